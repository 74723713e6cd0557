"""From observed tokens to what predicts a model's experts, and to how well it does on other tokens."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence

import numpy as np
from jaxtyping import Array

from jmoe.config import ModelConfig
from jmoe.experts.prefetch import (
    MAX_AHEAD,
    METHODS,
    Estimators,
    Method,
    Methods,
    Predictor,
    everywhere,
    make_predictor,
    placed,
    places,
    quasi_hidden,
)
from jmoe.experts.prefetch_file import Calibration
from jmoe.training.prefetch import EstimatorTraining, Observation, default_vectors, join, train_estimators
from jmoe.training.prefetch_recall import Rates, choose, of_after_experts, of_lookahead, of_the_past

Params = Mapping[str, Array]
Measured = dict[tuple[Method, int], np.ndarray]  # recall by method and distance, [L] by predicted layer
DISTANCES = range(1, MAX_AHEAD + 1)


@dataclasses.dataclass(frozen=True)
class Split:
    """Sequences that teach (default vectors and estimators), that decide between methods, and that are held out."""

    taught: list[Observation]
    deciding: list[Observation]
    held_out: list[Observation]

    @classmethod
    def of(cls, sequences: Sequence[Observation]) -> "Split":
        """Every second one is held out; of the others every fourth decides. Raises ValueError for less than 3."""
        if len(sequences) < 3:
            raise ValueError(f"{len(sequences)} sequences; expected 3 or more, to teach, to decide and to measure")
        own, held_out = list(sequences[::2]), list(sequences[1::2])
        decides = [n % 4 == (len(own) - 1) % 4 for n in range(len(own))]
        deciding = [seen for seen, chosen in zip(own, decides, strict=True) if chosen]
        return cls([seen for seen, chosen in zip(own, decides, strict=True) if not chosen], deciding, held_out)


def calibrate(
    config: ModelConfig,
    params: Params,
    split: Split,
    fingerprint: str,
    training: EstimatorTraining,
    *,
    estimate_below: float,
    progress: Callable[[], object] = lambda: None,
) -> Calibration:
    """Default vectors, estimators where recall is below `estimate_below` without them, and the choice of methods.

    `progress` is called after each step of the estimators' training. `recall` is that of the held-out sequences.
    """
    num_layers, taught = len(config.moe_layers), join(split.taught)
    vectors = default_vectors(taught)
    predictor = make_predictor(config, params, default_vectors=vectors)
    measured = measure(predictor, split.deciding, ("router", "default_vectors"), config.num_experts_per_tok)
    low = [(n, at) for n, at in places(num_layers) if _best(measured, n, at + n) < estimate_below]
    estimators = _trained(predictor, taught, low, training, progress)
    predictor = make_predictor(config, params, default_vectors=vectors, estimators=estimators)
    measured |= measure(predictor, split.deciding, ("estimator",), config.num_experts_per_tok)
    predictor = make_predictor(
        config, params, default_vectors=vectors, estimators=estimators, methods=choose(measured, num_layers)
    )
    found = (of_lookahead(predictor, split.held_out, config.num_experts_per_tok, n)[n:] for n in DISTANCES)
    recall = tuple(tuple(row.tolist()) for row in found)
    return Calibration(fingerprint, vectors, estimators, predictor.methods, recall)


def held_out_recall(predictor: Predictor, split: Split, num_guesses: int) -> Rates:
    """Recall of every predictor on the held-out sequences, [L] by name; "… +2" is two layers ahead."""
    rates = of_the_past([*split.taught, *split.deciding], split.held_out, num_guesses)
    measured = measure(predictor, split.held_out, METHODS, num_guesses)
    for n in DISTANCES:
        suffix = f" +{n}" if n > 1 else ""
        rates |= {f"{method}{suffix}": measured[method, n] for method in METHODS}
        rates[f"hybrid{suffix}"] = of_lookahead(predictor, split.held_out, num_guesses, n)
        if n == 1:
            rates["after_experts"] = of_after_experts(split.held_out, num_guesses)
    return rates


def measure(
    predictor: Predictor, sequences: Sequence[Observation], methods: Sequence[Method], num_guesses: int
) -> Measured:
    """Recall by method and distance, [L] by predicted layer; nan where there is no prediction, or no estimator."""
    measured: Measured = {}
    for method in methods:
        alone = dataclasses.replace(predictor, methods=_only(method, predictor))
        for n in DISTANCES:
            row = measured[method, n] = of_lookahead(alone, sequences, num_guesses, n)
            row[n:][[used != method for used in alone.methods[n - 1]]] = np.nan
    return measured


def _only(method: Method, predictor: Predictor) -> Methods:
    """This method everywhere, but the plain router where it needs an estimator that is not there."""
    if method != "estimator":
        return everywhere(method, predictor.num_layers)
    return tuple(tuple("estimator" if estimator else "router" for estimator in row) for row in predictor.estimators)


def _best(measured: Measured, n: int, target: int) -> float:
    return max(float(row[target]) for (_, ahead), row in measured.items() if ahead == n)


def _trained(
    predictor: Predictor,
    taught: Observation,
    low: Sequence[tuple[int, int]],
    training: EstimatorTraining,
    progress: Callable[[], object],
) -> Estimators:
    """Estimators for these (n, l), None in the other places."""
    if not low:
        return placed({}, predictor.num_layers)
    seen = [(taught.residuals[layer], taught.routing(layer)) for _, layer in low]
    q = [quasi_hidden(predictor, at, *inputs, ahead=n) for (n, at), inputs in zip(low, seen, strict=True)]
    routers = [predictor.routers[layer + n] for n, layer in low]
    logits = [taught.logits[layer + n] for n, layer in low]
    stacked = (np.stack([np.asarray(array, np.float32) for array in arrays]) for arrays in (q, routers, logits))
    trained = train_estimators(training, *stacked, progress=progress)
    return placed(dict(zip(low, trained, strict=True)), predictor.num_layers)
