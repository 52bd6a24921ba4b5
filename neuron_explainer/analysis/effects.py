"""What each part of a model contributes to a target on one prompt: the table of nodes.

    table = nodes(model, "The capital of France is", logit_difference(model, " Paris", " Rome"))

A *node* is a unit at a position: an embedding, an MLP neuron, an attention head or one of its pairs of
tokens, a latent of an autoencoder or what the autoencoder does not capture, a bias. The *measures* are

- ``activation``: the unit's value ``a``;
- ``write_norm``: ``a`` times the length of what the unit writes into the residual stream per 1 of ``a``;
- ``direct``: the unit's write times the gradient of the target at the last residual stream: its effect on
  the logits through no later layer. With the final norm's scale frozen and a target linear in the logits,
  the direct effects of all nodes sum to the target;
- ``act_grad``: ``a`` times the gradient of the target with respect to ``a``: the first-order estimate of
  what setting ``a`` to 0 takes away, through all later layers;
- ``patching``: the same for setting ``a`` to its value in a second prompt (attribution patching, Nanda
  2023; Kramár et al. 2024): ``(b - a)`` times the gradient;
- ``ablation``: measured, not estimated: target minus target with the unit set to 0.

An autoencoder is not spliced in: its latents are read off the activation, and since the error is kept,
the gradient with respect to a latent is the activation's gradient times the decoder's row. So only
active latents cost anything.

Shape legend: ``s`` positions, ``k`` attended positions, ``h`` heads, ``u`` units, ``d`` model width.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from neuron_explainer.analysis.sweeps import optional_module, sweep
from neuron_explainer.analysis.targets import Metric, Reading, Target, as_target, token_texts
from neuron_explainer.errors import InputError, did_you_mean
from neuron_explainer.models.autoencoder import Autoencoder
from neuron_explainer.models.autoencoder_context import AutoencoderContext
from neuron_explainer.models.autoencoders.latents import Latents
from neuron_explainer.models.autoencoders.pruned import get_decoder_weight
from neuron_explainer.models.hooks import TransformerHooks
from neuron_explainer.models.interventions import ablate, add, align
from neuron_explainer.models.language_model import LanguageModel
from neuron_explainer.models.locations import ActivationLocation
from neuron_explainer.models.weight_names import WeightLocationType
from neuron_explainer.tables import escaped, text_table

__all__ = ["MEASURES", "Freeze", "Kind", "Node", "NodeTable", "nodes"]

Kind = Literal["embedding", "neuron", "head", "pair", "latent", "error", "bias"]
Freeze = Literal["final_norm", "norms", "patterns"]
"""What gradients do not flow through: the scale of the final norm, of every norm, attention patterns."""
MEASURES = ("activation", "write_norm", "direct", "act_grad", "patching", "ablation")
Floats = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]


@dataclass(frozen=True, order=True)
class Node:
    """A unit at a position."""

    location: str
    """Such as ``3/mlp.post_act``."""
    kind: Kind
    unit: int
    """Number of the neuron, head or latent; 0 where a kind has one unit at a position."""
    position: int
    attended: int | None = None
    """For a pair: the position that the head looks at."""

    def __str__(self) -> str:
        numbered = self.kind in ("neuron", "head", "pair", "latent")
        name = (
            f"{'head' if self.kind == 'pair' else self.kind}{f' {self.unit}' if numbered else ''}"
        )
        where = (
            f"{self.position}" if self.attended is None else f"{self.position} from {self.attended}"
        )
        return f"{self.location} {name} at {where}"


@dataclass
class _Part:
    """All nodes of one kind at one location, ``n`` of them."""

    location: ActivationLocation
    kind: Kind
    unit: Ints
    """``[n]``, as are ``position`` and ``attended`` (-1 for none)."""
    position: Ints
    attended: Ints
    value: Tensor
    """``[n, w]`` float64: each node's activation; a vector where a unit is one."""
    gradient: Tensor
    """``[n, w]``: of the target with respect to it."""
    measures: dict[str, Floats]
    """Measure -> ``[n]``."""

    def __post_init__(self) -> None:
        self.measures["act_grad"] = _numpy((self.value * self.gradient).sum(dim=-1))

    def node(self, index: int) -> Node:
        attended = int(self.attended[index])
        return Node(
            str(self.location),
            self.kind,
            int(self.unit[index]),
            int(self.position[index]),
            None if attended < 0 else attended,
        )


