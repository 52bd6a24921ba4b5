"""Each entry of the table of families: what its sites mean, shown without the names of the table.

The order in which a layer calls its matrices tells what each part reads and writes, whatever its
modules are called; ``output_hidden_states`` tells the stream. Tiny random models, nothing is
downloaded.
"""

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor, nn

transformers = pytest.importorskip("transformers")

from neuron_explainer.errors import InputError, LocationError  # noqa: E402
from neuron_explainer.models.hooks import TransformerHooks  # noqa: E402
from neuron_explainer.models.huggingface import families  # noqa: E402
from neuron_explainer.models.huggingface.families import FAMILIES, architecture_of  # noqa: E402
from neuron_explainer.models.huggingface.model import HuggingFaceModel  # noqa: E402
from neuron_explainer.models.weight_names import WeightLocationType as W  # noqa: E402
from tests.models import test_huggingface_context as earlier  # noqa: E402
from tests.models.test_huggingface_context import (  # noqa: E402
    BASE,
    GPT2,
    GROUPED,
    close,
)

WINDOW = {"sliding_window": 4}
WITHOUT_WIDTH = {key: value for key, value in BASE.items() if key != "intermediate_size"}
KINDS = ["sliding_attention", "full_attention", "sliding_attention"]
FALCON = WITHOUT_WIDTH | {"ffn_hidden_size": 20}
BLOOM = {key: value for key, value in WITHOUT_WIDTH.items() if key != "max_position_embeddings"}
MPT = {"vocab_size": 61, "d_model": 16, "n_layers": 3, "n_heads": 4, "max_seq_len": 24}

NEW = {
    "bloom": transformers.BloomConfig(**BLOOM),
    "bloom, norms go on": transformers.BloomConfig(
        **BLOOM, apply_residual_connection_post_layernorm=True
    ),
    "bloom, in slices": transformers.BloomConfig(**BLOOM, pretraining_tp=2, slow_but_exact=True),
    "cohere": transformers.CohereConfig(**GROUPED),
    "cohere2": transformers.Cohere2Config(**GROUPED, **WINDOW, layer_types=KINDS),
    "falcon": transformers.FalconConfig(**FALCON),
    "falcon, serial": transformers.FalconConfig(**FALCON, parallel_attn=False, multi_query=False),
    "falcon, two norms": transformers.FalconConfig(
        **FALCON, new_decoder_architecture=True, num_kv_heads=2
    ),
    "falcon, alibi": transformers.FalconConfig(**FALCON, alibi=True, parallel_attn=False),
    "gemma": transformers.GemmaConfig(**GROUPED, head_dim=8),
    "gemma3": transformers.Gemma3TextConfig(
        **GROUPED, **WINDOW, head_dim=8, query_pre_attn_scalar=8, layer_types=KINDS
    ),
    "gemma3, with images": transformers.Gemma3Config(
        text_config=GROUPED
        | WINDOW
        | {"head_dim": 8, "query_pre_attn_scalar": 8, "layer_types": KINDS},
        vision_config={
            "hidden_size": 16,
            "intermediate_size": 16,
            "num_hidden_layers": 1,
            "num_attention_heads": 2,
            "image_size": 28,
            "patch_size": 14,
        },
    ),
    "gpt_bigcode": transformers.GPTBigCodeConfig(**GPT2),
    "gpt_bigcode, own keys": transformers.GPTBigCodeConfig(**GPT2, multi_query=False),
    "gpt_oss": transformers.GptOssConfig(
        **GROUPED,
        **WINDOW,
        head_dim=8,
        layer_types=KINDS,
        num_local_experts=4,
        num_experts_per_tok=2,
    ),
    "gptj": transformers.GPTJConfig(**GPT2, rotary_dim=2),
    "granite": transformers.GraniteConfig(**GROUPED),
    "granite, scaled": transformers.GraniteConfig(
        **GROUPED, residual_multiplier=0.3, embedding_multiplier=2.0, logits_scaling=4.0
    ),
    "mixtral": transformers.MixtralConfig(**GROUPED, num_local_experts=4, sliding_window=None),
    "mpt": transformers.MptConfig(**MPT),
    "mpt, clipped": transformers.MptConfig(**MPT, attn_config={"clip_qkv": 0.5, "alibi": True}),
    "olmo": transformers.OlmoConfig(**GROUPED),
    "olmo2": transformers.Olmo2Config(**GROUPED),
    "olmo3": transformers.Olmo3Config(**GROUPED, **WINDOW, layer_types=KINDS),
    "phi": transformers.PhiConfig(**GROUPED),
    "qwen3": transformers.Qwen3Config(**GROUPED, head_dim=8),
    "stablelm": transformers.StableLmConfig(**GROUPED, partial_rotary_factor=0.5),
    "stablelm, parallel": transformers.StableLmConfig(
        **GROUPED, partial_rotary_factor=0.5, use_parallel_residual=True
    ),
    "starcoder2": transformers.Starcoder2Config(**GROUPED),
}
CONFIGS = earlier.CONFIGS | NEW
ALL = pytest.mark.parametrize("family", CONFIGS)
ADDED = pytest.mark.parametrize("family", NEW)

