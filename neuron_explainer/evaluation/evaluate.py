"""Measure autoencoders: on activations alone, or on tokens, through the model that they belong to.

    evaluate(context, autoencoder, batches)                      one autoencoder on token batches
    evaluate_all(context, {"name": autoencoder, …}, batches)     several, from the same passes
    measure(autoencoder, activations)                            without a model

Token batches are gone through twice: once for the mean activation, which mean ablation and the
explained variance per token need, then for everything else. A batch costs one pass as it is and,
where losses are wanted, one for each autoencoder and two for each place; these start at the layer of
the place. Latents are computed for a piece of a batch at a time.

What each figure means stands in :class:`~neuron_explainer.evaluation.figures.Evaluation`.

Shape legend: ``b`` batch, ``s`` sequence, ``n`` inputs, ``o`` outputs, ``l`` latents, ``t`` tokens.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor
from tqdm import tqdm

from neuron_explainer.activations.windows import TokenBatch
from neuron_explainer.errors import InputError
from neuron_explainer.evaluation.compat import PeerBatch, PeerLosses, PeerStats
from neuron_explainer.evaluation.figures import Evaluation, LossTotals
from neuron_explainer.evaluation.metrics import (
    ReconstructionStats,
    cross_entropy_per_token,
    kl_divergence_per_token,
)
from neuron_explainer.evaluation.placed import Subject, subjects_of
from neuron_explainer.evaluation.spliced_passes import SplicedPasses, scored
from neuron_explainer.models.autoencoder import Autoencoder
from neuron_explainer.models.autoencoder_context import AutoencoderContext
from neuron_explainer.models.autoencoders.latents import Latents
from neuron_explainer.models.locations import ActivationLocation, LocationLike
from neuron_explainer.models.model_context import HookableModel, ModelContext
from neuron_explainer.models.weight_names import Dimension

LATENTS_AT_ONCE = 2**25
"""How many latents of how many tokens are computed at a time: 128 MiB in float32."""

Activations = Iterable[Tensor | tuple[Tensor, Tensor]]
"""Batches of activations ``[…, n]``; of a transcoder, pairs with what its output stands for."""


class Coded(NamedTuple):
    """What an autoencoder makes of some tokens."""

    latents: Latents
    """Of ``t`` tokens."""
    recons: Tensor
    """``[t, o]``"""


def coded_pieces(autoencoder: Autoencoder, rows: Tensor) -> Iterator[tuple[slice, Coded]]:
    """Encode and decode ``[t, n]``, a piece at a time. No gradients.

    Latents are sparse, but an autoencoder that is not, such as one at the beginning of its training,
    has as many as dense ones.
    """
    size = max(1, LATENTS_AT_ONCE // autoencoder.n_latents)
    for start in range(0, len(rows), size):
        piece = slice(start, start + size)
        with torch.no_grad():
            x = rows[piece].to(autoencoder.device, autoencoder.dtype)
            latents = autoencoder.encode_sparse(x)
            recons = autoencoder.decode(latents, autoencoder.normalize(x)[1])
        yield piece, Coded(latents, recons)


def measure(
    autoencoder: Autoencoder,
    batches: Activations,
    *,
    mean: Tensor | None = None,
    compat: str | Sequence[str] = (),
) -> Evaluation:
    """Measure an autoencoder on activations, without a model.

    Args:
        autoencoder: left as it is.
        batches: activations as the model has them, ``[…, n]`` each, all of which count.
        mean: of all of them ``[o]``, for the explained variance per token, where it is known.
        compat: peers whose figures are wanted too, such as ``"dictionary_learning"``: see
            :mod:`neuron_explainer.evaluation.compat`.
    """
    totals = _Totals.start(autoencoder, mean, compat)
    for batch in batches:
        x, target = batch if isinstance(batch, tuple) else (batch, batch)
        if autoencoder.is_transcoder and not isinstance(batch, tuple):
            raise InputError(
                "a transcoder is measured on pairs of its input and what its output stands for; "
                f"found a batch {list(x.shape)} alone."
            )
        totals.add(x.flatten(0, -2), target.flatten(0, -2))
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
    """Measure one autoencoder on batches of tokens: :func:`evaluate_all` with one.

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
) -> dict[str, Evaluation]:
    """Measure autoencoders on batches of tokens, all from the same forward passes.

    Pads never count. The figures do not depend on padding or on how the tokens are cut into batches,
    those of ``compat`` excepted (and, with ``ce_every``, which tokens losses are measured on).

    Args:
        context: the model that they were trained on.
        autoencoders: by name; the name is its location, ``"3/mlp.post_act"``, where an autoencoder
            does not say where its inputs come from. Or a context, whose names are the locations.
        batches: token batches; kept in memory if they can be gone through only once.
        score_bos: whether the activations of start tokens count. Most autoencoders are trained
            without them, and their norms are unlike all others.
        ce_every: measure losses on every n-th batch, from the first; 0: not at all.
        compat: peers whose figures are wanted too.
        progress: show a progress bar.

    Returns:
        An evaluation of each, by name.
    """
    if ce_every < 0:
        raise InputError(f"ce_every must be at least 0, found {ce_every}.")
    model = context.get_or_create_model()
    subjects = subjects_of(autoencoders, context.get_dim_size(Dimension.LAYERS))
    batches = list(batches) if isinstance(batches, Iterator) else batches
    bar: Any = tqdm(desc="evaluating", unit="batch", disable=not progress)
    targets = dict.fromkeys(subject.target for subject in subjects.values())
    means = _means(model, targets, batches, score_bos, bar)
    totals = {
        name: _Totals.start(subject.autoencoder, means[subject.target], compat)
        for name, subject in subjects.items()
    }
    bar.reset(total=bar.n)
    for index, batch in enumerate(batches):
        with_losses = ce_every > 0 and index % ce_every == 0
        _add_batch(model, batch, subjects, totals, means, score_bos, with_losses)
        bar.update()
    bar.close()
    return {name: totals[name].result(str(subjects[name].target)) for name in subjects}


