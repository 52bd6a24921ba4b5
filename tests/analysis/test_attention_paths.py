"""What attention carries to latents: sums, and measurements with patterns and norms held fixed."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from neuron_explainer.analysis.attention_paths import (
    head_loadings,
    token_pairs,
)
from neuron_explainer.analysis.effects import Node
from neuron_explainer.errors import InputError
from neuron_explainer.models.autoencoder import Autoencoder
from neuron_explainer.models.autoencoder_context import AutoencoderConfig, AutoencoderContext
from neuron_explainer.models.autoencoders.nonlinearities import TopK
from neuron_explainer.models.hooks import TransformerHooks
from neuron_explainer.models.interventions import add, freeze
from tests.conftest import make_model
from tests.models.test_interventions import wrong
from tests.models.test_language_model import make

MODEL = make_model(dtype=torch.float64, n_layers=3)
FIRST = next(iter(MODEL.layers))
PROMPT = [3, 1, 4, 1, 5, 9, 2]
Make = Any


@pytest.fixture(scope="module")
def context(tmp_path_factory: pytest.TempPathFactory) -> Make:
    def build(path: str, dtype: torch.dtype = torch.float64, **settings: Any) -> AutoencoderContext:
        torch.manual_seed(7)
        width = 48 if path == "mlp.post_act" else 16
        given = {"activation": TopK(6), "dtype": dtype, **settings}
        autoencoder = Autoencoder(32, width, **given)
        with torch.no_grad():
            for parameter in autoencoder.parameters():
                parameter.add_(0.3 * torch.randn(parameter.shape, dtype=dtype))
        folder: Path = tmp_path_factory.mktemp("autoencoder")
        autoencoder.save(folder / "a")
        config = AutoencoderConfig(path, dict.fromkeys(range(2), folder / "a"))
        return AutoencoderContext(config, "cpu", dtype=dtype)

    return build


ATTENTION = ["attn.v_out", "resid.torso.delta_attn"]


@pytest.mark.parametrize("path", ATTENTION)
@pytest.mark.parametrize("normalization", ["none", "center", "layer_norm", "rms"])
def test_pairs_and_biases_sum_to_the_pre_activation(
    path: str, normalization: str, context: Make
) -> None:
    found = token_pairs(MODEL, PROMPT, context(path, input_normalization=normalization), 1, 5)
    autoencoder = context(path).get_autoencoder(1)
    with torch.no_grad():
        x = MODEL.capture([PROMPT], f"1/{path}")[f"1/{path}"][0].flatten(1)
        mean = x.mean(dim=-1, keepdim=True) * (normalization in ("center", "layer_norm"))
        scale = {
            "layer_norm": x.std(dim=-1, keepdim=True) + 1e-5,
            "rms": x.square().mean(dim=-1, keepdim=True).sqrt(),
        }.get(normalization, torch.ones_like(mean))
        row = autoencoder.encoder.weight[5]
        pre = ((x - mean) / scale - autoencoder.pre_bias) @ row + autoencoder.latent_bias[5]
        # Biases by themselves, not what is left over.
        bias = autoencoder.latent_bias[5] - autoencoder.pre_bias @ row + torch.zeros(len(x))
        if path == "resid.torso.delta_attn":
            of_output: Tensor = list(MODEL.layers)[1].attn.out_proj.bias
            of_output = of_output - of_output.mean() * (normalization in ("center", "layer_norm"))
            bias = bias + of_output @ row / scale[:, 0]
    np.testing.assert_allclose(found.pre_activation, pre, atol=1e-10)
    np.testing.assert_allclose(found.bias, bias, atol=1e-10)
    np.testing.assert_allclose(found.values.sum((1, 2)) + found.bias, pre, atol=1e-10)
    assert not found.values[np.triu_indices(len(x), 1)].any()
    assert found.by_pair.shape == (7, 7)
    assert found.by_head.shape == (7, 4)


def test_a_pair_is_what_its_attention_weight_brings(context: Make) -> None:
    """Without normalisation, removing one attention weight takes away exactly the pair's value."""
    contexts = context("resid.torso.delta_attn")
    found = token_pairs(MODEL, PROMPT, contexts, 1, 5)
    for node, value in found.top(3) + found.top(2, position=4):

        def edit(x: Tensor, node: Node = node) -> Tensor:
            x = x.clone()
            x[:, node.position, node.attended, node.unit] = 0
            return x

        with torch.no_grad():
            hooks = TransformerHooks().append_at(node.location, edit)
            place = "1/resid.torso.delta_attn"
            x = MODEL.capture([PROMPT], place, hooks=hooks)[place][0]
            pre = contexts.get_autoencoder(1).encode_pre_act(x)[node.position, 5]
        assert found.pre_activation[node.position] - float(pre) == pytest.approx(value, abs=1e-10)
    assert all(node.position == 4 for node, _ in found.top(5, position=4))
    text = repr(found)
    assert text.startswith("1/resid.torso.delta_attn latent 5: largest pre-activation")
    assert len(found.to_dataframe()) == 4 * 7 * 8 // 2


