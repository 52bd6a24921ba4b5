"""Trains one TopK autoencoder for every layer and location of the model, with the library's own rooms.

The frozen model runs on windows of the books as activations are needed, once for all dictionaries
of a process; nothing is stored but checkpoints. Resumable bit for bit.
"""

import datetime
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from neuron_explainer.activations import ActivationBatch, Harvester, ShuffleBuffer, TokenBatch
from neuron_explainer.dictionaries import TopKConfig, TrainConfig, train_many
from neuron_explainer.dictionaries.prune import prune_by
from neuron_explainer.evaluation.latent_activity import LatentActivity
from neuron_explainer.experiments.tiny_tales.data import TrainingWindows
from neuron_explainer.models.autoencoder import Autoencoder
from neuron_explainer.models.locations import ActivationLocation, parse_locations
from neuron_explainer.models.model_context import ModelContext

PATHS = ("mlp.post_act", "resid.torso.delta_mlp", "resid.torso.delta_attn")
BATCH = 1024
"""Activations a step. Small batches fit better for the same number of tokens: 4,096 left 10 % more
variance unexplained after a million tokens."""
BUFFER = 256 * BATCH
WINDOWS_PER_FORWARD = 16


@dataclass(frozen=True)
class Size:
    """Latents to begin with, how many of them may be active for one token, and Adam's settings."""

    n_latents: int
    k: int
    lr: float
    beta2: float = 0.99
    rarest: float = 0.0
    """Latents that are active on no larger share of tokens are left out in the end: too seldom to be looked
    at or measured."""


#: By location, or by path for all layers not named. Sizes keep all assets below 40 MB. The first
#: layer writes less variety, and latents that it does not need die; the last is the hardest to
#: explain. Higher rates fit faster and kill more, and so does a second moment that forgets fast.
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
    """Of the location, or of its path."""
    return sizes.get(str(location)) or sizes[location.path]


def places(context: ModelContext, locations: Sequence[str]) -> list[ActivationLocation]:
    """The single locations meant; one without a layer stands for all layers."""
    return [p for each in parse_locations(locations) for p in each.expand(context.n_layers)]


def train_config(
    location: ActivationLocation, size: Size, steps: int, decay_steps: int, seed: int
) -> TrainConfig:
    """The recipe; sizes and rates differ from location to location, all else is the same."""
    return TrainConfig(
        TopKConfig(k=size.k, aux_k=64),
        n_latents=size.n_latents,
        steps=steps,
        batch_size=BATCH,
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


class BookActivations:
    """Activations of the training windows, by number: a source for :class:`ShuffleBuffer`."""

    def __init__(self, harvester: Harvester, windows: TrainingWindows) -> None:
        self.harvester, self.windows = harvester, windows

    @property
    def forward_s(self) -> float:
        """Seconds spent in the model so far."""
        return self.harvester.forward_s

    def chunk(self, number: int) -> ActivationBatch:
        """Of one batch of windows; there is always another."""
        tokens, _ = self.windows.batch(number)
        position = torch.arange(tokens.shape[1]).expand_as(tokens)
        return self.harvester(TokenBatch(tokens, torch.zeros_like(tokens), position))

    def describe(self) -> dict[str, Any]:
        """What decides the values."""
        windows = self.windows
        return {
            **self.harvester.describe(),
            "tokens": len(windows.stream),
            "windows": [windows.ctx_window, windows.batch_size, windows.seed, windows.bos_share],
        }


def train(
    context: ModelContext,
    windows: TrainingWindows,
    configs: Mapping[str, TrainConfig],
    folder: Path | None,
) -> dict[str, Autoencoder]:
    """Autoencoders by location; goes on from the checkpoint in ``folder`` where there is one."""
    source = BookActivations(Harvester(context, list(configs), autocast_bf16=True), windows)
    seed = next(iter(configs.values())).seed
    with ShuffleBuffer(source, BUFFER, BATCH, seed=seed, prefetch=False) as batches:
        return train_many(configs, batches, folder)


def without_rare(
    context: ModelContext,
    windows: TrainingWindows,
    autoencoders: Mapping[str, Autoencoder],
    n_batches: int,
) -> dict[str, Autoencoder]:
    """The autoencoders without the latents that are active too seldom (:attr:`Size.rarest`), judged on
    ``n_batches`` batches of windows."""
    source = BookActivations(Harvester(context, list(autoencoders), autocast_bf16=True), windows)
    activity = {name: LatentActivity(each.n_latents) for name, each in autoencoders.items()}
    for number in range(n_batches):
        for location, x in source.chunk(number).activations.items():
            activity[str(location)].update(autoencoders[str(location)].encode_sparse(x))
    return {
        name: prune_by(
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
    context: ModelContext,
    windows: TrainingWindows,
    autoencoders: Mapping[str, Autoencoder],
    n_batches: int,
) -> None:
    """Fill the autoencoders' own statistics of their latents, over ``n_batches`` batches of windows."""
    source = BookActivations(Harvester(context, list(autoencoders), autocast_bf16=True), windows)
    tokens = 0
    for autoencoder in autoencoders.values():
        autoencoder.latents_activation_frequency.zero_()
    for number in range(n_batches):
        chunk = source.chunk(number)
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


def training_record(config: TrainConfig, held_out_books: Sequence[str]) -> dict[str, Any]:
    """What an autoencoder's config says of how it was made."""
    return {
        "data": "35 public-domain books in English",
        "held_out_books": list(held_out_books),
        "date": datetime.date.today().isoformat(),
        "optimiser": f"Adam, betas ({config.beta1}, {config.beta2}), in float32",
        "steps": config.total_steps,
        "batch": BATCH,
        "tokens": config.total_steps * BATCH,
        "lr": config.lr,
        "decay_steps": config.decay_steps,
        "seed": config.seed,
    }
