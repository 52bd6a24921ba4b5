"""Both ways of a ReLU step equal the plain one, in value and in the gradient of every input."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from neuron_explainer.kernels.relu_step import Tuning, relu_autoencoder
from neuron_explainer.kernels.workspace import Workspace

B, N, L, N_OUT = 5, 6, 12, 7


# Chunks of 2, 2 and 1 tokens, whatever the share of active latents.
TUNINGS = {
    "dense": Tuning(2 * L, 2 * L, sparse_share=-1.0),
    "sparse": Tuning(2 * L, 2 * L, sparse_share=2.0),
}


@pytest.fixture(params=[*TUNINGS])
def tuning(request: pytest.FixtureRequest) -> Tuning:
    torch.manual_seed(0)
    return TUNINGS[request.param]


def drawn(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64).requires_grad_()


def inputs() -> tuple[Tensor, ...]:
    return drawn(B, N), drawn(L, N), drawn(L), drawn(L, N_OUT), drawn(N), drawn(L)


def plain(
    x: Tensor, weight: Tensor, bias: Tensor, decoder: Tensor, pre_bias: Tensor, scale: Tensor
) -> tuple[Tensor, Tensor]:
    latents = F.linear(x - pre_bias, weight, bias).relu()
    return latents @ decoder, latents @ scale


def test_equals_the_plain_step(tuning: Tuning) -> None:
    def ours(
        x: Tensor, weight: Tensor, bias: Tensor, decoder: Tensor, pre_bias: Tensor, scale: Tensor
    ) -> tuple[Tensor, Tensor]:
        return relu_autoencoder(
            x, weight, bias, decoder, pre_bias=pre_bias, scale=scale, tuning=tuning
        )[:2]

    given = inputs()
    torch.testing.assert_close(ours(*given), plain(*given))
    assert torch.autograd.gradcheck(ours, given)


def test_without_pre_bias_and_scale(tuning: Tuning) -> None:
    def ours(*given: Tensor) -> tuple[Tensor, Tensor]:
        return relu_autoencoder(*given, tuning=tuning)[:2]

    x, weight, bias, decoder, _, _ = inputs()
    expected = plain(x, weight, bias, decoder, torch.zeros(N).double(), torch.ones(L).double())
    torch.testing.assert_close(ours(x, weight, bias, decoder), expected)
    assert torch.autograd.gradcheck(ours, (x, weight, bias, decoder))


def test_latents(tuning: Tuning) -> None:
    x, weight, bias, decoder, _, _ = inputs()
    expected = F.linear(x, weight, bias).relu().detach()
    found = relu_autoencoder(x, weight, bias, decoder, tuning=tuning)
    if tuning == TUNINGS["dense"]:
        assert found.indices is None
        torch.testing.assert_close(found.values, expected)
        return
    torch.testing.assert_close(found.values, expected[expected > 0])
    assert found.indices is not None
    assert found.indices.tolist() == (expected > 0).nonzero()[:, 1].tolist()


def test_no_tokens_and_no_active_latents(tuning: Tuning) -> None:
    _, weight, bias, decoder, _, _ = inputs()
    for x, shift in ((drawn(0, N), 0.0), (drawn(B, N), -1e9)):
        found = relu_autoencoder(x, weight, bias + shift, decoder, tuning=tuning)
        assert found.output.shape == (len(x), N_OUT)
        assert found.sums.tolist() == [0.0] * len(x)
        total = found.output.sum() + found.sums.sum()
        for gradient in torch.autograd.grad(total, (weight, decoder), retain_graph=True):
            assert gradient.abs().sum() == 0


def test_nan_stays_in_its_row(tuning: Tuning) -> None:
    x, weight, bias, decoder, _, _ = (tensor.detach() for tensor in inputs())
    x[3, 1] = torch.nan
    found = relu_autoencoder(x, weight, bias, decoder, tuning=tuning)
    for result in (found.output.isnan().all(1), found.output.isnan().any(1), found.sums.isnan()):
        assert result.tolist() == [False, False, False, True, False]


def test_which_way_is_chosen() -> None:
    x, weight, decoder = torch.randn(8, N), torch.randn(100, N), torch.randn(100, N_OUT)
    assert relu_autoencoder(x, weight, torch.zeros(100), decoder).indices is None
    rare = relu_autoencoder(x, weight, torch.full((100,), -100.0), decoder)
    assert rare.indices is not None


def test_latents_outlive_the_step() -> None:
    """A callback may keep them: the workspace is for what a step is done with."""
    workspace = Workspace(min_bytes=0)
    x, weight, bias, decoder, _, _ = inputs()
    kept = relu_autoencoder(x, weight, bias, decoder, workspace=workspace, tuning=TUNINGS["dense"])
    before = kept.values.clone()
    for _ in range(2):
        workspace.next_step()
        found = relu_autoencoder(-x, weight, bias, decoder, workspace=workspace)
        torch.autograd.grad(found.output.sum() + found.sums.sum(), (weight, decoder))
    assert torch.equal(kept.values, before)
