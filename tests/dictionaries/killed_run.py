"""Small runs that are killed: one process imports torch, its children train and die.

    python -m tests.dictionaries.killed_run folder '[["step", 12], ["write", 30], ...]'

Each entry is a run of its own, in ``folder/<its index>``: a child is killed, another one goes on to
the end. ``step``: after that step; ``write``: in the middle of the first checkpoint written at or
after it; ``rename``: when that is written and has no name yet; ``tidy``: when it has, and an older
one is being removed; ``results``: while the finished autoencoders are written; ``outside``: by the
parent, after that many milliseconds. Also imported, for the run that nobody disturbs.
"""

import json
import os
import signal
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from neuron_explainer import files
from neuron_explainer.dictionaries import (
    BatchTopKConfig,
    PAnnealConfig,
    TopKConfig,
    TrainConfig,
    train_many,
)
from neuron_explainer.dictionaries.train import StepReport
from tests.dictionaries.planted import planted

STEPS = 30


class Batches:
    """Batches for four dictionaries; knows its place, and draws from a generator of its own."""

    def __init__(self) -> None:
        self.rows = planted(512)[0]
        self.generator = torch.Generator().manual_seed(7)

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        return self

    def __next__(self) -> dict[str, Tensor]:
        chosen = torch.randint(len(self.rows), (32,), generator=self.generator)
        rows = self.rows[chosen]
        return {name: rows.flip(1) if name == "0/other" else rows for name in configs()}

    def state_dict(self) -> dict[str, Any]:
        return {"generator": self.generator.get_state()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.generator.set_state(state["generator"])


class Plain:
    """The same from the start each time; knows nothing of its place."""

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        yield from Batches()


def configs() -> dict[str, TrainConfig]:
    shared: dict[str, Any] = {
        "steps": STEPS,
        "lr": 3e-3,
        "warmup_steps": 5,
        "decay": "linear",
        "decay_steps": 15,
        "grad_clip": 1.0,
        "dead_after_tokens": 200,
        "sample_batches": 2,
        "checkpoint_every": 7,
        "log_every": 5,
    }
    annealed = TopKConfig(k=2, multi_k=4, k_anneal_steps=15, k_start=6)
    return {
        "0/one": TrainConfig(annealed, n_latents=64, **shared),
        "0/other": TrainConfig(
            TopKConfig(k=3, aux_coefficient=0),
            n_latents=200,  # of which many are dead when others are resampled
            remedy="resample",
            resample_every=9,
            seed=3,
            **shared,
        ),
        "1/batch": TrainConfig(BatchTopKConfig(k=2), n_latents=64, **shared),
        "1/annealed": TrainConfig(
            PAnnealConfig(l1_coefficient=0.1, n_updates=5, anneal_start=8, memory=4),
            n_latents=200,
            remedy="ghost",
            **shared,
        ),
    }


def run(folder: Path, callback: Any = None, plain: bool = False) -> None:
    train_many(
        configs(),
        Plain() if plain else Batches(),
        folder,
        callbacks=[callback] if callback else [],
        progress=False,
    )


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def run_and_die(folder: Path, moment: str, step: int) -> None:
    """Does not come back unless the kill is to come from outside."""
    reached = [0]

    def callback(report: StepReport) -> None:
        reached[0] = report.step
        if moment == "step" and report.step == step:
            die()

    def watcher(kind: str, path: Path) -> None:
        in_checkpoints = path.parent.name == "checkpoints"
        a_checkpoint = in_checkpoints and path.name.isdigit()
        moments = {
            "write": kind == "make" and ".state.json" in path.name,
            "rename": kind == "rename" and a_checkpoint,
            # A folder that is removed has a temporary name by then.
            "tidy": kind == "remove" and in_checkpoints,
            "results": kind == "make" and ".finished.json" in path.name,
        }
        if reached[0] >= step and moments.get(moment):
            die()

    with files.watch_steps(watcher):
        run(folder, callback)


def in_child(function: Any, kill_after: float | None = None) -> int:
    """Status of a forked child that calls ``function``."""
    child = os.fork()
    if child == 0:
        function()
        os._exit(0)
    if kill_after is not None:
        time.sleep(kill_after)
        os.kill(child, signal.SIGKILL)
    return os.waitpid(child, 0)[1]


def main() -> None:
    torch.set_num_threads(1)
    os.fsync = lambda fd: None  # what it protects from, power cuts, is not tested here
    base, points = Path(sys.argv[1]), json.loads(sys.argv[2])
    run(base / "warm")  # what torch imports when it is first used, the children have then
    for index, (moment, step) in enumerate(points):
        folder = base / str(index)
        wait = step / 1000 if moment == "outside" else None
        status = in_child(lambda f=folder, m=moment, s=step: run_and_die(f, m, s), wait)
        if status != signal.SIGKILL and moment != "outside":
            raise SystemExit(f"{moment} {step}: expected a death, found status {status}")
        if not (folder / "finished.json").exists():
            status = in_child(lambda f=folder: run(f))
            if status:
                raise SystemExit(f"{moment} {step}: resuming ended with status {status}")


if __name__ == "__main__":
    main()
