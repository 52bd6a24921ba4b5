"""Whether an autoencoder's latents are the features that its activations are made of.

This needs activations whose features are known, such as those of
:mod:`neuron_explainer.evaluation.synthetic`. The figures are those of SynthSAEBench (Chanin &
Garriga-Alonso 2026, arXiv:2602.14687):

    MCC         mean |cos| of latents' directions and features, matched one to one so that it is largest
    uniqueness  how many features are the best match of a latent, over the number of latents
    F1          of each latent as a detector of its best match, averaged over latents

The best match of a latent is the feature with the largest |cos|. Never rank autoencoders by explained
variance alone: in the published table the one with the most explained variance recovers least.

Shape legend: ``t`` tokens, ``n`` width, ``m`` features, ``l`` latents.
"""

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Self

import torch
import torch.nn.functional as F
from torch import Tensor

from neuron_explainer.errors import InputError, optional_module
from neuron_explainer.evaluation.pieces import coded_pieces
from neuron_explainer.evaluation.running import ReconstructionStats
from neuron_explainer.evaluation.synthetic import SyntheticBatch
from neuron_explainer.models.autoencoder import Autoencoder
from neuron_explainer.models.autoencoders.latents import Latents


@dataclass(frozen=True)
class Recovery:
    """The figures of one autoencoder on tokens whose features are known."""

    n_tokens: int
    n_latents: int
    f1: float
    """Mean F1 of all latents as detectors; 0 for a latent that never fires."""
    precision: float
    """Of the tokens on which a latent fires, the share on which its best match is active; mean over
    latents."""
    recall: float
    """Of the tokens on which a latent's best match is active, the share on which it fires; mean."""
    mcc: float
    """Mean |cos| of the best one-to-one matching of directions and features."""
    uniqueness: float
    """Number of different best matches over the number of latents."""
    explained_variance: float
    l0: float
    dead_share: float
    norm_ratio: float
    """Mean of ``‖x̂‖ / ‖x‖``: below 1 where reconstructions shrink."""
    best: Tensor = field(repr=False, compare=False)
    """``[l]``: each latent's best match."""
    f1_of_latents: Tensor = field(repr=False, compare=False)
    """``[l]``"""

    def figures(self) -> dict[str, float]:
        """Every number by name."""
        return {k: v for k, v in vars(self).items() if isinstance(v, int | float)}


class RecoveryStats:
    """Running totals over batches of tokens, from which the figures follow.

    Args:
        directions: what the latents write, ``[l, n]``; those of length 0 match nothing.
        features: the directions that the data are made of, ``[m, n]``.
    """

    def __init__(self, directions: Tensor, features: Tensor) -> None:
        if directions.ndim != 2 or features.ndim != 2 or directions.shape[1] != features.shape[1]:
            raise InputError(
                "expected directions [l, n] and features [m, n] of the same width, found "
                f"{list(directions.shape)} and {list(features.shape)}."
            )
        self.cosine = cosines(directions, features)
        """``[l, m]``, without sign."""
        self.best = self.cosine.argmax(dim=1)
        self.fired = torch.zeros(len(directions), dtype=torch.int64)
        """``[l]``: tokens on which each latent fires."""
        self.hits = torch.zeros_like(self.fired)
        """``[l]``: of these, those on which its best match is active."""
        self.active = torch.zeros(len(features), dtype=torch.int64)
        """``[m]``: tokens on which each feature is active."""
        self.reconstruction = ReconstructionStats()

    def update(self, batch: SyntheticBatch, latents: Latents, recons: Tensor) -> Self:
        """Add tokens: the truth, latents ``[t, l]`` and reconstructions ``[t, n]``."""
        active = batch.features > 0
        fires = latents.values != 0
        indices = torch.where(fires, latents.indices, 0)
        hit = active.gather(1, self.best[indices]) & fires
        flat = latents.indices.flatten()
        self.fired.scatter_add_(0, flat, fires.flatten().long())
        self.hits.scatter_add_(0, flat, hit.flatten().long())
        self.active += active.sum(dim=0)
        self.reconstruction.update(batch.x, recons, latents)
        return self

    def merge(self, other: Self) -> Self:
        """Add the totals of other tokens, of the same latents and features."""
        if not torch.equal(self.cosine, other.cosine):
            raise InputError("totals can be merged only if they are of the same directions.")
        self.fired += other.fired
        self.hits += other.hits
        self.active += other.active
        self.reconstruction.merge(other.reconstruction)
        return self

    def result(self) -> Recovery:
        """The figures of all tokens so far."""
        hits, fired, active = (x.double() for x in (self.hits, self.fired, self.active[self.best]))
        precision, recall = _share(hits, fired), _share(hits, active)
        f1 = _share(2 * hits, fired + active)
        stats = self.reconstruction
        return Recovery(
            n_tokens=stats.n_tokens,
            n_latents=len(hits),
            f1=float(f1.mean()),
            precision=float(precision.mean()),
            recall=float(recall.mean()),
            mcc=matched_cosine(self.cosine),
            uniqueness=len(torch.unique(self.best)) / len(self.best),
            explained_variance=float(stats.explained_variance),
            l0=float(stats.l0),
            dead_share=float(stats.dead_share),
            norm_ratio=float(stats.norm_ratio),
            best=self.best,
            f1_of_latents=f1,
        )


def measure_recovery(
    autoencoder: Autoencoder,
    batches: Iterable[SyntheticBatch],
    features: Tensor,
    *,
    directions: Tensor | None = None,
) -> Recovery:
    """The figures of an autoencoder on synthetic tokens.

    Args:
        autoencoder: is not changed.
        batches: tokens and the truth about them.
        features: the directions that they are made of, ``[m, n]``.
        directions: other directions ``[l, n]`` to match instead of the autoencoder's own, such as
            :func:`~neuron_explainer.evaluation.floors.permuted_directions`, for a floor. They are used for
            the matching only.
    """
    own = autoencoder.directions.detach().float().cpu()
    stats = RecoveryStats(own if directions is None else directions, features)
    for batch in batches:
        for piece, coded in coded_pieces(autoencoder, batch.x):
            some = SyntheticBatch(batch.x[piece], batch.features[piece])
            latents = Latents(
                coded.latents.values.cpu(), coded.latents.indices.cpu(), autoencoder.n_latents
            )
            stats.update(some, latents, coded.recons.float().cpu())
    return stats.result()


def cosines(directions: Tensor, features: Tensor) -> Tensor:
    """``|cos|`` of all pairs, ``[l, n], [m, n] -> [l, m]``; 0 where a row is zero."""
    rows = F.normalize(directions.detach().float(), dim=1)
    return (rows @ F.normalize(features.detach().float(), dim=1).t()).abs()


def matched_cosine(cosine: Tensor) -> float:
    """The mean of ``[l, m]`` over the one-to-one matching for which it is largest (Hungarian algorithm)."""
    optimize = optional_module("scipy.optimize", "matching latents and features one to one")
    matrix = cosine.double().numpy()
    rows, columns = optimize.linear_sum_assignment(matrix, maximize=True)
    return float(matrix[rows, columns].mean())


def _share(part: Tensor, whole: Tensor) -> Tensor:
    """``part / whole``, 0 where the whole is 0."""
    return torch.where(whole > 0, part / whole.clamp(min=1), 0.0)
