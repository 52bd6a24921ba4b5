"""ReLU latents with an L1 penalty, and the same with a penalty that anneals towards L0.

    loss = ‖e‖²  +  c Σ w f^p

f are the latents, e is the error of their reconstruction. w is 1, or the length of each latent's direction:
without it, directions of unlimited length would grow to make latents small. p is 1, except in p-annealing.

- unit-norm decoder: Bricken et al. 2023, "Towards monosemanticity"; tied: Cunningham et al. 2023
  (arXiv:2309.08600)
- weighted by the norm: Conerly et al. 2024, "Update on how we train SAEs" (Circuits Updates, April)
- p-annealing: Karvonen et al. 2024 (arXiv:2408.00113), section 4

Shape legend: ``b`` tokens of a batch, ``n`` inputs, ``o`` outputs, ``l`` latents.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from neuron_explainer.dictionaries.dictionary import DecoderNorm, LearnedDictionary
from neuron_explainer.dictionaries.objectives.base import (
    Loss,
    Objective,
    ObjectiveConfig,
    SparseLatents,
    StepFacts,
    check_free_rows,
    register,
    squared_error,
)
from neuron_explainer.errors import InputError
from neuron_explainer.kernels.relu_step import relu_autoencoder


@dataclass(frozen=True)
class ReLUConfig(ObjectiveConfig):
    """ReLU and L1."""

    l1_coefficient: float = 1.0
    """Weight of the penalty. The penalty is summed over latents, and the squared error over the width; with
    constant normalisation, values of 1 to 10 are usual for a language model."""
    weighted: bool = False
    """Whether the penalty weighs each latent by the length of its direction; meant for decoder_norm =
    free."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.l1_coefficient < 0:
            raise InputError(f"l1_coefficient must not be negative, found {self.l1_coefficient}.")

    def check_run(self, steps: int, decoder_norm: DecoderNorm, tied: bool) -> None:
        if not self.weighted:
            check_free_rows(self.name, decoder_norm, tied)


@register("relu", ReLUConfig)
class ReLU(Objective[ReLUConfig]):
    """Penalises the sum of latents."""

    first_encoder_norm = 0.1
    splits_latents = True

    def loss(
        self, dictionary: LearnedDictionary, x: Tensor, target: Tensor, facts: StepFacts
    ) -> Loss:
        d, c = dictionary, self.config
        norms = torch.linalg.vector_norm(d.rows, dim=1) if c.weighted else None
        out = relu_autoencoder(
            x,
            d.encoder,
            d.latent_bias,
            d.rows,
            pre_bias=d.pre_bias,
            scale=norms,
            workspace=facts.workspace,
        )
        error = target - d.complete(out.output, x)
        reconstruction = squared_error(error)
        penalty = c.l1_coefficient * facts.sparsity * dictionary.total(out.sums.mean())
        terms = {"reconstruction": reconstruction.detach(), "sparsity": penalty.detach()}
        active = out.values if out.indices is None else SparseLatents(out.values, out.indices)
        return Loss(reconstruction + penalty, terms, error.detach(), active)

    def activation(self, dictionary: LearnedDictionary) -> nn.Module:
        return nn.ReLU()


