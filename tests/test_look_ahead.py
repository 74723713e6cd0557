"""Prefetching changes when weights come, never what is computed; and its counters are what they say."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jmoe.decoding.contest import Choice
from jmoe.decoding.sampling import SamplingParams, batch_sampling
from jmoe.engine import Engine, Weights
from jmoe.experts.layer import OffloadedExperts, ResidentExperts
from jmoe.experts.look_ahead import Prefetch, count, guess, pays
from jmoe.experts.residency import NONE
from jmoe.experts.slots import ExpertSlots, SlotLayout, init_slots
from jmoe.generation import Generation
from jmoe.model.router import Routing
from jmoe.prefetch_stats import PrefetchStats
from jmoe.prefetching import prefetching_line
from kernels_pallas.prefetch.arrivals import Arrivals
from kernels_pallas.route.api import route
from tests import models
from tests.models import SMALL

E, A, ROWS = SMALL.num_experts, SMALL.num_experts_per_tok, 3 * SMALL.moe_intermediate_size
NUM_LAYERS, ROW_BYTES = len(SMALL.moe_layers), SMALL.expert_bytes // ROWS
PROMPTS = models.prompts(9, 4, 13)
AMOUNTS = (0.02, 0.5, 1.0, 1.7)  # a row, half an expert, one, one and most of a second
ALONE = [SamplingParams(max_new_tokens=24, temperature=2.0)]
TOGETHER = [*ALONE, SamplingParams(max_new_tokens=9), SamplingParams(max_new_tokens=17, temperature=0.8, seed=2)]


@functools.cache
def engine(**runtime) -> Engine:
    return models.engine(SMALL, **{"prefill_chunk": 16, "decode_chunk": 12, "expert_slots": A, **runtime})


@functools.cache
def ran(num_sequences: int = 1, **runtime) -> Generation:
    """The fewest slots that there may be, unless it says more."""
    requests = TOGETHER if num_sequences > 1 else ALONE
    generation = engine(**runtime).generate(PROMPTS[:num_sequences], requests)
    generation.results()
    return generation


def tokens(generation: Generation) -> list[tuple[int, ...]]:
    return [completion.token_ids for completion in generation.completions]


def came(generation: Generation) -> PrefetchStats:
    assert generation.stats.prefetch is not None
    return generation.stats.prefetch


# The promises


@pytest.mark.parametrize(
    ("num_sequences", "expert_slots", "amount"),
    [*((1, A, amount) for amount in AMOUNTS), (3, 3 * A, 0.5), (3, 3 * A, 1.7)],
)
def test_prefetching_changes_no_token_and_no_residency(num_sequences: int, expert_slots: int, amount: float) -> None:
    """The same experts hit and missed; part of those missed came early, and none of it is counted twice."""
    sizes = {"batch_size": num_sequences, "expert_slots": expert_slots}
    plain = ran(num_sequences, **sizes).stats
    ahead = ran(num_sequences, prefetch="lookahead", prefetch_experts=amount, **sizes)
    assert tokens(ahead) == tokens(ran(num_sequences, **sizes))
    stats, brought = ahead.stats, came(ahead)
    assert stats.decode == plain.decode
    assert 0 < brought.useful_bytes < plain.link_bytes
    assert brought.useful_bytes + brought.wasted_bytes == brought.prefetched_bytes
    over_the_link = brought.prefetched_bytes + (stats.decode.fetched * SMALL.expert_bytes - brought.useful_bytes)
    assert stats.link_bytes == over_the_link


@pytest.mark.parametrize("amount", AMOUNTS)
def test_all_rows_come_where_experts_enough_are_missing(amount: float) -> None:
    made = ran(prefetch="lookahead", prefetch_experts=amount)
    num_rows = max(1, round(amount * ROWS))
    assert came(made).prefetched_bytes == made.stats.num_decode_steps * NUM_LAYERS * num_rows * ROW_BYTES


def test_a_batch_that_may_need_more_experts_than_there_are_slots_prefetches_nothing() -> None:
    """Of the same engine, a smaller one does."""
    sizes = {"batch_size": 3, "expert_slots": A}
    together, alone = (ran(number, prefetch="lookahead", **sizes) for number in (3, 1))
    assert tokens(together)[0] == tokens(alone)[0] == tokens(ran())[0]
    assert together.stats.prefetch is None
    assert came(alone).prefetched_bytes > 0


def test_nothing_is_prefetched_where_everything_is_resident() -> None:
    assert engine(expert_slots=E, prefetch="lookahead").prefetching is None
    assert engine(expert_slots=E, prefetch="auto").prefetching is None


def without_attention(weights: Weights) -> Weights:
    """Attention adds nothing to the residual stream."""
    params = {path: jnp.zeros_like(leaf) if "o_proj" in path else leaf for path, leaf in weights.params.items()}
    assert any("o_proj" in path for path in params)
    return dataclasses.replace(weights, params=params)


def test_where_attention_adds_nothing_the_guess_is_the_routing() -> None:
    """So the best guess is asked for wherever any expert is missing, and is wasted where none is."""
    made = engine(prefetch="lookahead", prefetch_experts=1.0)
    oracle = Engine.start(SMALL, made.runtime, lambda: without_attention(models.weights()))
    generation = oracle.generate(PROMPTS[:1], ALONE)
    generation.results()
    useful, wasted = (
        size / SMALL.expert_bytes for size in (came(generation).useful_bytes, came(generation).wasted_bytes)
    )
    fetched, steps = generation.stats.decode.fetched, generation.stats.num_decode_steps
    assert useful + wasted == steps * NUM_LAYERS
    assert fetched / A <= useful <= fetched
    assert came(generation).useful_share > came(ran(prefetch="lookahead", prefetch_experts=1.0)).useful_share


# One layer after the other, against plain Python


def layout(num_slots: int) -> SlotLayout:
    return SlotLayout(num_layers=NUM_LAYERS, num_experts=E, slots_per_layer=num_slots, num_staging=2)


@functools.cache
def step(num_experts: int):
    store = models.weights().store

    @jax.jit
    def run(slots: ExpertSlots, xs, routings, guesses, valid, num_rows):
        prefetch = Prefetch(num_experts, num_rows, A)
        experts = OffloadedExperts(store, slots, layout(6), admits=True, policy="lru", prefetch=prefetch)
        carry, ys = experts.start(), []
        for n in range(NUM_LAYERS):
            _, carry = experts.look_ahead(n, xs[n], functools.partial(jnp.asarray, guesses[n]), valid, carry)
            y, carry = experts(n, xs[n], routings[n], carry)
            ys.append(y)
        return ys, experts.finish(carry), experts.prefetched(carry)

    return run


@functools.cache
def resident():
    layers = models.on_device(models.weights()).store.layers

    @jax.jit
    def run(xs, routings):
        return [ResidentExperts(layers)(n, xs[n], routings[n], None)[0] for n in range(NUM_LAYERS)]

    return run


def rows_by_hand(odds: np.ndarray, slot_of: np.ndarray, needed: set[int], num_experts: int, left: int) -> list[int]:
    """[useful, wasted] rows of a layer."""
    found = [0, 0]
    missing = [expert for expert in np.argsort(-odds, kind="stable") if slot_of[expert] == NONE and odds[expert] > 0]
    for expert in missing[:num_experts]:
        found[expert not in needed] += min(ROWS, left)
        left -= min(ROWS, left)
    return found


@pytest.mark.parametrize("is_oracle", [False, True])
@pytest.mark.parametrize(("num_experts", "num_rows"), [(1, 0), (1, 7), (1, ROWS), (2, ROWS + 11), (2, 5 * ROWS)])
def test_counts_and_results_are_those_of_plain_python(num_experts: int, num_rows: int, is_oracle: bool) -> None:
    """Of three rows, two of them tokens; or one, whose guesses are its routing's own logits."""
    rng, valid = np.random.default_rng(num_rows), jnp.asarray([[True], [False], [not is_oracle]])
    slots, seen = init_slots(models.weights().store, layout(6), policy="lru"), set()
    for _ in range(12):
        xs = jnp.asarray(rng.normal(size=(NUM_LAYERS, 3, SMALL.hidden_size)), jnp.float32)
        logits = jnp.asarray(3 * rng.normal(size=(NUM_LAYERS, 3, E)), jnp.float32)
        routings = [Routing(*route(layer, valid[:, 0], num_chosen=A, normalize=True), layer) for layer in logits]
        guesses = logits if is_oracle else jnp.flip(logits, axis=0)
        before = np.asarray(slots.residency.stacked.slot_of)
        ys, slots, counted = step(num_experts)(slots, xs, routings, guesses, valid, jnp.asarray(num_rows, jnp.int32))
        for y, expected in zip(ys, resident()(xs, routings), strict=True):
            np.testing.assert_allclose(y, expected, atol=2e-6 * max(1, np.abs(expected).max()))
        odds = np.asarray(jnp.sum(jnp.where(valid, jax.nn.softmax(guesses, axis=-1), 0.0), axis=1))
        for n, routing in enumerate(routings):
            needed = set(np.asarray(routing.expert_ids).ravel().tolist()) - {E}
            expected = rows_by_hand(odds[n], before[n], needed, num_experts, num_rows)
            assert [int(counted.useful[n]), int(counted.wasted[n])] == expected
            seen.add((expected[0] > 0, expected[1] > 0))
            if is_oracle and num_rows and any(before[n][expert] == NONE for expert in needed):
                assert expected[0] > 0, "a missing expert of the routing is the best guess"
    assert len(seen) > (num_rows > 0), "now useful, now wasted"


