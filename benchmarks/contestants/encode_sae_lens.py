"""SAELens: ``StandardSAE.encode``, and ``forward`` of a ``TopKSAE``."""

from typing import Any

import torch

from benchmarks.contestants.encoding import activations, biases, directions
from benchmarks.workloads import Work

saes: Any = __import__("sae_lens.saes", fromlist=["*"])


def _filled(sae: Any, width: int, latents: int) -> Any:
    rows = directions(latents, width)
    latent_bias, pre_bias = biases(latents, width)
    for name, value in (
        ("W_enc", rows.t()),
        ("W_dec", rows),
        ("b_enc", latent_bias),
        ("b_dec", pre_bias),
    ):
        getattr(sae, name).data.copy_(value)
    return sae.eval()


def relu_encode(tokens: int, width: int, latents: int) -> Work:
    settings = saes.StandardSAEConfig(d_in=width, d_sae=latents, apply_b_dec_to_input=True)
    sae, x = _filled(saes.StandardSAE(settings), width, latents), activations(tokens, width)
    return lambda: {"latents": sae.encode(x)}


def topk_reconstruct(tokens: int, width: int, latents: int, k: int) -> Work:
    settings = saes.TopKSAEConfig(d_in=width, d_sae=latents, k=k, apply_b_dec_to_input=True)
    sae, x = _filled(saes.TopKSAE(settings), width, latents), activations(tokens, width)

    def work() -> dict[str, torch.Tensor]:
        return {"recons": sae(x)}

    return work
