"""The pages and their server: how soon they are there, what they weigh, and what the server bears.

Three tables: the server, the pages in a browser (:mod:`benchmarks.viewer_pages`), and the model behind them
(:mod:`benchmarks.viewer_compute`). The rows of the server are measured over HTTP on this machine, client and
server sharing its cores; the server is a process of its own. Stores: those of ``tiny-tales``; one of 32,768
latents with 40 random examples of 64 tokens each; 36 of 32,768 latents whose labels have nine words drawn by
Zipf's law from 20,000, 1,179,648 labels in all.
"""

import http.client
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
import venv
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from urllib.parse import quote

import numpy as np

from benchmarks import viewer_compute, viewer_pages
from benchmarks.store import GROUPS, made_up, repeated
from benchmarks.viewer_load import load
from neuron_explainer.activations.corpus import TokenCorpus
from neuron_explainer.analysis.store import ExampleStore
from neuron_explainer.analysis.store_format import Label, write_store
from neuron_explainer.analysis.token_store import TokenStore
from neuron_explainer.analysis.workspace import DATA_VARIABLE
from tests.analysis.examples import VOCABULARY, make_collected

API = "/api/v1"
N_UNITS, N_STORES, N_WORDS = 32_768, 36, 20_000
FIRST = "/dictionaries/ae-resid-delta-mlp.2/features/5"
WHEELS_VARIABLE = "NEURON_EXPLAINER_WHEELS"
"""A folder with the wheels of the extra ``serve``, as ``pip download`` writes it."""
_MADE = 4096
_KINDS_OF_STORES = 3  # with labels of their own; the others are copies


class Client:
    """A connection that is kept."""

    def __init__(self, address: str, token: str) -> None:
        self.connection = http.client.HTTPConnection(address, timeout=60)
        self.headers = {"Authorization": f"Bearer {token}", "Accept-Encoding": "gzip"}

    def get(self, path: str) -> tuple[int, bytes]:
        """Status and body, as it was sent."""
        self.connection.request("GET", API + path, headers=self.headers)
        reply = self.connection.getresponse()
        return reply.status, reply.read()


@contextmanager
def serving(
    *stores: Path, data: Path, python: str = sys.executable, model: bool = False
) -> Iterator[tuple[subprocess.Popen[str], str, str, float]]:
    """A server, by default without its model: the process, its address, its token, and the seconds it took
    to answer."""
    options = [part for store in stores for part in ("--store", str(store))]
    # With little to keep, memory that grows is memory that is lost.
    options += ["--cache", "0.03"] if model else ["--no-model"]
    command = [python, "-m", "neuron_explainer", "serve", "--port", "0"]
    environment = {**os.environ, DATA_VARIABLE: str(data)}
    elsewhere = python != sys.executable  # what is installed there is to run, not this checkout
    if elsewhere:
        environment.pop("PYTHONPATH", None)
    begin = time.perf_counter()
    process = subprocess.Popen(
        [*command, *options],
        stdout=subprocess.PIPE,
        text=True,
        env=environment,
        cwd=data if elsewhere else None,
    )
    try:
        assert process.stdout is not None
        text = "".join(process.stdout.readline() for _ in range(3))
        match = re.search(r"http://(\S+?)/\?token=(\S+)", text)
        assert match, text
        Client(match[1], match[2]).get("/health")
        yield process, match[1], match[2], time.perf_counter() - begin
    finally:
        process.kill()
        process.communicate()


def timed(client: Client, process: subprocess.Popen[str], paths: Sequence[str]) -> tuple[str, str]:
    """Median and 95th percentile of the milliseconds, the server's own, and the bytes of the median reply."""
    seconds, sizes = [], []
    for path in paths[:20]:
        client.get(path)  # figures of all units are read once
    begun = computed(process.pid)
    for path in paths:
        begin = time.perf_counter()
        status, body = client.get(path)
        seconds.append(time.perf_counter() - begin)
        assert status == 200, (path, body)
        sizes.append(len(body))
    p50, p95 = 1e3 * np.quantile(seconds, [0.5, 0.95])
    own = 1e3 * (computed(process.pid) - begun) / len(paths)
    return f"{p50:.1f} | {p95:.1f} | {own:.1f}", f"{np.median(sizes):,.0f} bytes gz"


