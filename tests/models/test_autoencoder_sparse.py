"""Sparse latents and the ways without a graph: always the formula's values and gradients."""

import copy
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from neuron_explainer.errors import InputError
from neuron_explainer.models.autoencoder import Autoencoder, BatchTopK, JumpReLU, TopK
from neuron_explainer.models.autoencoders.latents import Latents
from neuron_explainer.models.autoencoders.nonlinearities import Fista, Gated, GroupMax

L, N = 24, 6

ACTIVATIONS = {
    "ReLU": lambda: nn.ReLU(),
    "Identity": lambda: nn.Identity(),
    "TopK": lambda: TopK(3),
    "TopK-identity": lambda: TopK(20, nn.Identity()),
    "JumpReLU": lambda: JumpReLU(torch.linspace(0, 1.5, L)),
    "BatchTopK": lambda: BatchTopK(1.2, k=3),
    "GroupMax": lambda: GroupMax(4),
    "Gated": lambda: Gated(*torch.randn(3, L, generator=torch.Generator().manual_seed(5)) / 3),
    "Fista": lambda: Fista(0.3),
}
SHAPES: dict[str, dict[str, Any]] = {
    "plain": {},
    "tied": {"tied": True},
    "layer_norm": {"input_normalization": "layer_norm"},
    "transcoder": {"n_outputs": 4, "skip": True},
    "glu": {"glu": True, "post_bias": True, "input_normalization": "rms"},
}


def make(activation="TopK", shape="plain", dtype=torch.float64):
    settings: dict[str, Any] = {"tied": True} if activation == "Fista" else SHAPES[shape]
    ae = Autoencoder(L, N, ACTIVATIONS[activation](), **settings)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in ae.named_parameters():
            if not name.startswith("activation"):
                parameter.copy_(torch.randn(parameter.shape, generator=generator))
    return ae.to(dtype)


def inputs(*shape, dtype=torch.float64):
    return torch.randn(*shape, N, generator=torch.Generator().manual_seed(1), dtype=dtype)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_without_gradients_all_is_as_with_them(activation, shape):
    few = {"chunk_bytes": 3 * L * 8}
    ae, x = make(activation, shape), inputs(2, 5)
    with_graph = ae(x)
    with torch.no_grad():
        torch.testing.assert_close(ae.encode(x), with_graph.latents)
        torch.testing.assert_close(ae.reconstruct(x, **few), with_graph.recons)
        latents = ae.encode_sparse(x, **few)
        torch.testing.assert_close(latents.dense(), with_graph.latents)
        torch.testing.assert_close(ae.decode(latents, ae.normalize(x)[1]), with_graph.recons)
        for code in (ae.code(x), ae.code_sparse(x)):
            torch.testing.assert_close(code.decode(code.latents), with_graph.recons)
        assert ae.reconstruct(x[:0]).shape == (0, *with_graph.recons.shape[1:])
        assert ae.encode_sparse(x[:0]).dense().shape == (0, 5, L)
        torch.testing.assert_close(ae.reconstruct(x[0, 0]), with_graph.recons[0, 0])


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("activation", [name for name in ACTIVATIONS if name != "Fista"])
def test_gradients_through_sparse_latents_are_those_through_dense_ones(activation, shape):
    ae, x = make(activation, shape), inputs(7).requires_grad_()
    ways = [
        lambda: ae(x).recons,
        lambda: ae.decode(ae.encode_sparse(x), ae.normalize(x)[1]),
        lambda: ae.reconstruct(x),
        lambda: ae.decode(ae.encode(x), ae.normalize(x)[1]),
    ]
    weights = [x, *ae.parameters()]
    gradients = [
        torch.autograd.grad(way().square().sum(), weights, allow_unused=True) for way in ways
    ]
    assert any(gradient is not None for gradient in gradients[0])
    for other in gradients[1:]:
        torch.testing.assert_close(other, gradients[0])
    assert torch.autograd.gradcheck(lambda x: ae.encode_sparse(x).values, (x,))


def test_a_gradient_of_the_input_alone_is_enough():
    ae, x = make().requires_grad_(False), inputs(4).requires_grad_()
    assert ae.reconstruct(x).requires_grad
    assert ae.encode_sparse(x).values.requires_grad
    assert not ae.reconstruct(x.detach()).requires_grad


def test_topk_gives_k_entries_largest_first():
    ae, x = make(), inputs(5)
    for graph in (True, False):
        with torch.set_grad_enabled(graph):
            values, indices, n_latents = ae.encode_sparse(x)
        assert values.shape == indices.shape == (5, 3)
        assert n_latents == L
        assert (values.diff(dim=1) <= 0).all()


def test_wrong_sparse_latents_are_named():
    ae = make()
    values, indices = torch.zeros(2, 3, dtype=torch.float64), torch.zeros(2, 3, dtype=torch.int64)
    with pytest.raises(InputError, match="expected latents out of 24, found some out of 25"):
        ae.decode(Latents(values, indices, 25))
    with pytest.raises(
        InputError, match=r"weights are torch\.float64, the input is torch\.float32"
    ):
        ae.decode(Latents(values.float(), indices, L))
    with pytest.raises(InputError, match="expected input of width 6"), torch.no_grad():
        ae.reconstruct(torch.zeros(2, 5, dtype=torch.float64))


