"""A matrix product by groups as a Mosaic GPU kernel: each tile of rows with the weights of its group's slot.

Blocks stay and take items in turn, an item being a tile of rows times a tile of columns. One warpgroup of a block asks
the copy engine for tiles of 64 steps of the sum and runs ahead through a ring; the others have 64 of the rows each,
multiply what has arrived, and store. Items of one group follow one another, in panels that are a few columns wide and
as high as the group: the blocks at work at one time read the same weights and the same rows, which L2 serves then.

Every sum is over all steps in their order, so a row's result depends neither on its place nor on the other rows.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from kernels_pallas.expert_mlp.row_lists import ALIGNMENT, RowLists
from kernels_pallas.multiprocessors import COUNT

M = 64  # rows of one tensor core instruction: those of a warpgroup
STEPS = 64  # of the sum: what is multiplied at once, 128 bytes of 16 bit
PANEL = 8  # tiles of columns that the items of a group go through together
STORED = 64  # columns that are stored at once
SHARED_BYTES = 224 * 1024  # of a block; 227 KiB less what Mosaic takes for barriers
MAX_STAGES = 8
PRODUCER_REGISTERS, REGISTERS = 40, 232  # of a thread where two warpgroups multiply: 65536 / 128 for one of each
TRANSFORMS = (
    plgpu.TilingTransform((8, STEPS)),  # pyright: ignore[reportAbstractUsage]
    plgpu.SwizzleTransform(2 * STEPS),  # pyright: ignore[reportAbstractUsage]
)
# Lane semantics: layouts in shared memory are the ones written here. Approximate: exponentials of 2 ulp.
COMPILER_PARAMS = plgpu.CompilerParams(approx_math=True, lowering_semantics=plgpu.LoweringSemantics.Lane)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    """How many blocks run, and how many warpgroups of each have 64 rows. Raises ValueError for less than one."""

    num_blocks: int = COUNT  # one on each multiprocessor
    num_warpgroups: int = 2

    def __post_init__(self) -> None:
        if self.num_blocks < 1 or not 1 <= self.num_warpgroups <= 2:
            raise ValueError(
                f"expert_mlp: num_blocks={self.num_blocks} must be at least 1 and "
                f"num_warpgroups={self.num_warpgroups} 1 or 2"
            )

    @property
    def tile_rows(self) -> int:
        return M * self.num_warpgroups


@dataclasses.dataclass(frozen=True, kw_only=True)
class Weights:
    """What a kernel makes of the weights [R, 3F, D] of a slot, a tile of `width` columns of a product at a time.

    tile: the shape in shared memory. load(weights of a slot, tile of columns, step, to, barrier) starts `num_copies`
    copies into `to`. operand(tile) is [STEPS, width]. result(sums, n) is the n-th STORED columns of what is stored for
    a tile, from its sums [M, width]: num_stored columns in all, of num_columns that all tiles store.
    """

    width: int
    tile: tuple[int, int]
    num_copies: int
    num_steps: int
    num_stored: int
    num_columns: int
    load: Callable[..., None]
    operand: Callable[[Any], Any]
    result: Callable[[Any, int], Any]

    @property
    def num_tiles(self) -> int:
        return self.num_columns // self.num_stored


def span(n, size: int):
    """The n-th `size` elements, known to the compiler to be aligned."""
    return pl.ds(n * size if isinstance(n, int) else pl.multiple_of(n * size, size), size)


def stages(width: int, num_warpgroups: int) -> int:
    """Tiles of rows and of weights that a block has room for."""
    left = SHARED_BYTES - num_warpgroups * 2 * M * STORED * 2
    return min(MAX_STAGES, left // ((num_warpgroups * M + width) * STEPS * 2))


def product(rows, slots, group_slots, lists: RowLists, weights: Weights, config: Config, interpret):
    """[P, num_columns] for rows [P, STEPS * num_steps], by tiles of config.tile_rows; other places are not written."""
    num_warpgroups, num_stages = config.num_warpgroups, stages(weights.width, config.num_warpgroups)
    kernel = _Kernel(weights, config.num_blocks, num_warpgroups, num_stages, *group_slots.shape, *lists.groups.shape)
    return plgpu.kernel(
        kernel.multiply_rows,
        out_type=jax.ShapeDtypeStruct((rows.shape[0], weights.num_columns), rows.dtype),
        grid=(config.num_blocks,),
        grid_names=("block",),
        num_threads=num_warpgroups + 1,
        thread_name="warpgroup",
        scratch_types=[
            plgpu.SMEM((num_stages, num_warpgroups * M, STEPS), rows.dtype, transforms=TRANSFORMS),
            plgpu.SMEM((num_stages, *weights.tile), rows.dtype, transforms=TRANSFORMS),
            plgpu.SMEM((num_warpgroups, 2, M, STORED), rows.dtype, transforms=TRANSFORMS),
            plgpu.Barrier(num_barriers=num_stages, num_arrivals=1 + weights.num_copies),
            plgpu.Barrier(num_barriers=num_stages, num_arrivals=num_warpgroups),
        ],
        compiler_params=COMPILER_PARAMS,
        interpret=interpret,
    )(lists.groups, lists.first_tiles, lists.starts, lists.sizes, group_slots, rows, slots)


@dataclasses.dataclass(frozen=True)
class _Kernel:
    weights: Weights
    num_blocks: int
    num_warpgroups: int
    num_stages: int
    num_groups: int
    max_tiles: int

    def multiply_rows(self, groups, first_tiles, starts, sizes, group_slots, rows, slots, out, *here):
        # groups [N]; first_tiles [G + 1]; starts, sizes, group_slots [G]; rows [P, K]; slots [R, 3F, D];
        # out [P, num_columns]; shared memory: rows [stages, M * warpgroups, STEPS], weights [stages, *tile], what
        # is stored [warpgroups, 2, M, STORED]; arrived, free [stages]
        rows_here, weights_here, store, arrived, free = here
        ring = (rows_here, weights_here, arrived, free)
        tables = (groups, first_tiles, starts, sizes, group_slots)
        mine, block = lax.axis_index("warpgroup"), lax.axis_index("block")
        num_items = first_tiles[self.num_groups] * self.weights.num_tiles
        num_mine = lax.div(num_items - block + self.num_blocks - 1, self.num_blocks)

        def items(turn) -> None:
            """Calls turn(i, item) for the items of this block. Where the next one lies is read before its turn."""

            def step(i, here):
                there = self._place(tables, (i + 1) * self.num_blocks + block)
                turn(i, here)
                return there

            lax.fori_loop(0, num_mine, step, self._place(tables, block))

        def produce() -> None:
            self._registers(PRODUCER_REGISTERS, "decrease")
            items(lambda i, item: self._load(i, item, rows, slots, ring))
            self._drain(num_mine * self.weights.num_steps, free)

        def consume() -> None:
            self._registers(REGISTERS, "increase")
            items(lambda i, item: self._multiply(mine, i, item, ring, store, out))
            plgpu.wait_smem_to_gmem(0)

        lax.cond(mine == self.num_warpgroups, produce, consume)

    def _registers(self, number: int, action) -> None:
        if self.num_warpgroups > 1:
            plgpu.set_max_registers(number, action=action)

    def _drain(self, num_loads, free) -> None:
        """Waits until the last tiles have been multiplied."""
        for n in range(self.num_stages):
            left = num_loads + n - self.num_stages
            pl.when(left >= 0)(lambda left=left: plgpu.barrier_wait(free.at[lax.rem(left, self.num_stages)]))

    def _place(self, tables, item):
        """Slot, first place, places from there to the end of the group, and tile of columns of an item."""
        groups, first_tiles, starts, sizes, group_slots = tables
        num_tiles = self.weights.num_tiles
        # Some tile for an item that there is not, of a group that may be empty.
        group = groups[jnp.minimum(lax.div(item, num_tiles), self.max_tiles - 1)]
        first = first_tiles[group]
        many = jnp.maximum(first_tiles[group + 1] - first, 1)
        within = item - first * num_tiles
        panel = lax.div(within, many * PANEL)
        within = within - panel * many * PANEL
        width = jnp.clip(num_tiles - panel * PANEL, 1, PANEL)
        row = lax.div(within, width) * (M * self.num_warpgroups)
        return group_slots[group], starts[group] + row, sizes[group] - row, panel * PANEL + lax.rem(within, width)

    def _load(self, i, item, rows, slots, ring) -> None:
        slot, first, _, column = item
        rows_here, weights_here, arrived, free = ring

        @pl.loop(0, self.weights.num_steps)
        def _(step):
            n = i * self.weights.num_steps + step
            stage = lax.rem(n, self.num_stages)
            pl.when(n >= self.num_stages)(lambda: plgpu.barrier_wait(free.at[stage]))
            at = pl.ds(pl.multiple_of(first, ALIGNMENT), M * self.num_warpgroups)
            plgpu.copy_gmem_to_smem(rows.at[at, span(step, STEPS)], rows_here.at[stage], arrived.at[stage])
            self.weights.load(slots.at[slot], column, step, weights_here.at[stage], arrived.at[stage])

    def _multiply(self, mine, i, item, ring, store, out) -> None:
        """The 64 rows of this warpgroup; where the group has ended before them, it lets the tiles pass."""
        _, first, left, column = item
        rows_here, weights_here, arrived, free = ring
        left = left - mine * M

        def each(run) -> None:
            @pl.loop(0, self.weights.num_steps)
            def _(step):
                n = i * self.weights.num_steps + step
                plgpu.barrier_wait(arrived.at[lax.rem(n, self.num_stages)])
                run(n, lax.rem(n, self.num_stages))

        @pl.when(left <= 0)
        def _():
            each(lambda n, stage: plgpu.barrier_arrive(free.at[stage]))

        def sums(acc):
            def add(n, stage) -> None:
                plgpu.wgmma(acc, rows_here.at[stage, span(mine, M)], self.weights.operand(weights_here.at[stage]))
                plgpu.wgmma_wait(1)  # the tiles before this one have been multiplied: their place is free

                @pl.when(n > i * self.weights.num_steps)
                def _():
                    plgpu.barrier_arrive(free.at[lax.rem(n - 1, self.num_stages)])

            each(add)
            return acc[...]

        @pl.when(left > 0)
        def _():
            values = pl.run_scoped(sums, plgpu.WGMMAAccumulatorRef((M, self.weights.width), jnp.float32))
            last = (i + 1) * self.weights.num_steps - 1
            plgpu.barrier_arrive(free.at[lax.rem(last, self.num_stages)])
            self._store(values, store.at[mine], out, first + mine * M, left, column)

    def _store(self, values, store, out, first, left, column) -> None:
        """`left` of the rows: those behind them are another group's. Two pieces of columns are under way at a time."""
        num_pieces = self.weights.num_stored // STORED
        for n in range(num_pieces):
            here = store.at[n % 2]
            in_other_half = n > 0 or num_pieces % 2 == 0  # does the piece before this one lie
            plgpu.wait_smem_to_gmem(int(in_other_half), wait_read_only=True)
            here[...] = self.weights.result(values, n).astype(out.dtype)
            plgpu.commit_smem()
            columns = span(column * num_pieces + n, STORED)

            def copy(row, size: int, here=here, columns=columns) -> None:
                to = out.at[pl.ds(pl.multiple_of(first + row, ALIGNMENT), size), columns]
                plgpu.copy_smem_to_gmem(here.at[pl.ds(row, size)], to, commit_group=False)

            @pl.when(left >= M)
            def _():
                copy(0, M)

            @pl.when(left < M)
            def _():
                @pl.loop(0, lax.div(left, ALIGNMENT))
                def _(eight, copy=copy):
                    copy(pl.multiple_of(eight * ALIGNMENT, ALIGNMENT), ALIGNMENT)

            plgpu.commit_smem_to_gmem_group()