TORSO = "resid.torso"
PARALLEL = [
    "gpt_neox",
    "cohere",
    "cohere2",
    "falcon",
    "falcon, two norms",
    "gptj",
    "phi",
    "stablelm, parallel",
]
NO_SUM = ["opt, norms behind", "bloom, norms go on", "bloom, in slices", "granite, scaled"]
"""Where the stream is not the sum of what attention and the MLP put out, or that is not seen."""


def make(family: str) -> Any:
    """A model whose every parameter is random, norms and biases too: 0 and 1 would hide mistakes."""
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(copy.deepcopy(CONFIGS[family]))
    with torch.no_grad():
        for parameter in model.parameters():
            fresh = not torch.isfinite(parameter).all() or parameter.abs().max() > 100
            parameter.copy_((0 if fresh else parameter) + 0.3 * torch.randn(parameter.shape))
    return model


@pytest.fixture(scope="module")
def models() -> dict[str, HuggingFaceModel]:
    return {family: HuggingFaceModel(make(family)) for family in CONFIGS}


@pytest.fixture
def tokens() -> Tensor:
    return torch.randint(1, 61, (2, 9), generator=torch.Generator().manual_seed(5))


def test_every_family_is_tested() -> None:
    assert {config.model_type for config in CONFIGS.values()} == set(FAMILIES)


@ADDED
def test_without_hooks_it_is_the_model(family: str, models: Any, tokens: Tensor) -> None:
    model = models[family]
    assert torch.equal(model(tokens)[0], model.model(input_ids=tokens).logits)


# --- values ---


@ALL
def test_the_stream_is_in_the_hidden_states(family: str, models: Any, tokens: Tensor) -> None:
    model = models[family]
    states = model.model(input_ids=tokens, output_hidden_states=True).hidden_states
    at = model.capture(tokens, ["resid.post_emb", f"{TORSO}.post_mlp"])
    found = [at["resid.post_emb"], *(at[f"{i}/{TORSO}.post_mlp"] for i in range(3))]
    for ours, theirs in zip(found[:3], states[:3], strict=True):
        assert torch.equal(ours, theirs)
    if "resid.post_ln_f" in model.paths:
        assert torch.equal(model.capture(tokens, "resid.post_ln_f")["resid.post_ln_f"], states[3])


@ALL
def test_the_stream_is_the_sum_of_what_is_added(family: str, models: Any, tokens: Tensor) -> None:
    model = models[family]
    paths = [path for path in model.paths if path.startswith("resid") and "ln" not in path]
    at = model.capture(tokens, paths)
    before = at["resid.post_emb"]
    for layer in range(3):
        after = at[f"{layer}/{TORSO}.post_mlp"]
        if family in NO_SUM:
            assert f"{TORSO}.delta_attn" not in paths or family == "opt, norms behind"
        else:
            attn = at[f"{layer}/{TORSO}.delta_attn"]
            close(before + attn + at[f"{layer}/{TORSO}.delta_mlp"], after)
            assert (f"{TORSO}.post_attn" in paths) == (family not in PARALLEL)
            if family not in PARALLEL:
                close(before + attn, at[f"{layer}/{TORSO}.post_attn"])
        before = after


class Call:
    """One call of a matrix: what it read and what it put out, ``[b, s, …]``."""

    def __init__(self, x: Tensor, y: Tensor) -> None:
        self.x, self.y = (t.detach().clone().reshape(2, 9, -1) for t in (x, y))


