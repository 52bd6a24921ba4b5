"""The pictures of a report: SVG in base64, drawn by matplotlib, without words from outside.

The same numbers give the same bytes.
"""

import base64
import io
from collections.abc import Callable
from typing import Any

from torch import Tensor

from neuron_explainer.errors import optional_module
from neuron_explainer.evaluation.metrics import DensityHistogram

COLOURS = ("#1f77b4", "#d62728", "#2ca02c", "#9467bd", "#ff7f0e", "#17becf", "#8c564b", "#e377c2")
"""The colours of the curves, in order, and then again from the first."""

Lines = list[tuple[int, list[tuple[float, float]]]]
"""For each curve: the number of its colour, and its points."""

_SIZE = (4.4, 2.7)  # inches
_BINS = 60
_FEW_POINTS = 25


def check_matplotlib() -> None:
    """Raise MissingExtraError if matplotlib is not installed."""
    optional_module("matplotlib", "pictures")


def curve(lines: Lines, x_label: str, y_label: str) -> str:
    """Curves, on a logarithmic scale where values are positive and far apart."""

    def draw(axes: Any) -> None:
        for colour, points in lines:
            x, y = zip(*points, strict=True)
            marker = "o" if len(points) < _FEW_POINTS else None
            colours = COLOURS[colour % len(COLOURS)]
            axes.plot(x, y, color=colours, linewidth=1.2, marker=marker, markersize=3)
        values = [y for _, points in lines for _, y in points]
        if min(values) > 0 and max(values) > 30 * min(values):
            axes.set_yscale("log")
        axes.xaxis.set_major_formatter(_thousands)

    return _draw(draw, x_label, y_label)


def density_plot(density: DensityHistogram) -> str:
    """How many latents fire how often, on a logarithmic scale."""

    def draw(axes: Any) -> None:
        axes.stairs(density.counts, density.edges, fill=True, color=COLOURS[0])
        axes.set_xscale("log")

    return _draw(draw, "share of tokens on which a latent fires", "latents")


def histogram(values: Tensor, x_label: str) -> str:
    """How the numbers ``[w]`` are spread."""

    def draw(axes: Any) -> None:
        axes.hist(values.double().numpy(), bins=_BINS, color=COLOURS[0])

    return _draw(draw, x_label, "latents")


def _thousands(value: float, _: int) -> str:
    for unit, letter in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= unit:
            return f"{value / unit:g} {letter}"
    return f"{value:g}"


def _draw(draw: Callable[[Any], None], x_label: str, y_label: str) -> str:
    check_matplotlib()
    import matplotlib
    from matplotlib.figure import Figure

    # A Figure of its own, not pyplot: nothing global is made, and no window system is looked for.
    with matplotlib.rc_context({"svg.hashsalt": "neuron_explainer", "font.size": 9}):
        figure = Figure(figsize=_SIZE, layout="constrained")
        axes = figure.add_subplot()
        axes.spines[["top", "right"]].set_visible(False)
        draw(axes)
        axes.set_xlabel(x_label)
        axes.set_ylabel(y_label)
        out = io.BytesIO()
        figure.savefig(out, format="svg", metadata={"Date": None}, transparent=True)
    return base64.b64encode(out.getvalue()).decode()
