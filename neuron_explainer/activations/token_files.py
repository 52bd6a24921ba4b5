"""Token files: a corpus on disk that is tokenised once, and mapped into memory whenever it is used.

A folder with ``tokens.bin`` (uint16, or uint32 where the vocabulary needs it, little-endian),
``starts.bin`` (int64, see :class:`~neuron_explainer.activations.corpus.TokenCorpus`) and
``manifest.json``. It appears whole or not at all.
"""

import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeVar

import numpy as np

from neuron_explainer import files
from neuron_explainer.activations.corpus import TokenCorpus
from neuron_explainer.errors import CheckpointError, InputError, SourceError, shown
from neuron_explainer.models.model_context import ModelContext
from neuron_explainer.settings.fields import read_fields

MANIFEST_FILE = "manifest.json"
_KIND, _VERSION = "token_file", 1
T = TypeVar("T")
_DTYPES: dict[str, np.dtype[Any]] = {"uint16": np.dtype("<u2"), "uint32": np.dtype("<u4")}
_FILES = {"tokens": "tokens.bin", "starts": "starts.bin"}


@dataclass(frozen=True)
class _TokenManifest:
    """``manifest.json`` of a token file's folder."""

    format_version: int
    kind: str
    source: str
    tokenizer: str
    vocabulary: int
    dtype: Literal["uint16", "uint32"]
    n_tokens: int
    n_documents: int
    sha256: dict[str, str]

    def __post_init__(self) -> None:
        if set(self.sha256) != set(_FILES.values()):
            raise CheckpointError(f"sha256 should name {', '.join(_FILES.values())}.")
        if min(self.n_tokens, self.n_documents, self.vocabulary) < 1:
            raise CheckpointError("n_tokens, n_documents and vocabulary should be at least 1.")


def read_manifest(folder: Path, manifest: type[T], kind: str, version: int) -> T:
    """The content of the ``manifest.json`` in a folder; an error if its kind or version differs."""
    path = folder / MANIFEST_FILE
    found = files.read_json(path)
    if (found.get("kind"), found.get("format_version")) != (kind, version):
        raise CheckpointError(
            f"{path}: expected kind {kind!r} of format_version {version}, found "
            f"{shown(found.get('kind'))} of {shown(found.get('format_version'))}."
        )
    return read_fields(manifest, found, str(path), error=CheckpointError)


def write_token_file(
    folder: str | Path, documents: Iterable[str], context: ModelContext, *, progress: bool = False
) -> TokenCorpus:
    """Tokenise documents into a folder that must be absent or empty, and open it.

    Args:
        folder: the folder to write.
        documents: texts, held in memory one at a time; ``<|endoftext|>`` in them becomes the special
            token.
        context: the model whose tokenizer is used.
        progress: show a progress bar on stderr.
    """
    vocabulary = _vocabulary_of(context)
    dtype = "uint16" if vocabulary <= 1 << 16 else "uint32"
    with files.atomic_folder(folder) as temporary:
        starts = [0]
        with files.plain_write(temporary / _FILES["tokens"]) as path, path.open("wb") as out:
            for text in _counted(documents, progress):
                ids = np.asarray(context.encode(text), dtype=np.int64)
                out.write(ids.astype(_DTYPES[dtype]).tobytes())
                starts.append(starts[-1] + len(ids))
        if not starts[-1]:
            raise SourceError(f"{_name_of(documents)}: no tokens in {len(starts) - 1} documents.")
        with files.plain_write(temporary / _FILES["starts"]) as path:
            np.array(starts, dtype="<i8").tofile(path)
        manifest = {
            "format_version": _VERSION,
            "kind": _KIND,
            "source": _name_of(documents),
            "tokenizer": _tokenizer_name(context),
            "vocabulary": vocabulary,
            "dtype": dtype,
            "n_tokens": starts[-1],
            "n_documents": len(starts) - 1,
            "sha256": {name: files.sha256_of(temporary / name) for name in _FILES.values()},
        }
        files.write_json(temporary / MANIFEST_FILE, manifest)
    return open_token_file(folder, context)


def open_token_file(
    folder: str | Path, context: ModelContext | None = None, *, verify: bool = False
) -> TokenCorpus:
    """The corpus in a token file. The file is mapped, so the corpus takes next to no memory.

    Args:
        folder: written by :func:`write_token_file`.
        context: the model that will read the tokens; a model with another tokenizer is refused.
        verify: check the SHA-256 of the files too, which reads all of them; sizes are always checked.
    """
    folder = files.local_path(folder)
    manifest = read_manifest(folder, _TokenManifest, _KIND, _VERSION)
    if context is not None:
        _check_tokenizer(folder, manifest, context)
    dtype, n_tokens = _DTYPES[manifest.dtype], manifest.n_tokens
    sizes = {"tokens": n_tokens * dtype.itemsize, "starts": 8 * (manifest.n_documents + 1)}
    for key, name in _FILES.items():
        _check_file(folder / name, sizes[key], manifest.sha256[name] if verify else None)
    starts = np.fromfile(folder / _FILES["starts"], dtype="<i8").astype(np.int64)
    if starts[0] != 0 or starts[-1] != n_tokens or bool((np.diff(starts) < 0).any()):
        raise CheckpointError(f"{folder / _FILES['starts']} does not fit the {n_tokens} tokens.")
    tokens = np.memmap(folder / _FILES["tokens"], dtype=dtype, mode="r", shape=(n_tokens,))
    numbers = np.arange(manifest.n_documents)
    origin = {"source": str(folder.resolve())}
    return TokenCorpus(tokens, starts, numbers, manifest.source, manifest.vocabulary, origin)


def _check_file(path: Path, size: int, sha256: str | None) -> None:
    found = path.stat().st_size if path.exists() else None
    if found != size:
        raise CheckpointError(
            f"{path}: expected {size} bytes, found {'no file' if found is None else found}; "
            "write the token file anew."
        )
    if sha256 is not None and (digest := files.sha256_of(path)) != sha256:
        raise CheckpointError(f"{path}: expected SHA-256 {sha256}, found {digest}: damaged.")


def _check_tokenizer(folder: Path, manifest: _TokenManifest, context: ModelContext) -> None:
    there = manifest.tokenizer, manifest.vocabulary
    here = _tokenizer_name(context), _vocabulary_of(context)
    if there != here:
        raise InputError(
            f"{folder} was written with the tokenizer {there[0]!r} of {there[1]} tokens; "
            f"{context.model_name} has {here[0]!r} of {here[1]}. Write a token file for this model."
        )


def _tokenizer_name(context: ModelContext) -> str:
    return str(context.get_encoding().name)


def _vocabulary_of(context: ModelContext) -> int:
    return int(context.get_encoding().n_vocab)


def _name_of(documents: Iterable[str]) -> str:
    name = str(getattr(documents, "name", "documents"))
    return Path(name).name if os.path.exists(name) else name  # no folders of a user


def _counted(documents: Iterable[str], progress: bool) -> Iterator[str]:
    if not progress:
        return iter(documents)
    from neuron_explainer.progress import progress_bar

    return iter(progress_bar(documents, desc="tokenising", unit=" documents"))
