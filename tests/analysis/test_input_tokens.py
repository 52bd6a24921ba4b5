"""Which tokens' embeddings excite a unit: against the model's own pass and against formulas."""

import numpy as np
import pytest
import torch
from torch import Tensor

from neuron_explainer.analysis.input_tokens import InputReader, input_tokens
from neuron_explainer.errors import InputError, LocationError
from neuron_explainer.models.autoencoder import Autoencoder, TopK
from neuron_explainer.models.model_context import ModelContext
from neuron_explainer.models.weight_names import WeightLocationType as W
from tests.analysis.direction_models import (
    D,
    F,
    V,
    array,
    autoencoder,
    hugging_face_context,
    own_context,
)

FAMILIES = ["own", "gpt2", "gpt_neox", "llama", "gemma", "phi"]
ABSOLUTE = {"own", "gpt2"}
ALL_TOKENS = torch.arange(V)[:, None]


@pytest.fixture(scope="module")
def contexts(tmp_path_factory: pytest.TempPathFactory) -> dict[str, ModelContext]:
    found: dict[str, ModelContext] = {"own": own_context(tmp_path_factory.mktemp("own"))}
    return found | {name: hugging_face_context(name) for name in FAMILIES[1:]}


def of_model(made: Autoencoder, inputs: Tensor) -> np.ndarray:
    """Pre-activations ``[l, v]`` of what the model holds at a location for each token alone."""
    flat = inputs.reshape(V, -1).to(made.dtype)
    return array(made.encode_pre_act(flat)).T


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(
    "path", ["resid.torso.post_ln_attn", "attn.v_out", "resid.torso.delta_attn"]
)
def test_layer_0_is_exact_for_attention(family: str, path: str, contexts) -> None:
    context = contexts[family]
    inputs = context.get_or_create_model().capture(ALL_TOKENS, f"0/{path}")[f"0/{path}"]
    made = autoencoder(f"0/{path}", inputs.reshape(V, -1).shape[1])
    reader = InputReader(context, made, position=0 if family in ABSOLUTE else None)
    assert not reader.direct_path_only
    expected = of_model(made, inputs)
    np.testing.assert_allclose(
        reader.pre_activations(range(40)), expected, rtol=0, atol=1e-5 * np.abs(expected).max()
    )


@pytest.mark.parametrize("family", FAMILIES)
def test_neurons_read_the_norm_of_the_embedding(family: str, contexts) -> None:
    """The model itself, with the stream before the MLP replaced by the embedding."""
    context = contexts[family]
    model = context.get_or_create_model()
    reader = InputReader(context, "1/mlp.post_act")
    assert reader.direct_path_only
    found = reader.pre_activations([2, 40, 7])
    x = context.get_weight(W.EMBEDDING).to(model.dtype)
    normed = model.reader("1/resid.torso.post_ln_mlp")(x)
    expected = array(model.reader("1/mlp.pre_act")(normed))[:, [2, 40, 7]].T
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-5 * np.abs(expected).max())


def test_neurons_of_our_own_model_are_the_formula(contexts) -> None:
    context = contexts["own"]
    model = context.get_or_create_model()
    layer = next(iter(model.layers))
    e = array(model.tok_embed.weight)
    centred = e - e.mean(axis=1, keepdims=True)
    normed = centred / np.sqrt((centred**2).mean(axis=1, keepdims=True) + 1e-5)
    normed = normed * array(layer.ln_2.weight) + array(layer.ln_2.bias)
    expected = normed @ array(layer.mlp.in_layer.weight[5]) + array(layer.mlp.in_layer.bias[5])
    found = InputReader(context, "0/mlp.pre_act").pre_activations([5])[0]
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-5 * np.abs(expected).max())


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(("path", "n"), [("mlp.post_act", F), ("resid.torso.delta_mlp", D)])
def test_latents_behind_the_mlp_read_it(family: str, path: str, n: int, contexts) -> None:
    context = contexts[family]
    model = context.get_or_create_model()
    made = autoencoder(f"1/{path}", n, activation=TopK(3))
    found = InputReader(context, made).pre_activations([0, 9])
    x = context.get_weight(W.EMBEDDING).to(model.dtype)
    normed = model.reader("1/resid.torso.post_ln_mlp")(x)
    post = _mlp_post_act(family, model, normed)
    if path == "resid.torso.delta_mlp":
        post = _mlp_out(family, model, post)
    expected = of_model(made, post)[[0, 9]]
    np.testing.assert_allclose(found, expected, rtol=0, atol=2e-5 * np.abs(expected).max())


