"""Token files: a corpus on disk that is tokenised once, and mapped into memory whenever it is used.

A folder with ``tokens.bin`` (uint16, or uint32 where the vocabulary needs it, little-endian),
``starts.bin`` (int64, see :class:`~neuron_explainer.activations.corpus.TokenCorpus`) and
``manifest.json``. The corpus of a store of examples also has ``vocabulary.bin``, see
:mod:`~neuron_explainer.analysis.token_store`. The folder appears whole or not at all.
"""

import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeVar

import numpy as np
import numpy.typing as npt

from neuron_explainer import files
from neuron_explainer.activations.corpus import TokenCorpus
from neuron_explainer.errors import CheckpointError, InputError, SourceError, shown
from neuron_explainer.settings.fields import read_fields

if TYPE_CHECKING:
    from neuron_explainer.models.model_context import ModelContext

MANIFEST_FILE = "manifest.json"
_KIND, _VERSION = "token_file", 1
T = TypeVar("T")
_DTYPES: dict[str, np.dtype[Any]] = {"uint16": np.dtype("<u2"), "uint32": np.dtype("<u4")}
_FILES = {"tokens": "tokens.bin", "starts": "starts.bin"}
VOCABULARY_FILE = "vocabulary.bin"


@dataclass(frozen=True)
class TokenManifest:
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
        if set(self.sha256) - {VOCABULARY_FILE} != set(_FILES.values()):
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
    folder: str | Path, documents: Iterable[str], context: "ModelContext", *, progress: bool = False
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
    name = _name_of(documents)
    encoded = (context.encode(text) for text in _counted(documents, progress))
    with files.atomic_folder(folder) as temporary:
        write_tokens(temporary, encoded, name, tokenizer_name(context), vocabulary)
    return open_token_file(folder, context)


def write_tokens(
    folder: Path,
    documents: Iterable[Sequence[int] | npt.NDArray[Any]],
    source: str,
    tokenizer: str,
    vocabulary: int,
) -> None:
    """Write the files of a token file into a folder that exists; a ``vocabulary.bin`` in it is kept.

    Args:
        folder: the folder.
        documents: token ids, one document at a time.
        source: the name of the text.
        tokenizer: the name of the tokenizer.
        vocabulary: the number that all ids lie below.
    """
    dtype = "uint16" if vocabulary <= 1 << 16 else "uint32"
    starts = [0]
    with files.plain_write(folder / _FILES["tokens"]) as path, path.open("wb") as out:
        for ids in documents:
            out.write(np.asarray(ids).astype(_DTYPES[dtype]).tobytes())
            starts.append(starts[-1] + len(ids))
    if not starts[-1]:
        raise SourceError(f"{source}: no tokens in {len(starts) - 1} documents.")
    with files.plain_write(folder / _FILES["starts"]) as path:
        np.array(starts, dtype="<i8").tofile(path)
    names = [name for name in (*_FILES.values(), VOCABULARY_FILE) if (folder / name).exists()]
    manifest = {
        "format_version": _VERSION,
        "kind": _KIND,
        "source": source,
        "tokenizer": tokenizer,
        "vocabulary": vocabulary,
        "dtype": dtype,
        "n_tokens": starts[-1],
        "n_documents": len(starts) - 1,
        "sha256": {name: files.sha256_of(folder / name) for name in names},
    }
    files.write_json(folder / MANIFEST_FILE, manifest)


def open_token_file(
    folder: str | Path, context: "ModelContext | None" = None, *, verify: bool = False
) -> TokenCorpus:
    """The corpus in a token file. The file is mapped, so the corpus takes next to no memory.

    Args:
        folder: written by :func:`write_token_file`.
        context: the model that will read the tokens; a model with another tokenizer is refused.
        verify: check the SHA-256 of the files too, which reads all of them; sizes are always checked.
    """
    folder = files.local_path(folder)
    manifest = read_token_manifest(folder)
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


def read_token_manifest(folder: Path) -> TokenManifest:
    """The ``manifest.json`` of a token file."""
    return read_manifest(folder, TokenManifest, _KIND, _VERSION)


def _check_file(path: Path, size: int, sha256: str | None) -> None:
    found = path.stat().st_size if path.exists() else None
    if found != size:
        raise CheckpointError(
            f"{path}: expected {size} bytes, found {'no file' if found is None else found}; "
            "write the token file anew."
        )
    if sha256 is not None and (digest := files.sha256_of(path)) != sha256:
        raise CheckpointError(f"{path}: expected SHA-256 {sha256}, found {digest}: damaged.")


def _check_tokenizer(folder: Path, manifest: TokenManifest, context: "ModelContext") -> None:
    there = manifest.tokenizer, manifest.vocabulary
    here = tokenizer_name(context), _vocabulary_of(context)
    if there != here:
        raise InputError(
            f"{folder} was written with the tokenizer {there[0]!r} of {there[1]} tokens; "
            f"{context.model_name} has {here[0]!r} of {here[1]}. Write a token file for this model."
        )


def tokenizer_name(context: "ModelContext") -> str:
    """The name of a context's tokenizer."""
    return str(context.get_encoding().name)


def _vocabulary_of(context: "ModelContext") -> int:
    return int(context.get_encoding().n_vocab)


def _name_of(documents: Iterable[str]) -> str:
    name = str(getattr(documents, "name", "documents"))
    return Path(name).name if os.path.exists(name) else name  # no folders of a user


def _counted(documents: Iterable[str], progress: bool) -> Iterator[str]:
    if not progress:
        return iter(documents)
    from neuron_explainer.progress import progress_bar

    return iter(progress_bar(documents, desc="tokenising", unit=" documents"))
