"""Tracing: what makes a node inside the model what it is.

    trace(model, prompt, Node("9/attn.qk_probs", "pair", 6, 14, attended=3), through="q")

The goal is a node's value instead of a target of the logits: a neuron's pre-activation, a latent's, a
head's attention score, or what a head writes along the gradient of a later goal. The table is that of
:func:`~neuron_explainer.analysis.effects.nodes`, and holds what comes before the node. The scale of the norm
in front of the node is frozen by default, so that pre-activations and scores are linear in the stream and
direct effects sum to them.
"""

from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor

from neuron_explainer.analysis.effects import (
    OF_ONE_PASS,
    Effects,
    NodeTable,
    check_measures,
    one_prompt,
)
from neuron_explainer.analysis.node_parts import (
    MLP_PLACES,
    Freeze,
    Goal,
    Node,
    Pass,
    check_list,
    final_norm,
)
from neuron_explainer.analysis.targets import Metric, with_gradient
from neuron_explainer.errors import InputError, shown
from neuron_explainer.models.autoencoder_context import AutoencoderContext
from neuron_explainer.models.hooks import TransformerHooks
from neuron_explainer.models.language_model import Activations, LanguageModel
from neuron_explainer.models.locations import ActivationLocation
from neuron_explainer.models.weight_names import Dimension, WeightLocationType

__all__ = ["goal_of", "trace"]

Through = Literal["q", "k", "qk", "v"]


def trace(
    model: LanguageModel,
    prompt: str | Sequence[int],
    node: Node,
    measures: Sequence[str] = ("write_norm", "direct", "act_grad"),
    top_k: int = 10,
    *,
    through: Through | None = None,
    downstream: Metric | None = None,
    attention: Literal["heads", "pairs"] = "heads",
    autoencoders: Sequence[AutoencoderContext] = (),
    freeze: Sequence[Freeze] = ("final_norm",),
    bos: bool | int = False,
    positions: Sequence[int] | None = None,
    hooks: TransformerHooks | None = None,
) -> NodeTable:
    """The nodes before a node that contribute most to its value.

    Args:
        node: a neuron, a latent (of one of ``autoencoders``), a head or a pair.
        through: for heads and pairs. "q", "k", "qk": the goal is the pair's score before the softmax,
            changed through its query with the key fixed, through its key, or through both. "v": the goal
            is what the head writes (at a pair: from the attended token), along the gradient of
            ``downstream``, with the pattern fixed.
        downstream: the target that gives the direction for ``through="v"``.
        freeze: "final_norm" stands for the norm in front of the node.
        positions: of which tokens the nodes are; None: of all.
        hooks: interventions under which everything is measured.
    """
    check_list(measures, "measures")
    if unknown := [m for m in measures if m not in OF_ONE_PASS]:
        raise InputError(f"trace measures write_norm, direct and act_grad; found {unknown[0]!r}.")
    check_measures(measures, top_k, None)
    tokens = one_prompt(model, prompt, bos)[0].tolist()
    goal = goal_of(
        model,
        tokens,
        node,
        through=through,
        downstream=downstream,
        autoencoders=autoencoders,
        hooks=hooks,
    )
    settings: dict[str, Any] = {"attention": attention, "autoencoders": autoencoders}
    settings |= {"freeze": freeze, "positions": positions, "hooks": hooks}
    return Effects(model, tokens, goal, **settings).table(measures, top_k)


def goal_of(
    model: LanguageModel,
    prompt: Sequence[int],
    node: Node,
    *,
    through: Through | None = None,
    downstream: Metric | None = None,
    autoencoders: Sequence[AutoencoderContext] = (),
    hooks: TransformerHooks | None = None,
) -> Goal:
    """A node's value as a goal, which :class:`~neuron_explainer.analysis.effects.Effects` takes.

    For the arguments see :func:`trace`.
    """
    if not isinstance(node, Node):
        raise InputError(f"expected a Node, found {shown(node)}.")
    tokens = one_prompt(model, prompt, False)
    for position in (node.position, node.attended):
        if position is not None and not 0 <= position < tokens.shape[1]:
            raise InputError(
                f"{node}: positions are 0 to {tokens.shape[1] - 1} in this prompt, found {position}."
            )
    _check_unit(model, node)
    if node.kind in ("head", "pair"):
        return _goal_of_head(model, tokens, node, through, downstream, hooks)
    if through is not None:
        raise InputError(f"through={through!r} is for heads and pairs; {node} has one input.")
    if node.kind == "neuron":
        return goal_of_neuron(node)
    if node.kind == "latent":
        return goal_of_latent(node, autoencoders)
    raise InputError(f"{node} cannot be traced; give a neuron, latent, head or pair.")


def _check_unit(model: LanguageModel, node: Node) -> None:
    """Refuse neurons and heads that the model does not have, and pairs of a token and a later one."""
    if node.attended is not None and node.attended > node.position:
        raise InputError(f"{node}: a token attends to itself and to earlier ones.")
    if node.kind not in ("neuron", "head", "pair"):
        return
    group = "mlp" if node.kind == "neuron" else "attn"
    if not ActivationLocation.parse(node.location).path.startswith(f"{group}."):
        raise InputError(f"{node}: a {node.kind} is at a location of {group}.")
    width = model.sizes[Dimension.MLP_ACTS if group == "mlp" else Dimension.ATTN_HEADS]
    if not 0 <= node.unit < width:
        raise InputError(f"{node}: the numbers are 0 to {width - 1}, found {node.unit}.")


