"""The formula in plain torch, as the original library writes it or in chunks."""

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.contestants.encoding import activations, biases, directions
from benchmarks.workloads import Work

ROWS = 128
"""Rows in a chunk."""


def relu_encode(tokens: int, width: int, latents: int, variant: str) -> Work:
    x, weight = activations(tokens, width), directions(latents, width)
    latent_bias, pre_bias = biases(latents, width)

    def original() -> dict[str, Tensor]:
        return {"latents": torch.relu(F.linear(x - pre_bias, weight) + latent_bias)}

    def plain() -> dict[str, Tensor]:
        return {"latents": F.linear(x - pre_bias, weight, latent_bias).relu()}

    return original if variant == "original" else plain


def topk_reconstruct(tokens: int, width: int, latents: int, k: int, variant: str) -> Work:
    x, weight = activations(tokens, width), directions(latents, width)
    decoder = directions(latents, width).t().contiguous()
    latent_bias, pre_bias = biases(latents, width)

    def original() -> dict[str, Tensor]:
        pre_act = F.linear(x - pre_bias, weight) + latent_bias
        top = torch.topk(pre_act, k, dim=-1)
        dense = torch.zeros_like(pre_act).scatter_(-1, top.indices, top.values.relu())
        return {"recons": F.linear(dense, decoder) + pre_bias}

    def plain() -> dict[str, Tensor]:
        parts = []
        for part in x.split(ROWS):
            pre_act = F.linear(part - pre_bias, weight, latent_bias)
            top = torch.topk(pre_act, k, dim=-1, sorted=False)
            parts.append(
                F.embedding_bag(
                    top.indices, weight, per_sample_weights=top.values.relu(), mode="sum"
                )
            )
        return {"recons": torch.cat(parts) + pre_bias}

    return original if variant == "original" else plain
