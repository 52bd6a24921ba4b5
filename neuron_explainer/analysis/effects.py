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
- ``integrated``: the same with the mean gradient on the way from 0 to the location's activation, in
  ``ig_steps`` steps (integrated gradients, see :mod:`~neuron_explainer.analysis.node_integrals`);
- ``patching``: the estimate of setting ``a`` to its value ``b`` in a second prompt (attribution patching,
  Nanda 2023; Kramár et al. 2024): ``(b - a)`` times the gradient;
- ``integrated_patching``: the same with the mean gradient on the way from the second prompt's activation;
- ``ablation``: measured, not estimated: target minus target with the unit set to 0.

An autoencoder is not spliced in: its latents are read off the activation, and since the error is kept,
the gradient with respect to a latent is the activation's gradient times the decoder's row. So only
active latents cost anything.

Shape legend: ``s`` positions, ``k`` attended positions, ``h`` heads, ``u`` units, ``d`` model width.
"""

import math
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from neuron_explainer.analysis.node_integrals import (
    Baseline,
    averaged_pass,
    from_other,
    from_zero,
)
from neuron_explainer.analysis.node_parts import (
    MLP_PLACES,
    Floats,
    Freeze,
    Goal,
    Ints,
    Kind,
    Memory,
    Node,
    Part,
    Pass,
    all_parts,
    check_list,
    flat,
    into_stream,
    wanted_places,
)
from neuron_explainer.analysis.sweeps import sweep
from neuron_explainer.analysis.targets import Metric, Target, as_target, token_texts, with_gradient
from neuron_explainer.errors import InputError, did_you_mean, optional_module
from neuron_explainer.models.autoencoder_context import AutoencoderContext
from neuron_explainer.models.checks import check_count
from neuron_explainer.models.hooks import TransformerHooks
from neuron_explainer.models.interventions import ablate, add, align
from neuron_explainer.models.language_model import LanguageModel
from neuron_explainer.models.locations import ActivationLocation
from neuron_explainer.models.weight_names import WeightLocationType
from neuron_explainer.tables import escaped, percent, text_table

__all__ = [
    "MEASURES",
    "Effects",
    "Freeze",
    "Kind",
    "Node",
    "NodeTable",
    "TokenEffects",
    "aligned_nodes",
    "nodes",
]

MEASURES = (
    "activation",
    "write_norm",
    "direct",
    "act_grad",
    "integrated",
    "patching",
    "integrated_patching",
    "ablation",
)
OF_ONE_PASS = ("activation", "write_norm", "direct", "act_grad")
"""The measures that one pass of one prompt gives."""


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
        """The nodes' share of the sum of a measure over all nodes; NaN if that sum is 0."""
        total = self.totals[measure]
        return float(self.values[measure].sum() / total) if total else float("nan")

    def order(self, by: str) -> list[int]:
        """Row numbers by size of a measure, the largest first, either sign."""
        return [int(i) for i in np.argsort(-np.abs(self.values[by]), kind="stable")]

    def to_dataframe(self) -> Any:
        """One row a node (needs pandas)."""
        pandas = optional_module("pandas", "a data frame")
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
            explained(name, float(self.values[name].sum()), self.totals[name])
            for name in ("direct", "act_grad", "integrated")
            if name in self.values
        ]
        said = f"; they explain {' and '.join(share)}" if share else ""
        lines.append(f"{len(self.nodes)} nodes shown{said}.")
        if self.rank_correlation is not None:
            lines.append(rank_agreement(self.rank_correlation))
        rows = []
        for i in self.order(by)[:20]:
            node = self.nodes[i]
            token = escaped(repr(self.tokens[node.position]))
            rows.append([str(node), token, *(f"{v[i]:+.4f}" for v in self.values.values())])
        lines.append(text_table(["node", "token", *self.values], rows, n_left=2, rule=True))
        return "\n".join(lines)


