"""What is known about the units of a dictionary or a location, in memory: figures and examples.

A unit is a latent, a neuron, a channel of a vector, or an attention head. A token's *corpus position* is
its index in the flat token array of its corpus (``TokenCorpus.tokens``): it names the token whatever the
windows, batches and processes were. This module needs numpy only.

Shape legend: ``u`` units, ``e`` examples, ``p`` partners of a unit.
"""

from dataclasses import dataclass, fields, replace
from typing import Any, Literal, Self

import numpy as np
import numpy.typing as npt

from neuron_explainer.errors import InputError

Doubles = npt.NDArray[np.float64]
Floats = npt.NDArray[np.float32]
Ints = npt.NDArray[np.int64]
Kind = Literal["latent", "neuron", "channel", "head"]

HISTOGRAM_EDGES: Doubles = 2.0 ** (np.arange(-80, 81) / 4)
"""``[161]``: four bins an octave from 2**-20 to 2**20. Bin 0 of a histogram counts the values below the
first edge, bin ``i`` those from edge ``i - 1`` up to, without, edge ``i``, and the last bin all others."""
N_BINS = len(HISTOGRAM_EDGES) + 1

GROUPS = ("top", "bottom", "stratum", "uniform", "weighted", "inactive")
"""Groups of examples, in the order of their numbers in :attr:`ExampleTable.group`."""


@dataclass(frozen=True, eq=False)
class Moments:
    """Count, mean and central sums of the values of each unit.

    The variance is that of a population. Where it is 0, skewness and kurtosis are given as 0.
    """

    count: Ints
    """``[u]``"""
    mean: Doubles
    """``[u]``; 0 where there are no values."""
    m2: Doubles
    """``[u]``: the sum of ``(x - mean) ** 2``."""
    m3: Doubles
    """``[u]``: the sum of ``(x - mean) ** 3``."""
    m4: Doubles
    """``[u]``: the sum of ``(x - mean) ** 4``."""

    @classmethod
    def empty(cls, n_units: int) -> Self:
        """The moments of no values."""
        return cls(np.zeros(n_units, np.int64), *(np.zeros(n_units) for _ in range(4)))

    @property
    def variance(self) -> Doubles:
        """``[u]``"""
        return _ratio(self.m2, self.count)

    @property
    def skewness(self) -> Doubles:
        """``[u]``"""
        with np.errstate(over="ignore", under="ignore"):
            return _ratio(np.sqrt(self.count) * self.m3, self.m2**1.5)

    @property
    def kurtosis(self) -> Doubles:
        """``[u]``: 3 for a normal distribution."""
        with np.errstate(over="ignore", under="ignore"):
            return _ratio(self.count * self.m4, self.m2**2)

    def merge(self, other: "Moments") -> "Moments":
        """The moments of the values of both, by Pébay's formulas (Sandia report SAND2008-6212).

        The order matters in the last bits: merge what comes first in the corpus with what follows.
        """
        n_a, n_b = self.count.astype(np.float64), other.count.astype(np.float64)
        n = n_a + n_b
        safe = np.maximum(n, 1)
        d = other.mean - self.mean
        d_n = d / safe
        product = n_a * n_b
        m2 = self.m2 + other.m2 + d * d_n * product
        m3 = (
            self.m3
            + other.m3
            + d * d_n**2 * product * (n_a - n_b)
            + 3 * d_n * (n_a * other.m2 - n_b * self.m2)
        )
        m4 = (
            self.m4
            + other.m4
            + d * d_n**3 * product * (n_a**2 - product + n_b**2)
            + 6 * d_n**2 * (n_a**2 * other.m2 + n_b**2 * self.m2)
            + 4 * d_n * (n_a * other.m3 - n_b * self.m3)
        )
        # With no values on one side the mean is the other's to the last bit.
        mean = np.where(self.count == 0, other.mean, self.mean + d_n * n_b)
        return Moments(self.count + other.count, mean, m2, m3, m4)

    def with_zeros(self, n: int | Ints) -> "Moments":
        """The moments of the same values and ``n`` zeros more, ``n`` for each unit or for all."""
        zeros = Moments.empty(len(self.count))
        return self.merge(replace(zeros, count=zeros.count + n))


