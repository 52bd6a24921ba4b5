"""Runs of several processes, forked from one that has imported torch.

    python -m tests.dictionaries.world_runs folder

In ``folder/<group>``: what each case's first process found; and of a process that was killed, what the
other one said. Also imported, for the same cases in one process.
"""

import json
import os
import signal
import socket
import sys
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import safetensors.torch
import torch
from torch import Tensor

from neuron_explainer.activations.buffer import ShuffleBuffer
from neuron_explainer.activations.chunks import ActivationBatch, ActivationSource
from neuron_explainer.dictionaries import (
    BatchTopKConfig,
    GatedConfig,
    JumpReLUConfig,
    MatryoshkaConfig,
    PAnnealConfig,
    ReLUConfig,
    TopKConfig,
    TrainConfig,
    train,
    train_many,
)
from neuron_explainer.dictionaries.distributed import SINGLE_PROCESS, Split, World, open_world
from neuron_explainer.dictionaries.shared_source import SharedSource
from neuron_explainer.errors import NeuronExplainerError
from neuron_explainer.models.locations import ActivationLocation
from tests.dictionaries.planted import planted

PLACE = ActivationLocation.parse("0/resid.torso.post_mlp")
STEPS, BATCH, KILLED_AT = 50, 33, 17  # 33 rows are no two equal parts

TOPK = TopKConfig(k=3, multi_k=6, k_anneal_steps=20, k_start=8, aux_k=2)


class Case(NamedTuple):
    """One dictionary, and how processes share it."""

    config: TrainConfig
    split: Split = "data"


def case(objective: Any, split: Split = "data", **fields: Any) -> Case:
    values: dict[str, Any] = {
        "n_latents": 64,
        "steps": STEPS,
        "batch_size": BATCH,
        "lr": 3e-3,
        "dead_after_tokens": 60,
        "log_every": 10,
        "sample_batches": 2,
        "dtype": "float64",
        **fields,
    }
    return Case(TrainConfig(objective, **values), split)


CASES = {
    "topk": case(TOPK, grad_clip=0.5),
    "topk by latents": case(TOPK, "latents", grad_clip=0.5),
    "topk float32": case(TOPK, dtype="float32"),
    "topk float32 by latents": case(TOPK, "latents", dtype="float32"),
    "tied by latents": case(TopKConfig(k=3), "latents", tied=True, grad_clip=0.5),
    "transcoder by latents": case(TOPK, "latents", transcoder=True, skip=True),
    "transcoder": case(TOPK, transcoder=True, skip=True),
    "relu": case(ReLUConfig(l1_coefficient=0.3)),
    "relu float32": case(ReLUConfig(l1_coefficient=0.3), dtype="float32"),
    "resample": case(TopKConfig(k=2, aux_coefficient=0), remedy="resample", resample_every=20),
    "ghost": case(TopKConfig(k=2, aux_coefficient=0), remedy="ghost"),
    "jumprelu": case(JumpReLUConfig(target_l0=3.0, bandwidth=0.1, first_threshold=0.1)),
    "gated": case(GatedConfig(l1_coefficient=0.3)),
    "p_anneal": case(PAnnealConfig(l1_coefficient=0.3, n_updates=4, memory=5)),
    "batch_topk": case(BatchTopKConfig(k=3)),
    "matryoshka": case(MatryoshkaConfig(k=3)),
    "relu by latents": case(ReLUConfig(l1_coefficient=0.3), "latents", grad_clip=0.5),
    "weighted relu by latents": case(
        ReLUConfig(l1_coefficient=0.3, weighted=True), "latents", decoder_norm="free"
    ),
    "jumprelu by latents": case(
        JumpReLUConfig(target_l0=3.0, bandwidth=0.1, first_threshold=0.1), "latents", grad_clip=0.5
    ),
    "gated by latents": case(GatedConfig(l1_coefficient=0.3), "latents"),
    "p_anneal by latents": case(
        PAnnealConfig(l1_coefficient=0.3, n_updates=4, memory=5), "latents", tied=True
    ),
    "batch_topk by latents": case(BatchTopKConfig(k=3), "latents", transcoder=True, skip=True),
    "matryoshka by latents": case(MatryoshkaConfig(k=3), "latents"),
}