def calls_of(model: HuggingFaceModel, tokens: Tensor) -> list[list[Call]]:
    """The calls of matrices of each layer, in their order."""
    from transformers.pytorch_utils import Conv1D

    found: list[list[Call]] = [[] for _ in model.layers]
    handles = []
    for layer, calls in zip(model.layers, found, strict=True):
        for module in layer.modules():
            if isinstance(module, nn.Linear | Conv1D):
                handles.append(
                    module.register_forward_hook(
                        lambda m, args, y, calls=calls: calls.append(Call(args[0], y))
                    )
                )
    try:
        model.model(input_ids=tokens)
    finally:
        for handle in handles:
            handle.remove()
    return found


@ALL
def test_parts_read_and_write_what_sites_say(family: str, models: Any, tokens: Tensor) -> None:
    """Attention's first matrix reads post_ln_attn, its last reads v_out; so with the MLP's."""
    model = models[family]
    # Looking at patterns makes attention explicit, which rounds otherwise.
    at = model.capture(tokens, [path for path in model.paths if path != "attn.qk_probs"])
    for layer, calls in enumerate(calls_of(model, tokens)):
        n_mlp = {"mixtral": 0, "gpt_oss": 0}.get(family, 0 if "slices" in family else None)
        if n_mlp is None:
            gated = W.MLP_TO_HIDDEN not in model.architecture.weights
            n_mlp = 3 if gated else 2
        attn, mlp = calls[: len(calls) - n_mlp], calls[len(calls) - n_mlp :]

        def same(path: str, expected: Tensor, layer: int = layer) -> None:
            if path in model.paths:
                found = at[f"{layer}/{path}"]
                assert torch.equal(found.reshape(2, 9, -1), expected), path

        same(f"{TORSO}.post_ln_attn", attn[0].x)
        if family != "bloom, in slices":
            same("attn.v_out", attn[-1].x)
        if mlp:
            same(f"{TORSO}.post_ln_mlp", mlp[0].x)
            same("mlp.pre_act", mlp[0].y)
            same("mlp.post_act", mlp[-1].x)
            assert {"mlp.pre_act", "mlp.post_act"} <= set(model.paths)


@ALL
def test_what_parts_read_is_a_norm_of_the_stream(family: str, models: Any, tokens: Tensor) -> None:
    model = models[family]
    at = model.capture(tokens, [path for path in model.paths if path != "attn.qk_probs"])
    before = at["resid.post_emb"]
    for layer, module in enumerate(model.layers):
        norms = [m for m in module.modules() if "Norm" in type(m).__name__]
        between = before
        if f"{TORSO}.post_attn" in model.paths:
            between = at[f"{layer}/{TORSO}.post_attn"]
        for path, stream in (("post_ln_attn", before), ("post_ln_mlp", between)):
            if f"{TORSO}.{path}" in model.paths:
                found = at[f"{layer}/{TORSO}.{path}"]
                fitting = [
                    norm for norm in norms if getattr(norm, "weight", stream).shape[-1] == 16
                ]
                assert any(torch.equal(norm(stream), found) for norm in fitting), path
        before = at[f"{layer}/{TORSO}.post_mlp"]


# --- edits ---


@contextmanager
def torch_hook(module: nn.Module, side: str, edit: Callable[[Tensor], Tensor]) -> Iterator[None]:
    """``edit`` on the first tensor of a module's input or output."""

    def before(module: nn.Module, args: Any, kwargs: Any) -> Any:
        if args:
            return (edit(args[0]), *args[1:]), kwargs
        return args, kwargs | {"hidden_states": edit(kwargs["hidden_states"])}

    def after(module: nn.Module, args: Any, out: Any) -> Any:
        return edit(out) if isinstance(out, Tensor) else (edit(out[0]), *out[1:])

    handle = (
        module.register_forward_pre_hook(before, with_kwargs=True)
        if side == "in"
        else module.register_forward_hook(after)
    )
    try:
        yield
    finally:
        handle.remove()


def doubled(x: Tensor, **kwargs: Any) -> Tensor:
    return x * 2


