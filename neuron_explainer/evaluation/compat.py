"""Other libraries' figures, by their own definitions and names, to compare published figures with.

The libraries share names but not definitions, and several of their figures depend on how tokens are
cut into batches. Ours are in :mod:`neuron_explainer.evaluation.metrics`; these are theirs:

``"saelens_legacy"``     SAELens and SAEBench. ``explained_variance_legacy`` is one minus the mean over
                         tokens of ``‖x - x̂‖² / ‖x - x̄‖²``, x̄ the mean of the *batch*; SAEBench's
                         paper uses it. ``explained_variance_about_zero`` is what SAELens gave as
                         ``explained_variance`` from March 2025 to 6.45.1: variance about zero, which
                         makes any autoencoder look good; ``explained_variance`` is that since 6.45.2.
``"dictionary_learning"``  everything is averaged over batches, ratios too. ``frac_variance_explained``
                         compares ``var(x - x̂)`` with ``var(x)``, so that a constant error costs
                         nothing; ``frac_recovered`` is a mean of ratios of losses.
``"sparsify"``           ``fvu``: ``Σ ‖x - x̂‖² / Σ ‖x - x̄‖²`` in each batch, averaged over batches.
``"openai"``             ``normalized_mean_squared_error`` is the mean over tokens of
                         ``‖x - x̂‖² / ‖x‖²`` (the paper divides by the error of the mean instead).

They all count the start token and have no pads; ``evaluate(…, score_bos=True)`` does the same.

Shape legend: ``b`` tokens of a batch, ``n`` width, ``l`` latents, ``t`` predictions of a batch.
"""

from collections.abc import Callable, Mapping
from typing import NamedTuple

from torch import Tensor

from neuron_explainer.errors import InputError, did_you_mean
from neuron_explainer.evaluation.running import ByLoss, ReconstructionStats
from neuron_explainer.models.autoencoder import Autoencoder

Figures = dict[str, Tensor]


class PeerBatch(NamedTuple):
    """One batch, without the tokens that do not count."""

    x: Tensor
    """``[b, n]`` in float64"""
    recons: Tensor
    """``[b, n]`` in float64"""
    l0: Tensor
    """``[b]``: how many latents of each token are not zero."""
    l1: Tensor
    """``[b]``: the sum of their magnitudes."""
    features_l1: Tensor
    """``[b]``: the same of what dictionary_learning calls features, see :func:`feature_scale`."""


class Peer(NamedTuple):
    """How one library defines its figures."""

    measure: Callable[[PeerBatch], Figures]
    """Returns ``[b]`` for a figure that is averaged over tokens, ``[]`` for one averaged over batches."""
    losses: Callable[[ByLoss[Tensor]], Figures]
    """The same for the predictions of a batch that count: ``[t]`` each, in float64."""
    finish: Callable[[dict[str, float], ReconstructionStats], dict[str, float]]
    """The figures to report, from the averages and our own totals."""


class PeerStats:
    """Running averages of one peer's figures; call :meth:`update` once for each of the peer's batches."""

    def __init__(self, name: str) -> None:
        if name not in PEERS:
            raise InputError(
                f"unknown compat {name!r}.{did_you_mean(name, PEERS)} Known: {', '.join(PEERS)}."
            )
        self._peer = PEERS[name]
        self._sums: dict[str, tuple[float, int]] = {}

    def update(self, batch: PeerBatch) -> None:
        """Add a batch of tokens."""
        if len(batch.x):
            self._add(self._peer.measure(batch))

    def update_losses(self, per_token: ByLoss[Tensor]) -> None:
        """Add the losses of a batch of predictions; those that do not count are NaN."""
        losses = ByLoss(*(values[~values.isnan()].double() for values in per_token))
        if len(losses.ce_original):
            self._add(self._peer.losses(losses))

    def _add(self, figures: Figures) -> None:
        for name, value in figures.items():
            total, count = self._sums.get(name, (0.0, 0))
            self._sums[name] = (total + float(value.sum()), count + value.numel())

    def figures(self, stats: ReconstructionStats) -> dict[str, float]:
        """The peer's figures under the peer's names; ``stats`` must be those of the same tokens."""
        means = {name: total / count for name, (total, count) in self._sums.items()}
        return self._peer.finish(means, stats)


def _squares(x: Tensor) -> Tensor:
    """``[b, n] -> [b]``"""
    return x.square().sum(dim=-1)


# ---- SAELens -------------------------------------------------------------------------------------


