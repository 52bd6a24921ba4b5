"""Dictionaries from three libraries' own trainers, on the same activations, measured by one evaluation.

All libraries share the activations (harvested once, the same batches in the same order), the number of
steps and latents, the schedule (learning rate and L1 penalty warm up over the first twentieth, the rate
falls linearly to 0 over the last fifth), the number of steps after which a latent is dead, and the search.
The learning rate is the best of ``LEARNING_RATES`` in runs of full length, because in shorter runs high
rates look better than they are. For ReLU dictionaries the L1 coefficient is searched until L0 is within
``NEAR`` of the target at each learning rate, and within ``CLOSE`` at the best one. The chosen run is
repeated with other seeds; figures are means over them, with standard deviations for FVU and CE recovered.
Each library keeps its own first weights, scale of activations, loss, AuxK, clipping, decoder norm and
optimiser.

Choices are made on one part of the held-out documents; the figures come from another part.
"""

import json
import math
import os
import select
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import torch

from benchmarks.contestants.quality_runs import Run
from benchmarks.harness import ROOT
from neuron_explainer.activations import DataConfig, TokenBatch, open_buffer, open_windows
from neuron_explainer.evaluation.evaluate import evaluate_all
from neuron_explainer.evaluation.figures import Evaluation
from neuron_explainer.models.autoencoder import Autoencoder
from neuron_explainer.models.model_context import ModelContext

MODEL, LOCATION = "tiny-tales", "1/resid.torso.delta_mlp"
LEARNING_RATES = (3e-3, 1e-2, 3e-2)
SEEDS = (0, 1, 2)
FIRST_L1 = 4.0
NEAR, CLOSE = 0.1, 0.02
ATTEMPTS = 6
"""Largest number of trainings in a search for an L1 coefficient."""
ENDED = '{"error": "its process has ended; is it installed?"}'
PATIENCE = 3600
"""Seconds after which a silent contestant counts as stuck."""

LIBRARIES = {
    "neuron_explainer": ("quality_ours", ""),
    "dictionary_learning": ("quality_dictionary_learning", "dictionary-learning"),
    "SAELens": ("quality_sae_lens", "sae-lens"),
}
"""For each library, its module in ``benchmarks.contestants`` and its name in ``--peers``."""


@dataclass(frozen=True)
class Sizes:
    """The sizes of the comparison."""

    tokens: int = 2**19
    batch: int = 1024
    latents: int = 1536
    k: int = 16
    l0: float = 32.0
    """The L0 that ReLU dictionaries are brought to."""
    held_out: tuple[int, int] = (8, 24)
    """Batches of windows for choosing, and for the final figures."""


QUICK = Sizes(tokens=64 * 40, batch=64, latents=256, k=4, l0=20.0, held_out=(1, 1))


class Failure(Exception):
    """Raised with the reason why a library cannot take part."""


@dataclass(frozen=True)
class Found:
    """A trained dictionary."""

    run: Run
    evaluation: Evaluation
    """The figures by which it was chosen."""
    trainings: int
    """Number of trainings until it was found, pilots included."""
    seconds: float
    """Seconds of its own training."""


@dataclass(frozen=True)
class Measured:
    """A library's result: the run that was chosen, and its evaluation with each seed."""

    chosen: Found
    evaluations: list[Evaluation]


class Library:
    """A library's process, which trains on request."""

    def __init__(self, module: str, python: str) -> None:
        environment = {"HF_HUB_OFFLINE": "1", "WANDB_MODE": "disabled", "PYTHONPATH": str(ROOT)}
        try:
            self._child = subprocess.Popen(
                [python, "-m", f"benchmarks.contestants.{module}"],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                cwd=ROOT,
                env={**os.environ, **environment},
            )
        except OSError as error:
            raise Failure(f"its interpreter does not start: {error}") from None

    def train(self, run: Run) -> float:
        """Train and return the seconds that it took."""
        assert self._child.stdin is not None
        assert self._child.stdout is not None
        start = time.monotonic()
        try:
            self._child.stdin.write(json.dumps(asdict(run)).encode() + b"\n")
            self._child.stdin.flush()
        except BrokenPipeError:
            raise Failure("its process has ended") from None
        if not select.select([self._child.stdout], [], [], PATIENCE)[0]:
            raise Failure(f"no answer within {PATIENCE} s")
        answer = json.loads(self._child.stdout.readline() or ENDED)
        if "error" in answer:
            raise Failure(answer["error"])
        return time.monotonic() - start

    def close(self) -> None:
        """End the process."""
        self._child.kill()
        self._child.communicate()


