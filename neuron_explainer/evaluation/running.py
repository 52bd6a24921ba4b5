"""Running totals over batches of tokens, from which every measure of a reconstruction follows.

Shape legend: ``n`` inputs of an autoencoder, ``l`` latents, ``…`` any leading axes: all of them count
as tokens.
"""

import math
from collections.abc import Mapping
from typing import Self

import torch
from torch import Tensor

from neuron_explainer.errors import InputError
from neuron_explainer.models.autoencoders.latents import Latents


class ReconstructionStats:
    """Running totals over batches of tokens: FVU and its kin, L0, L1, how often each latent fires.

    Batches may be cut anywhere and come in any order; the results agree to rounding in float64. The
    variance is merged by Chan, Golub and LeVeque's update, since subtracting the square of the mean
    from the mean of squares loses all digits where the mean is large.

        stats = ReconstructionStats()
        for x in batches:
            out = autoencoder(x)
            stats.update(x, out.recons, out.latents)
        stats.fvu, stats.l0, stats.dead_share

    Args:
        mean: of all tokens ``[n]``, where it is known beforehand: for
            :attr:`explained_variance_per_token`, which cannot be had without.
    """

    def __init__(self, mean: Tensor | None = None) -> None:
        self.n_tokens = 0
        self._about = None if mean is None else mean.detach().double()
        self._mean: Tensor | None = None  # [n]
        self._sums: dict[str, Tensor] = {}  # [] float64 each, over tokens
        self._fired: Tensor | None = None  # [l], tokens on which each latent is not zero
        self._tokens_with_latents = 0

    def update(
        self,
        x: Tensor,
        recons: Tensor,
        latents: Tensor | Latents | None = None,
        pad: Tensor | None = None,
    ) -> Self:
        """Add tokens ``[…, n]``, their reconstructions and, for L0 and dead latents, ``[…, l]``.

        ``pad`` ``[…]`` is True at the tokens that do not count. For a transcoder ``x`` is what its
        output stands for.
        """
        if x.shape != recons.shape:
            raise InputError(
                f"x and its reconstruction must have one shape, found {list(x.shape)} and "
                f"{list(recons.shape)}."
            )
        rows = kept_rows(x.detach(), pad, "x").double()
        batch = ReconstructionStats()
        if len(rows):
            batch.n_tokens = len(rows)
            batch._mean = rows.mean(dim=0)
            others = kept_rows(recons.detach(), pad, "recons").double()
            batch._sums = _sums_over_tokens(rows, others, batch._mean, self._about)
        if latents is not None:
            batch._add_latents(latents, x.shape, pad)
        return self.merge(batch)

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
            places = kept_rows(latents.indices, pad, "latents")
            fired = places.new_zeros(latents.n_latents)
            fired.scatter_add_(0, places.flatten(), active.flatten().to(fired.dtype))
        if self.n_tokens:
            self._fired, self._tokens_with_latents = fired, self.n_tokens
            self._sums["l1"] = values.abs().sum(dtype=torch.float64)

    def merge(self, other: "ReconstructionStats") -> Self:
        """Add the tokens of another accumulator, of another process perhaps."""
        if other._mean is None:
            return self
        sums = dict(other._sums)
        if self._mean is None:
            self._mean = other._mean
        else:
            mean = other._mean.to(self._mean.device)
            _check_same_width("x", self._mean, mean)
            total = self.n_tokens + other.n_tokens
            delta = mean - self._mean
            shift = delta.square().sum() * (self.n_tokens * other.n_tokens / total)
            sums["deviation"] = sums["deviation"].to(delta.device) + shift
            self._mean = self._mean + delta * (other.n_tokens / total)
        for name, value in sums.items():
            old = self._sums.get(name)
            self._sums[name] = value if old is None else old + value.to(old.device)
        self.n_tokens += other.n_tokens
        if other._fired is not None:
            fired = other._fired
            if self._fired is not None:
                _check_same_width("latents", self._fired, fired)
                fired = self._fired + fired.to(self._fired.device)
            self._fired = fired
            self._tokens_with_latents += other._tokens_with_latents
        return self

    def state_dict(self) -> dict[str, Tensor]:
        """Everything added so far, as tensors: to be saved, or sent to the process that merges."""
        state = {f"sums.{name}": value for name, value in self._sums.items()}
        state["n_tokens"] = torch.tensor(self.n_tokens)
        state["tokens_with_latents"] = torch.tensor(self._tokens_with_latents)
        parts = {"about": self._about, "mean": self._mean, "fired": self._fired}
        return state | {name: value for name, value in parts.items() if value is not None}

    @classmethod
    def from_state_dict(cls, state: Mapping[str, Tensor]) -> Self:
        """The accumulator that :meth:`state_dict` describes; adding to it goes on from there."""
        stats = cls(state.get("about"))
        stats.n_tokens = int(state["n_tokens"])
        stats._tokens_with_latents = int(state["tokens_with_latents"])
        stats._mean, stats._fired = state.get("mean"), state.get("fired")
        prefix = "sums."
        stats._sums = {
            name.removeprefix(prefix): value
            for name, value in state.items()
            if name.startswith(prefix)
        }
        return stats

    # ---- of reconstructions --------------------------------------------------------------------

    @property
    def mean(self) -> Tensor:
        """``[n]``: the mean token."""
        self._require(self.n_tokens, "tokens")
        assert self._mean is not None
        return self._mean

    @property
    def fvu(self) -> Tensor:
        """``[]``, see :func:`~neuron_explainer.evaluation.metrics.fvu`, over all tokens so far."""
        return self._sum("error") / self._sum("deviation")

    @property
    def explained_variance(self) -> Tensor:
        """``[]``, see :func:`~neuron_explainer.evaluation.metrics.explained_variance`."""
        return 1 - self.fvu

    @property
    def explained_variance_per_token(self) -> Tensor:
        """``[]``, see :func:`~neuron_explainer.evaluation.metrics.explained_variance_per_token`.

        It needs the mean from the beginning.
        """
        if self.n_tokens and "error_share" not in self._sums:
            raise InputError(
                "explained_variance_per_token needs the mean of all tokens before the first is added: "
                "ReconstructionStats(mean)."
            )
        return 1 - self._sum("error_share") / self.n_tokens

    @property
    def mse(self) -> Tensor:
        """``[]``: squared error per token, summed over the width and averaged over tokens."""
        return self._sum("error") / self.n_tokens

    @property
    def cosine_similarity(self) -> Tensor:
        """``[]``, see :func:`~neuron_explainer.evaluation.metrics.cosine_similarity`."""
        return self._sum("cosine") / self.n_tokens

    @property
    def norm_ratio(self) -> Tensor:
        """``[]``, see :func:`~neuron_explainer.evaluation.metrics.norm_ratio`."""
        return self._sum("norm_ratio") / self._sum("not_zero")

    @property
    def relative_reconstruction_bias(self) -> Tensor:
        """``[]``, see :func:`~neuron_explainer.evaluation.metrics.relative_reconstruction_bias`."""
        return self._sum("recons_square") / self._sum("product")

    # ---- of latents ----------------------------------------------------------------------------

    @property
    def frequency(self) -> Tensor:
        """``[l]``: share of tokens on which each latent is not zero."""
        self._require(self._tokens_with_latents, "latents")
        assert self._fired is not None
        return self._fired.double() / self._tokens_with_latents

    @property
    def l0(self) -> Tensor:
        """``[]``, see :func:`~neuron_explainer.evaluation.metrics.l0`, over all tokens so far."""
        return self.frequency.sum()

    @property
    def l1(self) -> Tensor:
        """``[]``, see :func:`~neuron_explainer.evaluation.metrics.l1`, over all tokens so far."""
        self._require(self._tokens_with_latents, "latents")
        return self._sums["l1"] / self._tokens_with_latents

    @property
    def dead_share(self) -> Tensor:
        """``[]``, see :func:`~neuron_explainer.evaluation.metrics.dead_share`; report ``n_tokens`` too."""
        return (self.frequency == 0).double().mean()

    def _sum(self, name: str) -> Tensor:
        self._require(self.n_tokens, "tokens")
        return self._sums[name]

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


