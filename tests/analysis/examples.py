"""Collections of made-up examples, as a collation finds them."""

from typing import Any

import numpy as np
import numpy.typing as npt

from neuron_explainer.activations.corpus import TokenCorpus
from neuron_explainer.analysis.records import (
    GROUPS,
    N_BINS,
    CoActivation,
    Collected,
    ExampleTable,
    Kind,
    Moments,
    UnitStatistics,
)

VOCABULARY = [
    b" the",
    b" king",
    b"\n",
    b" ",
    b"s",
    "\u2603".encode()[:2],
    "\u2603".encode()[2:],
    b"\x1b[2J",
]
N_TOKENS = 4000
GROUP_SIZES = {"top": 4, "stratum": 6, "uniform": 3, "weighted": 3}


def make_corpus(n_tokens: int = N_TOKENS, n_documents: int = 9, seed: int = 0) -> TokenCorpus:
    """Random tokens in documents of different lengths."""
    rng = np.random.default_rng(seed)
    tokens = rng.integers(0, len(VOCABULARY), n_tokens).tolist()
    cuts = np.sort(rng.choice(np.arange(1, n_tokens), n_documents - 1, replace=False))
    documents = [tokens[a:b] for a, b in zip([0, *cuts], [*cuts, n_tokens], strict=True)]
    return TokenCorpus.of(documents, "made-up text")


def make_collected(
    corpus: TokenCorpus,
    n_units: int = 5,
    *,
    kind: Kind = "latent",
    window: int = 16,
    density: float = 0.25,
    sizes: dict[str, int] = GROUP_SIZES,
    signed: bool = False,
    seed: int = 0,
    **more: Any,
) -> Collected:
    """Units whose figures and examples are random; unit 0 is dead if there are several."""
    rng = np.random.default_rng(seed)
    dead = 1 if n_units > 1 else 0
    count = rng.integers(1, min(500, len(corpus.tokens)), n_units)
    count[:dead] = 0
    active = count > 0
    mean = np.where(active, rng.exponential(2.0, n_units) + 0.1, 0.0)
    m2, m3, m4 = (np.where(active, rng.exponential(2.0, n_units), 0.0) for _ in range(3))
    moments = Moments(count.astype(np.int64), mean, m2, m3, m4)
    examples = _examples(corpus, n_units, dead, kind, window, density, sizes, signed, rng)
    histogram = np.zeros((n_units, N_BINS), np.uint32)
    histogram[dead:, 70:100] = rng.integers(0, 1000, (n_units - dead, 30))
    n_all = len(corpus.tokens)
    largest = np.zeros(n_units, np.float32)
    np.maximum.at(largest, examples.unit, examples.value)
    statistics = UnitStatistics(
        n_tokens=n_all,
        active=moments,
        all=moments.with_zeros(n_all - moments.count),
        max=largest,
        min=np.where(active & signed, -largest, 0).astype(np.float32),
        last_active=np.where(active, rng.integers(0, n_all, n_units), -1),
        histogram=histogram,
    )
    facts: dict[str, Any] = {
        "location": "2/resid.torso.delta_mlp",
        "name": "made-up",
        "coactivation": None,
        "settings": {"seed": seed, "window": window},
        "provenance": {"model": "none", "autoencoder_sha256": f"{seed:064x}"},
    }
    return Collected(
        kind=kind, signed=signed, statistics=statistics, examples=examples, **(facts | more)
    )


def _examples(
    corpus: TokenCorpus,
    n_units: int,
    dead: int,
    kind: Kind,
    window: int,
    density: float,
    sizes: dict[str, int],
    signed: bool,
    rng: np.random.Generator,
) -> ExampleTable:
    group, interval, rank = _places(sizes)
    n = len(group) * (n_units - dead)
    unit = np.repeat(np.arange(dead, n_units), len(group))
    lengths = np.diff(corpus.starts)
    document = rng.integers(0, len(lengths), n)
    length = np.minimum(window, lengths[document])
    start = corpus.starts[document] + (rng.random(n) * (lengths[document] - length + 1)).astype(int)
    size = length * (length + 1) // 2 if kind == "head" else length
    width = window * (window + 1) // 2 if kind == "head" else window
    peak = (rng.random(n) * size).astype(np.int64)
    value = (rng.exponential(2.0, n) + 0.05).astype(np.float32)
    activations = (rng.exponential(2.0, (n, width)) * value[:, None] / 20).astype(np.float16)
    if signed:
        activations *= rng.choice(np.array([-1, 1], np.float16), activations.shape)
    activations[rng.random((n, width)) >= density] = 0
    activations[np.arange(width) >= size[:, None]] = 0
    activations[np.arange(n), peak] = value
    sampled = np.tile(group, n_units - dead) >= GROUPS.index("stratum")
    return ExampleTable(
        unit=unit.astype(np.int32),
        group=np.tile(group, n_units - dead),
        interval=np.tile(interval, n_units - dead),
        rank=np.tile(rank, n_units - dead),
        start=start,
        length=length.astype(np.uint16),
        peak=peak.astype(np.uint16),
        value=value,
        activations=activations,
        key=np.where(sampled, rng.random(n).astype(np.float32), value).astype(np.float64),
    )


def _places(sizes: dict[str, int]) -> tuple[npt.NDArray[Any], ...]:
    """Group, interval and rank of the examples of one unit; a stratum has intervals of three."""
    rows = []
    for group, size in sorted(sizes.items(), key=lambda item: GROUPS.index(item[0])):
        for i in range(size):
            interval, rank = divmod(i, 3) if group == "stratum" else (0, i)
            rows.append((GROUPS.index(group), interval, rank))
    group_column, interval_column, rank_column = np.array(rows).reshape(-1, 3).T
    return (
        group_column.astype(np.uint8),
        interval_column.astype(np.uint8),
        rank_column.astype(np.uint16),
    )


def make_coactivation(n_units: int, partners: int = 3, seed: int = 0) -> CoActivation:
    """Random partners."""
    rng = np.random.default_rng(seed)
    count = rng.integers(50, 100, n_units)
    partner = np.full((n_units, partners), -1, np.int32)
    both = np.zeros((n_units, partners), np.int64)
    for unit in range(n_units):
        others = rng.permutation(np.delete(np.arange(n_units), unit))[:partners]
        partner[unit, : len(others)] = others
        both[unit, : len(others)] = np.sort(rng.integers(1, 50, len(others)))[::-1]
    return CoActivation(1000, count, partner, both)
