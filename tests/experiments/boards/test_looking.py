"""Probes, distances, edits and words, on cases whose answer is known; no trained model."""

import numpy as np
import pytest
import torch

from neuron_explainer.errors import InputError
from neuron_explainer.experiments.boards import edits, speech
from neuron_explainer.experiments.boards.dataset import BoardDataset
from neuron_explainer.experiments.boards.geometry import (
    participation_ratio,
    plane,
    spreads,
    three_distances,
    variance_shares,
)
from neuron_explainer.experiments.boards.gpt import BoardGPT, GPTSizes
from neuron_explainer.experiments.boards.lea import LEA, LEASizes
from neuron_explainer.experiments.boards.measures import accuracies, accuracy, code_entropy
from neuron_explainer.experiments.boards.objects import EMPTY, BoardConfig
from neuron_explainer.experiments.boards.probes import (
    cells_to_probe,
    fit,
    probe_everywhere,
    probe_table,
)
from neuron_explainer.experiments.boards.recording import Recording, record, stream_points
from neuron_explainer.experiments.boards.sites import location

PLACE = location("0/resid.torso.post_mlp")
OTHER = location("1/resid.torso.post_mlp")


@pytest.fixture(scope="module")
def dataset() -> BoardDataset:
    return BoardDataset(
        BoardConfig(board_size=5, root_size=2, root_cells=4, n_roots=3, n_composites=2)
    )


@pytest.fixture(scope="module")
def model(dataset: BoardDataset) -> BoardGPT:
    return BoardGPT(GPTSizes(n_cells=25, n_layers=2, width=16, position_width=8))


@pytest.fixture(scope="module")
def planted(model: BoardGPT, dataset: BoardDataset) -> Recording:
    """A recording whose vectors hold the root at one place and nothing at another."""
    recording = record(model, dataset, n=60, mask=0.5)
    rng = np.random.default_rng(0)
    noise = rng.normal(size=(*recording.tokens.shape, 12)).astype(np.float32)
    knows = noise.copy()
    for root in range(3):
        knows[recording.roots == root, root] += 8
    recording.activations.update({PLACE: noise, OTHER: knows})
    return recording


# --- probes ---


def test_probes_find_what_is_there_and_no_more(planted: Recording) -> None:
    found = probe_everywhere(planted, ["root", "cell"], cells=500)
    results = {(r.place, r.target): r for r in found}
    assert results[OTHER, "root"].accuracy > 0.97
    for key in ((PLACE, "root"), (PLACE, "cell"), (OTHER, "cell")):
        assert results[key].accuracy < results[key].chance + 0.12
    assert results[OTHER, "root"].n_cells > 50
    table = probe_table(list(results.values()))
    assert "chance (most frequent class)" in table
    assert str(OTHER) in table


def test_probes_are_asked_about_hidden_cells_and_tested_on_other_boards(planted: Recording) -> None:
    asked = cells_to_probe(planted, "root")
    assert (planted.masked[asked] == 20).all()
    assert (planted.roots[asked] != EMPTY).all()
    assert cells_to_probe(planted, "place").all()
    # what differs from board to board alone cannot be learned: each board its own constant
    boards = planted.where(np.ones(len(planted), dtype=bool))
    own = np.random.default_rng(1).normal(size=(len(planted), 1, 30)).astype(np.float32)
    boards.activations.clear()
    boards.activations[PLACE] = np.broadcast_to(own, (*planted.tokens.shape, 30)).copy()
    (result,) = probe_everywhere(boards, ["composite"])
    assert result.accuracy < 0.75


def test_a_probes_weights_are_those_of_raw_activations() -> None:
    rng = np.random.default_rng(0)
    x = (rng.normal(size=(300, 5)) * [1, 10, 0.1, 1, 1] + 7).astype(np.float32)
    x[:, 4] = 3.0  # a constant
    labels = (x[:, 0] > 7).astype(int) + 4
    probe = fit(x, labels)
    assert probe.accuracy(x, labels) > 0.97
    assert probe.scores(x).shape == (300, 2)
    assert set(probe.predict(x)) == {4, 5}
    with pytest.raises(InputError, match="two classes or more"):
        fit(x, np.zeros(300, dtype=int))


