"""TopK: the k largest pre-activations of each token, and AuxK for latents that nothing reaches.

    loss = ‖e‖² / σ²  +  c_multi ‖e_multi‖² / σ²  +  c_aux ‖e - ê‖² / ‖e - mean(e)‖²

e is the reconstruction error, σ² the variance of targets, e_multi the error with more latents active,
ê what the best of the dead latents make of e. Gao et al. 2024 (arXiv:2406.04093), section 2.3 and
appendix A.

Shape legend: ``b`` tokens of a batch, ``n`` inputs, ``o`` outputs, ``l`` latents, ``k`` active ones,
``d`` dead ones.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from neuron_explainer.dictionaries.dictionary import Dictionary
from neuron_explainer.dictionaries.objectives.base import (
    Loss,
    Moment,
    Objective,
    ObjectiveConfig,
    SparseLatents,
    register,
    squared_error,
)
from neuron_explainer.dictionaries.schedules import annealed_k
from neuron_explainer.dictionaries.sparse_step import decode_rows, encode_top_k
from neuron_explainer.errors import InputError
from neuron_explainer.models.latent_activations import TopK as TopKActivation


@dataclass(frozen=True)
class AuxKConfig(ObjectiveConfig):
    """What the objectives with a fixed number of active latents share."""

    k: int = 32
    """Latents that are active for a token."""
    aux_k: int | None = None
    """Dead latents that try to explain the error of a token; half the width if not given."""
    aux_coefficient: float = 1 / 32
    """Weight of that try in the loss; 0 leaves dead latents alone."""
    k_anneal_steps: int = 0
    """Steps in which the number of active latents falls from k_start to k."""
    k_start: int | None = None
    """Latents that are active at step 0 if the number is annealed; the width if not given."""

    def __post_init__(self) -> None:
        if self.k < 1:
            raise InputError(f"k must be at least 1, found {self.k}.")
        if self.aux_k is not None and self.aux_k < 1:
            raise InputError(
                f"aux_k must be at least 1, found {self.aux_k}; aux_coefficient = 0 turns AuxK off."
            )
        if self.aux_coefficient < 0 or self.k_anneal_steps < 0:
            raise InputError("aux_coefficient and k_anneal_steps must not be negative.")
        if self.k_start is not None and not (self.k_anneal_steps and self.k_start >= self.k):
            raise InputError(
                f"k_start must be at least k = {self.k} and needs k_anneal_steps > 0, found "
                f"{self.k_start}."
            )


@dataclass(frozen=True)
class TopKConfig(AuxKConfig):
    """TopK (Gao et al. 2024)."""

    multi_k: int | None = None
    """A second, larger number of active latents whose reconstruction is trained too (4 k in the
    paper), so that other numbers work when the dictionary is used; none if not given."""
    multi_coefficient: float = 1 / 8
    """Weight of that second reconstruction in the loss."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.multi_k is not None and self.multi_k <= self.k:
            raise InputError(f"multi_k must be more than k = {self.k}, found {self.multi_k}.")


def check_k(config: AuxKConfig, dictionary: Dictionary, largest: int) -> None:
    """An error if more latents are to be active than there are."""
    if largest > dictionary.n_latents:
        raise InputError(
            f"{config.name}: {largest} active latents are more than the {dictionary.n_latents} there "
            "are; give more latents, or a smaller k."
        )


def k_at(config: AuxKConfig, dictionary: Dictionary, step: int) -> int:
    """Number of active latents a token at a step."""
    start = config.k_start or max(config.k, min(dictionary.n_inputs, dictionary.n_latents))
    return annealed_k(step, config.k, start, config.k_anneal_steps)


def aux_k_loss(
    config: AuxKConfig, dictionary: Dictionary, x: Tensor, error: Tensor, dead: Tensor
) -> Tensor:
    """``[]``: how badly the best of the dead latents explain ``error`` ``[b, o]``.

    The error is taken as it is, without gradient: live latents are not to leave work for dead ones.
    """
    k = min(config.aux_k or max(1, dictionary.n_outputs // 2), len(dead))
    d = dictionary
    values, indices = encode_top_k(
        x, d.encoder, d.latent_bias, k, pre_bias=d.pre_bias, latents=dead
    )
    explained = decode_rows(values.relu(), indices, dictionary.rows)
    deviation = (error - error.mean(0)).square().sum() / len(error)
    share = squared_error(error - explained) / torch.where(deviation > 0, deviation, 1.0)
    return torch.where(deviation > 0, share, 0.0)  # nothing to explain is not infinitely hard


@register("topk", TopKConfig)
class TopK(Objective[TopKConfig]):
    """Keeps the largest pre-activations of each token; no tensor of all latents outlives that."""

    def __init__(self, config: TopKConfig, dictionary: Dictionary) -> None:
        super().__init__(config, dictionary)
        check_k(config, dictionary, max(config.multi_k or 0, k_at(config, dictionary, 0)))

    def loss(self, dictionary: Dictionary, x: Tensor, target: Tensor, moment: Moment) -> Loss:
        config = self.config
        k = k_at(config, dictionary, moment.step)
        d, larger = dictionary, max(k, config.multi_k or 0)
        # One search for both numbers: values come in descending order.
        every, which = encode_top_k(x, d.encoder, d.latent_bias, larger, pre_bias=d.pre_bias)
        every = every.relu()
        values, indices = every[:, :k], which[:, :k]
        error = self._error(dictionary, x, target, values, indices)
        total = reconstruction = squared_error(error) / dictionary.variance
        terms = {"reconstruction": reconstruction.detach()}
        if config.multi_k is not None:
            multi = squared_error(self._error(dictionary, x, target, every, which))
            multi = multi / dictionary.variance
            total = total + config.multi_coefficient * multi
            terms["multi"] = multi.detach()
        if len(moment.dead) and config.aux_coefficient:
            aux = aux_k_loss(config, dictionary, x, error.detach(), moment.dead)
            total = total + config.aux_coefficient * aux
            terms["aux"] = aux.detach()
        return Loss(total, terms, error.detach(), SparseLatents(values.detach(), indices))

    def _error(
        self, dictionary: Dictionary, x: Tensor, target: Tensor, values: Tensor, indices: Tensor
    ) -> Tensor:
        return target - dictionary.add_rest(decode_rows(values, indices, dictionary.rows), x)

    def activation(self, dictionary: Dictionary) -> nn.Module:
        return TopKActivation(self.config.k)
