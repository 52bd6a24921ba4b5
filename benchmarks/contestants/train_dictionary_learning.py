"""dictionary_learning: ``update`` of its trainers."""

from itertools import count
from typing import Any

import torch

from benchmarks.contestants.training import L1, LR, activations, dead, directions
from benchmarks.workloads import Work

top_k: Any = __import__("dictionary_learning.trainers.top_k", fromlist=["*"])
standard: Any = __import__("dictionary_learning.trainers.standard", fromlist=["*"])

LAYOUT = {"steps": 10**6, "layer": 0, "lm_name": "", "lr": LR, "device": "cpu"}


def topk_step(tokens: int, width: int, latents: int, k: int, aux: bool = False) -> Work:
    trainer = top_k.TopKTrainer(activation_dim=width, dict_size=latents, k=k, **LAYOUT)
    rows = directions(latents, width)
    trainer.ae.encoder.weight.data.copy_(rows)
    trainer.ae.decoder.weight.data.copy_(rows.t())
    x, steps = activations(tokens, width), count(1)  # at step 0 it moves a bias
    silent = dead(latents) if aux else torch.empty(0, dtype=torch.long)

    def work() -> dict[str, torch.Tensor]:
        trainer.num_tokens_since_fired[silent] = 10**9
        loss = trainer.update(next(steps), x)
        return {} if aux else {"squared error": torch.tensor(loss)}

    return work


def relu_step(tokens: int, width: int, latents: int) -> Work:
    trainer = standard.StandardTrainer(
        activation_dim=width, dict_size=latents, l1_penalty=L1, **LAYOUT
    )
    rows = directions(latents, width)
    trainer.ae.encoder.weight.data.copy_(rows)
    trainer.ae.decoder.weight.data.copy_(rows.t())
    x, steps = activations(tokens, width), count(1)

    def work() -> dict[str, torch.Tensor]:
        trainer.update(next(steps), x)
        return {}

    return work
