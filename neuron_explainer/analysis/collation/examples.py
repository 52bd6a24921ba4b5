"""The examples of the units of one place: reservoirs for each group, and the table they end as.

Memory depends on the units and the config alone (:func:`bytes_per_unit`): about 10 kB a unit with the
defaults, whatever the number of tokens.

Shape legend: ``u`` units, ``m`` peaks or entries, ``e`` examples.
"""

from collections.abc import Iterator

import numpy as np

from neuron_explainer.analysis.collation.config import CollateConfig
from neuron_explainer.analysis.collation.reservoirs import (
    Entries,
    Reservoir,
    Strata,
    interval_of,
    uniform,
    unit_hashes,
)
from neuron_explainer.analysis.collation.seen import Peaks, Seen
from neuron_explainer.analysis.records import (
    N_BINS,
    Doubles,
    ExampleTable,
    Floats,
    Ints,
    group_number,
)

_APART = 10
"""Bins of values that are kept apart for the strata: two and a half octaves below the largest value, so that
the lowest of five intervals is the first that shares the reservoir of all lower values."""
_POSITIVE = ("top", "uniform", "weighted")
"""The groups of reservoirs whose examples have a positive value."""
_UNITS_AT_ONCE = 2048
_MOST_NEGATIVE = np.finfo(np.float32).min


