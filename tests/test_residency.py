"""Residency: `admit` against its twin in plain Python, and what must hold after every step."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jmoe.experts.residency import (
    NONE,
    FetchPlan,
    LayerResidency,
    admit,
    count_before,
    init_residency,
    rank_of,
    select,
)
from tests.twin import Twin

SIZES = ((1, 1), (4, 2), (8, 3), (8, 8), (16, 5))  # (E, S): few, for each is compiled
JITTED = jax.jit(admit, static_argnames=("plan_size", "policy"))
REPEATED = settings(deadline=None, max_examples=60)


def start(num_experts: int, num_slots: int, *, empty: bool) -> tuple[LayerResidency, Twin]:
    if empty:
        none = functools.partial(jnp.full, fill_value=NONE, dtype=jnp.int32)
        layer = LayerResidency(none((num_experts,)), none((num_slots,)), jnp.zeros((num_slots,), jnp.int32))
        return layer, Twin.empty(num_slots)
    return init_residency(1, num_experts, num_slots).layer(0), Twin.filled(num_slots)


def step(layer: LayerResidency, needed: set[int], clock: int) -> tuple[LayerResidency, FetchPlan]:
    num_experts, num_slots = len(layer.slot_of), len(layer.owner)
    flags = np.isin(np.arange(num_experts), list(needed))
    return JITTED(layer, flags, jnp.asarray(clock, jnp.int32), plan_size=num_slots)


@st.composite
def histories(draw: st.DrawFn) -> tuple[int, int, bool, list[set[int]]]:
    """(E, S, whether the slots start empty, the experts that each step needs)."""
    num_experts, num_slots = draw(st.sampled_from(SIZES))
    expert = st.integers(0, num_experts - 1)
    fitting = st.sets(expert, max_size=num_slots)
    steps = draw(st.lists(fitting | fitting | st.sets(expert), min_size=1, max_size=12))
    return num_experts, num_slots, draw(st.booleans()), steps


@REPEATED
@given(histories())
def test_admit_does_what_its_twin_does(history: tuple[int, int, bool, list[set[int]]]) -> None:
    num_experts, num_slots, empty, steps = history
    layer, twin = start(num_experts, num_slots, empty=empty)
    for clock, needed in enumerate(steps, start=1):
        layer, plan = step(layer, needed, clock)
        expected = twin.admit(needed, clock)
        assert np.asarray(layer.owner).tolist() == twin.owner
        assert np.asarray(layer.last_used).tolist() == twin.last_used
        entries = [*expected, *[(0, 0)] * (num_slots - len(expected))]  # 0 beyond the count
        assert int(plan.count) == len(expected)
        assert np.asarray(plan.expert_ids).tolist() == [expert for expert, _ in entries]
        assert np.asarray(plan.slot_ids).tolist() == [slot for _, slot in entries]


@REPEATED
@given(histories())
def test_what_holds_after_every_step(history: tuple[int, int, bool, list[set[int]]]) -> None:
    num_experts, num_slots, empty, steps = history
    layer, _ = start(num_experts, num_slots, empty=empty)
    for clock, needed in enumerate(steps, start=1):
        before = np.asarray(layer.owner)
        layer, plan = step(layer, needed, clock)
        slot_of, owner, count = np.asarray(layer.slot_of), np.asarray(layer.owner), int(plan.count)
        assert_inverse(slot_of, owner)
        resident = {expert for expert in range(num_experts) if slot_of[expert] != NONE}
        victims = set(before[np.asarray(plan.slot_ids)[:count]].tolist())
        assert not victims & needed
        if len(needed) <= num_slots:
            assert needed <= resident
            assert count == len(needed - set(before.tolist()))
        else:
            assert count == 0
            np.testing.assert_array_equal(owner, before)


def assert_inverse(slot_of: np.ndarray, owner: np.ndarray) -> None:
    """No slot has two owners, no expert two slots."""
    assert all(owner[slot] == expert for expert, slot in enumerate(slot_of) if slot != NONE)
    assert all(slot_of[expert] == slot for slot, expert in enumerate(owner) if expert != NONE)


def test_the_least_recently_used_goes_first() -> None:
    """By hand: E = 4, S = 2."""
    layer, _ = start(4, 2, empty=False)
    layer, _ = step(layer, {1}, 1)
    layer, plan = step(layer, {3}, 2)  # slot 0 was never used
    assert (int(plan.count), int(plan.expert_ids[0]), int(plan.slot_ids[0])) == (1, 3, 0)
    layer, plan = step(layer, {0}, 3)  # slot 1 was used before slot 0
    assert np.asarray(layer.owner).tolist() == [3, 0]
    assert np.asarray(layer.slot_of).tolist() == [1, NONE, NONE, 0]
    layer, plan = step(layer, {0, 1, 2}, 4)  # more than there are slots: a hit is touched, nothing else happens
    assert np.asarray(layer.owner).tolist() == [3, 0]
    assert np.asarray(layer.last_used).tolist() == [2, 4]
    assert int(plan.count) == 0


def test_a_policy_chooses_the_victim() -> None:
    def highest_expert(layer: LayerResidency) -> jax.Array:
        return -layer.owner

    layer, _ = start(8, 3, empty=False)
    needed = jnp.zeros(8, bool).at[jnp.asarray([2, 6])].set(True)
    after, plan = JITTED(layer, needed, jnp.asarray(1, jnp.int32), plan_size=2, policy=highest_expert)
    assert np.asarray(after.owner).tolist() == [0, 6, 2]  # 2 is the highest, but it is needed
    assert int(plan.slot_ids[0]) == 1


@pytest.mark.parametrize(("num_experts", "num_slots"), SIZES)
def test_the_start(num_experts: int, num_slots: int) -> None:
    residency = init_residency(3, num_experts, num_slots)
    assert int(residency.clock) == 0
    for layer in (residency.layer(n) for n in range(3)):
        assert np.asarray(layer.owner).tolist() == list(range(num_slots))
        assert_inverse(np.asarray(layer.slot_of), np.asarray(layer.owner))
    counters = [count for kind in (residency.decode, residency.prefill) for count in jax.tree.leaves(kind)]
    assert [count.shape for count in counters] == [(3,)] * 6
    assert not np.any(counters)


LENGTHS = st.sampled_from([1, 2, 7, 16])


@REPEATED
@given(LENGTHS.flatmap(lambda n: st.lists(st.integers(-3, 3), min_size=n, max_size=n)))
def test_rank_of_is_a_stable_order(keys: list[int]) -> None:
    order = np.argsort(keys, kind="stable")
    np.testing.assert_array_equal(rank_of(jnp.asarray(keys, jnp.int32)), np.argsort(order))


@REPEATED
@given(LENGTHS.flatmap(lambda n: st.lists(st.booleans(), min_size=n, max_size=n)))
def test_count_before_is_an_exclusive_sum(flags: list[bool]) -> None:
    np.testing.assert_array_equal(count_before(jnp.asarray(flags)), np.cumsum(flags) - flags)


@REPEATED
@given(st.lists(st.none() | st.integers(0, 4), min_size=6, max_size=6))
def test_select_takes_what_is_chosen_or_0(chosen: list[int | None]) -> None:
    values = np.array([5, -7, 0, 11, 2], np.int32)
    choose = np.array([[column == choice for column in range(5)] for choice in chosen])
    expected = [0 if choice is None else values[choice] for choice in chosen]
    np.testing.assert_array_equal(select(jnp.asarray(choose), jnp.asarray(values)), expected)
