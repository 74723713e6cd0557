"""What training makes small. All in float32, means over tokens."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jmoe.model.router import Routing


def load_balancing_loss(routing: Routing) -> Float[Array, ""]:
    """E · Σₑ fₑ · pₑ: f the share of the choices that fell on e, p its mean probability (arXiv 2101.03961, eq. 4).

    1 when all experts are used alike, E when one has all. Only p has a gradient.
    """
    num_experts = routing.logits.shape[-1]
    chosen = jax.nn.one_hot(routing.expert_ids, num_experts, dtype=jnp.float32)  # [T, A, E]
    share = jnp.mean(chosen, axis=(0, 1))
    return num_experts * jnp.sum(share * jnp.mean(jax.nn.softmax(routing.logits, axis=-1), axis=0))


def router_z_loss(routing: Routing) -> Float[Array, ""]:
    """mean(logsumexp(logits)²), which keeps the router's logits small (arXiv 2202.08906, eq. 5)."""
    return jnp.mean(jax.nn.logsumexp(routing.logits, axis=-1) ** 2)
