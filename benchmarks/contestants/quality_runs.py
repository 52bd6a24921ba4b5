"""The runs that every library's trainer gets, and the pipe through which they are requested.

A contestant is a program that reads a JSON line of settings, trains, saves the result in its own format,
and answers with a JSON line. It imports only its own library, torch and this module.

Shape legend: ``n`` tokens of a batch, ``d`` width of an activation.
"""

import json
import os
import sys
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Run:
    """One training, described in terms that all libraries have."""

    data: str
    """Folder of ``<number>.pt`` files with ``[n, d]`` each, the batches in their order."""
    folder: str
    """The folder for the dictionary."""
    steps: int
    batch: int
    width: int
    latents: int
    lr: float
    k: int = 0
    """Active latents of a TopK dictionary; 0 for ReLU + L1."""
    l1: float = 0.0
    """Weight of the L1 norm, for activations whose mean squared norm is their width."""
    seed: int = 0

    @property
    def warmup(self) -> int:
        """Steps in which the learning rate and the L1 penalty rise."""
        return self.steps // 20

    @property
    def decay(self) -> int:
        """The last steps, in which the learning rate falls to 0."""
        return self.steps // 5

    @property
    def dead_after(self) -> int:
        """Steps after which a silent latent counts as dead."""
        return self.steps // 10

    def __iter__(self) -> Iterator[Tensor]:
        """The batches, from the first one each time."""
        for number in range(self.steps):
            yield torch.load(f"{self.data}/{number}.pt", weights_only=True)


def serve(train: Callable[[Run], None]) -> None:
    """Answer requests until the pipe is closed. What libraries print goes to stderr."""
    pipe = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    torch.set_flush_denormal(
        True
    )  # as this library's loop does: Adam's moments of silent latents fade
    for line in sys.stdin:
        try:
            run = Run(**json.loads(line))
            torch.manual_seed(run.seed)
            train(run)
            answer = {}
        except Exception as error:  # whatever a library raises: it is reported in the table
            traceback.print_exc()
            answer = {"error": f"{type(error).__name__}: {str(error).strip()[:200]}"}
        print(json.dumps(answer), file=pipe, flush=True)
