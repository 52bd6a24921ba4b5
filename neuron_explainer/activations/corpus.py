"""Documents as tokens, in memory or in a mapped file: what windows are cut from.

Shape legend: ``n`` tokens, ``m`` documents.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from hashlib import sha256
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from neuron_explainer.errors import InputError, SourceError

Ints = npt.NDArray[np.int64]
_TOKENS_AT_ONCE = 1 << 20
TokenArray = npt.NDArray[np.uint16] | npt.NDArray[np.uint32] | Ints


class TextEncoder(Protocol):
    """Anything that turns text into tokens, as every ``ModelContext`` does."""

    def encode(self, string: str, /) -> list[int]:
        """The tokens of a text; no start token is added."""


def permutation(n: int, *key: int) -> Ints:
    """A random order of ``0 … n-1`` that depends on the key alone.

    NumPy promises that ``RandomState`` will always draw the same numbers, and makes no such promise for
    its newer generators: with those, a run resumed after an update would repeat and miss rows.
    """
    if not all(0 <= part < 2**64 for part in key):
        raise InputError(f"a seed must be at least 0 and below 2**64, found {key[0]}.")
    words = [word for part in key for word in (part & 0xFFFFFFFF, part >> 32)]
    return np.random.RandomState(words).permutation(n).astype(np.int64)


@dataclass(frozen=True, eq=False)
class TokenCorpus:
    """The tokens of all documents one after the other, and where each document begins.

    ``split`` makes two corpora that share these tokens and have some of the documents each.
    """

    tokens: TokenArray
    """Token ids, ``[n]``."""
    starts: Ints
    """``[m + 1]``: document ``i`` of the source is ``tokens[starts[i] : starts[i + 1]]``."""
    numbers: Ints
    """The numbers of the documents that belong to this corpus, in rising order."""
    name: str = "tokens"
    vocabulary: int | None = None
    """The size of the tokenizer, which all ids are below; None if it is not known."""
    origin: Mapping[str, Any] = field(default_factory=dict)
    """How to read the same text again: ``source`` (a path, a URL or ``hf:OWNER/NAME``) and fields of
    :class:`~neuron_explainer.activations.data_config.DataConfig`; empty where that is not known."""
    _digests: dict[str, str] = field(default_factory=dict, repr=False)  # shared with its parts

    @classmethod
    def of(
        cls,
        documents: Iterable[Sequence[int] | npt.NDArray[Any]],
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

    @classmethod
    def joined(cls, corpora: Sequence["TokenCorpus"]) -> "TokenCorpus":
        """The documents of several whole corpora, one corpus after the other."""
        if len(corpora) == 1:
            return corpora[0]
        for each in corpora:
            if len(each) != len(each.starts) - 1:
                raise InputError(f"{each.name}: join whole corpora, and split them then.")
        vocabularies = {each.vocabulary for each in corpora}
        if not vocabularies or len(vocabularies - {None}) > 1:
            raise InputError(f"expected corpora of one tokenizer, found {len(corpora)} corpora.")
        ends = np.cumsum([0, *(len(each.tokens) for each in corpora)])
        starts = [each.starts[:-1] + end for each, end in zip(corpora, ends, strict=False)]
        return cls(
            np.concatenate([each.tokens for each in corpora]),
            np.concatenate([*starts, ends[-1:]]).astype(np.int64),
            np.arange(sum(map(len, corpora))),
            " + ".join(Path(each.name).name for each in corpora),
            max((v for v in vocabularies if v is not None), default=None),
        )

    @property
    def lengths(self) -> Ints:
        """Number of tokens of each document of this corpus."""
        return self.starts[self.numbers + 1] - self.starts[self.numbers]

    @property
    def n_tokens(self) -> int:
        """Number of tokens of this corpus."""
        return int(self.lengths.sum())

    @property
    def fingerprint(self) -> str:
        """A hash of all tokens, and of where the documents of this corpus begin."""
        digest = sha256(self.source_fingerprint.encode())
        digest.update(self.starts.tobytes())
        digest.update(self.numbers.tobytes())
        return digest.hexdigest()[:16]

    @property
    def source_fingerprint(self) -> str:
        """A hash of all documents of the source, the same for all corpora split or cut from it."""
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
        """Split at random into whole documents to train on and to measure on, in this order.

        Goes through the documents in random order, and sets each apart that brings the number of
        tokens set apart nearer to ``held_out``. If none does, the shortest document is set apart.

        Args:
            held_out: share of the tokens.
            seed: decides the order.
        """
        _check_share(held_out)
        lengths = self.lengths
        if np.count_nonzero(lengths) < 2:
            raise InputError(
                f"{self.name} is a single document, so no whole one can be set apart; cut the text "
                "into documents (read_documents(..., split=), corpus.cut()), or measure on another "
                "file."
            )
        wanted, found = held_out * lengths.sum(), 0
        chosen = np.zeros(len(self), dtype=bool)
        for index in permutation(len(self), seed, len(self)):
            if lengths[index] and abs(found + lengths[index] - wanted) < wanted - found:
                chosen[index], found = True, found + lengths[index]
        if not found:
            chosen[np.where(lengths > 0, lengths, lengths.max() + 1).argmin()] = True
        how = {"hold_out": held_out, "data_seed": seed}
        return self._only(self.numbers[~chosen], how), self._only(self.numbers[chosen], how)

    def cut(self, length: int) -> "TokenCorpus":
        """The same tokens, cut into documents of at most ``length`` tokens, which are numbered anew.

        This is for a text of a few long documents, none of which can be set apart.
        """
        if length < 1:
            raise InputError(f"length must be at least 1, found {length}.")
        if len(self) != len(self.starts) - 1:
            raise InputError("cut the whole corpus, and split it then.")
        pieces = [
            np.arange(a, b, length) for a, b in zip(self.starts, self.starts[1:], strict=False)
        ]
        starts = np.concatenate([*pieces, self.starts[-1:]]).astype(np.int64)
        _ = self.source_fingerprint  # of the documents before they are cut; handed on
        return replace(self, starts=starts, numbers=np.arange(len(starts) - 1))

    def _only(self, numbers: Ints, how: Mapping[str, Any]) -> "TokenCorpus":
        return replace(self, numbers=numbers, origin={**self.origin, **how})

    def __repr__(self) -> str:
        return f"TokenCorpus({self.name!r}, {len(self)} documents, {self.n_tokens} tokens)"


def _check_share(held_out: float) -> None:
    if not 0 < held_out < 1:
        raise InputError(f"held_out must lie between 0 and 1, found {held_out}.")


def tokenize(
    documents: Iterable[str], encoder: TextEncoder, *, max_tokens: int | None = None
) -> TokenCorpus:
    """The documents as tokens in memory, 8 bytes each; :func:`write_token_file` needs less memory.

    Args:
        documents: texts; ``<|endoftext|>`` in them becomes the special token.
        encoder: a context.
        max_tokens: stop with the document that reaches this many tokens.
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
    from neuron_explainer.models.tokenizers import start_token_of  # brings torch

    encoding = context.get_encoding()
    bos = getattr(encoding, "bos_token", None)
    return int(start_token_of(encoding) if bos is None else bos)
