"""The decoder. Its mixture-of-experts layers get what they multiply with from the caller: see `MoE`."""

import contextlib
import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, Protocol

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

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


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Placed:
    """Where the tokens of a step go: their positions, the rotation there, and which of them are tokens at all."""

    positions: Int[Array, "B T"]
    angles: tuple[Float[Array, "B T H/2"], Float[Array, "B T H/2"]]
    valid: Bool[Array, "B T"]

    @classmethod
    def after(
        cls, lengths: Int[Array, " B"], valid: Bool[Array, "B T"], rope_lengths: Int[Array, " B"], config: ModelConfig
    ) -> "Placed":
        """Of tokens that follow as many as `lengths`."""
        positions = lengths[:, None] + jnp.arange(valid.shape[1])[None, :]
        return cls(positions, rope_angles(config, positions, rope_lengths), valid)


class DecoderLayer(nnx.Module):
    """Pre-norm attention, then either a router (whose experts live elsewhere) or a dense MLP."""

    def __init__(self, config: ModelConfig, is_moe: bool, *, rngs: nnx.Rngs, implementation: str | None = "reference"):
        self.input_norm = RMSNorm(config.hidden_size, eps=config.rms_norm_eps, dtype=config.dtype)
        self.attention = Attention(config, rngs=rngs, implementation=implementation)
        self.post_attention_norm = RMSNorm(config.hidden_size, eps=config.rms_norm_eps, dtype=config.dtype)
        self.router = Router(config, rngs=rngs, implementation=implementation) if is_moe else None
        self.mlp = (
            None if is_moe else DenseMLP(config.hidden_size, config.intermediate_size, dtype=config.dtype, rngs=rngs)
        )

    def __call__(
        self,
        x: Float[Array, "B T D"],
        added: Float[Array, "B T D"] | None,
        placed: Placed,
        cache: KVCache,
        layer: int,
        moe: MoE,
        moe_layer: int,
        carry: Any,
    ) -> tuple[Float[Array, "B T D"], Float[Array, "B T D"], KVCache, Any]:
        """(the residual stream x + added after attention, what is to be added to it, the cache, the carry).

        `layer` is the layer's number in the cache, `moe_layer` its number in `moe`, which a dense layer does not need.
        What a layer adds is left to the next one's projection.
        """
        with jax.named_scope("attention"):
            at = cache, layer, placed.angles, placed.positions, placed.valid
            x, cache = self.attention(x, self.input_norm, *at, added)
        added, carry = self._feed_forward(x, placed.valid, moe, moe_layer, carry)
        return x, added, cache, carry

    def _feed_forward(self, x: Float[Array, "B T D"], valid, moe: MoE, moe_layer: int, carry: Any):
        """What is added to the residual stream x."""
        if self.mlp is not None:
            with jax.named_scope("mlp"):
                return self.mlp(self.post_attention_norm(x)), carry
        assert self.router is not None  # a layer has one or the other
        with jax.named_scope("router"):
            routing, rows = self.router.after_norm(x, self.post_attention_norm, valid)  # rows [B*T, D]
        with jax.named_scope("prefetch"):
            carry = moe.look_ahead(moe_layer, x.reshape(rows.shape), routing, carry)
        y, carry = moe(moe_layer, rows, routing, carry)
        return y.reshape(x.shape), carry


class Decoder(nnx.Module):
    """Token ids to hidden states, layer by layer; `implementation` is that of all kernels of the trunk.

    Without `with_layers` it is what comes before the layers and after them.
    """

    def __init__(
        self,
        config: ModelConfig,
        *,
        rngs: nnx.Rngs,
        implementation: str | None = "reference",
        with_layers: bool = True,
    ):
        num_layers = config.num_hidden_layers if with_layers else 0
        self.embed = Embedding(config.vocab_size, config.hidden_size, dtype=config.dtype, rngs=rngs)
        self.layers = nnx.List(
            [
                DecoderLayer(config, n in config.moe_layers, rngs=rngs, implementation=implementation)
                for n in range(num_layers)
            ]
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
        placed = Placed.after(cache.lengths, valid, rope_lengths, self.config)
        x, added = self.embed(token_ids), None  # [B, T, D]
        numbers = {layer: number for number, layer in enumerate(self.config.moe_layers)}
        for n, layer in enumerate(self.layers):
            x, added, cache, carry = layer(x, added, placed, cache, n, moe, numbers.get(n, -1), carry)
        return self.finish(x, added), cache.advanced(valid), carry

    def finish(self, x: Float[Array, "B T D"], added: Float[Array, "B T D"] | None) -> Float[Array, "B T D"]:
        """Hidden states from what the last layer leaves."""
        assert added is not None  # there are layers
        return self.norm(x + added)

    def unembed(self, x: Float[Array, "*n D"]) -> Float[Array, "*n V"]:
        """Logits, float32."""
        kernel = self.embed.embedding[...] if self.lm_head is None else self.lm_head.kernel[...]
        with jax.named_scope("head"), exact(self.config.dtype):
            return matmul(x, kernel, jnp.float32)


def exact(dtype: str):
    """float32 means float32: without this, matrix products on a GPU round their operands to TF32 (10 bits)."""
    return jax.default_matmul_precision("highest") if dtype == "float32" else contextlib.nullcontext()


def build_decoder(
    config: ModelConfig, params: Mapping[str, Array], implementation: str | None = "reference", with_layers: bool = True
) -> Decoder:
    """The decoder with these parameters, by flat path ("layers/0/attention/o_proj/kernel").

    `implementation` is that of `route`, of `decode_attention`, which does single tokens, of `chunk_attention`, which
    does several, and of `norm_linear`, which does few rows.

    Raises RuntimeError unless they are exactly the decoder's.
    """
    how = {"implementation": implementation, "with_layers": with_layers}
    return _built(lambda rngs: Decoder(config, rngs=rngs, **how), params)


def build_layer(
    config: ModelConfig, is_moe: bool, params: Mapping[str, Array], implementation: str | None = "reference"
) -> DecoderLayer:
    """A layer, with its parameters by their path within it ("attention/o_proj/kernel"). As `build_decoder`."""
    return _built(lambda rngs: DecoderLayer(config, is_moe, rngs=rngs, implementation=implementation), params)


def _built[M: nnx.Module](make: Callable[[nnx.Rngs], M], params: Mapping[str, Array]) -> M:
    graph, state = nnx.split(nnx.eval_shape(lambda: make(nnx.Rngs(0))), nnx.Param)
    leaves = nnx.to_flat_state(state)
    if differing := {_name(path) for path, _ in leaves} ^ set(params):
        raise RuntimeError(f"trunk parameters that are missing or not the model's: {sorted(differing)[:10]}")
    return nnx.merge(graph, nnx.from_flat_state([(path, leaf.replace(params[_name(path)])) for path, leaf in leaves]))


def params_of_layers(params: Mapping[str, Array], num_layers: int) -> tuple[list[dict[str, Array]], dict[str, Array]]:
    """A decoder's parameters as those of each layer, as `build_layer` takes them, and all others."""
    of_layers, others = [{} for _ in range(num_layers)], {}
    for path, array in params.items():
        top, _, rest = path.partition("/")
        number, _, name = rest.partition("/")
        (of_layers[int(number)] if top == "layers" else others)[name if top == "layers" else path] = array
    return of_layers, others


def _name(path: tuple) -> str:
    return "/".join(map(str, path))