def _ratio(a: npt.NDArray[Any], b: npt.NDArray[Any]) -> Doubles:
    """``a / b``, and 0 where ``b`` is 0."""
    out: Doubles = np.divide(a, b, out=np.zeros(np.shape(a)), where=b != 0)
    return out


@dataclass(frozen=True, eq=False)
class UnitStatistics:
    """Figures of each unit over all tokens looked at, duplicates included.

    A unit is active where its value is above 0; a signed unit, where its value is not 0. For heads, pairs
    of tokens stand in the place of tokens.
    """

    n_tokens: int
    """Number of tokens looked at: the same for all units."""
    active: Moments
    """Over the tokens where the unit is active."""
    all: Moments
    """Over all tokens."""
    max: Floats
    """``[u]``: the largest value over all tokens."""
    min: Floats
    """``[u]``: the smallest value over all tokens."""
    last_active: Ints
    """``[u]``: corpus position of the last token where the unit is active; -1 if there is none."""
    histogram: npt.NDArray[np.uint32]
    """``[u, N_BINS]``: how many values above 0 lie in each bin of :data:`HISTOGRAM_EDGES`."""

    def __len__(self) -> int:
        return len(self.max)

    @property
    def density(self) -> Doubles:
        """``[u]``: the share of tokens where the unit is active."""
        return self.active.count / max(self.n_tokens, 1)


@dataclass(frozen=True, eq=False)
class ExampleTable:
    """Examples of all units, sorted by (unit, group, interval, rank).

    A context is a piece of one document that stood in one row of a batch. A unit has at most one example
    of a group from a context. Its peak is the largest value there (the smallest one for "bottom"), at the
    first position that has it. The tokens shown are part of the context.

    For heads a value belongs to a pair of tokens, the query and a key at or before it. The activations of
    an example are the lower triangle of its tokens, one query after the other: query ``i`` and key ``j``
    stand at ``i * (i + 1) / 2 + j``.
    """

    unit: npt.NDArray[np.int32]
    """``[e]``"""
    group: npt.NDArray[np.uint8]
    """``[e]``: index in :data:`GROUPS`."""
    interval: npt.NDArray[np.uint8]
    """``[e]``: the number of the stratum, 0 for the one of the largest values; 0 in other groups."""
    rank: npt.NDArray[np.uint16]
    """``[e]``: from 0. Groups "top" and "bottom" begin with the most extreme value, "weighted" with the
    largest key, all others with the smallest key. Of equals, the one that comes first in the corpus."""
    start: Ints
    """``[e]``: corpus position of the first token shown."""
    length: npt.NDArray[np.uint16]
    """``[e]``: number of tokens shown."""
    peak: npt.NDArray[np.uint16]
    """``[e]``: index of the peak in the activations: the place of its token among those shown, or of
    its pair in the triangle."""
    value: Floats
    """``[e]``: the activation at the peak, exact."""
    activations: npt.NDArray[np.float16]
    """``[e, w]``: of the tokens shown, 0 after their end. ``w`` is the most tokens shown, or for heads
    the number of pairs of these."""
    key: Doubles
    """``[e]``: the sampling key; the value in the groups "top" and "bottom"."""

    def __len__(self) -> int:
        return len(self.unit)

    def rows(self, which: Any) -> "ExampleTable":
        """The table of some of the examples; ``which`` is an index array, a mask or a slice."""
        return ExampleTable(
            **{field.name: getattr(self, field.name)[which] for field in fields(self)}
        )

    def of_unit(self, unit: int, group: str | None = None) -> "ExampleTable":
        """The examples of a unit, of all groups or of one."""
        begin, end = np.searchsorted(self.unit, [unit, unit + 1])
        found = self.rows(slice(begin, end))
        return found if group is None else found.rows(found.group == group_number(group))

    @classmethod
    def concatenate(cls, tables: "list[ExampleTable]") -> Self:
        """One table of all examples, sorted."""
        columns = {
            field.name: np.concatenate([getattr(table, field.name) for table in tables])
            for field in fields(cls)
        }
        order = np.lexsort([columns[name] for name in ("rank", "interval", "group", "unit")])
        return cls(**{name: column[order] for name, column in columns.items()})