def test_targets_and_places_are_named(planted: Recording) -> None:
    with pytest.raises(InputError, match=r"unknown target 'roots'. Did you mean 'root'"):
        planted.labels("roots")  # type: ignore[arg-type]  # the point of the test
    with pytest.raises(InputError, match=r"nothing was recorded at 0/mlp.post_act"):
        planted.at("0/mlp.post_act")


# --- geometry ---


def test_distances_within_and_between_classes_by_hand(planted: Recording) -> None:
    chosen = planted.on_objects
    nothing, knows = spreads(planted, "root", chosen)
    assert nothing.ratio == pytest.approx(1, abs=0.02)
    assert knows.ratio < 0.5
    assert knows.dimensions < 2.2  # three means lie in a plane
    few = Recording(
        tokens=np.zeros((1, 4), dtype=int),
        masked=np.zeros((1, 4), dtype=int),
        roots=np.array([[0, 0, 1, 1]]),
        cells=np.zeros((1, 4), dtype=int),
        parts=np.zeros((1, 4), dtype=int),
        composites=np.array([EMPTY]),
        backgrounds=np.array([0]),
        kinds=np.array([0]),
        activations={PLACE: np.array([[[0.0, 0], [0, 1], [3, 0], [3, 1]]], dtype=np.float32)},
    )
    (found,) = spreads(few, "root", np.ones((1, 4), dtype=bool))
    assert found.within == pytest.approx(1)
    assert found.between == pytest.approx((3 + 10**0.5) / 2)
    twice = few.where(np.array([0, 0]))  # two boards, the second far away
    twice.activations[PLACE] = twice.activations[PLACE] + np.array(
        [[[0]], [[100]]], dtype=np.float32
    )
    (found,) = spreads(twice, "root", np.ones((2, 4), dtype=bool), same_board=True)
    assert found.within == pytest.approx(1)
    assert found.between == pytest.approx((3 + 10**0.5) / 2)


def test_planes_dimensions_and_variances() -> None:
    rng = np.random.default_rng(0)
    x = rng.normal(size=(500, 2)) @ [[3, 0, 0, 0], [0, 1, 0, 0]] + [0, 0, 5, 0]
    found = plane(x.astype(np.float32), 2)
    assert found.shares.sum() == pytest.approx(1)
    assert abs(found.directions[0, 0]) > 0.99
    np.testing.assert_allclose(found.points @ found.directions + found.mean, x, atol=1e-4)
    assert participation_ratio(rng.normal(size=(4000, 6)).astype(np.float32)) == pytest.approx(
        6, abs=0.1
    )
    assert participation_ratio(np.ones((4, 3), dtype=np.float32)) == 0
    labels = rng.integers(3, size=900)
    y = np.eye(3)[labels] * 4 + rng.normal(size=(900, 3))
    shares = variance_shares(
        y.astype(np.float32), {"label": labels, "other": rng.integers(3, size=900)}
    )
    assert shares["other"] < 0.01
    assert 0.6 < shares["label"] < 0.9
    matrices = three_distances(np.array([[1.0, 0], [0, 2]], dtype=np.float32))
    assert [float(m[0, 1]) for m in matrices.values()] == pytest.approx([5**0.5, 2**0.5, 1])


# --- edits ---


def test_replacing_by_itself_changes_nothing(model: BoardGPT, dataset: BoardDataset) -> None:
    exact = BoardGPT(model.sizes, seed=1).double()
    pair = edits.root_pairs(dataset, 40)
    for place in stream_points(2):
        if place.path.startswith("resid.torso"):
            assert edits.largest_change(exact, pair.masked_before, place, pair.cells) <= 1e-10


