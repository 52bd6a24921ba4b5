"""Circuits: sets of edges that are run alone, with every other edge cut, and how well they explain a target.

    runner = CircuitRunner(model, prompts, corrupt, target)
    curve = faithfulness_curve(runner, edge_attribution(model, prompts, corrupt, target))
    circuit = top_edges(scores, 200).pruned()
    runner(circuit).mean(), runner.clean.mean()

The edges are those of :mod:`neuron_explainer.analysis.edges`. In a run of a circuit each destination (the
query, key and value input of each head apart, MLPs, the logits) reads its own stream: along edges of the
circuit what the source writes *in this run*, along all others what it writes on a reference. Norms and
attention are computed anew from these inputs; nothing is frozen. The reference is

- "resample": the corrupt prompt of each pair;
- "mean": the mean over the reference prompts, position by position, so that these should be of one template.

With all edges this is the model; with none it is the reference: for "resample" the corrupt prompt.

Shape legend: ``p`` prompts, ``s`` positions, ``h`` heads, ``d`` model width, ``i`` sources, ``j``
destinations, ``t`` destinations that are computed together, ``n`` circuits.
"""

import heapq
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from neuron_explainer.analysis.edges import (
    QKV_WEIGHTS,
    Batch,
    Bools,
    EdgeGraph,
    EdgeScores,
    Floats,
    Outputs,
    head_writes,
    in_batches,
    own_transformer,
    paired,
    read_target,
    whole_batch,
)
from neuron_explainer.analysis.targets import Metric, as_target
from neuron_explainer.errors import InputError, did_you_mean, optional_module
from neuron_explainer.models.checks import check_count
from neuron_explainer.models.language_model import LanguageModel, Prompts
from neuron_explainer.models.transformer import Transformer, TransformerLayer, merge_heads
from neuron_explainer.tables import text_table

__all__ = [
    "FRACTIONS",
    "Circuit",
    "CircuitRunner",
    "Completeness",
    "FaithfulnessCurve",
    "completeness",
    "faithfulness_curve",
    "greedy_edges",
    "random_edges",
    "run_circuit",
    "top_edges",
]

FRACTIONS = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0)
"""Shares of all edges at which MIB (Mueller et al. 2025) measures faithfulness."""
RefKind = Literal["resample", "mean"]


# --- circuits ---


@dataclass(frozen=True, eq=False, repr=False)
class Circuit:
    """A set of edges of a model's graph."""

    graph: EdgeGraph
    kept: Bools
    """Bool ``[i, j]``."""

    @classmethod
    def of(cls, model: LanguageModel | EdgeGraph, edges: Iterable[str]) -> "Circuit":
        """From names such as ``a0.h1->m3``."""
        graph = model if isinstance(model, EdgeGraph) else EdgeGraph.of(model)
        if isinstance(edges, str):
            raise InputError(f"a circuit is a list of edges, found the text {edges!r}.")
        kept = np.zeros_like(graph.exists)
        for edge in edges:
            kept[graph.place(edge)] = True
        return cls(graph, kept)

    @property
    def edges(self) -> list[str]:
        """The names of the edges."""
        return [self.graph.name(i, j) for i, j in np.argwhere(self.kept).tolist()]

    @property
    def nodes(self) -> list[str]:
        """The names of the embedding, heads and MLPs that an edge leaves or enters."""
        places = np.argwhere(self.kept).tolist()
        touched = {i for i, _ in places} | {self.graph.node_of(j) for _, j in places}
        return [name for i, name in enumerate(self.graph.sources) if i in touched]

    def __len__(self) -> int:
        return int(self.kept.sum())

    def complement(self) -> "Circuit":
        """All other edges."""
        return Circuit(self.graph, self.graph.exists & ~self.kept)

    def without(self, names: Iterable[str]) -> "Circuit":
        """The circuit without some edges; a node's name stands for all edges into and out of it."""
        kept = self.kept.copy()
        for name in [names] if isinstance(names, str) else names:
            if name in self.graph.sources:
                node = self.graph.sources.index(name)
                kept[node] = False
                kept[:, self._owners() == node] = False
            else:
                kept[self.graph.place(name)] = False
        return Circuit(self.graph, kept)

    def pruned(self) -> "Circuit":
        """The circuit without dead ends: only edges on a path from the embedding to the logits.

        With "resample" a run of it has the same result: a node that nothing of the clean prompt reaches
        writes what it writes on the corrupt prompt. With "mean" the result may change, because what a node
        makes of mean inputs is not its mean output.
        """
        owners = self._owners()
        reached = np.zeros(len(self.graph.sources), dtype=bool)
        reached[0] = True
        for node in range(1, len(reached)):  # sources are in the order of a forward pass
            reached[node] = self.kept[reached][:, owners == node].any()
        useful = np.zeros_like(reached)
        read = owners < 0  # the destinations whose node is useful; the logits are
        for node in reversed(range(len(reached))):
            useful[node] = self.kept[node, read].any()
            read |= useful[node] & (owners == node)
        return Circuit(self.graph, self.kept & reached[:, None] & read)

    def _owners(self) -> npt.NDArray[np.int64]:
        """``[j]``: the source to which each destination belongs; -1 for the logits."""
        found = [self.graph.node_of(j) for j in range(len(self.graph.destinations))]
        return np.array([-1 if node is None else node for node in found])

    def __repr__(self) -> str:
        return f"Circuit({len(self):,} of {len(self.graph):,} edges, {len(self.nodes)} nodes)"


