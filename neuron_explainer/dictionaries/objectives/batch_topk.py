"""BatchTopK: the k times batch size largest pre-activations of a whole batch; and its nested form.

    BatchTopK    loss = ‖e‖² / σ²  +  c_aux AuxK
    Matryoshka   loss = mean over prefixes of ‖e_prefix‖² / σ²  +  c_aux AuxK

σ² is the variance of targets; AuxK that of TopK. In training a token has as many active latents as it
needs; the finished autoencoder uses one threshold instead, so that a token's latents do not depend
on other tokens. A prefix is the reconstruction from the first latents only.

- Bussmann, Leask, Nanda 2024, "BatchTopK sparse autoencoders" (arXiv:2412.06410)
- Bussmann et al. 2025, "Learning multi-level features with Matryoshka SAEs" (arXiv:2503.17547)

Shape legend: ``b`` tokens of a batch, ``n`` inputs, ``o`` outputs, ``l`` latents, ``m`` active pairs
(token, latent) of a batch.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from neuron_explainer.dictionaries.dictionary import LearnedDictionary
from neuron_explainer.dictionaries.distributed import SINGLE_PROCESS, World
from neuron_explainer.dictionaries.objectives.base import (
    Loss,
    Objective,
    SparseLatents,
    StepFacts,
    register,
    squared_error,
)
from neuron_explainer.dictionaries.objectives.topk import AuxKConfig, aux_k_loss, check_k, k_at
from neuron_explainer.errors import InputError
from neuron_explainer.kernels.top_k import largest_entries
from neuron_explainer.models.autoencoders.nonlinearities import BatchTopK as BatchTopKActivation


@dataclass(frozen=True)
class BatchTopKConfig(AuxKConfig):
    """BatchTopK (Bussmann et al. 2024)."""


@dataclass(frozen=True)
class MatryoshkaConfig(AuxKConfig):
    """Matryoshka BatchTopK (Bussmann et al. 2025)."""

    group_fractions: tuple[float, ...] = (1 / 16, 1 / 16, 1 / 8, 1 / 4, 1 / 2)
    """The share of the latents that each prefix adds to the previous one; the shares add up to 1."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.group_fractions or min(self.group_fractions) <= 0:
            raise InputError(f"group_fractions must be above 0, found {self.group_fractions}.")
        if abs(sum(self.group_fractions) - 1) > 1e-6:
            raise InputError(
                f"group_fractions must add up to 1, found {self.group_fractions}, which add up to "
                f"{sum(self.group_fractions):g}."
            )


def batch_top_k(
    pre_act: Tensor, k: int, world: World = SINGLE_PROCESS, n_everywhere: int | None = None
) -> SparseLatents:
    """The ``b · k`` largest of all pre-activations ``[b, l]``, rectified.

    Where processes share a batch of ``n_everywhere`` tokens, or each has some of the latents: those of the
    largest that belong to this process.
    """
    n_tokens, n_latents = pre_act.shape
    count = k * (n_everywhere if world.splits_batch and n_everywhere else n_tokens)
    every = pre_act.flatten()
    flat = largest_entries(every, min(count, len(every)))
    values = every.gather(0, flat)
    if world.size > 1:
        chosen = world.among_largest(values, count)
        values, flat = values[chosen], flat[chosen]
    tokens = flat.div(n_latents, rounding_mode="floor")
    starts = torch.searchsorted(tokens, torch.arange(n_tokens, device=flat.device))
    return SparseLatents(values.relu(), flat % n_latents, starts)


C = TypeVar("C", bound=AuxKConfig)


