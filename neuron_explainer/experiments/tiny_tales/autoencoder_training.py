"""Trains one TopK autoencoder for every layer and location of the model, with the library's own rooms.

The frozen model runs on windows of the books when activations are needed, once for all dictionaries of
a process; only checkpoints are stored. A run continues from its newest checkpoint, bit for bit.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from neuron_explainer.activations import (
    ActivationBatch,
    Harvester,
    LiveSource,
    ShuffleBuffer,
    TokenCorpus,
    TokenWindows,
)
from neuron_explainer.dictionaries import TopKConfig, TrainConfig, train_many
from neuron_explainer.dictionaries.prune import prune
from neuron_explainer.dictionaries.runs import Run
from neuron_explainer.evaluation.latent_activity import LatentActivity
from neuron_explainer.experiments.tiny_tales.data import data_record
from neuron_explainer.models.autoencoder import Autoencoder
from neuron_explainer.models.locations import ActivationLocation, parse_locations
from neuron_explainer.models.model_context import ModelContext
from neuron_explainer.models.weight_names import Dimension

PATHS = ("mlp.post_act", "resid.torso.delta_mlp", "resid.torso.delta_attn")
BATCH = 1024
"""Activations per step. Small batches fit better for the same number of tokens: 4,096 left 10 % more
variance unexplained after a million tokens."""
BUFFER = 256 * BATCH
"""Activations in the shuffled buffer."""
WINDOWS_PER_FORWARD = 16


@dataclass(frozen=True)
class Size:
    """The size of a dictionary, and Adam's settings."""

    n_latents: int
    """Latents to begin with."""
    k: int
    """How many of them may be active on one token."""
    lr: float
    beta2: float = 0.99
    rarest: float = 0.0
    """Latents that are active on no more than this share of tokens are removed at the end: they are too
    rare to be looked at or measured."""


#: By location, or by path for all layers that are not named. The sizes keep all assets below 40 MB. The
#: first layer writes less variety, and latents that it does not need die; the last one is the hardest to
#: explain. Higher rates fit faster and kill more latents, and so does a second moment that forgets fast.
SIZES = {
    "mlp.post_act": Size(n_latents=1536, k=32, lr=2e-3),
    "1/mlp.post_act": Size(n_latents=1536, k=32, lr=2e-3, beta2=0.999),
    "2/mlp.post_act": Size(n_latents=1536, k=32, lr=2e-3, rarest=1 / 20_000),
    "3/mlp.post_act": Size(n_latents=2048, k=32, lr=3e-3),
    "resid.torso.delta_mlp": Size(n_latents=2560, k=16, lr=3e-3),
    "0/resid.torso.delta_mlp": Size(n_latents=1280, k=16, lr=3e-3),
    "resid.torso.delta_attn": Size(n_latents=2560, k=16, lr=1.5e-3),
    "0/resid.torso.delta_attn": Size(n_latents=768, k=16, lr=1.5e-3),
}


def size_of(location: ActivationLocation, sizes: Mapping[str, Size] = SIZES) -> Size:
    """The size for a location: its own, or that of its path."""
    return sizes.get(str(location)) or sizes[location.path]


def places(context: ModelContext, locations: Sequence[str]) -> list[ActivationLocation]:
    """Each location in one layer; a location without a layer stands for all layers."""
    return [p for each in parse_locations(locations) for p in each.expand(context.n_layers)]


def train_config(
    location: ActivationLocation,
    size: Size,
    steps: int,
    decay_steps: int,
    seed: int,
    batch_size: int = BATCH,
) -> TrainConfig:
    """The recipe; only the size differs from location to location."""
    return TrainConfig(
        TopKConfig(k=size.k, aux_k=64),
        n_latents=size.n_latents,
        steps=steps,
        batch_size=batch_size,
        lr=size.lr,
        beta2=size.beta2,
        warmup_steps=min(50, steps - decay_steps),
        decay="linear" if decay_steps else "none",
        decay_steps=decay_steps,
        sample_batches=16,
        decoder_bias="mean",
        dead_after_tokens=50_000,
        seed=seed,
        checkpoint_every=500,
        location=str(location),
        model_name="tiny-tales",
    )


