"""Batches of token windows, with what each token is: of which document, where in it, pad, start token.

Windows are addressed by number, and their order is a function of seed and epoch alone: so every number
of workers or processes sees one order, and to resume takes one counter.

Packed windows attend across the documents in them, as is usual where models are trained on packed text
(GPT-2 was): a token sees those of the document before. One document a row has nothing of that.

Shape legend: ``b`` windows in a batch, ``s`` positions of a window.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from neuron_explainer.activations.corpus import Ints, TokenCorpus, permutation
from neuron_explainer.errors import CheckpointError, InputError


@dataclass(frozen=True)
class TokenBatch:
    """Windows of tokens, as they go through a model."""

    tokens: Tensor
    """Ids ``[b, s]`` int64."""
    document: Tensor
    """Running number of the document that each token belongs to, ``[b, s]`` int64; -1 at pads."""
    position: Tensor
    """Place in the window as the model sees it, ``[b, s]`` int64, from 0; -1 at pads."""
    pad: Tensor | None = None
    """Pad mask ``[b, s]`` bool, True at padding; None: there is none."""
    bos: Tensor | None = None
    """``[b, s]`` bool, True at start tokens and document separators, whether they were put there or read
    (they have one id, and activations of their own kind); None: there are none."""


@dataclass(frozen=True)
class _Window:
    tokens: Ints
    document: Ints


class TokenWindows:
    """Batches of windows cut from a corpus, by number or one after the other.

    Each token of the corpus is in exactly one window an epoch (``concat=False``: those within the
    context length); the last window of packed text is padded. Iterating starts anew each time.

    Args:
        corpus: the documents.
        context_length: positions of a window, start token included.
        batch_size: windows in a batch; an epoch's last batch has what is left.
        concat: pack documents one after the other; else one document a row, cut to the context length
            and padded on the right to the longest of its batch.
        bos: id of a start token to put at the front of each window, and of each document in it;
            None: nothing is added. See :func:`~neuron_explainer.activations.corpus.start_token`.
        seed: of the order of the windows; None: as they lie in the corpus, in each epoch.
        epochs: None: without end.
        rank: take batches ``rank``, ``rank + world``, … only: for process ``rank`` of ``world``.
        world: see ``rank``.
    """

    def __init__(
        self,
        corpus: TokenCorpus,
        context_length: int,
        batch_size: int,
        *,
        concat: bool = True,
        bos: int | None = None,
        seed: int | None = 0,
        epochs: int | None = 1,
        rank: int = 0,
        world: int = 1,
    ) -> None:
        if context_length < (1 if bos is None else 2):
            raise InputError(f"context_length leaves no room for text, found {context_length}.")
        if batch_size < 1 or (epochs is not None and epochs < 1):
            raise InputError(f"batch_size {batch_size} and epochs {epochs} must be at least 1.")
        check_rank(rank, world)
        if not corpus.n_tokens:
            raise InputError(f"{corpus!r} holds no tokens.")
        self.corpus, self.context_length, self.batch_size = corpus, context_length, batch_size
        self.concat, self.bos, self.seed, self.epochs = concat, bos, seed, epochs
        self.rank, self.world = rank, world
        self._numbers = corpus.numbers[corpus.lengths > 0]
        # Packed: each document in the stream is a separator, where there is one, and its tokens.
        lengths = corpus.lengths[corpus.lengths > 0] + (0 if bos is None else 1)
        self._offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
        self._cuts = self._cut_stream() if concat else np.arange(len(lengths) + 1)
        self._order: tuple[int, Ints] | None = None

    @property
    def n_windows(self) -> int:
        """Windows in an epoch."""
        return len(self._cuts) - 1

    @property
    def batches_per_epoch(self) -> int:
        """Of all processes together."""
        return -(-self.n_windows // self.batch_size)

    @property
    def n_batches(self) -> int | None:
        """Batches of this process in all epochs; None: without end."""
        if self.epochs is None:
            return None
        return len(range(self.rank, self.epochs * self.batches_per_epoch, self.world))

    def describe(self) -> dict[str, Any]:
        """What decides which tokens come in which order, as JSON holds it."""
        return {
            "corpus": self.corpus.name,
            "n_documents": len(self.corpus),
            "n_tokens": self.corpus.n_tokens,
            "fingerprint": self.corpus.fingerprint,
            "source_fingerprint": self.corpus.source_fingerprint,
            "context_length": self.context_length,
            "batch_size": self.batch_size,
            "concat": self.concat,
            "bos": self.bos,
            "seed": self.seed,
            "epochs": self.epochs,
            "rank": self.rank,
            "world": self.world,
        }

    def batch(self, number: int) -> TokenBatch:
        """The batch with this number among those of this process, over all epochs."""
        if number < 0 or (self.n_batches is not None and number >= self.n_batches):
            raise InputError(f"there are {self.n_batches} batches; found number {number}.")
        epoch, index = divmod(self.rank + number * self.world, self.batches_per_epoch)
        order = self._order_of(epoch)
        chosen = order[index * self.batch_size : (index + 1) * self.batch_size]
        return _stack([self._window(int(which)) for which in chosen], self._row_length, self.bos)

    def __iter__(self) -> "TokenIterator":
        return TokenIterator(self)

    @property
    def _row_length(self) -> int | None:
        return self.context_length if self.concat else None

    def _order_of(self, epoch: int) -> Ints:
        if self.seed is None:
            return np.arange(self.n_windows)
        if self._order is None or self._order[0] != epoch:
            self._order = epoch, permutation(self.n_windows, self.seed, epoch)
        return self._order[1]

    def _cut_stream(self) -> Ints:
        """Where windows begin in the stream, and its end.

        A window holds one token less where the start token in front is not in the stream already; a
        separator that a window begins with is its start token.
        """
        end = int(self._offsets[-1])
        if self.bos is None:
            return np.append(np.arange(0, end, self.context_length), end)
        cuts, place = [], 0
        while place < end:
            front = _next_front(self._offsets, place, self.context_length - 1)
            cuts.append(np.arange(place, front + 1, self.context_length - 1))
            place = front + self.context_length
        places = np.concatenate(cuts)
        return np.append(places[places < end], end)

    def _window(self, which: int) -> _Window:
        if not self.concat:
            number = int(self._numbers[which])
            room = self.context_length - (self.bos is not None)
            tokens = self.corpus.document(number)[:room]
            return self._with_bos(_Window(tokens, np.full(len(tokens), number)))
        return self._packed(int(self._cuts[which]), int(self._cuts[which + 1]))

    def _packed(self, begin: int, end: int) -> _Window:
        first = int(np.searchsorted(self._offsets, begin, side="right")) - 1
        tokens, document = [], []
        for index in range(first, len(self._numbers)):
            front, back = int(self._offsets[index]), int(self._offsets[index + 1])
            if front >= end:
                break
            number = int(self._numbers[index])
            separated = self.bos is not None
            text_from = front + separated
            if separated and front >= begin:
                tokens.append(np.array([self.bos]))
            source = int(self.corpus.starts[number]) - text_from
            span = slice(max(begin, text_from) + source, max(min(end, back), text_from) + source)
            tokens.append(self.corpus.tokens[span].astype(np.int64))
            document.append(np.full(min(end, back) - max(begin, front), number))
        window = _Window(np.concatenate(tokens), np.concatenate(document))
        begins_document = int(self._offsets[first]) == begin
        return window if begins_document else self._with_bos(window)

    def _with_bos(self, window: _Window) -> _Window:
        if self.bos is None:
            return window
        return _Window(
            np.concatenate([[self.bos], window.tokens]),
            np.concatenate([window.document[:1], window.document]),
        )

    def __repr__(self) -> str:
        return (
            f"TokenWindows({self.corpus!r}, {self.n_windows} windows of {self.context_length}, "
            f"batches of {self.batch_size})"
        )


class TokenIterator(Iterator[TokenBatch]):
    """One pass over a :class:`TokenWindows`, which can be left and taken up again."""

    def __init__(self, windows: TokenWindows) -> None:
        self.windows = windows
        self._next = 0

    def __next__(self) -> TokenBatch:
        if self._next == self.windows.n_batches:
            raise StopIteration
        batch = self.windows.batch(self._next)
        self._next += 1
        return batch

    def state_dict(self) -> dict[str, Any]:
        """Where the pass is, and of what; JSON holds it."""
        return {"next_batch": self._next, "windows": self.windows.describe()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from there; an error where the state is of other windows."""
        check_same_settings(state["windows"], self.windows.describe(), "token windows")
        self._next = int(state["next_batch"])


