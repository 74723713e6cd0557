"""How the kernels of decode attention cut up their work."""

import dataclasses

import jax.numpy as jnp
from jax import lax

TILE = 64  # positions that are read and multiplied at once
MAX_SPLITS = 64  # the second kernel has all parts of a head in registers
WARPS, LANES = 4, 32


@dataclasses.dataclass(frozen=True)
class Shape:
    """B sequences of N query heads, over a KV cache of S positions and K heads of H elements."""

    batch: int
    num_heads: int
    num_positions: int
    num_kv_heads: int
    head_dim: int
    dtype: jnp.dtype
    sliding_window: int | None

    @property
    def half(self) -> int:
        return self.head_dim // 2

    @property
    def group(self) -> int:
        """G, the query heads of a KV head."""
        return self.num_heads // self.num_kv_heads

    @property
    def num_rows(self) -> int:
        """G filled up to whole tiles of shared memory."""
        return -(-self.group // 8) * 8

    @property
    def num_tiles(self) -> int:
        """The most that a sequence can need: a window may begin and end within a tile."""
        tiles = -(-self.num_positions // TILE)
        return tiles if self.sliding_window is None else min(tiles, -(-self.sliding_window // TILE) + 1)

    def num_splits(self, num_blocks: int) -> int:
        """P, the parts of a sequence, in whole rows of the second kernel's threads."""
        wanted = min(self.num_tiles, MAX_SPLITS, max(1, num_blocks // (self.batch * self.num_kv_heads)))
        rows = self.lane_rows(wanted)
        return -(-wanted // rows) * rows

    def num_stages(self, num_splits: int, most: int) -> int:
        """Tiles that a block has room for: no more than it may need."""
        return min(most, -(-self.num_tiles // num_splits))

    def lane_rows(self, num_splits: int) -> int:
        """Parts that the threads of a warp of the second kernel share out: each has up to 16 bytes of one."""
        most = 4 * LANES * WARPS // self.head_dim
        return next(n for n in (2, 4, 8) if n >= min(num_splits, most))

    def tiles_of(self, position, valid):
        """The first tile that a sequence sees, and how many: none where it is not valid."""
        seen_from = 0 if self.sliding_window is None else jnp.maximum(position - (self.sliding_window - 1), 0)
        first = lax.div(jnp.int32(seen_from), TILE)
        return first, jnp.where(valid != 0, lax.div(position, TILE) - first + 1, 0)
