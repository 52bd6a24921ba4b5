"""Stores of examples: how large they are, and how fast they open and give a unit's page.

The content is random: 40 examples of 64 tokens for each unit, in a text of 24,576 pieces of 128 tokens.
Latents are active on 16 of 64 tokens on average; neurons (GELU) have a value other than 0 at every token; of
heads, 32 tokens are shown, and half of the pairs have a value. Pages are read in random order from a warm
disk cache, and then drawn as HTML. Times are on the clock, but for the last three columns, which count what
the process itself computed: on a busy machine these say what an idle one would need.
"""

import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from neuron_explainer.activations.corpus import TokenCorpus
from neuron_explainer.analysis.records import Collected, Kind
from neuron_explainer.analysis.store import ExampleStore
from neuron_explainer.analysis.store_format import all_from_active, hashed_keys, write_store
from neuron_explainer.analysis.token_store import TokenStore
from tests.analysis.examples import VOCABULARY, make_coactivation, make_collected

GROUPS = {"top": 15, "stratum": 15, "uniform": 5, "weighted": 5}
CASES: list[tuple[Kind, str, int, int, float]] = [
    ("latent", "latents", 32_768, 64, 15 / 63),
    ("latent", "latents, 10 partners each", 32_768, 64, 15 / 63),
    ("neuron", "neurons", 3072, 64, 1.0),
    ("head", "heads (pairs of tokens)", 144, 32, 0.5),
]
_MADE = 4096
"""Units whose content is made up; of more units, these are repeated."""
_PIECES, _LENGTH = 24_576, 128


def run(quick: bool) -> str:
    """Measure and return a table."""
    rng = np.random.default_rng(0)
    tokens = rng.integers(0, len(VOCABULARY), _PIECES * _LENGTH).astype(np.uint16)
    starts = np.arange(_PIECES + 1) * _LENGTH
    corpus = TokenCorpus(tokens, starts, np.arange(_PIECES), "random")
    lines = [
        "| units | number | bytes a unit | GiB for 32,768 | write, s | open, ms | page, ms | p95, ms | "
        "page, ms of CPU | p95, ms of CPU | HTML, ms of CPU |",
        "|---|--:|--:|--:|--:|--:|--:|--:|--:|--:|--:|",
    ]
    with tempfile.TemporaryDirectory() as scratch:
        store = TokenStore.write(Path(scratch, "tokens"), corpus, VOCABULARY)
        for kind, name, n_units, window, density in CASES:
            n = min(n_units, 100) if quick else n_units
            path = Path(scratch, f"{len(lines)}.store")
            found = made_up(corpus, kind, min(n, _MADE), window, density, "partners" in name)
            found = repeated(found, n // len(found.statistics))
            start = time.perf_counter()
            write_store(path, found, store)
            seconds = time.perf_counter() - start
            lines.append(f"| {name} | {n:,} | {_measured(path, n, seconds, quick)} |")
    return "\n".join(lines)


def made_up(
    corpus: TokenCorpus, kind: Kind, n: int, window: int, density: float, partners: bool
) -> Collected:
    """Units with random examples."""
    return make_collected(
        corpus,
        n,
        kind=kind,
        window=window,
        density=density,
        sizes=GROUPS,
        settings={"key_seed": 1},
        coactivation=make_coactivation(n, 10) if partners else None,
        stratum_limits=np.full((n, 5), np.inf),
    )


def repeated(found: Collected, times: int) -> Collected:
    """The same units several times, with sampling keys and figures of their own.

    Figures that repeat would be smaller than those of a real store.
    """

    def tiled(table: Any) -> Any:
        arrays = {
            name: np.concatenate([value] * times)
            for name, value in vars(table).items()
            if isinstance(value, np.ndarray)
        }
        return replace(table, **arrays)

    n, examples = len(found.statistics), tiled(found.examples)
    shift = np.repeat(np.arange(times, dtype=np.int32) * n, len(found.examples))
    examples = replace(examples, unit=examples.unit + shift)
    rng, statistics = np.random.default_rng(2), tiled(found.statistics)
    active = tiled(statistics.active)
    parts = {name: getattr(active, name) for name in ("mean", "m2", "m3", "m4")}
    varied = {name: values * (0.5 + rng.random(n * times)) for name, values in parts.items()}
    active = replace(active, **varied)
    statistics = replace(
        statistics,
        active=active,
        all=all_from_active(active, statistics.n_tokens),
        max=statistics.max * (0.5 + rng.random(n * times, np.float32)),
        last_active=rng.integers(0, statistics.n_tokens, n * times),
    )
    together = found.coactivation
    return replace(
        found,
        statistics=statistics,
        examples=hashed_keys(examples, 1, n * times, found.kind == "head"),
        coactivation=None if together is None else tiled(together),
        stratum_limits=np.full((n * times, 5), np.inf),
    )


def _measured(path: Path, n: int, write_s: float, quick: bool) -> str:
    opening, reading = [], []
    for _ in range(3 if quick else 20):
        start = time.perf_counter()
        with ExampleStore(path):
            opening.append(time.perf_counter() - start)
    units = np.random.default_rng(1).integers(1, n, 20 if quick else 1000).tolist()
    with ExampleStore(path) as store:
        _ = store[0]  # figures of all units are read once
        for unit in units:
            start = time.perf_counter()
            _ = store[unit]
            reading.append(time.perf_counter() - start)
        computing = []
        for unit in units:
            begun = time.thread_time()
            _ = store[unit]
            computing.append(time.thread_time() - begun)
        records = [store[unit] for unit in units[:100]]
        read = time.process_time()
        for record in records:
            record._repr_html_()
        drawn = (time.process_time() - read) / len(records)
    size = path.stat().st_size / n
    median, p95 = np.quantile(reading, [0.5, 0.95]) * 1e3
    cpu, cpu_p95 = np.quantile(computing, [0.5, 0.95]) * 1e3
    return (
        f"{size:,.0f} | {size * 32_768 / 2**30:.4f} | {write_s:.1f} | {1e3 * np.median(opening):.1f} | "
        f"{median:.2f} | {p95:.2f} | {cpu:.2f} | {cpu_p95:.2f} | {1e3 * drawn:.1f}"
    )