def group_number(group: str) -> int:
    """The number of a group; an error that lists the groups if there is none of this name."""
    if group not in GROUPS:
        raise InputError(f"unknown group {group!r}; the groups are {', '.join(GROUPS)}.")
    return GROUPS.index(group)


@dataclass(frozen=True, eq=False)
class CoActivation:
    """Which units are active together, counted exactly on a sample of tokens.

    A unit's partners are the units that were active on the largest number of tokens with it; of equals,
    the lowest numbers.
    """

    n_tokens: int
    """Number of tokens in the sample."""
    count: Ints
    """``[u]``: on how many of them each unit is active."""
    partner: npt.NDArray[np.int32]
    """``[u, p]``: the partners, those with the most tokens first; -1 where there are no more."""
    both: Ints
    """``[u, p]``: on how many tokens the unit and its partner are active; 0 where there is no partner."""

    @property
    def jaccard(self) -> Doubles:
        """``[u, p]``: tokens with both, divided by tokens with at least one of the two."""
        own, other, both = self._counts
        return _ratio(both, own + other - both)

    @property
    def pmi(self) -> Doubles:
        """``[u, p]``: ``ln(n · n_ij / (n_i · n_j))``; 0 where there is no partner."""
        own, other, both = self._counts
        ratio = _ratio(self.n_tokens * both, own * other)
        return np.log(ratio, out=np.zeros_like(ratio), where=ratio > 0)

    @property
    def phi(self) -> Doubles:
        """``[u, p]``: the correlation of "active" of the two; 0 where one of them is always active."""
        own, other, both = self._counts
        n = float(self.n_tokens)
        spread = np.sqrt(own * (n - own)) * np.sqrt(other * (n - other))
        return np.where(self.partner >= 0, _ratio(n * both - own * other, spread), 0.0)

    @property
    def _counts(self) -> tuple[Doubles, Doubles, Doubles]:
        count = self.count.astype(np.float64)
        return (
            np.broadcast_to(count[:, None], self.partner.shape),
            np.where(self.partner >= 0, count[self.partner], 0.0),
            self.both.astype(np.float64),
        )


@dataclass(frozen=True, eq=False)
class Collected:
    """All that a collation found out about the units of one dictionary or location."""

    kind: Kind
    location: str
    """Such as ``"2/mlp.post_act"``; for a dictionary, where its inputs come from."""
    name: str
    """The name of the dictionary, or the location."""
    signed: bool
    """Whether units are active at values below 0 too."""
    statistics: UnitStatistics
    examples: ExampleTable
    coactivation: CoActivation | None
    settings: dict[str, Any]
    """Everything that decides the result, as JSON values."""
    provenance: dict[str, Any]
    """Names and hashes of model, dictionary and corpus, and versions, as JSON values."""
    stratum_limits: Doubles | None = None
    """``[u, intervals]``: the group "stratum" has every context of the interval whose key is at most this
    (inf: every context). Two collations can be merged exactly because of it. An example whose key is above
    the limit is not of this sample: it fills the interval up. None if the limits are not known."""

    @property
    def n_units(self) -> int:
        """Number of units."""
        return len(self.statistics)

    @property
    def dead(self) -> Ints:
        """The units that were never active."""
        return np.flatnonzero(self.statistics.active.count == 0)

    def dense(self, density: float = 0.1) -> Ints:
        """The units that are active on at least this share of tokens."""
        return np.flatnonzero(self.statistics.density >= density)

    def density_histogram(self) -> tuple[Ints, Doubles]:
        """How many of the units that are not dead have which density.

        Returns:
            counts ``[40]``, and the edges ``[41]`` of the bins: four a decade from 1e-10 to 1.
        """
        edges = 10.0 ** (np.arange(-40, 1) / 4)
        density = self.statistics.density
        counts = np.histogram(density[density > 0], np.append(edges[:-1], 1.0))[0]
        return counts.astype(np.int64), edges