# --- one pass with gradients ---


class _Pass:
    """The activations of one prompt, and the gradients of the target with respect to them."""

    def __init__(
        self,
        model: LanguageModel,
        tokens: Tensor,
        target: Target,
        wanted: Sequence[str],
        freeze: Sequence[Freeze],
    ) -> None:
        self.model, self.tokens = model, tokens
        last = f"{model.n_layers - 1}/resid.torso.post_mlp"
        hooks = _leaf_at_embedding() + _frozen(freeze)
        with torch.enable_grad():
            self.found = model.capture(
                tokens, [*wanted, last, "resid.post_emb", "logits"], hooks=hooks
            )
            logits = self.found["logits"] if target.every_position else self.found["logits"][:, -1]
            zero = torch.zeros(1, dtype=torch.long, device=tokens.device)
            pad = torch.zeros_like(tokens, dtype=torch.bool)
            self.value = target(Reading(logits, zero, logits.detach(), tokens, pad))[0]
            places = [place for place in self.found if place.path != "logits"]
            gradients = torch.autograd.grad(
                self.value, [self.found[place] for place in places], allow_unused=True
            )
        self.gradients = {
            place: torch.zeros_like(self.found[place]) if gradient is None else gradient
            for place, gradient in zip(places, gradients, strict=True)
        }
        self.last_gradient = self.gradient(last)
        self.last_stream = self.activation(last)

    def activation(self, place: str | ActivationLocation) -> Tensor:
        """``[s, …]`` float64."""
        return self.found[place][0].detach().double()

    def gradient(self, place: str | ActivationLocation) -> Tensor:
        """``[s, …]`` float64."""
        return self.gradients[ActivationLocation.parse(place)][0].double()


def _leaf_at_embedding() -> TransformerHooks:
    """Gradients begin at the embedding, so that the parameters need none."""
    return TransformerHooks().append_at("resid.post_emb", lambda x: x.detach().requires_grad_())


_FROZEN: dict[Freeze, tuple[str, ...]] = {
    "final_norm": ("resid.ln_f.scale",),
    "norms": ("resid.ln_f.scale", "resid.torso.ln_attn.scale", "resid.torso.ln_mlp.scale"),
    "patterns": ("attn.qk_probs",),
}


def _frozen(freeze: Sequence[Freeze]) -> TransformerHooks:
    hooks = TransformerHooks()
    if unknown := [name for name in freeze if name not in _FROZEN]:
        raise InputError(
            f"freeze takes {', '.join(_FROZEN)}; found {unknown[0]!r}."
            f"{did_you_mean(str(unknown[0]), list(_FROZEN))}"
        )
    for path in dict.fromkeys(path for name in freeze for path in _FROZEN[name]):
        hooks.append_at(path, lambda x: x.detach())
    return hooks


# --- the parts of a model ---


def _grid(*shape: int) -> list[Ints]:
    return [axis.reshape(-1) for axis in np.indices(shape, dtype=np.int64)]


def _numpy(x: Tensor) -> Floats:
    found: Floats = x.detach().double().cpu().numpy().reshape(-1)
    return found


def _written(run: _Pass, position: Ints, writes: Tensor) -> Floats:
    """``direct`` ``[n]`` of writes ``[n, d]`` at positions ``[n]``."""
    return _numpy((writes * run.last_gradient[torch.from_numpy(position)]).sum(dim=-1))


def _vectors(
    run: _Pass, place: ActivationLocation, kind: Kind, value: Tensor, write: Tensor
) -> _Part:
    """One unit a position, a vector ``[s, n]`` that writes ``[s, d]``; ``activation`` is its length."""
    position = np.arange(len(value))
    zeros = np.zeros_like(position)
    measures = {
        "activation": _numpy(value.norm(dim=-1)),
        "write_norm": _numpy(write.norm(dim=-1)),
        "direct": _written(run, position, write),
    }
    gradient = run.gradient(place).flatten(1)
    return _Part(place, kind, zeros, position, zeros - 1, value, gradient, measures)


