"""The seam: grouping, staging, and that offloaded experts compute what resident ones do, and count what they did."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jmoe import memory
from jmoe.experts import waves
from jmoe.experts.groups import Groups, group_by_expert, tokens_of_experts
from jmoe.experts.layer import OffloadedExperts, ResidentExperts
from jmoe.experts.residency import NONE, Residency
from jmoe.experts.slots import ExpertSlots, SlotLayout, init_slots
from jmoe.experts.store import ExpertStore
from jmoe.model.router import Routing
from kernels_pallas.fetch import api as fetch_api
from tests.twin import Twin, TwinLRU

E, A, F, D, NUM_LAYERS = 8, 2, 8, 16, 2
KINDS = ("random", "one_expert", "everything", "random", "masked", "no_token", "random", "random")


@functools.cache
def store() -> ExpertStore:
    rng = np.random.default_rng(0)
    layers = (rng.normal(size=(E, 3, F, D)).astype(np.float32) / 4 for _ in range(NUM_LAYERS))
    return ExpertStore(tuple(jax.device_put(layer, memory.host_sharding()) for layer in layers))


def layout(num_slots: int) -> SlotLayout:
    return SlotLayout(num_layers=NUM_LAYERS, num_experts=E, slots_per_layer=num_slots, num_staging=3)


def make_routing(kind: str, num_rows: int, rng: np.random.Generator) -> Routing:
    expert_ids = np.stack([rng.permutation(E)[:A] for _ in range(num_rows)])
    if kind == "one_expert":
        expert_ids[:] = expert_ids[0]
    if kind == "everything":
        expert_ids = np.resize(np.arange(E), (num_rows, A))
    expert_ids = np.sort(expert_ids, axis=1)
    weights = rng.uniform(0.1, 0.9, expert_ids.shape).astype(np.float32)
    valid = {"masked": np.arange(num_rows) % 2 == 1, "no_token": np.zeros(num_rows, bool)}.get(kind)
    if valid is not None:
        expert_ids, weights = np.where(valid[:, None], expert_ids, E), np.where(valid[:, None], weights, 0)
    return Routing(jnp.asarray(expert_ids, jnp.int32), jnp.asarray(weights), jnp.zeros((num_rows, E)))


def asked(routing: Routing) -> set[int]:
    return set(np.asarray(routing.expert_ids).ravel().tolist()) - {E}


@functools.cache
def offloaded(num_slots: int, admits: bool):
    """One step: both layers. Returns their outputs and the slots afterwards."""

    @jax.jit
    def run(store: ExpertStore, slots: ExpertSlots, xs, routings):
        experts = OffloadedExperts(store, slots, layout(num_slots), admits=admits, policy="lru")
        carry, ys = experts.start(), []
        for n in range(NUM_LAYERS):
            y, carry = experts(n, xs[n], routings[n], carry)
            ys.append(y)
        return ys, experts.finish(carry)

    return run


@functools.cache
def resident():
    @jax.jit
    def run(layers, xs, routings):
        experts = ResidentExperts(layers)
        return [experts(n, xs[n], routings[n], None)[0] for n in range(NUM_LAYERS)]

    layers = tuple(jax.device_put(layer, memory.device_sharding()) for layer in store().layers)
    return functools.partial(run, layers)


def start(num_slots: int) -> ExpertSlots:
    """Staging slots are NaN: nothing may be read from them before it was put there.

    All is committed to its device, as a step's outputs are: else the second step would compile anew.
    """
    slots = init_slots(store(), layout(num_slots), policy="lru")
    slots = dataclasses.replace(slots, staging=tuple(jnp.full_like(half, np.nan) for half in slots.staging))
    return jax.device_put(slots, jax.devices()[0])


@pytest.mark.parametrize("num_rows", [1, 2, 5])
@pytest.mark.parametrize("num_slots", [2, 4, E])
@pytest.mark.parametrize("admits", [True, False], ids=["decode", "prefill"])
def test_offloaded_experts_compute_and_count_as_they_should(num_slots: int, admits: bool, num_rows: int) -> None:
    rng = np.random.default_rng(num_rows)
    slots, twins = start(num_slots), [Twin.filled(num_slots) for _ in range(NUM_LAYERS)]
    policy = TwinLRU(NUM_LAYERS, E)
    counts = np.zeros((3, NUM_LAYERS), int)  # hits, fetched, streamed
    for clock, kind in enumerate(KINDS):
        xs = [jnp.asarray(rng.normal(size=(num_rows, D)), jnp.float32) for _ in range(NUM_LAYERS)]
        routings = [make_routing(kind, num_rows, rng) for _ in range(NUM_LAYERS)]
        ys, slots = offloaded(num_slots, admits)(store(), slots, xs, routings)
        for y, expected in zip(ys, resident()(xs, routings), strict=True):
            np.testing.assert_allclose(y, expected, atol=2e-6 * max(1, np.abs(expected).max()))
        used = [tokens(routing) for routing in routings]
        for n, twin in enumerate(twins):
            value = policy.value(n, used[n], clock) if admits else None
            counts[:, n] += count(twin, asked(routings[n]), value)
        policy.update(used, clock)
        assert np.asarray(slots.residency.stacked.owner).tolist() == [twin.owner for twin in twins]
    used = slots.residency.decode if admits else slots.residency.prefill
    unused = slots.residency.prefill if admits else slots.residency.decode
    np.testing.assert_array_equal([used.hits, used.fetched, used.streamed], counts)
    assert not np.any(jax.tree.leaves(unused))
    assert int(slots.residency.clock) == (len(KINDS) if admits else 0)
    assert_slots_hold_their_owners(slots)


def prefill_of_one_layer(num_staging: int):
    """Two slots, and staging slots that hold NaN."""
    sizes = dataclasses.replace(layout(2), num_staging=num_staging)

    def run(store: ExpertStore, residency: Residency, x, routing):
        staging = tuple(jnp.full((num_staging, 3, F, D), jnp.nan) for _ in range(2))
        slots = ExpertSlots(
            tuple(jax.device_put(layer[:2], jax.memory.Space.Device) for layer in store.layers), staging, residency
        )
        experts = OffloadedExperts(store, slots, sizes, admits=False, policy="lru")
        return experts(0, x, routing, experts.start())[0]

    return run


@pytest.mark.parametrize("num_staging", range(1, 5))
@pytest.mark.parametrize("kind", ["one_expert", "everything", "random", "no_token"])
def test_waves_of_any_size_bring_what_is_missing_and_no_more(
    kind: str, num_staging: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    fetched: list[int] = []

    def fetch(store, slots, expert_ids, slot_ids, count, **options):
        jax.debug.callback(lambda count: fetched.append(int(count)), count)
        return fetch_api.fetch(store, slots, expert_ids, slot_ids, count, **options)

    monkeypatch.setattr(waves, "fetch", fetch)
    rng = np.random.default_rng(num_staging)
    x, routing = jnp.asarray(rng.normal(size=(5, D)), jnp.float32), make_routing(kind, 5, rng)
    y = jax.jit(prefill_of_one_layer(num_staging))(store(), start(2).residency, x, routing)
    wanted = resident()([x, x], [routing, routing])[0]
    jax.effects_barrier()
    np.testing.assert_allclose(y, wanted, atol=2e-6 * max(1, np.abs(wanted).max()))
    num_missing = len(asked(routing) - {0, 1})
    assert sum(fetched) == num_missing
    assert sorted(fetched, reverse=True)[: -(-num_missing // num_staging)] == [
        min(num_staging, num_missing - start) for start in range(0, num_missing, num_staging)
    ]


def test_each_wave_comes_while_what_came_before_is_multiplied_with(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing in the program keeps a fetch waiting for the arithmetic beside it, nor that for the fetch."""
    monkeypatch.setattr(waves, "fetch", jax.jit(fetch_api.fetch, static_argnames="implementation"))
    monkeypatch.setattr(waves, "multiply", jax.jit(waves.multiply, static_argnums=4))
    routing = make_routing("everything", 5, np.random.default_rng(0))
    program = jax.make_jaxpr(prefill_of_one_layer(3))(store(), start(2).residency, jnp.zeros((5, D)), routing)
    [loop] = [equation for equation in program.eqns if equation.primitive.name == "while"]
    assert calls(program.jaxpr) == [("fetch", set()), ("multiply", set())]
    assert calls(loop.params["body_jaxpr"].jaxpr) == [
        ("fetch", set()),
        ("multiply", set()),
        ("fetch", {"multiply"}),
        ("multiply", {"fetch", "multiply"}),
    ]