# ---- adding up -------------------------------------------------------------------------------------


@dataclass
class _Totals:
    """Everything added up for one autoencoder."""

    autoencoder: Autoencoder
    stats: ReconstructionStats
    mean_known: bool
    peers: dict[str, PeerStats]
    losses: LossTotals = field(default_factory=LossTotals)

    @classmethod
    def start(
        cls, autoencoder: Autoencoder, mean: Tensor | None, compat: str | Sequence[str]
    ) -> "_Totals":
        names = [compat] if isinstance(compat, str) else compat
        peers = {name: PeerStats(name) for name in names}
        return cls(autoencoder, ReconstructionStats(mean), mean is not None, peers)

    def add(self, x: Tensor, target: Tensor) -> Tensor:
        """Add tokens ``[t, n]`` and what is to be reconstructed ``[t, o]``; returns ``[t, o]``."""
        recons = torch.empty_like(target)
        l0: list[Tensor] = []
        l1: list[Tensor] = []
        for piece, coded in coded_pieces(self.autoencoder, x):
            found = coded.recons.to(target.device)
            self.stats.update(target[piece], found, coded.latents)
            recons[piece] = found
            if self.peers:
                values = coded.latents.values
                l0.append((values != 0).sum(dim=-1))
                l1.append(values.abs().sum(dim=-1, dtype=torch.float64))
        if self.peers and l0:
            batch = PeerBatch(target.double(), recons.double(), torch.cat(l0), torch.cat(l1))
            for peer in self.peers.values():
                peer.update(batch)
        return recons

    def result(self, location: str | None) -> Evaluation:
        return Evaluation.from_stats(
            location, self.stats, self.losses.result(), self.peers, self.mean_known
        )


def _means(
    model: HookableModel,
    locations: Iterable[ActivationLocation],
    batches: Iterable[TokenBatch],
    score_bos: bool,
    bar: Any,
) -> dict[ActivationLocation, Tensor]:
    """The mean activation at each place, over all tokens that count."""
    totals = {location: ReconstructionStats() for location in locations}
    for batch in batches:
        passes = SplicedPasses(model, batch.tokens, batch.pad, totals, logits=False)
        counted = scored(passes.tokens, batch.pad, batch.bos, score_bos)
        for location, stats in totals.items():
            x = passes.activation(location)[counted]
            stats.update(x, x)
        bar.update()
    return {location: stats.mean for location, stats in totals.items()}


def _add_batch(
    model: HookableModel,
    batch: TokenBatch,
    subjects: Mapping[str, Subject],
    totals: Mapping[str, _Totals],
    means: Mapping[ActivationLocation, Tensor],
    score_bos: bool,
    with_losses: bool,
) -> None:
    places = [place for subject in subjects.values() for place in subject[1:]]
    passes = SplicedPasses(model, batch.tokens, batch.pad, places, with_losses)
    counted = scored(passes.tokens, batch.pad, batch.bos, score_bos)
    losses = _BatchLosses(passes, batch, counted, score_bos) if with_losses else None
    for name, subject in subjects.items():
        target = passes.activation(subject.target)
        x = passes.activation(subject.source)[counted]
        recons = totals[name].add(x, target[counted])
        if losses is not None:
            value = target.clone()
            value[counted] = recons
            found = losses.of(subject.target, value, means[subject.target])
            totals[name].losses.update(**found)
            for peer in totals[name].peers.values():
                peer.update_losses(losses.for_peers(found))


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
        self._ablated: dict[ActivationLocation, dict[str, Tensor]] = {}

    def of(self, location: ActivationLocation, value: Tensor, mean: Tensor) -> dict[str, Tensor]:
        """With ``value`` ``[b, s, o]`` in the activation's place, and with it ablated."""
        if location not in self._ablated:
            x, where = self.passes.activation(location), self.counted[..., None]
            zero = x.masked_fill(where, 0)
            average = torch.where(where, mean.to(x.device, x.dtype), x)
            self._ablated[location] = self._both(location, zero, "zero_ablated") | self._both(
                location, average, "mean_ablated"
            )
        spliced = self._both(location, value, "spliced")
        spliced["kl"] = spliced.pop("kl_spliced")
        return {"ce_original": self.original} | spliced | self._ablated[location]

    def for_peers(self, found: Mapping[str, Tensor]) -> PeerLosses:
        """The same, without those that do not count."""
        names = ("ce_original", "ce_spliced", "ce_zero_ablated", "kl", "kl_zero_ablated")
        return PeerLosses(*(found[name][~found[name].isnan()].double() for name in names))

    def _both(self, location: ActivationLocation, value: Tensor, name: str) -> dict[str, Tensor]:
        logits = self.passes.replaced(location, value)
        kl = kl_divergence_per_token(self.passes.logits, logits, self.passes.pad)
        # A start token that does not count is not replaced: its 0 would make the others' mean smaller.
        kl = kl.masked_fill(~self.counted, float("nan"))
        return {f"ce_{name}": self._ce(logits), f"kl_{name}": kl}

    def _ce(self, logits: Tensor) -> Tensor:
        losses = cross_entropy_per_token(logits, self.passes.tokens, self.passes.pad)
        return losses if self.ignored is None else losses.masked_fill(self.ignored, float("nan"))
