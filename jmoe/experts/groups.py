"""The rows of a layer by the experts that they go to, and what these make of them."""

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from jmoe.experts.residency import NONE
from jmoe.model.router import Routing
from kernels_pallas.admit import reference as grouping
from kernels_pallas.admit.result import Admitted
from kernels_pallas.expert_mlp.api import expert_mlp


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Groups:
    """The distinct experts of a routing, ascending, each with the weight of every row; then some that weigh nothing.

    No row is in more than `per_row` groups, and `count` groups have a row, if that is known.
    """

    expert_ids: Int[Array, " G"]
    weights: Float[Array, "G T"]
    per_row: int = dataclasses.field(metadata={"static": True})
    count: Int[Array, ""] | None = None

    @classmethod
    def of(cls, admitted: Admitted, per_row: int) -> "Groups":
        return cls(admitted.group_experts, admitted.group_weights, per_row, admitted.num_used)

    def only(self, chosen: Bool[Array, " G"], size: int) -> "Groups":
        """The chosen groups, at most `size` of them, in their order."""
        at, count = grouping.compact(chosen, size), jnp.sum(chosen, dtype=jnp.int32)
        kept = jnp.arange(size) < count
        expert_ids, weights = jnp.where(kept, self.expert_ids[at], NONE), self.weights[at]
        return Groups(expert_ids, jnp.where(kept[:, None], weights, 0.0), self.per_row, count)


def tokens_of_experts(expert_ids: Int[Array, "*L T A"], num_experts: int) -> Int[Array, "*L E"]:
    """How many tokens go to each expert."""
    experts, chosen = jnp.arange(num_experts, dtype=jnp.int32), expert_ids.reshape(*expert_ids.shape[:-2], 1, -1)
    return jnp.sum(chosen == experts.reshape(*(1,) * (expert_ids.ndim - 2), -1, 1), axis=-1, dtype=jnp.int32)


def group_by_expert(routing: Routing, num_experts: int) -> Groups:
    """G is the most that can be needed: every row's experts, or all there are.

    What one token chose is groups already, as it is; where it is no token, their number is E, and they weigh nothing.
    """
    num_rows, per_row = routing.expert_ids.shape
    if num_rows == 1:
        return Groups(routing.expert_ids[0], routing.combine_weights.T, per_row)
    needed = tokens_of_experts(routing.expert_ids, num_experts) > 0
    num_groups = min(routing.expert_ids.size, num_experts)
    expert_ids, weights = grouping.group(routing.expert_ids, routing.combine_weights, needed, num_groups)
    return Groups(jnp.maximum(expert_ids, 0), weights, per_row, jnp.sum(needed, dtype=jnp.int32))


def multiply(x: Float[Array, "T D"], slots, at: Int[Array, " G"], groups: Groups, implementation: str | None):
    """Each row with its groups, whose experts lie in the slots `at`: [T, D], float32."""
    with jax.named_scope("experts"):
        named = at, groups.weights, groups.count
        return expert_mlp(x, slots, *named, max_groups_per_row=groups.per_row, implementation=implementation)
