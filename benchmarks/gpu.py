"""One command for a machine with a GPU: the ``gpu`` tests, then tables of speed, into one JSON file.

    python -m benchmarks gpu --out gpu.json

At most eight minutes: the tests get four, each table stops after its share of the rest. Every line has
the same work as one of the CPU tables (``forward``, ``sample``, ``encode``, ``train_step``) and stands
beside its floor: the matrix products of that work alone, in the same dtype, in the same run. Times are
medians of calls that wait for the device.
"""

import contextlib
import itertools
import json
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.harness import ROOT, provenance
from benchmarks.workloads import BATCH, PROMPT, Setup
from neuron_explainer.dictionaries import (
    BatchTopKConfig,
    ObjectiveConfig,
    ReLUConfig,
    StepReport,
    TopKConfig,
    TrainConfig,
    train,
)
from neuron_explainer.models.autoencoder import Autoencoder, TopK
from neuron_explainer.models.transformer import Transformer

TEST_SECONDS = 240
TABLE_SECONDS = 50
"""For each of the four tables."""
Work = Callable[[], object]
_DTYPES = (torch.float32, torch.bfloat16)


@dataclass
class Line:
    """One measurement."""

    table: str
    work: str
    median_ms: float
    min_ms: float
    max_ms: float
    calls: int
    floor_ms: float
    ratio: float
    """Median over floor."""
    peak_mib: float
    """Most memory of the device in use during the calls, beyond what was in use before."""


@dataclass
class Clock:
    """Calls timed on one device, for at most so many seconds each."""

    device: torch.device
    seconds: float
    most_calls: int

    def wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def times(self, work: Work) -> list[float]:
        """Milliseconds of each call after two that are not counted."""
        end, found = time.perf_counter() + self.seconds, []
        for call in range(self.most_calls + 2):
            self.wait()
            start = time.perf_counter()
            work()
            self.wait()
            if call >= 2:
                found.append(1e3 * (time.perf_counter() - start))
            if found and time.perf_counter() > end:
                break
        return found

    def line(self, table: str, name: str, work: Work, floor: Work) -> Line:
        """A measurement of ``work`` beside ``floor``."""
        return self.compared(table, name, partial(self.times, work), floor)

    def compared(
        self, table: str, name: str, measure: Callable[[], list[float]], floor: Work
    ) -> Line:
        """The same for what ``measure`` times in its own way."""
        floor_ms = statistics.median(self.times(floor))
        before = self._memory(reset=True)
        found = measure()
        median = statistics.median(found)
        peak = (self._memory() - before) / 2**20
        figures = (min(found), max(found), len(found), floor_ms, median / floor_ms, peak)
        return Line(table, name, median, *figures)

    def _memory(self, reset: bool = False) -> int:
        if self.device.type != "cuda":
            return 0
        if reset:
            torch.cuda.reset_peak_memory_stats(self.device)
            return torch.cuda.memory_allocated(self.device)
        return torch.cuda.max_memory_allocated(self.device)


def run(out: Path, quick: bool = False, device: str = "cuda") -> int:
    """Run the tests and the tables and write ``out``; 1 without a device or if a test fails."""
    if device == "cuda" and not torch.cuda.is_available():
        print(
            f"There is no CUDA device here (torch {torch.__version__}): nothing was tested or measured, "
            f"{out} was not written. On a machine with a GPU install the CUDA build of torch first."
        )
        return 1
    where, began = (
        torch.device(device, 0) if device == "cuda" else torch.device(device),
        time.monotonic(),
    )
    found: dict[str, Any] = {"machine": machine(where), "provenance": provenance()}
    found["tests"] = tests(where, quick)
    found["tables"] = [vars(line) for line in tables(where, quick)]
    found["seconds"] = round(time.monotonic() - began, 1)
    out.write_text(json.dumps(found, indent=1) + "\n")
    print(f"tests: {found['tests']['summary']}\n\n{markdown(found['tables'])}\n{out} is written")
    return int(found["tests"]["exit"] != 0)


