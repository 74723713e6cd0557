"""Random weights of a model's true shapes, made on the device and put straight where they live: no disk."""

import zlib

import jax
import jax.numpy as jnp

from jmoe import memory
from jmoe.config import ModelConfig
from jmoe.engine import Weights, trunk_state
from jmoe.experts.store import ExpertStore
from jmoe.model.families import trunk_shapes
from jmoe.synthetic import Regime, init_mean, init_std

NUM_PIECES = 8  # a layer's experts are drawn in pieces, so that the random bits need little memory


def random_weights(config: ModelConfig, regime: Regime, seed: int) -> Weights:
    """A trunk on the device and experts in pinned host memory, at the scales of `regime` (see `jmoe.synthetic`)."""
    key = jax.random.key(seed)
    flat = {
        name: _normal(_key_of(key, name), shape, init_mean(name), init_std(name, shape, regime), config.dtype)
        for name, shape in trunk_shapes(config).items()
    }
    layers = tuple(_expert_layer(config, regime, jax.random.fold_in(key, layer)) for layer in config.moe_layers)
    return Weights(trunk_state(config, flat), ExpertStore(layers))


def _key_of(key, name: str):
    return jax.random.fold_in(key, zlib.crc32(name.encode()))


@jax.jit(static_argnums=(1, 4))
def _normal(key, shape, mean, std, dtype):
    return (mean + std * jax.random.normal(key, shape, jnp.float32)).astype(dtype)


def _expert_layer(config: ModelConfig, regime: Regime, key) -> jax.Array:
    experts, width, hidden = config.num_experts, config.moe_intermediate_size, config.hidden_size
    stds = jnp.array(
        [
            init_std("gate_proj", (width, hidden), regime),
            init_std("up_proj", (width, hidden), regime),
            init_std("down_proj", (hidden, width), regime),
        ]
    )
    layer = _draw(key, experts, config.expert_shape, config.dtype, stds)
    return jax.block_until_ready(jax.device_put(layer, memory.host_sharding()))


@jax.jit(static_argnums=(1, 2, 3))
def _draw(key, num_experts, shape, dtype, stds):
    pieces = next(n for n in range(min(NUM_PIECES, num_experts), 0, -1) if num_experts % n == 0)

    def piece(part):
        noise = jax.random.normal(part, (num_experts // pieces, *shape), dtype)
        return noise * stds.reshape(1, 3, 1, 1).astype(dtype)

    return jax.lax.map(piece, jax.random.split(key, pieces)).reshape(num_experts, *shape)