def _checked_size(graph: EdgeGraph, n: int) -> int:
    check_count(n, "the number of edges", least=0)
    if n > len(graph):
        raise InputError(f"a circuit of this model has 0 to {len(graph):,} edges, asked for {n}.")
    return n


def _of_places(graph: EdgeGraph, places: Iterable[Sequence[int]]) -> Circuit:
    kept = np.zeros_like(graph.exists)
    for i, j in places:
        kept[i, j] = True
    return Circuit(graph, kept)


def top_edges(scores: EdgeScores, n: int) -> Circuit:
    """The ``n`` edges with the largest scores of either sign."""
    return _of_places(scores.graph, scores.order()[: _checked_size(scores.graph, n)].tolist())


def greedy_edges(scores: EdgeScores, n: int) -> Circuit:
    """``n`` edges that all lead to the logits: again and again the largest of those that enter a node
    which the circuit already reads (Hanna et al. 2024)."""
    graph = scores.graph
    owners = Circuit(graph, graph.exists)._owners()
    candidates: list[tuple[float, int, int]] = []

    def offer(node: int) -> None:
        """Make the edges into a node candidates; -1 for the logits."""
        for j in (owners == node).nonzero()[0].tolist():
            for i in graph.exists[:, j].nonzero()[0].tolist():
                heapq.heappush(candidates, (-abs(float(scores.values[i, j])), i, j))

    offer(-1)
    read, chosen = {-1}, []
    for _ in range(_checked_size(graph, n)):
        _, i, j = heapq.heappop(candidates)
        chosen.append((i, j))
        if i not in read:
            read.add(i)
            offer(i)
    return _of_places(graph, chosen)


def random_edges(graph: EdgeGraph, n: int, seed: int) -> Circuit:
    """``n`` edges drawn by a seed; those of a smaller ``n`` are among those of a larger one."""
    places = np.random.default_rng(seed).permutation(np.argwhere(graph.exists))
    return _of_places(graph, places[: _checked_size(graph, n)].tolist())


# --- running ---


