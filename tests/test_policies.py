"""Policies: each against its twin in plain Python, what it costs, and what it learns and keeps."""

import dataclasses
import functools
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jmoe import arguments
from jmoe.config import RESIDENCY_POLICIES, RuntimeConfig
from jmoe.decoding.sampling import SamplingParams
from jmoe.engine import Engine
from jmoe.experts import activation, experience
from jmoe.experts.policies import DEFAULT_POLICY, POLICIES, Reuse
from jmoe.experts.slots import SlotLayout, init_slots
from jmoe.experts.store import ExpertStore
from tests import models
from tests.twin import TWINS, TwinActivation

L, E = 2, 6
EXACT = ("lru", "lru2", "lfu", "lfru")  # integers throughout
REPEATED = settings(deadline=None, max_examples=15)

STEPS = st.lists(
    st.lists(st.lists(st.integers(0, 3) | st.just(0), min_size=E, max_size=E), min_size=L, max_size=L),
    min_size=1,
    max_size=12,
)


@functools.cache
def jitted(name: str):
    """(values of all layers, the state after the step, the state after the requests)"""
    policy = POLICIES[name]
    value = jax.vmap(policy.value, in_axes=(0, 0, None))
    value_of = jax.jit(lambda state, used, clock: value(policy.outlook(state), used, clock))
    return value_of, jax.jit(policy.update), jax.jit(policy.finish) if policy.finish else lambda state: state


@pytest.mark.parametrize("name", POLICIES)
@REPEATED
@given(requests=st.lists(STEPS, min_size=1, max_size=3))
def test_values_are_those_of_the_twin(name: str, requests: list[list[list[list[int]]]]) -> None:
    """Exactly for integers; where floats are rounded, to a unit for each of them."""
    value, update, finish = jitted(name)
    state, twin, clock = POLICIES[name].start(L, E), TWINS[name](L, E), 0
    for request in requests:
        for step in request:
            used, now = jnp.asarray(step, jnp.int32), jnp.asarray(clock, jnp.int32)
            made = value(state, used, now)
            expected = [twin.value(n, step[n], clock) for n in range(L)]
            np.testing.assert_allclose(made, expected, rtol=0, atol=0 if name in EXACT else 2 + np.sum(step))
            state, clock = update(state, used, now), clock + 1
            twin.update(step, clock - 1)
        state = finish(state)
        twin.finish()


def test_every_policy_has_a_name_that_configurations_know() -> None:
    assert tuple(POLICIES) == RESIDENCY_POLICIES
    assert set(TWINS) == set(POLICIES)
    assert DEFAULT_POLICY in POLICIES


def test_an_unknown_policy_is_refused_with_the_known_ones() -> None:
    with pytest.raises(ValueError, match="residency_policy='magic' is not one of lru, lru2, lfu, lfru, activation"):
        RuntimeConfig(residency_policy="magic")
    options = arguments.parse(["--residency-policy", "lfu"])
    assert arguments.runtime_config(options, 1).residency_policy == "lfu"
    assert arguments.runtime_config(arguments.parse([]), 1).residency_policy is None


@pytest.mark.parametrize(
    ("name", "shapes"),
    [
        ("lru", [(L, E)]),
        ("lru2", [(L, E)] * 2),
        ("lfu", [(L, E)]),
        ("lfru", [(L, E)] * 2),
        ("activation", [(L, 128, E), (L, E), (L, E), (L, E)]),
        ("reuse", [(L, E, 2 * E + 1), (L, E), (L, 2 * E + 1)]),
    ],
)
def test_a_policy_carries_what_it_needs_and_no_more(name: str, shapes: list[tuple[int, ...]]) -> None:
    state = POLICIES[name].start(L, E)
    assert [leaf.shape for leaf in jax.tree.leaves(state)] == shapes
    pointers = [leaf.unsafe_buffer_pointer() for leaf in jax.tree.leaves(state)]
    assert len(set(pointers)) == len(pointers)  # else a step could not take them all
    assert experience.num_bytes(name, L, E) == 4 * sum(int(np.prod(shape)) for shape in shapes)


