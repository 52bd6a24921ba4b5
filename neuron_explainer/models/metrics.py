"""How well an autoencoder stands in for the activations it was trained on: executable definitions.

The names of these measures are shared by the field, their definitions are not; each function says
which one it is. Sums are taken in float64 and, over several batches, exactly as if all tokens had
been one batch: means of per-batch values depend on where batches are cut, and are not used.

Shape legend: ``b`` batch, ``s`` sequence, ``n`` inputs of an autoencoder, ``l`` latents, ``v``
vocabulary, ``…`` any leading axes: all of them count as tokens.
"""

from typing import Self

import torch
import torch.nn.functional as F
from torch import Tensor

from neuron_explainer.errors import InputError


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


def l0(latents: Tensor) -> Tensor:
    """Mean number of latents per token that are not zero. ``[…, l] -> []`` in float64.

    Cunningham et al. 2023. For latents that may be negative, "> 0" would be another number.
    """
    tokens = _rows(latents, "latents")
    return (tokens != 0).sum().double() / len(tokens)


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
    if pad.shape != tokens.shape or pad.dtype != torch.bool:
        raise InputError(
            f"expected a bool pad mask {list(tokens.shape)}, found {list(pad.shape)} of {pad.dtype}."
        )
    return losses.masked_fill(pad[:, 1:] | pad[:, :-1], float("nan"))


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


class ReconstructionStats:
    """Running totals over batches of tokens: FVU, L0, how often each latent fires.

    Batches may be cut anywhere and come in any order; the results agree to rounding in float64. The
    variance is merged by Chan, Golub and LeVeque's update, since subtracting the square of the mean
    from the mean of squares loses all digits where the mean is large.

        stats = ReconstructionStats()
        for x in batches:
            out = autoencoder(x)
            stats.update(x, out.recons, out.latents)
        stats.fvu, stats.l0, stats.dead_share
    """

    def __init__(self) -> None:
        self.n_tokens = 0
        self._mean: Tensor | None = None  # [n]
        self._deviation = torch.zeros((), dtype=torch.float64)  # Σ ‖x - mean‖²
        self._error = torch.zeros((), dtype=torch.float64)  # Σ ‖x - x̂‖²
        self._fired: Tensor | None = None  # [l], tokens on which each latent is not zero
        self._tokens_with_latents = 0

    def update(
        self, x: Tensor, recons: Tensor, latents: Tensor | None = None, pad: Tensor | None = None
    ) -> Self:
        """Add tokens ``[…, n]``, their reconstructions and, for L0 and dead latents, ``[…, l]``.

        ``pad`` ``[…]`` is True at the tokens that do not count.
        """
        if x.shape != recons.shape:
            raise InputError(
                f"x and its reconstruction must have one shape, found {list(x.shape)} and "
                f"{list(recons.shape)}."
            )
        if latents is not None and latents.shape[:-1] != x.shape[:-1]:
            raise InputError(
                f"latents must have the leading axes of x {list(x.shape)}, found "
                f"{list(latents.shape)}."
            )
        rows = _kept(x.detach(), pad, "x").double()
        batch = ReconstructionStats()
        if len(rows):
            batch.n_tokens = len(rows)
            batch._mean = rows.mean(dim=0)
            batch._deviation = (rows - batch._mean).square().sum()
            batch._error = (rows - _kept(recons.detach(), pad, "recons")).square().sum()
            if latents is not None:
                active = _kept(latents.detach(), pad, "latents") != 0
                batch._fired = active.sum(dim=0)
                batch._tokens_with_latents = len(rows)
        return self.merge(batch)

    def merge(self, other: "ReconstructionStats") -> Self:
        """Add the tokens of another accumulator, of another process perhaps."""
        if other._mean is None:
            return self
        if self._mean is None:
            self._mean = other._mean
            self._deviation = other._deviation
        else:
            mean, deviation = other._mean.to(self._mean.device), other._deviation
            _check_same_width("x", self._mean, mean)
            total = self.n_tokens + other.n_tokens
            delta = mean - self._mean
            shift = delta.square().sum() * (self.n_tokens * other.n_tokens / total)
            self._deviation = self._deviation + deviation.to(delta.device) + shift
            self._mean = self._mean + delta * (other.n_tokens / total)
        self._error = self._error.to(self._mean.device) + other._error.to(self._mean.device)
        self.n_tokens += other.n_tokens
        if other._fired is not None:
            fired = other._fired
            if self._fired is not None:
                _check_same_width("latents", self._fired, fired)
                fired = self._fired + fired.to(self._fired.device)
            self._fired = fired
            self._tokens_with_latents += other._tokens_with_latents
        return self

    @property
    def fvu(self) -> Tensor:
        """``[]``, see :func:`fvu`, over all tokens so far."""
        self._require(self.n_tokens, "tokens")
        return self._error / self._deviation

    @property
    def mse(self) -> Tensor:
        """``[]``: squared error per token, summed over the width and averaged over tokens."""
        self._require(self.n_tokens, "tokens")
        return self._error / self.n_tokens

    @property
    def frequency(self) -> Tensor:
        """``[l]``: share of tokens on which each latent is not zero."""
        self._require(self._tokens_with_latents, "latents")
        assert self._fired is not None
        return self._fired.double() / self._tokens_with_latents

    @property
    def l0(self) -> Tensor:
        """``[]``, see :func:`l0`, over all tokens so far."""
        return self.frequency.sum()

    @property
    def dead_share(self) -> Tensor:
        """``[]``, see :func:`dead_share`; report ``n_tokens`` with it."""
        return (self.frequency == 0).double().mean()

    @staticmethod
    def _require(count: int, what: str) -> None:
        if not count:
            raise InputError(f"no {what} have been added yet.")

    def __repr__(self) -> str:
        facts = [f"n_tokens={self.n_tokens}"]
        if self.n_tokens:
            facts.append(f"fvu={float(self.fvu):.6g}")
        if self._tokens_with_latents:
            facts += [f"l0={float(self.l0):.6g}", f"dead_share={float(self.dead_share):.6g}"]
        return f"ReconstructionStats({', '.join(facts)})"


def _rows(values: Tensor, what: str) -> Tensor:
    """``[…, w] -> [tokens, w]``."""
    if values.ndim == 0 or not values.numel():
        raise InputError(
            f"{what}: expected at least one token […, width], found {list(values.shape)}."
        )
    return values.reshape(-1, values.shape[-1])


def _kept(values: Tensor, pad: Tensor | None, what: str) -> Tensor:
    """``[…, w] -> [tokens, w]`` without those that are padding."""
    if values.ndim == 0:
        raise InputError(f"{what}: expected […, width], found a single number.")
    rows = values.reshape(-1, values.shape[-1])
    if pad is None:
        return rows
    if pad.shape != values.shape[:-1] or pad.dtype != torch.bool:
        raise InputError(
            f"expected a bool pad mask {list(values.shape[:-1])}, found {list(pad.shape)} of "
            f"{pad.dtype}."
        )
    return rows[~pad.flatten()]


def _check_same_width(what: str, one: Tensor, other: Tensor) -> None:
    if one.shape != other.shape:
        raise InputError(f"{what}: width {len(one)} so far, found {len(other)}.")