def _saelens(batch: PeerBatch) -> Figures:
    x, recons = batch.x, batch.recons
    norm_in, norm_out = x.norm(dim=-1), recons.norm(dim=-1)
    error = _squares(x - recons)
    return {
        "explained_variance_legacy": 1 - error / _squares(x - x.mean(dim=0)),
        "mse": error,
        "cossim": (x * recons).sum(dim=-1) / (norm_in * norm_out),
        "l2_norm_in": norm_in,
        "l2_norm_out": norm_out,
        "l2_ratio": norm_out / norm_in.masked_fill(norm_in < 1e-4, 1.0),
        "relative_reconstruction_bias": _squares(recons).mean() / (x * recons).sum(dim=-1).mean(),
        "l0": batch.l0.double(),
        "l1": batch.l1,
        "_square": _squares(x),
    }


def _saelens_losses(losses: ByLoss[Tensor]) -> Figures:
    return {
        "ce_loss_without_sae": losses.ce_original,
        "ce_loss_with_sae": losses.ce_spliced,
        "ce_loss_with_ablation": losses.ce_zero_ablated,
        "kl_div_with_sae": losses.kl,
        "kl_div_with_ablation": losses.kl_zero_ablated,
    }


def _saelens_finish(means: dict[str, float], stats: ReconstructionStats) -> dict[str, float]:
    found = dict(means)
    found["explained_variance"] = float(stats.explained_variance)
    found["explained_variance_about_zero"] = 1 - means["mse"] / found.pop("_square")
    if "ce_loss_with_sae" in means:
        zero, sae = means["ce_loss_with_ablation"], means["ce_loss_with_sae"]
        found["ce_loss_score"] = (zero - sae) / (zero - means["ce_loss_without_sae"])
        zero = means["kl_div_with_ablation"]
        found["kl_div_score"] = (zero - means["kl_div_with_sae"]) / zero
    return found


# ---- dictionary_learning -------------------------------------------------------------------------


def feature_scale(autoencoder: Autoencoder) -> Tensor | None:
    """What dictionary_learning multiplies latents by before it measures them, ``[l]``; None for 1.

    Its ``AutoEncoderNew`` (a ReLU and an output bias of its own) gives out latents times the norms of
    their decoder columns; none of its other classes does.
    """
    if not autoencoder.nonlinearity.is_relu or autoencoder.post_bias is None:
        return None
    norms: Tensor = autoencoder.decoder.weight.detach().double().norm(dim=0)
    return norms


def _dictionary_learning(batch: PeerBatch) -> Figures:
    x, recons = batch.x, batch.recons
    norm_in, norm_out = x.norm(dim=-1), recons.norm(dim=-1)
    product = (x * recons).sum(dim=-1)
    return {
        "l2_loss": (x - recons).norm(dim=-1).mean(),
        "l1_loss": batch.features_l1.mean(),
        "l0": batch.l0.double().mean(),
        "frac_variance_explained": 1 - (x - recons).var(dim=0).sum() / x.var(dim=0).sum(),
        "cossim": (product / (norm_in * norm_out)).mean(),
        "l2_ratio": (norm_out / norm_in).mean(),
        "relative_reconstruction_bias": _squares(recons).mean() / product.mean(),
    }


def _dictionary_learning_losses(losses: ByLoss[Tensor]) -> Figures:
    original, spliced = losses.ce_original.mean(), losses.ce_spliced.mean()
    zero = losses.ce_zero_ablated.mean()
    return {
        "loss_original": original,
        "loss_reconstructed": spliced,
        "loss_zero": zero,
        "frac_recovered": (spliced - zero) / (original - zero),
    }


def _dictionary_learning_finish(
    means: dict[str, float], stats: ReconstructionStats
) -> dict[str, float]:
    return {**means, "frac_alive": 1 - float(stats.dead_share)}


# ---- sparsify, OpenAI ----------------------------------------------------------------------------


def _sparsify(batch: PeerBatch) -> Figures:
    deviation = _squares(batch.x - batch.x.mean(dim=0)).sum()
    return {"fvu": _squares(batch.x - batch.recons).sum() / deviation}


def _openai(batch: PeerBatch) -> Figures:
    square = _squares(batch.x)
    return {
        "normalized_mean_squared_error": _squares(batch.x - batch.recons) / square,
        "normalized_L1_loss": batch.l1 / square.sqrt(),
    }


def _none(losses: ByLoss[Tensor]) -> Figures:
    return {}


def _as_is(means: dict[str, float], stats: ReconstructionStats) -> dict[str, float]:
    return means


PEERS: Mapping[str, Peer] = {
    "saelens_legacy": Peer(_saelens, _saelens_losses, _saelens_finish),
    "dictionary_learning": Peer(
        _dictionary_learning, _dictionary_learning_losses, _dictionary_learning_finish
    ),
    "sparsify": Peer(_sparsify, _none, _as_is),
    "openai": Peer(_openai, _none, _as_is),
}
"""The libraries, by the name that ``compat=`` takes."""