class CircuitRunner:
    """Runs circuits on the same prompts.

    Args:
        prompts: as ``sample`` takes them.
        corrupt: the reference. With ``reference="resample"`` for each prompt one of as many tokens; with
            "mean" any number of prompts, of which some reach the length of the longest prompt.
        target: what is measured. Where it compares with an unchanged pass (:func:`kl`), this is the clean
            pass of the whole model.
        reference: see the module's docstring.
        bos: prepend the start token.
        batch_tokens: most tokens in a batch. Memory grows with it: for GPT-2 small about 1 MB a token.
    """

    clean: Floats
    """``[p]``: the target of the whole model."""

    def __init__(
        self,
        model: LanguageModel,
        prompts: Prompts,
        corrupt: Prompts,
        target: Metric,
        *,
        reference: RefKind = "resample",
        bos: bool | int = False,
        batch_tokens: int = 512,
    ) -> None:
        self.model, self.graph = own_transformer(model), EdgeGraph.of(model)
        self.target, self.reference = as_target(target), reference
        if reference == "resample":
            pairs = paired(model, prompts, corrupt, bos)
        elif reference == "mean":
            batch = whole_batch(model, model.prompt_ids(prompts, bos))
            pairs = batch, batch
        else:
            raise InputError(
                f"reference must be 'resample' or 'mean', found {reference!r}."
                f"{did_you_mean(str(reference), ['resample', 'mean'])}"
            )
        self._batches: list[tuple[Batch, Tensor, Outputs, Tensor]] = []
        clean = []
        with torch.no_grad():
            means = None
            if reference == "mean":
                others = whole_batch(model, model.prompt_ids(corrupt, bos))
                means = _means(self.model, others, pairs[0].tokens.shape[1], batch_tokens)
            for batch, other in in_batches(pairs, batch_tokens):
                here = Outputs.of(self.model, batch)
                found, logits = read_target(self.model, self.target, here.normed, batch, None)
                clean.append(found)
                there = Outputs.of(self.model, other) if means is None else means
                self._batches.append((batch, here.embedding, there, logits))
        self.clean = torch.cat(clean).double().cpu().numpy()

    @torch.no_grad()
    def __call__(self, circuit: Circuit) -> Floats:
        """``[p]``: the target on each prompt if only the circuit's edges carry the prompt."""
        if circuit.graph != self.graph:
            raise InputError(
                f"the circuit is of a model of {circuit.graph.n_layers} layers and "
                f"{circuit.graph.n_heads} heads, this one has {self.graph.n_layers} and "
                f"{self.graph.n_heads}."
            )
        found = []
        kept = torch.from_numpy(circuit.kept).to(self.model.device, self.model.dtype)
        for batch, embedding, there, logits in self._batches:
            normed = _patched(self.model, self.graph, kept, embedding, there)
            found.append(read_target(self.model, self.target, normed, batch, logits)[0])
        result: Floats = torch.cat(found).double().cpu().numpy()
        return result

    def mean(self, circuit: Circuit) -> float:
        """The target of a circuit, mean over the prompts."""
        return float(self(circuit).mean())

    @property
    def whole(self) -> Circuit:
        """All edges."""
        return Circuit(self.graph, self.graph.exists)

    @property
    def empty(self) -> Circuit:
        """No edge."""
        return Circuit(self.graph, np.zeros_like(self.graph.exists))

    def __repr__(self) -> str:
        return (
            f"CircuitRunner({len(self.clean)} prompts, {len(self.graph):,} edges, reference "
            f"{self.reference}; {self.target.name}, whole model {self.clean.mean():.4g})"
        )


def run_circuit(
    model: LanguageModel,
    circuit: Circuit,
    prompts: Prompts,
    corrupt: Prompts,
    target: Metric,
    **settings: Any,
) -> Floats:
    """``[p]``: the target of one circuit on each prompt; settings are those of :class:`CircuitRunner`."""
    return CircuitRunner(model, prompts, corrupt, target, **settings)(circuit)


def _means(model: Transformer, others: Batch, length: int, batch_tokens: int) -> Outputs:
    """``[1, s, …]``: the mean of what sources write at each position, over the rows that reach it."""
    counts = (~others.pad).sum(dim=0)
    if len(counts) < length:
        raise InputError(
            f"the longest prompt has {length} tokens, the longest reference prompt {len(counts)}; the "
            "mean at each position needs a reference that reaches it."
        )
    totals: list[Tensor] | None = None
    for batch, _ in in_batches((others, others), batch_tokens):
        there = Outputs.of(model, batch)
        parts = [there.embedding, *there.heads, *there.mlps, there.normed]
        known = ~batch.pad[:, :length]
        sums = [
            (x[:, :length].double() * known.view(*known.shape, *[1] * (x.dim() - 2))).sum(dim=0)
            for x in parts
        ]
        totals = sums if totals is None else [a + b for a, b in zip(totals, sums, strict=True)]
    assert totals is not None
    means = [
        (x / counts[:length].view(-1, *[1] * (x.dim() - 1)))[None].to(model.dtype) for x in totals
    ]
    n = model.n_layers
    return Outputs(means[0], means[1 : n + 1], means[n + 1 : -1], means[-1])


