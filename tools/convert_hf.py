"""Converts a Hugging Face checkpoint to a jmoe one: python tools/convert_hf.py SOURCE DESTINATION [--dtype float32]."""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from tqdm import tqdm

from jmoe.config import DTYPES
from jmoe.convert import convert_hf


def main(arguments: Sequence[str] | None = None) -> int:
    """The exit code: 0, or 2 after one line on stderr that says what is wrong."""
    parser = argparse.ArgumentParser(description="Converts a Hugging Face checkpoint (safetensors) to a jmoe one.")
    parser.add_argument("source", type=Path, help="directory with config.json and *.safetensors")
    parser.add_argument("destination", type=Path, help="directory to make")
    parser.add_argument("--dtype", choices=DTYPES, help="cast the weights (default: keep them as they are)")
    options = parser.parse_args(arguments)
    try:
        written = _convert(options.source, options.destination, options.dtype)
    except (ValueError, RuntimeError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(f"{options.destination}: {'written' if written else 'already the checkpoint of this source, kept'}")
    return 0


def _convert(source: Path, destination: Path, dtype: str | None) -> bool:
    with tqdm(unit="B", unit_scale=True, unit_divisor=1024, leave=False, delay=1) as bar:

        def report(phase: str, done_bytes: int, total_bytes: int) -> None:
            bar.total = total_bytes
            bar.set_description(phase, refresh=False)
            bar.update(done_bytes - bar.n)

        return convert_hf(source, destination, dtype=dtype, progress=report)


if __name__ == "__main__":
    sys.exit(main())
