"""The fetch as one Mosaic GPU kernel: TMA from pinned host memory through shared memory into the slots, in place.

Bound by the link. A few blocks suffice, because what hides the link's latency is the number of bytes in flight
(blocks x stages x tile), not the number of threads; all other SMs stay free. The plan's count is read on the device.
"""

import dataclasses
import math

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from kernels_pallas.host_view import device_view

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
                f"fetch: num_blocks={self.num_blocks} must be at least 1 and num_stages={self.num_stages} at least 2"
            )


@dataclasses.dataclass(frozen=True)
class Tiling:
    """One expert as `num_tiles` tiles of [rows, columns]."""

    num_tiles: int
    rows: int
    columns: int


def tiling(num_elements: int, itemsize: int, tile_bytes: int) -> Tiling:
    """The largest tiles of at most `tile_bytes` that cut an expert evenly. Raises NotImplementedError if none does."""
    step = math.lcm(TMA_ALIGNMENT // itemsize, 1)
    columns = next((c for c in range(TMA_MAX_BOX, 0, -1) if c % step == 0 and num_elements % c == 0), None)
    if columns is None:
        raise NotImplementedError(
            f"fetch: an expert of {num_elements} elements of {itemsize} bytes is not a multiple of {TMA_ALIGNMENT} "
            "bytes; use implementation='reference'"
        )
    num_rows = num_elements // columns
    most = max(1, min(TMA_MAX_BOX, tile_bytes // (columns * itemsize)))
    rows = next(r for r in range(most, 0, -1) if num_rows % r == 0)
    return Tiling(num_rows // rows, rows, columns)


def fetch(store, slots, expert_ids, slot_ids, count, *, config: Config = Config(), interpret=None):
    tile = tiling(math.prod(store.shape[1:]), store.dtype.itemsize, config.tile_bytes)
    flat = (tile.num_tiles * tile.rows, tile.columns)
    ref = jax.new_ref(slots.reshape(slots.shape[0], *flat))
    kernel = plgpu.kernel(
        _copy_plan(tile, config),
        out_type=(),
        grid=(config.num_blocks,),
        grid_names=("block",),
        scratch_types=[
            plgpu.SMEM((config.num_stages, tile.rows, tile.columns), store.dtype),
            plgpu.Barrier(num_barriers=config.num_stages),
        ],
        interpret=interpret,
    )
    plan = (expert_ids.astype(jnp.int32), slot_ids.astype(jnp.int32), count.astype(jnp.int32).reshape(1))
    kernel(*plan, device_view(store.reshape(store.shape[0], *flat)), ref)
    return jax.freeze(ref).reshape(slots.shape)


def _copy_plan(tile: Tiling, config: Config):
    """The kernel body: block b copies tiles b, b + num_blocks, … of the plan through a ring of stages."""
    num_blocks, num_stages = config.num_blocks, config.num_stages

    def copy_plan(expert_ids, slot_ids, count, store, slots, stages, arrived):
        # expert_ids, slot_ids [P], count [1]; store [E, rows, columns] (host); slots [R, rows, columns]
        # stages [num_stages, tile.rows, tile.columns] (shared memory); arrived [num_stages]
        block = lax.axis_index("block")
        num_tiles = count[0] * tile.num_tiles
        num_mine = lax.div(num_tiles - block + num_blocks - 1, num_blocks)

        def place(i):
            at = i * num_blocks + block
            entry = lax.div(at, tile.num_tiles)
            return entry, pl.ds(lax.rem(at, tile.num_tiles) * tile.rows, tile.rows)

        def load(i, stage):
            entry, rows = place(i)
            plgpu.copy_gmem_to_smem(store.at[expert_ids[entry], rows], stages.at[stage], arrived.at[stage])

        for stage in range(num_stages):
            pl.when(stage < num_mine)(lambda stage=stage: load(stage, stage))

        @pl.loop(0, num_mine)
        def _(i):
            stage = lax.rem(i, num_stages)
            entry, rows = place(i)
            plgpu.barrier_wait(arrived.at[stage])
            plgpu.copy_smem_to_gmem(stages.at[stage], slots.at[slot_ids[entry], rows])

            # The stage of the tile before this one is free once its store has read it; one store stays in flight.
            @pl.when((i > 0) & (i - 1 + num_stages < num_mine))
            def _():
                plgpu.wait_smem_to_gmem(1, wait_read_only=True)
                load(i - 1 + num_stages, lax.rem(i - 1, num_stages))

        plgpu.wait_smem_to_gmem(0)

    return copy_plan
