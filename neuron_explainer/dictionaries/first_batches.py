"""What training measures on the first batches: mean and scale of activations, and their geometric median.

Shape legend: ``b`` tokens, ``n`` width of an activation.
"""

from typing import Literal

import torch
from torch import Tensor

DecoderBias = Literal["geometric_median", "mean", "zeros"]


def mean_and_scale(x: Tensor) -> tuple[Tensor, Tensor]:
    """``[b, n] -> [n], []``: with them ``(x - mean) / scale`` has mean 0 and variance 1.

    One scale for all entries, so that directions stay what they are. 1 where all rows are equal.
    """
    mean = x.mean(0)
    scale = (x - mean).square().mean().sqrt()
    return mean, torch.where(scale == 0, 1.0, scale)


def variance(x: Tensor) -> Tensor:
    """``[b, n] -> []``: mean squared distance of a row from the mean of all, the FVU's denominator."""
    return (x - x.mean(0)).square().sum(1).mean()


def geometric_median(x: Tensor, max_iterations: int = 100, tolerance: float = 1e-5) -> Tensor:
    """``[b, n] -> [n]``: the point with the least sum of distances to all rows.

    Weiszfeld's iteration, from the mean, until it moves less than ``tolerance`` of the mean
    distance. Unlike the mean it hardly notices a few activations of enormous norm.
    """
    point = x.mean(0)
    for _ in range(max_iterations):
        distance = torch.linalg.vector_norm(x - point, dim=1)
        spread = distance.mean()
        if spread == 0:
            break
        weight = 1 / distance.clamp_min(1e-6 * float(spread))
        moved = (weight / weight.sum()) @ x
        step, point = torch.linalg.vector_norm(moved - point), moved
        if step < tolerance * spread:
            break
    return point


def first_bias(x: Tensor, method: DecoderBias) -> Tensor:
    """``[b, n] -> [n]``: where a decoder's bias starts."""
    if method == "geometric_median":
        return geometric_median(x)
    return x.mean(0) if method == "mean" else torch.zeros_like(x[0])
