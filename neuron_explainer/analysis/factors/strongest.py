"""The N strongest tokens of every factor, from a stream of codes.

The order of the tokens of a factor is total: the higher score first, and of equal scores the one that
stands earlier in the corpus. So the result is that of one pass over everything at once, whatever the order
and the size of the batches.

Shape legend: ``t`` tokens, ``k`` active factors of a token, ``e`` entries.
"""

from typing import NamedTuple

import numpy as np
import numpy.typing as npt
from torch import Tensor

from neuron_explainer.activations.corpus import Ints
from neuron_explainer.errors import InputError
from neuron_explainer.models.autoencoders.latents import Latents

Factors = npt.NDArray[np.int32]
Scores = npt.NDArray[np.float32]


class Entries(NamedTuple):
    """Tokens with their scores, ``[e]`` each, sorted by factor, then strongest first."""

    factor: Factors
    score: Scores
    position: Ints
    """The token's place in the corpus."""

    @classmethod
    def empty(cls) -> "Entries":
        """No entries."""
        return cls(np.empty(0, np.int32), np.empty(0, np.float32), np.empty(0, np.int64))

    def of(self, factor: int) -> "Entries":
        """The entries of one factor."""
        first, last = np.searchsorted(self.factor, [factor, factor + 1]).tolist()
        return self.rows(slice(first, last))

    def rows(self, which: slice | Ints) -> "Entries":
        """Some of the entries."""
        return Entries(self.factor[which], self.score[which], self.position[which])


class Strongest:
    """Takes codes in any order and keeps the ``n`` strongest tokens of each factor.

    Args:
        n_factors: number of factors.
        n: how many tokens to keep of each.
    """

    def __init__(self, n_factors: int, n: int) -> None:
        if n < 1:
            raise InputError(f"the number of examples of a factor must be at least 1, found {n}.")
        self.n_factors, self.n = n_factors, n
        self._kept = Entries.empty()
        self._new: list[Entries] = []
        self._limit = np.zeros(n_factors, np.float32)  # the n-th score; 0 where there are fewer

    def add(self, latents: Latents, positions: Tensor) -> None:
        """Add the codes of tokens ``[t, k]``, which stand at ``positions`` ``[t]`` in the corpus.

        Scores of 0 and below are no examples. Call :meth:`merge` from time to time: until then, every
        entry that may be one of the strongest is kept.
        """
        values = latents.values.detach().float().cpu().numpy()
        if not np.isfinite(values).all():
            row = int((~np.isfinite(values)).any(axis=1).argmax())
            raise InputError(
                f"the code of the token at corpus position {int(positions[row])} holds NaN or infinity."
            )
        active = values > 0
        rows = active.nonzero()[0]
        factor = latents.indices.cpu().numpy()[active].astype(np.int32)
        found = Entries(factor, values[active], positions.cpu().numpy().astype(np.int64)[rows])
        # An equal score may stand earlier in the corpus.
        self._new.append(found.rows(np.flatnonzero(found.score >= self._limit[factor])))

    def merge(self) -> Entries:
        """The strongest of everything added so far."""
        factors, scores, positions = zip(self._kept, *self._new, strict=True)
        found = Entries(*map(np.concatenate, (factors, scores, positions)))
        self.restore(_cut(found, self.n))
        return self._kept

    def restore(self, entries: Entries) -> None:
        """Continue from what :meth:`merge` returned; what was added since then is forgotten."""
        self._kept, self._new = entries, []
        counts = np.bincount(entries.factor, minlength=self.n_factors)
        last = entries.score[np.maximum(np.cumsum(counts) - 1, 0)] if len(entries.score) else 0.0
        self._limit = np.where(counts < self.n, np.float32(0), last).astype(np.float32)


def _cut(entries: Entries, n: int) -> Entries:
    """The first ``n`` of each factor in the total order."""
    order = np.lexsort((entries.position, -entries.score, entries.factor))
    factor = entries.factor[order]
    rank = np.arange(len(factor)) - np.searchsorted(factor, factor)
    return entries.rows(order[rank < n])