def machine(device: torch.device) -> dict[str, Any]:
    """What the figures depend on."""
    known: dict[str, Any] = {
        "device": str(device),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "tf32": torch.backends.cuda.matmul.allow_tf32,
    }
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        known |= {
            "name": properties.name,
            "memory_gib": round(properties.total_memory / 2**30, 1),
            "capability": f"{properties.major}.{properties.minor}",
            "cuda": torch.version.cuda,
            "devices": torch.cuda.device_count(),
        }
    return known


def tests(device: torch.device, quick: bool) -> dict[str, Any]:
    """The ``gpu`` tests in a process of their own; with ``quick`` a few of them."""
    chosen = ["-k", "a_cache_changes_nothing"] if quick else []
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "-n0",
        "-p",
        "no:cacheprovider",
        "-m",
        "gpu",
        "tests/gpu",
    ]
    start = time.monotonic()
    try:
        ended = subprocess.run(
            [*command, *chosen],
            cwd=ROOT,
            capture_output=True,
            text=True,
            timeout=TEST_SECONDS,
            check=False,
        )
    except subprocess.TimeoutExpired as late:
        text = (late.stdout or b"").decode(errors="replace")
        return {"exit": -1, "summary": f"stopped after {TEST_SECONDS} s", "output": text[-4000:]}
    lines = ended.stdout.strip().splitlines()
    return {
        "exit": ended.returncode,
        "summary": lines[-1] if lines else ended.stderr[-400:],
        "seconds": round(time.monotonic() - start, 1),
        "output": "" if ended.returncode == 0 else ended.stdout[-8000:],
    }


def tables(device: torch.device, quick: bool) -> Iterator[Line]:
    """Every line of every table."""
    clock = Clock(device, 0.2 if quick else 3.0, 3 if quick else 50)
    for table in (forward, sample, encode, train_step):
        end = time.monotonic() + TABLE_SECONDS
        for line in table(clock, quick):
            yield line
            if time.monotonic() > end:
                break


# ---- tables --------------------------------------------------------------------------------------


@contextlib.contextmanager
def models(clock: Clock, quick: bool) -> Iterator[tuple[Setup, dict[torch.dtype, Transformer]]]:
    """GPT-2 small's shape with random weights, in float32 and bfloat16."""
    with tempfile.TemporaryDirectory() as scratch:
        setup = Setup(Path(scratch), quick)
        loaded = {t: Transformer.load(setup.folder, device=clock.device, dtype=t) for t in _DTYPES}
        yield setup, loaded


def products(
    setup: Setup, n_tokens: int, dtype: torch.dtype, device: torch.device, times: int = 1
) -> Work:
    """The matrix products of a forward pass over ``n_tokens``, attention's inner ones left out."""
    d, f, v = setup.sizes["n_embd"], 4 * setup.sizes["n_embd"], setup.sizes["vocab_size"]
    shapes = [(d, 3 * d), (d, d), (d, f), (f, d)] * setup.sizes["n_layer"] + [(d, v)]
    made = {s: torch.randn(s, device=device, dtype=dtype) for s in set(shapes)}
    inputs = {n: torch.randn(n_tokens, n, device=device, dtype=dtype) for n in (d, f)}

    def work() -> None:
        for shape in shapes * times:
            torch.mm(inputs[shape[0]], made[shape])

    return work


@torch.no_grad()
def forward(clock: Clock, quick: bool) -> Iterator[Line]:
    """Logits of every position."""
    with models(clock, quick) as (setup, loaded):
        for batch, length in ((4, 128), (1, 1024), (32, 512)):
            batch = min(batch, 2) if quick else batch
            tokens = torch.tensor(setup.tokens(batch, length), device=clock.device)
            for dtype, model in loaded.items():
                floor = products(setup, batch * length, dtype, clock.device)
                name = f"logits ({batch}, {length}), {_short(dtype)}"
                yield clock.line("forward", name, partial(model, tokens), floor)


