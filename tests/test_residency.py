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
    init_residency,
)
from kernels_pallas.admit.reference import count_before, rank_of, select
from tests.twin import Twin

SIZES = ((1, 1), (4, 2), (8, 3), (8, 8), (16, 5))  # (E, S): few, for each is compiled
JITTED = jax.jit(admit, static_argnames="max_needed")
REPEATED = settings(deadline=None, max_examples=60)
LEAST, MOST = -(2**31) + 1, 2**31 - 2

Step = tuple[set[int], list[int]]  # the experts that it needs, the value of each expert


def start(num_experts: int, num_slots: int, *, empty: bool) -> tuple[LayerResidency, Twin]:
    if empty:
        none = functools.partial(jnp.full, fill_value=NONE, dtype=jnp.int32)
        return LayerResidency(none((num_experts,)), none((num_slots,))), Twin.empty(num_slots)
    return init_residency(1, num_experts, num_slots).layers[0], Twin.filled(num_slots)


def step(
    layer: LayerResidency, needed: set[int], value: list[int], *, fits: bool = False
) -> tuple[LayerResidency, FetchPlan]:
    """`fits`: whether it is known when the step is traced that the slots suffice."""
    num_experts, num_slots = len(layer.slot_of), len(layer.owner)
    flags = np.isin(np.arange(num_experts), list(needed))
    return JITTED(layer, flags, np.asarray(value, np.int32), max_needed=num_slots if fits else num_experts)


@st.composite
def histories(draw: st.DrawFn) -> tuple[int, int, bool, list[Step]]:
    """(E, S, whether the slots start empty, steps)."""
    num_experts, num_slots = draw(st.sampled_from(SIZES))
    expert = st.integers(0, num_experts - 1)
    needed = st.sets(expert, max_size=num_slots) | st.sets(expert)
    value = st.integers(-3, 3) | st.sampled_from((LEAST, LEAST + 1, MOST))
    values = st.lists(value, min_size=num_experts, max_size=num_experts)
    steps = draw(st.lists(st.tuples(needed, values), min_size=1, max_size=12))
    return num_experts, num_slots, draw(st.booleans()), steps


@REPEATED
@given(histories())
def test_admit_does_what_its_twin_does(history: tuple[int, int, bool, list[Step]]) -> None:
    num_experts, num_slots, empty, steps = history
    layer, twin = start(num_experts, num_slots, empty=empty)
    for needed, value in steps:
        layer, plan = step(layer, needed, value)
        expected = twin.admit(needed, value)
        assert np.asarray(layer.owner).tolist() == twin.owner
        assert int(plan.count) == len(expected)
        entries = [*expected, *[(0, 0)] * (num_slots - len(expected))]  # 0 beyond the count
        assert np.asarray(plan.expert_ids).tolist() == [expert for expert, _ in entries]
        assert np.asarray(plan.slot_ids).tolist() == [slot for _, slot in entries]


@REPEATED
@given(histories())
def test_what_holds_after_every_step(history: tuple[int, int, bool, list[Step]]) -> None:
    num_experts, num_slots, empty, steps = history
    layer, _ = start(num_experts, num_slots, empty=empty)
    for needed, value in steps:
        before = np.asarray(layer.owner)
        layer, plan = step(layer, needed, value)
        slot_of, owner, count = np.asarray(layer.slot_of), np.asarray(layer.owner), int(plan.count)
        assert_inverse(slot_of, owner)
        resident = {expert for expert in range(num_experts) if slot_of[expert] != NONE}
        victims = before[np.asarray(plan.slot_ids)[:count]].tolist()
        admitted = np.asarray(plan.expert_ids)[:count].tolist()
        assert not set(victims) & needed
        assert set(admitted) <= needed - set(before.tolist())
        if len(needed) <= num_slots:
            assert needed <= resident
            assert count == len(needed - set(before.tolist()))
        else:  # what is kept is worth at least what it replaced
            assert all(old == NONE or value[new] > value[old] for new, old in zip(admitted, victims, strict=True))


@REPEATED
@given(histories())
def test_steps_that_are_known_to_fit_are_the_same_for_less(history: tuple[int, int, bool, list[Step]]) -> None:
    num_experts, num_slots, empty, steps = history
    layer, _ = start(num_experts, num_slots, empty=empty)
    for needed, value in ((needed, value) for needed, value in steps if len(needed) <= num_slots):
        known, _ = step(layer, needed, value, fits=True)
        layer, _ = step(layer, needed, value)
        np.testing.assert_array_equal(known.owner, layer.owner)


def assert_inverse(slot_of: np.ndarray, owner: np.ndarray) -> None:
    """No slot has two owners, no expert two slots."""
    assert all(owner[slot] == expert for expert, slot in enumerate(slot_of) if slot != NONE)
    assert all(slot_of[expert] == slot for slot, expert in enumerate(owner) if expert != NONE)


def test_the_least_valuable_goes_first() -> None:
    """By hand: E = 6, S = 3."""
    layer, _ = start(6, 3, empty=False)
    layer, plan = step(layer, {2, 5}, [7, 4, 0, 0, 0, 0])  # 2 is worth nothing, but it is needed
    assert np.asarray(layer.owner).tolist() == [0, 5, 2]
    assert np.asarray(layer.slot_of).tolist() == [0, NONE, 2, NONE, NONE, 1]
    assert (int(plan.count), int(plan.expert_ids[0]), int(plan.slot_ids[0])) == (1, 5, 1)


def test_a_step_that_is_too_large_admits_what_is_worth_more() -> None:
    layer, _ = start(6, 3, empty=False)
    layer, plan = step(layer, {1, 3, 4, 5}, [3, 0, 2, 1, 9, 3])  # 4 takes the place of 2; 5 is no better than 0
    assert np.asarray(layer.owner).tolist() == [0, 1, 4]
    assert (int(plan.count), int(plan.expert_ids[0]), int(plan.slot_ids[0])) == (1, 4, 2)
    layer, plan = step(layer, {0, 1, 2, 3, 4, 5}, [0, 0, 9, 9, 0, 9])  # residents that are needed stay
    assert np.asarray(layer.owner).tolist() == [0, 1, 4]
    assert int(plan.count) == 0


@pytest.mark.parametrize(("num_experts", "num_slots"), SIZES)
def test_the_start(num_experts: int, num_slots: int) -> None:
    residency = init_residency(3, num_experts, num_slots)
    assert int(residency.clock) == 0
    for layer in residency.layers:
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
