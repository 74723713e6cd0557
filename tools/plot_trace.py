"""A picture of what the device did when, from a profiler trace: python -m tools.plot_trace DIRECTORY trace.png

A lane for each kind of kernel (fetch, experts, attention, …), time from left to right. Traces come from
`python -m jmoe.generate --profile`, and from the tools that have --profile or --trace. Needs matplotlib, which the
extra `plots` installs.
"""

import argparse
import collections
import importlib.util
import math
import sys
from collections.abc import Sequence
from pathlib import Path

from tools.command import exit_code
from tools.profile_decode import LANES, Kernel, kernels

# Distinct to the colour-blind (Okabe and Ito); what is seldom seen together shares one.
COLOURS = {
    "prefetch": "#0072B2",
    "projections": "#E69F00",
    "attention": "#56B4E9",
    "mlp": "#F0E442",
    "router": "#CC79A7",
    "admit": "#D55E00",
    "fetch": "#0072B2",
    "experts": "#009E73",
    "head": "#F0E442",
    "sample": "#555555",
    "other": "#999999",
}


def main(arguments: Sequence[str] | None = None) -> int:
    """The exit code: 0, or 2 after one line on stderr that says what is wrong."""
    return exit_code(_run, _parser().parse_args(arguments))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("directory", type=Path, help="where the profiler's trace is; the newest below it is read")
    parser.add_argument("picture", type=Path, help="the file to write, of any format that matplotlib knows")
    parser.add_argument("--from-ms", type=float, default=0.0, metavar="X", help="since the first kernel")
    parser.add_argument("--ms", type=float, default=math.inf, metavar="X", help="how long; default: to the end")
    parser.add_argument("--title", default="", help="above the picture")
    parser.add_argument("--list", action="store_true", help="print when each kernel drawn began, and how long it took")
    return parser


def _run(options: argparse.Namespace) -> None:
    if importlib.util.find_spec("matplotlib") is None:
        raise RuntimeError("a picture needs matplotlib, which is not installed; uv sync --extra plots")
    found = between(list(kernels(options.directory, {})), options.from_ms, options.ms)
    draw(found, options.picture, options.title)
    for kernel in sorted(found, key=lambda kernel: kernel.start_ns) if options.list else ():
        print(f"{kernel.start_ns / 1e6:10.4f} ms {kernel.duration_ns / 1e3:9.1f} us  {kernel.scope} {kernel.name}")
    print(f"{len(found)} kernels drawn to {options.picture}")


def between(found: Sequence[Kernel], from_ms: float, ms: float) -> list[Kernel]:
    """What runs in a stretch of the trace, as far as it does so there, times counted from its beginning.

    Raises ValueError where nothing does.
    """
    first = min((kernel.start_ns for kernel in found), default=0.0) + from_ms * 1e6
    inside = []
    for kernel in found:
        start = max(kernel.start_ns - first, 0.0)
        end = min(kernel.start_ns + kernel.duration_ns - first, ms * 1e6)
        if start < end:
            inside.append(Kernel(kernel.name, kernel.scope, start, end - start))
    if not inside:
        whole = max((kernel.start_ns for kernel in found), default=0.0) - first
        raise ValueError(
            f"no kernel from {from_ms} ms for {ms} ms; the trace has {len(found)}, "
            f"the last {whole / 1e6:.1f} ms after that"
        )
    return inside


def draw(found: Sequence[Kernel], file: Path, title: str) -> None:
    """Writes the picture."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg  # an extra, and slow to import
    from matplotlib.figure import Figure

    spans: dict[str, list[tuple[float, float]]] = collections.defaultdict(list)
    for kernel in found:
        spans[kernel.scope].append((kernel.start_ns / 1e6, kernel.duration_ns / 1e6))
    lanes = [scope for scope in LANES if scope in spans]
    figure = Figure(figsize=(11, 0.8 + 0.4 * len(lanes)), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    for lane, scope in enumerate(lanes):
        axes.broken_barh(spans[scope], (lane - 0.4, 0.8), facecolors=COLOURS[scope])
    axes.set_yticks(range(len(lanes)), lanes)
    axes.invert_yaxis()
    axes.set(xlabel="ms", title=title)
    figure.savefig(file, dpi=150)


if __name__ == "__main__":
    sys.exit(main())
