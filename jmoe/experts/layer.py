"""The seam: a routing becomes experts that can be multiplied with. route → admit → fetch → expert_mlp → combine.

Both kinds of experts here fit `jmoe.model.decoder.MoE`. `ResidentExperts` is the reference: everything on the device.
`OffloadedExperts` brings in what its routers ask for. They share the grouping, so that they add up the same numbers in
the same order.
"""

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from jmoe.experts.residency import (
    NONE,
    Counters,
    FetchPlan,
    LayerResidency,
    Residency,
    admit,
    count_before,
    select,
)
from jmoe.experts.slots import ExpertSlots, SlotLayout
from jmoe.experts.store import ExpertStore
from jmoe.model.router import Routing
from kernels_pallas.expert_mlp.api import expert_mlp
from kernels_pallas.fetch.api import fetch


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Groups:
    """The distinct experts of a routing, ascending, each with the weight of every row. NONE fills up the list."""

    expert_ids: Int[Array, " G"]
    weights: Float[Array, "G T"]


def needed_experts(routing: Routing, num_experts: int) -> Bool[Array, " E"]:
    experts = jnp.arange(num_experts, dtype=jnp.int32)
    return jnp.any(routing.expert_ids.reshape(-1)[None, :] == experts[:, None], axis=1)


def group_by_expert(routing: Routing, needed: Bool[Array, " E"]) -> Groups:
    """G is the most that can be needed: every row's experts, or all there are."""
    num_experts = needed.shape[0]
    num_groups = min(routing.expert_ids.size, num_experts)
    experts = jnp.arange(num_experts, dtype=jnp.int32)
    mine = needed[None, :] & (count_before(needed)[None, :] == jnp.arange(num_groups)[:, None])  # [G, E]
    expert_ids = select(mine, experts + 1) - 1  # NONE where no expert is left
    routed = routing.expert_ids[None] == expert_ids[:, None, None]  # [G, T, A]
    weights = jnp.sum(jnp.where(routed, routing.combine_weights[None], 0.0), axis=-1)
    return Groups(expert_ids, weights)


@dataclasses.dataclass(frozen=True)
class ResidentExperts:
    """All experts on the device, one array a layer; nothing is fetched, and slots are handed on as they are."""

    layers: tuple[Float[Array, "E 3 F D"], ...]
    slots: ExpertSlots | None = None
    implementation: str | None = None

    def start(self) -> ExpertSlots | None:
        return self.slots

    def finish(self, carry: ExpertSlots) -> ExpertSlots:
        return carry

    def __call__(self, moe_layer: int, x: Float[Array, "T D"], routing: Routing, carry: ExpertSlots | None):
        weights = self.layers[moe_layer]
        with jax.named_scope("experts"):
            groups = group_by_expert(routing, needed_experts(routing, weights.shape[0]))
            at = jnp.maximum(groups.expert_ids, 0)
            y = expert_mlp(x, weights, at, groups.weights, implementation=self.implementation)
        return y.astype(x.dtype), carry


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Progress:
    """What the layers done so far have made of the pool and of their residency."""

    pool: Float[Array, "R 3 F D"]
    layers: tuple[LayerResidency, ...] = ()
    counts: tuple[tuple[Array, Array, Array], ...] = ()


