"""Attention of one new token in jnp; norm, rotation and writing are those of the model's longer chunks too."""

import jax
import jax.numpy as jnp

from kernels_pallas.chunk_attention.reference import attend


def rms_norm(x, scale, eps: float):
    """x / sqrt(mean(x²) + eps) * scale over the last axis (arXiv 1910.07467), x normed in float32, then rounded."""
    wide = x.astype(jnp.float32)
    normed = wide * jax.lax.rsqrt(jnp.mean(wide * wide, axis=-1, keepdims=True) + eps)
    return normed.astype(x.dtype) * scale.reshape((1,) * (x.ndim - 1) + (-1,))


def rotate(x, cos, sin):
    """x [B, T, N, H] with each pair (x[i], x[i + H/2]) turned by its angle; cos and sin [B, T, H/2]."""
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    cos, sin = cos[:, :, None, :], sin[:, :, None, :]
    turned = jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)
    return turned.astype(x.dtype)


def write(cached, new, positions, valid):
    """`cached` [B, S, K, H] with the valid tokens of `new` [B, T, K, H] at their positions [B, T]."""
    at = jnp.where(valid, positions, cached.shape[1])  # beyond the end: dropped
    rows = jnp.arange(at.shape[0])[:, None]
    return cached.at[rows, at].set(new.astype(cached.dtype), mode="drop", unique_indices=False)


def decode_attention(
    qkv, q_scale, k_scale, cos, sin, keys, values, positions, valid, *, num_heads, sliding_window, eps
):
    batch, _, kv_heads, head_dim = keys.shape
    heads = qkv.reshape(batch, 1, num_heads + 2 * kv_heads, head_dim)
    queries, new_keys, new_values = jnp.split(heads, [num_heads, num_heads + kv_heads], axis=2)
    cos, sin, positions, valid = cos[:, None], sin[:, None], positions[:, None], valid[:, None]
    queries = rotate(rms_norm(queries, q_scale, eps), cos, sin)
    keys = write(keys, rotate(rms_norm(new_keys, k_scale, eps), cos, sin), positions, valid)
    values = write(values, new_values, positions, valid)
    out = attend(queries, keys, values, positions, sliding_window)
    return out.reshape(batch, num_heads * head_dim), keys, values
