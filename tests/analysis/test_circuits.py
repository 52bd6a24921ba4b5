"""Running circuits, against a model written out edge by edge; selections and scores."""

from collections.abc import Iterable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from neuron_explainer.analysis.circuits import (
    FRACTIONS,
    Circuit,
    CircuitRunner,
    completeness,
    faithfulness_curve,
    greedy_edges,
    random_edges,
    run_circuit,
    top_edges,
)
from neuron_explainer.analysis.edges import EdgeGraph, EdgeScores, edge_attribution
from neuron_explainer.analysis.targets import Target, kl, logit_difference, loss
from neuron_explainer.errors import InputError
from neuron_explainer.models.transformer import Transformer
from tests.analysis.slow_paths import Sources, slow_pass
from tests.conftest import make_model
from tests.models.test_interventions import wrong

MODEL = make_model(dtype=torch.float64)
GRAPH = EdgeGraph.of(MODEL)
CLEAN = [[3, 1, 4, 1, 5], [2, 7, 1, 8], [1, 6, 1, 8, 9]]
CORRUPT = [[3, 7, 4, 1, 5], [2, 7, 3, 9], [1, 2, 1, 8, 3]]
TARGET = logit_difference(MODEL, [6, 8], 12)
SCORES = edge_attribution(MODEL, CLEAN, CORRUPT, TARGET, ig_steps=5)


def runner(**settings: Any) -> CircuitRunner:
    given: dict[str, Any] = {"corrupt": CORRUPT, "target": TARGET, **settings}
    return CircuitRunner(MODEL, CLEAN, **given)


def slow_run(model: Transformer, edges: Iterable[str], tokens: list[int], there: Sources) -> Tensor:
    """Logits ``[s, v]`` with every source's output chosen anew for every destination."""
    edges = set(edges)

    def input_of(destination: str, sources: Sources, bias: Tensor) -> Tensor:
        return bias + torch.stack(
            [
                write if f"{name}->{destination}" in edges else there[name]
                for name, write in sources.items()
            ]
        ).sum(dim=0)

    with torch.no_grad():
        return slow_pass(model, tokens, input_of)[0]


def slow_means(rows: list[list[int]]) -> Sources:
    with torch.no_grad():
        found = [slow_pass(MODEL, row)[1] for row in rows]
    longest = max(map(len, rows))
    return {
        name: torch.stack(
            [
                torch.stack([f[name][s] for f in found if len(f[name]) > s]).mean(dim=0)
                for s in range(longest)
            ]
        )
        for name in found[0]
    }


def metric(logits: Tensor) -> float:
    return float((logits[-1, 6] + logits[-1, 8]) / 2 - logits[-1, 12])


@pytest.mark.parametrize("reference", ["resample", "mean"])
@pytest.mark.parametrize("batch_tokens", [1, 512])
def test_a_circuit_runs_as_written_out_edge_by_edge(reference: Any, batch_tokens: int) -> None:
    run = runner(reference=reference, batch_tokens=batch_tokens)
    for n in (25, 55, 90):
        circuit = random_edges(GRAPH, n, seed=n)
        expected = []
        for clean, corrupt in zip(CLEAN, CORRUPT, strict=True):
            with torch.no_grad():
                there = slow_means(CORRUPT) if reference == "mean" else slow_pass(MODEL, corrupt)[1]
            there = {name: write[: len(clean)] for name, write in there.items()}
            expected.append(metric(slow_run(MODEL, circuit.edges, clean, there)))
        np.testing.assert_allclose(run(circuit), expected, atol=1e-10)
        assert np.abs(run(circuit) - run(run.empty)).max() > 1e-3


