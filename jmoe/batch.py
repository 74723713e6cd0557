"""One batch of a generation: calls the jitted steps, and takes what they emit apart."""

import dataclasses
import math
import time
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

import jax
import jax.numpy as jnp
import numpy as np

from jmoe import prefetching
from jmoe.clock import Clock
from jmoe.completions import Delta
from jmoe.decoding.compiled import Call
from jmoe.decoding.contest import Choice
from jmoe.decoding.emitted import Emitted, Routed
from jmoe.decoding.prefill import Chunk
from jmoe.decoding.sampling import NO_TOKEN, Mode, batch_sampling, sampling_mode
from jmoe.decoding.speculative import Verified
from jmoe.decoding.step import DecodeState
from jmoe.drafting import Drafting
from jmoe.experts.draft import DraftSet
from jmoe.experts.residency import Counters
from jmoe.prefetch_stats import PrefetchStats
from jmoe.stats import DecodeCalls, ExpertCounts, read_counts

if TYPE_CHECKING:
    from jmoe.engine import Engine

LIVE_S = 0.1  # how often text should appear
STOP_S = 0.025  # of a call that a stop string may make needless
RUNS_TO_RECORD = 2  # XLA records the CUDA graph of a program when it runs for the second time
SMALLEST_CHUNK = 16  # prefill compiles for powers of two from here to the plan's prefill_chunk


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


@dataclasses.dataclass(frozen=True)
class _Call:
    """A call of a jitted step that the device was asked for, at `start` by this process's clock, and what comes of it.

    At most `num_steps` steps, or cycles, chosen when as many sequences as `num_active` were known not to be done.
    """

    choice: Choice
    num_active: int
    num_steps: int
    start: float
    result: Emitted | Verified


