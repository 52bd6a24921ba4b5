"""Documents as tokens, in memory or in a mapped file: what windows are cut from.

Shape legend: ``n`` tokens, ``m`` documents.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from hashlib import sha256
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from neuron_explainer.errors import InputError, SourceError
from neuron_explainer.models.tokenizers import start_token_of

Ints = npt.NDArray[np.int64]
_TOKENS_AT_ONCE = 1 << 20
TokenArray = npt.NDArray[np.uint16] | npt.NDArray[np.uint32] | Ints


class TextEncoder(Protocol):
    """What turns text into tokens: every ``ModelContext`` does."""

    def encode(self, string: str, /) -> list[int]:
        """The tokens of a text, with nothing added."""


def permutation(n: int, *key: int) -> Ints:
    """A random order of ``0 … n-1`` that depends on nothing but the key.

    NumPy promises that ``RandomState`` draws the same for ever, and promises no such thing of its
    newer generators: with those, a run resumed after an update would repeat and miss rows.
    """
    if not all(0 <= part < 2**64 for part in key):
        raise InputError(f"a seed must be at least 0 and below 2**64, found {key[0]}.")
    words = [word for part in key for word in (part & 0xFFFFFFFF, part >> 32)]
    return np.random.RandomState(words).permutation(n).astype(np.int64)


@dataclass(frozen=True, eq=False)
class TokenCorpus:
    """All tokens of all documents one after the other, and where each document lies.

    ``split`` gives corpora of some of the documents, over the same tokens.
    """

    tokens: TokenArray
    """Ids ``[n]``."""
    starts: Ints
    """``[m + 1]``: document ``i`` of the source is ``tokens[starts[i] : starts[i + 1]]``."""
    numbers: Ints
    """The documents that belong to this corpus, rising."""
    name: str = "tokens"
    vocabulary: int | None = None
    """The tokenizer's size, where it is known; ids are below it."""
    origin: Mapping[str, Any] = field(default_factory=dict)
    """How to read the same text again: ``source`` (a path, a URL or ``hf:OWNER/NAME``) and fields of
    :class:`~neuron_explainer.activations.data_config.DataConfig`; empty where that is not known."""
    _digests: dict[str, str] = field(default_factory=dict, repr=False)  # shared with its parts

    @classmethod
    def of(
        cls,
        documents: Iterable[Sequence[int]],
        name: str = "tokens",
        origin: Mapping[str, Any] | None = None,
    ) -> "TokenCorpus":
        """A corpus of documents that are token ids already."""
        pieces = [np.asarray(document, dtype=np.int64) for document in documents]
        lengths = [len(piece) for piece in pieces]
        if not sum(lengths):
            raise SourceError(f"{name}: no tokens in {len(pieces)} documents.")
        starts = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
        numbers = np.arange(len(pieces))
        return cls(np.concatenate(pieces), starts, numbers, name, origin=origin or {})

    @property
    def lengths(self) -> Ints:
        """Tokens of each document of this corpus."""
        return self.starts[self.numbers + 1] - self.starts[self.numbers]

    @property
    def n_tokens(self) -> int:
        """Tokens of this corpus."""
        return int(self.lengths.sum())

    @property
    def fingerprint(self) -> str:
        """Tells corpora apart by all of their tokens, and where documents begin."""
        digest = sha256(self.source_fingerprint.encode())
        digest.update(self.numbers.tobytes())
        return digest.hexdigest()[:16]

    @property
    def source_fingerprint(self) -> str:
        """The same for all documents of the source, whichever of them belong to this corpus."""
        if "source" not in self._digests:
            digest = sha256(self.starts.tobytes())
            for begin in range(0, len(self.tokens), _TOKENS_AT_ONCE):
                # One width for all: a token file holds what a corpus in memory holds.
                digest.update(self.tokens[begin : begin + _TOKENS_AT_ONCE].astype("<u4").tobytes())
            self._digests["source"] = digest.hexdigest()[:16]
        return self._digests["source"]

    def __len__(self) -> int:
        return len(self.numbers)

    def document(self, number: int) -> Ints:
        """The tokens of the document with this number in the source."""
        return self.tokens[self.starts[number] : self.starts[number + 1]].astype(np.int64)

    def split(self, held_out: float, seed: int = 0) -> tuple["TokenCorpus", "TokenCorpus"]:
        """Whole documents set apart at random: (to train on, to measure on).

        Args:
            held_out: share of the documents, rounded to a whole number of them, at least one.
            seed: of the choice.
        """
        if not 0 < held_out < 1:
            raise InputError(f"held_out must lie between 0 and 1, found {held_out}.")
        if len(self) < 2:
            raise InputError(
                f"{self.name} is a single document, of which none can be set apart; cut the text "
                "into documents (read_documents(..., split=)), or measure on another file."
            )
        n_held_out = min(max(1, round(held_out * len(self))), len(self) - 1)
        order = permutation(len(self), seed, len(self))
        chosen = np.zeros(len(self), dtype=bool)
        chosen[order[:n_held_out]] = True
        how = {"hold_out": held_out, "data_seed": seed}
        return self._only(self.numbers[~chosen], how), self._only(self.numbers[chosen], how)

    def _only(self, numbers: Ints, how: Mapping[str, Any]) -> "TokenCorpus":
        return replace(self, numbers=numbers, origin={**self.origin, **how})

    def __repr__(self) -> str:
        return f"TokenCorpus({self.name!r}, {len(self)} documents, {self.n_tokens} tokens)"


def tokenize(
    documents: Iterable[str], encoder: TextEncoder, *, max_tokens: int | None = None
) -> TokenCorpus:
    """The documents as tokens in memory (8 bytes each); for more, :func:`write_token_file`.

    Args:
        documents: texts; ``<|endoftext|>`` in them is the special token.
        encoder: a context.
        max_tokens: stop with the document that reaches so many.
    """
    if max_tokens is not None and max_tokens < 1:
        raise InputError(f"max_tokens must be at least 1, found {max_tokens}.")

    def encoded() -> Iterator[list[int]]:
        n_tokens = 0
        for text in documents:
            yield (ids := encoder.encode(text))
            n_tokens += len(ids)
            if max_tokens is not None and n_tokens >= max_tokens:
                return

    name: Any = getattr(documents, "name", "documents")
    origin: Any = getattr(documents, "origin", {})
    if origin and max_tokens is not None:
        origin = {**origin, "corpus_tokens": max_tokens}
    return TokenCorpus.of(encoded(), str(name), origin)


def start_token(context: Any) -> int:
    """The id of a model's start token: ``<|endoftext|>`` for GPT-2.

    Args:
        context: a ``ModelContext``.
    """
    encoding = context.get_encoding()
    bos = getattr(encoding, "bos_token", None)
    return int(start_token_of(encoding) if bos is None else bos)