def test_heads_that_share_values_each_bring_their_own(context: Make) -> None:
    model = make("llama")
    for path in ATTENTION:
        contexts = context(path, dtype=torch.float32)
        found = token_pairs(model, PROMPT, contexts, 1, 5)
        assert found.values.shape == (7, 7, 4)
        # Llama has no biases in attention, so only the autoencoder's are left.
        autoencoder = contexts.get_autoencoder(1)
        bias = autoencoder.latent_bias[5] - autoencoder.pre_bias @ autoencoder.encoder.weight[5]
        np.testing.assert_allclose(found.bias, float(bias.detach()), atol=1e-4)


PLACE = "resid.torso.delta_mlp"


def measured(
    source: Node, target_place: str, read: Any, write: Tensor, blocked: tuple[int, ...] = ()
) -> float:
    """The change of the target's pre-activation if a write is taken away, all else held fixed.

    ``blocked``: layers whose attention output is held fixed too.
    """
    last = int(target_place[0])
    places = ["attn.qk_probs", *(f"resid.torso.{norm}.scale" for norm in ("ln_attn", "ln_mlp"))]
    places += [f"{layer}/{PLACE}" for layer in range(last)]
    places += [f"{layer}/resid.torso.delta_attn" for layer in blocked]
    with torch.no_grad():
        kept = MODEL.capture([PROMPT], places)
        hooks = freeze(next(iter(kept)), kept)
        for place in list(kept)[1:]:
            hooks = hooks + freeze(place, kept)
        change = torch.zeros(1, len(PROMPT), 16, dtype=torch.float64)
        change[0, source.position] = -write
        hooks = hooks + add(f"{source.location[0]}/resid.torso.post_mlp", change)
        here, there = (
            MODEL.capture([PROMPT], target_place, hooks=h)[target_place][0] for h in (None, hooks)
        )
        return float(read(here) - read(there))


@pytest.mark.parametrize("position", [6, 3])
def test_head_loadings_are_what_each_head_carries(position: int) -> None:
    source = Node("0/mlp.post_act", "neuron", 7, 3)
    target = Node("2/mlp.post_act", "neuron", 11, position)
    found = head_loadings(MODEL, PROMPT, source, target)
    with torch.no_grad():
        value = MODEL.capture([PROMPT], "0/mlp.post_act")["0/mlp.post_act"][0, 3, 7]
        write = value * FIRST.mlp.out_layer.weight[:, 7]

    def read(pre_act: Tensor) -> Tensor:
        return pre_act[position, 11]

    def effect(*blocked: int) -> float:
        return measured(source, "2/mlp.pre_act", read, write, blocked)

    assert found.layers == [1, 2]
    assert found.total == pytest.approx(effect(), abs=1e-9)
    assert found.bypass == pytest.approx(effect(1, 2), abs=1e-9)
    assert found.values[1].sum() == pytest.approx(effect(1) - effect(1, 2), abs=1e-9)
    assert (found.bypass != 0) == (position == 3)
    layer, head, loading = found.top(1)[0]
    assert loading == found.values[layer - 1, head]
    assert abs(loading) == np.abs(found.values).max() > 1e-6