def _patched(
    model: Transformer, graph: EdgeGraph, kept: Tensor, embedding: Tensor, there: Outputs
) -> Tensor:
    """What the unembedding reads ``[p, s, d]`` where only edges of ``kept`` ``[i, j]`` carry this run."""
    change = embedding.new_zeros(len(graph.sources), *embedding.shape)
    change[0] = embedding - there.embedding  # of each source, from the reference to this run
    base = there.embedding
    for layer, block in enumerate(model.layers):
        n = graph.before_attention(layer)
        x = base + _along(change[:n], kept[:n, graph.attention_columns(layer)])
        z = _attention(model, block, x)
        change[n : n + graph.n_heads] = head_writes(model, layer, z - there.heads[layer])
        base = base + block.attn.out_proj(merge_heads(there.heads[layer]))
        n += graph.n_heads
        x = base + _along(change[:n], kept[:n, graph.mlp_column(layer), None])
        change[n] = block.mlp_block(x[0]) - there.mlps[layer]
        base = base + there.mlps[layer]
    x = base + _along(change, kept[:, -1:])
    normed: Tensor = model.final_ln(x[0])
    return normed


def _along(change: Tensor, kept: Tensor) -> Tensor:
    """``[t, p, s, d]``: the changes ``[i, p, s, d]`` that reach some destinations, by ``kept`` ``[i, t]``."""
    return (kept.T @ change.flatten(1)).view(-1, *change.shape[1:])


def _attention(model: Transformer, block: TransformerLayer, x: Tensor) -> Tensor:
    """What heads read out ``[p, s, h, d_head]``, from the inputs ``[3 * h, p, s, d]`` of each head's query,
    key and value. Pads are on the right, so that no token sees one."""
    normed = block.ln_1(x).unflatten(0, (-1, 3))
    projections = (block.attn.q_proj, block.attn.k_proj, block.attn.v_proj)
    q, k, v = (
        _by_head(model, block, normed[:, letter], projection, letter)
        for letter, projection in enumerate(projections)
    )
    out = F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=block.attn.qk_scale**2)
    return out.transpose(1, 2)


def _by_head(
    model: Transformer, block: TransformerLayer, x: Tensor, projection: nn.Linear, letter: int
) -> Tensor:
    """``[p, h, s, d_head]`` from each head's own input ``[h, p, s, d]``."""
    weight = model.weight(QKV_WEIGHTS[letter], block.layer_idx).detach()
    bias = projection.bias.view(len(weight), 1, -1)
    return torch.einsum("hpsd,hdc->phsc", x, weight) + bias


# --- how much a circuit explains ---


