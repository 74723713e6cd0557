"""Named shapes of decode attention: real models, short and long sequences, batches of uneven ones."""

import dataclasses

import numpy as np


@dataclasses.dataclass(frozen=True, kw_only=True)
class DecodeAttentionSpec:
    """A new token for each of the sequences, whose lengths before it are `lengths`; a negative one is not valid.

    N query heads and K KV heads of H elements, a KV cache of S positions.
    """

    name: str
    num_heads: int
    num_kv_heads: int
    head_dim: int
    num_positions: int
    lengths: tuple[int, ...]
    sliding_window: int | None = None
    dtype: str = "bfloat16"

    @property
    def batch(self) -> int:
        return len(self.lengths)

    @property
    def qkv_shape(self) -> tuple[int, int]:
        return (self.batch, (self.num_heads + 2 * self.num_kv_heads) * self.head_dim)

    @property
    def cache_shape(self) -> tuple[int, int, int, int]:
        return (self.batch, self.num_positions, self.num_kv_heads, self.head_dim)

    @property
    def positions(self) -> np.ndarray:
        return np.maximum(np.array(self.lengths, np.int32), 0)

    @property
    def valid(self) -> np.ndarray:
        return np.array(self.lengths) >= 0

    @property
    def num_seen(self) -> np.ndarray:
        """Positions that each sequence reads, the new one among them; 0 for those that are not valid."""
        seen = self.positions + 1
        return np.where(self.valid, np.minimum(seen, self.sliding_window or seen), 0)

    def scaled(self, factor: int) -> "DecodeAttentionSpec":
        """The same heads over a KV cache and lengths `factor` times as short; for a CPU."""
        room = -(-self.num_positions // factor // 8) * 8
        window = self.sliding_window and max(1, self.sliding_window // factor)
        lengths = tuple(length if length < 0 else min(length // factor, room - 1) for length in self.lengths)
        return dataclasses.replace(self, num_positions=room, sliding_window=window, lengths=lengths)


_QWEN3_30B = DecodeAttentionSpec(
    name="qwen3_30b", num_heads=32, num_kv_heads=4, head_dim=128, num_positions=1024, lengths=(600,)
)

SPECS: tuple[DecodeAttentionSpec, ...] = (
    _QWEN3_30B,
    dataclasses.replace(_QWEN3_30B, name="b8", lengths=tuple(range(450, 850, 50))),
    dataclasses.replace(_QWEN3_30B, name="b32", lengths=(1023,) * 32),
    dataclasses.replace(_QWEN3_30B, name="long", num_positions=8192, lengths=(8191,)),
    dataclasses.replace(_QWEN3_30B, name="b8_long", num_positions=8192, lengths=(8000,) * 8),
    dataclasses.replace(_QWEN3_30B, name="b64_uneven", lengths=tuple(16 * n for n in range(64))),
    dataclasses.replace(_QWEN3_30B, name="first_tokens", lengths=(0, 1, 2, 62, 63, 64, 65)),
    dataclasses.replace(_QWEN3_30B, name="last_position", num_positions=1000, lengths=(999, 998, 960, 959, 936, 935)),
    dataclasses.replace(_QWEN3_30B, name="not_valid", lengths=(-1, 300, -1, 1023)),
    dataclasses.replace(_QWEN3_30B, name="window", sliding_window=128, lengths=(0, 127, 128, 500, 1023)),
    dataclasses.replace(_QWEN3_30B, name="window_of_one", sliding_window=1, lengths=(0, 64, 700)),
    dataclasses.replace(_QWEN3_30B, name="float16", dtype="float16"),
    dataclasses.replace(_QWEN3_30B, name="float32", dtype="float32"),
    dataclasses.replace(_QWEN3_30B, name="qwen3_235b", num_heads=64, lengths=(600, 900)),
    dataclasses.replace(_QWEN3_30B, name="group_of_4", num_kv_heads=8, lengths=(600, 33)),
    dataclasses.replace(_QWEN3_30B, name="group_of_12", num_heads=12, num_kv_heads=1, lengths=(600, 33)),
    dataclasses.replace(_QWEN3_30B, name="no_groups", num_heads=2, num_kv_heads=2, lengths=(600, 33)),
    dataclasses.replace(_QWEN3_30B, name="head_dim_64", head_dim=64, lengths=(600, 63, 1023)),
    dataclasses.replace(_QWEN3_30B, name="head_dim_96", head_dim=96),
)
