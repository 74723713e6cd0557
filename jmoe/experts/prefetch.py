"""Which experts the layers ahead will ask for, guessed while a layer runs: what to prefetch.

Pure, traced functions of what a layer knows before its experts have answered (Speculating Experts, arXiv 2603.19289):
its residual stream r_l, which is what `post_attention_norm` gets, and its routing. A guess only says what to fetch
early; the true router decides what is computed. docs/prefetch.md has the formulas and how often they are right.

Layers here are MoE layers, counted from 0.
"""

import dataclasses
from collections.abc import Mapping
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from jmoe.config import ModelConfig
from jmoe.experts import activation
from jmoe.experts.activation import Activation
from jmoe.experts.look_ahead import Foresight
from jmoe.experts.residency import Residency
from jmoe.model.router import Routing
from kernels_pallas.decode_attention.reference import rms_norm
from kernels_pallas.norm_linear.api import norm_linear
from kernels_pallas.norm_linear.reference import matmul

Method = Literal["router", "default_vectors", "estimator"]
Methods = tuple[tuple[Method, ...], ...]  # [n - 1][l]: how layer l predicts layer l + n
METHODS: tuple[Method, ...] = ("router", "default_vectors", "estimator")
MAX_AHEAD = 2  # layers
LARGEST_LOGIT = 80.0  # of which float32 has the exponential
_MEMORY = 0.5  # below 1/2 + 1/4 + … = 1: all experts of the last step come before all that were not in it


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Estimator:
    """A correction of one layer's quasi-hidden state: q + down · silu(up · q + bias), H wide."""

    up: Float[Array, "H D"]
    bias: Float[Array, " H"]
    down: Float[Array, "D H"]

    def __call__(self, q: Float[Array, "T D"]) -> Float[Array, "T D"]:
        hidden = jax.nn.silu(matmul(q, self.up) + self.bias[None])
        return q + matmul(hidden, self.down)


Estimators = tuple[tuple[Estimator | None, ...], ...]  # in the places of Methods


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Predictor(Foresight):
    """All that a prediction needs, in the dtype of the trunk. `norms` and `routers` are the trunk's own arrays.

    `methods[n - 1][l]` is how layer l predicts layer l+n; it is static, so that a step holds that method alone.
    `estimators` have the same places. `default_vectors` are None where no method needs them. `implementation` is that
    of `norm_linear`.
    """

    norms: tuple[Float[Array, " D"], ...]  # L of them: the scale of the norm before the router
    routers: tuple[Float[Array, "E D"], ...]
    default_vectors: tuple[Float[Array, "E D"], ...] | None
    estimators: Estimators
    methods: tuple[tuple[Method, ...], ...] = dataclasses.field(metadata={"static": True})
    eps: float = dataclasses.field(metadata={"static": True})
    implementation: str | None = dataclasses.field(default="reference", metadata={"static": True})

    @property
    def num_layers(self) -> int:
        return len(self.routers)

    def odds(
        self, layer: int, residual: Float[Array, "T D"], routing: Routing, residency: Residency
    ) -> Float[Array, " E"]:
        """`predict`, one layer ahead; whatever the residency."""
        return predict(self, layer, residual, routing)


def make_predictor(
    config: ModelConfig,
    params: Mapping[str, Array],
    *,
    methods: Methods | None = None,
    default_vectors: Float[np.ndarray | Array, "L E D"] | None = None,
    estimators: Estimators | None = None,
    implementation: str | None = "reference",
) -> Predictor:
    """The predictor of a model with these trunk parameters, by flat path. Default: the plain next router everywhere.

    Raises ValueError for methods that are not one for each layer that has one ahead, or that lack their arrays, and for
    default vectors of another shape than the model's.
    """
    num_layers, names = len(config.moe_layers), [f"layers/{layer}" for layer in config.moe_layers]
    estimators = placed({}, num_layers) if estimators is None else estimators
    predictor = Predictor(
        norms=tuple(params[f"{name}/post_attention_norm/scale"] for name in names),
        routers=tuple(params[f"{name}/router/kernel"] for name in names),
        default_vectors=_as_layers(default_vectors, config),
        estimators=jax.tree.map(lambda array: jnp.asarray(array, config.dtype), estimators),
        methods=everywhere("router", num_layers) if methods is None else methods,
        eps=config.rms_norm_eps,
        implementation=implementation,
    )
    _require_methods(predictor)
    return predictor


