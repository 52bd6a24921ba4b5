"""What users do by mistake, or on purpose in ways that are easy to break."""

import copy
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from neuron_explainer.errors import HookError, InputError, NeuronExplainerError
from neuron_explainer.models.devices import check_device, get_default_device
from neuron_explainer.models.hooks import (
    AtLayers,
    FwdBwdHooks,
    HookCollection,
    Hooks,
    MLPHooks,
    TransformerHooks,
)
from neuron_explainer.models.transformer import HiddenState, Transformer, TransformerConfig
from tests.conftest import TINY, make_model

TOKENS = torch.tensor([[1, 2, 3]])


def zero(x: Tensor) -> Tensor:
    return torch.zeros_like(x)


# --- trees of hooks ---


def test_the_empty_tree_is_not_handed_out(tiny_model: Transformer) -> None:
    before, _ = tiny_model(TOKENS)
    _, _, _, hooks = tiny_model.run_embed(TOKENS)
    hooks.logits.append_fwd(zero)
    assert torch.equal(tiny_model(TOKENS)[0], before)


def test_an_assigned_branch_counts_everywhere(tiny_model: Transformer) -> None:
    branch = MLPHooks()
    branch.post_act.append_fwd(zero)
    site = FwdBwdHooks().append_fwd(zero)
    by_branch, by_site = TransformerHooks(), TransformerHooks()
    by_branch.mlp = branch
    by_site.mlp.post_act = site
    for hooks in (by_branch, by_site, by_branch.copy(), copy.deepcopy(by_site)):
        assert "mlp.post_act.fwd: zero" in repr(hooks)
        assert not tiny_model.capture(TOKENS, "1/mlp.post_act", hooks=hooks)["1/mlp.post_act"].any()
    by_site.mlp.post_act.fwd.append(lambda x: None)
    with pytest.raises(HookError, match=r"mlp.post_act.fwd, layer 0"):
        tiny_model(TOKENS, hooks=by_site)


def test_a_function_in_place_of_a_site_is_refused() -> None:
    with pytest.raises(HookError, match=r"post_act is a place for hooks.*append_fwd"):
        TransformerHooks().mlp.post_act = zero  # type: ignore[assignment]


@pytest.mark.parametrize("base", [Hooks, HookCollection])
def test_a_subclass_with_a_call_of_its_own_is_called(base: type, tiny_model: Transformer) -> None:
    seen: list[int] = []

    class EvenLayers(base):  # type: ignore[misc]
        def __call__(self, x: Tensor, *args: Any, layer: int, **kwargs: Any) -> Tensor:
            if layer % 2 == 0:
                seen.append(layer)
            return x

    hooks = TransformerHooks()
    hooks.mlp.post_act.append_fwd(EvenLayers())
    hooks.attn.qk_probs.append_fwd(EvenLayers())
    tiny_model(TOKENS, hooks=hooks)
    assert seen == [layer for layer in range(TINY.n_layers) for _ in range(2) if layer % 2 == 0]


def test_at_layers_without_a_layer_is_an_error_not_a_no_op(tiny_model: Transformer) -> None:
    with pytest.raises(HookError, match=r"AtLayers\(1\).*without one"):
        AtLayers(1).append(zero)(torch.ones(2))
    hooks = TransformerHooks()
    hooks.mlp.post_act.append_fwd(AtLayers(np.int64(1)).append(zero))  # type: ignore[arg-type]
    mlp = list(tiny_model.layers)[1].mlp
    x = torch.randn(1, 3, TINY.d_model)
    assert torch.equal(mlp(x, hooks.mlp), mlp.out_layer.bias.expand(1, 3, -1))


