"""Inside a kernel: the groups that some row asks for, numbered in their order."""

import dataclasses
from typing import Any

import jax.numpy as jnp


@dataclasses.dataclass(frozen=True)
class AskedGroups:
    """Over references `asked` [G], not 0 where a row has a weight, and `slots` [G].

    Scalar code that every thread runs on its own: a scan of a few dozen numbers that are in its cache.
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
        """(group, slot) of the group with `rank` asked ones before it; group 0 if there is none."""
        seen = found = jnp.int32(0)
        for group in range(self.num_groups):
            asked = self._is_asked(group)
            found = jnp.where((asked == 1) & (seen == rank), jnp.int32(group), found)
            seen = seen + asked
        return found, self.slots[found]
