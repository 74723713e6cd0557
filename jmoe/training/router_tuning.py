"""One step of router tuning: the loss of `jmoe.training.locality`, gradients of the routers alone, AdamW."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Bool, Float, Int

from jmoe.config import ModelConfig
from jmoe.decoding.compiled import COMPILER_OPTIONS
from jmoe.decoding.sampling import token_logprobs
from jmoe.training import locality
from jmoe.training.config import RouterTuningConfig
from jmoe.training.frozen import RESIDENT, Frozen, Placement, Routed, Routers, forward


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Knobs:
    """What may differ between tunings that share one compiled step: the terms' weights and the learning rate."""

    trust: Float[Array, ""]
    reuse: Float[Array, ""]
    smoothness: Float[Array, ""]
    lagged: Float[Array, ""]
    window_entropy: Float[Array, ""]
    learning_rate: Float[Array, ""]

    @classmethod
    def of(cls, tuning: RouterTuningConfig) -> "Knobs":
        names = [field.name for field in dataclasses.fields(cls)]
        return cls(**{name: jnp.float32(getattr(tuning, name)) for name in names})


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TuningState:
    """All that changes from step to step, float32; donated to each."""

    step: Int[Array, ""]
    routers: Routers
    optimizer: optax.OptState


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Terms:
    """Means over a batch: cross-entropy in nats a token, the terms unweighted, and the overlap of consecutive tokens.

    `overlap` is the share of a token's experts that the token before had; it is what the terms are to raise.
    """

    cross_entropy: Float[Array, ""]
    trust: Float[Array, ""]
    reuse: Float[Array, ""]
    smoothness: Float[Array, ""]
    lagged: Float[Array, ""]
    window_entropy: Float[Array, ""]
    overlap: Float[Array, ""]

    def loss(self, knobs: Knobs, ramp: Float[Array, ""] | float) -> Float[Array, ""]:
        """cross-entropy + trust + ramp · locality, each with its weight."""
        names = ("reuse", "smoothness", "lagged", "window_entropy")
        local = sum(getattr(knobs, name) * getattr(self, name) for name in names)
        return self.cross_entropy + knobs.trust * self.trust + ramp * local


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Scored:
    """Of a batch of held-out windows: nats of the scored tokens, and what was routed.

    `num_reused` and `num_followed` are the choices that the token before made too, and those that have one before.
    """

    nats: Float[Array, ""]
    num_reused: Float[Array, ""]
    num_followed: Float[Array, ""]
    expert_ids: Int[Array, "L B T A"]


def terms_of(nats: Float[Array, "B T"], routed: Routed, tuning: RouterTuningConfig) -> Terms:
    """The terms of whole windows: every token counts."""
    valid = jnp.ones(nats.shape, bool)
    return Terms(
        cross_entropy=jnp.mean(nats),
        trust=locality.trust(routed.log_p, routed.log_reference, valid),
        reuse=locality.reuse(routed.log_p, routed.expert_ids, valid),
        smoothness=locality.smoothness(routed.log_p, valid),
        lagged=locality.lagged(routed.log_p, valid, tuning.lags),
        window_entropy=locality.window_entropy(routed.log_p, valid, tuning.window),
        overlap=locality.overlap(routed.expert_ids, valid),
    )


