"""Writes the Hugging Face checkpoint of a jmoe one: python tools/export_hf.py SOURCE DESTINATION."""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from jmoe.export import export_hf
from tools.command import byte_bar, exit_code


def main(arguments: Sequence[str] | None = None) -> int:
    """The exit code: 0, or 2 after one line on stderr that says what is wrong."""
    parser = argparse.ArgumentParser(description="Writes the Hugging Face checkpoint (safetensors) of a jmoe one.")
    parser.add_argument("source", type=Path, help="a jmoe checkpoint")
    parser.add_argument("destination", type=Path, help="directory to make")
    parser.add_argument(
        "--router", type=Path, metavar="FILE", help="tuned routers of that checkpoint, instead of its own"
    )
    parser.add_argument("--max-shard-bytes", type=int, default=5_000_000_000, help="size of a file at most")
    return exit_code(_run, parser.parse_args(arguments))


def _run(options: argparse.Namespace) -> None:
    with byte_bar() as (_, report):
        export_hf(
            options.source,
            options.destination,
            router=options.router,
            max_shard_bytes=options.max_shard_bytes,
            progress=report,
        )
    print(f"{options.destination}: written")


if __name__ == "__main__":
    sys.exit(main())
