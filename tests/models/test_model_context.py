import base64
import json
import threading
from pathlib import Path

import pytest
import torch

from neuron_explainer.errors import InputError, NeuronExplainerError, SourceError
from neuron_explainer.models.checkpoints import (
    load_checkpoint,
    save_huggingface,
    save_native,
    save_pieces,
)
from neuron_explainer.models.config import TransformerConfig
from neuron_explainer.models.model_context import (
    InvalidTokenException,
    ModelContext,
    StandardModelContext,
    StubModelContext,
    get_default_device,
    get_embedding,
    get_unembedding_with_ln_gain,
)
from neuron_explainer.models.tokenizer_files import GPT2_PATTERN, TokenizerSpec
from neuron_explainer.models.transformer import Transformer, split_heads
from neuron_explainer.models.weight_names import (
    Dimension,
    WeightLocationType,
    get_dimension_index_of_weight_location_type,
)

CONFIG = TransformerConfig(
    enc="bytes", ctx_window=16, d_model=12, n_layers=2, n_heads=3, m_mlp=2, n_vocab=300
)
SIZES = {"h": 3, "d": 12, "d_head": 4, "f": 24, "v": 300, "ctx": 16}


@pytest.fixture(scope="module")
def model() -> Transformer:
    model = Transformer(CONFIG, seed=0)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():  # norms too: gains of 1 would hide mistakes
            parameter.add_(torch.randn(parameter.shape, generator=generator))
    return model


