"""Measure autoencoders on token batches, through the model they belong to, or on activations alone.

    evaluate(context, autoencoder, batches)                      one autoencoder on token batches
    evaluate_all(context, {"name": autoencoder, …}, batches)     several, from the same passes
    measure(autoencoder, activations)                            without a model

The token batches are read twice: first for the mean activation, which mean ablation and the
explained variance per token need, then for everything else. Each batch costs one unchanged forward
pass and, where losses are wanted, one more for each autoencoder and two for each location; these begin
at the location's layer. No more than one batch of activations is held at a time.

:class:`~neuron_explainer.evaluation.figures.Evaluation` says what each figure means.

Shape legend: ``b`` batch, ``s`` sequence, ``n`` inputs, ``o`` outputs, ``l`` latents, ``t`` tokens.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor

from neuron_explainer.activations.windows import TokenBatch
from neuron_explainer.errors import InputError
from neuron_explainer.evaluation.compat import PeerBatch, PeerStats, feature_scale
from neuron_explainer.evaluation.figures import Evaluation
from neuron_explainer.evaluation.metrics import (
    cross_entropy_per_token,
    kept_rows,
    kl_divergence_per_token,
)
from neuron_explainer.evaluation.pieces import LATENTS_AT_ONCE, Activations, coded_pieces
from neuron_explainer.evaluation.placed import Placed, placed
from neuron_explainer.evaluation.running import ByLoss, LossTotals, ReconstructionStats
from neuron_explainer.evaluation.spliced_passes import SplicedPasses, scored
from neuron_explainer.models.autoencoder import Autoencoder
from neuron_explainer.models.autoencoder_context import AutoencoderContext
from neuron_explainer.models.checks import check_tensor
from neuron_explainer.models.language_model import LanguageModel
from neuron_explainer.models.locations import ActivationLocation, LocationLike
from neuron_explainer.models.model_context import ModelContext
from neuron_explainer.models.weight_names import Dimension
from neuron_explainer.progress import progress_bar


def measure(
    autoencoder: Autoencoder,
    batches: Activations,
    *,
    mean: Tensor | None = None,
    compat: str | Sequence[str] = (),
) -> Evaluation:
    """Measure an autoencoder on activations, without a model.

    Args:
        autoencoder: is not changed.
        batches: activations as the model has them, ``[…, n]`` each; all of them count.
        mean: the mean of all of them ``[o]``, if it is known: the explained variance per token needs
            it.
        compat: peers whose figures to add, such as ``"dictionary_learning"``: see
            :mod:`neuron_explainer.evaluation.compat`.
    """
    totals = _Totals.start(autoencoder, mean, compat)
    for batch in batches:
        x, target = batch if isinstance(batch, tuple) else (batch, batch)
        check_tensor(x, "a batch")
        if autoencoder.is_transcoder and not isinstance(batch, tuple):
            raise InputError(
                "a transcoder is measured on pairs of its input and what its output stands for; "
                f"found a single batch {list(x.shape)}."
            )
        totals.add(kept_rows(x, None, "a batch"), kept_rows(target, None, "the targets of a batch"))
    place = autoencoder.output_location if autoencoder.is_transcoder else autoencoder.location
    return totals.result(None if place is None else str(place))


def evaluate(
    context: ModelContext,
    autoencoder: Autoencoder,
    batches: Iterable[TokenBatch],
    *,
    location: LocationLike | None = None,
    score_bos: bool = False,
    ce_every: int = 1,
    compat: str | Sequence[str] = (),
    progress: bool = True,
) -> Evaluation:
    """Measure one autoencoder on batches of tokens; :func:`evaluate_all` has the other arguments.

    Args:
        location: where its inputs come from, if the autoencoder does not say.
    """
    place = autoencoder.location if location is None else ActivationLocation.parse(location)
    name = "autoencoder" if place is None else str(place)
    found = evaluate_all(
        context,
        {name: autoencoder},
        batches,
        score_bos=score_bos,
        ce_every=ce_every,
        compat=compat,
        progress=progress,
    )
    return found[name]


@torch.no_grad()
def evaluate_all(
    context: ModelContext,
    autoencoders: Mapping[str, Autoencoder] | AutoencoderContext,
    batches: Iterable[TokenBatch],
    *,
    score_bos: bool = False,
    ce_every: int = 1,
    compat: str | Sequence[str] = (),
    progress: bool = True,
    latents_at_once: int = LATENTS_AT_ONCE,
) -> dict[str, Evaluation]:
    """Measure autoencoders on batches of tokens, all from the same forward passes.

    Pads never count. The figures do not depend on padding or on how the tokens are cut into batches,
    except those of ``compat`` (and, with ``ce_every``, which tokens losses are measured on).

    Args:
        context: the model that they were trained on.
        autoencoders: by name, or a context, whose names are the locations. An autoencoder that does
            not say where its inputs come from must have its location as its name:
            ``"3/mlp.post_act"``.
        batches: token batches; an iterator is read into memory.
        score_bos: whether the activations of start tokens count. Most autoencoders are trained
            without them, because their norms are unlike all others.
        ce_every: measure losses on every n-th batch, beginning with the first; 0: on none.
        compat: peers whose figures to add.
        progress: show a progress bar.
        latents_at_once: how many latents to compute at a time.

    Returns:
        ``{name: evaluation}``
    """
    if ce_every < 0:
        raise InputError(f"ce_every must be at least 0, found {ce_every}.")
    model = context.get_or_create_model()
    subjects = placed(autoencoders, context.get_dim_size(Dimension.LAYERS))
    batches = list(batches) if isinstance(batches, Iterator) else batches
    bar: Any = progress_bar(desc="evaluating", unit="batch", disable=not progress)
    targets = dict.fromkeys(each.target for each in subjects.values())
    means = _means(model, targets, batches, score_bos, bar)
    totals = {
        name: _Totals.start(each.autoencoder, means[each.target], compat, latents_at_once)
        for name, each in subjects.items()
    }
    bar.reset(total=bar.n)
    for index, batch in enumerate(batches):
        with_losses = ce_every > 0 and index % ce_every == 0
        _add_batch(model, batch, subjects, totals, means, score_bos, with_losses)
        bar.update()
    bar.close()
    return {name: totals[name].result(str(each.target)) for name, each in subjects.items()}


# ---- adding up -------------------------------------------------------------------------------------


@dataclass
class _Totals:
    """Running totals of one autoencoder."""

    autoencoder: Autoencoder
    stats: ReconstructionStats
    mean_known: bool
    peers: dict[str, PeerStats]
    latents_at_once: int
    losses: LossTotals = field(default_factory=LossTotals)

    @classmethod
    def start(
        cls,
        autoencoder: Autoencoder,
        mean: Tensor | None,
        compat: str | Sequence[str],
        latents_at_once: int = LATENTS_AT_ONCE,
    ) -> "_Totals":
        names = [compat] if isinstance(compat, str) else compat
        peers = {name: PeerStats(name) for name in names}
        stats = ReconstructionStats(mean)
        return cls(autoencoder, stats, mean is not None, peers, latents_at_once)

    def add(self, x: Tensor, target: Tensor) -> Tensor:
        """Add inputs ``[t, n]`` and what to reconstruct ``[t, o]``; returns reconstructions ``[t, o]``."""
        recons = torch.empty_like(target)
        l0: list[Tensor] = []
        l1: list[Tensor] = []
        features_l1: list[Tensor] = []
        scale = feature_scale(self.autoencoder) if self.peers else None
        for piece, coded in coded_pieces(self.autoencoder, x, self.latents_at_once):
            found = coded.recons.to(target.device)
            self.stats.update(target[piece], found, coded.latents)
            recons[piece] = found
            if self.peers:
                values = coded.latents.values
                l0.append((values != 0).sum(dim=-1))
                sizes = values.abs().double()
                l1.append(sizes.sum(dim=-1))
                scaled = sizes if scale is None else sizes * scale[coded.latents.indices]
                features_l1.append(scaled.sum(dim=-1))
        if self.peers and l0:
            of_latents = (torch.cat(each) for each in (l0, l1, features_l1))
            batch = PeerBatch(target.double(), recons.double(), *of_latents)
            for peer in self.peers.values():
                peer.update(batch)
        return recons

    def add_losses(self, found: ByLoss[Tensor]) -> None:
        """Add losses per token."""
        self.losses.update(found)
        for peer in self.peers.values():
            peer.update_losses(found)

    def result(self, location: str | None) -> Evaluation:
        return Evaluation.from_totals(
            location, self.stats, self.losses, self.peers, self.mean_known
        )


def _means(
    model: LanguageModel,
    locations: Iterable[ActivationLocation],
    batches: Iterable[TokenBatch],
    score_bos: bool,
    bar: Any,
) -> dict[ActivationLocation, Tensor]:
    """The mean activation at each location, over all tokens that count."""
    totals = {location: ReconstructionStats() for location in locations}
    for batch in batches:
        _add_activations(model, batch, totals, score_bos)
        bar.update()
    return {location: stats.mean for location, stats in totals.items()}


def _add_activations(
    model: LanguageModel,
    batch: TokenBatch,
    totals: Mapping[ActivationLocation, ReconstructionStats],
    score_bos: bool,
) -> None:
    # A function of its own, so that nothing of a batch is held when the next one is made.
    passes = SplicedPasses(model, batch.tokens, batch.pad, totals, logits=False)
    counted = scored(passes.tokens, batch.pad, batch.bos, score_bos)
    for location, stats in totals.items():
        x = passes.activation(location)[counted]
        stats.update(x, x)


def _add_batch(
    model: LanguageModel,
    batch: TokenBatch,
    subjects: Mapping[str, Placed],
    totals: Mapping[str, _Totals],
    means: Mapping[ActivationLocation, Tensor],
    score_bos: bool,
    with_losses: bool,
) -> None:
    locations = [place for each in subjects.values() for place in (each.source, each.target)]
    passes = SplicedPasses(model, batch.tokens, batch.pad, locations, with_losses)
    counted = scored(passes.tokens, batch.pad, batch.bos, score_bos)
    losses = _BatchLosses(passes, batch, counted, score_bos) if with_losses else None
    for name, each in subjects.items():
        target = passes.activation(each.target)
        x = passes.activation(each.source)[counted]
        recons = totals[name].add(x, target[counted])
        if losses is not None:
            value = target.clone()
            value[counted] = recons
            totals[name].add_losses(losses.of(each.target, value, means[each.target]))


class _Losses(NamedTuple):
    """What the predictions lose with one value in an activation's place, per token."""

    ce: Tensor
    """``[b, s - 1]``"""
    kl: Tensor
    """``[b, s]``"""


