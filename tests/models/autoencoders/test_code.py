"""Encoding and decoding an input costs one normalisation and, with a skip connection, one product."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from neuron_explainer.dictionaries import finetune_decoder
from neuron_explainer.evaluation.evaluate import measure
from neuron_explainer.models.autoencoder import Autoencoder, JumpReLU, TopK
from neuron_explainer.models.autoencoders.input_normalization import normalize_input
from neuron_explainer.models.autoencoders.pruned import omit_least_active_latents
from neuron_explainer.models.hooks import AutoencoderHooks

N, L = 6, 16
KINDS: dict[str, Callable[[], Any]] = {
    "ReLU": lambda: None,
    "TopK": lambda: TopK(3),
    "JumpReLU": lambda: JumpReLU(torch.full((L,), 0.2)),
}


@pytest.fixture
def normalisations(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Grows by one at each normalisation."""
    counted: list[int] = []

    def counting(*args: Any) -> Any:
        counted.append(1)
        return normalize_input(*args)

    monkeypatch.setattr("neuron_explainer.models.autoencoder.normalize_input", counting)
    return counted


def make(kind: str, skip: bool = True) -> tuple[Autoencoder, list[int]]:
    """An autoencoder, and a list that grows at each product of its skip connection."""
    torch.manual_seed(0)
    ae = Autoencoder(L, N, KINDS[kind](), input_normalization="layer_norm", skip=skip)
    products: list[int] = []
    if ae.skip is not None:
        forward = ae.skip.forward

        def counting(x: Tensor) -> Tensor:
            products.append(1)
            return forward(x)

        # Not a hook: with a hook on a module inside, every path is the formula's.
        object.__setattr__(ae.skip, "forward", counting)
    return ae.requires_grad_(False), products


WAYS: dict[str, Callable[[Autoencoder, Tensor], Any]] = {
    "forward": lambda ae, x: ae(x),
    "reconstruct": lambda ae, x: ae.reconstruct(x),
    "code": lambda ae, x: _decoded(ae.code(x)),
    "code_sparse": lambda ae, x: _decoded(ae.code_sparse(x)),
    "evaluation": lambda ae, x: measure(ae, [x]),
    "hooks": lambda ae, x: _hooked(ae)(x),
    "fine-tuning": lambda ae, x: finetune_decoder(ae, [x], progress=False),
}


def _hooked(ae: Autoencoder) -> AutoencoderHooks:
    hooks = AutoencoderHooks.from_autoencoder(ae, add_error=True)
    hooks.latents.append_fwd(lambda latents: latents)  # with none, the input itself is the result
    return hooks


def _decoded(code: Any) -> Tensor:
    decoded: Tensor = code.decode(code.latents)
    return decoded


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("kind", KINDS)
def test_one_normalisation_and_one_product(kind, way, normalisations):
    ae, products = make(kind)
    WAYS[way](ae, torch.randn(5, N))
    assert len(normalisations) == 1
    assert len(products) == 1


@pytest.mark.parametrize("kind", KINDS)
def test_encoding_needs_no_product_of_the_skip_connection(kind, normalisations):
    ae, products = make(kind)
    x = torch.randn(5, N)
    for encode in (ae.encode, ae.encode_sparse, ae.encode_pre_act):
        encode(x)
    assert len(normalisations) == 3
    assert not products


@pytest.mark.parametrize("skip", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_a_code_decodes_for_its_own_input(kind, skip):
    ae, _ = make(kind, skip)
    first, second = torch.randn(2, 4, N)
    dense, sparse = ae.code(first), ae.code_sparse(second)
    torch.testing.assert_close(_decoded(dense), ae(first).recons)
    torch.testing.assert_close(_decoded(sparse), ae(second).recons)
    edited = dense.latents + 1
    expected = ae.decode(edited, ae.normalize(first)[1])
    torch.testing.assert_close(dense.decode(edited), expected)


@pytest.mark.parametrize("kind", KINDS)
def test_with_latents_left_out_too(kind, normalisations):
    ae, _ = make(kind)
    ae.latents_activation_frequency[::2] = 0.5
    pruned = omit_least_active_latents(ae, L // 2)
    x = torch.randn(5, N)
    expected = pruned(x)
    normalisations.clear()
    for code in (pruned.code(x), pruned.code_sparse(x)):
        torch.testing.assert_close(code.decode(code.latents), expected.recons)
    assert len(normalisations) == 2
    assert pruned.code(x).latents.shape == (5, L)


def test_a_copy_with_other_weights_keeps_the_facts():
    facts: dict[str, Any] = {
        "input_normalization": "rms",
        "location": "2/mlp.pre_act",
        "output_location": "2/resid.torso.delta_mlp",
        "model_name": "m",
        "metadata": {"a": 1},
    }
    ae = Autoencoder(L, N, n_outputs=4, **facts)
    other = Autoencoder.from_state_dict(ae.state_dict(), **ae.facts)
    assert other.facts == ae.facts
    assert {name: fact for name, fact in ae.facts.items() if "location" not in name} == {
        name: fact for name, fact in facts.items() if "location" not in name
    }
    assert str(ae.facts["location"]) == "2/mlp.pre_act"
    misspelt: dict[str, Any] = {"loction": "2/mlp.pre_act"}
    for make_one in (
        lambda: Autoencoder(L, N, **misspelt),
        lambda: Autoencoder.from_state_dict({}, **misspelt),
    ):
        with pytest.raises(TypeError, match="unexpected keyword argument 'loction'"):
            make_one()
