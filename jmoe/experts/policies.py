"""Policies: how much keeping each expert in a slot is worth. Pure functions over arrays, traced.

A policy remembers something of what was used (`start`, `update` once a step for all layers) and says from it what each
expert of a layer is worth (`value`, at the layer's turn, from what `outlook` made of it for all layers at once before:
what stands between a router and the fetch has to be short). `jmoe.experts.residency.admit` replaces the experts of the
least value. What a policy does not remember is neither carried nor computed. Values are integers, so that ties are
ties wherever they are computed. docs/residency.md has the papers and what each policy is worth.

`used` counts the tokens of a step that went to each expert. `clock` numbers the steps that admit, from 0.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from jmoe.experts import activation

DEFAULT_POLICY = "reuse"
_NEVER = -1  # a time before all others
_LONG_AGO = 1 << 30  # more steps than any engine takes
_FREQUENCY_UNIT = 1 << 12  # one token in a fixed-point frequency
_FREQUENCY_SHIFT = 5  # f loses 1/32 of itself a step: half of it in 22


@dataclasses.dataclass(frozen=True)
class Policy:
    """One way to value experts; `state` is a pytree whose leaves are [L, ...], as are those of an outlook, of which
    `row` is one layer.

    `finish`, if there is one, is told that the batch of requests is done. `learned` names the fields of the state
    that outlive the process: see `jmoe.experts.experience`.
    """

    start: Callable[[int, int], Any]  # (L, E) -> state
    value: Callable[[Any, Int[Array, " E"], Int[Array, ""]], Int[Array, " E"]]  # (row, used, clock)
    update: Callable[[Any, Int[Array, "L E"], Int[Array, ""]], Any]  # (state, used, clock) -> state
    outlook: Callable[[Any], Any] = lambda state: state
    finish: Callable[[Any], Any] | None = None  # state -> state
    learned: tuple[str, ...] = ()


# Recency.


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Times:
    """The step of each expert's last use, and of the one before (None if the policy does not ask)."""

    last: Int[Array, "*L E"]
    before: Int[Array, "*L E"] | None = None

    def after(self, used: Int[Array, "*L E"], clock: Int[Array, ""]) -> "Times":
        before = None if self.before is None else jnp.where(used > 0, self.last, self.before)
        return Times(jnp.where(used > 0, clock, self.last), before)


def _never_used(num_layers: int, num_experts: int) -> Int[Array, "L E"]:
    return jnp.full((num_layers, num_experts), _NEVER, jnp.int32)


def _start_lru(num_layers: int, num_experts: int) -> Times:
    return Times(_never_used(num_layers, num_experts))


def _lru(row: Times, used: Int[Array, " E"], clock: Int[Array, ""]) -> Int[Array, " E"]:
    """Least recently used goes first: the time of the last use."""
    return row.after(used, clock).last


def _start_lru2(num_layers: int, num_experts: int) -> Times:
    return Times(_never_used(num_layers, num_experts), _never_used(num_layers, num_experts))


def _lru2(row: Times, used: Int[Array, " E"], clock: Int[Array, ""]) -> Int[Array, " E"]:
    """LRU-2: the time of the use before the last; what was used once only goes first, by its last use."""
    times = row.after(used, clock)
    assert times.before is not None
    return jnp.where(times.before == _NEVER, times.last - _LONG_AGO, times.before)


# Frequency.


def _start_lfu(num_layers: int, num_experts: int) -> Int[Array, "L E"]:
    return jnp.zeros((num_layers, num_experts), jnp.int32)


def _lfu(frequency: Int[Array, "*L E"], used: Int[Array, "*L E"], clock: Int[Array, ""]) -> Int[Array, "*L E"]:
    """Least frequently used goes first, with decay: f <- f - f/32 + used, in units of 1/4096."""
    return frequency - (frequency >> _FREQUENCY_SHIFT) + used * _FREQUENCY_UNIT


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class RecentFrequency:
    """What LRU and LFU remember."""

    times: Times
    frequency: Int[Array, "*L E"]


def _start_lfru(num_layers: int, num_experts: int) -> RecentFrequency:
    return RecentFrequency(_start_lru(num_layers, num_experts), _start_lfu(num_layers, num_experts))


def _lfru(row: RecentFrequency, used: Int[Array, " E"], clock: Int[Array, ""]) -> Int[Array, " E"]:
    """f / (age + 1), age in steps since the last use."""
    age = clock - row.times.after(used, clock).last
    return _lfu(row.frequency, used, clock) // (age + 1)


def _update_lfru(state: RecentFrequency, used: Int[Array, "L E"], clock: Int[Array, ""]) -> RecentFrequency:
    return RecentFrequency(state.times.after(used, clock), _lfu(state.frequency, used, clock))


# Reuse, learned from the run itself.