def calls(program) -> list[tuple[str, set[str]]]:
    """The fetches and products of a jaxpr in their order, each with the names of those that it has to wait for."""
    needed: dict = {}  # by variable
    found = []
    for equation in program.eqns:
        waits_for = set().union(*(needed.get(id(variable), set()) for variable in equation.invars))
        name = equation.params.get("name")
        if name in ("fetch", "multiply"):
            found.append((name, waits_for))
            waits_for = waits_for | {name}
        needed |= {id(variable): waits_for for variable in equation.outvars}
    return found


def tokens(routing: Routing) -> list[int]:
    return [int((np.asarray(routing.expert_ids) == expert).sum()) for expert in range(E)]


def count(twin: Twin, needed: set[int], value: list[int] | None) -> tuple[int, int, int]:
    num_hits = len(needed & twin.resident)
    num_fetched = len(twin.admit(needed, value)) if value else 0
    return num_hits, num_fetched, len(needed) - num_hits - num_fetched


def assert_slots_hold_their_owners(slots: ExpertSlots) -> None:
    owner = np.asarray(slots.residency.stacked.owner)
    for n, layer in enumerate(store().layers):
        np.testing.assert_array_equal(np.asarray(slots.layers[n]), np.asarray(layer)[owner[n]])


def test_resident_experts_are_the_formula() -> None:
    """Against float64, token by token, without any grouping."""
    rng = np.random.default_rng(7)
    routings = [make_routing("random", 5, rng) for _ in range(NUM_LAYERS)]
    xs = [rng.normal(size=(5, D)).astype(np.float32) for _ in range(NUM_LAYERS)]
    ys = resident()([jnp.asarray(x) for x in xs], routings)
    for layer, x, routing, y in zip(store().layers, xs, routings, ys, strict=True):
        weights = np.asarray(layer, np.float64)
        for row, experts, shares in zip(range(5), routing.expert_ids, np.asarray(routing.combine_weights), strict=True):
            parts = [share * swiglu(x[row], *weights[expert]) for expert, share in zip(experts, shares, strict=True)]
            np.testing.assert_allclose(y[row], np.sum(parts, axis=0), atol=1e-5)


