"""The decoder. Its mixture-of-experts layers get what they multiply with from the caller: see `MoE`."""

import contextlib
from collections.abc import Mapping
from typing import Any, Protocol

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from jmoe.config import ModelConfig
from jmoe.model.attention import Attention
from jmoe.model.kv_cache import KVCache
from jmoe.model.layers import DenseMLP, Embedding, Linear, RMSNorm
from jmoe.model.rope import rope_angles
from jmoe.model.router import Router, Routing
from kernels_pallas.norm_linear.reference import matmul


class MoE(Protocol):
    """Applies the experts of one layer: (index among the MoE layers, rows, routing, carry) → (rows, carry).

    The carry is whatever state the experts need from layer to layer; the decoder only hands it on.
    """

    def __call__(self, moe_layer: int, x: Float[Array, "T D"], routing: Routing, carry: Any) -> tuple[Array, Any]: ...

    def look_ahead(self, moe_layer: int, residual: Float[Array, "T D"], routing: Routing, carry: Any) -> Any:
        """The carry, once a layer has routed and before its experts answer: time to guess what comes next.

        `residual` is what the norm before the router got. By default nothing is done.
        """
        return carry


class DecoderLayer(nnx.Module):
    """Pre-norm attention, then either a router (whose experts live elsewhere) or a dense MLP."""

    def __init__(self, config: ModelConfig, layer: int, *, rngs: nnx.Rngs, implementation: str | None = "reference"):
        self.input_norm = RMSNorm(config.hidden_size, eps=config.rms_norm_eps, dtype=config.dtype)
        self.attention = Attention(config, rngs=rngs, implementation=implementation)
        self.post_attention_norm = RMSNorm(config.hidden_size, eps=config.rms_norm_eps, dtype=config.dtype)
        is_moe = layer in config.moe_layers
        self.router = Router(config, rngs=rngs, implementation=implementation) if is_moe else None
        self.mlp = (
            None if is_moe else DenseMLP(config.hidden_size, config.intermediate_size, dtype=config.dtype, rngs=rngs)
        )


class Decoder(nnx.Module):
    """Token ids to hidden states, layer by layer; `implementation` is that of all kernels of the trunk."""

    def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs, implementation: str | None = "reference"):
        self.embed = Embedding(config.vocab_size, config.hidden_size, dtype=config.dtype, rngs=rngs)
        self.layers = nnx.List(
            [DecoderLayer(config, n, rngs=rngs, implementation=implementation) for n in range(config.num_hidden_layers)]
        )
        self.norm = RMSNorm(config.hidden_size, eps=config.rms_norm_eps, dtype=config.dtype)
        tied = config.tie_word_embeddings
        self.lm_head = None if tied else Linear(config.hidden_size, config.vocab_size, dtype=config.dtype, rngs=rngs)
        self.config = config

    def __call__(
        self,
        token_ids: Int[Array, "B T"],
        valid: Array,
        rope_lengths: Int[Array, " B"],
        cache: KVCache,
        moe: MoE,
        carry: Any,
    ) -> tuple[Float[Array, "B T D"], KVCache, Any]:
        """Hidden states (before the head) of the tokens that follow what the cache holds.

        `valid` marks the tokens of each row; the valid ones come first. The others change nothing.
        """
        with exact(self.config.dtype):
            return self._forward(token_ids, valid, rope_lengths, cache, moe, carry)

    def _forward(self, token_ids, valid, rope_lengths, cache: KVCache, moe: MoE, carry: Any):
        positions = cache.lengths[:, None] + jnp.arange(token_ids.shape[1])[None, :]
        angles = rope_angles(self.config, positions, rope_lengths)
        x, added = self.embed(token_ids), None  # [B, T, D]; a layer leaves what it adds to the next one's projection
        for n, layer in enumerate(self.layers):
            with jax.named_scope("attention"):
                x, cache = layer.attention(x, layer.input_norm, cache, n, angles, positions, valid, added)
            added, carry = self._feed_forward(n, x, valid, moe, carry)
        assert added is not None  # there are layers
        x = x + added
        lengths = cache.lengths + jnp.sum(valid, axis=1, dtype=jnp.int32)
        return self.norm(x), KVCache(cache.keys, cache.values, lengths), carry

    def _feed_forward(self, n: int, x: Float[Array, "B T D"], valid, moe: MoE, carry: Any):
        """What is added to the residual stream x."""
        layer = self.layers[n]
        if layer.mlp is not None:
            with jax.named_scope("mlp"):
                return layer.mlp(layer.post_attention_norm(x)), carry
        moe_layer = self.config.moe_layers.index(n)
        assert layer.router is not None  # a layer has one or the other
        with jax.named_scope("router"):
            routing, rows = layer.router.after_norm(x, layer.post_attention_norm, valid)  # rows [B*T, D]
        with jax.named_scope("prefetch"):
            carry = moe.look_ahead(moe_layer, x.reshape(rows.shape), routing, carry)
        y, carry = moe(moe_layer, rows, routing, carry)
        return y.reshape(x.shape), carry

    def unembed(self, x: Float[Array, "*n D"]) -> Float[Array, "*n V"]:
        """Logits, float32."""
        kernel = self.embed.embedding[...] if self.lm_head is None else self.lm_head.kernel[...]
        with jax.named_scope("head"), exact(self.config.dtype):
            return matmul(x, kernel, jnp.float32)


def exact(dtype: str):
    """float32 means float32: without this, matrix products on a GPU round their operands to TF32 (10 bits)."""
    return jax.default_matmul_precision("highest") if dtype == "float32" else contextlib.nullcontext()


def build_decoder(
    config: ModelConfig, params: Mapping[str, Array], implementation: str | None = "reference"
) -> Decoder:
    """The decoder with these parameters, by flat path ("layers/0/attention/o_proj/kernel").

    `implementation` is that of `route`, of `decode_attention`, which does single tokens, of `chunk_attention`, which
    does several, and of `norm_linear`, which does few rows.

    Raises RuntimeError unless they are exactly the decoder's.
    """
    graph, state = nnx.split(
        nnx.eval_shape(lambda: Decoder(config, rngs=nnx.Rngs(0), implementation=implementation)), nnx.Param
    )
    leaves = nnx.to_flat_state(state)
    if differing := {_name(path) for path, _ in leaves} ^ set(params):
        raise RuntimeError(f"trunk parameters that are missing or not the model's: {sorted(differing)[:10]}")
    return nnx.merge(graph, nnx.from_flat_state([(path, leaf.replace(params[_name(path)])) for path, leaf in leaves]))


def _name(path: tuple) -> str:
    return "/".join(map(str, path))
