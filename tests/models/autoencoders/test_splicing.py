"""Spliced autoencoders compute what the formula says, and make dense latents only where a hook takes them."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from neuron_explainer.errors import InputError
from neuron_explainer.models.autoencoder import Autoencoder
from neuron_explainer.models.autoencoders.nonlinearities import JumpReLU, TopK
from neuron_explainer.models.autoencoders.pruned import omit_dead_latents
from neuron_explainer.models.hooks import AtLayers, AutoencoderHooks, TransformerHooks
from neuron_explainer.models.interventions import Edit, ablate, clamp, scale, set_to
from tests.conftest import make_model, random_tokens

PLACE = "1/resid.torso.delta_mlp"
MODEL = make_model(dtype=torch.float64)
TOKENS = random_tokens(2, 7, seed=1)


def make(kind: str) -> Autoencoder:
    torch.manual_seed(4)
    activation: Any = {
        "topk": TopK(5),
        "relu": torch.nn.ReLU(),
        "jumprelu": JumpReLU(torch.full((40,), 0.2, dtype=torch.float64)),
    }[kind]
    autoencoder = Autoencoder(
        40, 16, activation=activation, input_normalization="layer_norm", dtype=torch.float64
    )
    with torch.no_grad():
        for parameter in autoencoder.parameters():
            parameter.add_(0.3 * torch.randn(parameter.shape, dtype=parameter.dtype))
    return autoencoder.eval().requires_grad_(False)


def spliced(autoencoder: Autoencoder, add_error: bool, *hooks: Any) -> tuple[Tensor, Tensor]:
    """The activation before, and after passing through the autoencoder with hooks on latents."""
    inside = AutoencoderHooks.from_autoencoder(autoencoder, add_error)
    for hook in hooks:
        inside.latents.append_fwd(hook)
    with torch.no_grad():
        x = MODEL.capture(TOKENS, PLACE)[PLACE]
        tree = TransformerHooks().append_at(PLACE, inside)
        return x, MODEL.capture(TOKENS, PLACE, hooks=tree)[PLACE]


def formula(
    autoencoder: Autoencoder, x: Tensor, add_error: bool, edit: Callable[[Tensor], Tensor]
) -> Tensor:
    _, stats = autoencoder.normalize(x)
    latents = autoencoder.encode(x)
    recons = autoencoder.decode(edit(latents.clone()), stats)
    return recons + x - autoencoder.decode(latents, stats) if add_error else recons


def edit_of(make_edit: Callable[..., TransformerHooks], *args: Any) -> Any:
    """An intervention on latents as the hook that goes on them."""
    found = make_edit(PLACE, *args).resid.torso.delta_mlp.fwd._hooks[0]
    assert isinstance(found, AtLayers)
    (edit,) = found._hooks
    assert isinstance(edit, Edit)
    return replace(edit, units=replace(edit.units, latents=True))


@pytest.mark.parametrize("kind", ["topk", "relu", "jumprelu"])
@pytest.mark.parametrize("add_error", [True, False])
@pytest.mark.parametrize("pruned", [False, True])
def test_every_way_is_the_formula(kind: str, add_error: bool, pruned: bool) -> None:
    autoencoder = make(kind)
    if pruned:
        autoencoder.latents_activation_frequency.fill_(1)
        autoencoder.latents_activation_frequency[::7] = 0
        autoencoder = omit_dead_latents(autoencoder)

    def in_place(latents: Tensor) -> Tensor:
        latents[..., 3] = 1.5
        return latents

    x, after = spliced(autoencoder, add_error, in_place)
    torch.testing.assert_close(after, formula(autoencoder, x, add_error, in_place))
    x, after = spliced(autoencoder, add_error)
    expected = x if add_error else formula(autoencoder, x, False, lambda latents: latents)
    torch.testing.assert_close(after, expected)
    assert not add_error or torch.equal(after, x)
    x, after = spliced(autoencoder, add_error, lambda latents: 2 * latents)
    torch.testing.assert_close(after, formula(autoencoder, x, add_error, lambda x: 2 * x))


class NeverDense(Autoencoder):
    """An autoencoder whose dense latents nobody may ask for."""

    def encode(self, x: Tensor) -> Tensor:
        raise AssertionError("dense latents were made")

    def code(self, x: Tensor) -> Any:
        raise AssertionError("dense latents were made")


@pytest.mark.parametrize("add_error", [True, False])
def test_edits_of_some_latents_never_make_the_others(add_error: bool) -> None:
    autoencoder = make("topk")
    x = MODEL.capture(TOKENS, PLACE)[PLACE].detach()
    a, b, c = autoencoder.encode(x).sum(dim=(0, 1)).argsort(descending=True)[:3].tolist()
    hooks = [
        edit_of(ablate, a),
        edit_of(scale, 3.0, [b, a]),
        edit_of(set_to, 0.7, [c, 39, 0], 2),
        edit_of(clamp, None, 0.1, c),
    ]

    def plain(latents: Tensor) -> Tensor:
        latents[..., a] = 0
        latents[..., [a, b]] *= 3
        latents[:, 2, [c, 39, 0]] = 0.7
        latents[..., c] = latents[..., c].clamp(max=0.1)
        return latents

    expected = formula(autoencoder, x, add_error, plain)
    autoencoder.__class__ = NeverDense
    _, after = spliced(autoencoder, add_error, *hooks)
    torch.testing.assert_close(after, expected)
    with pytest.raises(AssertionError, match="dense latents"):
        spliced(autoencoder, add_error, lambda latents: latents)


def test_gradients_flow_through_the_formula() -> None:
    autoencoder = make("topk")
    x = torch.randn(1, 3, 16, dtype=torch.float64, requires_grad=True)
    hook = AutoencoderHooks.from_autoencoder(autoencoder, False)
    hook.latents.append_fwd(edit_of(scale, 2.0, [1, 2]))
    found = torch.autograd.grad(
        hook(x, layer=1, positions=torch.arange(3)[None]).square().sum(), x
    )[0]

    def plain(latents: Tensor) -> Tensor:
        return latents * torch.ones(40).double().index_fill(0, torch.tensor([1, 2]), 2.0)

    expected = torch.autograd.grad(formula(autoencoder, x, False, plain).square().sum(), x)[0]
    torch.testing.assert_close(found, expected)


def test_the_wrong_width_is_refused_even_where_nothing_would_change() -> None:
    autoencoder = Autoencoder(40, 12, activation=TopK(5), dtype=torch.float64)
    with pytest.raises(InputError, match="of width 12"):
        spliced(autoencoder.requires_grad_(False), True)
