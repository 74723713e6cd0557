"""`expert_mlp`: validates, then runs the best implementation here."""

from jaxtyping import Array, Float, Int

from kernels_pallas import backends
from kernels_pallas.expert_mlp import dense, reference


def _mosaic_gpu(x, slots, group_slots, group_weights, num_asked, max_groups_per_row):
    from kernels_pallas.expert_mlp import mosaic_gpu  # importing Mosaic takes seconds, and a CPU needs none of it

    groups = group_slots, group_weights, num_asked
    return mosaic_gpu.expert_mlp(x, slots, *groups, max_groups_per_row=max_groups_per_row)


def _of_all_rows(expert_mlp):
    """An implementation that multiplies every row with every group, whatever groups it is in."""
    return lambda x, slots, group_slots, group_weights, *_: expert_mlp(x, slots, group_slots, group_weights)


IMPLEMENTATIONS = {
    "reference": _of_all_rows(reference.expert_mlp),
    "dense": _of_all_rows(dense.expert_mlp),
    "mosaic_gpu": _mosaic_gpu,
}


def resolve(implementation: str | None) -> str:
    """The name of the implementation that runs for this request. Raises as `expert_mlp` does."""
    return backends.resolve("expert_mlp", IMPLEMENTATIONS, implementation)


def choose(implementation: str | None, x, slots) -> str:
    """`resolve`, and for None the reference where the kernels cannot do these shapes. Raises as `expert_mlp` does."""
    return backends.choose("expert_mlp", IMPLEMENTATIONS, implementation, lambda: _mosaic_gpu_problem(x, slots))


def _mosaic_gpu_problem(x, slots) -> str | None:
    from kernels_pallas.expert_mlp import mosaic_gpu

    return mosaic_gpu.problem(x, slots)


def expert_mlp(
    x: Float[Array, "T D"],
    slots: Float[Array, "R 3 F D"],
    group_slots: Int[Array, " G"],
    group_weights: Float[Array, "G T"],
    num_asked: Int[Array, ""] | None = None,
    *,
    max_groups_per_row: int | None = None,
    implementation: str | None = None,
) -> Float[Array, "T D"]:
    """Sum over groups g of group_weights[g, t] * swiglu(x[t], slots[group_slots[g]]), float32.

    swiglu(x, (gate, up, down)) = (silu(x @ gate.T) * (x @ up.T)) @ down: all three are rows of D. A group is the rows
    of one expert; a row that does not belong to it has weight 0, a group that nobody asks for has weights 0 and any
    slot, even one beyond the last, and its weights may stay unread. The order of all sums depends on the number of
    groups asked for and on shapes alone, so the same groups give the same bits wherever their weights lie.

    num_asked is the caller's word that the groups asked for are the first so many: else mosaic_gpu has to look for
    them, in kernels of its own, for 3 to 32 rows.

    max_groups_per_row is the caller's word that no row is in more groups than that (of a row that is, some may be left
    out); for more than 32 rows mosaic_gpu has lists and buffers for as many, where None means for all G.

    mosaic_gpu has forms for decode steps, up to 32 rows of 16 bit where D is a multiple of 128, or 4 of any dtype where
    it is one of 256, and one for prefill, any more rows of 16 bit where D and F are multiples of 64 (see
    `mosaic_gpu.problem`); it has no gradient. For implementation=None other calls go to the reference.

    Raises ValueError for shapes that do not fit or a max_groups_per_row below 1, NotImplementedError for an
    implementation that cannot run here or cannot do these shapes.
    """
    if slots.ndim != 4 or slots.shape[1] != 3 or slots.shape[3] != x.shape[1]:
        raise ValueError(f"expert_mlp: slots {slots.shape} must be [R, 3, F, D] with D={x.shape[1]}, the width of x")
    if group_weights.shape != (group_slots.shape[0], x.shape[0]):
        raise ValueError(
            f"expert_mlp: group_weights {group_weights.shape} must be [G, T] = {(group_slots.shape[0], x.shape[0])}"
        )
    if max_groups_per_row is not None and max_groups_per_row < 1:
        raise ValueError(
            f"expert_mlp: max_groups_per_row={max_groups_per_row} must be at least 1, or None for any number"
        )
    chosen = IMPLEMENTATIONS[choose(implementation, x, slots)]
    return chosen(x, slots, group_slots, group_weights, num_asked, max_groups_per_row)
