"""Books on disk -> tokens -> training batches and held-out windows.

Shape legend: ``b`` windows of a batch, ``s`` tokens of a window.
"""

import datetime
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import tiktoken
from torch import Tensor

from neuron_explainer.activations import TokenCorpus, TokenWindows
from neuron_explainer.activations.corpus import Ints, permutation
from neuron_explainer.errors import InputError, SourceError

#: Books that are never trained on, neither for the tokenizer nor the model nor an autoencoder.
HELD_OUT_BOOKS = ("the_crimson_fairy_book", "the_wind_in_the_willows", "treasure_island")


@dataclass(frozen=True)
class Corpus:
    """The texts of the books, by title."""

    training: dict[str, str]
    held_out: dict[str, str]


def read_corpus(folder: Path) -> Corpus:
    """Read ``folder/*.txt``, one book per file, and set the held-out books apart."""
    if not folder.is_dir():
        raise SourceError(f"No corpus at {str(folder)!r}: expected a folder of .txt files.")
    books = {path.stem: path.read_text(encoding="utf-8") for path in sorted(folder.glob("*.txt"))}
    missing = [title for title in HELD_OUT_BOOKS if title not in books]
    if missing:
        raise SourceError(
            f"The corpus at {str(folder)!r} lacks the held-out books {', '.join(missing)} "
            f"(found {len(books)} .txt files), so nothing trained on it could be measured."
        )
    if len(books) == len(HELD_OUT_BOOKS):
        raise SourceError(f"The corpus at {str(folder)!r} holds no book to train on.")
    return Corpus(
        training={title: text for title, text in books.items() if title not in HELD_OUT_BOOKS},
        held_out={title: books[title] for title in HELD_OUT_BOOKS},
    )


def data_record() -> dict[str, Any]:
    """What the config of a trained thing says about its data."""
    return {
        "data": "35 public-domain books in English",
        "held_out_books": list(HELD_OUT_BOOKS),
        "date": datetime.date.today().isoformat(),
    }


def token_corpus(books: Mapping[str, str], enc: tiktoken.Encoding) -> TokenCorpus:
    """The books as tokens, one document each."""
    return TokenCorpus.of(enc.encode_ordinary(text) for text in books.values())


class ModelBatches:
    """Batches for training the model: inputs and targets ``[b, s]``, without end.

    The books are one stream. Each epoch cuts it from another offset, so that a token is at another
    position each time. In every fourth batch the windows begin with ``<|endoftext|>``, so that prompts
    which begin with it are nothing new to the model. Each batch depends on its number and the seed only.

    Args:
        corpus: the books.
        ctx_window: ``s``
        batch_size: ``b``
        seed: of the offsets and of the order of windows.
        bos: the id of ``<|endoftext|>``.
    """

    def __init__(
        self, corpus: TokenCorpus, ctx_window: int, batch_size: int, seed: int, bos: int
    ) -> None:
        self.corpus, self.ctx_window, self.batch_size = corpus, ctx_window, batch_size
        self.seed, self.bos = seed, bos
        # A window has one token more than its inputs: the last target.
        self.n_windows = (corpus.n_tokens - ctx_window) // (ctx_window + 1)
        if self.n_windows < batch_size:
            raise InputError(
                f"a corpus of {corpus.n_tokens} tokens is too short for batches of {batch_size} windows "
                f"of {ctx_window}: at least {batch_size * (ctx_window + 1) + ctx_window} are needed."
            )
        self._next = 0
        self._epoch = -1
        self._cut: list[TokenWindows] = []

    def batch(self, number: int) -> tuple[Tensor, Tensor]:
        """Inputs and targets of the batch with this number."""
        epoch, index = divmod(number, self.n_windows // self.batch_size)
        if self._epoch != epoch:
            offset = int(permutation(self.ctx_window, self.seed, epoch)[0])
            self._cut = [self._windows(offset, bos) for bos in (self.bos, None)]
            self._epoch = epoch
        windows = self._cut[0 if number % 4 == 0 else 1]
        tokens = windows.batch(epoch * windows.batches_per_epoch + index).tokens
        return tokens[:, :-1], tokens[:, 1:]

    def _windows(self, offset: int, bos: int | None) -> TokenWindows:
        """``n_windows`` whole windows from ``offset`` on."""
        length = self.ctx_window + 1
        end = offset + self.n_windows * (length if bos is None else length - 1)
        stream = TokenCorpus(self.corpus.tokens, np.array([offset, end]), np.array([0]))
        return TokenWindows(stream, length, self.batch_size, bos=bos, seed=self.seed, epochs=None)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        while True:
            self._next += 1
            yield self.batch(self._next - 1)

    def state_dict(self) -> dict[str, int]:
        return {"next": self._next}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self._next = state["next"]


@dataclass(frozen=True)
class EvalWindow:
    """Tokens for one forward pass."""

    tokens: Ints
    count_from: int
    """The position of the first prediction that counts."""


def evaluation_windows(
    text_tokens: Ints, ctx_window: int, stride: int, bos_token: int
) -> Iterator[EvalWindow]:
    """Cut a book into windows so that each of its tokens is predicted exactly once.

    A start token before the book lets its first token be predicted too. With ``stride == ctx_window``
    the windows lie side by side, and the first predictions of a window have almost no context. With a
    shorter stride they overlap, and each prediction (except a book's first ones) sees at least
    ``ctx_window - stride`` tokens.
    """
    if not 0 < stride <= ctx_window:
        raise InputError(f"The stride must lie in 1..{ctx_window}; found {stride}.")
    stream = np.concatenate([[bos_token], text_tokens])
    predicted = 0  # stream[1 : predicted + 1] have been predicted
    while predicted < len(text_tokens):
        end = min(predicted + (ctx_window if predicted == 0 else stride), len(text_tokens))
        start = max(0, end - ctx_window)
        yield EvalWindow(stream[start : end + 1], count_from=predicted - start)
        predicted = end
