"""Lenses against the model itself and plain formulas."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from neuron_explainer.analysis.lenses import (
    TunedLens,
    logit_attribution,
    logit_lens,
    read_out,
    token_losses,
)
from neuron_explainer.analysis.targets import logit_difference
from neuron_explainer.errors import CheckpointError, InputError
from neuron_explainer.models.transformer import Transformer
from tests.conftest import make_model
from tests.models.test_interventions import wrong
from tests.models.test_language_model import make

MODEL = make_model(n_layers=3)
PROMPT = [3, 1, 4, 1, 5]


@pytest.mark.parametrize("kind", ["native", "gpt2", "llama"])
@pytest.mark.parametrize("points", ["layers", "sublayers"])
@torch.no_grad()
def test_the_last_point_is_the_model(kind: str, points: Any) -> None:
    model = make(kind)
    found = logit_lens(model, PROMPT, points=points)
    logs = model([PROMPT])[0][0].double().log_softmax(dim=-1)
    top = logs.topk(5, dim=-1)
    np.testing.assert_allclose(found.top_probs[-1], top.values.exp().numpy(), atol=1e-5)
    assert found.top_tokens[-1] == [[str(i) for i in row] for row in top.indices.tolist()]
    assert found.kl[-1].max() < 1e-6 < found.kl[0].max()
    assert len(found.points) == 1 + model.n_layers * (2 if points == "sublayers" else 1)


@torch.no_grad()
def test_a_point_is_norm_and_unembedding() -> None:
    found = logit_lens(MODEL, PROMPT)
    x = MODEL.capture([PROMPT], "1/resid.torso.post_mlp")["1/resid.torso.post_mlp"][0].double()
    norm = MODEL.final_ln
    normed = F.layer_norm(x, (16,), norm.weight.double(), norm.bias.double(), norm.eps)
    probs = (normed @ MODEL.unembed.weight.double().T).softmax(dim=-1)
    np.testing.assert_allclose(found.top_probs[2], probs.topk(5).values.numpy(), atol=1e-6)
    tokens = torch.tensor([PROMPT])
    a, b = (read_out(m, tokens, torch.ones(1, 5, 16)) for m in (MODEL, MODEL))
    assert torch.equal(a, b)


def lens_folder(folder: Path, n_layers: int = 3, width: int = 16, **changes: Any) -> Path:
    generator = torch.Generator().manual_seed(0)
    params = {}
    for layer in range(n_layers):
        params[f"{layer}.weight"] = 0.1 * torch.randn(width, width, generator=generator)
        params[f"{layer}.bias"] = 0.1 * torch.randn(width, generator=generator)
    config = {
        "base_model_name_or_path": "tiny",
        "d_model": width,
        "num_hidden_layers": n_layers,
        "bias": True,
        "lens_type": "linear_tuned_lens",
        "unembed_hash": "0",
    }
    folder.mkdir(exist_ok=True)
    torch.save(params, folder / "params.pt")
    (folder / "config.json").write_text(json.dumps(config | changes))
    return folder


@torch.no_grad()
def test_a_tuned_lens_maps_each_layers_input(tmp_path: Path) -> None:
    lens = TunedLens.load(lens_folder(tmp_path / "lens"))
    found = logit_lens(MODEL, PROMPT, tuned=lens)
    x = MODEL.capture([PROMPT], "0/resid.torso.post_mlp")["0/resid.torso.post_mlp"]
    mapped = x + x @ lens.weights[1].T + lens.biases[1]
    probs = read_out(MODEL, torch.tensor([PROMPT]), mapped)[0].double().softmax(dim=-1)
    np.testing.assert_allclose(found.top_probs[1], probs.topk(5).values.numpy(), atol=1e-6)
    # The stream after the last layer is the model's own and is not mapped.
    np.testing.assert_allclose(found.top_probs[-1], logit_lens(MODEL, PROMPT).top_probs[-1])
    zero = TunedLens([torch.zeros(16, 16)] * 3, [torch.zeros(16)] * 3)
    np.testing.assert_array_equal(
        logit_lens(MODEL, PROMPT, tuned=zero).kl, logit_lens(MODEL, PROMPT).kl
    )
    assert "3 layers of width 16" in repr(lens)


def test_bad_tuned_lenses(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="linear_tuned_lens"):
        TunedLens.load(lens_folder(tmp_path / "a", lens_type="other"))
    with pytest.raises(CheckpointError, match="d_model 8"):
        TunedLens.load(lens_folder(tmp_path / "b", d_model=8))
    with pytest.raises(CheckpointError, match=r"missing 3\.weight"):
        TunedLens.load(lens_folder(tmp_path / "c", num_hidden_layers=4))
    with pytest.raises(CheckpointError, match="num_hidden_layers"):
        TunedLens.load(lens_folder(tmp_path / "d", num_hidden_layers="x"))
    two = TunedLens.load(lens_folder(tmp_path / "e", n_layers=2))
    with pytest.raises(InputError, match="2 layers"):
        logit_lens(MODEL, PROMPT, tuned=two)
    narrow = TunedLens.load(lens_folder(tmp_path / "f", width=8))
    with pytest.raises(InputError, match="width 8"):
        logit_lens(MODEL, PROMPT, tuned=narrow)
    with pytest.raises(InputError, match="none between"):
        logit_lens(make_model(), PROMPT, tuned=two, points="sublayers")


@pytest.mark.parametrize("by", ["sublayer", "head"])
def test_attribution_sums_to_the_target(by: Any) -> None:
    target = logit_difference(MODEL, 3, 4)
    found = logit_attribution(MODEL, PROMPT, target, by=by)
    with torch.no_grad():
        logits = MODEL([PROMPT])[0][0, -1]
    assert sum(found.values()) == pytest.approx(float(logits[3] - logits[4]), abs=1e-4)
    heads = [name for name in found if "head" in name]
    assert len(heads) == (12 if by == "head" else 0)
    assert {"embedding", "0/mlp", "final norm"} <= set(found)
    with pytest.raises(InputError, match="'sublayer' or 'head'"):
        logit_attribution(MODEL, PROMPT, target, by=wrong("layer"))


def test_attribution_of_a_model_that_does_not_show_its_norms_scale() -> None:
    model = make("gpt2")
    found = logit_attribution(model, PROMPT, logit_difference(model, 3, 4))
    with torch.no_grad():
        logits = model([PROMPT])[0][0, -1]
    assert sum(found.values()) == pytest.approx(float(logits[3] - logits[4]), abs=1e-4)


def test_the_last_mlps_share_is_what_ablating_it_takes_with_a_frozen_norm() -> None:
    target = logit_difference(MODEL, 3, 4)
    share = logit_attribution(MODEL, PROMPT, target)["2/mlp"]
    with torch.no_grad():
        found = MODEL.capture(
            [PROMPT], ["resid.ln_f.scale", "2/resid.torso.post_attn", "2/resid.torso.delta_mlp"]
        )
        write = found["2/resid.torso.delta_mlp"][0, -1]
        centred = (write - write.mean()) / found["resid.ln_f.scale"][0, -1] * MODEL.final_ln.weight
        logits = MODEL.unembed.weight @ centred
    assert share == pytest.approx(float(logits[3] - logits[4]), abs=1e-4)


def test_losses_of_ragged_prompts() -> None:
    prompts = [[1, 2, 3, 4], [5, 6]]
    found = token_losses(MODEL, prompts)
    for prompt, losses in zip(prompts, found, strict=True):
        with torch.no_grad():
            logits = MODEL([prompt])[0][0, :-1]
        expected = F.cross_entropy(logits, torch.tensor(prompt[1:]), reduction="none")
        assert losses == pytest.approx(expected.tolist(), abs=1e-5)


def test_tables_and_pictures() -> None:
    pytest.importorskip("matplotlib").use("agg")
    pytest.importorskip("pandas")
    model = Transformer.load("tiny-tales")
    found = logit_lens(model, "The king gave his $\n\x1b[31m daughter", bos=True)
    assert "\x1b" not in str(found)
    assert str(found).splitlines()[1].split() == ["point", "1.", "2.", "3.", "KL"]
    assert len(found.to_dataframe()) == len(found.points) * len(found.tokens)
    figure = found.plot()
    figure.canvas.draw()
    with pytest.raises(InputError, match="'layers' or 'sublayers'"):
        logit_lens(model, "a", points=wrong("heads"))


def test_a_lens_at_some_positions_is_that_part_of_the_whole() -> None:
    whole, some = logit_lens(MODEL, PROMPT), logit_lens(MODEL, PROMPT, positions=[3, 1])
    np.testing.assert_allclose(some.top_probs, whole.top_probs[:, [1, 3]], atol=1e-6)
    np.testing.assert_array_equal(some.top_ids, whole.top_ids[:, [1, 3]])
    assert some.tokens == [whole.tokens[1], whole.tokens[3]]
    with torch.no_grad():
        logits = MODEL(torch.tensor([PROMPT]))[0][0, 3]
    assert some.top_ids[-1, 1].tolist() == logits.topk(5).indices.tolist()
