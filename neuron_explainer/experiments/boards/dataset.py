"""A data set of boards: every board is a row of numbers, and every row is its place in an enumeration.

    dataset = BoardDataset(BoardConfig(split="stringent"))
    dataset.rows("double", "test")          # [n, 7]: root, x, y, root, x, y, background
    dataset.draw("single", "train", 3, rng).board(0)

Rows are (root, x, y, background), (root, x, y, root, x, y, background) and (composite, x, y, background);
``x`` counts rows of cells from the top and ``y`` columns from the left, as in the paper's program. Only the
places of the rows that are held out are kept and saved: the training set is what is left, and a row is
computed from its place when it is needed.

Shape legend: ``n`` rows, ``f`` fields of a row, ``s`` cells of a board.
"""

import functools
import hashlib
import json
from dataclasses import asdict
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np

from neuron_explainer import files
from neuron_explainer.errors import CheckpointError, InputError, did_you_mean
from neuron_explainer.experiments.boards.drawing import Boards, Flags, paint
from neuron_explainer.experiments.boards.objects import (
    EMPTY,
    KINDS,
    BoardConfig,
    Ints,
    Kind,
    make_composites,
    make_roots,
)
from neuron_explainer.settings import read_fields

Part = Literal["train", "val", "test"]
PARTS: tuple[Part, ...] = ("train", "val", "test")
SET_NAMES: dict[Kind, str] = {
    "single": "singleRoot",
    "double": "doubleRoot",
    "composite": "singleComposite",
}
"""What the paper's program calls the boards of each kind, before ``_train``, ``_val`` or ``_test``."""
FORMAT_VERSION = 1


def check_kind(kind: str) -> Kind:
    """The kind of board; an error that suggests the nearest if there is none of this name."""
    if kind not in KINDS:
        raise InputError(
            f"unknown kind of board {kind!r}.{did_you_mean(kind, KINDS)} Known: {', '.join(KINDS)}."
        )
    return kind


def check_part(part: str) -> Part:
    """The part of a data set; an error that suggests the nearest if there is none of this name."""
    if part not in PARTS:
        raise InputError(
            f"unknown part of a data set {part!r}.{did_you_mean(part, PARTS)} Known: {', '.join(PARTS)}."
        )
    return part


class RowSpace(NamedTuple):
    """All boards of a kind: each combination of objects, positions and background has a place from 0."""

    objects: Ints
    """``[groups, 1 or 2]``: the objects of a board."""
    positions: Ints
    """``[p, 2 or 4]``: where they stand."""
    n_backgrounds: int

    @property
    def per_group(self) -> int:
        """Boards of one group of objects."""
        return len(self.positions) * self.n_backgrounds

    @property
    def size(self) -> int:
        """Number of boards."""
        return len(self.objects) * self.per_group

    def rows(self, places: Ints) -> Ints:
        """The rows ``[n, f]`` at places ``[n]``."""
        shape = (len(self.objects), len(self.positions), self.n_backgrounds)
        group, position, background = np.unravel_index(places, shape)
        parts = []
        for i in range(self.objects.shape[1]):
            parts += [self.objects[group, i, None], self.positions[position, 2 * i : 2 * i + 2]]
        return np.concatenate([*parts, background[:, None]], axis=1).astype(np.int64)

    def places(self, rows: Ints) -> Ints:
        """The inverse of :meth:`rows`; an error for a row that is no board of this kind."""
        n_objects = self.objects.shape[1]
        if rows.ndim != 2 or rows.shape[1] != 3 * n_objects + 1:
            raise InputError(
                f"expected rows of {3 * n_objects + 1} numbers, found {list(rows.shape)}."
            )
        objects = rows[:, : 3 * n_objects : 3]
        positions = np.delete(rows[:, :-1], np.s_[::3], axis=1)
        group, position = _index_of(objects, self.objects), _index_of(positions, self.positions)
        bad = (group < 0) | (position < 0) | (rows[:, -1] < 0) | (rows[:, -1] >= self.n_backgrounds)
        if bad.any():
            raise InputError(f"row {rows[bad][0].tolist()} is not a board of this data set.")
        return (group * len(self.positions) + position) * self.n_backgrounds + rows[:, -1]


