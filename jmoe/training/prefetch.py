"""What a model's layers did with some tokens, and from that what predicts their experts: see docs/prefetch.md."""

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float, Int

from jmoe.config import ModelConfig
from jmoe.decoding.compiled import COMPILER_OPTIONS
from jmoe.experts.layer import ResidentExperts
from jmoe.experts.prefetch import Estimator
from jmoe.model.decoder import build_decoder, exact
from jmoe.model.kv_cache import init_kv_cache
from jmoe.model.rope import rope_angles
from jmoe.model.router import Routing


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Observation:
    """What the L MoE layers saw and chose, of N tokens of one or several sequences, in order.

    `residuals` are r_l: what the norm before the router gets. `early_logits` are what the router would have said before
    the layer's attention. `output_sums` adds up each expert's output over the tokens that chose it, unweighted,
    float32; `num_chosen` counts them.
    """

    residuals: Float[Array, "L N D"]
    expert_ids: Int[Array, "L N A"]
    combine_weights: Float[Array, "L N A"]
    logits: Float[Array, "L N E"]
    early_logits: Float[Array, "L N E"]
    output_sums: Float[Array, "L E D"]
    num_chosen: Int[Array, "L E"]

    def routing(self, layer: int) -> Routing:
        return Routing(self.expert_ids[layer], self.combine_weights[layer], self.logits[layer])


@functools.partial(jax.jit, static_argnames=("config",), compiler_options=COMPILER_OPTIONS)
def observe(
    config: ModelConfig,
    params: Mapping[str, Array],
    expert_layers: tuple[Float[Array, "E 3 F D"], ...],
    token_ids: Int[Array, "1 T"],
) -> Observation:
    """One sequence, with every expert on the device. The decoder's own layers, with a look between them."""
    decoder, experts = build_decoder(config, params), ResidentExperts(expert_layers, implementation="reference")
    positions = jnp.arange(token_ids.shape[1])[None]
    angles = rope_angles(config, positions, jnp.full((1,), token_ids.shape[1], jnp.int32))
    cache, valid, seen = init_kv_cache(config, *token_ids.shape), jnp.ones(token_ids.shape, bool), []
    with exact(config.dtype):
        x = decoder.embed(token_ids)
        for n, layer in enumerate(decoder.layers):
            residual, cache = layer.attention(x, layer.input_norm, cache, n, angles, positions, valid)
            rows = layer.post_attention_norm(residual)[0]
            if layer.router is None:
                assert layer.mlp is not None  # a layer has one or the other
                added = layer.mlp(rows)
            else:
                routing, moe_layer = layer.router(rows), config.moe_layers.index(n)
                added, _ = experts(moe_layer, rows, routing, None)
                early = layer.router.logits(layer.post_attention_norm(x)[0])
                seen.append(_seen(residual[0], routing, early, rows, expert_layers[moe_layer]))
            x = residual + added[None]
    return jax.tree.map(lambda *leaves: jnp.stack(leaves), *seen)


def _seen(
    residual, routing: Routing, early_logits, rows: Float[Array, "T D"], experts: Float[Array, "E 3 F D"]
) -> Observation:
    every = jnp.arange(experts.shape[0]).reshape(1, 1, -1)
    chosen = jnp.any(routing.expert_ids[:, :, None] == every, axis=1)  # [T, E]
    sums = output_sums(rows, experts, chosen)
    counts = jnp.sum(chosen, axis=0, dtype=jnp.int32)
    chosen_by = routing.expert_ids, routing.combine_weights, routing.logits
    return Observation(residual, *chosen_by, early_logits, sums, counts)


def output_sums(rows: Float[Array, "T D"], experts: Float[Array, "E 3 F D"], chosen) -> Float[Array, "E D"]:
    """Each expert's output summed over its `chosen` [T, E] rows, float32: down is linear, so once for the sum."""

    def of_one(weights_and_chosen):
        weights, mine = weights_and_chosen
        gate, up = (jnp.dot(rows, kernel.T, preferred_element_type=jnp.float32) for kernel in weights[:2])
        hidden = jnp.sum(jnp.where(mine[:, None], jax.nn.silu(gate) * up, 0.0), axis=0)
        return hidden @ weights[2].astype(jnp.float32)

    return jax.lax.map(of_one, (experts, chosen.T))


