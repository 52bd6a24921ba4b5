"""``autoencoder.directions``: what one unit of each latent adds to the reconstruction, for every kind."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from neuron_explainer.models.autoencoder import Autoencoder, BatchTopK, JumpReLU, TopK
from neuron_explainer.models.autoencoders.nonlinearities import Fista, Gated, GroupMax
from neuron_explainer.models.autoencoders.pruned import (
    get_decoder_weight,
    omit_least_active_latents,
)

N, L, N_OUTPUTS = 6, 16, 5

KINDS: dict[str, Callable[[], Autoencoder]] = {
    "ReLU": lambda: Autoencoder(L, N),
    "TopK": lambda: Autoencoder(L, N, TopK(3)),
    "tied": lambda: Autoencoder(L, N, TopK(3), tied=True),
    "JumpReLU": lambda: Autoencoder(L, N, JumpReLU(torch.full((L,), 0.2))),
    "BatchTopK": lambda: Autoencoder(L, N, BatchTopK(0.1, 3), post_bias=True),
    "GroupMax": lambda: Autoencoder(L, N, GroupMax(4)),
    "two gates": lambda: Autoencoder(L, N, Gated(*torch.randn(3, L))),
    "FISTA": lambda: Autoencoder(L, N, Fista(0.1), tied=True),
    "groups": lambda: Autoencoder(L, N, group_sizes=[4, 12]),
    "gated": lambda: Autoencoder(L, N, glu=True),
    "transcoder": lambda: Autoencoder(L, N, n_outputs=N_OUTPUTS),
    "transcoder with a skip": lambda: Autoencoder(L, N, n_outputs=N_OUTPUTS, skip=True),
    "layer norm": lambda: Autoencoder(L, N, input_normalization="layer_norm"),
    "rms": lambda: Autoencoder(L, N, TopK(3), input_normalization="rms"),
    "center": lambda: Autoencoder(L, N, input_normalization="center"),
}


def make(kind: str) -> Autoencoder:
    """Every parameter is random, biases too."""
    torch.manual_seed(0)
    ae = KINDS[kind]()
    with torch.no_grad():
        for parameter in ae.parameters():
            parameter.copy_(torch.randn(parameter.shape))
    return ae.double().requires_grad_(False)


def check(ae: Autoencoder, directions: Tensor) -> None:
    """One unit of a latent moves the reconstruction by its direction, in normalised units."""
    x = torch.randn(N, dtype=torch.float64)
    code = ae.code(x)
    scale = 1.0
    if code.stats is not None and code.stats.std is not None and not ae.is_transcoder:
        scale = float(code.stats.std)
    assert directions.shape == (ae.n_latents, ae.n_outputs)
    base = code.decode(code.latents)
    for latent in range(ae.n_latents):
        if not directions[latent].any():
            continue
        edited = code.latents.clone()
        edited[latent] += 1
        torch.testing.assert_close(code.decode(edited) - base, scale * directions[latent])


@pytest.mark.parametrize("kind", KINDS)
def test_one_unit_of_a_latent_moves_the_output_by_its_direction(kind: str) -> None:
    ae = make(kind)
    assert ae.directions.any(dim=1).all()
    check(ae, ae.directions)
    assert torch.equal(ae.directions[3], ae.decoder.weight[:, 3])
    assert torch.equal(get_decoder_weight(ae), ae.directions)


def test_latents_that_were_left_out_have_rows_of_zeros() -> None:
    ae = make("TopK")
    ae.latents_activation_frequency = torch.linspace(0, 1, L)
    pruned = omit_least_active_latents(ae, 10)
    assert not pruned.directions[:6].any()
    assert torch.equal(pruned.directions[6:], ae.directions[6:])
    check(pruned, pruned.directions)


def test_they_carry_gradients() -> None:
    ae = Autoencoder(L, N).requires_grad_(True)
    ae.directions[3].sum().backward()
    assert ae.decoder.weight.grad is not None
    assert ae.decoder.weight.grad[:, 3].eq(1).all()
    assert ae.decoder.weight.grad.count_nonzero() == N
