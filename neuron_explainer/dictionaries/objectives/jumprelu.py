"""JumpReLU: each latent is off below a threshold, which is learned by straight-through gradients.

    f = z 1[z > θ]           loss = ‖e‖² / σ²  +  c L0        or  c (L0 / target - 1)²

    ∂f/∂θ  := -(θ/ε) K((z - θ)/ε)        ∂1[z > θ]/∂θ := -(1/ε) K((z - θ)/ε)

K is 1 between -½ and ½, else 0. Neither f nor L0 has a useful derivative with respect to θ, but the expected
loss has one, and this is a kernel estimate of it. θ and ε are in units of σ, the root of the variance of
targets, as if activations had been scaled to a mean squared norm of 1.

Rajamanoharan et al. 2024, "Jumping ahead" (arXiv:2407.14435), equations 9 to 12; the penalty with a
target is that of Smith et al. 2025 (Google DeepMind's negative results update).

Shape legend: ``b`` tokens of a batch, ``n`` inputs, ``o`` outputs, ``l`` latents.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from neuron_explainer.dictionaries.dictionary import LearnedDictionary
from neuron_explainer.dictionaries.objectives.base import (
    Loss,
    Objective,
    ObjectiveConfig,
    StepFacts,
    register,
    squared_error,
)
from neuron_explainer.errors import InputError
from neuron_explainer.models.autoencoders.nonlinearities import JumpReLU as JumpReLUActivation


@dataclass(frozen=True)
class JumpReLUConfig(ObjectiveConfig):
    """JumpReLU (Rajamanoharan et al. 2024)."""

    coefficient: float = 1.0
    """Weight of the penalty. Without target_l0 it multiplies the number of active latents, and values around
    0.001 are usual."""
    target_l0: float | None = 20.0
    """Mean number of active latents to aim at. If not given: the fewer, the better."""
    bandwidth: float = 0.001
    """Width of the kernel that estimates gradients of thresholds."""
    first_threshold: float = 0.001
    """Initial value of thresholds."""
    threshold_speed: float = 10.0
    """How much faster thresholds are learned than everything else. Adam changes a threshold by a factor of at
    most about 1 + threshold_speed · lr in a step, and thresholds have to grow a hundredfold. With 1, as in
    the paper, that takes some ten thousand steps, in which nothing is sparse."""

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("bandwidth", "first_threshold", "threshold_speed", "target_l0"):
            value = getattr(self, name)
            if value is not None and value <= 0:
                raise InputError(f"{name} must be above 0, found {value}.")
        if self.coefficient < 0:
            raise InputError(f"coefficient must not be negative, found {self.coefficient}.")


@register("jumprelu", JumpReLUConfig)
class JumpReLU(Objective[JumpReLUConfig]):
    """Penalises the number of active latents."""

    first_encoder_norm = 0.1
    splits_latents = True
    per_latent = ("threshold_exponent",)

    def __init__(self, config: JumpReLUConfig, dictionary: LearnedDictionary) -> None:
        super().__init__(config, dictionary)
        first = torch.zeros(dictionary.n_latents, dtype=dictionary.encoder.dtype)
        self.threshold_exponent = nn.Parameter(first)

    @property
    def thresholds(self) -> Tensor:
        """``[l]``, in units of σ. An exponential stays positive, and the factor in it sets the speed,
        because the length of Adam's steps does not depend on that of gradients."""
        return (
            self.config.first_threshold
            * (self.config.threshold_speed * self.threshold_exponent).exp()
        )

    def loss(
        self, dictionary: LearnedDictionary, x: Tensor, target: Tensor, facts: StepFacts
    ) -> Loss:
        c, unit = self.config, dictionary.variance.sqrt()
        threshold, bandwidth = self.thresholds * unit, c.bandwidth * unit
        pre_act = dictionary.pre_act(x).relu()
        latents = jump_relu(pre_act, threshold, bandwidth)
        here = step(pre_act, threshold, bandwidth).sum() / len(x)
        l0 = dictionary.total(dictionary.mean(here, facts.n_tokens))
        error = target - dictionary.decode(latents, x)
        reconstruction = squared_error(error) / dictionary.variance
        excess = l0 if c.target_l0 is None else (l0 / c.target_l0 - 1).square()
        penalty = c.coefficient * facts.sparsity * excess
        terms = {"reconstruction": reconstruction.detach(), "sparsity": penalty.detach()}
        return Loss(reconstruction + penalty, terms, error.detach(), latents.detach())

    def revive(self, latents: Tensor) -> None:
        self.threshold_exponent.data[latents] = 0

    def activation(self, dictionary: LearnedDictionary) -> nn.Module:
        unit = dictionary.variance.sqrt() * dictionary.target_scale
        return JumpReLUActivation(self.thresholds * unit)


def jump_relu(z: Tensor, threshold: Tensor, bandwidth: Tensor | float) -> Tensor:
    """``z 1[z > θ]``: ``[b, l], [l] -> [b, l]``, with the kernel's gradient for ``θ``."""
    latents: Tensor = _JumpReLU.apply(z, threshold, bandwidth)  # type: ignore[no-untyped-call]
    return latents


def step(z: Tensor, threshold: Tensor, bandwidth: Tensor | float) -> Tensor:
    """``1[z > θ]``: ``[b, l], [l] -> [b, l]``, with the kernel's gradient for ``θ``, none for ``z``."""
    on: Tensor = _Step.apply(z, threshold, bandwidth)  # type: ignore[no-untyped-call]
    return on


def _kernel(z: Tensor, threshold: Tensor, bandwidth: Tensor | float) -> Tensor:
    return (z - threshold).abs() <= bandwidth / 2


class _JumpReLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, z: Tensor, threshold: Tensor, bandwidth: Any) -> Tensor:
        ctx.save_for_backward(z, threshold)
        ctx.bandwidth = bandwidth
        return torch.where(z > threshold, z, 0.0)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None]:
        z, threshold = ctx.saved_tensors
        near = torch.where(_kernel(z, threshold, ctx.bandwidth), grad, 0.0)
        to_threshold = -(threshold / ctx.bandwidth) * near.sum(0)
        return torch.where(z > threshold, grad, 0.0), to_threshold, None


class _Step(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, z: Tensor, threshold: Tensor, bandwidth: Any) -> Tensor:
        ctx.save_for_backward(z, threshold)
        ctx.bandwidth = bandwidth
        return (z > threshold).to(z.dtype)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[None, Tensor, None]:
        z, threshold = ctx.saved_tensors
        near = torch.where(_kernel(z, threshold, ctx.bandwidth), grad, 0.0)
        return None, -near.sum(0) / ctx.bandwidth, None