def _rest(run: _Pass, path: str, layer: int, writes: Tensor) -> _Part:
    """What a sublayer writes besides ``writes`` ``[s, d]``: its bias."""
    delta = ActivationLocation(path, layer)
    rest = run.activation(delta) - writes
    return _vectors(run, delta, "bias", rest, rest)


def _neurons(run: _Pass, layer: int) -> Iterator[_Part]:
    place = ActivationLocation("mlp.post_act", layer)
    weight = run.model.weight(WeightLocationType.MLP_TO_RESIDUAL, layer).detach().double()
    a = run.activation(place)
    position, unit = _grid(*a.shape)
    measures = {
        "activation": _numpy(a),
        "write_norm": _numpy(a * weight.norm(dim=-1)),
        "direct": _numpy(a * (run.last_gradient @ weight.T)),
    }
    none = np.full_like(unit, -1)
    gradient = run.gradient(place)
    yield _Part(
        place, "neuron", unit, position, none, a.reshape(-1, 1), gradient.reshape(-1, 1), measures
    )
    yield _rest(run, "resid.torso.delta_mlp", layer, a @ weight)


def _heads(run: _Pass, layer: int) -> Iterator[_Part]:
    place = ActivationLocation("attn.v_out", layer)
    weight = run.model.weight(WeightLocationType.ATTN_TO_RESIDUAL, layer).detach().double()
    z = run.activation(place)  # [s, h, d_head]
    writes = torch.einsum("shc,hcd->shd", z, weight)
    position, unit = _grid(*z.shape[:2])
    norm = _numpy(writes.norm(dim=-1))
    measures = {
        "activation": norm,
        "write_norm": norm,
        "direct": _written(run, position, writes.flatten(0, 1)),
    }
    none = np.full_like(unit, -1)
    gradient = run.gradient(place).flatten(0, 1)
    yield _Part(place, "head", unit, position, none, z.flatten(0, 1), gradient, measures)
    yield _rest(run, "resid.torso.delta_attn", layer, writes.sum(dim=1))


def _pairs(run: _Pass, layer: int) -> Iterator[_Part]:
    place = ActivationLocation("attn.qk_probs", layer)
    weight = run.model.weight(WeightLocationType.ATTN_TO_RESIDUAL, layer).detach().double()
    pattern, v = run.activation(place), run.activation(ActivationLocation("attn.v", layer))
    written = torch.einsum("khc,hcd->khd", v, weight)
    to_last = torch.einsum("khd,qd->qkh", written, run.last_gradient)
    position, attended, unit = _grid(*pattern.shape)
    seen = attended <= position
    measures = {
        "activation": _numpy(pattern),
        "write_norm": _numpy(pattern * written.norm(dim=-1)),
        "direct": _numpy(pattern * to_last),
    }
    value, gradient = pattern.reshape(-1, 1), run.gradient(place).reshape(-1, 1)
    some = torch.from_numpy(seen)
    yield _Part(
        place,
        "pair",
        unit[seen],
        position[seen],
        attended[seen],
        value[some],
        gradient[some],
        {name: values[seen] for name, values in measures.items()},
    )
    writes = torch.einsum("qkh,khd->qd", pattern, written)
    yield _rest(run, "resid.torso.delta_attn", layer, writes)


@torch.no_grad()
def _latents(run: _Pass, place: ActivationLocation, autoencoder: Autoencoder) -> Iterator[_Part]:
    assert place.layer is not None
    x = run.activation(place).flatten(1)
    code = autoencoder.code_sparse(x.to(autoencoder.device, autoencoder.dtype))
    row, slot = (code.latents.values != 0).nonzero(as_tuple=True)
    a, unit = code.latents.values[row, slot].double(), code.latents.indices[row, slot]
    # On the scale of the input: an autoencoder that normalises multiplies by a number for each token.
    per_one = get_decoder_weight(autoencoder)[unit].double()
    per_one = per_one * _scale(code, autoencoder, len(x))[row, None]
    to_stream = _into_stream(run.model, place)
    gradient, writes = run.gradient(place).flatten(1), to_stream(per_one)
    position = row.cpu().numpy()
    measures = {
        "activation": _numpy(a),
        "write_norm": _numpy(a * writes.norm(dim=-1)),
        "direct": _written(run, position, a[:, None] * writes),
    }
    none = np.full_like(position, -1)
    its_gradient = (per_one * gradient[row]).sum(dim=-1, keepdim=True)
    yield _Part(
        place, "latent", unit.cpu().numpy(), position, none, a[:, None], its_gradient, measures
    )
    recons = code.decode(code.latents).double()
    bias = code.decode(_one_each(code.latents, 0.0)).double()
    for kind, rest in (("error", x - recons), ("bias", bias)):
        yield _vectors(run, place, kind, rest, to_stream(rest))  # type: ignore[arg-type]  # a Kind
    if place.path in _INSIDE:
        yield _rest(run, _INSIDE[place.path], place.layer, to_stream(x))


