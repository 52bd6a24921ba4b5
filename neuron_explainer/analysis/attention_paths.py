"""What attention carries to a latent: from which tokens, and through which heads.

    pairs = token_pairs(model, prompt, attention_autoencoders, layer=5, latent=812)
    print(pairs)                     # which head brought what, from which token

:func:`token_pairs` splits the pre-activation of a latent of an attention autoencoder over attended tokens and
heads (source attribution; Kissane et al. 2024). :func:`head_loadings` splits what one unit gives to a later
latent or neuron, perhaps at another position, over the heads that carry it.

Shape legend: ``q`` positions, ``k`` attended positions, ``h`` heads, ``d`` model width, ``n`` inputs of an
autoencoder, ``l`` layers between.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from neuron_explainer.analysis.edges import own_transformer
from neuron_explainer.analysis.effects import one_prompt
from neuron_explainer.analysis.node_parts import Floats, Goal, Node, Pass, flat, into_stream
from neuron_explainer.analysis.targets import token_texts
from neuron_explainer.analysis.trace import goal_of_latent, goal_of_neuron
from neuron_explainer.errors import InputError, optional_module
from neuron_explainer.models.autoencoder import Autoencoder
from neuron_explainer.models.autoencoder_context import AutoencoderContext
from neuron_explainer.models.autoencoders.pruned import PrunedAutoencoder
from neuron_explainer.models.hooks import TransformerHooks
from neuron_explainer.models.language_model import Activations, LanguageModel
from neuron_explainer.models.locations import ActivationLocation
from neuron_explainer.models.transformer import Norm, Transformer
from neuron_explainer.models.weight_names import WeightLocationType
from neuron_explainer.tables import escaped, text_table

__all__ = ["HeadLoadings", "TokenPairs", "head_loadings", "token_pairs", "token_write"]


# --- of a token alone ---


@torch.no_grad()
def token_write(model: LanguageModel, layer: int, head: int, token: int) -> Tensor:
    """``[d]``: what a head writes when it attends to a token of which there is only the embedding."""
    stream = model.weight(WeightLocationType.EMBEDDING, None)[token]
    normed = model.reader(ActivationLocation("resid.torso.post_ln_attn", layer))(stream[None])[0]
    value = normed @ model.weight(WeightLocationType.ATTN_TO_VALUE, layer)[head]
    written: Tensor = value @ model.weight(WeightLocationType.ATTN_TO_RESIDUAL, layer)[head]
    return written


# --- from which tokens ---


@dataclass(frozen=True, repr=False)
class TokenPairs:
    """A latent's pre-activation at each position, split over attended positions and heads."""

    values: Floats
    """``[q, k, h]``: what head ``h`` brings to position ``q`` from position ``k``. They sum over ``k`` and
    ``h`` to ``pre_activation - bias``."""
    pre_activation: Floats
    """``[q]``"""
    bias: Floats
    """``[q]``: what is there without any token: biases of the autoencoder and of attention's output. It
    differs from position to position only if inputs are normalised."""
    tokens: list[str]
    """The prompt's tokens as text."""
    location: str
    latent: int

    @property
    def by_pair(self) -> Floats:
        """``[q, k]``: summed over heads."""
        found: Floats = self.values.sum(axis=2)
        return found

    @property
    def by_head(self) -> Floats:
        """``[q, h]``: summed over attended positions."""
        found: Floats = self.values.sum(axis=1)
        return found

    def top(self, k: int = 10, position: int | None = None) -> list[tuple[Node, float]]:
        """The ``k`` pairs that bring most, of either sign: at one position or anywhere."""
        values = self.values if position is None else self.values[position, None]
        order = np.argsort(-np.abs(values), axis=None, kind="stable")[:k]
        layer = ActivationLocation.parse(self.location).layer
        found = []
        for place in order:
            q, attended, head = (int(i) for i in np.unravel_index(place, values.shape))
            at = q if position is None else position
            node = Node(f"{layer}/attn.qk_probs", "pair", head, at, attended)
            found.append((node, float(values[q, attended, head])))
        return found

    def to_dataframe(self) -> Any:
        """One row a pair and head (needs pandas)."""
        pandas = optional_module("pandas", "a data frame")
        q, k, h = np.indices(self.values.shape).reshape(3, -1)
        seen = k <= q
        columns = {"position": q[seen], "attended": k[seen], "head": h[seen]}
        return pandas.DataFrame({**columns, "value": self.values.reshape(-1)[seen]})

    def __repr__(self) -> str:
        best = int(self.pre_activation.argmax())
        head = (
            f"{self.location} latent {self.latent}: largest pre-activation "
            f"{self.pre_activation[best]:.4g} at position {best}, of it bias {self.bias[best]:.4g}"
        )
        rows = [
            [
                escaped(repr(self.tokens[node.attended or 0])),
                str(node.attended),
                str(node.unit),
                f"{v:+.4f}",
            ]
            for node, v in self.top(10, best)
        ]
        return "\n".join([head, text_table(["from", "position", "head", "value"], rows, rule=True)])


