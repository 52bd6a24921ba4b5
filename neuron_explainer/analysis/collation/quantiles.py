"""Equal-count quantiles of chosen units: :func:`exact_quantiles`, :func:`quantiles_of_store`.

Shape legend: ``u`` chosen units, ``n`` quantiles, ``m`` peaks.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields

import numpy as np

from neuron_explainer.activations.windows import TokenWindows
from neuron_explainer.analysis.collation.config import CollateConfig
from neuron_explainer.analysis.collation.examples import example_table, ranks
from neuron_explainer.analysis.collation.passes import Collation
from neuron_explainer.analysis.collation.reservoirs import Entries, Words, uniform, unit_hashes
from neuron_explainer.analysis.collation.seen import Seen
from neuron_explainer.analysis.collation.units import Watched, What, watched
from neuron_explainer.analysis.records import ExampleTable, Floats, Ints
from neuron_explainer.analysis.store import ExampleStore
from neuron_explainer.errors import InputError
from neuron_explainer.models.autoencoder import Autoencoder
from neuron_explainer.models.model_context import ModelContext
from neuron_explainer.progress import progress_bar


@dataclass(frozen=True, eq=False)
class Quantiles:
    """The contexts of each unit, sorted by their largest value and cut into parts of equal count."""

    unit: Ints
    """``[u]``: the chosen units, ascending."""
    count: Ints
    """``[u, n]``: number of contexts of each quantile; the counts of a unit differ by at most 1, and the
    first quantiles have more."""
    largest: Floats
    """``[u, n]``: the largest value of each quantile; 0 where it is empty."""
    smallest: Floats
    """``[u, n]``: the smallest peak of a context of each quantile; 0 where it is empty."""
    examples: ExampleTable
    """Examples in the group "stratum"; ``interval`` is the number of the quantile, 0 for the one of the
    largest values. Ranked by their sampling keys: a uniform sample of each quantile."""


@dataclass(frozen=True, eq=False)
class _Peaks:
    """The peaks of chosen units in all contexts, sorted by unit, value (descending) and position."""

    unit: Ints
    value: Floats
    position: Ints
    batch: Ints
    quantile: Ints

    def rows(self, which: Ints) -> "_Peaks":
        """Some of the peaks."""
        return _Peaks(**{field.name: getattr(self, field.name)[which] for field in fields(self)})


def exact_quantiles(
    context: ModelContext,
    what: What,
    windows: TokenWindows,
    units: Mapping[str, Sequence[int]],
    n: int = 10,
    per_quantile: int = 5,
    config: CollateConfig | None = None,
    *,
    progress: bool = False,
) -> dict[str, Quantiles]:
    """Sort the contexts of some units by their peaks, and draw examples from quantiles of equal count.

    All peaks above 0 of the chosen units are held in memory (36 bytes each), so this is for some units, not
    for all. The corpus is read once, and the batches of the examples drawn once more. The result is exact
    and does not depend on how the windows are batched or ordered.

    Args:
        context: the model.
        what: autoencoders or locations, as for :func:`collate`.
        windows: the corpus, cut into windows: one epoch.
        units: for each dictionary or location in ``what``, by name, the numbers of the units.
        n: number of quantiles.
        per_quantile: number of examples drawn from each.
        config: of it ``window``, ``head_window``, ``keep_bos`` and ``seed`` count.
        progress: show a bar on stderr while the corpus is read.

    Returns:
        the quantiles of each dictionary or location, by name.
    """
    config = CollateConfig() if config is None else config
    if not 1 <= n <= 100:
        raise InputError(f"n must be 1 to 100, found {n}.")
    if not 0 <= per_quantile <= 1000:
        raise InputError(f"per_quantile must be 0 to 1000, found {per_quantile}.")
    places = watched(context, what, config)
    chosen = _chosen(places, units)
    places = [place for place in places if place.name in chosen]
    collation = Collation(context, places, windows, config)
    peaks = [
        _quantiles_of(parts, n)
        for parts in _read(collation, [chosen[place.name] for place in places], progress)
    ]
    drawn = [
        _draw(each, unit_hashes(collation.seed, place.n_units), n, per_quantile)
        for each, place in zip(peaks, places, strict=True)
    ]
    tables = _show(collation, drawn)
    return {
        place.name: _summary(chosen[place.name], each, n, table)
        for place, each, table in zip(places, peaks, tables, strict=True)
    }


def quantiles_of_store(
    store: ExampleStore,
    context: ModelContext,
    units: Sequence[int],
    n: int = 10,
    per_quantile: int = 5,
    *,
    autoencoder: Autoencoder | None = None,
    progress: bool = False,
) -> Quantiles:
    """:func:`exact_quantiles` of units of a store, from the text that the store holds.

    The text is cut, and examples are drawn, with the settings of the collation.

    Args:
        store: a store that a collation wrote; of merged and imported ones it is not known how their text
            was cut.
        context: the model of the store.
        units: numbers of units.
        n: number of quantiles.
        per_quantile: number of examples drawn from each; ``store.examples_of(found.examples)`` shows them.
        autoencoder: for latents: the autoencoder of the store.
        progress: show a bar on stderr while the text is read.
    """
    windows = windows_of_store(store)
    store.check_model(context)
    what: What = store.location
    if store.kind == "latent":
        if autoencoder is None:
            raise InputError(f"{store.name} is of latents: give the autoencoder.")
        store.check_autoencoder(autoencoder)
        what = {store.name: autoencoder}
    config = CollateConfig(**store.settings["config"])
    chosen = {store.name: units}
    found = exact_quantiles(
        context, what, windows, chosen, n, per_quantile, config, progress=progress
    )
    return found[store.name]


def windows_of_store(store: ExampleStore) -> TokenWindows:
    """The windows that a collation has read, from its store."""
    cut = store.settings.get("windows")
    if not isinstance(cut, Mapping):
        raise InputError(
            f"{store.path} does not say how its text was cut into windows: it was imported, not collated."
        )
    how = {name: cut[name] for name in ("concat", "bos", "seed")}
    windows = TokenWindows(store.tokens.corpus, cut["context_length"], cut["batch_size"], **how)
    found = windows.describe()
    for name in ("fingerprint", "source_fingerprint", "n_documents"):
        if found[name] != cut[name]:
            raise InputError(
                f"{store.path} was collated on another text than the one beside it, or it is of several "
                f"texts: {name} is {cut[name]} and {found[name]}."
            )
    return windows


def _chosen(places: list[Watched], units: Mapping[str, Sequence[int]]) -> dict[str, Ints]:
    by_name = {place.name: place for place in places}
    found = {}
    for name, numbers in units.items():
        if name not in by_name:
            raise InputError(f"{name!r} is not looked at; expected one of {', '.join(by_name)}.")
        found[name] = np.unique(np.asarray(numbers, np.int64))
        last = by_name[name].n_units - 1
        wrong = found[name][(found[name] < 0) | (found[name] > last)]
        if len(wrong):
            raise InputError(f"{name} has units 0 to {last}, found {wrong[0]}.")
    if not any(len(each) for each in found.values()):
        raise InputError("no units are chosen.")
    return found


def _read(
    collation: Collation, chosen: list[Ints], progress: bool
) -> list[list[tuple[Ints, Floats, Ints, Ints]]]:
    """Unit, value, position and batch of all peaks of the chosen units, for each place."""
    found: list[list[tuple[Ints, Floats, Ints, Ints]]] = [[] for _ in chosen]
    numbers = range(collation.windows.batches_per_epoch)
    for number in progress_bar(numbers, desc="reading", unit=" batches", disable=not progress):
        for index, seen in collation.see(number):
            peaks = seen.peaks()
            peaks = peaks.rows(np.isin(peaks.unit, chosen[index]))
            batch = np.full(len(peaks), number)
            found[index].append((peaks.unit, peaks.value, peaks.position, batch))
    return found


def _quantiles_of(parts: list[tuple[Ints, Floats, Ints, Ints]], n: int) -> _Peaks:
    none = (np.empty(0, np.int64), np.empty(0, np.float32), *[np.empty(0, np.int64)] * 2)
    columns = [np.concatenate(column) for column in zip(none, *parts, strict=True)]
    unit, value, position, batch = columns
    order = np.lexsort((position, -value, unit))
    unit = unit[order]
    count = np.bincount(unit)[unit] if len(unit) else unit
    size, larger = np.divmod(count, n)  # the first ``larger`` quantiles have one more
    rank = ranks(unit)
    later = larger + (rank - larger * (size + 1)) // np.maximum(size, 1)
    quantile = np.where(rank < larger * (size + 1), rank // (size + 1), later)
    return _Peaks(unit, value[order], position[order], batch[order], quantile)


def _draw(peaks: _Peaks, hashes: Words, n: int, most: int) -> tuple[_Peaks, Floats]:
    """The peaks with the smallest keys of each quantile, and their keys."""
    key = uniform(hashes[peaks.unit], peaks.position).astype(np.float32)
    label = peaks.unit * n + peaks.quantile
    order = np.lexsort((peaks.position, key, label))
    order = order[ranks(label[order]) < most]
    return peaks.rows(order), key[order]


def _show(collation: Collation, drawn: list[tuple[_Peaks, Floats]]) -> list[ExampleTable]:
    """The tables of the examples; their batches are read again."""
    empty = [np.empty(0, np.int64)] * 2
    tables = []
    for place in collation.watched:
        width = place.shown(collation.config)[1]
        tables.append([example_table("stratum", empty[0], Entries.none(width), empty[1])])
    for number in np.unique(np.concatenate([peaks.batch for peaks, _ in drawn])).tolist():
        for index, seen in collation.see(number):
            peaks, key = drawn[index]
            some = np.flatnonzero(peaks.batch == number)
            window = collation.watched[index].shown(collation.config)[0]
            entries = _entries(seen, peaks.unit[some], peaks.position[some], window)
            entries.key = -key[some]
            table = example_table("stratum", peaks.unit[some], entries, peaks.quantile[some])
            tables[index].append(table)
    return [_ranked(ExampleTable.concatenate(each)) for each in tables]


def _entries(seen: Seen, unit: Ints, position: Ints, window: int) -> Entries:
    """The examples around the peaks of these units at these positions, in this order."""
    peaks = seen.peaks()
    there = np.lexsort((peaks.position, peaks.unit))
    wanted = np.lexsort((position, unit))
    first = peaks.position.min(initial=0)
    span = int(peaks.position.max(initial=0) - first) + 1
    label = (peaks.unit * span + peaks.position - first)[there]
    at = there[np.searchsorted(label, (unit * span + position - first)[wanted])]
    back = np.empty_like(wanted)
    back[wanted] = at
    return seen.show(peaks.rows(back), window)


def _ranked(table: ExampleTable) -> ExampleTable:
    """Examples of several batches, with the ranks that they have among all of their quantile."""
    order = np.lexsort((table.start, table.key, table.interval, table.unit))
    table = table.rows(order)
    table.rank[:] = ranks(table.unit.astype(np.int64) * 256 + table.interval)
    return table


def _summary(chosen: Ints, peaks: _Peaks, n: int, examples: ExampleTable) -> Quantiles:
    row = np.searchsorted(chosen, peaks.unit)
    cell = row * n + peaks.quantile
    shape = (len(chosen), n)
    largest, smallest = np.zeros(len(chosen) * n, np.float32), np.zeros(len(chosen) * n, np.float32)
    smallest[cell] = peaks.value  # the last one of each quantile stays
    largest[cell[::-1]] = peaks.value[::-1]
    return Quantiles(
        unit=chosen,
        count=np.bincount(cell, minlength=len(chosen) * n).reshape(shape),
        largest=largest.reshape(shape),
        smallest=smallest.reshape(shape),
        examples=examples,
    )
