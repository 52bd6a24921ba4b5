"""Folding of layer norms into the linear maps that read them: the same function with fewer parts."""

from collections.abc import Iterable
from typing import Protocol

import torch
from torch import nn


class _Affine(Protocol):
    weight: nn.Parameter
    bias: nn.Parameter


@torch.no_grad()
def apply_layernorm_foldin(ln: _Affine, linears: Iterable[nn.Linear]) -> None:
    """Move a norm's gain and bias into the ``linears`` behind it, in place.

    ``W (g * x + c) + b = (W * g) x + (W c + b)``, computed in float64 so that only the final cast to
    the parameters' dtype rounds. Afterwards the norm's gain is 1 and its bias 0.
    """
    gain, shift = ln.weight.double(), ln.bias.double()
    for linear in linears:
        weight = linear.weight.double()
        linear.bias.copy_(linear.bias.double() + weight @ shift)
        linear.weight.copy_(weight * gain)
    ln.weight.fill_(1)
    ln.bias.fill_(0)
