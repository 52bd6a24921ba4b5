"""What is done to each input of an autoencoder before encoding, and how it is undone.

A normalisation concerns each vector by itself, so it is a function of the vector and the name of a
kind, and needs no autoencoder. What undoes it goes with the data, as :class:`InputStats`, and is never
kept in between: two batches can be in flight at once.

Shape legend: ``n`` inputs, ``o`` outputs, ``…`` any leading axes.
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor

from neuron_explainer.errors import InputError
from neuron_explainer.models.checkpoints.autoencoders.state import InputNormalization
from neuron_explainer.tables import by_shape

_LAYER_NORM_EPS = 1e-5


class InputStats(NamedTuple):
    """What decoding needs to know about an input besides its latents."""

    mean: Tensor | None
    """``[…, 1]`` the mean over the width; None if it was not subtracted."""
    std: Tensor | None
    """``[…, 1]`` what the input was divided by: the unbiased standard deviation over the width, or
    with ``"rms"`` the root mean square; None if it was not divided."""
    skip: Tensor | None = None
    """``[…, o]`` what goes past the latents; None without a skip connection."""

    def __repr__(self) -> str:
        return by_shape(self)

    def undo(self, recons: Tensor) -> Tensor:
        """``[…, o]`` in units of normalised inputs ``-> […, o]`` on the scale of the input."""
        if self.std is not None:
            recons = recons * self.std
        return recons if self.mean is None else recons + self.mean

    def redo(self, target: Tensor) -> Tensor:
        """The inverse of :meth:`undo`."""
        target = target if self.mean is None else target - self.mean
        return target if self.std is None else target / self.std.masked_fill(self.std == 0, 1)


def normalize_input(x: Tensor, kind: InputNormalization) -> tuple[Tensor, InputStats | None]:
    """``[…, n]`` as the encoder takes it, ``[…, n]``, and what undoes it (None for ``"none"``)."""
    if kind == "none":
        return x, None
    if kind == "rms":
        rms = torch.linalg.vector_norm(x, dim=-1, keepdim=True) / math.sqrt(x.shape[-1])
        return x / torch.where(rms == 0, 1.0, rms), InputStats(None, rms)
    mean = x.mean(dim=-1, keepdim=True)
    x = x - mean
    if kind == "center":
        return x, InputStats(mean, None)
    # Unbiased: n - 1. For no rows at all torch would warn, as if the width were too small.
    std = x.std(dim=-1, keepdim=True) if x.numel() else mean
    return x / (std + _LAYER_NORM_EPS), InputStats(mean, std)


def check_stats(
    stats: InputStats | None, kind: InputNormalization, skip: bool, name: str
) -> InputStats:
    """The stats that an autoencoder with this normalisation and skip connection needs, or an error."""
    if stats is None:
        why = f"inputs are normalised ({kind!r})" if kind != "none" else "it has a skip connection"
        raise InputError(
            f"{name}: decode needs stats, because {why}: `x_hat, stats = autoencoder.normalize(x)`, "
            "then `autoencoder.decode(latents, stats)`. `autoencoder.reconstruct(x)` does it all."
        )
    expected = (kind in ("none", "rms"), kind in ("none", "center"), not skip)
    if tuple(part is None for part in stats) != expected:
        raise InputError(
            f"{name}: these stats are not those of {kind!r} normalisation "
            f"{'with' if skip else 'without'} a skip connection; take them from this autoencoder's "
            "normalize(x)."
        )
    return stats