_INSIDE = {"mlp.post_act": "resid.torso.delta_mlp", "attn.v_out": "resid.torso.delta_attn"}
"""Where what is inside a sublayer is written to the stream."""


def _one_each(latents: Latents, value: float) -> Latents:
    """Latent 0 of every row at a value, and no other."""
    values = torch.full_like(latents.values[:, :1], value)
    return Latents(values, torch.zeros_like(latents.indices[:, :1]), latents.n_latents)


def _scale(code: Any, autoencoder: Autoencoder, n_tokens: int) -> Tensor:
    """``[s]``: what decoding multiplies a decoder row by."""
    row = get_decoder_weight(autoencoder)[0].double()
    zero = _one_each(code.latents, 0.0)
    change = (code.decode(_one_each(code.latents, 1.0)) - code.decode(zero)).double()
    scale: Tensor = change @ row / row.square().sum()
    return scale


def _into_stream(model: LanguageModel, place: ActivationLocation) -> Callable[[Tensor], Tensor]:
    """From vectors ``[…, n]`` at a place to what they write into the residual stream ``[…, d]``."""
    if place.path == "mlp.post_act":
        weight = model.weight(WeightLocationType.MLP_TO_RESIDUAL, place.layer).detach().double()
        return lambda x: x @ weight
    if place.path == "attn.v_out":
        heads = model.weight(WeightLocationType.ATTN_TO_RESIDUAL, place.layer).detach().double()
        return lambda x: x @ heads.flatten(0, 1)
    if place.path in ("resid.torso.delta_mlp", "resid.torso.delta_attn"):
        return lambda x: x
    raise InputError(
        f"latents of {place} are no part of a sum that makes the stream; expected an autoencoder of "
        "mlp.post_act, attn.v_out, resid.torso.delta_mlp or resid.torso.delta_attn."
    )


_MLP_PLACES = ("mlp.post_act", "resid.torso.delta_mlp")


def _parts(
    run: _Pass, attention: str, autoencoders: Mapping[bool, AutoencoderContext]
) -> list[_Part]:
    """Every part of the model once: their writes sum to the last residual stream."""
    emb = ActivationLocation("resid.post_emb")
    embedding = run.activation(emb)
    parts = [_vectors(run, emb, "embedding", embedding, embedding)]
    for layer in range(run.model.n_layers):
        for is_mlp in (False, True):
            context = autoencoders.get(is_mlp)
            if context is not None and layer in context.layer_indices:
                place = context.location.at(layer)
                parts += _latents(run, place, context.get_autoencoder(layer))
            elif is_mlp:
                parts += _neurons(run, layer)
            else:
                parts += _pairs(run, layer) if attention == "pairs" else _heads(run, layer)
    return [*parts, _constant(run)]


def _wanted(
    model: LanguageModel, attention: str, autoencoders: Mapping[bool, AutoencoderContext]
) -> list[str]:
    inside = ["attn.qk_probs", "attn.v"] if attention == "pairs" else ["attn.v_out"]
    paths = [*inside, "resid.torso.delta_attn", "mlp.post_act", "resid.torso.delta_mlp"]
    paths += [context.location.path for context in autoencoders.values()]
    for path in paths:
        model.require(path)
    return list(dict.fromkeys(paths))


# --- the table ---


