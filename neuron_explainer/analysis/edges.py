"""Edge attribution: how much each connection between two parts of a model matters for a target.

    scores = edge_attribution(model, prompts, corrupt, logit_difference(model, " Mary", " John"))

A model is read as a graph. Its **sources** write to the residual stream: the embedding ("input"), heads
("a0.h1") and MLPs ("m0"). Its **destinations** read the stream: the query, key and value input of each head
("a1.h0<q>", "a1.h0<k>", "a1.h0<v>"), MLPs and the logits. An edge goes from each source to each destination
after it: ``input->a1.h0<q>``, ``a0.h1->m3``, ``m2->logits``. What biases of attention write is in every
input and belongs to no edge.

Edge attribution patching (EAP; Nanda 2023, Syed et al. 2023) estimates what happens to the target if one edge
alone carries the source's output in a corrupted prompt:

    score = sum over positions and channels of (corrupt - clean output of the source)
            * gradient of the target with respect to the destination's input, at the clean prompt

as a mean over pairs of prompts. All edges together take one pass on each prompt and one backward pass. With
``ig_steps`` the gradient is a mean over points on the line between the two embeddings (EAP-IG-inputs; Hanna
et al. 2024), which sees through a saturated softmax.

Shape legend: ``p`` pairs of prompts, ``s`` positions, ``h`` heads, ``d`` model width, ``i`` sources, ``j``
destinations, ``v`` vocabulary.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from neuron_explainer.analysis.node_parts import Freeze, frozen_hooks
from neuron_explainer.analysis.targets import Metric, Reading, Target, as_target, with_gradient
from neuron_explainer.errors import InputError, did_you_mean, optional_module
from neuron_explainer.models.checks import check_count
from neuron_explainer.models.hooks import TransformerHooks
from neuron_explainer.models.language_model import LanguageModel, Prompts
from neuron_explainer.models.locations import ActivationLocation
from neuron_explainer.models.transformer import Norm, Transformer
from neuron_explainer.models.weight_names import WeightLocationType
from neuron_explainer.tables import text_table

__all__ = ["EdgeGraph", "EdgeScores", "edge_attribution"]

Floats = npt.NDArray[np.float64]
Bools = npt.NDArray[np.bool_]
QKV_WEIGHTS = (
    WeightLocationType.ATTN_TO_QUERY,
    WeightLocationType.ATTN_TO_KEY,
    WeightLocationType.ATTN_TO_VALUE,
)


# --- the graph ---


@dataclass(frozen=True)
class EdgeGraph:
    """The sources, destinations and edges of a model of some size."""

    n_layers: int
    n_heads: int

    @classmethod
    def of(cls, model: LanguageModel) -> "EdgeGraph":
        """That of a model, which must be neuron_explainer's own ``Transformer``."""
        own_transformer(model)
        n_heads = ActivationLocation.parse("attn.qk_probs").site.width(model.sizes.__getitem__)
        return cls(model.n_layers, n_heads)

    @cached_property
    def sources(self) -> tuple[str, ...]:
        """Names in the order of a forward pass: "input", and in each layer its heads and its MLP."""
        names = ["input"]
        for layer in range(self.n_layers):
            names += [f"a{layer}.h{head}" for head in range(self.n_heads)]
            names.append(f"m{layer}")
        return tuple(names)

    @cached_property
    def destinations(self) -> tuple[str, ...]:
        """Names in the order of a forward pass: in each layer its heads' inputs and its MLP, "logits"."""
        names = []
        for layer in range(self.n_layers):
            names += [
                f"a{layer}.h{head}<{letter}>" for head in range(self.n_heads) for letter in "qkv"
            ]
            names.append(f"m{layer}")
        return (*names, "logits")

    def attention_columns(self, layer: int) -> slice:
        """Where the inputs of a layer's heads stand among the destinations: q, k, v of head 0, …"""
        begin = layer * (3 * self.n_heads + 1)
        return slice(begin, begin + 3 * self.n_heads)

    def mlp_column(self, layer: int) -> int:
        """Where a layer's MLP stands among the destinations."""
        return layer * (3 * self.n_heads + 1) + 3 * self.n_heads

    def before_attention(self, layer: int) -> int:
        """How many sources come before a layer's attention; ``layer = n_layers``: before the logits."""
        return 1 + layer * (self.n_heads + 1)

    @cached_property
    def exists(self) -> Bools:
        """Bool ``[i, j]``: which pairs of a source and a destination are edges."""
        found = np.zeros((len(self.sources), len(self.destinations)), dtype=bool)
        for layer in range(self.n_layers):
            n = self.before_attention(layer)
            found[:n, self.attention_columns(layer)] = True
            found[: n + self.n_heads, self.mlp_column(layer)] = True
        found[:, -1] = True
        return found

    def __len__(self) -> int:
        return int(self.exists.sum())

    def name(self, source: int, destination: int) -> str:
        """Such as ``a0.h1->m3``."""
        return f"{self.sources[source]}->{self.destinations[destination]}"

    @cached_property
    def _places(self) -> dict[str, tuple[int, int]]:
        pairs = np.argwhere(self.exists).tolist()
        return {self.name(i, j): (i, j) for i, j in pairs}

    @property
    def edges(self) -> list[str]:
        """The names of all edges."""
        return list(self._places)

    def place(self, edge: str) -> tuple[int, int]:
        """The numbers of an edge's source and destination; an InputError if there is no such edge."""
        if edge not in self._places:
            raise InputError(
                f"the model has no edge {edge!r}.{did_you_mean(str(edge), self.edges)} Edges go from "
                f"a source such as {self.sources[-1]!r} to a later destination such as 'logits', and "
                "into a head by <q>, <k> or <v>."
            )
        return self._places[edge]

    def node_of(self, destination: int) -> int | None:
        """The number of the source to which a destination belongs; None for the logits."""
        name = self.destinations[destination].partition("<")[0]
        return None if name == "logits" else self.sources.index(name)


