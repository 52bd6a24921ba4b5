"""How often each latent fires on some activations, and how large it gets.

Shape legend: ``l`` latents, ``n`` inputs, ``…`` any leading axes.
"""

from collections.abc import Iterable
from typing import Self

import torch
from torch import Tensor

from neuron_explainer.evaluation.metrics import kept_rows
from neuron_explainer.evaluation.pieces import coded_pieces
from neuron_explainer.models.autoencoder import Autoencoder
from neuron_explainer.models.autoencoders.latents import Latents


class LatentActivity:
    """Running totals over tokens, on the CPU."""

    def __init__(self, n_latents: int) -> None:
        self.n_tokens = 0
        self.fired = torch.zeros(n_latents, dtype=torch.int64)
        """``[l]``: on how many tokens each latent is not zero."""
        self.largest = torch.zeros(n_latents)
        """``[l]``: the largest value of each latent, in the autoencoder's units."""

    @classmethod
    def of(cls, autoencoder: Autoencoder, batches: Iterable[Tensor]) -> Self:
        """The activity of an autoencoder's latents on batches of activations ``[…, n]``."""
        activity = cls(autoencoder.n_latents)
        for batch in batches:
            for _, coded in coded_pieces(autoencoder, kept_rows(batch, None, "a batch")):
                activity.update(coded.latents)
        return activity

    def update(self, latents: Latents) -> Self:
        """Add the latents of any number of tokens."""
        values = latents.values.detach().flatten().float().cpu()
        indices = latents.indices.flatten().cpu()
        self.n_tokens += latents.values.shape[:-1].numel()
        self.fired.scatter_add_(0, indices, (values != 0).long())
        self.largest.scatter_reduce_(0, indices, values, "amax")
        return self
