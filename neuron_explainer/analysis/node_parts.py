"""The parts of a model on one prompt, with the gradient of a goal: what the table of nodes is made of.

A goal is a number: a target of the logits, or the value of a node inside the model. Gradients are read at
every part, and at the last residual stream before the goal.

Shape legend: ``s`` positions, ``k`` attended positions, ``h`` heads, ``u`` units, ``d`` model width,
``n`` nodes, ``w`` width of a node (1, or the width of a vector), ``p`` positions of nodes.
"""

import copy
import operator
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Literal, Protocol

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from neuron_explainer.analysis.targets import Reading, Target
from neuron_explainer.errors import InputError, did_you_mean, shown
from neuron_explainer.kernels.graph_memory import saved_for_backward
from neuron_explainer.kernels.products import linear, product
from neuron_explainer.models.autoencoder import Autoencoder
from neuron_explainer.models.autoencoder_context import AutoencoderContext
from neuron_explainer.models.autoencoders.latents import Latents
from neuron_explainer.models.hooks import TransformerHooks
from neuron_explainer.models.language_model import Activations, LanguageModel
from neuron_explainer.models.locations import SITES, ActivationLocation, LocationLike
from neuron_explainer.models.transformer import Transformer
from neuron_explainer.models.weight_names import LayerIndex, WeightLocationType

Kind = Literal["embedding", "neuron", "head", "pair", "latent", "error", "bias"]
Freeze = Literal["final_norm", "norms", "patterns"]
"""What gradients do not flow through: the scale of the norm that reads the stream before the goal (the
final norm, for a target of the logits), of every norm, attention patterns."""
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
class Part:
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
    direction: Callable[[int], Tensor] | None = None
    """Of latents: from a place among the ``n`` to what 1 of the latent adds to the activation, ``[o]``."""

    def __post_init__(self) -> None:
        self.measures["act_grad"] = flat((self.value * self.gradient).sum(dim=-1))

    def node(self, index: int) -> Node:
        attended = int(self.attended[index])
        return Node(
            str(self.location),
            self.kind,
            int(self.unit[index]),
            int(self.position[index]),
            None if attended < 0 else attended,
        )

    def row_of(self, node: Node) -> int | None:
        """The place of a node of this kind and location among the ``n``; None if it is not there."""
        attended = -1 if node.attended is None else node.attended
        same = (self.unit == node.unit) & (self.position == node.position)
        found = np.flatnonzero(same & (self.attended == attended))
        return int(found[0]) if len(found) else None


# --- the goal, and one pass with gradients ---


@dataclass(frozen=True)
class Goal:
    """A number of one pass, of which gradients are taken."""

    name: str
    value: Callable[[Activations], Tensor]
    """From the captured activations to a tensor ``[]``. A target of the logits takes a batch as well, and
    returns the sum over its rows."""
    places: tuple[str, ...]
    """What has to be captured for it."""
    stream: str
    """The last residual stream before it."""
    norm: str
    """The norm that reads this stream, whose scale may be frozen."""
    hooks: TransformerHooks = field(default_factory=TransformerHooks)
    position: int | None = None
    """Where it is read; None: at the last token."""
    constant_at: str = "resid.post_ln_f"
    """The location by which the table calls what the goal has without any stream."""

    @classmethod
    def of_logits(cls, model: LanguageModel, target: Target, sees_logits: bool = False) -> "Goal":
        """A target of the last token's logits, or of all.

        Args:
            sees_logits: whether a hook is attached to the logits, which are then all computed.
        """

        # The unembedding of one token is far cheaper than that of all.
        last_only = isinstance(model, Transformer) and not target.every_position and not sees_logits

        def value(found: Activations) -> Tensor:
            logits = found["logits"] if target.every_position else last_logits(model, found)
            zero = torch.zeros(len(logits), dtype=torch.long, device=logits.device)
            pad = torch.zeros_like(found.tokens, dtype=torch.bool)
            reading = Reading(logits, zero, logits.detach(), found.tokens, pad)
            return target.unchanged(reading).sum()

        stream = f"{model.n_layers - 1}/resid.torso.post_mlp"
        place = "resid.post_ln_f" if last_only else "logits"
        return cls(target.name, value, (place,), stream, "resid.ln_f")


