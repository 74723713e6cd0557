"""Random weights of a model's true shapes, made on the device and put straight where they live: no disk."""

import functools
import math
import zlib

import jax
import jax.numpy as jnp

from jmoe import memory
from jmoe.config import ModelConfig
from jmoe.engine import Weights
from jmoe.experts.store import ExpertStore
from jmoe.model.families import trunk_shapes
from jmoe.synthetic import Regime, init_mean, init_std

PIECE_BYTES = 64 * 2**20  # drawn at a time, so that the random bits need little memory beside what is made


def random_weights(config: ModelConfig, regime: Regime, seed: int) -> Weights:
    """A trunk on the device and experts in pinned host memory, at the scales of `regime` (see `jmoe.synthetic`)."""
    key = jax.random.key(seed)
    layers = tuple(_expert_layer(config, regime, jax.random.fold_in(key, layer)) for layer in config.moe_layers)
    params = {
        name: _normal(_key_of(key, name), shape, init_mean(name), init_std(name, shape, regime), config.dtype)
        for name, shape in trunk_shapes(config).items()
    }
    return Weights(params, ExpertStore(layers))


def _key_of(key: jax.Array, name: str) -> jax.Array:
    return jax.random.fold_in(key, zlib.crc32(name.encode()))


def _expert_layer(config: ModelConfig, regime: Regime, key: jax.Array) -> jax.Array:
    width, hidden = config.moe_intermediate_size, config.hidden_size
    shapes = {"gate_proj": (width, hidden), "up_proj": (width, hidden), "down_proj": (hidden, width)}
    stds = jnp.array([init_std(name, shape, regime) for name, shape in shapes.items()]).reshape(1, 3, 1, 1)
    layer = _normal(key, (config.num_experts, *config.expert_shape), 0.0, stds, config.dtype)
    return jax.block_until_ready(jax.device_put(layer, memory.host_sharding()))


@functools.partial(jax.jit, static_argnums=(1, 4))
def _normal(key: jax.Array, shape: tuple[int, ...], mean, std, dtype: str) -> jax.Array:
    """Independent normal numbers, drawn along the first axis in pieces."""
    most = max(1, PIECE_BYTES // (math.prod(shape[1:]) * 4))
    rows = next(n for n in range(min(most, shape[0]), 0, -1) if shape[0] % n == 0)

    def piece(part: jax.Array) -> jax.Array:
        return (mean + std * jax.random.normal(part, (rows, *shape[1:]), jnp.float32)).astype(dtype)

    return jax.lax.map(piece, jax.random.split(key, shape[0] // rows)).reshape(shape)