def test_all_edges_are_the_model_and_none_the_corrupt_prompt() -> None:
    with torch.no_grad():
        clean, corrupt = ([metric(MODEL([row])[0][0]) for row in rows] for rows in (CLEAN, CORRUPT))
    run = runner()
    np.testing.assert_allclose(run.clean, clean, atol=1e-12)
    np.testing.assert_allclose(run(run.whole), clean, atol=1e-10)
    np.testing.assert_allclose(run(run.empty), corrupt, atol=1e-10)
    means = runner(reference="mean")
    np.testing.assert_allclose(means(means.whole), clean, atol=1e-10)
    found = run_circuit(MODEL, run.empty, CLEAN, CORRUPT, TARGET)
    np.testing.assert_array_equal(found, run(run.empty))


def test_in_float32_the_whole_circuit_is_the_model_to_rounding() -> None:
    model = make_model(n_layers=3)
    run = CircuitRunner(model, CLEAN, CORRUPT, logit_difference(model, 6, 8))
    np.testing.assert_allclose(run(run.whole), run.clean, atol=1e-5)


@pytest.mark.parametrize("target", [loss(), kl(), kl(every_position=True)], ids=str)
def test_other_targets(target: Target) -> None:
    run = runner(target=target)
    with torch.no_grad():
        here, there = (MODEL([rows[0]])[0][0].log_softmax(dim=-1) for rows in (CLEAN, CORRUPT))
    divergence = (here.exp() * (here - there)).sum(dim=-1)
    expected = {
        "loss": -there[:-1].gather(-1, torch.tensor(CLEAN[0])[1:, None]).mean(),
        "KL divergence": divergence.mean() if target.every_position else divergence[-1],
    }[target.name]
    assert run(run.empty)[0] == pytest.approx(float(expected), abs=1e-9)
    assert run(run.whole)[0] == pytest.approx(run.clean[0], abs=1e-9)


def test_pruning_keeps_what_lies_on_a_path_and_changes_no_resampled_result() -> None:
    dead = ["a0.h1->m0", "input->a1.h2<q>", "m0->m1", "a1.h0->logits"]
    alive = ["input->a0.h0<v>", "a0.h0->m1", "m1->logits", "input->logits"]
    circuit = Circuit.of(MODEL, [*dead, *alive])
    assert set(circuit.pruned().edges) == {*alive}
    assert circuit.pruned().nodes == ["input", "a0.h0", "m1"]
    run = runner()
    for seed in range(4):
        random = random_edges(GRAPH, 25, seed)
        assert len(random.pruned()) < 25
        np.testing.assert_allclose(run(random.pruned()), run(random), atol=1e-10)
    assert run.whole.pruned().edges == GRAPH.edges


def test_top_edges_are_the_largest() -> None:
    circuit = top_edges(SCORES, 7)
    assert set(circuit.edges) == {edge for edge, _ in SCORES.top(7)}
    assert len(top_edges(SCORES, 0)) == 0
    assert top_edges(SCORES, len(GRAPH)).edges == GRAPH.edges


def test_greedy_edges_all_lead_to_the_logits() -> None:
    chosen: list[str] = []
    for n in range(1, 15):  # each step adds the largest edge into what is read already
        read = {"logits"} | {edge.partition("->")[0] for edge in chosen}
        candidates = [
            edge
            for edge in GRAPH.edges
            if edge not in chosen and edge.partition("->")[2].partition("<")[0] in read
        ]
        chosen.append(max(candidates, key=lambda edge: abs(SCORES.score(edge))))
        assert set(greedy_edges(SCORES, n).edges) == set(chosen)
    assert greedy_edges(SCORES, len(GRAPH)).edges == GRAPH.edges


def test_random_edges_grow_by_seed() -> None:
    small, large = (set(random_edges(GRAPH, n, 3).edges) for n in (4, 30))
    assert (len(small), len(large)) == (4, 30)
    assert small < large
    assert small != set(random_edges(GRAPH, 4, 4).edges)


