"""Executing guesses: it is the model where guesses are right, what was guessed where they are not, and always said."""

import dataclasses
import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jmoe.config import ModelConfig, RuntimeConfig
from jmoe.decoding.sampling import SamplingParams, batch_sampling, sampling_mode
from jmoe.engine import Engine, Weights
from jmoe.executing import executed_guess, executing_line, guessed_layers
from jmoe.experts.execute_guess import ExecutedGuess, GuessedRouting
from jmoe.experts.prefetch import Methods, everywhere, predict, predicted_logits
from jmoe.experts.prefetch_file import Calibration
from jmoe.experts.residency import init_residency
from jmoe.experts.store import ExpertStore
from jmoe.generation import Generation
from jmoe.memory import host_sharding
from jmoe.model.decoder import MoE
from jmoe.model.router import Routing
from kernels_pallas.route.api import route
from tests import models
from tests.models import SMALL

pytestmark = pytest.mark.usefixtures("brings_all_guesses")

CONFIG = dataclasses.replace(SMALL, num_hidden_layers=2, mlp_only_layers=())
THREE = dataclasses.replace(SMALL, mlp_only_layers=())  # three layers, each a mixture of experts
E, A, D = CONFIG.num_experts, CONFIG.num_experts_per_tok, CONFIG.hidden_size
PROMPTS = models.prompts(9, 4, 13, config=CONFIG)
TOGETHER = [
    SamplingParams(max_new_tokens=20, temperature=2.0),
    SamplingParams(max_new_tokens=9),
    SamplingParams(max_new_tokens=14, temperature=0.8, seed=2),
]


def calibration(scale: float = 1.0, recall: tuple[float, ...] = (0.5,)) -> Calibration:
    """Default vectors of this size, in directions of their own; a layer for each recall, and one more."""
    num_layers = 1 + len(recall)
    vectors = scale * np.random.default_rng(5).normal(size=(num_layers, E, D)).astype(np.float32)
    methods: Methods = everywhere("default_vectors", num_layers)
    return Calibration("abc", vectors, everywhere(None, num_layers), methods, (recall, recall[1:]))


@functools.cache
def weights(*, foresees: bool) -> Weights:
    """Tokens depend much on the last experts. If it `foresees`, nothing is added between the two layers' routers."""
    made, silent = models.weights(CONFIG), "layers/1/attention/o_proj/kernel"
    params = {**made.params, silent: (not foresees) * made.params[silent]}
    scaled = (np.asarray(layer) * by for layer, by in zip(made.store.layers, (not foresees, 30), strict=True))
    return Weights(params, ExpertStore(tuple(jax.device_put(layer, host_sharding()) for layer in scaled)))


@functools.cache
def engine(*, scale: float = 1.0, foresees: bool = False, **runtime) -> Engine:
    sizes = {"expert_slots": A, "staging_slots": 3, "max_seq_len": 64, "prefill_chunk": 16, "decode_chunk": 20}
    options = RuntimeConfig(**{**sizes, "measure_link": False, "record_routing": True, **runtime})
    return Engine.start(CONFIG, options, lambda: weights(foresees=foresees), calibration=calibration(scale))


@functools.cache
def ran(num_sequences: int = 1, **options) -> Generation:
    generation = engine(**options).generate(PROMPTS[:num_sequences], TOGETHER[:num_sequences])
    generation.results()
    return generation


def tokens(generation: Generation) -> list[tuple[int, ...]]:
    return [completion.token_ids for completion in generation.completions]


# Whole generations


def test_where_guesses_are_right_the_tokens_are_the_models() -> None:
    """Default vectors of nothing are the outputs of experts that add nothing; others are not, and change tokens."""
    plain = {"foresees": True, "batch_size": 3, "expert_slots": 3 * A}
    right, wrong = (ran(3, **plain, execute_guess=0.0, scale=scale) for scale in (0.0, 1.0))
    assert tokens(right) == tokens(ran(3, **plain))
    assert right.stats.decode == ran(3, **plain).stats.decode
    assert tokens(wrong) != tokens(right)


def test_no_layer_passes_a_gate_above_every_recall() -> None:
    assert engine(execute_guess=0.51).executed is None
    assert tokens(ran(execute_guess=0.51)) == tokens(ran())


def test_what_is_guessed_wrong_changes_tokens() -> None:
    guess = engine(execute_guess=0.5).executed
    assert guess is not None
    assert guess.layers == (1,)
    assert tokens(ran(execute_guess=0.5)) == tokens(ran(execute_guess=0.0)) != tokens(ran())