def own_transformer(model: LanguageModel) -> Transformer:
    """The model, if each head's inputs can be told apart in it; an InputError otherwise."""
    if not isinstance(model, Transformer):
        raise InputError(
            "this needs the query, key and value of each head and the scales of norms, which only "
            f"neuron_explainer's own Transformer shows, found {model.name}. A GPT-2 is opened as one by "
            "Transformer.load or open_model. With other models, nodes (freeze=()) and token_pairs estimate "
            "what heads do, and sweep with heads(model) measures it."
        )
    return model


# --- pairs of prompts, and what the sources write on them ---


@dataclass(frozen=True)
class Batch:
    """Some prompts, padded on the right."""

    tokens: Tensor
    """``[p, s]``"""
    pad: Tensor
    """``[p, s]`` bool"""
    prompt: Tensor
    """``[p]``: the number of each prompt among all."""

    def last(self, x: Tensor) -> Tensor:
        """``[p, s, …] -> [p, …]``: what stands at each row's last token."""
        lengths = (~self.pad).sum(dim=1)
        return x[torch.arange(len(x), device=x.device), lengths - 1]


def paired(
    model: LanguageModel, prompts: Prompts, corrupt: Prompts, bos: bool | int
) -> tuple[Batch, Batch]:
    """Two batches whose rows are pairs of prompts of equal lengths."""
    ids, others = model.prompt_ids(prompts, bos), model.prompt_ids(corrupt, bos)
    if len(ids) != len(others):
        raise InputError(
            f"expected one corrupt prompt for each of {len(ids)}, found {len(others)}."
        )
    for number, (row, other) in enumerate(zip(ids, others, strict=True)):
        if len(row) != len(other):
            raise InputError(
                f"the prompts of pair {number} have {len(row)} and {len(other)} tokens; edges are "
                "compared position by position, so both must have the same number."
            )
    return whole_batch(model, ids), whole_batch(model, others)


def whole_batch(model: LanguageModel, ids: list[list[int]]) -> Batch:
    """All prompts as one batch."""
    tokens, pad = model.to_batch(ids)
    pad = torch.zeros_like(tokens, dtype=torch.bool) if pad is None else pad
    return Batch(tokens, pad, torch.arange(len(tokens), device=tokens.device))