@pytest.fixture(scope="module")
def folder(model: Transformer, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A native folder with a tokenizer of single bytes and one special token."""
    root = tmp_path_factory.mktemp("model_context")
    vocabulary = b"".join(base64.b64encode(bytes([i])) + b" %d\n" % i for i in range(256))
    (root / "bytes.tiktoken").write_bytes(vocabulary)
    spec = TokenizerSpec(
        "bytes", GPT2_PATTERN, (("<|endoftext|>", 256),), (str(root / "bytes.tiktoken"),)
    )
    save_native(root / "model", CONFIG, model.state_dict(), spec)
    return root / "model"


@pytest.fixture
def context(folder: Path) -> StandardModelContext:
    return StandardModelContext(folder, device="cpu")


@pytest.fixture
def reads(monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    """The keys of each read of a checkpoint; the whole of it is ["*"]."""
    log: list[list[str]] = []

    def load(*args, keys=None, **kwargs):
        log.append(["*"] if keys is None else list(keys))
        return load_checkpoint(*args, keys=keys, **kwargs)

    monkeypatch.setattr("neuron_explainer.models.model_context.load_checkpoint", load)
    monkeypatch.setattr("neuron_explainer.models.checkpointed.load_checkpoint", load)
    return log


def of_model(model: Transformer, kind: WeightLocationType, layer: int) -> torch.Tensor:
    """The weight, built from the model's parameters in another way than the context does."""
    block = list(model.layers)[layer]
    heads = [slice(4 * h, 4 * h + 4) for h in range(3)]
    attention = {
        WeightLocationType.ATTN_TO_QUERY: block.attn.q_proj,
        WeightLocationType.ATTN_TO_KEY: block.attn.k_proj,
        WeightLocationType.ATTN_TO_VALUE: block.attn.v_proj,
    }
    if kind in attention:
        return torch.stack([attention[kind].weight[head].T for head in heads])
    if kind == WeightLocationType.ATTN_TO_RESIDUAL:
        return torch.stack([block.attn.out_proj.weight[:, head].T for head in heads])
    return {
        WeightLocationType.MLP_TO_HIDDEN: block.mlp.in_layer.weight.T,
        WeightLocationType.MLP_TO_RESIDUAL: block.mlp.out_layer.weight.T,
        WeightLocationType.EMBEDDING: model.tok_embed.weight,
        WeightLocationType.UNEMBEDDING: model.unembed.weight.T,
        WeightLocationType.POSITION_EMBEDDING: model.pos_embed.weight,
        WeightLocationType.LAYER_NORM_GAIN_FINAL: model.final_ln.weight,
        WeightLocationType.LAYER_NORM_BIAS_FINAL: model.final_ln.bias,
        WeightLocationType.LAYER_NORM_GAIN_PRE_ATTN: block.ln_1.weight,
        WeightLocationType.LAYER_NORM_GAIN_PRE_MLP: block.ln_2.weight,
    }[kind]


SHAPES = {
    WeightLocationType.MLP_TO_HIDDEN: (12, 24),
    WeightLocationType.MLP_TO_RESIDUAL: (24, 12),
    WeightLocationType.EMBEDDING: (300, 12),
    WeightLocationType.UNEMBEDDING: (12, 300),
    WeightLocationType.POSITION_EMBEDDING: (16, 12),
    WeightLocationType.ATTN_TO_QUERY: (3, 12, 4),
    WeightLocationType.ATTN_TO_KEY: (3, 12, 4),
    WeightLocationType.ATTN_TO_VALUE: (3, 12, 4),
    WeightLocationType.ATTN_TO_RESIDUAL: (3, 4, 12),
    WeightLocationType.LAYER_NORM_GAIN_FINAL: (12,),
    WeightLocationType.LAYER_NORM_BIAS_FINAL: (12,),
    WeightLocationType.LAYER_NORM_GAIN_PRE_ATTN: (12,),
    WeightLocationType.LAYER_NORM_GAIN_PRE_MLP: (12,),
}


def test_every_kind_of_weight_is_listed() -> None:
    assert set(SHAPES) == set(WeightLocationType)
    assert len(SHAPES) == 13


@pytest.mark.parametrize("loaded", ["from disk", "from the model"])
@pytest.mark.parametrize("kind", WeightLocationType)
def test_weights_are_the_parameters(
    kind: WeightLocationType, loaded: str, model: Transformer, context: StandardModelContext
) -> None:
    if loaded == "from the model":
        context.get_or_create_model()
    for layer in [None] if kind.has_no_layers else [0, 1]:
        weight = context.get_weight(kind, layer)
        assert weight.shape == SHAPES[kind]
        assert torch.equal(weight, of_model(model, kind, layer or 0))
        assert not weight.requires_grad
        assert weight.is_contiguous()


@pytest.mark.parametrize("layout", ["pieces", "huggingface"])
def test_other_layouts_give_the_same_weights(
    layout: str, model: Transformer, tmp_path: Path
) -> None:
    if layout == "pieces":
        cfg = TransformerConfig(**{**CONFIG.to_dict(), "enc": "gpt2"})
        save_pieces(tmp_path / "m", cfg, model.state_dict())
    else:
        save_huggingface(tmp_path / "m", CONFIG, model.state_dict())
    context = StandardModelContext(tmp_path / "m", device="cpu")
    for kind in WeightLocationType:
        layer = None if kind.has_no_layers else 1
        assert torch.equal(context.get_weight(kind, layer), of_model(model, kind, 1))


def test_head_weights_act_as_the_projections(
    model: Transformer, context: StandardModelContext
) -> None:
    x, block = torch.randn(5, 12), next(iter(model.layers))
    W_q = context.get_weight(WeightLocationType.ATTN_TO_QUERY, 0)
    q = torch.einsum("sd,hdk->shk", x, W_q).flatten(1) + block.attn.q_proj.bias
    torch.testing.assert_close(q, block.attn.q_proj(x))
    W_o = context.get_weight(WeightLocationType.ATTN_TO_RESIDUAL, 0)
    written = torch.einsum("shk,hkd->sd", split_heads(x, 3), W_o) + block.attn.out_proj.bias
    torch.testing.assert_close(written, block.attn.out_proj(x))


def test_the_constructor_reads_nothing(folder: Path, reads: list[list[str]]) -> None:
    context = StandardModelContext(folder)
    assert reads == []
    assert context.n_layers == 2
    assert context.n_vocab == 300
    assert reads == [[]]  # the config alone, once


def test_a_tensor_is_read_once_and_alone(
    context: StandardModelContext, reads: list[list[str]]
) -> None:
    for _ in range(2):
        context.get_weight(WeightLocationType.MLP_TO_HIDDEN, 1)
    assert reads == [[], ["xf_layers.1.mlp.in_layer.weight"]]


def test_a_loaded_model_gives_the_weights(
    context: StandardModelContext, reads: list[list[str]]
) -> None:
    model = context.get_or_create_model()
    context.get_weight(WeightLocationType.MLP_TO_HIDDEN, 1)
    assert reads.count(["*"]) == 1
    assert ["xf_layers.1.mlp.in_layer.weight"] not in reads
    with torch.no_grad():
        model.tok_embed.weight[3] = 7.0  # an edited model is the model
    assert context.get_weight(WeightLocationType.EMBEDDING)[3].eq(7).all()


def test_weights_are_those_of_the_model_that_was_made(
    model: Transformer, context: StandardModelContext
) -> None:
    """Folded where only a simplified model exists, as in the original; of the plain one otherwise."""
    kind = WeightLocationType.LAYER_NORM_GAIN_PRE_ATTN
    simplified = context.get_or_create_model(simplify=True)
    assert context.get_weight(kind, 0).eq(1).all()
    folded = context.get_weight(WeightLocationType.MLP_TO_HIDDEN, 0)
    assert torch.equal(folded, next(iter(simplified.layers)).mlp.in_layer.weight.T)
    context.get_or_create_model()
    assert torch.equal(context.get_weight(kind, 0), of_model(model, kind, 0))


def test_models_are_kept_apart_by_simplify_and_device(context: StandardModelContext) -> None:
    plain, simplified = context.get_or_create_model(), context.get_or_create_model(simplify=True)
    assert plain is context.get_or_create_model("cpu")
    assert simplified is context.get_or_create_model(torch.device("cpu", 0), simplify=True)
    assert plain is not simplified
    assert next(iter(simplified.layers)).ln_1.weight.eq(1).all()
    assert not next(iter(plain.layers)).ln_1.weight.eq(1).all()
    tokens = torch.tensor([[1, 2, 3]])
    torch.testing.assert_close(plain(tokens)[0], simplified(tokens)[0], rtol=1e-4, atol=1e-3)


def test_one_model_for_all_threads(context: StandardModelContext) -> None:
    found: list[Transformer] = []
    threads = [
        threading.Thread(target=lambda: found.append(context.get_or_create_model()))
        for _ in range(4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len({id(model) for model in found}) == 1


@pytest.mark.parametrize("loaded", [False, True])
def test_editing_a_weight_changes_nothing_else(context: StandardModelContext, loaded: bool) -> None:
    if loaded:
        context.get_or_create_model()
    for kind in WeightLocationType:
        layer = None if kind.has_no_layers else 0
        before = context.get_weight(kind, layer).clone()
        context.get_weight(kind, layer).zero_()
        assert torch.equal(context.get_weight(kind, layer), before)


def test_dtype(folder: Path, model: Transformer, tmp_path: Path) -> None:
    half = {key: value.half() for key, value in model.state_dict().items()}
    save_native(tmp_path / "half", CONFIG, half)
    as_float = StandardModelContext(tmp_path / "half", "cpu")
    assert as_float.get_weight(WeightLocationType.EMBEDDING).dtype == torch.float32
    assert as_float.get_or_create_model().dtype == torch.float32
    as_stored = StandardModelContext(tmp_path / "half", "cpu", dtype=None)
    assert as_stored.get_weight(WeightLocationType.EMBEDDING).dtype == torch.float16
    assert as_stored.get_or_create_model().dtype == torch.float16


def test_normalize_dim(context: StandardModelContext) -> None:
    weight = context.get_weight(
        WeightLocationType.ATTN_TO_VALUE, 1, normalize_dim=Dimension.RESIDUAL_STREAM_CHANNELS
    )
    torch.testing.assert_close(weight.norm(dim=1), torch.ones(3, 4))
    plain = context.get_weight(WeightLocationType.ATTN_TO_VALUE, 1)
    torch.testing.assert_close(weight * plain.norm(dim=1, keepdim=True), plain)
    with pytest.raises(InputError, match=r"attn\.to_value has no axis 'mlp_acts'.*attn_heads"):
        context.get_weight(WeightLocationType.ATTN_TO_VALUE, 1, normalize_dim=Dimension.MLP_ACTS)


def test_unembedding_and_embedding(model: Transformer, context: StandardModelContext) -> None:
    expected = model.unembed.weight.T * model.final_ln.weight[:, None]
    assert torch.equal(get_unembedding_with_ln_gain(context), expected)
    assert torch.equal(get_embedding(context), model.tok_embed.weight)


def test_tokens(context: StandardModelContext) -> None:
    assert context.encode("ab<|endoftext|>") == [97, 98, 256]
    assert context.decode([97, 98, 256]) == "ab<|endoftext|>"
    assert context.decode("é".encode()) == "é"
    assert context.decode_token(0xC3) == "�"
    assert context.decode_token_list([97, 98]) == ["a", "b"]
    assert context.encode_token_str("a") == 97
    assert context.encode_token_str_list(["a", "<|endoftext|>"]) == [97, 256]
    assert context.get_encoding().name == "bytes"
    with pytest.raises(InvalidTokenException, match=r"'ab' should be one token.*found 2: 'a', 'b'"):
        context.encode_token_str("ab")
    with pytest.raises(InvalidTokenException, match="found 0: none"):
        context.encode_token_str("")


def test_config_and_sizes(context: StandardModelContext) -> None:
    config = context.get_model_config_as_dict()
    assert json.loads(json.dumps(config)) == CONFIG.to_dict()
    assert (context.n_neurons, context.n_attention_heads, context.n_layers) == (24, 3, 2)
    assert context.n_residual_stream_channels == 12
    assert (context.n_vocab, context.n_context) == (300, 16)
    assert context.get_dim_size(Dimension.QUERY_AND_KEY_CHANNELS) == 4
    assert context.get_dim_size(Dimension.VALUE_CHANNELS) == 4
    with pytest.raises(InputError, match="no size for 'autoencoder_latents'"):
        context.get_dim_size(Dimension.AUTOENCODER_LATENTS)


def test_wrong_requests(context: StandardModelContext) -> None:
    with pytest.raises(InputError, match=r"mlp\.to_hidden needs a layer of 0 to 1, found None"):
        context.get_weight(WeightLocationType.MLP_TO_HIDDEN)
    with pytest.raises(InputError, match="found 2"):
        context.get_weight(WeightLocationType.MLP_TO_HIDDEN, 2)
    with pytest.raises(InputError, match="found -1"):
        context.get_weight(WeightLocationType.MLP_TO_HIDDEN, -1)
    with pytest.raises(InputError, match=r"embedding exists once.*found layer 0"):
        context.get_weight(WeightLocationType.EMBEDDING, 0)
    with pytest.raises(InputError, match=r"unknown weight 'mlp\.up'.*mlp\.to_hidden"):
        context.get_weight("mlp.up", 0)
    with pytest.raises(SourceError, match="no model 'gpt2-smal'"):
        StandardModelContext("gpt2-smal")


def test_a_context_whose_sizes_contradict_its_weights_says_so(
    context: StandardModelContext, monkeypatch: pytest.MonkeyPatch
) -> None:
    sizes = context.get_dim_size

    def wrong(dim: Dimension) -> int:
        return sizes(dim) + (dim is Dimension.MLP_ACTS)

    monkeypatch.setattr(context, "get_dim_size", wrong)
    with pytest.raises(NeuronExplainerError, match=r"shape \[12, 25\], found \[12, 24\]"):
        context.get_weight(WeightLocationType.MLP_TO_HIDDEN, 0)


def test_from_model_type(folder: Path) -> None:
    context = ModelContext.from_model_type(folder, device="cpu")
    assert isinstance(context, StandardModelContext)
    assert context.device == torch.device("cpu")
    assert repr(context) == f"StandardModelContext({str(folder)!r}, device='cpu')"


def test_stub() -> None:
    stub = StubModelContext({Dimension.LAYERS: 2})
    assert stub.n_layers == 2
    with pytest.raises(InputError, match=r"has no size for 'mlp_acts'\. It has: layers"):
        _ = stub.n_neurons
    refused = [
        stub.get_encoding,
        stub.get_or_create_model,
        stub.get_model_config_as_dict,
        lambda: stub.get_weight(WeightLocationType.EMBEDDING),
        lambda: stub.encode("a"),
    ]
    for call in refused:
        with pytest.raises(NotImplementedError, match="knows sizes only") as caught:
            call()
        assert isinstance(caught.value, NeuronExplainerError)


def test_default_device(monkeypatch: pytest.MonkeyPatch) -> None:
    def machine(cuda: bool, mps: bool) -> str:
        monkeypatch.setattr(torch.cuda, "is_available", lambda: cuda)
        monkeypatch.setattr(torch.backends.mps, "is_available", lambda: mps)
        return str(get_default_device())

    assert machine(cuda=True, mps=True) == "cuda:0"
    assert machine(cuda=False, mps=True) == "mps:0"
    assert machine(cuda=False, mps=False) == "cpu"


def test_component_names() -> None:
    assert WeightLocationType("mlp.to_hidden") is WeightLocationType.MLP_TO_HIDDEN
    index = get_dimension_index_of_weight_location_type
    assert index(WeightLocationType.ATTN_TO_RESIDUAL, Dimension.VALUE_CHANNELS) == 1
