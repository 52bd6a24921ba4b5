"""The figures of all units: added up batch by batch, within parts of the corpus that are merged at the end.

Counts, extremes and histograms are the same whatever the order. Sums of floating point numbers are not, so
mean and central sums are kept for each part of the corpus, and a part takes its batches in their order.

Shape legend: ``u`` units, ``a`` active entries sorted by unit, ``t`` tokens (or pairs).
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from neuron_explainer.analysis.collation.reservoirs import histogram_bin
from neuron_explainer.analysis.collation.seen import DenseSeen, Seen, SparseSeen
from neuron_explainer.analysis.records import (
    N_BINS,
    Doubles,
    Ints,
    Moments,
    UnitStatistics,
)

_VALUES_AT_ONCE = 1 << 20  # of dense values, whose powers are held in float64
_MOMENTS = ("count", "mean", "m2", "m3", "m4")


@dataclass(eq=False)
class PartSums:
    """The central sums of one part of the corpus."""

    active: Moments
    all: Moments | None
    """None where values that are not active are 0, so that it follows from ``active``."""

    def arrays(self) -> dict[str, npt.NDArray[Any]]:
        """The sums by name, to be written to a file."""
        kinds = {"active": self.active} | ({} if self.all is None else {"all": self.all})
        return {f"{kind}.{n}": getattr(m, n) for kind, m in kinds.items() for n in _MOMENTS}

    @classmethod
    def from_arrays(cls, arrays: dict[str, npt.NDArray[Any]]) -> "PartSums":
        """The inverse of :meth:`arrays`."""
        active, all_ = (
            Moments(*(arrays[f"{kind}.{name}"] for name in _MOMENTS))
            if f"{kind}.count" in arrays
            else None
            for kind in ("active", "all")
        )
        assert active is not None
        return cls(active, all_)


class Totals:
    """Running figures of the units of one place.

    Args:
        n_units: number of units.
        dense: whether values that are not active can be other than 0.
    """

    def __init__(self, n_units: int, dense: bool) -> None:
        self.n_units, self.dense = n_units, dense
        self.n_tokens = 0
        self.max = np.full(n_units, -np.inf, np.float32)
        self.min = np.full(n_units, np.inf, np.float32)
        self.last_active = np.full(n_units, -1, np.int64)
        self.histogram = np.zeros((n_units, N_BINS), np.uint32)
        self.parts: dict[int, PartSums] = {}

    @property
    def nbytes(self) -> int:
        """Bytes of memory."""
        own = (self.max, self.min, self.last_active, self.histogram)
        sums = [array for part in self.parts.values() for array in part.arrays().values()]
        return sum(array.nbytes for array in own) + sum(array.nbytes for array in sums)

    def add(self, seen: Seen, part: int) -> None:
        """Add a batch of a part of the corpus."""
        if part not in self.parts:
            all_ = Moments.empty(self.n_units) if self.dense else None
            self.parts[part] = PartSums(Moments.empty(self.n_units), all_)
        self.n_tokens += seen.n_tokens
        if isinstance(seen, SparseSeen):
            self._add_sparse(seen, self.parts[part])
        else:
            assert isinstance(seen, DenseSeen)
            self._add_dense(seen, self.parts[part])

    def _add_sparse(self, seen: SparseSeen, sums: PartSums) -> None:
        if not len(seen.unit):
            return
        starts = np.flatnonzero(np.diff(seen.unit, prepend=-1))
        unit = seen.unit[starts]
        values = seen.value.astype(np.float64)
        count = np.diff(starts, append=len(values))
        mean = np.add.reduceat(values, starts) / count
        d = values - np.repeat(mean, count)
        square = d * d
        powers = (square, square * d, square * square)
        found = Moments(count, mean, *(np.add.reduceat(power, starts) for power in powers))
        _merge_into(sums.active, unit, found)
        self.max[unit] = np.maximum(self.max[unit], np.maximum.reduceat(seen.value, starts))
        self.min[unit] = np.minimum(self.min[unit], np.minimum.reduceat(seen.value, starts))
        last = np.maximum.reduceat(seen.places.position[seen.token], starts)
        self.last_active[unit] = np.maximum(self.last_active[unit], last)
        above = seen.value > 0
        cells = seen.unit[above] * N_BINS + histogram_bin(seen.value[above])
        np.add.at(self.histogram.reshape(-1), cells, np.uint32(1))

    def _add_dense(self, seen: DenseSeen, sums: PartSums) -> None:
        if not seen.n_tokens:
            return
        step = max(1, _VALUES_AT_ONCE // seen.n_tokens)
        for begin in range(0, self.n_units, step):
            units = np.arange(begin, min(begin + step, self.n_units))
            x = np.ascontiguousarray(seen.x[:, units])
            active = x != 0 if seen.signed else x > 0
            self.max[units] = np.maximum(self.max[units], x.max(axis=0))
            self.min[units] = np.minimum(self.min[units], x.min(axis=0))
            last = np.where(active, seen.position[:, None], -1).max(axis=0)
            self.last_active[units] = np.maximum(self.last_active[units], last)
            bins = np.where(x > 0, histogram_bin(x), N_BINS) + np.arange(len(units)) * (N_BINS + 1)
            counts = np.bincount(bins.ravel(), minlength=len(units) * (N_BINS + 1))
            counts = counts.reshape(len(units), N_BINS + 1)[:, :N_BINS]
            self.histogram[units] += counts.astype(np.uint32)
            values = x.astype(np.float64)
            _merge_into(sums.active, units, _central(values, active))
            assert sums.all is not None
            _merge_into(sums.all, units, _central(values, None))

    def result(self) -> UnitStatistics:
        """The figures of all parts together."""
        active, all_ = Moments.empty(self.n_units), Moments.empty(self.n_units)
        for part in sorted(self.parts):
            active = active.merge(self.parts[part].active)
            if self.dense:
                whole = self.parts[part].all
                assert whole is not None
                all_ = all_.merge(whole)
        if not self.dense:
            all_ = active.with_zeros(self.n_tokens - active.count)
        zeros = np.zeros(self.n_units, bool) if self.dense else active.count < self.n_tokens
        if not self.n_tokens:
            zeros[:] = True
        return UnitStatistics(
            n_tokens=self.n_tokens,
            active=active,
            all=all_,
            max=np.where(zeros, np.maximum(self.max, 0), self.max),
            min=np.where(zeros, np.minimum(self.min, 0), self.min),
            last_active=self.last_active,
            histogram=self.histogram,
        )

    def absorb(self, other: "Totals") -> None:
        """Add the figures of other parts of the same corpus."""
        assert not self.parts.keys() & other.parts.keys()
        self.n_tokens += other.n_tokens
        self.max = np.maximum(self.max, other.max)
        self.min = np.minimum(self.min, other.min)
        self.last_active = np.maximum(self.last_active, other.last_active)
        self.histogram += other.histogram
        self.parts |= other.parts


def _central(values: Doubles, active: npt.NDArray[np.bool_] | None) -> Moments:
    """The moments of each column of ``[t, u]``, of the entries that are active or of all."""
    if active is None:
        count = np.full(values.shape[1], len(values))
        mean = values.sum(axis=0) / len(values)
        d = values - mean
    else:
        count = active.sum(axis=0)
        mean = (values * active).sum(axis=0) / np.maximum(count, 1)
        d = (values - mean) * active
    square = d * d
    powers = (square.sum(axis=0), (square * d).sum(axis=0), (square * square).sum(axis=0))
    return Moments(count, mean, *powers)


def _merge_into(total: Moments, units: Ints, found: Moments) -> None:
    """Add the moments of some units to those of all, in place."""
    some = Moments(*(getattr(total, name)[units] for name in _MOMENTS)).merge(found)
    for name in _MOMENTS:
        getattr(total, name)[units] = getattr(some, name)
