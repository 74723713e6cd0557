"""Rows to their places by group and back, as two Mosaic GPU kernels that are bound by device memory.

The copy engine moves whole rows, through rings of tiles in shared memory, one ring for each warpgroup; what there is to
do is known on the device alone, so that room for more rows costs no time.
"""

import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from kernels_pallas.expert_mlp.row_lists import RowLists

COLUMNS = 64  # of a row: what one of its lines in shared memory has
MAX_WIDTH = 8192  # a row of 16 KiB for each stage of each ring
WARPGROUP = 128  # threads
STAGES = 3  # of a ring
PLACING_WARPGROUPS, ADDING_WARPGROUPS = 4, 2  # of a block
PLACED_BYTES, ADDED_BYTES = 16 * 1024, 32 * 1024  # of a tile, about
COMPILER_PARAMS = plgpu.CompilerParams(lowering_semantics=plgpu.LoweringSemantics.Lane)


def rows_of_tile(width: int, num_bytes: int) -> int:
    """How many rows of 16 bit: a power of two up to 8."""
    fits = [rows for rows in (1, 2, 4, 8) if rows * width * 2 <= num_bytes]
    return max(fits, default=1)


def place(x, lists: RowLists, num_blocks: int, interpret):
    """[P, D]: the rows of x at their places; what lies behind the last place of a group is not written."""
    num_lines, num_places = x.shape[1] // COLUMNS, lists.tokens.shape[0]
    rows = rows_of_tile(x.shape[1], PLACED_BYTES)
    num_workers = num_blocks * PLACING_WARPGROUPS

    def place_rows(tokens, starts, sizes, x, out, tiles, arrived):
        # tokens [P]; starts, sizes [G]; x [T, n, COLUMNS]; out [P, n, COLUMNS]
        # shared memory: tiles [warpgroups, STAGES, rows, n, COLUMNS]; arrived [warpgroups * STAGES]
        mine = lax.axis_index("warpgroup")
        worker = mine * num_blocks + lax.axis_index("block")
        last = starts.shape[0] - 1
        num_mine = _num_mine(lax.div(starts[last] + sizes[last], rows), worker, num_workers)

        def load(i, stage) -> None:
            first = (i * num_workers + worker) * rows
            for row in range(rows):
                to = tiles.at[mine, stage, row]
                plgpu.copy_gmem_to_smem(x.at[tokens[first + row]], to, arrived.at[mine * STAGES + stage])

        def turn(i, stage) -> None:
            plgpu.barrier_wait(arrived.at[mine * STAGES + stage])
            to = out.at[pl.ds((i * num_workers + worker) * rows, rows)]
            plgpu.copy_smem_to_gmem(tiles.at[mine, stage], to)
            plgpu.wait_smem_to_gmem(1, wait_read_only=True)  # the tile before this one has been read: its place is free

        _through_ring(num_mine, load, turn)
        plgpu.wait_smem_to_gmem(0)

    placed = _kernel(
        place_rows,
        jax.ShapeDtypeStruct((num_places, num_lines, COLUMNS), x.dtype),
        plgpu.SMEM((PLACING_WARPGROUPS, STAGES, rows, num_lines, COLUMNS), x.dtype),
        num_blocks,
        PLACING_WARPGROUPS,
        num_arrivals=rows,
        interpret=interpret,
    )(lists.tokens, lists.starts, lists.sizes, x.reshape(-1, num_lines, COLUMNS))
    return placed.reshape(num_places, x.shape[1])