def _index_of(rows: Ints, table: Ints) -> Ints:
    """Where in a table each row stands ``[n]``; -1 if it does not. Numbers lie between 0 and 2**15."""
    radix = 1 << 15
    keys, wanted = (
        (x.astype(np.int64) * radix ** np.arange(x.shape[1])).sum(1) for x in (table, rows)
    )
    order = np.argsort(keys)
    at = np.minimum(np.searchsorted(keys[order], wanted), len(keys) - 1)
    found = order[at]
    return np.where((table[found] == rows).all(1), found, -1)


def _square(n: int) -> Ints:
    """All pairs of numbers below n, ``[n * n, 2]``, the last number varying fastest."""
    return np.stack(np.divmod(np.arange(n * n), n), axis=1)


def row_spaces(config: BoardConfig) -> dict[Kind, RowSpace]:
    """The boards of each kind, in the order in which the paper's program enumerates them.

    Two roots never share a row or a column as their corner; their footprints may overlap all the same.
    """
    single = _square(config.board_size - config.root_size + 1)
    first, second = np.divmod(np.arange(len(single) ** 2), len(single))
    double = np.concatenate([single[first], single[second]], axis=1)
    apart = (double[:, 0] != double[:, 2]) & (double[:, 1] != double[:, 3])
    roots, n = np.arange(config.n_roots)[:, None], config.n_backgrounds
    pairs = np.stack(np.divmod(np.arange(config.n_roots**2), config.n_roots), axis=1)
    composites = np.arange(config.n_composites)[:, None]
    return {
        "single": RowSpace(roots, single, n),
        "double": RowSpace(pairs, double[apart], n),
        "composite": RowSpace(composites, _square(config.board_size - config.footprint + 1), n),
    }


