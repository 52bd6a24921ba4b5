"""What an evaluation found: figures with their definitions beside them, as text and as JSON."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from neuron_explainer.evaluation.compat import PeerStats
from neuron_explainer.evaluation.metrics import (
    DensityHistogram,
    ReconstructionStats,
    ce_recovered,
    density_histogram,
)


@dataclass(frozen=True)
class Losses:
    """What the model's predictions lose when the activation is replaced, in nats a token.

    Replaced are the activations that count (no pads; start tokens only if they are scored), in the
    spliced and in the ablated passes alike: an autoencoder that gives back its input recovers 1, one
    that gives zeros recovers 0 of the ablation to zero.
    """

    n_tokens: int
    """Predictions counted: neither the token nor what it predicts is padding, and what is predicted
    is not a start token or separator (unless those are scored)."""
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
    """The same against the mean; the stricter one, as zero is often far from every activation."""
    kl: float
    """Mean over the tokens whose activations count of KL(original ‖ spliced), of the next token."""
    kl_zero_ablated: float
    """KL(original ‖ zeros)."""
    kl_mean_ablated: float
    """KL(original ‖ mean)."""


@dataclass(frozen=True)
class Evaluation:
    """What an autoencoder keeps of its activations, and of the model's predictions.

    Of a transcoder, reconstructions are compared with the activations at its output's location.
    """

    location: str | None
    """What is reconstructed, such as ``3/mlp.post_act``; None if not known."""
    n_tokens: int
    """Tokens measured. Dead latents and densities mean nothing without it."""
    n_latents: int
    fvu: float
    """Fraction of variance unexplained: :func:`~neuron_explainer.evaluation.metrics.fvu`."""
    explained_variance: float
    """``1 - fvu``."""
    explained_variance_per_token: float | None
    """:func:`~neuron_explainer.evaluation.metrics.explained_variance_per_token`; None where the mean was
    not known beforehand."""
    mse: float
    """Squared error a token, summed over the width."""
    l0: float
    """Mean number of latents per token that are not zero."""
    l1: float
    """Mean sum of their magnitudes, in the autoencoder's own units."""
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
    """``[l]``: share of the tokens on which each latent fires. Not part of :meth:`to_dict`."""
    losses: Losses | None = None
    """Of the model's predictions; None where there was no model."""
    compat: Mapping[str, Mapping[str, float]] = field(default_factory=dict)
    """Peers' figures by their own definitions: :mod:`neuron_explainer.evaluation.compat`."""

    @classmethod
    def from_stats(
        cls,
        location: str | None,
        stats: ReconstructionStats,
        losses: Losses | None = None,
        peers: Mapping[str, PeerStats] | None = None,
        mean_known: bool = True,
    ) -> "Evaluation":
        """The figures that running totals amount to."""
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
            losses=losses,
            compat={name: peer.figures(stats) for name, peer in (peers or {}).items()},
        )

    def figures(self) -> dict[str, float]:
        """Every number by name: ours, ``ce_…`` and ``kl…``, and peers' as ``peer/name``."""
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
        """As JSON can hold it; the frequency of each latent is left out, its histogram is not."""
        result = {
            name: value
            for name, value in vars(self).items()
            if name not in ("frequency", "density", "losses", "compat")
        }
        result["density"] = self.density._asdict()
        result["losses"] = None if self.losses is None else dict(vars(self.losses))
        result["compat"] = {peer: dict(figures) for peer, figures in self.compat.items()}
        return result

    def table(self) -> str:
        """One figure a line."""
        rows = {"location": self.location or "unknown"} | {
            name: f"{value:,}" if isinstance(value, int) else f"{value:.6g}"
            for name, value in self.figures().items()
        }
        width = max(map(len, rows))
        return "\n".join(f"{name:<{width}}  {value}" for name, value in rows.items())


class LossTotals:
    """Running sums of cross-entropies and divergences per token; NaN is what does not count.

    The names are those of :class:`Losses` that begin with ``ce_`` or ``kl``.
    """

    def __init__(self) -> None:
        self._sums: dict[str, tuple[float, int]] = {}

    def update(self, **per_token: Tensor) -> None:
        """Add per-token values under their names."""
        for name, values in per_token.items():
            total, count = self._sums.get(name, (0.0, 0))
            counted = values[~values.isnan()].double()
            self._sums[name] = (total + float(counted.sum()), count + counted.numel())

    def merge(self, other: "LossTotals") -> None:
        """Add the tokens of another accumulator."""
        for name, (total, count) in other._sums.items():
            own_total, own_count = self._sums.get(name, (0.0, 0))
            self._sums[name] = (own_total + total, own_count + count)

    def state_dict(self) -> dict[str, Tensor]:
        """Everything added so far, ``[2]`` a name: the sum and the number of predictions."""
        return {name: torch.tensor(v, dtype=torch.float64) for name, v in self._sums.items()}

    @classmethod
    def from_state_dict(cls, state: Mapping[str, Tensor]) -> "LossTotals":
        """The accumulator that :meth:`state_dict` describes."""
        totals = cls()
        totals._sums = {name: (float(v[0]), int(v[1])) for name, v in state.items()}
        return totals

    def result(self) -> Losses | None:
        """The means, and what is made of them; None if there is no prediction."""
        n_tokens = self._sums.get("ce_original", (0.0, 0))[1]
        if not n_tokens:
            return None
        means = {name: total / count for name, (total, count) in self._sums.items()}
        zero, mean = (
            float(
                ce_recovered(means["ce_original"], means["ce_spliced"], means[f"ce_{how}_ablated"])
            )
            for how in ("zero", "mean")
        )
        return Losses(n_tokens=n_tokens, recovered_zero=zero, recovered_mean=mean, **means)


def evaluation_table(evaluations: Mapping[str, Evaluation]) -> str:
    """The most looked-at figures, one line an autoencoder."""
    columns: dict[str, tuple[str, str]] = {
        "FVU": ("fvu", "8.4f"),
        "L0": ("l0", "8.2f"),
        "cosine": ("cosine_similarity", "8.4f"),
        "dead": ("dead_share", "8.1%"),
        "CE rec. (zero)": ("recovered_zero", "15.4f"),
        "(mean)": ("recovered_mean", "8.4f"),
        "KL": ("kl", "8.4f"),
        "tokens": ("n_tokens", "12,d"),
    }
    first = max([len("autoencoder"), *map(len, evaluations)])

    def width(spec: str) -> int:
        return int(spec.split(".")[0].split(",")[0])

    head = f"{'autoencoder':<{first}}" + "".join(
        f" {title:>{width(spec)}}" for title, (_, spec) in columns.items()
    )
    lines = [head]
    for name, evaluation in evaluations.items():
        figures = evaluation.figures()
        cells = [
            f"{figures[key]:{spec}}" if key in figures else f"{'-':>{width(spec)}}"
            for key, spec in columns.values()
        ]
        lines.append(" ".join([f"{name:<{first}}", *cells]))
    return "\n".join(lines)
