"""The KV cache: per layer keys and values, per sequence a length. A rejected draft is a shorter length."""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from jmoe.config import DTYPE_BYTES, ModelConfig
from kernels_pallas.decode_attention.reference import write


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class KVCache:
    """Keys and values, one array [B, S, K, H] a layer, and the number of valid positions of each sequence.

    Positions at or beyond `lengths` are never seen: they may hold any finite number (0 times NaN would be NaN).
    """

    keys: tuple[Float[Array, "B S K H"], ...]
    values: tuple[Float[Array, "B S K H"], ...]
    lengths: Int[Array, " B"]

    @property
    def batch_size(self) -> int:
        return self.lengths.shape[0]

    @property
    def capacity(self) -> int:
        return self.keys[0].shape[1]

    def is_deleted(self) -> bool:
        """Whether a step has taken it and not given it back."""
        return any(leaf.is_deleted() for leaf in jax.tree.leaves(self))

    def advanced(self, valid: Bool[Array, "B T"]) -> "KVCache":
        """With the valid ones of a step's tokens, which all layers have."""
        return dataclasses.replace(self, lengths=self.lengths + jnp.sum(valid, axis=1, dtype=jnp.int32))


def kv_shape(config: ModelConfig, batch_size: int, max_seq_len: int) -> tuple[int, int, int, int]:
    """Room for `max_seq_len` positions, in whole eights: the attention kernel reads no other number."""
    num_positions = -(-max_seq_len // 8) * 8
    return (batch_size, num_positions, config.num_key_value_heads, config.head_dim)


def kv_bytes(config: ModelConfig, batch_size: int, max_seq_len: int) -> int:
    """Bytes of the keys and values of all layers."""
    elements = math.prod(kv_shape(config, batch_size, max_seq_len))
    return 2 * config.num_hidden_layers * elements * DTYPE_BYTES[config.dtype]


def init_kv_cache(config: ModelConfig, batch_size: int, max_seq_len: int) -> KVCache:
    shape = kv_shape(config, batch_size, max_seq_len)
    layers = range(config.num_hidden_layers)
    return KVCache(
        keys=tuple(jnp.zeros(shape, config.dtype) for _ in layers),
        values=tuple(jnp.zeros(shape, config.dtype) for _ in layers),
        lengths=jnp.zeros((batch_size,), jnp.int32),
    )


@functools.partial(jax.jit, donate_argnums=0, keep_unused=True)
def emptied(cache: KVCache) -> KVCache:
    """With nothing in it, where it lies: for arrays that lie elsewhere XLA records CUDA graphs anew."""
    return jax.tree.map(jnp.zeros_like, cache)


def append(
    cache: KVCache, layer: int, keys: Float[Array, "B T K H"], values: Float[Array, "B T K H"], positions, valid
) -> KVCache:
    """Writes the valid tokens at their positions; lengths are the caller's to advance, once for all layers."""
    keys = write(cache.keys[layer], keys, positions, valid)
    return replace_layer(cache, layer, keys, write(cache.values[layer], values, positions, valid))


def replace_layer(
    cache: KVCache, layer: int, keys: Float[Array, "B S K H"], values: Float[Array, "B S K H"]
) -> KVCache:
    """With these keys and values of one layer."""
    return dataclasses.replace(
        cache, keys=_replace_at(cache.keys, layer, keys), values=_replace_at(cache.values, layer, values)
    )


def _replace_at(items: tuple, index: int, item) -> tuple:
    return (*items[:index], item, *items[index + 1 :])
