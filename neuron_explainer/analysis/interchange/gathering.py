"""From examples that carry their own text to a store, whose examples point into one text.

Foreign files hold the tokens of each example as strings. :class:`Gatherer` takes the examples of all
units, one layer after the other. It keeps each text once, as a document of its own, and numbers the
strings in the order in which they come: that is the vocabulary of the store. Stores of several layers
share the text.

Legend: ``s`` tokens of an example, ``u`` units, ``e`` examples.
"""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from neuron_explainer import files
from neuron_explainer.activations.corpus import TokenCorpus
from neuron_explainer.analysis.records import (
    HISTOGRAM_EDGES,
    N_BINS,
    Collected,
    ExampleTable,
    Kind,
    Moments,
    UnitStatistics,
    group_number,
)
from neuron_explainer.analysis.store_format import Label, encodable, write_store
from neuron_explainer.analysis.store_names import SUFFIX
from neuron_explainer.analysis.token_store import TOKENS_FOLDER, TokenStore
from neuron_explainer.errors import CheckpointError, InputError

Floats = npt.NDArray[np.float32]
LONGEST = 65535
"""Tokens, or pairs of tokens, that an example of a store can have."""
_NO_ACTIVATIONS: Floats = np.zeros(0, np.float32)


@dataclass(frozen=True, eq=False)
class ForeignExample:
    """A text with activations, from another program's file."""

    group: str
    tokens: list[str]
    activations: Floats
    """``[s]``, or the lower triangle of pairs."""
    interval: int = 0
    peak: int | None = None
    """Where the value of the example is; None: at the largest activation."""


@dataclass(frozen=True, eq=False)
class ForeignUnit:
    """What another program's files say about a unit."""

    unit: int
    examples: Sequence[ForeignExample]
    n_tokens: int
    """Number of tokens that the figures are about."""
    values: npt.NDArray[np.float64]
    """Activations above 0 on these tokens, or the middles of the bars of a histogram ``[n]``."""
    counts: npt.NDArray[np.int64]
    """How often each of them was found ``[n]``."""
    moments: tuple[float, float, float, float] | None = None
    """Mean, variance, skewness and kurtosis over all tokens, where the file says them."""
    max: float = 0.0
    min: float = 0.0
    labels: Sequence[Label] = ()


@dataclass(eq=False)
class Gathered:
    """The units of one layer."""

    kind: Kind
    location: str
    name: str
    provenance: dict[str, Any]
    settings: dict[str, Any]
    units: list[ForeignUnit] = field(default_factory=list)


class Gatherer:
    """Collects units of one or several layers and writes their stores.

    Args:
        source: where the files come from; the name of the text.
    """

    def __init__(self, source: str) -> None:
        self.source = source
        self._vocabulary: dict[str, int] = {}
        self._documents: list[npt.NDArray[np.int64]] = []
        self._starts: dict[bytes, int] = {}
        self._end = 0

    def start_of(self, tokens: Sequence[str]) -> int:
        """The corpus position of a text; it becomes a document where it is new."""
        known = self._vocabulary
        ids = np.array([known.setdefault(encodable(each), len(known)) for each in tokens], np.int64)
        key = ids.tobytes()
        if key not in self._starts:
            self._starts[key] = self._end
            self._documents.append(ids)
            self._end += len(ids)
        return self._starts[key]

    def write(
        self, folder: str | Path, layers: Sequence[Gathered], n_units: int | None = None
    ) -> list[Path]:
        """Write the stores of these layers into a folder, and return their paths.

        Args:
            folder: for the stores and their text.
            layers: the units, by layer.
            n_units: how many units a layer has; None: up to the highest number that is there.
        """
        collected = [self._collected(layer, n_units) for layer in layers]
        if not self._documents:
            raise InputError(f"{self.source}: there are no examples, so there is nothing to store.")
        place = files.local_path(folder)
        corpus = TokenCorpus.of(self._documents, self.source)
        pieces = [each.encode() for each in self._vocabulary]
        tokens = TokenStore.write(place / TOKENS_FOLDER, corpus, pieces, "strings of the source")
        paths = []
        for layer, found in zip(layers, collected, strict=True):
            path = place / f"{found.name.replace('/', '.')}{SUFFIX}"
            write_store(path, found, tokens, [each for unit in layer.units for each in unit.labels])
            paths.append(path)
        return paths

    def _collected(self, layer: Gathered, n_units: int | None) -> Collected:
        units = sorted(layer.units, key=lambda each: each.unit)
        numbers = [each.unit for each in units]
        if len(set(numbers)) < len(numbers):
            twice = next(a for a, b in itertools.pairwise(numbers) if a == b)
            raise InputError(f"{self.source}: unit {twice} of {layer.name} stands there twice.")
        size = max(numbers, default=-1) + 1 if n_units is None else n_units
        if numbers and numbers[-1] >= size:
            raise InputError(
                f"{self.source}: {layer.name} has units 0 to {size - 1}, found unit {numbers[-1]}."
            )
        return Collected(
            kind=layer.kind,
            location=layer.location,
            name=layer.name,
            signed=False,
            statistics=_statistics(units, size),
            examples=self._table(units, layer),
            coactivation=None,
            settings=layer.settings,
            provenance=layer.provenance,
        )

    def _table(self, units: Sequence[ForeignUnit], layer: Gathered) -> ExampleTable:
        rows = [
            (unit.unit, example, rank) for unit in units for example, rank in _ranked(unit.examples)
        ]
        n, width = len(rows), max((len(row[1].activations) for row in rows), default=1)
        if width > LONGEST:
            raise CheckpointError(
                f"{self.source}: an example of {layer.name} has {width} activations; a store holds at "
                f"most {LONGEST} for each example."
            )
        activations = np.zeros((n, width), np.float16)
        peak, value = np.zeros(n, np.uint16), np.zeros(n, np.float32)
        start, length = np.zeros(n, np.int64), np.zeros(n, np.uint16)
        for row, (_, example, _) in enumerate(rows):
            found = example.activations
            activations[row, : len(found)] = np.clip(found, -65504, 65504)
            peak[row] = _peak(example)
            value[row] = found[peak[row]]
            start[row], length[row] = self.start_of(example.tokens), len(example.tokens)
        ranks = np.array([rank for _, _, rank in rows], np.uint16)
        group = np.array([group_number(example.group) for _, example, _ in rows], np.uint8)
        by_value = group <= group_number("bottom")
        return ExampleTable(
            unit=np.array([unit for unit, _, _ in rows], np.int32),
            group=group,
            interval=np.array([example.interval for _, example, _ in rows], np.uint8),
            rank=ranks,
            start=start,
            length=length,
            peak=peak,
            value=value,
            activations=activations,
            # The order in the file stands for the keys, which foreign files do not have.
            key=np.where(by_value, value.astype(np.float64), ranks.astype(np.float64)),
        )


