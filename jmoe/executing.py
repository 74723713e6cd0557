"""Executing guesses in the engine (--execute-guess): in which layers, and said so that nobody misses it."""

from collections.abc import Mapping

from jaxtyping import Array

from jmoe.config import ModelConfig
from jmoe.experts.execute_guess import ExecutedGuess
from jmoe.experts.prefetch_file import Calibration


def guessed_layers(config: ModelConfig, gate: float, calibration: Calibration | None) -> tuple[int, ...]:
    """The MoE layers, counted from 0, whose calibrated recall one layer ahead is `gate` or more; never the first.

    Raises ValueError without a calibration, and for a model of one MoE layer.
    """
    first, *others = config.moe_layers
    if not others:
        raise ValueError(
            f"--execute-guess {gate:g}: this model has one MoE layer (layer {first}), and guesses are "
            "made in the one before; expected two or more; leave it out"
        )
    if calibration is None:
        raise ValueError(
            f"--execute-guess {gate:g} goes by the recall of calibrated guesses, and no calibration lies beside the "
            "checkpoint; make one: python -m tools.calibrate_prefetch --model MODEL --text FILE …"
        )
    return tuple(layer for layer, recall in enumerate(calibration.recall[0], start=1) if recall >= gate)


def executed_guess(
    config: ModelConfig,
    params: Mapping[str, Array],
    gate: float,
    calibration: Calibration | None,
    *,
    implementation: str | None = None,
) -> ExecutedGuess | None:
    """What the layers that pass the gate compute; None where none does. Raises as `guessed_layers`."""
    layers = guessed_layers(config, gate, calibration)
    if not layers or calibration is None:
        return None
    return ExecutedGuess(calibration.predictor(config, params), layers, config.norm_topk_prob, implementation)


def executing_line(config: ModelConfig, gate: float, calibration: Calibration | None) -> str:
    """What is guessed, and that it changes what the model says, for people. Raises as `guessed_layers`."""
    layers, count = guessed_layers(config, gate, calibration), len(config.moe_layers)
    if not layers or calibration is None:
        return f"--execute-guess {gate:g} changes nothing: in none of {count} MoE layers are guesses right so often"
    recall = min(calibration.recall[0][layer - 1] for layer in layers)
    named = ", ".join(str(config.moe_layers[layer]) for layer in layers)
    return (
        f"--execute-guess {gate:g} CHANGES WHAT THE MODEL SAYS: decoding computes guessed experts, not those that the "
        f"router chooses, in {len(layers)} of {count} MoE layers (layers {named}; recall {recall:.2f} and more)"
    )
