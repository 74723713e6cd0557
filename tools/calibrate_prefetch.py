"""What predicts a model's experts a layer ahead, learned from text, and how often it is right on other text.

    python -m tools.calibrate_prefetch --model path/to/model --stdlib-held-out

Runs the first --tokens tokens of each document, one document at a time, with every expert on the device: the model has
to fit there as a whole, and what is observed in host memory. Of the documents every second one is only measured; the
others give default vectors, train estimators where recall without is below --estimate-below, and (every fourth) decide
which method each layer uses. Writes prefetch.safetensors beside the converted checkpoint, or to --output.

Prints recall, the share of a token's true experts among the guesses, by predicted layer and on the measured documents:

  previous         the experts of the token before, and with more guesses, of those before it
  activation       what the past request has that is most like the last steps (MoE-Infinity), and this request
  router           the next layer's router on this layer's residual stream
  default_vectors  the same, after the default vectors of this layer's experts are added
  estimator        the same, after a small network corrected it; - for layers that have none
  hybrid           for each layer the best of the three before, as the deciding documents say: what the engine uses
  after_experts    the layer's own router on the residual stream before its attention: for comparison, known too late
  … +2             two layers ahead

Then, for each of --slot-shares, how often the best guess among the experts that are not resident is asked for, where
that share of a layer's experts have slots and the least recently used give way: `missing` is how often any is missing.
"""

import argparse
import dataclasses
import json
import math
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from tqdm import tqdm

from jmoe import checkpoint, memory, sources
from jmoe.config import ModelConfig
from jmoe.experts.prefetch_file import Calibration, file_beside
from jmoe.tokenizer import load_tokenizer
from jmoe.training.prefetch import EstimatorTraining, observe
from jmoe.training.prefetch_calibration import Params, Split, calibrate, held_out_recall
from jmoe.training.prefetch_recall import of_missing
from tools.command import exit_code
from tools.measure_routing import load_resident, read_documents


def main(arguments: Sequence[str] | None = None) -> int:
    """The exit code: 0, or 2 after one line on stderr that says what is wrong."""
    options = _parse(arguments)
    return exit_code(_run, options)


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="as python -m jmoe.generate takes it; default: the demo model")
    text = parser.add_mutually_exclusive_group(required=True)
    text.add_argument("--text", type=Path, nargs="+", metavar="FILE", help="documents, UTF-8")
    text.add_argument("--stdlib-held-out", action="store_true", help="held-out files of Python's standard library")
    parser.add_argument("--stdlib-root", type=Path, metavar="DIR", help="default: this interpreter's")
    parser.add_argument("--num-documents", type=int, default=32, help="at most; default: 32")
    parser.add_argument("--tokens", type=int, default=512, help="of each document; shorter ones are left out")
    parser.add_argument("--estimate-below", type=float, default=0.9, metavar="RECALL", help="default: 0.9; 0: none")
    for field in dataclasses.fields(EstimatorTraining):
        option = f"--{field.name.replace('_', '-')}"
        parser.add_argument(option, type=type(field.default), default=field.default, help=f"default: {field.default}")
    parser.add_argument(
        "--slot-shares", type=float, nargs="+", default=[0.25, 0.5], metavar="X", help="default: 0.25 0.5"
    )
    parser.add_argument("--output", type=Path, metavar="FILE", help="default: beside the converted checkpoint")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all figures there")
    options = parser.parse_args(arguments)
    if options.stdlib_root and not options.stdlib_held_out:
        parser.error("--stdlib-root is where --stdlib-held-out reads; give both, or --text alone")
    if options.tokens < 2 or options.num_documents < 3:
        parser.error("--tokens has to be 2 or more, and --num-documents 3 or more: to teach, to decide and to measure")
    if not all(0 < share < 1 for share in options.slot_shares):
        parser.error("--slot-shares have to be above 0 and below 1: where all are resident nothing is prefetched")
    return options


