"""Curves over optimiser steps as inline SVG, readable on a light and on a dark page."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Curve = tuple[Sequence[float], Sequence[float]]  # steps, values

COLOURS = ("#2f7ed8", "#e07b24", "#2a9d62", "#c23b75", "#7d62c9", "#8a7a2e")
INK = "#010203"  # drawn in this colour, then replaced by the text colour of the page
NUM_MEAN = 15  # values that a running mean spans


@dataclass
class Plot:
    """Curves by run name in one frame; `marks` are steps at which something happened to a run."""

    title: str
    curves: Mapping[str, Curve]
    marks: Mapping[str, Sequence[float]] = field(default_factory=dict)
    smooth: bool = False  # draw the running mean, and the values pale behind it
    bounds: tuple[float, float] | None = None  # of the values' axis
    steps: bool = False  # a value holds until the next one


def plot_svg(plot: Plot, colours: Mapping[str, str]) -> str:
    """The plot as one `<svg>` element without references to anything outside."""
    import io

    import matplotlib

    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": plot.title, "font.size": 9}):
        buffer = io.StringIO()
        empty = {"Date": None, "Creator": None, "Format": None, "Type": None}
        figure(plot, colours).savefig(buffer, format="svg", transparent=True, metadata=empty)
    svg = buffer.getvalue()
    svg = svg[svg.index("<svg") :].replace(INK, "currentColor")
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    # Identifiers are unique on the page: other plots have the same ones.
    prefix = re.sub(r"\W+", "-", plot.title.lower())
    return re.sub(r'(\bid="|url\(#|href="#)', rf"\1{prefix}-", svg)


def figure(plot: Plot, colours: Mapping[str, str]) -> "Figure":
    """The plot as a matplotlib figure that no window and no global state knows."""
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure

    result = Figure(figsize=(5.2, 3.0), layout="constrained")
    FigureCanvasSVG(result)
    axes = result.add_subplot()
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
    axes.set_title(plot.title, color=INK, fontsize=10, loc="left")
    axes.set_xlabel("step", color=INK)
    axes.tick_params(colors=INK)
    axes.grid(color="#808080", alpha=0.25, linewidth=0.6)
    for side, spine in axes.spines.items():
        spine.set_visible(side in ("left", "bottom"))
        spine.set_color(INK)
    if plot.bounds is not None:
        axes.set_ylim(*plot.bounds)
    if plot.curves:
        axes.legend(frameon=False, labelcolor=INK, fontsize=8)
    return result


def running_mean(values: Sequence[float]) -> list[float]:
    """Mean of each value and those before it, at most NUM_MEAN in all."""
    means, total = [], 0.0
    for position, value in enumerate(values):
        total += value - (values[position - NUM_MEAN] if position >= NUM_MEAN else 0.0)
        means.append(total / min(position + 1, NUM_MEAN))
    return means
