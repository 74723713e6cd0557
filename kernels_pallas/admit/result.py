"""What an admission decides."""

import dataclasses

import jax
from jaxtyping import Array, Float, Int

NONE = -1


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Admitted:
    """The groups that multiply, the residency afterwards, and the plan that makes it true.

    Group g is expert `group_experts[g]`, ascending, NONE where no expert is left; `group_slots[g]` is where it lies,
    some slot if it lies nowhere; `group_weights[g, t]` what it weighs for row t; `group_fetched[g]` is 1 if it was not
    there before, and 0 otherwise. The plan, which brings those, copies expert `plan_experts[i]` into slot
    `plan_slots[i]` for i < `count`; entries beyond are 0. `num_used` experts are used: the groups that have one;
    `num_hits` of them were there before. `known_at` is when all this was known, by `kernels_pallas.clock`: None where
    there is no clock.
    """

    group_experts: Int[Array, " G"]
    group_slots: Int[Array, " G"]
    group_weights: Float[Array, "G T"]
    group_fetched: Int[Array, " G"]
    slot_of: Int[Array, " E"]
    owner: Int[Array, " S"]
    plan_experts: Int[Array, " P"]
    plan_slots: Int[Array, " P"]
    count: Int[Array, ""]
    num_used: Int[Array, ""]
    num_hits: Int[Array, ""]
    known_at: Int[Array, ""] | None = None
