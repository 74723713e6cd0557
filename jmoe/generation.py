"""One call of `Engine.generate`: prefill, then decode chunk by chunk, with text as it comes."""

import dataclasses
import time
from collections.abc import Generator, Iterator, Sequence
from typing import TYPE_CHECKING

import jax
import jax.numpy as jnp
import numpy as np

from jmoe import memory
from jmoe.decoding.sampling import NO_TOKEN, SamplingParams, batch_sampling, sampling_mode
from jmoe.decoding.step import Chunk, DecodeState, Emitted, Routed
from jmoe.stats import ExpertCounts, GenerationStats, read_counts
from jmoe.tokenizer import TextStream
from jmoe.traces import Recording, Trace

if TYPE_CHECKING:
    from jmoe.engine import Engine

LIVE_S = 0.1  # how often text should appear
SMALLEST_CHUNK = 16  # prefill compiles for powers of two from here to the plan's prefill_chunk
_NO_EXPERTS = ExpertCounts(hits=0, fetched=0, streamed=0)


@dataclasses.dataclass(frozen=True)
class Delta:
    """New tokens of prompt `index`, and the text that may be shown now (some may be held back)."""

    index: int
    text: str
    token_ids: tuple[int, ...]


@dataclasses.dataclass(frozen=True)
class Completion:
    """What became of one prompt. `finish_reason` is "eos", "stop" (a stop string), "length", or "unfinished".

    `token_ids` end with the end of sequence if that came; `text` has neither it nor the stop string.
    """

    index: int
    prompt_token_ids: tuple[int, ...]
    token_ids: tuple[int, ...]
    logprobs: tuple[float, ...]
    text: str
    finish_reason: str


def prompt_chunks(prompts: Sequence[Sequence[int]], prefill_chunk: int) -> Iterator[Chunk]:
    """The prompts as chunks of one shape: the smallest power of two that holds them, or `prefill_chunk`."""
    lengths = np.array([len(prompt) for prompt in prompts], np.int32)
    longest = int(lengths.max())
    size = min(prefill_chunk, max(SMALLEST_CHUNK, 1 << (longest - 1).bit_length()))
    for start in range(0, longest, size):
        token_ids = np.zeros((len(prompts), size), np.int32)
        for row, prompt in zip(token_ids, prompts, strict=True):
            part = prompt[start : start + size]
            row[: len(part)] = part
        ends = (lengths > start) & (lengths <= start + size)
        num_valid = np.clip(lengths - start, 0, size)
        yield Chunk(*(jnp.asarray(field) for field in (token_ids, num_valid, ends, lengths)))


class _Sequence:
    """One prompt's tokens and text so far."""

    def __init__(self, index: int, prompt: Sequence[int], stream: TextStream | None):
        self.index, self.prompt, self.stream = index, prompt, stream
        self.budget = 0  # tokens that it may produce; known when its batch starts
        self.token_ids: list[int] = []
        self.logprobs: list[float] = []
        self.text = ""

    @property
    def stopped(self) -> bool:
        return self.stream is not None and self.stream.stopped

    def push(self, token_ids: Sequence[int], logprobs: Sequence[float]) -> Delta:
        self.token_ids += token_ids
        self.logprobs += logprobs
        text = self.stream.push(list(token_ids)) if self.stream else ""
        self.text += text
        return Delta(self.index, text, tuple(token_ids))

    def flush(self) -> Delta:
        text = self.stream.flush() if self.stream else ""
        self.text += text
        return Delta(self.index, text, ())

    def completion(self, eos_ids: Sequence[int]) -> Completion:
        ended = bool(self.token_ids) and self.token_ids[-1] in eos_ids
        full = bool(self.token_ids) and len(self.token_ids) == self.budget
        reason = "stop" if self.stopped else "eos" if ended else "length" if full else "unfinished"
        keep = self.stream.num_tokens if self.stopped and self.stream else len(self.token_ids)
        return Completion(
            self.index, tuple(self.prompt), tuple(self.token_ids[:keep]), tuple(self.logprobs[:keep]), self.text, reason
        )


