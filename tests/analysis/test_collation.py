"""Collation against brute force over random activations, batch by batch, whatever the order."""

from dataclasses import fields, replace
from typing import Any

import numpy as np
import pytest

from neuron_explainer.activations.corpus import TokenCorpus
from neuron_explainer.activations.windows import TokenWindows
from neuron_explainer.analysis.collation.config import CollateConfig
from neuron_explainer.analysis.collation.examples import bytes_per_unit
from neuron_explainer.analysis.collation.findings import Findings
from neuron_explainer.analysis.collation.places import Places, duplicates_of
from neuron_explainer.analysis.collation.reservoirs import histogram_bin
from neuron_explainer.analysis.collation.seen import PairsSeen
from neuron_explainer.analysis.records import HISTOGRAM_EDGES, ExampleTable
from neuron_explainer.errors import InputError
from tests.analysis.collated import (
    BOS,
    BruteForce,
    check,
    check_examples,
    collate,
    contexts_of,
    corpus_of,
    findings,
    random_values,
)

LENGTHS = [23, 9, 1, 40, 0, 17, 8, 23, 9, 30, 5]
SMALL = CollateConfig(
    top=3,
    intervals=4,
    per_interval=2,
    uniform=3,
    weighted=3,
    inactive=2,
    window=6,
    coactivation_tokens=60,
    partners=3,
)


def windows_of(corpus: TokenCorpus, **how) -> TokenWindows:
    settings = {"concat": True, "bos": BOS, "seed": 0, **how}
    return TokenWindows(corpus, 12, 3, **settings)


@pytest.fixture(scope="module")
def corpus() -> TokenCorpus:
    return corpus_of(LENGTHS, repeats=2)


def wide_values(n_tokens: int, n_units: int) -> np.ndarray:
    """Values over a hundred octaves, with subnormal ones, and a few that only float32 can hold."""
    rng = np.random.default_rng(0)
    values = np.float32(2.0) ** rng.normal(0, 20, size=(n_tokens, n_units)).astype(np.float32)
    values[rng.random(values.shape) < 0.3] = 0
    values[5, :] = 3e-42
    values[9, 2] = 3e38
    return values.astype(np.float32)


@pytest.mark.parametrize("dense", [False, True], ids=["sparse", "dense"])
@pytest.mark.parametrize("signed", [False, True], ids=["positive", "signed"])
@pytest.mark.parametrize("concat", [False, True], ids=["rows", "packed"])
def test_everything_equals_brute_force(
    corpus: TokenCorpus, dense: bool, signed: bool, concat: bool
) -> None:
    values = random_values(len(corpus.tokens), 6)
    if signed or dense:
        values[::3] *= -1
    windows = windows_of(corpus, concat=concat)
    found = collate(windows, values, SMALL, dense=dense, signed=signed)
    check(found, windows, values, SMALL, dense=dense, signed=signed)


@pytest.mark.parametrize(
    "how",
    [{"bos": None}, {"seed": None}, {"seed": 3, "bos": None, "concat": False}],
    ids=["no start token", "in order", "rows"],
)
@pytest.mark.parametrize("keep_bos", [False, True])
def test_other_windows(corpus: TokenCorpus, how: dict[str, Any], keep_bos: bool) -> None:
    config = replace(SMALL, keep_bos=keep_bos)
    values = random_values(len(corpus.tokens), 4)
    windows = windows_of(corpus, **how)
    check(collate(windows, values, config), windows, values, config)


@pytest.mark.parametrize(
    "changes",
    [
        {"top": 100, "uniform": 100, "weighted": 100, "inactive": 100, "per_interval": 100},
        {"window": 100, "weight_exponent": 2.5},
        {"window": 1, "intervals": 1},
        {"top": 0, "uniform": 0, "weighted": 0, "inactive": 0, "intervals": 0},
        {"intervals": 20, "per_interval": 1, "seed": 7},
    ],
    ids=["more than there are", "wide windows", "one token", "none", "many intervals"],
)
def test_other_settings(corpus: TokenCorpus, changes: dict[str, Any]) -> None:
    config = replace(SMALL, **changes)
    values = random_values(len(corpus.tokens), 4, seed=1)
    windows = windows_of(corpus)
    check(collate(windows, values, config), windows, values, config)


@pytest.mark.parametrize("per_interval", [1, 2])
def test_strata_of_many_octaves(corpus: TokenCorpus, per_interval: int) -> None:
    """Most of the bins share a reservoir, whose limit counts for the lowest intervals."""
    config = replace(SMALL, per_interval=per_interval, intervals=8)
    rng = np.random.default_rng(1)
    values = (2.0 ** rng.normal(0, 3, size=(len(corpus.tokens), 8))).astype(np.float32)
    values[rng.random(values.shape) < 0.7] = 0
    windows = TokenWindows(corpus, 4, 5, bos=BOS)
    check(collate(windows, values, config), windows, values, config)