def test_replaced_cells_hold_the_other_boards_values(
    model: BoardGPT, dataset: BoardDataset
) -> None:
    pair = edits.root_pairs(dataset, 20)
    values = edits.values_at(model, pair.masked_after, PLACE)
    own = edits.values_at(model, pair.masked_before, PLACE)
    edited = edits.replace_cells(pair.cells, values)(own)
    chosen = torch.from_numpy(pair.cells)
    assert torch.equal(edited[chosen], values[chosen])
    assert torch.equal(edited[~chosen], own[~chosen])
    # after the last block nothing mixes cells any more: the edited cells draw the other board
    after = edits.draw_with(
        model, pair.masked_before, OTHER, edits.replace_cells(pair.cells, values)
    )
    assert after.shape == pair.before.tokens.shape
    all_cells = np.ones_like(pair.cells)
    last = edits.values_at(model, pair.masked_after, OTHER)
    everything = edits.draw_with(
        model, pair.masked_before, OTHER, edits.replace_cells(all_cells, last)
    )
    with torch.no_grad():
        theirs = model(torch.from_numpy(pair.masked_after)).argmax(-1).numpy()
    assert np.array_equal(everything, theirs)


def test_pairs_differ_in_one_thing(dataset: BoardDataset) -> None:
    pair = edits.root_pairs(dataset, 50)
    assert (pair.before.rows[:, 1:] == pair.after.rows[:, 1:]).all()
    assert (pair.before.rows[:, 0] != pair.after.rows[:, 0]).all()
    assert (pair.masked_before[pair.cells] == 20).all()
    assert ((pair.masked_before == 20) == (pair.masked_after == 20)).all()
    whole = edits.composite_pairs(dataset, 50)
    assert set(whole.cells.sum(1).tolist()) == {4}
    assert (whole.before.rows[:, 0] != whole.after.rows[:, 0]).all()


def test_mirroring_turns_a_probes_preference_around(planted: Recording) -> None:
    cells = planted.on_objects & planted.hidden
    probe = fit(planted.at(OTHER)[cells], planted.roots[cells])
    single = planted.where(planted.kinds == 0)
    cells = single.on_objects & single.hidden
    old = single.roots.max(1)
    new = (old + 1) % 3
    x = torch.from_numpy(single.at(OTHER))

    def margin(y: torch.Tensor) -> np.ndarray:
        scores, i = probe.scores(y.numpy()), np.arange(len(old))
        return (scores[i, :, new] - scores[i, :, old])[cells]

    for strength, factor in ((0.0, 1.0), (0.5, 0.0), (1.0, -1.0)):
        moved = edits.mirror_cells(cells, probe, old, new, strength)(x)
        np.testing.assert_allclose(margin(moved), factor * margin(x), atol=2e-3)
        assert torch.equal(moved[torch.from_numpy(~cells)], x[torch.from_numpy(~cells)])
    with pytest.raises(InputError, match="the probe knows no class 7"):
        edits.mirror_cells(cells, probe, old, np.full_like(new, 7))


def test_edits_of_the_wrong_shape_are_refused(model: BoardGPT, dataset: BoardDataset) -> None:
    pair = edits.root_pairs(dataset, 10)
    values = edits.values_at(model, pair.masked_before, PLACE)
    with pytest.raises(InputError, match=r"of the same boards; found cells \[\d+, 24\]"):
        edits.replace_cells(pair.cells[:, :24], values)
    hook = edits.replace_cells(pair.cells, values[..., :8])
    with pytest.raises(InputError, match=r"needs values of that shape, found \[\d+, 25, 8\]"):
        edits.draw_with(model, pair.masked_before, PLACE, hook)


# --- measures and words ---


