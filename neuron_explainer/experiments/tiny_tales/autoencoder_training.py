"""Trains one TopK autoencoder for every layer and location of the model, all at once.

Each step runs the frozen model on new windows and gives every dictionary the activations of its
location: the forward pass is paid once for all of them and nothing is stored on disk. Resumable bit
for bit, like the model's training.
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from neuron_explainer.experiments.tiny_tales.checkpoints import load_checkpoint, save_checkpoint
from neuron_explainer.experiments.tiny_tales.data import TrainingWindows
from neuron_explainer.experiments.tiny_tales.dictionary import Dictionary, DictionaryConfig
from neuron_explainer.experiments.tiny_tales.schedule import warmup_stable_decay
from neuron_explainer.models.autoencoder import Autoencoder, TopK
from neuron_explainer.models.locations import ActivationLocation
from neuron_explainer.models.transformer import Transformer

PATHS = ("mlp.post_act", "resid.torso.delta_mlp", "resid.torso.delta_attn")

#: By location, or by path for all layers not named. Sizes keep all assets below 40 MB. The first
#: layer writes less variety, and latents that it does not need die; the last is the hardest to
#: explain. Higher rates fit faster and kill more.
CONFIGS = {
    "mlp.post_act": DictionaryConfig(n_latents=1536, k=32, lr=2e-3),
    "3/mlp.post_act": DictionaryConfig(n_latents=2048, k=32, lr=3e-3),
    "resid.torso.delta_mlp": DictionaryConfig(n_latents=2560, k=16, lr=3e-3),
    "0/resid.torso.delta_mlp": DictionaryConfig(n_latents=1280, k=16, lr=3e-3),
    "resid.torso.delta_attn": DictionaryConfig(n_latents=2560, k=16, lr=1.5e-3),
    "0/resid.torso.delta_attn": DictionaryConfig(n_latents=768, k=16, lr=1.5e-3),
}


@dataclass(frozen=True)
class AutoencoderTrainingConfig:
    """Everything that decides the dictionaries, next to the model and the data."""

    steps: int
    decay_steps: int
    warmup_steps: int = 50
    windows_per_step: int = 4
    dead_after_tokens: int = 50_000
    sample_windows: int = 64
    """Windows whose activations give means and scales."""
    bos_share: float = 0.25
    seed: int = 1


@torch.no_grad()
def harvest(model: Transformer, tokens: Tensor, locations: list[str]) -> dict[str, Tensor]:
    """Activations ``[b * s, n]`` by single location; one without a layer stands for all layers."""
    with torch.autocast("cpu", torch.bfloat16):
        captured = model.capture(tokens, locations)
    return {str(location): x.flatten(0, 1).float() for location, x in captured.items()}


class AutoencoderTrainer:
    """All dictionaries of a model, their optimiser and the step they have reached."""

    def __init__(
        self,
        model: Transformer,
        windows: TrainingWindows,
        config: AutoencoderTrainingConfig,
        locations: Sequence[str] = PATHS,
        configs: Mapping[str, DictionaryConfig] = CONFIGS,
    ) -> None:
        self.model, self.windows, self.config, self.step = model, windows, config, 0
        self.locations = list(locations)
        generator = torch.Generator().manual_seed(config.seed)
        self.dictionaries = {
            location: Dictionary(_config_of(location, configs), sample, generator)
            for location, sample in self._harvest_sample().items()
        }
        self.lrs = {location: _config_of(location, configs).lr for location in self.dictionaries}
        self.optimiser = torch.optim.Adam(
            [{"params": list(d.parameters())} for d in self.dictionaries.values()], fused=True
        )

    def _harvest_sample(self) -> dict[str, Tensor]:
        """Activations from which means, scales and first directions are taken."""
        batches = -(-self.config.sample_windows // self.windows.batch_size)
        tokens = torch.cat([self.windows.batch(step)[0] for step in range(batches)])
        return harvest(self.model, tokens, self.locations)

    def activations(self, step: int) -> dict[str, Tensor]:
        """What the dictionaries see at a step: ``[b, n]`` by location."""
        tokens, _ = self.windows.batch(step)
        return harvest(self.model, tokens, self.locations)

    def train_step(self) -> dict[str, float]:
        """One update of every dictionary; returns each one's share of variance not explained."""
        c = self.config
        factor = warmup_stable_decay(self.step, c.steps, c.warmup_steps, c.decay_steps)
        for group, lr in zip(self.optimiser.param_groups, self.lrs.values(), strict=True):
            group["lr"] = lr * factor
        activations = self.activations(self.step)
        self.optimiser.zero_grad()
        fvu: dict[str, float] = {}
        for location, dictionary in self.dictionaries.items():
            loss = dictionary.loss(activations[location], c.dead_after_tokens)
            loss.total.backward()  # type: ignore[no-untyped-call]
            dictionary.keep_gradient_tangential()
            fvu[location] = float(loss.fvu)
        self.optimiser.step()
        for dictionary in self.dictionaries.values():
            dictionary.normalise_decoder()
        self.step += 1
        return fvu

    def _checkpoint(self, folder: Path) -> Path:
        """Named after the locations: they may be shared out among processes."""
        name = "+".join(sorted(self.locations)).replace("/", "-")
        return folder / f"autoencoder_training.{name}.pt"

    def save(self, folder: Path) -> None:
        """Write the checkpoint whole or not at all."""
        save_checkpoint(
            self._checkpoint(folder),
            config=asdict(self.config),
            step=self.step,
            state={
                "dictionaries": {k: d.state_dict() for k, d in self.dictionaries.items()},
                "optimiser": self.optimiser.state_dict(),
            },
        )

    def load(self, folder: Path) -> bool:
        """Take up the checkpoint in ``folder``, if there is one; says whether there was."""
        stored = load_checkpoint(self._checkpoint(folder), asdict(self.config))
        if stored is None:
            return False
        for location, state in stored.state["dictionaries"].items():
            self.dictionaries[location].load_state_dict(state)
        self.optimiser.load_state_dict(stored.state["optimiser"])
        self.step = stored.step
        return True

    def finished(self, location: str, model_name: str, metadata: dict[str, Any]) -> Autoencoder:
        """The dictionary of a location as a plain autoencoder of raw activations."""
        dictionary = self.dictionaries[location]
        n_latents, n_inputs = dictionary.encoder.shape
        autoencoder = Autoencoder(
            n_latents,
            n_inputs,
            TopK(dictionary.k),
            location=location,
            model_name=model_name,
            metadata=metadata,
        )
        parameters = dictionary.folded_state_dict()
        for name, parameter in autoencoder.named_parameters():
            parameter.data.copy_(parameters[name])
        return autoencoder


