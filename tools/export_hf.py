"""Writes the Hugging Face checkpoint of a jmoe one: python tools/export_hf.py SOURCE DESTINATION."""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from tqdm import tqdm

from jmoe.export import export_hf


def main(arguments: Sequence[str] | None = None) -> int:
    """The exit code: 0, or 2 after one line on stderr that says what is wrong."""
    parser = argparse.ArgumentParser(description="Writes the Hugging Face checkpoint (safetensors) of a jmoe one.")
    parser.add_argument("source", type=Path, help="a jmoe checkpoint")
    parser.add_argument("destination", type=Path, help="directory to make")
    parser.add_argument(
        "--router", type=Path, metavar="FILE", help="tuned routers of that checkpoint, instead of its own"
    )
    parser.add_argument("--max-shard-bytes", type=int, default=5_000_000_000, help="size of a file at most")
    options = parser.parse_args(arguments)
    try:
        _export(options)
    except (ValueError, RuntimeError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(f"{options.destination}: written")
    return 0


def _export(options: argparse.Namespace) -> None:
    with tqdm(unit="B", unit_scale=True, unit_divisor=1024, leave=False, delay=1) as bar:

        def report(phase: str, done_bytes: int, total_bytes: int) -> None:
            bar.total = total_bytes
            bar.set_description(phase, refresh=False)
            bar.update(done_bytes - bar.n)

        export_hf(
            options.source,
            options.destination,
            router=options.router,
            max_shard_bytes=options.max_shard_bytes,
            progress=report,
        )


if __name__ == "__main__":
    sys.exit(main())
