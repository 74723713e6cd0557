"""The pool of slots on the device: every layer's share, then the staging slots that all layers use in turn."""

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from jmoe.experts.residency import Residency, init_residency
from jmoe.experts.store import ExpertStore
from kernels_pallas.fetch.api import fetch


@dataclasses.dataclass(frozen=True, kw_only=True)
class SlotLayout:
    """How the pool [R, 3, F, D] is shared out: layer l owns `slots_per_layer` slots from `start(l)` on."""

    num_layers: int
    num_experts: int
    slots_per_layer: int
    num_staging: int

    @property
    def num_slots(self) -> int:
        return self.num_layers * self.slots_per_layer + self.num_staging

    @property
    def staging_start(self) -> int:
        return self.num_layers * self.slots_per_layer

    @property
    def all_resident(self) -> bool:
        return self.slots_per_layer == self.num_experts

    def start(self, moe_layer: int) -> int:
        return moe_layer * self.slots_per_layer


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class ExpertSlots:
    """The pool and what is in it. Donated from step to step."""

    pool: Float[Array, "R 3 F D"]
    residency: Residency


def init_slots(store: ExpertStore, layout: SlotLayout, *, implementation: str | None = None) -> ExpertSlots:
    """A pool whose slots hold the first experts of each layer, so that they may be used from the first token on."""
    fill = jax.jit(fetch, donate_argnums=1, static_argnames="implementation")
    shape = (layout.num_slots, *store.layers[0].shape[1:])
    pool = jnp.zeros(shape, store.layers[0].dtype)
    experts: Int[Array, " P"] = jnp.arange(layout.slots_per_layer, dtype=jnp.int32)
    count = jnp.asarray(layout.slots_per_layer, jnp.int32)
    for n, layer in enumerate(store.layers):
        pool = fill(layer, pool, experts, experts + layout.start(n), count, implementation=implementation)
    residency = init_residency(layout.num_layers, layout.num_experts, layout.slots_per_layer)
    return ExpertSlots(pool, residency)
