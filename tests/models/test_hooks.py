"""Hooks: where and when they run, what they are given, what they may do, and what they never break."""

import copy
import gc
import pickle
import re
import weakref
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from neuron_explainer.errors import HookError
from neuron_explainer.models.hooks import (
    AtLayers,
    AttentionHooks,
    AutoencoderHooks,
    ConditionalHooks,
    FwdBwdHooks,
    Hooks,
    TransformerHooks,
    WrapperHooks,
    grad_hook_wrapper,
)
from neuron_explainer.models.locations import SITES
from neuron_explainer.models.transformer import Transformer
from tests.conftest import (
    ONCE,
    PER_LAYER,
    TINY,
    assert_close,
    assert_same_gradients,
    gradients,
    keep_in,
    make_model,
    random_tokens,
)

TOKENS = random_tokens(3, 6, seed=2)
PAD = torch.zeros(3, 6, dtype=torch.bool)
PAD[1, :2] = True
PAD[2, [2, 5]] = True
KINDS = ("fwd", "bwd", "fwd2")
LETTERS = {"b": 3, "s": 6, "q": 6, "k": 6, "h": 4, "d": 16, "f": 48, "v": 29, "d_head": 4, "1": 1}


class Recorder:
    """A hook with a memory; a copy of it would remember nothing."""

    def __init__(self) -> None:
        self.calls: list[tuple[Tensor, dict[str, Any]]] = []

    def __call__(self, x: Tensor, **kwargs: Any) -> Tensor:
        self.calls.append((x, kwargs))
        return x

    def method(self, x: Tensor, layer: int | None) -> Tensor:
        self.calls.append((x, {"layer": layer}))
        return x

    @property
    def layers(self) -> list[Any]:
        return [kwargs["layer"] for _, kwargs in self.calls]


def loss_of(logits: Tensor) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return (logits * torch.randn(logits.shape, generator=generator, dtype=logits.dtype)).sum()


def at(path: str, kind: str, hook: Callable[..., Any]) -> TransformerHooks:
    return TransformerHooks().append_to_path(f"{path}.{kind}", hook)


def layers_of(path: str) -> list[int | None]:
    return [0, 1] if SITES[path].per_layer else [None]


# ------------------------------------------------------------------------- where, when, with what


def test_the_tree_is_the_table_of_sites() -> None:
    leaves = [path for path, _ in TransformerHooks().leaves()]
    assert sorted(leaves) == sorted(f"{path}.{kind}" for path in SITES for kind in KINDS)


@pytest.mark.parametrize("pad", [None, PAD], ids=["no pads", "pads"])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("path", SITES)
def test_each_site_fires_once_a_layer_as_documented(
    path: str, kind: str, pad: Tensor | None, tiny_model: Transformer
) -> None:
    recorder = Recorder()
    logits, _ = tiny_model(TOKENS, pad=pad, hooks=at(path, kind, recorder))
    gradients(tiny_model, loss_of(logits))
    expected = layers_of(path)
    assert recorder.layers == (expected[::-1] if kind == "bwd" else expected)
    positions = (
        torch.arange(6).expand(3, 6)
        if pad is None
        else torch.tensor([[0, 1, 2, 3, 4, 5], [0, 0, 0, 1, 2, 3], [0, 1, 1, 2, 3, 3]])
    )
    for x, kwargs in recorder.calls:
        assert list(x.shape) == [LETTERS[letter] for letter in SITES[path].shape]
        assert set(kwargs) == set(SITES[path].keywords)
        assert torch.equal(kwargs["positions"], positions)
        if path == "mlp.post_act":
            layer = kwargs["layer"]
            assert kwargs["out_layer"] is tiny_model.xf_layers[layer].mlp.out_layer


def test_sites_fire_in_the_order_of_the_table(tiny_model: Transformer) -> None:
    order: list[tuple[str, int | None]] = []
    hooks = TransformerHooks()
    for path in SITES:

        def note(x: Tensor, layer: int | None, path: str = path) -> Tensor:
            order.append((path, layer))
            return x

        hooks.append_to_path(f"{path}.fwd", note)
    tiny_model(TOKENS, hooks=hooks)
    first, last = ["resid.post_emb"], [p for p in ONCE if p != "resid.post_emb"]
    expected: list[tuple[str, int | None]] = [(path, None) for path in first]
    expected += [(path, layer) for layer in (0, 1) for path in PER_LAYER]
    expected += [(path, None) for path in last]
    assert order == expected


@pytest.mark.parametrize("path", SITES)
def test_fwd_then_bwd_then_fwd2(path: str, tiny_model64: Transformer) -> None:
    """bwd hooks run last appended first, last layer first; they see what fwd2 hooks did."""
    calls: list[tuple[str, int | None]] = []

    def note(name: str, factor: float = 1.0) -> Callable[..., Tensor]:
        def hook(x: Tensor, layer: int | None) -> Tensor:
            calls.append((name, layer))
            return x if factor == 1 else x * factor

        return hook

    def run(hooks: TransformerHooks) -> None:
        calls.clear()
        logits, _ = tiny_model64(TOKENS, hooks=hooks)
        gradients(tiny_model64, loss_of(logits))

    hooks = TransformerHooks()
    for name in ("fwd2 a", "bwd a", "fwd a", "fwd b", "bwd b", "fwd2 b"):
        hooks.append_to_path(f"{path}.{name.split()[0]}", note(name))
    run(hooks)
    layers = layers_of(path)
    forward = [(n, layer) for layer in layers for n in ("fwd a", "fwd b", "fwd2 a", "fwd2 b")]
    assert calls == forward + [(n, layer) for layer in layers[::-1] for n in ("bwd b", "bwd a")]

    # The gradient that a bwd hook sees: at fwd's output, with fwd2's factor in it, fwd's not.
    seen: dict[str, Tensor] = {}
    for name, factor in {"plain": None, "fwd": "fwd", "fwd2": "fwd2"}.items():
        layer = layers[-1]
        hooks = TransformerHooks()

        def only(hook: Callable[..., Any], layer: int | None = layer) -> Callable[..., Any]:
            return hook if layer is None else AtLayers(layer).append(hook)

        # In place of a factor on x, which would move the point of evaluation: x + a * (x - x').
        def tripled(x: Tensor) -> Tensor:
            finite = x.isfinite()
            return torch.where(finite, x + 2 * (x - x.detach()).nan_to_num(0.0), x)

        def keep(grad: Tensor, name: str = name) -> Tensor:
            seen[name] = grad
            return grad

        hooks.append_to_path(f"{path}.bwd", only(keep))
        if factor is not None:
            hooks.append_to_path(f"{path}.{factor}", only(tripled))
        logits, _ = tiny_model64(TOKENS, hooks=hooks)
        gradients(tiny_model64, loss_of(logits))
    assert_close(seen["fwd"], seen["plain"], 1e-12)
    assert_close(seen["fwd2"], 3 * seen["plain"], 1e-12)