def test_edges_and_nodes_can_be_taken_away() -> None:
    whole = runner().whole
    without = whole.without(["a0.h1", "m0->m1"])
    gone = set(whole.edges) - set(without.edges)
    assert gone == {edge for edge in whole.edges if "a0.h1" in edge} | {"m0->m1"}
    assert set(without.complement().edges) == gone
    assert repr(without) == f"Circuit({110 - len(gone)} of 110 edges, 10 nodes)"


@pytest.mark.parametrize("select", ["top", "greedy"])
def test_the_curve_is_between_no_edge_and_all(select: Any) -> None:
    run = runner()
    curve = faithfulness_curve(run, SCORES, select=select, seeds=[0, 1])
    assert curve.fractions == list(FRACTIONS)
    assert curve.n_edges == [0, 0, 0, 1, 2, 5, 11, 22, 55, 110]
    clean, empty = run.clean.mean(), run(run.empty).mean()
    select_edges = top_edges if select == "top" else greedy_edges
    for n, value in zip(curve.n_edges, curve.faithfulness, strict=True):
        found = run(select_edges(SCORES, n)).mean()
        assert value == pytest.approx((found - empty) / (clean - empty), abs=1e-10)
    assert curve.faithfulness[[0, -1]] == pytest.approx([0, 1], abs=1e-9)
    assert curve.random.shape == (2, 10)
    assert curve.random[:, -1] == pytest.approx([1, 1], abs=1e-9)
    assert curve.random[1, 6] == pytest.approx(
        (run(random_edges(GRAPH, 11, 1)).mean() - empty) / (clean - empty)
    )
    # As MIB's script adds it up.
    cpr = cmd = 0.0
    for i in range(9):
        step = FRACTIONS[i + 1] - FRACTIONS[i]
        here, there = curve.faithfulness[i], curve.faithfulness[i + 1]
        cpr += step * (here + there) / 2
        cmd += step * (abs(1 - here) + abs(1 - there)) / 2
    assert (curve.cpr, curve.cmd) == pytest.approx((cpr, cmd))
    lines = repr(curve).splitlines()
    assert lines[0].endswith("(reference: resample)")
    assert lines[-1].startswith(f"CMD (lower is better) {curve.cmd:.3f}; random edges")
    assert list(curve.to_dataframe().columns)[:3] == ["fraction", "edges", "faithfulness"]


def planted() -> Transformer:
    """A model in which only two heads write anything that depends on the prompt."""
    model = make_model(dtype=torch.float64)
    with torch.no_grad():
        for number, layer in enumerate(model.layers):
            layer.mlp.out_layer.weight.zero_()
            kept = slice(4, 8) if number == 0 else slice(8, 12)  # the columns of one head
            others = torch.ones(16, dtype=torch.bool)
            others[kept] = False
            layer.attn.out_proj.weight[:, others] = 0
    return model


def test_a_planted_circuit_is_found_and_is_better_than_random_edges() -> None:
    model = planted()
    target = logit_difference(model, [6, 8], 12)
    inputs = [f"{head}<{letter}>" for head in ("a0.h1", "a1.h2") for letter in "qkv"]
    known = {f"input->{name}" for name in inputs} | {f"a0.h1->{name}" for name in inputs[3:]}
    known |= {f"{source}->logits" for source in ("input", "a0.h1", "a1.h2")}
    scores = edge_attribution(model, CLEAN, CORRUPT, target, ig_steps=5)
    assert {edge for edge in GRAPH.edges if scores.score(edge)} == known
    run = CircuitRunner(model, CLEAN, CORRUPT, target)
    np.testing.assert_allclose(run(top_edges(scores, 12)), run.clean, atol=1e-10)
    for reference in ("resample", "mean"):
        run = CircuitRunner(model, CLEAN, CORRUPT, target, reference=wrong(reference))
        curve = faithfulness_curve(run, scores)
        assert curve.cmd < 0.5 * curve.random_cmd.min()
        assert curve.faithfulness[7:] == pytest.approx([1, 1, 1], abs=1e-9)


