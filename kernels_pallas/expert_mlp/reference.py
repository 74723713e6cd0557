"""The expert MLP in jnp: a loop over the groups, or for a single row all groups at once."""

import jax
import jax.numpy as jnp


def expert_mlp(x, slots, group_slots, group_weights):
    form = _one_row if x.shape[0] == 1 else _many_rows
    return form(x, slots, group_slots, group_weights)


def _many_rows(x, slots, group_slots, group_weights):
    num_rows, width = x.shape
    num_hidden = slots.shape[2]

    def add_group(y, group):
        slot, weights = group
        gate_up_down = jax.lax.dynamic_index_in_dim(slots, slot, keepdims=False)  # [3, F, D]
        gate_up = _dot(x, gate_up_down[:2].reshape(2 * num_hidden, width), 1)  # [T, 2F]
        hidden = jax.nn.silu(gate_up[:, :num_hidden]) * gate_up[:, num_hidden:]
        return y + weights[:, None] * _dot(hidden.astype(x.dtype), gate_up_down[2], 0), None

    y, _ = jax.lax.scan(add_group, jnp.zeros((num_rows, width), jnp.float32), (group_slots, group_weights))
    return y


def _dot(x, kernel, contracted: int):
    return jax.lax.dot_general(x, kernel, (((1,), (contracted,)), ((), ())), preferred_element_type=jnp.float32)


def _one_row(x, slots, group_slots, group_weights):
    """Products and sums instead of dots: XLA fuses the gather of the slots into the sum, so weights are read once.

    The barrier keeps the computation of the slots out of that fusion, where every thread would do it again, and the
    gather does not check its bounds: both would stand between a thread and its next weights.
    """
    at = jax.lax.optimization_barrier(group_slots)
    gate_up_down = slots.at[at].get(mode="promise_in_bounds").astype(jnp.float32)  # [G, 3, F, D], never materialised
    gate_up = jnp.sum(gate_up_down[:, :2] * x[0].astype(jnp.float32).reshape(1, 1, 1, -1), axis=-1)  # [G, 2, F]
    hidden = jax.nn.silu(gate_up[:, 0]) * gate_up[:, 1] * group_weights  # [G, F]
    return jnp.sum(gate_up_down[:, 2] * hidden[:, :, None], axis=(0, 1))[None]  # [1, D]