@dataclass(frozen=True, repr=False)
class NodeTable:
    """Some nodes with their measures, and what all nodes sum to."""

    nodes: list[Node]
    values: Mapping[str, Floats]
    """Measure -> ``[n]``, one number a node."""
    totals: Mapping[str, float]
    """Measure -> its sum over all nodes, shown or not."""
    target: float
    """The target on the prompt."""
    target_name: str
    tokens: list[str]
    """The prompt's tokens as text."""
    other: Mapping[str, Floats] = field(default_factory=dict)
    """The same measures of the second prompt, at the aligned positions; NaN where there is none."""
    rank_correlation: float | None = None
    """Spearman's correlation of ``act_grad`` with ``ablation`` over the nodes shown."""

    def coverage(self, measure: str = "direct") -> float:
        """The nodes' share of the sum of a measure over all nodes."""
        total = self.totals[measure]
        return float(self.values[measure].sum() / total) if total else float("nan")

    def order(self, by: str) -> list[int]:
        """Row numbers by size of a measure, the largest first, either sign."""
        return [int(i) for i in np.argsort(-np.abs(self.values[by]), kind="stable")]

    def to_dataframe(self) -> Any:
        """One row a node (needs pandas)."""
        pandas = optional_module("pandas")
        rows = [
            {
                "location": node.location,
                "kind": node.kind,
                "unit": node.unit,
                "position": node.position,
                "token": self.tokens[node.position],
                "attended": node.attended,
                **{name: values[i] for name, values in self.values.items()},
                **{f"{name} (second)": values[i] for name, values in self.other.items()},
            }
            for i, node in enumerate(self.nodes)
        ]
        return pandas.DataFrame(rows)

    def __repr__(self) -> str:
        by = "act_grad" if "act_grad" in self.values else next(iter(self.values))
        lines = [f"{self.target_name}: {self.target:.4g}"]
        share = [
            f"{self.coverage(name):.0%} of {name}"
            for name in ("direct", "act_grad")
            if name in self.values
        ]
        lines.append(f"{len(self.nodes)} nodes shown; they explain {' and '.join(share)}.")
        if self.rank_correlation is not None:
            lines.append(
                f"Rank correlation of act_grad with ablation: {self.rank_correlation:.2f}."
            )
        rows = []
        for i in self.order(by)[:20]:
            node = self.nodes[i]
            token = escaped(repr(self.tokens[node.position]))
            rows.append([str(node), token, *(f"{v[i]:+.4f}" for v in self.values.values())])
        lines.append(text_table(["node", "token", *self.values], rows, n_left=2, rule=True))
        return "\n".join(lines)


def nodes(
    model: LanguageModel,
    prompt: str | Sequence[int],
    target: Metric,
    measures: Sequence[str] = ("write_norm", "direct", "act_grad"),
    top_k: int = 10,
    *,
    prompt_b: str | Sequence[int] | None = None,
    attention: Literal["heads", "pairs"] = "heads",
    autoencoders: Sequence[AutoencoderContext] = (),
    freeze: Sequence[Freeze] = ("final_norm",),
    bos: bool | int = False,
) -> NodeTable:
    """The nodes that matter most for a target: for each measure the ``top_k`` largest of either sign.

    Args:
        prompt: text or token ids.
        target: see :mod:`neuron_explainer.analysis.targets`; for ``direct`` it should be linear in the
            logits.
        measures: by which nodes are chosen, of :data:`MEASURES`. ``ablation`` chooses none and is measured
            for those chosen by the others; ``activation`` is always given and compares no kinds.
        prompt_b: a second prompt; its tokens are aligned with the first's by an edit script.
        attention: one node a head, or one a head and pair of tokens.
        autoencoders: whose latents, with an error, take the place of an MLP's neurons or of attention's
            heads in the layers that they cover.
        freeze: what gradients do not flow through.
        bos: begin with the start token.
    """
    kinds = _check(measures, top_k, prompt_b, attention, autoencoders)
    target = as_target(target)
    run = _run(model, prompt, target, attention, kinds, freeze, bos)
    parts = _parts(run, attention, kinds)
    second = None
    if prompt_b is not None:
        second = _run(model, prompt_b, target, attention, kinds, freeze, bos)
        _add_patching(parts, _parts(second, attention, kinds), align(*_ids(run, second)).numpy())
    chosen = _choose(parts, [m for m in measures if m not in ("ablation", "activation")], top_k)
    names = [m for m in MEASURES if m in {*measures, "activation"} and m != "ablation"]
    values = {m: np.array([part.measures[m][i] for part, i in chosen]) for m in names}
    found = [part.node(i) for part, i in chosen]
    correlation = None
    if "ablation" in measures:
        values["ablation"] = _ablated(run, chosen, target, kinds.values())
        if len(found) > 2:
            correlation = spearman(values["act_grad"], values["ablation"])
    other = {}
    if second is not None:
        other = {
            m: np.array([part.measures[f"{m} (second)"][i] for part, i in chosen])
            for m in ("activation", "direct", "act_grad")
        }
    totals = {m: float(sum(part.measures[m].sum() for part in parts)) for m in names}
    tokens = token_texts(model, run.tokens[0].tolist())
    return NodeTable(
        found, values, totals, float(run.value.detach()), target.name, tokens, other, correlation
    )


