"""Prefill in parts of some layers: however many a part has, everything is the same."""

import functools

import numpy as np
import pytest

from jmoe.decoding import prefill
from jmoe.decoding.sampling import SamplingParams
from jmoe.engine import Engine
from jmoe.stats import ExpertCounts
from jmoe.traces import Trace
from tests import models

PROMPTS = models.prompts(21, 5, 33)
SAMPLING = SamplingParams(max_new_tokens=6, temperature=1.5)


@functools.cache
def engine(expert_slots: int) -> Engine:
    how = {"batch_size": 3, "prefill_chunk": 16, "staging_slots": 1, "record_routing": True}
    return models.engine(expert_slots=expert_slots, **how)


def ran(expert_slots: int) -> tuple[list[tuple[int, ...]], ExpertCounts, Trace, list[np.ndarray]]:
    """Tokens, what prefill asked for, what was routed, and scores of the prompts."""
    made = engine(expert_slots)
    generation = made.generate(PROMPTS, SAMPLING)
    tokens = [completion.token_ids for completion in generation.results()]
    return tokens, generation.stats.prefill, generation.trace, made.score(PROMPTS)


@pytest.mark.parametrize("expert_slots", [3, 8])
@pytest.mark.parametrize("most_layers", [1, 2, 3])  # of three, the second of which has no experts
def test_nothing_depends_on_how_many_layers_a_program_has(
    expert_slots: int, most_layers: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    tokens, counts, trace, scores = ran(expert_slots)
    parts = prefill._parts
    monkeypatch.setattr(prefill, "_parts", lambda num_layers, most: parts(num_layers, most_layers))
    in_parts, counts_in_parts, trace_in_parts, scores_in_parts = ran(expert_slots)
    assert in_parts == tokens
    assert counts_in_parts.hits + counts_in_parts.misses == counts.hits + counts.misses > 0
    np.testing.assert_array_equal(trace_in_parts.expert_ids, trace.expert_ids)
    np.testing.assert_array_equal(trace_in_parts.step, trace.step)
    for one, other in zip(scores_in_parts, scores, strict=True):
        np.testing.assert_allclose(one, other, atol=1e-5)


@pytest.mark.parametrize(
    ("num_layers", "sizes"),
    [(1, [1]), (8, [8]), (9, [5, 4]), (12, [6, 6]), (27, [7, 7, 7, 6]), (48, [8] * 6), (94, [8] * 11 + [6])],
)
def test_parts_are_few_and_alike(num_layers: int, sizes: list[int]) -> None:
    parts = prefill._parts(num_layers, 8)
    assert [part.stop - part.start for part in parts] == sizes
    assert [layer for part in parts for layer in range(num_layers)[part]] == list(range(num_layers))
