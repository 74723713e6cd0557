"""The engine: what it refuses, when a generation ends, that it survives being left or interrupted, and its figures."""

import dataclasses
import functools
import gc

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jmoe.batch
from jmoe.config import RuntimeConfig
from jmoe.decoding.compiled import Call
from jmoe.decoding.sampling import SamplingParams
from jmoe.decoding.step import Steps
from jmoe.engine import Engine
from jmoe.generation import Completion
from jmoe.model.decoder import build_decoder
from jmoe.synthetic import byte_tokenizer
from jmoe.tokenizer import Tokenizer
from tests import models
from tests.models import MAX_SEQ_LEN, SMALL

TEXT = dataclasses.replace(SMALL, vocab_size=259)  # the byte tokenizer's ids and no more
BYTES = Tokenizer(byte_tokenizer(TEXT.vocab_size), eos_ids=())
GREEDY = SamplingParams(max_new_tokens=12)
PROMPTS = models.prompts(9, 4, 13, 6, 11)
NUM_MOE_LAYERS, A = len(SMALL.moe_layers), SMALL.num_experts_per_tok


@pytest.fixture(scope="module")
def engine() -> Engine:
    return models.engine(prefill_chunk=16)


@functools.cache
def expected() -> list[tuple[int, ...]]:
    """Greedy continuations of PROMPTS, by an engine that nothing happens to."""
    fresh = models.engine(prefill_chunk=16)
    return [fresh.generate([prompt], GREEDY).results()[0].token_ids for prompt in PROMPTS]


def tokens(engine: Engine, prompts=PROMPTS, sampling=GREEDY) -> list[tuple[int, ...]]:
    return [completion.token_ids for completion in engine.generate(prompts, sampling).results()]


def text_engine(**details) -> Engine:
    runtime = RuntimeConfig(expert_slots=4, max_seq_len=MAX_SEQ_LEN, prefill_chunk=16, measure_link=False)
    return Engine.start(TEXT, runtime, lambda: models.weights(TEXT), **details)


# What is refused, before anything runs