def test_a_bwd_hook_replaces_the_gradient(tiny_model64: Transformer) -> None:
    model = tiny_model64
    hooks = TransformerHooks().append_at("1/mlp.post_act", lambda grad: grad * 0, kind="bwd")
    found = gradients(model, loss_of(model(TOKENS, hooks=hooks)[0]))
    assert float(found["xf_layers.1.mlp.in_layer.weight"].abs().max()) == 0
    assert float(found["xf_layers.1.mlp.out_layer.weight"].abs().max()) > 0
    assert float(found["xf_layers.0.mlp.in_layer.weight"].abs().max()) > 0


def test_positions_while_sampling(tiny_model: Transformer) -> None:
    """Of left-padded prompts, then of each new token."""
    recorder = Recorder()
    hooks = at("mlp.post_act", "fwd", AtLayers(1).append(recorder))
    tiny_model.sample([[1, 2, 3], [4]], num_tokens=3, temperature=0, hooks=hooks)
    found = [kwargs["positions"].tolist() for _, kwargs in recorder.calls]
    assert found == [[[0, 1, 2], [0, 0, 0]], [[3], [1]], [[4], [2]]]


@pytest.mark.parametrize(
    "path", ["logits", "resid.post_ln_f", "resid.ln_f.scale", "resid.post_emb"]
)
def test_hooks_without_layers_while_sampling(path: str, tiny_model: Transformer) -> None:
    recorder = Recorder()
    tiny_model.sample(
        [[1, 2, 3], [4]], num_tokens=3, temperature=0, hooks=at(path, "fwd", recorder)
    )
    assert [x.shape[:2] for x, _ in recorder.calls] == [(2, 3), (2, 1), (2, 1)]
    assert recorder.layers == [None] * 3


def test_a_hook_changes_the_samples(tiny_model: Transformer) -> None:
    def only_seven(x: Tensor) -> Tensor:
        x[..., 7] = 1e4
        return x

    hooks = at("logits", "fwd", only_seven)
    assert tiny_model.sample([[1, 2], [3]], 4, hooks=hooks)["tokens"] == [[7] * 4] * 2
    assert tiny_model.sample([[1, 2], [3]], 4, temperature=0)["tokens"] != [[7] * 4] * 2


def test_keys_and_values_of_all_tokens_so_far(tiny_model: Transformer) -> None:
    recorders = {path: Recorder() for path in ("attn.q", "attn.k", "attn.v", "attn.qk_probs")}
    hooks = TransformerHooks()
    for path, recorder in recorders.items():
        hooks.append_to_path(f"{path}.fwd", AtLayers(0).append(recorder))
    _, H = tiny_model(TOKENS[:, :4], hooks=hooks)
    tiny_model(TOKENS[:, 4:], H, hooks=hooks)
    found = {path: [list(x.shape) for x, _ in r.calls] for path, r in recorders.items()}
    assert found == {
        "attn.q": [[3, 4, 4, 4], [3, 2, 4, 4]],
        "attn.k": [[3, 4, 4, 4], [3, 6, 4, 4]],
        "attn.v": [[3, 4, 4, 4], [3, 6, 4, 4]],
        "attn.qk_probs": [[3, 4, 4, 4], [3, 2, 6, 4]],
    }


# ------------------------------------------------------------------------- what hooks may do to x


def scaled(x: Tensor) -> Tensor:
    return x * 1.25


def scaled_in_place(x: Tensor) -> Tensor:
    x *= 1.25
    return x


@pytest.mark.parametrize("activation", ["gelu_tanh", "relu"])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("path", SITES)
def test_hooks_may_edit_in_place(path: str, kind: str, activation: str) -> None:
    """In place or not is one meaning: values and gradients, also with nothing but this hook."""
    model = make_model(dtype=torch.float64, activation=activation)
    for pad in (None, PAD):
        results = []
        for hook in (scaled, scaled_in_place):
            with torch.no_grad():
                without_grad, _ = model(TOKENS, pad=pad, hooks=at(path, kind, hook))
            logits, _ = model(TOKENS, pad=pad, hooks=at(path, kind, hook))
            assert torch.equal(logits, without_grad)
            # sum(): its gradient is one number spread over a shape, the hardest to edit
            results.append((logits, gradients(model, logits.sum())))
        assert torch.equal(results[0][0], results[1][0])
        assert_same_gradients(results[1][1], results[0][1], 1e-14)


Given = list[tuple[str, Tensor, Tensor]]


def keeper(where: str, given: Given) -> Callable[..., Tensor]:
    def keep(x: Tensor, positions: Tensor) -> Tensor:
        for tensor in (x, positions):
            given.append((where, tensor, tensor.detach().clone()))
        return x

    return keep


@pytest.mark.parametrize("grad", [False, True], ids=["no grad", "grad"])
@pytest.mark.parametrize("pad", [None, PAD], ids=["no pads", "pads"])
def test_what_a_hook_was_given_is_never_changed(
    grad: bool, pad: Tensor | None, tiny_model: Transformer
) -> None:
    """Activations, gradients and positions of every site, through later calls and the backward pass."""
    for paths in [[path] for path in SITES] + [list(SITES)]:
        given: Given = []
        hooks = TransformerHooks()
        for path in paths:
            for kind in KINDS:
                hooks.append_to_path(f"{path}.{kind}", keeper(f"{path}.{kind}", given))
        with torch.set_grad_enabled(grad):
            first, H = tiny_model(
                TOKENS[:, :4], pad=None if pad is None else pad[:, :4], hooks=hooks
            )
            second, H = tiny_model(TOKENS[:, 4:5], H, None if pad is None else pad[:, 4:5], hooks)
            third, H = tiny_model(TOKENS[:, 5:], H, None if pad is None else pad[:, 5:], hooks)
            if grad:
                gradients(tiny_model, loss_of(torch.cat([first, second, third], dim=1)))
        assert len({where for where, *_ in given}) == len(paths) * (3 if grad else 2)
        for where, tensor, as_given in given:
            assert torch.equal(tensor.detach(), as_given), where


def test_outputs_are_not_changed_later_either(tiny_model: Transformer) -> None:
    """Logits and captured values, by sampling on and by branching."""
    with torch.no_grad():
        logits, H = tiny_model(TOKENS[:, :3])
        kept = logits.clone()
        captured = tiny_model.capture(TOKENS, list(SITES))
        copies = {key: value.clone() for key, value in captured.items()}
        for i in range(3, 6):
            tiny_model(TOKENS[:, i : i + 1], H)
        assert torch.equal(logits, kept)
        assert all(torch.equal(captured[key], copies[key]) for key in copies)


