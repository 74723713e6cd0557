"""How a model is trained (`TrainingConfig`): configs/training/*.toml."""

import dataclasses
from pathlib import Path
from typing import Self

from jmoe.config import read_toml


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainingConfig:
    """AdamW with a linear warm-up and a cosine down to `final_learning_rate`; lengths in tokens, intervals in steps.

    A batch is `batch_size` windows of `sequence_length` predictions each. The held-out text is scored every
    `eval_every` steps; after `patience` times without a new minimum, training stops, and the minimum is what counts.
    """

    num_steps: int
    batch_size: int = 32
    sequence_length: int = 1024
    learning_rate: float = 3e-3
    final_learning_rate: float = 1e-4
    warmup_steps: int = 200
    weight_decay: float = 0.1
    beta1: float = 0.9
    beta2: float = 0.95
    clip_norm: float = 1.0
    load_balancing_weight: float = 0.01
    router_z_weight: float = 1e-3
    eval_every: int = 250
    patience: int = 4
    checkpoint_every: int = 500
    seed: int = 0

    def __post_init__(self) -> None:
        for name in _COUNTS:
            value = getattr(self, name)
            if not isinstance(value, int) or value < 1:
                raise ValueError(f"{name}={value!r} must be a whole number of at least 1")
        for name in _SIZES:
            value = getattr(self, name)
            if not isinstance(value, int | float) or value < 0:
                raise ValueError(f"{name}={value!r} must be a number of at least 0")
        if not 0 <= self.warmup_steps < self.num_steps:
            raise ValueError(f"warmup_steps={self.warmup_steps} must be below num_steps={self.num_steps}")

    @property
    def tokens_per_step(self) -> int:
        return self.batch_size * self.sequence_length

    @classmethod
    def from_toml(cls, path: str | Path) -> Self:
        """Reads configs/training/*.toml. Raises ValueError for a malformed file, an unknown key or a bad value."""
        return read_toml(cls, path)


_COUNTS = "num_steps batch_size sequence_length eval_every patience checkpoint_every".split()
_SIZES = (
    "learning_rate final_learning_rate warmup_steps weight_decay beta1 beta2 clip_norm load_balancing_weight "
    "router_z_weight"
).split()
