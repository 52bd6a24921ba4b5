"""The transformer computes GPT-2: values and gradients, at every site, on every path through the code."""

import math
import re
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from neuron_explainer.errors import CheckpointError, InputError
from neuron_explainer.models.hooks import AtLayers, TransformerHooks
from neuron_explainer.models.locations import SITES
from neuron_explainer.models.transformer import (
    HiddenState,
    KeyValueCache,
    Norm,
    Transformer,
    TransformerConfig,
    TransformerLayer,
    apply_layernorm_foldin,
    causal_attn_mask,
    gelu,
    merge_heads,
    prep_input_and_pad,
    prep_input_and_right_pad_for_forward_pass,
    prep_pos_from_pad_and_prev_lens,
    safe_div,
    split_heads,
)
from tests.conftest import (
    TINY,
    assert_close,
    assert_same_gradients,
    gradients,
    keep_in,
    make_model,
    random_tokens,
    reference_sites,
)

TOKENS = random_tokens(5, 9, seed=1)
PAD = torch.zeros(5, 9, dtype=torch.bool)
PAD[1, :4] = True  # left
PAD[2, 5:] = True  # right
PAD[3, [1, 4, 5, 8]] = True  # between tokens
PAD[4, :] = True  # nothing but pads
BATCHES: dict[str, Tensor | None] = {"no pads": None, "pads": PAD}
TOLERANCE = {torch.float32: 1e-4, torch.float64: 1e-12}

# A hook at these sites takes the model off its fused or library kernels.
EXPLICIT = [path for path in SITES if re.search(r"attn\.(q|k|qk_\w+)$|\.ln_\w+\.", path)]


def identity(x: Tensor) -> Tensor:
    return x


def identity_at(*paths: str) -> TransformerHooks:
    hooks = TransformerHooks()
    for path in paths:
        hooks.append_to_path(f"{path}.fwd", identity)
    return hooks


def weighted(logits: Tensor, seed: int = 0) -> Tensor:
    """A loss with a different gradient at every logit."""
    weights = torch.randn(logits.shape, generator=torch.Generator().manual_seed(seed))
    return (logits * weights.to(logits.dtype)).sum() / 10


@pytest.fixture(params=[torch.float32, torch.float64], ids=["float32", "float64"])
def model(request: pytest.FixtureRequest) -> Transformer:
    name = "tiny_model" if request.param == torch.float32 else "tiny_model64"
    return request.getfixturevalue(name)  # type: ignore[no-any-return]


# ------------------------------------------------------------------------------- against numpy


@pytest.fixture(scope="module")
def expected(tiny_model: Transformer, tiny_model64: Transformer) -> Callable[..., Any]:
    models = {torch.float32: tiny_model, torch.float64: tiny_model64}
    known = {
        (dtype, batch): reference_sites(model, TOKENS, pad)
        for dtype, model in models.items()
        for batch, pad in BATCHES.items()
    }
    return lambda dtype, batch: known[dtype, batch]


def record(x: Tensor, path: str, seen: dict[Any, Tensor], layer: int | None) -> Tensor:
    seen[path, layer] = x
    return x


@pytest.mark.parametrize("path", [*SITES, "every site"])
def test_every_site_holds_what_numpy_says(
    path: str, model: Transformer, expected: Callable[..., Any]
) -> None:
    for batch, pad in BATCHES.items():
        seen: dict[tuple[str, int | None], Tensor] = {}
        hooks = TransformerHooks()
        for one in SITES if path == "every site" else [path]:
            hooks.append_to_path(f"{one}.fwd", partial(record, path=one, seen=seen))
        logits, _ = model(TOKENS, pad=pad, hooks=hooks)
        sites = expected(model.dtype, batch)
        wanted = sites if path == "every site" else [key for key in sites if key[0] == path]
        assert set(seen) == set(wanted)
        for key in wanted:
            assert_close(seen[key], sites[key], TOLERANCE[model.dtype], f"{key}, {batch}")
        assert_close(logits, sites["logits", None], TOLERANCE[model.dtype], batch)


@pytest.mark.parametrize(
    "sizes",
    [
        {"activation": "relu"},
        {"activation": "gelu"},
        {"norm_eps": 0.3},
        {"m_attn": 0.5},
        {"m_attn": 2, "n_heads": 2},
        {"n_heads": 1, "n_layers": 1, "m_mlp": 0.125},
        {"d_model": 15, "m_mlp": 40 / 15, "n_heads": 3},
    ],
    ids=str,
)
def test_other_configs_equal_numpy(sizes: dict[str, Any]) -> None:
    model = make_model(dtype=torch.float64, **sizes)
    logits, _ = model(TOKENS, pad=PAD)
    assert_close(logits, reference_sites(model, TOKENS, PAD)["logits", None], 1e-12)


# ------------------------------------------------------------------------ against Hugging Face


