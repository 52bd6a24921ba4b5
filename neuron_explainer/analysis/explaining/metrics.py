"""Measures of predictions, and how sure they are.

Intervals are bootstrap intervals: texts are drawn again with replacement, active and inactive ones apart.
To each class one text is added that is half right. Without it, a sample that is all right would have an
interval of width 0, however small it is; with it, intervals cover the true value as often as they say
(a test simulates it).

Shape legend: ``n`` texts, ``p`` active ones, ``m`` inactive ones, ``r`` rounds of the bootstrap.
"""

import math
from collections.abc import Sequence
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from neuron_explainer.analysis.explaining.explanation import Counts

Doubles = npt.NDArray[np.float64]
ROUNDS = 1000
_POWER = 1.959964 + 0.841621  # quantiles of the normal distribution: 95 % two-sided, power 0.8


class Estimate(NamedTuple):
    """A figure and how sure it is."""

    value: float
    low: float
    """The 95 % interval."""
    high: float
    error: float
    """The standard error."""


# --- figures ---


def ratio(a: float, b: float) -> float | None:
    """``a / b``; None if ``b`` is 0."""
    return a / b if b else None


def balanced_accuracy(counts: Counts) -> float | None:
    """The mean of the shares of active and of inactive texts that are judged right."""
    of_active = ratio(counts.tp, counts.tp + counts.fn)
    of_inactive = ratio(counts.tn, counts.tn + counts.fp)
    return None if of_active is None or of_inactive is None else (of_active + of_inactive) / 2


def classification(counts: Counts) -> dict[str, float | None]:
    """Accuracy, precision, recall and F1. Precision and F1 are None where nothing is judged active."""
    return {
        "accuracy": ratio(counts.tp + counts.tn, counts.judged),
        "precision": ratio(counts.tp, counts.tp + counts.fp),
        "recall": ratio(counts.tp, counts.tp + counts.fn),
        "F1": ratio(2 * counts.tp, 2 * counts.tp + counts.fp + counts.fn),
    }


def auc(active: npt.ArrayLike, inactive: npt.ArrayLike) -> float | None:
    """The probability that an active text has a higher value than an inactive one; ties count half.

    Args:
        active: ``[p]`` values.
        inactive: ``[m]`` values.
    """
    a, b = np.asarray(active, np.float64), np.asarray(inactive, np.float64)
    if not len(a) or not len(b):
        return None
    return float(_wins(a, b).mean())


def pearson(a: npt.ArrayLike, b: npt.ArrayLike) -> float | None:
    """The correlation of two vectors; None if one of them is constant."""
    sums = _sums([(np.asarray(a, np.float64), np.asarray(b, np.float64))])
    found = float(_correlation(sums.sum(axis=0)))
    return None if math.isnan(found) else found


def pearson_within(pairs: Sequence[tuple[Doubles, Doubles]]) -> Doubles:
    """``[n]``: the correlation within each text; NaN where one side is constant."""
    # Each text by itself: on the scale of another one, its squares could be too small to be told from 0.
    sums = [_sums([pair])[0] for pair in pairs]
    return _correlation(np.stack(sums) if sums else np.zeros((0, 6)))


# --- intervals ---


def of_balanced_accuracy(
    active: npt.ArrayLike, inactive: npt.ArrayLike, seed: int = 0
) -> Estimate | None:
    """The balanced accuracy with its interval; None without active or without inactive texts.

    Args:
        active: ``[p]``: how right each active text was judged, 0 or 1.
        inactive: ``[m]``: the same for inactive texts.
        seed: of the bootstrap.
    """
    a, b = np.asarray(active, np.float64), np.asarray(inactive, np.float64)
    if not len(a) or not len(b):
        return None
    drawn = (_means(a, 0.5, seed) + _means(b, 0.5, seed + 1)) / 2
    return _at_least(_estimate(float((a.mean() + b.mean()) / 2), drawn), len(a), len(b))


def of_auc(active: npt.ArrayLike, inactive: npt.ArrayLike, seed: int = 0) -> Estimate | None:
    """The area under the curve with its interval; None without active or without inactive texts."""
    a, b = np.asarray(active, np.float64), np.asarray(inactive, np.float64)
    if not len(a) or not len(b):
        return None
    wins = np.full((len(a) + 1, len(b) + 1), 0.5)
    wins[:-1, :-1] = _wins(a, b)
    of_a, of_b = _weights(len(a), len(a) + 1, seed), _weights(len(b), len(b) + 1, seed + 1)
    drawn = ((of_a @ wins) * of_b).sum(axis=1)
    return _at_least(_estimate(float(wins[:-1, :-1].mean()), drawn), len(a), len(b))


def of_mean(values: npt.ArrayLike, seed: int = 0) -> Estimate | None:
    """The mean of values from 0 to 1, one for each text, with its interval; None if there are none."""
    x = np.asarray(values, np.float64)
    if not len(x):
        return None
    return _at_least(_estimate(float(x.mean()), _means(x, 0.5, seed)), len(x), len(x))


