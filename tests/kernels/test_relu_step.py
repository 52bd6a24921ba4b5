"""Both ways of a ReLU step equal the plain one, in value and in the gradient of every input."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from neuron_explainer.kernels import relu_step as sparse_relu
from neuron_explainer.kernels.relu_step import relu_autoencoder

B, N, L, N_OUT = 5, 6, 12, 7


@pytest.fixture(autouse=True, params=["dense", "sparse"])
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    torch.manual_seed(0)
    for name in ("_FORWARD_ELEMENTS", "_CHUNK_ELEMENTS"):  # chunks of 2, 2 and 1 tokens
        monkeypatch.setattr(sparse_relu, name, 2 * L)
    monkeypatch.setattr(sparse_relu, "_SPARSE", -1.0 if request.param == "dense" else 2.0)
    return str(request.param)


def drawn(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64).requires_grad_()


def inputs() -> tuple[Tensor, ...]:
    return drawn(B, N), drawn(L, N), drawn(L), drawn(L, N_OUT), drawn(N), drawn(L)


def ours(
    x: Tensor, weight: Tensor, bias: Tensor, decoder: Tensor, pre_bias: Tensor, scale: Tensor
) -> tuple[Tensor, Tensor]:
    return relu_autoencoder(x, weight, bias, decoder, pre_bias=pre_bias, scale=scale)[:2]


def plain(
    x: Tensor, weight: Tensor, bias: Tensor, decoder: Tensor, pre_bias: Tensor, scale: Tensor
) -> tuple[Tensor, Tensor]:
    latents = F.linear(x - pre_bias, weight, bias).relu()
    return latents @ decoder, latents @ scale


def test_gradients_of_both_outputs_by_all_inputs() -> None:
    assert torch.autograd.gradcheck(ours, inputs())


def test_equals_the_plain_step() -> None:
    given = inputs()
    torch.testing.assert_close(ours(*given), plain(*given))


def test_without_pre_bias_and_scale() -> None:
    x, weight, bias, decoder, _, _ = inputs()
    found = relu_autoencoder(x, weight, bias, decoder)
    expected = plain(x, weight, bias, decoder, torch.zeros(N).double(), torch.ones(L).double())
    torch.testing.assert_close(found[:2], expected)
    assert torch.autograd.gradcheck(lambda *a: relu_autoencoder(*a)[:2], (x, weight, bias, decoder))


def test_latents(way: str) -> None:
    x, weight, bias, decoder, _, _ = inputs()
    expected = F.linear(x, weight, bias).relu().detach()
    found = relu_autoencoder(x, weight, bias, decoder)
    if way == "dense":
        assert found.indices is None
        torch.testing.assert_close(found.values, expected)
        return
    torch.testing.assert_close(found.values, expected[expected > 0])
    assert found.indices is not None
    assert found.indices.tolist() == (expected > 0).nonzero()[:, 1].tolist()


def test_no_tokens_and_no_active_latents() -> None:
    _, weight, bias, decoder, _, _ = inputs()
    for x, shift in ((drawn(0, N), 0.0), (drawn(B, N), -1e9)):
        found = relu_autoencoder(x, weight, bias + shift, decoder)
        assert found.output.shape == (len(x), N_OUT)
        assert found.sums.tolist() == [0.0] * len(x)
        total = found.output.sum() + found.sums.sum()
        for gradient in torch.autograd.grad(total, (weight, decoder), retain_graph=True):
            assert gradient.abs().sum() == 0


def test_nan_stays_in_its_row() -> None:
    x, weight, bias, decoder, _, _ = (tensor.detach() for tensor in inputs())
    x[3, 1] = torch.nan
    found = relu_autoencoder(x, weight, bias, decoder)
    for result in (found.output.isnan().all(1), found.output.isnan().any(1), found.sums.isnan()):
        assert result.tolist() == [False, False, False, True, False]


@pytest.mark.parametrize("way", ["dense"], indirect=True)
def test_which_way_is_chosen(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sparse_relu, "_SPARSE", 0.1)
    x, weight, decoder = torch.randn(8, N), torch.randn(100, N), torch.randn(100, N_OUT)
    assert relu_autoencoder(x, weight, torch.zeros(100), decoder).indices is None
    rare = relu_autoencoder(x, weight, torch.full((100,), -100.0), decoder)
    assert rare.indices is not None