@pytest.mark.parametrize("grad", [False, True], ids=["no grad", "grad"])
@pytest.mark.parametrize("path", ["attn.k", "attn.v"])
@pytest.mark.parametrize("kind", ["fwd", "fwd2"])
def test_key_and_value_hooks_never_reach_the_cache(
    path: str, kind: str, grad: bool, tiny_model: Transformer
) -> None:
    with torch.set_grad_enabled(grad):
        hooks = at(path, kind, lambda x: x.fill_(7.0))
        _, H = tiny_model(TOKENS[:, :3], hooks=hooks)
        _, H = tiny_model(TOKENS[:, 3:4], H, hooks=hooks)
        _, plain = tiny_model(TOKENS[:, :3])
        _, plain = tiny_model(TOKENS[:, 3:4], plain)
        cache, expected = H[0], plain[0]
        assert cache is not None
        assert expected is not None
        assert torch.equal(cache.K_cache, expected.K_cache)
        assert torch.equal(cache.V_cache, expected.V_cache)
        again, _ = tiny_model(TOKENS[:, 4:], H.copy(), hooks=hooks)
        changed, _ = tiny_model(TOKENS[:, 4:], H)
        assert not torch.equal(again, changed)  # the hook did something
        if path == "attn.k":  # equal keys: every query spreads evenly, whatever its layer's input
            pattern: list[Tensor] = []
            hooks.attn.qk_probs.append_fwd(keep_in(pattern))
            _, H = tiny_model(TOKENS, hooks=hooks)
            assert_close(pattern[1][:, 3, :4], torch.full((3, 4, 4), 0.25), 1e-6)


def test_edits_move_what_comes_after_and_nothing_before(tiny_model64: Transformer) -> None:
    everything = list(SITES)
    before = tiny_model64.capture(TOKENS, everything)
    hooks = TransformerHooks().append_at("1/attn.v", lambda x: x * 2)
    after = tiny_model64.capture(TOKENS, everything, hooks=hooks)
    order = list(before)
    assert list(after) == order
    edited = next(i for i, key in enumerate(order) if str(key) == "1/attn.v")
    assert_close(after["1/attn.v"], 2 * before["1/attn.v"], 1e-15)
    same = ["1/attn.qk_logits", "1/attn.qk_softmax_denominator", "1/attn.qk_probs"]
    for i, key in enumerate(order):
        unchanged = i < edited or str(key) in same
        assert torch.equal(after[key], before[key]) == unchanged, str(key)


def test_ablating_everything_leaves_the_bias(tiny_model64: Transformer) -> None:
    hooks = at("resid.ln_f.post_scale", "fwd", torch.zeros_like)
    logits, _ = tiny_model64(TOKENS, hooks=hooks)
    model = tiny_model64
    assert_close(logits, (model.unembed.weight @ model.final_ln.bias).expand_as(logits), 1e-12)


# ------------------------------------------------------------------------------- kinds of callables


class Module(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.calls: list[int | None] = []
        self.shift = nn.Parameter(torch.zeros(()))

    def forward(self, x: Tensor, *, layer: int | None = None) -> Tensor:
        self.calls.append(layer)
        return x + self.shift


@pytest.mark.parametrize("kind", KINDS)
def test_stateful_hooks_keep_their_state(kind: str, tiny_model: Transformer) -> None:
    def function(x: Tensor, store: list[int | None], layer: int | None) -> Tensor:
        store.append(layer)
        return x

    obj, with_method, module = Recorder(), Recorder(), Module()
    stored: list[int | None] = []
    hooks = TransformerHooks()
    for hook in (
        obj,
        with_method.method,
        partial(function, store=stored),
        module,
        AtLayers([0, 1]).append(obj),
        nn.Identity(),
        torch.clone,
        lambda x, *args: x,
    ):
        hooks.append_to_path(f"resid.torso.post_mlp.{kind}", hook)
    gradients(tiny_model, loss_of(tiny_model(TOKENS, hooks=hooks)[0]))
    layers = [1, 0] if kind == "bwd" else [0, 1]
    assert obj.layers == [layer for layer in layers for _ in range(2)]
    assert with_method.layers == stored == module.calls == layers
    if kind == "fwd":  # a module's parameters are reached by the gradient
        loss_of(tiny_model(TOKENS, hooks=hooks)[0]).backward(inputs=[module.shift])
        assert module.shift.grad is not None
        assert float(module.shift.grad) != 0


def test_keywords_by_signature(tiny_model: Transformer) -> None:
    """A hook is given what its signature accepts, looked up when attached."""
    got: list[Any] = []

    def none(x: Tensor) -> Tensor:
        got.append(None)
        return x

    def one(x: Tensor, positions: Tensor) -> Tensor:
        got.append(tuple(positions.shape))
        return x

    def keyword_only(x: Tensor, *, layer: int, unknown: str = "default") -> Tensor:
        got.append((layer, unknown))
        return x

    def all_of_them(x: Tensor, **kwargs: Any) -> Tensor:
        got.append(sorted(kwargs))
        return x

    def named_like_none(layer: Tensor, /, **kwargs: Any) -> Tensor:
        got.append(("x", kwargs["layer"]))
        return layer

    hooks = TransformerHooks()
    for hook in (none, one, keyword_only, all_of_them, named_like_none):
        hooks.append_at("1/mlp.post_act", hook)
    tiny_model(TOKENS, hooks=hooks)
    names = ["layer", "out_layer", "positions"]
    assert got == [None, (3, 6), (1, "default"), names, ("x", 1)]


# ---------------------------------------------------------------------------------------- misuse


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("result", "message"),
    [
        (lambda x: None, r"None, expected a tensor \[3, 6, 48\] of torch.float32. A hook must return x"),
        (lambda x: x[..., :5], r"\[3, 6, 5\] of torch.float32, expected a tensor \[3, 6, 48\]"),
        (lambda x: x.sum(), r"\[\] of torch.float32"),
        (lambda x: x.double(), r"\[3, 6, 48\] of torch.float64, expected .* of torch.float32"),
        (lambda x: x.bool(), r"\[3, 6, 48\] of torch.bool"),
        (lambda x: "x", r"'x'"),
        (lambda x: (x, x), r"\(tensor"),
    ],
    ids=["None", "shape", "scalar", "float64", "bool", "str", "tuple"],
)  # fmt: skip
def test_bad_results_are_named(
    kind: str, result: Callable[..., Any], message: str, tiny_model: Transformer
) -> None:
    for wrapped in (result, AtLayers(1).append(result)):
        hooks = at("mlp.post_act", kind, wrapped)
        layer = 1 if kind == "bwd" or wrapped is not result else 0
        start = rf"^mlp\.post_act\.{kind}, layer {layer}: hook <lambda> returned "
        with pytest.raises(HookError, match=start + message):
            gradients(tiny_model, loss_of(tiny_model(TOKENS, hooks=hooks)[0]))
    assert tiny_model(TOKENS)[0].isfinite().all()


def test_bad_results_without_a_layer(tiny_model: Transformer) -> None:
    with pytest.raises(HookError, match=r"^logits\.fwd, layer None: hook .* returned None"):
        tiny_model(TOKENS, hooks=at("logits", "fwd", lambda x: None))


