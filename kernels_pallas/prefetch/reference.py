"""The prefetch in plain JAX: whole experts, of which the first rows count. Any backend, and no clock."""

import jax
import jax.numpy as jnp

from kernels_pallas.prefetch.arrivals import NONE, Arrivals, share_out


def prefetch(store, expert_ids, count, num_rows, after=None):
    size = expert_ids.size
    named = jnp.arange(size) < count
    experts = [jax.lax.dynamic_index_in_dim(store, jnp.where(named, expert_ids, 0)[p]) for p in range(size)]
    weights = jnp.concatenate([jax.device_put(expert, jax.memory.Space.Device) for expert in experts])
    rows = share_out(count, num_rows, size, 3 * store.shape[2])
    return Arrivals(jnp.where(named, expert_ids, NONE), rows, weights)
