"""Which expert sits in which slot, as arrays on the device, and how that changes: `admit`.

Every layer owns its share of the slots, so the state of a layer is small and layers cannot push out each other's
experts (docs/design.md has the measurement). Which experts are worth keeping is a policy's to say
(`jmoe.experts.policies`), how they get their slots `kernels_pallas.admit`'s. All of this is integer code with a
plain-Python twin in the tests.
"""

import dataclasses
from collections.abc import Iterable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Int

from jmoe.experts.policies import DEFAULT_POLICY, POLICIES
from kernels_pallas.admit.reference import admit_needed
from kernels_pallas.admit.result import NONE


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
    """All layers. `clock` counts the steps that admitted.

    `tracked` is by name what policies remember, every leaf [L, ...]: of the one that decides, and of any that is only
    watched, for what it expects of the steps to come.

    Arrays for each layer: of a kernel whose operand is a row of a larger one XLA makes no part of a command buffer.
    """

    layers: tuple[LayerResidency, ...]
    tracked: dict[str, Any]
    clock: Int[Array, ""]
    decode: Counters
    prefill: Counters

    @property
    def stacked(self) -> LayerResidency:
        """`slot_of` [L, E] and `owner` [L, S]."""
        return jax.tree.map(lambda *rows: jnp.stack(rows), *self.layers)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class FetchPlan:
    """Copy store[expert_ids[i]] into slot slot_ids[i] for i < count. Entries beyond are 0."""

    expert_ids: Int[Array, " P"]
    slot_ids: Int[Array, " P"]
    count: Int[Array, ""]


def init_residency(
    num_layers: int,
    num_experts: int,
    slots_per_layer: int,
    policy: str = DEFAULT_POLICY,
    watched: Iterable[str] = (),
) -> Residency:
    """Slot s of every layer holds expert s: what `init_slots` puts there.

    `policy`, which decides, and those only `watched` are names of `POLICIES`.
    """
    experts = jnp.arange(num_experts, dtype=jnp.int32)
    slots = jnp.arange(slots_per_layer, dtype=jnp.int32)

    layers = tuple(
        LayerResidency(
            slot_of=jnp.where(experts < slots_per_layer, experts, NONE),
            owner=jnp.where(slots < num_experts, slots, NONE),
        )
        for _ in range(num_layers)
    )
    tracked = {name: POLICIES[name].start(num_layers, num_experts) for name in {policy, *watched}}
    return Residency(layers, tracked, jnp.zeros((), jnp.int32), init_counters(num_layers), init_counters(num_layers))


def init_counters(num_layers: int) -> Counters:
    return Counters(*(jnp.zeros((num_layers,), jnp.int32) for _ in range(3)))


def admit(
    layer: LayerResidency, needed: Bool[Array, " E"], value: Int[Array, " E"], max_needed: int
) -> tuple[LayerResidency, FetchPlan]:
    """What `kernels_pallas.admit` does to a layer and the plan for it, without the groups that multiply.

    `max_needed` bounds the experts of one step.
    """
    slot_of, owner, *plan = admit_needed(needed, value, layer.slot_of, layer.owner, max_needed)
    return LayerResidency(slot_of, owner), FetchPlan(*plan)