@torch.no_grad()
def record_statistics(
    trainer: AutoencoderTrainer, autoencoders: dict[str, Autoencoder], n_steps: int
) -> None:
    """Fill the autoencoders' own statistics of their latents, over ``n_steps`` batches."""
    tokens = 0
    for autoencoder in autoencoders.values():
        autoencoder.latents_activation_frequency.zero_()
    for step in range(n_steps):
        activations = trainer.activations(trainer.step + step)
        for location, autoencoder in autoencoders.items():
            latents = autoencoder.encode(activations[location])
            active = latents > 0
            autoencoder.latents_activation_frequency += active.sum(0)
            autoencoder.latents_mean_square += latents.square().sum(0)
            autoencoder.stats_last_nonzero += 1
            autoencoder.stats_last_nonzero[active.any(0)] = 0
        tokens += len(latents)
    for autoencoder in autoencoders.values():
        autoencoder.latents_activation_frequency /= tokens
        autoencoder.latents_mean_square /= tokens


def _config_of(location: str, configs: Mapping[str, DictionaryConfig]) -> DictionaryConfig:
    return configs.get(location) or configs[_path(location)]


def _path(location: str) -> str:
    return ActivationLocation.parse(location).path


def train(trainer: AutoencoderTrainer, folder: Path, checkpoint_every: int = 200) -> None:
    """Run to ``config.steps``, from the checkpoint in ``folder`` where there is one."""
    torch.set_flush_denormal(True)
    trainer.load(folder)
    with tqdm(total=trainer.config.steps, initial=trainer.step, unit="step") as bar:
        while trainer.step < trainer.config.steps:
            fvu = trainer.train_step()
            bar.update()
            dead = {
                location: dictionary.dead_share(trainer.config.dead_after_tokens)
                for location, dictionary in trainer.dictionaries.items()
            }
            bar.set_postfix(fvu=_by_path(fvu), dead=_by_path(dead), refresh=False)
            if trainer.step % checkpoint_every == 0 or trainer.step == trainer.config.steps:
                trainer.save(folder)


def _by_path(values: dict[str, float]) -> str:
    """Means over the layers, as text for the progress bar."""
    by_path: dict[str, list[float]] = {}
    for location, value in values.items():
        by_path.setdefault(_path(location), []).append(value)
    return " ".join(
        f"{path.rpartition('.')[2]}={sum(found) / len(found):.3f}"
        for path, found in by_path.items()
    )
