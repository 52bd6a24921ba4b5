"""Distances between activations along depth, planes to look at them, and how many dimensions they take.

Shape legend: ``c`` cells, ``d`` width, ``k`` directions.
"""

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from neuron_explainer.experiments.boards.drawing import Flags
from neuron_explainer.experiments.boards.objects import Ints
from neuron_explainer.experiments.boards.recording import Floats, Recording, Target
from neuron_explainer.models.locations import ActivationLocation


def distances(x: Floats, y: Floats | None = None) -> Floats:
    """Euclidean distances ``[c, c']`` between rows ``[c, d]`` and rows ``[c', d]`` (default: the same)."""
    y = x if y is None else y
    squares = (x**2).sum(1)[:, None] + (y**2).sum(1)[None] - 2 * x @ y.T
    return np.asarray(np.sqrt(np.maximum(squares, 0)))


def unit(x: Floats) -> Floats:
    """Rows scaled to length 1; rows of zeros stay."""
    norms = np.linalg.norm(x, axis=1, keepdims=True)
    return np.asarray(x / np.where(norms > 0, norms, 1))


def three_distances(x: Floats) -> dict[str, Floats]:
    """Euclidean distances, those of rows of length 1, and 1 - cosine, ``[c, c]`` each."""
    return {
        "Euclidean": distances(x),
        "Euclidean, unit norm": distances(unit(x)),
        "cosine": 1 - unit(x) @ unit(x).T,
    }


@dataclass(frozen=True)
class Spread:
    """How far activations of a class lie apart at a place, beside those of different classes."""

    place: ActivationLocation
    within: float
    """Mean distance between two cells of the same class."""
    between: float
    """Mean distance between two cells of different classes."""
    dimensions: float
    """Participation ratio of the principal variances: how many directions the activations take up."""

    @property
    def ratio(self) -> float:
        """``within / between``: 1 where classes do not matter, near 0 where each is a point."""
        return self.within / self.between if self.between else float("nan")


def participation_ratio(x: Floats) -> float:
    """``(Σ λ)² / Σ λ²`` of the variances λ along principal directions of rows ``[c, d]``."""
    singular = np.linalg.svd(x - x.mean(0), compute_uv=False).astype(np.float64)
    squares = singular**2
    return float(squares.sum() ** 2 / (squares**2).sum()) if squares.sum() > 1e-12 else 0.0


def spreads(
    recording: Recording,
    target: Target,
    chosen: Flags,
    *,
    same_board: bool = False,
    cells: int = 1500,
    seed: int = 0,
) -> list[Spread]:
    """Distances within and between classes at each recorded place, among cells ``chosen`` ``[n, s]``.

    Args:
        same_board: compare cells of one board only, so that the rest of the board is the same for both.
        cells: at most so many cells.
    """
    rng = np.random.default_rng([seed, 31])
    places = np.flatnonzero(chosen)
    if len(places) > cells:
        boards = rng.permutation(len(chosen))  # whole boards, until there are enough cells
        enough = int(np.searchsorted(np.cumsum(chosen[boards].sum(1)), cells)) + 1
        places = np.flatnonzero(chosen & np.isin(np.arange(len(chosen)), boards[:enough])[:, None])
    labels, board = recording.labels(target).reshape(-1)[places], places // chosen.shape[1]
    compared = ~np.eye(len(places), dtype=bool)
    if same_board:
        compared &= board[:, None] == board[None]
    same = labels[:, None] == labels[None]
    found = []
    for place, x in recording.activations.items():
        rows = x.reshape(-1, x.shape[-1])[places]
        apart = distances(rows)
        apart[apart < 1e-3 * np.linalg.norm(rows, axis=1).mean()] = 0  # equal up to rounding
        within, between = apart[same & compared].mean(), apart[~same & compared].mean()
        means = np.stack([rows[labels == label].mean(0) for label in np.unique(labels)])
        found.append(Spread(place, float(within), float(between), participation_ratio(means)))
    return found


class Plane(NamedTuple):
    """The first principal directions of some activations."""

    points: Floats
    """``[c, k]``: where the rows lie on them."""
    shares: Floats
    """``[k]``: share of the variance along each."""
    directions: Floats
    """``[k, d]``."""
    mean: Floats
    """``[d]``."""


def plane(x: Floats, k: int = 2) -> Plane:
    """The first ``k`` principal directions of rows ``[c, d]``; the largest entry of each is positive."""
    mean = x.mean(0)
    _, singular, directions = np.linalg.svd(x - mean, full_matrices=False)
    directions = directions[:k]
    largest = np.take_along_axis(directions, np.abs(directions).argmax(1)[:, None], 1)
    directions = directions * np.sign(largest)
    squares = singular.astype(np.float64) ** 2
    shares = squares[:k] / squares.sum() if squares.sum() else squares[:k]
    return Plane((x - mean) @ directions.T, shares.astype(np.float32), directions, mean)


def variance_shares(x: Floats, factors: dict[str, Ints]) -> dict[str, float]:
    """The share of the variance of rows ``[c, d]`` that lies between the classes of each factor ``[c]``."""
    total = float(((x - x.mean(0)) ** 2).sum())
    found = {}
    for name, labels in factors.items():
        between = 0.0
        for label in np.unique(labels):
            rows = x[labels == label]
            between += len(rows) * float(((rows.mean(0) - x.mean(0)) ** 2).sum())
        found[name] = between / total if total else float("nan")
    return found
