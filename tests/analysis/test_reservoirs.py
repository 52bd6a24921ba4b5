"""Reservoirs: what is drawn is drawn with the right probability, and merging changes nothing."""

from collections.abc import Callable

import numpy as np
import pytest

from neuron_explainer.analysis.collation.examples import _weighted
from neuron_explainer.analysis.collation.reservoirs import (
    Entries,
    Reservoir,
    Strata,
    mix,
    uniform,
    unit_hashes,
)
from tests.analysis import collated

N = 20  # contexts
VALUES = np.linspace(0.5, 4, N).astype(np.float32)
CHI_SQUARE = 36.19  # p = 0.01 with 19 degrees of freedom

Draw = Callable[[np.ndarray], np.ndarray]


def chosen(hashes: np.ndarray, key: Draw) -> np.ndarray:
    """Which of the contexts each of many draws of one takes."""
    n = len(hashes)
    reservoir = Reservoir(n, 1, 1)
    row, context = np.divmod(np.arange(n * N), N)
    u = uniform(hashes[row], 1000 + 37 * context)
    reservoir.offer(row, key(u).astype(np.float32), context)
    return np.bincount(reservoir.entries.position[:, 0], minlength=N)


def chi_square(counts: np.ndarray, share: np.ndarray) -> float:
    expected = counts.sum() * share / share.sum()
    return float(((counts - expected) ** 2 / expected).sum())


def hashes_of(kind: str, n: int) -> np.ndarray:
    """Of ``n`` units with one seed, or of one unit with ``n`` seeds."""
    if kind == "units":
        return unit_hashes(5, n)
    return np.concatenate([unit_hashes(seed, 1) for seed in range(n)])


@pytest.mark.parametrize("kind", ["units", "seeds"])
def test_one_of_all_with_the_same_probability(kind: str) -> None:
    counts = chosen(hashes_of(kind, 5000), lambda u: -u)
    assert chi_square(counts, np.ones(N)) < CHI_SQUARE
    assert chi_square(counts, VALUES) > 10 * CHI_SQUARE


@pytest.mark.parametrize("kind", ["units", "seeds"])
@pytest.mark.parametrize("exponent", [1.0, 2.0])
def test_one_with_a_probability_in_proportion_to_its_weight(kind: str, exponent: float) -> None:
    values = np.tile(VALUES, 5000)
    counts = chosen(hashes_of(kind, 5000), lambda u: _weighted(u, values, exponent))
    assert chi_square(counts, VALUES**exponent) < CHI_SQUARE
    assert chi_square(counts, VALUES ** (3 - exponent)) > 3 * CHI_SQUARE


def test_weighted_keys_of_tiny_values_are_finite_and_kept() -> None:
    value = np.array([1e-45, 1e-30, 1.0], np.float32)
    key = _weighted(np.array([0.5, 0.5, 0.5]), value, 2.0)
    assert np.isfinite(key).all()
    reservoir = Reservoir(1, 3, 1)
    reservoir.offer(np.zeros(3, np.int64), key, np.arange(3))
    assert sorted(reservoir.entries.position[0].tolist()) == [0, 1, 2]


def test_the_hash_is_the_one_of_the_docstring() -> None:
    rng = np.random.default_rng(0)
    seeds, units, positions = rng.integers(0, 2**62, (3, 50))
    for seed, unit, position in zip(seeds, units % 100, positions, strict=True):
        found = uniform(unit_hashes(int(seed), 100)[[int(unit)]], np.array([position]))
        assert found[0] == collated.u_of(int(seed), int(unit), int(position))
    assert mix(np.array([0], np.uint64))[0] == 0xE220A8397B1DCDAF  # of the paper's generator


def entries_of(key: np.ndarray, position: np.ndarray, value: np.ndarray) -> Entries:
    zeros = np.zeros(len(key), np.uint16)
    return Entries(key, position, value, zeros, zeros, zeros, value[:, None].astype(np.float16))


@pytest.mark.parametrize("n_pieces", [1, 3, 20])
def test_random_pieces_in_any_order(n_pieces: int) -> None:
    """Few different keys, so that positions decide; ten entries of forty rows."""
    rng = np.random.default_rng(n_pieces)
    n = 3000
    row, key = rng.integers(0, 40, n), rng.integers(0, 6, n).astype(np.float32)
    position, value = rng.permutation(n), rng.normal(size=n).astype(np.float32)
    reservoir = Reservoir(40, 10, 1)
    for piece in np.array_split(rng.permutation(n), n_pieces):
        reservoir.add(row[piece], entries_of(key[piece], position[piece], value[piece]))
    for which in range(40):
        own = np.flatnonzero(row == which)
        best = own[np.lexsort((position[own], -key[own]))][:10]
        _, found = reservoir.take(np.array([which]))
        assert sorted(found.position.tolist()) == sorted(position[best].tolist())
        by_position = dict(zip(found.position.tolist(), found.value.tolist(), strict=True))
        assert by_position == {int(position[i]): float(value[i]) for i in best}


def test_bins_fall_into_the_shared_reservoir_as_the_largest_value_grows() -> None:
    """Small values first, in the worst order: each is the largest so far."""
    rng = np.random.default_rng(0)
    n = 400
    value = np.sort(2.0 ** rng.uniform(-15, 15, n)).astype(np.float32)
    unit, position = np.zeros(n, np.int64), np.arange(n)
    key = -rng.random(n).astype(np.float32)
    growing, at_once = Strata(1, 2, 1, 10), Strata(1, 2, 1, 10)
    for i in range(n):
        one = slice(i, i + 1)
        growing.add(unit[one], entries_of(key[one], position[one], value[one]))
    at_once.add(unit, entries_of(key, position, value))
    for name in ("key", "position"):
        one, other = (getattr(s.reservoir.entries, name) for s in (growing, at_once))
        assert np.array_equal(np.sort(one, axis=1), np.sort(other, axis=1))
    assert np.array_equal(growing.limits(5), at_once.limits(5))
