"""As python -m jmoe.tune_router, with text and models for experiments: python -m tools.tune_router tuned.safetensors

The text is Python's standard library (--stdlib-root) without the files that the demo model's training holds out, and
these are what is held out here too. --random-weights makes a model of any shape without a checkpoint, to see that it
fits and how fast it goes; its routers are of no use.
"""

import argparse
import dataclasses
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import get_args

import jax

from jmoe import memory
from jmoe.config import ModelConfig
from jmoe.synthetic import Regime, byte_tokenizer
from jmoe.tokenizer import Tokenizer
from jmoe.training.frozen import Frozen
from jmoe.training.texts import Texts
from jmoe.tune_router import Subject, answer, load_subject, make_parser, placement_for
from tools.random_weights import random_weights
from tools.stdlib_corpus import read_files, stdlib_root


def main(arguments: Sequence[str] | None = None) -> int:
    """The exit code: 0, or 2 after one line on stderr that says what is wrong."""
    parser = make_parser(__doc__ or "")
    parser.add_argument("--stdlib-root", type=Path, metavar="DIR", help="default: the running interpreter's library")
    parser.add_argument("--config", type=Path, help="with --random-weights: one of configs/models/*.toml")
    parser.add_argument("--layers", type=int, help="with --random-weights: decoder layers; default: the architecture's")
    parser.add_argument("--random-weights", choices=get_args(Regime), help="no checkpoint: how weights are spread")
    return answer(parser, arguments, read_stdlib, _load)


def read_stdlib(options: argparse.Namespace) -> Texts:
    """The standard library at --stdlib-root."""
    root = options.stdlib_root or stdlib_root()
    return Texts(*(read_files(root, held_out=held) for held in (False, True)))


def _load(options: argparse.Namespace) -> Subject:
    if options.random_weights is None:
        if options.config or options.layers:
            raise ValueError("--config and --layers are for --random-weights; add that, or leave them out")
        return load_subject(options)
    if options.config is None or options.model:
        raise ValueError("--random-weights makes a model of --config; give that, and no --model")
    config = ModelConfig.from_toml(options.config)
    config = dataclasses.replace(
        config,
        num_hidden_layers=options.layers or config.num_hidden_layers,
        dtype=options.dtype or config.dtype,
    )
    memory.configure_backend(config)
    placement = placement_for(config, options.experts)
    weights = random_weights(config, options.random_weights, 0)
    experts = weights.store.layers
    if not placement.offloaded:
        experts = tuple(jax.device_put(layer, memory.device_sharding()) for layer in experts)
    tokenizer = Tokenizer(byte_tokenizer(config.vocab_size), eos_ids=(256,))
    name = f"random {options.config.stem}"
    return Subject(name, config, Frozen(weights.params, experts), placement, tokenizer, "random weights", config.dtype)


if __name__ == "__main__":
    sys.exit(main())
