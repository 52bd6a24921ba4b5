"""This library: :func:`neuron_explainer.analysis.collect`, and the part of it that any collation needs."""

from functools import cache

import torch

from benchmarks.contestants.encoding import directions
from benchmarks.workloads import Prepared
from neuron_explainer.activations.corpus import TokenCorpus
from neuron_explainer.activations.windows import TokenWindows
from neuron_explainer.analysis.collation.config import CollateConfig
from neuron_explainer.analysis.collation.findings import Findings
from neuron_explainer.analysis.collation.passes import Collation
from neuron_explainer.analysis.collation.places import Places
from neuron_explainer.analysis.collation.units import Latents, watched
from neuron_explainer.models.autoencoder import Autoencoder, TopK
from neuron_explainer.models.model_context import ModelContext, StandardModelContext

BOS = 0


@cache
def context(folder: str) -> ModelContext:
    return StandardModelContext(folder, "cpu")


def autoencoders(
    model: ModelContext, tokens: list[list[int]], layers: list[int], latents: int, k: int
) -> dict[str, Autoencoder]:
    """Random directions around the mean activation, so that most latents fire now and then."""
    made = {}
    for number, layer in enumerate(layers):
        place = f"{layer}/resid.torso.post_mlp"
        x = model.get_or_create_model().capture(torch.tensor(tokens[:8]), place)[place]
        autoencoder = Autoencoder(latents, x.shape[-1], TopK(k), location=place)
        autoencoder.encoder.weight.data.copy_(directions(latents, x.shape[-1]).roll(number, 0))
        autoencoder.pre_bias.data.copy_(x.mean((0, 1)))
        made[f"{number}: {place}"] = autoencoder.requires_grad_(False)
    return made


def three(
    folder: str,
    tokens: list[list[int]],
    batch: int,
    latents: int,
    k: int,
    layers: list[int],
    variant: str,
) -> Prepared:
    """``variant``: ``floor``, or ``collate``."""
    model = context(folder)
    corpus = TokenCorpus.of(tokens)
    windows = TokenWindows(corpus, len(tokens[0]) + 1, batch, bos=BOS)
    config = CollateConfig()
    places = watched(model, autoencoders(model, tokens, layers, latents, k), config)
    collation = Collation(model, places, windows, config)

    def collate() -> dict[str, torch.Tensor]:
        found = [collation.findings(place) for place in places]
        for number in range(windows.batches_per_epoch):
            for index, seen in collation.see(number):
                found[index].add(seen, 0)
        return _figures(found)

    def floor() -> dict[str, torch.Tensor]:
        for number in range(windows.batches_per_epoch):
            _encode(collation, number)
        return {}

    if variant == "floor":
        return Prepared(floor)
    found = [collation.findings(place) for place in places]
    for number in range(windows.batches_per_epoch):
        for index, seen in collation.see(number):
            found[index].add(seen, 0)
    active = sum(int((each.totals.result().active.count > 0).sum()) for each in found)
    return Prepared(collate, f"{active} latents were active")


def _encode(collation: Collation, number: int) -> None:
    """The forward pass and the encoders on the tokens that count."""
    batch = collation.windows.batch(number)
    places = Places.of(batch, collation.duplicates, False)
    model = collation.context.get_or_create_model()
    captured = model.capture(batch.tokens, collation.sources, pad=batch.pad)
    for place in collation.watched:
        assert isinstance(place, Latents)
        x = captured[place.sources[0]].flatten(0, 1)[torch.from_numpy(places.cell)]
        place.autoencoder.encode_sparse(x)


def _figures(found: list[Findings]) -> dict[str, torch.Tensor]:
    counts = [each.totals.result().active.count for each in found]
    return {"counts": torch.stack([torch.from_numpy(count) for count in counts])}