class LargestTensor(TorchDispatchMode):
    """Records the largest number of elements that an operation made."""

    def __init__(self):
        super().__init__()
        self.numel = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        made = out if isinstance(out, tuple | list) else [out]
        sizes = [x.numel() for x in made if isinstance(x, torch.Tensor)]
        self.numel = max(self.numel, *sizes, 0)
        return out


@pytest.mark.parametrize("activation", ["TopK", "BatchTopK", "ReLU"])
def test_dense_latents_are_never_held_for_all_rows(activation):
    ae, x = make(activation, dtype=torch.float32), inputs(100, dtype=torch.float32)
    with torch.no_grad(), LargestTensor() as largest:
        ae.reconstruct(x, chunk_bytes=8 * L * 4)
    assert 8 * L <= largest.numel < 100 * L / 2


@pytest.mark.parametrize("share", [0.0, 1.0])
def test_few_latents_are_decoded_one_by_one_and_many_by_a_product(share, monkeypatch):
    used = []
    whole = Latents.decode
    monkeypatch.setattr(Latents, "decode", lambda *args: used.append(1) or whole(*args))  # type: ignore[func-returns-value]
    ae, x = make("BatchTopK"), inputs(9)
    with torch.no_grad():
        torch.testing.assert_close(ae.reconstruct(x, sparse_share=share), ae(x).recons)
    assert bool(used) == bool(share)


def test_hooks_on_modules_inside_are_still_called():
    ae, x, calls = make("ReLU"), inputs(4), []
    ae.activation.register_forward_hook(lambda *args: calls.append(1))
    with torch.no_grad():
        ae.reconstruct(x)
        ae.encode(x)
    assert len(calls) == 2


@pytest.fixture
def certified(monkeypatch):
    monkeypatch.setenv("NEURON_EXPLAINER_CERTIFIED", "1")
    generator = torch.Generator().manual_seed(0)
    ae = Autoencoder(600, 32, TopK(4)).requires_grad_(False)
    for parameter in ae.parameters():
        parameter.copy_(torch.randn(parameter.shape, generator=generator))
    return ae, torch.randn(50, 32, generator=generator)


def test_certified_is_what_float32_is(certified, monkeypatch):
    ae, x = certified
    fast = [ae.reconstruct(x), ae.encode(x), *ae.encode_sparse(x)[:2]]
    monkeypatch.setenv("NEURON_EXPLAINER_CERTIFIED", "0")
    slow = [ae.reconstruct(x), ae.encode(x), *ae.encode_sparse(x)[:2]]
    for one, other in zip(fast, slow, strict=True):
        torch.testing.assert_close(one, other, atol=1e-4, rtol=1e-5)


WAYS_OF_CHANGING_WEIGHTS = {
    "in place": lambda ae, p: ae.encoder.weight.neg_(),
    "scaled through .data": lambda ae, p: ae.encoder.weight.data.mul_(2),
    "latents in another order, through .data": lambda ae, p: ae.encoder.weight.data.__setitem__(
        p, ae.encoder.weight.data[p.flip(0)].clone()
    ),
    "biases exchanged, through .data": lambda ae, p: ae.latent_bias.data.__setitem__(
        p, ae.latent_bias.data[p.flip(0)].clone()
    ),
    "latents in another order, through numpy": lambda ae, p: ae.encoder.weight.numpy().__setitem__(
        p.numpy(), ae.encoder.weight.numpy()[p.flip(0).numpy()].copy()
    ),
    "another pre_bias": lambda ae, p: ae.pre_bias.add_(3),
}


@pytest.mark.parametrize("change", WAYS_OF_CHANGING_WEIGHTS.values(), ids=WAYS_OF_CHANGING_WEIGHTS)
def test_latents_are_those_of_the_weights_as_they_are(certified, change):
    # A copy of the weights, recognised by a sum that is blind to their order, would still serve.
    ae, x = certified
    before = ae.encode(x)
    change(ae, torch.randperm(600, generator=torch.Generator().manual_seed(2))[:400])
    pre_act = (x - ae.pre_bias).double() @ ae.encoder.weight.double().T + ae.latent_bias.double()
    top = pre_act.topk(4)
    expected = torch.zeros_like(pre_act).scatter(1, top.indices, top.values.relu()).float()
    after = ae.encode(x)
    torch.testing.assert_close(after, expected, atol=1e-4, rtol=1e-5)
    assert not torch.allclose(before, after)
    torch.testing.assert_close(ae.reconstruct(x), ae(x).recons, atol=1e-3, rtol=1e-5)


def test_the_decoder_lies_in_memory_latent_by_latent():
    ae = make("ReLU", dtype=torch.float32)
    for other in (ae, copy.deepcopy(ae), ae.half(), Autoencoder.from_state_dict(ae.state_dict())):
        assert other.decoder.weight.shape == (N, L)
        assert other.decoder.weight.t().is_contiguous()
    weight = ae.decoder.weight.detach().contiguous()
    ae.decoder.weight = nn.Parameter(weight)  # any other layout does, only slower
    latents = Latents.of(torch.eye(L, dtype=ae.dtype))
    torch.testing.assert_close(ae.decode(latents) - ae.pre_bias, weight.t(), atol=1e-2, rtol=1e-2)
