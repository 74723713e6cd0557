"""Grouped-query attention with q/k norms over a KV cache."""

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from jmoe.config import ModelConfig
from jmoe.model.kv_cache import KVCache, append, replace_layer
from jmoe.model.layers import Linear, RMSNorm
from kernels_pallas.chunk_attention.api import chunk_attention
from kernels_pallas.decode_attention import reference
from kernels_pallas.decode_attention.api import decode_attention


class Attention(nnx.Module):
    """softmax(q kᵀ / sqrt(H)) v over the cached and the new positions; q, k and v are one projection.

    `implementation` is that of `decode_attention`, which does single tokens, of `chunk_attention`, which does several,
    and of the projections of few rows.
    """

    def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs, implementation: str | None = "reference"):
        heads, kv_heads, head_dim = config.num_attention_heads, config.num_key_value_heads, config.head_dim
        shared = {
            "dtype": config.dtype,
            "use_bias": config.attention_bias,
            "rngs": rngs,
            "implementation": implementation,
        }
        self.qkv_proj = Linear(config.hidden_size, (heads + 2 * kv_heads) * head_dim, **shared)
        self.o_proj = Linear(heads * head_dim, config.hidden_size, **shared)
        self.q_norm = RMSNorm(head_dim, eps=config.rms_norm_eps, dtype=config.dtype)
        self.k_norm = RMSNorm(head_dim, eps=config.rms_norm_eps, dtype=config.dtype)
        self.config, self.implementation = config, implementation

    def __call__(
        self,
        x: Float[Array, "B T D"],
        norm: RMSNorm,
        cache: KVCache,
        layer: int,
        angles,
        positions: Int[Array, "B T"],
        valid,
        added: Float[Array, "B T D"] | None = None,
    ) -> tuple[Float[Array, "B T D"], KVCache]:
        """x + attention(norm(x)), the residual stream, for x + added if something is still to be added to x."""
        mix = self._mix_one if x.shape[1] == 1 else self._mix_chunk
        qkv, x = self.qkv_proj.after_norm(x, norm, added)
        mixed, cache = mix(qkv, cache, layer, angles, positions, valid)
        return self.o_proj(mixed, x), cache

    def _mix_one(self, qkv: Float[Array, "B 1 Q"], cache: KVCache, layer: int, angles, positions, valid):
        cos, sin = angles
        out, keys, values = decode_attention(
            qkv[:, 0],
            self.q_norm.scale[...],
            self.k_norm.scale[...],
            cos[:, 0],
            sin[:, 0],
            cache.keys[layer],
            cache.values[layer],
            positions[:, 0],
            valid[:, 0],
            num_heads=self.config.num_attention_heads,
            sliding_window=self.config.sliding_window,
            eps=self.config.rms_norm_eps,
            implementation=self.implementation,
        )
        return out[:, None], replace_layer(cache, layer, keys, values)

    def _mix_chunk(self, qkv: Float[Array, "B T Q"], cache: KVCache, layer: int, angles, positions, valid):
        config = self.config
        heads, kv_heads = config.num_attention_heads, config.num_key_value_heads
        qkv = qkv.reshape(*qkv.shape[:2], heads + 2 * kv_heads, config.head_dim)  # [B, T, N+2K, H]
        queries, keys, values = jnp.split(qkv, [heads, heads + kv_heads], axis=2)
        queries = reference.rotate(self.q_norm(queries), *angles)
        keys = reference.rotate(self.k_norm(keys), *angles)
        cache = append(cache, layer, keys, values, positions, valid)
        out = chunk_attention(
            queries,
            cache.keys[layer],
            cache.values[layer],
            positions,
            sliding_window=config.sliding_window,
            implementation=self.implementation,
        )
        return out.reshape(*out.shape[:2], heads * config.head_dim), cache
