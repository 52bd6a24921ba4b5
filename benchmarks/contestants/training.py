"""What every trainer is given: the same activations and the same first weights.

Activations are Gaussian with a spectrum that falls by a power law; first weights are unit rows, the
encoder the decoder's transpose, biases zero. ``squared error`` is that of the first step, summed over
the width and averaged over tokens, in whatever units a library minimises it.
"""

from functools import cache

import torch
from torch import Tensor

LR = 3e-4
L1 = 1e-3
DEAD_SHARE = 0.05
"""Of latents, in the steps in which AuxK has something to do."""


@cache
def activations(tokens: int, width: int) -> Tensor:
    """``[b, n]`` of mean square 1."""
    generator = torch.Generator().manual_seed(0)
    scale = torch.arange(1, width + 1) ** -0.5
    x = torch.randn(tokens, width, generator=generator) * scale
    return x[:, torch.randperm(width, generator=generator)] / scale.square().mean().sqrt()


@cache
def directions(latents: int, width: int) -> Tensor:
    """``[l, n]`` of unit norm."""
    generator = torch.Generator().manual_seed(0)  # as this library draws them
    rows = torch.randn(latents, width, generator=generator)
    return torch.nn.functional.normalize(rows, dim=1)


def dead(latents: int) -> Tensor:
    """``[d]`` int64."""
    generator = torch.Generator().manual_seed(2)
    return torch.randperm(latents, generator=generator)[: int(DEAD_SHARE * latents)]
