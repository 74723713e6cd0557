"""Traces: that what an engine records is what its routers chose, and what is made of it, in memory and in files."""

import dataclasses
import functools
import json
import re
from pathlib import Path

import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings

from jmoe import routing_stats
from jmoe.batch import prompt_chunks
from jmoe.decoding.compiled import Call
from jmoe.decoding.prefill import Prefill
from jmoe.decoding.resident import forward_routed
from jmoe.decoding.sampling import SamplingParams, batch_sampling
from jmoe.decoding.step import Steps
from jmoe.generation import Generation
from jmoe.traces import Recording, Trace
from tests import models
from tests.models import MAX_SEQ_LEN, SMALL

PROMPTS = models.prompts(21, 5, 33)  # prefill takes 16 tokens at a time
REQUESTS = [SamplingParams(max_new_tokens=count) for count in (12, 3, 9)]
NUM_COMPUTED = [21 + 11, 5 + 2, 33 + 8]  # the last token is never fed in
L, E, A = len(SMALL.moe_layers), SMALL.num_experts, SMALL.num_experts_per_tok


@functools.cache
def engine(batch_size: int, expert_slots: int, record: bool):
    return models.engine(
        batch_size=batch_size, expert_slots=expert_slots, record_routing=record, prefill_chunk=16, decode_chunk=5
    )


@functools.cache
def generated(batch_size: int, expert_slots: int, record: bool = True) -> Generation:
    generation = engine(batch_size, expert_slots, record).generate(PROMPTS, REQUESTS)
    generation.results()
    return generation


def tokens(generation: Generation) -> list[tuple[int, ...]]:
    return [completion.token_ids for completion in generation.completions]


@functools.cache
def chosen() -> tuple[np.ndarray, np.ndarray]:
    """Expert ids and weights [3, T, L, A] by the resident model, of each prompt with its continuation, padded."""
    padded = np.zeros((3, MAX_SEQ_LEN), np.int32)
    for row, completion in zip(padded, generated(3, 2).completions, strict=True):
        ids = [*completion.prompt_token_ids, *completion.token_ids]
        row[: len(ids)] = ids
    weights = models.on_device(models.weights())
    routed = jax.jit(lambda ids: forward_routed(SMALL, weights.params, weights.store.layers, ids)[1])(padded)
    shape = 3, MAX_SEQ_LEN, L, A
    ids = np.stack([routing.expert_ids for routing in routed], axis=1).reshape(shape)
    return ids, np.stack([routing.combine_weights for routing in routed], axis=1).reshape(shape)


def assert_same(left: Trace, right: Trace) -> None:
    for field in dataclasses.fields(Trace):
        one, other = getattr(left, field.name), getattr(right, field.name)
        np.testing.assert_array_equal(one, other, err_msg=field.name)
        assert type(one) is type(other)
        assert getattr(one, "dtype", None) == getattr(other, "dtype", None)


# What an engine records


@pytest.mark.parametrize(("batch_size", "expert_slots"), [(3, 2), (1, 3)])
def test_what_is_recorded_is_what_the_routers_chose(batch_size: int, expert_slots: int) -> None:
    """Prompts of several chunks and of less than one, in a batch that needs more experts than there are slots."""
    trace = generated(batch_size, expert_slots).trace
    ids, weights = chosen()
    np.testing.assert_array_equal(trace.expert_ids, ids[trace.request, trace.position])
    np.testing.assert_allclose(trace.combine_weights, weights[trace.request, trace.position], atol=1e-3)
    for request, count in enumerate(NUM_COMPUTED):
        assert sorted(trace.position[trace.request == request]) == list(range(count))
    lengths = np.array([len(prompt) for prompt in PROMPTS])
    np.testing.assert_array_equal(trace.is_prefill, trace.position < lengths[trace.request])
    assert (trace.num_experts, trace.moe_layers, trace.expert_ids.dtype) == (E, (0, 2), np.uint8)


