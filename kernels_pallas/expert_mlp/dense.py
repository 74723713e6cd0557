"""The expert MLP as two matrix products over all groups at once: for training, where most experts have rows anyway.

It copies the weights of the groups out of their slots and keeps 2 G F hidden values a row, so it is for small experts;
in return it is differentiable at the speed of a dense layer, in every argument but `group_slots`.
"""

import jax
import jax.numpy as jnp


def expert_mlp(x, slots, group_slots, group_weights):
    gate_up_down = slots[group_slots]  # [G, 3, F, D]
    hidden = [jnp.einsum("td,gfd->tgf", x, gate_up_down[:, part]) for part in (0, 1)]
    weighted = jax.nn.silu(hidden[0]) * hidden[1] * group_weights.T[:, :, None].astype(x.dtype)  # [T, G, F]
    return jnp.einsum("tgf,gfd->td", weighted, gate_up_down[:, 2], preferred_element_type=jnp.float32)
