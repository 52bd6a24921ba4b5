"""How well an autoencoder stands in for the activations it was trained on: executable definitions.

The names of these measures are shared by the field, their definitions are not; each function says
which one it is. Sums are taken in float64 and, over several batches, exactly as if all tokens had
been one batch: means of per-batch values depend on where batches are cut, and are not used.

Shape legend: ``b`` batch, ``s`` sequence, ``n`` inputs of an autoencoder, ``l`` latents, ``v``
vocabulary, ``…`` any leading axes: all of them count as tokens.
"""

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from neuron_explainer.errors import InputError
from neuron_explainer.evaluation.running import (
    ReconstructionStats,
    check_pad,
    kept_rows,
)

__all__ = [
    "DensityHistogram",
    "ReconstructionStats",
    "ce_recovered",
    "cosine_similarity",
    "cross_entropy_per_token",
    "dead_share",
    "density_histogram",
    "explained_variance",
    "explained_variance_per_token",
    "fvu",
    "kl_divergence_per_token",
    "l0",
    "l1",
    "norm_ratio",
    "relative_reconstruction_bias",
]


def fvu(x: Tensor, recons: Tensor) -> Tensor:
    """Fraction of variance unexplained, 1 - explained variance.

        Σ ‖x - x̂‖² / Σ ‖x - x̄‖²,   x̄ the mean of all tokens given

    ``[…, n], […, n] -> []`` in float64. 0 for a perfect reconstruction, 1 for one that is the mean
    everywhere, more for a worse one; NaN or infinite if all tokens are equal (one token, say).

    This is the normalised MSE of Gao et al. 2024 (MSE over that of predicting the mean) and one minus
    SAEBench's corrected explained variance. Not the same: variance about zero, the mean over tokens of
    per-token ratios, and ``var(x - x̂) / var(x)``, which forgives a constant offset.
    """
    return ReconstructionStats().update(x, recons).fvu


def explained_variance(x: Tensor, recons: Tensor) -> Tensor:
    """``1 - fvu(x, recons)``: 1 for a perfect reconstruction, 0 for the mean. ``-> []`` in float64."""
    return 1 - fvu(x, recons)


def explained_variance_per_token(
    x: Tensor, recons: Tensor, mean: Tensor | None = None, pad: Tensor | None = None
) -> Tensor:
    """One minus each token's error over its own distance from the mean, averaged over tokens.

        mean over tokens of 1 - ‖x - x̂‖² / ‖x - x̄‖²

    ``[…, n], […, n], [n] -> []`` in float64. Tokens near the mean weigh as much as those far away, so
    it is lower than :func:`explained_variance` where small activations are reconstructed badly. ``x̄``
    is ``mean``, or the mean of the tokens given. (SAELens's "legacy" has each batch's mean for x̄.)
    """
    if mean is None:
        mean = kept_rows(x.detach(), pad, "x").double().mean(dim=0)
    return ReconstructionStats(mean).update(x, recons, pad=pad).explained_variance_per_token


def cosine_similarity(x: Tensor, recons: Tensor) -> Tensor:
    """Mean over tokens of ``cos(x, x̂)``, 0 where either is zero. ``[…, n], […, n] -> []``, float64."""
    return ReconstructionStats().update(x, recons).cosine_similarity


def norm_ratio(x: Tensor, recons: Tensor) -> Tensor:
    """Mean of ``‖x̂‖ / ‖x‖`` over the tokens that are not zero. ``[…, n], […, n] -> []`` in float64.

    Below 1 where an autoencoder shrinks what it reconstructs, as those trained with L1 do.
    """
    return ReconstructionStats().update(x, recons).norm_ratio


def relative_reconstruction_bias(x: Tensor, recons: Tensor) -> Tensor:
    """``Σ ‖x̂‖² / Σ ⟨x, x̂⟩``: 1 if no rescaling of ``x̂`` would lower the error, less if it shrinks.

    ``[…, n], […, n] -> []`` in float64. Rajamanoharan et al. 2024, equation 10.
    """
    return ReconstructionStats().update(x, recons).relative_reconstruction_bias


def l0(latents: Tensor) -> Tensor:
    """Mean number of latents per token that are not zero. ``[…, l] -> []`` in float64.

    Cunningham et al. 2023. For latents that may be negative, "> 0" would be another number.
    """
    tokens = _rows(latents, "latents")
    return (tokens != 0).sum().double() / len(tokens)


def l1(latents: Tensor) -> Tensor:
    """Mean over tokens of the sum of the latents' magnitudes. ``[…, l] -> []`` in float64."""
    tokens = _rows(latents, "latents")
    return tokens.double().abs().sum() / len(tokens)


def dead_share(latents: Tensor) -> Tensor:
    """Share of latents that are zero on every token given. ``[…, l] -> []`` in float64.

    It falls with the number of tokens, so it is worth nothing without that number. (Gao et al. 2024
    call a latent dead that has not been active for 10 million training tokens.)
    """
    return (_rows(latents, "latents") == 0).all(dim=0).double().mean()


