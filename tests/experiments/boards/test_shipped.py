"""The models that come with the package, against the claims of the paper.

Thresholds were set after the first honest run of these very models, a little below (or above) what was
measured; README.md in the room says what that was. What longer training would reach is not tested here.
"""

import copy
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from neuron_explainer import files
from neuron_explainer.experiments.boards import edits
from neuron_explainer.experiments.boards.__main__ import main
from neuron_explainer.experiments.boards.dataset import BoardDataset
from neuron_explainer.experiments.boards.demo import run_demo
from neuron_explainer.experiments.boards.essay import CHAPTERS, chosen_chapters, write_essay
from neuron_explainer.experiments.boards.geometry import spreads
from neuron_explainer.experiments.boards.measures import accuracy_by_kind, predict
from neuron_explainer.experiments.boards.model_files import shipped
from neuron_explainer.experiments.boards.objects import EMPTY
from neuron_explainer.experiments.boards.pictures_of_claims import seen_objects
from neuron_explainer.experiments.boards.probes import probe_everywhere
from neuron_explainer.experiments.boards.recording import record, stream_points
from neuron_explainer.experiments.boards.speech import (
    spoken,
    swap_words,
    word_information,
)
from neuron_explainer.experiments.boards.study import Study
from neuron_explainer.models.locations import ActivationLocation

# What is asked for, below what was measured on these models (README.md).
CELLS, HIDDEN_OBJECT_CELLS, CONSTITUENTS = 0.99, 0.9, 0.9
PROBES = {"root": 0.85, "cell": 0.75}
CONVERGENCE, FLIPPED = 0.88, 0.85
FROM_WORDS, WORDS_USED = 0.96, 20
INFORMATION = {"root": 0.2, "row": 0.4, "column": 0.15, "background": 0.15}


@pytest.fixture(scope="module")
def study() -> Study:
    return Study.of(boards=60)


# --- what is shipped ---


def test_assets_are_small_and_say_how_they_were_made() -> None:
    for name in ("gpt", "lea"):
        folder = shipped(name)
        stored = [path for path in folder.rglob("*") if path.is_file()]
        assert sum(path.stat().st_size for path in stored) < 1_000_000
        config = files.read_json(folder / "config.json")
        assert config["training"]["epochs_done"] > 0
        assert config["boards_checksum"] == BoardDataset().checksum
        assert "test_single_cells" in config["accuracies"]
        assert "loss" in (folder / "log.jsonl").read_text("utf-8")
    drawn = [draw.__name__ for _, _, draws in CHAPTERS for draw in draws]
    assert list(files.read_json(shipped("gpt").parent / "numbers.json")) == drawn


def test_recorded_accuracies_are_those_of_the_weights(study: Study) -> None:
    recorded = files.read_json(shipped("gpt") / "config.json")["accuracies"]
    found = accuracy_by_kind(study.model, study.dataset, "test")
    for kind, figures in found.items():
        assert figures.cells == pytest.approx(recorded[f"test_{kind}_cells"], abs=2e-3)
        assert figures.hidden == pytest.approx(recorded[f"test_{kind}_hidden"], abs=1e-2)


# --- the factored transformer ---


def test_visible_cells_are_kept_and_hidden_ones_filled_in(study: Study) -> None:
    recording = record(study.model, study.dataset, part="test", mask=0.2)
    drawn = predict(study.model, recording.masked)
    right = drawn == recording.tokens
    assert right[~recording.hidden].mean() > 0.999
    assert right.mean() > CELLS
    on_objects = recording.hidden & recording.on_objects
    assert right[on_objects].mean() > HIDDEN_OBJECT_CELLS  # chance: 0.1


def test_held_out_boards_are_drawn_as_well_as_others(study: Study) -> None:
    train, test = (
        accuracy_by_kind(study.model, study.dataset, part, rounds=1) for part in ("train", "test")
    )
    for kind in ("single", "double", "composite"):
        assert abs(train[kind].cells - test[kind].cells) < 0.03, kind


def test_a_hidden_constituent_is_inferred_from_the_others(study: Study) -> None:
    pair = edits.composite_pairs(study.dataset, 200)
    drawn = predict(study.model, pair.masked_before)
    whole = ((drawn == pair.before.tokens) | ~pair.cells).all(1).mean()
    assert whole > CONSTITUENTS  # chance: 0.1


def test_probes_rise_from_chance_to_certainty(study: Study) -> None:
    places = [
        ActivationLocation("resid.post_emb"),
        ActivationLocation("resid.torso.post_mlp", study.n_layers - 1),
    ]
    recording = record(study.model, study.dataset, places, n=60)
    results = probe_everywhere(recording, ["root", "cell"], cells=800)
    first, last = ([r for r in results if r.place == place] for place in places)
    for result in first:
        assert result.accuracy < result.chance + 0.05
    for result in last:
        assert result.accuracy > PROBES[result.target], result
    place = probe_everywhere(
        record(study.model, study.dataset, places[:1], n=40), ["place"], cells=600
    )[0]
    assert place.accuracy < 0.05  # no position on the stream: chance is 1/64


