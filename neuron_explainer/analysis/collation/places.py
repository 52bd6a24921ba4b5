"""Where the tokens of a batch stand in the corpus, and which of them belong to one context.

Shape legend: ``b`` rows and ``s`` positions of a batch, ``t`` tokens looked at, ``c`` contexts.
"""

from dataclasses import dataclass
from hashlib import blake2b

import numpy as np
import numpy.typing as npt

from neuron_explainer.activations.corpus import TokenCorpus
from neuron_explainer.activations.windows import TokenBatch, TokenWindows
from neuron_explainer.analysis.records import Ints
from neuron_explainer.errors import InputError

Mask = npt.NDArray[np.bool_]


@dataclass(frozen=True, eq=False)
class Places:
    """The tokens of a batch that are looked at, in the order of its rows, and its contexts.

    A *cell* is an index in the flattened batch ``[b * s]``.
    """

    cell: Ints
    """``[t]``: where each token stands in the batch."""
    position: Ints
    """``[t]``: its corpus position; -1 for a start token that is not part of the text."""
    context: Ints
    """``[t]``: the number of its context, ascending; -1 where the corpus position is -1."""
    in_examples: Mask
    """``[t]``: whether it may be in an example: its context is part of the text, and no duplicate."""
    index: Ints
    """``[b * s]``: the index of the token in a cell among those looked at; -1 if it is not."""
    first_cell: Ints
    """``[c]``: where each context begins."""
    start: Ints
    """``[c]``: the corpus position of its first token."""
    length: Ints
    """``[c]``: its number of tokens."""
    duplicate: Mask
    """``[c]``: whether an earlier context of the corpus has the same tokens."""
    document: Ints
    """``[t]``: number of each token's document, for messages."""
    window_position: Ints
    """``[t]``: position of each token in its window, for messages."""
    shape: tuple[int, int]
    """``b`` and ``s``."""

    @classmethod
    def of(cls, batch: TokenBatch, duplicates: Ints, keep_bos: bool) -> "Places":
        """The places of a batch.

        Args:
            batch: cut from a corpus.
            duplicates: the starts of contexts that are duplicates, in ascending order.
            keep_bos: whether start tokens and separators are looked at.
        """
        if batch.corpus_position is None:
            raise InputError("collating needs batches of TokenWindows, which say where tokens are.")
        shape = batch.tokens.shape
        position = batch.corpus_position.cpu().numpy().ravel()
        document = batch.document.cpu().numpy().ravel()
        looked_at = np.ones(len(position), bool)
        if batch.pad is not None:
            looked_at &= ~batch.pad.cpu().numpy().ravel()
        if batch.bos is not None and not keep_bos:
            looked_at &= ~batch.bos.cpu().numpy().ravel()
        row = np.repeat(np.arange(shape[0]), shape[1])
        in_text = position >= 0
        same = (np.diff(row) == 0) & (np.diff(document) == 0) & (np.diff(position) == 1)
        begins = in_text & np.append(True, ~(same & in_text[:-1]))
        context = np.where(in_text, np.cumsum(begins) - 1, -1)
        first_cell = np.flatnonzero(begins)
        start = position[first_cell]
        at = np.minimum(np.searchsorted(duplicates, start), max(len(duplicates) - 1, 0))
        duplicate = duplicates[at] == start if len(duplicates) else np.zeros(len(start), bool)
        cell = np.flatnonzero(looked_at)
        index = np.full(len(position), -1)
        index[cell] = np.arange(len(cell))
        own = context[cell]
        return cls(
            cell=cell,
            position=position[cell],
            context=own,
            in_examples=(own >= 0) & ~np.append(duplicate, True)[own],
            index=index,
            first_cell=first_cell,
            start=start,
            length=np.bincount(context[in_text], minlength=len(start)),
            duplicate=duplicate,
            document=document[cell],
            window_position=batch.position.cpu().numpy().ravel()[cell],
            shape=(shape[0], shape[1]),
        )

    def __len__(self) -> int:
        return len(self.cell)

    def name(self, token: int) -> str:
        """Which token this is, for an error."""
        return f"document {self.document[token]}, position {self.window_position[token]}"


def window_of(
    peak: Ints, length: Ints, size: int, earliest: Ints | None = None
) -> tuple[Ints, Ints]:
    """The tokens of a context that are shown around a peak: three quarters of them before it.

    Args:
        peak: ``[m]``: where in the context the peak is.
        length: ``[m]``: number of tokens of the context.
        size: the most tokens shown.
        earliest: ``[m]``: a place in the context that must be shown too, less than ``size`` before
            the peak.

    Returns:
        where in the context the window begins, and its number of tokens.
    """
    begin = np.minimum(peak - size * 3 // 4, length - size)
    if earliest is not None:
        begin = np.minimum(begin, earliest)
    begin = np.maximum(begin, 0)
    return begin, np.minimum(length - begin, size)


def duplicates_of(windows: TokenWindows) -> Ints:
    """The starts of the contexts that have the same tokens as an earlier context of the corpus.

    Besides the corpus this takes 24 bytes a context while it runs.
    """
    starts, lengths = windows.contexts()
    order = np.argsort(starts, kind="stable")
    starts, lengths = starts[order], lengths[order]
    tokens = windows.corpus.tokens
    digests = np.empty(len(starts), np.uint64)
    for index, (start, length) in enumerate(zip(starts.tolist(), lengths.tolist(), strict=True)):
        content = np.ascontiguousarray(tokens[start : start + length]).view(np.uint8)
        digests[index] = int.from_bytes(blake2b(content.data, digest_size=8).digest(), "little")
    by_digest = np.argsort(digests, kind="stable")
    sorted_digests = digests[by_digest]
    begins = np.append(True, sorted_digests[1:] != sorted_digests[:-1])
    firsts = by_digest[begins][np.cumsum(begins) - 1]
    found = [
        starts[index]
        for index, first in zip(by_digest[~begins], firsts[~begins], strict=True)
        if _same_tokens(windows.corpus, starts, lengths, int(index), int(first))
    ]
    return np.sort(np.array(found, np.int64))


def _same_tokens(corpus: TokenCorpus, starts: Ints, lengths: Ints, one: int, other: int) -> bool:
    a, b = (corpus.tokens[starts[i] : starts[i] + lengths[i]] for i in (one, other))
    return bool(np.array_equal(a, b))