def test_rows_of_a_step_were_computed_together() -> None:
    together, in_turn = generated(3, 2).trace, generated(1, 3).trace
    assert together.needed(prefill=True).shape == (3, L, E)  # 33 tokens, 16 at a time
    assert together.needed(prefill=False).shape == (11, L, E)  # as many as the longest continuation, less one
    assert in_turn.needed(prefill=True).shape == (2 + 1 + 3, L, E)
    assert in_turn.needed(prefill=False).shape == (11 + 2 + 8, L, E)
    first = together.step == 0
    np.testing.assert_array_equal(np.bincount(together.request[first]), [16, 5, 16])
    fourth_decode = together.step == 3 + 3
    np.testing.assert_array_equal(together.request[fourth_decode], [0, 2])  # the other one is done
    np.testing.assert_array_equal(together.position[fourth_decode], [21 + 3, 33 + 3])


@pytest.mark.parametrize(("batch_size", "expert_slots"), [(3, 2), (1, 3)])
def test_needed_adds_up_to_what_the_engine_counted(batch_size: int, expert_slots: int) -> None:
    generation = generated(batch_size, expert_slots)
    for prefill, counts in ((True, generation.stats.prefill), (False, generation.stats.decode)):
        assert generation.trace.needed(prefill=prefill).sum() == counts.hits + counts.misses > 0


def test_recording_changes_no_token_and_compiles_no_more() -> None:
    assert tokens(generated(3, 4, record=False)) == tokens(generated(3, 2)) == tokens(generated(1, 3))
    sizes = Steps.decode._cache_size(), Prefill.prefill_layers._cache_size()
    for seed in range(2):
        other = models.prompts(20 + seed, 9, 3, seed=seed)
        engine(3, 2, True).generate(other, SamplingParams(max_new_tokens=4 + seed)).results()
    assert (Steps.decode._cache_size(), Prefill.prefill_layers._cache_size()) == sizes


def test_it_does_not_matter_how_many_steps_a_call_takes() -> None:
    live = engine(3, 2, True).generate(PROMPTS, REQUESTS)
    assert len(list(live)) > 3 + 2  # text as it comes: shorter calls than those of `results`
    assert_same(live.trace, generated(3, 2).trace)


def test_a_trace_is_there_before_the_end() -> None:
    generation = engine(3, 2, True).generate(PROMPTS, REQUESTS)
    assert len(generation.trace) == 0
    assert generation.trace.expert_ids.shape == (0, L, A)
    next(iter(generation))
    assert generation.trace.is_prefill.all()
    assert len(generation.trace) == sum(map(len, PROMPTS))
    generation.close()
    assert_same(generation.trace, generated(3, 2).trace._take(np.arange(sum(map(len, PROMPTS)))))


def test_without_recording_there_is_no_trace_and_nothing_to_copy() -> None:
    with pytest.raises(RuntimeError, match=r"routing is not recorded; start .* RuntimeConfig\(record_routing=True\)"):
        _ = generated(3, 4, record=False).trace
    off, on = (jaxprs(record=record) for record in (False, True))
    for without, recording in zip(off, on, strict=True):
        assert "u16" not in str(without)
        assert "u16" in str(recording)
        assert len(recording.out_avals) == len(without.out_avals) + 2


def jaxprs(*, record: bool) -> list:
    """Of what routes in prefill (a layer, and its end) and of decode, for a batch of 3."""
    runner = engine(3, 4, False)
    steps, weights = dataclasses.replace(runner.steps, record=record), runner.weights
    state = runner.new_state(3, [4] * 3)
    chunk = next(prompt_chunks(PROMPTS, 16))
    sampling = batch_sampling(REQUESTS, ())
    given = weights.params, weights.store, state
    calls = [Call(steps, "decode", 3, (*given, sampling, jnp.asarray(2)), {"capacity": 5, "mode": "greedy"})]
    made = {call.name: traced(call) for call in calls}

    def run(call: Call):
        if call.name == "prefill_end" or (call.name == "prefill_layers" and call.name not in made):  # the first layer
            made[call.name] = traced(call)
        return call.run()

    state, _ = Prefill(steps).chunk(*given, chunk, sampling, mode="greedy", run=run)
    runner.give_back(state)
    return [made[name] for name in ("prefill_layers", "prefill_end", "decode")]