class Batch:
    """The device side of a batch: calls the jitted steps and takes their tokens apart."""

    def __init__(self, engine: "Engine", sequences, requests, state: DecodeState, clock: Clock):
        self.engine, self.sequences, self.state, self.clock = engine, sequences, state, clock
        self.sampling = batch_sampling(requests, engine.eos_ids)
        self.mode: Mode = sampling_mode(requests)
        self.finished = False
        self.drafting = engine.drafting
        pays = prefetching.pays(engine.config, engine.plan, len(sequences))
        self.prefetching = engine.prefetching if pays else None
        self._draft_set: DraftSet | None = None
        self._next: _Call | None = None
        self._runs_ahead = not engine.runtime.profiled
        self._may_stop = any(request.stop for request in requests)
        self._last_end = 0.0
        self._num_active = len(sequences)
        self._before = read_counts(state.experts.residency)
        self._seen = self._before[1]
        self._step_s: dict[int, float] = {}  # the last call's, by the number of drafted tokens

    def compile(self) -> None:
        """Compiles what this batch needs, by steps that do nothing: a chunk without tokens, a decode of no step."""
        engine, chunk = self.engine, next(self._chunks())
        shape = (chunk.token_ids.shape, self.mode)
        if shape in engine.compiled:
            return
        start = time.perf_counter()
        engine.announce(f"compiling for {shape[0][0]} sequence(s), prompts {shape[0][1]} tokens at a time")
        nothing = jnp.zeros_like(chunk.num_valid)
        empty = dataclasses.replace(chunk, num_valid=nothing, is_last=nothing.astype(bool))
        drafting, choices = self.drafting, []
        if drafting is None or drafting.has_plain_steps:
            choices = self.prefetching.programs if self.prefetching else [Choice(0)]
        cycles = [self._cycles_call(drafting, Choice(1), 0)] if drafting else []
        with engine.programs.making([*cycles, *(self._decode_call(choice, 0) for choice in choices)]):
            self._prefill(empty)  # its parts are small: they are made in turn, as they are called
        for _ in range(RUNS_TO_RECORD):
            if drafting:
                self._cycles(drafting, Choice(1), 0)
            for choice in choices:
                self._decode(choice, 0)
        jax.block_until_ready(self.state)
        engine.compiled.add(shape)
        self.clock.compile_s += time.perf_counter() - start

    def _chunks(self) -> Iterator[Chunk]:
        prompts = [sequence.prompt for sequence in self.sequences]
        return prompt_chunks(prompts, self.engine.plan.prefill_chunk)

    def _prefill(self, chunk: Chunk) -> Routed | None:
        engine, weights = self.engine, self.engine.weights
        inputs = weights.params, weights.store, self.state, chunk, self.sampling
        self.state, routed = engine.prefill.chunk(*inputs, mode=self.mode, run=engine.programs)
        return routed

    def _decode_call(self, choice: Choice, num_steps: int) -> Call:
        weights, steps, size = self.engine.weights, self.engine.steps, len(self.sequences)
        inputs = weights.params, weights.store, self.state, self.sampling, np.int32(num_steps)
        static = {"capacity": self.engine.runtime.decode_chunk, "mode": self.mode}
        if self.prefetching and choice.number:
            ahead = self.engine.predictor, np.int32(choice.number)
            static["prefetch_experts"] = self.prefetching.num_experts
            return Call(steps, "decode_prefetching", size, (*inputs, *ahead), static)
        return Call(steps, "decode", size, (*inputs, self.engine.executed), static)

    def _decode(self, choice: Choice, num_steps: int) -> Emitted:
        self.state, emitted = self.engine.programs(self._decode_call(choice, num_steps))
        return emitted

    def _cycles_call(self, drafting: Drafting, choice: Choice, num_cycles: int) -> Call:
        weights, steps, distances = self.engine.weights, drafting.steps, drafting.distances
        if self._draft_set is None:
            self._draft_set = self.engine.programs(Call(steps, "start", (), (self.state.experts, distances), {}))
        inputs = weights.params, weights.store, self.state, self._draft_set, distances, self.sampling
        counts = np.int32(choice.number), np.int32(num_cycles)
        static = {"capacity": drafting.most_cycles(self.engine.runtime.decode_chunk), "mode": self.mode}
        return Call(steps, "decode", len(self.sequences), (*inputs, *counts), static)

    def _cycles(self, drafting: Drafting, choice: Choice, num_cycles: int) -> Verified:
        call = self._cycles_call(drafting, choice, num_cycles)
        self.state, self._draft_set, verified = self.engine.programs(call)
        return verified

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
        """The tokens of one call of a jitted step: plain steps, or cycles.

        The next call is asked for before: the device goes on while the host takes this one's tokens apart. But after a
        try of drafts it depends on how long that took, such a try is not to take time from the call before, and a
        profiler is to see one call after the other.
        """
        call, self._next = self._next or self._begin(self._choose()), None
        if self._runs_ahead and not self._is_timed(call.choice) and self._tokens_left > call.num_steps:
            choice = self._choose()
            self._next = None if self._is_timed(choice) else self._begin(choice)
        result = jax.device_get(call.result)  # all of it together: one wait
        start, self._last_end = max(call.start, self._last_end), time.perf_counter()
        if isinstance(result, Verified):
            num_steps, counts = int(result.num_cycles), _counts_of_drafts(result)
        else:
            num_steps, counts = int(result.num_steps), _counts_of_steps(result)
            self._record(jax.tree.map(lambda steps: steps[:num_steps], result.routed), is_prefill=False)
        assert result.counters is not None  # a call has ended
        self._count(call, num_steps, self._last_end - start, result.counters, counts)
        if self.prefetching and isinstance(result, Emitted):
            came = PrefetchStats.of_call(result.prefetched, num_steps, call.choice.number, self.engine.config)
            self.clock.add_prefetch(came)
            self.prefetching.learn(call.num_active, call.choice.number, num_steps, came)
        yield from self._hand_out(*map(np.asarray, (result.token_ids, result.logprobs, result.done)))

    @property
    def _tokens_left(self) -> int:
        """The most that a sequence may still produce, as far as is known."""
        return max(sequence.budget - len(sequence.token_ids) for sequence in self.sequences)

    def _choose(self) -> Choice:
        chooser = self.drafting or self.prefetching
        return chooser.choose(self._num_active) if chooser else Choice(0)

    def _is_timed(self, choice: Choice) -> bool:
        """Whether it is a try, that goes by its time (see `jmoe.decoding.contest`): what prefetches goes by bytes."""
        return self.drafting is not None and choice.num_steps is not None

    def _begin(self, choice: Choice) -> _Call:
        start, drafting, capacity = time.perf_counter(), self.drafting, self.engine.runtime.decode_chunk
        if drafting and choice.number:
            num_steps = self._num_steps(choice, drafting.num_cycles(capacity, choice.number))
            result = self._cycles(drafting, choice, num_steps)
        else:
            num_steps = self._num_steps(choice, capacity)
            result = self._decode(choice, num_steps)
            self._draft_set = None  # its experts may lose their slots
        return _Call(choice, self._num_active, num_steps, start, result)

    def _count(self, asked: _Call, num_steps: int, seconds: float, counters: Counters, counts: dict) -> None:
        drafted = self._drafted(asked.choice)
        self._step_s[drafted] = seconds / max(1, num_steps)
        self.clock.add_decode(num_steps, seconds, counts["num_tokens"])
        seen = ExpertCounts.read(counters)
        experts, self._seen = seen - self._seen, seen
        call = DecodeCalls(num_draft_tokens=drafted, num_steps=num_steps, seconds=seconds, experts=experts, **counts)
        if self.drafting:
            self.drafting.record(asked.num_active, call)
            self.clock.add_call(call)

    def _record(self, routed: Routed | None, *, is_prefill: bool) -> None:
        if routed is not None and self.clock.recording is not None:
            requests = [sequence.index for sequence in self.sequences]
            ids, weights = np.asarray(routed.expert_ids), np.asarray(routed.combine_weights)
            self.clock.recording.add(ids, weights, requests, is_prefill=is_prefill)

    def _drafted(self, choice: Choice) -> int:
        """The number of tokens that are drafted at a time."""
        return choice.number if self.drafting else 0

    def _num_steps(self, choice: Choice, capacity: int) -> int:
        """As many steps as fill a call's time at the pace of the last such call, one to begin with.

        A prefetch's short calls are for running ahead, two at a time: else the host's time would come with each.
        """
        if self.drafting or self._runs_ahead:
            capacity = min(capacity, choice.num_steps or capacity)
        if math.isinf(self._call_s):
            return capacity
        step_s = self._step_s.get(self._drafted(choice))
        return 1 if step_s is None else min(capacity, max(1, int(self._call_s / step_s)))

    @property
    def _call_s(self) -> float:
        """How long a call may take: as long as it likes if nobody watches, and nothing but a length ends the text."""
        if self._may_stop and self._runs_ahead:
            return STOP_S
        return LIVE_S if self.clock.is_live else math.inf

    def _hand_out(self, tokens: np.ndarray, logprobs: np.ndarray, done: np.ndarray) -> Iterator[Delta]:
        stopped = np.zeros(len(self.sequences), bool)
        for n, sequence in enumerate(self.sequences):
            real = tokens[n] != NO_TOKEN
            if real.any() and not sequence.stopped:
                yield sequence.push(tokens[n][real].tolist(), logprobs[n][real].tolist())
            stopped[n] = sequence.stopped
        self._num_active = int((~(done | stopped)).sum())
        self.finished = self._num_active == 0
        if (stopped & ~done).any() and not self.finished:  # a call under way may have ended others
            self.state = dataclasses.replace(self.state, done=self.state.done | stopped)

    def close(self) -> None:
        """Counts the calls whose tokens were taken: one may be under way, whose time and tokens nobody has."""
        self.clock.decode = self.clock.decode + self._seen - self._before[1]
        if not self.state.experts.is_deleted():
            prefill, _ = read_counts(self.state.experts.residency)
            self.clock.prefill = self.clock.prefill + prefill - self._before[0]
        self.engine.give_back(self.state)


def _counts_of_steps(emitted: Emitted) -> dict[str, int]:
    num_tokens = int((emitted.token_ids != NO_TOKEN).sum())
    return {"num_tokens": num_tokens, "num_verifications": num_tokens}


def _counts_of_drafts(verified: Verified) -> dict[str, int]:
    names = ("num_verifications", "proposed", "accepted")
    return {"num_tokens": int(verified.num_tokens.sum())} | {name: int(getattr(verified, name)) for name in names}
