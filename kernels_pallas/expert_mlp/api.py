"""`expert_mlp`: validates, then runs the best implementation here."""

from jaxtyping import Array, Float, Int

from kernels_pallas import backends
from kernels_pallas.expert_mlp import dense, reference


def _mosaic_gpu(x, slots, group_slots, group_weights):
    from kernels_pallas.expert_mlp import mosaic_gpu  # importing Mosaic takes seconds, and a CPU needs none of it

    return mosaic_gpu.expert_mlp(x, slots, group_slots, group_weights)


IMPLEMENTATIONS = {"reference": reference.expert_mlp, "dense": dense.expert_mlp, "mosaic_gpu": _mosaic_gpu}


def resolve(implementation: str | None) -> str:
    """The name of the implementation that runs for this request. Raises as `expert_mlp` does."""
    return backends.resolve("expert_mlp", IMPLEMENTATIONS, implementation)


def choose(implementation: str | None, x, slots) -> str:
    """`resolve`, and for None the reference where the kernels cannot do these shapes. Raises as `expert_mlp` does."""
    name = resolve(implementation)
    if implementation is None and name == "mosaic_gpu":
        from kernels_pallas.expert_mlp import mosaic_gpu

        return "reference" if mosaic_gpu.problem(x, slots) else name
    return name


def expert_mlp(
    x: Float[Array, "T D"],
    slots: Float[Array, "R 3 F D"],
    group_slots: Int[Array, " G"],
    group_weights: Float[Array, "G T"],
    *,
    implementation: str | None = None,
) -> Float[Array, "T D"]:
    """Sum over groups g of group_weights[g, t] * swiglu(x[t], slots[group_slots[g]]), float32.

    swiglu(x, (gate, up, down)) = (silu(x @ gate.T) * (x @ up.T)) @ down: all three are rows of D. A group is the rows
    of one expert; a row that does not belong to it has weight 0, a group that nobody asks for has weights 0 and any
    valid slot, and its weights may stay unread. The order of all sums depends on the number of groups asked for and on
    shapes alone, so the same groups give the same bits wherever their weights lie.

    mosaic_gpu is the form for decode steps: up to 32 rows of 16 bit, or 4 of float32, where D is a multiple of 256 (see
    `mosaic_gpu.problem`); it has no gradient. For implementation=None other calls go to the reference.

    Raises ValueError for shapes that do not fit, NotImplementedError for an implementation that cannot run here or
    cannot do these shapes.
    """
    if slots.ndim != 4 or slots.shape[1] != 3 or slots.shape[3] != x.shape[1]:
        raise ValueError(f"expert_mlp: slots {slots.shape} must be [R, 3, F, D] with D={x.shape[1]}, the width of x")
    if group_weights.shape != (group_slots.shape[0], x.shape[0]):
        raise ValueError(
            f"expert_mlp: group_weights {group_weights.shape} must be [G, T] = {(group_slots.shape[0], x.shape[0])}"
        )
    return IMPLEMENTATIONS[choose(implementation, x, slots)](x, slots, group_slots, group_weights)