def last_logits(model: LanguageModel, found: Activations) -> Tensor:
    """``[1, v]`` after the last token, from captured logits or from the captured final norm."""
    if ActivationLocation("logits") in found:
        return found["logits"][:, -1]
    assert isinstance(model, Transformer)
    return linear(found["resid.post_ln_f"][:, -1], model.unembed)


class Memory(Protocol):
    """What is kept from one pass to another, of those who ask for many passes of the same prompt."""

    def run(
        self, wanted: Sequence[str], make: Callable[["tuple[Pass, int] | None"], "Pass"]
    ) -> "Pass":
        """A pass that was kept, or the one that ``make`` makes: afresh (None), or with the layers before
        one taken from a pass that did the same there."""

    def encoding(self, place: ActivationLocation, make: Callable[[], "Encoding"]) -> "Encoding":
        """The latents at a place that were kept, or those that ``make`` computes."""


class Pass:
    """The activations of one prompt, and the gradients of a goal with respect to them.

    Args:
        wanted: places, without layers, whose gradients are needed.
        freeze: what gradients do not flow through.
        hooks: interventions, which run before everything else at a place.
        positions: of which tokens the nodes are; None: of all.
        after: an earlier pass of the same prompt that keeps its graph, and the first layer that is to be
            run: what comes before it is the same in both.
        keep_graph: whether later passes may go on from this one.
    """

    def __init__(
        self,
        model: LanguageModel,
        tokens: Tensor,
        goal: Goal,
        wanted: Sequence[str],
        freeze: Sequence[Freeze],
        hooks: TransformerHooks | None = None,
        positions: Sequence[int] | None = None,
        after: "tuple[Pass, int] | None" = None,
        keep_graph: bool = False,
    ) -> None:
        self.model, self.tokens, self.goal = model, tokens, goal
        self.freeze, self.hooks = freeze, hooks
        self.positions = checked_positions(positions, tokens.shape[1])
        self.stream = ActivationLocation.parse(goal.stream)
        before = [place for place in _places(model, wanted) if is_before(place, self.stream)]
        hooks = (hooks or TransformerHooks()) + _leaf_at_embedding()
        places = [*before, self.stream, ActivationLocation("resid.post_emb")]
        for path in dict.fromkeys(place.path for place in places):
            hooks.append_at(path, _tracked)
        hooks = hooks + frozen_hooks(model, freeze, goal.norm) + goal.hooks
        captured: list[LocationLike] = [*places, *goal.places]
        if keep_graph:
            captured += _places(model, ["resid.torso.post_mlp"])
        with torch.enable_grad():
            if after is None:
                self.found = model.capture(tokens, captured, hooks=hooks)
            else:
                assert isinstance(model, Transformer)
                self.found = model.capture_from(after[1], after[0].found, captured, hooks)
            self.value = goal.value(self.found)
            places = list(dict.fromkeys(places))
            gradients = torch.autograd.grad(
                self.value,
                [self.found[place] for place in places],
                allow_unused=True,
                retain_graph=keep_graph or after is not None,
            )
        self.gradients: dict[ActivationLocation, Tensor] = {
            place: torch.zeros_like(self.found[place]) if gradient is None else gradient
            for place, gradient in zip(places, gradients, strict=True)
        }
        self.last_gradient = self.gradients[self.stream][0].double()
        """``[s, d]`` float64, of every position."""
        self.last_stream = self.found[self.stream][0].detach().double()

    def at(self, positions: Sequence[int] | None) -> "Pass":
        """The same pass, with nodes of other tokens."""
        found = copy.copy(self)
        found.positions = checked_positions(positions, self.tokens.shape[1])
        return found

    def tensors(self) -> list[Tensor]:
        """All that it holds, its graph included."""
        own = [*self.found.values(), *self.gradients.values()]
        return [*own, self.last_gradient, self.last_stream, *saved_for_backward([self.value])]

    def activation(self, place: str | ActivationLocation) -> Tensor:
        """``[p, …]`` float64: at the positions of the nodes."""
        return self.rows(self.found[place][0].detach()).double()

    def gradient(self, place: str | ActivationLocation) -> Tensor:
        """``[p, …]`` float64: at the positions of the nodes."""
        return self.rows(self.gradients[ActivationLocation.parse(place)][0]).double()

    def onto_goal(self, weight: Tensor) -> Tensor:
        """``[p, u]`` float64: what 1 of each unit adds to the goal past all later layers.

        ``weight`` ``[u, d]`` is what units write to the stream. Most often the goal reads the last stream
        at one position: only where it does is there anything to multiply.
        """
        gradient = self.rows(self.last_gradient)
        read = gradient.any(dim=1)
        found = gradient.new_zeros(len(gradient), len(weight))
        found[read] = (gradient[read].to(weight.dtype) @ weight.T).double()
        return found

    def rows(self, x: Tensor) -> Tensor:
        """``[s, …] -> [p, …]``: at the positions of the nodes."""
        every = len(self.positions) == len(x)
        return x if every else x[torch.from_numpy(self.positions).to(x.device)]


