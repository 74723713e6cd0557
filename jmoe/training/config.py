"""How a model is trained (`TrainingConfig`) and how its routers are tuned (`RouterTuningConfig`): configs/training."""

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Self

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
        _check(self, _COUNTS, _SIZES)
        if not 0 <= self.warmup_steps < self.num_steps:
            raise ValueError(f"warmup_steps={self.warmup_steps} must be below num_steps={self.num_steps}")

    @property
    def tokens_per_step(self) -> int:
        return self.batch_size * self.sequence_length

    @classmethod
    def from_toml(cls, path: str | Path) -> Self:
        """Reads configs/training/*.toml. Raises ValueError for a malformed file, an unknown key or a bad value."""
        return read_toml(cls, path)


@dataclasses.dataclass(frozen=True, kw_only=True)
class RouterTuningConfig:
    """Loss, optimizer and gate of router tuning; lengths in tokens, intervals in steps.

    loss = cross-entropy + trust · L_trust + a · (reuse · L_reuse + … + window_entropy · L_window), where a rises from 0
    to 1 in `ramp_steps` and the terms are those of `jmoe.training.locality`. A step is `gradient_accumulation` times
    `batch_size` windows of `sequence_length` predictions. The learning rate rises linearly in `warmup_steps`, then
    falls as a cosine to `final_learning_rate`. Tuning stops once the held-out text, scored every `eval_every` steps,
    takes more than 1 + `most_worse` times the bits that it took before. `remat` computes each layer again in the
    backward pass instead of keeping its activations.
    """

    num_steps: int = 400
    batch_size: int = 32
    gradient_accumulation: int = 1
    sequence_length: int = 1024
    trust: float = 0.1
    reuse: float = 0.15
    smoothness: float = 0.015
    lagged: float = 0.015
    window_entropy: float = 0.015
    lags: tuple[int, ...] = (1, 2, 4, 8, 16)
    window: int = 16
    ramp_steps: int = 50
    learning_rate: float = 1e-3
    final_learning_rate: float = 1e-4
    warmup_steps: int = 20
    weight_decay: float = 0.0
    beta1: float = 0.9
    beta2: float = 0.95
    clip_norm: float = 1.0
    most_worse: float = 0.01
    eval_every: int = 50
    checkpoint_every: int = 100
    remat: bool = False
    seed: int = 0

    def __post_init__(self) -> None:
        object.__setattr__(self, "lags", tuple(self.lags))
        _check(self, _TUNING_COUNTS, _TUNING_SIZES)
        if not 0 <= self.warmup_steps < self.num_steps:
            raise ValueError(f"warmup_steps={self.warmup_steps} must be below num_steps={self.num_steps}")
        for name, value in (*(("lags", lag) for lag in self.lags), ("window", self.window)):
            if not isinstance(value, int) or not 1 <= value < self.sequence_length:
                raise ValueError(f"{name}: {value!r} must be a whole number in 1..{self.sequence_length - 1}")
        if not self.lags:
            raise ValueError("lags is empty; give at least one, or set lagged = 0")

    @property
    def tokens_per_step(self) -> int:
        return self.gradient_accumulation * self.batch_size * self.sequence_length

    @classmethod
    def from_toml(cls, path: str | Path) -> Self:
        """Reads a configs/training/*.toml. Raises ValueError for a malformed file, an unknown key or a bad value."""
        return read_toml(cls, path)


def _check(config: Any, counts: Sequence[str], sizes: Sequence[str]) -> None:
    """Raises ValueError for a count that is not a whole number of at least 1, or a size below 0."""
    for name in counts:
        value = getattr(config, name)
        if not isinstance(value, int) or value < 1:
            raise ValueError(f"{name}={value!r} must be a whole number of at least 1")
    for name in sizes:
        value = getattr(config, name)
        if not isinstance(value, int | float) or value < 0:
            raise ValueError(f"{name}={value!r} must be a number of at least 0")


_COUNTS = "num_steps batch_size sequence_length eval_every patience checkpoint_every".split()
_SIZES = (
    "learning_rate final_learning_rate warmup_steps weight_decay beta1 beta2 clip_norm load_balancing_weight "
    "router_z_weight"
).split()
_TUNING_COUNTS = (
    "num_steps batch_size gradient_accumulation sequence_length window ramp_steps eval_every checkpoint_every"
).split()
_TUNING_SIZES = (
    "trust reuse smoothness lagged window_entropy learning_rate final_learning_rate warmup_steps weight_decay beta1 "
    "beta2 clip_norm most_worse"
).split()
