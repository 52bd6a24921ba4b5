"""The activations and first weights that every trainer gets.

Activations are Gaussian, with a spectrum that falls by a power law. First weights are unit rows, the encoder
is the transpose of the decoder, and biases are zero. ``squared error`` is that of the first step, summed
over the width and averaged over tokens, in the units in which the library minimises it.
"""

from functools import cache

import torch
from torch import Tensor

LR = 3e-4
L1 = 1e-3
DEAD_SHARE = 0.05
"""The share of latents that are dead in the steps in which AuxK acts."""


@cache
def activations(tokens: int, width: int) -> Tensor:
    """Activations ``[b, n]`` of mean square 1."""
    generator = torch.Generator().manual_seed(0)
    scale = torch.arange(1, width + 1) ** -0.5
    x = torch.randn(tokens, width, generator=generator) * scale
    return x[:, torch.randperm(width, generator=generator)] / scale.square().mean().sqrt()


@cache
def directions(latents: int, width: int) -> Tensor:
    """First directions ``[l, n]`` of unit norm."""
    generator = torch.Generator().manual_seed(0)  # as this library draws them
    rows = torch.randn(latents, width, generator=generator)
    return torch.nn.functional.normalize(rows, dim=1)


def dead(latents: int) -> Tensor:
    """Indices ``[d]`` of the dead latents, int64."""
    generator = torch.Generator().manual_seed(2)
    return torch.randperm(latents, generator=generator)[: int(DEAD_SHARE * latents)]