def add(shares, lists: RowLists, num_blocks: int, interpret):
    """[T, D], for each row the sum of its shares [P, D] times their weights, float32, in the order of its groups."""
    (num_rows, per_row), width = lists.places.shape, shares.shape[1]
    num_lines, filled_lines = width // COLUMNS, _up(width, 4 * WARPGROUP) // COLUMNS
    ranks = min(rows_of_tile(filled_lines * COLUMNS, ADDED_BYTES), per_row)
    num_chunks = -(-per_row // ranks)
    num_workers = num_blocks * ADDING_WARPGROUPS
    vector = math.gcd(8, filled_lines * COLUMNS // WARPGROUP)
    strided = plgpu.Layout.WG_STRIDED((filled_lines, COLUMNS), vector)

    def add_shares(places, weights, counts, shares, out, tiles, arrived):
        # places, weights [T, A]; counts [T]; shares [P, n, COLUMNS]; out [T, filled n, COLUMNS]
        # shared memory: tiles [warpgroups, STAGES, ranks, filled n, COLUMNS]; arrived [warpgroups * STAGES]
        mine = lax.axis_index("warpgroup")
        worker = mine * num_blocks + lax.axis_index("block")
        num_mine = _num_mine(num_rows, worker, num_workers) * num_chunks

        zero = plgpu.layout_cast(jnp.zeros((filled_lines, COLUMNS), jnp.float32), strided)

        def at(i):
            """Row, chunk of its groups, and how many of them there are in that."""
            row, chunk = lax.div(i, num_chunks) * num_workers + worker, lax.rem(i, num_chunks)
            return row, chunk, jnp.minimum(counts[row] - chunk * ranks, ranks)

        def load(i, stage) -> None:
            row, chunk, number = at(i)
            here = arrived.at[mine * STAGES + stage]
            for rank in range(ranks):

                @pl.when(rank < number)
                def _(rank=rank):
                    to = tiles.at[mine, stage, rank, pl.ds(0, num_lines)]
                    plgpu.copy_gmem_to_smem(shares.at[places[row, chunk * ranks + rank]], to, here)

                pl.when(rank >= number)(lambda: plgpu.barrier_arrive(here))

        def turn(i, stage, y):
            row, chunk, number = at(i)
            plgpu.barrier_wait(arrived.at[mine * STAGES + stage])

            def one(rank, y):
                share = plgpu.load(tiles.at[mine, stage, rank], layout=strided).astype(jnp.float32)
                return y + weights[row, chunk * ranks + rank] * share

            y = lax.fori_loop(0, number, one, jnp.where(chunk > 0, y, zero))

            @pl.when(chunk == num_chunks - 1)
            def _():
                out[row] = y

            plgpu.commit_smem()  # all warps have read the tile: its place is free
            return y

        _through_ring(num_mine, load, turn, zero)

    sums = _kernel(
        add_shares,
        jax.ShapeDtypeStruct((num_rows, filled_lines, COLUMNS), jnp.float32),
        plgpu.SMEM((ADDING_WARPGROUPS, STAGES, ranks, filled_lines, COLUMNS), shares.dtype),
        num_blocks,
        ADDING_WARPGROUPS,
        num_arrivals=ranks,
        interpret=interpret,
    )(lists.places, lists.weights, lists.counts, shares.reshape(-1, num_lines, COLUMNS))
    return sums.reshape(num_rows, filled_lines * COLUMNS)[:, :width]


def _through_ring(num_mine, load: Callable, turn: Callable, *state) -> None:
    """turn(i, stage, *state) for each tile, which frees the stage of the one before; load(i, stage) well before."""
    for stage in range(STAGES - 1):
        pl.when(stage < num_mine)(lambda stage=stage: load(stage, stage))

    def step(i, state):
        after = turn(i, lax.rem(i, STAGES), *state)
        next_one = i + STAGES - 1
        pl.when(next_one < num_mine)(lambda: load(next_one, lax.rem(next_one, STAGES)))
        return (after,) if state else ()

    lax.fori_loop(0, num_mine, step, state)


def _num_mine(number, worker, num_workers: int):
    return lax.div(number - worker + num_workers - 1, num_workers)


def _up(n: int, multiple: int) -> int:
    return -(-n // multiple) * multiple


def _kernel(body, out_type, tiles, num_blocks: int, num_warpgroups: int, *, num_arrivals: int, interpret):
    return plgpu.kernel(
        body,
        out_type=out_type,
        grid=(num_blocks,),
        grid_names=("block",),
        num_threads=num_warpgroups,
        thread_name="warpgroup",
        scratch_types=[tiles, plgpu.Barrier(num_barriers=num_warpgroups * STAGES, num_arrivals=num_arrivals)],
        compiler_params=COMPILER_PARAMS,
        interpret=interpret,
    )