class Examples:
    """The examples found so far.

    Args:
        n_units: number of units.
        config: how many examples to keep.
        seed: seed of the sampling keys; differs between corpora.
        signed: whether units are active at values below 0 too.
        window: the most tokens shown.
        width: the number of activations of an example.
    """

    def __init__(
        self,
        n_units: int,
        config: CollateConfig,
        seed: int,
        signed: bool,
        window: int,
        width: int,
    ) -> None:
        self.n_units, self.config, self.window, self.width = n_units, config, window, width
        self.hashes = unit_hashes(seed, n_units)
        kept = {
            "top": config.top,
            "bottom": config.top if signed else 0,
            "uniform": config.uniform,
            "weighted": config.weighted,
            "inactive": config.inactive,
        }
        self.reservoirs = {name: Reservoir(n_units, k, width) for name, k in kept.items() if k}
        per_interval = config.per_interval if config.intervals else 0
        self.strata = Strata(n_units, per_interval, width, _APART) if per_interval else None

    @property
    def nbytes(self) -> int:
        """Bytes of memory."""
        strata = self.strata.nbytes if self.strata is not None else 0
        return int(
            self.hashes.nbytes + strata + sum(each.nbytes for each in self.reservoirs.values())
        )

    # ---- adding ------------------------------------------------------------------------------------

    def add(self, seen: Seen) -> None:
        """Add a batch."""
        self._add_active(seen, seen.peaks())
        if "bottom" in self.reservoirs:
            peaks = seen.peaks(lowest=True)
            self._store(seen, peaks, {"bottom": -peaks.value})
        if "inactive" in self.reservoirs:
            peaks = seen.inactive()
            self._store(seen, peaks, {"inactive": -self._uniform(peaks)})

    def _uniform(self, peaks: Peaks) -> Floats:
        return uniform(self.hashes[peaks.unit], peaks.position).astype(np.float32)

    def _add_active(self, seen: Seen, peaks: Peaks) -> None:
        u = uniform(self.hashes[peaks.unit], peaks.position)
        keys = {"top": peaks.value, "uniform": -u.astype(np.float32)}
        if "weighted" in self.reservoirs:
            keys["weighted"] = _weighted(u, peaks.value, self.config.weight_exponent)
        self._store(seen, peaks, keys, keys["uniform"])

    def _store(
        self, seen: Seen, peaks: Peaks, keys: dict[str, Floats], stratum_key: Floats | None = None
    ) -> None:
        """Offer peaks to reservoirs; what is shown of a peak is looked up only if it is kept."""
        if not len(peaks):
            return
        places = [
            (self.reservoirs[name], self.reservoirs[name].offer(peaks.unit, key, peaks.position))
            for name, key in keys.items()
            if name in self.reservoirs
        ]
        if self.strata is not None and stratum_key is not None:
            found = self.strata.offer(peaks.unit, peaks.value, stratum_key, peaks.position)
            places.append((self.strata.reservoir, found))
        wanted = np.zeros(len(peaks), bool)
        for _, (_, _, which) in places:
            wanted[which] = True
        entries = seen.show(peaks.rows(wanted), self.window)
        number = np.cumsum(wanted) - 1
        for reservoir, (row, slot, which) in places:
            reservoir.fill(row, slot, entries.rows(number[which]))

    # ---- to files and back -------------------------------------------------------------------------

    @property
    def groups(self) -> list[str]:
        """The names of the groups that are kept."""
        return [*self.reservoirs, *(["stratum"] if self.strata is not None else [])]

    def blocks(
        self, group: str, units_at_once: int = _UNITS_AT_ONCE
    ) -> Iterator[tuple[Ints, Entries]]:
        """The entries of a group, some units at a time: the unit of each, and the entries."""
        if group == "stratum":
            assert self.strata is not None
            return self.strata.blocks(units_at_once)
        return self.reservoirs[group].blocks(units_at_once)

    @property
    def largest(self) -> Floats:
        """``[u]``: the largest value of any example of a stratum, kept or not."""
        none = np.zeros(self.n_units, np.float32)
        return none if self.strata is None else self.strata.largest

    def raise_to(self, largest: Floats) -> None:
        """Before the entries of another collation of the same units: its :attr:`largest`."""
        if self.strata is not None:
            self.strata.raise_to(largest)

    def absorb(self, group: str, unit: Ints, entries: Entries) -> None:
        """Add entries of another collation of the same units."""
        if group == "stratum":
            assert self.strata is not None
            self.strata.add(unit, entries)
        else:
            self.reservoirs[group].add(unit, entries)

    # ---- the end -----------------------------------------------------------------------------------

    def result(self) -> tuple[ExampleTable, Doubles | None]:
        """The table of all examples, and the limits of the strata. The reservoirs are emptied."""
        tables, limits = [], None
        if self.strata is not None:
            table, limits = self._strata_table(self.strata)
            tables.append(table)
            self.strata = None
        for name in list(self.reservoirs):
            reservoir = self.reservoirs.pop(name)
            tables += [
                example_table(name, u, entries) for u, entries in reservoir.blocks(_UNITS_AT_ONCE)
            ]
        if not tables:
            tables = [example_table("top", np.empty(0, np.int64), Entries.none(self.width))]
        return ExampleTable.concatenate(tables), limits

    def _strata_table(self, strata: Strata) -> tuple[ExampleTable, Doubles]:
        """The first few of each interval by their keys, and up to which key these are a uniform sample.

        Of a bin that an interval's end cuts through, the entries with the smallest keys may lie on the other
        side. So fewer than wanted may be known to be the first of an interval: those that its limit lets in.
        The other places go to the next ones among all entries that are kept of the unit, those of other
        groups included; their keys are above the limit. Because the entry of the largest value is kept, the
        topmost interval is never empty.
        """
        n, most = self.config.intervals, self.config.per_interval
        limits = strata.limits(n)
        tables = [example_table("stratum", np.empty(0, np.int64), Entries.none(self.width))]
        for begin in range(0, self.n_units, _UNITS_AT_ONCE):
            units = np.arange(begin, min(begin + _UNITS_AT_ONCE, self.n_units))
            unit, entries = self._kept(strata, units)
            interval = interval_of(entries.value, strata.largest[unit], n)
            table = example_table("stratum", unit, entries, interval)
            let_in = table.key <= limits[table.unit, table.interval]
            cut = np.zeros(limits.shape, bool)
            more = table.rows(let_in & (table.rank >= most))
            cut[more.unit, more.interval] = True
            last = table.rows(table.rank == most - 1)
            where = last.unit, last.interval
            limits[where] = np.where(cut[where], last.key, limits[where])
            tables.append(table.rows(table.rank < most))
        return ExampleTable.concatenate(tables), limits

    def _kept(self, strata: Strata, units: Ints) -> tuple[Ints, Entries]:
        """The entries of some units in the strata and in other groups with positive values, each once and
        with the key of a uniform sample; the unit of each."""
        reservoirs = [self.reservoirs[name] for name in _POSITIVE if name in self.reservoirs]
        taken = [strata.take(units), *(reservoir.take(units) for reservoir in reservoirs)]
        unit = units[np.concatenate([index for index, _ in taken])]
        entries = Entries.concatenate([each for _, each in taken])
        order = np.lexsort((entries.position, unit))
        new = np.diff(unit[order], prepend=-1) != 0
        new |= np.diff(entries.position[order], prepend=-1) != 0
        order = order[new]
        unit, entries = unit[order], entries.rows(order)
        entries.key = -uniform(self.hashes[unit], entries.position).astype(np.float32)
        return unit, entries


