"""Models of Hugging Face run with our hooks; tiny random ones, nothing is downloaded."""

import copy
import json
import sys
import threading
from pathlib import Path

import pytest
import torch

transformers = pytest.importorskip("transformers")

from neuron_explainer.errors import (  # noqa: E402
    HookError,
    InputError,
    LocationError,
    MissingExtraError,
    SourceError,
)
from neuron_explainer.models.hooks import AtLayers, TransformerHooks  # noqa: E402
from neuron_explainer.models.huggingface.context import HuggingFaceModelContext  # noqa: E402
from neuron_explainer.models.huggingface.families import (  # noqa: E402
    Architecture,
    Tap,
)
from neuron_explainer.models.huggingface.model import HuggingFaceModel  # noqa: E402
from neuron_explainer.models.huggingface.tokenizer import HuggingFaceTokenizer  # noqa: E402
from neuron_explainer.models.transformer import Transformer  # noqa: E402
from neuron_explainer.models.weight_names import (  # noqa: E402
    Dimension,
    WeightLocationType,
)

BASE = {
    "vocab_size": 61,
    "hidden_size": 16,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "max_position_embeddings": 24,
    "intermediate_size": 20,
    "bos_token_id": 0,
    "eos_token_id": 0,
    "pad_token_id": None,
}
GPT2 = {
    "vocab_size": 61,
    "n_embd": 16,
    "n_layer": 3,
    "n_head": 4,
    "n_positions": 24,
    "n_inner": 20,
    "bos_token_id": 0,
    "eos_token_id": 0,
}
GROUPED = BASE | {"num_key_value_heads": 2}
NEO = {key: value for key, value in BASE.items() if key != "num_hidden_layers"} | {
    "num_layers": 3,
    "num_heads": 4,
    "attention_types": [[["global", "local", "global"], 1]],
    "window_size": 4,
}
OPT = BASE | {"ffn_dim": 20, "word_embed_proj_dim": 16}

CONFIGS = {
    "gpt2": transformers.GPT2Config(**GPT2),
    "gpt_neo": transformers.GPTNeoConfig(**NEO),
    "gpt_neox": transformers.GPTNeoXConfig(**BASE),
    "gpt_neox, serial": transformers.GPTNeoXConfig(**BASE, use_parallel_residual=False),
    "opt": transformers.OPTConfig(**OPT),
    "opt, norms behind": transformers.OPTConfig(**OPT, do_layer_norm_before=False),
    "llama": transformers.LlamaConfig(**GROUPED),
    "mistral": transformers.MistralConfig(**GROUPED, sliding_window=4),
    "qwen2": transformers.Qwen2Config(**GROUPED),
    "gemma2": transformers.Gemma2Config(
        **GROUPED, head_dim=8, sliding_window=4, query_pre_attn_scalar=8
    ),
}
ALL = pytest.mark.parametrize("family", CONFIGS)


def make(family: str, seed: int = 0):
    """A model whose every parameter is random, norms and biases too: 0 and 1 would hide mistakes."""
    torch.manual_seed(seed)
    model = transformers.AutoModelForCausalLM.from_config(copy.deepcopy(CONFIGS[family]))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.3 * torch.randn(parameter.shape))
    return model


@pytest.fixture(scope="module")
def models() -> dict[str, HuggingFaceModel]:
    return {family: HuggingFaceModel(make(family)) for family in CONFIGS}


@pytest.fixture
def tokens() -> torch.Tensor:
    return torch.randint(1, 61, (2, 9), generator=torch.Generator().manual_seed(5))


def close(a: torch.Tensor, b: torch.Tensor, tolerance: float = 1e-5) -> None:
    largest = max(1.0, float(b.detach().abs().max()))
    torch.testing.assert_close(a, b, rtol=0, atol=tolerance * largest)


def identity(x: torch.Tensor, **kwargs: object) -> torch.Tensor:
    return x


def halve(x: torch.Tensor, **kwargs: object) -> torch.Tensor:
    return x * 0.5


def hooks_at(*paths: str, hook=identity, kind: str = "fwd") -> TransformerHooks:
    hooks = TransformerHooks()
    for path in paths:
        hooks.append_to_path(f"{path}.{kind}", hook)
    return hooks


def count_hooks(model: HuggingFaceModel) -> int:
    return sum(
        len(module._forward_hooks) + len(module._forward_pre_hooks)
        for module in model.model.modules()
    )


# --- meaning ---


@ALL
def test_without_hooks_it_is_the_model(family: str, models, tokens) -> None:
    model = models[family]
    assert torch.equal(model(tokens)[0], model.model(input_ids=tokens).logits)


@ALL
def test_identity_hooks_change_no_bit(family: str, models, tokens) -> None:
    model = models[family]
    plain, _ = model(tokens)
    fused = model.model.config._attn_implementation == "sdpa"
    for path in model.paths:
        hooked, _ = model(tokens, hooks=hooks_at(path))
        if fused and path == "attn.qk_probs":  # the explicit formula, not the fused one
            close(hooked, plain)
        else:
            assert torch.equal(hooked, plain), path