@torch.no_grad()
def token_pairs(
    model: LanguageModel,
    prompt: str | Sequence[int],
    autoencoders: AutoencoderContext,
    layer: int,
    latent: int,
    *,
    bos: bool | int = False,
) -> TokenPairs:
    """Split a latent's pre-activation over the tokens that attention brings it from, and over heads.

    Args:
        prompt: text or token ids.
        autoencoders: of ``attn.v_out`` (the joined heads) or ``resid.torso.delta_attn``. Where they
            normalise their inputs, the mean and the scale of the actual input are kept fixed.
        bos: begin with the start token.
    """
    place = autoencoders.location.at(layer)
    if place.path not in ("attn.v_out", "resid.torso.delta_attn"):
        raise InputError(
            f"expected autoencoders of attn.v_out or resid.torso.delta_attn, found {autoencoders.location}."
        )
    autoencoder = _linear(autoencoders.get_autoencoder(layer), latent)
    tokens = one_prompt(model, prompt, bos)
    paths = ["attn.qk_probs", "attn.v_out", "resid.torso.post_ln_attn"]
    found = model.capture(tokens, [place, *(f"{layer}/{path}" for path in paths)])
    x = found[place][0].flatten(1).to(autoencoder.device, autoencoder.dtype)
    pattern, z, normed = (found[f"{layer}/{path}"][0].double() for path in paths)
    v = _values(model, layer, pattern, z, normed)
    direction = _directions(autoencoder, latent, x).to(pattern.device)
    if place.path == "attn.v_out":
        per_head = direction.view(len(x), pattern.shape[2], -1)
    else:
        weight = model.weight(WeightLocationType.ATTN_TO_RESIDUAL, layer).detach().double()
        written = torch.einsum("qhc,hcd->qd", z, weight)
        _constant_rest(x, written, f"{model.name}: what attention adds to the stream")
        per_head = torch.einsum("qd,hcd->qhc", direction, weight)
    values = pattern * torch.einsum("khc,qhc->qkh", v, per_head)
    pre_activation = autoencoder.encode_pre_act(x, slice(latent, latent + 1))[:, 0]
    whole = flat(pre_activation)
    shares: Floats = values.cpu().numpy()
    texts = token_texts(model, tokens[0].tolist())
    return TokenPairs(shares, whole, whole - shares.sum((1, 2)), texts, str(place), latent)


def _linear(autoencoder: Autoencoder, latent: int) -> Autoencoder:
    """The autoencoder, if the latent's pre-activation is linear in its normalised input."""
    if not 0 <= latent < autoencoder.n_latents:
        raise InputError(f"latents are 0 to {autoencoder.n_latents - 1}, found {latent}.")
    if autoencoder.glu is not None:
        raise InputError(
            "a gated autoencoder's pre-activation is a product, not a sum over tokens and heads."
        )
    if isinstance(autoencoder, PrunedAutoencoder):
        raise InputError("latents of this autoencoder were left out of memory; load it whole.")
    return autoencoder


