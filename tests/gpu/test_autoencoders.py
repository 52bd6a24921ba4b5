"""Autoencoders on CUDA: equal to the CPU's, one choice of latents on every path, spliced into a model."""

import pytest
import torch
from torch import Tensor, nn

from neuron_explainer.models.autoencoder import Autoencoder, BatchTopK, JumpReLU, TopK
from neuron_explainer.models.model_registry import make_autoencoder_context
from neuron_explainer.models.transformer import Transformer
from tests.conftest import assert_close

NAMES = ["ae-mlp-post-act", "ae-resid-delta-attn", "ae-resid-delta-mlp"]
TEXT = "The old woman lived in a little house at the edge of the forest, and the wolf came to her door."


def activations(context: object, layer: int) -> Tensor:
    place = context.location.at(layer)  # type: ignore[attr-defined]  # an AutoencoderContext
    with torch.no_grad():
        model = Transformer.load("tiny-tales", device="cpu", dtype=torch.float32)
        return model.capture([TEXT], place)[place][0]


def random_autoencoder(activation: nn.Module, dtype: torch.dtype = torch.float32) -> Autoencoder:
    torch.manual_seed(0)
    autoencoder = Autoencoder(512, 48, activation, input_normalization="layer_norm")
    with torch.no_grad():
        for parameter in autoencoder.parameters():
            if parameter.ndim == 1 and parameter.shape[0] != 1:
                parameter.normal_(0, 0.05)
    return autoencoder.to(dtype)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("layer", [0, 3])
def test_the_shipped_ones_give_what_they_give_on_the_cpu(
    device: torch.device, name: str, layer: int
) -> None:
    contexts = [
        make_autoencoder_context("tiny-tales", name, device=where) for where in ("cpu", device)
    ]
    x = activations(contexts[0], layer)
    here, there = (context.get_autoencoder(layer) for context in contexts)
    assert there.device == device
    with torch.no_grad():
        for method in ("encode_pre_act", "encode", "reconstruct"):
            found = getattr(there, method)(x.to(device))
            assert_close(found.cpu(), getattr(here, method)(x), 1e-4, method)


@pytest.mark.parametrize(
    "activation",
    [nn.ReLU(), TopK(16), JumpReLU(torch.full((512,), 0.1)), BatchTopK(0.2)],
    ids=lambda activation: type(activation).__name__,
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_all_paths_choose_the_same_latents(
    device: torch.device, activation: nn.Module, dtype: torch.dtype
) -> None:
    """Ties are common in bfloat16; the lowest index wins on every path."""
    autoencoder = random_autoencoder(activation, dtype).to(device)
    x = torch.randn(300, 48, generator=torch.Generator().manual_seed(1)).to(device, dtype)
    with torch.no_grad():
        expected = autoencoder(x).latents != 0
        assert expected.any()
        assert torch.equal(autoencoder.encode(x) != 0, expected)
        assert torch.equal(autoencoder.encode_sparse(x).dense() != 0, expected)
    assert torch.equal(autoencoder.encode(x.clone().requires_grad_(True)) != 0, expected)


@pytest.mark.parametrize("n_rows", [1, 1024, 3000])
def test_a_search_in_bfloat16_finds_the_same(
    device: torch.device, n_rows: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The certified search is off on CUDA unless it is asked for; asked for, it is exact."""
    autoencoder = random_autoencoder(TopK(16)).to(device).requires_grad_(False)
    x = torch.randn(n_rows, 48, generator=torch.Generator().manual_seed(2)).to(device)
    found = {}
    for switch in ("0", "1"):
        monkeypatch.setenv("NEURON_EXPLAINER_CERTIFIED", switch)
        found[switch] = autoencoder.encode_sparse(x)
    assert torch.equal(found["0"].indices, found["1"].indices)
    assert_close(found["1"].values.cpu(), found["0"].values.cpu(), 1e-5)


def test_gradients_are_those_of_the_cpu(device: torch.device) -> None:
    found = []
    x = torch.randn(64, 48, generator=torch.Generator().manual_seed(3))
    for where in (torch.device("cpu"), device):
        autoencoder = random_autoencoder(TopK(16)).to(where)
        rows = x.to(where).requires_grad_(True)
        loss = (autoencoder.reconstruct(rows) - rows).square().sum()
        found.append(
            [g.cpu() for g in torch.autograd.grad(loss, [rows, *autoencoder.parameters()])]
        )
    for a, b in zip(*found, strict=True):
        assert_close(b, a, 1e-4)


@pytest.mark.parametrize("add_error", [False, True])
def test_spliced_into_a_model(device: torch.device, add_error: bool) -> None:
    logits = []
    for where in (torch.device("cpu"), device):
        model = Transformer.load("tiny-tales", device=where, dtype=torch.float32)
        context = make_autoencoder_context("tiny-tales", "ae-resid-delta-mlp", device=where)
        tokens = torch.tensor([model.enc.encode(TEXT)], device=where)
        with torch.no_grad():
            logits.append(model(tokens, hooks=context.hooks(add_error=add_error))[0].cpu())
    assert_close(logits[1], logits[0], 1e-3)