def _mlp_module(family: str, model):
    if family == "own":
        return list(model.layers)[1].mlp
    return model.layers[1].mlp


def _mlp_post_act(family: str, model, normed: Tensor):
    """By the names of each family's own parts."""
    mlp = _mlp_module(family, model)
    if family in ("llama", "gemma"):
        return mlp.act_fn(mlp.gate_proj(normed)) * mlp.up_proj(normed)
    names = {"own": "in_layer", "gpt2": "c_fc", "gpt_neox": "dense_h_to_4h", "phi": "fc1"}
    act = {"phi": "activation_fn"}.get(family, "act")
    return getattr(mlp, act)(getattr(mlp, names[family])(normed))


def _mlp_out(family: str, model, post: Tensor):
    names = {"own": "out_layer", "gpt2": "c_proj", "gpt_neox": "dense_4h_to_h", "phi": "fc2"}
    return getattr(_mlp_module(family, model), names.get(family, "down_proj"))(post)


def test_latents_of_the_stream_read_the_embedding(contexts) -> None:
    context = contexts["llama"]
    made = autoencoder("resid.post_emb", input_normalization="layer_norm")
    expected = of_model(made, context.get_weight(W.EMBEDDING))
    reader = InputReader(context, made)
    np.testing.assert_allclose(reader.pre_activations(range(40)), expected, rtol=0, atol=1e-4)
    assert not reader.direct_path_only
    assert InputReader(context, autoencoder("0/resid.torso.post_mlp")).direct_path_only


def test_folded_norms_change_nothing(tmp_path, contexts) -> None:
    model = own_context(tmp_path / "a").get_or_create_model()
    model.simplify().save(tmp_path / "simple")
    from neuron_explainer.models.model_context import StandardModelContext

    simple = StandardModelContext(tmp_path / "simple", device="cpu")
    for what in ("1/mlp.post_act", autoencoder("1/resid.torso.delta_mlp")):
        a = InputReader(contexts["own"], what).pre_activations([3, 17])
        b = InputReader(simple, what).pre_activations([3, 17])
        torch.testing.assert_close(a, b, rtol=0, atol=2e-4)


def test_lists_are_sorted_and_say_what_they_are(contexts) -> None:
    found = input_tokens(contexts["own"], "1/mlp.post_act", 5, 4)
    values = InputReader(contexts["own"], "1/mlp.post_act").pre_activations([5])[0]
    order = values.argsort(descending=True).tolist()
    assert [t.token for t in found.top] == order[:4]
    assert [t.token for t in found.bottom] == order[::-1][:4]
    assert "neuron 5 of 1/mlp.post_act" in repr(found)
    assert "direct path only" in found.note
    assert "<table>" in found._repr_html_()
    assert "1/mlp.post_act" in repr(InputReader(contexts["own"], "1/mlp.post_act"))


def test_what_cannot_be_read_is_an_error(contexts) -> None:
    own = contexts["own"]
    with pytest.raises(LocationError, match="is not known"):
        InputReader(own, "0/resid.torso.post_mlp")
    with pytest.raises(LocationError, match="is in every layer"):
        InputReader(own, "mlp.post_act")
    with pytest.raises(InputError, match="they are 0 to 47"):
        input_tokens(own, "0/mlp.post_act", 48)
    with pytest.raises(InputError, match="position must be"):
        input_tokens(own, "0/mlp.post_act", 4, position=12)
    with pytest.raises(LocationError, match="no single weight 'position_embedding'"):
        input_tokens(contexts["llama"], "0/mlp.post_act", 4, position=0)
    with pytest.raises(InputError, match="does not record where"):
        InputReader(own, autoencoder(None))
