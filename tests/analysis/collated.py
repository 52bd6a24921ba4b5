"""Collation by brute force, in float64: every figure and example from a table of all activations.

``values[position, unit]`` is the activation of a unit at each token of a corpus.
"""

import math
from collections import defaultdict
from dataclasses import dataclass
from typing import Any

import numpy as np

from neuron_explainer.activations.corpus import TokenCorpus
from neuron_explainer.activations.windows import TokenWindows
from neuron_explainer.analysis.collation.coactivation import TogetherActive, sample_limit
from neuron_explainer.analysis.collation.config import CollateConfig
from neuron_explainer.analysis.collation.examples import Examples
from neuron_explainer.analysis.collation.findings import Findings
from neuron_explainer.analysis.collation.moments import Totals
from neuron_explainer.analysis.collation.places import Places, duplicates_of
from neuron_explainer.analysis.collation.seen import DenseSeen, Seen, SparseSeen
from neuron_explainer.analysis.records import (
    GROUPS,
    HISTOGRAM_EDGES,
    CoActivation,
    ExampleTable,
    UnitStatistics,
)

SEED = 12345
BOS = 99


def corpus_of(lengths: list[int], seed: int = 0, repeats: int = 0) -> TokenCorpus:
    """Documents of random tokens; the last ``repeats`` ones are copies of the first ones."""
    rng = np.random.default_rng(seed)
    documents = [rng.integers(0, 90, n).tolist() for n in lengths]
    for number in range(repeats):
        documents[-1 - number] = documents[number]
    if len(documents) > 1 and len(documents[1]) > 3:
        documents[1][2] = BOS  # a separator in the text
    return TokenCorpus.of(documents)


def random_values(n_tokens: int, n_units: int, seed: int = 0, coarse: bool = True) -> np.ndarray:
    """Mostly zeros; many equal values; a dead unit; a unit that is active everywhere."""
    rng = np.random.default_rng(seed)
    values = rng.gamma(1.0, 2.0, size=(n_tokens, n_units))
    if coarse:
        values = np.round(values)
    values[rng.random(values.shape) < 0.7] = 0
    values[:, 0] = 0
    if n_units > 1:
        values[:, 1] = rng.gamma(3.0, size=n_tokens) + 0.1
    return values.astype(np.float32)


def findings(
    n_units: int,
    config: CollateConfig,
    dense: bool,
    signed: bool,
    limit: float = 0.0,
) -> Findings:
    together = TogetherActive(n_units, limit, SEED) if limit else None
    return Findings(
        Totals(n_units, dense),
        Examples(n_units, config, SEED, signed, config.window, config.window),
        together,
    )


def see(places: Places, values: np.ndarray, dense: bool, signed: bool) -> Seen:
    x = np.where(places.position[:, None] >= 0, values[places.position], 7.0).astype(np.float32)
    if dense:
        return DenseSeen(places, x, signed)
    token, unit = np.nonzero(x if signed else x > 0)
    return SparseSeen(places, token, unit, x[token, unit], values.shape[1])


