"""Estimates of what a change of an activation does to a target, without running it: integrated gradients
and attribution patching.

:func:`integrated_gradients` (Sundararajan et al. 2017) goes from a baseline to the activation in ``n``
steps: the attributions of a location sum to the target's change, up to an error that shrinks with ``n``.

:func:`attribution_patching` is the first-order estimate of patching each head's query, key, value and
output from another prompt (Nanda 2023), with the two repairs of AtP* (Kramár et al. 2024):

- *QK fix*: where a patched query or key moves a saturated softmax, a gradient says nothing. So the
  softmax is computed anew with the patched query (or key), and the change of the pattern is multiplied
  with the gradient at the pattern (their section 3.1.1).
- *GradDrop*: where a direct effect and one through a later layer cancel, the gradient is near 0. So the
  gradient is taken once for each layer, without what flows back through that layer's attention and MLP,
  and the mean size over layers is the estimate (section 3.1.2). It has no sign.

Shape legend: ``s`` positions, ``q`` query, ``k`` key, ``h`` heads, ``c`` width of a head, ``n`` steps.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from neuron_explainer.analysis.effects import one_prompt
from neuron_explainer.analysis.targets import Metric, Reading, Target, token_texts, with_gradient
from neuron_explainer.errors import InputError, shown
from neuron_explainer.models.checks import check_count
from neuron_explainer.models.hooks import TransformerHooks
from neuron_explainer.models.language_model import Activations, LanguageModel
from neuron_explainer.models.locations import ActivationLocation, LocationLike

__all__ = ["HeadScores", "Integrated", "attribution_patching", "integrated_gradients"]

Floats = npt.NDArray[np.float64]
STEPS_AT_ONCE = 16
Baseline = Literal["zero", "mean"] | Activations
Component = Literal["q", "k", "v", "v_out"]


# --- integrated gradients ---


@dataclass(frozen=True, repr=False)
class Integrated:
    """Integrated gradients of one location on one prompt."""

    location: str
    values: Floats
    """``[s, …]``: the attribution of each unit at each position, in the location's layout."""
    difference: float
    """The target on the prompt minus the target with the whole location at the baseline."""
    target: str
    tokens: list[str]

    @property
    def error(self) -> float:
        """The sum of the attributions minus ``difference``: it shrinks as the number of steps grows."""
        return float(self.values.sum()) - self.difference

    def __repr__(self) -> str:
        return (
            f"Integrated({self.location}, {self.target}: sum {self.values.sum():.4g}, change "
            f"{self.difference:.4g}, error {self.error:.1e})"
        )


def integrated_gradients(
    model: LanguageModel,
    prompt: str | Sequence[int],
    target: Metric,
    location: LocationLike,
    *,
    baseline: Baseline = "zero",
    steps: int = 16,
    bos: bool | int = False,
) -> Integrated:
    """The attribution of each unit: ``(a - b)`` times the mean gradient between the baseline b and a.

    At the embedding, "zero" converges slowly: a layer norm jumps where its input comes near 0, and steps
    hardly see the jump. Look at :attr:`Integrated.error`, and use another baseline there.

    Args:
        location: in one layer.
        baseline: "zero"; "mean": the mean over the prompt's positions; or a capture of this location on
            a prompt of as many tokens.
        steps: points at which gradients are taken, each in the middle of its step.
    """
    place = ActivationLocation.parse(location)
    if place.site.per_layer and place.layer is None:
        raise InputError(f"{place} is in every layer; name one, such as '0/{place}'.")
    check_count(steps, "steps")
    target = with_gradient(target, "integrated gradients")
    tokens = one_prompt(model, prompt, bos)
    with torch.no_grad():
        clean = model.capture(tokens, place)[place]
    start = _baseline(clean, baseline, place)
    if not bool((clean - start).isfinite().all()):
        raise InputError(
            f"{place} or its baseline holds infinite values or NaN, between which there are no steps. For "
            "attention scores, use attn.qk_probs."
        )
    with torch.no_grad():
        ends = _value(model, tokens, target, place, torch.cat([clean, start])).tolist()
    if not math.isfinite(ends[0] - ends[1]):
        raise InputError(
            f"{target.name} is {ends[0]:g} on the prompt and {ends[1]:g} with {place} at the baseline; both "
            "must be finite. Where a model divides by what is there, take the baseline 'mean' or a capture."
        )
    total = torch.zeros_like(clean[0], dtype=torch.float64)
    middles = (torch.arange(steps, dtype=torch.float64) + 0.5) / steps
    for some in torch.split(middles, STEPS_AT_ONCE):
        weight = some.to(clean.device, clean.dtype).view(-1, *[1] * (clean.dim() - 1))
        x = (start + weight * (clean - start)).detach().requires_grad_()
        _, gradient = _value_and_gradient(model, tokens, target, place, x)
        total += gradient.double().sum(dim=0)
    values = (clean - start)[0].double() * total / steps
    difference = ends[0] - ends[1]
    found: Floats = values.cpu().numpy()
    return Integrated(
        str(place), found, difference, target.name, token_texts(model, tokens[0].tolist())
    )