def test_cells_of_one_root_come_together_for_a_while(study: Study) -> None:
    recording = record(study.model, study.dataset, stream_points(study.n_layers), n=60, mask=0.5)
    seen = seen_objects(recording)
    ratios = [s.ratio for s in spreads(recording, "root", seen, same_board=True, cells=900)]
    assert min(ratios[1:-1]) < CONVERGENCE * min(ratios[0], ratios[-1])


def test_another_roots_activations_flip_the_board(study: Study) -> None:
    pair = edits.root_pairs(study.dataset, 50, hidden=0.35)
    places = [ActivationLocation("resid.torso.post_mlp", i) for i in range(study.n_layers)]
    on_root = pair.before.roots != EMPTY
    whole = edits.swap_roots(study.model, pair, places[:2], on_root)
    hidden = edits.swap_roots(study.model, pair, places[2:])
    assert max(r.flipped for r in whole) > FLIPPED
    assert hidden[0].flipped > FLIPPED
    for result in (*whole, *hidden):
        assert result.control < 0.05
        assert result.elsewhere > 0.98
    exact = copy.deepcopy(study.model).double()
    assert edits.largest_change(exact, pair.masked_before[:20], places[0], on_root[:20]) <= 1e-10


# --- LEA ---


def test_boards_are_drawn_from_words_alone(study: Study) -> None:
    found = accuracy_by_kind(study.lea, study.lea_dataset, "test", mask=0.0, from_words=True)
    assert found["single"].cells > FROM_WORDS


def test_words_tell_about_the_board_and_no_code_explodes(study: Study) -> None:
    boards, words = spoken(study.lea, study.lea_dataset, 600)
    assert len(np.unique(words)) >= WORDS_USED
    found = word_information(words, boards)
    for name, share, floor in zip(
        found.attributes, found.shares.max(1), found.floor.max(1), strict=True
    ):
        assert share > floor + INFORMATION[name], name
    norms = study.lea.quantiser.codebook.detach().norm(dim=1)
    assert float(norms.max()) < 20


def test_changing_words_changes_what_they_are_about(study: Study) -> None:
    swap = swap_words(study.lea, study.lea_dataset, "background", 30)
    assert swap.by_number[0] < 0.05
    assert swap.by_number[-1] > 0.9
    assert swap.by_number.max() > swap.control + 0.3


# --- demo and figures ---


def test_the_demo_shows_a_board_a_table_and_an_edit(
    study: Study, capsys: pytest.CaptureFixture[str]
) -> None:
    run_demo(study)
    said = capsys.readouterr().out
    for expected in (
        "what it draws",
        "chance (most frequent class)",
        "boards turn",
        "LEA says in 16 words",
    ):
        assert expected in said


def test_a_page_with_figures(study: Study, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    few, chapters = replace(study, boards=3), chosen_chapters(["learning"])
    page = write_essay(few, tmp_path, chapters=chapters, progress=lambda line: None)
    text = page.read_text("utf-8")
    assert text.count("data:image/png;base64,") == 1
    assert "Errors on hidden cells at the end of the logs" in text
    assert {"learning.png", "learning.svg", "numbers.json", "activations"} <= {
        p.name for p in tmp_path.iterdir()
    }
    meta = files.read_json(tmp_path / "activations" / "meta.json")
    stored = np.load(tmp_path / "activations" / meta["places"]["1/resid.torso.post_mlp"])
    assert stored.shape[1:] == (64, 64)


def check_figures(out: Path, *argv: str) -> None:
    main(["figures", *argv, "--out", str(out)])
    drawn = [draw.__name__ for _, _, draws in CHAPTERS for draw in draws]
    numbers = files.read_json(out / "numbers.json")
    assert list(numbers) == drawn
    assert not any("nan" in number for number in numbers.values())
    assert len(list(out.glob("*.svg"))) == len(drawn)


@pytest.mark.slow
def test_every_figure_of_the_page(tmp_path: Path) -> None:
    check_figures(tmp_path, "--boards", "30")


@pytest.mark.slow
def test_every_figure_of_models_of_other_boards(tmp_path: Path) -> None:
    small = ["--board-size", "5", "--root-size", "2", "--root-cells", "4", "--n-backgrounds", "6"]
    run = ["train", *small, "--epoch", "1", "--boards-per-epoch", "64", "--pace", "3000"]
    for model in ("gpt", "lea"):
        main([*run, "--model", model, "--run", str(tmp_path / model)])
    check_figures(tmp_path / "f", *(str(tmp_path / m) for m in ("gpt", "lea")), "--boards", "10")
