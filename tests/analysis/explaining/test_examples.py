"""Example sets: no text in two places, quantiles, random and hard negatives, bad input."""

from collections import Counter
from dataclasses import replace
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from neuron_explainer.analysis.explaining.examples import (
    ExampleSet,
    LabelledExample,
    Neighbour,
    SetConfig,
)
from neuron_explainer.analysis.latent_record import Example
from neuron_explainer.analysis.store import ExampleStore
from neuron_explainer.errors import InputError
from tests.analysis.examples import VOCABULARY, make_coactivation, make_collected, make_corpus

N_UNITS = 6


def documents_of(corpus: Any) -> list[Any]:
    return [corpus.document(i) for i in range(len(corpus.starts) - 1)]


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> ExampleStore:
    corpus = make_corpus(40_000, 60)
    collected = make_collected(
        corpus,
        N_UNITS,
        sizes={"top": 16, "stratum": 15, "uniform": 5, "weighted": 5},
        window=16,
        coactivation=make_coactivation(N_UNITS),
    )
    folder = tmp_path_factory.mktemp("store")
    return ExampleStore.from_arrays(folder, collected, documents_of(corpus), VOCABULARY)


def spans(examples: tuple[LabelledExample, ...]) -> list[tuple[int, int]]:
    return [(each.id, each.id + len(each.example.tokens)) for each in examples]


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("unit", range(1, N_UNITS))
def test_no_two_texts_of_a_set_share_a_token(store: ExampleStore, unit: int, seed: int) -> None:
    found = ExampleSet.of(store, unit, seed)
    assert not set(found.ids("train")) & set(found.ids("test"))
    for (a, b), (c, d) in combinations(spans(found.train + found.test), 2):
        assert b <= c or d <= a
    texts = [each.example.tokens.tobytes() for each in found.train + found.test]
    assert len(texts) == len(set(texts))


def test_inactive_texts_touch_no_active_one_of_the_store(store: ExampleStore) -> None:
    found = ExampleSet.of(store, 2)
    known = [(e.start, e.start + len(e.tokens)) for e in store[2].all_examples]
    for each in found.train + found.test:
        if not each.active:
            assert not each.example.activations.any()
            assert each.example.value == 0
            begin, end = each.id, each.id + len(each.example.tokens)
            assert all(end <= a or b <= begin for a, b in known)


def test_half_of_each_part_is_inactive_and_half_of_that_hard(store: ExampleStore) -> None:
    found = ExampleSet.of(store, 3)
    for part in (found.train, found.test):
        count = Counter(each.source for each in part)
        assert count["active"] == count["random"] + count["hard"]
        assert abs(count["hard"] - count["random"]) <= 1
    partners = {p.unit for p in store[3].partners if p.jaccard > 0}
    hard = [each for each in found.train + found.test if each.source == "hard"]
    assert {each.neighbour for each in hard} <= partners
    for each in hard:
        starts = {e.start for e in store[each.neighbour].all_examples}
        assert each.id in starts


def test_equal_seeds_choose_equal_texts_and_others_do_not(store: ExampleStore) -> None:
    one, same, other = (ExampleSet.of(store, 4, seed) for seed in (1, 1, 2))
    assert one.ids("train") == same.ids("train")
    assert one.ids("test") == same.ids("test")
    assert one.ids("test") != other.ids("test")


class Everything:
    """A reading of a text in which unit 1 is active once in each of ``n`` contexts of 40 tokens."""

    def __init__(self, store: ExampleStore, n: int) -> None:
        self.store, self.n = store, n

    def active(self, unit: int) -> list[Example]:
        start = np.arange(self.n) * 40 + (0 if unit == 1 else 20)
        corpus = self.store.tokens.corpus.tokens
        blank = self.store[1].all_examples[0]
        return [
            replace(
                blank,
                value=float(i + 1),
                start=int(at),
                tokens=np.asarray(corpus[at : at + 10], np.int64),
                activations=np.ones(10, np.float32),
            )
            for i, at in enumerate(start)
        ]

    def places(self, random: np.random.RandomState, n: int, window: int) -> tuple[Any, Any]:
        starts = self.store.tokens.corpus.starts
        start = random.randint(0, self.n * 40 - window, n)
        end = starts[np.searchsorted(starts, start, side="right")]
        return start, np.minimum(window, end - start)

    def silent(self, unit: int, start: Any, length: Any) -> Any:
        place = start % 40
        return (place >= 10) & (place + length <= 40)

    def neighbours(self, unit: int) -> list[Neighbour]:
        return [Neighbour(2, 0.25)]


