"""Converts a Hugging Face checkpoint to a jmoe one: python tools/convert_hf.py SOURCE DESTINATION [--dtype float32]."""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from jmoe.config import DTYPES
from jmoe.convert import convert_hf
from tools.command import byte_bar, exit_code


def main(arguments: Sequence[str] | None = None) -> int:
    """The exit code: 0, or 2 after one line on stderr that says what is wrong."""
    parser = argparse.ArgumentParser(description="Converts a Hugging Face checkpoint (safetensors) to a jmoe one.")
    parser.add_argument("source", type=Path, help="directory with config.json and *.safetensors")
    parser.add_argument("destination", type=Path, help="directory to make")
    parser.add_argument("--dtype", choices=DTYPES, help="cast the weights (default: keep them as they are)")
    return exit_code(_run, parser.parse_args(arguments))


def _run(options: argparse.Namespace) -> None:
    with byte_bar() as (_, report):
        written = convert_hf(options.source, options.destination, dtype=options.dtype, progress=report)
    print(f"{options.destination}: {'written' if written else 'already the checkpoint of this source, kept'}")


if __name__ == "__main__":
    sys.exit(main())
