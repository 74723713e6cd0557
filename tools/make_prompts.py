"""Writes prompts for benchmarks, heads of held-out standard-library files: python -m tools.make_prompts DESTINATION.

One JSON object a line, {"source": "heapq.py", "text": "…"}: library modules first, then tests. The text depends on the
version of the Python that runs this, so the file that benchmarks use is kept: configs/prompts/python.jsonl.
"""

import argparse
import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from tools.command import exit_code
from tools.stdlib_corpus import read_files, stdlib_root
from tools.workload import Prompt

NUM_PROMPTS = 40
PROMPT_BYTES = 6000
SHORTEST_FILE_BYTES = 4000


def main(arguments: Sequence[str] | None = None) -> int:
    """The exit code: 0, or 2 after one line on stderr that says what is wrong."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("destination", type=Path, help="file to write; replaced if it is there")
    return exit_code(_run, parser.parse_args(arguments))


def _run(options: argparse.Namespace) -> None:
    prompts = heads(read_files(stdlib_root(), held_out=True))
    lines = [json.dumps({"source": prompt.source, "text": prompt.text}) + "\n" for prompt in prompts]
    options.destination.write_text("".join(lines), encoding="utf-8")
    print(f"{options.destination}: {len(prompts)} prompts of Python {sys.version.split()[0]} written")


def heads(files: Mapping[str, str]) -> list[Prompt]:
    """The first PROMPT_BYTES of NUM_PROMPTS files that are long enough, library modules first, up to a line's end."""
    long_enough = [path for path, text in files.items() if len(text.encode()) >= SHORTEST_FILE_BYTES]
    chosen = sorted(long_enough, key=lambda path: (path.startswith("test/"), path))[:NUM_PROMPTS]
    return [Prompt(path, _head(files[path])) for path in chosen]


def _head(text: str) -> str:
    """Whole lines of at most PROMPT_BYTES together; one that is longer is cut."""
    encoded = text.encode()
    if len(encoded) <= PROMPT_BYTES:
        return text
    cut = encoded[:PROMPT_BYTES]
    return cut[: cut.rfind(b"\n") + 1 or None].decode(errors="ignore")


if __name__ == "__main__":
    sys.exit(main())