def _baseline(clean: Tensor, baseline: Baseline, place: ActivationLocation) -> Tensor:
    if isinstance(baseline, Activations):
        if place not in baseline or baseline[place].shape != clean.shape:
            found = list(baseline[place].shape) if place in baseline else "nothing"
            raise InputError(
                f"the baseline must hold {place} as {list(clean.shape)}, found {found}: a prompt of as "
                "many tokens."
            )
        return baseline[place].detach()
    if baseline == "mean":
        return clean.mean(dim=1, keepdim=True).expand_as(clean)
    if baseline == "zero":
        return torch.zeros_like(clean)
    raise InputError(f"baseline must be 'zero', 'mean' or a capture, found {shown(baseline)}.")


def _value(
    model: LanguageModel, tokens: Tensor, target: Target, place: ActivationLocation, x: Tensor
) -> Tensor:
    """``[r]``: the target with the location set to each row of ``x`` ``[r, s, …]``."""
    rows = tokens.expand(len(x), -1)
    hooks = TransformerHooks().append_at(place, lambda _: x)
    logits = model(rows, hooks=hooks)[0]
    logits = logits if target.every_position else logits[:, -1]
    prompt = torch.zeros(len(x), dtype=torch.long, device=tokens.device)
    pad = torch.zeros_like(rows, dtype=torch.bool)
    return target(Reading(logits, prompt, logits.detach(), rows, pad)).double()


def _value_and_gradient(
    model: LanguageModel, tokens: Tensor, target: Target, place: ActivationLocation, x: Tensor
) -> tuple[Tensor, Tensor]:
    with torch.enable_grad():
        value = _value(model, tokens, target, place, x)
        (gradient,) = torch.autograd.grad(value.sum(), x)
    return value.detach(), gradient


# --- attribution patching ---


@dataclass(frozen=True, repr=False)
class HeadScores:
    """Estimated effects of patching each head's parts from another prompt."""

    scores: dict[Component, Floats]
    """Part -> ``[layer, position, head]``: the target's change, or with GradDrop its mean size."""
    signed: bool
    """Whether the scores have a sign; with GradDrop they do not."""
    target: str
    tokens: list[str]

    def top(self, k: int = 10) -> list[tuple[str, float]]:
        """The ``k`` largest of all parts, either sign, by name: ``"9/attn.q head 6 at 14"``."""
        found = [
            (f"{layer}/attn.{part} head {head} at {position}", float(values[layer, position, head]))
            for part, values in self.scores.items()
            for layer, position, head in np.ndindex(values.shape)
        ]
        return sorted(found, key=lambda entry: -abs(entry[1]))[:k]

    def __repr__(self) -> str:
        lines = [f"HeadScores({self.target}), the largest:"]
        return "\n".join([*lines, *(f"  {name}: {value:+.4f}" for name, value in self.top())])


_SITES = ("attn.q", "attn.k", "attn.v", "attn.v_out", "attn.qk_logits", "attn.qk_probs")


def attribution_patching(
    model: LanguageModel,
    clean: str | Sequence[int],
    corrupt: str | Sequence[int],
    target: Metric,
    *,
    qk_fix: bool = True,
    grad_drop: bool = False,
    bos: bool | int = False,
) -> HeadScores:
    """The estimated change of the target when one head's query, key, value or output, at one position of
    the clean run, becomes that of the corrupt run.

    Args:
        clean: the prompt whose run is patched.
        corrupt: a prompt of as many tokens, from which values come.
        qk_fix: compute the softmax anew for queries and keys, instead of their gradients.
        grad_drop: the mean over layers of the sizes without each layer's way back.
    """
    target = with_gradient(target, "attribution patching")
    here, there = one_prompt(model, clean, bos), one_prompt(model, corrupt, bos)
    if here.shape != there.shape:
        raise InputError(
            f"the prompts have {here.shape[1]} and {there.shape[1]} tokens; attribution patching compares "
            "position by position: give prompts of one length."
        )
    for path in _SITES:
        model.require(path)
    with torch.no_grad():
        other = model.capture(there, list(_SITES[:4]))
    drops: list[int | None] = list(range(model.n_layers)) if grad_drop else [None]
    totals: dict[Component, Floats] = {}
    for dropped in drops:
        scores = _scores(model, here, other, target, qk_fix, dropped)
        for part, values in scores.items():
            values = np.abs(values) / max(1, model.n_layers - 1) if grad_drop else values
            totals[part] = totals.get(part, 0.0) + values
    tokens = token_texts(model, here[0].tolist())
    return HeadScores(totals, not grad_drop, target.name, tokens)