def explained(measure: str, shown: float, total: float) -> str:
    """How much of a measure's sum over all nodes belongs to those shown: their share, or both sums where
    large parts of either sign cancel, so that a share would say little."""
    if not total:
        return f"{shown:+.3g} of {measure}, which sums to 0 over all nodes"
    if not 0 <= shown / total <= 1.5 and math.isfinite(shown / total):
        return f"{shown:+.3g} of {measure}'s {total:+.3g}"
    return f"{percent(shown / total)} of {measure}"


def rank_agreement(correlation: float) -> str:
    """A line about the rank correlation of ``act_grad`` with ``ablation``."""
    undefined = "undefined, because one of the two is the same at every node"
    found = undefined if math.isnan(correlation) else f"{correlation:.2f}"
    return f"Rank correlation of act_grad with ablation: {found}."


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
    positions: Sequence[int] | None = None,
    hooks: TransformerHooks | None = None,
    ig_steps: int = 8,
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
        positions: of which tokens of the prompt the nodes are; None: of all. Only these are encoded by
            autoencoders, and totals are sums over them.
        hooks: interventions under which everything is measured, on both prompts.
        ig_steps: of the measures that integrate, which take this many passes for each location.
    """
    check_measures(measures, top_k, prompt_b)
    if "ablation" in measures and hooks is not None:
        raise InputError("ablation is measured on the unchanged model: leave hooks out.")
    settings: dict[str, Any] = {"attention": attention, "autoencoders": autoencoders}
    settings |= {"freeze": freeze, "bos": bos, "hooks": hooks}
    first = Effects(model, prompt, target, positions=positions, **settings)
    if prompt_b is not None:
        second = Effects(model, prompt_b, target, **settings)
        _compare(first, second, ig_steps if "integrated_patching" in measures else None)
    if "integrated" in measures:
        _take(first.parts, "integrated", first.averaged(ig_steps, from_zero), "act_grad")
    chosen = choose(first.parts, measures, top_k)
    table = table_of(first.run, first.parts, chosen, measures)
    if "ablation" in measures:
        table = _with_ablation(table, first.run, chosen, as_target(target), autoencoders)
    if prompt_b is not None:
        other = {
            name: np.array([part.measures[f"{name} (second)"][i] for part, i in chosen])
            for name in _OF_SECOND
        }
        table = replace(table, other=other)
    return table


@dataclass(frozen=True)
class TokenEffects:
    """What each token of a prompt contributes: the sum of ``act_grad`` over the units at its position."""

    embedding: Floats
    """``[s]``, as are the others."""
    mlp: Floats
    """Of the neurons at the position."""
    attention_from: Floats
    """Of the heads at the position, which look from it at earlier ones."""
    attention_to: Floats
    """Of the same, counted at the position that a head looks at. Both sum to the same."""


class Effects:
    """One pass of a prompt with the gradients of a target: tables and token effects are read from it.

    :func:`nodes` makes one, reads one table and drops it. Who needs several tables, or the values of given
    nodes, keeps it.

    Args:
        target: of the logits, or the value of a node (:func:`~neuron_explainer.analysis.trace.goal_of`).
        positions: of which tokens the nodes are; None: of all. Only these are encoded by autoencoders, and
            totals are sums over them.
        hooks: interventions under which everything is measured.
        of_tokens: also keep what :meth:`of_tokens` needs.
        at_once: compute all parts now. Otherwise each sublayer is computed when it is first asked for, and
            the model and its autoencoders must stay as they are until then.
        memory: what is kept from one pass to another.

    The other arguments are those of :func:`nodes`.
    """

    def __init__(
        self,
        model: LanguageModel,
        prompt: str | Sequence[int],
        target: Metric | Goal,
        *,
        attention: Literal["heads", "pairs"] = "heads",
        autoencoders: Sequence[AutoencoderContext] = (),
        freeze: Sequence[Freeze] = ("final_norm",),
        bos: bool | int = False,
        positions: Sequence[int] | None = None,
        hooks: TransformerHooks | None = None,
        of_tokens: bool = False,
        at_once: bool = True,
        memory: Memory | None = None,
    ) -> None:
        kinds = _by_kind(model, attention, autoencoders)
        if isinstance(target, Node):
            raise InputError(f"{target}: what makes a node is traced: trace(model, prompt, node).")
        if not isinstance(target, Goal):
            sees_logits = hooks is not None and not hooks.logits.is_empty()
            target = with_gradient(target, "the table of nodes")
            target = Goal.of_logits(model, target, sees_logits)
        wanted = wanted_places(model, attention, kinds)
        if of_tokens:
            model.require("attn.v")
            wanted = list(dict.fromkeys([*wanted, "attn.v", "attn.v_out"]))
        tokens = one_prompt(model, prompt, bos)
        goal = target

        def make(after: tuple[Pass, int] | None = None, keep_graph: bool = True) -> Pass:
            return Pass(
                model, tokens, goal, wanted, freeze, hooks, positions, after, keep_graph=keep_graph
            )

        if memory is None:
            self.run = make(keep_graph=False)
        else:
            self.run = memory.run(wanted, make).at(positions)
        self._all_parts = partial(all_parts, attention=attention, autoencoders=kinds)
        self._coming = self._all_parts(self.run, memory=memory)
        self._known: list[list[Part]] = []
        if at_once:
            list(self.sublayers())

    def sublayers(self) -> Iterator[list[Part]]:
        """The parts of the model in its order, those of a sublayer together."""
        for number, compute in enumerate(self._coming):
            if number == len(self._known):
                self._known.append(compute())
            yield self._known[number]

    @property
    def n_sublayers(self) -> int:
        """How many lists :meth:`sublayers` gives."""
        return len(self._coming)

    @property
    def parts(self) -> list[Part]:
        """All parts of the model."""
        return [part for parts in self.sublayers() for part in parts]

    def averaged(self, steps: int, baseline: Baseline) -> list[Part]:
        """The parts with gradients that are means on the way from a baseline, in ``steps`` steps."""
        moved = averaged_pass(self.run, steps, baseline)
        return [part for compute in self._all_parts(moved) for part in compute()]

    @property
    def target(self) -> float:
        """The target on the prompt."""
        return float(self.run.value.detach())

    def table(
        self, measures: Sequence[str] = ("write_norm", "direct", "act_grad"), top_k: int = 10
    ) -> NodeTable:
        """The ``top_k`` nodes by each measure, as :func:`nodes` gives them."""
        check_measures(measures, top_k, None)
        if others := [name for name in measures if name not in OF_ONE_PASS]:
            raise InputError(f"{others[0]} takes passes of its own: use nodes().")
        return table_of(self.run, self.parts, choose(self.parts, measures, top_k), measures)

    def chosen(
        self, measures: Sequence[str], top_k: int = 10, layers: Collection[int] | None = None
    ) -> list[Node]:
        """The ``top_k`` nodes by each measure, in the order of the model.

        Args:
            layers: only nodes of these layers; None: all nodes, also those outside the layers.
        """
        best = Best(measures, top_k, layers)
        best.add(self.parts)
        return best.nodes()

    def total(self, measure: str) -> float:
        """The sum of a measure over all nodes."""
        return float(sum(part.measures[measure].sum() for part in self.parts))

    def values(self, nodes: Sequence[Node | None], measure: str) -> Floats:
        """``[n]``: a measure of given nodes; 0 for latents that are not active, NaN for None and for nodes
        that this pass does not have."""
        return self.several_values(nodes, [measure], self.parts)[measure]

    def several_values(
        self, nodes: Sequence[Node | None], measures: Sequence[str], parts: Sequence[Part]
    ) -> dict[str, Floats]:
        """Several of :meth:`values`, read from some of the parts."""
        places = {(str(part.location), part.kind): part for part in parts}
        inside = set(self.run.positions.tolist())
        found = {measure: np.full(len(nodes), np.nan) for measure in measures}
        for number, node in enumerate(nodes):
            part = None if node is None else places.get((node.location, node.kind))
            if node is None or part is None:
                continue
            row = part.row_of(node)
            if row is None and not (node.kind == "latent" and node.position in inside):
                continue
            for measure, values in found.items():
                values[number] = 0.0 if row is None else part.measures[measure][row]
        return found

    @torch.no_grad()
    def write(self, node: Node) -> Tensor:
        """``[d]`` float64: what a neuron, head, pair or latent adds to the residual stream here.

        Zero for latents that are not active.
        """
        place = ActivationLocation.parse(node.location)
        part = next(
            (p for p in self.parts if (p.location, p.kind) == (place, node.kind)),
            None,
        )
        if part is None or node.kind not in ("neuron", "head", "pair", "latent"):
            raise InputError(f"{node}: expected a neuron, head, pair or latent of this pass.")
        row = part.row_of(node)
        if row is None:
            return torch.zeros_like(self.run.last_gradient[0])
        value, model = part.value[row], self.run.model
        if part.direction is not None:
            return into_stream(model, place)(value[0] * part.direction(row))
        if node.kind == "neuron":
            weight = model.weight(WeightLocationType.MLP_TO_RESIDUAL, place.layer).detach()
            return value[0] * weight[node.unit].double()
        weight = model.weight(WeightLocationType.ATTN_TO_RESIDUAL, place.layer)[node.unit]
        if node.kind == "pair":
            v = self.run.found[ActivationLocation("attn.v", place.layer)][0, node.attended]
            value = value[0] * v[node.unit].detach().double()
        return value @ weight.detach().double()

    def of_tokens(self) -> TokenEffects:
        """What each token contributes, at every position, whatever ``positions`` are."""

        def summed(path: str) -> Tensor:
            places = [place for place in self.run.gradients if place.path == path]
            total = torch.zeros(self.run.tokens.shape[1], dtype=torch.float64)
            for place in places:
                x, gradient = self.run.found[place][0].detach(), self.run.gradients[place][0]
                product = x.double() * gradient.double()
                total += product.flatten(1).sum(dim=1).cpu()
            return total

        paths = ("resid.post_emb", "mlp.post_act", "attn.v_out", "attn.v")
        return TokenEffects(*(flat(summed(path)) for path in paths))


def aligned_nodes(
    a: Effects,
    b: Effects,
    measures: Sequence[str],
    top_k: int = 10,
    layers: Collection[int] | None = None,
) -> list[tuple[Node | None, Node | None]]:
    """The nodes that matter most on either of two prompts, as pairs of the same node on both.

    The tokens are aligned by an edit script. A node at a token that the other prompt does not have is
    paired with None.
    """
    return paired_nodes(a, b, *(each.chosen(measures, top_k, layers) for each in (a, b)))


def paired_nodes(
    a: Effects, b: Effects, of_a: Sequence[Node], of_b: Sequence[Node]
) -> list[tuple[Node | None, Node | None]]:
    """Nodes chosen on either of two prompts, as :func:`aligned_nodes` pairs them."""
    tokens = [effects.run.tokens[0].tolist() for effects in (a, b)]
    there = dict(enumerate(align(*tokens).tolist()))
    here = {other: place for place, other in there.items() if other >= 0}
    pairs: dict[Node | None, tuple[Node | None, Node | None]] = {}
    for node in of_a:
        pairs[node] = (node, _moved(node, there))
    only_b: list[tuple[Node | None, Node | None]] = []
    for node in of_b:
        counterpart = _moved(node, here)
        if counterpart is None:
            only_b.append((None, node))
        else:
            pairs.setdefault(counterpart, (counterpart, node))
    return [*pairs.values(), *only_b]


def _moved(node: Node, places: Mapping[int, int]) -> Node | None:
    """The same node at other positions; None if it has none there."""
    position = places.get(node.position, -1)
    attended = None if node.attended is None else places.get(node.attended, -1)
    if position < 0 or (attended is not None and attended < 0):
        return None
    return replace(node, position=position, attended=attended)


def one_prompt(model: LanguageModel, prompt: str | Sequence[int], bos: bool | int) -> Tensor:
    """Token ids ``[1, s]`` of one prompt."""
    if not isinstance(prompt, str) and not all(isinstance(token, int) for token in prompt):
        raise InputError("nodes are of one prompt: text, or a list of token ids.")
    return model.to_batch(prompt if isinstance(prompt, str) else [list(prompt)], None, bos)[0]


def table_of(
    run: Pass, parts: Sequence[Part], chosen: Sequence[tuple[Part, int]], measures: Sequence[str]
) -> NodeTable:
    """The chosen nodes with those measures that one pass gives."""
    names = [m for m in MEASURES if m in {*measures, "activation"} and m != "ablation"]
    values = {m: np.array([part.measures[m][i] for part, i in chosen]) for m in names}
    totals = {m: float(sum(part.measures[m].sum() for part in parts)) for m in names}
    tokens = token_texts(run.model, run.tokens[0].tolist())
    found = [part.node(i) for part, i in chosen]
    return NodeTable(found, values, totals, float(run.value.detach()), run.goal.name, tokens)


def check_measures(measures: Sequence[str], top_k: int, prompt_b: object) -> None:
    """Refuse measures that are unknown, choose no nodes or lack what they compare with."""
    check_list(measures, "measures")
    if unknown := [name for name in measures if name not in MEASURES]:
        raise InputError(
            f"unknown measure {unknown[0]!r}.{did_you_mean(unknown[0], MEASURES)} "
            f"Known: {', '.join(MEASURES)}."
        )
    if not {*measures} - {"ablation", "activation"}:
        raise InputError(
            "give at least one measure that chooses nodes: direct, act_grad, write_norm, integrated, …"
        )
    if "ablation" in measures and "act_grad" not in measures:
        raise InputError("ablation is shown beside act_grad, its estimate: give both measures.")
    if prompt_b is None and (of_two := [m for m in measures if m.endswith("patching")]):
        raise InputError(f"{of_two[0]} compares with a second prompt: give prompt_b.")
    check_count(top_k, "top_k")


def _by_kind(
    model: LanguageModel, attention: str, autoencoders: Sequence[AutoencoderContext]
) -> dict[bool, AutoencoderContext]:
    """The autoencoders by whether they are of an MLP; an error if two cover the same part, or if one does
    not fit the model."""
    if attention not in ("heads", "pairs"):
        raise InputError(f"attention must be 'heads' or 'pairs', found {attention!r}.")
    check_list(autoencoders, "autoencoders")
    kinds: dict[bool, AutoencoderContext] = {}
    for context in autoencoders:
        # One layer stands for all: loading every autoencoder here would hold up the first sublayers.
        context.check_model(model, next(iter(context.layer_indices)))
        is_mlp = context.location.path in MLP_PLACES
        if is_mlp in kinds:
            raise InputError(
                f"autoencoders of {kinds[is_mlp].location} and of {context.location} cover the same part of "
                "the stream; give one of them."
            )
        kinds[is_mlp] = context
    return kinds


def _compare(first: Effects, second: Effects, ig_steps: int | None) -> None:
    """Give the nodes of the first prompt what the second one says of them; ``ig_steps``: also integrated."""
    index_map = align(*(effects.run.tokens[0].tolist() for effects in (first, second))).numpy()
    _add_patching(first.parts, second.parts, index_map)
    if ig_steps is not None:
        averaged = first.averaged(ig_steps, from_other(second.run, index_map))
        _add_patching(averaged, second.parts, index_map)
        _take(first.parts, "integrated_patching", averaged, "patching")


def _add_patching(parts: list[Part], others: list[Part], index_map: Ints) -> None:
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
        part.measures["patching"] = np.where(lost, 0.0, flat(change))
        for name in _OF_SECOND:
            of_other = np.where(absent, 0.0, other.measures[name][found])
            part.measures[f"{name} (second)"] = np.where(lost, np.nan, of_other)


def _take(parts: list[Part], name: str, others: list[Part], measure: str) -> None:
    """Give each part, as the measure ``name``, a measure of the same part in another list."""
    for part, other in zip(parts, others, strict=True):
        part.measures[name] = other.measures[measure]


_OF_SECOND = ("activation", "direct", "act_grad")


def _keys(unit: Ints, position: Ints, attended: Ints) -> Ints:
    """One number for each node, the same for the same node."""
    return (unit << 32) | ((position + 1) << 16) | (attended + 1)


class Best:
    """The union over measures of the ``top_k`` nodes of the parts that it has seen; ties by order in the
    model.

    Args:
        measures: by which nodes are chosen; those that choose none are ignored.
        layers: only nodes of these layers; None: all nodes, also those outside the layers.
    """

    def __init__(
        self, measures: Sequence[str], top_k: int, layers: Collection[int] | None = None
    ) -> None:
        self.top_k, self.layers = top_k, layers
        self.parts: list[Part] = []
        self._best: dict[str, list[tuple[float, int, int]]] = {
            measure: [] for measure in measures if measure not in ("ablation", "activation")
        }

    def add(self, parts: Iterable[Part]) -> None:
        """See parts that come after those seen before."""
        for part in parts:
            if self.layers is not None and part.location.layer not in self.layers:
                continue
            for measure, best in self._best.items():
                sizes = np.abs(part.measures[measure])
                # Of parts that come later only what is larger than all that are held can be chosen.
                least = -best[-1][0] if len(best) == self.top_k else -np.inf
                found = _largest(sizes, np.flatnonzero(~(sizes <= least)), self.top_k)
                best += [(-float(sizes[i]), len(self.parts), i) for i in found.tolist()]
                best[:] = sorted(best)[: self.top_k]
            self.parts.append(part)

    def chosen(self) -> list[tuple[Part, int]]:
        """The nodes in the order of the model, each as its part and its place there."""
        found = {(number, i) for best in self._best.values() for _, number, i in best}
        return [(self.parts[number], i) for number, i in sorted(found)]

    def nodes(self, of: Collection[Part] | None = None) -> list[Node]:
        """The same as nodes; of some parts, if these are given."""
        some = None if of is None else {id(part) for part in of}
        return [p.node(i) for p, i in self.chosen() if some is None or id(p) in some]


def choose(parts: Sequence[Part], measures: Sequence[str], top_k: int) -> list[tuple[Part, int]]:
    """The union over measures of the ``top_k`` nodes; ties by order in the model."""
    best = Best(measures, top_k)
    best.add(parts)
    return best.chosen()


def _largest(sizes: Floats, candidates: Ints, k: int) -> Ints:
    """The places of the ``k`` largest of the candidates, the largest first; of equal ones the first comes
    first."""
    if k < len(candidates):
        some = sizes[candidates]
        smallest = np.partition(some, len(some) - k)[len(some) - k]
        if np.isfinite(smallest):
            candidates = candidates[some >= smallest]
    found: Ints = candidates[np.argsort(-sizes[candidates], kind="stable")[:k]]
    return found


# --- measured ---


def _with_ablation(
    table: NodeTable,
    run: Pass,
    chosen: Sequence[tuple[Part, int]],
    target: Target,
    contexts: Iterable[AutoencoderContext],
) -> NodeTable:
    """The table with the measured effect of each of its nodes."""
    measured = _ablated(run, chosen, target, contexts)
    correlation = spearman(table.values["act_grad"], measured) if len(measured) > 2 else None
    values = {**table.values, "ablation": measured}
    return replace(table, values=values, rank_correlation=correlation)


def _ablated(
    run: Pass,
    parts: Sequence[tuple[Part, int]],
    target: Target,
    contexts: Iterable[AutoencoderContext],
) -> Floats:
    """``[n]``: the target minus the target with each node alone set to 0."""
    cells = [_without(run, part, i, contexts) for part, i in parts]
    result = sweep(run.model, [run.tokens[0].tolist()], cells, target)
    return -result.effect[:, 0]


def _without(
    run: Pass, part: Part, i: int, contexts: Iterable[AutoencoderContext]
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
