"""What one batch shows of the units at one place: values for the figures, and peaks for the examples.

There are three ways to hold values: sparse (latents), one for each token (neurons, channels), and one for
each pair of tokens (heads). All give the same results; a test holds them equal.

Shape legend: ``t`` tokens, ``u`` units, ``a`` active entries, ``m`` peaks, ``c`` contexts, ``q`` pairs of
tokens, ``w`` activations shown.
"""

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from neuron_explainer.analysis.collation.places import Mask, Places, window_of
from neuron_explainer.analysis.collation.reservoirs import Entries
from neuron_explainer.analysis.records import Floats, Ints

_LARGEST_HALF = 65504.0  # of float16
_SHOWN_AT_ONCE = 1 << 19  # activations of examples that are looked up at a time


@dataclass(frozen=True, eq=False)
class Peaks:
    """At most one peak of each unit in each context that may give examples."""

    unit: Ints
    """``[m]``, ascending."""
    value: Floats
    """``[m]``"""
    position: Ints
    """``[m]``: corpus position of the peak's token."""
    at: Ints
    """``[m]``: index of the peak's token, pair or active entry among those of the batch."""

    def __len__(self) -> int:
        return len(self.unit)

    def rows(self, which: Any) -> "Peaks":
        """Some of the peaks."""
        return Peaks(*(x[which] for x in (self.unit, self.value, self.position, self.at)))


class Seen(ABC):
    """The units of one place in one batch."""

    places: Places
    n_units: int
    n_tokens: int
    """Number of tokens (or pairs) looked at."""

    @abstractmethod
    def peaks(self, lowest: bool = False) -> Peaks:
        """The peaks above 0, or with ``lowest`` those below 0 where the smallest values are."""

    @abstractmethod
    def inactive(self) -> Peaks:
        """The first token (or pair) of each context in which a unit is nowhere active."""

    @abstractmethod
    def show(self, peaks: Peaks, window: int) -> Entries:
        """The examples around peaks, without keys; at most ``window`` tokens of each are shown."""


class SparseSeen(Seen):
    """Active latents ``[a]``, sorted by unit and then by token.

    Args:
        places: the tokens of the batch.
        token: ``[a]`` index of the token of each active entry.
        unit: ``[a]``
        value: ``[a]``, not 0.
        n_units: number of units.
    """

    def __init__(
        self, places: Places, token: Ints, unit: Ints, value: Floats, n_units: int
    ) -> None:
        self.places, self.n_units, self.n_tokens = places, n_units, len(places)
        # A stable sort of 16 bits is a radix sort, several times as fast as one of 64.
        keys = unit.astype(np.uint16) if n_units <= 1 << 16 else unit
        order = np.argsort(keys, kind="stable")
        self.token, self.unit, self.value = token[order], unit[order], value[order]
        some = places.in_examples[self.token]
        self._entry = np.arange(len(some)) if some.all() else np.flatnonzero(some)
        context = places.context[self.token[self._entry]]
        new = (np.diff(self.unit[self._entry]) != 0) | (np.diff(context) != 0)
        self._run = np.flatnonzero(np.append(True, new)) if len(context) else self._entry
        """Where the entries of one unit in one context begin, among those that may be in examples."""

    def peaks(self, lowest: bool = False) -> Peaks:
        value = self.value[self._entry]
        first = _first_of_largest(-value if lowest else value, self._run)
        found = self._peaks(self._entry[first])
        return found.rows(found.value < 0 if lowest else found.value > 0)

    def _peaks(self, at: Ints) -> Peaks:
        position = self.places.position[self.token[at]]
        return Peaks(self.unit[at], self.value[at], position, at)

    def inactive(self) -> Peaks:
        places = self.places
        fires = np.zeros((len(places.start), self.n_units), bool)
        fires[places.context[self.token[self._entry]], self.unit[self._entry]] = True
        return _inactive(places, _first_tokens(places), fires)

    def show(self, peaks: Peaks, window: int) -> Entries:
        # ``at`` is an active entry; of an inactive context, the first token with a value of 0.
        off = peaks.value == 0
        token = np.where(
            off, peaks.at, self.token[np.where(off, 0, peaks.at)] if len(self.token) else 0
        )
        shown = _Window.around(self.places, token, window)
        activations = np.zeros((len(peaks), window), np.float16)
        if len(self._run):
            place = np.searchsorted(self._entry, peaks.at)
            run = np.searchsorted(self._run, place, side="right") - 1
            ends = np.append(self._run[1:], len(self._entry))
            lengths = np.where(off, 0, ends[run] - self._run[run])
            example = np.repeat(np.arange(len(peaks)), lengths)
            steps = np.arange(len(example)) - np.repeat(np.cumsum(lengths) - lengths, lengths)
            entry = self._entry[np.repeat(self._run[run], lengths) + steps]
            column = self.places.position[self.token[entry]] - shown.position[example]
            inside = (column >= 0) & (column < shown.length[example])
            activations[example[inside], column[inside]] = _halves(self.value[entry[inside]])
        return shown.entries(peaks, activations)


