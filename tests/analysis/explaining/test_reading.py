"""Reading a text again: the same activations, texts that are truly inactive, random directions."""

import contextlib
from typing import Any

import numpy as np
import pytest

from neuron_explainer.analysis.explaining.examples import ExampleSet, SetConfig
from neuron_explainer.analysis.explaining.explanation import Score
from neuron_explainer.analysis.explaining.methods import Predictor, by_tokens, rule_of
from neuron_explainer.analysis.explaining.reading import Reading, read_again
from neuron_explainer.analysis.explaining.scorers import detection
from neuron_explainer.analysis.store import ExampleStore
from neuron_explainer.cli.open import find_autoencoders
from neuron_explainer.errors import InputError
from tests.analysis.explaining.planted import N_PLANTED, Planted


def tokens_at(store: ExampleStore, positions: np.ndarray) -> list[int]:
    ids: list[int] = store.tokens.corpus.tokens[positions].tolist()
    return ids


def test_a_planted_latent_is_active_at_its_token_and_nowhere_else(
    planted: Planted, planted_reading: Reading
) -> None:
    ids = np.asarray(planted.store.tokens.corpus.tokens)
    for unit, token in enumerate(planted.tokens):
        assert planted_reading.positions(unit).tolist() == np.flatnonzero(ids == token).tolist()


def test_counts_and_largest_values_are_those_of_the_store(
    planted: Planted, planted_reading: Reading
) -> None:
    for unit in range(len(planted.store)):
        figures = planted.store[unit].statistics
        assert len(planted_reading.positions(unit)) == figures.count
        assert planted_reading.values(unit).max() == pytest.approx(figures.max, rel=1e-4)
    assert planted_reading.n_tokens == planted.store.n_tokens


def test_active_texts_are_peaks_of_contexts_of_their_own(
    planted: Planted, planted_reading: Reading
) -> None:
    for unit in range(len(planted.store)):
        texts = planted_reading.active(unit)
        assert len({each.document for each in texts}) == len(texts)  # a context is a document here
        stored = {(e.start, e.peak): e for e in planted.store[unit].all_examples}
        again = {(e.start, e.peak): e for e in texts}
        assert stored.keys() <= again.keys()
        for key, example in stored.items():
            assert again[key].value == pytest.approx(example.value, rel=1e-4)
            np.testing.assert_allclose(again[key].activations, example.activations, rtol=2e-3)


def test_inactive_texts_are_inactive_and_hard_ones_are_of_neighbours(
    planted: Planted, planted_reading: Reading
) -> None:
    hard = 0
    for unit in range(len(planted.store)):
        found = ExampleSet.of(planted.store, unit, reading=planted_reading)
        positions = set(planted_reading.positions(unit).tolist())
        jaccard = {each.unit: each.jaccard for each in planted_reading.neighbours(unit)}
        for each in found.train + found.test:
            span = range(each.id, each.id + len(each.example.tokens))
            assert each.active == bool(positions & set(span))
            if each.source == "hard":
                hard += 1
                assert jaccard[each.neighbour] > 0
                theirs = set(planted_reading.positions(each.neighbour).tolist())
                assert theirs & set(span)
        assert found.mislabelled == 0
    assert hard


def test_places_lie_in_one_context(planted: Planted, planted_reading: Reading) -> None:
    start, length = planted_reading.places(np.random.RandomState(0), 500, 32)
    starts = planted.store.tokens.corpus.starts
    document = np.searchsorted(starts, start, side="right") - 1
    assert (start >= starts[document]).all()
    assert (start + length <= starts[document + 1]).all()
    assert (length == 32).all()


def score(store: Any, unit: int, reading: Any) -> Score:
    config = SetConfig(hard=0)
    examples = ExampleSet.of(store, unit, 0, config, reading)
    rule = rule_of(by_tokens(examples))
    assert rule is not None
    return detection(examples, Predictor(rule).texts)


def test_token_sets_explain_planted_latents(planted: Planted, planted_reading: Reading) -> None:
    values = [score(planted.store, u, planted_reading).value or 0.0 for u in range(N_PLANTED)]
    assert min(values) > 0.95


def test_token_sets_say_little_of_random_directions_deep_in_the_model(planted: Planted) -> None:
    store = ExampleStore.open("tiny-tales/ae-resid-delta-mlp/2")
    autoencoder = find_autoencoders("ae-resid-delta-mlp", "tiny-tales").at(None, 2).only().load()
    units = store.alive[5::160].tolist()
    part = read_again(store, units, planted.context, autoencoder, most_tokens=33_000, n_random=16)

    def scores(records: object, numbers: list[int], reading: object) -> list[float]:
        found = []
        for unit in numbers:
            with contextlib.suppress(InputError):  # too few texts in this part
                found.append(score(records, unit, reading).value or 0.0)
        return found

    of_random = scores(part.random, list(range(16)), part.random)
    of_trained = scores(store, units, part)
    assert min(len(of_random), len(of_trained)) >= 10
    assert np.median(of_random) <= 0.65
    assert np.median(of_random) < np.median(of_trained) < 0.95


def test_random_directions_are_as_dense_as_the_units(
    planted: Planted, planted_reading: Reading
) -> None:
    counts = [len(planted_reading.positions(unit)) for unit in range(len(planted.store))]
    random = [len(planted_reading.random.positions(unit)) for unit in range(8)]
    assert (min(random), max(random)) == (min(counts), max(counts))
    assert random == sorted(random)
    for unit in range(8):
        assert (planted_reading.random.values(unit) > 0).all()
        assert (np.diff(planted_reading.random.positions(unit)) > 0).all()
        assert planted_reading.random[unit].statistics.count == random[unit]
    density = planted_reading.random.density
    nearest = planted_reading.random.nearest(float(density[3]), 2)
    assert density[nearest[0]] == density[3]


def test_a_part_of_the_text_is_enough(planted: Planted) -> None:
    part = read_again(
        planted.store, [0], planted.context, planted.autoencoder, most_tokens=9000, n_random=0
    )
    assert 0 < part.n_tokens <= 9000
    ids = np.asarray(planted.store.tokens.corpus.tokens)
    read = np.concatenate(
        [np.arange(s, s + n) for s, n in zip(part.start, part.length, strict=True)]
    )
    expected = read[ids[read] == planted.tokens[0]]
    assert part.positions(0).tolist() == expected.tolist()
    with pytest.raises(InputError, match="unit 99 was not read"):
        part.positions(99)


@pytest.mark.parametrize("units", [[], [12], [-1]])
def test_units_that_are_not_there(planted: Planted, units: list[int]) -> None:
    with pytest.raises(InputError, match=r"units is empty|has no latent"):
        read_again(planted.store, units, planted.context, planted.autoencoder)


def test_neurons_are_read_too(planted: Planted) -> None:
    store = ExampleStore.open("tiny-tales/2/mlp.post_act.neurons")
    part = read_again(store, [5, 40], planted.context, most_tokens=9000, n_random=2)
    assert len(part.positions(5))
    assert (part.values(5) > 0).all()
    with pytest.raises(InputError, match="give its autoencoder"):
        read_again(planted.store, [0], planted.context)