def cross_entropy_per_token(logits: Tensor, tokens: Tensor, pad: Tensor | None = None) -> Tensor:
    """Cross-entropy, in nats, of each token given those before it.

        ce[b, i] = -log softmax(logits[b, i])[tokens[b, i + 1]]

    ``[b, s, v], [b, s], [b, s] -> [b, s - 1]``. NaN, not 0, where the token or the one before it is
    padding (``pad`` True): there is nothing to predict, and a mean must not count it.
    """
    if logits.shape[:-1] != tokens.shape or tokens.ndim != 2:
        raise InputError(
            f"expected logits [b, s, v] and tokens [b, s], found {list(logits.shape)} and "
            f"{list(tokens.shape)}."
        )
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    losses = F.cross_entropy(
        logits[:, :-1].flatten(0, 1), tokens[:, 1:].flatten(), reduction="none"
    ).view(len(tokens), -1)
    if pad is None:
        return losses
    check_pad(pad, tokens.shape)
    return losses.masked_fill(pad[:, 1:] | pad[:, :-1], float("nan"))


def kl_divergence_per_token(original: Tensor, logits: Tensor, pad: Tensor | None = None) -> Tensor:
    """How far the predictions have moved at each token, in nats.

        kl[b, i] = Σ_v p_v (log p_v - log q_v),   p = softmax(original[b, i]), q = softmax(logits[b, i])

    ``[b, s, v], [b, s, v], [b, s] -> [b, s]``. NaN, not 0, at padding. 0 where nothing has changed.
    """
    if original.shape != logits.shape or original.ndim != 3:
        raise InputError(
            f"expected two logits [b, s, v], found {list(original.shape)} and {list(logits.shape)}."
        )
    check_pad(pad, original.shape[:-1])
    found = logits.new_empty(
        logits.shape[:-1], dtype=torch.promote_types(logits.dtype, torch.float32)
    )
    # Row by row: the three copies that this takes of all logits at once would be gigabytes.
    for row, (p, q) in enumerate(zip(original, logits, strict=True)):
        log_p, log_q = (F.log_softmax(values.to(found.dtype), dim=-1) for values in (p, q))
        found[row] = F.kl_div(log_q, log_p, reduction="none", log_target=True).sum(dim=-1)
    return found if pad is None else found.masked_fill(pad, float("nan"))


class DensityHistogram(NamedTuple):
    """How many latents fire how often."""

    edges: list[float]
    """Powers of ten that bound the bins, ascending: a bin holds ``edge <= frequency < next edge``."""
    counts: list[int]
    """Latents in each bin, one fewer than edges."""
    never: int
    """Latents that fired on no token; they are in no bin."""


def density_histogram(frequency: Tensor, per_decade: int = 4) -> DensityHistogram:
    """Sort latents by the logarithm of the share of tokens on which they fire.

    ``[l]`` (:attr:`ReconstructionStats.frequency`) ``->`` bins of a quarter of a decade, from the
    decade of the rarest latent to 1. A latent that always fires is in the last bin.
    """
    fired = frequency[frequency > 0].double().cpu()
    lowest = min(-1, math.floor(float(fired.min().log10()))) if len(fired) else -1
    exponents = torch.linspace(lowest, 0, -lowest * per_decade + 1, dtype=torch.float64)
    edges = 10**exponents
    places = (torch.bucketize(fired, edges, right=True) - 1).clamp(0, len(edges) - 2)
    counts = torch.bincount(places, minlength=len(edges) - 1)
    return DensityHistogram(edges.tolist(), counts.tolist(), len(frequency) - len(fired))


def ce_recovered(
    original: Tensor | float, spliced: Tensor | float, ablated: Tensor | float
) -> Tensor:
    """How much of the loss that ablating a location costs its reconstruction wins back.

        (CE_ablated - CE_spliced) / (CE_ablated - CE_original)

    Each CE is the mean over all tokens (NaN left out) of a cross-entropy per token, or that mean
    itself: first the means, then the ratio. ``-> []`` in float64. 1: as good as the activations
    themselves; 0: as bad as the ablation (usually to zero: say which). It is unstable where the
    ablation hardly matters.

    Bricken et al. 2023 ("loss recovered"); Gao et al. 2024 on what it hides.
    """
    values = [torch.as_tensor(v, dtype=torch.float64) for v in (original, spliced, ablated)]
    places = [torch.isnan(value) for value in values]
    if any(value.shape != values[0].shape for value in values) or any(
        not torch.equal(place, places[0]) for place in places
    ):
        raise InputError(
            "the three cross-entropies must be of the same tokens; found shapes "
            f"{[list(value.shape) for value in values]} with "
            f"{[int((~place).sum()) for place in places]} tokens that count."
        )
    ce_original, ce_spliced, ce_ablated = (value.nanmean() for value in values)
    return (ce_ablated - ce_spliced) / (ce_ablated - ce_original)


def _rows(values: Tensor, what: str) -> Tensor:
    """``[…, w] -> [tokens, w]``."""
    if values.ndim == 0 or not values.numel():
        raise InputError(
            f"{what}: expected at least one token […, width], found {list(values.shape)}."
        )
    return values.reshape(-1, values.shape[-1])
