"""Boards: objects, splits, rows, painting, files, pictures."""

import itertools
import time
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest

from neuron_explainer import files
from neuron_explainer.errors import CheckpointError, InputError
from neuron_explainer.experiments.boards.dataset import (
    PARTS,
    SET_NAMES,
    BoardDataset,
    check_kind,
    check_part,
)
from neuron_explainer.experiments.boards.drawing import Board, hide, read_board
from neuron_explainer.experiments.boards.objects import (
    EMPTY,
    KINDS,
    BoardConfig,
    Split,
    could_be_drawn_alike,
    make_composites,
    make_roots,
)
from neuron_explainer.experiments.boards.seed_layout import read_seed_layout, write_seed_layout

SMALL = BoardConfig(n_roots=3, n_backgrounds=2, n_composites=2)


@pytest.fixture(scope="module")
def dataset() -> BoardDataset:
    return BoardDataset()


def rng(seed: int = 0) -> np.random.Generator:
    return np.random.default_rng(seed)


# --- splits ---


def test_set_sizes_of_the_default_split_are_the_papers(dataset: BoardDataset) -> None:
    found = {name: n for name, n in dataset.sizes.items() if n}
    assert found == {
        "singleRoot_train": 3560,
        "singleRoot_test": 40,
        "doubleRoot_train": 899_600,
        "doubleRoot_test": 400,
        "singleComposite_train": 180,
        "singleComposite_test": 20,
    }
    for kind in KINDS:  # four of each object, of doubles four of each ordered pair
        rows = dataset.rows(kind, "test")
        objects = rows[:, [0, 3]] if kind == "double" else rows[:, :1]
        assert set(np.unique(objects, axis=0, return_counts=True)[1].tolist()) == {4}


def test_making_and_saving_the_default_data_set_is_quick_and_small(tmp_path: Path) -> None:
    start = time.perf_counter()
    BoardDataset().save(tmp_path / "boards")
    assert time.perf_counter() - start < 2
    stored = sum(path.stat().st_size for path in (tmp_path / "boards").iterdir())
    assert stored < 5_000_000


@pytest.mark.parametrize("split", ["balanced", "fraction", "stringent"])
def test_parts_are_disjoint_and_complete_by_brute_force(split: Split) -> None:
    config = BoardConfig(n_roots=3, n_backgrounds=2, n_composites=2, split=split, val=0.0)
    found = BoardDataset(config)
    corners = list(itertools.product(range(6), repeat=2))
    every: dict[str, set[tuple[int, ...]]] = {
        "single": {(r, *c, b) for r in range(3) for c in corners for b in range(2)},
        "double": {
            (r, *c, r2, *c2, b)
            for r in range(3)
            for c in corners
            for r2 in range(3)
            for c2 in corners
            if c[0] != c2[0] and c[1] != c2[1]
            for b in range(2)
        },
        "composite": {
            (i, x, y, b) for i in range(2) for x in range(2) for y in range(2) for b in range(2)
        },
    }
    for kind in KINDS:
        parts = [set(map(tuple, found.rows(kind, part).tolist())) for part in PARTS]
        assert sum(map(len, parts)) == len(every[kind])
        assert set.union(*parts) == every[kind]
        if split == "fraction":
            assert len(parts[2]) == int(0.1 * len(every[kind]))


@pytest.fixture(scope="module")
def stringent() -> BoardDataset:
    return BoardDataset(BoardConfig(n_roots=4, n_backgrounds=3, split="stringent", seed=3))


def test_a_stringent_split_never_shows_held_out_positions_in_training(
    stringent: BoardDataset,
) -> None:
    found, held_out = stringent, stringent.held_out_positions
    assert held_out is not None
    n_test = dict.fromkeys(KINDS, 0)
    for kind in KINDS:
        for part in ("train", "test"):
            rows = found.rows(kind, part)
            if kind == "composite":
                roots = found.composites[rows[:, 0]].reshape(len(rows), 4)
                corners = rows[:, None, 1:3] + 4 * np.array([[0, 0], [0, 1], [1, 0], [1, 1]])
            else:
                pairs = [(rows[:, 0], rows[:, 1:3])]
                pairs += [(rows[:, 3], rows[:, 4:6])] if kind == "double" else []
                roots = np.stack([p[0] for p in pairs], 1)
                corners = np.stack([p[1] for p in pairs], 1)
            hits = (corners == held_out[roots]).all(-1).any(1)
            assert hits.all() if part == "test" else not hits.any()
            n_test[kind] += len(rows) * (part == "test")
    assert n_test["single"] == 12  # four roots, one position, three backgrounds
    assert n_test["double"] > 0