def line(**runtime) -> str:
    made = engine(**{"prefetch": "lookahead", **runtime})
    return prefetching_line(SMALL, made.runtime, made.plan)


def test_what_the_engine_says() -> None:
    assert line() == "prefetch of 0.5 experts a layer, at most 6.00 KiB a step, while attention runs"
    assert "at most 24.00 KiB a step" in line(prefetch_experts=2)
    assert line(batch_size=3).endswith(
        "; not for 3 sequences together, which may ask for 6 experts of a layer of 2 slots"
    )
    assert "of 0, 0.25, 0.5, 1 experts a layer, whichever is fastest, at most 12.00 KiB a step" in line(prefetch="auto")
    assert line(expert_slots=E) == "prefetch: none is needed, every expert is resident"


# Its parts


@pytest.mark.parametrize(
    ("num_slots", "num_choices", "expected"),
    [(4, 4, True), (4, 5, False), (2, 2, True), (7, 100, False), (E, 2, False), (E, 100, False)],
)
def test_where_it_pays(num_slots: int, num_choices: int, expected: bool) -> None:
    assert pays(layout(num_slots), num_choices) is expected


LOGITS = jnp.log(jnp.asarray([[0.4, 0.3, 0.2, 0.1], [0.1, 0.1, 0.6, 0.2], [0.97, 0.01, 0.01, 0.01]]))