def check_rank(rank: int, world: int) -> None:
    """An error unless ``rank`` is that of one of ``world`` processes."""
    if not 0 <= rank < world:
        raise InputError(f"rank must be 0 to {world - 1} of {world}, found {rank}.")


def check_same_settings(saved: dict[str, Any], here: dict[str, Any], what: str) -> None:
    """An error that lists what differs: with it, resuming would repeat and miss tokens."""
    differing = [
        f"{key} was {saved.get(key)!r}, is {here.get(key)!r}"
        for key in sorted(saved.keys() | here.keys())
        if saved.get(key) != here.get(key)
    ]
    if differing:
        raise CheckpointError(f"the state is of other {what}: {'; '.join(differing)}.")


def _next_front(offsets: Ints, place: int, step: int) -> int:
    """The first document at ``place``, ``place + step``, …; the end of the stream if there is none.

    That is some ``step`` documents on, as a rule: a look at a few thousand finds it.
    """
    for begin in range(int(np.searchsorted(offsets, place)), len(offsets), 4096):
        some = offsets[begin : begin + 4096]
        hits = np.flatnonzero((some - place) % step == 0)
        if len(hits):
            return int(some[hits[0]])
    return int(offsets[-1])


def _stack(windows: list[_Window], length: int | None, start_token: int | None) -> TokenBatch:
    """Rows padded on the right to ``length``, or to the longest."""
    length = length or max(len(window.tokens) for window in windows)
    shape = len(windows), length
    tokens, document = torch.zeros(shape, dtype=torch.long), torch.full(shape, -1)
    position = torch.full(shape, -1)
    for row, window in enumerate(windows):
        n = len(window.tokens)
        tokens[row, :n] = torch.from_numpy(window.tokens)
        document[row, :n] = torch.from_numpy(window.document)
        position[row, :n] = torch.arange(n)
    pad = position < 0
    bos = None if start_token is None else (tokens == start_token) & ~pad
    return TokenBatch(
        tokens,
        document,
        position,
        pad if pad.any() else None,
        bos if bos is not None and bos.any() else None,
    )