def _from_huggingface(theirs: Any) -> Transformer:
    """Our model with a GPT2LMHeadModel's weights, mapped here by hand."""
    c = theirs.config
    model = Transformer(
        TransformerConfig(
            ctx_window=c.n_positions,
            d_model=c.n_embd,
            n_layers=c.n_layer,
            n_heads=c.n_head,
            n_vocab=c.vocab_size,
        ),
        dtype=theirs.dtype,
    )
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(_their_tensor(theirs, name, lambda p: p))
    return model


def _their_tensor(theirs: Any, name: str, pick: Callable[[Any], Tensor]) -> Tensor:
    """What in GPT2LMHeadModel our parameter ``name`` is; ``pick`` takes the value or its gradient."""
    body = theirs.transformer
    if name == "unembed.weight":
        return pick(theirs.lm_head.weight)
    if name == "tok_embed.weight":
        return pick(body.wte.weight)
    if name == "pos_embed.weight":
        return pick(body.wpe.weight)
    if name.startswith("final_ln"):
        return pick(getattr(body.ln_f, name.split(".")[1]))
    _, layer, rest = name.split(".", 2)
    block, (*module, kind) = body.h[int(layer)], rest.split(".")
    if len(module) == 1:
        return pick(getattr(getattr(block, module[0]), kind))
    if module[1] in ("q_proj", "k_proj", "v_proj"):
        part = "qkv".index(module[1][0])
        return _transposed(pick(getattr(block.attn.c_attn, kind)).chunk(3, dim=-1)[part])
    conv = {
        "out_proj": block.attn.c_proj,
        "in_layer": block.mlp.c_fc,
        "out_layer": block.mlp.c_proj,
    }[module[1]]
    return _transposed(pick(getattr(conv, kind)))


def _transposed(x: Tensor) -> Tensor:
    return x.T if x.dim() == 2 else x


