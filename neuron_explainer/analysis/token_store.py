"""The text behind stores of examples: a token file together with its vocabulary.

A folder of stores has one, ``tokens/``, which all stores of the folder share. It is a token file (see
:mod:`neuron_explainer.activations.token_files`) with one file more, ``vocabulary.bin``: what each token
writes, as bytes. So examples are read without a model, a tokenizer, or torch.

``vocabulary.bin`` holds ``v + 1`` offsets (uint32, little-endian) for a vocabulary of ``v`` tokens, and
then the bytes of all tokens; token ``i`` is ``bytes[offset[i] : offset[i + 1]]``.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from neuron_explainer import files
from neuron_explainer.activations.corpus import TokenCorpus
from neuron_explainer.activations.token_files import (
    MANIFEST_FILE,
    VOCABULARY_FILE,
    open_token_file,
    read_token_manifest,
    tokenizer_name,
    write_tokens,
)
from neuron_explainer.errors import CheckpointError, InputError

if TYPE_CHECKING:
    from neuron_explainer.models.model_context import ModelContext

Ints = npt.NDArray[np.int64]

TOKENS_FOLDER = "tokens"
_checked: set[tuple[object, ...]] = set()  # files whose SHA-256 this process has compared


@dataclass(frozen=True, eq=False)
class TokenStore:
    """Tokens of a corpus and the bytes that they write.

    The SHA-256 of the files is compared when tokens are first read in a process; afterwards, before each
    read, size and time of the files are compared with those of that moment.
    """

    folder: Path
    corpus: TokenCorpus
    """The tokens, mapped into memory."""
    tokenizer: str
    """The name of the tokenizer."""
    sha256: dict[str, str]
    """By file name."""
    offsets: npt.NDArray[np.uint32]
    """``[v + 1]``: where the bytes of each token begin."""
    text: bytes
    """The bytes of all tokens of the vocabulary, one after the other."""
    marks: dict[str, tuple[int, ...]]
    """Size, time and inode of each file when it was opened."""

    @classmethod
    def open(cls, folder: str | Path) -> "TokenStore":
        """Open a ``tokens/`` folder. Sizes are checked now, hashes when tokens are first read."""
        folder = files.local_path(folder)
        manifest = read_token_manifest(folder)
        if VOCABULARY_FILE not in manifest.sha256:
            raise CheckpointError(
                f"{folder}: a token file without {VOCABULARY_FILE}, so its tokens have no text; "
                "collate writes one."
            )
        corpus = open_token_file(folder)
        path = folder / VOCABULARY_FILE
        content = path.read_bytes() if path.is_file() else b""
        end = 4 * (manifest.vocabulary + 1)
        whole = len(content) >= end
        offsets = np.frombuffer(content[: end if whole else 0], dtype="<u4").astype(np.uint32)
        steps = np.diff(offsets.astype(np.int64))
        if not whole or (steps < 0).any() or offsets[-1] != len(content) - end:
            raise CheckpointError(
                f"{path}: damaged: expected the texts of {manifest.vocabulary} tokens, found "
                f"{len(content)} bytes that do not fit."
            )
        marks = {name: mark_of(folder / name) for name in manifest.sha256}
        names = manifest.tokenizer, manifest.sha256
        return cls(folder, corpus, *names, offsets, content[end:], marks)

    @classmethod
    def write(
        cls,
        folder: str | Path,
        corpus: TokenCorpus,
        vocabulary: Sequence[bytes],
        tokenizer: str = "none",
    ) -> "TokenStore":
        """Write a ``tokens/`` folder and open it. If there is one, it must hold the same.

        All tokens of the source are written, also those of documents that a split has set apart: the
        positions of examples count them.

        Args:
            folder: usually ``OUT/tokens``.
            corpus: the tokens; ``TokenCorpus.of(documents, name)`` makes one of lists of token ids.
            vocabulary: the bytes that each token writes, by id.
            tokenizer: the name of the tokenizer.
        """
        folder = files.local_path(folder)
        _check_ids(corpus, len(vocabulary))
        if (folder / MANIFEST_FILE).exists():
            there = cls.open(folder)
            there._check_same(corpus, vocabulary)
            return there
        with files.atomic_folder(folder) as temporary:
            ends = np.cumsum([0, *map(len, vocabulary)]).astype("<u4")
            with files.plain_write(temporary / VOCABULARY_FILE) as path:
                path.write_bytes(ends.tobytes() + b"".join(vocabulary))
            documents = (
                corpus.tokens[a:b] for a, b in zip(corpus.starts, corpus.starts[1:], strict=False)
            )
            write_tokens(temporary, documents, corpus.name, tokenizer, len(vocabulary))
        return cls.open(folder)

    @classmethod
    def of_context(
        cls, folder: str | Path, corpus: TokenCorpus, context: "ModelContext"
    ) -> "TokenStore":
        """:meth:`write` with the vocabulary of a model's tokenizer."""
        from neuron_explainer.models.tokenizers import vocabulary_bytes  # brings torch

        vocabulary = vocabulary_bytes(context.get_encoding())
        # A model may have more rows than its tokenizer has tokens, and a corpus of ids may use them.
        highest = max((int(part.max()) for part in _parts(corpus)), default=-1)
        vocabulary += [b"<|token %d|>" % i for i in range(len(vocabulary), highest + 1)]
        return cls.write(folder, corpus, vocabulary, tokenizer_name(context))

    def windows(self, start: Ints, length: Ints) -> tuple[list[Ints], Ints]:
        """The token ids of several pieces of text.

        Args:
            start: ``[e]`` corpus positions.
            length: ``[e]`` numbers of tokens; each piece lies in one document.

        Returns:
            the ids of each piece, and the number of its document ``[e]``.
        """
        self.check_unchanged()
        n, starts = len(self.corpus.tokens), self.corpus.starts
        document = np.searchsorted(starts, start, side="right") - 1
        inside = (start >= 0) & (start < n) & (length > 0)
        inside &= start + length <= starts[np.clip(document, 0, len(starts) - 2) + 1]
        if not inside.all():
            row = int(np.flatnonzero(~inside)[0])
            raise CheckpointError(
                f"{self.folder}: expected tokens of one document of {n} tokens in all, found an example of "
                f"{length[row]} tokens at {start[row]}. The store of examples is damaged, or of another text."
            )
        places = np.minimum(start[:, None] + np.arange(int(length.max(initial=0))), n - 1)
        ids = np.asarray(self.corpus.tokens[places]).astype(np.int64)
        return [row[:size] for row, size in zip(ids, length.tolist(), strict=True)], document

    def pieces(self, ids: npt.ArrayLike) -> list[bytes]:
        """What each of these tokens writes."""
        numbers, n = np.asarray(ids, dtype=np.int64), len(self.offsets) - 1
        wrong = numbers[(numbers < 0) | (numbers >= n)]
        if len(wrong):
            raise CheckpointError(
                f"{self.folder}: token {wrong[0]} is not among the {n} of the vocabulary: the folder is "
                "damaged."
            )
        ends = self.offsets[numbers + 1].tolist()
        return [self.text[a:b] for a, b in zip(self.offsets[numbers].tolist(), ends, strict=True)]

    @cached_property
    def words(self) -> dict[str, list[int]]:
        """Tokens by what they write, without spaces around it and without capitals."""
        found: dict[str, list[int]] = {}
        for number, piece in enumerate(self.pieces(np.arange(len(self.offsets) - 1))):
            found.setdefault(piece.decode(errors="replace").strip().casefold(), []).append(number)
        return found

    def tokens_like(self, text: str) -> list[int]:
        """The tokens that write a text: exactly this one, or this word with other spaces and capitals."""
        near = self.words.get(text.strip().casefold(), [])
        exact = text.encode(errors="replace")
        same = [n for n, piece in zip(near, self.pieces(near), strict=True) if piece == exact]
        return same if same and text != text.strip() else near

    def check_unchanged(self) -> None:
        """An error if a file is not the one that was written, or has changed since it was opened."""
        for name, mark in self.marks.items():
            path = self.folder / name
            if mark_of(path) != mark:
                raise CheckpointError(
                    f"{path} has changed since it was opened; the examples no longer point to their "
                    "text. Open the store again."
                )
            key = (str(path), mark, self.sha256[name])
            if key not in _checked:
                self._compare(path)
                _checked.add(key)

    def verify(self) -> None:
        """Compare the SHA-256 of all files again."""
        for name in self.sha256:
            self._compare(self.folder / name)

    def _compare(self, path: Path) -> None:
        found, expected = files.sha256_of(path), self.sha256[path.name]
        if found != expected:
            raise CheckpointError(
                f"{path} is not the file that was written: expected SHA-256 {expected}, found {found}. "
                "Get the folder again, or collate again."
            )

    def _check_same(self, corpus: TokenCorpus, vocabulary: Sequence[bytes]) -> None:
        same = (
            np.array_equal(self.corpus.starts, corpus.starts)
            and np.array_equal(self.corpus.tokens, corpus.tokens)
            and self.text == b"".join(vocabulary)
            and np.array_equal(np.diff(self.offsets), [len(text) for text in vocabulary])
        )
        if not same:
            raise InputError(
                f"{self.folder} holds another corpus ({self.corpus.name}, {len(self.corpus.tokens)} "
                f"tokens) than {corpus.name} ({len(corpus.tokens)} tokens), and the stores beside it "
                "share it. Write to another folder."
            )


def _parts(corpus: TokenCorpus) -> Iterator[npt.NDArray[Any]]:
    for begin in range(0, len(corpus.tokens), 1 << 20):
        yield corpus.tokens[begin : begin + (1 << 20)]


def _check_ids(corpus: TokenCorpus, n_vocabulary: int) -> None:
    for part in _parts(corpus):
        wrong = part[(part < 0) | (part >= n_vocabulary)]
        if len(wrong):
            raise InputError(
                f"{corpus.name}: token ids must lie between 0 and {n_vocabulary - 1}, the last token "
                f"of the vocabulary; found {wrong[0]}."
            )


def mark_of(path: Path) -> tuple[int, ...]:
    """Size, time and inode of a file, by which a change of it is noticed; empty if it cannot be had."""
    try:
        found = path.stat()
    except OSError:
        return ()
    return found.st_size, found.st_mtime_ns, found.st_ino