def _as_layers(vectors: np.ndarray | Array | None, config: ModelConfig) -> tuple[Array, ...] | None:
    if vectors is None:
        return None
    expected = len(config.moe_layers), config.num_experts, config.hidden_size
    if vectors.shape != expected:
        raise ValueError(f"default vectors {list(vectors.shape)}; expected {list(expected)}: calibrate this model")
    return tuple(jnp.asarray(layer, config.dtype) for layer in vectors)


def places(num_layers: int) -> list[tuple[int, int]]:
    """(n, l) of all predictions: layer l predicts layer l + n."""
    return [(n, layer) for n in range(1, MAX_AHEAD + 1) for layer in range(num_layers - n)]


def everywhere[T](value: T, num_layers: int) -> tuple[tuple[T, ...], ...]:
    """The same in all places: [n - 1][l]."""
    return tuple((value,) * max(0, num_layers - n) for n in range(1, MAX_AHEAD + 1))


def placed[T](values: Mapping[tuple[int, int], T], num_layers: int) -> tuple[tuple[T | None, ...], ...]:
    """Values of (n, l) in their places: [n - 1][l]; None in the others."""
    return tuple(tuple(values.get((n, at)) for at in range(num_layers - n)) for n in range(1, MAX_AHEAD + 1))


def _require_methods(predictor: Predictor) -> None:
    expected = [max(0, predictor.num_layers - n) for n in range(1, MAX_AHEAD + 1)]
    given = [[len(row) for row in rows] for rows in (predictor.methods, predictor.estimators)]
    if given != [expected] * 2:
        raise ValueError(
            f"methods for {given[0]} layers and estimators for {given[1]}; expected {expected} of each, by distance, "
            f"for the {predictor.num_layers} MoE layers"
        )
    named = {method for row in predictor.methods for method in row}
    if named - set(METHODS):
        raise ValueError(f"unknown methods {sorted(named - set(METHODS))}; expected some of {', '.join(METHODS)}")
    if named - {"router"} and predictor.default_vectors is None:
        raise ValueError(f"methods {sorted(named)} need default vectors, and there are none; calibrate, or use router")
    asked = [(n, at) for n, at in places(predictor.num_layers) if predictor.methods[n - 1][at] == "estimator"]
    if lacking := [f"{at} (+{n})" for n, at in asked if predictor.estimators[n - 1][at] is None]:
        raise ValueError(f"layers {', '.join(lacking)} lack the estimator they are to predict with; use another method")


def predict(
    predictor: Predictor, layer: int, residual: Float[Array, "T D"], routing: Routing, *, ahead: int = 1
) -> Float[Array, " E"]:
    """How likely each expert of layer `layer + ahead` is asked for: the guessed router's softmax, summed over rows.

    Of one row it is not divided by its sum, which changes nothing of the order, and saves a step two kernels.

    `residual` is r of `layer`, before its experts' output is added; `routing` its routing. Both are there before any of
    its experts is, so that a prefetch can go out with the demand. Rows that are no token count for nothing.
    `layer` and `ahead` are Python numbers. Raises ValueError where there is no such layer.
    """
    logits = predicted_logits(predictor, layer, residual, routing, ahead=ahead)
    is_alone = logits.shape[0] == 1
    odds = jnp.exp(jnp.minimum(logits, LARGEST_LOGIT)) if is_alone else jax.nn.softmax(logits, axis=-1)
    return jnp.sum(jnp.where(is_token(routing), odds, 0.0), axis=0)