def _directions(autoencoder: Autoencoder, latent: int, x: Tensor) -> Tensor:
    """``[q, n]`` float64: what the pre-activation gains for each 1 of the input ``x`` ``[q, n]``, with
    the mean and the scale that it is normalised with kept fixed."""
    row = autoencoder.encoder.weight[latent].double().expand_as(x)
    x_hat, stats = autoencoder.normalize(x)
    if stats is None:
        return row
    if stats.mean is not None:
        row, x = row - row.mean(dim=-1, keepdim=True), x - stats.mean
    if stats.std is None:
        return row
    # The very divisor, whatever is added to the scale against a division by 0.
    length, normed = (y.double().norm(dim=-1, keepdim=True) for y in (x, x_hat))
    return row / torch.where(normed == 0, 1.0, length / normed)


def _values(model: LanguageModel, layer: int, pattern: Tensor, z: Tensor, normed: Tensor) -> Tensor:
    """``[k, h, d_head]``: the values of each head, also of models in which no hook sees them.

    A pattern sums to 1, so what heads read out ``z`` without the values' weights is the values' bias.
    """
    weight = model.weight(WeightLocationType.ATTN_TO_VALUE, layer).detach().double()
    v = torch.einsum("kd,hdc->khc", normed, weight)
    read = torch.einsum("qkh,khc->qhc", pattern, v)
    return v + _constant_rest(z, read, f"{model.name}: what heads read out")


def _constant_rest(whole: Tensor, sum_of_parts: Tensor, what: str) -> Tensor:
    """``[1, …]``: the bias that is left of ``whole`` ``[q, …]``; an error if it is none."""
    rest = whole.double() - sum_of_parts
    if float((rest - rest[:1]).abs().max()) > 1e-3 * float(whole.abs().max()):
        raise InputError(
            f"{what} is not a sum over tokens and heads and a bias (such as where a norm comes between)."
        )
    return rest[:1]


# --- through which heads ---


@dataclass(frozen=True, repr=False)
class HeadLoadings:
    """What a unit gives to a later unit's pre-activation, split over the heads that carry it."""

    source: Node
    target: Node
    values: Floats
    """``[l, h]``: through each head, as the first that carries it."""
    layers: list[int]
    """The number of each of the ``l`` layers."""
    bypass: float
    """Through no head: along the residual stream, which needs one position."""

    @property
    def total(self) -> float:
        """All that the source gives to the target, other than through MLPs."""
        return self.bypass + float(self.values.sum())

    def top(self, k: int = 10) -> list[tuple[int, int, float]]:
        """Layer, head and loading of the ``k`` heads that carry most, of either sign."""
        order = np.argsort(-np.abs(self.values), axis=None, kind="stable")[:k]
        places = [np.unravel_index(i, self.values.shape) for i in order]
        return [(self.layers[a], int(h), float(self.values[a, h])) for a, h in places]

    def __repr__(self) -> str:
        rows = [[f"{layer}", f"{head}", f"{value:+.4f}"] for layer, head, value in self.top()]
        lines = [
            f"{self.source} gives {self.target} {self.total:+.4g}; past all heads {self.bypass:+.4g}"
        ]
        if rows:
            lines.append(text_table(["layer", "head", "value"], rows, n_left=0, rule=True))
        return "\n".join(lines)


def head_loadings(
    model: LanguageModel,
    prompt: str | Sequence[int],
    source: Node,
    target: Node,
    *,
    autoencoders: Sequence[AutoencoderContext] = (),
    bos: bool | int = False,
) -> HeadLoadings:
    """Split what one unit gives to a later one over the heads that carry it there.

    Attention patterns and the scales of norms are kept as they are, and nothing goes through MLPs. Then
    the way is linear: the source's write, through a head's value and output weights and its pattern, into
    the gradient of the target's pre-activation. Where several heads carry it one after the other, it
    counts for the first.

    Args:
        source: a latent or neuron that writes to the stream.
        target: a neuron, or a latent of an autoencoder in an MLP, in a later layer.
        autoencoders: those of the latents.
        bos: begin with the start token.
    """
    own = own_transformer(model)
    tokens = one_prompt(own, prompt, bos)
    begin, end = (_layer(node, tokens.shape[1]) for node in (source, target))
    if not begin < end:
        raise InputError(
            f"the target must be in a later layer than the source: {target}, {source}."
        )
    layers = list(range(begin + 1, end + 1))
    if target.kind == "neuron":
        goal = goal_of_neuron(target)
    elif target.kind == "latent" and "attn" not in target.location:
        goal = goal_of_latent(target, autoencoders)
    else:
        raise InputError(
            f"{target}: expected a neuron, or a latent of an MLP's autoencoder; see token_pairs for "
            "latents of attention."
        )
    write = _write(own, tokens, source, autoencoders)
    run = _linear_pass(own, tokens, goal, end)
    with torch.no_grad():
        kept = own.capture(tokens, ["attn.qk_probs", "resid.torso.ln_attn.scale"])
    values = np.stack([_loadings(run, kept, layer, source.position, write) for layer in layers])
    bypass = float(write @ run.last_gradient[source.position])
    return HeadLoadings(source, target, values, layers, bypass)


