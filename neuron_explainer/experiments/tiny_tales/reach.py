"""How much of an autoencoder's error comes from its encoder: the same decoder with better codes.

A TopK encoder is one linear map, so its codes are not the best ones for its decoder. Two other codes with
as many latents per token show what could still be gained:

    refit   the latents that the encoder chose, with the values that fit best (least squares)
    pursuit orthogonal matching pursuit (Pati et al. 1993): latents are chosen one by one, each along the
            largest part of the remaining error, and all values are fitted again each time

Both allow negative values, so they are better than any autoencoder with these latents can be.

Shape legend: ``b`` tokens, ``n`` inputs, ``l`` latents, ``k`` latents of a token.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from neuron_explainer.evaluation.metrics import fvu
from neuron_explainer.models.autoencoder import Autoencoder
from neuron_explainer.tables import text_table

_RIDGE = 1e-6  # keeps the values of two nearly equal unit vectors from becoming huge


class Reach(NamedTuple):
    """FVU of one decoder with codes from the encoder, refitted, and from pursuit."""

    encoder: float
    refit: float
    pursuit: float


@torch.no_grad()
def reach(autoencoder: Autoencoder, x: Tensor, k: int) -> Reach:
    """Measure a TopK autoencoder without input normalisation on activations ``[b, n]``."""
    directions = torch.nn.functional.normalize(autoencoder.decoder.weight.t(), dim=1)
    target = x - autoencoder.pre_bias
    chosen = autoencoder.encode(x).topk(k, dim=1).indices
    refit = best_fit(target, directions, chosen) + autoencoder.pre_bias
    pursued = pursue(target, directions, k) + autoencoder.pre_bias
    recons = autoencoder.reconstruct(x)
    return Reach(*(float(fvu(x, found)) for found in (recons, refit, pursued)))


def best_fit(target: Tensor, directions: Tensor, chosen: Tensor) -> Tensor:
    """``[b, n]``: the sum of the chosen directions ``[b, k]`` that is nearest to ``target``."""
    rows = directions[chosen]  # [b, k, n]
    gram = rows @ rows.mT + _RIDGE * torch.eye(chosen.shape[1])
    values = torch.linalg.solve(gram, rows @ target[:, :, None])
    nearest: Tensor = (values * rows).sum(1)
    return nearest


def pursue(target: Tensor, directions: Tensor, k: int) -> Tensor:
    """``[b, n]``: orthogonal matching pursuit with ``k`` of the unit rows of ``directions`` ``[l, n]``."""
    chosen = torch.empty(len(target), 0, dtype=torch.long)
    found = torch.zeros_like(target)
    for _ in range(k):
        along = ((target - found) @ directions.t()).abs()
        along.scatter_(1, chosen, -1.0)
        chosen = torch.cat([chosen, along.argmax(1, keepdim=True)], dim=1)
        found = best_fit(target, directions, chosen)
    return found


def table(found: dict[str, Reach]) -> str:
    """One line for each autoencoder."""
    rows = ([name, *(f"{fvu:.4f}" for fvu in reach)] for name, reach in found.items())
    return text_table(["location", *Reach._fields], rows)