def check_list(given: object, name: str) -> None:
    """Refuse a text or a single value where several are expected."""
    if isinstance(given, str) or not isinstance(given, Iterable):
        raise InputError(f"{name} must be a list, found {shown(given)}.")


def checked_positions(positions: Sequence[int] | None, length: int) -> Ints:
    """Ascending positions ``[p]``, each once; None: all."""
    if positions is None:
        return np.arange(length)
    check_list(positions, "positions")
    try:
        chosen = sorted({operator.index(position) for position in positions})
    except TypeError:
        chosen = []
    if not chosen or chosen[0] < 0 or chosen[-1] >= length:
        raise InputError(
            f"positions are 0 to {length - 1} in this prompt, found {list(positions)}."
        )
    return np.array(chosen, dtype=np.int64)


def _tracked(x: Tensor) -> Tensor:
    """Gradients begin anew behind an intervention that leaves nothing of what came before."""
    return x if x.requires_grad else x.detach().requires_grad_()


def _places(model: LanguageModel, wanted: Sequence[str]) -> list[ActivationLocation]:
    parsed = [ActivationLocation.parse(path) for path in wanted]
    return [single for place in parsed for single in place.expand(model.n_layers)]


def is_before(place: ActivationLocation, stream: ActivationLocation) -> bool:
    """Whether a place of a layer lies before a place of the stream."""
    if stream.layer is None:  # the embedding
        return False
    order = list(SITES)
    here, there = (order.index(p.path) for p in (place, stream))
    return ((place.layer or 0), here) < (stream.layer, there)


def _leaf_at_embedding() -> TransformerHooks:
    """Gradients begin at the embedding, so that the parameters need none."""
    return TransformerHooks().append_at("resid.post_emb", lambda x: x.detach().requires_grad_())


_FROZEN: dict[Freeze, tuple[str, ...]] = {
    "final_norm": (),
    "norms": ("resid.ln_f.scale", "resid.torso.ln_attn.scale", "resid.torso.ln_mlp.scale"),
    "patterns": ("attn.qk_probs",),
}


def final_norm(model: LanguageModel) -> tuple[Freeze, ...]:
    """The ``freeze`` that makes direct effects linear: nothing where a model does not show the scale."""
    return ("final_norm",) if "resid.ln_f.scale" in model.paths else ()


