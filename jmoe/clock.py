"""What is counted while a generation runs, and the stats that come of it."""

from typing import TYPE_CHECKING

from jmoe import memory
from jmoe.prefetch_stats import PrefetchStats
from jmoe.stats import DecodeCalls, DraftStats, ExpertCounts, GenerationStats
from jmoe.traces import Recording

if TYPE_CHECKING:
    from jmoe.engine import Engine

_NO_EXPERTS = ExpertCounts(hits=0, fetched=0, streamed=0)


class Clock:
    """Times and counts, summed over the batches of a generation, its routing, and whether anybody watches it run."""

    def __init__(self, recording: Recording | None):
        self.recording = recording
        self.is_live = True
        self.compile_s = self.ttft_s = 0.0
        self.num_prompt_tokens = self.num_decode_tokens = 0
        self.decode_calls: list[tuple[int, float]] = []
        self.prefill = self.decode = _NO_EXPERTS
        self.prefetch: PrefetchStats | None = None
        self.drafted: dict[int, DecodeCalls] = {}  # by the number of drafted tokens; without drafts empty

    def add_decode(self, num_steps: int, seconds: float, num_tokens: int) -> None:
        """Of any call of a jitted decode."""
        self.decode_calls.append((num_steps, seconds))
        self.num_decode_tokens += num_tokens

    def add_call(self, call: DecodeCalls) -> None:
        """Where there are drafts: the same call in all its figures."""
        known = self.drafted.get(call.num_draft_tokens)
        self.drafted[call.num_draft_tokens] = known + call if known else call

    def add_prefetch(self, call: PrefetchStats) -> None:
        """What came early in a call of a jitted decode."""
        self.prefetch = self.prefetch + call if self.prefetch else call

    def stats(self, engine: "Engine", num_generated_tokens: int) -> GenerationStats:
        """What happened so far."""
        return GenerationStats(
            num_prompt_tokens=self.num_prompt_tokens,
            num_generated_tokens=num_generated_tokens,
            num_decode_tokens=self.num_decode_tokens,
            decode_calls=tuple(self.decode_calls),
            compile_s=self.compile_s,
            ttft_s=self.ttft_s,
            prefill=self.prefill,
            decode=self.decode,
            expert_bytes=engine.config.expert_bytes,
            link_ceiling_gbps=engine.link_ceiling_gbps,
            peak_device_bytes=memory.peak_device_bytes(),
            drafts=self._draft_stats(engine) if engine.drafting else None,
            prefetch=self.prefetch,
        )

    def _draft_stats(self, engine: "Engine") -> DraftStats:
        calls = tuple(self.drafted[number] for number in sorted(self.drafted))
        return DraftStats(
            calls=calls, num_layers=engine.plan.layout.num_layers, expert_bytes=engine.config.expert_bytes
        )