class Generation:
    """Iterate for `Delta`s as tokens arrive; `results()` runs to the end. `stats` are there afterwards."""

    def __init__(self, engine: "Engine", prompts: list[list[int]], requests: list[SamplingParams]):
        self._engine, self._requests = engine, requests
        tokenizer = engine.tokenizer
        if tokenizer is None and any(request.stop for request in requests):
            raise ValueError("stop strings need a tokenizer, and this engine has none")
        self._sequences = [
            _Sequence(n, prompt, TextStream(tokenizer, request.stop) if tokenizer else None)
            for n, (prompt, request) in enumerate(zip(prompts, requests, strict=True))
        ]
        records = engine.runtime.record_routing
        self._clock = _Clock(Recording(engine.config, engine.fingerprint) if records else None)
        self._iterator = _run(engine, self._sequences, requests, self._clock)

    def __iter__(self) -> Iterator[Delta]:
        return self._iterator

    def close(self) -> None:
        """Ends the generation where it is; the engine is free again. `stats` say what happened so far."""
        self._iterator.close()

    def results(self) -> list[Completion]:
        """Runs what is left, in the largest chunks, and returns a completion for each prompt."""
        self._clock.is_live = False
        for _ in self._iterator:
            pass
        return self.completions

    @property
    def completions(self) -> list[Completion]:
        """Each prompt's completion as far as it has come."""
        return [
            sequence.completion(() if request.ignore_eos else self._engine.eos_ids)
            for sequence, request in zip(self._sequences, self._requests, strict=True)
        ]

    @property
    def trace(self) -> Trace:
        """The routing of all tokens that were computed so far. Raises RuntimeError if none is recorded."""
        if self._clock.recording is None:
            raise RuntimeError("routing is not recorded; start the engine with RuntimeConfig(record_routing=True)")
        return self._clock.recording.trace()

    @property
    def stats(self) -> GenerationStats:
        clock, engine = self._clock, self._engine
        return GenerationStats(
            num_prompt_tokens=clock.num_prompt_tokens,
            num_generated_tokens=sum(len(sequence.token_ids) for sequence in self._sequences),
            num_decode_tokens=clock.num_decode_tokens,
            decode_calls=tuple(clock.decode_calls),
            compile_s=clock.compile_s,
            ttft_s=clock.ttft_s,
            prefill=clock.prefill,
            decode=clock.decode,
            expert_bytes=engine.config.expert_bytes,
            link_ceiling_gbps=engine.link_ceiling_gbps,
            peak_device_bytes=memory.peak_device_bytes(),
        )


def _run(
    engine: "Engine", sequences: list[_Sequence], requests: list[SamplingParams], clock: "_Clock"
) -> Generator[Delta]:
    """Batch after batch. No method: a `Generation` that its own iterator holds would keep the slots once abandoned."""
    size = engine.plan.batch_size
    for start in range(0, len(sequences), size):
        yield from _run_batch(engine, sequences[start : start + size], requests[start : start + size], clock)


def _run_batch(
    engine: "Engine", sequences: list[_Sequence], requests: list[SamplingParams], clock: "_Clock"
) -> Generator[Delta]:
    for sequence, request in zip(sequences, requests, strict=True):
        sequence.budget = min(request.max_new_tokens, engine.plan.max_seq_len - len(sequence.prompt))
    budget = [sequence.budget for sequence in sequences]
    batch = _Batch(engine, sequences, requests, engine.new_state(len(sequences), budget), clock)
    try:
        batch.compile()
        yield from batch.prefill()
        while not batch.finished:
            yield from batch.decode()
        yield from (sequence.flush() for sequence in sequences)
    finally:
        batch.close()


class _Clock:
    """Times and counts, summed over the batches of a generation, its routing, and whether anybody watches it run."""

    def __init__(self, recording: Recording | None):
        self.recording = recording
        self.is_live = True
        self.compile_s = self.ttft_s = 0.0
        self.num_prompt_tokens = self.num_decode_tokens = 0
        self.decode_calls: list[tuple[int, float]] = []
        self.prefill = self.decode = _NO_EXPERTS