def test_estimates_follow_the_measured_effects_of_single_edges() -> None:
    run = runner()
    measured = [run.mean(run.whole.without([edge])) - run.clean.mean() for edge in GRAPH.edges]
    estimates = [SCORES.score(edge) for edge in GRAPH.edges]
    assert np.corrcoef(measured, estimates)[0, 1] > 0.8


def test_completeness_compares_circuit_and_model_after_the_same_removals() -> None:
    run, circuit = runner(reference="mean"), top_edges(SCORES, 30)
    found = completeness(run, circuit, [["m0"], circuit.edges[:3]])
    assert found.removed == [[], ["m0"], circuit.edges[:3], circuit.edges]
    for i, part in enumerate(found.removed):
        assert found.circuit[i] == pytest.approx(run.mean(circuit.without(part)))
        assert found.model[i] == pytest.approx(run.mean(run.whole.without(part)))
    assert found.faithfulness == pytest.approx(abs(run.clean.mean() - run.mean(circuit)))
    assert found.incompleteness == found.gaps.max()
    assert found.circuit[-1] == pytest.approx(run.mean(run.empty))
    assert found.model[-1] == pytest.approx(run.mean(circuit.complement()))
    assert "m0" in repr(found)
    drawn = completeness(run, circuit, 4, seed=1, random_seeds=())
    assert [set(part) <= set(circuit.edges) for part in drawn.removed] == [True] * 6
    assert len({len(part) for part in drawn.removed}) > 2
    whole = completeness(run, run.whole, 3)
    assert whole.incompleteness == pytest.approx(0, abs=1e-10)


def other_scores() -> EdgeScores:
    model = make_model(dtype=torch.float64, n_layers=1)
    return edge_attribution(model, CLEAN, CORRUPT, TARGET)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: Circuit.of(MODEL, ["a0.h1->m9"]), "has no edge 'a0.h1->m9'"),
        (lambda: Circuit.of(MODEL, wrong("a0.h1->m1")), "a list of edges"),
        (lambda: runner().whole.without(["a7.h1"]), "has no edge 'a7.h1'"),
        (lambda: top_edges(SCORES, 111), "0 to 110 edges, asked for 111"),
        (lambda: top_edges(SCORES, wrong(2.5)), "whole number of at least 0, found 2.5"),
        (lambda: random_edges(GRAPH, -1, 0), "at least 0, found -1"),
        (lambda: runner(reference="means"), "Did you mean 'mean'"),
        (lambda: runner(corrupt=CORRUPT[:2]), "one corrupt prompt for each of 3"),
        (lambda: runner(corrupt=[[1, 2]], reference="mean"), "longest reference prompt 2"),
        (lambda: runner()(Circuit.of(EdgeGraph(1, 4), [])), "of a model of 1 layers and 4 heads"),
        (lambda: faithfulness_curve(runner(), other_scores()), "of other sizes"),
        (lambda: faithfulness_curve(runner(), SCORES, fractions=[0.5, 0.1]), "must ascend"),
        (lambda: faithfulness_curve(runner(), SCORES, select=wrong("best")), "found 'best'"),
        (lambda: faithfulness_curve(runner(corrupt=CLEAN), SCORES), "nothing to explain"),
    ],
)
def test_bad_input(call: Any, message: str) -> None:
    with pytest.raises(InputError, match=message):
        call()


def test_the_curve_is_drawn() -> None:
    pytest.importorskip("matplotlib").use("agg")
    curve = faithfulness_curve(runner(), SCORES, fractions=(0.01, 0.1, 1.0), seeds=(0, 1))
    (axes,) = curve.plot().axes
    drawn = [line.get_ydata() for line in axes.lines]
    np.testing.assert_array_equal(drawn[2], curve.faithfulness)
    np.testing.assert_array_equal(drawn[:2], curve.random)
    assert axes.get_xscale() == "log"
    assert "-0.000" not in repr(curve)
