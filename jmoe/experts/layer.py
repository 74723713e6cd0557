"""The seam: a routing becomes experts that can be multiplied with. route → admit → fetch → expert_mlp → combine.

`ResidentExperts` is the reference: everything on the device.
`OffloadedExperts` brings in what its routers ask for. They share the grouping, so that they add up the same numbers in
the same order.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from jmoe.experts import look_ahead
from jmoe.experts.groups import Groups, group_by_expert, multiply, tokens_of_experts
from jmoe.experts.look_ahead import Guess, Prefetch, Prefetched, no_rows
from jmoe.experts.policies import DEFAULT_POLICY, POLICIES
from jmoe.experts.residency import Counters, FetchPlan, LayerResidency
from jmoe.experts.slots import ExpertSlots, SlotLayout
from jmoe.experts.store import ExpertStore
from jmoe.experts.waves import Halves, multiply_in_waves
from jmoe.model.decoder import MoE
from jmoe.model.router import Routing
from kernels_pallas.admit.api import admit
from kernels_pallas.admit.result import Admitted
from kernels_pallas.expert_mlp import read_through
from kernels_pallas.fetch.api import fetch
from kernels_pallas.prefetch.api import now
from kernels_pallas.prefetch.api import prefetch as bring
from kernels_pallas.prefetch.arrivals import Arrivals


@dataclasses.dataclass(frozen=True)
class ResidentExperts(MoE):
    """All experts on the device, one array a layer; nothing is fetched, and slots are handed on as they are."""

    layers: tuple[Float[Array, "E 3 F D"], ...]
    slots: ExpertSlots | None = None
    implementation: str | None = None

    def start(self) -> ExpertSlots | None:
        return self.slots

    def finish(self, carry: ExpertSlots) -> ExpertSlots:
        return carry

    def prefetched(self, carry: ExpertSlots) -> None:
        return None

    def __call__(self, moe_layer: int, x: Float[Array, "T D"], routing: Routing, carry: ExpertSlots | None):
        weights = self.layers[moe_layer]
        with jax.named_scope("experts"):
            groups = group_by_expert(routing, weights.shape[0])
        y = multiply(x, weights, groups.expert_ids, groups, self.implementation)
        return y.astype(x.dtype), carry


@dataclasses.dataclass(frozen=True)
class Observed(MoE):
    """Experts whose carry is their own, and beside it the tuple of all routings so far, one a MoE layer."""

    experts: MoE

    def __call__(
        self, moe_layer: int, x: Float[Array, "T D"], routing: Routing, carry: tuple[Any, tuple[Routing, ...]]
    ):
        inner, routings = carry
        y, inner = self.experts(moe_layer, x, routing, inner)
        return y, (inner, (*routings, routing))

    def look_ahead(self, moe_layer: int, residual, routing: Routing, carry: tuple[Any, tuple[Routing, ...]]):
        inner, routings = carry
        return self.experts.look_ahead(moe_layer, residual, routing, inner), routings


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Progress:
    """What the layers done so far have asked for, and have made of the slots and of their residency.

    `outlook` is what a step that admits goes by, its policy's. With a prefetch, `guess` is what the next layer will
    miss, and `arrivals` what came early for each so far, or each but the first; `known_at` is when the demand of these
    layers was known, where there is a clock. `fetched`, whose values are of no matter, is computed once the last
    layer's experts are in their slots, multiplied with or not.
    """

    staging: Halves
    slots: tuple[Float[Array, "S 3 F D"], ...] = ()
    layers: tuple[LayerResidency, ...] = ()
    expert_ids: tuple[Int[Array, "T A"], ...] = ()
    num_hits: tuple[Int[Array, ""], ...] = ()
    num_fetched: tuple[Int[Array, ""], ...] = ()
    outlook: Any = None
    guess: Guess | None = None
    fetched: Array | None = None
    arrivals: tuple[Arrivals, ...] = ()
    known_at: tuple[Int[Array, ""], ...] = ()


@dataclasses.dataclass(frozen=True)
class OffloadedExperts(MoE):
    """Experts in the store, used from the slots.

    Decode steps (`admits`) make their misses resident, in the place of what `policy` (a name of `POLICIES`, the one
    that the slots' residency was made with) values least. Prefill does not: it uses what is resident where it is and
    streams the rest through the staging slots, so that the decode set survives it.

    With `prefetch`, what a layer will probably miss comes while its attention runs, and is taken from there: in steps
    that admit, and for which `look_ahead.pays`.
    """

    store: ExpertStore
    slots: ExpertSlots
    layout: SlotLayout
    admits: bool
    implementation: str | None = None
    policy: str = DEFAULT_POLICY
    prefetch: Prefetch | None = None

    def start(self) -> Progress:
        progress, ahead = Progress(self.slots.staging, outlook=self._outlook()), self._ahead
        odds = ahead.predictor.odds_at_start(self.slots.residency) if ahead else None
        if ahead is None or odds is None:
            return progress
        with jax.named_scope("prefetch"):
            return self._bring(0, self._guess(ahead, 0, odds), progress)

    def _outlook(self) -> Any:
        if self._is_fixed:
            return None
        with jax.named_scope("admit"):
            return POLICIES[self.policy].outlook(self.slots.residency.tracked[self.policy])

    def finish(self, progress: Progress) -> ExpertSlots:
        """The state after the step, with what the policy remembers and the counters brought on."""
        before, kind = self.slots.residency, "decode" if self.admits else "prefill"
        used = tokens_of_experts(jnp.stack(progress.expert_ids), self.layout.num_experts)  # [L, E]
        counters = jax.tree.map(jnp.add, getattr(before, kind), self._counts(progress, used > 0))
        after = dataclasses.replace(before, clock=before.clock + self.admits, **{kind: counters})
        if not self._is_fixed:
            with jax.named_scope("admit"):
                tracked = {
                    name: POLICIES[name].update(state, used, before.clock) for name, state in before.tracked.items()
                }
            after = dataclasses.replace(after, layers=progress.layers, tracked=tracked)
        return ExpertSlots(progress.slots, progress.staging, after)

    def prefetched(self, progress: Progress) -> Prefetched | None:
        """What came early in the step, counted; None without `prefetch`."""
        if not progress.arrivals:
            return no_rows(self.layout.num_layers) if self.prefetch else None
        used = tokens_of_experts(jnp.stack(progress.expert_ids), self.layout.num_experts)
        return look_ahead.count(progress.arrivals, used > 0, progress.known_at)

    def _counts(self, progress: Progress, needed: Bool[Array, "L E"]) -> Counters:
        """Of this step, all layers at once: a few small kernels a step instead of a layer."""
        asked = jnp.sum(needed, axis=1, dtype=jnp.int32)
        hits = jnp.stack(progress.num_hits) if progress.num_hits else asked
        fetched = jnp.stack(progress.num_fetched) if progress.num_fetched else jnp.zeros_like(hits)
        return Counters(hits, fetched, asked - hits - fetched)

    @property
    def _is_fixed(self) -> bool:
        """Whether no expert changes its slot in this step."""
        return self.layout.all_resident or not self.admits

    def look_ahead(self, moe_layer: int, residual: Float[Array, "T D"], routing: Routing, carry: Progress) -> Progress:
        ahead, following = self._ahead, moe_layer + 1
        if ahead is None or following == self.layout.num_layers:
            return carry
        odds = ahead.predictor.odds(moe_layer, residual, routing, self.slots.residency)
        return dataclasses.replace(carry, guess=self._guess(ahead, following, odds))

    @property
    def _ahead(self) -> Prefetch | None:
        """The prefetch, if this step makes one."""
        pays = self.admits and self.prefetch and look_ahead.pays(self.layout, self.prefetch.num_choices)
        return self.prefetch if pays else None

    def _guess(self, ahead: Prefetch, moe_layer: int, odds: Float[Array, " E"]) -> Guess:
        rows_of_expert = 3 * self.store.layers[moe_layer].shape[2]
        return look_ahead.guess(odds, self.slots.residency.layers[moe_layer].slot_of, ahead, rows_of_expert)

    def _bring(self, moe_layer: int, best: Guess, carry: Progress, after: Array | None = None) -> Progress:
        wanted, how = (best.expert_ids, best.num_rows), {"implementation": self.implementation}
        arrivals = bring(self.store.layers[moe_layer], *wanted, after=after, **how)
        return dataclasses.replace(carry, arrivals=(*carry.arrivals, arrivals))

    def _bring_guessed(self, moe_layer: int, y: Float[Array, "T D"], carry: Progress):
        """What the next layer will probably miss, once this one's experts have come: before, the link is theirs."""
        if carry.guess is None:
            return y, carry
        after, best = jax.lax.optimization_barrier((carry.fetched, carry.guess))
        y, _ = jax.lax.optimization_barrier((y, best))  # else XLA makes the guess together with the next routing
        carry = dataclasses.replace(carry, guess=None, fetched=None)
        with jax.named_scope("prefetch"):
            return y, self._bring(moe_layer + 1, best, carry, after)

    def __call__(self, moe_layer: int, x: Float[Array, "T D"], routing: Routing, carry: Progress):
        asked = dataclasses.replace(carry, expert_ids=(*carry.expert_ids, routing.expert_ids))
        run = self._from_slots if self.layout.all_resident else self._from_slots_and_store
        y, progress = run(moe_layer, x, routing, asked)
        return self._bring_guessed(moe_layer, y.astype(x.dtype), progress)

    def _from_slots(self, moe_layer: int, x, routing: Routing, carry: Progress):
        """Where there is a slot for every expert: slot s holds expert s, and nothing changes."""
        slots = self.slots.layers[moe_layer]
        with jax.named_scope("admit"):
            at, groups = self._groups(moe_layer, routing)
        y = multiply(x, slots, at, groups, self.implementation)
        return y, dataclasses.replace(carry, slots=(*carry.slots, slots))

    def _groups(self, moe_layer: int, routing: Routing) -> tuple[Int[Array, " G"], Groups]:
        """With the slot of each, where every expert has one: of several tokens the kernel that admits finds them."""
        num_rows, per_row = routing.expert_ids.shape
        if num_rows == 1:
            groups = group_by_expert(routing, self.layout.num_experts)
            return groups.expert_ids, groups
        admitted = self._admit(moe_layer, routing)
        return admitted.group_slots, Groups.of(admitted, per_row)

    def _from_slots_and_store(self, moe_layer: int, x, routing: Routing, carry: Progress):
        slots, staging = self.slots.layers[moe_layer], carry.staging
        arrivals = carry.arrivals[-1] if carry.arrivals else None  # for this layer
        with jax.named_scope("admit"):
            admitted = self._admit(moe_layer, routing, carry.outlook)
        after = LayerResidency(admitted.slot_of, admitted.owner)
        groups = Groups.of(admitted, routing.expert_ids.shape[1])
        if self.admits and not self.layout.overflows(routing.expert_ids.size):
            beside = self._beside(after, carry)
            y, slots, fetched = self._fetch_and_multiply(moe_layer, x, slots, admitted, groups, arrivals, beside)
            carry = dataclasses.replace(carry, fetched=fetched)
        else:
            if self.admits:
                slots = self._fetch(moe_layer, slots, plan_of(admitted))
            what_stays = slots[:1, 0, 0, :1] if self.admits else None  # comes before what does not
            how = {"after": what_stays, "implementation": self.implementation}
            y, staging = multiply_in_waves(x, self.store.layers[moe_layer], slots, staging, groups, after, **how)
        progress = dataclasses.replace(
            carry,
            staging=staging,
            slots=(*carry.slots, slots),
            layers=(*carry.layers, after),
            known_at=(*carry.known_at, *_known_at(admitted, arrivals)),
            num_hits=(*carry.num_hits, admitted.num_hits),
            num_fetched=(*carry.num_fetched, admitted.count) if self.admits else (),
        )
        return y, progress

    def _admit(self, moe_layer: int, routing: Routing, outlook: Any = None) -> Admitted:
        """Which experts of the layer get which slots, if there is a policy's outlook; and the groups."""
        residency, value = self.slots.residency, None
        used = tokens_of_experts(routing.expert_ids, self.layout.num_experts)
        if outlook is not None:
            row = jax.tree.map(lambda stacked: stacked[moe_layer], outlook)
            value = POLICIES[self.policy].value(row, used, residency.clock)
        before = residency.layers[moe_layer]
        ids, weights = routing.expert_ids, routing.combine_weights
        return admit(ids, weights, used, value, before.slot_of, before.owner, implementation=self.implementation)

    def _fetch(
        self, moe_layer: int, slots: Float[Array, "R 3 F D"], plan: FetchPlan, arrivals: Arrivals | None = None
    ) -> Float[Array, "R 3 F D"]:
        store, copies = self.store.layers[moe_layer], (plan.expert_ids, plan.slot_ids, plan.count)
        with jax.named_scope("fetch"):
            return fetch(store, slots, *copies, arrivals=arrivals, implementation=self.implementation)

    def _beside(self, residency: LayerResidency, carry: Progress) -> list[Array]:
        """What may be computed beside the experts of a layer, and should be before.

        The kernel that multiplies takes every multiprocessor whole: to begin beside a small one costs it some 8 us.
        """
        return jax.tree.leaves((residency, carry.guess)) if self._ahead else []

    def _fetch_and_multiply(self, moe_layer: int, x, slots, admitted: Admitted, groups: Groups, arrivals, beside):
        """In one pass where a kernel does both, so that experts that are here are multiplied with while others come.

        What comes third is there once the experts are.
        """
        if read_through.can(self.implementation, x, slots):
            with jax.named_scope("experts"):
                y, slots = read_through.expert_mlp(x, self.store.layers[moe_layer], slots, admitted, arrivals, beside)
            y = y.astype(x.dtype)  # here, so that it is no kernel of its own for those who wait
            return y, slots, y
        slots = self._fetch(moe_layer, slots, plan_of(admitted), arrivals)
        return multiply(x, slots, admitted.group_slots, groups, self.implementation), slots, slots[:1, 0, 0, :1]


def _known_at(admitted: Admitted, arrivals: Arrivals | None) -> tuple[Int[Array, ""], ...]:
    """When the layer's demand was known, if that is to be compared with when something came.

    A kernel of its own is asked only where no kernel admits: beside the one that multiplies it costs a layer 8 us.
    """
    if arrivals is None or arrivals.came_at is None:
        return ()
    return (now(admitted.count) if admitted.known_at is None else admitted.known_at,)


def plan_of(admitted: Admitted) -> FetchPlan:
    return FetchPlan(admitted.plan_experts, admitted.plan_slots, admitted.count)
