"""Which rows belong to which group, as lists: before the kernels of the prefill form, in a few small operations.

Places are the rows of a buffer in which the rows of a group lie together, in the order of their tokens, and each group
starts at a multiple of 8. Running sums and scatters to distinct places instead of sorts, so that all orders are fixed.
"""

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

BLOCK = 128  # flags that are added up in one product: at most 256, which bfloat16 counts exactly
ALIGNMENT = 8  # rows: what one store of the copy engine writes, and a tile in shared memory is made of


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class RowLists:
    """P places for T rows that are in A groups at most, and N tiles of some places that the G groups are cut into.

    tokens: the row of x of each place; 0 where none is. places: of each row in its a-th group, and their weights, for
    as many groups as `counts` says; some place and 0 beyond.
    starts and sizes: of the groups, in places; first_tiles: how many tiles the groups before have, and at the end all.
    groups: of the tiles; a valid one behind the last.
    """

    tokens: Int[Array, " P"]
    places: Int[Array, "T A"]
    weights: Float[Array, "T A"]
    counts: Int[Array, " T"]
    starts: Int[Array, " G"]
    sizes: Int[Array, " G"]
    first_tiles: Int[Array, " G+1"]
    groups: Int[Array, " N"]


def num_places(num_rows: int, num_groups: int, per_row: int, tile_rows: int) -> int:
    """P: enough for rows that are in `per_row` groups each, and for a whole tile at any place."""
    asked = num_rows * per_row
    filled = min(asked + (ALIGNMENT - 1) * min(num_groups, asked), num_groups * _up(num_rows, ALIGNMENT))
    return _up(filled, ALIGNMENT) + tile_rows - ALIGNMENT


def num_tiles(num_rows: int, num_groups: int, per_row: int, tile_rows: int) -> int:
    """N: the most tiles that there can be, whatever the sizes of the groups."""
    places = num_places(num_rows, num_groups, per_row, tile_rows) - tile_rows + ALIGNMENT
    partial = min(num_groups, num_rows * per_row) * (tile_rows - ALIGNMENT)
    return max(1, min((places + partial) // tile_rows, num_groups * (_up(num_rows, tile_rows) // tile_rows)))


def _up(n, multiple: int):
    return -(-n // multiple) * multiple


def row_lists(group_weights: Float[Array, "G T"], per_row: int, tile_rows: int) -> RowLists:
    """A row is in a group where its weight is not 0; of its groups, those after the first `per_row` are left out."""
    num_groups, num_rows = group_weights.shape
    sizes_of = (num_rows, num_groups, per_row, tile_rows)
    asked = group_weights != 0
    rank = _set_before(asked.T).T  # [G, T] of a group among those of the row
    asked &= rank < per_row
    sizes = _up(jnp.sum(asked, axis=1, dtype=jnp.int32), ALIGNMENT)
    starts = jnp.cumsum(sizes) - sizes
    place = starts[:, None] + _set_before(asked)
    token = jnp.broadcast_to(jnp.arange(num_rows, dtype=jnp.int32), asked.shape)
    tokens = _scatter(jnp.zeros(num_places(*sizes_of), jnp.int32), asked, place, token)
    places, weights = _by_row(asked, rank, place, group_weights, per_row)
    counts = jnp.sum(asked, axis=0, dtype=jnp.int32)
    ends = jnp.cumsum(_up(sizes, tile_rows) // tile_rows)
    groups = jnp.sum(ends[None] <= jnp.arange(num_tiles(*sizes_of))[:, None], axis=1, dtype=jnp.int32)
    first_tiles = jnp.concatenate([jnp.zeros(1, jnp.int32), ends])
    groups = jnp.minimum(groups, num_groups - 1)
    return RowLists(tokens, places, weights, counts, starts, sizes, first_tiles, groups)


def _by_row(asked, rank, place, group_weights, per_row: int) -> tuple[jax.Array, jax.Array]:
    """`places` and `weights` of RowLists, from those of each group and row."""
    num_groups, num_rows = asked.shape
    row = jnp.arange(num_rows, dtype=jnp.int32)
    group = jnp.broadcast_to(jnp.arange(num_groups, dtype=jnp.int32)[:, None], asked.shape)
    nobody = jnp.full(num_rows * per_row, -1, jnp.int32)
    groups = _scatter(nobody, asked, rank + row[None] * per_row, group).reshape(num_rows, per_row)
    at = jnp.maximum(groups, 0), row[:, None]
    places, weights = (values.at[at].get(mode="promise_in_bounds") for values in (place, group_weights))
    return jnp.where(groups < 0, 0, places), jnp.where(groups < 0, 0.0, weights.astype(jnp.float32))


def _set_before(flags: Bool[Array, "N n"]) -> Int[Array, "N n"]:
    """How many of a row's flags are set before each: running sums as products with triangles, which are exact.

    XLA's running sum adds up each of them by itself.
    """
    num_rows, size = flags.shape
    num_blocks = -(-size // BLOCK)
    ones = jnp.pad(flags.astype(jnp.bfloat16), ((0, 0), (0, num_blocks * BLOCK - size)))
    blocks = ones.reshape(num_rows, num_blocks, BLOCK)
    inside = jnp.einsum("nbk,kj->nbj", blocks, _before(BLOCK), preferred_element_type=jnp.float32)
    totals = jnp.sum(blocks, axis=2, dtype=jnp.float32)
    earlier = jnp.sum(totals[:, None] * _before(num_blocks).T.astype(jnp.float32)[None], axis=2)  # [N, blocks]
    return (inside + earlier[:, :, None]).astype(jnp.int32).reshape(num_rows, -1)[:, :size]


def _before(size: int) -> Array:
    """[k, j]: 1 where k comes before j."""
    return jnp.triu(jnp.ones((size, size), jnp.bfloat16), 1)


def _scatter(onto, asked, at, values) -> Array:
    """The values of what is asked for at its places; the rest goes to places of its own behind the end: nowhere."""
    nowhere = onto.size + jnp.arange(asked.size, dtype=jnp.int32).reshape(asked.shape)
    return onto.at[jnp.where(asked, at, nowhere)].set(values, mode="drop", unique_indices=True)