def batches(config: TrainConfig) -> list[Any]:
    rows = planted(20 * BATCH)[0].to(config.torch_dtype)
    rows = rows[: -(BATCH // 2)]  # the last batch is a small one
    if not config.transcoder:
        return list(rows.split(BATCH))
    return [(x, x[:, :7].flip(1)) for x in rows.split(BATCH)]


def found(which: Case, world: World = SINGLE_PROCESS) -> dict[str, Tensor]:
    """Parameters of the finished autoencoder, and the losses and terms of all steps."""
    curves: dict[str, list[float]] = {"total": []}

    def note(report: Any) -> None:
        loss = report.losses["autoencoder"]
        curves["total"].append(float(loss.total))
        for name, term in loss.terms.items():
            curves.setdefault(name, []).append(float(term))

    c = which.config
    autoencoder = train(c, batches(c), callbacks=[note], progress=False, world=world)
    # With buffers, of which one is the threshold of BatchTopK.
    state = [*autoencoder.named_parameters(), *autoencoder.named_buffers()]
    tensors = {name: x.detach().contiguous() for name, x in state}
    curve = {f"curve {name}": torch.tensor(v, dtype=torch.float64) for name, v in curves.items()}
    return {**{name: x.clone() for name, x in tensors.items()}, **curve}


def all_cases(folder: Path) -> None:
    with open_world(timeout=150) as world:
        for name, which in CASES.items():
            here = World(world.rank, world.size, which.split, world.device)
            result = found(which, here)
            if world.is_rank_zero:
                safetensors.torch.save_file(result, folder / f"{name}.safetensors")
        pair = {name: CASES[name].config for name in ("topk", "resample")}
        both = [dict.fromkeys(pair, x) for x in batches(CASES["topk"].config)]
        train_many(pair, both, folder / "many", progress=False, world=world)


class Counted:
    """A source of seven chunks of different lengths; remembers which it was asked for."""

    forward_s = 0.0

    def __init__(self) -> None:
        self.asked: list[int] = []

    def chunk(self, number: int) -> ActivationBatch | None:
        if number >= 7:
            return None
        self.asked.append(number)
        rows = planted(20 + number, seed=number)[0]
        which = torch.arange(len(rows))
        return ActivationBatch({PLACE: rows}, which, which + number, which)

    def describe(self) -> dict[str, Any]:
        return {}


def shuffled(source: ActivationSource) -> tuple[list[Tensor], list[Tensor]]:
    """All batches; and those after the third, of a buffer that went on from there."""

    def buffer() -> ShuffleBuffer:
        return ShuffleBuffer(source, 48, 12, prefetch=False)

    first, again = buffer(), buffer()
    batches = [next(first) for _ in range(3)]
    again.load_state_dict(first.state_dict())
    whole: list[Any] = [*batches, *first]
    rest: list[Any] = list(again)
    return whole, rest


def shared(folder: Path) -> None:
    """Each process notes what it got and what it computed."""
    with open_world(timeout=150) as world:
        source = Counted()
        whole, rest = shuffled(SharedSource(source, world))
        tensors = {"whole": torch.cat(whole), "rest": torch.cat(rest)}
        tensors["asked"] = torch.tensor(source.asked)
        safetensors.torch.save_file(tensors, folder / f"{world.rank}.safetensors")


def resumable(folder: Path, split: Split, killed_at: int | None = None) -> None:
    """A run of which the second process dies after a step."""

    def die(report: Any) -> None:
        if world.rank == 1 and report.step == killed_at:
            os.kill(os.getpid(), signal.SIGKILL)

    config = case(TOPK, dtype="float32", checkpoint_every=5).config
    with open_world(split, timeout=150) as world:
        train(config, batches(config), folder / "run", callbacks=[die], progress=False, world=world)


def hangs(folder: Path) -> None:
    """A run whose second process stops answering."""

    def sleep(report: Any) -> None:
        if world.rank == 1 and report.step == 2:
            signal.pause()

    config = case(TOPK).config
    with open_world(timeout=1) as world:
        train(config, batches(config), callbacks=[sleep], progress=False, world=world)


def refused(folder: Path) -> None:
    """An error of the first process alone is told by all."""
    (folder / "run").mkdir(exist_ok=True)
    (folder / "run" / "thesis.txt").write_text("mine")
    config = case(TOPK).config
    with open_world(timeout=150) as world:
        train(config, batches(config), folder / "run", progress=False, world=world)


def together(folder: Path, function: Callable[[Path], None], size: int = 2) -> list[int]:
    """Exit statuses of processes that call ``function``; what they say is in ``said <rank>``."""
    folder.mkdir(parents=True, exist_ok=True)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    children = []
    for rank in range(size):
        child = os.fork()
        if child == 0:
            os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(size), "LOCAL_RANK": str(rank)}
            os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
            with open(folder / f"said {rank}", "w", encoding="utf-8") as said:
                os.dup2(said.fileno(), 2)
            status = 0
            try:
                function(folder)
            except NeuronExplainerError as error:
                print(f"{type(error).__name__}: {error}", file=sys.stderr, flush=True)
                status = 2
            except BaseException:
                sys.excepthook(*sys.exc_info())
                status = 1
            sys.stderr.flush()
            os._exit(status)
        children.append(child)
    return _statuses(children)


def _statuses(children: Iterable[int]) -> list[int]:
    """Of all; when one has ended with an error the last one is not waited for if it hangs."""
    statuses = {}
    waiting = list(children)
    for child in waiting:
        statuses[child] = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        if statuses[child] == 2 and child == waiting[0]:
            signal.signal(signal.SIGALRM, lambda *_: os.kill(waiting[-1], signal.SIGKILL))
            signal.alarm(3)
    signal.alarm(0)
    return [statuses[child] for child in waiting]


def main() -> None:
    torch.set_num_threads(1)
    os.fsync = lambda fd: None
    base = Path(sys.argv[1])
    found(case(TopKConfig(k=2), steps=2))  # what torch imports when it is first used, all have then
    statuses = {"cases": together(base / "cases", all_cases)}
    splits: tuple[Split, ...] = ("data", "latents")
    for split in splits:
        whole, broken = base / f"whole {split}", base / f"broken {split}"
        statuses[f"whole {split}"] = together(whole, partial(resumable, split=split))
        dying = partial(resumable, split=split, killed_at=KILLED_AT)
        statuses[f"killed {split}"] = together(broken, dying)
        (broken / "said 0").rename(broken / "said when killed")
        statuses[f"resumed {split}"] = together(broken, partial(resumable, split=split))
    statuses["shared"] = together(base / "shared", shared)
    statuses["hung"] = together(base / "hung", hangs)
    statuses["refused"] = together(base / "refused", refused)
    (base / "statuses.json").write_text(json.dumps(statuses))


if __name__ == "__main__":
    main()
