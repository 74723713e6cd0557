"""One call of `Engine.generate`: prefill, then decode chunk by chunk, with text as it comes."""

from collections.abc import Generator, Iterator
from typing import TYPE_CHECKING

from jmoe.batch import Batch
from jmoe.clock import Clock
from jmoe.completions import Completion, Delta, PromptInProgress
from jmoe.decoding.sampling import SamplingParams
from jmoe.stats import GenerationStats
from jmoe.tokenizer import TextStream
from jmoe.traces import Recording, Trace

if TYPE_CHECKING:
    from jmoe.engine import Engine


class Generation:
    """Iterate for `Delta`s as tokens arrive; `results()` runs to the end. `stats` are there afterwards."""

    def __init__(self, engine: "Engine", prompts: list[list[int]], requests: list[SamplingParams]):
        self._engine, self._requests = engine, requests
        tokenizer = engine.tokenizer
        if tokenizer is None and any(request.stop for request in requests):
            raise ValueError("stop strings need a tokenizer, and this engine has none")
        self._sequences = [
            PromptInProgress(n, prompt, TextStream(tokenizer, request.stop) if tokenizer else None)
            for n, (prompt, request) in enumerate(zip(prompts, requests, strict=True))
        ]
        records = engine.runtime.record_routing
        self._clock = Clock(Recording(engine.config, engine.fingerprint) if records else None)
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
        return self._clock.stats(self._engine, sum(len(sequence.token_ids) for sequence in self._sequences))


def _run(
    engine: "Engine", sequences: list[PromptInProgress], requests: list[SamplingParams], clock: Clock
) -> Generator[Delta]:
    """Batch after batch. No method: a `Generation` that its own iterator holds would keep the slots once abandoned."""
    size = engine.plan.batch_size
    for start in range(0, len(sequences), size):
        yield from _run_batch(engine, sequences[start : start + size], requests[start : start + size], clock)


def _run_batch(
    engine: "Engine", sequences: list[PromptInProgress], requests: list[SamplingParams], clock: Clock
) -> Generator[Delta]:
    for sequence, request in zip(sequences, requests, strict=True):
        sequence.budget = min(request.max_new_tokens, engine.plan.max_seq_len - len(sequence.prompt))
    budget = [sequence.budget for sequence in sequences]
    batch = Batch(engine, sequences, requests, engine.new_state(len(sequences), budget), clock)
    try:
        batch.compile()
        yield from batch.prefill()
        while not batch.finished:
            yield from batch.decode()
        yield from (sequence.flush() for sequence in sequences)
    finally:
        batch.close()
