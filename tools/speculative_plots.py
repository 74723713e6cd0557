"""A plot of speculative decoding beside other ways. Needs matplotlib, which the extra `plots` installs."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

# Distinct to the colour-blind (Okabe and Ito).
COLOURS = {"on-demand": "#555555", "hottest": "#009E73", "plain": "#0072B2", "drafts": "#D55E00", "auto": "#CC79A7"}
MARKERS = "os^Dv<>Pp"


def speed_by_batch(rows: Sequence[Mapping[str, Any]], file: Path) -> None:
    """Tokens a second of each way over the batch size, both logarithmic, into a file of any format."""
    figure = Figure(figsize=(7, 4.5), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    lines: dict[tuple[str, str], list[tuple[int, float]]] = {}
    for row in rows:
        lines.setdefault((row["way"], label_of(row)), []).append((row["batch"], row["tokens/s"]))
    for number, ((way, label), points) in enumerate(lines.items()):
        x, y = zip(*sorted(points), strict=True)
        axes.plot(x, y, color=COLOURS[way], marker=MARKERS[number % len(MARKERS)], label=label)
    sizes = sorted({row["batch"] for row in rows})
    axes.set(xscale="log", yscale="log", xlabel="sequences at a time", ylabel="tokens/s", title="Ways to decode")
    axes.set_xticks(sizes, [str(size) for size in sizes])
    axes.minorticks_off()
    if lines:
        axes.legend(fontsize="small")
    figure.savefig(file, dpi=150)


def label_of(row: Mapping[str, Any]) -> str:
    """The way and its settings."""
    drafts = "" if row["γ"] is None else f", γ={row['γ']}, N={row['N']}, {row['policy']}"
    return f"{row['way']}, {row['slots']} slots{drafts}"
