"""The oracle knows what every step asks for, and says no more; what it brings early changes no token."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jmoe.config import RuntimeConfig
from jmoe.decoding.sampling import SamplingParams
from jmoe.engine import Engine
from jmoe.experts.residency import init_residency
from jmoe.generation import Generation
from jmoe.model.router import Routing
from tests import models
from tests.models import SMALL
from tools.oracle import Oracle

pytestmark = pytest.mark.usefixtures("brings_all_guesses")

A, E = SMALL.num_experts_per_tok, SMALL.num_experts
BATCHES = [models.prompts(9, 4), models.prompts(13, 6, seed=1)]
SAMPLING = [SamplingParams(max_new_tokens=14, temperature=2.0), SamplingParams(max_new_tokens=9)]


def ran(predictor: Oracle | None, **more) -> tuple[list[Generation], Engine]:
    sizes = {"batch_size": 2, "expert_slots": 2 * A, "max_seq_len": 64, "prefill_chunk": 16, "decode_chunk": 5}
    runtime = RuntimeConfig(**{**sizes, "measure_link": False, **more})
    made = Engine.start(SMALL, runtime, models.weights, predictor=predictor)
    generations = [made.generate(prompts, SAMPLING) for prompts in BATCHES]
    for generation in generations:
        generation.results()
    return generations, made


@functools.cache
def recorded() -> tuple[list[Generation], Engine]:
    return ran(None, record_routing=True)


@pytest.mark.parametrize("amount", [0.3, 4.0])
def test_all_that_comes_early_is_used_and_no_token_changes(amount: float) -> None:
    """Of a batch one of whose sequences ends first, and of the one after it. Four experts are all a batch asks for."""
    plain, before = recorded()
    oracle = Oracle.of([generation.trace for generation in plain])
    ahead, made = ran(oracle, prefetch="lookahead", prefetch_experts=amount)
    for one, other in zip(plain, ahead, strict=True):
        assert [each.token_ids for each in one.completions] == [each.token_ids for each in other.completions]
        assert one.stats.decode == other.stats.decode
        assert other.stats.prefetch is not None
        assert other.stats.prefetch.useful_share == 1
    came = sum(each.stats.prefetch.useful_bytes for each in ahead if each.stats.prefetch)
    missing = fetched(made)[1:].sum() * SMALL.expert_bytes
    assert came == missing if amount == 4 else 0 < came < missing
    np.testing.assert_array_equal(fetched(made), fetched(before))


def fetched(engine: Engine) -> np.ndarray:
    """Experts by layer, in all decode steps so far."""
    state = engine.new_state(1, [1])
    engine.give_back(state)
    return np.asarray(state.experts.residency.decode.fetched)


def test_it_says_what_was_recorded_and_after_that_nothing() -> None:
    rng = np.random.default_rng(0)
    needed = jnp.asarray(rng.integers(0, 2, (3, 2, E)), bool)
    odds = jax.jit(Oracle(needed).odds, static_argnums=0)
    routing = Routing(jnp.zeros((1, A), jnp.int32), jnp.ones((1, A)), jnp.zeros((1, E)))
    for clock in range(5):
        residency = dataclasses.replace(init_residency(2, E, 2), clock=jnp.asarray(clock, jnp.int32))
        made = odds(0, jnp.zeros((1, SMALL.hidden_size)), routing, residency)
        assert made.tolist() == (needed[clock, 1].astype(float).tolist() if clock < 3 else [0] * E)