def test_unknown_places() -> None:
    hooks = TransformerHooks()
    with pytest.raises(HookError, match=r"'mlp.postact.fwd'.*Did you mean .*'mlp\.post_act\.fwd"):
        hooks.append_to_path("mlp.postact.fwd", scaled)
    with pytest.raises(HookError, match=r"It goes on: mlp\.post_act\.fwd, mlp\.post_act\.bwd"):
        hooks.append_to_path("mlp.post_act", scaled)
    with pytest.raises(AttributeError, match=r"MLPHooks has no 'postact'. Did you mean 'post_act'"):
        hooks.mlp.postact  # noqa: B018
    with pytest.raises(AttributeError, match=r"FwdBwdHooks has no 'append'"):
        hooks.mlp.post_act.append(scaled)
    assert hooks.is_empty()
    assert not hasattr(hooks, "_not_there")


@pytest.mark.parametrize("path", ONCE)
@pytest.mark.parametrize("kind", KINDS)
def test_choosing_layers_where_there_are_none(path: str, kind: str) -> None:
    hooks = TransformerHooks()
    inside = ConditionalHooks(lambda x: True).append(AtLayers(0).append(scaled))
    autoencoder = AutoencoderHooks(scaled, scaled)
    autoencoder.latents.append_fwd(AtLayers(2).append(scaled))
    for hook in (AtLayers(0).append(scaled), inside, autoencoder):
        with pytest.raises(HookError, match=rf"^{re.escape(path)}\.{kind}: .* not in each layer"):
            hooks.append_to_path(f"{path}.{kind}", hook)
    assert hooks.is_empty()


def test_refused_hooks_are_not_attached() -> None:
    hooks = TransformerHooks()
    with pytest.raises(HookError, match="not in each layer"):
        hooks.append_all(AtLayers(0).append(scaled))
    with pytest.raises(HookError, match=r"needs out_layer, which it would not be given"):
        hooks.append_all(lambda x, out_layer: x)
    assert hooks.is_empty()
    for not_a_hook in (None, 3, "relu", torch.zeros(1)):
        with pytest.raises(HookError, match=r"mlp\.pre_act\.fwd: a hook is a function"):
            hooks.mlp.pre_act.append_fwd(not_a_hook)  # type: ignore[arg-type]
    with pytest.raises(HookError, match=r"takes no positional argument"):
        hooks.mlp.pre_act.append_fwd(lambda *, x: x)
    with pytest.raises(HookError, match=r"needs y, .* Keywords at this place: layer, positions\."):
        hooks.mlp.pre_act.append_bwd(lambda x, y: x)
    with pytest.raises(HookError, match=r"needs y"):
        hooks.mlp.pre_act.append_fwd(lambda x, y, /: x)
    with pytest.raises(HookError, match="is a tree for a whole model or part of it"):
        hooks(TOKENS)
    for layers in (-1, [0, -2], "01", [0.5]):
        with pytest.raises(HookError, match="AtLayers takes a layer or a list of layers"):
            AtLayers(layers)  # type: ignore[arg-type]
    assert hooks.is_empty()


def test_keywords_are_checked_inside_conditional_hooks() -> None:
    hooks = TransformerHooks()
    for nested in (
        AtLayers(0).append(lambda x, out_layer: x),
        ConditionalHooks(lambda x: True).append(AtLayers(0).append(lambda x, out_layer: x)),
        ConditionalHooks(lambda x, out_layer: True),
    ):
        with pytest.raises(HookError, match=r"^mlp\.pre_act\.fwd: .* needs out_layer"):
            hooks.mlp.pre_act.append_fwd(nested)
        with pytest.raises(HookError, match=r"^mlp\.pre_act\.bwd: .* needs out_layer"):
            hooks.mlp.pre_act.append_bwd(nested)
        hooks.mlp.post_act.append_fwd(nested)
    autoencoder = AutoencoderHooks(scaled, scaled)
    autoencoder.latents.append_bwd(lambda grad, out_layer: grad)
    with pytest.raises(HookError, match=r"^mlp\.pre_act\.fwd: .* needs out_layer"):
        hooks.mlp.pre_act.append_fwd(autoencoder)
    assert hooks.mlp.pre_act.is_empty()
    bound = AtLayers(0).append(lambda x, a: x).bind(a=1)
    hooks.mlp.pre_act.append_fwd(bound)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("path", SITES)
def test_a_raising_hook_leaves_the_model_usable(
    path: str, kind: str, tiny_model: Transformer
) -> None:
    expected, _ = tiny_model(TOKENS)

    def fail(x: Tensor) -> Tensor:
        raise ZeroDivisionError("mine")

    with pytest.raises(ZeroDivisionError, match="mine"):
        gradients(tiny_model, loss_of(tiny_model(TOKENS, hooks=at(path, kind, fail))[0]))
    assert torch.equal(tiny_model(TOKENS)[0], expected)
    assert torch.equal(tiny_model(TOKENS, hooks=TransformerHooks())[0], expected)


def test_two_experiments_interleave(tiny_model: Transformer) -> None:
    """Each continues its own generation with its own hooks, step by step."""
    doubled = at("resid.torso.delta_mlp", "fwd", lambda x: 2 * x)
    silenced = at("attn.v_out", "fwd", lambda x: x.mul_(0))

    def steps(hooks: TransformerHooks) -> Any:
        H = None
        for i in range(6):
            logits, H = tiny_model(TOKENS[:, i : i + 1], H, hooks=hooks)
            yield logits

    alone = [list(steps(hooks)) for hooks in (doubled, silenced, TransformerHooks())]
    together = zip(steps(doubled), steps(silenced), steps(TransformerHooks()), strict=True)
    for logits, *expected in zip(together, *alone, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(logits, expected, strict=True))
    assert not torch.equal(alone[0][-1], alone[2][-1])
    assert not torch.equal(alone[1][-1], alone[2][-1])


def test_a_hook_may_run_a_model_or_append(tiny_model: Transformer) -> None:
    expected, _ = tiny_model(TOKENS)
    hooks, inner = TransformerHooks(), Recorder()

    def nested(x: Tensor) -> Tensor:
        assert torch.equal(tiny_model(TOKENS)[0], expected)
        hooks.mlp.pre_act.append_fwd(inner)
        return x

    hooks.mlp.pre_act.append_fwd(nested)
    tiny_model(TOKENS, hooks=hooks)
    assert inner.layers == [1]  # appended in layer 0: not in the list that was running then


# --------------------------------------------------------------------------- the tree as a value


def test_append_all_is_every_list(tiny_model: Transformer) -> None:
    recorder = Recorder()
    hooks = TransformerHooks()
    assert hooks.append_all(recorder) is hooks
    logits, _ = tiny_model(TOKENS, hooks=hooks)
    n_sites = len(ONCE) + 2 * len(PER_LAYER)
    assert len(recorder.calls) == 2 * n_sites
    gradients(tiny_model, loss_of(logits))
    assert len(recorder.calls) == 3 * n_sites
    part = TransformerHooks()
    part.resid.torso.ln_attn.append_all(recorder)
    filled = [path for path, leaf in part.leaves() if not leaf.is_empty()]
    assert filled == [
        f"resid.torso.ln_attn.{name}.{kind}"
        for name in ("post_mean_subtraction", "scale", "post_scale")
        for kind in KINDS
    ]


