"""Collations that are killed, or divided among processes: one process imports torch, its children work.

    python -m tests.analysis.collation_runs FOLDER N_KILLS

A child counts everything that it does to the disk and every batch that it reads, and dies at one of these
moments. Then other processes, as many as the case says, go on.
"""

import json
import os
import random
import signal
import sys
import tempfile
import traceback
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from neuron_explainer.activations.windows import TokenBatch, TokenWindows
from neuron_explainer.analysis import CollateConfig, collate
from neuron_explainer.models.autoencoder import Autoencoder, TopK
from neuron_explainer.models.model_context import ModelContext
from tests.analysis.byte_models import BOS, byte_corpus, save_byte_context

CONFIG = CollateConfig(
    top=3, intervals=3, per_interval=2, uniform=2, window=6, head_window=3, parts=5,
    coactivation_tokens=30,
)  # fmt: skip
MOMENTS = ("fsync", "rename", "replace", "mkdir", "unlink")


class Counter:
    """Calls ``at`` when the moment with a number has come."""

    def __init__(self, number: int, at: Callable[[], None]) -> None:
        self.number, self.at, self.count = number, at, 0

    def tick(self) -> None:
        self.count += 1
        if self.count == self.number:
            self.at()


class Counted(TokenWindows):
    counter: Counter

    def batch(self, number: int) -> TokenBatch:
        self.counter.tick()
        return super().batch(number)


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def what() -> list[Any]:
    torch.manual_seed(0)
    made = Autoencoder(24, 16, TopK(3), location="1/resid.torso.post_mlp").requires_grad_(False)
    signed = Autoencoder(24, 16, TopK(3, nn.Identity())).requires_grad_(False)
    return [{"topk": made, "0/resid.torso.post_attn": signed}, "1/mlp.post_act", "0/attn.qk_probs"]


def run(context: ModelContext, out: Path, counter: Counter) -> None:
    windows = Counted(byte_corpus(), 10, 3, bos=BOS)
    windows.counter = counter
    for name in MOMENTS:
        setattr(os, name, _ticking(getattr(os, name), counter))
    collate(context, what(), windows, out, CONFIG, progress=False, save_every_s=0.0)


def _ticking(function: Callable[..., Any], counter: Counter) -> Callable[..., Any]:
    def call(*args: Any, **kwargs: Any) -> Any:
        counter.tick()
        return function(*args, **kwargs)

    return call


def children(size: int, work: Callable[[], None]) -> list[int]:
    """The statuses of ``size`` processes that are connected if there are several."""
    with tempfile.TemporaryDirectory() as meeting:
        pids = []
        for rank in range(size):
            if (pid := os.fork()) == 0:
                _in_child(rank, size, meeting, work)
            pids.append(pid)
        statuses = {}
        for _ in pids:
            pid, status = os.wait()
            statuses[pid] = os.waitstatus_to_exitcode(status)
            if statuses[pid] and size > 1:  # as torchrun does
                for other in set(pids) - set(statuses):
                    os.kill(other, signal.SIGKILL)
        return [statuses[pid] for pid in pids]


def _in_child(rank: int, size: int, meeting: str, work: Callable[[], None]) -> None:
    try:
        if size > 1:
            os.environ["WORLD_SIZE"] = str(size)
            dist.init_process_group(
                "gloo", init_method=f"file://{meeting}/here", rank=rank, world_size=size
            )
        work()
    except BaseException:
        traceback.print_exc()
        os._exit(1)
    os._exit(0)


def main(folder: Path, n_kills: int) -> None:
    torch.set_num_threads(1)
    context = save_byte_context(folder)
    context.get_or_create_model()
    found: dict[str, Any] = {}
    never = Counter(0, die)

    def whole() -> None:
        run(context, folder / "whole", never)
        (folder / "moments").write_text(str(never.count))

    found["whole"] = children(1, whole)
    for size in (2, 4):
        out = folder / f"{size} processes"
        found[out.name] = children(size, partial(run, context, out, never))
    n_moments = int((folder / "moments").read_text())
    draw = random.Random(0)
    for kill in range(n_kills):
        out = folder / f"killed {kill}"
        sizes = draw.choice([(1, 1), (1, 1), (3, 1), (1, 2), (2, 4), (4, 3)])
        moment = draw.randrange(1, 1 + n_moments // (1 if sizes[0] == 1 else 3))
        dying = Counter(moment, die)
        begun = children(sizes[0], partial(run, context, out, dying))
        finished = [0]
        if not _is_whole(out, folder):
            finished = children(sizes[1], partial(run, context, out, never))
        found[out.name] = {"sizes": sizes, "moment": moment, "begun": begun, "finished": finished}
    (folder / "found.json").write_text(json.dumps(found))


def _is_whole(out: Path, folder: Path) -> bool:
    """Whether the process was killed after its last step."""
    names = {path.name for path in (folder / "whole").iterdir()}
    return out.is_dir() and {path.name for path in out.iterdir()} == names


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]))
