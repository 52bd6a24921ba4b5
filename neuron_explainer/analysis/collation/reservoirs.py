"""Samples that do not depend on the order in which things are seen: the k entries with the largest keys.

A *reservoir* keeps, in each of its rows, the k entries that come first in the total order (key descending,
corpus position ascending). So the reservoir of a union is the reservoir of the union of two reservoirs, and
batches, processes and resumed runs can be merged in any order. What the key is decides what is kept: the
value for the largest values; a hash for a uniform sample; ``log(u) / w`` for a sample with weights ``w``
(Efraimidis and Spirakis 2006).

The hash ``u`` of a unit's example depends on the seed, the unit and the corpus position of the peak. In
Python::

    def mix(z):  # splitmix64 of Steele, Lea and Flood (2014)
        z = (z + 0x9E3779B97F4A7C15) % 2**64
        z = (z ^ z >> 30) * 0xBF58476D1CE4E5B9 % 2**64
        z = (z ^ z >> 27) * 0x94D049BB133111EB % 2**64
        return z ^ z >> 31

    def u(seed, unit, position):  # in (0, 1)
        return ((mix(mix(mix(seed) ^ unit) ^ position) >> 11) + 0.5) / 2**53

Keys are kept as float32. Among equal keys the corpus position decides.

Shape legend: ``u`` units, ``r`` rows, ``k`` entries kept of a row, ``m`` candidates, ``w`` activations shown.
"""

from collections.abc import Iterator
from dataclasses import dataclass, fields
from typing import Any

import numpy as np
import numpy.typing as npt

from neuron_explainer.analysis.records import N_BINS, Doubles, Floats, Ints

Words = npt.NDArray[np.uint64]
_NO_POSITION = np.iinfo(np.int64).max
_MANTISSA = 23  # bits of a float32 below its exponent
# The first float32 of the second, third and fourth bin of the octave from 1 to 2, as bits of the mantissa.
_QUARTERS = [
    int(np.ceil((2.0 ** (quarter / 4) - 1) * 2**_MANTISSA)) for quarter in (1, 2, 3)
]  # exact: none of the three is a float32


def mix(z: Words) -> Words:
    """splitmix64, as in the module's docstring."""
    with np.errstate(over="ignore"):
        z = z + np.uint64(0x9E3779B97F4A7C15)
        z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        return z ^ (z >> np.uint64(31))


def unit_hashes(seed: int, n_units: int) -> Words:
    """``[u]``: ``mix(mix(seed) ^ unit)`` of each unit, the part of the hash that positions share."""
    first = mix(np.array([seed % 2**64], dtype=np.uint64))
    return mix(first ^ np.arange(n_units, dtype=np.uint64))


def uniform(hashes: Words, position: Ints) -> Doubles:
    """``[m]``: ``u`` in (0, 1) for entries of :func:`unit_hashes` and corpus positions."""
    words = mix(hashes ^ position.astype(np.uint64))
    return ((words >> np.uint64(11)).astype(np.float64) + 0.5) * 2.0**-53


def histogram_bin(value: Floats) -> npt.NDArray[np.int32]:
    """``[m]``: the bin of each positive value in a histogram with :data:`records.HISTOGRAM_EDGES`.

    It reads exponent and mantissa from the bits of the float32, which is exact and faster than a search.
    """
    bits = np.ascontiguousarray(value, dtype=np.float32).view(np.int32)
    mantissa = bits & ((1 << _MANTISSA) - 1)
    found = ((bits >> _MANTISSA) - 127 + 20) * 4 + 1
    for first in _QUARTERS:
        found += mantissa >= first
    bins: npt.NDArray[np.int32] = np.clip(found, 0, N_BINS - 1).astype(np.int32)
    return bins