@ALL
def test_each_site_fires_once_a_layer_with_its_shape(family: str, models, tokens) -> None:
    model = models[family]
    heads = CONFIGS[family].num_attention_heads
    d_head = getattr(CONFIGS[family], "head_dim", None) or 4
    shapes = {
        "mlp.pre_act": (2, 9, 20),
        "mlp.post_act": (2, 9, 20),
        "attn.v_out": (2, 9, heads, d_head),
        "attn.qk_probs": (2, 9, 9, heads),
        "logits": (2, 9, 61),
    }
    for path in model.paths:
        fired: list[int | None] = []

        def record(x, layer, positions, path=path, fired=fired, **kwargs):
            assert x.shape == shapes.get(path, (2, 9, 16)), path
            assert positions.tolist() == [list(range(9))] * 2
            assert ("out_layer" in kwargs) == (path == "mlp.post_act")
            fired.append(layer)
            return x

        model(tokens, hooks=hooks_at(path, hook=record))
        once = path in ("resid.post_emb", "resid.post_ln_f", "logits")
        assert fired == ([None] if once else [0, 1, 2]), path


@ALL
def test_the_stream_is_the_sum_of_what_is_added(family: str, models, tokens) -> None:
    model = models[family]
    if family == "opt, norms behind":
        assert "resid.torso.post_attn" not in model.paths
        return
    torso = "resid.torso"
    at = model.capture(
        tokens,
        ["resid.post_emb", f"{torso}.delta_attn", f"{torso}.delta_mlp", f"{torso}.post_mlp"],
    )
    before = at["resid.post_emb"]
    for layer in range(3):
        deltas = at[f"{layer}/{torso}.delta_attn"], at[f"{layer}/{torso}.delta_mlp"]
        close(before + deltas[0] + deltas[1], at[f"{layer}/{torso}.post_mlp"])
        if f"{torso}.post_attn" in model.paths:
            between = model.capture(tokens, f"{layer}/{torso}.post_attn")
            close(before + deltas[0], between[f"{layer}/{torso}.post_attn"])
        before = at[f"{layer}/{torso}.post_mlp"]


@ALL
def test_parts_fit_together(family: str, models, tokens) -> None:
    """The norms read the stream, out_layer reads post_act, the unembedding reads post_ln_f."""
    model = models[family]
    seen = {}

    def keep(x, layer, out_layer):
        seen[layer] = out_layer(x).reshape(2, 9, -1)
        return x

    model(tokens, hooks=hooks_at("mlp.post_act", hook=keep))
    if family != "gemma2":  # there a norm follows
        delta = model.capture(tokens, "resid.torso.delta_mlp")
        for layer in range(3):
            close(seen[layer], delta[f"{layer}/resid.torso.delta_mlp"])
    if "resid.post_ln_f" in model.paths:
        at = model.capture(tokens, ["resid.post_ln_f", "logits"])
        logits = model.model.lm_head(at["resid.post_ln_f"])
        if family == "gemma2":
            logits = 30 * torch.tanh(logits / 30)
        close(logits, at["logits"])


@ALL
def test_patterns_are_those_of_eager_attention(family: str, models, tokens) -> None:
    model = models[family]
    eager = transformers.AutoModelForCausalLM.from_config(
        copy.deepcopy(CONFIGS[family]),
        attn_implementation="eager",  # which is noted in the config
    ).eval()
    eager.load_state_dict(model.model.state_dict())
    expected = eager(input_ids=tokens, output_attentions=True).attentions
    found = model.capture(tokens, "attn.qk_probs")
    for layer in range(3):
        close(found[f"{layer}/attn.qk_probs"], expected[layer].permute(0, 2, 3, 1))


@ALL
def test_a_pattern_can_be_replaced(family: str, models, tokens) -> None:
    model = models[family]

    def look_at_self(x, layer):
        return torch.eye(9)[None, :, :, None].expand_as(x) if layer == 1 else x

    hooks = TransformerHooks()
    hooks.attn.qk_probs.append_fwd(AtLayers(1).append(look_at_self))
    at = model.capture(tokens, "1/attn.v_out", hooks=hooks)["1/attn.v_out"]
    alone = model.capture(tokens, "0/resid.torso.post_mlp")["0/resid.torso.post_mlp"]
    assert alone.shape == (2, 9, 16)  # below the edit nothing changes: checked by the next line
    assert torch.equal(
        alone,
        model.capture(tokens, "0/resid.torso.post_mlp", hooks=hooks)["0/resid.torso.post_mlp"],
    )
    # A token that attends to itself alone reads its own value, whatever the others are.
    first = model.capture(tokens[:, :1], "1/attn.v_out")["1/attn.v_out"]
    close(at[:, :1], first)
    assert not torch.allclose(at, model.capture(tokens, "1/attn.v_out")["1/attn.v_out"])


