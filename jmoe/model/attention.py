"""Grouped-query attention with q/k norms over a KV cache."""

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from jmoe.config import ModelConfig
from jmoe.model.kv_cache import KVCache, append
from jmoe.model.layers import Linear, RMSNorm
from jmoe.model.rope import apply_rope

# Scores of one block of queries are materialised in float32; longer chunks go block by block.
MAX_SCORE_BYTES = 256 * 2**20


class Attention(nnx.Module):
    """softmax(q kᵀ / sqrt(H)) v over the cached and the new positions; q, k and v are one projection."""

    def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs):
        heads, kv_heads, head_dim = config.num_attention_heads, config.num_key_value_heads, config.head_dim
        shared = {"dtype": config.dtype, "use_bias": config.attention_bias, "rngs": rngs}
        self.qkv_proj = Linear(config.hidden_size, (heads + 2 * kv_heads) * head_dim, **shared)
        self.o_proj = Linear(heads * head_dim, config.hidden_size, **shared)
        self.q_norm = RMSNorm(head_dim, eps=config.rms_norm_eps, dtype=config.dtype)
        self.k_norm = RMSNorm(head_dim, eps=config.rms_norm_eps, dtype=config.dtype)
        self.config = config

    def __call__(
        self, x: Float[Array, "B T D"], cache: KVCache, layer: int, angles, positions: Int[Array, "B T"], valid
    ) -> tuple[Float[Array, "B T D"], KVCache]:
        config = self.config
        heads, kv_heads = config.num_attention_heads, config.num_key_value_heads
        qkv = self.qkv_proj(x).reshape(*x.shape[:2], heads + 2 * kv_heads, config.head_dim)  # [B, T, N+2K, H]
        queries, keys, values = jnp.split(qkv, [heads, heads + kv_heads], axis=2)
        queries = apply_rope(self.q_norm(queries), *angles)
        keys = apply_rope(self.k_norm(keys), *angles)
        cache = append(cache, layer, keys, values, positions, valid)
        out = attend(queries, cache.keys[layer], cache.values[layer], positions, config.sliding_window)
        return self.o_proj(out.reshape(*x.shape[:2], heads * config.head_dim)), cache


def attend(
    queries: Float[Array, "B T N H"],
    keys: Float[Array, "B S K H"],
    values: Float[Array, "B S K H"],
    positions: Int[Array, "B T"],
    sliding_window: int | None = None,
) -> Float[Array, "B T N H"]:
    """Causal attention of queries at `positions` over the cache; scores and softmax in float32."""
    block = query_block(queries.shape, keys.shape[1])
    if block == queries.shape[1]:
        return _attend_block(queries, keys, values, positions, sliding_window)
    batch, num_queries = queries.shape[:2]

    def one(args):
        return _attend_block(args[0], keys, values, args[1], sliding_window)

    blocked = jnp.moveaxis(queries.reshape(batch, num_queries // block, block, *queries.shape[2:]), 1, 0)
    out = jax.lax.map(one, (blocked, jnp.moveaxis(positions.reshape(batch, -1, block), 1, 0)))
    return jnp.moveaxis(out, 0, 1).reshape(queries.shape)


def query_block(shape: tuple[int, ...], num_positions: int) -> int:
    """Largest power-of-two fraction of T whose float32 scores fit in MAX_SCORE_BYTES."""
    batch, block, heads, _ = shape
    while block % 2 == 0 and batch * heads * block * num_positions * 4 > MAX_SCORE_BYTES:
        block //= 2
    return block


def _attend_block(queries, keys, values, positions, sliding_window) -> Float[Array, "B T N H"]:
    batch, num_queries, heads, head_dim = queries.shape
    kv_heads = keys.shape[2]
    grouped = queries.reshape(batch, num_queries, kv_heads, heads // kv_heads, head_dim)
    scores = jnp.einsum("btkgh,bskh->bkgts", grouped, keys, preferred_element_type=jnp.float32)
    seen = visible(positions, keys.shape[1], sliding_window)  # [B, T, S]
    scores = jnp.where(seen[:, None, None], scores * head_dim**-0.5, -jnp.inf)
    weights = jax.nn.softmax(scores, axis=-1).astype(values.dtype)
    out = jnp.einsum("bkgts,bskh->btkgh", weights, values, preferred_element_type=jnp.float32)
    return out.astype(queries.dtype).reshape(queries.shape)


def visible(positions: Int[Array, "B T"], num_positions: int, sliding_window: int | None) -> Bool[Array, "B T S"]:
    """Which KV positions a query sees: itself and those before it, within the sliding window if there is one."""
    at = jnp.arange(num_positions)[None, None, :]
    query = positions[:, :, None]
    seen = at <= query
    return seen if sliding_window is None else seen & (at > query - sliding_window)
