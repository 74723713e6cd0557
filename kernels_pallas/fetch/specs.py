"""Named shapes of fetches: real models' experts, and plans that are empty, single, full."""

import dataclasses
import math

import jax.numpy as jnp
import numpy as np


@dataclasses.dataclass(frozen=True, kw_only=True)
class FetchSpec:
    """A store of E experts [3, F, D], a pool of R slots, and a plan of P entries of which `count` are real."""

    name: str
    num_experts: int
    num_hidden: int
    width: int
    num_slots: int
    plan_size: int
    count: int
    dtype: str = "bfloat16"

    @property
    def expert_shape(self) -> tuple[int, int, int]:
        return (3, self.num_hidden, self.width)

    @property
    def store_shape(self) -> tuple[int, int, int, int]:
        return (self.num_experts, *self.expert_shape)

    @property
    def slots_shape(self) -> tuple[int, int, int, int]:
        return (self.num_slots, *self.expert_shape)

    @property
    def fetched_bytes(self) -> int:
        """What crosses the link."""
        return self.count * math.prod(self.expert_shape) * jnp.dtype(self.dtype).itemsize

    def scaled(self, factor: int) -> "FetchSpec":
        """The same plan with experts `factor` times as narrow both ways, in steps of 8; for tests on a CPU."""
        hidden, width = (max(8, size // factor // 8 * 8) for size in (self.num_hidden, self.width))
        return dataclasses.replace(self, num_hidden=hidden, width=width)

    def plan(self, seed: int = 0) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """expert_ids [P], slot_ids [P] and count []: distinct experts to distinct slots, in no order.

        What lies beyond `count` is nonsense, and must not be read.
        """
        rng = np.random.default_rng(seed)
        expert_ids, slot_ids = np.full((2, self.plan_size), 10**6, np.int32)
        expert_ids[: self.count] = rng.permutation(self.num_experts)[: self.count]
        slot_ids[: self.count] = rng.permutation(self.num_slots)[: self.count]
        return expert_ids, slot_ids, np.array(self.count, np.int32)


_QWEN3_30B = FetchSpec(
    name="qwen3_30b", num_experts=128, num_hidden=768, width=2048, num_slots=64, plan_size=8, count=5
)

SPECS: tuple[FetchSpec, ...] = (
    _QWEN3_30B,
    dataclasses.replace(_QWEN3_30B, name="empty", count=0),
    dataclasses.replace(_QWEN3_30B, name="single", count=1),
    dataclasses.replace(_QWEN3_30B, name="full", count=8),
    dataclasses.replace(_QWEN3_30B, name="plan_of_one", plan_size=1, count=1),
    dataclasses.replace(_QWEN3_30B, name="two", count=2),
    dataclasses.replace(_QWEN3_30B, name="plan_of_64", plan_size=64, count=64),
    dataclasses.replace(_QWEN3_30B, name="every_slot", num_slots=32, plan_size=32, count=32),
    dataclasses.replace(_QWEN3_30B, name="float32", dtype="float32"),
    FetchSpec(name="qwen3_235b", num_experts=128, num_hidden=1536, width=4096, num_slots=32, plan_size=8, count=6),
    FetchSpec(name="mixtral_8x7b", num_experts=8, num_hidden=14336, width=4096, num_slots=4, plan_size=2, count=2),
    FetchSpec(name="deepseek_v2_lite", num_experts=64, num_hidden=1408, width=2048, num_slots=32, plan_size=6, count=4),
    FetchSpec(name="gpt_oss_20b_like", num_experts=32, num_hidden=2880, width=2880, num_slots=16, plan_size=4, count=3),
    # No power of two divides these: tiles of odd heights.
    FetchSpec(name="odd", num_experts=7, num_hidden=600, width=1000, num_slots=5, plan_size=5, count=4),
)
