"""How often latents fire and how large they get, added up over batches."""

import pytest
import torch

from neuron_explainer.evaluation.latent_activity import LatentActivity
from neuron_explainer.models.autoencoder import Autoencoder
from neuron_explainer.models.autoencoders.latents import Latents


def test_activity_adds_up() -> None:
    latents = torch.relu(torch.randn(50, 5, generator=torch.Generator().manual_seed(1)) - 0.5)
    one = LatentActivity(5).update(Latents.of(latents))
    parts = LatentActivity(5).update(Latents.of(latents[:20])).update(Latents.of(latents[:0]))
    parts.update(Latents.of(latents[20:].view(3, 10, 5)))
    for activity in (one, parts):
        assert activity.n_tokens == 50
        assert activity.fired.tolist() == (latents > 0).sum(0).tolist()
        assert activity.largest.tolist() == pytest.approx(latents.max(0).values.tolist())


def test_activity_of_an_autoencoder_is_that_of_its_latents() -> None:
    torch.manual_seed(0)
    autoencoder = Autoencoder(12, 6)
    x = torch.randn(9, 6)
    found = LatentActivity.of(autoencoder, [x[:4].view(2, 2, 6), x[4:]])
    latents = autoencoder.encode(x)
    assert found.n_tokens == 9
    assert found.fired.tolist() == (latents != 0).sum(0).tolist()
    assert found.largest.tolist() == pytest.approx(latents.max(0).values.tolist(), rel=1e-5)
