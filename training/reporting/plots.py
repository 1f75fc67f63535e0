"""Curves over optimiser steps, points with spreads and heat maps as inline SVG, readable on light and dark pages."""

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Curve = tuple[Sequence[float], Sequence[float]]  # steps, values

COLOURS = ("#2f7ed8", "#e07b24", "#2a9d62", "#c23b75", "#7d62c9", "#8a7a2e")
INK = "#010203"  # a colour that stands for the page's text colour until the SVG is written
NUM_MEAN = 15  # Number of values that a running mean spans


@dataclass(kw_only=True)
class Plot:
    """Curves by run name in one frame; `marks` are steps at which something happened to a run."""

    title: str
    curves: Mapping[str, Curve]
    marks: Mapping[str, Sequence[float]] = field(default_factory=dict)
    smooth: bool = False  # draws the running mean, and the values pale behind it
    bounds: tuple[float, float] | None = None  # of the values' axis
    steps: bool = False  # a value holds until the next one


@dataclass
class Points:
    """A chart of one row for each name, with a point for each series and its spread as a bar."""

    title: str
    names: Sequence[str]
    series: Mapping[str, Sequence[tuple[float, float] | None]]  # mean and spread for each name; None: not measured
    marked: str = ""  # name whose means are drawn as dotted lines through all rows


@dataclass(kw_only=True)
class HeatMap:
    """A value between 0 and 1 for each row and column."""

    title: str
    columns: Sequence[str]
    rows: Sequence[str]
    values: Sequence[Sequence[float]]  # [rows][columns]
    x_title: str = ""
    y_title: str = ""


def plot_svg(plot: Plot, colours: Mapping[str, str]) -> str:
    """Return the plot as one `<svg>` element that refers to nothing outside of it."""
    return _svg(plot.title, lambda: figure(plot, colours))


def points_svg(points: Points) -> str:
    """Return the points as one `<svg>` element."""
    return _svg(points.title, lambda: _points_figure(points))


def heat_svg(heat: HeatMap) -> str:
    """Return the heat map as one `<svg>` element, each cell with its number."""
    return _svg(heat.title, lambda: _heat_figure(heat))


def _svg(title: str, draw: Callable[[], "Figure"]) -> str:
    import io

    import matplotlib

    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": title, "font.size": 9}):
        buffer = io.StringIO()
        empty = {"Date": None, "Creator": None, "Format": None, "Type": None}
        draw().savefig(buffer, format="svg", transparent=True, metadata=empty)
    svg = buffer.getvalue()
    svg = svg[svg.index("<svg") :].replace(INK, "currentColor")
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    # Identifiers are unique on the page: other plots have the same ones.
    prefix = re.sub(r"\W+", "-", title.lower())
    return re.sub(r'(\bid="|url\(#|href="#)', rf"\1{prefix}-", svg)


def figure(plot: Plot, colours: Mapping[str, str]) -> "Figure":
    """Return the plot as a matplotlib figure without a window; pyplot does not know it."""
    result, axes = _frame(5.2, 3.0, plot.title)
    for run, (steps, values) in plot.curves.items():
        draw_style = "steps-post" if plot.steps else "default"
        marker = "o" if len(steps) < 30 else ""
        smooth = plot.smooth and len(steps) >= 2 * NUM_MEAN
        pale = 0.25 if smooth else 0.9
        label = None if smooth else run
        axes.plot(steps, values, color=colours[run], alpha=pale, drawstyle=draw_style, marker=marker, ms=4, label=label)
        if smooth:
            axes.plot(steps, running_mean(values), color=colours[run], label=run)
        for step in plot.marks.get(run, []):
            axes.axvline(step, color=colours[run], alpha=0.7, linewidth=1.0, linestyle=":")
    axes.set_xlabel("step", color=INK)
    axes.grid(color="#808080", alpha=0.25, linewidth=0.6)
    if plot.bounds is not None:
        axes.set_ylim(*plot.bounds)
    if plot.curves:
        axes.legend(frameon=False, labelcolor=INK, fontsize=8)
    return result


def _frame(width: float, height: float, title: str) -> tuple["Figure", Any]:
    """Return an empty figure of the given size in inches, and its axes."""
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure

    result = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasSVG(result)
    axes = result.add_subplot()
    axes.set_title(title, color=INK, fontsize=10, loc="left")
    axes.tick_params(colors=INK)
    for side, spine in axes.spines.items():
        spine.set_visible(side in ("left", "bottom"))
        spine.set_color(INK)
    return result, axes


def _points_figure(points: Points) -> "Figure":
    result, axes = _frame(7.5, 1.0 + 0.28 * len(points.names), points.title)
    for number, (series, values) in enumerate(points.series.items()):
        colour = COLOURS[number % len(COLOURS)]
        shift = 0.12 * (number - (len(points.series) - 1) / 2)
        known = [(place, value) for place, value in enumerate(values) if value is not None]
        means, spreads = [mean for _, (mean, _) in known], [spread for _, (_, spread) in known]
        places = [place + shift for place, _ in known]
        axes.errorbar(means, places, xerr=spreads, fmt="o", color=colour, ms=4, capsize=2, label=series)
        marked = dict(zip(points.names, values, strict=True)).get(points.marked)
        if marked is not None:
            axes.axvline(marked[0], color=colour, alpha=0.6, linewidth=1.0, linestyle=":")
    axes.set_yticks(range(len(points.names)), points.names)
    axes.set_ylim(len(points.names) - 0.5, -0.5)
    axes.set_xlim(-0.02, 1.02)
    axes.grid(axis="x", color="#808080", alpha=0.25, linewidth=0.6)
    if points.series:
        axes.legend(frameon=False, labelcolor=INK, fontsize=8)
    return result


def _heat_figure(heat: HeatMap) -> "Figure":
    result, axes = _frame(1.6 + 0.7 * len(heat.columns), 1.2 + 0.4 * len(heat.rows), heat.title)
    # Cells are drawn as vectors: an image would be a reference to something outside of the page.
    axes.pcolormesh(heat.values, cmap="viridis", vmin=0.0, vmax=1.0, edgecolors="face")
    for row, values in enumerate(heat.values):
        for column, value in enumerate(values):
            ink = "white" if value < 0.6 else "black"
            axes.text(column + 0.5, row + 0.5, f"{value:.2f}", color=ink, ha="center", va="center", fontsize=8)
    axes.set_xticks([column + 0.5 for column in range(len(heat.columns))], heat.columns)
    axes.set_yticks([row + 0.5 for row in range(len(heat.rows))], heat.rows)
    axes.invert_yaxis()
    axes.set_xlabel(heat.x_title, color=INK)
    axes.set_ylabel(heat.y_title, color=INK)
    return result


def running_mean(values: Sequence[float]) -> list[float]:
    """Return the mean of each value and those before it, at most NUM_MEAN in all."""
    means, total = [], 0.0
    for position, value in enumerate(values):
        total += value - (values[position - NUM_MEAN] if position >= NUM_MEAN else 0.0)
        means.append(total / min(position + 1, NUM_MEAN))
    return means
