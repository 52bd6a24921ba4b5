"""Encode and decode many activations, a piece at a time, so that the latents fit into memory.

Shape legend: ``t`` tokens, ``n`` inputs, ``o`` outputs, ``l`` latents.
"""

from collections.abc import Iterable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from neuron_explainer.models.autoencoder import Autoencoder
from neuron_explainer.models.autoencoders.latents import Latents

Activations = Iterable[Tensor | tuple[Tensor, Tensor]]
"""Batches of activations ``[…, n]``; for a transcoder, pairs (input, activation to reconstruct)."""
LATENTS_AT_ONCE = 2**25
"""Latents (tokens times dictionary size) that are computed at a time: 128 MiB in float32."""


class Coded(NamedTuple):
    """What an autoencoder makes of some tokens."""

    latents: Latents
    """``[t, l]``, the active ones only."""
    recons: Tensor
    """``[t, o]``"""


def coded_pieces(
    autoencoder: Autoencoder, rows: Tensor, latents_at_once: int = LATENTS_AT_ONCE
) -> Iterator[tuple[slice, Coded]]:
    """Encode and decode ``rows`` ``[t, n]`` without gradients; yields pieces and their places.

    ``latents_at_once`` bounds the size of a piece by dense latents: they are stored sparse, but an
    autoencoder at the beginning of its training can have most of them active.
    """
    size = max(1, latents_at_once // autoencoder.n_latents)
    for start in range(0, len(rows), size):
        piece = slice(start, start + size)
        with torch.no_grad():
            x = rows[piece].to(autoencoder.device, autoencoder.dtype)
            code = autoencoder.code_sparse(x)
            recons = code.decode(code.latents)
        yield piece, Coded(code.latents, recons)