def frozen_hooks(model: LanguageModel, freeze: Sequence[Freeze], norm: str) -> TransformerHooks:
    """Hooks that stop gradients as ``freeze`` says; ``norm`` is the one in front of the goal."""
    hooks = TransformerHooks()
    check_list(freeze, "freeze")
    if unknown := [name for name in freeze if name not in _FROZEN]:
        raise InputError(
            f"freeze takes {', '.join(_FROZEN)}; found {unknown[0]!r}."
            f"{did_you_mean(str(unknown[0]), list(_FROZEN))}"
        )
    paths = [path for name in freeze for path in _FROZEN[name]]
    if "final_norm" in freeze and "norms" not in freeze:
        paths.append(f"{norm}.scale")
    for path in dict.fromkeys(paths):
        if ActivationLocation.parse(path).path not in model.paths:
            raise InputError(
                f"{model.name} does not show {path}, so that it cannot be frozen; give freeze=(). With "
                "no frozen scale, direct effects do not sum to the target."
            )
        hooks.append_at(path, lambda x: x.detach())
    return hooks


# --- the parts of a model ---


def _grid(run: Pass, *shape: int) -> list[Ints]:
    """The position and the other indices of each node of ``[p, *shape]``."""
    first, *others = np.indices((len(run.positions), *shape), dtype=np.int64)
    return [run.positions[first].reshape(-1), *(axis.reshape(-1) for axis in others)]


def flat(x: Tensor) -> Floats:
    found: Floats = x.detach().double().cpu().numpy().reshape(-1)
    return found


def _written(run: Pass, position: Ints, writes: Tensor) -> Floats:
    """``direct`` ``[n]`` of writes ``[n, d]`` at positions ``[n]``."""
    return flat((writes * run.last_gradient[torch.from_numpy(position)]).sum(dim=-1))


def _vectors(
    run: Pass, place: ActivationLocation, kind: Kind, value: Tensor, write: Tensor
) -> Part:
    """One unit a position, a vector ``[s, n]`` that writes ``[s, d]``; ``activation`` is its length."""
    position, zeros = run.positions, np.zeros_like(run.positions)
    measures = {
        "activation": flat(value.norm(dim=-1)),
        "write_norm": flat(write.norm(dim=-1)),
        "direct": _written(run, position, write),
    }
    gradient = run.gradient(place).flatten(1)
    return Part(place, kind, zeros, position, zeros - 1, value, gradient, measures)


def _rest(run: Pass, path: str, layer: int, writes: Tensor) -> Part:
    """What a sublayer writes besides ``writes`` ``[s, d]``: its bias."""
    delta = ActivationLocation(path, layer)
    rest = run.activation(delta) - writes
    return _vectors(run, delta, "bias", rest, rest)


def _neurons(run: Pass, layer: int) -> Iterator[Part]:
    place = ActivationLocation("mlp.post_act", layer)
    weight = _weight(run.model, WeightLocationType.MLP_TO_RESIDUAL, layer)
    a = run.activation(place)
    position, unit = _grid(run, a.shape[1])
    measures = {
        "activation": flat(a),
        # As a product, which torch computes several times faster than a norm.
        "write_norm": flat(a * torch.linalg.vecdot(weight, weight).sqrt().double()),
        "direct": flat(a * run.onto_goal(weight)),
    }
    none = np.full_like(unit, -1)
    gradient = run.gradient(place)
    yield Part(
        place, "neuron", unit, position, none, a.reshape(-1, 1), gradient.reshape(-1, 1), measures
    )
    yield _rest(run, "resid.torso.delta_mlp", layer, (a.to(weight.dtype) @ weight).double())


def _weight(model: LanguageModel, kind: WeightLocationType, layer: LayerIndex) -> Tensor:
    """A weight in at least float32."""
    weight = model.weight(kind, layer).detach()
    return weight if weight.dtype is torch.float64 else weight.float()


