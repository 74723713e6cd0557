"""`expert_mlp`: validates, then runs the best implementation here."""

from jaxtyping import Array, Float, Int

from kernels_pallas import backends
from kernels_pallas.expert_mlp import dense, reference

IMPLEMENTATIONS = {"reference": reference.expert_mlp, "dense": dense.expert_mlp}


def resolve(implementation: str | None) -> str:
    """The name of the implementation that runs for this request. Raises as `expert_mlp` does."""
    return backends.resolve("expert_mlp", IMPLEMENTATIONS, implementation)


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
    valid slot. Groups are summed in their order, so the same groups give the same bits wherever their weights lie.

    Raises ValueError for shapes that do not fit, NotImplementedError for an implementation that cannot run here.
    """
    if slots.ndim != 4 or slots.shape[1] != 3 or slots.shape[3] != x.shape[1]:
        raise ValueError(f"expert_mlp: slots {slots.shape} must be [R, 3, F, D] with D={x.shape[1]}, the width of x")
    if group_weights.shape != (group_slots.shape[0], x.shape[0]):
        raise ValueError(
            f"expert_mlp: group_weights {group_weights.shape} must be [G, T] = {(group_slots.shape[0], x.shape[0])}"
        )
    return IMPLEMENTATIONS[resolve(implementation)](x, slots, group_slots, group_weights)
