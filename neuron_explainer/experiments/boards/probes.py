"""Linear probes: what a linear map can read from an activation, beside what guessing gets.

A probe is scikit-learn's multinomial logistic regression on standardised activations. Boards are split, not
cells: no cell of a board that a probe is tested on was seen when it was trained.

Shape legend: ``c`` cells, ``d`` width, ``y`` classes.
"""

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from neuron_explainer.errors import InputError, optional_module
from neuron_explainer.experiments.boards.drawing import Flags
from neuron_explainer.experiments.boards.objects import EMPTY, Ints
from neuron_explainer.experiments.boards.recording import Floats, Recording, Target
from neuron_explainer.models.locations import ActivationLocation
from neuron_explainer.tables import text_table


@dataclass(frozen=True, eq=False)
class Probe:
    """A linear map from activations to scores of classes."""

    classes: Ints
    """``[y]``."""
    weights: Floats
    """``[y, d]``, on activations as they are."""
    biases: Floats
    """``[y]``."""

    def scores(self, x: Floats) -> Floats:
        """``[..., d] -> [..., y]``."""
        return np.asarray(x @ self.weights.T + self.biases)

    def predict(self, x: Floats) -> Ints:
        """The class of the highest score, ``[..., d] -> [...]``."""
        return np.asarray(self.classes[self.scores(x).argmax(-1)])

    def accuracy(self, x: Floats, labels: Ints) -> float:
        """The share of activations ``[c, d]`` whose label ``[c]`` is predicted."""
        return float((self.predict(x) == labels).mean())


def fit(x: Floats, labels: Ints, *, penalty: float = 1.0, iterations: int = 300) -> Probe:
    """A probe for activations ``[c, d]`` and labels ``[c]``.

    Args:
        penalty: strength of the L2 penalty on weights of standardised activations.
        iterations: of L-BFGS at most; an accuracy measured earlier is a lower bound.
    """
    optional_module("sklearn", "probes", "scikit-learn")
    from sklearn.exceptions import ConvergenceWarning
    from sklearn.linear_model import LogisticRegression

    if len(np.unique(labels)) < 2:
        raise InputError(f"a probe needs two classes or more, found {np.unique(labels).tolist()}.")
    x = x.astype(np.float64)
    mean, scale = x.mean(0), x.std(0)
    scale[scale < 1e-9] = 1.0  # constant: standardised to zero, and left alone
    regression = LogisticRegression(C=1 / penalty, max_iter=iterations, tol=1e-3)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        regression.fit((x - mean) / scale, labels)
    weights, biases = regression.coef_ / scale, regression.intercept_
    biases = biases - weights @ mean
    if len(weights) == 1:  # of two classes scikit-learn keeps one
        weights, biases = (
            np.concatenate([-weights, weights]) / 2,
            np.concatenate([-biases, biases]) / 2,
        )
    return Probe(regression.classes_, weights.astype(np.float32), biases.astype(np.float32))


@dataclass(frozen=True)
class ProbeResult:
    """What a probe reads at a place, beside what the most frequent class would get."""

    place: ActivationLocation
    target: Target
    accuracy: float
    """Mean over splits, on boards held out."""
    spread: float
    """Standard deviation over splits."""
    chance: float
    """Share of the most frequent class of the training cells among those held out."""
    n_cells: int
    """Held-out cells."""


def cells_to_probe(recording: Recording, target: Target) -> Flags:
    """The cells that a target is asked of, ``[n, s]``: hidden ones, whose token the model has to infer.

    Of roots and composites only cells of objects have a label; a place is asked of all cells.
    """
    if target == "place":
        return np.ones_like(recording.hidden)
    return np.asarray(recording.hidden & (recording.labels(target) != EMPTY))


def probe_everywhere(
    recording: Recording,
    targets: Sequence[Target],
    *,
    seeds: Sequence[int] = (0,),
    held_out: float = 0.4,
    cells: int = 2500,
) -> list[ProbeResult]:
    """Probes for each target at each recorded place.

    Args:
        seeds: a split of the boards each.
        held_out: share of the boards that probes are tested on.
        cells: at most so many cells to learn from.
    """
    results = []
    for target in targets:
        labels, usable = recording.labels(target), cells_to_probe(recording, target)
        splits = [_split(usable, seed, held_out, cells) for seed in seeds]
        for place, x in recording.activations.items():
            scored = [
                (
                    fit(x[train], labels[train]).accuracy(x[test], labels[test]),
                    _chance(labels, train, test),
                )
                for train, test in splits
            ]
            accuracies, chances = np.array(scored).T
            n = int(splits[0][1].sum())
            results.append(
                ProbeResult(
                    place,
                    target,
                    float(accuracies.mean()),
                    float(accuracies.std()),
                    float(chances.mean()),
                    n,
                )
            )
    return results


def _split(usable: Flags, seed: int, held_out: float, cells: int) -> tuple[Flags, Flags]:
    """The cells to learn from and to be tested on, ``[n, s]`` each, of different boards."""
    rng = np.random.default_rng([seed, 23])
    test_board = rng.permutation(len(usable)) < held_out * len(usable)
    train, test = usable & ~test_board[:, None], usable & test_board[:, None]
    places = np.flatnonzero(train)
    if len(places) > cells:
        train = np.zeros_like(train)
        train.flat[rng.choice(places, cells, replace=False)] = True
    return train, test


def _chance(labels: Ints, train: Flags, test: Flags) -> float:
    """What always naming the most frequent class gets."""
    values, counts = np.unique(labels[train], return_counts=True)
    return float((labels[test] == values[counts.argmax()]).mean())


def probe_table(results: Sequence[ProbeResult]) -> str:
    """Accuracies in per cent by place and target, chance in the last line."""
    targets = list(dict.fromkeys(result.target for result in results))
    by_place: dict[str, dict[str, ProbeResult]] = {}
    for result in results:
        by_place.setdefault(str(result.place), {})[result.target] = result
    rows = [
        [place, *(_cell(found.get(target)) for target in targets)]
        for place, found in by_place.items()
    ]
    chance: list[Any] = ["chance (most frequent class)"]
    for target in targets:
        chances = [result.chance for result in results if result.target == target]
        chance.append(f"{100 * sum(chances) / len(chances):.1f}")
    return text_table(["record point", *targets], [*rows, chance], rule=True)


def _cell(result: ProbeResult | None) -> str:
    if result is None:
        return ""
    spread = f" ± {100 * result.spread:.1f}" if result.spread else ""
    return f"{100 * result.accuracy:.1f}{spread}"
