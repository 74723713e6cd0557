"""Copies of experts inside a Mosaic GPU kernel: TMA from anywhere through a ring in shared memory to anywhere.

A few blocks suffice for the link to host memory, because what hides its latency is the number of bytes in flight
(blocks x stages x tile), not the number of threads; all other SMs stay free.
"""

import dataclasses
import math
from collections.abc import Callable

from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

TMA_MAX_BOX = 256  # elements of one dimension of a TMA box
TMA_ALIGNMENT = 16  # bytes


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    """How the copy is cut up. `num_blocks * num_stages * tile_bytes` bytes are in flight.

    Raises ValueError for no block, or for fewer than two stages: while one is stored, another has to be loaded.
    """

    num_blocks: int = 8
    num_stages: int = 6
    tile_bytes: int = 32 * 1024

    def __post_init__(self) -> None:
        if self.num_blocks < 1 or self.num_stages < 2:
            raise ValueError(
                f"a copy of experts: num_blocks={self.num_blocks} must be at least 1 and "
                f"num_stages={self.num_stages} at least 2"
            )


@dataclasses.dataclass(frozen=True)
class Tiling:
    """One expert as `num_tiles` tiles of [rows, columns]."""

    num_tiles: int
    rows: int
    columns: int

    @property
    def size(self) -> int:
        return self.rows * self.columns

    def flat(self, array):
        """Experts [N, 3, F, D] as [N, rows of all tiles, columns]."""
        return array.reshape(array.shape[0], self.num_tiles * self.rows, self.columns)


def tiling(num_elements: int, itemsize: int, tile_bytes: int) -> Tiling:
    """The largest tiles of at most `tile_bytes` that cut an expert evenly. Raises NotImplementedError if none does."""
    step = math.lcm(TMA_ALIGNMENT // itemsize, 1)
    columns = next((c for c in range(TMA_MAX_BOX, 0, -1) if c % step == 0 and num_elements % c == 0), None)
    if columns is None:
        raise NotImplementedError(
            f"a copy of experts: one of {num_elements} elements of {itemsize} bytes is not a multiple of "
            f"{TMA_ALIGNMENT} bytes; use implementation='reference'"
        )
    num_rows = num_elements // columns
    most = max(1, min(TMA_MAX_BOX, tile_bytes // (columns * itemsize)))
    rows = next(r for r in range(most, 0, -1) if num_rows % r == 0)
    return Tiling(num_rows // rows, rows, columns)


def shared_bytes(tile: Tiling, config: Config, itemsize: int) -> int:
    """What a block has in shared memory, less its barriers."""
    return config.num_stages * tile.size * itemsize


def kernel(body: Callable, tile: Tiling, config: Config, dtype, *, out_type=(), interpret=None):
    """A kernel of `body`, whose last two arguments are what `copy_tiles` needs."""
    return plgpu.kernel(
        body,
        out_type=out_type,
        grid=(config.num_blocks,),
        grid_names=("block",),
        scratch_types=[
            plgpu.SMEM((config.num_stages, tile.rows, tile.columns), dtype),
            plgpu.Barrier(num_barriers=config.num_stages),
        ],
        interpret=interpret,
    )


def copy_tiles(
    tile: Tiling, config: Config, num_tiles, load: Callable, keep: Callable, stages, arrived, *, in_turn: bool = False
) -> None:
    """Inside a kernel: block b copies tiles b, b + num_blocks, … of the first `num_tiles` of some experts in order.

    Their order is one expert after the other, or, of whole experts, `in_turn` a tile of each.
    `load(entry, at, stage, arrived)` starts to bring the rows `at` of the expert numbered `entry`, `keep(entry, at,
    stage)` to send them on. `stages` is [num_stages, tile.rows, tile.columns], `arrived` [num_stages].
    """
    num_blocks, num_stages = config.num_blocks, config.num_stages
    block = lax.axis_index("block")
    num_mine = lax.div(num_tiles - block + num_blocks - 1, num_blocks)
    num_experts = lax.div(num_tiles, tile.num_tiles)  # no tile is placed where it is 0

    def place(i):
        at = i * num_blocks + block
        if in_turn:
            n, entry = lax.div(at, num_experts), lax.rem(at, num_experts)
        else:
            entry, n = lax.div(at, tile.num_tiles), lax.rem(at, tile.num_tiles)
        return entry, pl.ds(n * tile.rows, tile.rows)

    def load_into(i, stage):
        load(*place(i), stages.at[stage], arrived.at[stage])

    for stage in range(num_stages):
        pl.when(stage < num_mine)(lambda stage=stage: load_into(stage, stage))

    @pl.loop(0, num_mine)
    def _(i):
        stage = lax.rem(i, num_stages)
        entry, rows = place(i)
        plgpu.barrier_wait(arrived.at[stage])
        keep(entry, rows, stages.at[stage])

        # The stage of the tile before this one is free once its store has read it; one store stays in flight.
        @pl.when((i > 0) & (i - 1 + num_stages < num_mine))
        def _():
            plgpu.wait_smem_to_gmem(1, wait_read_only=True)
            load_into(i - 1 + num_stages, lax.rem(i - 1, num_stages))

    plgpu.wait_smem_to_gmem(0)