def collate(
    windows: TokenWindows,
    values: np.ndarray,
    config: CollateConfig,
    *,
    dense: bool = False,
    signed: bool = False,
    numbers: list[int] | None = None,
    n_parts: int = 1,
) -> Findings:
    """What the package finds, over some of the batches or all."""
    limit = (
        sample_limit(windows, config.coactivation_tokens, SEED) if config.coactivation_tokens else 0
    )
    found = findings(values.shape[1], config, dense, signed, limit)
    duplicates = duplicates_of(windows)
    n_batches = windows.batches_per_epoch
    for number in range(n_batches) if numbers is None else numbers:
        places = Places.of(windows.batch(number), duplicates, config.keep_bos)
        found.add(see(places, values, dense, signed), number * n_parts // n_batches)
    return found


# ---- brute force -----------------------------------------------------------------------------------


@dataclass
class Context:
    start: int
    length: int
    positions: list[int]
    """Corpus positions of the tokens that count."""


def contexts_of(windows: TokenWindows, keep_bos: bool) -> list[Context]:
    """All contexts in the order of the corpus, from the batches themselves."""
    found = []
    for number in range(windows.batches_per_epoch):
        batch = windows.batch(number)
        assert batch.corpus_position is not None
        for row in range(len(batch.tokens)):
            pieces: dict[int, list[tuple[int, bool]]] = defaultdict(list)
            for column in range(batch.tokens.shape[1]):
                position = int(batch.corpus_position[row, column])
                if position < 0:
                    continue
                assert int(batch.tokens[row, column]) == windows.corpus.tokens[position]
                is_bos = batch.bos is not None and bool(batch.bos[row, column])
                document = int(batch.document[row, column])
                pieces[document].append((position, keep_bos or not is_bos))
            for piece in pieces.values():
                start, end = piece[0][0], piece[-1][0] + 1
                assert [p for p, _ in piece] == list(range(start, end))
                found.append(Context(start, end - start, [p for p, counts in piece if counts]))
    return sorted(found, key=lambda context: context.start)


def added_tokens(windows: TokenWindows) -> int:
    """How many start tokens are added to the text."""
    total = 0
    for number in range(windows.batches_per_epoch):
        batch = windows.batch(number)
        assert batch.corpus_position is not None
        pads = 0 if batch.pad is None else int(batch.pad.sum())
        total += int((batch.corpus_position < 0).count_nonzero()) - pads
    return total


def mix(z: int) -> int:
    z = (z + 0x9E3779B97F4A7C15) % 2**64
    z = (z ^ z >> 30) * 0xBF58476D1CE4E5B9 % 2**64
    z = (z ^ z >> 27) * 0x94D049BB133111EB % 2**64
    return z ^ z >> 31


def u_of(seed: int, unit: int, position: int) -> float:
    return ((mix(mix(mix(seed) ^ unit) ^ position) >> 11) + 0.5) / 2**53


def f32(x: float) -> float:
    return float(np.float32(x))


@dataclass
class Peak:
    value: float
    position: int
    context: Context
    u: float


class BruteForce:
    """Everything about one unit."""

    def __init__(
        self,
        windows: TokenWindows,
        column: np.ndarray,
        unit: int,
        config: CollateConfig,
        signed: bool,
        seed: int = SEED,
    ) -> None:
        self.column, self.unit, self.config, self.signed = column, unit, config, signed
        self.seed = seed
        self.contexts = contexts_of(windows, config.keep_bos)
        seen: set[tuple[int, ...]] = set()
        self.fresh = []
        for context in self.contexts:
            end = context.start + context.length
            tokens = tuple(windows.corpus.tokens[context.start : end].tolist())
            if tokens not in seen:
                self.fresh.append(context)
            seen.add(tokens)
        self.extra = added_tokens(windows) if config.keep_bos else 0

    def active(self, value: float) -> bool:
        return value != 0 if self.signed else value > 0

    def statistics(self) -> dict[str, Any]:
        positions = [p for context in self.contexts for p in context.positions]
        x = np.array([float(self.column[p]) for p in positions] + [7.0] * self.extra)
        active = np.array([v for v in x if self.active(v)])
        last = max((p for p in positions if self.active(self.column[p])), default=-1)
        counts = np.zeros(len(HISTOGRAM_EDGES) + 1, int)
        for v in x[x > 0]:
            counts[np.searchsorted(HISTOGRAM_EDGES, v, side="right")] += 1
        return {
            "n_tokens": len(x),
            "active": central(active),
            "all": central(x),
            "max": x.max(),
            "min": x.min(),
            "last_active": last,
            "histogram": counts,
        }

    def peaks(self, lowest: bool = False) -> list[Peak]:
        sign = -1 if lowest else 1
        found = []
        for context in self.fresh:
            best = max(context.positions, key=lambda p: (sign * self.column[p], -p), default=None)
            if best is not None and sign * self.column[best] > 0:
                u = u_of(self.seed, self.unit, best)
                found.append(Peak(float(self.column[best]), best, context, u))
        return found

    def group(self, name: str) -> list[tuple[int, Peak, float]]:
        """(interval, peak, key) in order."""
        config, peaks = self.config, self.peaks()
        if name == "top":
            ordered = sorted(peaks, key=lambda p: (-p.value, p.position))[: config.top]
            return [(0, p, p.value) for p in ordered]
        if name == "bottom":
            if not self.signed:
                return []
            lowest = sorted(self.peaks(True), key=lambda p: (p.value, p.position))[: config.top]
            return [(0, p, p.value) for p in lowest]
        if name == "uniform":
            drawn = sorted(peaks, key=lambda p: (f32(p.u), p.position))[: config.uniform]
            return [(0, p, f32(p.u)) for p in drawn]
        if name == "weighted":
            keyed = [(f32(math.log(p.u) / p.value**config.weight_exponent), p) for p in peaks]
            keyed.sort(key=lambda pair: (-pair[0], pair[1].position))
            return [(0, p, key) for key, p in keyed[: config.weighted]]
        if name == "inactive":
            silent = []
            for context in self.fresh:
                if context.positions and not any(
                    self.active(self.column[p]) for p in context.positions
                ):
                    first = context.positions[0]
                    u = u_of(self.seed, self.unit, first)
                    silent.append(Peak(float(self.column[first]), first, context, u))
            silent.sort(key=lambda p: (f32(p.u), p.position))
            return [(0, p, f32(p.u)) for p in silent[: config.inactive]]
        return self.strata(peaks)

    def strata(self, peaks: list[Peak], apart: int = 10) -> list[tuple[int, Peak, float]]:
        """Bins of the histogram, the lowest ones together; members of an interval below its limit."""
        n, k = self.config.intervals, self.config.per_interval
        if not peaks or not n or not k:
            return []
        largest = max(p.value for p in peaks)

        def bin_of(value: float) -> int:
            return int(np.searchsorted(HISTOGRAM_EDGES, value, side="right"))

        def interval(value: float) -> int:
            return min(max(math.floor((1 - value / largest) * n), 0), n - 1)

        top = bin_of(largest)
        bins: dict[int, list[Peak]] = defaultdict(list)
        for p in peaks:
            bins[max(bin_of(p.value), top - apart)].append(p)
        limits = [math.inf] * n
        members = []
        for number, inside in bins.items():
            inside.sort(key=lambda p: (f32(p.u), p.position))
            members += inside[:k]
            if len(inside) < k:
                continue
            upper = (
                largest if number >= len(HISTOGRAM_EDGES) else min(HISTOGRAM_EDGES[number], largest)
            )
            lower = 0.0 if number == top - apart or number < 1 else HISTOGRAM_EDGES[number - 1]
            for i in range(interval(upper), interval(lower) + 1):
                limits[i] = min(limits[i], f32(inside[k - 1].u))
        others = [p for name in ("top", "uniform", "weighted") for _, p, _ in self.group(name)]
        found = []
        for i in range(n):
            drawn = [p for p in members if interval(p.value) == i and f32(p.u) <= limits[i]]
            drawn.sort(key=lambda p: (f32(p.u), p.position))
            # Places that are left go to others that are kept, by their keys.
            rest = {p.position: p for p in members + others if interval(p.value) == i}
            for p in drawn:
                del rest[p.position]
            drawn += sorted(rest.values(), key=lambda p: (f32(p.u), p.position))
            found += [(i, p, f32(p.u)) for p in drawn[:k]]
        return found

    def shown(self, peak: Peak) -> tuple[int, list[float]]:
        """Where the window begins, and its activations."""
        size, context = self.config.window, peak.context
        at = peak.position - context.start
        begin = max(min(at - size * 3 // 4, context.length - size), 0)
        end = min(begin + size, context.length)
        places = range(context.start + begin, context.start + end)
        counting = set(context.positions)
        values = [float(self.column[p]) if p in counting else 0.0 for p in places]
        if not self.signed and self.hide_below_zero:
            values = [max(v, 0.0) for v in values]
        return context.start + begin, values

    hide_below_zero = False


def central(x: np.ndarray) -> list[float]:
    if not len(x):
        return [0.0] * 5
    d = x - x.mean()
    return [len(x), x.mean(), *((d**p).sum() for p in (2, 3, 4))]


def check_statistics(found: UnitStatistics, unit: int, expected: dict[str, Any]) -> None:
    assert found.n_tokens == expected["n_tokens"]
    for kind in ("active", "all"):
        moments = getattr(found, kind)
        values = [getattr(moments, name)[unit] for name in ("count", "mean", "m2", "m3", "m4")]
        np.testing.assert_allclose(values, expected[kind], rtol=1e-9, atol=1e-7)
    assert found.max[unit] == expected["max"]
    assert found.min[unit] == expected["min"]
    assert found.last_active[unit] == expected["last_active"]
    assert found.histogram[unit].tolist() == expected["histogram"].tolist()


def check_examples(found: ExampleTable, unit: int, brute: BruteForce) -> None:
    own = found.of_unit(unit)
    for number, name in enumerate(GROUPS):
        some = own.rows(own.group == number)
        expected = brute.group(name)
        where = [(i, p.position, p.value) for i, p, _ in expected]
        got = zip(some.interval, some.start + some.peak, some.value, strict=True)
        assert [(int(i), int(p), float(v)) for i, p, v in got] == where, name
        np.testing.assert_allclose(some.key, [key for _, _, key in expected], rtol=1e-6)
        for row, (_, peak, _) in enumerate(expected):
            start, values = brute.shown(peak)
            assert (some.start[row], some.length[row]) == (start, len(values))
            padded = values + [0.0] * (some.activations.shape[1] - len(values))
            assert some.activations[row].tolist() == np.array(padded, np.float16).tolist()
        ranks = [list(g) for g in np.split(some.rank, np.flatnonzero(np.diff(some.interval)) + 1)]
        assert all(rank == list(range(len(rank))) for rank in ranks)


def check(
    found: Findings, windows: TokenWindows, values: np.ndarray, config: CollateConfig, **how
) -> None:
    """Everything that was found out against brute force."""
    statistics = found.totals.result()
    examples, _ = found.examples.result()
    check_units(statistics, examples, windows, values, config, **how)
    if found.together is not None:
        check_coactivation(found.together.result(config.partners), windows, values, config, **how)


def check_units(
    statistics: UnitStatistics,
    examples: ExampleTable,
    windows: TokenWindows,
    values: np.ndarray,
    config: CollateConfig,
    signed: bool = False,
    dense: bool = False,
    seed: int = SEED,
) -> None:
    """Figures and examples of every unit."""
    for unit in range(values.shape[1]):
        brute = BruteForce(windows, values[:, unit], unit, config, signed, seed)
        brute.hide_below_zero = not dense
        check_statistics(statistics, unit, brute.statistics())
        check_examples(examples, unit, brute)


def check_coactivation(
    found: CoActivation, windows: TokenWindows, values: np.ndarray, config: CollateConfig, **how
) -> None:
    contexts = contexts_of(windows, True)
    everything = [p for c in contexts for p in range(c.start, c.start + c.length)]
    everything.sort(key=lambda p: u_of(SEED + 1, 0, p))
    counted = {p for c in contexts_of(windows, config.keep_bos) for p in c.positions}
    sample = [p for p in everything[: config.coactivation_tokens] if p in counted]
    x = values[sample]
    active = (x != 0 if how.get("signed") else x > 0).astype(int)
    table = active.T @ active
    assert found.n_tokens == len(sample)
    assert found.count.tolist() == table.diagonal().tolist()
    for unit in range(values.shape[1]):
        others = [j for j in range(values.shape[1]) if j != unit and table[unit, j]]
        others.sort(key=lambda j: (-table[unit, j], j))
        others = others[: config.partners]
        n = len(others)
        assert found.partner[unit, :n].tolist() == others
        assert found.both[unit, :n].tolist() == [table[unit, j] for j in others]
        assert not found.both[unit, n:].any()
        assert (found.partner[unit, n:] == -1).all()