def of_pearson(pairs: Sequence[tuple[Any, Any]], seed: int = 0) -> Estimate | None:
    """The correlation over all tokens of all texts, with its interval; texts are drawn, not tokens.

    Args:
        pairs: for each text the true and the predicted value of each of its tokens.
        seed: of the bootstrap.
    """
    if len(pairs) < 2:
        return None
    sums = _sums([(np.asarray(a, np.float64), np.asarray(p, np.float64)) for a, p in pairs])
    value = float(_correlation(sums.sum(axis=0)))
    if math.isnan(value):
        return None
    drawn = _correlation(_weights(len(sums), len(sums), seed) @ sums)
    drawn = drawn[~np.isnan(drawn)]
    return _estimate(value, drawn) if len(drawn) > ROUNDS // 2 else None


def of_difference(
    active: tuple[npt.ArrayLike, npt.ArrayLike],
    inactive: tuple[npt.ArrayLike, npt.ArrayLike],
    seed: int = 0,
) -> Estimate | None:
    """The difference of two balanced accuracies on the same texts (paired bootstrap).

    Args:
        active: for each of the two, ``[p]``: how right each active text was judged, 0 or 1.
        inactive: for each of the two, ``[m]``.
        seed: of the bootstrap.
    """
    a, b = (np.subtract(*(np.asarray(x, np.float64) for x in both)) for both in (active, inactive))
    if not len(a) or not len(b):
        return None
    drawn = (_means(a, 0.0, seed) + _means(b, 0.0, seed + 1)) / 2
    return _at_least(_estimate(float((a.mean() + b.mean()) / 2), drawn), len(a), len(b))


def smallest_difference(error: float) -> float:
    """The true difference that is found with probability 0.8, at the 5 % level, given its standard error."""
    return _POWER * error


def _estimate(value: float, drawn: Doubles) -> Estimate:
    low, high = np.quantile(drawn, [0.025, 0.975])
    return Estimate(
        value, min(float(low), value), max(float(high), value), float(drawn.std(ddof=1))
    )


def _at_least(estimate: Estimate, n_active: int, n_inactive: int) -> Estimate:
    """The estimate with a standard error of at least what one wrong text in each class would make: where
    all texts of the sample are right, or two judges agree on all, the next one may still differ."""
    least = math.hypot(1 / (n_active + 1), 1 / (n_inactive + 1)) / 2
    return estimate._replace(error=max(estimate.error, least))


@lru_cache(maxsize=64)
def _weights(n: int, n_different: int, seed: int) -> Doubles:
    """``[r, n_different]``: the share of each text among ``n`` that are drawn, in each round."""
    random = np.random.RandomState(seed)
    found = random.multinomial(n, np.full(n_different, 1 / n_different), ROUNDS) / n
    found.flags.writeable = False
    return found


def _means(values: Doubles, added: float, seed: int) -> Doubles:
    """``[r]`` means of samples of values and one more."""
    weights = _weights(len(values), len(values) + 1, seed)
    drawn: Doubles = weights @ np.append(values, added)
    return drawn


def _wins(a: Doubles, b: Doubles) -> Doubles:
    found: Doubles = (a[:, None] > b) + 0.5 * (a[:, None] == b)
    return found


def _sums(pairs: Sequence[tuple[Doubles, Doubles]]) -> Doubles:
    """``[n, 6]``: for each text the number of tokens and the sums of a, p, aa, pp and ap."""
    some = [pair for pair in pairs if len(pair[0])]
    if not some:
        return np.zeros((len(pairs), 6))
    a, p = (np.concatenate(side) for side in zip(*some, strict=True))
    a, p = _centred(a), _centred(p)
    length = np.array([len(true) for true, _ in some])
    columns = np.stack([np.ones(len(a)), a, p, a * a, p * p, a * p])
    found: Doubles = np.add.reduceat(columns, np.cumsum(length) - length, axis=1).T
    return found


def _centred(x: Doubles) -> Doubles:
    """``x`` about its mean and on a scale of its own, which changes no correlation.

    Squares of the values as they are could overflow or underflow, and their sums would lose digits where
    the mean is far from 0.
    """
    x = x / (np.abs(x).max() or 1.0)
    x = x - x.mean()
    found: Doubles = x / (np.abs(x).max() or 1.0)
    return found


def _correlation(sums: Doubles) -> Doubles:
    """``[..., 6] -> [...]``; NaN where one of the two is constant."""
    n, a, p, aa, pp, ap = np.moveaxis(sums, -1, 0)
    n = np.maximum(n, 1)
    of_a, of_p = aa - a * a / n, pp - p * p / n
    # What is left of a constant is rounding.
    constant = (of_a <= 1e-12 * np.maximum(aa, 1e-300)) | (of_p <= 1e-12 * np.maximum(pp, 1e-300))
    lengths = np.sqrt(np.where(constant, 1.0, of_a)) * np.sqrt(np.where(constant, 1.0, of_p))
    found: Doubles = np.where(constant, np.nan, (ap - a * p / n) / lengths)
    return np.clip(found, -1, 1)