def swiglu(x: np.ndarray, gate: np.ndarray, up: np.ndarray, down: np.ndarray) -> np.ndarray:
    hidden = gate @ x
    return (hidden / (1 + np.exp(-hidden)) * (up @ x)) @ down


@pytest.mark.parametrize("num_rows", [1, 3, 6])
@pytest.mark.parametrize("kind", sorted(set(KINDS)))
def test_groups_are_the_experts_asked_for_in_ascending_order(kind: str, num_rows: int) -> None:
    routing = make_routing(kind, num_rows, np.random.default_rng(3))
    experts = sorted(asked(routing))
    assert np.flatnonzero(tokens_of_experts(routing.expert_ids, E)).tolist() == experts
    groups = group_by_expert(routing, E)
    num_groups = min(num_rows * A, E)
    assert np.asarray(groups.expert_ids).tolist()[: len(experts)] == experts
    assert len(groups.expert_ids) == num_groups
    expected = np.zeros((num_groups, num_rows), np.float32)
    ids, weights = np.asarray(routing.expert_ids), np.asarray(routing.combine_weights)
    for row, place in np.ndindex(ids.shape):
        if ids[row, place] != E:
            expected[experts.index(int(ids[row, place])), row] = weights[row, place]
    np.testing.assert_array_equal(groups.weights, expected)


@pytest.mark.parametrize("pattern", range(16))
def test_only_the_chosen_groups(pattern: int) -> None:
    """In their order, and nothing else: NONE and weight 0 fill up the list."""
    chosen = np.array([bool(pattern >> place & 1) for place in range(4)])
    weights = np.random.default_rng(pattern).uniform(0.1, 1, (4, 3)).astype(np.float32)
    groups = Groups(jnp.array([1, 4, 5, 7], jnp.int32), jnp.asarray(weights), 2).only(jnp.asarray(chosen), 5)
    padding = 5 - chosen.sum()
    assert np.asarray(groups.expert_ids).tolist() == [*np.array([1, 4, 5, 7])[chosen], *[NONE] * padding]
    np.testing.assert_array_equal(groups.weights, np.concatenate([weights[chosen], np.zeros((padding, 3))]))


@pytest.mark.parametrize("num_slots", [2, E])
def test_slots_start_with_the_first_experts(num_slots: int) -> None:
    slots = init_slots(store(), layout(num_slots))
    assert [layer.shape for layer in slots.layers] == [(num_slots, 3, F, D)] * NUM_LAYERS
    assert [half.shape for half in slots.staging] == [(3, 3, F, D)] * 2
    assert np.asarray(slots.residency.stacked.owner).tolist() == [list(range(num_slots))] * NUM_LAYERS
    assert_slots_hold_their_owners(slots)
