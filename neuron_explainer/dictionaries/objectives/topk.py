"""TopK: the k largest pre-activations of each token, and AuxK for dead latents.

    loss = ‖e‖² / σ²  +  c_multi ‖e_multi‖² / σ²  +  c_aux ‖e - ê‖² / ‖e - mean(e)‖²

e is the reconstruction error, σ² the variance of targets, e_multi the error with more active latents,
ê the reconstruction of e by the dead latents that fit it best. Gao et al. 2024 (arXiv:2406.04093), section
2.3 and appendix A.

Shape legend: ``b`` tokens of a batch, ``n`` inputs, ``o`` outputs, ``l`` latents, ``k`` active ones,
``d`` dead ones.
"""

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn

from neuron_explainer.dictionaries.dictionary import DecoderNorm, LearnedDictionary
from neuron_explainer.dictionaries.objectives.base import (
    Loss,
    Objective,
    ObjectiveConfig,
    SparseLatents,
    StepFacts,
    register,
    squared_error,
)
from neuron_explainer.dictionaries.schedules import annealed_k
from neuron_explainer.errors import InputError
from neuron_explainer.kernels.top_k_step import decode_rows, encode_top_k
from neuron_explainer.kernels.workspace import Workspace
from neuron_explainer.models.autoencoders.nonlinearities import TopK as TopKActivation


@dataclass(frozen=True)
class AuxKConfig(ObjectiveConfig):
    """Settings of all objectives with a fixed number of active latents."""

    k: int = 32
    """Number of active latents of each token."""
    aux_k: int | None = None
    """Number of dead latents that try to explain the error of a token. If not given: half the width."""
    aux_coefficient: float = 1 / 32
    """Weight of the loss of dead latents; 0 turns AuxK off."""
    k_anneal_steps: int = 0
    """Steps in which the number of active latents falls from k_start to k."""
    k_start: int | None = None
    """Number of active latents at step 0, if it is annealed. If not given: the width of the input."""

    def __post_init__(self) -> None:
        super().__post_init__()
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

    def check_run(self, steps: int, decoder_norm: DecoderNorm, tied: bool) -> None:
        if self.k_anneal_steps > steps:
            raise InputError(
                f"k_anneal_steps = {self.k_anneal_steps} is more than the {steps} steps of the run: "
                f"training would end with more than k = {self.k} active latents."
            )