def test_cells_of_roots_at_held_out_positions(
    dataset: BoardDataset, stringent: BoardDataset
) -> None:
    found = stringent
    assert found.held_out_positions is not None
    for kind in KINDS:
        boards = found.draw(kind, "train", 20, rng())
        assert not found.at_held_out_positions(boards).any()
    x, y = found.held_out_positions[1]
    other = next(p for p in range(6) if p not in (x, *found.held_out_positions[2]))
    # root 1 where training never shows it, covered by root 2 where it may stand
    boards = found.paint("double", np.array([[1, x, y, 2, other, (y + 1) % 6, 0]]))
    moved = found.at_held_out_positions(boards)
    square = np.zeros((8, 8), dtype=bool)
    square[x : x + 3, y : y + 3] = True
    assert np.array_equal(moved, square.reshape(1, 64) & (boards.roots == 1))
    assert moved.any()
    assert not dataset.at_held_out_positions(boards).any()


def test_validation_sets(dataset: BoardDataset) -> None:
    balanced = BoardDataset(BoardConfig(val=2.0))
    assert balanced.sizes["singleRoot_val"] == 20
    assert balanced.sizes["singleRoot_test"] == 40
    fraction = BoardDataset(BoardConfig(split="fraction", val=0.05, test=0.2))
    assert fraction.sizes["singleRoot_val"] == 180
    assert fraction.sizes["singleRoot_test"] == 720
    stringent = BoardDataset(BoardConfig(split="stringent", val=1.0))
    assert stringent.sizes["singleRoot_val"] == stringent.sizes["singleRoot_test"] == 50


def test_seeds_reproduce(dataset: BoardDataset) -> None:
    again, other = BoardDataset(), BoardDataset(BoardConfig(seed=1))
    assert again.checksum == dataset.checksum != other.checksum
    assert not np.array_equal(dataset.roots, other.roots)
    draws = [dataset.draw("double", "train", 5, rng(seed)).tokens for seed in (0, 0, 1)]
    assert np.array_equal(draws[0], draws[1])
    assert not np.array_equal(draws[0], draws[2])


# --- objects ---


def test_roots_and_composites_are_unique() -> None:
    config = BoardConfig(n_roots=16, root_size=2, root_cells=4, n_object_tokens=2, seed=5)
    roots = make_roots(config, rng())  # all there are
    assert len({root.tobytes() for root in roots}) == 16
    few = BoardConfig(n_roots=2, n_composites=16)
    assert len({c.tobytes() for c in make_composites(few, rng())}) == 16


def test_sizes_that_cannot_hold_the_objects_are_refused() -> None:
    with pytest.raises(InputError, match="found only 16 roots"):
        make_roots(BoardConfig(n_roots=17, root_size=2, root_cells=4, n_object_tokens=2), rng())
    with pytest.raises(InputError, match="only 16 different composites"):
        make_composites(BoardConfig(n_roots=2, n_composites=17), rng())
    with pytest.raises(InputError, match=r"composite of 7 cells .* does not fit on a board of 6"):
        BoardConfig(board_size=6)
    with pytest.raises(InputError, match="root of 9 cells does not fit"):
        BoardConfig(root_size=9)
    with pytest.raises(InputError, match="root_cells must be at most 9"):
        BoardConfig(root_cells=10)
    with pytest.raises(InputError, match="36 boards of each object cannot be held out"):
        BoardDataset(BoardConfig(n_roots=3, n_backgrounds=1, test=36))


def test_fuzzy_roots_take_exactly_the_values_they_have() -> None:
    config = BoardConfig(fuzzy_cells=2, fuzzy_values=3, n_roots=4)
    found = BoardDataset(config)
    assert found.roots.shape == (4, 3, 3, 3)
    assert ((found.roots != EMPTY).sum(-1) == 3).sum((1, 2)).tolist() == [2] * 4
    rows = np.tile([[1, 0, 0, 0]], (300, 1))
    painted = found.paint("single", rows, rng())
    shown = [set(painted.tokens[:, i * 8 + j].tolist()) for i in range(3) for j in range(3)]
    allowed = [set(cell[cell != EMPTY].tolist()) for cell in found.roots[1].reshape(9, 3)]
    assert shown == allowed
    assert sorted(map(len, shown)) == [1] * 7 + [3] * 2


def test_roots_that_could_be_drawn_alike() -> None:
    one = np.array([[[10, 11], [12, EMPTY]]])
    assert could_be_drawn_alike(one, np.array([[[11, 13], [12, EMPTY]]]))
    assert not could_be_drawn_alike(one, np.array([[[14, 13], [12, EMPTY]]]))
    assert not could_be_drawn_alike(one, np.array([[[11, 13], [EMPTY, EMPTY]]]))


