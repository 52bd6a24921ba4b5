"""Board models as folders: ``config.json`` and ``model.safetensors``."""

from dataclasses import asdict
from importlib import resources
from pathlib import Path
from typing import Any, NamedTuple

import safetensors
import safetensors.torch
import torch

from neuron_explainer import files
from neuron_explainer.errors import CheckpointError, SourceError
from neuron_explainer.experiments.boards.dataset import BoardDataset
from neuron_explainer.experiments.boards.gpt import BoardGPT, GPTSizes
from neuron_explainer.experiments.boards.lea import LEA, LEASizes
from neuron_explainer.settings import read_fields

BoardModel = BoardGPT | LEA
FORMAT_VERSION = 1
WEIGHTS, BOARDS = "model.safetensors", "boards"
_KINDS: dict[str, tuple[type[BoardModel], type[GPTSizes] | type[LEASizes]]] = {
    "board_gpt": (BoardGPT, GPTSizes),
    "board_lea": (LEA, LEASizes),
}


def kind_of(model: BoardModel) -> str:
    """What ``config.json`` calls a model's architecture."""
    return "board_lea" if isinstance(model, LEA) else "board_gpt"


def save_model(
    model: BoardModel,
    folder: str | Path,
    dataset: BoardDataset,
    record: dict[str, Any],
    *,
    dtype: torch.dtype | None = None,
    overwrite: bool = False,
) -> None:
    """Write a folder, whole or not at all.

    Args:
        model: is left as it is.
        folder: absent or empty; one that holds a model is replaced only with ``overwrite``.
        dataset: what it was trained on; a folder ``boards`` beside the weights holds it.
        record: what else ``config.json`` says about it (training, figures).
        dtype: of the stored weights; default: as they are.
    """
    with files.atomic_folder(folder, overwrite=overwrite) as temporary:
        tensors = {
            name: value.detach().to("cpu", dtype or value.dtype).contiguous()
            for name, value in model.state_dict().items()
        }
        with files.plain_write(temporary / WEIGHTS) as path:
            safetensors.torch.save_file(tensors, path)
        dataset.save(temporary / BOARDS)
        config = {
            "format_version": FORMAT_VERSION,
            "kind": kind_of(model),
            "sizes": asdict(model.sizes),
            "boards_checksum": dataset.checksum,
            **record,
        }
        files.write_json(temporary / "config.json", config)


class StoredModel(NamedTuple):
    """A model, its boards, and what its folder says about it."""

    model: BoardModel
    dataset: BoardDataset
    config: dict[str, Any]


def load_model(
    folder: str | Path,
    kind: str | None = None,
    *,
    device: str = "cpu",
    dtype: torch.dtype = torch.float32,
) -> StoredModel:
    """The model of a folder, or of the ``model`` folder of a run.

    Args:
        folder: what :func:`save_model` or a training wrote.
        kind: ``"board_gpt"`` or ``"board_lea"``: refuse the other one.
    """
    folder = Path(folder)
    if (folder / "model" / "config.json").is_file():
        folder = folder / "model"
    if not (folder / "config.json").is_file():
        raise SourceError(
            f"{folder} holds no board model: expected a folder that train has finished, with "
            f"model/config.json and model/{WEIGHTS}, or a folder with these two files."
        )
    config = files.read_json(folder / "config.json")
    found = config.get("kind")
    if found not in _KINDS or config.get("format_version") != FORMAT_VERSION:
        raise CheckpointError(
            f"{folder} is no board model of a format known here (kind {found!r})."
        )
    if kind is not None and found != kind:
        raise CheckpointError(
            f"{folder}: expected a model of kind {kind!r}, found one of kind {found!r}."
        )
    model_type, sizes_type = _KINDS[found]
    sizes = read_fields(sizes_type, config.get("sizes"), str(folder), error=CheckpointError)
    model = model_type(sizes)  # type: ignore[arg-type]  # each architecture has its own sizes
    path = folder / WEIGHTS
    try:
        tensors = safetensors.torch.load_file(path)
    except (OSError, safetensors.SafetensorError) as error:
        raise CheckpointError(f"{path} cannot be read: {error}") from error
    fill(model, {name: value.float() for name, value in tensors.items()}, str(path))
    dataset = BoardDataset.load(folder / BOARDS)
    if config.get("boards_checksum") != dataset.checksum:
        raise CheckpointError(
            f"{folder}: the model was trained on boards of checksum {config.get('boards_checksum')}, and "
            f"{BOARDS} holds those of {dataset.checksum}."
        )
    return StoredModel(model.to(device=device, dtype=dtype), dataset, config)


def fill(model: BoardModel, tensors: dict[str, torch.Tensor], where: str) -> None:
    """Put stored weights into a model; one error that lists all that does not fit."""
    expected = {name: tuple(value.shape) for name, value in model.state_dict().items()}
    found = {name: tuple(value.shape) for name, value in tensors.items()}
    wrong = [
        f"{name}: expected {expected.get(name, 'nothing')}, found {found.get(name, 'nothing')}"
        for name in sorted(expected.keys() | found.keys())
        if expected.get(name) != found.get(name)
    ]
    if wrong:
        raise CheckpointError(f"{where} does not fit a {kind_of(model)}: {'; '.join(wrong[:5])}")
    model.load_state_dict(tensors)


def shipped(name: str) -> Path:
    """The folder of a model that comes with the package: ``"gpt"`` or ``"lea"``."""
    return Path(str(resources.files("neuron_explainer"))) / "assets" / "boards" / name