def _heads(run: Pass, layer: int) -> Iterator[Part]:
    place = ActivationLocation("attn.v_out", layer)
    weight = run.model.weight(WeightLocationType.ATTN_TO_RESIDUAL, layer).detach().double()
    z = run.activation(place)  # [s, h, d_head]
    writes = torch.einsum("shc,hcd->shd", z, weight)
    position, unit = _grid(run, z.shape[1])
    norm = flat(writes.norm(dim=-1))
    measures = {
        "activation": norm,
        "write_norm": norm,
        "direct": _written(run, position, writes.flatten(0, 1)),
    }
    none = np.full_like(unit, -1)
    gradient = run.gradient(place).flatten(0, 1)
    yield Part(place, "head", unit, position, none, z.flatten(0, 1), gradient, measures)
    yield _rest(run, "resid.torso.delta_attn", layer, writes.sum(dim=1))


def _pairs(run: Pass, layer: int) -> Iterator[Part]:
    place = ActivationLocation("attn.qk_probs", layer)
    weight = run.model.weight(WeightLocationType.ATTN_TO_RESIDUAL, layer).detach().double()
    pattern = run.activation(place)
    v = run.found[ActivationLocation("attn.v", layer)][0].detach().double()
    written = torch.einsum("khc,hcd->khd", v, weight)
    last_gradient = run.last_gradient[torch.from_numpy(run.positions)]
    to_last = torch.einsum("khd,qd->qkh", written, last_gradient)
    position, attended, unit = _grid(run, *pattern.shape[1:])
    seen = attended <= position
    measures = {
        "activation": flat(pattern),
        "write_norm": flat(pattern * written.norm(dim=-1)),
        "direct": flat(pattern * to_last),
    }
    value, gradient = pattern.reshape(-1, 1), run.gradient(place).reshape(-1, 1)
    some = torch.from_numpy(seen)
    yield Part(
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


@dataclass
class Encoding:
    """What a dictionary sees at a place: the active latents of each token, ``n`` in all, and what they leave.

    Nothing here depends on the goal.
    """

    row: Tensor
    """``[n]``: of each active latent its token, as a place among the positions of the pass."""
    unit: Tensor
    value: Tensor
    """``[n]`` float64, as is ``scale``: what decoding multiplies the latent's direction by."""
    scale: Tensor
    write_norm: Floats
    rests: list[tuple[Kind, Tensor, Tensor]]
    """What is not latents, ``[p, n]`` each: its kind, its value, and what it writes to the stream."""
    written: Tensor | None
    """``[p, d]``: what a place inside a sublayer writes to the stream."""

    def tensors(self) -> list[Tensor]:
        """All that it holds."""
        rests = [x for _, value, write in self.rests for x in (value, write)]
        rests += [] if self.written is None else [self.written]
        return [self.row, self.unit, self.value, self.scale, *rests]


@torch.no_grad()
def _encoding(run: Pass, place: ActivationLocation, autoencoder: Autoencoder) -> Encoding:
    x = run.activation(place).flatten(1)
    code = autoencoder.code_sparse(x.to(autoencoder.device, autoencoder.dtype))
    row, slot = (code.latents.values != 0).nonzero(as_tuple=True)
    a, unit = code.latents.values[row, slot].double(), code.latents.indices[row, slot]
    # On the scale of the input: an autoencoder that normalises multiplies by a number for each token.
    scale = _scale(code, autoencoder, len(x))[row]
    lengths = _lengths(autoencoder.directions, unit, _stream_weight(run.model, place))
    error = x - code.decode(code.latents).double()
    bias = code.decode(_one_each(code.latents, 0.0)).double()
    to_stream = into_stream(run.model, place)
    rests: list[tuple[Kind, Tensor, Tensor]] = [
        ("error", error, to_stream(error)),
        ("bias", bias, to_stream(bias)),
    ]
    inside = to_stream(x) if place.path in _INSIDE else None
    return Encoding(row, unit, a, scale, flat(a * scale * lengths), rests, inside)


@torch.no_grad()
def _latents(
    run: Pass, place: ActivationLocation, autoencoder: Autoencoder, memory: Memory | None
) -> Iterator[Part]:
    assert place.layer is not None
    make = partial(_encoding, run, place, autoencoder)
    seen = make() if memory is None else memory.encoding(place, make)
    row, unit, scale = seen.row, seen.unit, seen.scale
    directions, weight = autoencoder.directions, _stream_weight(run.model, place)
    position = run.positions[row.cpu().numpy()]
    last = run.rows(run.last_gradient)
    last = last if weight is None else run.onto_goal(weight)
    measures = {
        "activation": flat(seen.value),
        "write_norm": seen.write_norm,
        "direct": flat(seen.value * scale * _products(directions, last, row, unit)),
    }
    none = np.full_like(position, -1)
    its_gradient = scale * _products(directions, run.gradient(place).flatten(1), row, unit)
    yield Part(
        place,
        "latent",
        unit.cpu().numpy(),
        position,
        none,
        seen.value[:, None],
        its_gradient[:, None],
        measures,
        lambda i: directions[unit[i]].double() * scale[i],
    )
    for kind, rest, write in seen.rests:
        yield _vectors(run, place, kind, rest, write)
    if seen.written is not None:
        yield _rest(run, _INSIDE[place.path], place.layer, seen.written)


def _products(directions: Tensor, vectors: Tensor, row: Tensor, unit: Tensor) -> Tensor:
    """``[n]`` float64: ``directions[unit] . vectors[row]``, of ``[l, o]`` and ``[p, o]``."""
    found = vectors.new_zeros(len(row))
    read = vectors.any(dim=1)[row]
    row, unit = row[read], unit[read]
    vectors = vectors.to(directions.dtype)
    if 2 * len(row) > len(directions):  # then one product of all is cheaper
        rows, index = _distinct(row, len(vectors))
        found[read] = product(vectors[rows], directions, None)[index, unit].double()
    else:
        found[read] = torch.linalg.vecdot(directions[unit], vectors[row]).double()
    return found


def _lengths(directions: Tensor, unit: Tensor, weight: Tensor | None) -> Tensor:
    """``[n]`` float64: the length of what each unit writes to the stream for 1 of its activation."""
    units, index = _distinct(unit, len(directions))
    rows = directions[units]
    rows = rows if weight is None else rows.to(weight.dtype) @ weight
    found: Tensor = torch.linalg.vecdot(rows, rows).double().sqrt()[index]
    return found


def _distinct(numbers: Tensor, end: int) -> tuple[Tensor, Tensor]:
    """The different numbers below ``end``, ascending, and where each is among them."""
    used = torch.zeros(end, dtype=torch.bool, device=numbers.device)
    used[numbers] = True
    return used.nonzero()[:, 0], used.cumsum(0)[numbers] - 1


_INSIDE = {"mlp.post_act": "resid.torso.delta_mlp", "attn.v_out": "resid.torso.delta_attn"}
"""Where what is inside a sublayer is written to the stream."""


def _one_each(latents: Latents, value: float) -> Latents:
    """Latent 0 of every row at a value, and no other."""
    values = torch.full_like(latents.values[:, :1], value)
    return Latents(values, torch.zeros_like(latents.indices[:, :1]), latents.n_latents)


def _scale(code: Any, autoencoder: Autoencoder, n_tokens: int) -> Tensor:
    """``[s]``: what decoding multiplies a decoder row by."""
    # Not from the decoded change of one latent: a latent that was left out has a row of zeros.
    zeros = autoencoder.directions.new_zeros(n_tokens, autoencoder.n_outputs)
    change = autoencoder.denormalize(zeros + 1, code.stats) - autoencoder.denormalize(
        zeros, code.stats
    )
    return change[:, 0].double()


def into_stream(model: LanguageModel, place: ActivationLocation) -> Callable[[Tensor], Tensor]:
    """From vectors ``[…, n]`` at a place to what they write into the residual stream ``[…, d]``."""
    weight = _stream_weight(model, place)
    if weight is None:
        return lambda x: x
    matrix = weight.double()
    return lambda x: x @ matrix


def _stream_weight(model: LanguageModel, place: ActivationLocation) -> Tensor | None:
    """``[n, d]``: what stands between a place and the stream that it is added to; None for nothing."""
    if place.path == "mlp.post_act":
        return _weight(model, WeightLocationType.MLP_TO_RESIDUAL, place.layer)
    if place.path == "attn.v_out":
        return _weight(model, WeightLocationType.ATTN_TO_RESIDUAL, place.layer).flatten(0, 1)
    if place.path in ("resid.torso.delta_mlp", "resid.torso.delta_attn"):
        return None
    raise InputError(
        f"latents of {place} are no part of a sum that makes the stream; expected an autoencoder of "
        "mlp.post_act, attn.v_out, resid.torso.delta_mlp or resid.torso.delta_attn."
    )


MLP_PLACES = ("mlp.post_act", "resid.torso.delta_mlp")


def all_parts(
    run: Pass,
    attention: str,
    autoencoders: Mapping[bool, AutoencoderContext],
    memory: Memory | None = None,
) -> list[Callable[[], list[Part]]]:
    """Every part before the goal once: their writes sum to the last residual stream before it, at the
    positions of the pass.

    Functions that compute them, in the order of the model: one for the embedding, for each sublayer and
    for the goal's constant.
    """
    found: list[Callable[[], list[Part]]] = [lambda: _embedding(run)]
    for layer in range(run.model.n_layers):
        for is_mlp, delta in ((False, "resid.torso.delta_attn"), (True, "resid.torso.delta_mlp")):
            if not is_before(ActivationLocation(delta, layer), run.stream):
                continue
            context = autoencoders.get(is_mlp)
            if context is not None and context.layer_indices & {layer, None}:
                found.append(partial(_of_dictionary, run, layer, context, memory))
            elif is_mlp:
                found.append(partial(_listed, _neurons, run, layer))
            else:
                found.append(
                    partial(_listed, _pairs if attention == "pairs" else _heads, run, layer)
                )
    return [*found, lambda: [_constant(run)]]


def _embedding(run: Pass) -> list[Part]:
    place = ActivationLocation("resid.post_emb")
    embedding = run.activation(place)
    return [_vectors(run, place, "embedding", embedding, embedding)]


def _listed(make: Callable[[Pass, int], Iterator[Part]], run: Pass, layer: int) -> list[Part]:
    return list(make(run, layer))


def _of_dictionary(
    run: Pass, layer: int, context: AutoencoderContext, memory: Memory | None
) -> list[Part]:
    place, autoencoder = context.location.at(layer), context.get_autoencoder(layer)
    return list(_latents(run, place, autoencoder, memory))


def wanted_places(
    model: LanguageModel, attention: str, autoencoders: Mapping[bool, AutoencoderContext]
) -> list[str]:
    inside = ["attn.qk_probs", "attn.v"] if attention == "pairs" else ["attn.v_out"]
    paths = [*inside, "resid.torso.delta_attn", "mlp.post_act", "resid.torso.delta_mlp"]
    paths += [context.location.path for context in autoencoders.values()]
    for path in paths:
        model.require(path)
    return list(dict.fromkeys(paths))


def _constant(run: Pass) -> Part:
    """What the goal has without any stream: the biases on the way to it, where that way is linear."""
    place = ActivationLocation.parse(run.goal.constant_at)
    rest = float(run.value.detach().double() - (run.last_stream * run.last_gradient).sum())
    position = run.tokens.shape[1] - 1 if run.goal.position is None else run.goal.position
    last, zero = np.array([position]), np.zeros(1)
    measures = {"activation": zero, "write_norm": zero, "direct": np.array([rest])}
    nothing = torch.zeros(1, 1, dtype=torch.float64)
    first = np.zeros(1, dtype=np.int64)
    return Part(place, "bias", first, last, first - 1, nothing, nothing, measures)