def test_appending_returns_what_was_appended_to() -> None:
    hooks = TransformerHooks()
    site = hooks.mlp.post_act
    assert site.append_fwd(scaled).append_bwd(scaled).append_fwd2(scaled) is site
    assert hooks.append_to_path("logits.fwd", scaled) is hooks
    assert hooks.append_at("1/mlp_post_act", scaled, kind="bwd") is hooks
    assert site.fwd.append(scaled) is site.fwd
    assert site.bwd.append(scaled) is site.bwd
    assert isinstance(site.bwd, WrapperHooks)
    assert (len(site.fwd), len(site.bwd), len(site.fwd2)) == (2, 3, 1)
    layers = AtLayers(1)
    assert layers.append(scaled).append(scaled) is layers
    assert site.bind(a=1) is site
    assert site.unbind(["a"]) is site


def test_bind_gives_keywords_to_every_hook() -> None:
    got: list[Any] = []

    def hook(x: Tensor, a: int = 0, layer: int | None = None) -> Tensor:
        got.append((a, layer))
        return x

    def needs(x: Tensor, a: int) -> Tensor:
        got.append(a)
        return x

    hooks = TransformerHooks()
    hooks.mlp.post_act.append_fwd(hook).append_fwd2(AtLayers(3).append(hook))
    x = torch.zeros(2)
    hooks.mlp.bind(a=1)
    hooks.mlp.post_act.append_fwd(needs)  # what is bound is there
    hooks.mlp.post_act(x, layer=3)
    assert got == [(1, 3), 1, (1, 3)]
    with pytest.raises(HookError, match=r"'a' is already bound; unbind it first"):
        hooks.mlp.bind(a=2)
    hooks.mlp.unbind(["a", "never bound"])
    got.clear()
    hooks.mlp.post_act.fwd2(x, layer=3)
    assert got == [(0, 3)]
    hooks.mlp.post_act.fwd2.bind(layer=3)
    hooks.mlp.post_act.fwd2(x)
    assert got[1:] == [(0, 3)]


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda hooks: hooks.copy()])
def test_copies_are_trees_of_their_own_with_the_same_hooks(
    duplicate: Callable[[Any], Any], tiny_model: Transformer
) -> None:
    recorder, module = Recorder(), Module()
    inner = AtLayers(1).append(recorder)
    hooks = TransformerHooks()
    hooks.mlp.post_act.append_fwd(inner).append_bwd(recorder).append_fwd2(module)
    hooks.mlp.bind(unused=1)
    new = duplicate(hooks)
    assert isinstance(new, TransformerHooks)
    assert repr(new) == repr(hooks)
    hooks.mlp.unbind(["unused"])  # the copy keeps it
    new.mlp.post_act.append_fwd(scaled)
    new.mlp.post_act.fwd._hooks[0].append(scaled)  # type: ignore[attr-defined]
    new.mlp.post_act.bwd.append(scaled)
    new.logits.append_fwd(scaled)
    assert (len(hooks.mlp.post_act.fwd), len(inner), len(hooks.mlp.post_act.bwd)) == (1, 1, 1)
    assert hooks.logits.is_empty()
    assert new.mlp.post_act.fwd.bound_kwargs == {"unused": 1}
    gradients(tiny_model, loss_of(tiny_model(TOKENS, hooks=new)[0]))
    assert recorder.layers == [1, 1, 0]  # the very objects were called
    assert module.calls == [0, 1]
    with pytest.raises(HookError, match=r"^logits\.bwd: .* not in each layer"):
        new.logits.append_bwd(AtLayers(0))  # a copy still knows its places


def test_copies_share_what_the_user_gave(tiny_model: Transformer) -> None:
    """Functions and weights inside composite hooks are the user's, by identity."""
    autoencoder = Codec()
    layers, codec = AtLayers([0, 2]), AutoencoderHooks(autoencoder.encode, autoencoder.decode, True)
    conditional = ConditionalHooks(autoencoder.is_codec)
    for original in (layers, codec, conditional):
        for new in (copy.deepcopy(original), original.copy()):
            assert new is not original
            assert type(new) is type(original)
    assert copy.deepcopy(layers).condition is layers.condition
    assert copy.deepcopy(layers).at_layers == [0, 2]
    assert copy.deepcopy(conditional).condition == conditional.condition
    new_codec = copy.deepcopy(codec)
    assert new_codec.encode == codec.encode
    assert new_codec.encode.__self__ is autoencoder  # type: ignore[attr-defined]
    assert new_codec.decode == codec.decode
    assert new_codec.add_error is True
    new_codec.latents.append_fwd(scaled)
    assert codec.latents.is_empty()
    bound = TransformerHooks()
    bound.mlp.post_act.append_fwd(AtLayers(0).append(codec))
    again = copy.deepcopy(bound)
    again.bind(extra=1)
    assert bound.mlp.post_act.fwd.bound_kwargs == {}


def test_emptiness() -> None:
    hooks = TransformerHooks()
    assert hooks.is_empty()
    hooks.attn.qk_probs.append_bwd(AtLayers(1).append(scaled))
    assert not hooks.is_empty()
    assert not hooks.attn.is_empty()
    assert hooks.mlp.is_empty()
    assert hooks.attn.is_empty_at(0)
    assert not hooks.attn.is_empty_at(1)
    assert hooks.attn.need_explicit(1)
    assert not hooks.attn.need_explicit(0)
    v_only = AttentionHooks()
    v_only.v.append_fwd(scaled)
    assert not v_only.need_explicit(0)
    assert AtLayers(1).is_empty_at(1)
    assert not AutoencoderHooks(scaled, scaled).is_empty()


def test_repr_shows_what_is_attached() -> None:
    hooks = TransformerHooks()
    assert repr(hooks) == "TransformerHooks()"
    hooks.mlp.post_act.append_fwd(scaled).append_fwd(AtLayers([3, 5]).append(Recorder()))
    hooks.mlp.post_act.append_bwd(Recorder().method).append_fwd2(partial(scaled))
    hooks.logits.append_fwd(Module())
    autoencoder = AutoencoderHooks(scaled, scaled, add_error=True)
    autoencoder.latents.append_fwd(scaled)
    hooks.resid.torso.delta_mlp.append_fwd(AtLayers(1).append(autoencoder))
    text = repr(hooks)
    for part in (
        "mlp.post_act.fwd: scaled, AtLayers(3, 5)[Recorder]",
        "mlp.post_act.bwd: Recorder.method",
        "mlp.post_act.fwd2: partial(scaled)",
        "resid.torso.delta_mlp.fwd: AtLayers(1)[AutoencoderHooks(add_error=True",
        "latents.fwd: scaled",
        "logits.fwd: Module()",
    ):
        assert part in text
    assert "pre_act" not in text
    assert repr(AutoencoderHooks(scaled, scaled)) == "AutoencoderHooks(add_error=False)"
    assert repr(Hooks([scaled])) == "Hooks[scaled]"