@pytest.mark.parametrize(
    ("valid", "resident", "num_experts", "expected"),
    [
        ([1, 0, 0], [], 1, [0]),
        ([1, 0, 0], [], 3, [0, 1, 2]),
        ([1, 0, 0], [0, 2], 1, [1]),
        ([1, 0, 0], [0, 2], 3, [1, 3]),
        ([1, 1, 0], [], 2, [2, 0]),  # 0.8, then 0.5
        ([0, 1, 0], [2], 3, [3, 0, 1]),  # of equals the first
        ([0, 0, 0], [], 2, []),
        ([1, 1, 1], [0, 1, 2, 3], 2, []),
    ],
)
def test_guesses_are_the_most_probable_that_are_not_resident(valid, resident, num_experts, expected) -> None:
    slot_of = jnp.asarray([expert if expert in resident else NONE for expert in range(4)])
    made = jax.jit(guess, static_argnums=3)(LOGITS, jnp.asarray(valid, bool), slot_of, num_experts)
    assert np.asarray(made.expert_ids).shape == (num_experts,)
    assert np.asarray(made.expert_ids)[: int(made.count)].tolist() == expected


def test_an_impossible_expert_is_no_guess() -> None:
    logits = jnp.asarray([[0.0, -jnp.inf, -jnp.inf, 0.0]])
    assert int(guess(logits, jnp.ones(1, bool), jnp.full(4, NONE), 3).count) == 2


