"""This library: whole steps of its training loop."""

import os
from typing import Any

import torch

from benchmarks.contestants.training import L1, LR, activations, dead, directions
from benchmarks.workloads import Work
from neuron_explainer.dictionaries import TopKConfig, TrainConfig
from neuron_explainer.dictionaries.objectives import ObjectiveConfig, config_class
from neuron_explainer.dictionaries.train import ONLY, _Run


def topk_step(
    tokens: int, width: int, latents: int, k: int, variant: str, aux: bool = False
) -> Work:
    """``variant``: how the largest are searched, ``float32`` or ``certified``."""
    os.environ["NEURON_EXPLAINER_CERTIFIED"] = str(int(variant == "certified"))
    return _steps(TopKConfig(k=k), tokens, width, latents, aux)


def relu_step(tokens: int, width: int, latents: int) -> Work:
    objective: Any = config_class("relu")
    return _steps(objective(l1_coefficient=L1), tokens, width, latents, False)


def _steps(objective: ObjectiveConfig, tokens: int, width: int, latents: int, aux: bool) -> Work:
    torch.set_flush_denormal(True)  # as the loop does
    config = TrainConfig(
        objective,
        n_latents=latents,
        steps=10**6,
        lr=LR,
        grad_clip=1.0,
        input_normalization="none",
        decoder_bias="zeros",
    )
    run = _Run({ONLY: config}, [activations(tokens, width)], single=True)
    run.begin()
    trainee = run.trainees[ONLY]
    with torch.no_grad():
        trainee.dictionary.encoder.copy_(directions(latents, width))
        trainee.dictionary.rows.copy_(directions(latents, width))
    silent = dead(latents) if aux else torch.empty(0, dtype=torch.long)

    def work() -> dict[str, torch.Tensor]:
        trainee.counter.silent[silent] = 10**9
        loss = run.train_step()[0][ONLY]
        return {"squared error": loss.error.square().sum() / len(loss.error)}

    return work