def join(observations: Sequence[Observation]) -> Observation:
    """Those of several sequences, in host memory, one after the other. Raises ValueError for none."""
    if not observations:
        raise ValueError("no observations to join; observe at least one sequence")
    observations = [jax.device_get(observation) for observation in observations]
    rows = ("residuals", "expert_ids", "combine_weights", "logits", "early_logits")
    sums = ("output_sums", "num_chosen")
    joined: dict[str, Any] = {name: np.concatenate([getattr(o, name) for o in observations], axis=1) for name in rows}
    joined |= {name: np.sum([getattr(o, name) for o in observations], axis=0) for name in sums}
    return Observation(**joined)


def default_vectors(observation: Observation) -> np.ndarray:
    """Each expert's mean output over the tokens that chose it, float32 [L, E, D].

    An expert that no token chose gets the mean over all choices of its layer.
    """
    sums, counts = np.asarray(observation.output_sums, np.float32), np.asarray(observation.num_chosen)[:, :, None]
    overall = sums.sum(axis=1, keepdims=True) / np.maximum(counts.sum(axis=1, keepdims=True), 1)
    return np.where(counts > 0, sums / np.maximum(counts, 1), overall)


# Estimators.


@dataclasses.dataclass(frozen=True, kw_only=True)
class EstimatorTraining:
    """Adam with a cosine down to 0, on batches of rows drawn with replacement, the same rows everywhere."""

    width: int = 64
    num_steps: int = 400
    batch_size: int = 512
    learning_rate: float = 1e-3
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("width", "num_steps", "batch_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} must be at least 1")
        if not self.learning_rate > 0:
            raise ValueError(f"learning_rate={self.learning_rate} must be above 0")

    @property
    def optimizer(self) -> optax.GradientTransformation:
        return optax.adam(optax.cosine_decay_schedule(self.learning_rate, self.num_steps))


def start_estimators(training: EstimatorTraining, num_places: int, width: int) -> Estimator:
    """Those of n places, stacked, float32. They correct nothing yet: `down` is 0."""
    rng, hidden = np.random.default_rng(training.seed), training.width
    up = rng.standard_normal((num_places, hidden, width)).astype(np.float32) / np.float32(np.sqrt(width))
    return Estimator(jnp.asarray(up), jnp.zeros((num_places, hidden)), jnp.zeros((num_places, width, hidden)))


def divergence(
    estimators: Estimator, q: Float[Array, "n T D"], routers: Float[Array, "n E D"], logits: Float[Array, "n T E"]
) -> Float[Array, " n"]:
    """KL(softmax(logits) ‖ softmax of the estimated ones) in nats a token, of stacked places."""
    corrected = jax.vmap(Estimator.__call__)(estimators, q)
    guessed = jax.nn.log_softmax(jnp.einsum("ntd,ned->nte", corrected, routers), axis=-1)
    true = jax.nn.log_softmax(logits, axis=-1)
    return jnp.mean(jnp.sum(jnp.exp(true) * (true - guessed), axis=-1), axis=-1)


@functools.partial(jax.jit, static_argnames=("training",), donate_argnames=("estimators", "state"))
def _step(training: EstimatorTraining, estimators: Any, state: optax.OptState, q, routers, logits):
    def loss(estimators: Estimator) -> Float[Array, ""]:
        return jnp.sum(divergence(estimators, q, routers, logits))

    nats, gradients = jax.value_and_grad(loss)(estimators)
    updates, state = training.optimizer.update(gradients, state, estimators)
    return optax.apply_updates(estimators, updates), state, nats


def train_estimators(
    training: EstimatorTraining,
    q: np.ndarray,
    routers: np.ndarray,
    logits: np.ndarray,
    progress: Callable[[], object] = lambda: None,
) -> list[Estimator]:
    """One for each of n places: q [n, N, D], and the true `logits` [n, N, E] of the routers [n, E, D] that they meet.

    `progress` is called after each step. Raises RuntimeError if the loss is no longer a number.
    """
    estimators: Any = start_estimators(training, len(q), q.shape[-1])
    state, rng, nats = training.optimizer.init(estimators), np.random.default_rng([training.seed, 1]), jnp.zeros(())
    for _ in range(training.num_steps):
        at = rng.integers(0, q.shape[1], training.batch_size)
        estimators, state, nats = _step(training, estimators, state, q[:, at], routers, logits[:, at])
        progress()
    if not np.isfinite(float(nats)):
        raise RuntimeError(f"the loss of the estimators is {float(nats)}: training has diverged; lower learning_rate")
    return [jax.tree.map(lambda leaf, n=n: np.asarray(leaf[n]), estimators) for n in range(len(q))]
