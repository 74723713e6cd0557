"""What happened in a generation: tokens, times, experts hit and fetched."""

import dataclasses
from typing import Any

import numpy as np

from jmoe.experts.residency import Counters, Residency


@dataclasses.dataclass(frozen=True, kw_only=True)
class ExpertCounts:
    """Distinct experts that steps asked for, summed over layers. See `jmoe.experts.residency.Counters`."""

    hits: int
    fetched: int
    streamed: int

    @classmethod
    def read(cls, counters: Counters) -> "ExpertCounts":
        """Waits for the device."""
        values = (counters.hits, counters.fetched, counters.streamed)
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


def read_counts(residency: Residency) -> tuple[ExpertCounts, ExpertCounts]:
    """(prefill, decode) so far."""
    return ExpertCounts.read(residency.prefill), ExpertCounts.read(residency.decode)


@dataclasses.dataclass(frozen=True, kw_only=True)
class GenerationStats:
    """Of one call of `Engine.generate`. Decode figures leave out the first token, which prefill produces.

    `compile_s` is spent once for each shape, before the other clocks start. `decode_calls` are the (steps, seconds) of
    each call of the jitted decode; what the caller does between them does not count.
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
    def bytes_per_token(self) -> float:
        """Bytes that crossed the link for one decoded token."""
        return self.decode.misses * self.expert_bytes / self.num_decode_tokens if self.num_decode_tokens else 0.0

    @property
    def fetched_gbps(self) -> float:
        """GB/s over the link while decoding, everything included."""
        return self.decode.misses * self.expert_bytes / self.decode_s / 1e9 if self.decode_s else 0.0

    @property
    def percent_of_ceiling(self) -> float | None:
        return 100 * self.fetched_gbps / self.link_ceiling_gbps if self.link_ceiling_gbps else None

    def lines(self) -> list[str]:
        """The closing summary for people."""
        decode, prefill = self.decode, self.prefill
        ceiling = self.link_ceiling_gbps
        compiled = [f"compiled in {self.compile_s:.1f} s, once for this shape"] if self.compile_s else []
        share = f", {self.percent_of_ceiling:.0f} % of the link ceiling ({ceiling:.1f} GB/s)" if ceiling else ""
        return [
            *compiled,
            f"prompt {self.num_prompt_tokens} tokens, time to first token {self.ttft_s:.3f} s; "
            f"{prefill.hits} experts used in place, {prefill.misses} streamed",
            f"generated {self.num_generated_tokens} tokens, {self.tokens_per_s:.1f} tokens/s "
            f"({self.ms_per_step:.2f} ms a step)",
            f"experts {decode.hits + decode.misses} asked for, hit rate {decode.hit_rate:.1%}, "
            f"{decode.fetched} fetched, {decode.streamed} streamed",
            f"fetched {self.bytes_per_token / 1e6:.2f} MB a token, {self.fetched_gbps:.2f} GB/s{share}",
        ]

    def to_dict(self) -> dict[str, Any]:
        derived = (
            "num_decode_steps",
            "decode_s",
            "tokens_per_s",
            "ms_per_step",
            "hit_rate",
            "bytes_per_token",
            "fetched_gbps",
            "percent_of_ceiling",
        )
        return {**dataclasses.asdict(self), **{name: getattr(self, name) for name in derived}}