def test_conditional_hooks(tiny_model: Transformer) -> None:
    """The condition is given x and whatever it asks for."""
    recorder, first = Recorder(), next(iter(tiny_model.layers))
    conditions: list[tuple[Callable[..., bool], list[int]]] = [
        (lambda x, layer: layer == 1, [1]),
        (lambda x: x.shape[-1] == 48, [0, 1]),
        (lambda x, **kwargs: kwargs["out_layer"] is first.mlp.out_layer, [0]),
        (lambda x: False, []),
    ]
    for condition, expected in conditions:
        recorder.calls.clear()
        hooks = at("mlp.post_act", "fwd", ConditionalHooks(condition).append(recorder))
        tiny_model(TOKENS, hooks=hooks)
        assert recorder.layers == expected


@pytest.mark.parametrize("kind", KINDS)
def test_at_layers(kind: str, tiny_model: Transformer) -> None:
    cases: list[tuple[Any, list[int]]] = [(0, [0]), ([1], [1]), ([0, 1], [0, 1])]
    cases += [([], []), (range(2), [0, 1])]
    for layers, expected in cases:
        recorder = Recorder()
        hooks = at("mlp.post_act", kind, AtLayers(layers).append(recorder))
        gradients(tiny_model, loss_of(tiny_model(TOKENS, hooks=hooks)[0]))
        assert recorder.layers == (expected[::-1] if kind == "bwd" else expected)


def test_grad_hook_wrapper_is_a_forward_hook() -> None:
    x = torch.arange(4.0, requires_grad=True)
    seen: list[Any] = []

    def hook(grad: Tensor, layer: int) -> Tensor:
        seen.append((grad.tolist(), layer))
        return grad * 10

    y = grad_hook_wrapper(hook)(x * 1.0, layer=3)
    assert torch.equal(y, x)
    (y * torch.tensor([1.0, 2, 3, 4])).sum().backward()
    assert seen == [([1, 2, 3, 4], 3)]
    assert x.grad is not None
    assert x.grad.tolist() == [10, 20, 30, 40]
    with torch.no_grad():
        assert grad_hook_wrapper(hook)(x, layer=3) is x
    assert len(seen) == 1
    # second derivatives pass through
    z = torch.tensor(2.0, requires_grad=True, dtype=torch.float64)
    site = FwdBwdHooks().append_bwd(lambda grad: 3 * grad)
    (first,) = torch.autograd.grad(site(z**3), z, create_graph=True)
    (second,) = torch.autograd.grad(first, z)
    assert (float(first.detach()), float(second)) == (36.0, 36.0)


# ------------------------------------------------------------------------------ autoencoder hooks


class Codec(nn.Module):
    """A ReLU autoencoder with random weights, bare."""

    def __init__(self, n_inputs: int = 48, n_latents: int = 10, seed: int = 0) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(seed)

        def random(*shape: int) -> nn.Parameter:
            return nn.Parameter(torch.randn(*shape, generator=generator, dtype=torch.float64) / 4)

        self.encoder, self.decoder = random(n_latents, n_inputs), random(n_inputs, n_latents)
        self.latent_bias, self.bias = random(n_latents), random(n_inputs)

    def encode(self, x: Tensor) -> Tensor:
        return torch.relu((x - self.bias) @ self.encoder.T + self.latent_bias)

    def is_codec(self, x: Tensor) -> bool:
        return True

    def decode(self, latents: Tensor) -> Tensor:
        return latents @ self.decoder.T + self.bias


@pytest.fixture
def codec() -> Codec:
    return Codec()


@pytest.mark.parametrize("kind", ["fwd", "fwd2"])
def test_error_preserving_autoencoders_change_nothing(
    kind: str, codec: Codec, tiny_model64: Transformer
) -> None:
    plain, _ = tiny_model64(TOKENS)
    expected = gradients(tiny_model64, loss_of(plain))
    for add_error in (True, False):
        hooks = at("mlp.post_act", kind, AutoencoderHooks(codec.encode, codec.decode, add_error))
        logits, _ = tiny_model64(TOKENS, hooks=hooks)
        found = gradients(tiny_model64, loss_of(logits))
        if add_error:
            assert_close(logits, plain, 1e-13)
            assert_same_gradients(found, expected, 1e-12)
        else:
            assert not torch.allclose(logits, plain, rtol=1e-2)
            with pytest.raises(AssertionError, match="off by"):
                assert_same_gradients(found, expected, 1e-2)


def test_autoencoder_values_are_the_formulas(codec: Codec, tiny_model64: Transformer) -> None:
    x = tiny_model64.capture(TOKENS, "1/mlp.post_act")["1/mlp.post_act"]
    latents = codec.encode(x)
    for add_error in (False, True):
        hooks = AutoencoderHooks(codec.encode, codec.decode, add_error)
        recorders = {name: Recorder() for name in hooks.all_hooks}
        for name, site in hooks.all_hooks.items():
            assert isinstance(site, FwdBwdHooks)

            site.append_fwd(recorders[name])
        tree = TransformerHooks().append_at("1/mlp.post_act", hooks)
        found = tiny_model64.capture(TOKENS, "1/mlp.post_act", hooks=tree)["1/mlp.post_act"]
        seen = {name: recorder.calls[0][0] for name, recorder in recorders.items()}
        assert_close(seen["latents"], latents, 1e-12)
        assert_close(seen["reconstruction"], codec.decode(latents), 1e-12)
        assert_close(seen["error"], x - codec.decode(latents), 1e-12)
        assert_close(found, x if add_error else codec.decode(latents), 1e-12)
        for recorder in recorders.values():
            ((_, kwargs),) = recorder.calls
            assert set(kwargs) == {"layer", "positions", "out_layer"}
            assert kwargs["layer"] == 1


@pytest.mark.parametrize("in_place", [False, True])
@pytest.mark.parametrize("add_error", [False, True])
def test_editing_a_latent_moves_the_output_by_its_decoder_column(
    add_error: bool, in_place: bool, codec: Codec, tiny_model64: Transformer
) -> None:
    location = "0/mlp.post_act"

    def raise_latent(latents: Tensor) -> Tensor:
        latents = latents if in_place else latents.clone()
        latents[..., 4] += 2.5
        return latents

    outputs = []
    for edit in (None, raise_latent):
        hooks = AutoencoderHooks(codec.encode, codec.decode, add_error)
        if edit is not None:
            hooks.latents.append_fwd(edit)
        tree = TransformerHooks().append_at(location, hooks)
        outputs.append(tiny_model64.capture(TOKENS, location, hooks=tree)[location])
        # the edit and the backward pass go together
        gradients(tiny_model64, loss_of(tiny_model64(TOKENS, hooks=tree)[0]))
    difference = outputs[1] - outputs[0]
    assert_close(difference, (2.5 * codec.decoder[:, 4]).expand_as(difference), 1e-12)


