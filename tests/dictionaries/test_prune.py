"""Pruning: the mask is its three criteria, and what it leaves out is gone whatever the activation."""

from pathlib import Path
from typing import Any

import pytest
import torch

from neuron_explainer.dictionaries.prune import prune
from neuron_explainer.errors import InputError
from neuron_explainer.evaluation.latent_activity import LatentActivity
from neuron_explainer.models.autoencoder import Autoencoder, BatchTopK, JumpReLU, TopK
from neuron_explainer.models.autoencoders.nonlinearities import Gated
from neuron_explainer.models.autoencoders.pruned import (
    count_dead_latents,
    get_decoder_weight,
    omit_dead_latents,
)

N, N_LATENTS = 6, 20


def dictionary(activation: Any = None, tied: bool = False, **kwargs: Any) -> Autoencoder:
    torch.manual_seed(0)
    found = Autoencoder(
        N_LATENTS, N, activation, tied, location="3/mlp.post_act", dtype=torch.float64, **kwargs
    )
    with torch.no_grad():
        for parameter in found.parameters():
            parameter.normal_(0, 0.6)
    return found.requires_grad_(False)


def tokens(n: int = 300, seed: int = 1) -> torch.Tensor:
    return torch.randn(n, N, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


BOUNDS: dict[str, Any] = {"min_frequency": 0.3, "min_max_activation": 3.5, "min_decoder_norm": 1.2}


def expected_mask(autoencoder: Autoencoder, x: torch.Tensor) -> list[bool]:
    latents = autoencoder.encode(x).numpy()
    norms = [float((column**2).sum() ** 0.5) for column in autoencoder.decoder.weight.T.numpy()]
    return [
        (latents[:, i] != 0).sum() > 0.3 * len(x) and latents[:, i].max() > 3.5 and norms[i] >= 1.2
        for i in range(N_LATENTS)
    ]


@pytest.mark.parametrize(
    "activation",
    [
        None,
        TopK(8),
        BatchTopK(0.3),
        JumpReLU(torch.linspace(-0.5, 1, N_LATENTS).double()),
        Gated(*(torch.linspace(a, 1, N_LATENTS).double() for a in (-0.4, -0.3, -0.5))),
    ],
    ids=lambda a: type(a).__name__,
)
def test_the_mask_is_its_criteria_and_the_rest_is_gone(activation: Any) -> None:
    whole, x = dictionary(activation), tokens()
    found = prune(whole, [x[:100], x[100:].view(4, 50, N)], **BOUNDS)
    expected = expected_mask(whole, x)
    assert found.kept.tolist() == expected
    assert 0 < found.n_kept == sum(expected) < N_LATENTS
    assert found.n_tokens == 300
    assert min(found.too_rare, found.too_weak, found.too_short) > 0

    latents = found.autoencoder.encode(x)
    assert (latents[:, ~found.kept] == 0).all()
    if not isinstance(activation, TopK):  # with which another latent takes the place
        masked = whole.encode(x) * found.kept
        assert torch.equal(latents, masked)
        assert torch.allclose(found.autoencoder.reconstruct(x), whole.decode(masked))
    small = prune(whole, [x], **BOUNDS, keep_indices=False).autoencoder
    assert small.n_latents == found.n_kept
    assert torch.allclose(small.encode(x), latents[:, found.kept])
    assert torch.allclose(small.reconstruct(x), found.autoencoder.reconstruct(x))


@pytest.mark.parametrize("kwargs", [{"tied": True}, {"glu": True}, {"input_normalization": "rms"}])
def test_of_any_kind(kwargs: dict[str, Any], tmp_path: Path) -> None:
    whole, x = dictionary(**kwargs), tokens()
    found = prune(whole, [x], min_frequency=0.3, min_max_activation=0.1, min_decoder_norm=1.3)
    assert 0 < found.n_kept < N_LATENTS
    assert torch.equal(found.autoencoder.encode(x), whole.encode(x) * found.kept)
    found.autoencoder.save(tmp_path / "ae")
    again = Autoencoder.load(tmp_path / "ae", dtype=None)
    assert torch.equal(again.reconstruct(x), found.autoencoder.reconstruct(x))
    assert not get_decoder_weight(again)[~found.kept].any()
    assert again.location == whole.location
    assert again.metadata["pruned"]["n_kept"] == found.n_kept
    assert count_dead_latents(again) == N_LATENTS - found.n_kept
    assert torch.allclose(omit_dead_latents(again).reconstruct(x), again.reconstruct(x))


def test_the_given_one_is_left_as_it_is() -> None:
    whole = dictionary()
    before = {name: value.clone() for name, value in whole.named_parameters()}
    prune(whole, [tokens()], **BOUNDS)
    assert all(torch.equal(value, before[name]) for name, value in whole.named_parameters())
    assert whole.metadata == {}


def test_bounds_are_strict_or_not_as_documented() -> None:
    whole = dictionary()
    with torch.no_grad():
        whole.decoder.weight.copy_(torch.eye(N, N_LATENTS))  # lengths 1 and 0
        whole.decoder.weight[0, 6] = 0.99
        whole.decoder.weight[0, 7] = 0.98
    activity = LatentActivity(N_LATENTS)
    activity.n_tokens = 1_000_000
    activity.fired += 2
    activity.largest += 1.5
    activity.fired[0] = 1  # exactly 1e-6 of the tokens
    activity.largest[1] = 1.0
    found = prune(whole, activity)
    assert found.kept.nonzero().flatten().tolist() == [2, 3, 4, 5, 6]
    assert (found.too_rare, found.too_weak, found.too_short) == (1, 1, 13)


def test_bad_input() -> None:
    with pytest.raises(InputError, match="no tokens were given"):
        prune(dictionary(), [])
    with pytest.raises(
        InputError, match=r"no latent would be left: of 20, 0 fired .* 20 were never"
    ):
        prune(dictionary(), [tokens()], min_max_activation=1e6)