def _layer(node: Node, length: int) -> int:
    layer = ActivationLocation.parse(node.location).layer
    if layer is None:
        raise InputError(f"{node}: the location must name a layer.")
    if not 0 <= node.position < length:
        raise InputError(f"{node}: positions are 0 to {length - 1} in this prompt.")
    return layer


def _linear_pass(model: Transformer, tokens: Tensor, goal: Goal, end: int) -> Pass:
    """Gradients of the goal along attention and the stream alone."""
    hooks = TransformerHooks()
    for layer in range(end):
        hooks.append_at(f"{layer}/resid.torso.delta_mlp", lambda x: x.detach())
    before: dict[str, Any] = {
        "stream": f"{end}/resid.torso.post_attn",
        "norm": f"{end}/resid.torso.ln_mlp",
        "hooks": goal.hooks + hooks,
    }
    wanted = ["resid.torso.delta_attn"]
    return Pass(model, tokens, replace(goal, **before), wanted, ("norms", "patterns"))


@torch.no_grad()
def _write(
    model: Transformer, tokens: Tensor, node: Node, autoencoders: Sequence[AutoencoderContext]
) -> Tensor:
    """``[d]`` float64: what a unit writes to the stream at its position."""
    place = ActivationLocation.parse(node.location)
    if node.kind == "neuron":
        value = model.capture(tokens, place)[place][0, node.position, node.unit].double()
        weight = model.weight(WeightLocationType.MLP_TO_RESIDUAL, place.layer).detach()
        return value * weight[node.unit].double()
    context = next((c for c in autoencoders if c.location == place.at(None)), None)
    if node.kind != "latent" or context is None:
        raise InputError(
            f"{node}: expected a neuron, or a latent with its autoencoders, autoencoders=[context]."
        )
    autoencoder = context.get_autoencoder(place.layer)
    x = model.capture(tokens, place)[place][0, node.position].flatten()[None]
    code = autoencoder.code(x.to(autoencoder.device, autoencoder.dtype))
    alone = torch.zeros_like(code.latents)
    alone[:, node.unit] = code.latents[:, node.unit]
    change = code.decode(alone) - code.decode(torch.zeros_like(alone))
    written_at = place if autoencoder.output_location is None else autoencoder.output_location
    found: Tensor = into_stream(model, written_at.at(place.layer))(change[0].double())
    return found


@torch.no_grad()
def _loadings(run: Pass, kept: Activations, layer: int, position: int, write: Tensor) -> Floats:
    """``[h]``: what a write ``[d]`` at a position gives to the goal through each head of a layer."""
    norm = run.model.reader(f"{layer}/resid.torso.post_ln_attn")
    assert isinstance(norm, Norm)
    scale = kept[f"{layer}/resid.torso.ln_attn.scale"][0, position].double()
    normed = (write - write.mean()) / scale * norm.weight.detach().double()
    value, out = (
        run.model.weight(kind, layer).detach().double()
        for kind in (WeightLocationType.ATTN_TO_VALUE, WeightLocationType.ATTN_TO_RESIDUAL)
    )
    per_head = torch.einsum("d,hdc,hce->he", normed, value, out)
    pattern = kept[f"{layer}/attn.qk_probs"][0, :, position].double()  # [q, h]
    gradient = run.gradient(ActivationLocation("resid.torso.delta_attn", layer))
    return flat(torch.einsum("he,qh,qe->h", per_head, pattern, gradient))
