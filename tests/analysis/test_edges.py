"""Edge attribution against automatic differentiation of a model written out edge by edge."""

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from neuron_explainer.analysis.attention_paths import head_loadings
from neuron_explainer.analysis.circuits import Circuit, CircuitRunner
from neuron_explainer.analysis.edges import EdgeGraph, EdgeScores, edge_attribution
from neuron_explainer.analysis.effects import Node, nodes
from neuron_explainer.analysis.targets import kl, logit_difference, loss
from neuron_explainer.errors import InputError
from neuron_explainer.models.hooks import TransformerHooks
from neuron_explainer.models.interventions import freeze
from tests.analysis.slow_paths import Sources, slow_pass, whole_input
from tests.conftest import make_model
from tests.models.test_interventions import wrong
from tests.models.test_language_model import make

MODEL = make_model(dtype=torch.float64)
CLEAN = [[3, 1, 4, 1, 5], [2, 7, 1, 8]]
CORRUPT = [[3, 7, 4, 1, 5], [2, 7, 3, 9]]
FIRST = (CLEAN[0], CORRUPT[0])
TARGET = logit_difference(MODEL, [6, 8], 12)


def metric(logits: Tensor) -> Tensor:
    return (logits[-1, 6] + logits[-1, 8]) / 2 - logits[-1, 12]


def slow_scores(points: list[float] | None = None) -> dict[str, float]:
    """Every edge's score by gradients of a zero added to each destination's input."""
    found: dict[str, float] = {}
    for clean, corrupt in zip(CLEAN, CORRUPT, strict=True):
        with torch.no_grad():
            (_, here), (_, there) = slow_pass(MODEL, clean), slow_pass(MODEL, corrupt)
        for share in points or [1.0]:
            point = share * here["input"] + (1 - share) * there["input"]
            gradients = slow_gradients(clean, point)
            for edge in EdgeGraph.of(MODEL).edges:
                source, _, destination = edge.partition("->")
                gradient = gradients[destination]
                score = float(((there[source] - here[source]) * gradient).sum())
                found[edge] = found.get(edge, 0.0) + score / len(CLEAN) / len(points or [1])
    return found


def slow_gradients(tokens: list[int], embedding: Tensor) -> dict[str, Tensor]:
    """Those of a zero added to each destination's input, with this embedding."""
    added: dict[str, Tensor] = {}

    def input_of(name: str, sources: Sources, bias: Tensor) -> Tensor:
        sources["input"] = embedding
        added[name] = torch.zeros_like(embedding).requires_grad_()
        return whole_input(name, sources, bias) + added[name]

    value = metric(slow_pass(MODEL, tokens, input_of)[0])
    return dict(zip(added, torch.autograd.grad(value, list(added.values())), strict=True))


def scores(**settings: Any) -> EdgeScores:
    return edge_attribution(MODEL, CLEAN, CORRUPT, TARGET, **settings)


def assert_equal(found: EdgeScores, expected: dict[str, float]) -> None:
    assert set(found.graph.edges) == set(expected)
    for edge, score in expected.items():
        assert found.score(edge) == pytest.approx(score, abs=1e-10), edge
    assert np.abs(found.values).sum() == pytest.approx(sum(map(abs, expected.values())))


def test_the_slow_pass_is_the_model() -> None:
    with torch.no_grad():
        logits = MODEL([CLEAN[0]])[0][0]
        torch.testing.assert_close(slow_pass(MODEL, CLEAN[0])[0], logits)


def test_scores_are_those_of_automatic_differentiation() -> None:
    found = scores()
    assert_equal(found, slow_scores())
    assert_equal(scores(batch_tokens=1), slow_scores())
    with torch.no_grad():
        means = [
            sum(float(metric(MODEL([row])[0][0])) for row in rows) / len(rows)
            for rows in (CLEAN, CORRUPT)
        ]
    assert [found.clean, found.corrupt] == pytest.approx(means)


def test_integrated_gradients_average_over_points_between_the_embeddings() -> None:
    assert_equal(scores(ig_steps=3), slow_scores([0.0, 1 / 3, 2 / 3]))


def test_gpt2_small_has_as_many_edges_as_published() -> None:
    graph = EdgeGraph(n_layers=12, n_heads=12)
    assert (len(graph.sources), len(graph.destinations), len(graph)) == (157, 445, 32_491)
    assert {"input->a0.h0<q>", "a0.h1->m3", "input->a1.h0<q>", "m2->logits"} <= {*graph.edges}


def test_an_edge_goes_from_what_is_computed_before_to_what_reads_later() -> None:
    graph = EdgeGraph(2, 2)
    assert "a0.h1->m0" in graph.edges
    for edge in ("m0->m0", "a1.h0->a1.h1<q>", "m0->a0.h0<v>", "a0.h0", "input->a1.h0"):
        assert edge not in graph.edges
        with pytest.raises(InputError, match="has no edge"):
            graph.place(edge)
    with pytest.raises(InputError, match=r"Did you mean 'input->a1.h0<[qkv]>'"):
        graph.place("input->a1.h0")
    assert [graph.node_of(j) for j in (0, 5, 6, len(graph.destinations) - 1)] == [1, 2, 3, None]


