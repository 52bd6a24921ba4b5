"""Tracing a node: sums of direct effects, finite differences, and what may not be traced."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from neuron_explainer.analysis.effects import Node, NodeTable
from neuron_explainer.analysis.targets import kl, logit_difference
from neuron_explainer.analysis.trace import trace
from neuron_explainer.errors import InputError
from neuron_explainer.models.autoencoder import Autoencoder
from neuron_explainer.models.autoencoder_context import AutoencoderConfig, AutoencoderContext
from neuron_explainer.models.autoencoders.nonlinearities import TopK
from neuron_explainer.models.hooks import TransformerHooks
from neuron_explainer.models.interventions import freeze as frozen_at
from neuron_explainer.models.interventions import scale
from tests.conftest import make_model
from tests.models.test_interventions import wrong

MODEL = make_model(dtype=torch.float64, n_layers=3)
PROMPT = [3, 1, 4, 1, 5, 9, 2]
ALL = 10**6
NEURON = Node("1/mlp.post_act", "neuron", 7, 4)
PAIR = Node("2/attn.qk_probs", "pair", 1, 5, attended=3)
HEAD = Node("2/attn.v_out", "head", 1, 5)
TARGET = logit_difference(MODEL, 6, 8)


def captured(place: str, hooks: TransformerHooks | None = None) -> Tensor:
    with torch.no_grad():
        found: Tensor = MODEL.capture([PROMPT], place, hooks=hooks)[place][0]
    return found


def traced(node: Node, **settings: Any) -> NodeTable:
    return trace(MODEL, PROMPT, node, **{"top_k": ALL, **settings})


@pytest.mark.parametrize("attention", ["heads", "pairs"])
def test_direct_effects_sum_to_a_neurons_pre_activation(attention: Any) -> None:
    found = traced(NEURON, attention=attention)
    expected = float(captured("1/mlp.pre_act")[4, 7])
    assert found.target == pytest.approx(expected, abs=1e-12)
    assert found.totals["direct"] == pytest.approx(expected, abs=1e-9)
    # The constant is the biases' share, not a remainder.
    (constant,) = [i for i, node in enumerate(found.nodes) if node.location == "1/mlp.pre_act"]
    layer = list(MODEL.layers)[1]
    bias = layer.mlp.in_layer.bias[7] + layer.mlp.in_layer.weight[7] @ layer.ln_2.bias
    assert found.values["direct"][constant] == pytest.approx(float(bias.detach()), abs=1e-9)
    assert all(node.location[0] in "01r" for node in found.nodes)
    assert not any("1/mlp.post_act" in str(node) for node in found.nodes)


@pytest.mark.parametrize("through", ["q", "k"])
def test_direct_effects_sum_to_a_score_through_query_or_key(through: Any) -> None:
    found = traced(PAIR, through=through)
    score = float(captured("2/attn.qk_logits")[5, 3, 1])
    assert found.target == pytest.approx(score, abs=1e-12)
    assert found.totals["direct"] == pytest.approx(score, abs=1e-9)
    # Through the query only the query's own position has a direct effect, through the key the key's.
    position = 5 if through == "q" else 3
    for i, node in enumerate(found.nodes):
        if node.location != "2/attn.qk_logits" and node.position != position:
            assert found.values["direct"][i] == 0


def test_a_score_through_both_adds_the_two() -> None:
    q, k, both = (
        traced(PAIR, through=through, measures=["act_grad"]) for through in ("q", "k", "qk")
    )
    by_node = [dict(zip(t.nodes, t.values["act_grad"], strict=True)) for t in (q, k, both)]
    for node, value in by_node[2].items():
        assert value == pytest.approx(by_node[0][node] + by_node[1][node], abs=1e-9)


@pytest.mark.parametrize("node", [HEAD, PAIR], ids=str)
def test_through_the_value_the_goal_is_the_write_along_the_later_gradient(node: Node) -> None:
    found = traced(node, through="v", downstream=TARGET)
    with torch.enable_grad():
        base = MODEL.capture([PROMPT], "2/resid.torso.delta_attn")["2/resid.torso.delta_attn"]
        leaf = base.detach().requires_grad_()
        scales = MODEL.capture([PROMPT], "resid.ln_f.scale")
        hooks = TransformerHooks().append_at("2/resid.torso.delta_attn", lambda _: leaf)
        hooks = hooks + frozen_at("resid.ln_f.scale", scales)
        logits = MODEL([PROMPT], hooks=hooks)[0][0, -1]
        (logits[6] - logits[8]).backward()
    assert leaf.grad is not None
    out = list(MODEL.layers)[2].attn.out_proj.weight.view(16, 4, 4)[:, 1]
    v, weights = captured("2/attn.v")[:, 1], captured("2/attn.qk_probs")[5, :, 1]
    writes = weights[:, None] * (v @ out.T)
    write = writes.sum(dim=0) if node.attended is None else writes[node.attended]
    expected = float((write @ leaf.grad[0, 5]).detach())
    assert found.target == pytest.approx(expected, abs=1e-9)
    assert found.totals["direct"] == pytest.approx(expected, abs=1e-9)


@pytest.fixture(scope="module")
def context(tmp_path_factory: pytest.TempPathFactory) -> AutoencoderContext:
    torch.manual_seed(1)
    autoencoder = Autoencoder(64, 16, activation=TopK(6), dtype=torch.float64)
    with torch.no_grad():
        for parameter in autoencoder.parameters():
            parameter.add_(0.3 * torch.randn(parameter.shape, dtype=torch.float64))
    folder: Path = tmp_path_factory.mktemp("autoencoder")
    autoencoder.save(folder / "a")
    paths = dict.fromkeys(range(3), folder / "a")
    return AutoencoderContext(
        AutoencoderConfig("resid.torso.delta_mlp", paths), "cpu", dtype=torch.float64
    )


def test_act_grad_of_a_latent_is_the_finite_difference(context: AutoencoderContext) -> None:
    place = "2/resid.torso.delta_mlp"
    latents = context.get_autoencoder(2).encode(captured(place))
    latent = int(latents[4].argmax())
    node = Node(place, "latent", latent, 4)
    found = traced(node, autoencoders=[context], freeze=(), measures=["act_grad"])
    assert found.target == pytest.approx(float(latents[4, latent]), abs=1e-9)
    step = 1e-5

    def value(hooks: TransformerHooks) -> float:
        return float(context.get_autoencoder(2).encode_pre_act(captured(place, hooks))[4, latent])

    checked = 0
    for i in found.order("act_grad")[:12]:
        other = found.nodes[i]
        if other.kind not in ("head", "embedding", "latent"):
            continue
        settings: dict[str, Any] = {"positions": other.position}
        if other.kind != "embedding":
            settings["units"] = other.unit
        if other.kind == "latent":
            settings["autoencoders"] = context
        up, down = (scale(other.location, 1 + sign * step, **settings) for sign in (1, -1))
        slope = (value(up) - value(down)) / (2 * step)
        assert found.values["act_grad"][i] == pytest.approx(slope, abs=1e-6), other
        checked += 1
    assert checked > 4


@pytest.mark.parametrize(
    ("node", "settings", "message"),
    [
        (NEURON, {"through": "q"}, "has one input"),
        (PAIR, {}, "must be 'q', 'k', 'qk' or 'v'"),
        (HEAD, {"through": "q"}, "give the attended position"),
        (HEAD, {"through": "v"}, "needs a target downstream"),
        (Node("1/resid.torso.delta_mlp", "latent", 3, 2), {}, "give its autoencoders"),
        (Node("1/resid.torso.delta_mlp", "bias", 0, 2), {}, "cannot be traced"),
        (Node("mlp.post_act", "neuron", 3, 2), {}, "must name a layer"),
        (Node("1/mlp.post_act", "neuron", 3, 9), {}, "0 to 6 in this prompt, found 9"),
        (NEURON, {"measures": ["ablation"]}, "found 'ablation'"),
        (NEURON, {"measures": ["activation"]}, "that chooses nodes"),
        (NEURON, {"measures": []}, "that chooses nodes"),
        (NEURON, {"top_k": 0}, "at least 1, found 0"),
        (NEURON, {"attention": "neurons"}, "'heads' or 'pairs'"),
        (wrong("1/mlp.post_act neuron 3 at 2"), {}, "expected a Node"),
        (HEAD, {"through": "v", "downstream": kl()}, "a distance from the unchanged run"),
    ],
)
def test_bad_input(node: Node, settings: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        trace(MODEL, PROMPT, node, **wrong(settings))


@pytest.mark.parametrize(
    ("node", "message"),
    [
        (Node("0/mlp.post_act", "neuron", 48, 2), "0 to 47, found 48"),
        (Node("0/mlp.post_act", "neuron", -1, 2), "0 to 47, found -1"),
        (Node("0/attn.qk_probs", "pair", 4, 2, 1), "0 to 3, found 4"),
        (Node("0/attn.v_out", "neuron", 3, 2), "at a location of mlp"),
        (Node("0/attn.qk_probs", "pair", 1, 2, 3), "to earlier ones"),
    ],
    ids=str,
)
def test_units_that_the_model_lacks(node: Node, message: str) -> None:
    with pytest.raises(InputError, match=message):
        traced(node, through="q" if node.kind == "pair" else None)


def test_a_trace_under_an_intervention_and_of_some_positions() -> None:
    hooks = scale("0/attn.v_out", 0.5, units=2)
    found = traced(NEURON, hooks=hooks)
    assert found.target == pytest.approx(float(captured("1/mlp.pre_act", hooks)[4, 7]), abs=1e-12)
    assert found.totals["direct"] == pytest.approx(found.target, abs=1e-9)
    last = Node("2/attn.v_out", "head", 1, 6)
    changed, plain = (
        traced(last, through="v", downstream=TARGET, hooks=given) for given in (hooks, None)
    )
    assert abs(changed.target - plain.target) > 1e-3
    # A neuron reads the stream at its own position alone.
    some = traced(NEURON, hooks=hooks, positions=[4])
    assert {node.position for node in some.nodes} == {4}
    assert some.totals["direct"] == pytest.approx(found.target, abs=1e-9)


@pytest.mark.parametrize("latent", [64, -1])
def test_latents_that_the_autoencoder_lacks(context: AutoencoderContext, latent: int) -> None:
    node = Node("1/resid.torso.delta_mlp", "latent", latent, 2)
    with pytest.raises(InputError, match=f"0 to 63, found {latent}"):
        traced(node, autoencoders=[context])


def test_one_autoencoder_for_all_layers(context: AutoencoderContext) -> None:
    (path,) = {*context.autoencoder_config.paths.values()}
    config = AutoencoderConfig(context.location, {None: path})
    one = AutoencoderContext(config, "cpu", dtype=torch.float64)
    node = Node("1/resid.torso.delta_mlp", "latent", 3, 2)
    found, expected = (traced(node, autoencoders=[each]) for each in (one, context))
    assert found.nodes == expected.nodes
    assert found.target == expected.target


def test_two_autoencoders_of_one_part_of_the_stream(context: AutoencoderContext) -> None:
    with pytest.raises(InputError, match="same part of the stream"):
        traced(NEURON, autoencoders=[context, context])
