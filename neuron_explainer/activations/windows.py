"""Batches of token windows that say for each token its document, its position, and whether it is a pad
or a start token.

Windows are addressed by number, and their order depends on the seed and the epoch alone. So any number of
workers or processes sees the same order, and one counter is enough to resume.

In packed windows a token attends to the documents before it, as is usual where models are trained on
packed text (GPT-2 was). With one document a row it does not.

Shape legend: ``b`` windows in a batch, ``s`` positions of a window.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from neuron_explainer.activations.corpus import Ints, TokenCorpus, permutation
from neuron_explainer.errors import CheckpointError, InputError, NeuronExplainerError
from neuron_explainer.tables import by_shape


class _EndlessError(NeuronExplainerError, TypeError):
    """Windows that never end were asked for their length; ``list`` expects a TypeError then."""


@dataclass(frozen=True)
class TokenBatch:
    """Windows of tokens, as a model reads them."""

    tokens: Tensor
    """Ids ``[b, s]`` int64."""
    document: Tensor
    """Running number of the document that each token belongs to, ``[b, s]`` int64; -1 at pads."""
    position: Tensor
    """Position in the window as the model sees it, ``[b, s]`` int64, from 0; -1 at pads."""
    pad: Tensor | None = None
    """Pad mask ``[b, s]`` bool, True at padding; None if the batch has no padding."""
    bos: Tensor | None = None
    """``[b, s]`` bool, True at start tokens and document separators, added here or read from the text
    (they share one id, and their activations differ in kind from others); None if there are none."""
    corpus_position: Tensor | None = None
    """Index of each token in the flat token array of its corpus, ``[b, s]`` int64; -1 at pads and at start
    tokens added here. None if the batch was not cut from a corpus."""

    def __repr__(self) -> str:
        return by_shape(self)


@dataclass(frozen=True)
class _Window:
    tokens: Ints
    document: Ints
    corpus_position: Ints


class _Stream:
    """The documents of a corpus one after the other, each behind a separator if ``bos`` is given."""

    def __init__(self, corpus: TokenCorpus, bos: int | None) -> None:
        self.corpus, self.bos = corpus, bos
        self.n_separators = 0 if bos is None else 1  # in front of each document
        self.numbers = corpus.numbers[corpus.lengths > 0]
        lengths = corpus.lengths[corpus.lengths > 0] + self.n_separators
        self.fronts = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
        """``[m + 1]``: where each document begins in the stream, and where the stream ends."""

    def cuts(self, length: int) -> Ints:
        """``[n_windows + 1]``: where windows of ``length`` begin in the stream, and where it ends.

        A window holds one token less if a start token has to be added in front of it. A window that
        begins with a separator has its start token already.
        """
        end = int(self.fronts[-1])
        if self.bos is None:
            return np.append(np.arange(0, end, length), end)
        cuts, place = [], 0
        while place < end:
            front = _next_front(self.fronts, place, length - 1)
            cuts.append(np.arange(place, front + 1, length - 1))
            place = front + length
        places = np.concatenate(cuts)
        return np.append(places[places < end], end)

    def slice(self, begin: int, end: int) -> _Window:
        """The part from ``begin`` to ``end``, with a start token in front."""
        first = int(np.searchsorted(self.fronts, begin, side="right")) - 1
        tokens, document, places = [], [], []
        for index in range(first, len(self.numbers)):
            front, back = int(self.fronts[index]), int(self.fronts[index + 1])
            if front >= end:
                break
            # What of this document is wanted; 0 is its separator, if it has one.
            low, high = max(begin, front) - front, min(end, back) - front
            if low < self.n_separators:
                tokens.append(np.array([self.bos]))
                places.append(np.array([-1]))
            number = int(self.numbers[index])
            text = int(self.corpus.starts[number]) - self.n_separators
            span = slice(text + max(low, self.n_separators), text + high)
            tokens.append(self.corpus.tokens[span].astype(np.int64))
            places.append(np.arange(span.start, span.stop))
            document.append(np.full(high - low, number))
        window = _Window(np.concatenate(tokens), np.concatenate(document), np.concatenate(places))
        begins_document = int(self.fronts[first]) == begin
        return window if begins_document else _with_bos(window, self.bos)


def _with_bos(window: _Window, bos: int | None) -> _Window:
    if bos is None:
        return window
    return _Window(
        np.concatenate([[bos], window.tokens]),
        np.concatenate([window.document[:1], window.document]),
        np.concatenate([[-1], window.corpus_position]),
    )


class TokenWindows:
    """Batches of windows cut from a corpus, by number or one after the other.

    Each token of the corpus is in exactly one window of an epoch (``concat=False``: each token within the
    context length). The last window of packed text is padded. Iterating starts again from the beginning
    each time.

    Args:
        corpus: the documents.
        context_length: positions of a window, start token included.
        batch_size: windows in a batch; the last batch of an epoch has what is left.
        concat: pack documents one after the other; False: one document a row, cut to the context length
            and padded on the right to the longest of its batch.
        bos: id of a start token to put at the front of each window, and of each document in it;
            None: nothing is added. See :func:`~neuron_explainer.activations.corpus.start_token`.
        seed: decides the order of the windows; None: the order of the corpus, in each epoch.
        epochs: how often the corpus is gone through; None: without end.
        rank: take batches ``rank``, ``rank + world``, … only, for process ``rank`` of ``world``.
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
        self._stream = _Stream(corpus, bos)
        n_documents = len(self._stream.numbers)
        self._cuts = self._stream.cuts(context_length) if concat else np.arange(n_documents + 1)
        self._order: tuple[int, Ints] | None = None

    @property
    def n_windows(self) -> int:
        """Number of windows in an epoch."""
        return len(self._cuts) - 1

    @property
    def batches_per_epoch(self) -> int:
        """Number of batches in an epoch, of all processes together."""
        return -(-self.n_windows // self.batch_size)

    @property
    def n_batches(self) -> int | None:
        """Number of batches of this process in all epochs; None: without end."""
        if self.epochs is None:
            return None
        return len(range(self.rank, self.epochs * self.batches_per_epoch, self.world))

    def __len__(self) -> int:
        """Number of batches that iterating gives; a TypeError if it never ends."""
        if self.n_batches is None:
            raise _EndlessError(
                "these windows never end (epochs=None), so they have no length; batches_per_epoch is "
                "the number of batches in an epoch."
            )
        return self.n_batches

    def describe(self) -> dict[str, Any]:
        """Everything that decides which tokens come in which order, as JSON values."""
        return {
            "corpus": Path(self.corpus.name).name,  # without the folders of a user
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
        """Batch ``number`` of this process, counted over all epochs."""
        if number < 0 or (self.n_batches is not None and number >= self.n_batches):
            raise InputError(
                f"there are {self.n_batches} batches, numbered from 0; found number {number}."
            )
        epoch, index = divmod(self.rank + number * self.world, self.batches_per_epoch)
        order = self._order_of(epoch)
        chosen = order[index * self.batch_size : (index + 1) * self.batch_size]
        return _stack([self._window(int(which)) for which in chosen], self._row_length, self.bos)

    def contexts(self) -> tuple[Ints, Ints]:
        """The pieces of documents that stand in one row each, in the order of the corpus.

        Returns:
            the corpus position of the first token of each, and its number of tokens.
        """
        stream = self._stream
        starts = stream.corpus.starts[stream.numbers]
        if not self.concat:
            room = self.context_length - (self.bos is not None)
            lengths = stream.corpus.starts[stream.numbers + 1] - starts
            return starts.astype(np.int64), np.minimum(lengths, room).astype(np.int64)
        borders = np.union1d(self._cuts, stream.fronts)
        document = np.searchsorted(stream.fronts, borders[:-1], side="right") - 1
        # Where each border lies in the text of its document; a separator belongs to no text.
        begin = borders[:-1] - stream.fronts[document] - stream.n_separators
        end = borders[1:] - stream.fronts[document] - stream.n_separators
        begin = np.maximum(begin, 0)
        some = end > begin
        return (starts[document] + begin)[some], (end - begin)[some]

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

    def _window(self, which: int) -> _Window:
        if self.concat:
            return self._stream.slice(int(self._cuts[which]), int(self._cuts[which + 1]))
        number = int(self._stream.numbers[which])
        room = self.context_length - (self.bos is not None)
        tokens = self.corpus.document(number)[:room]
        start = int(self.corpus.starts[number])
        places = np.arange(start, start + len(tokens))
        return _with_bos(_Window(tokens, np.full(len(tokens), number), places), self.bos)

    def __repr__(self) -> str:
        return (
            f"TokenWindows({self.corpus!r}, {self.n_windows} windows of {self.context_length}, "
            f"batches of {self.batch_size})"
        )


class TokenIterator(Iterator[TokenBatch]):
    """One pass over a :class:`TokenWindows`, which can be saved and resumed."""

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
        """The position of the pass and the settings of its windows, as JSON values."""
        return {"next_batch": self._next, "windows": self.windows.describe()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from a saved position; an error if it was saved with other windows."""
        check_same_settings(state["windows"], self.windows.describe(), "token windows")
        self._next = int(state["next_batch"])


def check_rank(rank: int, world: int) -> None:
    """An error unless ``rank`` is one of 0 to ``world`` - 1."""
    if not 0 <= rank < world:
        raise InputError(f"rank must be 0 to {world - 1} of {world}, found {rank}.")


def check_same_settings(saved: dict[str, Any], here: dict[str, Any], what: str) -> None:
    """An error that lists what differs: resuming would repeat and miss tokens."""
    differing = [
        f"{key} was {saved.get(key)!r}, is {here.get(key)!r}"
        for key in sorted(saved.keys() | here.keys())
        if saved.get(key) != here.get(key)
    ]
    if differing:
        raise CheckpointError(f"the state was saved with other {what}: {'; '.join(differing)}.")


def _next_front(fronts: Ints, place: int, step: int) -> int:
    """The first document that begins at ``place``, ``place + step``, …; the end if none does.

    It is about ``step`` documents away as a rule, so a look at a few thousand finds it.
    """
    for begin in range(int(np.searchsorted(fronts, place)), len(fronts), 4096):
        some = fronts[begin : begin + 4096]
        hits = np.flatnonzero((some - place) % step == 0)
        if len(hits):
            return int(some[hits[0]])
    return int(fronts[-1])


def _stack(windows: list[_Window], length: int | None, start_token: int | None) -> TokenBatch:
    """A batch of windows, padded on the right to ``length``, or to the longest."""
    length = length or max(len(window.tokens) for window in windows)
    shape = len(windows), length
    tokens, document = torch.zeros(shape, dtype=torch.long), torch.full(shape, -1)
    position, places = torch.full(shape, -1), torch.full(shape, -1)
    for row, window in enumerate(windows):
        n = len(window.tokens)
        places[row, :n] = torch.from_numpy(window.corpus_position)
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
        places,
    )