def test_the_time_of_the_last_use_costs_two_operations() -> None:
    row, used, clock = jax.tree.map(lambda x: x[0], POLICIES["lru"].start(L, E)), jnp.zeros(E, int), jnp.asarray(0)
    names = [equation.primitive.name for equation in jax.make_jaxpr(POLICIES["lru"].value)(row, used, clock).eqns]
    assert [name for name in names if name not in ("broadcast_in_dim", "jit")] == ["gt"]
    assert len(names) <= 3


def test_reuse_begins_as_frequency() -> None:
    state, used = POLICIES["reuse"].start(L, E), jnp.asarray([[3, 0, 1, 0, 0, 2]] * L, jnp.int32)
    guess = np.asarray(jitted("reuse")[0](state, used, jnp.asarray(0)))
    assert np.argsort(guess[0]).tolist()[-3:] == [2, 5, 0]


def test_reuse_learns_who_follows_whom() -> None:
    """Experts 0 and 1 take turns, with 2 and 3 at random beside them: after 0 comes 1, which frequency cannot know."""
    value, update, _ = jitted("reuse")
    state, rng = POLICIES["reuse"].start(L, E), np.random.default_rng(0)
    rows = np.zeros((2, L, E), np.int32)
    rows[0, :, 0] = rows[1, :, 1] = 1
    for clock in range(600):
        used = rows[clock % 2].copy()
        used[:, 2 + rng.integers(2)] = 1
        state = update(state, jnp.asarray(used), jnp.asarray(clock, jnp.int32))
    for turn in range(2):
        guess = np.asarray(value(state, jnp.asarray(rows[turn]), jnp.asarray(600)))
        assert (guess[:, 1 - turn] > guess[:, turn] + 0.1 * 2**16).all()
        assert (guess[:, :4] > guess[:, 4:].max()).all()


# Activation matrices.


def matrices(*rows: list[int]) -> jax.Array:
    """[L, C, E]: of one layer, the other has 0."""
    made = np.zeros((L, len(rows), E), np.float32)
    made[0] = rows
    return jnp.asarray(made)


def activations(collection: jax.Array, request: list[int]) -> activation.Activation:
    row = jnp.zeros((L, E)).at[0].set(jnp.asarray(request, jnp.float32))
    return activation.Activation(collection, row, row, row)


def test_a_finished_request_takes_an_empty_place_else_that_of_the_most_similar() -> None:
    first, second, empty = [4, 0, 1, 0, 0, 0], [0, 2, 0, 2, 0, 0], [0] * E
    request = [0, 9, 0, 7, 1, 0]
    after = activation.finish(activations(matrices(first, empty, second), request))
    np.testing.assert_array_equal(after.collection[0], [first, request, second])
    assert not np.any([after.request, after.recent, after.expected])
    after = activation.finish(activations(matrices(first, second), request))
    np.testing.assert_array_equal(after.collection[0], [first, request])
    nothing = activation.finish(activations(matrices(first, empty), empty))
    np.testing.assert_array_equal(nothing.collection[0], [first, empty])


def test_a_full_collection_of_the_twin_does_the_same() -> None:
    rng, twin = np.random.default_rng(0), TwinActivation(L, E, size=3)
    state = activations(jnp.zeros((L, 3, E)), [0] * E)
    for _ in range(9):
        for _ in range(4):
            used = rng.poisson(0.4, (L, E))
            state = activation.update(state, jnp.asarray(used, jnp.int32), jnp.asarray(0))
            twin.update(used.tolist(), 0)
        state = activation.finish(state)
        twin.finish()
        made = np.zeros((3, L, E))
        made[: len(twin.collection)] = twin.collection
        np.testing.assert_array_equal(np.moveaxis(np.asarray(state.collection), 1, 0), made)


def test_the_most_similar_request_says_what_comes() -> None:
    state = activations(matrices([4, 0, 0, 4, 0, 0], [0, 0, 2, 0, 6, 0]), [0] * E)
    used = jnp.zeros((L, E), jnp.int32).at[0, 2].set(1)
    after = activation.update(state, used, jnp.asarray(0))
    np.testing.assert_allclose(after.expected[0], [0, 0, 0.25 + 1, 0, 0.75, 0])
    ahead = activation.predict(after, -1)  # before the first of two layers
    np.testing.assert_allclose(ahead, np.asarray(after.expected) * [[0.5], [0.0]])
    assert not np.any(activation.predict(after, 0)[0])  # that layer is being done


# What is kept from run to run.


