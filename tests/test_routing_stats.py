"""Routing statistics: by hand, for routing that is constant or uniform, and against plain loops over sets."""

import itertools

import hypothesis.extra.numpy as arrays
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jmoe import routing_stats
from tests.twin import Twin
from tools.compare_slot_pools import LRU

BY_HAND = np.array([[0, 1], [1, 2], [3, 0], [0, 3]])[:, None]  # [T=4, L=1, A=2]


@st.composite
def routings(draw: st.DrawFn) -> tuple[np.ndarray, int]:
    """(ids [T, L, A], E), few experts so that they come again."""
    num_experts = draw(st.integers(2, 7))
    num_active = draw(st.integers(1, num_experts))
    shape = draw(st.tuples(st.integers(2, 12), st.integers(1, 2)))
    order = draw(arrays.arrays(float, (*shape, num_experts), elements=st.floats(0, 1, width=16)))
    return np.argsort(order, axis=-1)[..., :num_active], num_experts


def uniform_routing(num_tokens: int, num_layers: int, num_experts: int, num_active: int) -> np.ndarray:
    order = np.random.default_rng(0).random((num_tokens, num_layers, num_experts))
    return np.argsort(order, axis=-1)[..., :num_active]


def overlap(ids: np.ndarray, layer: int, t: int, u: int) -> float:
    return len(set(ids[t, layer]) & set(ids[u, layer])) / ids.shape[2]


def test_by_hand() -> None:
    use = routing_stats.expert_use(BY_HAND, 5)
    np.testing.assert_array_equal(routing_stats.activation_counts(BY_HAND, 5), [[3, 2, 1, 2, 0]])
    np.testing.assert_allclose(use, [[3 / 8, 2 / 8, 1 / 8, 2 / 8, 0]])
    entropy = -(3 / 8 * np.log(3 / 8) + 2 / 8 * np.log(2 / 8) * 2 + 1 / 8 * np.log(1 / 8))
    np.testing.assert_allclose(routing_stats.effective_experts(use), [np.exp(entropy)])
    np.testing.assert_array_equal(routing_stats.num_dead(use, 0.2), [2])
    np.testing.assert_allclose(routing_stats.reuse(BY_HAND), [(1 / 2 + 0 + 1) / 3])
    np.testing.assert_allclose(routing_stats.reuse(BY_HAND, lag=2), [(1 / 2 + 0) / 2])
    # 0 1 2 and 3 are new; 1 comes again after 0; 0 after 1 and 2; then 0 after 3, which its row named first, and 3
    np.testing.assert_array_equal(routing_stats.reuse_distances(BY_HAND, 5), [[1, 2, 1, 0, 0, 4]])


def test_hit_rates_are_a_cumulative_share() -> None:
    rates = routing_stats.lru_hit_rate(np.array([[1, 2, 1, 0, 0, 4]]))
    np.testing.assert_allclose(rates, [[0, 1 / 8, 3 / 8, 4 / 8, 4 / 8, 4 / 8]])


def test_skew_by_hand() -> None:
    counts = np.array([[1, 5, 0, 2], [2, 2, 2, 2]])
    np.testing.assert_allclose(
        routing_stats.concentration(counts), [[0, 5 / 8, 7 / 8, 1, 1], [0, 1 / 4, 1 / 2, 3 / 4, 1]]
    )
    np.testing.assert_allclose(routing_stats.top_share(counts, 0.25), [5 / 8, 1 / 4])
    np.testing.assert_allclose(routing_stats.top_share(counts, 0.375), [6 / 8, 3 / 8])  # one expert and a half
    np.testing.assert_allclose(routing_stats.top_share(counts, 1.0), [1, 1])
    np.testing.assert_allclose(routing_stats.top_share(counts, 0.0), [0, 0])


def test_similarity_by_hand() -> None:
    """Alike in the first layer but for the scale; nothing, or 45 degrees, in common in the second."""
    counts = np.array([[[1, 1, 0], [3, 0, 0]], [[2, 2, 0], [0, 1, 0]], [[5, 5, 0], [4, 4, 0]]])
    half = (1 + np.sqrt(0.5)) / 2
    np.testing.assert_allclose(routing_stats.similarity(counts), [[1, 0.5, half], [0.5, 1, half], [half, half, 1]])