class _BatchTopK(Objective[C]):
    """What both objectives share; they differ in which reconstructions they train."""

    splits_latents = True

    threshold: Tensor
    """``[]``: mean over recent batches of the smallest active value."""
    seen: Tensor
    """``[]``: number of batches so far."""

    def __init__(self, config: C, dictionary: LearnedDictionary) -> None:
        super().__init__(config, dictionary)
        check_k(config, dictionary, k_at(config, dictionary, 0))
        dtype = dictionary.encoder.dtype
        self.register_buffer("threshold", torch.zeros((), dtype=dtype))
        self.register_buffer("seen", torch.zeros((), dtype=dtype))

    def loss(
        self, dictionary: LearnedDictionary, x: Tensor, target: Tensor, facts: StepFacts
    ) -> Loss:
        k = k_at(self.config, dictionary, facts.step)
        active = batch_top_k(dictionary.pre_act(x), k, dictionary.world, facts.n_tokens)
        every = self.reconstructions(dictionary, active)
        errors = [target - dictionary.complete(recons, x) for recons in every]
        losses = [squared_error(error) / dictionary.variance for error in errors]
        total = torch.stack(losses).mean()
        terms = {"reconstruction": total.detach()}
        if len(losses) > 1:
            terms |= {f"prefix_{i}": loss.detach() for i, loss in enumerate(losses)}
        error = errors[-1].detach()
        aux = aux_k_loss(self.config, dictionary, x, error, facts)
        if aux is not None:
            total = total + self.config.aux_coefficient * aux
            terms["aux"] = aux.detach()
        return Loss(total, terms, error, active._replace(values=active.values.detach()))

    def reconstructions(
        self, dictionary: LearnedDictionary, active: SparseLatents
    ) -> Iterator[Tensor]:
        """The trained reconstructions, ``[b, o]`` each, without bias; the last one is from all latents."""
        yield active.decode(dictionary.rows)

    def after_step(self, dictionary: LearnedDictionary, loss: Loss, facts: StepFacts) -> None:
        """Update the threshold: a running mean over the last tenth of the steps, at most 1000.

        With a window of fixed length, short runs would end with a threshold from their first steps.
        """
        assert isinstance(loss.latents, SparseLatents)
        values = loss.latents.values
        positive = F.pad(torch.where(values > 0, values, torch.inf), (0, 1), value=torch.inf)
        smallest = dictionary.world.all_reduce_min(positive.min())
        self.seen += 1
        weight = 1 / (self.seen / 10).clamp(1, 1000)
        moved = torch.lerp(self.threshold, smallest, weight)
        self.threshold.copy_(torch.where(smallest.isfinite(), moved, self.threshold))

    def activation(self, dictionary: LearnedDictionary) -> nn.Module:
        return BatchTopKActivation(self.threshold * dictionary.target_scale, self.config.k)


@register("batch_topk", BatchTopKConfig)
class BatchTopK(_BatchTopK[BatchTopKConfig]):
    """One reconstruction, from all active latents."""


@register("matryoshka", MatryoshkaConfig)
class Matryoshka(_BatchTopK[MatryoshkaConfig]):
    """A reconstruction from each prefix of the latents."""

    def __init__(self, config: MatryoshkaConfig, dictionary: LearnedDictionary) -> None:
        super().__init__(config, dictionary)
        total, ends = dictionary.n_latents_everywhere, list[int]()
        for fraction in config.group_fractions:
            ends.append(round((ends[-1] if ends else 0) + fraction * total))
        ends[-1] = total
        self.sizes = tuple(b - a for a, b in zip([0, *ends], ends, strict=False))
        if min(self.sizes) < 1:
            raise InputError(f"matryoshka: {total} latents are too few for groups {self.sizes}.")

    def reconstructions(
        self, dictionary: LearnedDictionary, active: SparseLatents
    ) -> Iterator[Tensor]:
        # Each pair is decoded once: a group adds to the reconstruction from the groups before it.
        ends = torch.tensor(self.sizes, device=active.indices.device).cumsum(0)
        group = torch.searchsorted(ends, active.indices + dictionary.first_latent, right=True)
        recons: Any = 0
        for index in range(len(self.sizes)):
            values = torch.where(group == index, active.values, 0.0)
            recons = recons + active._replace(values=values).decode(dictionary.rows)
            yield recons

    def group_sizes(self) -> tuple[int, ...]:
        return self.sizes