def traced(call: Call):
    return getattr(call.steps, call.name).__func__.trace(call.steps, *call.args, **call.static).jaxpr


# What can be made of a trace


@st.composite
def traces(draw) -> Trace:
    """Random prompts and continuations, decoded in batches of random sizes, their rows as an engine orders them."""
    num_experts, num_layers = draw(st.integers(3, 6)), draw(st.integers(1, 3))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    config = dataclasses.replace(
        SMALL,
        num_experts=num_experts,
        num_experts_per_tok=draw(st.integers(1, 3)),
        num_hidden_layers=num_layers,
        mlp_only_layers=(),
    )
    recording, request = Recording(config), 0
    for batch_size in draw(st.lists(st.integers(1, 4), min_size=1, max_size=3)):
        requests = list(range(request, request + batch_size))
        request += batch_size
        for is_prefill, size in ((True, draw(st.integers(1, 3))), (False, 1)):
            counts = rng.integers(is_prefill, 6, batch_size)  # some have no decoded token
            num_steps = -(-int(counts.max()) // size)
            shape = num_steps, batch_size, size, num_layers
            ids = np.argsort(rng.random((*shape, num_experts)), axis=-1)[..., : config.num_experts_per_tok]
            at = np.arange(num_steps)[:, None, None] * size + np.arange(size)  # [n, 1, T]
            real = at < counts[:, None]
            ids = np.moveaxis(np.where(real[..., None, None], ids, num_experts), 3, 1)
            recording.add(ids, rng.random(ids.shape), requests, is_prefill=is_prefill)
    return recording.trace()


@settings(max_examples=40, deadline=None)
@given(traces())
def test_needed_by_brute_force(trace: Trace) -> None:
    for prefill in (True, False):
        rows = [n for n in range(len(trace)) if trace.is_prefill[n] == prefill]
        by_step: dict[int, list[set[int]]] = {}
        for n in rows:
            sets = by_step.setdefault(int(trace.step[n]), [set() for _ in trace.moe_layers])
            for layer, ids in enumerate(trace.expert_ids[n]):
                sets[layer] |= set(ids.tolist())
        made = [[set(np.flatnonzero(row)) for row in step] for step in trace.needed(prefill=prefill)]
        assert made == [by_step[step] for step in sorted(by_step)]


@settings(max_examples=40, deadline=None)
@given(traces())
def test_sequences_are_by_request_and_position(trace: Trace) -> None:
    rows = {(int(r), int(p)): n for n, (r, p) in enumerate(zip(trace.request, trace.position, strict=True))}
    assert len(rows) == len(trace)
    for prefill in (None, True, False):
        sequences = trace.sequences(prefill=prefill)
        assert len(sequences) == len(trace.requests)
        for request, ids in zip(trace.requests, sequences, strict=True):
            mine = [n for (r, _), n in sorted(rows.items()) if r == request]
            kept = [n for n in mine if prefill is None or trace.is_prefill[n] == prefill]
            np.testing.assert_array_equal(ids, trace.expert_ids[kept])


@settings(max_examples=60, deadline=None)
@given(traces(), st.integers(1, 5))
def test_rebatched_by_brute_force(trace: Trace, batch_size: int) -> None:
    made = trace.rebatched(batch_size)
    decoded = {int(r): np.flatnonzero((trace.request == r) & ~trace.is_prefill).tolist() for r in trace.requests}
    expected, requests, step = [], list(decoded), 0
    while requests:
        batch, requests = requests[:batch_size], requests[batch_size:]
        for nth in range(max(len(decoded[r]) for r in batch)):
            expected += [(step, decoded[r][nth]) for r in batch if nth < len(decoded[r])]
            step += 1
    rows = [row for _, row in expected]
    np.testing.assert_array_equal(made.step, [step for step, _ in expected])
    for name in ("expert_ids", "combine_weights", "request", "position"):
        np.testing.assert_array_equal(getattr(made, name), getattr(trace, name)[rows])
    assert not made.is_prefill.any()


def test_rebatched_is_what_a_batch_would_have_recorded() -> None:
    in_turn, together = generated(1, 3).trace, generated(3, 2).trace
    decoded = together._take(np.flatnonzero(~together.is_prefill))
    made = in_turn.rebatched(3)
    assert_same(made, dataclasses.replace(decoded, step=decoded.step - 3, combine_weights=made.combine_weights))
    np.testing.assert_allclose(made.combine_weights, decoded.combine_weights, atol=1e-3)
    np.testing.assert_array_equal(made.needed(prefill=False), together.needed(prefill=False))
    alone = in_turn.rebatched(1)
    np.testing.assert_array_equal(alone.needed(prefill=False), in_turn.needed(prefill=False))


def test_concatenated_requests_and_steps_are_numbered_on() -> None:
    first, second = generated(3, 2).trace, generated(1, 3).trace
    both = Trace.concatenate([first, second])
    assert_same(both.only(range(3)), first)
    back = both.only(range(3, 6))
    assert_same(dataclasses.replace(back, request=back.request - 3, step=back.step - 14), second)
    for prefill in (True, False):
        parts = [trace.needed(prefill=prefill) for trace in (first, second)]
        np.testing.assert_array_equal(both.needed(prefill=prefill), np.concatenate(parts))
    assert_same(Trace.concatenate([first]), first)
    empty = first.only([])
    assert_same(Trace.concatenate([empty, first]), first)


def test_routing_statistics_take_its_sequences() -> None:
    trace = generated(3, 2).trace
    counts = routing_stats.prompt_counts(trace.sequences(), E)
    np.testing.assert_array_equal(counts.sum(axis=(1, 2)), [L * A * count for count in NUM_COMPUTED])
    np.testing.assert_array_equal(counts.sum(axis=0), routing_stats.activation_counts(trace.expert_ids, E))


def test_what_does_not_go_together_is_refused() -> None:
    trace = generated(3, 2).trace
    with pytest.raises(ValueError, match="no traces to concatenate; give at least one"):
        Trace.concatenate([])
    with pytest.raises(
        ValueError, match="traces of different models: fingerprint '' and 'abc'; expected traces of one"
    ):
        Trace.concatenate([trace, dataclasses.replace(trace, fingerprint="abc")])
    with pytest.raises(ValueError, match=r"no requests \[3, 7\] in this trace; it has 3 in 0\.\.2"):
        trace.only([7, 1, 3])
    with pytest.raises(ValueError, match="batch_size=0 must be at least 1"):
        trace.rebatched(0)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"num_experts": 4}, "expert_ids are in 0..7, but there are 4 experts: expected 0..3"),
        ({"moe_layers": (0,)}, "expert_ids uint8[80, 2, 2]; expected integers [N, 1, A]"),
        ({"expert_ids": np.zeros((80, 2, 2))}, "expert_ids float64[80, 2, 2]; expected integers"),
        ({"combine_weights": np.zeros((80, 2, 3))}, "combine_weights of shape [80, 2, 3]; expected [80, 2, 2]"),
        ({"position": np.zeros(79, int)}, "position of shape [79]; expected [80]"),
        ({"step": -np.arange(80)}, "step descends; expected rows in the order in which they were computed"),
    ],
)
def test_arrays_that_do_not_fit_are_refused(changes: dict, words: str) -> None:
    with pytest.raises(ValueError, match=re.escape(words)):
        dataclasses.replace(generated(3, 2).trace, **changes)