class _Batch:
    """The device side of a batch: calls the jitted steps and takes their tokens apart."""

    def __init__(self, engine: "Engine", sequences, requests, state: DecodeState, clock: _Clock):
        self.engine, self.sequences, self.state, self.clock = engine, sequences, state, clock
        self.sampling = batch_sampling(requests, engine.eos_ids)
        self.mode = sampling_mode(requests)
        self.finished = False
        self._before = read_counts(state.experts.residency)
        self._step_s: float | None = None

    def compile(self) -> None:
        """Compiles what this batch needs, by steps that do nothing: a chunk without tokens, a decode of no step."""
        engine, chunk = self.engine, next(self._chunks())
        shape = (chunk.token_ids.shape, self.mode)
        if shape in engine.compiled:
            return
        start = time.perf_counter()
        engine.announce(f"compiling for {shape[0][0]} sequence(s), prompts {shape[0][1]} tokens at a time")
        nothing = jnp.zeros_like(chunk.num_valid)
        self._prefill(dataclasses.replace(chunk, num_valid=nothing, is_last=nothing.astype(bool)))
        self._decode(0)
        jax.block_until_ready(self.state)
        engine.compiled.add(shape)
        self.clock.compile_s += time.perf_counter() - start

    def _chunks(self) -> Iterator[Chunk]:
        prompts = [sequence.prompt for sequence in self.sequences]
        return prompt_chunks(prompts, self.engine.plan.prefill_chunk)

    def _prefill(self, chunk: Chunk) -> Routed | None:
        weights, steps = self.engine.weights, self.engine.steps
        self.state, routed = steps.prefill(
            weights.params, weights.store, self.state, chunk, self.sampling, mode=self.mode
        )
        return routed

    def _decode(self, num_steps: int) -> Emitted:
        weights, steps = self.engine.weights, self.engine.steps
        count, capacity = jnp.asarray(num_steps, jnp.int32), self.engine.runtime.decode_chunk
        self.state, emitted = steps.decode(
            weights.params, weights.store, self.state, self.sampling, count, capacity=capacity, mode=self.mode
        )
        return emitted

    def prefill(self) -> Iterator[Delta]:
        start = time.perf_counter()
        for chunk in self._chunks():
            self._record(jax.device_get(self._prefill(chunk)), is_prefill=True)
        state = self.state
        tokens, logprobs, done = jax.device_get((state.last_tokens, state.last_logprobs, state.done))
        self.clock.ttft_s = self.clock.ttft_s or time.perf_counter() - start
        self.clock.num_prompt_tokens += sum(len(sequence.prompt) for sequence in self.sequences)
        yield from self._hand_out(tokens[:, None], logprobs[:, None], done)

    def decode(self) -> Iterator[Delta]:
        start, capacity = time.perf_counter(), self.engine.runtime.decode_chunk
        emitted = self._decode(self._num_steps(capacity) if self.clock.is_live else capacity)
        emitted, done = jax.device_get((emitted, self.state.done))  # together: one wait
        num_steps = int(emitted.num_steps)
        self._record(jax.tree.map(lambda steps: steps[:num_steps], emitted.routed), is_prefill=False)
        tokens, logprobs = emitted.token_ids[:, :num_steps], emitted.logprobs[:, :num_steps]
        took = time.perf_counter() - start
        self._step_s = took / max(1, num_steps)
        self.clock.decode_calls.append((num_steps, took))
        self.clock.num_decode_tokens += int((tokens != NO_TOKEN).sum())
        yield from self._hand_out(tokens, logprobs, done)

    def _record(self, routed: Routed | None, *, is_prefill: bool) -> None:
        if routed is not None and self.clock.recording is not None:
            requests = [sequence.index for sequence in self.sequences]
            ids, weights = np.asarray(routed.expert_ids), np.asarray(routed.combine_weights)
            self.clock.recording.add(ids, weights, requests, is_prefill=is_prefill)

    def _num_steps(self, capacity: int) -> int:
        """As many steps as fill LIVE_S at the pace of the last call; one to begin with."""
        return 1 if self._step_s is None else max(1, min(capacity, int(LIVE_S / self._step_s)))

    def _hand_out(self, tokens: np.ndarray, logprobs: np.ndarray, done: np.ndarray) -> Iterator[Delta]:
        stopped = np.zeros(len(self.sequences), bool)
        for n, sequence in enumerate(self.sequences):
            real = tokens[n] != NO_TOKEN
            if real.any() and not sequence.stopped:
                yield sequence.push(tokens[n][real].tolist(), logprobs[n][real].tolist())
            stopped[n] = sequence.stopped
        if (stopped & ~done).any():
            committed = jax.device_put(done | stopped, jax.devices()[0])  # as a step returns it, see init_state
            self.state = dataclasses.replace(self.state, done=committed)
        self.finished = bool((done | stopped).all())

    def close(self) -> None:
        if not self.state.experts.is_deleted():
            prefill, decode = read_counts(self.state.experts.residency)
            self.clock.prefill = self.clock.prefill + prefill - self._before[0]
            self.clock.decode = self.clock.decode + decode - self._before[1]
        self.engine.give_back(self.state)
