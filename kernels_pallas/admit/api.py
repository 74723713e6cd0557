"""`admit`: validates, then runs the best implementation here."""

from jaxtyping import Array, Float, Int

from kernels_pallas import backends
from kernels_pallas.admit import reference
from kernels_pallas.admit.result import Admitted


def _mosaic_gpu(*arrays):
    from kernels_pallas.admit import mosaic_gpu  # importing Mosaic takes seconds, and a CPU needs none of it

    return mosaic_gpu.admit(*arrays)


IMPLEMENTATIONS = {"reference": reference.admit, "mosaic_gpu": _mosaic_gpu}


def resolve(implementation: str | None) -> str:
    """The name of the implementation that runs for this request. Raises as `admit` does."""
    return backends.resolve("admit", IMPLEMENTATIONS, implementation)


def choose(implementation: str | None, expert_ids, slot_of) -> str:
    """`resolve`, and for None the reference where the kernel cannot do these shapes. Raises as `admit` does."""
    return backends.choose("admit", IMPLEMENTATIONS, implementation, lambda: _mosaic_gpu_problem(expert_ids, slot_of))


def _mosaic_gpu_problem(expert_ids, slot_of) -> str | None:
    from kernels_pallas.admit import mosaic_gpu

    return mosaic_gpu.problem(expert_ids, slot_of)


def admit(
    expert_ids: Int[Array, "T A"],
    combine_weights: Float[Array, "T A"],
    used: Int[Array, " E"],
    value: Int[Array, " E"] | None,
    slot_of: Int[Array, " E"],
    owner: Int[Array, " S"],
    *,
    implementation: str | None = None,
) -> Admitted:
    """Makes the used experts of a layer resident, in the place of the residents of the least value among the others.

    `expert_ids` in [0, E), or E for no expert; an expert that a row chooses twice weighs the sum for it. `used` counts
    the rows of each expert. `slot_of` and `owner` say which expert lies in which slot (NONE: in none, nobody), and are
    inverse to each other. `value` says how much keeping each expert is worth, more for more, between -2**31 and 2**31 -
    1 exclusive; without it nothing changes its slot, and the plan is empty. When more are needed than there are slots,
    an expert is admitted only if it is worth more than the one it replaces: so a step that is too large does not wash
    out what is worth keeping. An expert that is needed is never replaced.

    Of a step's groups there are G = min(T * A, E), of entries in its plan P = min(G, S), or none without values.

    Raises ValueError for shapes that do not fit, NotImplementedError for an implementation that cannot run here or
    cannot do these shapes.
    """
    experts = {"used": used, "slot_of": slot_of} | ({} if value is None else {"value": value})
    for name, array in experts.items():
        if array.shape != slot_of.shape or array.ndim != 1:
            raise ValueError(f"admit: {name} {array.shape} must have one entry for each expert, [E]={slot_of.shape}")
    if expert_ids.ndim != 2 or expert_ids.shape != combine_weights.shape:
        raise ValueError(
            f"admit: expert_ids {expert_ids.shape} and combine_weights {combine_weights.shape} must both be [T, A]"
        )
    run = IMPLEMENTATIONS[choose(implementation, expert_ids, slot_of)]
    return run(expert_ids, combine_weights, used, value, slot_of, owner)