@ALL
def test_edits_are_those_of_torch_hooks(family: str, models: Any, tokens: Tensor) -> None:
    model = models[family]
    plain = model(tokens)[0]
    for path, tap in model.architecture.sites.items():
        found = model(tokens, hooks=TransformerHooks().append_at(f"1/{path}", doubled))[0]
        assert not torch.equal(found, plain), path
        module = model.layers[1].get_submodule(tap.module)
        edit = (lambda x: x.mul_(2)) if tap.is_stream else doubled
        with torch.no_grad(), torch_hook(module, tap.side, edit):
            close(found, model.model(input_ids=tokens).logits)


@ALL
def test_an_edit_reaches_what_it_should_alone(family: str, models: Any, tokens: Tensor) -> None:
    model = models[family]

    def at(path: str | None) -> Any:
        hooks = None if path is None else TransformerHooks().append_at(f"1/{path}", doubled)
        return model.capture(tokens, model.paths, hooks=hooks)

    def changed(edited: Any, path: str) -> bool:
        return not torch.equal(edited[f"1/{path}"], plain[f"1/{path}"])

    plain = at(None)
    for path in (f"{TORSO}.delta_attn", f"{TORSO}.post_attn", f"{TORSO}.post_ln_attn"):
        if path not in model.paths or f"{TORSO}.delta_mlp" not in model.paths:
            continue
        # Where the two parts stand side by side, the MLP does not read what attention does.
        assert changed(at(path), f"{TORSO}.delta_mlp") == (family not in PARALLEL), path
    if f"{TORSO}.post_ln_mlp" in model.paths and f"{TORSO}.delta_mlp" in model.paths:
        edited = at(f"{TORSO}.post_ln_mlp")
        assert changed(edited, f"{TORSO}.delta_mlp")
        assert not changed(edited, f"{TORSO}.delta_attn")
    if family in NO_SUM:
        return
    for path in ("delta_attn", "delta_mlp"):  # twice a delta is the delta once more in the stream
        edited, delta = at(f"{TORSO}.{path}"), plain[f"1/{TORSO}.{path}"]
        if path == "delta_attn" and family not in PARALLEL:
            close(edited[f"1/{TORSO}.post_attn"], plain[f"1/{TORSO}.post_attn"] + delta)
        else:
            close(edited[f"1/{TORSO}.post_mlp"], plain[f"1/{TORSO}.post_mlp"] + delta)


# --- patterns, batches, caches, weights ---


@ADDED
def test_patterns_are_those_of_eager_attention(family: str, models: Any, tokens: Tensor) -> None:
    model = models[family]
    if "attn.qk_probs" not in model.paths:
        assert family in ("falcon, alibi", "gpt_oss")
        return
    eager = transformers.AutoModelForCausalLM.from_config(
        copy.deepcopy(CONFIGS[family]), attn_implementation="eager"
    ).eval()
    eager.load_state_dict(model.model.state_dict())
    expected = eager(input_ids=tokens, output_attentions=True).attentions
    found = model.capture(tokens, "attn.qk_probs")
    for layer in range(3):
        close(found[f"{layer}/attn.qk_probs"], expected[layer].permute(0, 2, 3, 1))
    hooked = model(tokens, hooks=TransformerHooks().append_at("attn.qk_probs", lambda x: x))[0]
    close(hooked, model(tokens)[0])


@ADDED
@pytest.mark.parametrize("side", ["left", "right", "between"])
def test_a_row_equals_its_solo_run(family: str, side: str, models: Any, tokens: Tensor) -> None:
    model = models[family]
    windowed = families.attention_window(model.config) is not None
    if side == "between" and (windowed or families.counts_places(model.config)):
        return  # refused
    path = f"1/{TORSO}.post_ln_mlp" if f"{TORSO}.post_ln_mlp" in model.paths else "resid.post_emb"
    hooks = TransformerHooks().append_at(path, doubled)
    pad = torch.zeros(2, 9, dtype=torch.bool)
    pad[0, {"left": slice(0, 4), "right": slice(5, 9), "between": slice(3, 5)}[side]] = True
    batched, _ = model(tokens.masked_fill(pad, 0), pad=pad, hooks=hooks)
    assert torch.isfinite(batched).all()
    close(batched[0][~pad[0]], model(tokens[:1, ~pad[0]], hooks=hooks)[0][0])
    close(batched[1], model(tokens[1:], hooks=hooks)[0][0])


