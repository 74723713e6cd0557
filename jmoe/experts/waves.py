"""A layer that needs more experts than it has slots: the others stream through the staging slots, wave by wave."""

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from jmoe.experts.groups import Groups, multiply
from jmoe.experts.residency import NONE, LayerResidency
from kernels_pallas.fetch.api import fetch

Halves = tuple[Float[Array, "W 3 F D"], ...]  # of the staging slots


def multiply_in_waves(
    x: Float[Array, "T D"],
    store: Float[Array, "E 3 F D"],
    slots: Float[Array, "S 3 F D"],
    staging: Halves,
    groups: Groups,
    layer: LayerResidency,
    *,
    after: Array | None,
    implementation: str | None,
) -> tuple[Float[Array, "T D"], Halves]:
    """Residents where they are, while the first wave of the others comes; each wave while the next one comes.

    The first wave begins to come when `after` is computed, if that is given. A turn of the loop is two waves, so that
    each half of the staging slots is an array that is changed in place. In a program with
    `kernels_pallas.prefetch.api.COMPILER_OPTIONS` a GPU copies and multiplies at the same time.
    """
    asked = groups.expert_ids != NONE
    resident = asked & (layer.slot_of[jnp.maximum(groups.expert_ids, 0)] != NONE)
    even, odd = staging
    waves = Waves.of(store, groups, asked & ~resident, even.shape[0], implementation)
    even = waves.fetch(0, even, after)
    here = groups.only(resident, min(asked.size, slots.shape[0]))
    y = multiply(x, slots, _slots_of(layer, here.expert_ids), here, implementation)

    def two_waves(turn, state):
        y, even, odd = state
        odd = waves.fetch(2 * turn + 1, odd)
        y = waves.add(y, x, 2 * turn, even)
        even = waves.fetch(2 * turn + 2, even, after=y[:1, :1])
        return waves.add(y, x, 2 * turn + 1, odd), even, odd

    y, even, odd = jax.lax.fori_loop(0, -(-waves.num_groups // (2 * waves.size)), two_waves, (y, even, odd))
    return y, (even, odd)


@dataclasses.dataclass(frozen=True)
class Waves:
    """Groups whose experts have no slot, as many as their `count` says, `size` of them at a time."""

    store: Float[Array, "E 3 F D"]
    groups: Groups
    size: int
    implementation: str | None

    @staticmethod
    def of(store, groups: Groups, missing: Bool[Array, " G"], size: int, implementation: str | None) -> "Waves":
        away = groups.only(missing, missing.size + -missing.size % (2 * size))  # whole pairs of waves
        return Waves(store, away, size, implementation)

    @property
    def num_groups(self) -> Int[Array, ""]:
        assert self.groups.count is not None  # `only` says it
        return self.groups.count

    def count_of(self, wave: Int[Array, ""] | int) -> Int[Array, ""]:
        return jnp.clip(self.num_groups - wave * self.size, 0, self.size)

    def fetch(self, wave: Int[Array, ""] | int, onto: Float[Array, "W 3 F D"], after: Array | None = None):
        """The experts of a wave in the first of these slots; nothing, if there is no such wave."""
        expert_ids = jax.lax.dynamic_slice_in_dim(self.groups.expert_ids, wave * self.size, self.size)
        copies = expert_ids, jnp.arange(self.size, dtype=jnp.int32), self.count_of(wave)
        with jax.named_scope("fetch"):
            return fetch(self.store, onto, *copies, after=after, implementation=self.implementation)

    def add(self, y: Float[Array, "T D"], x, wave: Int[Array, ""], experts: Float[Array, "W 3 F D"]):
        """y, and what the experts of a wave make of x.

        After all that makes y: XLA would as soon begin with the last wave to come, and let its temporaries lie where
        those of the others do.
        """
        y, x = jax.lax.optimization_barrier((y, x))
        groups, places, count = self.groups, jnp.arange(self.size, dtype=jnp.int32), self.count_of(wave)
        weights = jax.lax.dynamic_slice_in_dim(groups.weights, wave * self.size, self.size)
        come = jnp.where(places < count, places, 0)  # what no expert came to is not read
        comers = Groups(groups.expert_ids, weights, groups.per_row, count)
        more = multiply(x, experts, come, comers, self.implementation)
        return jnp.where(count > 0, y + more, y)  # for a wave of nobody nothing may ever have come


def _slots_of(layer: LayerResidency, expert_ids: Int[Array, " G"]) -> Int[Array, " G"]:
    """Slot of each expert; some slot for those that have none."""
    return jnp.maximum(layer.slot_of[jnp.maximum(expert_ids, 0)], 0)