def predicted_logits(
    predictor: Predictor, layer: int, residual: Float[Array, "T D"], routing: Routing, *, ahead: int = 1
) -> Float[Array, "T E"]:
    """The logits that the router of layer `layer + ahead` would give, float32, as `predictor.methods` says."""
    if not (1 <= ahead <= MAX_AHEAD and 0 <= layer < predictor.num_layers - ahead):
        raise ValueError(
            f"layer={layer}, ahead={ahead}: expected ahead in 1..{MAX_AHEAD} and a layer there, of "
            f"{predictor.num_layers} MoE layers"
        )
    method = predictor.methods[ahead - 1][layer]
    stream = _stream(predictor, layer, residual, None if method == "router" else routing)
    scale, router = predictor.norms[layer + ahead], predictor.routers[layer + ahead]
    how = {"eps": predictor.eps, "out_dtype": jnp.float32, "implementation": predictor.implementation}
    if method == "estimator":
        estimator = predictor.estimators[ahead - 1][layer]
        assert estimator is not None  # make_predictor saw to it
        stream, scale = estimator(rms_norm(stream, scale, predictor.eps)), None
    logits, _, _ = norm_linear(stream, scale, router, **how)
    return logits


def quasi_hidden(
    predictor: Predictor, layer: int, residual: Float[Array, "T D"], routing: Routing | None, *, ahead: int = 1
) -> Float[Array, "T D"]:
    """q = norm(r_l + d_l), with the norm before the router of layer `layer + ahead`; d_l = 0 without a routing."""
    return rms_norm(_stream(predictor, layer, residual, routing), predictor.norms[layer + ahead], predictor.eps)


def _stream(predictor: Predictor, layer: int, residual: Float[Array, "T D"], routing: Routing | None):
    """r_l + d_l, or r_l alone without a routing."""
    if routing is None:
        return residual
    assert predictor.default_vectors is not None  # make_predictor saw to it
    return residual + default_value(predictor.default_vectors[layer], routing).astype(residual.dtype)


def default_value(vectors: Float[Array, "E D"], routing: Routing) -> Float[Array, "T D"]:
    """d = Σₑ gₑ dₑ over the experts of each row, float32: what the layer adds, if every expert gave its mean output."""
    at = jnp.minimum(routing.expert_ids, vectors.shape[0] - 1)  # a row that is no token has no weight
    chosen = vectors[at].astype(jnp.float32)  # [T, A, D]
    return jnp.sum(routing.combine_weights[:, :, None] * chosen, axis=1)


def is_token(routing: Routing) -> Bool[Array, "T 1"]:
    return routing.expert_ids[:, :1] < routing.logits.shape[-1]


# Guesses from the past, which need no hidden state, and so know something of the first layer too.


def recency(before: Float[Array, "*L E"], used: Int[Array, "*L E"]) -> Float[Array, "*L E"]:
    """Scores by last use, after a step in which `used` tokens went to each expert: the last step's experts come first.

    With as many guesses as a token has experts these are the experts of the token before.
    """
    return _MEMORY * before + (used > 0)


def from_activation(state: Activation, layer: int, *, ahead: int = 1) -> Float[Array, " E"]:
    """Scores of the experts of layer `layer + ahead` by past requests (MoE-Infinity, arXiv 2401.14361).

    `layer` -1 is before the first. Raises ValueError where there is no such layer.
    """
    num_layers = state.expected.shape[0]
    if not (ahead >= 1 and -1 <= layer < num_layers - ahead):
        raise ValueError(f"layer={layer}, ahead={ahead}: expected a layer there, of {num_layers} MoE layers")
    return activation.predict(state, layer)[layer + ahead]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class PastRequests(Foresight):
    """What past requests tell of the layers that nobody looks `ahead` to: of the first, and if that is None of all.

    The residency has to track what the policy `activation` does; whichever policy decides.
    """

    ahead: Foresight | None = None

    def odds(
        self, layer: int, residual: Float[Array, "T D"], routing: Routing, residency: Residency
    ) -> Float[Array, " E"]:
        if self.ahead is None:
            return from_activation(residency.tracked["activation"], layer)
        return self.ahead.odds(layer, residual, routing, residency)

    def odds_at_start(self, residency: Residency) -> Float[Array, " E"]:
        return from_activation(residency.tracked["activation"], -1)