@dataclass(frozen=True, repr=False)
class FaithfulnessCurve:
    """How much of the target circuits of growing size keep, beside circuits of random edges.

    Faithfulness is ``(circuit - empty) / (whole - empty)`` of the target's means: 0 for no edge, 1 for all.
    """

    fractions: list[float]
    n_edges: list[int]
    """``floor(fraction * edges)`` each."""
    faithfulness: Floats
    """``[n]``"""
    random: Floats
    """``[seeds, n]``: the faithfulness of random edges."""
    whole: float
    """The target of the model, mean over the prompts."""
    empty: float
    """The target with no edge."""
    target_name: str
    reference: str

    @property
    def cpr(self) -> float:
        """MIB's circuit performance ratio: the area under the curve; higher is better."""
        return float(_area(self.fractions, self.faithfulness))

    @property
    def cmd(self) -> float:
        """MIB's circuit-model distance: the area between the curve and 1; lower is better."""
        return float(_area(self.fractions, np.abs(1 - self.faithfulness)))

    @property
    def random_cpr(self) -> Floats:
        """``[seeds]``: ``cpr`` of random edges."""
        found: Floats = _area(self.fractions, self.random)
        return found

    @property
    def random_cmd(self) -> Floats:
        """``[seeds]``: ``cmd`` of random edges."""
        found: Floats = _area(self.fractions, np.abs(1 - self.random))
        return found

    def to_dataframe(self) -> Any:
        """One row a fraction (needs pandas)."""
        pandas = optional_module("pandas", "a data frame")
        table: dict[str, Any] = {
            "fraction": self.fractions,
            "edges": self.n_edges,
            "faithfulness": self.faithfulness,
        }
        table |= {f"random {seed}": values for seed, values in enumerate(self.random)}
        return pandas.DataFrame(table)

    def plot(self) -> Any:
        """Faithfulness over the share of edges, with random edges in grey.

        Returns:
            matplotlib's figure (needs the extra ``plots``).
        """
        pyplot = optional_module("matplotlib.pyplot", "a plot")
        figure, axes = pyplot.subplots(figsize=(6, 4), layout="constrained")
        for number, values in enumerate(self.random):
            label = "random edges" if number == 0 else None
            axes.plot(self.fractions, values, color="0.65", linewidth=1, label=label)
        axes.plot(self.fractions, self.faithfulness, "o-", color="#3b6ea8", label="best edges")
        for level in (0, 1):
            axes.axhline(level, color="black", linewidth=0.8, linestyle=":")
        if self.fractions[0] > 0:
            axes.set_xscale("log")
        axes.set_xlabel("share of edges")
        axes.set_ylabel("faithfulness")
        axes.set_title(f"{self.target_name} (reference: {self.reference})", fontsize="medium")
        axes.legend(frameon=False)
        return figure

    def __repr__(self) -> str:
        rows = [
            [f"{fraction:g}", f"{n:,}", _three(value), *([_spread(floor)] if len(floor) else [])]
            for fraction, n, value, floor in zip(
                self.fractions, self.n_edges, self.faithfulness, self.random.T, strict=True
            )
        ]
        titles = ["fraction", "edges", "faithfulness", "random"][: len(rows[0])]
        lines = [
            f"{self.target_name}: whole model {self.whole:.4g}, no edge {self.empty:.4g} "
            f"(reference: {self.reference})",
            text_table(titles, rows, n_left=0, rule=True),
        ]
        for name, better, value, floor in (
            ("CPR", "higher", self.cpr, self.random_cpr),
            ("CMD", "lower", self.cmd, self.random_cmd),
        ):
            beside = f"; random edges {_spread(floor)}" if len(floor) else ""
            lines.append(f"{name} ({better} is better) {value:.3f}{beside}")
        return "\n".join(lines)


def _spread(values: Floats) -> str:
    return f"{_three(values.min())} to {_three(values.max())}"


def _three(value: float) -> str:
    """Three digits, and no -0.000."""
    return f"{round(float(value), 3) + 0.0:.3f}"


def _area(fractions: Sequence[float], values: Floats) -> Any:
    """The area under ``values`` ``[…, n]`` by the trapezoid rule."""
    steps = np.diff(np.asarray(fractions))
    return (steps * (values[..., 1:] + values[..., :-1]) / 2).sum(axis=-1)


def faithfulness_curve(
    runner: CircuitRunner,
    scores: EdgeScores,
    *,
    fractions: Sequence[float] = FRACTIONS,
    select: Literal["top", "greedy"] = "top",
    seeds: Sequence[int] = (0, 1, 2),
) -> FaithfulnessCurve:
    """Run the best-scored edges at several shares of all edges, and as many random edges.

    Args:
        runner: may be of other prompts than the scores; it should be, to judge them.
        fractions: ascending shares of all edges, which the areas are taken over.
        select: by :func:`top_edges` or :func:`greedy_edges`.
        seeds: one random order of the edges each; empty for none.
    """
    graph = runner.graph
    if select not in ("top", "greedy"):
        raise InputError(f"select must be 'top' or 'greedy', found {select!r}.")
    if scores.graph != graph:
        raise InputError("the scores are of a model of other sizes than the runner's.")
    shares = [float(fraction) for fraction in fractions]
    if not shares or sorted({*shares}) != shares or not 0 <= shares[0] <= shares[-1] <= 1:
        raise InputError(f"fractions must ascend within 0 to 1, found {shares}.")
    whole, empty = float(runner.clean.mean()), runner.mean(runner.empty)
    if whole == empty:
        raise InputError(
            f"{runner.target.name} is {whole:.4g} with all edges and with none: there is nothing to explain."
        )
    sizes = [int(share * len(graph) + 1e-9) for share in shares]
    by_scores = top_edges if select == "top" else greedy_edges

    def curve(circuits: Iterator[Circuit]) -> list[float]:
        return [(runner.mean(circuit) - empty) / (whole - empty) for circuit in circuits]

    found = curve(by_scores(scores, n) for n in sizes)
    random = [curve(random_edges(graph, n, seed) for n in sizes) for seed in seeds]
    return FaithfulnessCurve(
        shares,
        sizes,
        np.array(found),
        np.array(random).reshape(len(random), len(sizes)),
        whole,
        empty,
        runner.target.name,
        runner.reference,
    )


