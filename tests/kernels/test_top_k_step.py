"""The sparse pieces of a step equal their dense twins, in value and in the gradient of every input."""

from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from neuron_explainer.errors import InputError
from neuron_explainer.kernels import top_k_step

B, N, L, N_OUT, K = 5, 6, 24, 7, 3

# In chunks of 2, 2 and 1 tokens going forward, in blocks of 10, 10 and 4 latents going backward.
encode_top_k = partial(top_k_step.encode_top_k, chunk_bytes=2 * L * 8, block_elements=10 * N)
decode_rows = partial(top_k_step.decode_rows, block_elements=10 * N)


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


def drawn(*shape: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(*shape, dtype=dtype).requires_grad_()


def dense_twin(x: Tensor, weight: Tensor, bias: Tensor, k: int) -> tuple[Tensor, Tensor]:
    values, indices = F.linear(x, weight, bias).topk(k, dim=1)
    return values, indices


def dense_decode(values: Tensor, indices: Tensor, decoder: Tensor) -> Tensor:
    return values.new_zeros(len(values), len(decoder)).scatter_add(1, indices, values) @ decoder


@pytest.mark.parametrize("k", [1, K, L])
def test_encode_gradients(k: int) -> None:
    inputs = (drawn(B, N), drawn(L, N), drawn(L))
    assert torch.autograd.gradcheck(lambda x, w, b: encode_top_k(x, w, b, k)[0], inputs)


def test_encode_gradients_among_some_latents() -> None:
    latents = torch.tensor([20, 3, 7, 11, 2])
    inputs = (drawn(B, N), drawn(L, N), drawn(L))
    assert torch.autograd.gradcheck(
        lambda x, w, b: encode_top_k(x, w, b, 2, latents=latents)[0], inputs
    )


def test_encode_gradients_with_pre_bias() -> None:
    def values(x: Tensor, weight: Tensor, bias: Tensor, pre_bias: Tensor) -> Tensor:
        return encode_top_k(x, weight, bias, K, pre_bias=pre_bias)[0]

    inputs = (drawn(B, N), drawn(L, N), drawn(L), drawn(N))
    assert torch.autograd.gradcheck(values, inputs)
    x, weight, bias, pre_bias = inputs
    torch.testing.assert_close(values(*inputs), dense_twin(x - pre_bias, weight, bias, K)[0])


@pytest.mark.parametrize("repeated", [False, True])
def test_decode_gradients(repeated: bool) -> None:
    indices = torch.randint(L, (B, K)) if not repeated else torch.full((B, K), 4)
    assert torch.autograd.gradcheck(
        lambda v, d: decode_rows(v, indices, d), (drawn(B, K), drawn(L, N_OUT))
    )


@pytest.mark.parametrize("k", [1, K, 11, L])
def test_encode_equals_the_dense_twin(k: int) -> None:
    x, weight, bias = drawn(B, N), drawn(L, N), drawn(L)
    values, indices = encode_top_k(x, weight, bias, k)
    expected, expected_indices = dense_twin(x, weight, bias, k)
    torch.testing.assert_close(values, expected)
    assert indices.tolist() == expected_indices.tolist()


def test_encode_among_some_latents() -> None:
    x, weight, bias = drawn(B, N), drawn(L, N), drawn(L)
    latents = torch.tensor([20, 3, 7, 11, 2])
    values, indices = encode_top_k(x, weight, bias, 2, latents=latents)
    expected, chosen = dense_twin(x, weight[latents], bias[latents], 2)
    torch.testing.assert_close(values, expected)
    assert indices.tolist() == latents[chosen].tolist()


def loss(encode: Any, decode: Any, inputs: list[Tensor], dead: Tensor) -> Tensor:
    """Reconstruction by k and by 4k latents, and AuxK: all that Gao et al. differentiate."""
    x, weight, bias, decoder, out_bias = inputs
    values, indices = encode(x, weight, bias, 4 * K)
    error = x - out_bias - decode(values[:, :K].relu(), indices[:, :K], decoder)
    multi = x - out_bias - decode(values.relu(), indices, decoder)
    aux_values, aux_indices = encode(x, weight, bias, 2, latents=dead)
    aux = error.detach() - decode(aux_values.relu(), aux_indices, decoder)
    total: Tensor = error.square().sum() + multi.square().sum() / 8 + aux.square().sum() / 32
    return total


def test_every_gradient_of_auxk_and_multi_topk() -> None:
    def encode(
        x: Tensor, weight: Tensor, bias: Tensor, k: int, latents: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        if latents is None:
            return dense_twin(x, weight, bias, k)
        values, chosen = dense_twin(x, weight[latents], bias[latents], k)
        return values, latents[chosen]

    inputs = [drawn(B, N), drawn(L, N), drawn(L), drawn(L, N), drawn(N)]
    dead = torch.tensor([1, 2, 5, 8, 13, 21])
    ours = loss(encode_top_k, decode_rows, inputs, dead)
    expected = loss(encode, dense_decode, inputs, dead)
    torch.testing.assert_close(ours, expected)
    for found, wanted in zip(
        torch.autograd.grad(ours, inputs), torch.autograd.grad(expected, inputs), strict=True
    ):
        assert wanted.abs().max() > 0
        torch.testing.assert_close(found, wanted)


def test_auxk_alone_trains_the_encoder() -> None:
    x, weight, bias, decoder = drawn(B, N), drawn(L, N), drawn(L), drawn(L, N)
    values, indices = encode_top_k(x, weight, bias, 2, latents=torch.arange(9, 15))
    decode_rows(values, indices, decoder).square().sum().backward()
    assert weight.grad is not None
    assert weight.grad[9:15].abs().sum() > 0
    assert weight.grad[:9].abs().sum() == weight.grad[15:].abs().sum() == 0


@pytest.mark.parametrize("certified", [False, True])
def test_in_float32(certified: bool) -> None:
    inputs = [drawn(64, 32, dtype=torch.float32), drawn(512, 32, dtype=torch.float32)]
    inputs += [drawn(512, dtype=torch.float32), drawn(512, 32, dtype=torch.float32)]

    def gradients(*wide: Tensor) -> tuple[Tensor, ...]:
        x, weight, bias, decoder = wide
        values, indices = encode_top_k(x, weight, bias, 8, certified=certified)
        return torch.autograd.grad(
            (decode_rows(values, indices, decoder) - x).square().mean(), wide
        )

    exact = gradients(*(tensor.detach().double().requires_grad_() for tensor in inputs))
    for found, wanted in zip(gradients(*inputs), exact, strict=True):
        torch.testing.assert_close(found.double(), wanted, rtol=1e-4, atol=1e-6)


def test_ties_go_to_one_latent_each() -> None:
    x, bias = torch.ones(2, N), torch.zeros(L)
    values, indices = encode_top_k(x, torch.ones(L, N), bias, K)
    assert values.tolist() == [[N] * K] * 2
    assert all(len(set(row)) == K for row in indices.tolist())


def test_fewer_positive_values_than_k() -> None:
    x, weight = torch.ones(1, N), -torch.ones(L, N)
    weight[7] = 1
    weight.requires_grad_()
    values, indices = encode_top_k(x, weight, torch.zeros(L), K)
    assert indices[0, 0] == 7
    assert values.tolist() == [[N, -N, -N]]
    decode_rows(values.relu(), indices, torch.ones(L, N_OUT)).sum().backward()
    assert weight.grad is not None
    assert weight.grad.abs().sum(1).nonzero().tolist() == [[7]]


def test_no_tokens() -> None:
    x, weight, bias, decoder = drawn(0, N), drawn(L, N), drawn(L), drawn(L, N_OUT)
    values, indices = encode_top_k(x, weight, bias, K)
    assert values.shape == indices.shape == (0, K)
    output = decode_rows(values, indices, decoder)
    assert output.shape == (0, N_OUT)
    for gradient in torch.autograd.grad(output.sum(), (weight, bias, decoder)):
        assert gradient.abs().sum() == 0


def test_nan_stays_in_its_row() -> None:
    x = torch.randn(B, N)
    x[2, 1] = torch.nan
    values, indices = encode_top_k(x, torch.randn(L, N), torch.zeros(L), K)
    output = decode_rows(values, indices, torch.randn(L, N_OUT))
    assert values.isnan().any(1).tolist() == [False, False, True, False, False]
    assert output.isnan().all(1).tolist() == [False, False, True, False, False]
    assert not output[[0, 1, 3, 4]].isnan().any()


def test_gradients_only_where_wanted() -> None:
    x, weight, bias = torch.randn(B, N), drawn(L, N, dtype=torch.float32), torch.zeros(L)
    values, _ = encode_top_k(x, weight, bias, K)
    values.sum().backward()
    assert weight.grad is not None
    assert x.grad is bias.grad is None


@pytest.mark.parametrize("k", [0, L + 1])
def test_k_out_of_range(k: int) -> None:
    with pytest.raises(InputError, match=f"from 1 to the {L} latents searched, found {k}"):
        encode_top_k(torch.ones(B, N), torch.ones(L, N), torch.ones(L), k)


def test_a_large_gradient_becomes_grad_without_a_copy() -> None:
    weight = torch.nn.Parameter(torch.ones(1 << 14, 256))
    values, _ = encode_top_k(torch.ones(2, 256), weight, torch.zeros(1 << 14), 1)
    seen: list[int] = []
    weight.register_hook(lambda grad: seen.append(grad.data_ptr()))
    values.sum().backward()
    assert weight.grad is not None
    assert [weight.grad.data_ptr()] == seen
    assert weight.grad.sum() == 2 * 256