@torch.no_grad()
def sample(clock: Clock, quick: bool) -> Iterator[Line]:
    """Greedy generation with a cache."""
    with models(clock, quick) as (setup, loaded):
        for batch in (1, BATCH):
            prompts, n_new = setup.tokens(batch, PROMPT), setup.new_tokens
            for dtype, model in loaded.items():
                floor = products(setup, batch, dtype, clock.device, times=n_new)
                work = partial(model.sample, prompts, n_new, temperature=0)
                yield clock.line(
                    "sample", f"{n_new} tokens, batch of {batch}, {_short(dtype)}", work, floor
                )


@torch.no_grad()
def encode(clock: Clock, quick: bool) -> Iterator[Line]:
    """ReLU latents, and TopK encoded and decoded."""
    n_tokens, width, n_latents = (300, 64, 512) if quick else (4096, 768, 32768)
    for dtype in _DTYPES:
        x = torch.randn(n_tokens, width, device=clock.device, dtype=dtype)
        for name, activation in (("ReLU encode", None), ("TopK encode and decode", TopK(32))):
            torch.manual_seed(0)
            autoencoder = Autoencoder(n_latents, width, activation).to(clock.device, dtype)
            weight = autoencoder.encoder.weight
            work = autoencoder.encode if activation is None else autoencoder.reconstruct
            name += f", {n_latents} latents, {n_tokens} tokens of width {width}, {_short(dtype)}"
            yield clock.line("encode", name, partial(work, x), partial(torch.mm, x, weight.T))


def train_step(clock: Clock, quick: bool) -> Iterator[Line]:
    """Whole steps of ``train``; the floor is the five products of a dense step."""
    n_tokens, width = (256, 32) if quick else (4096, 768)
    rows = torch.randn(n_tokens, width, device=clock.device)
    objectives: list[ObjectiveConfig] = [TopKConfig(k=32), BatchTopKConfig(k=32), ReLUConfig()]
    for n_latents in (256, 512) if quick else (16384, 32768):
        weight = torch.randn(n_latents, width, device=clock.device)
        latents = torch.randn(n_tokens, n_latents, device=clock.device)

        floor = partial(five_products, rows, weight, latents)
        for objective in objectives:
            for autocast in (False, True):
                name = f"{objective.name}, {n_latents} latents, {n_tokens} tokens of width {width}"
                settings = {"autocast": autocast, "n_latents": n_latents}
                measure = partial(steps, clock, objective, rows, **settings)
                name += ", autocast" if autocast else ""
                yield clock.compared("train_step", name, measure, floor)


def five_products(rows: Tensor, weight: Tensor, latents: Tensor) -> None:
    """Those of a dense step: latents, reconstructions, and the gradients of these and of both matrices."""
    for _ in range(2):
        torch.mm(latents.T, rows)
        torch.mm(rows, weight.T)
    torch.mm(latents, weight)


def steps(clock: Clock, objective: ObjectiveConfig, rows: Tensor, **settings: Any) -> list[float]:
    """Milliseconds of each step of a run but the first three, on the same batch again and again."""
    config = TrainConfig(
        objective,
        steps=clock.most_calls + 3,
        lr=1e-4,
        grad_clip=1.0,
        input_normalization="none",
        decoder_bias="zeros",
        device=str(clock.device),
        **settings,
    )
    moments: list[float] = []

    def note(report: StepReport) -> None:
        clock.wait()
        moments.append(time.perf_counter())

    train(config, [rows] * config.total_steps, callbacks=[note], progress=False)
    return [1e3 * (b - a) for a, b in itertools.pairwise(moments[2:])]


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def markdown(lines: list[dict[str, Any]]) -> str:
    """The tables to read."""
    head = ["table", "work", "median ms", "min-max", "floor ms", "ratio", "peak MiB"]
    rule = "|---|---|--:|--:|--:|--:|--:|"
    return f"| {' | '.join(head)} |\n{rule}\n" + "".join(
        f"| {line['table']} | {line['work']} | {line['median_ms']:.3g} | {line['min_ms']:.3g}-"
        f"{line['max_ms']:.3g} | {line['floor_ms']:.3g} | {line['ratio']:.2f} | {line['peak_mib']:.0f} |\n"
        for line in lines
    )