@pytest.mark.parametrize(("num_sequences", "expert_slots"), [(1, A), (3, 3 * A)])
def test_what_is_guessed_is_fetched_and_nothing_else(num_sequences: int, expert_slots: int) -> None:
    """So a prefetch is never wrong, and where it brings as many experts as a layer may ask for, all come early."""
    options = {"batch_size": num_sequences, "expert_slots": expert_slots, "execute_guess": 0.0}
    ahead = {"prefetch": "lookahead", "prefetch_experts": 4.0, **options}
    made, early = engine(**ahead), ran(num_sequences, **ahead)
    assert tokens(early) == tokens(ran(num_sequences, **options))
    assert early.stats.decode == ran(num_sequences, **options).stats.decode
    came = early.stats.prefetch
    assert came is not None
    assert came.useful_share == 1
    state = made.new_state(1, [1])
    fetched = np.asarray(state.experts.residency.decode.fetched)
    made.give_back(state)
    assert fetched[0] > 0
    assert 0 < came.useful_bytes <= fetched[1:].sum() * CONFIG.expert_bytes
    if num_sequences == 1:
        assert came.useful_bytes == fetched[1:].sum() * CONFIG.expert_bytes


def test_guesses_are_executed_where_the_first_layer_is_guessed_from_past_requests() -> None:
    """And are still known to come: at most the first layer's are wasted."""
    ahead = {"prefetch": "both", "prefetch_experts": 4.0, "expert_slots": A, "execute_guess": 0.0}
    early, plain = ran(**ahead), ran(expert_slots=A, execute_guess=0.0)
    assert tokens(early) == tokens(plain)
    assert early.stats.decode == plain.stats.decode
    by_looking = ran(**{**ahead, "prefetch": "lookahead"}).stats.prefetch
    assert early.stats.prefetch is not None
    assert by_looking is not None
    assert early.stats.prefetch.useful_bytes > by_looking.useful_bytes


def test_what_is_recorded_is_what_was_computed() -> None:
    """Prompts are computed as they should be."""
    plain, guessed = (ran(**options).trace for options in ({}, {"execute_guess": 0.0}))
    np.testing.assert_array_equal(plain.expert_ids[plain.is_prefill], guessed.expert_ids[guessed.is_prefill])
    first = np.flatnonzero(~plain.is_prefill)[0]  # the same token, after the same ones
    assert plain.expert_ids[first, 0].tolist() == guessed.expert_ids[first, 0].tolist()
    assert plain.expert_ids[first, 1].tolist() != guessed.expert_ids[first, 1].tolist()


def test_scores_are_those_of_decoding_with_the_guesses() -> None:
    made, first = engine(execute_guess=0.0), 7
    state, sampling = made.new_state(1, [15]), batch_sampling(TOGETHER[:1], ())
    state = dataclasses.replace(state, last_tokens=jnp.full_like(state.last_tokens, first))
    count, weights = jnp.asarray(15, jnp.int32), made.weights
    inputs = weights.params, weights.store, state, sampling, count, made.executed
    state, emitted = made.steps.decode(*inputs, capacity=20, mode=sampling_mode(TOGETHER[:1]))
    made.give_back(state)
    ids = [first, *np.asarray(emitted.token_ids)[0, :15].tolist()]
    for scorer in (made, engine(execute_guess=0.0, expert_slots=E)):
        np.testing.assert_allclose(scorer.score([ids], made.executed)[0], emitted.logprobs[0, :15], atol=1e-5)


# One layer after the other, against plain Python


class Listening(MoE):
    """Adds nothing, and carries the routings that it was asked for, first those of `look_ahead`."""

    def look_ahead(self, moe_layer, residual, routing, carry):
        return (*carry, routing)

    def __call__(self, moe_layer, x, routing, carry):
        return jnp.zeros_like(x), (*carry, routing)