@pytest.mark.parametrize("groups", [{}, {"top": 1, "uniform": 0, "weighted": 0}])
def test_an_interval_with_contexts_is_not_empty(groups: dict[str, Any]) -> None:
    """Most values lie just below the topmost interval, in the bin that it cuts through.

    An interval that holds a bin in which there is any value has an example, and so has the topmost one.
    """
    config = replace(
        SMALL, intervals=5, per_interval=1, inactive=0, coactivation_tokens=0, **groups
    )
    corpus = corpus_of([4] * 150)
    rng = np.random.default_rng(0)
    values = rng.uniform(0.71, 0.79, size=(600, 12)).astype(np.float32)
    rare = rng.random(values.shape) < 0.02
    values[rare] = rng.uniform(0.01, 0.83, size=int(rare.sum()))
    values[rng.integers(0, 600, 12), np.arange(12)] = 1.0
    windows = TokenWindows(corpus, 4, 20, concat=False, seed=None)
    table = collate(windows, values, config).examples.result()[0]
    for unit in range(12):
        brute = BruteForce(windows, values[:, unit], unit, config, False)
        check_examples(table, unit, brute)
        found = table.of_unit(unit, "stratum").interval.tolist()
        assert 0 in found
        peaks = np.array([p.value for p in brute.peaks()])
        for i in range(5):
            inside = peaks[(peaks <= (5 - i) / 5) & (peaks > (4 - i) / 5)]
            bins = np.searchsorted(HISTOGRAM_EDGES, inside, side="right")
            whole = (HISTOGRAM_EDGES[bins - 1] > (4 - i) / 5) & (
                HISTOGRAM_EDGES[bins] <= (5 - i) / 5
            )
            assert i in found or not whole.any()


def test_values_of_all_sizes(corpus: TokenCorpus) -> None:
    values = wide_values(len(corpus.tokens), 4)
    windows, config = windows_of(corpus), replace(SMALL, per_interval=1)
    found = collate(windows, values, config)
    examples = found.examples.result()[0]
    assert np.isfinite(examples.activations).all()
    assert np.isfinite(examples.key).all()
    # Strata and weighted keys, in any order, of values whose largest grows by many octaves.
    found = collate(windows, np.minimum(values, 6e4), config)
    for unit_moments in (found.totals.result().all.kurtosis, found.totals.result().active.skewness):
        assert np.isfinite(unit_moments).all()


def same(a: Findings, b: Findings) -> None:
    """Equal to the bit."""
    one, other = a.totals.result(), b.totals.result()
    for name in ("max", "min", "last_active", "histogram"):
        assert np.array_equal(getattr(one, name), getattr(other, name)), name
    for kind in ("active", "all"):
        for field in fields(one.active):
            pair = [getattr(getattr(x, kind), field.name) for x in (one, other)]
            assert np.array_equal(*pair), field.name
    tables = [x.examples.result() for x in (a, b)]
    assert [table[1] is None for table in tables] == [False, False]
    np.testing.assert_array_equal(tables[0][1], tables[1][1])
    same_examples(tables[0][0], tables[1][0])


def same_examples(a: ExampleTable, b: ExampleTable) -> None:
    for field in fields(ExampleTable):
        assert np.array_equal(getattr(a, field.name), getattr(b, field.name)), field.name


def absorb(found: Findings, other: Findings) -> None:
    found.totals.absorb(other.totals)
    found.examples.raise_to(other.examples.largest)
    for group in other.examples.groups:
        for unit, entries in other.examples.blocks(group, 2):
            found.examples.absorb(group, unit, entries)


