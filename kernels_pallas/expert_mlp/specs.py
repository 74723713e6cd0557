"""Named shapes of expert MLP calls: real models, and groups that are empty, single-row, uneven and full."""

import dataclasses

import numpy as np


@dataclasses.dataclass(frozen=True, kw_only=True)
class ExpertMlpSpec:
    """T rows of width D through R slots [3, F, D]; `group_sizes` is the number of rows of each of the G groups."""

    name: str
    num_slots: int
    num_hidden: int
    width: int
    num_rows: int
    group_sizes: tuple[int, ...]
    dtype: str = "bfloat16"

    @property
    def x_shape(self) -> tuple[int, int]:
        return (self.num_rows, self.width)

    @property
    def slots_shape(self) -> tuple[int, int, int, int]:
        return (self.num_slots, 3, self.num_hidden, self.width)

    @property
    def num_groups(self) -> int:
        return len(self.group_sizes)

    @property
    def max_groups_per_row(self) -> int:
        """Groups that each row is in, or one less."""
        return -(-sum(self.group_sizes) // self.num_rows)

    def scaled(self, factor: int) -> "ExpertMlpSpec":
        """The same groups with experts `factor` times as narrow both ways, in steps of 8; for tests on a CPU."""
        hidden, width = (max(8, size // factor // 8 * 8) for size in (self.num_hidden, self.width))
        return dataclasses.replace(self, num_hidden=hidden, width=width)

    def groups(self, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
        """group_slots [G] and group_weights [G, T]: distinct slots in no order, weights in (0, 1), 0 for other rows.

        A group without rows has slot 0, whoever else has it, as groups that nobody asks for do. Rows are dealt out in
        turn, so that all are in the same number of groups, as a router's are, or nearly.
        """
        rng = np.random.default_rng(seed)
        slots = rng.permutation(self.num_slots)[: self.num_groups].astype(np.int32)
        weights = np.zeros((self.num_groups, self.num_rows), np.float32)
        turns = rng.permutation(self.num_rows)
        for group, size in enumerate(self.group_sizes):
            rows = turns[(sum(self.group_sizes[:group]) + np.arange(size)) % self.num_rows]
            weights[group, rows] = rng.uniform(0.05, 0.95, size)
        return np.where(np.array(self.group_sizes) > 0, slots, 0).astype(np.int32), weights


def _falling(num_groups: int, largest: int) -> tuple[int, ...]:
    """Sizes largest, largest / 2, largest / 3, …: a few experts have many rows, most have few, some none."""
    return tuple(largest // (n + 1) for n in range(num_groups))


def _drawn(num_groups: int, num_rows: int, per_row: int) -> tuple[int, ...]:
    """Sizes as a router has them: some experts are liked several times as much as others; the same in every run."""
    rng = np.random.default_rng(num_rows)
    liked = rng.lognormal(sigma=0.6, size=num_groups)
    sizes = rng.multinomial(num_rows * per_row, liked / liked.sum())
    assert sizes.max() <= num_rows, "a row is in a group once"
    return tuple(sizes.tolist())


_QWEN3_30B = ExpertMlpSpec(
    name="qwen3_30b_decode", num_slots=64, num_hidden=768, width=2048, num_rows=1, group_sizes=(1,) * 8
)
_BATCH_OF_4 = dataclasses.replace(_QWEN3_30B, num_rows=4)

SPECS: tuple[ExpertMlpSpec, ...] = (
    _QWEN3_30B,
    dataclasses.replace(_QWEN3_30B, name="one_group", group_sizes=(1,)),
    dataclasses.replace(_QWEN3_30B, name="one_row_empty_groups", group_sizes=(1, 0, 1, 0, 0, 0, 0, 0)),
    dataclasses.replace(_QWEN3_30B, name="one_row_nothing_asked", group_sizes=(0,) * 8),
    dataclasses.replace(_BATCH_OF_4, name="batch_of_4", group_sizes=(4, 3, 3, *(1,) * 22)),
    dataclasses.replace(_BATCH_OF_4, name="full_groups", group_sizes=(4,) * 8),
    dataclasses.replace(_BATCH_OF_4, name="nothing_asked", group_sizes=(0,) * 8),
    dataclasses.replace(_BATCH_OF_4, name="empty_groups", group_sizes=(0, 2, 0, 0, 4, 1, 0, 0)),
    dataclasses.replace(_QWEN3_30B, name="qwen3_30b_wave", num_rows=512, group_sizes=_falling(14, 400)),
    dataclasses.replace(_QWEN3_30B, name="uneven", num_rows=67, group_sizes=(67, 1, 0, 33, 2, 64, 65, 0)),
    dataclasses.replace(_QWEN3_30B, name="float32", dtype="float32"),
    ExpertMlpSpec(
        name="qwen3_235b_decode", num_slots=32, num_hidden=1536, width=4096, num_rows=1, group_sizes=(1,) * 8
    ),
    ExpertMlpSpec(
        name="mixtral_8x7b_decode", num_slots=4, num_hidden=14336, width=4096, num_rows=1, group_sizes=(1,) * 2
    ),
    ExpertMlpSpec(
        name="deepseek_v2_lite_decode", num_slots=32, num_hidden=1408, width=2048, num_rows=1, group_sizes=(1,) * 6
    ),
    ExpertMlpSpec(
        name="gpt_oss_20b_like_decode", num_slots=16, num_hidden=2880, width=2880, num_rows=1, group_sizes=(1,) * 4
    ),
    dataclasses.replace(_QWEN3_30B, name="float16", dtype="float16"),
    dataclasses.replace(_QWEN3_30B, name="two_rows", num_rows=2, group_sizes=(2, *(1,) * 14)),
    dataclasses.replace(_QWEN3_30B, name="two_rows_empty_groups", num_rows=2, group_sizes=(0, 2, 0, 1, 1, 0)),
    dataclasses.replace(_BATCH_OF_4, name="batch_of_4_float32", dtype="float32"),
    dataclasses.replace(_QWEN3_30B, name="batch_of_8", num_rows=8, group_sizes=(4, 3, 2, *(1,) * 47, *(0,) * 14)),
    dataclasses.replace(_QWEN3_30B, name="batch_of_16", num_rows=16, group_sizes=_falling(64, 16)),
    dataclasses.replace(_QWEN3_30B, name="batch_of_32", num_rows=32, group_sizes=(*range(1, 33), *range(32))),
    dataclasses.replace(_QWEN3_30B, name="batch_of_32_over_64", num_rows=32, group_sizes=(4,) * 64),
    dataclasses.replace(_QWEN3_30B, name="batch_of_33", num_rows=33, group_sizes=(33, 1, 0, 20)),
    dataclasses.replace(_QWEN3_30B, name="prefill_512", num_slots=128, num_rows=512, group_sizes=_drawn(128, 512, 8)),
    dataclasses.replace(
        _QWEN3_30B, name="prefill_4096", num_slots=128, num_rows=4096, group_sizes=_drawn(128, 4096, 8)
    ),
    dataclasses.replace(
        _QWEN3_30B, name="prefill_8192", num_slots=128, num_rows=8192, group_sizes=_drawn(128, 8192, 8)
    ),
    dataclasses.replace(_QWEN3_30B, name="prefill_wave", num_rows=512, group_sizes=_drawn(14, 448, 1)),
    dataclasses.replace(_QWEN3_30B, name="prefill_one_group", num_rows=1001, group_sizes=(0, 0, 1001, 0)),
    dataclasses.replace(_QWEN3_30B, name="prefill_empty_groups", num_rows=100, group_sizes=(0, 64, 0, 1, 63, 0)),
    dataclasses.replace(_QWEN3_30B, name="prefill_nothing_asked", num_rows=100, group_sizes=(0,) * 6),
    dataclasses.replace(_QWEN3_30B, name="prefill_full_groups", num_rows=129, group_sizes=(129,) * 8),
    dataclasses.replace(
        _QWEN3_30B, name="prefill_float16", num_rows=65, group_sizes=(65, 0, 17, 64, 1), dtype="float16"
    ),
    dataclasses.replace(
        _QWEN3_30B, name="prefill_float32", num_rows=65, group_sizes=(65, 0, 17, 64, 1), dtype="float32"
    ),
    ExpertMlpSpec(
        name="mixtral_8x7b_prefill",
        num_slots=4,
        num_hidden=14336,
        width=4096,
        num_rows=300,
        group_sizes=(200, 90, 300, 10),
    ),
    ExpertMlpSpec(
        name="gpt_oss_20b_like_prefill",
        num_slots=16,
        num_hidden=2880,
        width=2880,
        num_rows=256,
        group_sizes=_drawn(16, 256, 4),
    ),
)