def _peak(example: ForeignExample) -> int:
    return int(np.argmax(example.activations)) if example.peak is None else example.peak


def _ranked(examples: Sequence[ForeignExample]) -> list[tuple[ForeignExample, int]]:
    """The examples of a unit in the order of a table, with their ranks; the top ones by their values."""

    def place(example: ForeignExample) -> tuple[int, int, float]:
        top = example.group == "top"
        number = group_number(example.group)
        return number, example.interval, -float(example.activations[_peak(example)]) if top else 0.0

    ordered = sorted(examples, key=place)
    ranked: list[tuple[ForeignExample, int]] = []
    for example in ordered:
        before = ranked[-1] if ranked else None
        same = before is not None and place(before[0])[:2] == place(example)[:2]
        ranked.append((example, before[1] + 1 if before is not None and same else 0))
    return ranked


def _statistics(units: Sequence[ForeignUnit], size: int) -> UnitStatistics:
    active, over_all = Moments.empty(size), Moments.empty(size)
    n_tokens = max((unit.n_tokens for unit in units), default=0)
    largest, smallest = np.zeros(size, np.float32), np.zeros(size, np.float32)
    histogram = np.zeros((size, N_BINS), np.uint32)
    for unit in units:
        at = unit.unit
        _set(active, at, _moments(unit.values, unit.counts))
        largest[at], smallest[at] = unit.max, unit.min
        bins = np.searchsorted(HISTOGRAM_EDGES, unit.values, side="right")
        histogram[at] = np.bincount(bins, unit.counts, N_BINS).astype(np.uint32)
    silent = active.with_zeros(n_tokens - active.count)
    for part in ("count", "mean", "m2", "m3", "m4"):
        getattr(over_all, part)[:] = getattr(silent, part)
    for unit in units:
        if unit.moments is not None:
            _set(over_all, unit.unit, _from_figures(max(n_tokens, 1), *unit.moments))
    last = np.full(size, -1, np.int64)  # foreign files do not say it
    return UnitStatistics(n_tokens, active, over_all, largest, smallest, last, histogram)


def _set(moments: Moments, unit: int, values: Sequence[float]) -> None:
    for part, value in zip(("count", "mean", "m2", "m3", "m4"), values, strict=True):
        getattr(moments, part)[unit] = value


def _moments(
    values: npt.NDArray[np.float64], counts: npt.NDArray[np.int64]
) -> tuple[float, float, float, float, float]:
    """Count, mean and central sums of values that were found several times."""
    n = int(counts.sum())
    if not n:
        return 0, 0.0, 0.0, 0.0, 0.0
    mean = float((values * counts).sum() / n)
    sums = [float((counts * (values - mean) ** power).sum()) for power in (2, 3, 4)]
    return n, mean, sums[0], sums[1], sums[2]


def _from_figures(
    n: int, mean: float, variance: float, skewness: float, kurtosis: float
) -> tuple[float, float, float, float, float]:
    """The central sums whose variance, skewness and kurtosis are these."""
    m2 = variance * n
    return n, mean, m2, skewness * m2**1.5 / n**0.5, kurtosis * m2**2 / n


def counted(values: npt.ArrayLike) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.int64]]:
    """The values above 0 and how often each was found."""
    found = np.asarray(values, np.float64)
    return np.unique(found[found > 0], return_counts=True)
