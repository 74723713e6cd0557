"""Rotary position embedding (arXiv 2104.09864) with linear, dynamic-NTK and YaRN (arXiv 2309.00071) scaling."""

import math

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from jmoe.config import ModelConfig, RopeConfig


def _exponents(head_dim: int) -> np.ndarray:
    return np.arange(0, head_dim, 2, dtype=np.float32) / head_dim


def yarn_attention_factor(rope: RopeConfig, factor: float) -> float:
    """The factor on cos and sin: 0.1 ln(factor) + 1 unless the checkpoint says otherwise (arXiv 2309.00071, §3.4)."""

    def mscale(weight: float) -> float:
        return 0.1 * weight * math.log(factor) + 1.0 if factor > 1 else 1.0

    if rope.attention_factor is not None:
        return rope.attention_factor
    if rope.mscale and rope.mscale_all_dim:
        return mscale(rope.mscale) / mscale(rope.mscale_all_dim)
    return mscale(1.0)


def _yarn(config: ModelConfig) -> tuple[np.ndarray, float]:
    rope, dim = config.rope, config.head_dim
    original = rope.original_max_position_embeddings or config.max_position_embeddings
    factor = rope.factor or config.max_position_embeddings / original

    def dim_of(num_rotations: float) -> float:
        return dim * math.log(original / (num_rotations * 2 * math.pi)) / (2 * math.log(rope.theta))

    low, high = dim_of(rope.beta_fast), dim_of(rope.beta_slow)
    if rope.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, dim - 1)
    high = high + 0.001 if low == high else high  # a ramp needs a slope
    ramp = np.clip((np.arange(dim // 2, dtype=np.float32) - low) / (high - low), 0, 1)
    inverse = 1.0 / rope.theta ** _exponents(dim)
    return (inverse / factor * ramp + inverse * (1 - ramp)).astype(np.float32), yarn_attention_factor(rope, factor)


def inverse_frequencies(config: ModelConfig) -> tuple[np.ndarray, float]:
    """[H/2] inverse frequencies of every type but "dynamic", and the factor on cos and sin."""
    rope = config.rope
    if rope.rope_type == "yarn":
        return _yarn(config)
    inverse = (1.0 / np.float32(rope.theta) ** _exponents(config.head_dim)).astype(np.float32)
    return (inverse / rope.scale if rope.rope_type == "linear" else inverse), 1.0


def _dynamic_inverse(config: ModelConfig, rope_lengths: Int[Array, " B"]) -> Float[Array, "B H/2"]:
    rope, dim, limit = config.rope, config.head_dim, config.max_position_embeddings
    lengths = jnp.maximum(rope_lengths, limit).astype(jnp.float32)
    growth = rope.scale * lengths / limit - (rope.scale - 1)
    theta = rope.theta * growth ** (dim / (dim - 2))  # [B]
    return 1.0 / theta[:, None] ** jnp.asarray(_exponents(dim))[None, :]


def rope_angles(
    config: ModelConfig, positions: Int[Array, "B T"], rope_lengths: Int[Array, " B"]
) -> tuple[Float[Array, "B T H/2"], Float[Array, "B T H/2"]]:
    """cos and sin for `positions`, float32.

    `rope_lengths` counts the tokens known when the step starts: the whole prompt in prefill, the sequence so far in
    decode. Only "dynamic" reads it: its base grows with the length, as Hugging Face does for one sequence at a time, so
    keys that were written at a shorter length keep the rotation they were written with.
    """
    if config.rope.rope_type == "dynamic":
        inverse, factor = _dynamic_inverse(config, rope_lengths)[:, None, :], 1.0  # [B, 1, H/2]
    else:
        table, factor = inverse_frequencies(config)
        inverse = jnp.asarray(table)[None, None, :]  # [1, 1, H/2]
    angles = positions.astype(jnp.float32)[:, :, None] * inverse  # [B, T, H/2]
    return jnp.cos(angles) * factor, jnp.sin(angles) * factor