@pytest.mark.parametrize("add_error", [False, True])
def test_ablating_a_latent(add_error: bool, codec: Codec, tiny_model64: Transformer) -> None:
    """A latent that is always large: gone from the output when ablated, but only if it was decoded."""
    with torch.no_grad():
        codec.latent_bias[3] = 1000
        codec.decoder[:, 3] = 1.0

    def ablate(latents: Tensor) -> Tensor:
        latents[..., 3] = 0
        return latents

    def largest(hooks: AutoencoderHooks) -> float:
        tree = at("mlp.post_act", "fwd", hooks)
        found = tiny_model64.capture(TOKENS, "mlp.post_act", hooks=tree)
        return max(float(x.detach().abs().max()) for x in found.values())

    plain = AutoencoderHooks(codec.encode, codec.decode, add_error)
    ablated = AutoencoderHooks(codec.encode, codec.decode, add_error)
    ablated.latents.append_fwd(ablate)
    assert (largest(plain) > 100) is not add_error
    assert (largest(ablated) > 100) is add_error


@pytest.mark.parametrize("add_error", [False, True])
def test_backward_from_a_cached_latent(
    add_error: bool, codec: Codec, tiny_model64: Transformer
) -> None:
    """A latent kept in the forward pass depends on earlier weights, and on no later ones."""
    seen: list[Tensor] = []
    hooks = AutoencoderHooks(codec.encode, codec.decode, add_error)
    hooks.latents.append_fwd(keep_in(seen))
    tree = TransformerHooks().append_at("1/mlp.post_act", hooks)
    tiny_model64(TOKENS, hooks=tree)
    found = gradients(tiny_model64, seen[0].sum())
    reached = {name for name, grad in found.items() if grad.abs().max() > 0}
    assert {
        "tok_embed.weight",
        "xf_layers.0.mlp.out_layer.weight",
        "xf_layers.1.mlp.in_layer.weight",
    } <= reached
    assert not {"xf_layers.1.mlp.out_layer.weight", "final_ln.weight", "unembed.weight"} & reached
    codec_grads = torch.autograd.grad(
        loss_of(tiny_model64(TOKENS, hooks=tree)[0]), list(codec.parameters()), allow_unused=True
    )
    assert all(grad is not None for grad in codec_grads)


def test_gradient_at_latents(codec: Codec, tiny_model64: Transformer) -> None:
    """bwd hooks inside see the derivative with respect to the latents."""
    seen: list[Tensor] = []
    hooks = AutoencoderHooks(codec.encode, codec.decode, add_error=True)
    hooks.latents.append_bwd(keep_in(seen))
    tree = TransformerHooks().append_at("1/mlp.post_act", hooks)
    gradients(tiny_model64, loss_of(tiny_model64(TOKENS, hooks=tree)[0]))
    at_output: list[Tensor] = []
    plain = TransformerHooks().append_at("1/mlp.post_act", keep_in(at_output), kind="bwd")
    gradients(tiny_model64, loss_of(tiny_model64(TOKENS, hooks=plain)[0]))
    assert_close(seen[0], at_output[0] @ codec.decoder, 1e-12)


def test_autoencoders_in_bwd_and_under_at_layers(codec: Codec, tiny_model64: Transformer) -> None:
    """The gradient itself may be encoded."""
    counts: dict[str, list[Any]] = {"fwd": [], "bwd": [], "fwd2": []}
    for kind, layers in counts.items():
        hooks = AutoencoderHooks(codec.encode, codec.decode, add_error=True)
        hooks.latents.append_fwd(lambda x, layer, to=layers: to.append((layer, x.shape)) or x)
        tree = at("mlp.post_act", kind, hooks)
        tree.append_to_path(f"mlp.post_act.{kind}", AtLayers(1).append(hooks))
        plain, _ = tiny_model64(TOKENS)
        logits, _ = tiny_model64(TOKENS, hooks=tree)
        assert_close(logits, plain, 1e-13)
        found = gradients(tiny_model64, loss_of(logits))
        assert_same_gradients(found, gradients(tiny_model64, loss_of(plain)), 1e-12)
    shape = torch.Size([3, 6, 10])
    assert counts["fwd"] == counts["fwd2"] == [(layer, shape) for layer in (0, 1, 1)]
    assert counts["bwd"] == [(layer, shape) for layer in (1, 1, 0)]


def test_append_all_on_an_autoencoder_reaches_its_sites(codec: Codec) -> None:
    recorder = Recorder()
    hooks = AutoencoderHooks(codec.encode, codec.decode)
    hooks.append_all(recorder)
    x = torch.randn(2, 48, dtype=torch.float64, requires_grad=True)
    hooks(x, layer=0).sum().backward()
    # latents, reconstruction, error, fwd and fwd2 each; backward reaches the first two
    assert [tuple(x.shape) for x, _ in recorder.calls] == [(2, 10)] * 2 + [(2, 48)] * 5 + [(2, 10)]
    with pytest.raises(HookError, match=r"latents\.fwd"):
        hooks.append_to_path("latent.fwd", recorder)


def test_errors_inside_autoencoder_hooks_say_where(codec: Codec, tiny_model64: Transformer) -> None:
    hooks = AutoencoderHooks(codec.encode, codec.decode)
    hooks.latents.append_fwd(lambda x: None)
    tree = TransformerHooks().append_at("1/mlp.post_act", hooks)
    expected = r"^mlp\.post_act\.fwd > latents\.fwd, layer 1: hook .* returned None, expected .*\[3, 6, 10\]"
    with pytest.raises(HookError, match=expected):
        tiny_model64(TOKENS, hooks=tree)
    wrong = AutoencoderHooks(codec.encode, lambda latents: latents)
    with pytest.raises(HookError, match=r"AutoencoderHooks returned \[3, 6, 10\]"):
        tiny_model64(TOKENS, hooks=at("mlp.post_act", "fwd", wrong))


def test_sizes_of_this_file() -> None:
    assert (TINY.d_model, TINY.d_ff, TINY.n_heads, TINY.n_vocab) == (16, 48, 4, 29)


# --- after an error, and hooks that would never run ---


def test_going_on_after_a_hook_raised_is_as_if_nothing_had_happened(tiny_model) -> None:
    tokens = torch.randint(
        0, tiny_model.n_vocab, (2, 6), generator=torch.Generator().manual_seed(5)
    )

    def fail(x: Tensor) -> Tensor:
        raise RuntimeError("on purpose")

    hooks = TransformerHooks().append_at("1/mlp.post_act", fail)
    for grad in (False, True):
        with torch.set_grad_enabled(grad):
            _, H = tiny_model(tokens[:, :4])
            for pad in (None, torch.tensor([[True], [False]])):
                with pytest.raises(RuntimeError, match="on purpose"):
                    tiny_model(tokens[:, 4:5], H, pad=pad, hooks=hooks)
            logits, _ = tiny_model(tokens[:, 4:], H)
            expected, _ = tiny_model(tokens)
        torch.testing.assert_close(logits, expected[:, 4:], atol=1e-5, rtol=0)