@dataclass(frozen=True, repr=False)
class Completeness:
    """Whether a circuit goes wrong as the model does when parts of both are removed.

    By the definitions of the paper on indirect objects (Wang et al. 2023): a circuit ``C`` of a model ``M``
    is faithful if ``|F(M) - F(C)|`` is small, ``F`` being the target's mean, and complete if
    ``|F(C without K) - F(M without K)|`` is small for every part ``K`` of the circuit.
    """

    removed: list[list[str]]
    """Each ``K``: names of edges and nodes. The first is empty, the last is the whole circuit."""
    circuit: Floats
    """``[n]``: ``F(C without K)``."""
    model: Floats
    """``[n]``: ``F(M without K)``."""
    random_faithfulness: Floats
    """``[seeds]``: ``|F(M) - F(R)|`` of circuits ``R`` of as many random edges."""
    target_name: str

    @property
    def gaps(self) -> Floats:
        """``[n]``: ``|F(C without K) - F(M without K)|``."""
        found: Floats = np.abs(self.circuit - self.model)
        return found

    @property
    def faithfulness(self) -> float:
        """``|F(M) - F(C)|``; lower is better."""
        return float(self.gaps[0])

    @property
    def incompleteness(self) -> float:
        """The largest gap of all ``K`` tried; lower is better."""
        return float(self.gaps.max())

    def __repr__(self) -> str:
        rows = [
            [_some(names), f"{c:.4g}", f"{m:.4g}", f"{gap:.4g}"]
            for names, c, m, gap in zip(
                self.removed, self.circuit, self.model, self.gaps, strict=True
            )
        ]
        titles = ["removed", "circuit", "model", "gap"]
        floor = self.random_faithfulness
        beside = f" (random edges {_spread(floor)})" if len(floor) else ""
        return "\n".join(
            [
                f"{self.target_name}; faithfulness: a gap of {self.faithfulness:.4g}{beside}; "
                f"completeness: gaps up to {self.incompleteness:.4g}",
                text_table(titles, rows, rule=True),
            ]
        )


def _some(names: Sequence[str]) -> str:
    if len(names) > 3:
        return f"{len(names)} edges or nodes"
    return ", ".join(names) or "nothing"


def completeness(
    runner: CircuitRunner,
    circuit: Circuit,
    removed: Sequence[Sequence[str]] | int = 10,
    *,
    seed: int = 0,
    random_seeds: Sequence[int] = (0, 1, 2),
) -> Completeness:
    """Compare the circuit with the model after removing the same parts of both.

    Args:
        removed: the parts ``K``, each a list of edges or nodes; or how many random ones to draw, each
            holding every edge of the circuit with probability 1/2. Nothing, and the whole circuit, are
            always among them.
        seed: for these draws.
        random_seeds: for the random circuits that faithfulness is compared with; empty for none.
    """
    edges = circuit.edges
    if isinstance(removed, int):
        coins = np.random.default_rng(seed).random((removed, len(edges))) < 0.5
        parts = [[edge for edge, is_in in zip(edges, row, strict=True) if is_in] for row in coins]
    else:
        parts = [list(part) for part in removed]
    parts = [[], *parts, edges]
    both = [(circuit.without(part), runner.whole.without(part)) for part in parts]
    found = np.array([[runner.mean(c), runner.mean(m)] for c, m in both])
    floor = [
        abs(float(runner.clean.mean()) - runner.mean(random_edges(runner.graph, len(circuit), s)))
        for s in random_seeds
    ]
    return Completeness(parts, found[:, 0], found[:, 1], np.array(floor), runner.target.name)
