"""What every autoencoder is given: the same activations and the same weights.

Activations and directions are those of :mod:`benchmarks.contestants.training`; the decoder is the
encoder's transpose, and both biases are there.
"""

import torch
from torch import Tensor

from benchmarks.contestants.training import activations, directions

__all__ = ["activations", "biases", "directions"]


def biases(latents: int, width: int) -> tuple[Tensor, Tensor]:
    """``[l]`` of the latents and ``[n]`` of the input and the output."""
    generator = torch.Generator().manual_seed(3)
    latent_bias = 0.1 * torch.randn(latents, generator=generator)
    return latent_bias, 0.1 * torch.randn(width, generator=generator)