class DenseSeen(Seen):
    """A value for each token and unit.

    Args:
        places: the tokens of the batch.
        x: ``[t, u]``
        signed: whether a unit is active at values below 0 too.
    """

    def __init__(self, places: Places, x: Floats, signed: bool) -> None:
        self.places, self.x, self.signed = places, x, signed
        self.n_tokens, self.n_units = x.shape
        self.position, self.context = places.position, places.context
        self.in_examples = places.in_examples

    def peaks(self, lowest: bool = False) -> Peaks:
        x = -self.x if lowest else self.x
        starts, ends = self._spans()
        value = np.empty((len(starts), self.n_units), np.float32)
        at = np.empty((len(starts), self.n_units), np.int64)
        for number, (start, end) in enumerate(zip(starts.tolist(), ends.tolist(), strict=True)):
            value[number] = x[start:end].max(axis=0)
            at[number] = start + (x[start:end] == value[number]).argmax(axis=0)
        unit, context = np.nonzero(value.T > 0)
        at_ = at[context, unit]
        values = -value[context, unit] if lowest else value[context, unit]
        return Peaks(unit, values, self.position[at_], at_)

    def _spans(self) -> tuple[Ints, Ints]:
        """Where the rows of each context that may give examples begin and end."""
        some = np.flatnonzero(self.in_examples)
        new = np.flatnonzero(np.diff(self.context[some], prepend=-1))
        ends = np.append(new[1:], len(some)) - 1
        return some[new], some[ends] + 1 if len(new) else some[new]

    def inactive(self) -> Peaks:
        starts, ends = self._spans()
        fires = np.zeros((len(starts), self.n_units), bool)
        for number, (start, end) in enumerate(zip(starts.tolist(), ends.tolist(), strict=True)):
            part = self.x[start:end]
            fires[number] = (part != 0 if self.signed else part > 0).any(axis=0)
        unit, context = np.nonzero(~fires.T)
        at = starts[context]
        return Peaks(unit, self.x[at, unit], self.position[at], at)

    def show(self, peaks: Peaks, window: int) -> Entries:
        shown = _Window.around(self.places, peaks.at, window)
        activations = np.zeros((len(peaks), window), np.float16)
        step = max(1, _SHOWN_AT_ONCE // window)
        for begin in range(0, len(peaks), step):
            part = slice(begin, begin + step)
            cell, inside = shown.cells(part, window)
            token = self.places.index[cell]
            values = self.x[token, peaks.unit[part, None]]
            activations[part] = _halves(np.where(inside & (token >= 0), values, 0))
        return shown.entries(peaks, activations)


class PairsSeen(DenseSeen):
    """A value for each pair of tokens of one context, the key at or before the query, for each head.

    Pairs further apart than the window shown are not looked at. A pair's corpus position is its query's.

    Args:
        places: the tokens of the batch.
        values: ``[b, s, s, u]``: by row, query, key and head.
        reach: the number of tokens that are shown, at most: ``reach - 1`` is the largest distance.
    """

    def __init__(self, places: Places, values: Floats, reach: int) -> None:
        query, key = _pairs(places, reach)
        row, at_query = np.divmod(places.cell[query], places.shape[1])
        at_key = places.cell[key] % places.shape[1]
        super().__init__(places, values[row, at_query, at_key], False)
        self.values, self.query, self.key = values, query, key
        self.position = places.position[query]
        self.context = places.context[query]
        self.in_examples = places.in_examples[query]

    def show(self, peaks: Peaks, window: int) -> Entries:
        query, key = self.query[peaks.at], self.key[peaks.at]
        shown = _Window.around(self.places, query, window, earliest=key)
        first = self.places.position[key] - shown.position
        i, j = np.tril_indices(window)
        activations = np.zeros((len(peaks), len(i)), np.float16)
        step = max(1, _SHOWN_AT_ONCE // len(i))
        for begin in range(0, len(peaks), step):
            part = slice(begin, begin + step)
            cell, inside = shown.cells(part, window)
            inside &= self.places.index[cell] >= 0
            row, column = np.divmod(cell, self.places.shape[1])
            values = self.values[row[:, i], column[:, i], column[:, j], peaks.unit[part, None]]
            activations[part] = _halves(np.where(inside[:, i] & inside[:, j], values, 0))
        return shown.entries(peaks, activations, shown.offset * (shown.offset + 1) // 2 + first)


def _pairs(places: Places, reach: int) -> tuple[Ints, Ints]:
    """Query and key of each pair, as tokens: by query, then by key."""
    some = np.flatnonzero(places.context >= 0)
    queries, keys = [], []
    for distance in range(reach):
        # Tokens of a context follow each other, but some may be left out: ``index`` knows.
        cell = places.cell[some] - distance
        key = np.where(cell >= 0, places.index[np.maximum(cell, 0)], -1)
        same = (key >= 0) & (places.context[key] == places.context[some])
        queries.append(some[same])
        keys.append(key[same])
    query, key = np.concatenate(queries), np.concatenate(keys)
    order = np.lexsort((key, query))
    return query[order], key[order]


@dataclass(frozen=True, eq=False)
class _Window:
    """The tokens shown of some examples."""

    position: Ints
    """Corpus position of the first one."""
    cell: Ints
    """Where in the batch it stands."""
    offset: Ints
    """How many come before the peak."""
    length: Ints

    @classmethod
    def around(
        cls, places: Places, token: Ints, window: int, earliest: Ints | None = None
    ) -> "_Window":
        context, cell = places.context[token], places.cell[token]
        first = places.first_cell[context]
        other = None if earliest is None else places.cell[earliest] - first
        begin, length = window_of(cell - first, places.length[context], window, other)
        return cls(places.start[context] + begin, first + begin, cell - first - begin, length)

    def cells(self, part: slice, window: int) -> tuple[Ints, Mask]:
        """``[m, window]``: the places in the batch of what is shown, and whether it is shown."""
        steps = np.arange(window)
        inside = steps < self.length[part, None]
        return np.where(inside, self.cell[part, None] + steps, self.cell[part, None]), inside

    def entries(
        self, peaks: Peaks, activations: npt.NDArray[np.float16], peak: Ints | None = None
    ) -> Entries:
        return Entries(
            key=np.zeros(len(peaks), np.float32),
            position=peaks.position,
            value=peaks.value,
            offset=self.offset.astype(np.uint16),
            length=self.length.astype(np.uint16),
            peak=(self.offset if peak is None else peak).astype(np.uint16),
            activations=activations,
        )


def _halves(values: npt.NDArray[Any]) -> npt.NDArray[np.float16]:
    halves: npt.NDArray[np.float16] = np.clip(values, -_LARGEST_HALF, _LARGEST_HALF).astype(
        np.float16
    )
    return halves


def _first_of_largest(value: Floats, starts: Ints) -> Ints:
    """The index of the largest value of each run, the first one if there are several."""
    if not len(value):
        return np.empty(0, np.int64)
    largest = np.maximum.reduceat(value, starts)
    run = np.repeat(np.arange(len(starts)), np.diff(starts, append=len(value)))
    at = np.flatnonzero(value == largest[run])
    first: Ints = at[np.flatnonzero(np.diff(run[at], prepend=-1))]
    return first


def _first_tokens(places: Places) -> Ints:
    """``[c]``: the index of the first token looked at of each context; -1 if there is none."""
    found = np.full(len(places.start), -1)
    some = np.flatnonzero(places.in_examples)
    new = some[np.flatnonzero(np.diff(places.context[some], prepend=-1))]
    found[places.context[new]] = new
    return found


def _inactive(places: Places, first: Ints, fires: Mask) -> Peaks:
    context = np.flatnonzero(first >= 0)
    unit, which = np.nonzero(~fires[context].T)
    at = first[context[which]]
    return Peaks(unit, np.zeros(len(unit), np.float32), places.position[at], at)


def segments(unit: Ints) -> tuple[Ints, Ints]:
    """Where each unit begins among sorted units, and which unit it is."""
    starts = np.flatnonzero(np.diff(unit, prepend=-1))
    return starts, unit[starts]
