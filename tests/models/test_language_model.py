"""What both kinds of model promise, each promise held for both."""

import logging
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from neuron_explainer.errors import HookError, InputError, LocationError, NeuronExplainerError
from neuron_explainer.models import language_model
from neuron_explainer.models.autoencoder import Autoencoder
from neuron_explainer.models.hooks import AtLayers, AutoencoderHooks, Hooks, TransformerHooks
from neuron_explainer.models.language_model import LanguageModel, UnmarkedPadsWarning
from neuron_explainer.models.locations import SITES
from neuron_explainer.models.model_context import ModelContext, StandardModelContext
from neuron_explainer.models.sampling import prep_input_and_pad
from neuron_explainer.models.transformer import HiddenState, Transformer
from tests.conftest import make_model, random_tokens

KINDS = ["native", "gpt2", "llama", "mistral"]
TOKENS = random_tokens(2, 9, seed=3)
PAD = torch.zeros(2, 9, dtype=torch.bool)
PAD[0, :3] = True


def make_huggingface(family: str, **changes: Any) -> Any:
    """A model of transformers with random weights, of the vocabulary of ``make_model``."""
    transformers = pytest.importorskip("transformers")
    sizes = {
        "vocab_size": 29,
        "hidden_size": 16,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "max_position_embeddings": 12,
        "intermediate_size": 24,
        "bos_token_id": 0,
        "eos_token_id": 0,
    }
    sizes |= {
        "llama": {"num_key_value_heads": 2},
        "mistral": {"num_key_value_heads": 2, "sliding_window": 4},
    }.get(family, {})
    if family == "gpt2":
        names = {
            "hidden_size": "n_embd",
            "num_hidden_layers": "n_layer",
            "num_attention_heads": "n_head",
        }
        names |= {"max_position_embeddings": "n_positions", "intermediate_size": "n_inner"}
        sizes = {names.get(name, name): size for name, size in sizes.items()}
    torch.manual_seed(0)
    config = transformers.AutoConfig.for_model(family, **sizes | changes)
    model = transformers.AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.3 * torch.randn(parameter.shape))
    return model


def make(kind: str) -> LanguageModel:
    if kind == "native":
        return make_model()
    model = make_huggingface(kind)
    from neuron_explainer.models.huggingface.model import HuggingFaceModel

    return HuggingFaceModel(model)


@pytest.fixture(params=KINDS)
def model(request: pytest.FixtureRequest) -> LanguageModel:
    return make(request.param)


class OnPurpose(BaseException):
    """As Ctrl-C: no Exception."""


def fail_in_layer_1(x: Tensor, layer: int | None) -> Tensor:
    if layer in (None, 1):
        raise OnPurpose
    return x


def halve(x: Tensor) -> Tensor:
    return x * 0.5


# --- states ---


@pytest.mark.parametrize("path", ["resid.post_emb", "attn.v_out", "mlp.post_act", "logits"])
@pytest.mark.parametrize("padded", [False, True])
def test_an_exception_leaves_the_state_as_it_was(
    path: str, padded: bool, model: LanguageModel
) -> None:
    pad = PAD if padded else None
    _, H = model(TOKENS[:, :5], pad=None if pad is None else pad[:, :5])
    expected, _ = model(TOKENS[:, 5:], H.copy())
    positions = H.positions
    hooks = TransformerHooks().append_to_path(f"{path}.fwd", fail_in_layer_1)
    for _ in range(2):
        with pytest.raises(OnPurpose):
            model(TOKENS[:, 5:], H, hooks=hooks)
    assert torch.equal(H.positions, positions)
    found, again = model(TOKENS[:, 5:], H)
    assert again is H
    assert torch.equal(found, expected)


def test_an_exception_in_the_first_call_leaves_an_empty_state(model: LanguageModel) -> None:
    _, H = model(TOKENS)
    empty = type(H)(model.n_layers) if isinstance(H, HiddenState) else type(H)()
    hooks = TransformerHooks().append_at("1/mlp.post_act", fail_in_layer_1)
    with pytest.raises(OnPurpose):
        model(TOKENS, empty, hooks=hooks)
    assert "empty" in repr(empty)
    assert torch.equal(model(TOKENS, empty)[0], model(TOKENS)[0])


