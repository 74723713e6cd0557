"""Tokens that were sampled with drafts are distributed as the whole model says: a chi-square test over many seeds."""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jmoe.config import RuntimeConfig
from jmoe.decoding.resident import forward_resident
from jmoe.decoding.sampling import SamplingParams
from jmoe.engine import Engine
from tests import models
from tests.models import SMALL

V = 12
TINY = dataclasses.replace(SMALL, vocab_size=V, num_hidden_layers=2, mlp_only_layers=())
PROMPT = (3, 1, 4, 1, 5)
SEEDS = 1500  # of each kind
KINDS = {
    "full": {"temperature": 1.1},
    "truncated": {"temperature": 1.3, "top_k": 9, "top_p": 0.93, "min_p": 0.05},
}


@functools.cache
def sampled() -> dict[str, np.ndarray]:
    """[SEEDS, 2]: the first two tokens that cycles gave, the prefill's own coming before them."""
    runtime = RuntimeConfig(
        expert_slots=4,
        draft=3,
        draft_experts=2,
        batch_size=2 * SEEDS,
        max_seq_len=16,
        prefill_chunk=len(PROMPT),
        measure_link=False,
    )
    engine = Engine.start(TINY, runtime, lambda: models.weights(TINY))
    requests = [
        SamplingParams(max_new_tokens=6, seed=seed, ignore_eos=True, **options)
        for options in KINDS.values()
        for seed in range(SEEDS)
    ]
    generation = engine.generate([PROMPT] * len(requests), requests)
    rows = np.array([completion.token_ids for completion in generation.results()])
    drafts = generation.stats.drafts
    assert drafts is not None
    assert 0.1 < drafts.cycles.acceptance_rate < 0.9, "some are accepted and some are not"
    return {kind: rows[n * SEEDS : (n + 1) * SEEDS, 1:3] for n, kind in enumerate(KINDS)}


def transformed(logits: np.ndarray, temperature: float, top_k: int = V, top_p: float = 1.0, min_p: float = 0.0):
    """Probabilities [n, V] in float64, each row by the definitions, one after another."""
    out = []
    for row in np.asarray(logits, np.float64) / temperature:
        order = np.argsort(-row)
        p = np.exp(row - row.max())
        p[order[top_k:]] = 0
        p /= p.sum()
        before = np.cumsum(p[order]) - p[order]
        p[order[before >= top_p]] = 0
        p /= p.sum()
        p[p < min_p * p.max()] = 0
        out.append(p / p.sum())
    return np.array(out)


@functools.cache
def logits_after(num_tokens: int) -> np.ndarray:
    """[V ** num_tokens, V] after the prompt and each possible continuation of so many tokens, in their order."""
    weights = models.on_device(models.weights(TINY))
    tails = np.indices((V,) * num_tokens).reshape(num_tokens, V**num_tokens).T
    ids = np.concatenate([np.tile(PROMPT, (len(tails), 1)), tails], axis=1).astype(np.int32)
    forward = jax.jit(lambda ids: forward_resident(TINY, weights.params, weights.store.layers, ids)[:, -1])
    return np.asarray(forward(jnp.asarray(ids)))


def expected(kind: str, **changes) -> np.ndarray:
    """[V, V]: how likely each pair of second and third tokens is, whatever the first."""
    first, second, third = (transformed(logits_after(n), **{**KINDS[kind], **changes}) for n in range(3))
    pair = first.reshape(V, 1) * second
    return (pair.reshape(V, V, 1) * third.reshape(V, V, V)).sum(axis=0)


def chi_square(tokens: np.ndarray, probabilities: np.ndarray) -> tuple[float, float]:
    """The statistic, and what it exceeds once in a thousand times if the probabilities are right.

    Pairs that are expected fewer than five times count as one; one that cannot be is infinitely wrong.
    """
    counts = np.zeros((V, V))
    np.add.at(counts, tuple(tokens.T), 1)
    wanted = probabilities * len(tokens)
    if (counts[probabilities == 0] > 0).any():
        return math.inf, 0.0
    often = wanted >= 5
    observed = np.append(counts[often], counts[~often].sum())
    wanted = np.append(wanted[often], wanted[~often].sum())
    observed, wanted = observed[wanted > 0], wanted[wanted > 0]
    freedom = len(wanted) - 1
    assert freedom > 20
    z, spread = 3.0902, 2 / (9 * freedom)  # Wilson and Hilferty: a cube root of it is nearly normal
    return float(((observed - wanted) ** 2 / wanted).sum()), freedom * (1 - spread + z * math.sqrt(spread)) ** 3


@pytest.mark.parametrize("kind", KINDS)
def test_the_distribution_is_the_models(kind: str) -> None:
    statistic, limit = chi_square(sampled()[kind], expected(kind))
    assert statistic < limit


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("changes", [{"temperature": 0.7}, {"top_k": 7, "top_p": 1.0, "min_p": 0.0}])
def test_another_distribution_is_told_apart(kind: str, changes: dict) -> None:
    """What the test above is worth."""
    statistic, limit = chi_square(sampled()[kind], expected(kind, **changes))
    assert statistic > limit


def test_the_quantile_is_that_of_the_tables() -> None:
    """99.9 % of chi-square with 30 degrees of freedom are below 59.70; here with 31 equal classes."""
    pairs = np.stack(np.divmod(np.arange(31 * 40) % 31, V), axis=1)
    probabilities = np.zeros(V * V)
    probabilities[:31] = 1 / 31
    statistic, limit = chi_square(pairs, probabilities.reshape(V, V))
    assert statistic == pytest.approx(0)
    assert limit == pytest.approx(59.70, rel=0.003)
