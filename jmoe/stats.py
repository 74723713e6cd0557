"""What happened in a generation: tokens, times, experts hit and fetched."""

import dataclasses
from typing import Any

import jax
import numpy as np

from jmoe.experts.residency import Counters, Residency
from jmoe.prefetch_stats import PrefetchStats


@dataclasses.dataclass(frozen=True, kw_only=True)
class ExpertCounts:
    """Distinct experts that steps asked for, summed over layers. See `jmoe.experts.residency.Counters`."""

    hits: int
    fetched: int
    streamed: int

    @classmethod
    def read(cls, counters: Counters) -> "ExpertCounts":
        """Waits for the device."""
        values = jax.device_get((counters.hits, counters.fetched, counters.streamed))  # together: one wait
        hits, fetched, streamed = (int(np.asarray(value, np.int64).sum()) for value in values)
        return cls(hits=hits, fetched=fetched, streamed=streamed)

    def __add__(self, other: "ExpertCounts") -> "ExpertCounts":
        return ExpertCounts(
            hits=self.hits + other.hits, fetched=self.fetched + other.fetched, streamed=self.streamed + other.streamed
        )

    def __sub__(self, earlier: "ExpertCounts") -> "ExpertCounts":
        return ExpertCounts(
            hits=self.hits - earlier.hits,
            fetched=self.fetched - earlier.fetched,
            streamed=self.streamed - earlier.streamed,
        )

    @property
    def misses(self) -> int:
        return self.fetched + self.streamed

    @property
    def hit_rate(self) -> float:
        asked = self.hits + self.misses
        return self.hits / asked if asked else 1.0


@dataclasses.dataclass(frozen=True, kw_only=True)
class DecodeCalls:
    """What calls of a jitted step came to that drafted the same number of tokens at a time; 0: plain steps.

    `num_steps` counts cycles, or plain steps; `num_verifications` the sequences of each that were not done.
    """

    num_draft_tokens: int
    num_steps: int
    seconds: float
    num_tokens: int
    num_verifications: int
    proposed: int = 0
    accepted: int = 0
    experts: ExpertCounts

    def __add__(self, other: "DecodeCalls") -> "DecodeCalls":
        """Both together. The number of drafted tokens is 0 where they differ."""
        same = self.num_draft_tokens if self.num_draft_tokens == other.num_draft_tokens else 0
        names = [field.name for field in dataclasses.fields(self) if field.name != "num_draft_tokens"]
        sums = {name: getattr(self, name) + getattr(other, name) for name in names}
        return DecodeCalls(num_draft_tokens=same, **sums)

    @property
    def acceptance_rate(self) -> float:
        return self.accepted / self.proposed if self.proposed else 0.0

    @property
    def mean_accepted(self) -> float:
        """Tokens that a verification yields, the one after the accepted included."""
        return self.num_tokens / self.num_verifications if self.num_verifications else 0.0

    @property
    def tokens_per_s(self) -> float:
        return self.num_tokens / self.seconds if self.seconds else 0.0

    @property
    def experts_per_step(self) -> float:
        """Distinct experts that a step asks for, all layers together."""
        return (self.experts.hits + self.experts.misses) / self.num_steps if self.num_steps else 0.0

    @property
    def misses_per_token(self) -> float:
        return self.experts.misses / self.num_tokens if self.num_tokens else 0.0