@dataclass(frozen=True)
class TopKConfig(AuxKConfig):
    """TopK (Gao et al. 2024)."""

    multi_k: int | None = None
    """A second, larger number of active latents that is trained too (4 k in the paper), so that the finished
    dictionary also works with other values of k. If not given: none."""
    multi_coefficient: float = 1 / 8
    """Weight of that second reconstruction in the loss."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.multi_k is not None and self.multi_k <= self.k:
            raise InputError(f"multi_k must be more than k = {self.k}, found {self.multi_k}.")


def check_k(config: AuxKConfig, dictionary: LearnedDictionary, largest: int) -> None:
    """Raise InputError if more latents should be active than the dictionary has."""
    there_are = dictionary.n_latents_everywhere
    if largest > there_are:
        raise InputError(
            f"{config.name}: {largest} active latents are more than the {there_are} latents of "
            "the dictionary; give more latents, or a smaller k."
        )


def k_at(config: AuxKConfig, dictionary: LearnedDictionary, step: int) -> int:
    """The number of active latents of each token at a step."""
    most = min(dictionary.n_inputs, dictionary.n_latents_everywhere)
    start = config.k_start or max(config.k, most)
    return annealed_k(step, config.k, start, config.k_anneal_steps)


def aux_k_loss(
    config: AuxKConfig, dictionary: LearnedDictionary, x: Tensor, error: Tensor, facts: StepFacts
) -> Tensor | None:
    """How badly the best dead latents explain ``error`` ``[b, o]``, as ``[]``; None if no latent is dead.

    ``error`` has no gradient, so that live latents do not learn to leave work for dead ones.
    """
    if not config.aux_coefficient or not (
        n_dead := int(dictionary.total(torch.tensor(len(facts.dead))))
    ):
        return None
    k = min(config.aux_k or max(1, dictionary.n_outputs // 2), n_dead)
    values, indices = largest(dictionary, x, k, facts.dead, facts.workspace).of(k)
    explained = decode_rows(values, indices, dictionary.rows, workspace=facts.workspace)
    explained = dictionary.total(explained)
    mean = dictionary.mean(error.mean(0), facts.n_tokens)
    deviation = dictionary.mean(squared_error(error - mean), facts.n_tokens)
    share = squared_error(error - explained) / torch.where(deviation > 0, deviation, 1.0)
    return torch.where(deviation > 0, share, 0.0)  # no error to explain: 0, not infinity


class Largest(NamedTuple):
    """The largest pre-activations of each token, rectified, and their latents: ``[b, k]`` each.

    Where each process holds some of the latents: those of the largest that belong to this process.
    """

    values: Tensor
    indices: Tensor
    rank: Tensor | None
    """``[b, k]``: rank of each value among all processes, from 0; None on one process, where the column
    index is the rank."""

    def of(self, k: int) -> tuple[Tensor, Tensor]:
        """Values and indices of the ``k`` largest only."""
        if self.rank is None:
            return self.values[:, :k], self.indices[:, :k]
        among = self.rank < k
        most = max(1, int(among.sum(1).max()))  # for any token; the columns after that are empty
        values = torch.where(among, self.values, 0.0)
        return values[:, :most], self.indices[:, :most]


def largest(
    dictionary: LearnedDictionary,
    x: Tensor,
    k: int,
    latents: Tensor | None = None,
    workspace: Workspace | None = None,
) -> Largest:
    """The ``k`` largest pre-activations of all latents, or of the given ``latents`` ``[c]``."""
    d, k_here = dictionary, min(k, dictionary.n_latents if latents is None else len(latents))
    if not k_here:
        values = x.new_full((len(x), 1), -torch.inf)  # smaller than any value of another process
        indices = torch.zeros_like(values, dtype=torch.int64)
    else:
        values, indices = encode_top_k(
            x,
            d.encoder,
            d.latent_bias,
            k_here,
            pre_bias=d.pre_bias,
            latents=latents,
            workspace=workspace,
        )
    rank = d.world.global_rank(values, k) if d.world.splits_latents else None
    return Largest(values.relu(), indices, rank)


@register("topk", TopKConfig)
class TopK(Objective[TopKConfig]):
    """Keeps the largest pre-activations of each token. No tensor ``[b, l]`` exists outside the search."""

    splits_latents = True

    def __init__(self, config: TopKConfig, dictionary: LearnedDictionary) -> None:
        super().__init__(config, dictionary)
        check_k(config, dictionary, max(config.multi_k or 0, k_at(config, dictionary, 0)))

    def loss(
        self, dictionary: LearnedDictionary, x: Tensor, target: Tensor, facts: StepFacts
    ) -> Loss:
        config = self.config
        k = k_at(config, dictionary, facts.step)
        # One search for both numbers: values come in descending order.
        every = largest(dictionary, x, max(k, config.multi_k or 0), workspace=facts.workspace)
        values, indices = every.of(k)
        recons = decode_rows(values, indices, dictionary.rows, workspace=facts.workspace)
        error = target - dictionary.complete(recons, x)
        total = reconstruction = squared_error(error) / dictionary.variance
        terms = {"reconstruction": reconstruction.detach()}
        if config.multi_k is not None:
            more = decode_rows(
                *every.of(config.multi_k), dictionary.rows, workspace=facts.workspace
            )
            more = dictionary.complete(more, x)
            multi = squared_error(target - more) / dictionary.variance
            total = total + config.multi_coefficient * multi
            terms["multi"] = multi.detach()
        aux = aux_k_loss(config, dictionary, x, error.detach(), facts)
        if aux is not None:
            total = total + config.aux_coefficient * aux
            terms["aux"] = aux.detach()
        return Loss(total, terms, error.detach(), SparseLatents(values.detach(), indices))

    def activation(self, dictionary: LearnedDictionary) -> nn.Module:
        return TopKActivation(self.config.k)