@ALL
def test_what_is_replaced_is_what_the_rest_reads(family: str, models, tokens) -> None:
    """Each stream site set to a constant: what comes after depends on nothing before."""
    model = models[family]
    other = tokens.flip(1)
    stream = ["resid.post_emb", "resid.torso.post_attn", "resid.torso.post_mlp"]
    for path in stream:
        if path not in model.paths:
            continue

        def constant(x):
            return torch.linspace(-1, 1, x.numel()).reshape(x.shape)

        hooks = TransformerHooks().append_at(path if path == stream[0] else f"1/{path}", constant)
        assert torch.equal(model(tokens, hooks=hooks)[0], model(other, hooks=hooks)[0]), path


# --- the native model ---


@pytest.fixture(scope="module")
def twins(tmp_path_factory: pytest.TempPathFactory) -> tuple[Transformer, HuggingFaceModelContext]:
    folder = tmp_path_factory.mktemp("huggingface") / "gpt2"
    make("gpt2").save_pretrained(folder)
    return Transformer.load(folder, device="cpu"), HuggingFaceModelContext(folder, device="cpu")


def ablate(x: torch.Tensor, **kwargs: object) -> torch.Tensor:
    x = x.clone()
    x[..., 1] = 0
    return x


def test_it_agrees_with_the_native_model_everywhere(twins, tokens) -> None:
    native, model = twins[0], twins[1].get_or_create_model()
    ours, theirs = native.capture(tokens, model.paths), model.capture(tokens, model.paths)
    assert set(ours) == set(theirs)
    assert len(ours) == 3 + 3 * 10
    for location, value in ours.items():
        close(theirs[location], value, 1e-4)


def test_edits_do_the_same_to_the_native_model(twins, tokens) -> None:
    native, model = twins[0], twins[1].get_or_create_model()
    plain, _ = native(tokens)
    for path in model.paths:
        hooks = hooks_at(path, hook=ablate)
        expected, found = native(tokens, hooks=hooks)[0], model(tokens, hooks=hooks)[0]
        assert not torch.allclose(expected, plain), path
        close(found, expected, 1e-4)


def test_gradients_at_sites_are_those_of_the_native_model(twins, tokens) -> None:
    native, model = twins[0], twins[1].get_or_create_model()

    def gradients(run) -> dict[tuple[str, int | None], torch.Tensor]:
        found = {}
        hooks = TransformerHooks()
        for path in model.paths:

            def keep(grad, layer, path=path):
                found[path, layer] = grad
                return grad * 0.5  # and what lies below gets less

            hooks.append_to_path(f"{path}.bwd", keep)
        run(tokens, hooks=hooks)[0].logsumexp(-1).sum().backward()
        return found

    expected, found = gradients(native), gradients(model)
    assert set(expected) == set(found)
    assert len(found) == 3 + 3 * 10
    for place, gradient in expected.items():
        close(found[place], gradient, 1e-4)


def test_sampling_is_that_of_the_native_model(twins) -> None:
    native, model = twins[0], twins[1].get_or_create_model()
    prompts = [[1, 2, 3, 4], [5], [6, 7]]
    hooks = hooks_at("mlp.post_act", "resid.torso.post_attn", hook=ablate)
    for chosen in (None, hooks):
        expected = native.sample(prompts, 8, temperature=0, hooks=chosen)["tokens"]
        assert model.sample(prompts, 8, temperature=0, hooks=chosen)["tokens"] == expected
    drawn = native.sample(prompts, 8, seed=3, top_k=20, top_p=0.9)["tokens"]
    assert model.sample(prompts, 8, seed=3, top_k=20, top_p=0.9)["tokens"] == drawn


# --- ragged batches, caches ---


@ALL
@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("hooked", [False, True])
def test_a_row_equals_its_solo_run(family: str, side: str, hooked: bool, models, tokens) -> None:
    model = models[family]
    editable = [path for path in ("resid.torso.post_attn", "attn.qk_probs") if path in model.paths]
    hooks = hooks_at("mlp.post_act", *editable, hook=halve) if hooked else None
    pad = torch.zeros(2, 9, dtype=torch.bool)
    span = slice(0, 4) if side == "left" else slice(5, 9)
    pad[0, span] = True
    batched, _ = model(tokens.masked_fill(pad, 0), pad=pad, hooks=hooks)
    assert torch.isfinite(batched).all()
    close(batched[0][~pad[0]], model(tokens[:1, ~pad[0]], hooks=hooks)[0][0])
    close(batched[1], model(tokens[1:], hooks=hooks)[0][0])


@ALL
def test_going_on_from_a_state(family: str, models, tokens) -> None:
    model, n = models[family], 6
    hooks = hooks_at("mlp.post_act", "resid.torso.delta_mlp", hook=halve)
    pad = torch.zeros(2, 9, dtype=torch.bool)
    pad[0, :2] = True
    whole, _ = model(tokens, pad=pad, hooks=hooks)
    start, H = model(tokens[:, :n], pad=pad[:, :n], hooks=hooks)
    branch = H.copy()
    rest, _ = model(tokens[:, n:], H, hooks=hooks)
    close(torch.cat([start, rest], dim=1)[~pad], whole[~pad])
    again, _ = model(tokens[:, n:], branch, hooks=hooks)
    assert torch.equal(again, rest)
    assert H.positions.tolist() == [[4, 5, 6], [6, 7, 8]]