def test_constant_routing() -> None:
    ids = np.tile(np.array([[4, 1, 2], [0, 5, 3]]), (9, 1, 1))
    np.testing.assert_allclose(routing_stats.effective_experts(routing_stats.expert_use(ids, 6)), [3, 3])
    np.testing.assert_array_equal(routing_stats.num_dead(routing_stats.expert_use(ids, 6), 0.01 / 6), [3, 3])
    np.testing.assert_array_equal(routing_stats.reuse(ids, lag=4), [1, 1])
    np.testing.assert_allclose(routing_stats.shuffled_reuse(ids, 6), [1, 1])
    np.testing.assert_array_equal(routing_stats.reuse_distances(ids, 6), [[8, 8, 8, 0, 0, 0, 3]] * 2)


def test_uniform_routing() -> None:
    ids = uniform_routing(2000, 2, 32, 4)
    hit_rate = routing_stats.lru_hit_rate(routing_stats.reuse_distances(ids, 32))
    np.testing.assert_allclose(routing_stats.effective_experts(routing_stats.expert_use(ids, 32)), 32, rtol=0.01)
    np.testing.assert_allclose(routing_stats.reuse(ids), 4 / 32, atol=0.01)
    np.testing.assert_allclose(routing_stats.reuse(ids, lag=64), 4 / 32, atol=0.01)
    np.testing.assert_allclose(routing_stats.shuffled_reuse(ids, 32), 4 / 32, atol=0.002)
    np.testing.assert_allclose(hit_rate[:, [4, 8, 16]], [[4 / 32, 8 / 32, 16 / 32]] * 2, atol=0.02)


def test_popular_experts_and_runs_of_them_are_told_apart() -> None:
    """Two experts in long runs are reused; in random order the same two are reused half the time."""
    runs = np.repeat([0, 1] * 5, 20)[:, None, None]
    assert routing_stats.reuse(runs)[0] == pytest.approx(190 / 199)
    expected = 2 * 100 * 99 / (200 * 199)
    np.testing.assert_allclose(routing_stats.shuffled_reuse(runs, 4), [expected])


@given(routings())
@settings(max_examples=60, deadline=None)
def test_use_and_reuse_are_what_sets_say(made: tuple[np.ndarray, int]) -> None:
    ids, num_experts = made
    num_tokens, num_layers, num_active = ids.shape
    use = routing_stats.expert_use(ids, num_experts)
    np.testing.assert_allclose(use.sum(axis=1), 1)
    effective = routing_stats.effective_experts(use)
    assert ((num_active - 1e-9 <= effective) & (effective <= num_experts + 1e-9)).all()
    for layer in range(num_layers):
        lag = num_tokens // 2
        lagged = [overlap(ids, layer, t, t - lag) for t in range(lag, num_tokens)]
        assert routing_stats.reuse(ids, lag)[layer] == pytest.approx(np.mean(lagged))
        pairs = [overlap(ids, layer, *pair) for pair in itertools.combinations(range(num_tokens), 2)]
        assert routing_stats.shuffled_reuse(ids, num_experts)[layer] == pytest.approx(np.mean(pairs))


@given(routings())
@settings(max_examples=60, deadline=None)
def test_hit_rates_are_those_of_an_lru(made: tuple[np.ndarray, int]) -> None:
    """At every size that holds a token; a row's last expert is used first, so the LRU gets rows in reverse."""
    ids, num_experts = made
    num_active = ids.shape[2]
    histogram = routing_stats.reuse_distances(ids, num_experts)
    assert (histogram.sum(axis=1) == ids.shape[0] * num_active).all()
    hit_rate = routing_stats.lru_hit_rate(histogram)
    for layer, slots in itertools.product(range(ids.shape[1]), range(num_active, num_experts + 1)):
        lru = LRU(range(-slots, 0))  # full of what nobody asks for
        hits = sum(lru.step(row[::-1].tolist()) for row in ids[:, layer])
        assert hit_rate[layer, slots] == pytest.approx(hits / ids[:, layer].size)


