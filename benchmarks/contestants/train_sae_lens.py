"""SAELens: steps of its ``SAETrainer``."""

from typing import Any

import torch

from benchmarks.contestants.training import L1, LR, activations, dead, directions
from benchmarks.workloads import Work

saes: Any = __import__("sae_lens.saes", fromlist=["*"])
config: Any = __import__("sae_lens.config", fromlist=["*"])
trainers: Any = __import__("sae_lens.training.sae_trainer", fromlist=["*"])


def topk_step(
    tokens: int, width: int, latents: int, k: int, variant: str, aux: bool = False
) -> Work:
    """``variant``: ``dense`` or ``sparse``, its own ``use_sparse_activations``."""
    settings = saes.TopKTrainingSAEConfig(
        d_in=width, d_sae=latents, k=k, use_sparse_activations=variant == "sparse"
    )
    return _steps(saes.TopKTrainingSAE(settings), tokens, width, latents, aux)


def relu_step(tokens: int, width: int, latents: int) -> Work:
    settings = saes.StandardTrainingSAEConfig(d_in=width, d_sae=latents, l1_coefficient=L1)
    return _steps(saes.StandardTrainingSAE(settings), tokens, width, latents, False)


def _steps(sae: Any, tokens: int, width: int, latents: int, aux: bool) -> Work:
    x, rows = activations(tokens, width), directions(latents, width)
    sae.W_enc.data.copy_(rows.t())
    sae.W_dec.data.copy_(rows)
    settings = config.SAETrainerConfig(
        total_training_samples=10**12, train_batch_size_samples=tokens, lr=LR, lr_end=LR
    )
    trainer = trainers.SAETrainer(settings, sae, iter([]))
    silent = dead(latents) if aux else torch.empty(0, dtype=torch.long)

    def work() -> dict[str, torch.Tensor]:
        trainer.n_forward_passes_since_fired[silent] = 10**6
        output = trainer.step(x)
        trainer.n_training_steps += 1
        return {"squared error": output.losses["mse_loss"].detach()}

    return work
