"""Places: which exist, when a pass reaches them, and what follows from the one table of sites."""

from typing import get_type_hints

import pytest
import torch
from torch import Tensor

from neuron_explainer.errors import LocationError, did_you_mean
from neuron_explainer.evaluation.spliced_passes import SplicedPasses
from neuron_explainer.models.hooks import NO_HOOKS, FwdBwdHooks, HookCollection, TransformerHooks
from neuron_explainer.models.kv_cache import HiddenState
from neuron_explainer.models.locations import SITES, ActivationLocation, Site
from neuron_explainer.models.transformer import Transformer
from neuron_explainer.models.weight_names import Dimension
from tests.conftest import make_model, random_tokens

TOKENS = random_tokens(2, 5, seed=3)


@pytest.mark.parametrize(
    ("place", "depth"),
    [("resid.post_emb", 0), ("0/attn.q", 0), ("2/mlp.post_act", 2)]
    + [(path, 3) for path in ("resid.ln_f.scale", "resid.post_ln_f", "logits")],
)
def test_depth_is_how_many_layers_have_run(place: str, depth: int) -> None:
    assert ActivationLocation.parse(place).depth(3) == depth


def test_a_place_in_every_layer_has_no_depth() -> None:
    with pytest.raises(LocationError, match=r"mlp\.pre_act is in every layer; name one"):
        ActivationLocation("mlp.pre_act").depth(3)


def test_width_is_that_of_the_tensor(tiny_model: Transformer) -> None:
    cfg = tiny_model.cfg
    sizes = {
        Dimension.RESIDUAL_STREAM_CHANNELS: cfg.d_model,
        Dimension.MLP_ACTS: cfg.d_ff,
        Dimension.ATTN_HEADS: cfg.n_heads,
        Dimension.QUERY_AND_KEY_CHANNELS: cfg.d_head_qk,
        Dimension.VALUE_CHANNELS: cfg.d_head_v,
        Dimension.VOCAB_SIZE: cfg.n_vocab,
    }
    for place, found in tiny_model.capture(TOKENS, list(SITES)).items():
        assert place.site.width(sizes.__getitem__) == found.shape[-1], place


@pytest.mark.parametrize("path", SITES)
def test_what_a_unit_is_at_each_site(path: str, tiny_model: Transformer) -> None:
    """Where there are heads a head, elsewhere an entry of the last axis."""
    site = SITES[path]
    place = ActivationLocation(path, 1 if site.per_layer else None)
    x = tiny_model.capture(TOKENS, place)[place].detach()
    number = 0 if x.shape[-1] == 1 else 2
    unit = site.unit(str(number))
    if path in ("attn.q", "attn.k", "attn.v", "attn.v_out"):
        assert unit.name == "head 2"
        assert torch.equal(x[unit.where], x[:, :, 2])
        channel = site.unit("2.1")
        assert channel.name == "channel 1 of head 2"
        assert torch.equal(x[channel.where], x[:, :, 2, 1])
    else:
        named = {"attn": "head", "mlp": "neuron", "logi": "token"}
        assert unit.name.split()[0] == named.get(path[:4].rstrip("."), "channel") or number == 0
        assert torch.equal(x[unit.where], x[..., number])
        with pytest.raises(LocationError, match=r"expected a unit such as 3; found '2\.1'"):
            site.unit("2.1")
    for wrong in ("", "-1", "x", "1.", ".1"):
        with pytest.raises(LocationError, match="expected a unit such as 3"):
            site.unit(wrong)


# ---------------------------------------------------------------- one more site, before the layers


class OneSiteMore(Transformer):
    """What adding a site takes: a line of the table, and the call in the model."""

    def run_embed(
        self,
        tokens: Tensor,
        H: HiddenState | None = None,
        pad: Tensor | None = None,
        hooks: TransformerHooks | None = None,
    ) -> tuple[Tensor, HiddenState, Tensor | None, TransformerHooks]:
        X, H, pad, hooks = super().run_embed(tokens, H, pad, hooks)
        return hooks.resid.entry(X, layer=None, positions=H.positions), H, pad, hooks


@pytest.fixture
def one_site_more(monkeypatch: pytest.MonkeyPatch) -> Transformer:
    monkeypatch.setitem(SITES, "resid.entry", Site("resid.entry", ("b", "s", "d"), "embed"))
    # The empty tree was made when the module was imported, before the table had the site.
    site = FwdBwdHooks()
    monkeypatch.setitem(NO_HOOKS.resid.all_hooks, "entry", site)
    monkeypatch.setattr(NO_HOOKS.resid, "entry", site, raising=False)
    plain = make_model()
    model = OneSiteMore(plain.cfg)
    model.load_state_dict(plain.state_dict())
    return model


def test_a_replaced_site_before_the_layers_is_not_dropped(one_site_more: Transformer) -> None:
    """A spliced pass starts where the site is, not behind the last layer."""
    place = ActivationLocation("resid.entry")
    with torch.no_grad():
        passes = SplicedPasses(one_site_more, TOKENS, None, [place])
        value = passes.activation(place) * -1.5
        found = passes.replaced(place, value)
        hooks = TransformerHooks().append_at("resid.entry", lambda x: value)
        expected, _ = one_site_more(TOKENS, hooks=hooks)
    assert torch.equal(found, expected)
    assert not torch.allclose(found, passes.logits)


def test_capture_at_a_site_before_the_layers_runs_no_layer(one_site_more: Transformer) -> None:
    ran: list[int | None] = []

    def note(x: Tensor, layer: int | None) -> Tensor:
        ran.append(layer)
        return x

    hooks = TransformerHooks().append_at("mlp.pre_act", note)
    found = one_site_more.capture(TOKENS, "resid.entry", hooks=hooks)["resid.entry"]
    assert not ran
    assert torch.equal(found, one_site_more.capture(TOKENS, "resid.post_emb")["resid.post_emb"])


def test_the_tree_has_the_new_site(one_site_more: Transformer) -> None:
    hooks = TransformerHooks()
    assert isinstance(hooks.resid.entry, FwdBwdHooks)
    hooks.append_at("resid.entry", torch.zeros_like)
    assert "resid.entry.fwd: " in repr(hooks)


def test_annotations_of_the_tree_are_true() -> None:
    """What an editor and a type checker are told is there, and of that type."""

    def check(tree: HookCollection) -> int:
        hints = get_type_hints(type(tree))
        annotated = {name: hints[name] for name in type(tree).__annotations__}
        for name, kind in annotated.items():
            assert type(tree.all_hooks[name]) is kind, f"{type(tree).__name__}.{name}"
        below = [c for c in tree.all_hooks.values() if not isinstance(c, FwdBwdHooks)]
        return len(annotated) + sum(check(c) for c in below if isinstance(c, HookCollection))

    assert check(TransformerHooks()) > len(SITES)


def test_names_that_are_not_near_are_not_suggested() -> None:
    assert did_you_mean("nothere", ["intr", "sample", "train"]) == ""
    with pytest.raises(LocationError, match=r"Did you mean 'mlp\.post_act'") as error:
        ActivationLocation("mlp.postact")
    assert "ln_attn" not in str(error.value)
    with pytest.raises(LocationError, match=r"such as 3/mlp\.post_act"):
        ActivationLocation("zzz")