# --- painting ---


def test_transparent_cells_show_the_background() -> None:
    found = BoardDataset(BoardConfig(root_cells=5, n_roots=4))
    boards = found.paint("single", np.array([[2, 1, 1, 7]]))
    clear = boards.tokens.reshape(8, 8)[1:4, 1:4] < 10
    assert clear.sum() == 4
    assert (boards.tokens.reshape(8, 8)[1:4, 1:4][clear] == 7).all()
    assert (
        boards.roots.reshape(8, 8)[1:4, 1:4] == 2
    ).all()  # the footprint, as in the paper's program


def test_the_second_root_of_a_double_covers_the_first(dataset: BoardDataset) -> None:
    boards = dataset.paint("double", np.array([[0, 0, 0, 1, 1, 1, 5]]))
    grid = boards.tokens.reshape(8, 8)
    assert np.array_equal(grid[1:4, 1:4], dataset.roots[1, ..., 0])
    assert np.array_equal(grid[0, :3], dataset.roots[0, 0, :, 0])
    assert boards.parts.reshape(8, 8)[1, 1] == 1
    assert grid[7, 7] == 5


def test_a_composites_footprint_is_seven_cells_wide(dataset: BoardDataset) -> None:
    boards = dataset.paint("composite", np.array([[3, 1, 0, 2]]))
    rows, columns = np.nonzero(boards.roots.reshape(8, 8) != EMPTY)
    assert (rows.min(), rows.max(), columns.min(), columns.max()) == (1, 7, 0, 6)
    assert (boards.roots != EMPTY).sum() == 36
    assert boards.roots.reshape(8, 8)[5, 4] == dataset.composites[3, 1, 1]
    assert boards.composites.tolist() == [3]


def test_drawn_boards_are_read_back() -> None:
    found = BoardDataset(BoardConfig(n_roots=4, n_backgrounds=3, n_composites=2, root_cells=8))
    for kind in KINDS:
        boards = found.draw(kind, "train", 3, rng(2))
        for tokens, row in zip(boards.tokens, boards.rows, strict=True):
            read = read_board(found.config, found.roots, found.composites, found.spaces, tokens)
            assert (kind, row.tolist()) in read
            for other, numbers in read:  # whatever else fits looks the same
                again = found.paint(other, np.array([numbers]))
                assert np.array_equal(again.tokens[0], tokens)
    hidden = np.full(64, found.config.hidden_token)
    assert not read_board(found.config, found.roots, found.composites, found.spaces, hidden)


def test_rows_and_places_are_inverse(dataset: BoardDataset) -> None:
    for space in dataset.spaces.values():
        places = rng(1).integers(space.size, size=50)
        assert np.array_equal(space.places(space.rows(places)), places)
    with pytest.raises(InputError, match=r"\[0, 2, 0, 0, 2, 3, 0\] is not a board"):
        dataset.spaces["double"].places(np.array([[0, 2, 0, 0, 2, 3, 0]]))


def test_which_test_boards_were_seen_in_training(dataset: BoardDataset) -> None:
    shown = dataset.shown_in_training("double", "test")
    rows = dataset.rows("double", "test")
    test = set(map(tuple, rows.tolist()))
    for row, seen in zip(rows.tolist(), shown, strict=True):
        apart = max(abs(row[1] - row[4]), abs(row[2] - row[5])) >= 3
        if apart:
            assert seen == ((*row[3:6], *row[:3], row[6]) not in test)
    assert 0.5 < shown.mean() < 0.8
    assert not dataset.shown_in_training("single", "test").any()


# --- hiding ---


def test_hidden_cells_and_patches(dataset: BoardDataset) -> None:
    boards = dataset.draw("single", "train", 3000, rng())
    masked = hide(boards, 0.25, 0.0, rng(1))
    hidden = masked == 20
    assert hidden.mean() == pytest.approx(0.25, abs=0.005)
    assert np.array_equal(masked[~hidden], boards.tokens[~hidden])
    patched = hide(boards, 0.0, 0.5, rng(2)) == 20
    assert set(patched.sum(1).tolist()) == {0, 9}
    assert patched.any(1).mean() == pytest.approx(0.5, abs=0.03)
    corners = {int(row.argmax()) for row in patched if row.any()}
    assert len(corners) == 36
    assert hide(boards, 0.0, 0.0, rng()).max() < 20


def test_a_composites_patch_hides_exactly_one_constituent(dataset: BoardDataset) -> None:
    boards = dataset.draw("composite", "train", 400, rng())
    patched = hide(boards, 0.0, 1.0, rng(1)) == 20
    assert set(patched.sum(1).tolist()) == {9}
    parts = [set(boards.parts[i][patched[i]].tolist()) for i in range(400)]
    assert all(len(part) == 1 for part in parts)
    assert set.union(*parts) == {0, 1, 2, 3}