# --- arguments that are something else ---


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda m: m(TOKENS, hooks=TransformerHooks().mlp), "hooks must be a TransformerHooks"),
        (lambda m: m(TOKENS, hooks=zero), "hooks must be a TransformerHooks.*function"),
        (lambda m: m.sample([[1]], hooks=zero), "hooks must be a TransformerHooks"),
        (lambda m: m.capture(TOKENS, "logits", hooks=zero), "hooks must be a TransformerHooks"),
        (lambda m: m(TOKENS, H=3), "H must be a HiddenState of 2 layers"),
        (lambda m: m(TOKENS, H=HiddenState(5)), "H must be a HiddenState of 2 layers"),
        (lambda m: m(TOKENS, pad=[[False] * 3]), "pad must be a tensor, found list"),
        (lambda m: m.sample([[1]], temperature="hot"), "temperature.*'hot'"),
        (lambda m: m.sample([[1]], top_p="x"), "top_p.*'x'"),
        (lambda m: m.sample(None), "prompts must be text or token ids, found NoneType"),
        (lambda m: m.sample([[1]], seed="x"), "seed must be a whole number.* found 'x'"),
        (lambda m: m.sample([[1]], stop=3.5), "stop must be tokens.*3.5"),
        (lambda m: AtLayers("one"), "AtLayers takes"),  # type: ignore[arg-type]
    ],
)
def test_each_is_told_what_was_expected(call: Any, message: str, tiny_model: Transformer) -> None:
    with pytest.raises(NeuronExplainerError, match=message):
        call(tiny_model)


@pytest.mark.parametrize("device", ["mps", "foo"])
def test_one_sentence_says_why_there_is_no_device(device: str) -> None:
    """torch explains its backends over many sentences."""
    if get_default_device().type == device:
        pytest.skip(f"{device} is here")
    with pytest.raises(
        InputError, match=rf"^no device '{device}' here: [^.]*(\.\w[^.]*)*\. Use 'cpu'"
    ):
        check_device(device)


def test_a_device_that_is_not_there(tiny_model: Transformer, tmp_path: Path) -> None:
    tiny_model.save(tmp_path / "m")
    with pytest.raises(InputError, match="no device 'foo' here"):
        Transformer.load(tmp_path / "m", device="foo")


# --- states, parameters, results ---


def test_a_cache_made_in_inference_mode_goes_on_outside(tiny_model: Transformer) -> None:
    tokens = torch.tensor([[1, 2, 3, 4]])
    with torch.inference_mode():
        _, H = tiny_model(tokens[:, :1])
        tiny_model(tokens[:, 1:2], H)
    with torch.no_grad():
        tiny_model(tokens[:, 2:3], H)
        logits, _ = tiny_model(tokens[:, 3:], H)
        expected, _ = tiny_model(tokens)
    torch.testing.assert_close(logits, expected[:, 3:], atol=1e-5, rtol=0)


def test_loading_into_a_model_keeps_its_parameters(tmp_path: Path) -> None:
    other = make_model(seed=7)
    other.save(tmp_path / "m")
    model = make_model(seed=8)
    held = dict(model.named_parameters())
    model.load_state_from_checkpoint(tmp_path / "m")
    for name, parameter in model.named_parameters():
        assert parameter is held[name]
        assert torch.equal(parameter, other.get_parameter(name))


def test_samples_of_token_ids_are_whole_dicts(text_model: Transformer) -> None:
    out = text_model.sample([[65, 66], [67]], 3, temperature=0)
    assert set(out) == {"tokens", "strings"}
    assert out["strings"] == [text_model.enc.decode(row) for row in out["tokens"]]
    assert pickle.loads(pickle.dumps(out)) == out == copy.deepcopy(out)


def test_token_ids_need_no_vocabulary() -> None:
    config = TransformerConfig("none", 16, 8, 1, 1, 2, 2, n_vocab=11)
    out = Transformer(config, seed=0).sample([[1, 2]], 3, temperature=0)
    assert len(out["tokens"][0]) == 3
    assert "strings" not in out
    with pytest.raises(NeuronExplainerError, match="token"):
        out["strings"]


def test_captures_are_found_by_text_and_stand_still() -> None:
    model = make_model()
    model.set_recompute(True)
    found = model.capture(TOKENS, "1/mlp.post_act")
    kept = found["1/mlp.post_act"]
    assert found.get("1/mlp.post_act") is kept
    assert found.get("0/mlp.post_act") is None
    assert "1/mlp_post_act" in found  # type: ignore[comparison-overlap]
    kept.sum().backward()
    assert found["1/mlp.post_act"] is kept
