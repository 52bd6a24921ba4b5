"""The activations and weights that every autoencoder gets.

Activations and directions are those of :mod:`benchmarks.contestants.training`. The decoder is the transpose
of the encoder, and both biases are used.
"""

import torch
from torch import Tensor

from benchmarks.contestants.training import activations, directions

__all__ = ["activations", "biases", "directions"]


def biases(latents: int, width: int) -> tuple[Tensor, Tensor]:
    """Bias of the latents ``[l]``, and bias of input and output ``[n]``."""
    generator = torch.Generator().manual_seed(3)
    latent_bias = 0.1 * torch.randn(latents, generator=generator)
    return latent_bias, 0.1 * torch.randn(width, generator=generator)