def test_edges_into_the_logits_are_the_direct_part_of_node_patching() -> None:
    """Frozen, the edges of all sources into the logits sum to the direct effects' difference."""
    found = edge_attribution(MODEL, [CLEAN[0]], [CORRUPT[0]], TARGET, freeze=["final_norm"])
    table = nodes(MODEL, CLEAN[0], TARGET, ["direct"], top_k=10**6)
    for layer, head in ((0, 1), (1, 3)):
        gradient_sum = sum(
            value
            for node, value in zip(table.nodes, table.values["direct"], strict=True)
            if node.location == f"{layer}/attn.v_out" and node.unit == head
        )
        # The direct effect of the clean output is what corrupting it to 0 takes away.
        here, there = (
            slow_pass(MODEL, row)[1][f"a{layer}.h{head}"] for row in (CLEAN[0], CORRUPT[0])
        )
        direct = _direct(there) - _direct(here)
        assert gradient_sum == pytest.approx(_direct(here), abs=1e-9)
        assert found.score(f"a{layer}.h{head}->logits") == pytest.approx(direct, abs=1e-9)


def _direct(write: Tensor) -> float:
    """What a write ``[s, d]`` adds to the target, with the final norm's scale of the clean prompt."""
    with torch.no_grad():
        scale = MODEL.capture([CLEAN[0]], "resid.ln_f.scale")["resid.ln_f.scale"][0, -1]
        x = (write[-1] - write[-1].mean()) / scale * MODEL.final_ln.weight
        return float(metric((MODEL.unembed.weight @ x)[None]))


def test_on_a_linear_model_the_edges_from_the_embedding_sum_to_the_whole_change() -> None:
    model = make_model(dtype=torch.float64, activation="relu")
    with torch.no_grad():
        for layer in model.layers:
            layer.mlp.in_layer.bias.fill_(100.0)  # every neuron is on: MLPs are linear
        places = ["resid.torso.ln_attn.scale", "resid.torso.ln_mlp.scale"]
        places += ["resid.ln_f.scale", "attn.qk_probs"]
        kept = model.capture([CLEAN[0]], places)
        hooks = TransformerHooks()
        for place in kept:
            hooks = hooks + freeze(place, kept)
        before, after = (float(model([row], hooks=hooks)[0][0, -1, 6]) for row in FIRST)
    found = edge_attribution(
        model,
        [CLEAN[0]],
        [CORRUPT[0]],
        logit_difference(model, 6),
        freeze=["norms", "patterns"],
    )
    from_embedding = [edge for edge in found.graph.edges if edge.startswith("input->")]
    assert sum(map(found.score, from_embedding)) == pytest.approx(after - before, abs=1e-6)
    assert all(
        found.score(edge) == 0 for edge in found.graph.edges if edge.endswith(("<q>", "<k>"))
    )


@pytest.mark.parametrize("target", [loss(), kl(every_position=True)], ids=str)
def test_targets_of_every_position(target: Any) -> None:
    found = edge_attribution(MODEL, CLEAN, CORRUPT, target, ig_steps=2)
    apart = [
        edge_attribution(MODEL, [here], [there], target, ig_steps=2)
        for here, there in zip(CLEAN, CORRUPT, strict=True)
    ]
    mean = (apart[0].values + apart[1].values) / 2
    np.testing.assert_allclose(found.values, mean, atol=1e-10)
    assert np.abs(found.values).max() > 1e-3


def test_top_and_repr() -> None:
    found = scores()
    sizes = [abs(score) for _, score in found.top(10**6)]
    assert sizes == sorted(sizes, reverse=True)
    assert len(sizes) == len(found.graph)
    lines = repr(found).splitlines()
    assert lines[0].startswith("EAP: 110 edges; logit of 6, 8 minus 12 is")
    assert found.top(1)[0][0] in lines[3]
    assert list(found.to_dataframe().columns) == ["edge", "source", "destination", "score"]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"ig_steps": 0}, "ig_steps must be a whole number of at least 1, found 0"),
        ({"target": kl()}, "EAP would hold only zeros"),
        ({"freeze": ["norm"]}, "Did you mean 'norms'"),
        ({"batch_tokens": 0}, "batch_tokens must be a whole number of at least 1"),
        ({"ig_steps": 2.5}, "ig_steps must be a whole number of at least 1, found 2.5"),
        ({"corrupt": CORRUPT[:1]}, "one corrupt prompt for each of 2, found 1"),
        ({"corrupt": [CORRUPT[1], CORRUPT[0]]}, "pair 0 have 5 and 4 tokens"),
    ],
)
def test_bad_input(settings: dict[str, Any], message: str) -> None:
    given = {"prompts": CLEAN, "corrupt": CORRUPT, "target": TARGET, **settings}
    with pytest.raises(InputError, match=message):
        edge_attribution(MODEL, **wrong(given))


def test_models_of_hugging_face_are_refused_before_any_work(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model = make("gpt2")
    ends = Node("0/mlp.post_act", "neuron", 1, 1), Node("1/mlp.post_act", "neuron", 1, 2)
    monkeypatch.setattr(type(model), "__call__", lambda *_: pytest.fail("the model ran"))
    for run in (
        lambda: edge_attribution(model, CLEAN, CORRUPT, TARGET),
        lambda: CircuitRunner(model, CLEAN, CORRUPT, TARGET),
        lambda: Circuit.of(model, ["input->logits"]),
        lambda: head_loadings(model, CLEAN[0], *ends),
    ):
        with pytest.raises(InputError, match=r"own Transformer shows, found .* sweep with heads"):
            run()
