"""How well an autoencoder reconstructs the activations it was trained on: executable definitions.

The field shares the names of these measures but not their definitions, so each function states its
formula. Everything here takes all tokens at once, in float64. For tokens that come in batches,
:mod:`neuron_explainer.evaluation.running` keeps running totals that give the same figures: a mean of
per-batch figures would depend on where the batches are cut.

Shape legend: ``b`` batch, ``s`` sequence, ``n`` inputs of an autoencoder, ``l`` latents, ``t`` tokens,
``v`` vocabulary, ``…`` any leading axes: all of them count as tokens.
"""

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from neuron_explainer.errors import InputError
from neuron_explainer.models.checks import check_tensor

__all__ = [
    "DensityHistogram",
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
    "n_active",
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
    x, recons = _pairs(x, recons)
    return (x - recons).square().sum() / (x - x.mean(dim=0)).square().sum()


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
    x, recons = _pairs(x, recons, pad)
    mean = x.mean(dim=0) if mean is None else mean.double()
    shares = (x - recons).square().sum(dim=1) / (x - mean).square().sum(dim=1)
    return 1 - shares.mean()


def cosine_similarity(x: Tensor, recons: Tensor) -> Tensor:
    """Mean over tokens of ``cos(x, x̂)``, 0 where either is zero. ``[…, n], […, n] -> []``, float64."""
    x, recons = _pairs(x, recons)
    norms = x.norm(dim=1) * recons.norm(dim=1)
    return torch.where(norms > 0, (x * recons).sum(dim=1) / norms, 0.0).mean()


def norm_ratio(x: Tensor, recons: Tensor) -> Tensor:
    """Mean of ``‖x̂‖ / ‖x‖`` over the tokens that are not zero. ``[…, n], […, n] -> []`` in float64.

    Below 1 where an autoencoder shrinks what it reconstructs, as those trained with L1 do.
    """
    x, recons = _pairs(x, recons)
    norms = x.norm(dim=1)
    ratios: Tensor = recons.norm(dim=1) / norms
    return ratios[norms > 0].mean()


def relative_reconstruction_bias(x: Tensor, recons: Tensor) -> Tensor:
    """``Σ ‖x̂‖² / Σ ⟨x, x̂⟩``: 1 if no rescaling of ``x̂`` would lower the error, less if it shrinks.

    ``[…, n], […, n] -> []`` in float64. Rajamanoharan et al. 2024, equation 10.
    """
    x, recons = _pairs(x, recons)
    return recons.square().sum() / (x * recons).sum()


def l0(latents: Tensor) -> Tensor:
    """Mean number of latents per token that are not zero. ``[…, l] -> []`` in float64.

    Cunningham et al. 2023. For latents that may be negative, "> 0" would be another number.
    """
    tokens = _some_rows(latents, "latents")
    return n_active(tokens).double() / len(tokens)


def n_active(latents: Tensor) -> Tensor:
    """How many of the values are not zero, which is what "active" means everywhere. ``-> []`` int64."""
    check_tensor(latents, "latents")
    return (latents != 0).sum()


def l1(latents: Tensor) -> Tensor:
    """Mean over tokens of the sum of the latents' magnitudes. ``[…, l] -> []`` in float64."""
    tokens = _some_rows(latents, "latents")
    return tokens.abs().sum(dtype=torch.float64) / len(tokens)


def dead_share(latents: Tensor) -> Tensor:
    """Share of latents that are zero on every token given. ``[…, l] -> []`` in float64.

    It falls as more tokens are given, so always report the number of tokens with it. (Gao et al. 2024
    call a latent dead that has not been active for 10 million training tokens.)
    """
    return (_some_rows(latents, "latents") == 0).all(dim=0).double().mean()


def cross_entropy_per_token(logits: Tensor, tokens: Tensor, pad: Tensor | None = None) -> Tensor:
    """Cross-entropy, in nats, of each token given those before it.

        ce[b, i] = -log softmax(logits[b, i])[tokens[b, i + 1]]

    ``[b, s, v], [b, s], [b, s] -> [b, s - 1]``. Where the token or the one before it is padding
    (``pad`` True) there is nothing to predict: the value is NaN, not 0, so that no mean counts it.
    """
    check_tensor(logits, "logits")
    check_tensor(tokens, "tokens")
    if logits.shape[:-1] != tokens.shape or tokens.ndim != 2:
        raise InputError(
            f"expected logits [b, s, v] and tokens [b, s], found {list(logits.shape)} and "
            f"{list(tokens.shape)}."
        )
    dtype = torch.promote_types(logits.dtype, torch.float32)
    # Row by row, as all logits at once would have to be copied.
    rows = zip(logits[:, :-1], tokens[:, 1:], strict=True)
    losses = torch.stack(
        [F.cross_entropy(row.to(dtype), wanted, reduction="none") for row, wanted in rows]
    )
    if pad is None:
        return losses
    check_pad(pad, tokens.shape)
    return losses.masked_fill(pad[:, 1:] | pad[:, :-1], float("nan"))


def kl_divergence_per_token(original: Tensor, logits: Tensor, pad: Tensor | None = None) -> Tensor:
    """KL divergence of the changed next-token predictions from the original ones, in nats.

        kl[b, i] = Σ_v p_v (log p_v - log q_v),   p = softmax(original[b, i]), q = softmax(logits[b, i])

    ``[b, s, v], [b, s, v], [b, s] -> [b, s]``. 0 where nothing has changed; NaN, not 0, at padding.
    """
    check_tensor(original, "original")
    check_tensor(logits, "logits")
    if original.shape != logits.shape or original.ndim != 3:
        raise InputError(
            f"expected two logits [b, s, v], found {list(original.shape)} and {list(logits.shape)}."
        )
    check_pad(pad, original.shape[:-1])
    found = logits.new_empty(
        logits.shape[:-1], dtype=torch.promote_types(logits.dtype, torch.float32)
    )
    # Row by row: for all rows at once, the three copies of the logits would take gigabytes.
    for row, (p, q) in enumerate(zip(original, logits, strict=True)):
        log_p, log_q = (F.log_softmax(values.to(found.dtype), dim=-1) for values in (p, q))
        found[row] = F.kl_div(log_q, log_p, reduction="none", log_target=True).sum(dim=-1)
    return found if pad is None else found.masked_fill(pad, float("nan"))


class DensityHistogram(NamedTuple):
    """How many latents fire how often."""

    edges: list[float]
    """Where the bins begin and end, ascending: a bin holds ``edge <= frequency < next edge``."""
    counts: list[int]
    """How many latents are in each bin; there is one bin fewer than edges."""
    never: int
    """How many latents fired on no token; they are in no bin."""


def density_histogram(frequency: Tensor, per_decade: int = 4) -> DensityHistogram:
    """Count latents by the share of tokens on which they fire, in bins of equal width in log10.

    ``frequency`` is ``[l]`` (:attr:`~neuron_explainer.evaluation.running.ReconstructionStats.frequency`).
    The bins run from the decade of the rarest latent to 1, ``per_decade`` of them a decade. A latent
    that always fires is in the last bin.
    """
    check_tensor(frequency, "frequency")
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
    """Share of the loss caused by ablating a location that its reconstruction recovers.

        (CE_ablated - CE_spliced) / (CE_ablated - CE_original)

    Give each cross-entropy per token (NaN does not count) or as its mean: the means are taken first,
    then the ratio. ``-> []`` in float64. 1 means as good as the activations themselves, 0 as bad as the
    ablation (say which one: to zero, to the mean). The ratio is unstable where the ablation costs
    little.

    Bricken et al. 2023 ("loss recovered"); Gao et al. 2024 on what it hides.
    """
    for value in (original, spliced, ablated):
        if not isinstance(value, int | float):
            check_tensor(value, "a cross-entropy that is no number")
    values = [torch.as_tensor(v, dtype=torch.float64) for v in (original, spliced, ablated)]
    places = [torch.isnan(value) for value in values]
    if any(value.shape != values[0].shape for value in values) or any(
        not torch.equal(place, places[0]) for place in places
    ):
        raise InputError(
            "the three cross-entropies must be those of the same tokens; found shapes "
            f"{[list(value.shape) for value in values]} with "
            f"{[int((~place).sum()) for place in places]} tokens that count."
        )
    ce_original, ce_spliced, ce_ablated = (value.nanmean() for value in values)
    return (ce_ablated - ce_spliced) / (ce_ablated - ce_original)


# ---- tokens as rows --------------------------------------------------------------------------------


def kept_rows(values: Tensor, pad: Tensor | None, what: str) -> Tensor:
    """``[…, w] -> [t, w]``, without the tokens that are padding; ``what`` names them in errors."""
    check_tensor(values, what)
    if values.ndim == 0:
        raise InputError(f"{what}: expected […, width], found a single number.")
    # Not -1: the sparse latents of tokens on which none fires have width 0.
    rows = values.reshape(math.prod(values.shape[:-1]), values.shape[-1])
    if pad is None:
        return rows
    check_pad(pad, values.shape[:-1])
    return rows[~pad.flatten()]


def check_pad(pad: Tensor | None, shape: torch.Size) -> None:
    """Raise InputError unless ``pad`` is a bool mask of this shape, or None."""
    if pad is not None:
        check_tensor(pad, "pad")
    if pad is not None and (pad.shape != shape or pad.dtype != torch.bool):
        raise InputError(
            f"expected a bool pad mask {list(shape)}, found {list(pad.shape)} of {pad.dtype}."
        )


def check_same_shape(x: Tensor, recons: Tensor) -> None:
    """Raise InputError unless activations and reconstructions have the same shape."""
    check_tensor(x, "x")
    check_tensor(recons, "recons")
    if x.shape != recons.shape:
        raise InputError(
            f"x and its reconstruction must have one shape, found {list(x.shape)} and "
            f"{list(recons.shape)}."
        )


def _pairs(x: Tensor, recons: Tensor, pad: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Activations and reconstructions as ``[t, n]`` in float64, without gradients and padding."""
    check_same_shape(x, recons)
    _some_rows(x, "x")
    rows = kept_rows(x.detach(), pad, "x")
    return rows.double(), kept_rows(recons.detach(), pad, "recons").double()


def _some_rows(values: Tensor, what: str) -> Tensor:
    """``[…, w] -> [t, w]``, at least one token."""
    rows = kept_rows(values, None, what)
    if not rows.numel():
        raise InputError(
            f"{what}: expected at least one token […, width], found {list(values.shape)}."
        )
    return rows
