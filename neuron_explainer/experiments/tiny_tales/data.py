"""Books on disk -> token streams -> training batches and held-out windows.

Everything random here is a pure function of ``(seed, step)``: a resumed run needs no saved state of
the data to see exactly the batches that an uninterrupted run sees.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import numpy.typing as npt
import tiktoken
import torch
from torch import Tensor

from neuron_explainer.errors import InputError, SourceError

#: Books that nothing is ever trained on: neither the tokenizer, the model nor an autoencoder.
HELD_OUT_BOOKS = ("the_crimson_fairy_book", "the_wind_in_the_willows", "treasure_island")

Tokens = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Corpus:
    """Texts of the books by title, those to train on and those held out."""

    training: dict[str, str]
    held_out: dict[str, str]


def read_corpus(folder: Path) -> Corpus:
    """Read ``folder/*.txt``, one book a file, and set the held-out books apart."""
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


def token_stream(books: dict[str, str], enc: tiktoken.Encoding) -> Tokens:
    """All books one after the other, each one opened by ``<|endoftext|>``."""
    pieces = [[enc.eot_token, *enc.encode_ordinary(text)] for text in books.values()]
    return np.concatenate([np.asarray(piece, dtype=np.int64) for piece in pieces])


@dataclass
class TrainingWindows:
    """Batches of windows of ``ctx_window`` tokens; batch ``step`` depends on the seed alone.

    An epoch cuts the stream at every ``ctx_window``-th token from a random offset and goes through
    the windows in random order, so each token is seen once an epoch and at another position in each.
    A share of the windows is shifted by one behind ``<|endoftext|>``, so that a prompt that starts
    with it is nothing new to the model.
    """

    stream: Tokens
    ctx_window: int
    batch_size: int
    seed: int
    bos_token: int
    bos_share: float = 0.25
    _epoch: tuple[int, Tokens, npt.NDArray[np.bool_]] | None = field(default=None, repr=False)

    def __post_init__(self) -> None:
        if len(self.stream) < 2 * self.ctx_window + 1:
            raise InputError(
                f"A stream of {len(self.stream)} tokens is too short for windows of "
                f"{self.ctx_window}: at least {2 * self.ctx_window + 1} are needed."
            )

    @property
    def windows_per_epoch(self) -> int:
        """The same for every offset below ``ctx_window``; one more token is the last target."""
        return (len(self.stream) - self.ctx_window) // self.ctx_window

    def _plan(self, epoch: int) -> tuple[Tokens, npt.NDArray[np.bool_]]:
        """Starts of the epoch's windows in their order, and which of them open with BOS."""
        if self._epoch is None or self._epoch[0] != epoch:
            rng = np.random.default_rng((self.seed, epoch))
            offset = int(rng.integers(self.ctx_window))
            starts = offset + self.ctx_window * rng.permutation(self.windows_per_epoch)
            with_bos = rng.random(self.windows_per_epoch) < self.bos_share
            self._epoch = (epoch, starts, with_bos)
        return self._epoch[1:]

    def window(self, index: int) -> tuple[Tokens, Tokens]:
        """Inputs and targets of the window with this running number over all epochs."""
        epoch, position = divmod(index, self.windows_per_epoch)
        starts, with_bos = self._plan(epoch)
        start = int(starts[position])
        tokens = self.stream[start : start + self.ctx_window + 1]
        if with_bos[position]:
            return np.concatenate([[self.bos_token], tokens[:-2]]), tokens[:-1]
        return tokens[:-1], tokens[1:]

    def batch(self, step: int) -> tuple[Tensor, Tensor]:
        """Inputs and targets ``[batch_size, ctx_window]`` of a training step."""
        first = step * self.batch_size
        pairs = [self.window(index) for index in range(first, first + self.batch_size)]
        return (
            torch.from_numpy(np.stack([inputs for inputs, _ in pairs])),
            torch.from_numpy(np.stack([targets for _, targets in pairs])),
        )


@dataclass(frozen=True)
class EvalWindow:
    """Tokens for one forward pass, and from which position on the predictions are counted."""

    tokens: Tokens
    count_from: int


def evaluation_windows(
    text_tokens: Tokens, ctx_window: int, stride: int, bos_token: int
) -> Iterator[EvalWindow]:
    """Cut a book into windows so that each of its tokens is predicted exactly once.

    The book is opened by BOS, so its first token is predicted too. With ``stride == ctx_window`` the
    windows lie side by side and a window's first predictions have almost no context; with a shorter
    stride they overlap and each prediction (but a book's first ones) sees at least
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
