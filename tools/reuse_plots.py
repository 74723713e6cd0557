"""Plots of router tuning: figures in, a picture out. Needs matplotlib, which the extra `plots` installs."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from tools.routing_plots import BLUE, GREY, VERMILION, save

__all__ = ["frontier", "hit_rates", "save"]


def hit_rates(curves: Mapping[str, np.ndarray], num_active: int) -> Figure:
    """LRU hit rate [E+1] by slots of a layer, a line for each set of routers, from the fewest that hold a token's."""
    figure, axes = _figure()
    for (name, curve), color in zip(curves.items(), (GREY, BLUE), strict=False):
        slots = np.arange(num_active, len(curve))
        axes.plot(slots, curve[num_active:], color=color, linewidth=2, label=f"{name} tuning")
    axes.set(title="Hits of least-recently-used slots", xlabel="slots of a layer (experts)", ylabel="hit rate")
    axes.set(xlim=(0, None), ylim=(0, 1))
    axes.legend(frameon=False, loc="lower right")
    return figure


def frontier(rows: Sequence[Mapping[str, Any]], most_worse: float) -> Figure:
    """Reuse against held-out loss, both relative to before tuning, a point for each row and the gate as a line.

    Rows have `name`, `reuse_change` and `bits_change`, shares.
    """
    figure, axes = _figure()
    for row in rows:
        passes = row["bits_change"] <= most_worse
        at = 100 * row["bits_change"], 100 * row["reuse_change"]
        axes.scatter(*at, color=BLUE if passes else VERMILION, s=18, zorder=3)
        axes.annotate(row["name"], at, xytext=(4, 3), textcoords="offset points", fontsize=7)
    axes.axvline(100 * most_worse, color=GREY, linestyle="--", label="the gate")
    axes.axhline(0, color=GREY, linewidth=0.8)
    axes.set(title="What reuse costs", xlabel="held-out bits per byte (% more)", ylabel="reuse (% more)")
    axes.legend(frameon=False, loc="lower right")
    return figure


def _figure():
    figure = Figure(figsize=(6, 4), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    axes.spines[["top", "right"]].set_visible(False)
    return figure, axes
