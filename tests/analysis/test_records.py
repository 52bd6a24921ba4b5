"""Figures in memory: moments, co-activation, histograms of density."""

import numpy as np
import pytest

from neuron_explainer.analysis.records import (
    CoActivation,
    Collected,
    ExampleTable,
    Moments,
    UnitStatistics,
    group_number,
)
from neuron_explainer.errors import InputError


def moments(values: np.ndarray) -> Moments:
    """Of the columns of ``[t, u]``, by the definition."""
    d = values - values.mean(0)
    count = np.full(values.shape[1], len(values))
    return Moments(count, values.mean(0), *((d**p).sum(0) for p in (2, 3, 4)))


def close(a: Moments, b: Moments) -> None:
    for name in ("count", "mean", "m2", "m3", "m4"):
        np.testing.assert_allclose(getattr(a, name), getattr(b, name), rtol=1e-11, atol=1e-9)


@pytest.mark.parametrize("cut", [1, 7, 99])
def test_merged_moments_are_those_of_all_values(cut: int) -> None:
    values = np.random.default_rng(0).gamma(2.0, size=(100, 5)) + 50
    close(moments(values[:cut]).merge(moments(values[cut:])), moments(values))
    padded = np.concatenate([values, np.zeros((cut, 5))])
    close(moments(values).with_zeros(cut), moments(padded))
    close(moments(values).with_zeros(np.full(5, cut)), moments(padded))


def test_moments_of_nothing_are_no_nan() -> None:
    empty = Moments.empty(2)
    one = moments(np.full((3, 2), 4.0))
    close(empty.merge(empty), empty)
    close(empty.merge(one), one)
    close(one.merge(empty), one)
    for each in (empty, one):
        assert not each.variance.any()
        assert not each.skewness.any()
        assert not each.kurtosis.any()


def test_skewness_and_kurtosis_of_known_distributions() -> None:
    found = moments(np.random.default_rng(0).exponential(size=(400_000, 1)))
    assert found.variance == pytest.approx(1, abs=0.02)
    assert found.skewness == pytest.approx(2, abs=0.05)
    assert found.kurtosis == pytest.approx(9, abs=0.6)


def coactivation(active: np.ndarray) -> CoActivation:
    """Of ``[t, u]`` bool, all others as partners."""
    both = active.T.astype(int) @ active.astype(int)
    others = [[j for j in range(len(both)) if j != i] for i in range(len(both))]
    partner = np.array(others, np.int32)
    counts = np.take_along_axis(both, partner, 1)
    return CoActivation(len(active), both.diagonal().copy(), partner, counts)


def test_figures_of_pairs_that_are_equal_nested_exclusive_and_independent() -> None:
    rng = np.random.default_rng(0)
    a, b = rng.random((2, 200_000)) < 0.3
    inside = a & (rng.random(200_000) < 0.5)
    found = coactivation(np.stack([a, a, inside, ~a, b], 1))
    phi = dict(zip(found.partner[0].tolist(), found.phi[0].tolist(), strict=True))
    assert phi[1] == pytest.approx(1)
    assert 0 < phi[2] < 1
    assert phi[3] == pytest.approx(-1)
    assert abs(phi[4]) < 0.02
    place = found.partner[2].tolist().index(0)
    assert found.both[2, place] == found.count[2]  # whenever inside is active, a is
    assert found.jaccard[0, 0] == 1
    assert found.pmi[0, 0] == pytest.approx(-np.log(a.mean()))
    pearson = np.corrcoef(a, inside)[0, 1]
    assert phi[2] == pytest.approx(pearson, abs=1e-9)


def test_no_partner_has_no_figures() -> None:
    one = CoActivation(10, np.array([3, 0]), np.full((2, 2), -1, np.int32), np.zeros((2, 2), int))
    for figure in (one.jaccard, one.pmi, one.phi):
        assert not figure.any()


def table(units: list[int], groups: list[int], ranks: list[int]) -> ExampleTable:
    n = len(units)
    return ExampleTable(
        unit=np.array(units, np.int32),
        group=np.array(groups, np.uint8),
        interval=np.zeros(n, np.uint8),
        rank=np.array(ranks, np.uint16),
        start=np.arange(n),
        length=np.ones(n, np.uint16),
        peak=np.zeros(n, np.uint16),
        value=np.ones(n, np.float32),
        activations=np.zeros((n, 1), np.float16),
        key=np.ones(n),
    )


def test_examples_of_a_unit() -> None:
    both = ExampleTable.concatenate([table([2, 0, 2], [0, 3, 0], [1, 0, 0]), table([2], [3], [0])])
    assert both.unit.tolist() == [0, 2, 2, 2]
    assert both.of_unit(2, "top").start.tolist() == [2, 0]
    assert len(both.of_unit(2)) == 3
    assert len(both.of_unit(1)) == 0
    with pytest.raises(InputError, match="top, bottom"):
        group_number("best")


def test_dead_dense_and_rare_units() -> None:
    active = Moments.empty(3)
    count = np.array([0, 1, 9_000_000])
    active = Moments(count, active.mean, active.m2, active.m3, active.m4)
    statistics = UnitStatistics(
        10_000_000,
        active,
        active,
        np.zeros(3, np.float32),
        np.zeros(3, np.float32),
        np.full(3, -1),
        np.zeros((3, 2), np.uint32),
    )
    found = Collected(
        "latent", "0/mlp.post_act", "x", False, statistics, table([], [], []), None, {}, {}
    )
    assert found.dead.tolist() == [0]
    assert found.dense().tolist() == [2]
    assert found.statistics.density[1] == 1e-7
    counts, edges = found.density_histogram()
    assert counts.sum() == 2
    assert counts[np.searchsorted(edges, 1.001e-7) - 1] == 1
