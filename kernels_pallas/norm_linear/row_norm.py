"""RMSNorm of a row that the threads of one warpgroup share, inside a Mosaic GPU kernel."""

import functools

import jax.numpy as jnp
from jax import lax
from jax.experimental.pallas import mosaic_gpu as plgpu

from kernels_pallas.row_dots import COLUMNS, ITEM_ROWS, by_rows, every_warps, lane_zeros, strided_vector, unroll


def layout(width: int, itemsize: int):
    """Of a row [n, COLUMNS] of `width` elements: each warp has whole columns, if they are a multiple of the warps."""
    if width % (ITEM_ROWS * COLUMNS) == 0:
        return by_rows(itemsize)
    return plgpu.Layout.WG_STRIDED((width // COLUMNS, COLUMNS), strided_vector(itemsize, width))


def added(parts: list):
    """The sum of one part or two, rounded as the reference does."""
    first, *other = parts
    return (first.astype(jnp.float32) + other[0].astype(jnp.float32)).astype(first.dtype) if other else first


def normed(row, scales, eps: float, here, sums):
    """A row [n, COLUMNS] in `layout`, normed, and rounded where the reference rounds.

    In shared memory there are `here` like the row, for this, and `sums` [ITEM_ROWS] in float32.
    """
    num_columns, wide = row.shape[0], row.astype(jnp.float32)
    if num_columns % ITEM_ROWS == 0:
        squares = [wide[n : n + ITEM_ROWS] * wide[n : n + ITEM_ROWS] for n in range(0, num_columns, ITEM_ROWS)]
        sums[...] = jnp.sum(functools.reduce(jnp.add, squares), axis=1)
        total = (sums[0] + sums[1]) + (sums[2] + sums[3])
    else:
        here[...] = row
        sums[...] = _whole_sum(here, row.dtype.itemsize)
        total = sums[0]
    rounded = (wide * lax.rsqrt(total / row.size + eps)).astype(row.dtype)
    return (rounded.astype(jnp.float32) * scales.astype(jnp.float32)).astype(row.dtype)


def _whole_sum(row, itemsize: int):
    """Of the squares of a row in shared memory, [ITEM_ROWS]: every warp adds up all of it for itself."""
    by_row, at_once = by_rows(itemsize), unroll(1, row.shape[0])

    def add_some(n, total):
        for column in range(at_once):
            x = every_warps(plgpu.load(row.at[n * at_once + column], layout=by_row.reduce(0)), by_row)
            total = total + x * x
        return total

    zeros = lane_zeros(1, itemsize)[0]
    return jnp.sum(lax.fori_loop(0, row.shape[0] // at_once, add_some, zeros), axis=1)
