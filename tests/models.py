"""Small models for tests, their weights in memory."""

import dataclasses
import functools

import jax
import numpy as np

from jmoe import memory
from jmoe.config import ModelConfig, RuntimeConfig
from jmoe.engine import Engine, Weights
from jmoe.experts.store import ExpertStore
from tools.random_weights import random_weights

SMALL = ModelConfig(
    vocab_size=97,
    hidden_size=32,
    intermediate_size=48,
    moe_intermediate_size=16,
    num_hidden_layers=3,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=8,
    num_experts=8,
    num_experts_per_tok=2,
    norm_topk_prob=True,
    mlp_only_layers=(1,),
    dtype="float32",
)
MAX_SEQ_LEN = 64


@functools.cache
def weights(config: ModelConfig = SMALL, seed: int = 0) -> Weights:
    return random_weights(config, "flat", seed)


def on_device(weights: Weights) -> Weights:
    layers = tuple(jax.device_put(layer, memory.device_sharding()) for layer in weights.store.layers)
    return dataclasses.replace(weights, store=ExpertStore(layers))


def engine(config: ModelConfig = SMALL, **runtime) -> Engine:
    options = {"expert_slots": 4, "staging_slots": 3, "max_seq_len": MAX_SEQ_LEN, "measure_link": False, **runtime}
    return Engine.start(config, RuntimeConfig(**options), lambda: weights(config))


def prompts(*lengths: int, config: ModelConfig = SMALL, seed: int = 0) -> list[list[int]]:
    rng = np.random.default_rng(seed)
    return [rng.integers(0, config.vocab_size, length).tolist() for length in lengths]