class BoardDataset:
    """Roots, composites, and which boards are held out.

    Args:
        config: sizes, split and seed. The same config gives the same data set.
    """

    def __init__(self, config: BoardConfig | None = None) -> None:
        config = BoardConfig() if config is None else config
        objects, split = (np.random.default_rng([config.seed, i]) for i in range(2))
        roots, composites = make_roots(config, objects), make_composites(config, objects)
        self._set(config, roots, composites)
        self.held_out_positions: Ints | None = None
        """``[r, 2]``: in a stringent split, the position at which training never shows each root."""
        if config.split == "stringent":
            n = config.board_size - config.root_size + 1
            self.held_out_positions = split.integers(n, size=(config.n_roots, 2))
        for kind, space in self.spaces.items():
            val, test = self._hold_out(kind, space, split)
            self.held_out[kind, "val"], self.held_out[kind, "test"] = np.sort(val), np.sort(test)

    def _set(self, config: BoardConfig, roots: Ints, composites: Ints) -> None:
        self.config, self.roots, self.composites = config, roots, composites
        self.spaces = row_spaces(config)
        self.held_out: dict[tuple[Kind, Part], Ints] = {}
        """The places of the rows that are held out, by kind and by "val" or "test", sorted."""
        self._train: dict[Kind, Ints] = {}

    # ---- splits ------------------------------------------------------------------------------------

    def _hold_out(self, kind: Kind, space: RowSpace, rng: np.random.Generator) -> tuple[Ints, Ints]:
        """The places of the validation rows and of the test rows."""
        config = self.config
        if config.split == "stringent":
            apart = rng.permutation(np.flatnonzero(self._shows_held_out_position(kind)))
            n_val = len(apart) // 2 if config.val else 0
            return apart[:n_val], apart[n_val:]
        if config.split == "fraction":
            n_val = int(space.size * config.val)
            chosen = rng.permutation(space.size)[
                : n_val + int(space.size * config.held_out_for_test)
            ]
            return chosen[:n_val], chosen[n_val:]
        n_val, n = int(config.val), int(config.val + config.held_out_for_test)
        if n >= space.per_group:
            raise InputError(
                f"{n} boards of each object cannot be held out: there are {space.per_group} boards of kind "
                f"{kind!r} for each. Give smaller val and test."
            )
        order = rng.random((len(space.objects), space.per_group)).argpartition(n, axis=1)[:, :n]
        places = order + space.per_group * np.arange(len(space.objects))[:, None]
        return places[:, :n_val].ravel(), places[:, n_val:].ravel()

    def _shows_held_out_position(self, kind: Kind) -> Any:
        """For each place of a kind, whether a root stands where training never shows it, ``[n]`` bool."""
        assert self.held_out_positions is not None
        space, positions = self.spaces[kind], self.held_out_positions
        shown = np.zeros((len(space.objects), len(space.positions)), dtype=bool)
        if kind == "composite":
            for i, j in _square(self.config.composite_size):
                root = self.composites[:, i, j]
                corner = space.positions + self.config.stride * np.array([i, j])
                hit = (corner[None] == positions[root][:, None]).all(-1)
                shown |= hit & (root != EMPTY)[:, None]
        else:
            for i in range(space.objects.shape[1]):
                corner = space.positions[:, 2 * i : 2 * i + 2]
                shown |= (corner[None] == positions[space.objects[:, i]][:, None]).all(-1)
        return np.repeat(shown.ravel(), space.n_backgrounds)

    # ---- rows --------------------------------------------------------------------------------------

    def places(self, kind: Kind, part: Part) -> Ints:
        """The places ``[n]`` of the rows of a part in the enumeration of their kind."""
        kind, part = check_kind(kind), check_part(part)
        if part != "train":
            return self.held_out[kind, part]
        if kind not in self._train:
            left = np.ones(self.spaces[kind].size, dtype=bool)
            for other in ("val", "test"):
                left[self.held_out[kind, check_part(other)]] = False
            self._train[kind] = np.flatnonzero(left)
        return self._train[kind]

    def rows(self, kind: Kind, part: Part) -> Ints:
        """The rows ``[n, f]`` of a part."""
        return self.spaces[check_kind(kind)].rows(self.places(kind, part))

    @property
    def sizes(self) -> dict[str, int]:
        """The number of rows of each set, by the names of the paper's program."""
        return {
            f"{SET_NAMES[kind]}_{part}": len(self.places(kind, part))
            for kind in KINDS
            for part in PARTS
        }

    def paint(self, kind: Kind, rows: Ints, rng: np.random.Generator | None = None) -> Boards:
        """The boards of rows ``[n, f]``; ``rng`` picks the tokens of fuzzy cells (None: the first)."""
        return paint(self.config, self.roots, self.composites, check_kind(kind), rows, rng)

    def draw(self, kind: Kind, part: Part, n: int, rng: np.random.Generator) -> Boards:
        """Random boards of a part, with replacement."""
        places = self.places(kind, part)
        if not len(places):
            raise InputError(
                f"this data set holds no {SET_NAMES[kind]}_{part} boards to draw from."
            )
        rows = self.spaces[kind].rows(places[rng.integers(len(places), size=n)])
        return self.paint(kind, rows, rng)

    def sample(self, kind: Kind, part: Part, n: int, seed: int) -> Boards | None:
        """Boards of a part without repetition, at most ``n``; None if it has none."""
        if n < 1:
            raise InputError(f"expected a number of boards, at least 1, found {n}.")
        places = self.places(kind, part)
        if not len(places):
            return None
        rng = np.random.default_rng([seed, KINDS.index(kind)])
        chosen = rng.choice(len(places), min(n, len(places)), replace=False)
        return self.paint(kind, self.spaces[kind].rows(places[chosen]), rng)

    def shown_in_training(self, kind: Kind, part: Part) -> Any:
        """Which boards of a part look exactly like one of the training set, ``[n]`` bool.

        Rows are held out, not pictures: a double board whose footprints do not overlap looks like the
        board of the row with its roots in the other order. (Roots are drawn with their first tokens.)
        """
        places, rows = self.places(kind, part), self.rows(kind, part)
        if kind != "double":
            return np.zeros(len(places), dtype=bool)
        mirrored = rows[:, [3, 4, 5, 0, 1, 2, 6]]
        same = (self.paint(kind, rows).tokens == self.paint(kind, mirrored).tokens).all(1)
        return same & np.isin(self.spaces[kind].places(mirrored), self.places(kind, "train"))

    def at_held_out_positions(self, boards: Boards) -> Flags:
        """The cells ``[n, s]`` of roots that stand where training never shows them; none if the split is not
        stringent."""
        if self.held_out_positions is None:
            return np.zeros(boards.tokens.shape, dtype=bool)
        row, column = np.divmod(np.arange(self.config.n_cells), self.config.board_size)
        down, right = np.divmod(boards.cells, self.config.root_size)
        corners = np.stack([row - down, column - right], axis=-1)
        hit = (corners == self.held_out_positions[boards.roots]).all(-1)
        return np.asarray(hit & (boards.roots != EMPTY))

    # ---- identity and files ------------------------------------------------------------------------

    @functools.cached_property
    def checksum(self) -> str:
        """SHA-256 of what the boards are: sizes, roots, composites, held-out rows."""
        config = {k: v for k, v in asdict(self.config).items() if k not in ("seed", "test", "val")}
        digest = hashlib.sha256(json.dumps(config, sort_keys=True).encode())
        for name, array in self._arrays().items():
            if name == "held_out_positions":  # says nothing that the held-out rows do not
                continue
            digest.update(f"{name} {list(array.shape)}".encode())
            digest.update(np.ascontiguousarray(array, dtype="<i8").tobytes())
        return digest.hexdigest()

    def _arrays(self) -> dict[str, Ints]:
        held_out = {f"{SET_NAMES[k]}_{part}": ids for (k, part), ids in self.held_out.items()}
        arrays = {"roots": self.roots, "composites": self.composites, **held_out}
        if self.held_out_positions is not None:
            arrays["held_out_positions"] = self.held_out_positions
        return arrays

    def save(self, folder: str | Path, *, overwrite: bool = False) -> None:
        """Write ``config.json`` (the manifest) and ``boards.npz`` to a folder, whole or not at all."""
        with files.atomic_folder(folder, overwrite=overwrite) as temporary:
            arrays: dict[str, Any] = {k: v.astype(np.int32) for k, v in self._arrays().items()}
            with files.plain_write(temporary / "boards.npz") as path:
                np.savez_compressed(path, **arrays)
            manifest = {
                "format_version": FORMAT_VERSION,
                "kind": "boards",
                "config": asdict(self.config),
                "sizes": self.sizes,
                "checksum": self.checksum,
            }
            files.write_json(temporary / "config.json", manifest)

    @classmethod
    def load(cls, folder: str | Path) -> "BoardDataset":
        """Read what :meth:`save` wrote; a CheckpointError if it is not what was written."""
        folder = Path(folder)
        manifest = files.read_json(folder / "config.json")
        if (manifest.get("kind"), manifest.get("format_version")) != ("boards", FORMAT_VERSION):
            raise CheckpointError(f"{folder} holds no data set of boards of a format known here.")
        config = read_fields(
            BoardConfig, manifest.get("config"), str(folder), error=CheckpointError
        )
        try:
            with np.load(folder / "boards.npz", allow_pickle=False) as stored:
                arrays = {name: stored[name].astype(np.int64) for name in stored.files}
        except (OSError, ValueError) as error:
            raise CheckpointError(f"{folder / 'boards.npz'} cannot be read: {error}") from error
        dataset = cls.from_arrays(config, arrays, str(folder))
        if dataset.checksum != manifest.get("checksum"):
            raise CheckpointError(
                f"{folder}: these are not the boards that were saved: expected the checksum "
                f"{manifest.get('checksum')}, found {dataset.checksum}."
            )
        return dataset

    @classmethod
    def from_arrays(
        cls, config: BoardConfig, arrays: dict[str, Ints], where: str
    ) -> "BoardDataset":
        """A data set from its parts: ``roots``, ``composites``, places of held-out rows by set name."""
        dataset = cls.__new__(cls)
        try:
            dataset._set(config, arrays["roots"], arrays["composites"])
            for kind, name in SET_NAMES.items():
                for part in ("val", "test"):
                    dataset.held_out[kind, check_part(part)] = np.sort(arrays[f"{name}_{part}"])
        except KeyError as error:
            raise CheckpointError(f"{where}: {error} is missing.") from None
        dataset.held_out_positions = arrays.get("held_out_positions")
        return dataset

    def __repr__(self) -> str:
        sizes = ", ".join(f"{name} {n}" for name, n in self.sizes.items() if n)
        return f"BoardDataset({self.config.split} split: {sizes})"
