"""From logits to the next token."""

import dataclasses
import math
from collections.abc import Sequence
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

Mode = Literal["greedy", "full", "truncated"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class SamplingParams:
    """What a request asks for. temperature 0 is greedy; top_k 0, top_p 1 and min_p 0 leave everything in.

    The transforms apply in this order: temperature, top_k, top_p (arXiv 1904.09751), min_p (arXiv 2407.01082).
    `stop` strings end the text before they appear in it. `ignore_eos` generates past the end of sequence.
    """

    max_new_tokens: int = 128
    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    seed: int = 0
    stop: tuple[str, ...] = ()
    ignore_eos: bool = False

    def __post_init__(self) -> None:
        object.__setattr__(self, "stop", (self.stop,) if isinstance(self.stop, str) else tuple(self.stop))
        _check("max_new_tokens", self.max_new_tokens, self.max_new_tokens >= 1, "at least 1")
        finite = math.isfinite(self.temperature) and self.temperature >= 0
        _check("temperature", self.temperature, finite, "a number of at least 0")
        _check("top_k", self.top_k, self.top_k >= 0, "at least 0 (0 = off)")
        _check("top_p", self.top_p, 0 < self.top_p <= 1, "above 0 and at most 1")
        _check("min_p", self.min_p, 0 <= self.min_p <= 1, "from 0 to 1")
        _check("seed", self.seed, 0 <= self.seed < 2**32, "from 0 to 2**32 - 1")
        _check("stop", self.stop, all(self.stop), "non-empty strings")

    @property
    def is_greedy(self) -> bool:
        return self.temperature == 0

    @property
    def truncates(self) -> bool:
        return not self.is_greedy and (self.top_k > 0 or self.top_p < 1 or self.min_p > 0)


def _check(name: str, value, good: bool, expected: str) -> None:
    if not good:
        raise ValueError(f"{name}={value!r} must be {expected}")


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Sampling:
    """The requests of a batch as arrays, so that changing an option compiles nothing."""

    temperature: Float[Array, " B"]
    top_k: Int[Array, " B"]
    top_p: Float[Array, " B"]
    min_p: Float[Array, " B"]
    seed: Int[Array, " B"]
    eos_ids: Int[Array, "B M"]  # filled up with NO_TOKEN


NO_TOKEN = -1


def batch_sampling(requests: Sequence[SamplingParams], eos_ids: Sequence[int]) -> Sampling:
    """One row a request; sequence b of a batch draws as a batch of one with the same seed would."""
    eos = list(eos_ids) or [NO_TOKEN]
    rows = [[NO_TOKEN] * len(eos) if request.ignore_eos else eos for request in requests]

    def column(name: str, dtype) -> Array:
        return jnp.asarray(np.array([getattr(request, name) for request in requests], dtype))

    return Sampling(
        temperature=column("temperature", np.float32),
        top_k=column("top_k", np.int32),
        top_p=column("top_p", np.float32),
        min_p=column("min_p", np.float32),
        seed=column("seed", np.uint32),
        eos_ids=jnp.asarray(np.array(rows, np.int32)),
    )


def sampling_mode(requests: Sequence[SamplingParams]) -> Mode:
    """The least work that serves every request of a batch. The mode never changes what a request draws."""
    if all(request.is_greedy for request in requests):
        return "greedy"
    return "truncated" if any(request.truncates for request in requests) else "full"


def cutoff(probabilities: Float[Array, "B V"], sampling: Sampling) -> Int[Array, " B"]:
    """How many of the descending probabilities survive top_k, top_p and min_p; at least one."""
    num_tokens = probabilities.shape[1]
    rank = jnp.arange(num_tokens)[None, :]
    keep = rank < jnp.where(sampling.top_k > 0, sampling.top_k, num_tokens)[:, None]
    left = jnp.where(keep, probabilities, 0.0)
    left = left / jnp.sum(left, axis=1, keepdims=True)
    before = jnp.cumsum(left, axis=1) - left
    keep &= (before < sampling.top_p[:, None]) & (left >= sampling.min_p[:, None] * left[:, :1])
    return jnp.maximum(jnp.sum(keep, axis=1, dtype=jnp.int32), 1)


def truncate(logits: Float[Array, "B V"], sampling: Sampling) -> Float[Array, "B V"]:
    """-inf for the tokens that top_k, top_p and min_p leave out. Tokens that tie with the last kept one stay."""
    descending = -jnp.sort(-logits, axis=1)
    last = cutoff(jax.nn.softmax(descending, axis=1), sampling) - 1
    smallest = jnp.take_along_axis(descending, last[:, None], axis=1)
    return jnp.where(logits >= smallest, logits, -jnp.inf)


def token_logprobs(logits: Float[Array, "*n V"], tokens: Int[Array, "*n"]) -> Float[Array, "*n"]:
    """log softmax(logits)[token], natural."""
    chosen = jnp.take_along_axis(logits, tokens[..., None], axis=-1)[..., 0]
    return chosen - jax.nn.logsumexp(logits, axis=-1)


def sample(
    logits: Float[Array, "B V"], sampling: Sampling, positions: Int[Array, " B"], mode: Mode
) -> tuple[Int[Array, " B"], Float[Array, " B"]]:
    """The next token of each sequence and its log-probability under the untransformed logits.

    The randomness of a token depends on its request's seed and its position alone: not on the batch, not on the chunk.
    """
    tokens = jnp.argmax(logits, axis=1).astype(jnp.int32)
    if mode != "greedy":
        tokens = jnp.where(sampling.temperature == 0, tokens, _draw(logits, sampling, positions, mode))
    return tokens, token_logprobs(logits, tokens)


def _draw(logits, sampling: Sampling, positions, mode: Mode) -> Int[Array, " B"]:
    """argmax(logits / temperature + Gumbel noise), a draw from the softmax (Maddison et al., arXiv 1411.0030)."""
    warm = logits / jnp.where(sampling.temperature == 0, 1.0, sampling.temperature)[:, None]
    if mode == "truncated":
        warm = truncate(warm, sampling)

    def noise(seed, position):
        return jax.random.gumbel(jax.random.fold_in(jax.random.key(seed), position), warm.shape[1:])

    return jnp.argmax(warm + jax.vmap(noise)(sampling.seed, positions), axis=1).astype(jnp.int32)
