"""Which units are active together, counted exactly on a bounded sample of tokens.

The sample holds the tokens whose hash is smallest, so it depends on the seed and the corpus alone. What
is kept of it are the active units of each of its tokens.

Shape legend: ``a`` active entries of the sample, ``u`` units, ``p`` partners.
"""

from itertools import pairwise

import numpy as np
import numpy.typing as npt

from neuron_explainer.activations.windows import TokenWindows
from neuron_explainer.analysis.collation.reservoirs import uniform, unit_hashes
from neuron_explainer.analysis.collation.seen import DenseSeen, Seen, SparseSeen
from neuron_explainer.analysis.records import CoActivation, Ints

_TOKENS_AT_ONCE = 1 << 20
_PAIRS_AT_ONCE = 1 << 23
_COUNTS_AT_ONCE = 1 << 22


def sample_limit(windows: TokenWindows, n_tokens: int, seed: int) -> float:
    """The hash up to which tokens are in a sample of ``n_tokens`` of the tokens of all contexts.

    The hash is that of unit 0 (:func:`~neuron_explainer.analysis.collation.reservoirs.uniform`) with
    the seed plus 1, so that it has nothing to do with the examples of a unit.
    """
    starts, lengths = windows.contexts()
    smallest = np.empty(0)
    ends = np.cumsum(lengths)
    begin = 0
    while begin < len(starts):
        done = int(ends[begin - 1]) if begin else 0
        end = max(begin + 1, int(np.searchsorted(ends, done + _TOKENS_AT_ONCE)))
        n = lengths[begin:end]
        steps = np.arange(n.sum()) - np.repeat(np.cumsum(n) - n, n)
        found = np.append(smallest, _hash(np.repeat(starts[begin:end], n) + steps, seed))
        smallest = np.partition(found, n_tokens)[:n_tokens] if len(found) > n_tokens else found
        begin = end
    return float(smallest.max())


def _hash(position: Ints, seed: int) -> npt.NDArray[np.float64]:
    return uniform(unit_hashes(seed + 1, 1), position)


class TogetherActive:
    """The active units of the sampled tokens.

    Args:
        n_units: number of units.
        limit: see :func:`sample_limit`.
        seed: the seed that it was made with.
    """

    def __init__(self, n_units: int, limit: float, seed: int) -> None:
        self.n_units, self.limit, self.seed = n_units, limit, seed
        self.n_tokens = 0
        self.units: list[npt.NDArray[np.int32]] = []
        self.counts: list[npt.NDArray[np.int32]] = []

    def add(self, seen: Seen) -> None:
        """Add the tokens of a batch that are in the sample."""
        position = seen.places.position
        chosen = np.flatnonzero(
            (position >= 0) & (_hash(np.maximum(position, 0), self.seed) <= self.limit)
        )
        if isinstance(seen, SparseSeen):
            number = np.full(len(position), -1)
            number[chosen] = np.arange(len(chosen))
            at = number[seen.token]
            some = np.flatnonzero(at >= 0)
            some = some[np.argsort(at[some], kind="stable")]
            unit, token = seen.unit[some], at[some]
        else:
            assert isinstance(seen, DenseSeen)
            x = seen.x[chosen]
            token, unit = np.nonzero(x != 0 if seen.signed else x > 0)
        self.n_tokens += len(chosen)
        self.units.append(unit.astype(np.int32))
        self.counts.append(np.bincount(token, minlength=len(chosen)).astype(np.int32))

    def arrays(self) -> dict[str, npt.NDArray[np.int32]]:
        """The active units of all sampled tokens, and their number for each token."""
        none = np.empty(0, np.int32)
        return {
            "units": np.concatenate([none, *self.units]),
            "counts": np.concatenate([none, *self.counts]),
        }

    def absorb(self, units: npt.NDArray[np.int32], counts: npt.NDArray[np.int32]) -> None:
        """Add other tokens of the same sample."""
        self.n_tokens += len(counts)
        self.units.append(units)
        self.counts.append(counts)

    def result(self, partners: int) -> CoActivation:
        """Count pairs, and list the partners of each unit: some units at a time against all."""
        arrays = self.arrays()
        unit, counts = arrays["units"].astype(np.int64), arrays["counts"].astype(np.int64)
        token = np.repeat(np.arange(len(counts)), counts)
        first = np.cumsum(counts) - counts
        n_partners = min(partners, max(self.n_units - 1, 0))
        partner = np.full((self.n_units, n_partners), -1, np.int32)
        both = np.zeros((self.n_units, n_partners), np.int64)
        order = np.argsort(unit, kind="stable")
        borders = np.searchsorted(unit[order], np.arange(self.n_units + 1))
        step = max(1, _COUNTS_AT_ONCE // self.n_units)
        for begin in range(0, self.n_units, step):
            end = min(begin + step, self.n_units)
            table = np.zeros((end - begin) * self.n_units, np.int64)
            entries = order[borders[begin] : borders[end]]
            each = counts[token[entries]]
            for some in _pieces(each):
                n, entry = each[some], entries[some]
                steps = np.arange(n.sum()) - np.repeat(np.cumsum(n) - n, n)
                other = unit[np.repeat(first[token[entry]], n) + steps]
                cells = np.repeat(unit[entry] - begin, n) * self.n_units + other
                table += np.bincount(cells, minlength=len(table))
            square = table.reshape(end - begin, self.n_units)
            square[np.arange(end - begin), np.arange(begin, end)] = 0
            rows = slice(begin, end)
            partner[rows], both[rows] = _largest(square, n_partners)
        total = np.bincount(unit, minlength=self.n_units).astype(np.int64)
        return CoActivation(self.n_tokens, total, partner, both)


def _pieces(n_pairs: Ints) -> list[slice]:
    """Slices of entries that have about ``_PAIRS_AT_ONCE`` pairs each."""
    ends = np.cumsum(n_pairs)
    borders = [0]
    while borders[-1] < len(n_pairs):
        done = int(ends[borders[-1] - 1]) if borders[-1] else 0
        following = int(np.searchsorted(ends, done + _PAIRS_AT_ONCE))
        borders.append(min(max(following, borders[-1] + 1), len(n_pairs)))
    return [slice(a, b) for a, b in pairwise(borders)]


def _largest(counts: Ints, n: int) -> tuple[npt.NDArray[np.int32], Ints]:
    """The columns of the ``n`` largest counts of each row, the first of equals, and these counts."""
    # One number that orders by count and then by column: no two are equal.
    keys = counts * counts.shape[1] + np.arange(counts.shape[1] - 1, -1, -1)
    column = np.argpartition(-keys, n, axis=1)[:, :n] if n < counts.shape[1] else np.argsort(-keys)
    order = np.take_along_axis(-keys, column, 1).argsort(axis=1)
    column = np.take_along_axis(column, order, 1)
    found = np.take_along_axis(counts, column, 1)
    return np.where(found > 0, column, -1).astype(np.int32), found
