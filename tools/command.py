"""How a tool ends."""

import argparse
import sys
from collections.abc import Callable


def exit_code(run: Callable[[argparse.Namespace], object], options: argparse.Namespace) -> int:
    """0 once `run(options)` is done; 2 after one line on stderr that says what the caller or the machine did wrong."""
    try:
        run(options)
    except (ValueError, RuntimeError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0
