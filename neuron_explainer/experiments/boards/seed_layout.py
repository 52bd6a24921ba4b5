"""The files of the paper's program: ``dataset.json`` with three ``.npy`` files beside it.

The JSON holds the program's own names for all settings, and every row of every set as a list.
"""

import json
from pathlib import Path
from typing import Any

import numpy as np

from neuron_explainer import files
from neuron_explainer.errors import CheckpointError
from neuron_explainer.experiments.boards.dataset import (
    PARTS,
    SET_NAMES,
    BoardDataset,
    RowSpace,
    row_spaces,
)
from neuron_explainer.experiments.boards.objects import KINDS, BoardConfig, Ints
from neuron_explainer.settings import read_fields

_NAMES = {
    "board_dim": "board_size",
    "vocab_bck": "n_backgrounds",
    "vocab_token": "n_object_tokens",
    "abs_n": "n_roots",
    "abs_dim": "root_size",
    "abs_c": "root_cells",
    "abs_w_c": "fuzzy_cells",
    "abs_w_m": "fuzzy_values",
    "comp_n": "n_composites",
    "comp_dim": "composite_size",
    "comp_c": "composite_roots",
    "comp_margin": "margin",
    "split_method": "split",
    "card_val": "val",
    "card_test": "test",
}
"""The program's names, and ours."""
_ARRAYS = ("roots", "compositions", "board_types_proba")


def write_seed_layout(
    dataset: BoardDataset, folder: str | Path, board_mix: tuple[float, ...] = (0.8, 0.1, 0.1)
) -> Path:
    """Write ``dataset.json`` and its arrays to a folder; the path of the JSON file.

    Args:
        board_mix: probabilities of single, double and composite boards, which the program keeps there.
    """
    folder = Path(folder)
    files.make_folder(folder)
    arrays = {
        "roots": dataset.roots,
        "compositions": dataset.composites,
        "board_types_proba": np.array(board_mix),
    }
    for name, array in arrays.items():
        with (
            files.atomic_write(folder / f"dataset_{name}.npy") as temporary,
            temporary.open("wb") as file,
        ):
            np.save(file, array)
    config = dataset.config
    settings = {theirs: getattr(config, ours) for theirs, ours in _NAMES.items()}
    settings["card_test"] = config.held_out_for_test
    if not config.fuzzy_cells:
        settings |= {"abs_w_c": None, "abs_w_m": 1}
    whole = config.split != "fraction"
    for name in ("card_val", "card_test"):
        settings[name] = int(settings[name]) if whole else settings[name]
    content = {
        "dataset_len": 1000,
        **settings,
        "board_types": ["single", "double", "composition"],
        "run_name": folder.name,
        "bool_split": True,
        **{name: f"dataset_{name}.npy" for name in arrays},
        "sets": {
            f"{SET_NAMES[kind]}_{part}": dataset.rows(kind, part).tolist()
            for kind in KINDS
            for part in PARTS
        },
        "set_type": "train",
    }
    path = folder / "dataset.json"
    with files.atomic_write(path) as temporary:
        temporary.write_text(json.dumps(content, separators=(",", ":")), "utf-8")
    return path


def read_seed_layout(path: str | Path) -> BoardDataset:
    """The data set that the paper's program wrote as ``dataset.json``, or :func:`write_seed_layout`."""
    path = Path(path)
    content = files.read_json(path)
    missing = [name for name in (*_NAMES, *_ARRAYS, "sets") if name not in content]
    if missing:
        raise CheckpointError(f"{path}: no data set of boards: {', '.join(missing)} missing.")
    values: dict[str, Any] = {ours: content[theirs] for theirs, ours in _NAMES.items()}
    values["fuzzy_cells"] = values["fuzzy_cells"] or 0
    values |= {name: float(values[name]) for name in ("val", "test")}
    config = read_fields(BoardConfig, values, str(path), error=CheckpointError)
    arrays = {ours: _array(path, content[theirs]) for theirs, ours in _TAKEN.items()}
    for kind, space in row_spaces(config).items():
        arrays |= _held_out(path, content["sets"], SET_NAMES[kind], space)
    return BoardDataset.from_arrays(config, arrays, str(path))


_TAKEN = {"roots": "roots", "compositions": "composites"}


def _array(path: Path, name: str) -> Ints:
    """An array beside the JSON file, which may name it by a path on another machine."""
    try:
        found = np.load(path.parent / Path(name).name, allow_pickle=False)
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path}: its array {name} cannot be read: {error}") from error
    return np.asarray(found, dtype=np.int64)


def _held_out(path: Path, sets: dict[str, Any], name: str, space: RowSpace) -> dict[str, Ints]:
    """The places of the rows held out of a kind, after a check that training has all others."""
    places = {}
    for part in PARTS:
        rows = np.asarray(sets.get(f"{name}_{part}", []), dtype=np.int64)
        places[part] = space.places(rows) if rows.size else np.empty(0, dtype=np.int64)
    every = np.sort(np.concatenate(list(places.values())))
    if not np.array_equal(every, np.arange(space.size)):
        raise CheckpointError(
            f"{path}: the sets {name}_… are not a split of the {space.size} boards of their kind: they hold "
            f"{len(every)} rows, {len(np.unique(every))} of them different."
        )
    return {f"{name}_{part}": places[part] for part in ("val", "test")}