@given(routings())
@settings(max_examples=60, deadline=None)
def test_slots_for_one_token_hit_what_the_token_before_used(made: tuple[np.ndarray, int]) -> None:
    """So does the residency that jmoe decodes with, whose ties go by slot: at A slots there are none."""
    ids, num_experts = made
    num_tokens, num_layers, num_active = ids.shape
    rates = routing_stats.lru_hit_rate(routing_stats.reuse_distances(ids, num_experts))[:, num_active]
    np.testing.assert_allclose(rates, routing_stats.reuse(ids) * (num_tokens - 1) / num_tokens)
    for layer in range(num_layers):
        twin = Twin.empty(num_active)
        fetched = sum(len(twin.admit(set(row.tolist()), [0] * num_experts)) for row in ids[:, layer])
        assert rates[layer] == pytest.approx(1 - fetched / (num_tokens * num_active))


def test_shuffled_prompts_keep_tokens_and_lengths() -> None:
    sequences = [np.full((length, 1, 1), length) for length in (50, 30, 90)]
    made = routing_stats.shuffled_prompts(sequences, seed=1)
    assert [ids.shape for ids in made] == [(50, 1, 1), (30, 1, 1), (90, 1, 1)]
    np.testing.assert_array_equal(np.sort(np.concatenate(made), axis=0), np.sort(np.concatenate(sequences), axis=0))
    assert all(len(np.unique(ids)) == 3 for ids in made)  # each has tokens of each


def test_a_summary_tells_prompts_from_their_pool() -> None:
    """Each prompt keeps to its own two experts of four: skewed each, even together."""
    sequences = [np.tile([[[0, 1]]], (300, 1, 1)), np.tile([[[2, 3]]], (300, 1, 1))]
    made = routing_stats.summarize(sequences, 4)
    assert (made.num_tokens, made.num_active, made.num_experts) == (300, 2, 4)
    np.testing.assert_allclose(made.use, [[0.25] * 4])
    assert list(made.reuse) == [1, 2, 4, 8, 16, 32, 64, 128, 256]
    assert all(values == [1.0] for values in made.reuse.values())
    np.testing.assert_allclose(made.hit_rate, [[0, 299 / 600, 299 / 300, 299 / 300, 299 / 300]])
    np.testing.assert_allclose(routing_stats.top_share(made.counts, 0.5), [[1], [1]])
    np.testing.assert_allclose(routing_stats.top_share(made.shuffled_counts, 0.5), [[0.5], [0.5]], atol=0.1)
    assert routing_stats.similarity(made.counts)[0, 1] == 0
    assert routing_stats.similarity(made.shuffled_counts)[0, 1] > 0.95


@pytest.mark.parametrize(
    ("ids", "message"),
    [
        (np.zeros((3, 2), int), r"int64\[3, 2\]; expected integers \[T, L, A\]"),
        (np.zeros((0, 2, 1), int), "none of them 0"),
        (np.zeros((3, 2, 1)), "float64"),
        (np.full((3, 2, 1), 4), r"in 4\.\.4, but there are 4 experts: expected 0\.\.3; leave out rows"),
        (np.full((3, 2, 1), -1), r"in -1\.\.-1"),
        (np.zeros((3, 2, 2), int), "the same expert twice"),
    ],
)
def test_what_is_no_routing_is_refused(ids: np.ndarray, message: str) -> None:
    for measure in (routing_stats.activation_counts, routing_stats.reuse_distances):
        with pytest.raises(ValueError, match=message):
            measure(ids, 4)


def test_what_cannot_be_measured_is_refused() -> None:
    with pytest.raises(ValueError, match=r"lag=4 is outside 1\.\.3 for 4 tokens"):
        routing_stats.reuse(BY_HAND, lag=4)
    with pytest.raises(ValueError, match="lag=0"):
        routing_stats.reuse(BY_HAND, lag=0)
    with pytest.raises(ValueError, match=r"1 token\(s\)"):
        routing_stats.shuffled_reuse(BY_HAND[:1], 4)
    with pytest.raises(ValueError, match=r"fraction=1.5 is outside 0\.\.1"):
        routing_stats.top_share(np.ones((1, 4)), 1.5)
    with pytest.raises(ValueError, match=r"shapes \[\(3, 1, 2\), \(4, 1, 2\)\]; expected one and the same"):
        routing_stats.summarize([BY_HAND, BY_HAND[:3]], 4)