def test_accuracy_by_hand() -> None:
    tokens = np.array([[1, 2, 3, 4], [1, 2, 3, 4]])
    masked = np.array([[9, 9, 3, 4], [1, 2, 9, 4]])
    drawn = np.array([[1, 0, 3, 4], [1, 2, 3, 4]])
    objects = np.array([[False, True, True, True], [True, True, True, True]])
    none = np.zeros_like(objects)
    found = accuracy(drawn, tokens, masked, objects, none)
    assert (found.cells, found.boards, found.hidden, found.n_boards) == (7 / 8, 0.5, 2 / 3, 2)
    assert found.objects == 0.5  # of three hidden cells the first is of the background
    assert np.isnan(found.moved)
    moved = np.array([[False, True, True, True], [False] * 4])
    assert accuracy(drawn, tokens, masked, objects, moved).moved == 0


def test_accuracies_have_names_for_a_log(model: BoardGPT, dataset: BoardDataset) -> None:
    found = accuracies(model, dataset)
    assert {"train_single_cells", "test_composite_boards", "test_double_hidden"} <= set(found)
    talker = LEA(LEASizes(n_cells=25, n_layers=1, width=8, position_width=4))
    found = accuracies(talker, dataset)
    assert "test_double_cells_from_words" in found
    assert not any("composite" in name for name in found)


def test_entropy_and_information_by_hand() -> None:
    assert code_entropy(torch.tensor([0, 1, 2, 3]), 4) == pytest.approx(1)
    assert code_entropy(torch.tensor([2, 2, 2]), 4) == 0
    labels = np.array([0, 1, 2, 3] * 25)
    assert speech.mutual_information(labels, labels) == pytest.approx(2)
    assert speech.mutual_information(labels // 2, labels) == pytest.approx(1)
    assert speech.mutual_information(np.zeros(100, dtype=int), labels) == pytest.approx(0)
    assert speech.entropy(labels) == pytest.approx(2)


def test_leas_picture_stream_is_recorded_while_it_reads(dataset: BoardDataset) -> None:
    model = LEA(LEASizes(n_cells=25, n_layers=2, width=8, position_width=4, sentence=4))
    recording = record(model, dataset, [*stream_points(2), "logits"], n=5)
    tokens = torch.from_numpy(recording.masked)
    with torch.no_grad():
        expected = model.tok_embed(tokens).numpy()
        logits = model.predict_from_board(tokens).numpy()
    np.testing.assert_array_equal(recording.at("resid.post_emb"), expected)
    np.testing.assert_allclose(recording.at("logits"), logits, atol=1e-6)
    assert recording.at("1/resid.torso.post_mlp").shape == (*tokens.shape, 8)


def test_words_of_a_model_that_says_nothing(dataset: BoardDataset) -> None:
    talker = LEA(LEASizes(n_cells=25, n_layers=1, width=8, position_width=4, sentence=4))
    with torch.no_grad():  # only the first word is near
        talker.quantiser.codebook[1:] += 100
    boards, words = speech.spoken(talker, dataset, 60)
    assert words.shape == (60, 4)
    assert set(words.ravel().tolist()) == {0}
    found = speech.word_information(words, boards)
    assert found.shares.max() == 0
    swap = speech.swap_words(talker, dataset, "background", 20)
    assert swap.differing_slots == 0
    assert swap.by_slot.shape == (4,)
    assert swap.by_number.shape == (5,)
    edited = speech.edit_word(words, 2, 7)
    assert (edited[:, 2] == 7).all()
    assert (words[:, 2] == 0).all()
    assert speech.draw_from_words(talker, edited).shape == (60, 25)


def test_bad_words_are_named(dataset: BoardDataset) -> None:
    with pytest.raises(InputError, match="slots 0 to 3, found 4"):
        speech.edit_word(np.zeros((1, 4), dtype=int), 4, 0)
    with pytest.raises(InputError, match=r"unknown attribute 'colour'. Did you mean 'column'"):
        speech.attribute_pairs(dataset, "colour", 3)


def test_attributes_are_changed_one_at_a_time(dataset: BoardDataset) -> None:
    for column, name in enumerate(speech.ATTRIBUTES):
        before, after = speech.attribute_pairs(dataset, name, 30)
        differs = before.rows != after.rows
        assert differs[:, column].all()
        assert differs.sum() == 30