@pytest.mark.parametrize("kind", ["fwd", "bwd", "fwd2"])
def test_hooks_for_a_layer_that_the_model_lacks_are_refused(tiny_model, kind: str) -> None:
    n = tiny_model.cfg.n_layers
    hooks = TransformerHooks().append_at(f"{n}/mlp.post_act", lambda x: x, kind)  # type: ignore[arg-type]
    with pytest.raises(HookError, match=rf"mlp.post_act.{kind}.*layer {n}.*0 to {n - 1}"):
        tiny_model(torch.tensor([[1]]), hooks=hooks)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("nested", [False, True])
def test_a_list_of_layers_of_which_the_model_lacks_one_is_refused(
    tiny_model: Transformer, kind: str, nested: bool
) -> None:
    chosen: Hooks = AtLayers([0, 7]).append(scaled)
    hooks = at("mlp.post_act", kind, Hooks([scaled, chosen]) if nested else chosen)
    with pytest.raises(HookError, match=rf"mlp.post_act.{kind}: .*layer 7, .* layers 0 to 1"):
        tiny_model(TOKENS, hooks=hooks)


# --- what is told ---


def test_an_optional_keyword_that_is_misspelt_is_refused() -> None:
    site = TransformerHooks().mlp.pre_act
    wrong: list[Callable[..., Any]] = [
        lambda x, layr=None: x,
        lambda x, *, positon=0, **kwargs: x,
        AtLayers(0).append(lambda x, layer_=None: x),
        partial(lambda x, mine, layr=None: x, mine=3),
    ]
    for hook in wrong:
        with pytest.raises(
            HookError, match=r"never be given '\w+'\. Did you mean '(layer|positions)'"
        ):
            site.append_fwd(hook)
    assert site.is_empty()
    right: list[Callable[..., Any]] = [
        lambda x, path="a": x,
        lambda x, factor=2.0, layer=None: x,
        lambda x, layer=None, layers=(1, 2): x,  # takes ours too: the other is its own
        partial(lambda x, layers=None: x, layers=[1, 2]),
    ]
    for hook in right:
        site.append_fwd(hook)
    site.bind(layr=1).append_fwd(lambda x, layr=None: x)
    assert len(site.fwd) == 5


@pytest.mark.parametrize("kind", KINDS)
def test_an_error_of_a_hook_says_where_it_was(kind: str, tiny_model: Transformer) -> None:
    def too_wide(x: Tensor) -> Tensor:
        return x + torch.zeros(x.shape[-1] + 1)

    hooks = at("mlp.post_act", kind, AtLayers(1).append(too_wide))
    with pytest.raises(RuntimeError, match="must match") as error:
        gradients(tiny_model, loss_of(tiny_model(TOKENS, hooks=hooks)[0]))
    (note,) = error.value.__notes__
    assert note.endswith(f"too_wide at mlp.post_act.{kind}, layer 1")


def test_append_is_named_where_a_site_has_no_append() -> None:
    hooks = TransformerHooks()
    with pytest.raises(AttributeError, match=r"use append_fwd\(hook\)"):
        hooks.mlp.post_act.append(scaled)
    with pytest.raises(
        AttributeError, match=r"MLPHooks has no 'append_fwd'\. Append to one of its"
    ):
        hooks.mlp.append_fwd(scaled)


def test_an_empty_subtree_lists_its_sites() -> None:
    hooks = TransformerHooks()
    assert repr(hooks.mlp) == "MLPHooks(no hooks yet at mlp.pre_act, mlp.post_act)"
    assert "resid.torso.ln_mlp.scale" in repr(hooks.resid)
    hooks.mlp.pre_act.append_fwd(scaled)
    assert repr(hooks.mlp) == "MLPHooks(\n  pre_act.fwd: scaled\n)"


def test_append_to_path_takes_the_names_of_places(tiny_model: Transformer) -> None:
    recorder = Recorder()
    hooks = TransformerHooks()
    for path in ("1/mlp_post_act.fwd", "blocks.0.mlp.hook_post.fwd2", "mlp_post_act.fwd2"):
        hooks.append_to_path(path, recorder)
    tiny_model(TOKENS, hooks=hooks)
    assert sorted(recorder.layers) == [0, 0, 1, 1]
    with pytest.raises(
        HookError, match=r"goes on: 1/mlp\.post_act\.fwd, .*append_at\('1/mlp\.post"
    ):
        hooks.append_to_path("1/mlp_post_act", recorder)


# --- what lives how long, and elsewhere ---


def every_kind_of_hook() -> TransformerHooks:
    hooks = TransformerHooks()
    hooks.append_at("1/mlp.post_act", scaled).append_at("0/attn.v", scaled, "bwd")
    hooks.mlp.post_act.append_fwd(ConditionalHooks(small).append(scaled)).append_bwd(scaled)
    autoencoder = AutoencoderHooks(torch.relu, scaled, add_error=True)
    autoencoder.latents.append_fwd(AtLayers(1).append(scaled))
    hooks.mlp.post_act.append_fwd2(autoencoder)
    return hooks.bind(extra=1)


def small(x: Tensor, layer: int) -> bool:
    return layer < 1


def test_hooks_can_be_pickled(tiny_model64: Transformer) -> None:
    hooks = every_kind_of_hook()
    again = pickle.loads(pickle.dumps(hooks))
    assert repr(again) == repr(hooks)
    results = [tiny_model64(TOKENS, hooks=tree)[0] for tree in (hooks, again)]
    assert torch.equal(*results)
    found = [gradients(tiny_model64, loss_of(logits)) for logits in results]
    assert_same_gradients(found[0], found[1], 0)
    again.logits.append_fwd(scaled)
    assert hooks.logits.is_empty()
    with pytest.raises(HookError, match=r"^logits\.bwd: .* not in each layer"):
        again.logits.append_bwd(AtLayers(0))


@pytest.mark.parametrize("grad", [False, True], ids=["no grad", "grad"])
def test_nothing_outlives_its_last_name(grad: bool, tiny_model: Transformer) -> None:
    """No reference cycle keeps a tree, a captured tensor or a logit until garbage is collected."""
    gc.collect()
    gc.disable()
    try:
        with torch.set_grad_enabled(grad):
            hooks = every_kind_of_hook()
            hooks.append_to_path("resid.torso.post_mlp.fwd", kept := Recorder())
            found = tiny_model.capture(TOKENS, list(SITES), hooks=hooks)
            logits = tiny_model(TOKENS, hooks=hooks)[0]
            if grad:
                gradients(tiny_model, loss_of(logits))
        alive = [weakref.ref(each) for each in (*found.values(), logits, hooks, kept, found)]
        alive += [weakref.ref(leaf) for _, leaf in hooks.leaves()]
        del hooks, found, logits, kept
        assert not [ref() for ref in alive if ref() is not None]
    finally:
        gc.enable()