@dataclasses.dataclass(frozen=True)
class Tuner:
    """The jitted functions of a tuning. Static and quickly hashed, so that it may be `self` under jit."""

    config: ModelConfig
    tuning: RouterTuningConfig
    placement: Placement = RESIDENT

    def start(self, frozen: Frozen) -> TuningState:
        """At the checkpoint's own routers, copied, since a state is donated."""
        routers = {
            path: jnp.array(kernel, jnp.float32, copy=True) for path, kernel in frozen.routers(self.config).items()
        }
        return TuningState(jnp.zeros((), jnp.int32), routers, self._optimizer().init(routers))

    def _optimizer(self) -> optax.GradientTransformation:
        """AdamW with a learning rate that peaks at 1: the traced one of `Knobs` is multiplied in afterwards."""
        tuning = self.tuning
        floor = tuning.final_learning_rate / tuning.learning_rate if tuning.learning_rate else 0.0
        schedule = optax.warmup_cosine_decay_schedule(0.0, 1.0, tuning.warmup_steps, tuning.num_steps, floor)
        return optax.chain(
            optax.clip_by_global_norm(tuning.clip_norm),
            optax.scale_by_adam(b1=tuning.beta1, b2=tuning.beta2),
            optax.add_decayed_weights(tuning.weight_decay),
            optax.scale_by_learning_rate(schedule),
        )

    def _forward(self, frozen: Frozen, routers: Routers, tokens: Int[Array, "B T+1"]):
        """-log p of all tokens but the first, [B, T], and what was routed."""
        low = {path: kernel.astype(self.config.dtype) for path, kernel in routers.items()}
        remat = self.tuning.remat
        logits, routed = forward(self.config, frozen, low, tokens[:, :-1], placement=self.placement, remat=remat)
        return -token_logprobs(logits, tokens[:, 1:]), routed

    def loss(
        self, routers: Routers, frozen: Frozen, tokens: Int[Array, "B T+1"], knobs: Knobs, ramp: Float[Array, ""]
    ) -> tuple[Float[Array, ""], Terms]:
        """What is made small, and its terms."""
        terms = terms_of(*self._forward(frozen, routers, tokens), self.tuning)
        return terms.loss(knobs, ramp), terms

    def _step(self, frozen: Frozen, knobs: Knobs, state: TuningState, tokens: Int[Array, "G B T+1"]):
        ramp = jnp.minimum(1.0, (state.step + 1) / self.tuning.ramp_steps)
        gradient = jax.grad(self.loss, has_aux=True)

        def accumulate(total, batch: Int[Array, "B T+1"]):
            return jax.tree.map(jnp.add, total, gradient(state.routers, frozen, batch, knobs, ramp)), None

        if len(tokens) == 1:
            gradients, terms = gradient(state.routers, frozen, tokens[0], knobs, ramp)
        else:
            nothing = (
                jax.tree.map(jnp.zeros_like, state.routers),
                Terms(*[jnp.zeros(())] * len(dataclasses.fields(Terms))),
            )
            total, _ = jax.lax.scan(accumulate, nothing, tokens)
            gradients, terms = jax.tree.map(lambda value: value / len(tokens), total)
        updates, optimizer = self._optimizer().update(gradients, state.optimizer, state.routers)
        routers = jax.tree.map(lambda old, change: old + knobs.learning_rate * change, state.routers, updates)
        return TuningState(state.step + 1, routers, optimizer), terms

    @functools.partial(
        jax.jit, static_argnames=("self",), donate_argnames=("state",), compiler_options=COMPILER_OPTIONS
    )
    def steps(
        self, frozen: Frozen, knobs: Knobs, state: TuningState, tokens: Int[Array, "S G B T+1"]
    ) -> tuple[TuningState, Terms]:
        """S steps of the optimizer, each on G batches; the terms of each step, [S]."""
        return jax.lax.scan(functools.partial(self._step, frozen, knobs), state, tokens)

    @functools.partial(jax.jit, static_argnames=("self",), compiler_options=COMPILER_OPTIONS)
    def score(
        self, frozen: Frozen, routers: Routers, tokens: Int[Array, "B T+1"], scored: Bool[Array, "B T"]
    ) -> Scored:
        """How well held-out windows are predicted, and how they are routed; tokens that are not scored do not count."""
        nats, routed = self._forward(frozen, routers, tokens)
        pairs = scored[:, 1:] & scored[:, :-1]
        num_followed = pairs.sum() * float(routed.log_p.shape[0])
        return Scored(
            nats=jnp.sum(jnp.where(scored, nats, 0.0)),
            num_reused=locality.overlap(routed.expert_ids, scored) * num_followed,
            num_followed=num_followed,
            expert_ids=routed.expert_ids,
        )


def finished(tuner: Tuner, state: TuningState) -> dict[str, np.ndarray]:
    """The routers as a checkpoint holds them: in the model's dtype."""
    return {path: np.asarray(kernel.astype(tuner.config.dtype)) for path, kernel in state.routers.items()}
