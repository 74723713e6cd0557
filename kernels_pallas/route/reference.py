"""Routing in plain JAX. Any backend; has a gradient."""

import jax
import jax.numpy as jnp

LEAST_WEIGHT = float(jnp.finfo(jnp.float32).tiny)  # of an expert that is chosen


def route(logits, valid, *, num_chosen: int, normalize: bool):
    weights, expert_ids = jax.lax.top_k(jax.nn.softmax(logits, axis=-1), num_chosen)
    order = jnp.argsort(expert_ids, axis=-1)
    weights, expert_ids = (jnp.take_along_axis(each, order, axis=-1) for each in (weights, expert_ids))
    if normalize:
        weights = weights / jnp.sum(weights, axis=-1, keepdims=True)
    keep, weights = valid[:, None], jnp.maximum(weights, LEAST_WEIGHT)
    return jnp.where(keep, expert_ids.astype(jnp.int32), logits.shape[1]), jnp.where(keep, weights, 0.0)