def _scores(
    model: LanguageModel,
    tokens: Tensor,
    other: Activations,
    target: Target,
    qk_fix: bool,
    dropped: int | None,
) -> dict[Component, Floats]:
    hooks = TransformerHooks().append_at("resid.post_emb", lambda x: x.detach().requires_grad_())
    if dropped is not None:
        for path in ("resid.torso.delta_attn", "resid.torso.delta_mlp"):
            hooks.append_at(f"{dropped}/{path}", lambda x: x.detach())
    with torch.enable_grad():
        found = model.capture(tokens, [*_SITES, "logits"], hooks=hooks)
        logits = found["logits"] if target.every_position else found["logits"][:, -1]
        zero = torch.zeros(1, dtype=torch.long, device=tokens.device)
        pad = torch.zeros_like(tokens, dtype=torch.bool)
        value = target.unchanged(Reading(logits, zero, logits.detach(), tokens, pad))[0]
        places = [place for place in found if place.path != "logits"]
        gradients = torch.autograd.grad(value, [found[p] for p in places], allow_unused=True)
    run = _Run(found, dict(zip(places, gradients, strict=True)), other)
    estimates: dict[Component, Callable[[int], Tensor]] = {
        "q": run.query_by_softmax if qk_fix else lambda layer: run.first_order("q", layer),
        "k": run.key_by_softmax if qk_fix else lambda layer: run.first_order("k", layer),
        "v": lambda layer: run.first_order("v", layer),
        "v_out": lambda layer: run.first_order("v_out", layer),
    }
    layers = range(model.n_layers)
    return {
        part: torch.stack([estimate(layer) for layer in layers]).cpu().numpy()
        for part, estimate in estimates.items()
    }


class _Run:
    """One clean run with gradients, and the other prompt's values."""

    def __init__(
        self, found: Activations, gradients: dict[ActivationLocation, Any], other: Activations
    ) -> None:
        self.found, self.gradients, self.other = found, gradients, other

    def _at(self, path: str, layer: int) -> tuple[Tensor, Tensor]:
        """Value and gradient ``[s, …]`` float64."""
        place = ActivationLocation(path, layer)
        value, gradient = self.found[place][0].detach().double(), self.gradients[place]
        return value, torch.zeros_like(value) if gradient is None else gradient[0].double()

    def _other(self, path: str, layer: int) -> Tensor:
        return self.other[ActivationLocation(path, layer)][0].double()

    def first_order(self, part: str, layer: int) -> Tensor:
        """``[s, h]``: the change of a part times its gradient."""
        value, gradient = self._at(f"attn.{part}", layer)
        return ((self._other(f"attn.{part}", layer) - value) * gradient).sum(dim=-1)

    def query_by_softmax(self, layer: int) -> Tensor:
        """``[q, h]``: the pattern with each query patched, times the gradient at the pattern."""
        logits, _ = self._at("attn.qk_logits", layer)
        pattern, gradient = self._at("attn.qk_probs", layer)
        key, _ = self._at("attn.k", layer)
        patched = torch.einsum("qhc,khc->qkh", self._other("attn.q", layer), key)
        patched = patched.masked_fill(logits == -torch.inf, -torch.inf).softmax(dim=1)
        return ((patched - pattern) * gradient).sum(dim=1)

    def key_by_softmax(self, layer: int) -> Tensor:
        """``[k, h]``: the same with each key patched, summed over the queries that see it.

        One changed logit scales the other probabilities of its row by ``(1 - p') / (1 - p)``. Where
        float32 rounds a probability to 0 or 1 the logits still tell, so the pattern is made anew from
        them in float64, and ``1 - p`` is the sum of the others.
        """
        logits, _ = self._at("attn.qk_logits", layer)
        _, gradient = self._at("attn.qk_probs", layer)
        query, _ = self._at("attn.q", layer)
        new = torch.einsum("qhc,khc->qkh", query, self._other("attn.k", layer))
        change = torch.where(logits != -torch.inf, new - logits, 0.0)
        logs = logits.log_softmax(dim=1)
        pattern = logs.exp()
        others, weighted = _all_but_each(pattern), _all_but_each(pattern * gradient)
        # Of row q: p'_k = p_k e / (1 - p_k + p_k e), with e = exp(change of the logit).
        odds = logs + change - others.log()
        shrink = torch.where(others > 0, (-odds).sigmoid() / others, 1.0)
        effect = (odds.sigmoid() - pattern) * gradient + (shrink - 1) * weighted
        return effect.sum(dim=0)


def _all_but_each(x: Tensor) -> Tensor:
    """``[q, k, h]``: the sum over the other keys, without a difference of nearly equal numbers."""
    before = x.cumsum(dim=1).roll(1, dims=1)
    after = x.flip(1).cumsum(dim=1).roll(1, dims=1).flip(1)
    before[:, 0] = 0
    after[:, -1] = 0
    return before + after
