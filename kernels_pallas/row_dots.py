"""Products of a few rows of x with rows of weights inside a Mosaic GPU kernel, in float32, a row of weights a warp."""

import math

import jax.numpy as jnp
from jax import lax
from jax.experimental.pallas import mosaic_gpu as plgpu

COLUMNS = 256  # of a tile: the most elements of one dimension of a TMA box
ITEM_ROWS = 4  # of weights: one for each warp of a warpgroup
MAX_ROWS = 4  # of x: the float32 units can multiply that often by a weight while the next arrives
WARP, WARPGROUP = 32, 128  # threads
VECTOR_BYTES = 16  # the widest load of a thread
SHARED_BYTES = 224 * 1024  # of a block; 227 KiB less what Mosaic takes for barriers
REGISTERS = 65536  # of a multiprocessor
DTYPES = ("bfloat16", "float16", "float32")


def lane_vector(itemsize: int) -> int:
    """Elements that a thread loads at once of a row that a warp shares."""
    return min(VECTOR_BYTES // itemsize, COLUMNS // WARP)


def strided_vector(itemsize: int, width: int) -> int:
    """The same of a row of `width` elements that a warpgroup shares."""
    return math.gcd(VECTOR_BYTES // itemsize, width // WARPGROUP)


def by_rows(itemsize: int):
    """The layout of [ITEM_ROWS, COLUMNS]: a warp has one row, its threads `lane_vector` neighbouring columns each."""
    return by_rows_of(WARP * lane_vector(itemsize))


def by_rows_of(width: int):
    """The same for [ITEM_ROWS, width], or a multiple of that."""
    tiling = plgpu.Tiling(((ITEM_ROWS, width), (width // WARP,)))
    return plgpu.Layout.TILED(tiling, warp_dims=(-3,), lane_dims=(-2,), vector_dim=-1)


def unroll(num_rows: int, num_tiles: int) -> int:
    """Tiles whose products are one stretch of code: enough to hide loads, few enough to compile fast."""
    return math.gcd(num_tiles, max(1, 8 // num_rows))


def every_warps(row, layout):
    """[COLUMNS] of a row of x as [ITEM_ROWS, COLUMNS], float32."""
    row = row.astype(jnp.float32)
    return plgpu.layout_cast(lax.broadcast_in_dim(row, (ITEM_ROWS, COLUMNS), (1,)), layout)


def row_dots(x, parts, itemsize: int) -> list[tuple]:
    """For each row of x its products with the rows of each part, as many times [ITEM_ROWS].

    In shared memory, x [T, n, COLUMNS] and each of `parts` [ITEM_ROWS, n, COLUMNS], elements of `itemsize` bytes.
    """
    zeros = lane_zeros(len(parts) * x.shape[0], itemsize)
    totals = [jnp.sum(total, axis=1) for total in add_products(zeros, x, parts, itemsize)]
    return [tuple(totals[n : n + len(parts)]) for n in range(0, len(totals), len(parts))]


def lane_zeros(number: int, itemsize: int) -> list:
    """So many times [ITEM_ROWS, COLUMNS], from which `add_products` starts: its rows' sums are what is wanted."""
    return [plgpu.layout_cast(jnp.zeros((ITEM_ROWS, COLUMNS), jnp.float32), by_rows(itemsize))] * number


def add_products(totals: list, x, parts, itemsize: int) -> list:
    """`totals` with the products of each row of x and each part added, row by row; both are as for `row_dots`.

    Each thread adds its columns in their order, so it is the same sum whether a row comes at once or in several parts.
    """
    num_rows, num_tiles, _ = x.shape
    layout, at_once = by_rows(itemsize), unroll(num_rows, num_tiles)

    def add(column, totals):
        totals = list(totals)
        kernels = [plgpu.load(part.at[:, column], layout=layout).astype(jnp.float32) for part in parts]
        for row in range(num_rows):
            x_rows = every_warps(plgpu.load(x.at[row, column], layout=layout.reduce(0)), layout)
            for n, kernel in enumerate(kernels):
                totals[len(parts) * row + n] += x_rows * kernel
        return totals

    def add_some(n, totals):
        for column in range(at_once):
            totals = add(n * at_once + column, totals)
        return totals

    return lax.fori_loop(0, num_tiles // at_once, add_some, totals)
