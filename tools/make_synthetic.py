"""Writes a random-weight Hugging Face checkpoint: python tools/make_synthetic.py --config X.toml DESTINATION."""

import argparse
import dataclasses
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import get_args

from jmoe.config import DTYPES, ModelConfig
from jmoe.synthetic import Regime, write_synthetic
from tools.command import byte_bar, exit_code


def main(arguments: Sequence[str] | None = None) -> int:
    """The exit code: 0, or 2 after one line on stderr that says what is wrong."""
    return exit_code(_run, _parser().parse_args(arguments))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description="Writes a Hugging Face checkpoint of random weights.")
    parser.add_argument("destination", type=Path, help="directory to make")
    parser.add_argument("--config", type=Path, required=True, help="the architecture: one of configs/models/*.toml")
    parser.add_argument("--layers", type=int, help="number of decoder layers (default: the architecture's)")
    parser.add_argument("--dtype", choices=DTYPES, help="default: the architecture's")
    parser.add_argument("--regime", choices=get_args(Regime), default="flat", help="how wide weights are spread")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--max-shard-bytes", type=int, default=5_000_000_000, help="size of a file at most")
    return parser


def _run(options: argparse.Namespace) -> None:
    changes = {"num_hidden_layers": options.layers, "dtype": options.dtype}
    given = {name: value for name, value in changes.items() if value is not None}
    config = dataclasses.replace(ModelConfig.from_toml(options.config), **given)
    with byte_bar() as (_, report):
        write_synthetic(
            config,
            options.destination,
            regime=options.regime,
            seed=options.seed,
            max_shard_bytes=options.max_shard_bytes,
            progress=report,
        )
    print(f"{options.destination}: written")


if __name__ == "__main__":
    sys.exit(main())
