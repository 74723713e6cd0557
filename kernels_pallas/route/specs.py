"""Named shapes of routing: real models, single tokens and batches, rows that are no tokens, and ties."""

import dataclasses

import numpy as np


@dataclasses.dataclass(frozen=True, kw_only=True)
class RouteSpec:
    """T rows choose A of E experts; every other one of them is no token if `masked`."""

    name: str
    num_experts: int
    num_chosen: int
    num_rows: int = 1
    normalize: bool = True
    masked: bool = False
    tied: bool = False  # few different logits
    scale: float = 2.0  # of the logits

    def make(self, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
        """Logits [T, E] and which rows are tokens [T]."""
        logits = self.scale * np.random.default_rng(seed).normal(size=(self.num_rows, self.num_experts))
        logits = np.round(logits) if self.tied else logits
        return logits.astype(np.float32), (np.arange(self.num_rows) % 2 == 0) | (not self.masked)


_QWEN3_30B = RouteSpec(name="qwen3_30b", num_experts=128, num_chosen=8)

SPECS: tuple[RouteSpec, ...] = (
    _QWEN3_30B,
    dataclasses.replace(_QWEN3_30B, name="b32", num_rows=32, masked=True),
    dataclasses.replace(_QWEN3_30B, name="b320", num_rows=320),
    dataclasses.replace(_QWEN3_30B, name="tied", num_rows=3, tied=True),
    dataclasses.replace(_QWEN3_30B, name="steep", num_rows=2, scale=60.0),
    dataclasses.replace(_QWEN3_30B, name="not_normalized", num_rows=2, normalize=False),
    RouteSpec(name="mixtral", num_experts=8, num_chosen=2, num_rows=2),
    RouteSpec(name="deepseek_v2_lite", num_experts=64, num_chosen=6, normalize=False),
    RouteSpec(name="experts_256", num_experts=256, num_chosen=8, num_rows=4),
    RouteSpec(name="one_of_12", num_experts=12, num_chosen=1, num_rows=3),
)