@pytest.fixture(scope="module")
def theirs() -> Any:
    from transformers import GPT2Config, GPT2LMHeadModel

    config = GPT2Config(
        vocab_size=29,
        n_positions=12,
        n_embd=16,
        n_layer=2,
        n_head=4,
        attn_pdrop=0,
        embd_pdrop=0,
        resid_pdrop=0,
        bos_token_id=0,
        eos_token_id=0,
        attn_implementation="eager",
        tie_word_embeddings=False,
    )
    torch.manual_seed(0)
    model = GPT2LMHeadModel(config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter += torch.randn(parameter.shape) * (0.5 if "c_attn" in name else 0.2)
    return model


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("explicit", [False, True])
def test_logits_and_parameter_gradients_equal_huggingface(
    theirs: Any, explicit: bool, recompute: bool
) -> None:
    model = _from_huggingface(theirs)
    model.set_recompute(recompute)
    expected = theirs(TOKENS).logits
    theirs.zero_grad()
    weighted(expected).backward()
    found, _ = model(TOKENS, hooks=identity_at(*SITES) if explicit else None)
    assert_close(found, expected, 1e-5)
    assert_same_gradients(
        gradients(model, weighted(found)),
        {
            name: _their_tensor(theirs, name, lambda p: p.grad)
            for name, _ in model.named_parameters()
        },
        1e-5,
    )
    assert torch.equal(found.argmax(-1), expected.argmax(-1))


def test_stream_and_patterns_equal_huggingface(theirs: Any) -> None:
    model = _from_huggingface(theirs)
    output = theirs(TOKENS, output_hidden_states=True, output_attentions=True)
    locations = ["resid.post_emb", "resid.torso.post_mlp", "resid.post_ln_f", "attn.qk_probs"]
    found = model.capture(TOKENS, locations)
    assert_close(found["resid.post_emb"], output.hidden_states[0], 1e-5)
    assert_close(found["0/resid.torso.post_mlp"], output.hidden_states[1], 1e-5)
    assert_close(found["resid.post_ln_f"], output.hidden_states[2], 1e-5)
    for layer, pattern in enumerate(output.attentions):
        assert_close(found[f"{layer}/attn.qk_probs"], pattern.permute(0, 2, 3, 1), 1e-5)


def test_left_pads_equal_huggingface(theirs: Any) -> None:
    """With a mask and positions given, theirs pads as ours does at the tokens."""
    model, pad = _from_huggingface(theirs), PAD.clone()[[0, 1]]
    positions = prep_pos_from_pad_and_prev_lens(pad, 0)
    expected = theirs(TOKENS[:2], attention_mask=(~pad).long(), position_ids=positions).logits
    found, _ = model(TOKENS[:2], pad=pad)
    assert_close(found[~pad], expected[~pad], 1e-5)


# ----------------------------------------------------------------------------- gradients at sites


@pytest.mark.parametrize("path", SITES)
@pytest.mark.parametrize("batch", BATCHES)
def test_gradient_at_each_site_is_the_derivative(
    path: str, batch: str, tiny_model64: Transformer
) -> None:
    """What a bwd hook sees against central differences along random directions."""
    model, pad = tiny_model64, BATCHES[batch]
    for layer in (0, 1) if SITES[path].per_layer else (None,):

        def at(hook: Callable[..., Tensor], layer: int | None = layer) -> Callable[..., Tensor]:
            return hook if layer is None else AtLayers(layer).append(hook)

        seen: list[Tensor] = []

        hooks = TransformerHooks().append_to_path(f"{path}.bwd", at(keep_in(seen)))
        logits, _ = model(TOKENS, pad=pad, hooks=hooks)
        weighted(logits).backward(inputs=[model.tok_embed.weight, model.unembed.weight])
        model.zero_grad()
        (grad,) = seen
        for seed in range(2):
            generator = torch.Generator().manual_seed(seed)
            direction = torch.randn(grad.shape, generator=generator, dtype=torch.float64)
            losses = []
            for step in (1e-6, -1e-6):
                moved = TransformerHooks().append_to_path(
                    f"{path}.fwd", at(lambda x, step=step, by=direction: x + step * by)
                )
                with torch.no_grad():
                    losses.append(float(weighted(model(TOKENS, pad=pad, hooks=moved)[0])))
            difference = (losses[0] - losses[1]) / 2e-6
            derivative = float((grad * direction).sum())
            assert derivative == pytest.approx(difference, rel=1e-5, abs=1e-7)
            assert abs(derivative) > 1e-4  # the comparison says something


# --------------------------------------------------------------- one meaning on two paths


@pytest.mark.parametrize("path", [*SITES, "every site"])
def test_fast_path_equals_explicit_path(path: str, model: Transformer) -> None:
    """Identity hooks force the explicit formulas; values and gradients stay."""
    tolerance = {torch.float32: 1e-6, torch.float64: 1e-14}[model.dtype]
    hooks = identity_at(*SITES) if path == "every site" else identity_at(path)
    same_kernels = path != "every site" and path not in EXPLICIT
    for batch, pad in BATCHES.items():
        fast, _ = model(TOKENS, pad=pad)
        explicit, _ = model(TOKENS, pad=pad, hooks=hooks)
        if same_kernels:
            assert torch.equal(explicit, fast)
        assert_close(explicit, fast, tolerance, batch)
        assert_same_gradients(
            gradients(model, weighted(explicit)), gradients(model, weighted(fast)), 10 * tolerance
        )


def test_explicit_path_is_really_another_path(
    tiny_model: Transformer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Guards the test above: which kernels run with which hooks."""
    calls: list[str] = []
    for name in ("scaled_dot_product_attention", "layer_norm"):
        real = getattr(F, name)

        def counted(*args: Any, real: Any = real, name: str = name, **kwargs: Any) -> Tensor:
            calls.append(name)
            return real(*args, **kwargs)  # type: ignore[no-any-return]

        monkeypatch.setattr(F, name, counted)
    fused, norm = ["scaled_dot_product_attention"], ["layer_norm"]
    tiny_model(TOKENS)
    assert sorted(calls) == norm * 5 + fused * 2
    for path, kernels in {
        "mlp.post_act": norm * 5 + fused * 2,
        "attn.v_out": norm * 5 + fused * 2,
        "attn.q": norm * 5 + fused * 2,
        "attn.qk_probs": norm * 5,
        "resid.torso.ln_attn.scale": norm * 3 + fused * 2,
        "resid.ln_f.scale": norm * 4 + fused * 2,
    }.items():
        calls.clear()
        tiny_model(TOKENS, hooks=identity_at(path))
        assert sorted(calls) == kernels, path
    calls.clear()
    hooks = TransformerHooks().append_at("1/attn.qk_logits", identity)
    hooks.append_at("0/resid.torso.ln_mlp.post_scale", identity)
    tiny_model(TOKENS, hooks=hooks)
    assert sorted(calls) == norm * 4 + fused  # the other layer stays on its kernels


# ------------------------------------------------------------------------------------ the cache


@pytest.mark.parametrize("sizes", [[9], [1] * 9, [1, 8], [8, 1], [4, 1, 4], [3, 3, 3]], ids=str)
@pytest.mark.parametrize("mode", ["grad", "no grad", "mixed"])
@pytest.mark.parametrize("path", [None, "attn.q", "attn.qk_softmax_denominator"])
def test_incremental_equals_full(
    sizes: list[int], mode: str, path: str | None, tiny_model64: Transformer
) -> None:
    hooks = None if path is None else identity_at(path)
    full, _ = tiny_model64(TOKENS)
    H, parts = None, []
    for i, chunk in enumerate(TOKENS.split(sizes, dim=1)):
        with torch.set_grad_enabled(mode == "grad" or (mode == "mixed" and i % 2 == 1)):
            logits, new = tiny_model64(chunk, H, hooks=hooks)
        assert H is None or new is H  # updated in place and returned
        H = new
        parts.append(logits)
        assert torch.equal(H.prev_lens, torch.full((5, 1), sum(sizes[: i + 1])))
    assert_close(torch.cat(parts, dim=1), full, 1e-13)
    if mode == "grad":
        assert_same_gradients(
            gradients(tiny_model64, weighted(torch.cat(parts, dim=1))),
            gradients(tiny_model64, weighted(full)),
            1e-12,
        )


@pytest.mark.parametrize("grad", [False, True])
def test_copies_of_a_state_branch(grad: bool, tiny_model64: Transformer) -> None:
    with torch.set_grad_enabled(grad):
        for n_before in (1, 2, 4):  # after buffers with and without room to spare
            H: HiddenState | None = None
            for i in range(n_before):
                _, H = tiny_model64(TOKENS[:, i : i + 1], H)
            assert H is not None
            other = H.copy()
            left, _ = tiny_model64(TOKENS[:, n_before:7], H)
            right, _ = tiny_model64(TOKENS[:, 7:], other)
            left_again, _ = tiny_model64(TOKENS[:, :1], H)
            for found, tokens in [
                (left, TOKENS[:, :7]),
                (right, torch.cat([TOKENS[:, :n_before], TOKENS[:, 7:]], dim=1)),
                (left_again, torch.cat([TOKENS[:, :7], TOKENS[:, :1]], dim=1)),
            ]:
                full, _ = tiny_model64(tokens)
                assert_close(found, full[:, -found.shape[1] :], 1e-13)


def test_state_is_readable(tiny_model: Transformer) -> None:
    _, H = tiny_model(TOKENS, pad=PAD)
    cache = H[1]
    assert isinstance(cache, KeyValueCache)
    assert len(H) == 2
    assert len(cache) == 9
    assert cache.K_cache.shape == cache.V_cache.shape == (5, 9, 16)
    assert cache.pad_cache is not None
    assert torch.equal(cache.pad_cache, PAD)
    assert repr(H) == "HiddenState(2 layers, KeyValueCache(9 tokens, batch 5))"
    assert repr(HiddenState(3)) == "HiddenState(3 layers, empty)"
    assert torch.equal(H.positions, prep_pos_from_pad_and_prev_lens(PAD, 0))


def test_cache_holds_plain_projections(tiny_model64: Transformer) -> None:
    """Unscaled, with no hook's doing in them."""
    seen: list[Tensor] = []
    hooks = TransformerHooks()
    hooks.resid.torso.post_ln_attn.append_fwd(AtLayers(0).append(keep_in(seen)))
    hooks.attn.k.append_fwd(lambda x: x.mul_(3))
    hooks.attn.v.append_fwd(lambda x: x.zero_())
    _, H = tiny_model64(TOKENS, hooks=hooks)
    attn = next(iter(tiny_model64.layers)).attn
    cache = H[0]
    assert cache is not None
    assert torch.equal(cache.K_cache, attn.k_proj(seen[0]))
    assert torch.equal(cache.V_cache, attn.v_proj(seen[0]))


# ------------------------------------------------------------------------------------- recompute


@pytest.mark.parametrize("batch", BATCHES)
@pytest.mark.parametrize("path", [None, *EXPLICIT[:1], "attn.qk_probs", "mlp.post_act"])
def test_recompute_gives_the_same_gradients(batch: str, path: str | None) -> None:
    model, pad = make_model(dtype=torch.float64), BATCHES[batch]
    hooks = TransformerHooks()
    if path is not None:
        hooks.append_to_path(f"{path}.fwd", lambda x: 1.5 * x)
        hooks.append_to_path(f"{path}.bwd", lambda x: 0.5 * x)
    logits, _ = model(TOKENS, pad=pad, hooks=hooks)
    expected = gradients(model, weighted(logits))
    model.set_recompute(True)
    again, _ = model(TOKENS, pad=pad, hooks=hooks)
    assert torch.equal(again, logits)
    assert_same_gradients(gradients(model, weighted(again)), expected, 1e-14)


def test_recompute_keeps_less(tiny_model: Transformer) -> None:
    """Guards the tests above: the inner values of a layer are really thrown away."""

    def size_kept(model: Transformer) -> int:
        kept: list[Tensor] = []
        with torch.autograd.graph.saved_tensors_hooks(keep_in(kept), lambda x: x):
            model(TOKENS)
        return sum(x.numel() for x in kept)

    model = make_model()
    model.set_recompute(True)
    assert size_kept(model) < size_kept(tiny_model) / 2


def test_recompute_with_a_continued_state() -> None:
    """Backward through two calls, in either order, once or at once; the state then still goes on."""
    first, second, third = TOKENS[:, :4], TOKENS[:, 4:7], TOKENS[:, 7:]
    plain = make_model(dtype=torch.float64)
    full, _ = plain(TOKENS)
    for split in ("at once", "second only", "first only"):
        model = make_model(dtype=torch.float64)
        model.set_recompute(True)
        a, H = model(first)
        b, H = model(second, H)
        assert_close(torch.cat([a, b], dim=1), full[:, :7], 1e-13)
        chosen = {"at once": (a, b), "second only": (b,), "first only": (a,)}[split]
        span = {"at once": (0, 7), "second only": (4, 7), "first only": (0, 4)}[split]
        found = gradients(model, weighted(torch.cat(chosen, dim=1)))
        expected = gradients(plain, weighted(plain(TOKENS)[0][:, slice(*span)]))
        assert_same_gradients(found, expected, 1e-12)
        assert [len(H[i]) for i in range(2)] == [7, 7]
        c, _ = model(third, H)
        assert_close(c, full[:, 7:], 1e-13)


def test_recompute_without_early_stop_does_not_wind_the_state_back() -> None:
    """torch may recompute a whole layer: what is stored on the way must be what is there already."""
    model = make_model(dtype=torch.float64)
    model.set_recompute(True)
    full, _ = model(TOKENS)
    with torch.utils.checkpoint.set_checkpoint_early_stop(False):
        a, H = model(TOKENS[:, :4])
        b, H = model(TOKENS[:, 4:7], H)
        weighted(torch.cat([a, b], dim=1)).backward()
    assert [len(H[i]) for i in range(2)] == [7, 7]
    c, _ = model(TOKENS[:, 7:], H)
    assert_close(c, full[:, 7:], 1e-13)


# -------------------------------------------------------------------------------------- simplify


def test_simplify_leaves_the_logits() -> None:
    for dtype, tolerance in ((torch.float32, 1e-5), (torch.float64, 1e-13)):
        model = make_model(dtype=dtype)
        before, _ = model(TOKENS, pad=PAD)
        gain = model.final_ln.weight.clone()
        assert model.simplify() is model
        after, _ = model(TOKENS, pad=PAD)
        assert_close(after, before, tolerance)
        for layer in model.layers:
            for ln in (layer.ln_1, layer.ln_2):
                assert torch.equal(ln.weight, torch.ones_like(ln.weight))
                assert torch.equal(ln.bias, torch.zeros_like(ln.bias))
        assert torch.equal(model.final_ln.weight, gain)
        assert all(parameter.requires_grad for parameter in model.parameters())
        sites = reference_sites(model, TOKENS, PAD)
        assert_close(after, sites["logits", None], TOLERANCE[dtype])


def test_foldin_of_one_norm() -> None:
    ln, linear = Norm(5), torch.nn.Linear(5, 3)
    with torch.no_grad():
        ln.weight.copy_(torch.tensor([2.0, 0.5, -1, 3, 1]))
        ln.bias.copy_(torch.arange(5.0))
    x = torch.randn(7, 5, generator=torch.Generator().manual_seed(0))
    before = linear(ln(x))
    apply_layernorm_foldin(ln, [linear])
    assert_close(linear(ln(x)), before, 1e-6)
    assert ln.weight.tolist() == [1] * 5
    assert ln.bias.tolist() == [0] * 5


def test_no_stale_weights() -> None:
    """A parameter changed in place, through .data or by an optimizer is what the next call uses."""
    model = make_model(dtype=torch.float64)
    model(TOKENS)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    weighted(model(TOKENS)[0]).backward()
    optimizer.step()
    next(iter(model.layers)).attn.k_proj.weight.data.mul_(1.5)
    assert_close(model(TOKENS)[0], reference_sites(model, TOKENS)["logits", None], 1e-12)


# ------------------------------------------------------------------------------- making a model


def test_initial_weights_are_gpt2s() -> None:
    cfg = TransformerConfig(d_model=128, n_layers=8, n_heads=4, n_vocab=600, ctx_window=300)
    model = Transformer(cfg, seed=3)
    for name, parameter in model.named_parameters():
        if parameter.dim() == 1:
            wanted = float(name.endswith("weight"))  # the norms' gains
            assert torch.equal(parameter, torch.full_like(parameter, wanted)), name
            continue
        weight, std = parameter.detach(), 0.02
        if name == "pos_embed.weight":
            std = 0.01
        if "out_proj" in name or "out_layer" in name:
            std = 0.02 / math.sqrt(16)
        assert float(weight.std()) == pytest.approx(std, rel=0.05), name
        assert abs(float(weight.mean())) < 5 * std / math.sqrt(weight.numel()), name
    assert all(parameter.requires_grad for parameter in model.parameters())
    flat = torch.cat([p.flatten() for n, p in model.named_parameters() if "q_proj.weight" in n])
    assert flat.unique().numel() > 0.9 * flat.numel()  # layers are not alike


def test_seed_decides_the_weights() -> None:
    torch.manual_seed(1)
    a = Transformer(TINY, seed=7).state_dict()
    torch.manual_seed(2)
    b, c = Transformer(TINY, seed=7).state_dict(), Transformer(TINY, seed=8).state_dict()
    assert all(torch.equal(a[key], b[key]) for key in a)
    assert not torch.equal(a["unembed.weight"], c["unembed.weight"])
    torch.manual_seed(5)
    d = Transformer(TINY).state_dict()
    torch.manual_seed(5)
    e = Transformer(TINY).state_dict()
    assert all(torch.equal(d[key], e[key]) for key in d)


def test_state_dict_keys_are_the_originals() -> None:
    layer = [
        *(f"attn.{p}_proj.{kind}" for p in ("q", "k", "v", "out") for kind in ("weight", "bias")),
        *(f"mlp.{p}_layer.{kind}" for p in ("in", "out") for kind in ("weight", "bias")),
        *(f"ln_{i}.{kind}" for i in (1, 2) for kind in ("weight", "bias")),
    ]
    assert set(make_model().state_dict()) == {
        "tok_embed.weight",
        "pos_embed.weight",
        "final_ln.weight",
        "final_ln.bias",
        "unembed.weight",
        *(f"xf_layers.{i}.{name}" for i in range(2) for name in layer),
    }
    cfg = TransformerConfig(d_model=768, n_layers=12, n_heads=12)
    small = Transformer(cfg, device="meta").state_dict()
    assert len(small) == 197
    assert sum(value.numel() for value in small.values()) == 163_037_184


def test_config_sizes() -> None:
    cfg = TransformerConfig()
    assert cfg.to_dict() == {
        "enc": "gpt2",
        "ctx_window": 1024,
        "d_model": 256,
        "n_layers": 2,
        "m_attn": 1,
        "n_heads": 8,
        "m_mlp": 4,
        "n_vocab": 50257,
        "activation": "gelu_tanh",
        "norm_eps": 1e-5,
    }
    assert (cfg.d_ff, cfg.d_attn_qk, cfg.d_attn_v, cfg.d_head_qk, cfg.d_head_v) == (
        1024,
        256,
        256,
        32,
        32,
    )
    for d_ff in range(1, 400):  # quotients come back as the whole numbers they were made from
        assert TransformerConfig(d_model=96, m_mlp=d_ff / 96).d_ff == d_ff


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"d_model": 0}, r"d_model must be at least 1 and at most 2147483647, found 0"),
        ({"n_layers": 2.5}, r"n_layers: expected a whole number, found 2.5"),
        ({"ctx_window": "12"}, r"ctx_window: expected a whole number, found '12'"),
        ({"n_heads": -1}, r"n_heads must be .* found -1"),
        ({"n_vocab": None}, r"n_vocab: expected .* found None"),
        ({"n_heads": 3}, r"attention width 256 .* not divisible by n_heads 3"),
        ({"m_mlp": 0}, r"m_mlp must leave a width >= 1, found 0"),
        ({"m_attn": -1}, r"m_attn must leave a width >= 1, found -1"),
        (
            {"activation": "gelu_new"},
            r"activation: expected one of gelu_tanh, gelu, relu, found 'gelu_new'",
        ),
    ],
    ids=str,
)
def test_config_errors(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        TransformerConfig(**fields)


def test_config_files(tmp_path: Path) -> None:
    cfg = TransformerConfig(m_mlp=2.5, enc="x", n_heads=4)
    cfg.save(tmp_path / "a.json")
    assert TransformerConfig.load(tmp_path / "a.json") == cfg
    assert TransformerConfig.load(str(tmp_path / "a.json")) == cfg
    assert TransformerConfig.from_dict(cfg.to_dict()) == cfg
    for name in ("a.pkl", "a.pickle", "a.txt"):
        for use in (cfg.save, TransformerConfig.load):
            with pytest.raises(CheckpointError, match=r"expected a \.json file"):
                use(tmp_path / name)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.json"]
    with pytest.raises(CheckpointError, match=r"unknown field 'n_layer'. Did you mean 'n_layers'"):
        TransformerConfig.from_dict({"n_layer": 3})


# ------------------------------------------------------------------------------------- bad tokens


@pytest.mark.parametrize(
    ("tokens", "kwargs", "message"),
    [
        (torch.tensor([[0, 29]]), {}, r"token ids must lie in 0 to 28, found 29"),
        (torch.tensor([[0, -1]]), {}, r"token ids must lie in 0 to 28, found -1"),
        (torch.tensor([[0, 1]], dtype=torch.int32), {}, r"an int64 tensor .* found torch.int32 \[1, 2\]"),
        (torch.tensor([[0.0]]), {}, r"found torch.float32 \[1, 1\]"),
        (torch.tensor([0, 1]), {}, r"found torch.int64 \[2\]"),
        (3, {}, r"prompts must be text or token ids, found int"),
        (torch.zeros(1, 0, dtype=torch.long), {}, r"at least one token, found \[1, 0\]"),
        (torch.zeros(0, 3, dtype=torch.long), {}, r"at least one token, found \[0, 3\]"),
        (torch.zeros(2, 13, dtype=torch.long), {}, r"13 tokens, more than the context of 12"),
        (TOKENS, {"pad": PAD[:, 1:]}, r"of tokens' shape \[5, 9\], found torch.bool \[5, 8\]"),
        (TOKENS, {"pad": PAD.long()}, r"pad must be bool .* found torch.int64 \[5, 9\]"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)  # fmt: skip
def test_token_errors(
    tokens: Any, kwargs: dict[str, Any], message: str, tiny_model: Transformer
) -> None:
    with pytest.raises(InputError, match=message):
        tiny_model(tokens, **kwargs)


def test_errors_of_a_continuation_leave_the_state(tiny_model: Transformer) -> None:
    _, H = tiny_model(TOKENS)
    for tokens, message in [
        (TOKENS[:2], r"H holds a batch of 5 rows, tokens one of 2"),
        (TOKENS[:, :4], r"13 tokens, more than the context of 12"),
    ]:
        with pytest.raises(InputError, match=message):
            tiny_model(tokens, H)
    found, _ = tiny_model(TOKENS[:, :2], H)
    expected, _ = tiny_model(torch.cat([TOKENS, TOKENS[:, :2]], dim=1))
    assert_close(found, expected[:, 9:], 1e-6)


def test_pads_do_not_count_towards_the_context(tiny_model: Transformer) -> None:
    tokens, pad = random_tokens(2, 20, seed=4), torch.zeros(2, 20, dtype=torch.bool)
    pad[:, :8] = True
    padded, H = tiny_model(tokens, pad=pad)
    solo, _ = tiny_model(tokens[:, 8:])
    assert_close(padded[:, 8:], solo, 1e-6)
    more = torch.ones(2, 3, dtype=torch.bool)
    _, H = tiny_model(tokens[:, :3], H, pad=more)  # a full context still takes pads
    with pytest.raises(InputError, match="13 tokens"):
        tiny_model(tokens[:, :1], H)


# ---------------------------------------------------------------------------- parts and utilities


def test_stages_and_parts_are_the_model(tiny_model64: Transformer) -> None:
    model = tiny_model64
    expected, _ = model(TOKENS, pad=PAD)
    X, H, pad, hooks = model.run_embed(TOKENS, None, PAD, None)
    X, H = model.run_torso(X, H, pad, hooks)
    X, H = model.run_ln_f(X, H, hooks)
    assert torch.equal(model.run_unembed(X, H, hooks)[0], expected)

    sites = reference_sites(model, TOKENS)
    for i, layer in enumerate(model.xf_layers):
        assert isinstance(layer, TransformerLayer)
        before = sites["resid.torso.post_mlp", i - 1] if i else sites["resid.post_emb", None]
        delta, cache = layer.attn_block(torch.from_numpy(before))
        assert_close(delta, sites["resid.torso.delta_attn", i], 1e-12)
        assert len(cache) == 9
        middle = torch.from_numpy(sites["resid.torso.post_attn", i])
        assert_close(layer.mlp_block(middle), sites["resid.torso.delta_mlp", i], 1e-12)
        normed = torch.from_numpy(sites["resid.torso.post_ln_attn", i])
        assert_close(layer.attn(normed)[0], sites["resid.torso.delta_attn", i], 1e-12)
        normed = torch.from_numpy(sites["resid.torso.post_ln_mlp", i])
        assert_close(layer.mlp(normed), sites["resid.torso.delta_mlp", i], 1e-12)
        after, _ = layer(torch.from_numpy(before))
        assert_close(after, sites["resid.torso.post_mlp", i], 1e-12)


def test_causal_mask_and_heads() -> None:
    mask = causal_attn_mask(5)
    assert mask.dtype == torch.bool
    assert mask.tolist() == [[key <= query for key in range(5)] for query in range(5)]
    mask.zero_()
    assert causal_attn_mask(5)[4, 0]  # each caller's own
    x = torch.arange(2 * 3 * 8.0).reshape(2, 3, 8)
    heads = split_heads(x, 4)
    assert heads.shape == (2, 3, 4, 2)
    assert heads[1, 2, 3].tolist() == x[1, 2, 6:].tolist()
    assert torch.equal(merge_heads(heads), x)
    assert safe_div(12, 4) == 3
    with pytest.raises(InputError, match="13 is not divisible by 4"):
        safe_div(13, 4)


def test_gelu() -> None:
    x = torch.linspace(-5, 5, 101, dtype=torch.float64)
    inner = math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)
    assert_close(gelu(x), 0.5 * x * (1 + torch.tanh(inner)), 1e-14)


def test_padding_utilities() -> None:
    rows = [[5, 6, 7], [8], []]
    tokens, pad = prep_input_and_pad(rows, "left")
    assert tokens.dtype == torch.long
    assert pad.dtype == torch.bool
    assert tokens.tolist() == [[5, 6, 7], [0, 0, 8], [0, 0, 0]]
    assert pad.tolist() == [[False] * 3, [True, True, False], [True] * 3]
    assert prep_pos_from_pad_and_prev_lens(pad, 0).tolist() == [[0, 1, 2], [0, 0, 0], [0, 0, 0]]
    for right in (
        prep_input_and_pad(rows, "right"),
        prep_input_and_right_pad_for_forward_pass(rows, "cpu"),
    ):
        assert right[0].tolist() == [[5, 6, 7], [8, 0, 0], [0, 0, 0]]
        assert right[1].tolist() == [[False] * 3, [False, True, True], [True] * 3]
    earlier = torch.tensor([[3], [0], [2]])
    assert prep_pos_from_pad_and_prev_lens(pad, earlier).tolist() == [
        [3, 4, 5],
        [0, 0, 0],
        [2, 2, 2],
    ]
    with pytest.raises(InputError, match="pad_side must be 'left' or 'right', found 'middle'"):
        prep_input_and_pad(rows, "middle")


def test_norm_is_float32_inside() -> None:
    ln = Norm(6, dtype=torch.bfloat16)
    x = torch.randn(3, 6, generator=torch.Generator().manual_seed(0)).bfloat16() + 300
    expected = F.layer_norm(x.float(), (6,)).bfloat16()
    assert ln(x).dtype == torch.bfloat16
    assert torch.equal(ln(x), expected)
    assert repr(ln) == "Norm(6, eps=1e-05)"


# --------------------------------------------------------------------------- dtypes, saving, loading


@pytest.mark.parametrize("path", [None, *SITES])
def test_bfloat16_runs_at_every_site(path: str | None) -> None:
    model = make_model(dtype=torch.bfloat16)
    seen: list[Tensor] = []
    hooks = TransformerHooks()
    if path is not None:
        for kind in ("fwd", "bwd"):
            hooks.append_to_path(f"{path}.{kind}", keep_in(seen))
    logits, _ = model(TOKENS, pad=PAD, hooks=hooks)
    assert logits.dtype == torch.bfloat16
    found = gradients(model, weighted(logits))
    assert all(grad.isfinite().all() for grad in found.values())
    inside = path is not None and (".ln_" in path or "denominator" in path)
    assert {x.dtype for x in seen} <= {torch.float32 if inside else torch.bfloat16}
    exact = make_model()
    exact.load_state_dict(model.state_dict())
    assert_close(logits.float(), exact(TOKENS, pad=PAD)[0], 0.05)


@pytest.mark.parametrize("layout", ["native", "pieces"])
def test_saved_models_come_back(layout: str, tmp_path: Path, tiny_model: Transformer) -> None:
    # The original's layout has no place for these.
    sizes: dict[str, Any] = {"enc": "gpt2"}
    if layout == "native":
        sizes |= {"activation": "relu", "norm_eps": 1e-3}
    model = make_model(**sizes)
    folder = tmp_path / "model"
    (model.save if layout == "native" else model.save_checkpoint)(folder)
    for loaded in (
        Transformer.load(folder, "cpu"),
        Transformer.from_checkpoint(str(folder), "cpu"),
    ):
        assert loaded.cfg == model.cfg
        expected = model.state_dict()
        assert list(loaded.state_dict()) == list(expected)
        assert all(torch.equal(loaded.state_dict()[key], expected[key]) for key in expected)
        assert all(parameter.requires_grad for parameter in loaded.parameters())
        assert all(parameter.is_leaf for parameter in loaded.parameters())
        assert torch.equal(loaded(TOKENS)[0], model(TOKENS)[0])
    half = Transformer.load(folder, torch.device("cpu"), dtype=torch.bfloat16, simplify=True)
    assert half.dtype == torch.bfloat16
    assert float(next(iter(half.layers)).ln_1.weight[3].detach()) == 1
    other = make_model(seed=9, **sizes)
    other.load_state_from_checkpoint(folder)
    assert torch.equal(other(TOKENS)[0], model(TOKENS)[0])
    weighted(other(TOKENS)[0]).backward()
    with pytest.raises(CheckpointError, match=r"expected .* found"):
        make_model(n_layers=3).load_state_from_checkpoint(folder)
    with pytest.raises(InputError, match="simplify takes no options"):
        Transformer.load(folder, simplify_kwargs={"a": 1})


def test_metadata_travels(tmp_path: Path) -> None:
    model = make_model()
    model.metadata = {"steps": 3, "data": ["a", "b"]}
    model.save(tmp_path / "m")
    assert Transformer.load(tmp_path / "m", "cpu").metadata == model.metadata


def test_numpy_reference_on_paper() -> None:
    """The reference itself, where the answer can be written down."""
    from tests.reference import gpt2_numpy

    assert gpt2_numpy.positions_of(np.array([[1, 0, 1, 0, 0]], dtype=bool)).tolist() == [
        [0, 0, 0, 1, 2]
    ]
    assert gpt2_numpy.activation_function("gelu", np.array([1.0])) == pytest.approx(
        0.8413447460685429
    )
    x = np.arange(8.0).reshape(1, 1, 8)
    assert gpt2_numpy._heads(x, 4)[0, 0].tolist() == [[0, 1], [2, 3], [4, 5], [6, 7]]
    sites: gpt2_numpy.Sites = {}
    zeros, v = np.zeros((1, 3, 1, 4)), np.arange(12.0).reshape(1, 3, 1, 4)
    gpt2_numpy._attend(zeros, zeros, v, np.zeros((1, 3), dtype=bool), sites, 0)
    assert sites["attn.v_out", 0][0, 2, 0].tolist() == v[0, :, 0].mean(axis=0).tolist()


@pytest.mark.parametrize(
    ("asked", "expected"), [(None, torch.float32), (torch.float16, torch.float16)]
)
def test_the_embedded_model_is_float32_unless_asked_otherwise(
    asked: torch.dtype | None, expected: torch.dtype
) -> None:
    """It is stored in float16, which is slow on a CPU."""
    assert Transformer.load("tiny-tales", device="cpu", dtype=asked).dtype == expected
