"""Running totals over batches of tokens, which give the figures of ``metrics.py`` for all of them.

Each figure is defined by the function of its name in :mod:`neuron_explainer.evaluation.metrics`; a
test compares the two in float64. Batches may be cut anywhere and come in any order.

Shape legend: ``n`` inputs of an autoencoder, ``l`` latents, ``t`` tokens, ``…`` any leading axes: all of
them count as tokens.
"""

from dataclasses import dataclass, fields, replace
from typing import Generic, NamedTuple, Self, TypeVar

import torch
from torch import Tensor

from neuron_explainer.errors import InputError
from neuron_explainer.evaluation.metrics import check_same_shape, kept_rows
from neuron_explainer.models.autoencoders.latents import Latents


@dataclass(frozen=True)
class _Sums:
    """Sums over tokens, each ``[]`` in float64."""

    error: Tensor
    """``‖x - x̂‖²``"""
    deviation: Tensor
    """``‖x - x̄‖²``"""
    product: Tensor
    """``⟨x, x̂⟩``"""
    recons_square: Tensor
    """``‖x̂‖²``"""
    cosine: Tensor
    norm_ratio: Tensor
    """``‖x̂‖ / ‖x‖`` where ``x`` is not zero."""
    n_nonzero: Tensor
    """How many ``x`` are not zero."""
    error_share: Tensor
    """``‖x - x̂‖² / ‖x - mean‖²``; NaN if the mean was not known beforehand."""

    @classmethod
    def of(cls, x: Tensor, recons: Tensor, batch_mean: Tensor, mean: Tensor | None) -> Self:
        """Sums over ``[t, n]`` in float64; ``batch_mean`` is theirs, ``mean`` that of all batches."""
        error = (x - recons).square().sum(dim=1)
        product = (x * recons).sum(dim=1)
        norm, recons_norm = x.norm(dim=1), recons.norm(dim=1)
        norms = norm * recons_norm
        share = error.new_tensor(torch.nan)
        if mean is not None:
            share = (error / (x - mean.to(x.device)).square().sum(dim=1)).sum()
        return cls(
            error=error.sum(),
            deviation=(x - batch_mean).square().sum(),
            product=product.sum(),
            recons_square=recons_norm.square().sum(),
            cosine=torch.where(norms > 0, product / norms, 0.0).sum(),
            norm_ratio=torch.where(norm > 0, recons_norm / norm, 0.0).sum(),
            n_nonzero=(norm > 0).sum().double(),
            error_share=share,
        )

    def plus(self, other: "_Sums") -> "_Sums":
        names = [each.name for each in fields(self)]
        pairs = {name: (getattr(self, name), getattr(other, name)) for name in names}
        return _Sums(**{name: a + b.to(a.device) for name, (a, b) in pairs.items()})


class _LatentSums(NamedTuple):
    """Sums over the tokens whose latents were given."""

    fired: Tensor
    """``[l]``: tokens on which each latent is not zero."""
    square: Tensor
    """``[l]`` in float64: the sum of its squares."""
    largest: Tensor
    """``[l]``: its largest value, at least 0."""
    l1: Tensor
    """``[]`` in float64."""
    n_tokens: int

    @classmethod
    def of(cls, values: Tensor, indices: Tensor | None, n_latents: int) -> Self:
        """Sums over dense ``[t, l]`` or, with indices, over sparse ``[t, k]``."""
        l1 = values.abs().sum(dtype=torch.float64)
        active = values != 0
        if indices is None:
            largest = torch.cat([values, values.new_zeros(1, n_latents)]).amax(dim=0)
            square = values.double().square().sum(dim=0)
            return cls(active.sum(dim=0), square, largest, l1, len(values))
        where, flat = indices.flatten(), values.flatten()
        fired = where.new_zeros(n_latents).scatter_add_(0, where, active.flatten().long())
        square = flat.new_zeros(n_latents, dtype=torch.float64)
        square.scatter_add_(0, where, flat.double().square())
        largest = flat.new_zeros(n_latents).scatter_reduce_(0, where, flat, "amax")
        return cls(fired, square, largest, l1, len(values))

    def plus(self, other: "_LatentSums") -> "_LatentSums":
        device = self.fired.device
        return _LatentSums(
            self.fired + other.fired.to(device),
            self.square + other.square.to(device),
            torch.maximum(self.largest, other.largest.to(device)),
            self.l1 + other.l1.to(device),
            self.n_tokens + other.n_tokens,
        )


