"""An objective of your own: a dataclass of settings, a loss and a nonlinearity; the loop stays the same."""

from dataclasses import dataclass

import torch
from torch import nn

from neuron_explainer.dictionaries import (
    Loss,
    Objective,
    ObjectiveConfig,
    TrainConfig,
    measure,
    register,
    train,
)


@dataclass(frozen=True)
class LogConfig(ObjectiveConfig):
    """ReLU latents with a logarithmic penalty, which hardly shrinks strong latents."""

    strength: float = 1.0
    """Weight of the penalty."""


@register("log_penalty", LogConfig)
class LogPenalty(Objective[LogConfig]):
    def loss(self, dictionary, x, target, facts):
        latents = dictionary.pre_act(x).relu()  # [b, l]
        error = target - dictionary.decode(latents, x)
        reconstruction = error.square().sum(-1).mean()
        # facts.sparsity rises from 0 to 1 if the run warms penalties up.
        penalty = self.config.strength * facts.sparsity * latents.log1p().sum(-1).mean()
        terms = {"reconstruction": reconstruction.detach(), "penalty": penalty.detach()}
        return Loss(reconstruction + penalty, terms, error.detach(), latents.detach())

    def activation(self, dictionary):
        return nn.ReLU()


# Each activation is a sum of few directions. train also takes any iterable of tensors [batch, n].
torch.manual_seed(0)
directions = nn.functional.normalize(torch.randn(64, 32), dim=1)
codes = torch.rand(4096, 64) * (torch.rand(4096, 64) < 0.05)
activations = codes @ directions

for strength in (0.1, 1.0):
    config = TrainConfig(
        LogConfig(strength), n_latents=64, steps=250, batch_size=512, lr=3e-3, seed=1
    )
    autoencoder = train(config, activations, progress=False)  # an ordinary Autoencoder
    found = measure(autoencoder, [activations])
    print(f"strength {strength}: FVU {found.fvu:.3f}, L0 {found.l0:.1f}")
