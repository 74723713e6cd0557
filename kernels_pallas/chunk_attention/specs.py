"""Named shapes of attention of a chunk: prompts of real models, first and later chunks, uneven batches, odd sizes."""

import dataclasses

import numpy as np


@dataclasses.dataclass(frozen=True, kw_only=True)
class ChunkAttentionSpec:
    """T queries of each sequence, the first at its position of `starts`; some may lie beyond the end, and are no token.

    N query heads and K KV heads of H elements, a KV cache of S positions.
    """

    name: str
    num_heads: int
    num_kv_heads: int
    head_dim: int
    num_queries: int
    num_positions: int
    starts: tuple[int, ...] = (0,)
    sliding_window: int | None = None
    dtype: str = "bfloat16"

    @property
    def batch(self) -> int:
        return len(self.starts)

    @property
    def queries_shape(self) -> tuple[int, int, int, int]:
        return (self.batch, self.num_queries, self.num_heads, self.head_dim)

    @property
    def cache_shape(self) -> tuple[int, int, int, int]:
        return (self.batch, self.num_positions, self.num_kv_heads, self.head_dim)

    @property
    def positions(self) -> np.ndarray:
        """[B, T]"""
        return np.array(self.starts, np.int32)[:, None] + np.arange(self.num_queries, dtype=np.int32)

    @property
    def valid(self) -> np.ndarray:
        """Which queries are tokens, [B, T]."""
        return self.positions < self.num_positions

    @property
    def num_seen(self) -> int:
        """Positions that the tokens see, those of each counted by itself."""
        seen = np.minimum(self.positions + 1, self.sliding_window or self.num_positions)
        return int(np.where(self.valid, seen, 0).sum())

    def scaled(self, factor: int) -> "ChunkAttentionSpec":
        """The same heads over a chunk and a KV cache `factor` times as short; for a CPU."""
        sizes = {"num_queries": self.num_queries, "num_positions": self.num_positions}
        window = self.sliding_window and max(1, self.sliding_window // factor)
        starts = tuple(start // factor for start in self.starts)
        short = {name: max(1, -(-size // factor)) for name, size in sizes.items()}
        return dataclasses.replace(self, starts=starts, sliding_window=window, **short)


_QWEN3_30B = ChunkAttentionSpec(
    name="qwen3_30b_4096", num_heads=32, num_kv_heads=4, head_dim=128, num_queries=4096, num_positions=4096
)
_SHORT = dataclasses.replace(_QWEN3_30B, name="qwen3_30b_512", num_queries=512)

SPECS: tuple[ChunkAttentionSpec, ...] = (
    _QWEN3_30B,
    _SHORT,
    dataclasses.replace(_QWEN3_30B, name="later_chunk", num_positions=16384, starts=(8192,)),
    dataclasses.replace(_SHORT, name="first_of_long", num_positions=32768),
    dataclasses.replace(_SHORT, name="b8", starts=(0,) * 8),
    dataclasses.replace(_SHORT, name="b8_uneven", starts=(0, 1, 63, 64, 500, 1024, 3000, 3584)),
    dataclasses.replace(_SHORT, name="beyond_the_end", num_positions=1024, starts=(900, 0, 512, 1023)),
    dataclasses.replace(_SHORT, name="window", sliding_window=128, starts=(0, 100, 128, 3584)),
    dataclasses.replace(_SHORT, name="window_past_the_start", num_positions=1024, sliding_window=700, starts=(0, 600)),
    dataclasses.replace(_SHORT, name="window_of_one", sliding_window=1, starts=(0, 700)),
    dataclasses.replace(_SHORT, name="odd", num_queries=317, num_positions=1043, starts=(0, 7, 726)),
    dataclasses.replace(_SHORT, name="few_queries", num_queries=16, starts=(0, 1000, 4080)),
    dataclasses.replace(_SHORT, name="two_queries", num_queries=2, starts=(0, 1, 77)),
    dataclasses.replace(_SHORT, name="float16", dtype="float16", starts=(300,)),
    dataclasses.replace(_SHORT, name="float32", dtype="float32", starts=(300,)),
    dataclasses.replace(_SHORT, name="qwen3_235b", num_heads=64, starts=(0, 900)),
    dataclasses.replace(_SHORT, name="no_groups", num_heads=2, num_kv_heads=2, starts=(0, 900)),
    dataclasses.replace(_SHORT, name="head_dim_64", head_dim=64, starts=(0, 900)),
    dataclasses.replace(_SHORT, name="head_dim_256", num_heads=8, num_kv_heads=2, head_dim=256, starts=(0, 900)),
    dataclasses.replace(_SHORT, name="head_dim_12", head_dim=12),
)
