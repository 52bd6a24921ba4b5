"""Which format a file or folder is of, by what is in it."""

import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from neuron_explainer import files
from neuron_explainer.errors import CheckpointError, SourceError
from neuron_explainer.models.checkpoints.autoencoders import (
    dictionary_learning,
    e2e,
    gemma_scope,
    language_model_saes,
    native,
    saelens,
    sparsify,
)
from neuron_explainer.models.checkpoints.autoencoders.common import AutoencoderFormat
from neuron_explainer.models.checkpoints.problems import damaged

FileKind = Literal["torch", "npz", "npy", "safetensors"]

# Files that only a folder of one format has.
_MARKS: dict[str, AutoencoderFormat] = {
    native.WEIGHTS_FILE: "native",
    saelens.WEIGHTS_FILE: "saelens",
    sparsify.WEIGHTS_FILE: "sparsify",
    dictionary_learning.WEIGHTS_FILE: "dictionary_learning",
    gemma_scope.WEIGHTS_FILE: "gemma_scope",
    language_model_saes.HYPERPARAMETERS_FILE: "language_model_saes",
}
_LAYOUTS = (
    "Expected a folder with config.json and autoencoder.safetensors (saved here), cfg.json and "
    "sae_weights.safetensors (SAELens), cfg.json and sae.safetensors (sparsify), ae.pt "
    "(dictionary_learning), hyperparams.json and a .pt file (Language-Model-SAEs) or params.npz (Gemma "
    "Scope); or a single .pt, .npz or .npy file."
)
_FILE_SUFFIXES = (".pt", ".pth", ".bin", ".ckpt", ".npz", ".npy", ".safetensors", ".pkl", ".pickle")


def is_file(source: str | Path) -> bool:
    """Whether a source is one file; a remote one cannot be looked at, there its ending tells."""
    if files.is_remote(source):
        return str(source).lower().endswith(_FILE_SUFFIXES)
    return Path(source).expanduser().is_file()


def folder_format(source: str | Path) -> AutoencoderFormat:
    """The one format that a folder is of."""
    if files.is_remote(source):
        return _remote_folder_format(source)
    folder = Path(source).expanduser()
    if not folder.is_dir():
        raise SourceError(f"{source}: no such file or folder.")
    names = sorted(path.name for path in folder.iterdir())
    found: dict[AutoencoderFormat, str] = {}  # and the file that tells it
    for name, formats_of in (("config.json", _config_formats), ("cfg.json", _cfg_formats)):
        if (folder / name).is_file():
            found |= dict.fromkeys(formats_of(files.read_json(folder / name)), name)
    found |= {_MARKS[name]: name for name in names if name in _MARKS}
    if len(found) > 1:
        marks = ", ".join(f"{name} ({mark})" for name, mark in found.items())
        raise CheckpointError(
            f"{source}: holds files of several formats: {marks}. Keep each autoencoder in a folder of "
            "its own."
        )
    if not found:
        listed = ", ".join(names[:10]) or "nothing"
        raise CheckpointError(f"{source}: of no known format (found: {listed}). {_LAYOUTS}")
    return next(iter(found))


def _config_formats(config: Mapping[str, Any]) -> list[AutoencoderFormat]:
    if "kind" in config or "format_version" in config:
        return ["native"]
    return ["dictionary_learning"] if "trainer" in config else []


def _cfg_formats(config: Mapping[str, Any]) -> list[AutoencoderFormat]:
    if "d_sae" in config:
        return ["saelens"]
    return ["sparsify"] if {"d_in", "k"} <= set(config) else []


def _remote_folder_format(source: str | Path) -> AutoencoderFormat:
    """A remote folder cannot be listed: the files that each format must have are asked for.

    What is in the cache needs no answer, so that a folder that was read once is read offline too.
    """
    unanswered: SourceError | None = None
    for name in ("config.json", "cfg.json", *_MARKS):
        path = files.join(source, name)
        try:
            there = files.exists(path)
        except SourceError as error:
            unanswered = unanswered or error
            continue
        if not there:
            continue
        if name in _MARKS:
            return _MARKS[name]
        config = files.read_json(files.fetch(path))
        found = _config_formats(config) if name == "config.json" else _cfg_formats(config)
        if found:
            return found[0]
    if unanswered is not None:
        raise unanswered
    raise CheckpointError(f"{source}: of no known format. {_LAYOUTS}")


def file_kind(path: Path, source: str | Path) -> FileKind:
    """What kind of file it is, by its first bytes and, for archives, by what is in them."""
    if str(source).lower().endswith((".pkl", ".pickle")):
        raise CheckpointError(
            f"{source}: refused: pickles can run any code. Expected a torch file of tensors (.pt), "
            "safetensors, .npz or .npy."
        )
    with path.open("rb") as file:
        head = file.read(9)
    if head.startswith(b"\x93NUMPY"):
        return "npy"
    if head.startswith(b"PK"):
        try:
            with zipfile.ZipFile(path) as archive:
                names = archive.namelist()
        except (zipfile.BadZipFile, OSError, ValueError, NotImplementedError) as error:
            raise damaged(source, error) from error
        return "npz" if names and all(name.endswith(".npy") for name in names) else "torch"
    if len(head) == 9 and head[8:] == b"{" and int.from_bytes(head[:8], "little") < 1 << 32:
        return "safetensors"
    return "torch"  # or none: its reader says so


def torch_format(content: Mapping[str, Any]) -> AutoencoderFormat:
    """Of the content of a torch file, by its keys; what nobody else has is of OpenAI's layout."""
    if language_model_saes.has_keys(content):
        return "language_model_saes"
    if e2e.places(content):
        return "e2e"
    keys = {key for key in content if isinstance(key, str)}
    if dictionary_learning.classes_with_keys(keys):
        return "dictionary_learning"
    return "openai"
