"""How often predictions of experts are right: recall and precision by layer, of each predictor, on observed tokens.

A sequence's first token is never scored: what guesses from the past knows nothing of it.
"""

import dataclasses
import functools
from collections.abc import Mapping, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from jmoe.experts import activation
from jmoe.experts.prefetch import (
    MAX_AHEAD,
    METHODS,
    Method,
    Methods,
    Predictor,
    everywhere,
    from_activation,
    predicted_logits,
    recency,
)
from jmoe.model.router import Routing
from jmoe.training.prefetch import Observation

MIN_GAIN = 0.01  # of recall: what a dearer method has to bring to be chosen

Rates = dict[str, np.ndarray]  # by predictor, [L] by the layer that is predicted; nan where there is no prediction


@functools.partial(jax.jit, static_argnames=("num_guesses",))
def num_found(scores: Float[Array, "T E"], expert_ids: Int[Array, "T A"], num_guesses: int) -> Int[Array, ""]:
    """How many of the rows' experts are among as many of the highest scores."""
    guesses = jax.lax.top_k(scores, num_guesses)[1]
    return jnp.sum(guesses[:, None, :] == expert_ids[:, :, None])


def recall(scores: Float[Array, "T E"], expert_ids: Int[Array, "T A"], num_guesses: int) -> float:
    """Share of the rows' experts that are among `num_guesses` guesses a row; 1 for an oracle with A of them or more."""
    return float(num_found(scores, expert_ids, num_guesses)) / expert_ids.size


@functools.partial(jax.jit, static_argnames=("layer", "ahead"))
def _lookahead(predictor: Predictor, layer: int, ahead: int, residual, routing: Routing) -> Float[Array, "T E"]:
    return predicted_logits(predictor, layer, residual, routing, ahead=ahead)


def of_lookahead(
    predictor: Predictor, sequences: Sequence[Observation], num_guesses: int, ahead: int = 1
) -> np.ndarray:
    """Recall by the layer that is predicted, [L]; nan for the first `ahead` layers."""
    recalls = np.full(predictor.num_layers, np.nan)
    for layer in range(predictor.num_layers - ahead):
        found = 0
        for seen in sequences:
            logits = _lookahead(predictor, layer, ahead, seen.residuals[layer], seen.routing(layer))
            found += int(num_found(logits[1:], seen.expert_ids[layer + ahead][1:], num_guesses))
        recalls[layer + ahead] = found / num_choices(sequences)
    return recalls


def num_choices(sequences: Sequence[Observation]) -> int:
    """How many experts a layer of these sequences asked for, first tokens left out. Raises ValueError for none."""
    total = sum(seen.expert_ids[0][1:].size for seen in sequences)
    if not total:
        raise ValueError(f"nothing to measure in {len(sequences)} sequences; expected one of 2 tokens or more")
    return total


# The layer's own router, before its attention.


def of_after_experts(sequences: Sequence[Observation], num_guesses: int) -> np.ndarray:
    """Recall by layer, [L], of what its router says once the layers before are done: for comparison."""
    pairs = [zip(seen.early_logits, seen.expert_ids, strict=True) for seen in sequences]
    found = [[int(num_found(logits[1:], ids[1:], num_guesses)) for logits, ids in layers] for layers in pairs]
    return np.sum(found, axis=0) / num_choices(sequences)


# Guesses among what is not resident.


def of_missing(
    predictor: Predictor, taught: Sequence[Observation], sequences: Sequence[Observation], num_slots: int
) -> Rates:
    """How often, with so many slots a layer and LRU, the best guess of those that are not resident is asked for.

    That is what a prefetch of one expert sees. `missing` is how often any expert is missing: what an oracle gets. The
    slots begin with the first experts, and are kept from sequence to sequence, as is what `activation` knows, whose
    collection begins with the taught sequences.
    """
    num_layers, num_experts = sequences[0].logits.shape[0], sequences[0].logits.shape[-1]
    last_use = jnp.tile(-jnp.arange(num_experts, dtype=jnp.int32), (num_layers, 1))
    totals: dict[str, np.ndarray] = {}
    past = _activation_after(taught, num_layers, num_experts)
    for seen in sequences:
        used, scores = used_experts(seen), _scores_of_each(predictor, seen)
        past, scores["activation"] = _activation_scores(past, used)
        last_use, counts = _replay(last_use, used, scores, num_slots)
        totals = {name: totals.get(name, 0) + np.asarray(count) for name, count in counts.items()}
    num_tokens = sum(seen.logits.shape[1] - 1 for seen in sequences)
    rates = {name: count / num_tokens for name, count in totals.items()}
    ahead = {name: np.where(np.arange(num_layers) == 0, np.nan, rates[name]) for name in AHEAD}
    return {
        **{name: rates[name] for name in ("missing", "activation")},
        **ahead,
        "after_experts": rates["after_experts"],
    }


AHEAD = ("router", "hybrid")  # predict the next layer, and so none for the first