def computed(pid: int) -> float:
    """Seconds that the processor has worked for a process."""
    path = Path(f"/proc/{pid}/stat")
    if not path.exists():
        return float("nan")
    parts = path.read_text().rpartition(")")[2].split()
    return (int(parts[11]) + int(parts[12])) / os.sysconf("SC_CLK_TCK")


def tables(quick: bool) -> Iterator[str]:
    """Measure; three tables, each as soon as it is there."""
    lines = [
        "| what | p50, ms | p95, ms | CPU of the server, ms | remark | goal: p95, ms |",
        "|---|--:|--:|--:|---|---|",
    ]
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        large = _large(folder / "large", 200 if quick else N_UNITS)
        yield f"### the pages\n\n{viewer_pages.run(folder, large, quick)}\n"
        lines += _ready(folder, 1 if quick else 5)
        lines += _pages(folder, large, 20 if quick else 1000)
        lines += _searches(folder, 200 if quick else N_UNITS, 2 if quick else N_STORES)
        lines += _load(folder, 1.0 if quick else 60.0)
        lines.append(_installed(folder))
    yield "\n".join(["### the server", "", *lines, ""])
    yield f"### the model\n\n{viewer_compute.run(quick)}"


def _large(folder: Path, n: int) -> Path:
    """The folder of a store of latents with 40 random examples of 64 tokens each."""
    rng = np.random.default_rng(0)
    tokens = rng.integers(0, len(VOCABULARY), 24_576 * 128).astype(np.uint16)
    corpus = TokenCorpus(tokens, np.arange(24_577) * 128, np.arange(24_576), "random")
    place = TokenStore.write(folder / "tokens", corpus, VOCABULARY)
    found = made_up(corpus, "latent", min(n, _MADE), 64, 15 / 63, True)
    write_store(folder / "large.store", repeated(found, n // len(found.statistics)), place)
    return folder


def _ready(folder: Path, rounds: int) -> list[str]:
    ready, first = [], []
    for _ in range(rounds):
        begin = time.perf_counter()
        with serving(Path("tiny-tales"), data=folder) as (_, address, token, seconds):
            status, _ = Client(address, token).get(FIRST)
            assert status == 200
            first.append(time.perf_counter() - begin)
            ready.append(seconds)
    return [
        f"| {what}, tiny-tales | {1e3 * np.median(values):.0f} | {1e3 * max(values):.0f} | | "
        f"of {rounds} starts; the second figure is the slowest | {goal} |"
        for what, values, goal in (
            ("process started to first answer", ready, "2,000"),
            ("process started to first unit", first, ""),
        )
    ]


def _pages(folder: Path, large: Path, requests: int) -> list[str]:
    rng = np.random.default_rng(0)
    with ExampleStore.open(large) as store:
        n = len(store)
    units = rng.integers(1, n, requests).tolist()
    lines = []
    with serving(large, Path("tiny-tales"), data=folder) as (process, address, token, _):
        client = Client(address, token)
        of_large = [f"/dictionaries/large/features/{unit}" for unit in units]
        of_tiny = [f"/dictionaries/ae-resid-delta-mlp.2/features/{u % 2560}" for u in units]
        table = "/dictionaries/large/features?limit=50&sort="
        tables = [
            f"{table}{name}&density_min={10**-k}&alive=true"
            for name in ("density", "max", "kurtosis", "unit")
            for k in range(2, 7)
        ]
        for what, paths, goal in (
            ("a unit, tiny-tales", of_tiny, "25; 25 kB"),
            (f"a unit, {sum(GROUPS.values())} examples of 64 tokens", of_large, "25; 25 kB"),
            (f"table: sorted and filtered, of {n:,}", tables * (1 if quick_of(n) else 5), "40"),
            ("/model, 17 dictionaries", ["/model"] * 20, "10"),
            ("/health", ["/health"] * 50, "5"),
        ):
            times, size = timed(client, process, paths)
            lines.append(f"| {what} | {times} | {size} | {goal} |")
    return lines


def quick_of(n: int) -> bool:
    """Whether this is a run that shows only that it runs."""
    return n < _MADE


def _searches(folder: Path, n: int, n_stores: int) -> list[str]:
    rng = np.random.default_rng(1)
    letters = np.array(list("etaoinshrdlucmfwygpbvkxqjz"))
    words = ["".join(rng.choice(letters, rng.integers(3, 10))) for _ in range(N_WORDS)]
    share = 1 / np.arange(1, N_WORDS + 1)
    share /= share.sum()
    place = _labelled(folder / "labels", n, n_stores, words, share, rng)

    def drawn(count: int) -> list[str]:
        return [" ".join(words[i] for i in rng.choice(N_WORDS, count, p=share)) for _ in range(200)]

    kinds: dict[str, list[str]] = {
        "two words": drawn(2),
        "one word": drawn(1),
        "the ten commonest words": words[:10],
        "a rare word": [words[i] for i in rng.integers(1000, N_WORDS, 200)],
        "the first three letters": [words[i][:3] for i in rng.choice(N_WORDS, 100, p=share)],
    }
    lines = []
    with serving(place, data=folder) as (process, address, token, seconds):
        client = Client(address, token)
        for kind, texts in kinds.items():
            times, _ = timed(client, process, [f"/search?q={quote(text)}" for text in texts])
            what = f"search {n * n_stores:,} labels: {kind}"
            lines.append(f"| {what} | {times} | {n_stores} stores | 30 |")
        lines.append(
            f"| process started to first answer, {n_stores} stores | {1e3 * seconds:.0f} | | | | 2,000 |"
        )
    return lines


def _labelled(
    folder: Path,
    n: int,
    n_stores: int,
    words: list[str],
    share: np.ndarray,
    rng: np.random.Generator,
) -> Path:
    tokens = rng.integers(0, len(VOCABULARY), 12_800).astype(np.uint16)
    corpus = TokenCorpus(tokens, np.arange(101) * 128, np.arange(100), "random")
    place = TokenStore.write(folder / "tokens", corpus, VOCABULARY)
    for number in range(n_stores):
        path = folder / f"{number}.store"
        if number >= _KINDS_OF_STORES:
            shutil.copy(folder / f"{number % _KINDS_OF_STORES}.store", path)
            continue
        drawn = rng.choice(len(words), (n, 9), p=share)
        labels = [
            Label(unit, " ".join(words[i] for i in row), "made up", 0.5)
            for unit, row in enumerate(drawn.tolist())
        ]
        found = make_collected(corpus, n, sizes={"top": 1}, window=8, name=f"labelled/{number}")
        write_store(path, found, place, labels)
    return folder


def _load(folder: Path, seconds: float) -> list[str]:
    with serving(Path("tiny-tales"), data=folder, model=True) as (process, address, token, _):
        return load(address, token, process.pid, seconds)


def _installed(folder: Path) -> str:
    """From ``pip install`` without a network to the first unit, if there is a folder of wheels."""
    what = "pip install, without a network, to the first unit"
    wheels = os.environ.get(WHEELS_VARIABLE)
    if not wheels:
        return (
            f"| {what} | | | | not measured: {WHEELS_VARIABLE} names no folder of wheels | 60,000 |"
        )
    place = folder / "installed"
    venv.create(place, with_pip=True)
    python = str(place / "bin" / "python")
    pip = [python, "-m", "pip", "install", "--quiet", "--no-index", "--find-links", wheels]
    begin = time.perf_counter()
    subprocess.run([*pip, f"{Path(__file__).parents[1]}[serve]"], check=True)
    with serving(Path("tiny-tales"), data=folder, python=python) as (_, address, token, _):
        status, _ = Client(address, token).get(FIRST)
        assert status == 200
    seconds = time.perf_counter() - begin
    return f"| {what} | {1e3 * seconds:,.0f} | | | in an empty environment | 60,000 |"