@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("layers", [(1, 2), (2,), (1,)])
def test_guessed_layers_get_the_guess_and_the_others_their_router(layers: tuple[int, ...], normalize: bool) -> None:
    """Four rows, the second of them no token. A guess goes on from what is computed, guessed or not."""
    rng, num_layers = np.random.default_rng(len(layers)), 3
    predictor = calibration(recall=(0.5, 0.25)).predictor(THREE, models.weights(THREE).params)
    guess = ExecutedGuess(predictor, layers, normalize)
    valid = jnp.asarray([True, False, True, True])
    residuals = jnp.asarray(rng.normal(size=(num_layers, 4, D)), jnp.float32)
    logits = jnp.asarray(3 * rng.normal(size=(num_layers, 4, E)), jnp.float32)
    true = [Routing(*route(each, valid, num_chosen=A, normalize=normalize), each) for each in logits]
    experts, computed = GuessedRouting(Listening(), guess), true[0]
    carry, residency = experts.start(()), init_residency(num_layers, E, A)
    for n in range(num_layers):
        carry = experts.look_ahead(n, residuals[n], true[n], carry)
        _, carry = experts(n, residuals[n], true[n], carry)
        asked, got = carry[0][-2:]
        np.testing.assert_array_equal(asked.expert_ids, got.expert_ids)
        np.testing.assert_array_equal(got.expert_ids, computed.expert_ids)
        np.testing.assert_allclose(got.combine_weights, computed.combine_weights, atol=1e-6)
        if n + 1 < num_layers:
            odds = guess.odds(n, residuals[n], computed, residency)
            if n + 1 in layers:
                computed = by_hand(np.asarray(predicted_logits(predictor, n, residuals[n], computed)), normalize)
                assert set(np.flatnonzero(odds)) == set(np.asarray(computed.expert_ids).ravel()) - {E}
                assert float(jnp.sum(odds)) == pytest.approx(float(jnp.sum(computed.combine_weights)), rel=1e-5)
            else:
                np.testing.assert_array_equal(odds, predict(predictor, n, residuals[n], computed))
                computed = true[n + 1]


def by_hand(logits: np.ndarray, normalize: bool) -> Routing:
    odds = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
    ids = np.sort(np.argsort(-odds, axis=1)[:, :A], axis=1)
    weights = np.take_along_axis(odds, ids, axis=1)
    weights = weights / weights.sum(axis=1, keepdims=True) if normalize else weights
    ids[1], weights[1] = E, 0
    return Routing(jnp.asarray(ids), jnp.asarray(weights), jnp.asarray(logits))


# What is said, and refused


def test_layers_by_their_recall() -> None:
    made = calibration(recall=(0.5, 0.25))
    by_gate = {gate: guessed_layers(THREE, gate, made) for gate in (0.0, 0.25, 0.3, 0.5, 0.6)}
    assert by_gate == {0.0: (1, 2), 0.25: (1, 2), 0.3: (1,), 0.5: (1,), 0.6: ()}
    assert executed_guess(THREE, models.weights(THREE).params, 0.6, made) is None


def test_what_the_engine_says() -> None:
    said: list[str] = []
    runtime = RuntimeConfig(expert_slots=A, max_seq_len=64, measure_link=False, execute_guess=0.25)
    Engine.start(CONFIG, runtime, lambda: models.weights(CONFIG), calibration=calibration(), announce=said.append)
    assert (
        "--execute-guess 0.25 CHANGES WHAT THE MODEL SAYS: decoding computes guessed experts, not those that the "
        "router chooses, in 1 of 2 MoE layers (layers 1; recall 0.50 and more)"
    ) in said
    three = calibration(recall=(0.5, 0.25))
    assert "in 2 of 3 MoE layers (layers 1, 2; recall 0.25" in executing_line(THREE, 0.1, three)
    assert "in 1 of 2 MoE layers (layers 2; recall 0.50" in executing_line(SMALL, 0.1, calibration())  # 1 is dense
    assert executing_line(THREE, 0.75, three).startswith("--execute-guess 0.75 changes nothing: in none of 3")


def refused(config: ModelConfig, message: str, **details) -> None:
    def make_weights() -> Weights:
        raise AssertionError("refused before weights are loaded")

    runtime = RuntimeConfig(expert_slots=A, max_seq_len=64, measure_link=False, execute_guess=0.9)
    with pytest.raises(ValueError, match=re.escape(message)):
        Engine.start(config, runtime, make_weights, **details)


def test_what_cannot_be_is_refused() -> None:
    refused(CONFIG, "--execute-guess 0.9 goes by the recall of calibrated guesses, and no calibration lies beside")
    one = dataclasses.replace(SMALL, mlp_only_layers=(0, 1))
    refused(one, "--execute-guess 0.9: this model has one MoE layer (layer 2)", calibration=calibration())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"execute_guess": -0.1}, "execute_guess=-0.1 must be a recall from 0"),
        ({"execute_guess": 1.5}, "execute_guess=1.5 must be a recall from 0"),
        ({"execute_guess": float("nan")}, "execute_guess=nan must be a recall"),
        ({"execute_guess": True}, "execute_guess=True must be a recall"),
        ({"execute_guess": 0.9, "draft": 2}, "execute_guess=0.9 does not go with draft=2: a verification promises"),
    ],
)
def test_settings_that_mean_nothing_are_refused(options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        RuntimeConfig(**options)
