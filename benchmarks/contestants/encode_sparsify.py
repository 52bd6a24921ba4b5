"""sparsify: ``encode`` and ``decode`` of its ``SparseCoder``."""

from typing import Any

import torch

from benchmarks.contestants.encoding import activations, biases, directions
from benchmarks.workloads import Work

sparsify: Any = __import__("sparsify")


def topk_reconstruct(tokens: int, width: int, latents: int, k: int) -> Work:
    coder = sparsify.SparseCoder(width, sparsify.SparseCoderConfig(num_latents=latents, k=k))
    rows = directions(latents, width)
    latent_bias, pre_bias = biases(latents, width)
    coder.encoder.weight.data.copy_(rows)
    coder.W_dec.data.copy_(rows)
    coder.encoder.bias.data.copy_(latent_bias)
    coder.b_dec.data.copy_(pre_bias)
    x = activations(tokens, width)

    def work() -> dict[str, torch.Tensor]:
        found = coder.encode(x)
        return {"recons": coder.decode(found.top_acts, found.top_indices)}

    return work