@pytest.fixture
def learned() -> Reuse:
    state = POLICIES["reuse"].start(L, E)
    used = jnp.asarray(np.random.default_rng(0).poisson(1, (L, E)), jnp.int32)
    for clock in range(3):
        state = POLICIES["reuse"].update(state, used, jnp.asarray(clock))
    return state


def test_experience_goes_through_a_file(learned: Reuse, tmp_path: Path) -> None:
    file, fresh = tmp_path / "made" / "reuse.npz", POLICIES["reuse"].start(L, E)
    experience.save(file, "reuse", "abc", learned)
    loaded = experience.load(file, "reuse", "abc", fresh)
    carried = experience.carry_over("reuse", learned, fresh)
    for made in (loaded, carried):
        np.testing.assert_array_equal(made.weights, learned.weights)
        assert not np.any(made.frequency)
        assert not np.any(made.trace)
    assert np.any(learned.weights != fresh.weights)
    assert [path.name for path in file.parent.iterdir()] == ["reuse.npz"]


def test_experience_of_something_else_is_refused(learned: Reuse, tmp_path: Path) -> None:
    file = tmp_path / "reuse.npz"
    experience.save(file, "reuse", "abc", learned)
    fresh = POLICIES["reuse"].start(L, E)
    with pytest.raises(RuntimeError, match=r"'fingerprint': 'abc'.*expected.*'fingerprint': 'other'.*Delete it"):
        experience.load(file, "reuse", "other", fresh)
    with pytest.raises(RuntimeError, match=r"weights \[2, 6, 13\], expected \[3, 6, 13\]"):
        experience.load(file, "reuse", "abc", POLICIES["reuse"].start(3, E))
    with pytest.raises(RuntimeError, match=r"damaged.*Delete it"):
        experience.load(file, "activation", "abc", POLICIES["activation"].start(L, E))


@pytest.mark.parametrize("cut", [0, 3, 100, -5])
def test_a_damaged_file_is_named(learned: Reuse, tmp_path: Path, cut: int) -> None:
    file = tmp_path / "reuse.npz"
    experience.save(file, "reuse", "abc", learned)
    file.write_bytes(file.read_bytes()[:cut])
    with pytest.raises(RuntimeError, match=r"reuse\.npz: damaged, it cannot be read.*Delete it"):
        experience.load(file, "reuse", "abc", POLICIES["reuse"].start(L, E))


def test_an_engine_goes_on_from_what_the_last_one_learned(tmp_path: Path) -> None:
    """And says so; steps of no token, as of a score, change nothing and write nothing."""
    file, said = tmp_path / "residency" / "abc-reuse.npz", []
    runtime = RuntimeConfig(expert_slots=4, max_seq_len=64, measure_link=False)

    def start() -> Engine:
        details = {"fingerprint": "abc", "experience_dir": file.parent, "announce": said.append}
        return Engine.start(models.SMALL, runtime, models.weights, **details)

    def weights(engine: Engine) -> np.ndarray:
        state = engine.new_state(1, [1])
        engine.give_back(state)
        return np.asarray(state.experts.residency.tracked["reuse"].weights)

    engine = start()
    fresh = weights(engine)
    assert not file.exists()
    engine.generate(models.prompts(5), SamplingParams(max_new_tokens=8)).results()
    assert np.any(weights(engine) != fresh)
    written = file.stat().st_mtime_ns
    np.testing.assert_array_equal(weights(start()), weights(engine))
    assert file.stat().st_mtime_ns == written
    assert [line for line in said if "policy" in line] == [
        "residency policy reuse (1.26 KiB of device memory, chosen automatically)",
        "residency policy reuse (1.26 KiB of device memory, chosen automatically)",
        f"policy reuse: with what it learned before ({file})",
    ]


def test_what_cannot_be_kept_is_said(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("no directory")
    said: list[str] = []
    store = ExpertStore((jnp.zeros((E, 3, 2, 2)),) * L)
    layout = SlotLayout(num_layers=L, num_experts=E, slots_per_layer=2, num_staging=1)
    slots = init_slots(store, layout)
    slots = dataclasses.replace(slots, residency=dataclasses.replace(slots.residency, clock=jnp.asarray(3)))
    experience.Experience(tmp_path / "file", ["reuse"], "abc", said.append).finish(slots)
    [line] = said
    assert line.startswith("what the policy reuse learned is not kept: ")