@dataclasses.dataclass(frozen=True)
class OffloadedExperts:
    """Experts in the store, used from the slots.

    Decode steps (`admits`) make their misses resident. Prefill does not: it uses what is resident where it is and
    streams the rest through the staging slots, so that the decode set survives it.
    """

    store: ExpertStore
    slots: ExpertSlots
    layout: SlotLayout
    admits: bool
    implementation: str | None = None

    @property
    def residency(self) -> Residency:
        return self.slots.residency

    def start(self) -> Progress:
        return Progress(self.slots.pool)

    def finish(self, progress: Progress) -> ExpertSlots:
        """The state after the step: layers stacked again, counters and clock advanced."""
        layers = jax.tree.map(lambda *rows: jnp.stack(rows), *progress.layers)
        counts = [jnp.stack(column) for column in zip(*progress.counts, strict=True)]
        kind = "decode" if self.admits else "prefill"
        counters = jax.tree.map(jnp.add, getattr(self.residency, kind), Counters(*counts))
        residency = dataclasses.replace(
            self.residency, layers=layers, clock=self.residency.clock + 1, **{kind: counters}
        )
        return ExpertSlots(progress.pool, residency)

    def __call__(self, moe_layer: int, x: Float[Array, "T D"], routing: Routing, carry: Progress):
        before = self.residency.layer(moe_layer)
        with jax.named_scope("admit"):
            needed = needed_experts(routing, self.layout.num_experts)
            groups = group_by_expert(routing, needed)
            after, plan = self._admit(before, needed, groups)
        pool = carry.pool if plan is None else self._fetch(moe_layer, carry.pool, plan, self.layout.start(moe_layer))
        if groups.expert_ids.shape[0] <= self.layout.slots_per_layer and (self.admits or self.layout.all_resident):
            with jax.named_scope("experts"):
                at = self._slots(moe_layer, after, groups.expert_ids)
                y = expert_mlp(x, pool, at, groups.weights, implementation=self.implementation)
        else:
            y, pool = self._in_waves(moe_layer, x, groups, after, pool)
        counts = self._counts(needed, before, plan)
        return y.astype(x.dtype), Progress(pool, (*carry.layers, after), (*carry.counts, counts))

    def _admit(self, before: LayerResidency, needed, groups: Groups) -> tuple[LayerResidency, FetchPlan | None]:
        if self.layout.all_resident or not self.admits:
            return before, None
        plan_size = min(groups.expert_ids.shape[0], self.layout.slots_per_layer)
        return admit(before, needed, self.residency.clock, plan_size)

    def _fetch(self, moe_layer: int, pool, plan: FetchPlan, start: int):
        with jax.named_scope("fetch"):
            layer = self.store.layers[moe_layer]
            at = plan.slot_ids + start
            return fetch(layer, pool, plan.expert_ids, at, plan.count, implementation=self.implementation)

    def _slots(self, moe_layer: int, layer: LayerResidency, expert_ids: Int[Array, " G"]) -> Int[Array, " G"]:
        """Slot of each expert in the pool; some slot of the layer for those that have none."""
        return jnp.maximum(layer.slot_of[jnp.maximum(expert_ids, 0)], 0) + self.layout.start(moe_layer)

    def _in_waves(self, moe_layer: int, x, groups: Groups, layer: LayerResidency, pool):
        """The groups in order, `num_staging` at a time; those that are not resident come through the staging slots."""
        size = self.layout.num_staging
        num_waves = -(-jnp.sum(groups.expert_ids != NONE, dtype=jnp.int32) // size)
        padding = -groups.expert_ids.shape[0] % size
        expert_ids = jnp.pad(groups.expert_ids, (0, padding), constant_values=NONE)
        weights = jnp.pad(groups.weights, ((0, padding), (0, 0)))

        def wave(n, state):
            y, pool = state
            mine = jax.lax.dynamic_slice_in_dim(expert_ids, n * size, size)
            missing = (mine != NONE) & (layer.slot_of[jnp.maximum(mine, 0)] == NONE)
            pool = self._fetch(moe_layer, pool, staging_plan(mine, missing), self.layout.staging_start)
            with jax.named_scope("experts"):
                staged = self.layout.staging_start + jnp.arange(size, dtype=jnp.int32)
                at = jnp.where(missing, staged, self._slots(moe_layer, layer, mine))
                part = jax.lax.dynamic_slice_in_dim(weights, n * size, size)
                return y + expert_mlp(x, pool, at, part, implementation=self.implementation), pool

        return jax.lax.fori_loop(0, num_waves, wave, (jnp.zeros(x.shape, jnp.float32), pool))

    def _counts(self, needed, before: LayerResidency, plan: FetchPlan | None) -> tuple[Array, Array, Array]:
        hits = jnp.sum(needed & (before.slot_of != NONE), dtype=jnp.int32)
        fetched = jnp.zeros((), jnp.int32) if plan is None else plan.count
        return hits, fetched, jnp.sum(needed, dtype=jnp.int32) - hits - fetched


def staging_plan(expert_ids: Int[Array, " W"], missing: Bool[Array, " W"]) -> FetchPlan:
    """Brings the missing experts into the staging slots of their own places in the wave."""
    places = jnp.arange(expert_ids.shape[0], dtype=jnp.int32)
    entry = missing[None, :] & (count_before(missing)[None, :] == places[:, None])  # [W entries, W places]
    return FetchPlan(select(entry, expert_ids), select(entry, places), jnp.sum(missing, dtype=jnp.int32))