def example_table(
    group: str, unit: Ints, entries: Entries, interval: Ints | None = None
) -> ExampleTable:
    """The table of the entries ``[m]`` of some units ``[m]``; ``interval`` ``[m]`` is 0 by default."""
    interval = np.zeros(len(unit), np.int64) if interval is None else interval
    order = np.lexsort((entries.position, -entries.key, interval, unit))
    unit, interval, entries = unit[order], interval[order], entries.rows(order)
    key = entries.key.astype(np.float64)
    if group in ("top", "bottom"):
        key = entries.value.astype(np.float64)
    elif group != "weighted":
        key = -key
    return ExampleTable(
        unit=unit.astype(np.int32),
        group=np.full(len(unit), group_number(group), np.uint8),
        interval=interval.astype(np.uint8),
        rank=ranks(unit * (int(interval.max(initial=0)) + 1) + interval).astype(np.uint16),
        start=entries.position - entries.offset,
        length=entries.length,
        peak=entries.peak,
        value=entries.value,
        activations=entries.activations,
        key=key,
    )


def _weighted(u: Doubles, value: Floats, exponent: float) -> Floats:
    """``log(u) / value ** exponent`` in float32; the smallest float32 where it would be below that."""
    with np.errstate(over="ignore", under="ignore", divide="ignore"):
        key = np.log(u) / value.astype(np.float64) ** exponent
    return np.maximum(key, _MOST_NEGATIVE).astype(np.float32)


def ranks(label: Ints) -> Ints:
    """The place of each entry among those with the same label, which follow each other."""
    starts = np.flatnonzero(np.diff(label, prepend=-1))
    ranks: Ints = np.arange(len(label)) - np.repeat(starts, np.diff(starts, append=len(label)))
    return ranks


def bytes_per_unit(
    config: CollateConfig, *, signed: bool = False, dense: bool = False, heads: bool = False
) -> int:
    """The most memory that a collation takes for each unit, whatever the number of tokens.

    An entry of a reservoir takes 22 bytes and 2 for each activation shown. A unit has ``top`` (twice where
    signed), ``uniform``, ``weighted`` and ``inactive`` of them, and ``per_interval`` in each of 11 bins of
    values. Besides, there are histogram (648 bytes) and sums (40 bytes for each part of the corpus; twice
    where values that are not active can be other than 0). With the defaults a latent takes 10.3 kB.
    """
    width = config.head_window * (config.head_window + 1) // 2 if heads else config.window
    bins = (_APART + 1) if config.intervals and config.per_interval else 0
    groups = (config.top * (2 if signed else 1), config.uniform, config.weighted, config.inactive)
    entries = sum(groups) + bins * config.per_interval
    rows = sum(count > 0 for count in groups) + signed + bins
    sums = config.parts * 40 * (2 if dense else 1)
    return entries * (22 + 2 * width) + 4 * rows + 8 + 4 + 4 * N_BINS + 16 + sums