def _sums_over_tokens(
    x: Tensor, recons: Tensor, mean: Tensor, about: Tensor | None
) -> dict[str, Tensor]:
    """What :class:`ReconstructionStats` adds up, of tokens ``[b, n]`` in float64."""
    error = (x - recons).square().sum(dim=1)
    product = (x * recons).sum(dim=1)
    norm, recons_norm = x.norm(dim=1), recons.norm(dim=1)
    norms = norm * recons_norm
    sums = {
        "error": error.sum(),
        "deviation": (x - mean).square().sum(),
        "product": product.sum(),
        "recons_square": recons_norm.square().sum(),
        "cosine": torch.where(norms > 0, product / norms, 0.0).sum(),
        "norm_ratio": torch.where(norm > 0, recons_norm / norm, 0.0).sum(),
        "not_zero": (norm > 0).sum().double(),
    }
    if about is not None:
        sums["error_share"] = (error / (x - about.to(x.device)).square().sum(dim=1)).sum()
    return sums


def kept_rows(values: Tensor, pad: Tensor | None, what: str) -> Tensor:
    """``[…, w] -> [tokens, w]`` without those that are padding."""
    if values.ndim == 0:
        raise InputError(f"{what}: expected […, width], found a single number.")
    # Not -1: the sparse latents of tokens on which none fires have width 0.
    rows = values.reshape(math.prod(values.shape[:-1]), values.shape[-1])
    if pad is None:
        return rows
    check_pad(pad, values.shape[:-1])
    return rows[~pad.flatten()]


def check_pad(pad: Tensor | None, shape: torch.Size) -> None:
    if pad is not None and (pad.shape != shape or pad.dtype != torch.bool):
        raise InputError(
            f"expected a bool pad mask {list(shape)}, found {list(pad.shape)} of {pad.dtype}."
        )


def _check_same_width(what: str, one: Tensor, other: Tensor) -> None:
    if one.shape != other.shape:
        raise InputError(f"{what}: width {len(one)} so far, found {len(other)}.")