class ReconstructionStats:
    """Figures of reconstructions and latents over batches of tokens: FVU, L0, L1, frequencies, …

        stats = ReconstructionStats()
        for x in batches:
            out = autoencoder(x)
            stats.update(x, out.recons, out.latents)
        stats.fvu, stats.l0, stats.dead_share

    Args:
        mean: the mean of all tokens ``[n]``, if it is known beforehand.
            :attr:`explained_variance_per_token` needs it.
    """

    def __init__(self, mean: Tensor | None = None) -> None:
        self.n_tokens = 0
        self._known_mean = None if mean is None else mean.detach().double()
        self._mean: Tensor | None = None  # [n]
        self._sums: _Sums | None = None
        self._latents: _LatentSums | None = None

    def update(
        self,
        x: Tensor,
        recons: Tensor,
        latents: Tensor | Latents | None = None,
        pad: Tensor | None = None,
    ) -> Self:
        """Add tokens ``[…, n]``, their reconstructions and, for L0 and dead latents, ``[…, l]``.

        Tokens where ``pad`` ``[…]`` is True do not count. For a transcoder, ``x`` is the activation at
        its output's location.
        """
        check_same_shape(x, recons)
        rows = kept_rows(x.detach(), pad, "x").double()
        others = kept_rows(recons.detach(), pad, "recons").double()
        if self._mean is not None:
            _check_same_width("x", len(self._mean), rows.shape[1])
        if latents is not None:
            self._add_latents(latents, x.shape, pad)
        if len(rows):
            self._add_rows(rows, others)
        return self

    def _add_rows(self, x: Tensor, recons: Tensor) -> None:
        """Add ``[t, n]``. Means and variances are merged by Chan, Golub and LeVeque's update:
        subtracting the squared mean from the mean of squares loses all digits where the mean is
        large."""
        mean = x.mean(dim=0)
        self._add_sums(mean, _Sums.of(x, recons, mean, self._known_mean), len(x))

    def _add_sums(self, mean: Tensor, sums: _Sums, count: int) -> None:
        n_tokens = self.n_tokens + count
        if self._sums is not None and self._mean is not None:
            delta = mean.to(self._mean.device) - self._mean
            shift = delta.square().sum() * (self.n_tokens * count / n_tokens)
            sums = replace(sums, deviation=sums.deviation.to(delta.device) + shift)
            mean = self._mean + delta * (count / n_tokens)
            sums = self._sums.plus(sums)
        self._mean, self._sums, self.n_tokens = mean, sums, n_tokens

    def merge(self, other: Self) -> Self:
        """Add the tokens that another process, or another pass, has counted."""
        if other._mean is not None and other._sums is not None:
            if self._mean is not None:
                _check_same_width("x", len(self._mean), len(other._mean))
            self._add_sums(other._mean, other._sums, other.n_tokens)
        if other._latents is not None:
            if self._latents is not None:
                width = len(other._latents.fired)
                _check_same_width("latents", len(self._latents.fired), width)
            mine = self._latents
            self._latents = other._latents if mine is None else mine.plus(other._latents)
        return self

    def _add_latents(
        self, latents: Tensor | Latents, shape: torch.Size, pad: Tensor | None
    ) -> None:
        if isinstance(latents, Tensor):
            values, indices, n_latents = latents, None, latents.shape[-1]
        else:
            values, indices, n_latents = latents
        if values.shape[:-1] != shape[:-1]:
            raise InputError(
                f"latents must have the leading axes of x {list(shape)}, found {list(values.shape)}."
            )
        values = kept_rows(values.detach(), pad, "latents")
        indices = None if indices is None else kept_rows(indices, pad, "latents")
        if self._latents is not None:
            _check_same_width("latents", len(self._latents.fired), n_latents)
        sums = _LatentSums.of(values, indices, n_latents)
        self._latents = sums if self._latents is None else self._latents.plus(sums)

    # ---- reconstructions -------------------------------------------------------------------------

    @property
    def mean(self) -> Tensor:
        """``[n]``: the mean token."""
        if self._mean is None:
            raise InputError("no tokens have been added yet.")
        return self._mean

    @property
    def fvu(self) -> Tensor:
        """``[]``: :func:`~neuron_explainer.evaluation.metrics.fvu` of all tokens so far."""
        return self._added.error / self._added.deviation

    @property
    def explained_variance(self) -> Tensor:
        """``[]``: :func:`~neuron_explainer.evaluation.metrics.explained_variance`."""
        return 1 - self.fvu

    @property
    def explained_variance_per_token(self) -> Tensor:
        """``[]``: :func:`~neuron_explainer.evaluation.metrics.explained_variance_per_token`.

        It needs the mean of all tokens before the first one is added.
        """
        if self._known_mean is None:
            raise InputError(
                "explained_variance_per_token needs the mean of all tokens before the first is added: "
                "ReconstructionStats(mean)."
            )
        return 1 - self._added.error_share / self.n_tokens

    @property
    def mse(self) -> Tensor:
        """``[]``: squared error per token, summed over the width and averaged over tokens."""
        return self._added.error / self.n_tokens

    @property
    def cosine_similarity(self) -> Tensor:
        """``[]``: :func:`~neuron_explainer.evaluation.metrics.cosine_similarity`."""
        return self._added.cosine / self.n_tokens

    @property
    def norm_ratio(self) -> Tensor:
        """``[]``: :func:`~neuron_explainer.evaluation.metrics.norm_ratio`."""
        return self._added.norm_ratio / self._added.n_nonzero

    @property
    def relative_reconstruction_bias(self) -> Tensor:
        """``[]``: :func:`~neuron_explainer.evaluation.metrics.relative_reconstruction_bias`."""
        return self._added.recons_square / self._added.product

    @property
    def _added(self) -> _Sums:
        if self._sums is None:
            raise InputError("no tokens have been added yet.")
        return self._sums

    # ---- latents ---------------------------------------------------------------------------------

    @property
    def frequency(self) -> Tensor:
        """``[l]``: share of tokens on which each latent is not zero."""
        return self._encoded.fired.double() / self._encoded.n_tokens

    @property
    def mean_square(self) -> Tensor:
        """``[l]``: mean over tokens of each latent's square, in float64."""
        return self._encoded.square / self._encoded.n_tokens

    @property
    def largest(self) -> Tensor:
        """``[l]``: the largest value of each latent; 0 if it has never been positive."""
        return self._encoded.largest

    @property
    def l0(self) -> Tensor:
        """``[]``: :func:`~neuron_explainer.evaluation.metrics.l0` of all tokens so far."""
        return self._encoded.fired.sum().double() / self._encoded.n_tokens

    @property
    def l1(self) -> Tensor:
        """``[]``: :func:`~neuron_explainer.evaluation.metrics.l1` of all tokens so far."""
        return self._encoded.l1 / self._encoded.n_tokens

    @property
    def dead_share(self) -> Tensor:
        """``[]``: :func:`~neuron_explainer.evaluation.metrics.dead_share`. Report ``n_tokens`` too."""
        return (self._encoded.fired == 0).double().mean()

    @property
    def _encoded(self) -> _LatentSums:
        if self._latents is None or not self._latents.n_tokens:
            raise InputError("no latents have been added yet.")
        return self._latents

    def __repr__(self) -> str:
        facts = [f"n_tokens={self.n_tokens}"]
        if self.n_tokens:
            facts.append(f"fvu={float(self.fvu):.6g}")
        if self._latents is not None and self._latents.n_tokens:
            facts += [f"l0={float(self.l0):.6g}", f"dead_share={float(self.dead_share):.6g}"]
        return f"ReconstructionStats({', '.join(facts)})"


