"""Which expert sits in which slot, as arrays on the device, and how that changes: `admit`.

Every layer owns its share of the slots, so the state of a layer is small and layers cannot push out each other's
experts (docs/design.md has the measurement). All of it is integer code with a plain-Python twin in the tests. Ranks
are found by comparing all with all instead of sorting: a layer has at most a few hundred slots, and XLA makes a few
small kernels of it where a sort is a dozen.
"""

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Int

NONE = -1
_NEVER = jnp.iinfo(jnp.int32).max


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class LayerResidency:
    """One layer: slot of each expert and expert of each slot (NONE if there is none), and when a slot was last used.

    Invariants: `slot_of` and `owner` are inverse to each other; slots are counted within the layer.
    """

    slot_of: Int[Array, " E"]
    owner: Int[Array, " S"]
    last_used: Int[Array, " S"]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Counters:
    """Distinct experts that steps asked for, one count a layer. hits + fetched + streamed = asked for."""

    hits: Int[Array, " L"]  # were resident
    fetched: Int[Array, " L"]  # were copied into a slot and stay
    streamed: Int[Array, " L"]  # were copied into a staging slot for this step only


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Residency:
    """All layers, stacked: `slot_of` [L, E], `owner` and `last_used` [L, S]; `clock` counts steps."""

    layers: LayerResidency
    clock: Int[Array, ""]
    decode: Counters
    prefill: Counters

    def layer(self, index: int) -> LayerResidency:
        return jax.tree.map(lambda stacked: stacked[index], self.layers)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class FetchPlan:
    """Copy store[expert_ids[i]] into slot slot_ids[i] for i < count. Entries beyond are 0."""

    expert_ids: Int[Array, " P"]
    slot_ids: Int[Array, " P"]
    count: Int[Array, ""]


Policy = Callable[[LayerResidency], Int[Array, " S"]]


def lru(layer: LayerResidency) -> Int[Array, " S"]:
    """Score of each slot, the smallest goes first. Least recently used: the time of last use, empty slots first."""
    return jnp.where(layer.owner == NONE, NONE, layer.last_used)


def init_residency(num_layers: int, num_experts: int, slots_per_layer: int) -> Residency:
    """Slot s of every layer holds expert s: what `fill_slots` puts there."""
    experts = jnp.arange(num_experts, dtype=jnp.int32)
    slots = jnp.arange(slots_per_layer, dtype=jnp.int32)

    def stack(row: Array) -> Array:
        return jnp.tile(row[None], (num_layers, 1))

    layers = LayerResidency(
        slot_of=stack(jnp.where(experts < slots_per_layer, experts, NONE)),
        owner=stack(jnp.where(slots < num_experts, slots, NONE)),
        last_used=stack(jnp.zeros_like(slots)),
    )
    return Residency(layers, jnp.zeros((), jnp.int32), init_counters(num_layers), init_counters(num_layers))


def init_counters(num_layers: int) -> Counters:
    return Counters(*(jnp.zeros((num_layers,), jnp.int32) for _ in range(3)))


def rank_of(keys: Int[Array, " n"]) -> Int[Array, " n"]:
    """Position of each element in the stable ascending order: argsort(argsort(keys))."""
    at = jnp.arange(keys.shape[0])
    before = (keys[None, :] < keys[:, None]) | ((keys[None, :] == keys[:, None]) & (at[None, :] < at[:, None]))
    return jnp.sum(before, axis=1, dtype=jnp.int32)


def count_before(flags: Bool[Array, " n"]) -> Int[Array, " n"]:
    """How many flags are set before each place: cumsum(flags) - flags."""
    at = jnp.arange(flags.shape[0])
    return jnp.sum(flags[None, :] & (at[None, :] < at[:, None]), axis=1, dtype=jnp.int32)


def select(choose: Bool[Array, "n m"], values: Int[Array, " m"]) -> Int[Array, " n"]:
    """The value that each row chooses; 0 for a row that chooses none. Rows choose one at most."""
    return jnp.sum(jnp.where(choose, values[None, :], 0), axis=1, dtype=jnp.int32)


def compact(flags: Bool[Array, " n"], size: int) -> Int[Array, " m"]:
    """Places of the set flags, ascending; `size` entries, 0 where no flag is left. nonzero(flags, size=size)."""
    entries, places = jnp.arange(size)[:, None], jnp.arange(flags.shape[0], dtype=jnp.int32)
    return select(flags[None, :] & (count_before(flags)[None, :] == entries), places)


def admit(
    layer: LayerResidency, needed: Bool[Array, " E"], clock: Int[Array, ""], plan_size: int, policy: Policy = lru
) -> tuple[LayerResidency, FetchPlan]:
    """Makes the needed experts resident if there are slots for all of them; else leaves the residents alone.

    Hits are touched. Misses take the slots that the policy scores lowest among those that this step does not need.
    When more experts are needed than there are slots, nothing is admitted: the caller streams the misses.

    Returns the layer afterwards and the plan that makes it true; `plan_size` bounds the misses of one step.
    """
    num_slots, num_experts = layer.owner.shape[0], layer.slot_of.shape[0]
    resident = layer.slot_of != NONE
    fits = jnp.sum(needed) <= num_slots
    admitted = needed & ~resident & fits  # [E]
    num_admitted = jnp.sum(admitted, dtype=jnp.int32)
    order = count_before(admitted)  # [E] place in the plan

    in_use = (layer.owner != NONE) & needed[jnp.maximum(layer.owner, 0)]  # [S]
    victim_rank = rank_of(jnp.where(in_use, _NEVER, policy(layer)))  # [S]
    taken = victim_rank < num_admitted
    gets = admitted[None, :] & (order[None, :] == victim_rank[:, None])  # [S, E] slot gets expert
    experts, slots = jnp.arange(num_experts, dtype=jnp.int32), jnp.arange(num_slots, dtype=jnp.int32)

    evicted = resident & taken[jnp.maximum(layer.slot_of, 0)]
    stays = jnp.where(evicted, NONE, layer.slot_of)
    after = LayerResidency(
        slot_of=jnp.where(admitted, select(gets.T, slots), stays),
        owner=jnp.where(taken, select(gets, experts), layer.owner),
        last_used=jnp.where(in_use | taken, clock, layer.last_used),
    )
    entries = jnp.arange(plan_size)[:, None]
    plan = FetchPlan(
        expert_ids=select(admitted[None, :] & (order[None, :] == entries), experts),
        slot_ids=select((victim_rank[None, :] == entries) & taken[None, :], slots),
        count=num_admitted,
    )
    return after, plan