@dataclass(eq=False)
class Entries:
    """Examples as reservoirs keep them."""

    key: Floats
    """``[m]``: larger is kept; the negative of ``u`` where the smallest ``u`` are wanted."""
    position: Ints
    """``[m]``: corpus position of the peak's token (of a pair: of its query)."""
    value: Floats
    """``[m]``: at the peak."""
    offset: npt.NDArray[np.uint16]
    """``[m]``: how many tokens are shown before that token."""
    length: npt.NDArray[np.uint16]
    """``[m]``: how many tokens are shown."""
    peak: npt.NDArray[np.uint16]
    """``[m]``: index of the peak in the activations."""
    activations: npt.NDArray[np.float16]
    """``[m, w]``"""

    def rows(self, which: Any) -> "Entries":
        """Some of the entries."""
        return Entries(*(getattr(self, field.name)[which] for field in fields(self)))

    @classmethod
    def none(cls, width: int) -> "Entries":
        """No entries, with ``width`` activations each."""
        return Reservoir(1, 1, width).take(np.array([0]))[1]

    @classmethod
    def concatenate(cls, parts: "list[Entries]") -> "Entries":
        """The entries of all parts, one part after the other."""
        return cls(*(np.concatenate([getattr(e, f.name) for e in parts]) for f in fields(cls)))


class Reservoir:
    """The ``k`` first entries of each row.

    Args:
        n_rows: number of rows, ``r``.
        k: entries kept of a row.
        width: number of activations shown of an entry, ``w``.
    """

    def __init__(self, n_rows: int, k: int, width: int) -> None:
        self.n_rows, self.k, self.width = n_rows, k, width
        shape = (n_rows, k)
        self.entries = Entries(
            key=np.full(shape, -np.inf, np.float32),
            position=np.full(shape, _NO_POSITION, np.int64),
            value=np.zeros(shape, np.float32),
            offset=np.zeros(shape, np.uint16),
            length=np.zeros(shape, np.uint16),
            peak=np.zeros(shape, np.uint16),
            activations=np.zeros((*shape, width), np.float16),
        )
        self.smallest = np.full(n_rows, -np.inf, np.float32)
        """``[r]``: the smallest key of a full row, -inf otherwise: what any candidate must reach."""

    @property
    def nbytes(self) -> int:
        """Bytes of memory."""
        arrays = [getattr(self.entries, field.name) for field in fields(self.entries)]
        return int(self.smallest.nbytes + sum(array.nbytes for array in arrays))

    def offer(self, row: Ints, key: Floats, position: Ints) -> tuple[Ints, Ints, Ints]:
        """Find places for candidates ``[m]``, and store their keys and positions there.

        Returns:
            rows, slots, and the numbers of the candidates that are kept: what else is to be stored of
            them goes there with :meth:`fill`.
        """
        some = np.flatnonzero(key >= self.smallest[row]) if self.k else np.empty(0, np.int64)
        some = some[np.lexsort((position[some], -key[some], row[some]))]
        rows = row[some]
        starts = np.flatnonzero(np.diff(rows, prepend=-1))
        rank = np.arange(len(rows)) - np.repeat(starts, np.diff(starts, append=len(rows)))
        kept: list[tuple[Ints, Ints, Ints]] = []
        for number in range(self.k):
            # The best candidate of each row first: it takes the place of the last entry of its row. If
            # it is not good enough, no later one of the row is.
            these = some[rank == number]
            if not len(these):
                break
            kept.append(self._replace_last(row[these], key[these], position[these], these))
        if not kept:
            none = np.empty(0, np.int64)
            return none, none, none
        rows, slots, numbers = (np.concatenate(column) for column in zip(*kept, strict=True))
        touched = kept[0][0]  # each row once: what is not good enough first is not so later
        self.smallest[touched] = self.entries.key[touched].min(axis=1)
        return rows, slots, numbers

    def _replace_last(
        self, row: Ints, key: Floats, position: Ints, candidate: Ints
    ) -> tuple[Ints, Ints, Ints]:
        """One candidate for each of several rows."""
        keys, positions = self.entries.key[row], self.entries.position[row]
        smallest = keys.min(axis=1)
        slot = np.where(keys == smallest[:, None], positions, -1).argmax(axis=1)
        last = positions[np.arange(len(row)), slot]
        better = (key > smallest) | ((key == smallest) & (position < last))
        row, slot = row[better], slot[better]
        self.entries.key[row, slot] = key[better]
        self.entries.position[row, slot] = position[better]
        return row, slot, candidate[better]

    def fill(self, row: Ints, slot: Ints, entries: Entries) -> None:
        """Store all but keys and positions, which :meth:`offer` has stored."""
        for name in ("value", "offset", "length", "peak", "activations"):
            getattr(self.entries, name)[row, slot] = getattr(entries, name)

    def add(self, row: Ints, entries: Entries) -> None:
        """Add entries of another reservoir to rows of this one."""
        rows, slots, which = self.offer(row, entries.key, entries.position)
        self.fill(rows, slots, entries.rows(which))

    def take(self, row: Ints) -> tuple[Ints, Entries]:
        """The entries of some rows: the index in ``row`` of each, and the entries."""
        index, slot = np.nonzero(self.entries.key[row] > -np.inf)
        return index, self.entries.rows((row[index], slot))

    def clear(self, row: Ints) -> None:
        """Empty some rows."""
        self.entries.key[row] = -np.inf
        self.entries.position[row] = _NO_POSITION
        self.smallest[row] = -np.inf

    def blocks(self, rows_at_once: int) -> Iterator[tuple[Ints, Entries]]:
        """All entries, some rows at a time: the row of each entry, and the entries."""
        for begin in range(0, self.n_rows, rows_at_once):
            rows = np.arange(begin, min(begin + rows_at_once, self.n_rows))
            index, entries = self.take(rows)
            if len(index):
                yield rows[index], entries

    def full(self, row: Ints) -> npt.NDArray[np.bool_]:
        """Which of these rows hold as many entries as they can: more may have been offered."""
        found: npt.NDArray[np.bool_] = self.smallest[row] > -np.inf
        return found


