"""The slots on the device: each layer's own, and the staging slots that all layers use in turn."""

import dataclasses
import functools
from collections.abc import Iterable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from jmoe.experts.policies import DEFAULT_POLICY
from jmoe.experts.residency import Residency, init_residency
from jmoe.experts.store import ExpertStore
from kernels_pallas.fetch.api import fetch


@dataclasses.dataclass(frozen=True, kw_only=True)
class SlotLayout:
    """How many slots there are: `slots_per_layer` for each MoE layer.

    What a layer needs and has no slot for streams in waves of `num_staging` experts, one of which is multiplied with
    while the next one comes: so there are twice as many staging slots, which all layers use in turn.
    """

    num_layers: int
    num_experts: int
    slots_per_layer: int
    num_staging: int

    @property
    def all_resident(self) -> bool:
        return self.slots_per_layer == self.num_experts

    def overflows(self, num_choices: int) -> bool:
        """Whether a layer of which so many choices are made may need more experts than it has slots."""
        return min(num_choices, self.num_experts) > self.slots_per_layer


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class ExpertSlots:
    """The slots and what is in them. Donated from step to step.

    An array for each layer: XLA computes addresses in 32 bits, and faster, where an array has less than 2**31 elements.
    And one for each half of the staging slots, so that one may be changed while the other is read.
    """

    layers: tuple[Float[Array, "S 3 F D"], ...]
    staging: tuple[Float[Array, "W 3 F D"], ...]
    residency: Residency

    def is_deleted(self) -> bool:
        """Whether a step has taken them and not given them back."""
        return any(leaf.is_deleted() for leaf in jax.tree.leaves(self))


def init_slots(
    store: ExpertStore,
    layout: SlotLayout,
    *,
    implementation: str | None = None,
    policy: str = DEFAULT_POLICY,
    watched: Iterable[str] = (),
) -> ExpertSlots:
    """Slots that hold the first experts of each layer, so that they may be used from the first token on.

    What `policy`, and those that are only `watched`, remember begins afresh.
    """
    experts: Int[Array, " P"] = jnp.arange(layout.slots_per_layer, dtype=jnp.int32)
    fill = jax.jit(functools.partial(fetch, implementation=implementation), donate_argnums=1)

    def empty(size: int) -> Float[Array, "R 3 F D"]:
        return jnp.zeros((size, *store.layers[0].shape[1:]), store.layers[0].dtype)

    def filled(layer: Float[Array, "E 3 F D"]) -> Float[Array, "S 3 F D"]:
        return fill(layer, empty(layout.slots_per_layer), experts, experts, jnp.asarray(experts.size))

    return ExpertSlots(
        layers=tuple(filled(layer) for layer in store.layers),
        staging=(empty(layout.num_staging), empty(layout.num_staging)),
        residency=init_residency(layout.num_layers, layout.num_experts, layout.slots_per_layer, policy, watched),
    )
