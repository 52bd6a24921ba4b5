"""Measures against brute force, and intervals against simulations with known answers."""

from itertools import product

import numpy as np
import pytest

from neuron_explainer.analysis.explaining import metrics
from neuron_explainer.analysis.explaining.explanation import Counts


def test_balanced_accuracy_and_the_other_shares() -> None:
    counts = Counts(tp=6, fp=1, tn=3, fn=2, failed=5, unparsable=7)
    assert metrics.balanced_accuracy(counts) == (6 / 8 + 3 / 4) / 2
    assert metrics.classification(counts) == {
        "accuracy": 9 / 12,
        "precision": 6 / 7,
        "recall": 6 / 8,
        "F1": 12 / 15,
    }


def test_figures_that_are_not_defined_are_none() -> None:
    assert metrics.balanced_accuracy(Counts(tp=3)) is None
    assert metrics.classification(Counts(tn=3))["precision"] is None
    assert metrics.auc([], [1.0]) is None
    assert metrics.pearson([1, 1, 1], [1, 2, 3]) is None
    assert metrics.pearson([0.1 + 0.2] * 9, np.arange(9.0)) is None
    assert metrics.of_balanced_accuracy([], [1]) is None
    assert metrics.of_difference(([], []), ([1], [0])) is None


def test_auc_is_the_share_of_pairs_in_order() -> None:
    random = np.random.default_rng(0)
    a, b = random.integers(0, 6, 30), random.integers(0, 5, 40)
    pairs = [1.0 if x > y else 0.5 if x == y else 0.0 for x, y in product(a, b)]
    assert metrics.auc(a, b) == pytest.approx(np.mean(pairs), abs=1e-15)


def test_pearson_over_all_tokens_is_not_the_mean_of_those_within_texts() -> None:
    a = [np.array([0, 1, 0, 1]), np.array([0, 10, 0, 10])]
    p = [np.array([0, 1, 0, 1]), np.array([0, 1, 0, 1])]
    assert [metrics.pearson(x, y) for x, y in zip(a, p, strict=True)] == pytest.approx([1, 1])
    whole = metrics.pearson(np.concatenate(a), np.concatenate(p))
    assert whole == pytest.approx(0.6539, abs=5e-5)
    found = metrics.of_pearson(list(zip(a, p, strict=True)))
    assert found is not None
    assert found.value == whole


def test_pearson_is_numpys_and_a_linear_map_leaves_it() -> None:
    random = np.random.default_rng(1)
    a, p = random.gamma(1, 2, 500) + 1e4, random.normal(size=500)
    expected = np.corrcoef(a, p)[0, 1]
    assert metrics.pearson(a, p) == pytest.approx(expected, abs=1e-12)
    assert metrics.pearson(a, 3 * p - 7) == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize("n", [20, 50])
def test_intervals_of_balanced_accuracy_cover_the_truth(n: int) -> None:
    random, hits = np.random.default_rng(n), 0
    for _ in range(300):
        p, q = random.uniform(0.5, 0.98, 2)
        found = metrics.of_balanced_accuracy(random.random(n) < p, random.random(n) < q)
        assert found is not None
        hits += found.low <= (p + q) / 2 <= found.high
    assert 0.92 <= hits / 300 <= 0.98


def test_intervals_of_the_auc_cover_the_truth() -> None:
    random, hits = np.random.default_rng(3), 0
    from math import erf

    for _ in range(300):
        shift = random.uniform(0, 2)
        found = metrics.of_auc(random.normal(shift, 1, 50), random.normal(0, 1, 50))
        assert found is not None
        hits += found.low <= (1 + erf(shift / 2)) / 2 <= found.high
    assert 0.92 <= hits / 300 <= 0.98


def test_intervals_of_pearson_cover_the_truth() -> None:
    random, hits = np.random.default_rng(4), 0
    for _ in range(300):
        rho = random.uniform(-0.5, 0.9)
        a = random.normal(size=(60, 8))
        p = rho * a + np.sqrt(1 - rho**2) * random.normal(size=a.shape)
        found = metrics.of_pearson(list(zip(a, p, strict=True)))
        assert found is not None
        hits += found.low <= rho <= found.high
    assert 0.92 <= hits / 300 <= 0.98


def test_intervals_of_differences_cover_the_truth() -> None:
    random, hits = np.random.default_rng(5), 0
    for _ in range(300):
        p, q, both = random.uniform(0.5, 0.95), random.uniform(0.5, 0.95), random.uniform(0, 1)
        sides = []
        for _ in range(2):
            u = random.random((2, 50))
            v = np.where(random.random(50) < both, u[0], u[1])  # how alike the two judges are
            sides.append(((u[0] < p).astype(float), (v < q).astype(float)))
        found = metrics.of_difference(sides[0], sides[1])
        assert found is not None
        hits += found.low - 1e-9 <= p - q <= found.high + 1e-9
    assert 0.92 <= hits / 300 <= 0.985


def test_a_sample_that_is_all_right_is_not_certain() -> None:
    few = metrics.of_balanced_accuracy(np.ones(5), np.ones(5))
    many = metrics.of_balanced_accuracy(np.ones(50), np.ones(50))
    assert few is not None
    assert many is not None
    assert few.low < many.low < few.value == many.value == 1
    assert metrics.smallest_difference(few.error) > metrics.smallest_difference(many.error) > 0
    alike = metrics.of_difference((np.ones(5), np.ones(5)), (np.ones(5), np.ones(5)))
    assert alike is not None
    assert (alike.value, alike.low, alike.high) == (0, 0, 0)
    assert alike.error > 0


def test_the_smallest_difference_is_found_four_times_in_five() -> None:
    random, found = np.random.default_rng(6), 0
    error = float(np.sqrt(2 * 0.7 * 0.3 / 200 / 2))
    gap = metrics.smallest_difference(error)
    for _ in range(400):
        sides = []
        for _ in range(2):
            sides.append((random.random(200) < 0.7 + gap / 2, random.random(200) < 0.7 - gap / 2))
        estimate = metrics.of_difference(sides[0], sides[1])
        assert estimate is not None
        found += estimate.low > 0
    assert 0.74 <= found / 400 <= 0.88


def test_equal_seeds_give_equal_intervals() -> None:
    right = np.arange(40) % 3 > 0
    one, same, other = (metrics.of_balanced_accuracy(right, right, seed) for seed in (1, 1, 5))
    assert one == same != other


@pytest.mark.parametrize("scale", [1e-300, 1e-170, 1e-9, 1e9, 1e170, 1e300])
def test_the_scale_of_a_text_changes_no_correlation(scale: float) -> None:
    random = np.random.default_rng(2)
    texts = [(random.gamma(1, 2, 9), random.normal(size=9)) for _ in range(3)]
    expected = [np.corrcoef(a, p)[0, 1] for a, p in texts]
    scaled = [(a * scale, p) for a, p in texts]
    assert metrics.pearson_within(scaled) == pytest.approx(expected, abs=1e-9)
    # One text of another scale than the rest leaves theirs as they are.
    mixed = metrics.pearson_within([scaled[0], *texts[1:]])
    assert mixed == pytest.approx(expected, abs=1e-9)
    a, p = (np.concatenate(side) for side in zip(*texts, strict=True))
    assert metrics.pearson(a * scale, p / scale) == pytest.approx(np.corrcoef(a, p)[0, 1], abs=1e-9)
    assert len(metrics.pearson_within([])) == 0
    assert np.isnan(metrics.pearson_within([(np.full(4, scale), np.arange(4.0))])).all()