class Strata:
    """Entries of each unit, apart by value: bins of a histogram, four an octave, with a reservoir each.

    Only the ``n_apart`` bins from the one of the unit's largest value downwards are kept apart; all lower
    ones share a reservoir. When a larger value comes, bins that fall out of these are added to the
    shared reservoir: it holds the first k of all that was ever below, as if it had been so from the
    beginning, and so the order of things does not matter here either.

    Args:
        n_units: number of units, ``u``.
        k: entries kept of a bin.
        width: number of activations shown of an entry.
        n_apart: number of bins that are kept apart.
    """

    def __init__(self, n_units: int, k: int, width: int, n_apart: int) -> None:
        self.n_units, self.n_apart = n_units, n_apart
        self.largest = np.zeros(n_units, np.float32)
        """``[u]``: the largest value that has been offered."""
        self.reservoir = Reservoir(n_units * (n_apart + 1), k, width)
        # Row i of a unit's n_apart + 1 rows holds the bin whose number is i modulo n_apart; the last row
        # holds all lower bins.

    @property
    def nbytes(self) -> int:
        """Bytes of memory."""
        return int(self.largest.nbytes + self.reservoir.nbytes)

    def offer(
        self, unit: Ints, value: Floats, key: Floats, position: Ints
    ) -> tuple[Ints, Ints, Ints]:
        """As :meth:`Reservoir.offer`, for candidates whose values are above 0."""
        largest = self.largest.copy()
        np.maximum.at(largest, unit, value)
        self.raise_to(largest)
        top = histogram_bin(self.largest[unit])
        return self.reservoir.offer(self.row(unit, histogram_bin(value), top), key, position)

    def raise_to(self, largest: Floats) -> None:
        """Take note of the largest values ``[u]`` elsewhere: those of all entries may not be kept."""
        before, self.largest = self.largest, np.maximum(self.largest, largest)
        self._lower(np.flatnonzero((self.largest > before) & (before > 0)), before)

    def add(self, unit: Ints, entries: Entries) -> None:
        """Add entries of other strata; see also :meth:`raise_to`."""
        rows, slots, which = self.offer(unit, entries.value, entries.key, entries.position)
        self.reservoir.fill(rows, slots, entries.rows(which))

    def row(self, unit: Ints, bin_: npt.NDArray[np.int32], top: npt.NDArray[np.int32]) -> Ints:
        """``[m]``: the row of a unit's bin; ``top`` is the bin of the unit's largest value."""
        inner = np.where(bin_ > top - self.n_apart, bin_ % self.n_apart, self.n_apart)
        return unit * (self.n_apart + 1) + inner

    def _lower(self, unit: Ints, before: Floats) -> None:
        """Move what is no longer kept apart to the shared reservoirs of these units."""
        old, new = histogram_bin(before[unit]), histogram_bin(self.largest[unit])
        for step in range(self.n_apart):
            fallen = old - step <= new - self.n_apart
            if not fallen.any():
                continue
            some = unit[fallen]
            rows = self.row(some, old[fallen] - step, old[fallen])
            index, entries = self.reservoir.take(rows)
            self.reservoir.clear(rows)
            shared = some[index] * (self.n_apart + 1) + self.n_apart
            self.reservoir.add(shared, entries)

    def blocks(self, units_at_once: int) -> Iterator[tuple[Ints, Entries]]:
        """All entries, some units at a time: the unit of each entry, and the entries."""
        for rows, entries in self.reservoir.blocks(units_at_once * (self.n_apart + 1)):
            yield rows // (self.n_apart + 1), entries

    def take(self, unit: Ints) -> tuple[Ints, Entries]:
        """The entries of some units: the index in ``unit`` of each, and the entries."""
        n_rows = self.n_apart + 1
        rows = (unit[:, None] * n_rows + np.arange(n_rows)).ravel()
        index, entries = self.reservoir.take(rows)
        return index // n_rows, entries

    def limits(self, n_intervals: int) -> Doubles:
        """``[u, n_intervals]``: up to which ``u`` all entries of an interval have been kept; inf: all.

        Interval ``i`` is the ``i``-th from the top of ``n_intervals`` equal intervals of [0, largest]. It has
        entries of every bin that it touches, so the smallest limit of these bins counts.
        """
        limits = np.full((self.n_units, n_intervals), np.inf)
        unit = np.arange(self.n_units)
        top = histogram_bin(self.largest)
        for step in range(self.n_apart + 1):
            shared = step == self.n_apart
            rows = unit * (self.n_apart + 1) + (step if shared else (top - step) % self.n_apart)
            full = self.reservoir.full(rows) & (self.largest > 0)
            limit = -self.reservoir.smallest[rows].astype(np.float64)
            upper = np.minimum(_upper_edge(top - step), self.largest)
            lower = np.zeros(len(top)) if shared else _upper_edge(top - step - 1)
            first = interval_of(upper, self.largest, n_intervals)
            last = interval_of(lower, self.largest, n_intervals)
            for interval in range(n_intervals):
                touched = full & (first <= interval) & (interval <= last)
                limits[touched, interval] = np.minimum(limits[touched, interval], limit[touched])
        return limits


def _upper_edge(bin_: npt.NDArray[np.int32]) -> Doubles:
    """Where a bin of the histogram ends; bin 0, and all below it, ends where the first edge is."""
    found: Doubles = np.where(bin_ < 0, 0.0, 2.0 ** ((np.maximum(bin_, 0) - 80) / 4))
    return np.where(bin_ >= N_BINS - 1, np.inf, found)


def interval_of(value: npt.NDArray[Any], largest: npt.NDArray[Any], n_intervals: int) -> Ints:
    """The number of each value's interval: 0 for the topmost of ``n_intervals`` of [0, largest].

    In float64: ``floor((1 - value / largest) * n_intervals)``, at most ``n_intervals - 1``.
    """
    share = np.divide(
        value.astype(np.float64), largest, out=np.zeros(len(value)), where=largest > 0
    )
    found = np.floor((1 - share) * n_intervals).astype(np.int64)
    clipped: Ints = np.clip(found, 0, n_intervals - 1)
    return clipped
