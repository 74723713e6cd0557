"""Named shapes of prefetches: real models' experts, and lists of which nothing, a part or all is to come."""

import dataclasses

import numpy as np


@dataclasses.dataclass(frozen=True, kw_only=True)
class PrefetchSpec:
    """A store of E experts [3, F, D] and a list of P, of which `count` are guessed and `share` experts are to come."""

    name: str
    num_experts: int
    num_hidden: int
    width: int
    size: int
    count: int
    share: float
    dtype: str = "bfloat16"

    @property
    def store_shape(self) -> tuple[int, int, int, int]:
        return (self.num_experts, 3, self.num_hidden, self.width)

    @property
    def num_rows(self) -> int:
        return round(self.share * 3 * self.num_hidden)

    def scaled(self, factor: int) -> "PrefetchSpec":
        """The same shares of experts `factor` times as narrow both ways, in steps of 8; for tests on a CPU."""
        hidden, width = (max(8, size // factor // 8 * 8) for size in (self.num_hidden, self.width))
        return dataclasses.replace(self, num_hidden=hidden, width=width)

    def make(self, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
        """expert_ids [P] and num_rows [P]. Experts of which nothing comes are nonsense, and must not be read."""
        rows_of_expert, expert_ids = 3 * self.num_hidden, np.full(self.size, 10**6, np.int32)
        num_rows = np.clip(self.num_rows - rows_of_expert * np.arange(self.size), 0, rows_of_expert).astype(np.int32)
        num_rows[self.count :] = 0
        coming = np.count_nonzero(num_rows)
        expert_ids[:coming] = np.random.default_rng(seed).permutation(self.num_experts)[:coming]
        return expert_ids, num_rows


_QWEN3_30B = PrefetchSpec(name="qwen3_30b", num_experts=128, num_hidden=768, width=2048, size=1, count=1, share=0.41)
_TWO = dataclasses.replace(_QWEN3_30B, size=2, count=2)

SPECS: tuple[PrefetchSpec, ...] = (
    _QWEN3_30B,
    dataclasses.replace(_QWEN3_30B, name="whole", share=1.0),
    dataclasses.replace(_QWEN3_30B, name="no_row", share=0.0),
    dataclasses.replace(_QWEN3_30B, name="nobody", count=0),
    dataclasses.replace(_TWO, name="part_of_the_first"),
    dataclasses.replace(_TWO, name="exactly_one", share=1.0),
    dataclasses.replace(_TWO, name="one_and_a_part", share=1.3),
    dataclasses.replace(_TWO, name="more_than_all", share=2.5),
    dataclasses.replace(_TWO, name="one_of_two", count=1, share=1.7),
    dataclasses.replace(_TWO, name="four", size=4, count=3, share=2.9),
    dataclasses.replace(_TWO, name="float32", share=1.3, dtype="float32"),
    PrefetchSpec(name="qwen3_235b", num_experts=128, num_hidden=1536, width=4096, size=2, count=2, share=0.7),
    PrefetchSpec(name="mixtral_8x7b", num_experts=8, num_hidden=14336, width=4096, size=1, count=1, share=0.2),
    # No power of two divides these: tiles of odd heights, and rows that end inside of tiles.
    PrefetchSpec(name="odd", num_experts=7, num_hidden=600, width=1000, size=2, count=2, share=1.1),
)
