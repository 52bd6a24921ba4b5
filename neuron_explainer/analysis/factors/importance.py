"""Importance curves: in which layers a factor is strong.

    I_c^(l) = (1/n) · (sum of the n largest values of factor c over all tokens at layer l)

A token at which the factor is not active has the value 0, so a factor that is active on fewer than n tokens
has less importance than the mean of its scores.

**Classes.** Yun et al. call a factor low-level (the meaning of a word) if its curve peaks in the first
layers, mid-level (a pattern of a sentence) if it peaks in the middle, and high-level (long range) if it peaks
later; they draw the line between the last two by hand. Here the place of the peak alone decides: of a model's
layers 0 to L - 1, layer l has depth (l + 1/2) / L; below 1/3 is low, below 2/3 is mid, the rest is high. Of
equal values the earliest layer is the peak. Whether a high factor does reach far is for its examples to show.

**Long activations.** A score grows with the activation that it is a part of. GPT-2's residual stream gets
many times longer from the first layer to the last, so that nearly every curve rises there. ``relative=True``
divides the scores of a layer by the root of the mean squared length of its activations.

Yun et al. 2021, "Transformer visualization via dictionary learning", section 3.1 and its notebook, where n is
200 and 500.

Shape legend: ``c`` factors, ``p`` locations (layers).
"""

import csv
import io
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import numpy.typing as npt

from neuron_explainer import files
from neuron_explainer.analysis.factors.examples import FactorExamples
from neuron_explainer.analysis.plots import COLOURS, check_matplotlib
from neuron_explainer.errors import InputError
from neuron_explainer.models.locations import ActivationLocation

Level = Literal["low", "mid", "high", "silent"]
"""Where a factor's curve peaks; ``silent`` if it is nowhere active."""
THIRDS = (1 / 3, 2 / 3)


@dataclass(frozen=True, eq=False)
class Importance:
    """The importance of every factor in every layer."""

    values: npt.NDArray[np.float64]
    """``[c, p]``."""
    locations: Sequence[ActivationLocation]
    """``[p]``, in the order of the layers."""
    n: int
    """How many of the largest scores each is the mean of."""
    n_layers: int
    """Layers of the model."""
    relative: bool
    """Whether scores were divided by the length of the activations."""
    rms: Sequence[float]
    """``[p]``: the root of the mean squared length of the activations."""

    @property
    def peak(self) -> npt.NDArray[np.int64]:
        """``[c]``: the index of the location where each curve is highest, the first of equal ones."""
        found: npt.NDArray[np.int64] = self.values.argmax(axis=1)
        return found

    @property
    def levels(self) -> list[Level]:
        """``[c]``: the class of each factor."""
        depths = [_depth(place, self.n_layers) for place in self.locations]
        names: list[Level] = ["low", "mid", "high"]
        by_place = [names[sum(depth >= third for third in THIRDS)] for depth in depths]
        alive = self.values.max(axis=1) > 0
        return [
            by_place[peak] if fires else "silent"
            for peak, fires in zip(self.peak.tolist(), alive.tolist(), strict=True)
        ]

    def strongest(self, n: int | None = None) -> list[int]:
        """The factors with the highest peaks that are active anywhere, highest first."""
        highest = self.values.max(axis=1)
        order = np.argsort(-highest, kind="stable")[:n]
        return [int(factor) for factor in order if highest[factor] > 0]

    def to_csv(self) -> str:
        """One line a factor: its number, class, peak, and its importance at each location."""
        out = io.StringIO(newline="")
        writer = csv.writer(out, lineterminator="\n")
        writer.writerow(["factor", "level", "peak", *map(str, self.locations)])
        for factor, (level, peak) in enumerate(zip(self.levels, self.peak, strict=True)):
            where = "" if level == "silent" else str(self.locations[peak])
            writer.writerow([factor, level, where, *self.values[factor].tolist()])
        return out.getvalue()


def importance(
    examples: FactorExamples, n: int | None = None, *, relative: bool = False
) -> Importance:
    """The importance of every factor at each location.

    Args:
        examples: with at least ``n`` examples asked for.
        n: how many of the largest scores to take the mean of; default: as many as were asked for. It is
            never more than there are tokens.
        relative: divide scores by the length of the activations at their location.
    """
    n = examples.n_examples if n is None else n
    if not 1 <= n <= examples.n_examples:
        raise InputError(
            f"n must lie in 1 to {examples.n_examples}, the examples that were collected; found {n}."
        )
    n = min(n, max(1, examples.n_tokens))
    columns = []
    for place, (factor, score, _) in examples.entries.items():
        rank = np.arange(len(factor)) - np.searchsorted(factor, factor)
        some = rank < n
        sums = np.bincount(
            factor[some], weights=score[some].astype(np.float64), minlength=examples.n_factors
        )
        scale = examples.rms[place] if relative else 1.0
        columns.append(sums / n / (scale or 1.0))
    return Importance(
        np.stack(columns, axis=1),
        examples.locations,
        n,
        int(examples.settings["n_layers"]),
        relative,
        [examples.rms[place] for place in examples.entries],
    )


def _depth(place: ActivationLocation, n_layers: int) -> float:
    """How far into the model the middle of a location's layer lies, as a share of its layers."""
    return (place.depth(n_layers) + 0.5) / n_layers


def plot_importance(path: str | Path, found: Importance, factors: Sequence[int]) -> None:
    """Draw the curves of some factors to a file, whose ending (.svg, .png, .pdf) decides its format.

    Raises:
        MissingExtraError: matplotlib is not installed; it comes with the extra ``plots``.
    """
    check_matplotlib()
    import matplotlib
    from matplotlib.figure import Figure

    if Path(path).suffix not in (".svg", ".png", ".pdf"):
        raise InputError(f"expected a file ending in .svg, .png or .pdf, found {path}.")
    layers = [place.depth(found.n_layers) for place in found.locations]
    with matplotlib.rc_context({"svg.hashsalt": "neuron_explainer", "font.size": 9}):
        figure = Figure(figsize=(6.4, 3.6), layout="constrained")
        axes = figure.add_subplot()
        axes.spines[["top", "right"]].set_visible(False)
        for index, factor in enumerate(factors):
            colour = COLOURS[index % len(COLOURS)]
            label = f"factor {factor}"
            axes.plot(layers, found.values[factor], marker="o", color=colour, label=label)
        axes.set_xlabel("layer")
        axes.set_xticks(layers)
        axes.set_ylim(bottom=0)
        relative = ", in lengths of activations" if found.relative else ""
        axes.set_ylabel(f"mean of the top {found.n} scores{relative}")
        if factors:
            axes.legend(frameon=False)
        with files.atomic_write(path) as temporary:
            form = Path(path).suffix[1:]
            dated = {"svg": {"Date": None}, "pdf": {"CreationDate": None}, "png": {}}[form]
            figure.savefig(temporary, format=form, dpi=150, metadata=dated)