def _layer(node: Node) -> int:
    layer = ActivationLocation.parse(node.location).layer
    if layer is None:
        raise InputError(f"{node}: the location must name a layer.")
    return layer


def _before_attention(layer: int) -> dict[str, Any]:
    """The stream that a layer's attention reads, and the norm that reads it."""
    stream = f"{layer - 1}/resid.torso.post_mlp" if layer else "resid.post_emb"
    return {"stream": stream, "norm": f"{layer}/resid.torso.ln_attn"}


def _before_mlp(layer: int) -> dict[str, Any]:
    return {"stream": f"{layer}/resid.torso.post_attn", "norm": f"{layer}/resid.torso.ln_mlp"}


def goal_of_neuron(node: Node) -> Goal:
    """A neuron's pre-activation."""
    layer = _layer(node)
    place = f"{layer}/mlp.pre_act"

    def value(found: Activations) -> Tensor:
        return found[place][0, node.position, node.unit]

    name = f"pre-activation of {node}"
    before = _before_mlp(layer)
    return Goal(name, value, (place,), **before, position=node.position, constant_at=place)


def goal_of_latent(node: Node, autoencoders: Sequence[AutoencoderContext]) -> Goal:
    """A latent's pre-activation."""
    place = ActivationLocation.parse(node.location)
    context = next((c for c in autoencoders if c.location == place.at(None)), None)
    if context is None:
        raise InputError(f"{node}: give its autoencoders, autoencoders=[context].")
    layer = _layer(node)
    autoencoder = context.get_autoencoder(layer)
    if not 0 <= node.unit < autoencoder.n_latents:
        raise InputError(
            f"{node}: the numbers are 0 to {autoencoder.n_latents - 1}, found {node.unit}."
        )

    def value(found: Activations) -> Tensor:
        x = found[place][0, node.position].flatten()
        return autoencoder.encode_pre_act(x[None].to(autoencoder.dtype))[0, node.unit]

    before = _before_mlp(layer) if place.path in MLP_PLACES else _before_attention(layer)
    name, at = f"pre-activation of {node}", str(place)
    return Goal(name, value, (at,), **before, position=node.position, constant_at=at)


def _goal_of_head(
    model: LanguageModel,
    tokens: Tensor,
    node: Node,
    through: Through | None,
    downstream: Metric | None,
    interventions: TransformerHooks | None,
) -> Goal:
    layer = _layer(node)
    if through == "v":
        return _goal_of_write(model, tokens, node, downstream, interventions)
    if through not in ("q", "k", "qk"):
        raise InputError(f"{node}: through= must be 'q', 'k', 'qk' or 'v', found {through!r}.")
    if node.attended is None:
        raise InputError(f"{node}: a score is of a pair; give the attended position.")
    place = f"{layer}/attn.qk_logits"

    def value(found: Activations) -> Tensor:
        return found[place][0, node.position, node.attended, node.unit]

    hooks = TransformerHooks()
    for name in {"q": "k", "k": "q"}.get(through, ""):
        hooks.append_at(f"{layer}/attn.{name}", _detach)
    title, before = f"score of {node}, through {through}", _before_attention(layer)
    at: dict[str, Any] = {"position": node.position, "constant_at": place}
    return Goal(title, value, (place,), **before, hooks=hooks, **at)


def _goal_of_write(
    model: LanguageModel,
    tokens: Tensor,
    node: Node,
    downstream: Metric | None,
    interventions: TransformerHooks | None,
) -> Goal:
    if downstream is None:
        raise InputError(
            f"{node}: through='v' needs a target downstream, which gives the direction."
        )
    layer = _layer(node)
    delta, pattern, values = (
        f"{layer}/{p}" for p in ("resid.torso.delta_attn", "attn.qk_probs", "attn.v")
    )
    sees_logits = interventions is not None and not interventions.logits.is_empty()
    target = with_gradient(downstream, "what is traced")
    goal = Goal.of_logits(model, target, sees_logits)
    frozen = final_norm(model)
    later = Pass(model, tokens, goal, [delta], frozen, interventions)
    gradient = later.gradient(delta)[node.position]
    weight = model.weight(WeightLocationType.ATTN_TO_RESIDUAL, layer).detach()[node.unit]
    direction = weight.double() @ gradient  # [d_head]

    def value(found: Activations) -> Tensor:
        some = slice(None) if node.attended is None else slice(node.attended, node.attended + 1)
        weights = found[pattern][0, node.position, some, node.unit].detach()
        written = found[values][0, some, node.unit].double() @ direction
        return (weights.double() * written).sum()

    hooks = TransformerHooks().append_at(pattern, _detach)
    title = f"write of {node} along the gradient of {later.goal.name}"
    before = _before_attention(layer)
    at: dict[str, Any] = {"position": node.position, "constant_at": values}
    return Goal(title, value, (pattern, values), **before, hooks=hooks, **at)


def _detach(x: torch.Tensor) -> torch.Tensor:
    return x.detach()
