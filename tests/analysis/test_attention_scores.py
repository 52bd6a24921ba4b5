"""Attention scores of directions, against the formula and against the model's own scores."""

import numpy as np
import pytest
import torch

from neuron_explainer.analysis.attention_scores import AttentionScores, Pair, attention_scores
from neuron_explainer.analysis.unit_directions import Units
from neuron_explainer.errors import InputError, LocationError
from neuron_explainer.models.hooks import TransformerHooks
from neuron_explainer.models.model_context import ModelContext
from neuron_explainer.models.weight_names import WeightLocationType as W
from tests.analysis.direction_models import (
    HEADS,
    D,
    F,
    array,
    autoencoder,
    hugging_face_context,
    own_context,
)

FAMILIES = ["own", "gpt2", "gpt_neox", "llama", "gemma", "phi"]
MEAN_SUBTRACTED = {"own", "gpt2", "gpt_neox", "phi"}


@pytest.fixture(scope="module")
def contexts(tmp_path_factory: pytest.TempPathFactory) -> dict[str, ModelContext]:
    found: dict[str, ModelContext] = {"own": own_context(tmp_path_factory.mktemp("own"))}
    return found | {name: hugging_face_context(name) for name in [*FAMILIES[1:], "qwen3"]}


@pytest.mark.parametrize("family", FAMILIES)
def test_scores_are_the_formula(family: str, contexts) -> None:
    context = contexts[family]
    a, b = autoencoder("0/resid.torso.delta_mlp", n_latents=30), autoencoder("0/mlp.post_act", F)
    rows = [array(a.decoder.weight.t())]
    rows.append(array(b.decoder.weight.t()) @ array(context.get_weight(W.MLP_TO_RESIDUAL, 0)))
    if family in MEAN_SUBTRACTED:
        rows = [x - x.mean(axis=1, keepdims=True) for x in rows]
    gain = array(context.get_weight(W.LAYER_NORM_GAIN_PRE_ATTN, 1))
    for head in range(HEADS):
        q, k = (array(context.get_weight(w, 1)[head]) for w in (W.ATTN_TO_QUERY, W.ATTN_TO_KEY))
        expected = (rows[0] * gain) @ q @ ((rows[1] * gain) @ k).T / np.sqrt(q.shape[1])
        found = attention_scores(context, a, b, 1, head)
        scores = found.queries @ found.keys.t()
        np.testing.assert_allclose(scores, expected, rtol=0, atol=1e-5 * np.abs(expected).max())
    assert ("rotary" in found.note) == (family not in ("own", "gpt2"))
    assert "30 latents of 0/resid.torso.delta_mlp as queries" in repr(found)


def test_scores_are_what_the_model_computes(contexts) -> None:
    """Streams that are multiples of the directions; the norm's scale and the biases divided out."""
    context = contexts["own"]
    model = context.get_or_create_model()
    a = autoencoder("0/resid.torso.post_mlp")
    rows = Units(context, a).rows([4, 9])
    layer = list(model.layers)[1]
    hooks = TransformerHooks().append_at("0/resid.torso.post_mlp", lambda x: rows[None] * 50)
    with torch.no_grad():
        for parameter in (layer.ln_1.bias, layer.attn.q_proj.bias, layer.attn.k_proj.bias):
            parameter.zero_()
        caught = model.capture(
            torch.tensor([[1, 2]]), ["1/attn.qk_logits", "1/resid.torso.ln_attn.scale"], hooks=hooks
        )
    scale = caught["1/resid.torso.ln_attn.scale"][0, :, 0] / 50
    for head in range(HEADS):
        model_score = caught["1/attn.qk_logits"][0, 1, 0, head] * scale[0] * scale[1]
        found = attention_scores(context, a, a, 1, head)
        torch.testing.assert_close(found.of_query(9)[4], model_score, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(found.of_key(4)[9], model_score, rtol=1e-4, atol=1e-4)


def test_top_pairs_are_those_of_all_pairs() -> None:
    torch.manual_seed(0)
    found = AttentionScores(
        torch.randn(13, 5), torch.randn(7, 5), "queries", "keys", "head 0 of layer 0", "note"
    )
    scores = (found.queries @ found.keys.t()).numpy()
    order = np.argsort(-scores, axis=None)[:6]
    expected = [(int(i // 7), int(i % 7)) for i in order]
    pairs = found.top_pairs(6, chunk_bytes=4 * 7 * 3)  # 3 queries at a time
    assert [(pair.query, pair.key) for pair in pairs] == expected
    assert pairs == found.top_pairs(6)
    assert len(found.top_pairs(1000)) == 91
    best = int(scores[2].argmax())
    assert found.attended_by(2, 1) == [Pair(2, best, float(found.of_query(2)[best]))]
    best = int(scores[:, 3].argmax())
    assert found.attending_to(3, 1) == [Pair(best, 3, float(found.of_key(3)[best]))]
    for call in (found.of_query, found.of_key):
        with pytest.raises(InputError, match="there is no unit"):
            call(13)
    with pytest.raises(InputError, match="k must be"):
        found.top_pairs(0)


def test_an_autoencoder_of_what_attention_reads_needs_no_norm(contexts) -> None:
    context = contexts["own"]
    made = autoencoder("1/resid.torso.post_ln_attn")
    found = attention_scores(context, made, made, 1, 2)
    q = array(context.get_weight(W.ATTN_TO_QUERY, 1)[2])
    np.testing.assert_allclose(
        found.queries, array(made.decoder.weight.t()) @ q / 2, rtol=0, atol=1e-5
    )
    with pytest.raises(LocationError, match="does not reach the residual stream"):
        attention_scores(context, made, made, 0, 2)  # another layer's norm


def test_what_attention_does_not_read_is_an_error(contexts) -> None:
    own = contexts["own"]
    made = autoencoder("1/resid.torso.delta_attn")
    with pytest.raises(LocationError, match="does not read what is written at 1/"):
        attention_scores(own, made, made, 1, 0)
    with pytest.raises(LocationError, match=r"does not read what is written at resid\.post_ln_f"):
        attention_scores(own, autoencoder("resid.post_ln_f"), made, 1, 0)
    first = autoencoder("resid.post_emb")
    attention_scores(own, first, first, 0, 0)
    with pytest.raises(InputError, match="they are 0 to 3"):
        attention_scores(own, first, first, 0, 4)
    with pytest.raises(InputError, match="needs a layer of 0 to 1"):
        attention_scores(own, first, first, 2, 0)
    with pytest.raises(LocationError, match="norms queries and keys"):
        attention_scores(contexts["qwen3"], first, first, 1, 0)
    assert D == 16