# Files


@pytest.mark.parametrize("num_experts", [8, 256, 257])
def test_a_file_gives_the_trace_back(num_experts: int, tmp_path: Path) -> None:
    trace = dataclasses.replace(generated(3, 2).trace, num_experts=num_experts, fingerprint="abc", model="déjà vu")
    file = tmp_path / "routing.trace"  # whatever its name
    file.write_text("an older one is replaced")
    trace.save(file)
    assert_same(Trace.read(file), trace)
    assert trace.expert_ids.dtype == (np.uint16 if num_experts > 256 else np.uint8)
    assert list(tmp_path.iterdir()) == [file]


def test_an_empty_trace_has_a_file_too(tmp_path: Path) -> None:
    empty = Recording(SMALL).trace()
    empty.save(tmp_path / "empty.npz")
    assert_same(Trace.read(tmp_path / "empty.npz"), empty)
    assert empty.sequences() == []
    assert len(empty.rebatched(3)) == 0
    assert empty.needed(prefill=False).shape == (0, L, E)


def test_a_write_that_fails_leaves_what_was_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trace = generated(3, 2).trace
    trace.save(tmp_path / "trace.npz")

    def full(file, **arrays) -> None:
        file.write(b"half of it")
        raise OSError("no space left")

    monkeypatch.setattr(np, "savez_compressed", full)
    with pytest.raises(OSError, match="no space left"):
        trace.only([1]).save(tmp_path / "trace.npz")
    assert_same(Trace.read(tmp_path / "trace.npz"), trace)
    assert len(list(tmp_path.iterdir())) == 1