@pytest.mark.parametrize(
    ("n", "quantiles"), [(400, 10), (137, 10), (90, 10), (33, 10), (9, 4), (6, 3)]
)
def test_quantiles_have_equally_many_texts_in_order(tmp_path: Path, n: int, quantiles: int) -> None:
    corpus = make_corpus(40_000, 60)
    collected = make_collected(corpus, 2, sizes={"top": 5})
    store = ExampleStore.from_arrays(tmp_path, collected, documents_of(corpus), VOCABULARY)
    config, reading = SetConfig(window=12), Everything(store, n)
    found = ExampleSet.of(store, 1, 0, config, reading)
    assert found.n_quantiles == quantiles
    assert found.available == n
    assert found.mislabelled == 0
    for part, most in ((found.train, config.train), (found.test, config.test)):
        active = [each for each in part if each.active]
        count = Counter(each.quantile for each in active)
        if n >= config.train + config.test:
            assert len(active) == most
            assert max(count.values()) - min(count.values()) <= 1
    best = sorted(
        (each for each in found.train + found.test if each.active), key=lambda e: -e.example.value
    )
    assert [each.quantile for each in best] == sorted(each.quantile for each in best)
    for each in found.train + found.test:
        if not each.active:
            assert each.id % 40 >= 10
        if each.source == "hard":
            assert (each.neighbour, each.id % 40) == (2, 20)


def test_what_is_expected_to_be_mislabelled(store: ExampleStore) -> None:
    found = ExampleSet.of(store, 5, 0, SetConfig(hard=0.0))
    density = store[5].statistics.density
    assert found.mislabelled == pytest.approx(1 - (1 - density) ** 32, rel=0.1)
    assert found.mislabelled > 0


def test_texts_that_the_store_knows_to_be_inactive(tmp_path: Path) -> None:
    corpus = make_corpus(8_000, 9)
    collected = make_collected(
        corpus,
        2,
        sizes={"top": 8, "inactive": 60},
        window=8,
        density=0.1,
        settings={"windows": {"concat": False, "context_length": 65, "bos": 1}},
    )
    store = ExampleStore.from_arrays(tmp_path, collected, documents_of(corpus), VOCABULARY)
    found = ExampleSet.of(store, 1)
    silent = [e.start for e in store[1].examples("inactive")]
    inactive = [each for each in found.train + found.test if not each.active]
    assert inactive
    assert found.mislabelled == 0
    ends = corpus.starts[1:]
    moved = 0
    for each in inactive:
        first = max(start for start in silent if start <= each.id)
        end = min(first + 64, ends[ends > first].min())
        assert each.id + len(each.example.tokens) <= end
        moved += each.id > first
    assert moved


def test_a_dead_unit_and_one_with_too_few_texts(store: ExampleStore) -> None:
    with pytest.raises(InputError, match="latent 0 of made-up was never active on 40,000 tokens"):
        ExampleSet.of(store, 0)
    n = len(store[1].all_examples)
    with pytest.raises(InputError, match=rf"has \d\d different active texts; at least {n + 1} are"):
        ExampleSet.of(store, 1, config=SetConfig(least=n + 1))


def test_a_unit_that_is_active_everywhere(store: ExampleStore) -> None:
    class Nowhere(Everything):
        def silent(self, unit: int, start: Any, length: Any) -> Any:
            return np.zeros(len(start), bool)

    with pytest.raises(InputError, match=r"active on .*% of the tokens: 0 texts where"):
        ExampleSet.of(store, 1, reading=Nowhere(store, 100))


@pytest.mark.parametrize("seed", [-1, 2**64])
def test_a_seed_out_of_range(store: ExampleStore, seed: int) -> None:
    with pytest.raises(InputError, match="seed must be"):
        ExampleSet.of(store, 1, seed)


def test_heads_are_refused(tmp_path: Path) -> None:
    corpus = make_corpus(2_000, 3)
    collected = make_collected(corpus, 1, kind="head", window=6)
    store = ExampleStore.from_arrays(tmp_path, collected, documents_of(corpus), VOCABULARY)
    with pytest.raises(InputError, match="pairs of tokens"):
        ExampleSet.of(store, 0)


@pytest.mark.parametrize("wrong", [{"train": 0}, {"hard": 1.5}, {"window": 1}, {"least": 1}])
def test_settings_out_of_range(wrong: dict[str, Any]) -> None:
    with pytest.raises(InputError, match=next(iter(wrong))):
        SetConfig(**wrong)