def test_one_heads_loading_is_what_is_lost_without_its_output() -> None:
    """Heads of one layer: zero the others' output matrices, and only one is left."""
    source = Node("1/mlp.post_act", "neuron", 7, 3)
    target = Node("2/mlp.post_act", "neuron", 11, 5)
    found = head_loadings(MODEL, PROMPT, source, target)
    layer: Any = list(MODEL.layers)[2]
    with torch.no_grad():
        value = MODEL.capture([PROMPT], "1/mlp.post_act")["1/mlp.post_act"][0, 3, 7]
        write = value * list(MODEL.layers)[1].mlp.out_layer.weight[:, 7]
        places = [
            f"2/{path}"
            for path in ("resid.torso.ln_attn.scale", "resid.torso.ln_mlp.scale", "attn.qk_probs")
        ]
        captured = MODEL.capture([PROMPT], places)
        first, second, pattern = (captured[place][0] for place in places)
        x = (write - write.mean()) / first[3] * layer.ln_1.weight
        for head in range(4):
            rows = slice(4 * head, 4 * head + 4)
            out = layer.attn.out_proj.weight[:, rows] @ (layer.attn.v_proj.weight[rows] @ x)
            out = (out - out.mean()) / second[5] * layer.ln_2.weight * pattern[5, 3, head]
            expected = float(layer.mlp.in_layer.weight[11] @ out)
            assert found.values[0, head] == pytest.approx(expected, abs=1e-9)


def test_head_loadings_between_latents(context: Make) -> None:
    contexts = context("mlp.post_act")
    place = "0/mlp.post_act"
    with torch.no_grad():
        x = MODEL.capture([PROMPT], place)[place][0]
        autoencoder = contexts.get_autoencoder(0)
        latents = autoencoder.encode(x)
        unit = int(latents[3].argmax())
        write = float(latents[3, unit]) * autoencoder.directions[unit]
        write = FIRST.mlp.out_layer.weight @ write
    source = Node(place, "latent", unit, 3)
    target = Node("2/mlp.post_act", "neuron", 11, 5)
    found = head_loadings(MODEL, PROMPT, source, target, autoencoders=[contexts])
    expected = measured(source, "2/mlp.pre_act", lambda pre: pre[5, 11], write)
    assert found.total == pytest.approx(expected, abs=1e-9)
    # A latent as target: its pre-activation's gradient goes through the neurons' nonlinearity.
    later = Node("1/mlp.post_act", "latent", 4, 5)
    to_latent = head_loadings(MODEL, PROMPT, source, later, autoencoders=[contexts])
    step = 1e-6

    def read(post_act: Tensor) -> Tensor:
        found: Tensor = contexts.get_autoencoder(1).encode_pre_act(post_act)[5, 4]
        return found

    slope = measured(source, "1/mlp.post_act", read, step * write) / step
    assert to_latent.total == pytest.approx(slope, abs=1e-6)
    assert repr(to_latent).startswith(
        f"0/mlp.post_act latent {unit} at 3 gives 1/mlp.post_act latent 4"
    )


def node(location: str = "0/mlp.post_act", kind: Any = "neuron", position: int = 3) -> Node:
    return Node(location, kind, 2, position)


@pytest.mark.parametrize(
    ("source", "target", "message"),
    [
        (node("1/mlp.post_act"), node("1/mlp.post_act"), "in a later layer"),
        (node("mlp.post_act"), node("1/mlp.post_act"), "must name a layer"),
        (node(position=9), node("1/mlp.post_act"), "0 to 6"),
        (node(), node("1/attn.v_out", "head"), "expected a neuron, or a latent"),
        (node(kind="latent"), node("1/mlp.post_act"), r"autoencoders=\[context\]"),
        (node("0/attn.v_out", "head"), node("1/mlp.post_act"), "with its autoencoders"),
    ],
)
def test_bad_nodes(source: Node, target: Node, message: str) -> None:
    with pytest.raises(InputError, match=message):
        head_loadings(MODEL, PROMPT, source, target)


def test_bad_autoencoders(context: Make) -> None:
    for contexts, latent, message in [
        (context("resid.torso.delta_mlp"), 5, "expected autoencoders of attn.v_out"),
        (context("attn.v_out"), 32, "latents are 0 to 31, found 32"),
        (context("attn.v_out", activation=None, glu=True), 5, "gated"),
    ]:
        with pytest.raises(InputError, match=message):
            token_pairs(MODEL, PROMPT, contexts, 1, latent)
    with pytest.raises(InputError, match="one prompt"):
        token_pairs(MODEL, wrong([PROMPT]), context("attn.v_out"), 1, 5)