@pytest.mark.parametrize("make", [random_values, wide_values])
@pytest.mark.parametrize("seed", range(4))
def test_parts_in_any_order_and_merged_in_any_order(corpus: TokenCorpus, make, seed: int) -> None:
    values = make(len(corpus.tokens), 5)
    values[::4] *= -1
    windows = windows_of(corpus)
    how: dict[str, Any] = {"signed": True, "n_parts": 4}
    whole = collate(windows, values, SMALL, **how)
    n = windows.batches_per_epoch
    rng = np.random.default_rng(seed)
    parts = [[b for b in range(n) if b * 4 // n == part] for part in range(4)]
    order = rng.permutation(4)
    cut = int(rng.integers(1, 4))
    found = findings(5, SMALL, False, True)
    for some in (order[:cut], order[cut:]):
        numbers = [number for part in some for number in parts[part]]
        absorb(found, collate(windows, values, SMALL, numbers=numbers, **how))
    same(whole, found)


def test_sparse_and_dense_are_twins(corpus: TokenCorpus) -> None:
    values = random_values(len(corpus.tokens), 5)
    windows = windows_of(corpus)
    sparse, dense = (collate(windows, values, SMALL, dense=dense) for dense in (False, True))
    same_examples(sparse.examples.result()[0], dense.examples.result()[0])
    one, other = sparse.totals.result(), dense.totals.result()
    assert np.array_equal(one.histogram, other.histogram)
    np.testing.assert_allclose(one.all.m4, other.all.m4, rtol=1e-12)
    assert sparse.together is not None
    assert dense.together is not None
    assert np.array_equal(sparse.together.result(3).partner, dense.together.result(3).partner)


def test_examples_do_not_depend_on_batches_or_the_order_of_windows(corpus: TokenCorpus) -> None:
    values = random_values(len(corpus.tokens), 5)
    tables = []
    for batch_size, seed in ((3, 0), (1, 5), (100, None)):
        windows = TokenWindows(corpus, 12, batch_size, bos=BOS, seed=seed)
        tables.append(collate(windows, values, SMALL).examples.result()[0])
    same_examples(tables[0], tables[1])
    same_examples(tables[0], tables[2])


def test_contexts_are_those_of_the_batches(corpus: TokenCorpus) -> None:
    for concat in (False, True):
        for bos in (None, BOS):
            windows = windows_of(corpus, concat=concat, bos=bos)
            expected = [(c.start, c.length) for c in contexts_of(windows, True)]
            starts, lengths = windows.contexts()
            found = [(s, n) for s, n in zip(starts.tolist(), lengths.tolist(), strict=True) if n]
            assert found == expected


def test_duplicates_are_found_in_the_order_of_the_corpus() -> None:
    corpus = TokenCorpus.of([[1, 2], [3], [1, 2], [1, 2, 3], [3], [3]])
    windows = TokenWindows(corpus, 5, 2, concat=False, seed=4)
    assert duplicates_of(windows).tolist() == [3, 8, 9]


def test_bins_are_those_of_the_edges() -> None:
    rng = np.random.default_rng(0)
    edges = HISTOGRAM_EDGES.astype(np.float32)
    values = np.concatenate(
        [
            edges,
            np.nextafter(edges, np.float32(0)),
            np.nextafter(edges, np.float32(np.inf)),
            np.float32(2.0) ** rng.normal(0, 15, 10_000).astype(np.float32),
            np.array([1e-45, 1e-38, 3e38], np.float32),
        ]
    )
    expected = np.searchsorted(HISTOGRAM_EDGES, values.astype(np.float64), side="right")
    assert np.array_equal(histogram_bin(values), expected)


def test_memory_is_bounded_whatever_the_number_of_tokens() -> None:
    config = CollateConfig(window=16, parts=3, inactive=1)
    for dense, signed in ((False, False), (True, False), (True, True)):
        found = findings(64, config, dense, signed)
        sizes = []
        for n_tokens in (2_000, 8_000):
            corpus = corpus_of([n_tokens // 20] * 20)
            values = random_values(n_tokens, 64)
            windows = TokenWindows(corpus, 20, 8, bos=BOS)
            found = collate(windows, values, config, dense=dense, signed=signed, n_parts=3)
            sizes.append(found.nbytes)
        bound = 64 * bytes_per_unit(config, signed=signed, dense=dense)
        assert sizes[0] == sizes[1] <= bound
        assert sizes[0] > 0.95 * bound
    defaults = CollateConfig()
    assert 3 * 32_768 * bytes_per_unit(defaults) < 2**30


def test_settings_that_cannot_be() -> None:
    wrong: list[dict[str, Any]] = [{"top": -1}, {"window": 0}, {"parts": 0}, {"intervals": 101}]
    for settings in wrong:
        with pytest.raises(InputError, match=next(iter(settings))):
            CollateConfig(**settings)
    with pytest.raises(InputError, match="weight_exponent"):
        CollateConfig(weight_exponent=0.0)


def test_of_equal_pairs_the_one_of_the_earlier_query_is_the_peak() -> None:
    windows = TokenWindows(TokenCorpus.of([[1, 2, 3, 4]]), 4, 1, seed=None)
    places = Places.of(windows.batch(0), duplicates_of(windows), False)
    values = np.zeros((1, 4, 4, 1), np.float32)
    values[0, 1, 1] = values[0, 2, 0] = values[0, 2, 1] = 0.5
    seen = PairsSeen(places, values, 3)
    peaks = seen.peaks()
    assert seen.query[peaks.at].tolist() == [1]
    assert seen.key[peaks.at].tolist() == [1]
    assert peaks.position.tolist() == [1]
    entries = seen.show(peaks, 3)
    assert entries.activations.tolist() == [[0, 0, 0.5, 0.5, 0.5, 0]]
    assert entries.peak.tolist() == [2]


def test_pairs_with_a_separator_are_not_looked_at() -> None:
    windows = TokenWindows(TokenCorpus.of([[1, BOS, 3, 4]]), 5, 1, bos=BOS, seed=None)
    places = Places.of(windows.batch(0), duplicates_of(windows), False)
    seen = PairsSeen(places, np.ones((1, 5, 5, 1), np.float32), 4)
    assert seen.n_tokens == 6
    entries = seen.show(seen.peaks(), 4)
    assert entries.activations.tolist() == [[1, 0, 0, 1, 0, 1, 1, 0, 1, 1]]
