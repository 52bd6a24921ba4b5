"""The pictures of a report: SVG in base64, drawn by matplotlib, without words from outside.

A picture is the same bytes for the same numbers.
"""

import base64
import io
from collections.abc import Callable
from typing import Any

from torch import Tensor

from neuron_explainer.errors import MissingExtraError
from neuron_explainer.evaluation.metrics import DensityHistogram

COLOURS = ("#1f77b4", "#d62728", "#2ca02c", "#9467bd", "#ff7f0e", "#17becf", "#8c564b", "#e377c2")
"""Of the curves, in order, and again from the first."""

Lines = list[tuple[int, list[tuple[float, float]]]]
"""Curves: which colour, and the points."""

_SIZE = (4.6, 3.0)  # inches
_BINS = 60


def curve(lines: Lines) -> str:
    """A curve for each dictionary; on a logarithmic scale where values are positive and far apart."""

    def draw(axes: Any) -> None:
        for colour, points in lines:
            x, y = zip(*points, strict=True)
            axes.plot(x, y, color=COLOURS[colour % len(COLOURS)], linewidth=1.2)
            if len(points) == 1:
                axes.plot(x, y, "o", color=COLOURS[colour % len(COLOURS)])
        values = [y for _, points in lines for _, y in points]
        if min(values) > 0 and max(values) > 30 * min(values):
            axes.set_yscale("log")

    return _draw(draw)


def density_plot(density: DensityHistogram) -> str:
    """Latents by how often they fire, on a logarithmic scale."""

    def draw(axes: Any) -> None:
        axes.stairs(density.counts, density.edges, fill=True, color=COLOURS[0])
        axes.set_xscale("log")

    return _draw(draw)


def histogram(values: Tensor) -> str:
    """How the numbers ``[w]`` are spread."""

    def draw(axes: Any) -> None:
        axes.hist(values.double().numpy(), bins=_BINS, color=COLOURS[0])

    return _draw(draw)


def _draw(draw: Callable[[Any], None]) -> str:
    try:
        import matplotlib
        from matplotlib.figure import Figure
    except ImportError:
        raise MissingExtraError(
            "a report's pictures need matplotlib, which is not installed: pip install matplotlib"
        ) from None
    # A Figure of its own, not pyplot: nothing global is made, and no window system is looked for.
    with matplotlib.rc_context({"svg.hashsalt": "neuron_explainer", "font.size": 9}):
        figure = Figure(figsize=_SIZE, layout="constrained")
        draw(figure.add_subplot())
        out = io.BytesIO()
        figure.savefig(out, format="svg", metadata={"Date": None})
    return base64.b64encode(out.getvalue()).decode()
