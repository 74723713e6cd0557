"""Plots of routing statistics: arrays in, figures out. Needs matplotlib, which the extra `plots` installs."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.cm import ScalarMappable
from matplotlib.colors import ListedColormap, LogNorm, Normalize
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

# Distinct to the colour-blind: the blue, vermilion and green of Okabe and Ito; cividis and viridis for what is ordered.
BLUE, VERMILION, GREEN, GREY = "#0072B2", "#D55E00", "#009E73", "#555555"
LEAST_SHOWN = 0.01  # of a uniform share: the heat map's darkest


def use_map(use: np.ndarray, moe_layers: Sequence[int]) -> Figure:
    """Heat map of expert use [L, E], each layer's experts from the most used to the least."""
    figure, axes = _figure()
    relative = -np.sort(-use * use.shape[1], axis=1)
    norm = LogNorm(LEAST_SHOWN, max(float(relative.max()), 2.0), clip=True)
    image = axes.imshow(relative, cmap="cividis", norm=norm, aspect="auto", interpolation="nearest")
    axes.set(
        title="Use of experts, sorted in each layer", xlabel="experts of the layer, most used first", ylabel="layer"
    )
    _tick_layers(axes, moe_layers)
    figure.colorbar(image, label="tokens of the expert (× uniform share)")
    return figure


def reuse_by_lag(reuse: Mapping[int, np.ndarray], moe_layers: Sequence[int], uniform: float) -> Figure:
    """Reuse [L] by lag in tokens, a line for each layer, and what uniform routing gives."""
    figure, axes = _figure()
    lags = list(reuse)
    _layer_lines(figure, axes, np.asarray(lags), np.stack([reuse[lag] for lag in lags], axis=1), moe_layers)
    axes.axhline(uniform, color=GREY, linestyle="--", label="uniform routing")
    axes.set_xscale("log", base=2)
    axes.set_xticks(lags, [str(lag) for lag in lags])
    axes.set(title="Experts that a token shares with an earlier one", xlabel="distance between the two (tokens)")
    axes.set(ylabel="share of a token's experts", ylim=(0, None))
    axes.legend(frameon=False)
    return figure


def hit_rate_by_slots(hit_rate: np.ndarray, moe_layers: Sequence[int], num_active: int) -> Figure:
    """LRU hit rate [L, E+1] by slots of a layer, from the fewest that hold a token's experts."""
    figure, axes = _figure()
    slots = np.arange(num_active, hit_rate.shape[1])
    _layer_lines(figure, axes, slots, hit_rate[:, num_active:], moe_layers)
    axes.plot(slots, slots / slots[-1], color=GREY, linestyle="--", label="uniform routing, warm")
    axes.set(title="Hits of least-recently-used slots", xlabel="slots of a layer (experts)", ylabel="hit rate")
    axes.set(xlim=(0, slots[-1]), ylim=(0, 1))
    axes.legend(frameon=False, loc="lower right")
    return figure


def hit_rate_by_share(rows: Sequence[Mapping[str, Any]], num_experts: int) -> Figure:
    """Hit rate against the share of experts with a slot, a panel for each batch size and a line for each policy.

    Rows have `batch_size`, `slots`, `policy`, `hit_rate`; the policy "optimum" is drawn as the bound that it is.
    """
    batch_sizes = list(dict.fromkeys(row["batch_size"] for row in rows))
    figure = Figure(figsize=(3 * len(batch_sizes) + 1.5, 4), layout="constrained")
    FigureCanvasAgg(figure)
    names = list(dict.fromkeys(row["policy"] for row in rows))
    colors = colormaps["viridis"](np.linspace(0, 0.95, len(names)))
    for axes, batch_size in zip(figure.subplots(1, len(batch_sizes), squeeze=False)[0], batch_sizes, strict=True):
        for name, color in zip(names, colors, strict=True):
            mine = [row for row in rows if (row["policy"], row["batch_size"]) == (name, batch_size)]
            shares, rates = [row["slots"] / num_experts for row in mine], [row["hit_rate"] for row in mine]
            style = {"color": GREY, "linestyle": "--"} if name == "optimum" else {"color": color, "marker": "."}
            axes.plot(shares, rates, label=name, **style)
        axes.set(title=f"batch {batch_size}", xlabel="share of experts with a slot", ylabel="hit rate")
        axes.spines[["top", "right"]].set_visible(False)
    handles, labels = figure.axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, frameon=False, loc="outside right upper")
    return figure


def skew_curves(concentrations: Mapping[str, np.ndarray]) -> Figure:
    """Share of activations against share of experts, by label: one curve [E+1], or [prompts, E+1] and their mean."""
    figure, axes = _figure()
    styles = ((BLUE, "-"), (GREEN, "-"), (VERMILION, ":"))
    for (label, curves), (color, style) in zip(concentrations.items(), styles, strict=True):
        curves = np.atleast_2d(curves)
        experts = np.linspace(0, 1, curves.shape[1])
        if len(curves) > 1:
            axes.fill_between(experts, curves.min(axis=0), curves.max(axis=0), color=color, alpha=0.2, linewidth=0)
            label = f"{label}: mean, all within the band"
        axes.plot(experts, curves.mean(axis=0), color=color, linestyle=style, linewidth=2, label=label)
    axes.plot([0, 1], [0, 1], color=GREY, linestyle="--", label="uniform routing")
    axes.set(title="Skew: what the most used experts take", xlabel="share of experts, most used first")
    axes.set(ylabel="share of activations (mean over layers)", xlim=(0, 1), ylim=(0, 1))
    axes.legend(frameon=False, loc="lower right")
    return figure


def save(figure: Figure, file: Path) -> Path:
    """Writes the figure as a PNG, 600 x 400 pixels; returns the file."""
    figure.savefig(file, format="png", dpi=100, pil_kwargs={"optimize": True})
    return file


def _figure() -> tuple[Figure, Axes]:
    figure = Figure(figsize=(6, 4), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    axes.spines[["top", "right"]].set_visible(False)
    return figure, axes


def _layer_lines(figure: Figure, axes: Axes, x: np.ndarray, curves: np.ndarray, moe_layers: Sequence[int]) -> None:
    """A line for each layer, coloured by depth."""
    norm = Normalize(moe_layers[0], max(moe_layers[-1], moe_layers[0] + 1))
    colors = ListedColormap(colormaps["viridis"](np.linspace(0, 0.9, 256)))  # less its palest yellow
    for layer, curve in zip(moe_layers, curves, strict=True):
        axes.plot(x, curve, color=colors(norm(layer)), linewidth=1.2)
    bar = figure.colorbar(ScalarMappable(norm, colors), ax=axes, label="layer")
    bar.locator = MaxNLocator(integer=True)
    bar.update_ticks()


def _tick_layers(axes: Axes, moe_layers: Sequence[int]) -> None:
    at = range(0, len(moe_layers), max(1, len(moe_layers) // 12))
    axes.set_yticks(list(at), [str(moe_layers[n]) for n in at])