class Comparison:
    """Model, activations and held-out windows; trains with a library and measures what comes back."""

    def __init__(self, corpus: Path, scratch: Path, sizes: Sizes) -> None:
        self.sizes, self.scratch, self.trained = sizes, scratch, 0
        self.context = ModelContext.from_model_type(MODEL)
        data = DataConfig(buffer_tokens=min(DataConfig.buffer_tokens, sizes.tokens))
        self._write_batches(corpus, data)
        held = iter(open_windows(self.context, corpus, data, part="held_out", epochs=None))
        choose, final = ([next(held) for _ in range(n)] for n in sizes.held_out)
        self.windows: Mapping[str, list[TokenBatch]] = {"choose": choose, "final": final}

    def _write_batches(self, corpus: Path, data: DataConfig) -> None:
        batch = self.sizes.batch
        with open_buffer(self.context, corpus, LOCATION, data, batch) as batches:
            for number in range(self.sizes.tokens // batch):
                x = next(batches)
                assert isinstance(x, torch.Tensor)
                self.width = x.shape[1]
                torch.save(x, self.scratch / f"{number}.pt")

    def run(self, lr: float, **kind: Any) -> Run:
        """The description of a run of full length."""
        s = self.sizes
        steps = s.tokens // s.batch
        return Run(str(self.scratch), "", steps, s.batch, self.width, s.latents, lr, **kind)

    def attempt(self, library: Library, run: Run, name: str) -> Found:
        """Train a dictionary and measure it."""
        self.trained += 1
        run = replace(run, folder=str(self.scratch / f"dictionary-{self.trained}"))
        seconds = library.train(run)
        autoencoder = Autoencoder.load(run.folder, location=LOCATION)
        found = Found(run, self.evaluate(autoencoder, "choose"), 1, seconds)
        print(
            f"  {name}: {run.steps} steps, lr {run.lr:g}, l1 {run.l1:.4g}: FVU "
            f"{found.evaluation.fvu:.4f}, L0 {found.evaluation.l0:.2f}, {seconds:.0f} s",
            file=sys.stderr,
            flush=True,
        )
        return found

    def evaluate(self, autoencoder: Autoencoder, part: str) -> Evaluation:
        """Evaluate on held-out windows; losses are measured only for final figures."""
        return evaluate_all(
            self.context,
            {LOCATION: autoencoder},
            self.windows[part],
            ce_every=int(part == "final"),
            progress=False,
        )[LOCATION]

    def best(self, library: Library, name: str, k: int) -> Measured:
        """A run at each learning rate, the best of them brought to its L0, and the same with other seeds."""
        s = self.sizes

        def trained(run: Run) -> Found:
            return self.attempt(library, run, name)

        tried: list[Found] = []
        l1 = 0.0 if k else FIRST_L1
        for lr in LEARNING_RATES:
            run = self.run(lr, k=k, l1=l1)
            tried.append(trained(run) if k else at_l0(trained, run, s.l0, NEAR))
            l1 = tried[-1].run.l1
        near = [each for each in tried if k or is_near(each, s.l0, NEAR)] or tried
        found = min(near, key=lambda each: each.evaluation.fvu)
        trainings = sum(each.trainings for each in tried)
        if not (k or is_near(found, s.l0, CLOSE)):
            found = at_l0(trained, found.run, s.l0, CLOSE)
            trainings += found.trainings
        again = [trained(replace(found.run, seed=seed)) for seed in SEEDS if seed != found.run.seed]
        finals = [
            self.evaluate(Autoencoder.load(each.run.folder, location=LOCATION), "final")
            for each in (found, *again)
        ]
        return Measured(replace(found, trainings=trainings), finals)


def is_near(found: Found, l0: float, near: float) -> bool:
    """Whether two dictionaries count as equally sparse."""
    return abs(found.evaluation.l0 / l0 - 1) <= near


def at_l0(trained: Callable[[Run], Found], run: Run, l0: float, near: float) -> Found:
    """Train with other L1 coefficients, by secants of log L0 over log coefficient, until L0 is near."""
    tried: list[Found] = []
    for _ in range(ATTEMPTS):
        tried.append(trained(run))
        if is_near(tried[-1], l0, near):
            break
        slope = -1.5
        x, y = _logs(tried[-1])
        if len(tried) > 1:
            last_x, last_y = _logs(tried[-2])
            slope = min(-0.5, (y - last_y) / (x - last_x))
        run = replace(run, l1=run.l1 * math.exp(max(-1.0, min(1.0, (math.log(l0) - y) / slope))))
    nearest = min(tried, key=lambda found: abs(_logs(found)[1] - math.log(l0)))
    return replace(nearest, trainings=len(tried))


def _logs(found: Found) -> tuple[float, float]:
    """The logarithms of the L1 coefficient and of L0."""
    return math.log(found.run.l1), math.log(max(found.evaluation.l0, 1e-3))


def run(corpus: Path, scratch: Path, pythons: Mapping[str, str] | None, quick: bool) -> str:
    """Train, measure, and return the tables.

    Args:
        corpus: text, as of ``open_windows``.
        scratch: a folder for activations and dictionaries.
        pythons: interpreters by peer name, a peer without one being looked for in this environment;
            None: no peers.
        quick: tiny sizes, to see that it runs.
    """
    return compare(Comparison(corpus, scratch, QUICK if quick else Sizes()), pythons)


def compare(comparison: Comparison, pythons: Mapping[str, str] | None) -> str:
    """The tables of a comparison; each line is also printed to stderr as soon as it is known."""
    s = comparison.sizes
    text = (
        f"{LOCATION} of {MODEL}, {s.latents} latents, {s.tokens:,} tokens in batches of {s.batch}; "
        f"learning rates {', '.join(f'{lr:g}' for lr in LEARNING_RATES)}; mean ± standard deviation of "
        f"{len(SEEDS)} seeds\n"
    )
    for title, k in (
        (f"TopK, k = {s.k}", s.k),
        (f"ReLU + L1 at L0 = {s.l0:g} ± {CLOSE:.0%}", 0),
    ):
        lines = []
        for name, (module, peer) in LIBRARIES.items():
            if peer and pythons is None:
                continue
            python = (pythons or {}).get(peer, sys.executable)
            lines.append(_line(comparison, name, module, python, k))
            print(lines[-1], file=sys.stderr, flush=True)
        text += "\n".join(["", f"### {title}", "", HEAD, RULE, *lines, ""])
    return text


def _line(comparison: Comparison, name: str, module: str, python: str, k: int) -> str:
    try:
        library = Library(module, python)
        try:
            return _row(name, comparison.best(library, name, k))
        finally:
            library.close()
    except Failure as failure:
        return f"| {name} | {failure} |" + " - |" * (HEAD.count("|") - 3)


HEAD = (
    "| library | FVU | L0 | CE recovered (zero) | (mean) | dead | learning rate | L1 | trainings "
    "| seconds |"
)
RULE = "|---|" + "--:|" * (HEAD.count("|") - 2)


def _row(name: str, measured: Measured) -> str:
    chosen, each = measured.chosen, measured.evaluations
    losses = [e.losses for e in each if e.losses is not None]
    return (
        f"| {name} | {_spread([e.fvu for e in each])} | {mean(e.l0 for e in each):.2f} "
        f"| {_spread([found.recovered_zero for found in losses])} "
        f"| {_spread([found.recovered_mean for found in losses])} "
        f"| {mean(e.dead_share for e in each):.1%} | {chosen.run.lr:g} "
        f"| {f'{chosen.run.l1:.3g}' if chosen.run.l1 else '-'} | {chosen.trainings} "
        f"| {chosen.seconds:.0f} |"
    )


def _spread(values: list[float]) -> str:
    return f"{mean(values):.4f} ± {stdev(values):.4f}"