@pytest.mark.parametrize(
    ("prompts", "message"),
    [
        ([[1, 2], []], "prompt 1 is empty; give at least one token"),
        ([[0] * MAX_SEQ_LEN], "prompt 0 has 64 tokens, but max_seq_len=64 must hold it and at least one more"),
        ([[5], [96, 97, -1]], r"prompt 1 has token ids \[97, -1\] outside 0\.\.96 \(vocab_size=97\)"),
        ([], "no prompt: give at least one"),
        ("text", "this engine has no tokenizer; give token ids instead of text"),
        ([[1], "text"], "this engine has no tokenizer"),
    ],
)
def test_prompts_that_cannot_be_are_refused(engine: Engine, prompts, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        engine.generate(prompts)
    assert tokens(engine, PROMPTS[:1]) == expected()[:1]


def test_options_that_cannot_be_are_refused(engine: Engine) -> None:
    with pytest.raises(ValueError, match="2 sampling parameters for 3 prompts; give one, or one a prompt"):
        engine.generate(PROMPTS[:3], [GREEDY, GREEDY])
    with pytest.raises(ValueError, match="stop strings need a tokenizer"):
        engine.generate(PROMPTS, SamplingParams(stop=("x",)))


def test_a_plan_that_cannot_be_makes_no_weights() -> None:
    def never():
        raise AssertionError("weights were made before the plan was checked")

    with pytest.raises(ValueError, match="not enough device memory"):
        Engine.start(SMALL, RuntimeConfig(device_memory_bytes=1000, measure_link=False), never)


def test_a_trunk_with_other_parameters_is_refused() -> None:
    params = dict(models.weights().params)
    params["norm/bias"] = params.pop("norm/scale")
    with pytest.raises(RuntimeError, match=r"missing or not the model's: \['norm/bias', 'norm/scale'\]"):
        build_decoder(SMALL, params)


# When a generation ends


def test_it_ends_where_max_seq_len_does(engine: Engine) -> None:
    [prompt] = models.prompts(MAX_SEQ_LEN - 4)
    [completion] = engine.generate([prompt], SamplingParams(max_new_tokens=50)).results()
    assert (len(completion.token_ids), completion.finish_reason) == (4, "length")


@pytest.mark.parametrize("max_new_tokens", [1, 2, 7])
def test_it_ends_after_max_new_tokens(engine: Engine, max_new_tokens: int) -> None:
    [completion] = engine.generate(PROMPTS[:1], SamplingParams(max_new_tokens=max_new_tokens)).results()
    assert completion.token_ids == expected()[0][:max_new_tokens]
    assert completion.finish_reason == "length"
    assert completion.prompt_token_ids == tuple(PROMPTS[0])
    assert len(completion.logprobs) == max_new_tokens


def first_new(ids: tuple[int, ...]) -> int:
    """A place past the beginning whose token did not come before."""
    return next(place for place in range(3, len(ids)) if ids[place] not in ids[:place])


def test_it_ends_with_the_end_of_sequence() -> None:
    """Which token that is stands in generation_config.json; one sequence of a batch may end before the others."""
    at = first_new(expected()[0])
    engine = models.engine(prefill_chunk=16)
    engine.generation_defaults = {"eos_token_id": expected()[0][at]}
    for prompt, unlimited in zip(PROMPTS, expected(), strict=True):
        eos = engine.eos_ids[0]
        ends = unlimited.index(eos) + 1 if eos in unlimited else len(unlimited)
        [completion] = engine.generate([prompt], GREEDY).results()
        assert completion.token_ids == unlimited[:ends]
        assert completion.finish_reason == ("eos" if eos in unlimited else "length")
    ignoring = dataclasses.replace(GREEDY, ignore_eos=True)
    [completion] = engine.generate(PROMPTS[:1], ignoring).results()
    assert (completion.token_ids, completion.finish_reason) == (expected()[0], "length")


@pytest.mark.parametrize(
    ("defaults", "tokenizer", "ids"),
    [
        ({"eos_token_id": 7}, None, (7,)),
        ({"eos_token_id": [7, 9]}, Tokenizer(BYTES.inner, eos_ids=(3,)), (7, 9)),
        ({}, Tokenizer(BYTES.inner, eos_ids=(3,)), (3,)),
        ({}, None, ()),
    ],
)
def test_the_ends_of_sequence(engine: Engine, defaults, tokenizer, ids, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine, "generation_defaults", defaults)
    monkeypatch.setattr(engine, "tokenizer", tokenizer)
    assert engine.eos_ids == ids


def test_more_prompts_than_fit_run_in_turn() -> None:
    pair = models.engine(batch_size=2, prefill_chunk=16)
    generation = pair.generate(PROMPTS, GREEDY)
    assert [completion.index for completion in generation.results()] == list(range(5))
    assert [completion.token_ids for completion in generation.completions] == expected()
    assert generation.stats.num_prompt_tokens == sum(map(len, PROMPTS))
    assert tokens(pair, PROMPTS[:2]) == expected()[:2]


# Text


@pytest.fixture(scope="module")
def whole() -> Completion:
    return text_engine(tokenizer=BYTES).generate("A prompt", SamplingParams(max_new_tokens=40)).results()[0]


def test_text_as_it_comes_is_the_text_at_the_end(whole: Completion) -> None:
    generation = text_engine(tokenizer=BYTES).generate("A prompt", SamplingParams(max_new_tokens=40))
    deltas = list(generation)
    assert len(deltas) > 2
    assert {delta.index for delta in deltas} == {0}
    assert "".join(delta.text for delta in deltas) == whole.text == BYTES.decode(whole.token_ids)
    assert tuple(token for delta in deltas for token in delta.token_ids) == whole.token_ids
    assert generation.completions == [whole]
    assert whole.prompt_token_ids == tuple(b"A prompt")


def first_new_character(text: str) -> str:
    """One past the beginning that did not come before, after a whole character."""
    places = range(4, len(text))
    return next(text[n] for n in places if text[n] not in text[:n] and "\ufffd" not in text[n - 1 : n + 1])


@pytest.mark.parametrize("live", [True, False])
def test_a_stop_string_ends_the_text_before_it(whole: Completion, live: bool) -> None:
    stop = first_new_character(whole.text)
    generation = text_engine(tokenizer=BYTES).generate("A prompt", SamplingParams(max_new_tokens=40, stop=(stop,)))
    shown = "".join(delta.text for delta in generation) if live else None
    [completion] = generation.results()
    assert completion.finish_reason == "stop"
    assert completion.text == whole.text[: whole.text.index(stop)]
    assert shown in (None, completion.text)
    assert completion.token_ids == whole.token_ids[: len(completion.token_ids)]
    assert BYTES.decode(completion.token_ids) == completion.text
    assert len(completion.logprobs) == len(completion.token_ids)


def test_one_stops_and_the_other_goes_on(whole: Completion) -> None:
    """Without compiling anew: the engine marks the stopped one as done between two calls of the same program."""
    runtime = RuntimeConfig(expert_slots=4, max_seq_len=MAX_SEQ_LEN, batch_size=2, decode_chunk=4, measure_link=False)
    engine = Engine.start(TEXT, runtime, lambda: models.weights(TEXT), tokenizer=BYTES)
    stop = first_new_character(whole.text)
    requests = [SamplingParams(max_new_tokens=40, stop=(stop,)), SamplingParams(max_new_tokens=40)]
    compiled = Steps.decode._cache_size()
    stopped, other = engine.generate(["A prompt", "Another"], requests).results()
    assert Steps.decode._cache_size() == compiled + 1
    assert (stopped.finish_reason, stopped.text) == ("stop", whole.text[: whole.text.index(stop)])
    assert len(stopped.token_ids) < 36, "it ends in a chunk that is not the last"
    [alone] = text_engine(tokenizer=BYTES).generate("Another", requests[1]).results()
    assert (other.finish_reason, other.token_ids) == ("length", alone.token_ids)


def test_one_stops_while_the_call_under_way_ends_another(whole: Completion, monkeypatch: pytest.MonkeyPatch) -> None:
    """A token a call: the other's last token is under way when the stop string comes. It is not woken up."""
    monkeypatch.setattr(jmoe.batch, "STOP_S", 0.0)
    runtime = RuntimeConfig(expert_slots=4, max_seq_len=MAX_SEQ_LEN, batch_size=3, measure_link=False)
    engine = Engine.start(TEXT, runtime, lambda: models.weights(TEXT), tokenizer=BYTES)
    stop = first_new_character(whole.text)
    num_until_stop = next(n for n in range(len(whole.token_ids)) if stop in BYTES.decode(whole.token_ids[: n + 1])) + 1
    lengths = [40, num_until_stop + 1, num_until_stop + 4]
    requests = [SamplingParams(max_new_tokens=length) for length in lengths]
    prompts, stopping = ["A prompt", "Another", "Third"], dataclasses.replace(requests[0], stop=(stop,))
    generation = engine.generate(prompts, [stopping, *requests[1:]])
    made = generation.results()
    assert [completion.finish_reason for completion in made] == ["stop", "length", "length"]
    free = engine.generate(prompts, requests).results()
    assert [len(completion.token_ids) for completion in made[1:]] == lengths[1:]
    assert [completion.token_ids for completion in made[1:]] == [completion.token_ids for completion in free[1:]]
    assert generation.stats.num_decode_steps == lengths[2] - 1


@pytest.mark.parametrize("live", [True, False])
def test_where_a_text_may_stop_calls_are_short(live: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """So that little is decoded in vain: the call with the end of the stop string, and the one under way."""
    monkeypatch.setattr(jmoe.batch, "STOP_S", 0.0)
    runtime = RuntimeConfig(expert_slots=4, max_seq_len=MAX_SEQ_LEN, measure_link=False)
    engine = Engine.start(TEXT, runtime, lambda: models.weights(TEXT), tokenizer=BYTES)
    generation = engine.generate(["A prompt"], SamplingParams(max_new_tokens=12, stop=("never said",)))
    if live:
        list(generation)
    generation.results()
    assert [steps for steps, _ in generation.stats.decode_calls] == [1] * 11


# Left, or interrupted


def test_an_unfinished_generation_keeps_the_engine(engine: Engine) -> None:
    first = engine.generate(PROMPTS[:1], GREEDY)
    next(iter(first))
    for call in (lambda: tokens(engine), lambda: engine.logits([[1, 2]])):
        with pytest.raises(RuntimeError, match="another generation of this engine is unfinished; finish or close it"):
            call()
    assert [completion.token_ids for completion in first.results()] == expected()[:1]
    assert tokens(engine) == expected()


def test_a_closed_generation_says_how_far_it_came(engine: Engine) -> None:
    generation = engine.generate(PROMPTS[:2], GREEDY)
    next(iter(generation))
    generation.close()
    [begun, waiting] = generation.completions
    assert begun.token_ids == expected()[0][:1]
    assert begun.finish_reason == waiting.finish_reason == "unfinished"
    assert waiting.token_ids == ()
    assert generation.stats.num_generated_tokens == 1
    assert list(generation) == []
    assert tokens(engine) == expected()


def test_a_closed_generation_counts_no_call_that_was_under_way() -> None:
    engine = models.engine(expert_slots=4, decode_chunk=2)
    generation = engine.generate(PROMPTS[:1], SamplingParams(max_new_tokens=20, ignore_eos=True))
    deltas = iter(generation)
    while generation.stats.num_decode_steps < 4:
        next(deltas)
    generation.close()
    stats, config = generation.stats, engine.config
    asked = stats.num_decode_steps * len(config.moe_layers) * config.num_experts_per_tok
    assert stats.decode.hits + stats.decode.misses == asked


def test_a_generation_that_nobody_holds_frees_the_engine(engine: Engine) -> None:
    gc.collect()
    gc.disable()  # leaving the loop must do it, not a collection some time later
    try:
        for _ in engine.generate(PROMPTS, GREEDY):
            break
        assert tokens(engine) == expected()
        held = engine.generate(PROMPTS, GREEDY)
        next(iter(held))
        del held
        assert tokens(engine) == expected()
    finally:
        gc.enable()


def test_a_generation_that_never_began_holds_nothing(engine: Engine) -> None:
    waiting = engine.generate(PROMPTS[:1], GREEDY)
    assert tokens(engine) == expected()
    assert [completion.token_ids for completion in waiting.results()] == expected()[:1]


def test_a_generation_begins_with_an_empty_kv_cache_where_the_last_one_lay(engine: Engine) -> None:
    assert tokens(engine) == expected()
    kept = engine._cache
    assert kept is not None
    poisoned = jax.tree.map(lambda part: jnp.full_like(part, jnp.nan) if part.ndim > 1 else part, kept)
    engine._cache = jax.device_put(poisoned, jax.devices()[0])
    places = [part.unsafe_buffer_pointer() for part in engine._cache.keys]
    state = engine.new_state(1, [1])
    assert [part.unsafe_buffer_pointer() for part in state.cache.keys] == places
    assert not any(np.asarray(leaf).any() for leaf in jax.tree.leaves(state.cache))
    engine.give_back(state)
    assert tokens(engine) == expected()


class Interrupted:
    """Programs during one of which somebody presses Ctrl-C: its state is consumed and nothing comes back."""

    def __init__(self, programs, name: str):
        self._programs, self._name, self.calls = programs, name, 0

    def __getattr__(self, name: str):
        return getattr(self._programs, name)

    def __call__(self, call: Call):
        result = self._programs(call)
        if call.name == self._name:
            self.calls += 1
            raise KeyboardInterrupt
        return result


@pytest.mark.parametrize("step", ["prefill_begin", "prefill_layers", "prefill_end", "decode"])
@pytest.mark.parametrize("is_compiled", [True, False])
def test_an_interrupted_step_is_survived(step: str, is_compiled: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = models.engine(prefill_chunk=16)
    if is_compiled:
        tokens(engine)
    with monkeypatch.context() as patch:
        patch.setattr(engine, "programs", Interrupted(engine.programs, step))
        generation = engine.generate(PROMPTS, GREEDY)
        with pytest.raises(KeyboardInterrupt):
            generation.results()
        assert engine.programs.calls == 1
    assert generation.stats.decode.misses == 0
    assert tokens(engine) == expected()


def test_lost_slots_are_filled_anew(engine: Engine) -> None:
    state = engine.new_state(1, [1])
    state.experts.layers[0].delete()
    engine.give_back(state)
    assert tokens(engine) == expected()


class Counted:
    """Steps that count how often a decode was asked for."""

    def __init__(self, steps):
        self._steps, self.num_decodes = steps, 0

    def __getattr__(self, name: str):
        self.num_decodes += name == "decode"
        return getattr(self._steps, name)


@pytest.mark.parametrize(("profiled", "stop", "ahead"), [(False, (), 1), (False, ("never said",), 1), (True, (), 0)])
def test_the_next_call_is_asked_for_before_tokens_are_handed_out(
    profiled: bool, stop: tuple[str, ...], ahead: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """But not while a profiler looks on; and none is asked for in vain."""
    runtime = RuntimeConfig(
        expert_slots=4, max_seq_len=MAX_SEQ_LEN, prefill_chunk=16, decode_chunk=5, measure_link=False, profiled=profiled
    )
    engine = Engine.start(TEXT, runtime, lambda: models.weights(TEXT), tokenizer=BYTES)
    request = SamplingParams(max_new_tokens=12, stop=stop)
    [completion] = engine.generate(["A prompt"], request).results()  # compiles
    monkeypatch.setattr(engine, "steps", Counted(engine.steps))
    generation = engine.generate(["A prompt"], request)
    num_decodes = [engine.steps.num_decodes for _ in generation]
    assert num_decodes[:3] == [0, 1 + ahead, 2 + ahead]
    assert num_decodes[-1] == len(generation.stats.decode_calls)
    assert generation.completions == [completion]


# Figures


@pytest.mark.parametrize("expert_slots", [2, 4, 8])
def test_every_expert_asked_for_is_counted_once(expert_slots: int) -> None:
    """A sequence alone asks for A experts a layer in every step; a prompt of one token in prefill too."""
    engine = models.engine(expert_slots=expert_slots, prefill_chunk=16)
    stats = engine.generate([[3]], GREEDY)
    stats.results()
    stats = stats.stats
    asked = stats.num_decode_steps * NUM_MOE_LAYERS * A
    assert stats.decode.hits + stats.decode.fetched + stats.decode.streamed == asked
    assert stats.decode.streamed == stats.prefill.fetched == 0
    assert stats.prefill.hits + stats.prefill.streamed == NUM_MOE_LAYERS * A
    assert (stats.decode.misses == 0) == (expert_slots == 8)
    assert stats.expert_bytes == SMALL.expert_bytes


@pytest.mark.parametrize("live", [True, False])
def test_tokens_steps_and_calls_add_up(live: bool) -> None:
    engine = models.engine(batch_size=2, prefill_chunk=16, decode_chunk=5)
    requests = [SamplingParams(max_new_tokens=count) for count in (12, 3, 1, 7, 4)]
    generation = engine.generate(PROMPTS, requests)
    deltas = list(generation) if live else []
    completions, stats = generation.results(), generation.stats
    lengths = [len(completion.token_ids) for completion in completions]
    assert lengths == [12, 3, 1, 7, 4]
    assert [completion.token_ids for completion in completions] == [
        ids[:count] for ids, count in zip(expected(), lengths, strict=True)
    ]
    assert stats.num_generated_tokens == sum(lengths)
    assert stats.num_decode_tokens == sum(lengths) - len(lengths)  # the first of each comes from prefill
    assert stats.num_decode_steps == sum(steps for steps, _ in stats.decode_calls) == 11 + 6 + 3
    assert all(0 < steps <= 5 and seconds > 0 for steps, seconds in stats.decode_calls)
    assert sum(len(delta.token_ids) for delta in deltas) == (sum(lengths) if live else 0)
    assert stats.ttft_s > 0
    assert stats.decode_s > 0


def test_a_generation_counts_for_itself_alone(engine: Engine) -> None:
    """The engine's counters run on; each generation's figures begin at 0."""
    for _ in range(2):
        generation = engine.generate([[3]], GREEDY)
        generation.results()
        counts = generation.stats.decode
        assert counts.hits + counts.misses == (GREEDY.max_new_tokens - 1) * NUM_MOE_LAYERS * A


def test_compiling_is_said_and_timed_once() -> None:
    said: list[str] = []
    engine = text_engine(announce=said.append)
    compiled = []
    for _ in range(2):
        generation = engine.generate([[1, 2, 3]], GREEDY)
        generation.results()
        compiled.append(generation.stats.compile_s > 0)
    assert compiled == [True, False]
    assert sum(line.startswith("compiling for 1 sequence(s)") for line in said) == 1
    assert said[0] == "memory plan:"
    names = "route, admit, fetch, expert_mlp, decode_attention, chunk_attention, norm_linear"
    assert any(f"kernels: reference for {names} (the default" in line for line in said)


# Logits


def test_logits_of_every_position() -> None:
    engine = models.engine(batch_size=2, prefill_chunk=16)
    ids = np.array(models.prompts(20, 20))  # two chunks
    logits = engine.logits(ids)
    assert logits.shape == (2, 20, SMALL.vocab_size)
    assert logits.dtype == np.float32
    np.testing.assert_allclose(engine.logits(ids[1:])[0], logits[1], atol=1e-4)
    np.testing.assert_allclose(engine.logits(ids[:, :7]), logits[:, :7], atol=1e-4)
    [completion] = engine.generate([ids[0].tolist()], SamplingParams(max_new_tokens=1)).results()
    assert completion.token_ids == (logits[0, -1].argmax(),)


@pytest.mark.parametrize(
    ("token_ids", "message"),
    [
        ([1, 2, 3], r"token_ids of shape \(3,\) must be \[B, T\]"),
        ([[[1]]], r"token_ids of shape \(1, 1, 1\) must be \[B, T\]"),
        ([[1, 2], [3]], "inhomogeneous"),
        ([[1, 97]], r"prompt 0 has token ids \[97\] outside 0\.\.96"),
        ([[], []], "prompt 0 is empty"),
        ([[1] * MAX_SEQ_LEN], "max_seq_len=64"),
        (
            [[1], [2]],
            "2 sequences at a time, but memory is planned for 1; raise the runtime configuration's batch_size",
        ),
    ],
)
def test_token_ids_that_cannot_be_are_refused(engine: Engine, token_ids, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        engine.logits(token_ids)
    assert engine.logits([[1, 2]]).shape == (1, 2, SMALL.vocab_size)