def in_batches(both: tuple[Batch, Batch], batch_tokens: int) -> Iterator[tuple[Batch, Batch]]:
    """Pairs in batches of at most ``batch_tokens`` tokens, but of at least one pair."""
    check_count(batch_tokens, "batch_tokens")
    n_rows, length = both[0].tokens.shape
    step = max(1, batch_tokens // length)
    for start in range(0, n_rows, step):
        rows = slice(start, start + step)
        first, second = (Batch(b.tokens[rows], b.pad[rows], b.prompt[rows]) for b in both)
        yield first, second


@dataclass(frozen=True)
class Outputs:
    """What each source writes on a batch, kept small: heads before their output matrix."""

    embedding: Tensor
    """``[p, s, d]``"""
    heads: list[Tensor]
    """For each layer ``[p, s, h, d_head]``."""
    mlps: list[Tensor]
    """For each layer ``[p, s, d]``."""
    normed: Tensor
    """``[p, s, d]``: what the unembedding reads."""

    @classmethod
    def of(cls, model: Transformer, batch: Batch) -> "Outputs":
        """Those of an unchanged pass."""
        found = model.capture(
            batch.tokens,
            ["resid.post_emb", "attn.v_out", "resid.torso.delta_mlp", "resid.post_ln_f"],
            batch.pad,
        )
        layers = range(model.n_layers)
        return cls(
            found["resid.post_emb"],
            [found[f"{layer}/attn.v_out"] for layer in layers],
            [found[f"{layer}/resid.torso.delta_mlp"] for layer in layers],
            found["resid.post_ln_f"],
        )

    def minus(self, other: "Outputs", model: Transformer) -> Tensor:
        """``[i, p, s, d]``: the difference of what each source writes in two passes."""
        parts = [(self.embedding - other.embedding)[None]]
        for layer in range(model.n_layers):
            parts.append(head_writes(model, layer, self.heads[layer] - other.heads[layer]))
            parts.append((self.mlps[layer] - other.mlps[layer])[None])
        return torch.cat(parts)


def head_writes(model: Transformer, layer: int, z: Tensor) -> Tensor:
    """``[p, s, h, d_head] -> [h, p, s, d]``: what heads write to the stream, without the bias."""
    weight = model.weight(WeightLocationType.ATTN_TO_RESIDUAL, layer).detach()
    return torch.einsum("pshc,hcd->hpsd", z, weight)


def read_target(
    model: Transformer, target: Target, normed: Tensor, batch: Batch, clean: Tensor | None
) -> tuple[Tensor, Tensor]:
    """The target ``[p]`` from what the unembedding reads ``[p, s, d]``, and the logits that it is of.

    ``clean`` are the logits of the unchanged pass; None if this is that pass. Only the last token's
    logits are computed, unless the target reads others.
    """
    logits = model.unembed(normed if target.every_position else batch.last(normed))
    baseline = logits.detach() if clean is None else clean
    reading = Reading(logits, batch.prompt, baseline, batch.tokens, batch.pad)
    return target.unchanged(reading) if clean is None else target(reading), logits


# --- the scores ---


@dataclass(frozen=True, repr=False)
class EdgeScores:
    """A score for each edge."""

    graph: EdgeGraph
    values: Floats
    """``[i, j]``: the estimated change of the target if the edge alone is corrupted, mean over pairs of
    prompts; 0 where there is no edge."""
    clean: float
    """The target on the prompts, mean."""
    corrupt: float
    """The target on the corrupt prompts, mean."""
    target_name: str
    method: str

    def score(self, edge: str) -> float:
        """The score of an edge, such as ``a0.h1->m3``."""
        return float(self.values[self.graph.place(edge)])

    def order(self) -> npt.NDArray[np.int64]:
        """``[n, 2]``: all edges by size of their score, the largest first; ties in the graph's order."""
        places = np.argwhere(self.graph.exists)
        sizes = np.abs(self.values[self.graph.exists])
        return places[np.argsort(-sizes, kind="stable")]

    def top(self, k: int = 10) -> list[tuple[str, float]]:
        """The ``k`` edges with the largest scores of either sign, and these scores."""
        return [(self.graph.name(i, j), float(self.values[i, j])) for i, j in self.order()[:k]]

    def to_dataframe(self) -> Any:
        """One row an edge (needs pandas)."""
        pandas = optional_module("pandas", "a data frame")
        rows = [
            {
                "edge": self.graph.name(i, j),
                "source": self.graph.sources[i],
                "destination": self.graph.destinations[j],
                "score": float(self.values[i, j]),
            }
            for i, j in np.argwhere(self.graph.exists).tolist()
        ]
        return pandas.DataFrame(rows)

    def __repr__(self) -> str:
        head = (
            f"{self.method}: {len(self.graph):,} edges; {self.target_name} is {self.clean:.4g}, on the "
            f"corrupt prompts {self.corrupt:.4g}. Estimated change if one edge is corrupted:"
        )
        rows = [[edge, f"{score:+.4f}"] for edge, score in self.top()]
        return "\n".join([head, text_table(["edge", "score"], rows, rule=True)])


def edge_attribution(
    model: LanguageModel,
    prompts: Prompts,
    corrupt: Prompts,
    target: Metric,
    *,
    ig_steps: int | None = None,
    freeze: Sequence[Freeze] = (),
    bos: bool | int = False,
    batch_tokens: int = 512,
) -> EdgeScores:
    """Score every edge by edge attribution patching; see the module's docstring.

    Args:
        prompts: as ``sample`` takes them.
        corrupt: for each prompt one of as many tokens, such as the same with another name.
        target: what the scores are changes of.
        ig_steps: None: gradients at the clean prompt (EAP). ``m``: their mean over the points
            ``corrupt + k / m * (clean - corrupt)`` of the embedding, ``k = 0 … m - 1`` (EAP-IG-inputs;
            5 is usual).
        freeze: what gradients do not flow through: "norms" the scales of all norms, "final_norm" that of
            the final norm, "patterns" attention. As published, nothing is frozen: an input counts with its
            effect on the scale of the norm that reads it.
        bos: prepend the start token.
        batch_tokens: most tokens in a batch. Memory grows with it: for GPT-2 small about 1.5 MB a token.
    """
    own, graph = own_transformer(model), EdgeGraph.of(model)
    # Between the two prompts a distance from the clean one has a gradient; at the clean one it has none.
    target = with_gradient(target, "EAP") if ig_steps is None else as_target(target)
    hooks = frozen_hooks(own, freeze, "resid.ln_f")
    if ig_steps is not None:
        check_count(ig_steps, "ig_steps")
    both = paired(model, prompts, corrupt, bos)
    values = np.zeros(graph.exists.shape)
    means = np.zeros(2)
    for clean, other in in_batches(both, batch_tokens):
        with torch.no_grad():
            here, there = Outputs.of(own, clean), Outputs.of(own, other)
            found, logits = read_target(own, target, here.normed, clean, None)
            means += [
                float(found.sum()),
                float(read_target(own, target, there.normed, clean, logits)[0].sum()),
            ]
            change = there.minus(here, own).flatten(1)
        for share in [1.0] if ig_steps is None else [k / ig_steps for k in range(ig_steps)]:
            point = torch.lerp(there.embedding, here.embedding, share)
            for columns, gradient in _input_gradients(own, clean, target, point, logits, hooks):
                n = int(graph.exists[:, columns.start].sum())
                found = change[:n] @ gradient.flatten(1).to(change.dtype).T
                values[:n, columns] += found.double().cpu().numpy()
    n_pairs = len(both[0].tokens)
    method = "EAP" if ig_steps is None else f"EAP-IG-inputs with {ig_steps} steps"
    method += f", frozen: {', '.join(freeze)}" if freeze else ""
    clean_mean, corrupt_mean = (means / n_pairs).tolist()
    values /= n_pairs * (ig_steps or 1)
    return EdgeScores(graph, values, clean_mean, corrupt_mean, target.name, method)


def _input_gradients(
    model: Transformer,
    batch: Batch,
    target: Target,
    embedding: Tensor,
    clean: Tensor,
    hooks: TransformerHooks,
) -> Iterator[tuple[slice, Tensor]]:
    """Gradients of the target's sum with respect to each destination's input ``[columns, p, s, d]``.

    Heads share the norm's output, so a head's own share is its query's (key's, value's) gradient through
    the weights. The norm's derivative is the same linear map for all of them.
    """
    layers = range(model.n_layers)
    streams = ["resid.post_emb", "resid.torso.post_attn", "resid.torso.post_mlp"]
    readers = ["attn.q", "attn.k", "attn.v", "resid.torso.post_ln_mlp", "resid.post_ln_f"]
    leaf = embedding.detach().requires_grad_()
    with torch.enable_grad():
        start = TransformerHooks().append_at("resid.post_emb", lambda _: leaf)
        found = model.capture(batch.tokens, [*streams, *readers], batch.pad, start + hooks)
        value, _ = read_target(model, target, found["resid.post_ln_f"], batch, clean)
        places = [place for place in found if place.path in readers]
        gradients = torch.autograd.grad(
            value.sum(), [found[place] for place in places], allow_unused=True
        )
    by_place = {
        str(place): torch.zeros_like(found[place]) if gradient is None else gradient
        for place, gradient in zip(places, gradients, strict=True)
    }
    frozen = "resid.torso.ln_attn.scale" in _hooked(hooks)
    graph = EdgeGraph.of(model)
    blocks = list(model.layers)
    with torch.no_grad():
        for layer in layers:
            before = f"{layer - 1}/resid.torso.post_mlp" if layer else "resid.post_emb"
            normed = _through_weights(model, layer, by_place)
            stream = found[before].detach()
            yield (
                graph.attention_columns(layer),
                through_norm(blocks[layer].ln_1, stream, normed, frozen),
            )
            stream = found[f"{layer}/resid.torso.post_attn"].detach()
            normed = by_place[f"{layer}/resid.torso.post_ln_mlp"][None]
            column = graph.mlp_column(layer)
            yield (
                slice(column, column + 1),
                through_norm(blocks[layer].ln_2, stream, normed, frozen),
            )
        stream = found[f"{layers[-1]}/resid.torso.post_mlp"].detach()
        frozen = "resid.ln_f.scale" in _hooked(hooks)
        normed = by_place["resid.post_ln_f"][None]
        n = len(graph.destinations)
        yield slice(n - 1, n), through_norm(model.final_ln, stream, normed, frozen)


def _hooked(hooks: TransformerHooks) -> set[str]:
    """The places at which hooks are."""
    return {path.rpartition(".")[0] for path, leaf in hooks.leaves() if not leaf.is_empty()}


def _through_weights(model: Transformer, layer: int, gradients: dict[str, Tensor]) -> Tensor:
    """``[3 * h, p, s, d]``: gradients with respect to the norm's output, for each input of each head."""
    scale = list(model.layers)[layer].attn.qk_scale
    parts = []
    for letter, kind, factor in zip("qkv", QKV_WEIGHTS, (scale, scale, 1.0), strict=True):
        weight = model.weight(kind, layer).detach()  # [h, d, d_head]
        gradient = gradients[f"{layer}/attn.{letter}"] * factor
        parts.append(torch.einsum("pshc,hdc->hpsd", gradient, weight))
    return torch.stack(parts, dim=1).flatten(0, 1)


def through_norm(norm: Norm, x: Tensor, gradient: Tensor, frozen: bool) -> Tensor:
    """``[…, p, s, d]``: gradients with respect to a norm's input ``x`` from those of its output.

    With ``frozen``, the scale that the norm divides by counts as a constant.
    """
    dtype = torch.promote_types(x.dtype, torch.float32)
    x = x.to(dtype)
    centered = x - x.mean(dim=-1, keepdim=True)
    scale = (centered.square().mean(dim=-1, keepdim=True) + norm.eps).sqrt()
    gradient = gradient.to(dtype) * norm.weight.detach().to(dtype)
    if not frozen:
        normed = centered / scale
        gradient = gradient - normed * (gradient * normed).mean(dim=-1, keepdim=True)
    return (gradient - gradient.mean(dim=-1, keepdim=True)) / scale
