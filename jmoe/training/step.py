"""One step of training: float32 masters, the model's own dtype for the arithmetic, AdamW."""

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float, Int

from jmoe.config import ModelConfig
from jmoe.decoding.resident import forward_routed
from jmoe.decoding.sampling import token_logprobs
from jmoe.model.families import trunk_shapes
from jmoe.training.config import TrainingConfig
from jmoe.training.losses import load_balancing_loss, router_z_loss

Params = dict[str, Any]  # {"trunk": arrays by flat path, "experts": a tuple of [E, 3, F, D], one a MoE layer}
_SMALL_STD = 0.02  # of embeddings, and of routers, which so begin close to uniform


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TrainState:
    """All that changes from step to step, float32; donated to each."""

    step: Int[Array, ""]
    params: Params
    optimizer: optax.OptState


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Losses:
    """Means over a batch: cross-entropy in nats a token, and the routers' losses, means over the layers."""

    cross_entropy: Float[Array, ""]
    load_balancing: Float[Array, ""]
    router_z: Float[Array, ""]


def init_params(config: ModelConfig, seed: int) -> Params:
    """Random parameters: 1/sqrt(fan in), those that write to the residual stream smaller by sqrt(2L) (GPT-2)."""
    rng = np.random.default_rng(seed)
    depth = 1 / math.sqrt(2 * config.num_hidden_layers)

    def draw(shape: tuple[int, ...], std: float) -> np.ndarray:
        return (std * rng.standard_normal(shape)).astype(np.float32)

    def trunk(path: str, shape: tuple[int, ...]) -> np.ndarray:
        if "norm" in path:
            return np.ones(shape, np.float32)
        if path.endswith("bias"):
            return np.zeros(shape, np.float32)
        if path.startswith(("embed", "lm_head")) or "router" in path:
            return draw(shape, _SMALL_STD)
        return draw(shape, (depth if "o_proj" in path or "down_proj" in path else 1) / math.sqrt(shape[-1]))

    def experts() -> np.ndarray:
        width, hidden = config.moe_intermediate_size, config.hidden_size
        stds = np.array([1 / math.sqrt(hidden)] * 2 + [depth / math.sqrt(width)], np.float32)
        return draw((config.num_experts, *config.expert_shape), 1.0) * stds[:, None, None]

    params = {path: trunk(path, shape) for path, shape in trunk_shapes(config).items()}
    return jax.tree.map(jnp.asarray, {"trunk": params, "experts": tuple(experts() for _ in config.moe_layers)})


def make_optimizer(training: TrainingConfig) -> optax.GradientTransformation:
    """Clipping by the global norm, then AdamW; norms and biases, which are vectors, do not decay."""
    schedule = optax.warmup_cosine_decay_schedule(
        0.0, training.learning_rate, training.warmup_steps, training.num_steps, training.final_learning_rate
    )
    decayed = {"weight_decay": training.weight_decay, "mask": lambda params: jax.tree.map(lambda p: p.ndim > 1, params)}
    return optax.chain(
        optax.clip_by_global_norm(training.clip_norm),
        optax.adamw(schedule, b1=training.beta1, b2=training.beta2, **decayed),
    )


@dataclasses.dataclass(frozen=True)
class Trainer:
    """The jitted functions of a training. Static and quickly hashed, so that it may be `self` under jit."""

    config: ModelConfig
    training: TrainingConfig

    def start(self) -> TrainState:
        params = init_params(self.config, self.training.seed)
        return TrainState(jnp.zeros((), jnp.int32), params, make_optimizer(self.training).init(params))

    def _nats(self, params: Params, tokens: Int[Array, "B T+1"]):
        """-log p of all tokens but the first, [B, T], and the routings."""
        low = jax.tree.map(lambda leaf: leaf.astype(self.config.dtype), params)
        logits, routings = forward_routed(
            self.config, low["trunk"], low["experts"], tokens[:, :-1], implementation="dense"
        )
        return -token_logprobs(logits, tokens[:, 1:]), routings

    def loss(self, params: Params, tokens: Int[Array, "B T+1"]) -> tuple[Float[Array, ""], Losses]:
        """What is made small, and its parts."""
        nats, routings = self._nats(params, tokens)
        losses = Losses(
            cross_entropy=jnp.mean(nats),
            load_balancing=jnp.mean(jnp.stack([load_balancing_loss(routing) for routing in routings])),
            router_z=jnp.mean(jnp.stack([router_z_loss(routing) for routing in routings])),
        )
        training = self.training
        weighted = training.load_balancing_weight * losses.load_balancing + training.router_z_weight * losses.router_z
        return losses.cross_entropy + weighted, losses

    @jax.jit(static_argnames=("self",), donate_argnames=("state",))
    def step(self, state: TrainState, tokens: Int[Array, "B T+1"]) -> tuple[TrainState, Losses]:
        """One step of the optimizer."""
        gradients, losses = jax.grad(self.loss, has_aux=True)(state.params, tokens)
        updates, optimizer = make_optimizer(self.training).update(gradients, state.optimizer, state.params)
        params: Any = optax.apply_updates(state.params, updates)
        return TrainState(state.step + 1, params, optimizer), losses

    @jax.jit(static_argnames=("self",))
    def held_out_nats(self, params: Params, tokens: Int[Array, "B T+1"], scored: Array) -> Float[Array, ""]:
        """Sum of -log p over the scored tokens, in nats."""
        nats, _ = self._nats(params, tokens)
        return jnp.sum(jnp.where(scored, nats, 0.0))