# --- files ---


@pytest.mark.parametrize("split", ["balanced", "fraction", "stringent"])
def test_saved_data_sets_come_back(split: Split, tmp_path: Path) -> None:
    config = BoardConfig(n_roots=3, n_backgrounds=2, fuzzy_cells=1, fuzzy_values=2, split=split)
    found = BoardDataset(config)
    found.save(tmp_path / "ours")
    write_seed_layout(found, tmp_path / "theirs")
    for again in (
        BoardDataset.load(tmp_path / "ours"),
        read_seed_layout(tmp_path / "theirs" / "dataset.json"),
    ):
        assert again.checksum == found.checksum
        for kind, part in itertools.product(KINDS, PARTS):
            assert np.array_equal(again.rows(kind, part), found.rows(kind, part))


def test_the_seeds_layout_has_its_names(tmp_path: Path) -> None:
    path = write_seed_layout(BoardDataset(SMALL), tmp_path)
    content = files.read_json(path)
    assert content["abs_n"] == 3
    assert content["abs_w_c"] is None
    assert content["split_method"] == "balanced"
    assert set(content["sets"]) == {
        f"{name}_{part}" for name in SET_NAMES.values() for part in PARTS
    }
    names = ["dataset_board_types_proba.npy", "dataset_compositions.npy", "dataset_roots.npy"]
    assert sorted(p.name for p in tmp_path.glob("*.npy")) == names
    assert np.load(tmp_path / content["roots"]).shape == (3, 3, 3, 1)


def test_damaged_data_sets_are_refused(tmp_path: Path) -> None:
    found = BoardDataset(SMALL)
    found.save(tmp_path / "b")
    manifest = files.read_json(tmp_path / "b" / "config.json")
    files.write_json(tmp_path / "b" / "config.json", manifest | {"checksum": "0"})
    with pytest.raises(CheckpointError, match="not the boards that were saved"):
        BoardDataset.load(tmp_path / "b")
    path = write_seed_layout(found, tmp_path / "theirs")
    content = files.read_json(path)
    content["sets"]["singleRoot_train"].pop()
    files.write_json(path, content)
    with pytest.raises(CheckpointError, match="not a split of the 216 boards"):
        read_seed_layout(path)


# --- pictures and bad input ---


def test_a_board_prints_as_a_picture(dataset: BoardDataset) -> None:
    boards = dataset.paint("single", np.array([[0, 0, 0, 3]]))
    lines = repr(boards.board(0)).splitlines()
    assert len(lines) == 8
    assert lines[7] == "3 3 3 3 3 3 3 3"
    letters = "".join("ABCDEFGHIJ"[t - 10] for t in dataset.roots[0, 0, :, 0])
    assert lines[0].replace(" ", "") == f"{letters}33333"
    wrong = np.zeros(64, dtype=bool)
    wrong[63] = True
    tokens = np.where(wrong, 3, 20)
    marked = Board(tokens, dataset.config, wrong)
    assert repr(marked).endswith("░ 3!")
    assert marked._repr_html_().count("<td") == 64
    assert marked._repr_html_().count("2px solid") == 1
    assert repr(boards).startswith("1 board of kind single")


def test_a_board_is_drawn_by_matplotlib(dataset: BoardDataset) -> None:
    figure = pytest.importorskip("matplotlib.figure").Figure()
    axes = figure.add_subplot()
    tokens = dataset.draw("double", "train", 1, rng()).tokens[0].copy()
    tokens[0] = 20
    Board(tokens, dataset.config).draw(axes, "a board")
    assert len(axes.patches) == 64
    assert len(axes.texts) == 63


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (
            lambda: BoardConfig(split=cast(Any, "balancd")),
            "split: expected one of .*, found 'balancd'. Did you mean 'balanced'",
        ),
        (lambda: check_kind("duble"), "unknown kind of board 'duble'. Did you mean 'double'"),
        (lambda: check_part("tests"), "Did you mean 'test'"),
        (lambda: BoardConfig(split="fraction", test=4.0), "test must be a share"),
        (lambda: BoardConfig(test=0.5), "test must be a whole number"),
        (lambda: BoardConfig(fuzzy_cells=2, fuzzy_values=11), "fuzzy_values must be at most 10"),
    ],
)
def test_bad_input_is_named(call, message: str) -> None:
    with pytest.raises(InputError, match=message):
        call()


def test_an_empty_part_is_named(dataset: BoardDataset) -> None:
    with pytest.raises(InputError, match="no singleRoot_val boards"):
        dataset.draw("single", "val", 1, rng())
