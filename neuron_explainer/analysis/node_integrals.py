"""Integrated gradients of the table of nodes: gradients averaged on the way from a baseline to an activation.

A gradient at the activation itself says little where the model saturates, such as in a softmax that is near
0 or 1. So the gradient is taken at points between a baseline and the activation, and averaged (Sundararajan
et al. 2017). Each location moves alone and as a whole, with its biases and with what an autoencoder does not
capture (Marks et al. 2024); the rest of the model is computed anew at each point.

Shape legend: ``s`` positions, ``n`` points of a batch.
"""

import copy
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from neuron_explainer.analysis.node_parts import Ints, Pass, frozen_hooks
from neuron_explainer.models.checks import check_count
from neuron_explainer.models.hooks import TransformerHooks
from neuron_explainer.models.locations import ActivationLocation

STEPS_AT_ONCE = 16
Baseline = Callable[[ActivationLocation, Tensor], Tensor]
"""From a location and its activation ``[1, s, …]`` to where the way to it begins, in the same shape."""


def averaged_pass(run: Pass, steps: int, baseline: Baseline) -> Pass:
    """The same pass with mean gradients in the place of those at its activations.

    Args:
        steps: points at which gradients are taken, each in the middle of its step.
    """
    check_count(steps, "ig_steps")
    moved = copy.copy(run)
    moved.gradients = _MeanGradients(run, steps, baseline)
    return moved


def from_zero(place: ActivationLocation, clean: Tensor) -> Tensor:
    """The baseline 0."""
    return torch.zeros_like(clean)


def from_other(other: Pass, index_map: Ints) -> Baseline:
    """The baseline of another prompt's activations, at the positions that ``index_map`` ``[s]`` gives.

    What has no counterpart there, where the map is -1, stays as it is.
    """
    here = torch.from_numpy((index_map >= 0).nonzero()[0])
    there = torch.from_numpy(index_map)[here]

    def baseline(place: ActivationLocation, clean: Tensor) -> Tensor:
        start, values = clean.clone(), other.found[place].detach()
        if "k" in place.site.shape[2:]:
            start[0, here[:, None], here] = values[0, there[:, None], there]
        else:
            start[0, here] = values[0, there]
        return start

    return baseline


class _MeanGradients(dict[ActivationLocation, Tensor]):
    """Location -> mean gradient ``[1, s, …]``, computed when it is first asked for."""

    def __init__(self, run: Pass, steps: int, baseline: Baseline) -> None:
        super().__init__()
        self.run, self.steps, self.baseline = run, steps, baseline

    def __missing__(self, place: ActivationLocation) -> Tensor:
        clean = self.run.found[place].detach()
        start = self.baseline(place, clean)
        total = torch.zeros_like(clean)
        middles = (torch.arange(self.steps, dtype=torch.float64) + 0.5) / self.steps
        for some in torch.split(middles, STEPS_AT_ONCE):
            weight = some.to(clean.device, clean.dtype).view(-1, *[1] * (clean.dim() - 1))
            total += self._gradient(place, start + weight * (clean - start))
        self[place] = total / self.steps
        return self[place]

    def _gradient(self, place: ActivationLocation, x: Tensor) -> Tensor:
        """``[1, s, …]``: the sum of the goal's gradients at the points ``x`` ``[n, s, …]``."""
        run, leaf = self.run, x.requires_grad_()
        hooks = TransformerHooks() if run.hooks is None else run.hooks
        hooks = hooks + TransformerHooks().append_at(place, partial(_replaced, by=leaf))
        hooks = hooks + frozen_hooks(run.model, run.freeze, run.goal.norm)
        with torch.enable_grad():
            found = run.model.capture(
                run.tokens.expand(len(x), -1), run.goal.places, hooks=hooks + run.goal.hooks
            )
            (gradient,) = torch.autograd.grad(run.goal.value(found), leaf, allow_unused=True)
        return torch.zeros_like(x[:1]) if gradient is None else gradient.sum(dim=0, keepdim=True)


def _replaced(x: Tensor, by: Tensor) -> Tensor:
    return by
