"""One matrix product, into memory that is there already."""

import torch

from benchmarks.contestants.encoding import activations, directions
from benchmarks.workloads import Work


def product(tokens: int, width: int, latents: int, variant: str) -> Work:
    """``variant``: a dtype."""
    dtype = getattr(torch, variant)
    x, weight = activations(tokens, width).to(dtype), directions(latents, width).to(dtype)
    out = torch.empty(tokens, latents, dtype=dtype).fill_(0.0)

    def work() -> dict[str, torch.Tensor]:
        torch.mm(x, weight.t(), out=out)
        return {}

    return work
