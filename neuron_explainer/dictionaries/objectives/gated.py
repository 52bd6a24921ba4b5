"""Gated: one path decides which latents are active; another, with the same directions, how strongly.

    g = (x - b_pre) · W_encᵀ + b_gate         f = 1[g > 0] · relu(exp(r) (x - b_pre) · W_encᵀ + b_mag)
    loss = ‖x - x̂(f)‖²  +  c Σ relu(g)  +  ‖x - x̂_frozen(relu(g))‖²

The gate gets no gradient from f, so the last term teaches it to open where that helps; in x̂_frozen, the
decoder and its bias are constants. The penalty falls on the gate only, so magnitudes are not shrunk.

Rajamanoharan et al. 2024, "Improving dictionary learning with gated sparse autoencoders"
(arXiv:2404.16014), equations 6 to 8.

Shape legend: ``b`` tokens of a batch, ``n`` inputs, ``o`` outputs, ``l`` latents.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from neuron_explainer.dictionaries.dictionary import DecoderNorm, LearnedDictionary
from neuron_explainer.dictionaries.objectives.base import (
    Loss,
    Objective,
    ObjectiveConfig,
    StepFacts,
    check_free_rows,
    register,
    squared_error,
)
from neuron_explainer.errors import InputError
from neuron_explainer.models.autoencoders.nonlinearities import Gated as GatedActivation


@dataclass(frozen=True)
class GatedConfig(ObjectiveConfig):
    """Gated (Rajamanoharan et al. 2024)."""

    l1_coefficient: float = 1.0
    """Weight of the penalty on the gate, in the same units as relu's."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.l1_coefficient < 0:
            raise InputError(f"l1_coefficient must not be negative, found {self.l1_coefficient}.")

    def check_run(self, steps: int, decoder_norm: DecoderNorm, tied: bool) -> None:
        check_free_rows(self.name, decoder_norm, tied)


@register("gated", GatedConfig)
class Gated(Objective[GatedConfig]):
    """Penalises the gate's pre-activations."""

    first_encoder_norm = 0.1
    splits_latents = True
    per_latent = ("b_gate", "r_mag", "b_mag")
    trains_latent_bias = False  # each path has its own

    def __init__(self, config: GatedConfig, dictionary: LearnedDictionary) -> None:
        super().__init__(config, dictionary)
        zeros = torch.zeros(dictionary.n_latents, dtype=dictionary.encoder.dtype)
        self.b_gate = nn.Parameter(zeros.clone())
        self.r_mag = nn.Parameter(zeros.clone())
        self.b_mag = nn.Parameter(zeros.clone())

    def loss(
        self, dictionary: LearnedDictionary, x: Tensor, target: Tensor, facts: StepFacts
    ) -> Loss:
        pre_act = dictionary.pre_act(x)
        gate = pre_act + self.b_gate
        magnitude = (pre_act * self.r_mag.exp() + self.b_mag).relu()
        latents = torch.where(gate > 0, magnitude, 0.0)
        error = target - dictionary.decode(latents, x)
        reconstruction = squared_error(error)
        opening = gate.relu()
        opened = dictionary.total(opening.sum() / len(x))
        penalty = self.config.l1_coefficient * facts.sparsity * opened
        frozen = dictionary.total(opening @ dictionary.rows.detach())
        auxiliary = squared_error(target - (frozen + dictionary.frozen_rest(x)))
        terms = {
            "reconstruction": reconstruction.detach(),
            "sparsity": penalty.detach(),
            "gate": auxiliary.detach(),
        }
        total = reconstruction + penalty + auxiliary
        return Loss(total, terms, error.detach(), latents.detach())

    def revive(self, latents: Tensor) -> None:
        for parameter in (self.b_gate, self.r_mag, self.b_mag):
            parameter.data[latents] = 0

    def activation(self, dictionary: LearnedDictionary) -> nn.Module:
        scale = dictionary.target_scale
        return GatedActivation(self.b_gate * scale, self.r_mag, self.b_mag * scale)