_DECAY = 0.5 ** (1 / 20)  # a step, of the frequency that it looks at: half of it in 20
_HORIZON = 0.6  # weight of a use from one step to the next: how far ahead it looks
_RATE = 0.03  # of learning
_BIAS = 0.3
_VALUE_UNIT = 1 << 16  # what a choice adds is less than 1: 2**15 of a step fit into 32 bits


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Reuse:
    """A linear guess, for each layer, at the use of its experts soon: weights @ features.

    Features (F = 2E + 1) are the step's use of each expert, its frequency, and 1; `trace` is their decayed sum.
    """

    weights: Float[Array, "*L E F"]
    frequency: Float[Array, "*L E"]
    trace: Float[Array, "*L F"]


def _start_reuse(num_layers: int, num_experts: int) -> Reuse:
    """Knows nothing but frequency: at first this is LFU."""
    one = jnp.eye(num_experts, dtype=jnp.float32)
    weights = jnp.concatenate([jnp.zeros_like(one), one, jnp.zeros((num_experts, 1))], axis=1)
    return Reuse(
        weights=jnp.tile(weights[None], (num_layers, 1, 1)),
        frequency=jnp.zeros((num_layers, num_experts), jnp.float32),
        trace=jnp.zeros((num_layers, 2 * num_experts + 1), jnp.float32),
    )


def _centered(used: Int[Array, "*L E"]) -> Float[Array, "*L E"]:
    return used - jnp.mean(used, axis=-1, keepdims=True, dtype=jnp.float32)


def _frequency(state: Reuse, use: Float[Array, "*L E"]) -> Float[Array, "*L E"]:
    return state.frequency * _DECAY + use * (1 - _DECAY)


def _features(use: Float[Array, "*L E"], frequency: Float[Array, "*L E"]) -> Float[Array, "*L F"]:
    return jnp.concatenate([use, frequency, jnp.full((*use.shape[:-1], 1), _BIAS)], axis=-1)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class ExpectedUse:
    """Use of each expert in the steps to come, sum_k (1-g) g^(k-1) used[t+k], less its mean over experts.

    That is weights @ features, written as `base` and what one token to each expert adds to it, in fixed point: so that
    it is the same however it is added up.
    """

    base: Int[Array, "*L E"]
    added: Int[Array, "*L E E"]  # [..., of this expert, by a token to that one]


def _expected_use(state: Reuse) -> ExpectedUse:
    num_experts = state.frequency.shape[-1]
    by_use, by_frequency, by_bias = jnp.split(state.weights, [num_experts, 2 * num_experts], axis=-1)
    base = _DECAY * jnp.sum(by_frequency * state.frequency[..., None, :], axis=-1) + _BIAS * by_bias[..., 0]
    added = by_use + (1 - _DECAY) * by_frequency
    added = added - jnp.mean(added, axis=-1, keepdims=True)  # use is centered
    return ExpectedUse(*(jnp.round(part * _VALUE_UNIT).astype(jnp.int32) for part in (base, added)))


def _reuse(row: ExpectedUse, used: Int[Array, " E"], clock: Int[Array, ""]) -> Int[Array, " E"]:
    """The expected use."""
    return row.base + jnp.sum(row.added * used[..., None, :], axis=-1)


def _update_reuse(state: Reuse, used: Int[Array, "L E"], clock: Int[Array, ""]) -> Reuse:
    """A step of normalised least mean squares towards the discounted future use, which the trace makes causal.

    The target of the step t is sum_k (1-g) g^(k-1) use[t+k]. Its gradient needs use[t+k] times features[t], summed
    over t: the same terms, gathered at the time of the use, are use[t] times trace[t], trace[t] = sum_k (1-g) g^(k-1)
    features[t-k].
    """
    use = _centered(used)
    frequency = _frequency(state, use)
    features = _features(use, frequency)
    guess = jnp.sum(state.weights * features[..., None, :], axis=-1)  # [L, E]
    rate = _RATE / (1 + jnp.sum(features**2, axis=-1))[..., None, None]
    gain = use[..., :, None] * state.trace[..., None, :] - guess[..., :, None] * features[..., None, :]
    trace = _HORIZON * state.trace + (1 - _HORIZON) * features
    return Reuse(state.weights + rate * gain, frequency, trace)


POLICIES: dict[str, Policy] = {
    "lru": Policy(_start_lru, _lru, Times.after),
    "lru2": Policy(_start_lru2, _lru2, Times.after),
    "lfu": Policy(_start_lfu, _lfu, _lfu),
    "lfru": Policy(_start_lfru, _lfru, _update_lfru),
    "activation": Policy(
        activation.start, activation.value, activation.update, finish=activation.finish, learned=("collection",)
    ),
    "reuse": Policy(_start_reuse, _reuse, _update_reuse, _expected_use, learned=("weights",)),
}