@ALL
def test_sampling_row_by_row(family: str, models) -> None:
    model = models[family]
    prompts = [[1, 2, 3, 4, 5, 6], [7], [8, 9, 10]]
    hooks = hooks_at("mlp.post_act", "attn.qk_probs", hook=halve)
    together = model.sample(prompts, 6, temperature=0, hooks=hooks)["tokens"]
    alone = [model.sample(p, 6, temperature=0, hooks=hooks)["tokens"][0] for p in prompts]
    assert together == alone
    assert all(len(row) == 6 for row in together)
    # and without a cache
    ids = torch.tensor([prompts[0]])
    for token in alone[0]:
        assert int(model(ids, hooks=hooks)[0][0, -1].argmax()) == token
        ids = torch.cat([ids, torch.tensor([[token]])], dim=1)


def test_pads_between_tokens_and_a_sliding_window_are_refused(models, tokens) -> None:
    pad = torch.zeros(2, 9, dtype=torch.bool)
    pad[0, 3:5] = True
    with pytest.raises(InputError, match=r"last 4 places of a row.*Pad on the left"):
        models["mistral"](tokens, pad=pad)
    logits, _ = models["llama"](tokens, pad=pad)  # sees everything
    close(logits[0][~pad[0]], models["llama"](tokens[:1, ~pad[0]])[0][0])


def test_stop_bos_and_positions(models) -> None:
    model = models["gpt2"]
    first = model.sample([1, 2], 4, temperature=0)["tokens"][0]
    assert model.sample([1, 2], 4, temperature=0, stop=first[2])["tokens"] == [
        first[: first.index(first[2])]
    ]
    assert model.sample([2], 4, temperature=0, bos=1)["tokens"] == [first]
    seen = []

    def keep(x, positions):
        seen.append(positions.tolist())
        return x

    model.sample([[1, 2, 3], [4]], 3, hooks=hooks_at("resid.post_emb", hook=keep), seed=0)
    assert seen == [[[0, 1, 2], [0, 0, 0]], [[3], [1]], [[4], [2]]]


def test_hooks_on_logits_see_all_tokens_of_a_prompt(models) -> None:
    seen = []

    def keep(x):
        seen.append(tuple(x.shape))
        return x

    models["llama"].sample([1, 2, 3], 2, hooks=hooks_at("logits", hook=keep), seed=0)
    assert seen == [(1, 3, 61), (1, 1, 61)]


# --- hooks leave nothing, and stay apart ---


@pytest.mark.parametrize("path", ["resid.torso.post_attn", "attn.qk_probs", "mlp.post_act"])
def test_nothing_is_left_after_an_exception(path: str, models, tokens) -> None:
    model = models["gpt2"]
    before, plain = count_hooks(model), model(tokens)[0]

    def fail(x, layer):
        if layer == 1:
            raise RuntimeError("on purpose")
        return x

    with pytest.raises(RuntimeError, match="on purpose"):
        model(tokens, hooks=hooks_at(path, "logits", hook=fail))
    assert count_hooks(model) == before
    assert torch.equal(model(tokens)[0], plain)
    assert torch.equal(model.model(input_ids=tokens).logits, plain)
    softmax = torch.nn.functional.softmax(torch.zeros(1, 4, 9, 9), dim=-1)
    assert softmax.shape == (1, 4, 9, 9)  # no one listens any more


def test_a_hook_that_returns_nothing_is_told_where(models, tokens) -> None:
    hooks = hooks_at("attn.v_out", hook=lambda x: None)
    with pytest.raises(HookError, match=r"attn\.v_out\.fwd, layer 0.*\[2, 9, 4, 4\]"):
        models["gpt2"](tokens, hooks=hooks)


def test_capture_stops_where_nothing_more_is_needed(models, tokens) -> None:
    model = models["llama"]
    ran = []
    handles = [
        layer.register_forward_hook(lambda *args, i=i: ran.append(i))
        for i, layer in enumerate(model.layers)
    ]
    try:
        for location, expected in [
            ("resid.post_emb", []),
            ("0/mlp.post_act", [0]),
            ("1/resid.torso.post_mlp", [0, 1]),
            ("resid.post_ln_f", [0, 1, 2]),
        ]:
            ran.clear()
            assert list(map(str, model.capture(tokens, location))) == [location]
            assert ran == expected
    finally:
        for handle in handles:
            handle.remove()
    assert count_hooks(model) == 0


@ALL
def test_what_hooks_keep_stays_what_it_was(family: str, models, tokens) -> None:
    model, kept = models[family], []

    def keep(x):
        kept.append((x, x.detach().clone()))
        return x

    for hook in (identity, halve):
        hooks = hooks_at(*model.paths, hook=keep)
        for path in model.paths:
            hooks.append_to_path(f"{path}.fwd", hook)
            hooks.append_to_path(f"{path}.fwd2", keep)
        model(tokens, hooks=hooks)
    assert len(kept) == 4 * (3 * len(model.paths) - 2 * ("resid.post_ln_f" in model.paths) - 4)
    for x, kept_copy in kept:
        assert torch.equal(x, kept_copy)


