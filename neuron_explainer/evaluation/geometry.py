"""Lengths and angles of an autoencoder's weights, without any data.

Shape legend: ``n`` inputs, ``o`` outputs, ``l`` latents, ``m`` latents of a sample.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from neuron_explainer.models.autoencoder import Autoencoder
from neuron_explainer.models.checks import check_seed
from neuron_explainer.tables import by_shape

SAMPLE = 2048
"""For how many latents the nearest other one is searched: all pairs of 32,768 would take a minute."""
_PAIRS_AT_ONCE = 2**24


@dataclass(frozen=True)
class WeightGeometry:
    """Lengths and angles, on the CPU in float32. Latents without a decoder direction are left out."""

    decoder_norm: Tensor
    """``[l]``"""
    encoder_decoder_cosine: Tensor | None
    """``[l]``: how much a latent writes in the direction it reads; None for a transcoder."""
    nearest_cosine: Tensor
    """``[m]``: the largest cosine of a decoder direction with any other one; near 1 for duplicates."""

    def __repr__(self) -> str:
        return by_shape(self)

    @classmethod
    @torch.no_grad()
    def of(cls, autoencoder: Autoencoder, sample: int = SAMPLE, seed: int = 0) -> "WeightGeometry":
        """Measure the weights; the nearest cosine is measured for a random ``sample`` of latents."""
        check_seed(seed)
        decoder = autoencoder.directions.float()
        norm = decoder.norm(dim=1)
        alive = norm > 0
        directions = F.normalize(decoder[alive])
        aligned = None
        if not autoencoder.is_transcoder and len(autoencoder.encoder.weight) == len(decoder):
            encoder = F.normalize(autoencoder.encoder.weight.float())[alive]
            aligned = (encoder * directions).sum(dim=1).cpu()
        return cls(norm[alive].cpu(), aligned, nearest_cosines(directions, sample, seed).cpu())

    def sample_note(self, n_latents: int) -> str:
        """What to add to a caption if the nearest cosine is known for a sample only; else empty."""
        m = len(self.nearest_cosine)
        return "" if m >= len(self.decoder_norm) else f" ({m:,} of {n_latents:,} latents)"


def nearest_cosines(directions: Tensor, sample: int, seed: int = 0) -> Tensor:
    """The largest cosine of a sample of unit directions with any other one, ``[l, o] -> [m]``."""
    if len(directions) < 2:
        return directions.new_zeros(0)
    order = torch.randperm(len(directions), generator=torch.Generator().manual_seed(seed))
    chosen = order[:sample].sort().values.to(directions.device)
    found = []
    for rows in torch.split(chosen, max(1, _PAIRS_AT_ONCE // len(directions))):
        cosines = directions[rows] @ directions.t()
        cosines[torch.arange(len(rows), device=rows.device), rows] = -1  # itself
        found.append(cosines.amax(dim=1))
    return torch.cat(found)
