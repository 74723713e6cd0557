"""What came over the link early, and how much of it was of use."""

import dataclasses
from typing import Any

import numpy as np

from jmoe.config import ModelConfig
from jmoe.experts.look_ahead import Prefetched


@dataclasses.dataclass(frozen=True, kw_only=True)
class PrefetchStats:
    """Bytes that came before a router had asked: of experts that it then did (`useful`), or did not (`wasted`).

    Useful bytes are part of what was fetched, which without a prefetch would have come later; wasted ones come on top.
    `late_bytes` are part of the useful ones: they were still on their way when their layer's demand was known. None
    where no clock has timed all of the useful ones, as on a CPU.
    `steps` are decode steps by how many experts of each layer they brought, 0 for plain ones.
    """

    useful_bytes: int = 0
    wasted_bytes: int = 0
    late_bytes: int | None = 0
    steps: dict[float, int] = dataclasses.field(default_factory=dict)

    @classmethod
    def of_call(
        cls, prefetched: Prefetched | None, num_steps: int, num_rows: int, config: ModelConfig
    ) -> "PrefetchStats":
        """Of steps that bring so many rows a layer; `prefetched` is None if that is none. Waits for the device."""
        rows_of_expert = 3 * config.moe_intermediate_size
        row_bytes, steps = config.expert_bytes // rows_of_expert, {round(num_rows / rows_of_expert, 4): num_steps}
        if prefetched is None:
            return cls(steps=steps)
        counts = prefetched.useful, prefetched.wasted, prefetched.late, prefetched.untimed
        useful, wasted, late, untimed = (int(np.asarray(count, np.int64).sum()) * row_bytes for count in counts)
        return cls(useful_bytes=useful, wasted_bytes=wasted, late_bytes=None if untimed else late, steps=steps)

    def __add__(self, other: "PrefetchStats") -> "PrefetchStats":
        amounts = sorted({*self.steps, *other.steps})
        return PrefetchStats(
            useful_bytes=self.useful_bytes + other.useful_bytes,
            wasted_bytes=self.wasted_bytes + other.wasted_bytes,
            late_bytes=_known_sum(self.late_bytes, other.late_bytes),
            steps={amount: self.steps.get(amount, 0) + other.steps.get(amount, 0) for amount in amounts},
        )

    @property
    def prefetched_bytes(self) -> int:
        return self.useful_bytes + self.wasted_bytes

    @property
    def useful_share(self) -> float:
        """Of what came early; 0 where nothing did."""
        return self.useful_bytes / self.prefetched_bytes if self.prefetched_bytes else 0.0

    def lines(self, num_tokens: int) -> list[str]:
        """For people, by decoded token."""
        sizes = self.useful_bytes, self.wasted_bytes, self.prefetched_bytes, self.late_bytes or 0
        useful, wasted, both, late = (size / 1e6 / max(1, num_tokens) for size in sizes)
        of_which = "" if self.late_bytes is None else f", of which {late:.2f} late"
        return [
            f"of that prefetched {both:.2f} MB a token: {useful:.2f} useful{of_which}, {wasted:.2f} wasted "
            f"({self.useful_share:.1%} useful); {self._amounts()}"
        ]

    def _amounts(self) -> str:
        """How many steps were to bring how much."""
        plain, steps = self.steps.get(0, 0), {amount: count for amount, count in self.steps.items() if amount}
        count, least, most = sum(steps.values()), min(steps, default=0), max(steps, default=0)
        mean = sum(amount * count for amount, count in steps.items()) / max(1, count)
        one = f"{most:.3g} experts a layer"
        amounts = one if least == most else f"{least:.3g} to {one}, {mean:.3g} on average"
        parts = [(plain, "plain steps"), (count, f"steps of {amounts}")]
        return ", ".join(f"{number} {what}" for number, what in parts if number)

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        derived = {"prefetched_bytes": self.prefetched_bytes, "useful_share": self.useful_share}
        return {**dataclasses.asdict(self), **derived}


def _known_sum(one: int | None, other: int | None) -> int | None:
    return None if one is None or other is None else one + other