def test_refused_input_leaves_the_state_as_it_was(model: LanguageModel) -> None:
    _, H = model(TOKENS[:, :5])
    expected, _ = model(TOKENS[:, 5:], H.copy())
    for tokens, message in [
        (TOKENS[:1], r"H holds a batch of 2 rows, tokens one of 1"),
        (TOKENS, r"14 tokens, more than the context of 12"),
        (TOKENS + 29, r"token ids must lie in 0 to 28"),
    ]:
        with pytest.raises(InputError, match=message):
            model(tokens, H)
    assert torch.equal(model(TOKENS[:, 5:], H)[0], expected)


def test_a_copy_of_a_state_branches(model: LanguageModel) -> None:
    _, H = model(TOKENS[:, :5])
    branch = H.copy()
    expected, _ = model(TOKENS[:, 5:], H)
    assert torch.equal(model(TOKENS[:, 5:], branch)[0], expected)


@pytest.mark.parametrize("foreign", [3, "H", None])
def test_a_foreign_state_is_refused(foreign: Any, model: LanguageModel) -> None:
    if foreign is None:
        other = make("gpt2") if isinstance(model, Transformer) else make("native")
        foreign = other(TOKENS)[1]
    with pytest.raises(InputError, match=r"H must be a H\w+State.* as an earlier call"):
        model(TOKENS, foreign)


def test_a_state_of_another_size_is_refused() -> None:
    _, H = make_model()(TOKENS)
    for other, found in [(make_model(n_layers=3), "2 layers"), (make_model(d_model=8), "width 16")]:
        with pytest.raises(InputError, match=rf"H must be a HiddenState .* found .*{found}"):
            other(TOKENS, H)
    from neuron_explainer.models.huggingface.model import HuggingFaceModel

    _, H = HuggingFaceModel(make_huggingface("llama"))(TOKENS)
    with pytest.raises(InputError, match="H is the state of a model of other sizes"):
        HuggingFaceModel(make_huggingface("llama", intermediate_size=20))(TOKENS, H)


# --- hooks ---


@pytest.mark.parametrize("layers", [2, [0, 7], [7, 1], [0, 1, 2]])
@pytest.mark.parametrize("call", ["forward", "capture", "sample"])
def test_hooks_for_layers_that_the_model_lacks_are_refused(
    layers: Any, call: str, model: LanguageModel
) -> None:
    hooks = TransformerHooks()
    hooks.mlp.post_act.append_fwd(AtLayers(layers).append(halve))
    calls: dict[str, Callable[[], object]] = {
        "forward": lambda: model(TOKENS, hooks=hooks),
        "capture": lambda: model.capture(TOKENS, "0/mlp.post_act", hooks=hooks),
        "sample": lambda: model.sample([1, 2], 3, hooks=hooks),
    }
    with pytest.raises(HookError, match=r"mlp.post_act.* for layer [27].* layers 0 to 1"):
        calls[call]()


@pytest.mark.parametrize("hooks", [TransformerHooks().mlp, halve, AtLayers(1), {}, "hooks"])
def test_what_is_no_tree_is_refused(hooks: Any, model: LanguageModel) -> None:
    for call in (
        lambda: model(TOKENS, hooks=hooks),
        lambda: model.capture(TOKENS, "0/mlp.post_act", hooks=hooks),
        lambda: model.sample([1, 2], 3, hooks=hooks),
    ):
        with pytest.raises(HookError, match="hooks must be a TransformerHooks tree"):
            call()


def test_captures_outside_of_the_model_are_refused(model: LanguageModel) -> None:
    with pytest.raises(LocationError, match="layers 0 to 1"):
        model.capture(TOKENS, ["0/mlp.post_act", "7/mlp.post_act"])
    with pytest.raises(LocationError, match=r"unknown location 'mlp\.post'"):
        model.capture(TOKENS, "mlp.post")
    assert set(model.paths) <= set(SITES)


@pytest.mark.parametrize("kind", ["fwd", "bwd", "fwd2"])
def test_an_exception_in_a_hook_says_where(kind: str, model: LanguageModel) -> None:
    class MyError(Exception):
        pass

    def broken(x: Tensor) -> Tensor:
        raise MyError("mine")

    hooks = TransformerHooks().append_at("1/mlp.post_act", broken, kind)  # type: ignore[arg-type]
    with pytest.raises(MyError, match="mine") as caught:
        model(TOKENS, hooks=hooks)[0].sum().backward()
    assert any(
        "broken" in note and "mlp.post_act" in note and "layer 1" in note
        for note in caught.value.__notes__
    )


# --- text ---


