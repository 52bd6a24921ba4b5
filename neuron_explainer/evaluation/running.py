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
    l1: Tensor
    """``[]`` in float64."""
    n_tokens: int


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
        sums = _Sums.of(x, recons, mean, self._known_mean)
        n_tokens = self.n_tokens + len(x)
        if self._sums is not None and self._mean is not None:
            delta = mean.to(self._mean.device) - self._mean
            shift = delta.square().sum() * (self.n_tokens * len(x) / n_tokens)
            sums = replace(sums, deviation=sums.deviation.to(delta.device) + shift)
            mean = self._mean + delta * (len(x) / n_tokens)
            sums = self._sums.plus(sums)
        self._mean, self._sums, self.n_tokens = mean, sums, n_tokens

    def _add_latents(
        self, latents: Tensor | Latents, shape: torch.Size, pad: Tensor | None
    ) -> None:
        values = latents if isinstance(latents, Tensor) else latents.values
        if values.shape[:-1] != shape[:-1]:
            raise InputError(
                f"latents must have the leading axes of x {list(shape)}, found {list(values.shape)}."
            )
        values = kept_rows(values.detach(), pad, "latents")
        active = values != 0
        if isinstance(latents, Tensor):
            fired = active.sum(dim=0)
        else:
            indices = kept_rows(latents.indices, pad, "latents")
            fired = indices.new_zeros(latents.n_latents)
            fired.scatter_add_(0, indices.flatten(), active.flatten().to(fired.dtype))
        sums = _LatentSums(fired, values.abs().sum(dtype=torch.float64), len(values))
        if self._latents is not None:
            so_far, device = self._latents, self._latents.fired.device
            _check_same_width("latents", len(so_far.fired), len(fired))
            sums = _LatentSums(
                so_far.fired + fired.to(device),
                so_far.l1 + sums.l1.to(device),
                so_far.n_tokens + sums.n_tokens,
            )
        self._latents = sums

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