class InPlaceLayer(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.mlp = torch.nn.Linear(16, 16)

    def forward(self, x, *args, **kwargs):
        delta = self.mlp(x)
        delta += x  # what Falcon does
        return delta


def test_models_that_work_in_place(tokens) -> None:
    model = make("gpt2")
    model.transformer.h[1] = InPlaceLayer()
    model.transformer.h[0] = InPlaceLayer()
    model.transformer.h[2] = InPlaceLayer()
    architecture = Architecture("transformer.h", {"resid.torso.delta_mlp": Tap("out", "mlp")})
    wrapped = HuggingFaceModel(model, architecture=architecture)
    at = wrapped.capture(tokens, ["0/resid.torso.delta_mlp", "resid.post_emb"])
    close(at["0/resid.torso.delta_mlp"], model.transformer.h[0].mlp(at["resid.post_emb"]))
    plain, hooks = wrapped(tokens)[0], hooks_at("resid.torso.delta_mlp")
    assert torch.equal(wrapped(tokens, hooks=hooks)[0], plain)


def test_two_threads_with_different_hooks_do_not_meet(models, tokens) -> None:
    model = models["gpt2"]
    paths = ["mlp.post_act", "attn.qk_probs", "resid.torso.post_attn", "logits"]

    def scale(factor: float) -> TransformerHooks:
        return hooks_at(*paths, hook=lambda x: x * factor)

    factors = [0.5, 0.9, None]  # one runs without hooks
    hooks = [None if factor is None else scale(factor) for factor in factors]
    expected = [model(tokens, hooks=h)[0] for h in hooks]
    both_inside = threading.Barrier(3, timeout=30)
    wrong: list[object] = []

    def run(number: int) -> None:
        met = False

        def wait(x):
            nonlocal met
            if not met:
                met = True
                both_inside.wait()  # all three are within a forward pass, hooks attached
            return x

        try:
            for repeat in range(15):
                mine = hooks[number]
                if repeat == 0:
                    mine = TransformerHooks() if mine is None else mine.copy()
                    mine.resid.torso.delta_attn.append_fwd(wait)
                if not torch.equal(model(tokens, hooks=mine)[0], expected[number]):
                    wrong.append(number)
        except Exception as error:
            wrong.append(error)

    threads = [threading.Thread(target=run, args=(i,)) for i in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []
    assert count_hooks(model) == 0


def test_a_call_within_a_hook_has_its_own_hooks(models, tokens) -> None:
    model = models["gpt2"]
    inner_hooks = hooks_at("mlp.post_act", hook=halve)
    expected = model(tokens, hooks=inner_hooks)[0]
    found = []

    def call(x, layer):
        if layer == 1:
            found.append(model(tokens)[0])
            found.append(model(tokens, hooks=inner_hooks)[0])
        return x * 0.3

    outer = hooks_at("mlp.post_act", "attn.qk_probs", hook=call)
    model(tokens, hooks=outer)
    for plain, inner in zip(found[::2], found[1::2], strict=True):
        assert torch.equal(plain, model(tokens)[0])
        assert torch.equal(inner, expected)
    assert len(found) == 4


def test_a_softmax_in_a_hook_is_the_hooks_own(models, tokens) -> None:
    model, seen = models["gpt2"], []

    def own(x):
        x.softmax(-1)
        return x

    hooks = hooks_at("attn.v_out", hook=own)

    def note(x, layer):
        seen.append(layer)
        return x

    hooks.attn.qk_probs.append_fwd(note)
    close(model(tokens, hooks=hooks)[0], model(tokens)[0])
    assert seen == [0, 1, 2]


# --- gradients ---


@ALL
def test_backward_hooks_see_the_gradient_at_every_site(family: str, models, tokens) -> None:
    model = models[family]
    values: dict[tuple[str, int | None], torch.Tensor] = {}
    found: dict[tuple[str, int | None], torch.Tensor] = {}
    hooks = TransformerHooks()
    for path in model.paths:

        def keep_value(x, layer, path=path):
            values[path, layer] = x
            return x

        def keep_gradient(grad, layer, path=path):
            found[path, layer] = grad
            return grad

        hooks.append_to_path(f"{path}.fwd", keep_value)
        hooks.append_to_path(f"{path}.bwd", keep_gradient)
    loss = model(tokens, hooks=hooks)[0].sin().sum()
    expected = torch.autograd.grad(loss, list(values.values()))
    assert found.keys() == values.keys()
    for place, gradient in zip(values, expected, strict=True):
        assert torch.equal(found[place], gradient), place
        assert gradient.any(), place


def test_gradients_are_what_edits_do(tokens) -> None:
    """Against the derivative along a random direction; GPT-2 computes in float64 throughout."""
    model, step = HuggingFaceModel(make("gpt2").double()), 1e-6
    for path in model.paths:
        found: dict[int | None, torch.Tensor] = {}

        def keep(grad, layer, found=found):
            found[layer] = grad
            return grad

        model(tokens, hooks=hooks_at(path, hook=keep, kind="bwd"))[0].sin().sum().backward()
        layer = 1 if 1 in found else None
        direction = torch.randn(found[layer].shape, dtype=torch.float64)

        def loss(sign: int, path=path, layer=layer, direction=direction) -> float:
            def move(x):
                return x + sign * step * direction

            hooks = TransformerHooks().append_at(path if layer is None else f"1/{path}", move)
            with torch.no_grad():
                return float(model(tokens, hooks=hooks)[0].sin().sum())

        slope, dot = (loss(1) - loss(-1)) / (2 * step), float((found[layer] * direction).sum())
        assert slope == pytest.approx(dot, rel=1e-4, abs=1e-5), path


def test_parameters_get_their_gradients(models, tokens) -> None:
    ours, theirs = HuggingFaceModel(make("llama")), make("llama").eval()
    paths = [path for path in ours.paths if path != "attn.qk_probs"]
    ours(tokens, hooks=hooks_at(*paths))[0].sum().backward()
    theirs(input_ids=tokens).logits.sum().backward()
    for (name, a), b in zip(ours.model.named_parameters(), theirs.parameters(), strict=True):
        assert a.grad is not None
        assert b.grad is not None
        assert torch.equal(a.grad, b.grad), name


# --- what an architecture lacks ---


def test_places_that_a_family_lacks_are_refused(models, tokens) -> None:
    hooks = hooks_at("resid.torso.post_attn")
    with pytest.raises(LocationError, match=r"GPTNeoXForCausalLM has no 'resid\.torso\.post_attn'"):
        models["gpt_neox"](tokens, hooks=hooks)
    with pytest.raises(LocationError, match=r"It has: resid\.post_emb.*mlp\.post_act.*logits"):
        models["gpt_neox"].capture(tokens, "1/resid.torso.post_attn")
    with pytest.raises(LocationError, match=r"has no 'attn\.q'"):
        models["gpt2"].capture(tokens, "attn.q")
    with pytest.raises(LocationError, match="layers 0 to 2"):
        models["gpt2"].capture(tokens, "3/mlp.post_act")
    assert "resid.torso.post_attn" in models["gpt_neox, serial"].paths
    assert "resid.post_ln_f" not in models["opt, norms behind"].paths


def test_transformer_lens_names(models, tokens) -> None:
    at = models["gpt_neox"].capture(
        tokens, ["blocks.0.hook_resid_pre", "blocks.2.hook_resid_pre", "blocks.1.hook_mlp_out"]
    )
    assert set(map(str, at)) == {
        "resid.post_emb",
        "1/resid.torso.post_mlp",
        "1/resid.torso.delta_mlp",
    }


def test_a_family_of_ones_own(tokens) -> None:
    config = transformers.PersimmonConfig(**BASE)
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config)
    with pytest.raises(
        LocationError, match=r"type 'persimmon' are not in the table.*Architecture\("
    ):
        HuggingFaceModel(model)
    architecture = Architecture(
        layers="model.layers",
        final_norm="model.final_layernorm",
        attention="self_attn",
        sites={
            "mlp.post_act": Tap("in", "mlp.dense_4h_to_h"),
            "resid.torso.delta_attn": Tap("out", "self_attn"),
            "resid.torso.delta_mlp": Tap("out", "mlp"),
        },
    )
    context = HuggingFaceModelContext.from_model(model, architecture=architecture)
    at = context.get_or_create_model().capture(
        tokens, ["resid.post_emb", "0/resid.torso.delta_attn", "0/resid.torso.delta_mlp"]
    )
    after = context.get_or_create_model().capture(tokens, "0/resid.torso.post_mlp")
    close(torch.stack(list(at.values())).sum(0), after["0/resid.torso.post_mlp"])
    with pytest.raises(
        LocationError, match=r"no module 'mlp\.dense_4h_to_hh'\. Did you mean 'mlp\.dense_4h_to_h'"
    ):
        HuggingFaceModel(
            model,
            architecture=Architecture(
                layers="model.layers", sites={"mlp.post_act": Tap("in", "mlp.dense_4h_to_hh")}
            ),
        )
    with pytest.raises(LocationError, match=r"Architecture\.sites: 'logits' is not the path"):
        Architecture(layers="model.layers", sites={"logits": Tap("out", "lm_head")})
    wrong = HuggingFaceModel(model, architecture=Architecture("model.layers", attention="mlp"))
    with pytest.raises(LocationError, match=r"expected one softmax in each attention.*found 0"):
        wrong.capture(tokens, "0/attn.qk_probs")
    with pytest.raises(LocationError, match="should be the list of its layers"):
        HuggingFaceModel(model, architecture=Architecture(layers="model"))


# --- weights ---


def test_weights_of_gpt2_are_the_native_ones(twins) -> None:
    from neuron_explainer.models.model_context import StandardModelContext

    context = twins[1]
    native = StandardModelContext(context.model_name, "cpu")
    for kind in WeightLocationType:
        layer = None if kind.has_no_layers else 1
        assert torch.equal(context.get_weight(kind, layer), native.get_weight(kind, layer)), kind


@ALL
def test_weights_compute_what_the_model_computes(family: str, models, tokens) -> None:
    context = HuggingFaceModelContext.from_model(models[family].model)
    model = context.get_or_create_model()
    known = model.architecture.weights
    for kind in WeightLocationType:
        layer = None if kind.has_no_layers else 1
        if kind not in known:
            with pytest.raises(LocationError, match=f"no single weight '{kind.value}'"):
                context.get_weight(kind, layer)
            continue
        weight = context.get_weight(kind, layer)  # its shape is checked within
        weight.zero_()
        assert context.get_weight(kind, layer).any()
    at = model.capture(tokens, [path for path in model.paths if path != "resid.post_emb"])
    layer_1 = model.layers[1]

    def module(kind: WeightLocationType) -> torch.nn.Module:
        return layer_1.get_submodule(known[kind].parameter.partition(":")[0])

    v_out, post_act = at["1/attn.v_out"], at["1/mlp.post_act"]
    W_o = context.get_weight(WeightLocationType.ATTN_TO_RESIDUAL, 1)
    out = module(WeightLocationType.ATTN_TO_RESIDUAL)(v_out.flatten(2))
    bias = getattr(module(WeightLocationType.ATTN_TO_RESIDUAL), "bias", None)
    close(torch.einsum("bshk,hkd->bsd", v_out, W_o) + (0 if bias is None else bias), out)
    W_down = context.get_weight(WeightLocationType.MLP_TO_RESIDUAL, 1)
    bias = getattr(module(WeightLocationType.MLP_TO_RESIDUAL), "bias", None)
    close(
        post_act @ W_down + (0 if bias is None else bias),
        module(WeightLocationType.MLP_TO_RESIDUAL)(post_act),
    )


@pytest.mark.parametrize("family", ["gpt2", "gpt_neox", "gpt_neo", "opt", "llama", "gemma2"])
def test_value_weights_make_the_values(family: str, models, tokens) -> None:
    """The first token attends to itself alone, so v_out there is its value in each head."""
    context = HuggingFaceModelContext.from_model(models[family].model)
    model = context.get_or_create_model()
    at = model.capture(tokens, ["1/resid.torso.post_ln_attn", "1/attn.v_out"])
    W_v = context.get_weight(WeightLocationType.ATTN_TO_VALUE, 1)
    x = at["1/resid.torso.post_ln_attn"][:, 0]
    zero = torch.zeros(1, 16)
    value = torch.einsum("bd,hdk->bhk", x, W_v)
    path = model.architecture.weights[WeightLocationType.ATTN_TO_VALUE].parameter
    projection = model.layers[1].get_submodule(path)
    bias = projection(zero)[0]
    if family == "gpt2":
        bias = bias.chunk(3)[2].reshape(4, 4)
    elif family == "gpt_neox":
        bias = bias.reshape(4, 3, 4)[:, 2]
    else:
        d_head = W_v.shape[2]
        bias = bias.reshape(-1, d_head)
        bias = bias.repeat_interleave(4 // len(bias), dim=0)
    close(value + bias, at["1/attn.v_out"][:, 0])


def test_the_embedding_is_what_enters_the_stream(models, tokens) -> None:
    for family in ("llama", "gemma2", "gpt_neox", "gpt2", "opt", "gpt_neo"):
        context = HuggingFaceModelContext.from_model(models[family].model)
        X = context.get_weight(WeightLocationType.EMBEDDING)[tokens]
        if family in ("gpt2", "opt", "gpt_neo"):
            X = X + context.get_weight(WeightLocationType.POSITION_EMBEDDING)[:9]
        close(X, models[family].capture(tokens, "resid.post_emb")["resid.post_emb"])


# --- loading, text, bad input ---


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Llama of 300 tokens with a byte-level tokenizer."""
    from tokenizers import Tokenizer, decoders, pre_tokenizers
    from tokenizers.models import BPE

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {letter: i for i, letter in enumerate(alphabet)} | {"<|end|>": 256}
    backend = Tokenizer(BPE(vocab=vocab, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token="<|end|>", eos_token="<|end|>"
    )
    path = tmp_path_factory.mktemp("huggingface") / "llama"
    torch.manual_seed(0)
    config = transformers.LlamaConfig(**(GROUPED | {"vocab_size": 300}))
    transformers.AutoModelForCausalLM.from_config(config).half().save_pretrained(path)
    tokenizer.save_pretrained(path)
    return path


def test_a_folder_with_a_tokenizer(folder: Path) -> None:
    context = HuggingFaceModelContext(folder, device="cpu", dtype=torch.float32)
    assert context._models == {}
    assert context.n_layers == 3
    assert (context.n_neurons, context.n_vocab, context.n_context) == (20, 300, 24)
    assert context.get_dim_size(Dimension.VALUE_CHANNELS) == 4
    assert context._models == {}  # sizes come from the config alone
    ids = context.encode("né<|end|>")
    assert ids[-1] == 256
    assert len(ids) == 4
    assert context.decode(ids) == "né<|end|>"
    assert context.decode_token_list(context.encode(" a")) == [" ", "a"]
    assert context.decode([ids[0], 299]) == "n<|token 299|>"
    assert context.encode_token_str("n") == ids[0]
    model = context.get_or_create_model()
    assert model is context.get_or_create_model("cpu")
    assert model.dtype == torch.float32
    sampled = model.sample(["né", "a"], 4, temperature=0, bos=True)
    assert (
        sampled["tokens"][1]
        == model.sample([[256, ids[0]], [256, *context.encode("a")]], 4, temperature=0)["tokens"][1]
    )
    assert [len(row) for row in sampled["tokens"]] == [4, 4]
    assert all(isinstance(text, str) for text in sampled["strings"])
    at = model.capture(["né", "a"], "0/mlp.post_act", bos=True)
    assert at.tokens.shape == (2, 4)
    assert at.pad is not None
    assert at.pad.tolist() == [[False] * 4, [False, False, True, True]]
    assert context.get_model_config_as_dict()["model_type"] == "llama"
    json.dumps(context.get_model_config_as_dict())


def test_a_tokenizer_that_puts_a_space_before_a_text() -> None:
    from tokenizers import Tokenizer, decoders, pre_tokenizers
    from tokenizers.models import BPE

    vocab = {"▁": 0, "a": 1, "b": 2, "▁a": 3, "▁b": 4}
    backend = Tokenizer(BPE(vocab=vocab, merges=[("▁", "a"), ("▁", "b")]))
    backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
    backend.decoder = decoders.Metaspace(prepend_scheme="first")
    tokenizer = HuggingFaceTokenizer(transformers.PreTrainedTokenizerFast(tokenizer_object=backend))
    assert tokenizer.encode("a bb") == [3, 4, 2]
    assert tokenizer.decode([3, 4, 2]) == "a bb"
    assert tokenizer.decode_continuation([4, 2]) == " bb"
    assert [tokenizer.decode_continuation([i]) for i in (3, 2)] == [" a", "b"]
    with pytest.raises(InputError, match="no start token"):
        _ = tokenizer.bos_token
    with pytest.raises(InputError, match="at least 0, found -1"):
        tokenizer.decode([-1])


def test_dtype_is_as_stored_unless_given(folder: Path, tokens) -> None:
    context = HuggingFaceModelContext(folder, device="cpu")
    model = context.get_or_create_model()
    assert model.dtype == torch.float16
    assert context.get_weight(WeightLocationType.EMBEDDING).dtype == torch.float16
    probs = model.capture(tokens, "0/attn.qk_probs")["0/attn.qk_probs"]
    assert probs.dtype == torch.float16


def test_without_a_tokenizer_ids_still_run(twins) -> None:
    context = twins[1]
    model = context.get_or_create_model()
    assert model.sample([1, 2], 2, seed=0)["tokens"][0]
    with pytest.raises(SourceError, match="came without a tokenizer"):
        model.sample("text", 2)
    with pytest.raises(SourceError):
        context.encode("text")


def test_nothing_is_downloaded_for_a_folder_or_when_told(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(SourceError, match="AutoConfig cannot load this"):
        _ = HuggingFaceModelContext(tmp_path / "empty", device="cpu").n_layers
    with pytest.raises(SourceError, match="or a name on the Hugging Face Hub"):
        _ = HuggingFaceModelContext(
            "nobody/nothing-of-that-name", device="cpu", local_files_only=True
        ).n_layers


def test_bad_input(models, tokens) -> None:
    model = models["gpt2"]
    with pytest.raises(InputError, match="0 to 60, found 61"):
        model(torch.tensor([[1, 61]]))
    with pytest.raises(InputError, match="int64 tensor"):
        model(tokens.int())
    with pytest.raises(InputError, match="25 tokens, more than the context of 24"):
        model(torch.ones(1, 25, dtype=torch.long))
    with pytest.raises(InputError, match="batch of 2 rows, tokens one of 1"):
        model(tokens[:1], model(tokens)[1])
    with pytest.raises(InputError, match="pad must be bool"):
        model(tokens, pad=torch.zeros(2, 9))
    with pytest.raises(InputError, match="context of 24 holds"):
        model.sample([1], 25)
    with pytest.raises(InputError, match="num_tokens"):
        model.sample([1], 0)
    with pytest.raises(InputError, match="at least one prompt"):
        model.sample([], 1)
    with pytest.raises(InputError, match="simplify folds"):
        HuggingFaceModelContext.from_model(model.model).get_or_create_model(simplify=True)


def test_without_transformers_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "transformers", None)
    context = HuggingFaceModelContext("gpt2", device="cpu")
    with pytest.raises(MissingExtraError, match="pip install transformers"):
        _ = context.n_layers