def train(
    source: LiveSource,
    configs: Mapping[str, TrainConfig],
    folder: Path | None,
    buffer: int = BUFFER,
) -> dict[str, Autoencoder]:
    """Autoencoders by location, from the newest checkpoint in ``folder`` if there is one."""
    run = None if folder is None else Run.find(folder)
    if run is not None and run.is_finished:
        return {name: Autoencoder.load(path) for name, path in run.results.items()}
    first = next(iter(configs.values()))
    with ShuffleBuffer(
        source, buffer, first.batch_size, seed=first.seed, prefetch=False
    ) as batches:
        return train_many(configs, batches, folder)


def activations_of_books(
    context: ModelContext, books: TokenCorpus, locations: Sequence[str], seed: int
) -> LiveSource:
    """Activations of the books, window after window in random order, without end."""
    size = context.get_dim_size(Dimension.MAX_CONTEXT_LENGTH)
    windows = TokenWindows(books, size, WINDOWS_PER_FORWARD, seed=seed, epochs=None)
    return LiveSource(Harvester(context, locations, autocast_bf16=True), windows)


def without_rare(
    source: LiveSource, autoencoders: Mapping[str, Autoencoder], n_chunks: int
) -> dict[str, Autoencoder]:
    """The autoencoders without their rarest latents (:attr:`Size.rarest`), judged on some chunks."""
    activity = {name: LatentActivity(each.n_latents) for name, each in autoencoders.items()}
    for chunk in _chunks(source, n_chunks):
        for location, x in chunk.activations.items():
            activity[str(location)].update(autoencoders[str(location)].encode_sparse(x))
    return {
        name: prune(
            autoencoder,
            activity[name],
            min_frequency=size_of(ActivationLocation.parse(name)).rarest,
            min_max_activation=0,
            min_decoder_norm=0,
            keep_indices=False,
        ).autoencoder
        for name, autoencoder in autoencoders.items()
    }


@torch.no_grad()
def record_statistics(
    source: LiveSource, autoencoders: Mapping[str, Autoencoder], n_chunks: int
) -> None:
    """Fill in the autoencoders' own statistics of their latents, over some chunks of activations."""
    tokens = 0
    for autoencoder in autoencoders.values():
        autoencoder.latents_activation_frequency.zero_()
    for chunk in _chunks(source, n_chunks):
        for location, x in chunk.activations.items():
            autoencoder = autoencoders[str(location)]
            latents = autoencoder.encode(x)
            active = latents > 0
            autoencoder.latents_activation_frequency += active.sum(0)
            autoencoder.latents_mean_square += latents.square().sum(0)
            autoencoder.stats_last_nonzero += 1
            autoencoder.stats_last_nonzero[active.any(0)] = 0
        tokens += len(chunk)
    for autoencoder in autoencoders.values():
        autoencoder.latents_activation_frequency /= tokens
        autoencoder.latents_mean_square /= tokens


def _chunks(source: LiveSource, n_chunks: int) -> Iterator[ActivationBatch]:
    for number in range(n_chunks):
        chunk = source.chunk(number)
        assert chunk is not None  # the source has no end
        yield chunk


def training_record(config: TrainConfig) -> dict[str, Any]:
    """What an autoencoder's config says about how it was made."""
    return {
        **data_record(),
        "optimiser": f"Adam, betas ({config.beta1}, {config.beta2}), in float32",
        "steps": config.total_steps,
        "batch": config.batch_size,
        "tokens": config.total_steps * config.batch_size,
        "lr": config.lr,
        "decay_steps": config.decay_steps,
        "seed": config.seed,
    }
