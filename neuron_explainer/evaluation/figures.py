"""The figures of an evaluation, each with its definition; as text and as JSON."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from neuron_explainer.evaluation.compat import PeerStats
from neuron_explainer.evaluation.metrics import DensityHistogram, ce_recovered, density_histogram
from neuron_explainer.evaluation.running import LossTotals, ReconstructionStats
from neuron_explainer.tables import percent, text_table


@dataclass(frozen=True)
class Losses:
    """What the model's predictions lose when the activation is replaced, in nats per token.

    The spliced and the ablated passes replace the same activations: those that count (no pads; start
    tokens only if they are scored). So an autoencoder that returns its input recovers 1, and one that
    returns zeros recovers 0 of the ablation to zero.
    """

    n_tokens: int
    """How many predictions count: neither the token nor the one it predicts is padding, and the
    predicted one is no start token or separator (unless those are scored)."""
    ce_original: float
    """Mean cross-entropy of the model as it is."""
    ce_spliced: float
    """With the reconstruction in place of the activation."""
    ce_zero_ablated: float
    """With zeros in its place."""
    ce_mean_ablated: float
    """With the mean of all tokens that count in its place."""
    recovered_zero: float
    """``(ce_zero_ablated - ce_spliced) / (ce_zero_ablated - ce_original)``: see
    :func:`~neuron_explainer.evaluation.metrics.ce_recovered`."""
    recovered_mean: float
    """The same with the ablation to the mean. It is the stricter one: zero is often far from every
    activation."""
    kl: float
    """KL(original ‖ spliced) of the next-token distribution, averaged over counted tokens."""
    kl_zero_ablated: float
    """KL(original ‖ zero-ablated)."""
    kl_mean_ablated: float
    """KL(original ‖ mean-ablated)."""

    @classmethod
    def from_totals(cls, totals: LossTotals) -> "Losses | None":
        """The means and what follows from them; None if no prediction has been counted."""
        if not totals.n_tokens:
            return None
        means = totals.means
        original, spliced = means.ce_original, means.ce_spliced
        return cls(
            n_tokens=totals.n_tokens,
            recovered_zero=float(ce_recovered(original, spliced, means.ce_zero_ablated)),
            recovered_mean=float(ce_recovered(original, spliced, means.ce_mean_ablated)),
            **means._asdict(),
        )


@dataclass(frozen=True)
class Evaluation:
    """How well an autoencoder preserves its activations and the model's predictions.

    A transcoder's reconstructions are compared with the activations at its output's location.
    """

    location: str | None
    """Where the reconstructed activations are, such as ``3/mlp.post_act``; None if not known."""
    n_tokens: int
    """How many tokens were measured. Dead latents and densities mean nothing without it."""
    n_latents: int
    fvu: float
    """Fraction of variance unexplained: :func:`~neuron_explainer.evaluation.metrics.fvu`."""
    explained_variance: float
    """``1 - fvu``."""
    explained_variance_per_token: float | None
    """:func:`~neuron_explainer.evaluation.metrics.explained_variance_per_token`; None if the mean was
    not known beforehand."""
    mse: float
    """Squared error per token, summed over the width."""
    l0: float
    """Mean number of latents per token that are not zero."""
    l1: float
    """Mean over tokens of the sum of the latents' magnitudes, in the autoencoder's own units."""
    cosine_similarity: float
    """:func:`~neuron_explainer.evaluation.metrics.cosine_similarity`."""
    norm_ratio: float
    """:func:`~neuron_explainer.evaluation.metrics.norm_ratio`."""
    relative_reconstruction_bias: float
    """:func:`~neuron_explainer.evaluation.metrics.relative_reconstruction_bias`."""
    dead_share: float
    """Share of latents that fired on none of the ``n_tokens``."""
    density: DensityHistogram = field(repr=False)
    """How many latents fire how often."""
    frequency: Tensor = field(repr=False, compare=False)
    """``[l]``: share of the tokens on which each latent fires. :meth:`to_dict` leaves out this and the
    next two."""
    mean_square: Tensor = field(repr=False, compare=False)
    """``[l]`` in float64: mean over tokens of each latent's square."""
    largest: Tensor = field(repr=False, compare=False)
    """``[l]``: the largest value of each latent."""
    losses: Losses | None = None
    """Losses of the model's predictions; None if none were measured."""
    compat: Mapping[str, Mapping[str, float]] = field(default_factory=dict)
    """Peers' figures by their own definitions: :mod:`neuron_explainer.evaluation.compat`."""

    @classmethod
    def from_totals(
        cls,
        location: str | None,
        stats: ReconstructionStats,
        losses: LossTotals,
        peers: Mapping[str, PeerStats],
        mean_known: bool = True,
    ) -> "Evaluation":
        """The figures that follow from running totals."""
        return cls(
            location=location,
            n_tokens=stats.n_tokens,
            n_latents=len(stats.frequency),
            fvu=float(stats.fvu),
            explained_variance=float(stats.explained_variance),
            explained_variance_per_token=(
                float(stats.explained_variance_per_token) if mean_known else None
            ),
            mse=float(stats.mse),
            l0=float(stats.l0),
            l1=float(stats.l1),
            cosine_similarity=float(stats.cosine_similarity),
            norm_ratio=float(stats.norm_ratio),
            relative_reconstruction_bias=float(stats.relative_reconstruction_bias),
            dead_share=float(stats.dead_share),
            density=density_histogram(stats.frequency),
            frequency=stats.frequency.cpu(),
            mean_square=stats.mean_square.cpu(),
            largest=stats.largest.cpu(),
            losses=Losses.from_totals(losses),
            compat={name: peer.figures(stats) for name, peer in peers.items()},
        )

    def figures(self) -> dict[str, float]:
        """Every number by name: first ours, then those of :class:`Losses`, then peers' as ``peer/name``."""
        own = {
            name: value
            for name, value in vars(self).items()
            if isinstance(value, int | float) and not isinstance(value, bool)
        }
        if self.losses is not None:
            own |= {
                "loss_tokens" if name == "n_tokens" else name: value
                for name, value in vars(self.losses).items()
            }
        theirs = {
            f"{peer}/{name}": value
            for peer, figures in self.compat.items()
            for name, value in figures.items()
        }
        return own | theirs

    def to_dict(self) -> dict[str, Any]:
        """All of it as JSON can hold it, except what there is of each latent; the histogram is there."""
        result = {name: v for name, v in vars(self).items() if not isinstance(v, Tensor)}
        result["density"] = self.density._asdict()
        result["losses"] = None if self.losses is None else dict(vars(self.losses))
        result["compat"] = {peer: dict(figures) for peer, figures in self.compat.items()}
        return result

    def table(self) -> str:
        """One line for each figure."""
        rows = {"location": self.location or "unknown"} | {
            name: f"{value:,}" if isinstance(value, int) else f"{value:.6g}"
            for name, value in self.figures().items()
        }
        return text_table([], rows.items(), n_left=2)


_COLUMNS = (
    ("FVU", "fvu", ".4f"),
    ("L0", "l0", ".2f"),
    ("cosine", "cosine_similarity", ".4f"),
    ("dead", "dead_share", "%"),
    ("CE rec. (zero)", "recovered_zero", ".4f"),
    ("(mean)", "recovered_mean", ".4f"),
    ("KL", "kl", ".4f"),
    ("tokens", "n_tokens", ",d"),
)
"""Title, figure and format of the columns of :func:`evaluation_table`."""


def evaluation_table(evaluations: Mapping[str, Evaluation]) -> str:
    """The figures that are looked at most, one line for each autoencoder."""
    rows = []
    for name, evaluation in evaluations.items():
        found = evaluation.figures()
        cells = (
            "-" if k not in found else percent(found[k], 1) if f == "%" else f"{found[k]:{f}}"
            for _, k, f in _COLUMNS
        )
        rows.append([name, *cells])
    return text_table(["autoencoder", *(title for title, _, _ in _COLUMNS)], rows)