def _check(
    measures: Sequence[str],
    top_k: int,
    prompt_b: object,
    attention: str,
    autoencoders: Sequence[AutoencoderContext],
) -> dict[bool, AutoencoderContext]:
    """The autoencoders by whether they are of an MLP; an error for settings that do not fit together."""
    if unknown := [name for name in measures if name not in MEASURES]:
        raise InputError(
            f"unknown measure {unknown[0]!r}.{did_you_mean(unknown[0], MEASURES)} "
            f"Known: {', '.join(MEASURES)}."
        )
    if not {*measures} - {"ablation", "activation"}:
        raise InputError(
            "give at least one measure that chooses nodes: direct, act_grad, write_norm, patching."
        )
    if "ablation" in measures and "act_grad" not in measures:
        raise InputError("ablation is shown beside act_grad, its estimate: give both measures.")
    if "patching" in measures and prompt_b is None:
        raise InputError("patching compares with a second prompt: give prompt_b.")
    if top_k < 1:
        raise InputError(f"top_k must be at least 1, found {top_k}.")
    if attention not in ("heads", "pairs"):
        raise InputError(f"attention must be 'heads' or 'pairs', found {attention!r}.")
    kinds: dict[bool, AutoencoderContext] = {}
    for context in autoencoders:
        is_mlp = context.location.path in _MLP_PLACES
        if is_mlp in kinds:
            raise InputError(
                f"autoencoders of {kinds[is_mlp].location} and of {context.location} cover the same part of "
                "the stream; give one of them."
            )
        kinds[is_mlp] = context
    return kinds


def _run(
    model: LanguageModel,
    prompt: str | Sequence[int],
    target: Target,
    attention: str,
    kinds: Mapping[bool, AutoencoderContext],
    freeze: Sequence[Freeze],
    bos: bool | int,
) -> _Pass:
    if not isinstance(prompt, str) and not all(isinstance(token, int) for token in prompt):
        raise InputError("nodes are of one prompt: text, or a list of token ids.")
    tokens, _ = model.to_batch(prompt if isinstance(prompt, str) else [list(prompt)], None, bos)
    return _Pass(model, tokens, target, _wanted(model, attention, kinds), freeze)


def _ids(run: _Pass, second: _Pass) -> tuple[list[int], list[int]]:
    return run.tokens[0].tolist(), second.tokens[0].tolist()


def _constant(run: _Pass) -> _Part:
    """What the target has without any stream: the final norm's bias, for a linear target."""
    place = ActivationLocation("resid.post_ln_f")
    rest = float(run.value.detach().double() - (run.last_stream * run.last_gradient).sum())
    last, zero = np.array([run.tokens.shape[1] - 1]), np.zeros(1)
    measures = {"activation": zero, "write_norm": zero, "direct": np.array([rest])}
    nothing = torch.zeros(1, 1, dtype=torch.float64)
    first = np.zeros(1, dtype=np.int64)
    return _Part(place, "bias", first, last, first - 1, nothing, nothing, measures)


