"""This library: whole steps of ``train``, which is let go on by one step at a call."""

import os
import threading
from typing import Any

import torch

from benchmarks.contestants.training import L1, LR, activations, dead
from benchmarks.workloads import Work
from neuron_explainer.dictionaries import (
    ObjectiveConfig,
    ReLUConfig,
    StepReport,
    TopKConfig,
    TrainConfig,
    train,
)
from neuron_explainer.dictionaries.objectives.relu import ReLU


def topk_step(
    tokens: int, width: int, latents: int, k: int, variant: str, aux: bool = False
) -> Work:
    """``variant``: how the largest are searched, ``float32`` or ``certified``."""
    os.environ["NEURON_EXPLAINER_CERTIFIED"] = str(int(variant == "certified"))
    return _Steps(TopKConfig(k=k), tokens, width, latents, aux)


def relu_step(tokens: int, width: int, latents: int) -> Work:
    ReLU.first_encoder_norm = 1.0  # as the others' are here
    return _Steps(ReLUConfig(l1_coefficient=L1), tokens, width, latents, False)


class _Steps:
    """A run in a thread of its own, halted after each step until the next call."""

    def __init__(
        self, objective: ObjectiveConfig, tokens: int, width: int, latents: int, aux: bool
    ) -> None:
        config = TrainConfig(
            objective,
            n_latents=latents,
            steps=10**9,
            lr=LR,
            grad_clip=1.0,
            input_normalization="none",
            decoder_bias="zeros",
            log_every=10**9,
            seed=0,  # whose first directions the others are given
        )
        self.silent = dead(latents) if aux else torch.empty(0, dtype=torch.long)
        self.go, self.done = threading.Semaphore(0), threading.Semaphore(0)
        self.error: BaseException | None = None
        batches = [activations(tokens, width)]
        threading.Thread(target=self._train, args=(config, batches), daemon=True).start()

    def _train(self, config: TrainConfig, batches: Any) -> None:
        self.go.acquire()
        try:
            train(config, batches, callbacks=[self._halt], progress=False)
        except BaseException as error:
            self.error = error
            self.done.release()

    def _halt(self, report: StepReport) -> None:
        error = next(iter(report.losses.values())).error
        self.result = error.square().sum() / len(error)
        next(iter(report.trainees.values())).counter.silent[self.silent] = 10**9
        self.done.release()
        self.go.acquire()

    def __call__(self) -> dict[str, torch.Tensor]:
        self.go.release()
        self.done.acquire()
        if self.error is not None:
            raise self.error
        return {"squared error": self.result}
