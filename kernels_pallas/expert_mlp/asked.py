"""The groups that some row asks for, numbered in their order: found inside a kernel, or before it."""

import dataclasses
from typing import Any

import jax.numpy as jnp


@dataclasses.dataclass(frozen=True)
class AskedGroups:
    """Inside a kernel, over references `asked` [G], not 0 where a row has a weight, and `slots` [G].

    Scalar code that every thread runs on its own, for a few groups: no kernel before this one has to prepare a list.
    """

    asked: Any
    slots: Any
    num_groups: int

    def _is_asked(self, group: int):
        return (self.asked[group] != 0.0).astype(jnp.int32)

    def count(self):
        total = jnp.int32(0)
        for group in range(self.num_groups):
            total = total + self._is_asked(group)
        return total

    def at(self, rank):
        """(group, slot) of the group with `rank` asked ones before it; those of group 0 if there is none."""
        seen = found = jnp.int32(0)
        for group in range(self.num_groups):
            asked = self._is_asked(group)
            found = jnp.where((asked == 1) & (seen == rank), jnp.int32(group), found)
            seen = seen + asked
        return found, self.slots[found]


def asked_first(group_slots, group_weights):
    """Before a kernel: slots [G] and weights [G, T] of the groups asked for, in their order, then others; their number.

    Sums over comparisons of all with all, which are one small kernel, where sorting is many.
    """
    asked = jnp.any(group_weights != 0, axis=1)
    numbers = jnp.arange(asked.shape[0], dtype=jnp.int32)
    before = jnp.sum(asked[None, :] & (numbers[None, :] < numbers[:, None]), axis=1, dtype=jnp.int32)
    chosen = asked[None, :] & (before[None, :] == numbers[:, None])  # [place, group]
    groups, slots = (
        jnp.sum(jnp.where(chosen, part[None, :], 0), axis=1, dtype=jnp.int32) for part in (numbers, group_slots)
    )
    return slots, group_weights[groups], jnp.sum(asked, dtype=jnp.int32)