def _check_same_width(what: str, so_far: int, width: int) -> None:
    if so_far != width:
        raise InputError(f"{what}: width {so_far} so far, found {width}.")


# ---- losses --------------------------------------------------------------------------------------

T = TypeVar("T")


class ByLoss(NamedTuple, Generic[T]):
    """One value for each loss of the model's predictions that an evaluation measures."""

    ce_original: T
    """Cross-entropy of the model as it is."""
    ce_spliced: T
    """Cross-entropy with the reconstruction in place of the activation."""
    ce_zero_ablated: T
    ce_mean_ablated: T
    kl: T
    """KL divergence of the predictions with the reconstruction from the original ones."""
    kl_zero_ablated: T
    kl_mean_ablated: T


class LossTotals:
    """Means of losses per token over batches; tokens whose loss is NaN do not count."""

    def __init__(self) -> None:
        self._sums: ByLoss[float] = ByLoss(*[0.0] * 7)
        self._counts: ByLoss[int] = ByLoss(*[0] * 7)

    def update(self, per_token: ByLoss[Tensor]) -> None:
        """Add the losses of a batch of predictions."""
        kept = [values[~values.isnan()].double() for values in per_token]
        self._sums = ByLoss(*(a + float(v.sum()) for a, v in zip(self._sums, kept, strict=True)))
        self._counts = ByLoss(*(a + v.numel() for a, v in zip(self._counts, kept, strict=True)))

    @property
    def n_tokens(self) -> int:
        """How many predictions have been counted."""
        return self._counts.ce_original

    @property
    def means(self) -> ByLoss[float]:
        """The mean of each loss."""
        if not self.n_tokens:
            raise InputError("no predictions have been added yet.")
        return ByLoss(*(s / n for s, n in zip(self._sums, self._counts, strict=True)))
