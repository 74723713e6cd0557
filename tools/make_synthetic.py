"""Writes a random-weight Hugging Face checkpoint: python tools/make_synthetic.py --config X.toml DESTINATION."""

import argparse
import dataclasses
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import get_args

from tqdm import tqdm

from jmoe.config import DTYPES, ModelConfig
from jmoe.synthetic import Regime, write_synthetic


def main(arguments: Sequence[str] | None = None) -> int:
    """The exit code: 0, or 2 after one line on stderr that says what is wrong."""
    options = _parser().parse_args(arguments)
    try:
        config = ModelConfig.from_toml(options.config)
        changes = {"num_hidden_layers": options.layers, "dtype": options.dtype}
        given = {name: value for name, value in changes.items() if value is not None}
        _write(dataclasses.replace(config, **given), options)
    except (ValueError, RuntimeError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(f"{options.destination}: written")
    return 0


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


def _write(config: ModelConfig, options: argparse.Namespace) -> None:
    with tqdm(unit="B", unit_scale=True, unit_divisor=1024, leave=False, delay=1) as bar:

        def report(phase: str, done_bytes: int, total_bytes: int) -> None:
            bar.total = total_bytes
            bar.set_description(phase, refresh=False)
            bar.update(done_bytes - bar.n)

        write_synthetic(
            config,
            options.destination,
            regime=options.regime,
            seed=options.seed,
            max_shard_bytes=options.max_shard_bytes,
            progress=report,
        )


if __name__ == "__main__":
    sys.exit(main())