def _add_patching(parts: list[_Part], others: list[_Part], index_map: Ints) -> None:
    """Give each node the second prompt's measures, and ``patching`` from its value there."""
    by_place = {(part.location, part.kind): part for part in others}
    for part in parts:
        other = by_place[part.location, part.kind]
        there = index_map[part.position]
        attended = np.where(part.attended < 0, -1, index_map[part.attended.clip(min=0)])
        lost = (there < 0) | ((part.attended >= 0) & (attended < 0))
        keys = _keys(other.unit, other.position, other.attended)
        order = np.argsort(keys)
        wanted = _keys(part.unit, there, attended)
        found = order[np.searchsorted(keys[order], wanted).clip(max=len(keys) - 1)]
        absent = keys[found] != wanted  # a latent that is not active there has the value 0
        value = torch.where(torch.from_numpy(absent)[:, None], 0.0, other.value[found])
        change = ((value - part.value) * part.gradient).sum(dim=-1)
        part.measures["patching"] = np.where(lost, 0.0, _numpy(change))
        for name in _OF_SECOND:
            of_other = np.where(absent, 0.0, other.measures[name][found])
            part.measures[f"{name} (second)"] = np.where(lost, np.nan, of_other)


_OF_SECOND = ("activation", "direct", "act_grad")


def _keys(unit: Ints, position: Ints, attended: Ints) -> Ints:
    """One number for each node, the same for the same node."""
    return (unit << 32) | ((position + 1) << 16) | (attended + 1)


def _choose(parts: Sequence[_Part], measures: Sequence[str], top_k: int) -> list[tuple[_Part, int]]:
    """The union over measures of the ``top_k`` nodes; ties by order in the model."""
    chosen: dict[tuple[int, int], None] = {}
    for measure in measures:
        best: list[tuple[float, int, int]] = []
        for number, part in enumerate(parts):
            sizes = np.abs(part.measures[measure])
            for i in np.argsort(-sizes, kind="stable")[:top_k].tolist():
                best.append((-float(sizes[i]), number, i))
        for _, number, i in sorted(best)[:top_k]:
            chosen[number, i] = None
    return [(parts[number], i) for number, i in sorted(chosen)]


# --- measured ---


def _ablated(
    run: _Pass,
    parts: Sequence[tuple[_Part, int]],
    target: Target,
    contexts: Iterable[AutoencoderContext],
) -> Floats:
    """``[n]``: the target minus the target with each node alone set to 0."""
    cells = [_without(run, part, i, contexts) for part, i in parts]
    result = sweep(run.model, [run.tokens[0].tolist()], cells, target)
    return -result.effect[:, 0]


def _without(
    run: _Pass, part: _Part, i: int, contexts: Iterable[AutoencoderContext]
) -> TransformerHooks:
    """An intervention that sets one node to 0."""
    position, unit = int(part.position[i]), int(part.unit[i])
    if part.kind in ("neuron", "head"):
        return ablate(part.location, unit, position)
    if part.kind == "pair":
        return _without_pair(part.location, position, int(part.attended[i]), unit)
    if part.kind == "latent":
        autoencoders = next(c for c in contexts if c.location == part.location.at(None))
        return ablate(part.location, unit, position, autoencoders=autoencoders)
    if part.location.path == "resid.post_ln_f":
        return TransformerHooks()  # a constant of the target, which no intervention removes
    change = torch.zeros(1, *run.found[part.location].shape[1:], dtype=torch.float64)
    change[0, position] = -part.value[i].view(change.shape[2:])
    return add(part.location, change, positions=position)


def _without_pair(
    place: ActivationLocation, position: int, attended: int, head: int
) -> TransformerHooks:
    def edit(x: Tensor) -> Tensor:
        x = x.clone()
        x[:, position, attended, head] = 0
        return x

    return TransformerHooks().append_at(place, edit)


def spearman(a: Floats, b: Floats) -> float:
    """Spearman's rank correlation; ties get their mean rank; NaN if all of ``a`` or of ``b`` are equal."""
    ranks = _ranks(a), _ranks(b)
    if not (ranks[0].std() and ranks[1].std()):
        return float("nan")
    return float(np.corrcoef(*ranks)[0, 1])


def _ranks(x: Floats) -> Floats:
    _, inverse, counts = np.unique(x, return_inverse=True, return_counts=True)
    found: Floats = (np.cumsum(counts) - (counts - 1) / 2.0)[inverse]
    return found