def _scores_of_each(predictor: Predictor, seen: Observation) -> dict[str, Float[Array, "T L E"]]:
    plain = dataclasses.replace(predictor, methods=everywhere("router", predictor.num_layers))
    scores = {"after_experts": jnp.swapaxes(jnp.asarray(seen.early_logits, jnp.float32), 0, 1)}
    for name, made in zip(AHEAD, (plain, predictor), strict=True):
        layers = [_lookahead(made, n, 1, seen.residuals[n], seen.routing(n)) for n in range(predictor.num_layers - 1)]
        scores[name] = jnp.stack([jnp.zeros(seen.logits.shape[1:]), *layers], axis=1)
    return scores


@functools.partial(jax.jit, static_argnames=("num_slots",))
def _replay(last_use: Int[Array, "L E"], used: Int[Array, "T L E"], scores: dict[str, Array], num_slots: int):
    """The last uses afterwards, all different, and [L] by name for how many tokens but the first a guess was right."""

    def step(last_use, token):
        used, scores = token
        resident = last_use >= jax.lax.top_k(last_use, num_slots)[0][:, -1:]  # the latest used
        hits = {"missing": jnp.any((used > 0) & ~resident, axis=1)}
        for name, score in scores.items():
            guess = jnp.argmax(jnp.where(resident, -jnp.inf, score), axis=1)
            hits[name] = jnp.take_along_axis(used, guess[:, None], axis=1)[:, 0] > 0
        now = jnp.max(last_use) + 1 + jnp.arange(used.shape[1], dtype=jnp.int32)
        return jnp.where(used > 0, now[None], last_use), hits

    last_use, hits = jax.lax.scan(step, last_use, (used, scores))
    return last_use, {name: jnp.sum(hit[1:], axis=0) for name, hit in hits.items()}


# Guesses from the past.


def used_experts(seen: Observation) -> Int[Array, "T L E"]:
    """1 where a token went to an expert."""
    num_experts = seen.logits.shape[-1]
    chosen = (seen.expert_ids[..., None] == np.arange(num_experts)).any(axis=2)
    return jnp.asarray(np.swapaxes(chosen, 0, 1), jnp.int32)


@jax.jit
def recent_scores(used: Int[Array, "T L E"]) -> Float[Array, "T L E"]:
    """Before each token, `recency` of those before it."""

    def step(before, used):
        return recency(before, used), before

    return jax.lax.scan(step, jnp.zeros(used.shape[1:], jnp.float32), used)[1]


@jax.jit
def _activation_scores(state: activation.Activation, used: Int[Array, "T L E"]):
    """The state after a request of these tokens, and before each the scores [T, L, E] of `from_activation`."""

    def step(state, used):
        scores = jnp.stack([from_activation(state, layer - 1) for layer in range(used.shape[0])])
        return activation.update(state, used, jnp.zeros((), jnp.int32)), scores

    state, scores = jax.lax.scan(step, state, used)
    return activation.finish(state), scores


def _activation_after(taught: Sequence[Observation], num_layers: int, num_experts: int) -> activation.Activation:
    state = activation.start(num_layers, num_experts)
    for seen in taught:
        state, _ = _activation_scores(state, used_experts(seen))
    return state


def of_the_past(taught: Sequence[Observation], measured: Sequence[Observation], num_guesses: int) -> Rates:
    """Recall of `previous` tokens' experts, and of `activation`, whose collection begins with the taught sequences."""
    num_layers, num_experts = measured[0].logits.shape[0], measured[0].logits.shape[-1]
    state = _activation_after(taught, num_layers, num_experts)
    found = {name: np.zeros(num_layers) for name in ("previous", "activation")}
    for seen in measured:
        used = used_experts(seen)
        state, expected = _activation_scores(state, used)
        for name, scores in (("previous", recent_scores(used)), ("activation", expected)):
            for layer in range(num_layers):
                found[name][layer] += int(num_found(scores[1:, layer], seen.expert_ids[layer][1:], num_guesses))
    return {name: counts / num_choices(measured) for name, counts in found.items()}


# The hybrid.


def choose(measured: Mapping[tuple[Method, int], np.ndarray], num_layers: int) -> Methods:
    """For each layer the method of the best recall, where a dearer one has to bring MIN_GAIN more.

    `measured` has the recall of (method, layers ahead) by predicted layer; a method may be missing, or nan in places.
    """
    return tuple(
        tuple(
            _best({method: float(measured[method, n][layer + n]) for method in METHODS if (method, n) in measured})
            for layer in range(num_layers - n)
        )
        for n in range(1, MAX_AHEAD + 1)
    )


def _best(recalls: Mapping[Method, float]) -> Method:
    """METHODS are in the order of what they cost."""
    chosen, best = METHODS[0], recalls[METHODS[0]]
    for method, value in recalls.items():
        if value >= best + MIN_GAIN:
            chosen, best = method, value
    return chosen
