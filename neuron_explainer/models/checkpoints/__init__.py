"""Saved models: state dicts to and from the formats on disk, in both directions.

These are pure functions of a config and a state dict, without the transformer itself. The format of a
folder is read from its content, never guessed from its name.
"""

import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch

from neuron_explainer import files
from neuron_explainer.errors import CheckpointError, InputError, SourceError, did_you_mean
from neuron_explainer.models.checkpoints.problems import TensorInfo
from neuron_explainer.models.checkpoints.transformers.common import (
    Format,
    LoadedCheckpoint,
    StateDict,
    expected_shapes,
)
from neuron_explainer.models.checkpoints.transformers.huggingface import (
    load_huggingface,
    save_huggingface,
)
from neuron_explainer.models.checkpoints.transformers.native import load_native, save_native
from neuron_explainer.models.checkpoints.transformers.pieces import (
    PIECES_FOLDER,
    load_pieces,
    save_pieces,
)

__all__ = [
    "Format",
    "LoadedCheckpoint",
    "StateDict",
    "TensorInfo",
    "detect_format",
    "expected_shapes",
    "load_checkpoint",
    "save_huggingface",
    "save_native",
    "save_pieces",
]

# Fields of config.json that exist in one format only.
_MARKS: dict[Format, tuple[str, ...]] = {
    "native": ("format_version", "kind"),
    "pieces": ("enc", "ctx_window", "m_attn", "m_mlp"),
    "huggingface": ("model_type", "n_embd", "architectures"),
}
# Files beside it that do not occur in a format.
_FOREIGN: dict[Format, tuple[str, ...]] = {
    "native": (PIECES_FOLDER, "model.safetensors.index.json", "pytorch_model.bin"),
    "pieces": ("model.safetensors", "model.safetensors.index.json", "pytorch_model.bin"),
    "huggingface": (PIECES_FOLDER,),
}
_LAYOUTS = (
    "Expected a folder with config.json and model.safetensors (saved here), config.json and "
    "model_pieces/*.pt (the original's layout), or a Hugging Face GPT-2 folder."
)
_LOADERS = {"native": load_native, "pieces": load_pieces, "huggingface": load_huggingface}


def load_checkpoint(
    source: str | Path,
    *,
    dtype: torch.dtype | None = None,
    device: torch.device | str = "cpu",
    keys: Iterable[str] | None = None,
) -> LoadedCheckpoint:
    """Load a model's folder, local or remote, of any of the three formats.

    ``dtype`` None keeps the stored one. ``keys`` limits which tensors are read (and downloaded, if each
    tensor has its own file); with ``keys=()`` only the config and the tokenizer are read.
    """
    if dtype is not None and not dtype.is_floating_point:
        raise InputError(f"dtype must be a floating-point one, found {dtype}.")
    if not files.is_remote(source):
        source = _local_folder(source)
    config = files.read_json(files.fetch(files.join(source, "config.json")))
    chosen = detect_format(source, config)
    return _LOADERS[chosen](source, config, dtype=dtype, device=device, keys=keys)


def _local_folder(source: str | Path) -> Path:
    # Absolute, because a tokenizer is read later, when the current folder may have changed.
    folder = Path(os.path.abspath(Path(source).expanduser()))
    if folder.is_file():
        raise SourceError(f"{folder} is a file; give the folder that contains it.")
    if not folder.is_dir():
        raise SourceError(f"{folder}: no such folder. {_LAYOUTS}")
    if not (folder / "config.json").is_file():
        found = sorted(path.name for path in folder.iterdir())[:10]
        raise CheckpointError(
            f"{folder}: no config.json in it (found: {', '.join(found) or 'nothing'}). {_LAYOUTS}"
        )
    return folder


def detect_format(source: str | Path, config: dict[str, Any]) -> Format:
    """The format that ``config`` and, in a local folder, the files beside it belong to."""
    found = [name for name, marks in _MARKS.items() if set(marks) & set(config)]
    if not found:
        near = did_you_mean(next(iter(config), ""), [m for marks in _MARKS.values() for m in marks])
        raise CheckpointError(f"{source}: config.json is of no known format.{near} {_LAYOUTS}")
    if len(found) > 1:
        raise CheckpointError(
            f"{source}: config.json has fields of several formats ({', '.join(found)}); "
            "which one is meant cannot be told."
        )
    chosen = found[0]
    if not files.is_remote(source):
        foreign = [name for name in _FOREIGN[chosen] if Path(source, name).exists()]
        if foreign:
            raise CheckpointError(
                f"{source}: holds two formats: config.json is of the format {chosen!r}, and "
                f"{', '.join(foreign)} of another. Keep each model in a folder of its own."
            )
    return chosen