@ADDED
def test_going_on_from_a_state(family: str, models: Any, tokens: Tensor) -> None:
    model = models[family]
    path = f"{TORSO}.delta_mlp" if f"{TORSO}.delta_mlp" in model.paths else "resid.post_emb"
    hooks = TransformerHooks().append_at(path, doubled)
    pad = torch.zeros(2, 9, dtype=torch.bool)
    pad[0, :2] = True
    whole, _ = model(tokens, pad=pad, hooks=hooks)
    start, H = model(tokens[:, :6], pad=pad[:, :6], hooks=hooks)
    rest, _ = model(tokens[:, 6:], H, hooks=hooks)
    close(torch.cat([start, rest], dim=1)[~pad], whole[~pad])


@ADDED
def test_weights_do_what_the_model_does(family: str, models: Any, tokens: Tensor) -> None:
    model = models[family]
    at = model.capture(tokens, model.paths)
    known = model.architecture.weights

    def linear(kind: W, path_in: str, path_out: str, equation: str) -> None:
        """The layer's output is the weight times the input, up to a bias: the same for all tokens."""
        if kind in known and {path_in, path_out} <= set(model.paths):
            out = torch.einsum(equation, at[f"1/{path_in}"], model.weight(kind, 1))
            rest = at[f"1/{path_out}"] - out
            close(rest, rest[:1, :1].expand_as(rest), 1e-4)

    linear(W.MLP_TO_HIDDEN, f"{TORSO}.post_ln_mlp", "mlp.pre_act", "bsd,df->bsf")
    if not family.startswith(("gemma3", "olmo2", "olmo3")):  # a norm follows in these
        linear(W.MLP_TO_RESIDUAL, "mlp.post_act", f"{TORSO}.delta_mlp", "bsf,fd->bsd")
        linear(W.ATTN_TO_RESIDUAL, "attn.v_out", f"{TORSO}.delta_attn", "bshv,hvd->bsd")
    if W.EMBEDDING in known and W.POSITION_EMBEDDING not in known:
        close(model.weight(W.EMBEDDING, None)[tokens], at["resid.post_emb"])
    needed = {"attn.qk_probs", "attn.v_out", f"{TORSO}.post_ln_attn"}
    if W.ATTN_TO_VALUE in known and needed <= set(model.paths):
        value = torch.einsum(
            "bsd,hdv->bshv", at[f"1/{TORSO}.post_ln_attn"], model.weight(W.ATTN_TO_VALUE, 1)
        )
        mixed = torch.einsum("bqkh,bkhv->bqhv", at["1/attn.qk_probs"], value)
        rest = at["1/attn.v_out"] - mixed  # patterns sum to 1: a bias is the same for all tokens
        close(rest, rest[:1, :1].expand_as(rest), 1e-4)


def test_pads_change_no_distance_in_mpt_or_are_refused(models: Any, tokens: Tensor) -> None:
    """Its attention measures distances in places: pads at either end are right, others are refused."""
    model = models["mpt"]
    pad = torch.zeros(2, 9, dtype=torch.bool)
    pad[0, 3:5] = True
    with pytest.raises(InputError, match=r"Mpt.* counts pads as tokens .* Pad on the left"):
        model(tokens, pad=pad)
    at_the_end = torch.zeros(2, 9, dtype=torch.bool)
    at_the_end[0, 6:] = True
    _, H = model(tokens, pad=at_the_end)
    with pytest.raises(InputError, match="counts pads as tokens"):  # now they are between
        model(tokens[:, :1], H)
    long = torch.ones(2, 25, dtype=torch.long)
    with pytest.raises(InputError, match="25 places, pads included, more than the context of 24"):
        model(long, pad=(torch.arange(25) < 5).expand(2, 25))
    prompts = [[5, 6, 7, 8], [9, 10]]
    both = model.sample(prompts, 6, temperature=0)["tokens"]
    assert both == [model.sample(p, 6, temperature=0)["tokens"][0] for p in prompts]


def test_what_cannot_be_right_is_refused() -> None:
    with pytest.raises(LocationError, match="'t5' are not in the table"):
        architecture_of(transformers.T5Config())
    for config in CONFIGS.values():
        architecture_of(config)