@dataclasses.dataclass(frozen=True, kw_only=True)
class DraftStats:
    """Speculative decoding beside plain steps: the calls of a generation, by the number of tokens that they drafted."""

    calls: tuple[DecodeCalls, ...]
    num_layers: int
    expert_bytes: int

    @property
    def plain(self) -> DecodeCalls:
        """The plain steps; all zeros where there were none."""
        return sum((calls for calls in self.calls if not calls.num_draft_tokens), _NO_CALLS)

    @property
    def cycles(self) -> DecodeCalls:
        """All calls that drafted; all zeros where there were none."""
        return sum((calls for calls in self.calls if calls.num_draft_tokens), _NO_CALLS)

    @property
    def steps_by_draft_tokens(self) -> dict[int, int]:
        """What was chosen: cycles (0: plain steps) for each number of drafted tokens."""
        return {calls.num_draft_tokens: calls.num_steps for calls in self.calls}

    @property
    def union_size(self) -> float:
        """Distinct experts of a layer that a verification asks for."""
        return self.cycles.experts_per_step / self.num_layers

    def bytes_per_token(self, calls: DecodeCalls) -> float:
        """Bytes that crossed the link for one decoded token."""
        return calls.misses_per_token * self.expert_bytes

    def lines(self) -> list[str]:
        """For people: how the drafts did, and what was chosen."""
        plain, cycles = self.plain, self.cycles
        chosen = ", ".join(
            f"{count} cycles of {number}" if number else f"{count} plain steps"
            for number, count in self.steps_by_draft_tokens.items()
        )
        if not cycles.num_steps:
            return [f"drafts: {chosen}"]
        beside = ""
        if plain.num_steps:
            beside = f" (plain steps {self.bytes_per_token(plain) / 1e6:.2f} MB, {plain.tokens_per_s:.1f} tokens/s)"
        return [
            f"drafts: {chosen}; {cycles.accepted} of {cycles.proposed} tokens accepted "
            f"({cycles.acceptance_rate:.1%}), {cycles.mean_accepted:.2f} tokens a verification",
            f"a verification asks for {self.union_size:.1f} experts a layer; cycles fetched "
            f"{self.bytes_per_token(cycles) / 1e6:.2f} MB a token, {cycles.tokens_per_s:.1f} tokens/s{beside}",
        ]

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for JSON; what never ran has none of its own."""
        cycles, plain = self.cycles, self.plain
        return {
            "calls": [dataclasses.asdict(calls) for calls in self.calls],
            "steps_by_draft_tokens": self.steps_by_draft_tokens,
            "proposed": cycles.proposed,
            "accepted": cycles.accepted,
            "acceptance_rate": cycles.acceptance_rate if cycles.num_steps else None,
            "mean_accepted": cycles.mean_accepted if cycles.num_steps else None,
            "union_size": self.union_size if cycles.num_steps else None,
            "bytes_per_token": self.bytes_per_token(cycles) if cycles.num_steps else None,
            "plain_bytes_per_token": self.bytes_per_token(plain) if plain.num_steps else None,
        }


_NO_CALLS = DecodeCalls(
    num_draft_tokens=0,
    num_steps=0,
    seconds=0.0,
    num_tokens=0,
    num_verifications=0,
    experts=ExpertCounts(hits=0, fetched=0, streamed=0),
)


def read_counts(residency: Residency) -> tuple[ExpertCounts, ExpertCounts]:
    """(prefill, decode) so far."""
    prefill, decode = jax.device_get((residency.prefill, residency.decode))
    return ExpertCounts.read(prefill), ExpertCounts.read(decode)


@dataclasses.dataclass(frozen=True, kw_only=True)
class GenerationStats:
    """Of one call of `Engine.generate`. Decode figures leave out the first token, which prefill produces.

    `compile_s` is spent once for each shape, before the other clocks start. `decode_calls` are the (steps, seconds) of
    each call of a jitted step: from when it was asked for, or the call before it ended, to its result. With drafts, a
    cycle is a step, and `drafts` says how they did; `prefetch` is None where nothing was prefetched.
    """

    num_prompt_tokens: int
    num_generated_tokens: int
    num_decode_tokens: int
    decode_calls: tuple[tuple[int, float], ...]
    compile_s: float
    ttft_s: float
    prefill: ExpertCounts
    decode: ExpertCounts
    expert_bytes: int
    link_ceiling_gbps: float | None
    peak_device_bytes: int | None
    drafts: DraftStats | None = None
    prefetch: PrefetchStats | None = None

    @property
    def num_decode_steps(self) -> int:
        return sum(steps for steps, _ in self.decode_calls)

    @property
    def decode_s(self) -> float:
        return sum(seconds for _, seconds in self.decode_calls)

    @property
    def tokens_per_s(self) -> float:
        return self.num_decode_tokens / self.decode_s if self.decode_s else 0.0

    @property
    def ms_per_step(self) -> float:
        return self.decode_s * 1e3 / self.num_decode_steps if self.num_decode_steps else 0.0

    @property
    def hit_rate(self) -> float:
        return self.decode.hit_rate

    @property
    def link_bytes(self) -> int:
        """What crossed the link while decoding: every expert that was missing, once, and what came in vain."""
        wasted = self.prefetch.wasted_bytes if self.prefetch else 0
        return self.decode.misses * self.expert_bytes + wasted

    @property
    def bytes_per_token(self) -> float:
        """Bytes that crossed the link for one decoded token."""
        return self.link_bytes / self.num_decode_tokens if self.num_decode_tokens else 0.0

    @property
    def fetched_gbps(self) -> float:
        """GB/s over the link while decoding, everything included."""
        return self.link_bytes / self.decode_s / 1e9 if self.decode_s else 0.0

    @property
    def percent_of_ceiling(self) -> float | None:
        return 100 * self.fetched_gbps / self.link_ceiling_gbps if self.link_ceiling_gbps else None

    def lines(self) -> list[str]:
        """The closing summary for people."""
        decode, prefill = self.decode, self.prefill
        ceiling = self.link_ceiling_gbps
        ready = [f"compiled, or loaded, in {self.compile_s:.1f} s, once for this shape"] if self.compile_s else []
        share = f", {self.percent_of_ceiling:.0f} % of the link ceiling ({ceiling:.1f} GB/s)" if ceiling else ""
        return [
            *ready,
            f"prompt {self.num_prompt_tokens} tokens, time to first token {self.ttft_s:.3f} s; "
            f"{prefill.hits} experts used in place, {prefill.misses} streamed",
            f"generated {self.num_generated_tokens} tokens, {self.tokens_per_s:.1f} tokens/s "
            f"({self.ms_per_step:.2f} ms a step)",
            f"experts {decode.hits + decode.misses} asked for, hit rate {decode.hit_rate:.1%}, "
            f"{decode.fetched} fetched, {decode.streamed} streamed",
            f"fetched {self.bytes_per_token / 1e6:.2f} MB a token, {self.fetched_gbps:.2f} GB/s{share}",
            *(self.prefetch.lines(self.num_decode_tokens) if self.prefetch else []),
            *(self.drafts.lines() if self.drafts else []),
        ]

    def to_dict(self) -> dict[str, Any]:
        derived = (
            "num_decode_steps",
            "decode_s",
            "tokens_per_s",
            "ms_per_step",
            "hit_rate",
            "link_bytes",
            "bytes_per_token",
            "fetched_gbps",
            "percent_of_ceiling",
        )
        values = {**dataclasses.asdict(self), **{name: getattr(self, name) for name in derived}}
        parts = {"drafts": self.drafts, "prefetch": self.prefetch}
        return {**values, **{name: part.to_dict() if part else None for name, part in parts.items()}}