def test_counts_by_hand() -> None:
    """Layer 0: 10 rows of expert 1, needed, and 3 of 2, not. Layer 1: 5 of 3, not, and nobody."""

    def arrivals(expert_ids, num_rows) -> Arrivals:
        return Arrivals(jnp.asarray(expert_ids), jnp.asarray(num_rows), jnp.zeros((2, 3, 1, 1)))

    needed = jnp.asarray([[1, 1, 0, 1], [1, 0, 1, 0]], bool)
    made = count([arrivals([1, 2], [10, 3]), arrivals([3, NONE], [5, 0])], needed)
    assert np.asarray(made.useful).tolist() == [10, 0]
    assert np.asarray(made.wasted).tolist() == [3, 5]


def test_an_amount_that_is_measured_changes_no_token(monkeypatch: pytest.MonkeyPatch) -> None:
    """In one generation plain steps and others; which is said."""
    made, amounts = engine(prefetch="auto"), iter([0, ROWS, 0, ROWS // 4, ROWS // 2, *[0] * 24])
    assert made.prefetching is not None
    monkeypatch.setattr(made.prefetching, "choose", lambda num_sequences: Choice(next(amounts), 3))
    generation = made.generate(PROMPTS[:1], ALONE)
    generation.results()
    assert tokens(generation) == tokens(ran())
    steps = came(generation).steps
    assert [steps[amount] for amount in (0.25, 0.5, 1.0)] == [3, 3, 3]
    assert steps[0] == generation.stats.num_decode_steps - 9
    assert came(generation).prefetched_bytes == 3 * NUM_LAYERS * (ROWS + ROWS // 4 + ROWS // 2) * ROW_BYTES
    chosen = f"{steps[0]} steps of 0, 3 steps of 0.25, 3 steps of 0.5, 3 steps of 1 experts a layer"
    assert any(text.endswith(chosen) for text in generation.stats.lines())


def test_the_guess_is_made_before_attention() -> None:
    """A barrier a layer keeps XLA from making it part of the true router's product; plain steps have no such."""
    made = engine(prefetch="lookahead")
    state, steps, one = made.new_state(1, [1]), made.steps, jnp.asarray(1, jnp.int32)
    inputs = made.weights.params, made.weights.store, state, batch_sampling(ALONE, ()), one
    ahead = type(steps).decode_prefetching.lower(steps, *inputs, one, prefetch_experts=1, capacity=2, mode="greedy")
    plain = type(steps).decode.lower(steps, *inputs, capacity=2, mode="greedy")
    made.give_back(state)
    barriers = [lowered.as_text().count("stablehlo.optimization_barrier") for lowered in (plain, ahead)]
    assert barriers[1] == barriers[0] + NUM_LAYERS


def test_what_was_measured_is_learned() -> None:
    """The first call of an engine is a plain one, and it is remembered from then on."""
    made = engine(prefetch="auto")
    assert made.prefetching is not None
    made.generate(PROMPTS[:1], ALONE).results()
    assert made.prefetching.contest(1).seconds > 0
    assert made.prefetching.contest(1).best == 0


def test_another_amount_compiles_nothing() -> None:
    """Up to the same number of experts: rows are an argument."""
    steps = type(engine().steps)
    ran(prefetch="lookahead", prefetch_experts=0.5)
    before = steps.decode_prefetching._cache_size()
    ran(prefetch="lookahead", prefetch_experts=0.25)
    assert steps.decode_prefetching._cache_size() == before