class _BatchLosses:
    """Cross-entropies and divergences per token of one batch, NaN where they do not count."""

    def __init__(
        self, passes: SplicedPasses, batch: TokenBatch, counted: Tensor, score_bos: bool
    ) -> None:
        self.passes, self.counted = passes, counted
        self.ignored = None
        if batch.bos is not None and not score_bos:
            self.ignored = batch.bos.to(counted.device)[:, 1:]
        self.original = self._ce(passes.logits)
        self._ablated: dict[ActivationLocation, tuple[_Losses, _Losses]] = {}

    def of(self, location: ActivationLocation, value: Tensor, mean: Tensor) -> ByLoss[Tensor]:
        """With ``value`` ``[b, s, o]`` in the activation's place, and with it ablated."""
        if location not in self._ablated:
            x, where = self.passes.activation(location), self.counted[..., None]
            zero = x.masked_fill(where, 0)
            average = torch.where(where, mean.to(x.device, x.dtype), x)
            self._ablated[location] = self._with(location, zero), self._with(location, average)
        spliced, (zeros, means) = self._with(location, value), self._ablated[location]
        return ByLoss(
            ce_original=self.original,
            ce_spliced=spliced.ce,
            ce_zero_ablated=zeros.ce,
            ce_mean_ablated=means.ce,
            kl=spliced.kl,
            kl_zero_ablated=zeros.kl,
            kl_mean_ablated=means.kl,
        )

    def _with(self, location: ActivationLocation, value: Tensor) -> _Losses:
        logits = self.passes.replaced(location, value)
        kl = kl_divergence_per_token(self.passes.logits, logits, self.passes.pad)
        # A start token that does not count is not replaced either: counting its 0 would make the mean
        # of the others smaller.
        return _Losses(self._ce(logits), kl.masked_fill(~self.counted, float("nan")))

    def _ce(self, logits: Tensor) -> Tensor:
        losses = cross_entropy_per_token(logits, self.passes.tokens, self.passes.pad)
        return losses if self.ignored is None else losses.masked_fill(self.ignored, float("nan"))
