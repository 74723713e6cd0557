"""How tools show progress, and how they end."""

import argparse
import contextlib
import sys
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

from tqdm import tqdm

if TYPE_CHECKING:
    from jmoe.checkpoint import Progress  # seconds to import, for tools that read no checkpoint


def exit_code(run: Callable[[argparse.Namespace], object], options: argparse.Namespace) -> int:
    """0 once `run(options)` is done; 2 after one line on stderr that says what the caller or the machine did wrong."""
    try:
        run(options)
    except (ValueError, RuntimeError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


@contextlib.contextmanager
def byte_bar() -> "Iterator[tuple[tqdm, Progress]]":
    """A bar, and what to tell (phase, bytes done, bytes in all) for it. Work of less than a second shows none."""
    with tqdm(unit="B", unit_scale=True, unit_divisor=1024, leave=False, delay=1) as bar:

        def report(phase: str, done_bytes: int, total_bytes: int) -> None:
            bar.total = total_bytes
            bar.set_description(phase, refresh=False)
            bar.update(done_bytes - bar.n)

        yield bar, report