def test_what_is_no_trace_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "file"
    with pytest.raises(ValueError, match="file: no such file; expected a trace"):
        Trace.read(file)
    for content in (b"", b"text", np.random.default_rng(0).bytes(500)):
        file.write_bytes(content)
        with pytest.raises(ValueError, match=r"file: not a trace \(no npz file\)"):
            Trace.read(file)
    for arrays in ({"a": np.ones(3), "b": 2}, {"header": np.array("{"), "step": 1}, {"header": np.array("[]")}):
        with file.open("wb") as stream:
            np.savez(stream, **arrays)
        with pytest.raises(ValueError, match=rf"file: not a trace \(an npz file of {', '.join(arrays)}\)"):
            Trace.read(file)


def test_a_damaged_file_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "trace.npz"
    generated(3, 2).trace.save(file)
    whole = file.read_bytes()
    middle = len(whole) // 2
    for content in (whole[:-1], whole[:middle], whole[:40], whole[:middle] + b"\0\1\2\3" * 4 + whole[middle + 16 :]):
        file.write_bytes(content)
        with pytest.raises(RuntimeError, match=r"trace\.npz: damaged.* Record it again"):
            Trace.read(file)


@pytest.mark.parametrize(
    ("header", "arrays", "words"),
    [
        ({"version": 2}, {}, "format version 2, but this jmoe reads version 1. Update jmoe, or: Record it again"),
        ({"num_experts": 2}, {}, "damaged (ValueError: expert_ids are in 0..7, but there are 2 experts"),
        ({"moe_layers": None}, {}, "damaged (TypeError"),
        ({}, {"step": None}, "damaged (KeyError: 'step')"),
        ({}, {"request": np.zeros(3, np.int32)}, "damaged (ValueError: request of shape [3]; expected [80])"),
    ],
)
def test_a_file_that_cannot_be_used_is_refused(tmp_path: Path, header: dict, arrays: dict, words: str) -> None:
    file = tmp_path / "trace.npz"
    generated(3, 2).trace.save(file)
    with np.load(file) as stored:
        content = dict(stored)
    content["header"] = np.array(json.dumps(json.loads(str(content["header"])) | header))
    kept = {name: array for name, array in (content | arrays).items() if array is not None}
    with file.open("wb") as stream:
        np.savez(stream, **kept)
    with pytest.raises(RuntimeError, match=re.escape(words)):
        Trace.read(file)
