"""How steps are compiled: with kernels beside each other where copies overlap with arithmetic, and only there."""

import dataclasses
import functools
import types

import jax.numpy as jnp
import numpy as np
import pytest

from jmoe.decoding import compiled
from jmoe.decoding.compiled import StepJit
from jmoe.decoding.prefill import Prefill
from jmoe.decoding.speculative import SpeculativeSteps
from jmoe.decoding.step import Steps
from jmoe.experts.draft import DraftConfig
from tests import models


@dataclasses.dataclass(frozen=True)
class Doubling:
    profiled: bool

    @functools.partial(StepJit, static_argnames=("also",), overlaps=lambda steps, x: x.size > 2)
    def twice(self, x, *, also: int = 0):
        return 2 * x + also


@pytest.mark.parametrize("profiled", [False, True])
@pytest.mark.parametrize("size", [2, 3])
def test_a_call_runs_and_lowers_the_program_of_its_kind(profiled: bool, size: int) -> None:
    steps, x = Doubling(profiled), jnp.arange(size)
    before = {kind: program._cache_size() for kind, program in Doubling.twice._programs.items()}
    total = Doubling.twice._cache_size()
    np.testing.assert_array_equal(steps.twice(x, also=1), 2 * np.arange(size) + 1)
    np.testing.assert_array_equal(Doubling.twice.lower(steps, x).compile()(x), 2 * np.arange(size))
    assert str(Doubling.twice.trace(steps, x).jaxpr) == str(steps.twice.__func__.trace(steps, x).jaxpr)
    after = {kind: program._cache_size() for kind, program in Doubling.twice._programs.items()}
    assert [kind for kind in after if after[kind] != before[kind]] == [(profiled, size == 3)]
    assert Doubling.twice._cache_size() == total + 1


def overlaps(step, steps, num_sequences: int) -> bool:
    state = types.SimpleNamespace(last_tokens=np.zeros(num_sequences))
    return step._overlaps(steps, None, None, state, None)


@pytest.mark.parametrize(
    ("expert_slots", "resident", "num_sequences", "prefills", "decodes", "verifies"),
    [
        (4, False, 1, True, False, True),  # 2 choices a token, and 3 tokens to verify
        (6, False, 1, True, False, False),
        (4, False, 2, True, False, True),
        (4, False, 3, True, True, True),
        (8, False, 99, False, False, False),
        (4, True, 99, False, False, False),
    ],
)
def test_steps_overlap_where_they_go_in_waves(
    expert_slots: int, resident: bool, num_sequences: int, prefills: bool, decodes: bool, verifies: bool
) -> None:
    layout = models.engine(expert_slots=expert_slots).plan.layout
    steps = Steps(models.SMALL, layout, resident=resident)
    prefill = Prefill(steps)
    assert overlaps(Prefill.prefill_layers, prefill, num_sequences) == prefills
    assert overlaps(Prefill.prefill_guessed, prefill, num_sequences) == prefills
    assert not overlaps(Prefill.prefill_end, prefill, num_sequences)
    assert overlaps(Steps.decode, steps, num_sequences) == decodes
    assert overlaps(Steps.decode_prefetching, steps, num_sequences)
    assert not overlaps(Steps.unembed, steps, num_sequences)
    cycles = SpeculativeSteps(steps, DraftConfig(1), 2)
    assert overlaps(SpeculativeSteps.decode, cycles, num_sequences) == verifies


@pytest.mark.parametrize("profiled", [False, True])
def test_what_is_called_once_is_a_graph_only_where_copies_overlap(profiled: bool) -> None:
    graphs, order = "xla_gpu_enable_command_buffer", "xla_gpu_command_buffer_scheduling_mode"
    once, repeated = (
        {overlapping: compiled._options(profiled, overlapping, repeats) for overlapping in (False, True)}
        for repeats in (False, True)
    )
    assert once[False][graphs] == ""
    assert once[True] == repeated[True]
    assert (once[True][order], once[True].get(graphs)) == ("CONCURRENT", repeated[False].get(graphs))
    assert ("WHILE" in repeated[False].get(graphs, "")) == (not profiled)
