"""Sparse latents against the dense ones that they stand for."""

import torch

from neuron_explainer.models.autoencoders.latents import Latents


def dense_latents(*shape):
    generator = torch.Generator().manual_seed(0)
    values = torch.randn(*shape, generator=generator, dtype=torch.float64)
    return torch.where(values > 0.4, values, 0.0)


def test_there_and_back():
    dense = dense_latents(3, 4, 11)
    dense[1, 2] = 0
    latents = Latents.of(dense)
    assert latents.n_latents == 11
    assert latents.values.shape == latents.indices.shape == (3, 4, int((dense != 0).sum(-1).max()))
    assert torch.equal(latents.dense(), dense)
    assert not latents.values[1, 2].any()


def test_nothing_active_and_no_rows():
    for dense in (torch.zeros(3, 5), torch.zeros(0, 5), torch.zeros(2, 0, 5), torch.zeros(5)):
        latents = Latents.of(dense)
        assert torch.equal(latents.dense(), dense)
        decoded = latents.decode(torch.ones(5, 2))
        assert torch.equal(decoded, torch.zeros(*dense.shape[:-1], 2))


def test_a_nan_is_active():
    dense = torch.tensor([[0.0, float("nan"), 2.0]])
    assert Latents.of(dense).dense().isnan().tolist() == [[False, True, False]]


def test_decoding_is_the_matrix_product():
    dense = dense_latents(2, 3, 11)
    rows = torch.randn(11, 4, dtype=torch.float64)
    torch.testing.assert_close(Latents.of(dense).decode(rows), dense @ rows)


def test_gradients_are_derivatives():
    dense = dense_latents(3, 7)
    rows = torch.randn(7, 2, dtype=torch.float64, requires_grad=True)
    latents = Latents.of(dense)
    values = latents.values.clone().requires_grad_()

    def decode(values, rows):
        return Latents(values, latents.indices, 7).decode(rows)

    assert torch.autograd.gradcheck(decode, (values, rows))
    assert torch.autograd.gradcheck(lambda v: Latents(v, latents.indices, 7).dense(), (values,))
    dense.requires_grad_()
    (grad,) = torch.autograd.grad(Latents.of(dense).values.square().sum(), dense)
    torch.testing.assert_close(grad, 2 * dense.detach())