@dataclass(frozen=True)
class PAnnealConfig(ObjectiveConfig):
    """ReLU with an Lp penalty whose p falls from 1 in steps."""

    l1_coefficient: float = 1.0
    """Weight of the penalty while p is 1. When p falls, the weight is rescaled so that the penalty of recent
    batches stays the same."""
    p_end: float = 0.2
    """The final p."""
    n_updates: int = 10
    """How many times p falls."""
    anneal_start: int | None = None
    """Step, from 1, at which p falls for the first time; the other times are spread evenly over the rest of
    the run. If not given: each value of p, including the first, is kept for the same number of steps."""
    memory: int = 10
    """Number of batches before each change of p on which the rescaling is measured."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.l1_coefficient < 0 or not 0 < self.p_end <= 1:
            raise InputError(
                "l1_coefficient must not be negative and p_end must be in 0 to 1, 0 excluded (the "
                f"gradient of L0 is zero), found {self.l1_coefficient} and {self.p_end}."
            )
        for name in ("n_updates", "memory", "anneal_start"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise InputError(f"{name} must be at least 1, found {value}.")

    def check_run(self, steps: int, decoder_norm: DecoderNorm, tied: bool) -> None:
        check_free_rows(self.name, decoder_norm, tied)
        if self.anneal_start is not None and self.anneal_start >= steps:
            raise InputError(
                f"anneal_start = {self.anneal_start} is not less than the {steps} steps of the run: p "
                "would stay 1."
            )

    def start(self, steps: int) -> int:
        """The step at which p falls for the first time, in a run of ``steps``."""
        if self.anneal_start is not None:
            return self.anneal_start
        return max(1, steps // (self.n_updates + 1))


@register("p_anneal", PAnnealConfig)
class PAnneal(Objective[PAnnealConfig]):
    """Penalises Σ f^p."""

    first_encoder_norm = 0.1
    splits_latents = True

    coefficient: Tensor
    """``[]``: the weight of the penalty; it changes whenever p does."""
    sums: Tensor
    """``[2]``: Σ f^p over recent batches, with the current p and with the next one."""

    def __init__(self, config: PAnnealConfig, dictionary: LearnedDictionary) -> None:
        super().__init__(config, dictionary)
        self.register_buffer(
            "coefficient", torch.tensor(config.l1_coefficient, dtype=torch.float64)
        )
        self.register_buffer("sums", torch.zeros(2, dtype=torch.float64))

    def loss(
        self, dictionary: LearnedDictionary, x: Tensor, target: Tensor, facts: StepFacts
    ) -> Loss:
        latents = dictionary.pre_act(x).relu()
        error = target - dictionary.decode(latents, x)
        reconstruction = squared_error(error)
        power = power_sum(latents, self.p_after(self.updates(facts.step, facts.steps)))
        power = dictionary.total(power)
        penalty = self.coefficient.to(x.dtype) * facts.sparsity * power
        terms = {"reconstruction": reconstruction.detach(), "sparsity": penalty.detach()}
        return Loss(reconstruction + penalty, terms, error.detach(), latents.detach())

    def updates(self, step: int, steps: int) -> int:
        """How many times p has fallen before ``step``."""
        start, n = self.config.start(steps), self.config.n_updates
        if step < start or steps <= start:
            return 0
        return min(n, (step - start) * n // (steps - start) + 1)

    def p_after(self, updates: int) -> float:
        """The value of p after it has fallen ``updates`` times."""
        return 1 + (self.config.p_end - 1) * updates / self.config.n_updates

    def after_step(self, dictionary: LearnedDictionary, loss: Loss, facts: StepFacts) -> None:
        """Measure both penalties in the last batches before p changes; rescale the coefficient when it
        does."""
        now = self.updates(facts.step, facts.steps)
        soon = self.updates(facts.step + self.config.memory, facts.steps)
        if soon == now:
            return
        assert isinstance(loss.latents, Tensor)
        for index, updates in enumerate((now, now + 1)):
            power = power_sum(loss.latents, self.p_after(updates))
            self.sums[index] += dictionary.total(dictionary.mean(power, facts.n_tokens))
        if self.updates(facts.step + 1, facts.steps) > now:
            known = self.sums[1] > 0
            self.coefficient *= torch.where(known, self.sums[0] / self.sums[1], 1.0)
            self.sums.zero_()

    def activation(self, dictionary: LearnedDictionary) -> nn.Module:
        return nn.ReLU()


def power_sum(latents: Tensor, p: float) -> Tensor:
    """``[b, l] -> []``: Σ f^p over latents, averaged over tokens. Inactive latents get no gradient."""
    if p == 1:
        return latents.sum() / len(latents)
    active = latents > 0
    powers: Any = torch.where(active, latents, 1.0).pow(p)
    return torch.where(active, powers, 0.0).sum() / len(latents)
