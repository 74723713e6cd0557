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

    `came_at`, None where there is no clock, says when each of n equal parts of an expert had come, by
    `kernels_pallas.clock`. Of parts in which none of the first rows lies it is anything.
    """

    expert_ids: Int[Array, " P"]
    num_rows: Int[Array, " P"]
    weights: Float[Array, "P 3 F D"]
    came_at: Int[Array, "P n"] | None = None


def share_out(num_rows: Int[Array, ""], size: int, rows_of_expert: int) -> Int[Array, " P"]:
    """How many rows of each of `size` experts come when `num_rows` do: the first comes whole before the next begins."""
    return jnp.clip(num_rows - jnp.arange(size, dtype=jnp.int32) * rows_of_expert, 0, rows_of_expert)


def entry_of(arrivals: Arrivals, expert, end_row):
    """The entry that has come with an expert's rows up to `end_row`, NONE if none has. Also inside kernels, of refs."""
    found = jnp.int32(NONE)
    for entry in range(arrivals.expert_ids.shape[0]):
        here = (arrivals.expert_ids[entry] == expert) & (end_row <= arrivals.num_rows[entry])
        found = jnp.where(here, jnp.int32(entry), found)
    return found


def problem(arrivals: Arrivals, slots: Float[Array, "R 3 F D"]) -> str | None:
    """Why these cannot have come for such slots, or None. Takes anything that has their shapes and dtypes."""
    weights, size = arrivals.weights, arrivals.expert_ids.shape
    if weights.shape[1:] != slots.shape[1:] or weights.dtype != slots.dtype:
        return (
            f"arrivals {weights.dtype}{list(weights.shape)} and slots {slots.dtype}{list(slots.shape)} must hold "
            "experts of one shape and dtype"
        )
    if size != arrivals.num_rows.shape or size != weights.shape[:1]:
        return (
            f"arrivals of expert_ids {size}, num_rows {arrivals.num_rows.shape} and weights {weights.shape} must be P"
        )
    return None
