"""Which expert sits in which slot, as arrays on the device, and how that changes: `admit`.

Every layer owns its share of the slots, so the state of a layer is small and layers cannot push out each other's
experts (docs/design.md has the measurement). Which experts are worth keeping is a policy's to say
(`jmoe.experts.policies`). All of this is integer code with a plain-Python twin in the tests. Ranks are found by
comparing all with all instead of sorting: a layer has at most a few hundred slots, and XLA makes a few small kernels of
it where a sort is a dozen.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Int

from jmoe.experts.policies import DEFAULT_POLICY, POLICIES

NONE = -1
_NEVER, _FIRST = jnp.iinfo(jnp.int32).max, jnp.iinfo(jnp.int32).min


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class LayerResidency:
    """One layer: slot of each expert and expert of each slot (NONE if there is none).

    Invariants: the two are inverse to each other; slots are counted within the layer.
    """

    slot_of: Int[Array, " E"]
    owner: Int[Array, " S"]


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
    """All layers, stacked: `slot_of` [L, E], `owner` [L, S]. `clock` counts the steps that admitted.

    `tracked` is what the policy remembers, every leaf [L, ...].
    """

    layers: LayerResidency
    tracked: Any
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


def init_residency(num_layers: int, num_experts: int, slots_per_layer: int, policy: str = DEFAULT_POLICY) -> Residency:
    """Slot s of every layer holds expert s: what `init_slots` puts there. `policy` is a name of `POLICIES`."""
    experts = jnp.arange(num_experts, dtype=jnp.int32)
    slots = jnp.arange(slots_per_layer, dtype=jnp.int32)

    def stack(row: Array) -> Array:
        return jnp.tile(row[None], (num_layers, 1))

    layers = LayerResidency(
        slot_of=stack(jnp.where(experts < slots_per_layer, experts, NONE)),
        owner=stack(jnp.where(slots < num_experts, slots, NONE)),
    )
    tracked = POLICIES[policy].start(num_layers, num_experts)
    return Residency(layers, tracked, jnp.zeros((), jnp.int32), init_counters(num_layers), init_counters(num_layers))


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
    layer: LayerResidency, needed: Bool[Array, " E"], value: Int[Array, " E"], max_needed: int
) -> tuple[LayerResidency, FetchPlan]:
    """Makes the needed experts resident, in the place of the residents of the least value among the others.

    `value` says how much keeping each expert is worth, more for more, between -2**31 and 2**31 - 1 exclusive;
    `max_needed` bounds the experts of one step. When more are needed than there are slots, an expert is admitted only
    if it is worth more than the one it replaces, and the caller streams what was not admitted: so a step that is too
    large does not wash out what is worth keeping. An expert that is needed is never replaced.

    Returns the layer afterwards and the plan that makes it true.
    """
    num_slots, num_experts = layer.owner.shape[0], layer.slot_of.shape[0]
    resident, here = layer.slot_of != NONE, jnp.maximum(layer.owner, 0)
    missing = needed & ~resident  # [E]
    in_use = (layer.owner != NONE) & needed[here]  # [S]
    kept_value = jnp.where(layer.owner == NONE, _FIRST, value[here])
    victim_rank = rank_of(jnp.where(in_use, _NEVER, kept_value))  # [S]
    order = rank_of(jnp.where(missing, ~value, _NEVER))  # [E] place in the plan; ~: the most valuable first
    gets = missing[None, :] & (order[None, :] == victim_rank[:, None])  # [S, E] slot gets expert
    admitted, taken = missing, victim_rank < jnp.sum(missing)
    if max_needed > num_slots:
        is_worth = (value[None, :] > kept_value[:, None]) & ~in_use[:, None]
        gets &= is_worth | (jnp.sum(needed) <= num_slots)
        admitted, taken = jnp.any(gets, axis=0), jnp.any(gets, axis=1)

    experts, slots = jnp.arange(num_experts, dtype=jnp.int32), jnp.arange(num_slots, dtype=jnp.int32)
    evicted = resident & taken[jnp.maximum(layer.slot_of, 0)]
    after = LayerResidency(
        slot_of=jnp.where(admitted, select(gets.T, slots), jnp.where(evicted, NONE, layer.slot_of)),
        owner=jnp.where(taken, select(gets, experts), layer.owner),
    )
    entries = jnp.arange(min(max_needed, num_slots))[:, None]
    plan = FetchPlan(
        expert_ids=select(admitted[None, :] & (order[None, :] == entries), experts),
        slot_ids=select(taken[None, :] & (victim_rank[None, :] == entries), slots),
        count=jnp.sum(admitted, dtype=jnp.int32),
    )
    return after, plan
