"""All of a few things with all of others inside a Mosaic GPU kernel: rows of integers, and sums over pairs of them.

The rows lie in a table in shared memory. The threads of a warpgroup stand for things of one kind or another, and learn
of others by adding up something over the columns of the table.
"""

import dataclasses
import math
from typing import Any

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

WARPGROUP, WARP = 128, 32  # threads
VECTOR = 4  # columns that a thread loads at once
AT_ONCE = 32  # columns that are one stretch of code


def whole(size: int, unit: int = VECTOR) -> int:
    return -(-size // unit) * unit


def columns_of(size: int) -> int:
    """How many columns are looked at for `size` things: what is put into those beyond has to count for nothing."""
    return whole(size, VECTOR if size <= AT_ONCE else AT_ONCE)


def layout(width: int):
    """Of [n, width], width > 1: a thread has a row (two, of 256), and loads some neighbouring columns at once."""
    vector = math.gcd(width, VECTOR)
    vector = vector // 2 if vector == width else vector  # Mosaic loads no row of one vector
    tiling = plgpu.Tiling(((WARPGROUP, vector), (WARP, vector)))
    return plgpu.Layout.TILED(tiling, warp_dims=(-4,), lane_dims=(-2,), vector_dim=-1)


def put(table, rows: dict) -> None:
    """Writes rows into the table, for all threads to see."""
    for place, row in rows.items():
        table[place, pl.ds(0, row.shape[0])] = row
    plgpu.commit_smem()


@dataclasses.dataclass(frozen=True)
class Pairs:
    """The things of one kind with those of some columns: arrays [n, width]."""

    table: Any
    shape: tuple[int, int]
    start: Any  # the first of the columns

    def mine(self, row):
        """A number that each thing has."""
        return self._spread(row, 0)

    def other(self, place: int):
        """The number that each column has in a row of the table."""
        return self.of(self.table.at[place])

    def of(self, row):
        """The number that each column has in a row in shared memory."""
        part = row.at[pl.ds(self.start, self.shape[1])]
        return self._spread(plgpu.load(part, layout=layout(self.shape[1]).reduce((0,))), 1)

    @property
    def number(self):
        """Which column it is."""
        return self.start + plgpu.broadcasted_iota(jnp.int32, self.shape, 1, layout=layout(self.shape[1]))

    def _spread(self, row, dimension: int):
        return plgpu.layout_cast(lax.broadcast_in_dim(row, self.shape, (dimension,)), layout(self.shape[1]))


class Things:
    """Up to `size` of one kind, from 0. Their rows are `count` long: what is beyond `size` is up to the caller."""

    def __init__(self, table, size: int):
        self.table, self.count, self.layout = table, whole(size, WARPGROUP), layout(VECTOR).reduce((1,))
        self.me = plgpu.broadcasted_iota(jnp.int32, (self.count,), 0, layout=self.layout)

    def row(self, place: int):
        """What the table has of them."""
        return self.of(self.table.at[place])

    def of(self, row):
        """What a row in shared memory has of them."""
        return plgpu.load(row.at[pl.ds(0, self.count)], layout=self.layout)

    def pairs(self, start, width: int) -> Pairs:
        return Pairs(self.table, (self.count, width), start)

    def sums(self, columns: int, terms) -> tuple:
        """For each of them the sums over the columns of each of `terms(pairs)`."""
        width = columns if columns <= AT_ONCE else math.gcd(columns, AT_ONCE)

        def part(n):
            return tuple(jnp.sum(term.astype(jnp.int32), axis=1) for term in terms(self.pairs(n * width, width)))

        def add(n, totals):
            return tuple(total + more for total, more in zip(totals, part(n), strict=True))

        return part(0) if columns == width else lax.fori_loop(1, columns // width, add, part(0))