def contexts(text_folder: Any) -> list[ModelContext]:
    transformers = pytest.importorskip("transformers")
    from neuron_explainer.models.huggingface.context import HuggingFaceModelContext

    letters = byte_level(transformers)
    model = make_huggingface("gpt2", vocab_size=300, n_positions=64)
    return [
        StandardModelContext(text_folder, device="cpu"),
        HuggingFaceModelContext.from_model(model, letters),
    ]


def byte_level(transformers: Any, **options: Any) -> Any:
    """A tokenizer of single bytes, with ``<|endoftext|>`` as start token."""
    from tokenizers import Tokenizer, decoders, pre_tokenizers
    from tokenizers.models import BPE

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {letter: i for i, letter in enumerate(alphabet)} | {"<|endoftext|>": 256}
    backend = Tokenizer(BPE(vocab=vocab, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    options = {"bos_token": "<|endoftext|>", "eos_token": "<|endoftext|>"} | options
    return transformers.PreTrainedTokenizerFast(tokenizer_object=backend, **options)


@pytest.fixture
def text_folder(text_model: Transformer, tmp_path: Any) -> Any:
    text_model.save(tmp_path / "model")
    return tmp_path / "model"


def test_lone_surrogates_become_the_replacement_character(text_folder: Any) -> None:
    for context in contexts(text_folder):
        for text, expected in [("a\ud83d b", "a\ufffd b"), ("\ud83d\udc4d", "\U0001f44d")]:
            assert context.decode(context.encode(text)) == expected
        sample = context.get_or_create_model().sample("a\udc4d", 2, temperature=0)
        assert len(sample["tokens"][0]) == 2


def test_text_goes_wherever_tokens_go(text_folder: Any) -> None:
    for context in contexts(text_folder):
        model = context.get_or_create_model()
        texts = ["ab", "c"]
        tokens, pad = model.to_batch(texts, bos=True)
        assert pad is not None
        assert pad.tolist() == [[False] * 3, [False, False, True]]
        assert tokens[:, 0].unique().numel() == 1
        found, _ = model(texts)
        assert torch.equal(found, model(tokens[:, 1:], pad=pad[:, 1:])[0])
        assert torch.equal(model("ab")[0], model(context.encode("ab"))[0])
        at = model.capture(texts, "0/mlp.post_act", bos=True)
        assert torch.equal(at.tokens, tokens)
        ids = model.prompt_ids(texts, bos=True)
        assert model.sample(texts, 3, temperature=0, bos=True) == model.sample(
            ids, 3, temperature=0
        )
        with pytest.raises(InputError, match="Prompts are padded here"):
            model("ab", pad=pad)
        for bos in ("x", None, 1.5):
            with pytest.raises(InputError, match="bos must be True, False or a token id"):
                model.sample("ab", 2, bos=bos)  # type: ignore[arg-type]


def test_a_model_without_a_start_token_says_what_works() -> None:
    transformers = pytest.importorskip("transformers")
    from neuron_explainer.models.huggingface.model import HuggingFaceModel
    from neuron_explainer.models.huggingface.tokenizer import HuggingFaceTokenizer

    letters = HuggingFaceTokenizer(byte_level(transformers, bos_token=None))
    theirs = HuggingFaceModel(make_huggingface("gpt2", vocab_size=300), letters)
    for model, prompt in ((make_model(), [1, 2]), (theirs, "ab")):
        advice = r"start token.* bos=False \(in the shell --no-bos"
        with pytest.raises(InputError, match=advice):
            model.sample(prompt, 2, bos=True)
        with pytest.raises(InputError, match=advice):
            model.capture(prompt, "0/mlp.post_act", bos=True)
        model.sample(prompt, 2)  # what the error advises
        assert model.capture(prompt, "0/mlp.post_act", bos=5).tokens[0, 0] == 5
        with pytest.raises(InputError, match="token ids must lie in 0 to"):
            model.sample(prompt, 2, bos=1000)


# --- sampling ---


def test_a_nucleus_of_1_is_everything(model: LanguageModel) -> None:
    prompts = [[1, 2, 3], [4]]
    expected = model.sample(prompts, 8, temperature=3.0, seed=5)["tokens"]
    assert model.sample(prompts, 8, temperature=3.0, seed=5, top_p=1.0)["tokens"] == expected


@pytest.mark.parametrize("seed", [2**64, -(2**63) - 1, 1.5])
def test_seeds_that_torch_cannot_hold_are_refused(seed: Any, model: LanguageModel) -> None:
    with pytest.raises(InputError, match="seed must be a whole number"):
        model.sample([1], 1, seed=seed)


@pytest.mark.parametrize("kind", KINDS[:2])
def test_float16_on_a_cpu_is_told_once(kind: str, caplog: pytest.LogCaptureFixture) -> None:
    model: Any = make(kind)
    language_model._say_that_float16_is_slow.cache_clear()
    with caplog.at_level(logging.WARNING):
        model(TOKENS)
        assert not caplog.records
        (model if kind == "native" else model.model).half()
        model(TOKENS)
        model.sample([1], 2)
    assert [record.getMessage()[:24] for record in caplog.records] == ["A model in float16 is sl"]


# --- models without attention ---


@pytest.mark.parametrize("family", ["mamba", "rwkv"])
def test_models_without_attention(family: str) -> None:
    transformers = pytest.importorskip("transformers")
    from neuron_explainer.models.huggingface.context import HuggingFaceModelContext
    from neuron_explainer.models.huggingface.families import Architecture, Tap

    torch.manual_seed(0)
    config, architecture = {
        "mamba": (
            {"state_size": 4},
            Architecture(
                "backbone.layers", {"resid.torso.delta_mlp": Tap("out", "mixer")}, "backbone.norm_f"
            ),
        ),
        "rwkv": (
            {"attention_hidden_size": 16, "context_length": 32},
            Architecture(
                "rwkv.blocks", {"resid.torso.delta_mlp": Tap("out", "feed_forward")}, "rwkv.ln_out"
            ),
        ),
    }[family]
    config = transformers.AutoConfig.for_model(
        family, vocab_size=29, hidden_size=16, num_hidden_layers=2, **config
    )
    theirs = transformers.AutoModelForCausalLM.from_config(config).eval()
    model = HuggingFaceModelContext.from_model(theirs, None, architecture).get_or_create_model()
    with torch.no_grad():
        logits, H = model(TOKENS)
        assert torch.equal(logits, theirs(TOKENS).logits)
        place = "1/resid.torso.delta_mlp"
        assert model.capture(TOKENS, place)[place].shape == (2, 9, 16)
        right = PAD.flip(1)
        batched, _ = model(TOKENS, pad=right)
        torch.testing.assert_close(batched[0, :6], model(TOKENS[:1, :6])[0][0])
        with pytest.raises(InputError, match="Pad on the right"):
            model(TOKENS, pad=PAD)
        with pytest.raises(InputError, match="give all tokens in one call, or use sample"):
            model(TOKENS, H)
    together = model.sample([[1, 2, 3, 4], [5]], 6, temperature=0)["tokens"]
    alone = [model.sample(prompt, 6, temperature=0)["tokens"][0] for prompt in ([1, 2, 3, 4], [5])]
    assert together == alone
    assert int(model(torch.tensor([[5, *alone[1][:5]]]))[0][0, -1].argmax()) == alone[1][5]
    hooks = TransformerHooks().append_at(place, halve)
    assert not torch.equal(model(TOKENS, hooks=hooks)[0], logits)
    with pytest.raises(
        NeuronExplainerError, match=r"names attn\.v_out, but the config .* no num_attention_heads"
    ):
        HuggingFaceModelContext.from_model(
            theirs, None, Architecture(architecture.layers, {"attn.v_out": Tap("in", "")})
        )


def test_caches_that_are_written_in_place_are_restored_too() -> None:
    transformers = pytest.importorskip("transformers")
    from neuron_explainer.models.huggingface.model import HuggingFaceModel, HuggingFaceState

    model = HuggingFaceModel(make_huggingface("llama"))
    H = HuggingFaceState()
    H.cache = transformers.StaticCache(config=model.config, max_cache_len=12)
    hooks = TransformerHooks().append_at("1/mlp.post_act", fail_in_layer_1)
    with torch.no_grad():
        model(TOKENS[:, :5], H)
        expected, _ = model(TOKENS)
        with pytest.raises(OnPurpose):
            model(TOKENS[:, 5:].flip(1), H, hooks=hooks)
        found, _ = model(TOKENS[:, 5:], H)
    torch.testing.assert_close(found, expected[:, 5:], atol=1e-5, rtol=1e-5)


# --- pads ---


@pytest.mark.parametrize("side", ["left", "right"])
def test_a_padded_batch_without_its_mask_is_warned_of(side: str, model: LanguageModel) -> None:
    tokens, pad = prep_input_and_pad([[5, 6, 7, 8, 9], [4, 3]], side)
    for run in (model, lambda tokens: model.capture(tokens, "mlp.post_act")):
        with pytest.warns(UnmarkedPadsWarning, match=r"row 1 .* token 0 .*no pad mask.*Give pad="):
            run(tokens)
    # Warnings are errors here: none of these is one.
    model(tokens, pad=pad)
    model(tokens, pad=torch.zeros_like(pad))  # the caller says that all are tokens
    model(tokens[1:])
    model(torch.zeros(2, 5, dtype=torch.long))
    model.capture([[5, 6, 7, 8, 9], [4, 3]], "mlp.post_act")
    model.sample([[5, 6, 7, 8, 9], [4, 3]], 3)
    _, H = model(TOKENS[:, :5])
    model(torch.tensor([[0, 0, 0], [1, 2, 3]]), H)


def test_pads_of_other_libraries_are_known_too() -> None:
    """GPT-2's end of text; and what a config of transformers says."""
    model = Transformer.load("tiny-tales", device="cpu")
    end = model._start_token()
    with pytest.warns(UnmarkedPadsWarning, match=f"row 0 of tokens ends with token {end} repeated"):
        model(torch.tensor([[5, 6, end, end], [5, 6, 7, 8]]))
    foreign = make_huggingface("llama", pad_token_id=3)
    from neuron_explainer.models.huggingface.model import HuggingFaceModel

    with pytest.warns(UnmarkedPadsWarning, match="row 1 of tokens begins with token 3 repeated"):
        HuggingFaceModel(foreign)(torch.tensor([[5, 6, 7, 8], [3, 3, 7, 8]]))


def test_places_complete_after_a_quote(model: LanguageModel) -> None:
    found = model.capture(TOKENS, ["mlp.post_act", "logits"])
    assert found._ipython_key_completions_() == ["0/mlp.post_act", "1/mlp.post_act", "logits"]


# --- autoencoders of another dtype ---


@pytest.mark.parametrize("nested", [False, True])
def test_an_autoencoder_of_another_dtype_is_refused_before_the_pass(
    nested: bool, model: LanguageModel
) -> None:
    width = model.capture(TOKENS, "1/mlp.post_act")["1/mlp.post_act"].shape[-1]
    autoencoder = Autoencoder(8, width).requires_grad_(False)
    splice = AutoencoderHooks.from_autoencoder(autoencoder)
    hooks = TransformerHooks().append_at("1/mlp.post_act", Hooks([splice]) if nested else splice)
    model(TOKENS, hooks=hooks)
    seen: list[int] = []

    def see(x: Tensor) -> Tensor:
        seen.append(1)
        return x

    hooks.append_at("0/mlp.post_act", see)
    autoencoder.bfloat16()
    said = r"mlp.post_act.fwd: the autoencoder is torch.bfloat16, the model torch.float32"
    with pytest.raises(HookError, match=said):
        model(TOKENS, hooks=hooks)
    assert not seen
    autoencoder.float()
    model(TOKENS, hooks=hooks)
    assert seen == [1]


def test_norms_are_float32_whatever_the_model() -> None:
    model = make_model(dtype=torch.bfloat16)
    place = "1/resid.torso.ln_mlp.post_scale"
    autoencoder = Autoencoder(8, model.cfg.d_model).requires_grad_(False)
    model(
        TOKENS,
        hooks=TransformerHooks().append_at(place, AutoencoderHooks.from_autoencoder(autoencoder)),
    )


def test_a_stream_gives_what_sample_draws_with_the_models_probabilities(
    model: LanguageModel,
) -> None:
    prompt = [3, 1, 4]
    several: list[dict[str, Any]] = [{"seed": 7, "top_p": 0.9}, {"seed": 1, "top_k": 3}]
    for settings in [*several, {"temperature": 0.0}]:
        sampled = model.sample(prompt, 4, **settings)["tokens"][0]
        streamed = list(model.stream(prompt, 4, **settings))
        assert [token for token, _ in streamed] == sampled
        with torch.no_grad():
            logits = model(torch.tensor([[*prompt, *sampled]]))[0][0].double()
        probs = logits.softmax(dim=-1)
        for step, (token, prob) in enumerate(streamed):
            assert prob == pytest.approx(float(probs[len(prompt) - 1 + step, token]), rel=1e-4)
    with pytest.raises(InputError, match="one prompt"):
        model.stream([[1], [2]], 2)  # type: ignore[list-item]  # that is what is refused
    with pytest.raises(InputError, match="more than the context"):
        model.stream(prompt, 500)
