"""What a prefetch has brought."""

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

NONE = -1


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Arrivals:
    """P experts of one layer that are on the device, though in no slot: whole, or their beginnings.

    Expert `expert_ids[p]`, NONE for nobody, has come with the first `num_rows[p]` of its 3F rows of D values (gate, up,
    down); what `weights[p]` holds beyond them is anything. The experts are distinct.
    """

    expert_ids: Int[Array, " P"]
    num_rows: Int[Array, " P"]
    weights: Float[Array, "P 3 F D"]


def share_out(count: Int[Array, ""], num_rows: Int[Array, ""], size: int, rows_of_expert: int) -> Int[Array, " P"]:
    """How many rows of each of the first `count` of `size` experts come when `num_rows` do: one after the other."""
    place = jnp.arange(size, dtype=jnp.int32)
    rows = jnp.clip(num_rows - place * rows_of_expert, 0, rows_of_expert)
    return jnp.where(place < count, rows, 0)