def _run(options: argparse.Namespace) -> None:
    fields = dataclasses.fields(EstimatorTraining)
    training = EstimatorTraining(**{field.name: getattr(options, field.name) for field in fields})
    path = sources.resolve(options.model, announce=_say, prepare=memory.configure_backend)
    output = options.output or file_beside(path)
    if not output.absolute().parent.is_dir():
        raise ValueError(f"{output}: no directory {output.parent}; make it first")
    manifest = checkpoint.read_manifest(path)
    config = manifest.config
    documents = read_documents(options, config, load_tokenizer(path))
    params, layers = load_resident(path, config)
    progress = tqdm(documents.values(), desc="documents", leave=False, delay=1)
    split = Split.of([jax.device_get(observe(config, params, layers, np.asarray([ids], np.int32))) for ids in progress])
    with tqdm(total=training.num_steps, desc="estimators", unit="step", leave=False, delay=1) as bar:
        calibration = calibrate(
            config,
            params,
            split,
            manifest.fingerprint,
            training,
            estimate_below=options.estimate_below,
            progress=bar.update,
        )
    found = figures(config, params, calibration, split, options.slot_shares)
    report = {"model": str(path), "documents": list(documents), **found}
    print(*_lines(report), sep="\n")
    calibration.save(output)
    print(f"{output}: written, {output.stat().st_size} bytes")
    if options.json:
        options.json.write_text(json.dumps(report) + "\n", encoding="utf-8")
        print(f"{options.json}: written")


def _say(line: str) -> None:
    print(line, file=sys.stderr)


def figures(
    config: ModelConfig, params: Params, calibration: Calibration, split: Split, slot_shares: Sequence[float]
) -> dict[str, Any]:
    """Recall by number of guesses and predictor, a number or None (no prediction) for each MoE layer.

    `first_guess_right` is how often the best guess is one of the true experts, `first_missing_right` how often the best
    that is not resident is, by the number of slots.
    """
    predictor, num_active = calibration.predictor(config, params), config.num_experts_per_tok
    taught = [*split.taught, *split.deciding]
    counts = sorted({num_active, min(2 * num_active, config.num_experts)})
    first = held_out_recall(predictor, split, 1)
    rates = {str(count): held_out_recall(predictor, split, count) for count in counts}
    return {
        "fingerprint": calibration.fingerprint,
        "num_tokens": {name: sum(seen.logits.shape[1] for seen in part) for name, part in vars(split).items()},
        "num_experts": config.num_experts,
        "num_experts_per_tok": num_active,
        "moe_layers": config.moe_layers,
        "methods": calibration.methods,
        "first_guess_right": {name: _numbers(row * num_active) for name, row in first.items()},
        "first_missing_right": {
            str(count): {
                name: _numbers(row) for name, row in of_missing(predictor, taught, split.held_out, count).items()
            }
            for count in sorted({max(num_active, round(share * config.num_experts)) for share in slot_shares})
        },
        "recall": {count: {name: _numbers(row) for name, row in made.items()} for count, made in rates.items()},
    }


def _numbers(row: np.ndarray) -> list[float | None]:
    return [None if math.isnan(value) else round(float(value), 5) for value in row]


def _lines(report: Mapping[str, Any]) -> list[str]:
    """What people see: a table for each number of guesses, and what each layer uses."""
    tokens, layers = report["num_tokens"], report["moe_layers"]
    lines = [f"{tokens['taught']} tokens teach, {tokens['deciding']} decide, {tokens['held_out']} are measured"]
    for count, rates in report["recall"].items():
        lines += ["", f"recall with {count} guesses for {report['num_experts_per_tok']} experts"]
        lines += _table(rates, layers)
    lines += ["", "how often the first guess is right", *_table(report["first_guess_right"], layers), ""]
    for count, rates in report["first_missing_right"].items():
        lines += [f"how often the first guess that is not resident is right, with {count} slots (LRU)"]
        lines += [*_table(rates, layers), ""]
    for n, methods in enumerate(report["methods"], start=1):
        used = ", ".join(f"{layer} {method}" for layer, method in zip(layers, methods, strict=False))
        lines.append(f"{n} ahead, hybrid is, by the layer that predicts: {used}")
    return lines


def _table(rates: Mapping[str, Sequence[float | None]], moe_layers: Sequence[int]) -> list[str]:
    """A row for each predicted layer."""
    cells = [["layer", *rates]]
    cells += [[str(layer), *(_cell(row[n]) for row in rates.values())] for n, layer in enumerate(moe_layers)]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    return ["  ".join(f"{cell:>{width}}" for cell, width in zip(line, widths, strict=True)) for line in cells]


def _cell(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"


if __name__ == "__main__":
    sys.exit(main())
