"""A nonlinearity says everything about itself: a new one is one class."""

import pytest
import torch
from torch import Tensor, nn

from neuron_explainer.dictionaries import prune
from neuron_explainer.errors import InputError
from neuron_explainer.models.autoencoder import Autoencoder, TopK
from neuron_explainer.models.autoencoders.nonlinearities import (
    ACTIVATIONS_CLASSES,
    Nonlinearity,
    activation_name,
    as_nonlinearity,
)
from neuron_explainer.models.autoencoders.pruned import omit_least_active_latents


class Shifted(Nonlinearity):
    """relu(scale · x + shift), on at most ``most`` latents."""

    name = "Shifted"
    fields = ("shift", "scale", "most")
    tensors = per_latent = biases = ("shift",)
    optional = ("scale",)

    def __init__(self, shift: Tensor, most: int, scale: float = 2.0) -> None:
        super().__init__()
        self.shift = nn.Parameter(shift.clone())
        self.most, self.scale = most, scale

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(self.scale * x + self.shift)


@pytest.fixture
def autoencoder():
    ae = Autoencoder(6, 3, Shifted(torch.linspace(0, 1, 6), most=9))
    with torch.no_grad():
        ae.latents_activation_frequency.copy_(torch.tensor([0.1, 0.5, 0.3, 0.2, 0.9, 0.8]))
    return ae


def test_one_class_is_applied_saved_loaded_pruned(autoencoder, tmp_path):
    x = torch.randn(4, 3, generator=torch.Generator().manual_seed(0))
    latents = autoencoder.encode(x)
    with torch.no_grad():
        torch.testing.assert_close(autoencoder.encode(x), latents)
    autoencoder.save(tmp_path / "ae")
    loaded = Autoencoder.load(tmp_path / "ae")
    assert activation_name(loaded.activation) == "Shifted"
    assert loaded.nonlinearity.plain_fields() == {"scale": 2.0, "most": 9}
    assert torch.equal(loaded.encode(x), latents)
    for keep_indices in (True, False):
        pruned = omit_least_active_latents(autoencoder, 3, keep_indices)
        kept = [1, 4, 5]
        found = pruned.encode(x)
        torch.testing.assert_close(found[:, kept] if keep_indices else found, latents[:, kept])
    pruning = prune(autoencoder, [x], min_max_activation=1.0, min_decoder_norm=0)
    assert 0 < pruning.n_kept < 6
    found = pruning.autoencoder.encode(x)
    assert torch.equal(found != 0, (latents != 0) & pruning.kept)  # shift would let 0 pass
    other = Autoencoder(6, 3, Shifted(torch.zeros(6), most=1))
    other.load_state_dict(autoencoder.state_dict())
    assert other.nonlinearity.plain_fields() == {"scale": 2.0, "most": 9}
    assert torch.equal(other.encode(x), Autoencoder.from_state_dict(other.state_dict()).encode(x))
    assert torch.equal(other.nonlinearity.state_dict()["shift"], torch.linspace(0, 1, 6))


def test_it_does_not_fit_another_number_of_latents():
    with pytest.raises(InputError, match="Shifted: shift has 5 numbers for 6 latents"):
        Autoencoder(6, 3, Shifted(torch.zeros(5), most=1))


def test_a_name_is_taken_once():
    with pytest.raises(InputError, match="a nonlinearity 'TopK' exists already"):

        class Other(Nonlinearity):
            name = "TopK"

    assert ACTIVATIONS_CLASSES["TopK"] is TopK


def test_torch_modules_have_the_same_interface():
    relu, identity = as_nonlinearity(nn.ReLU()), as_nonlinearity(nn.Identity())
    assert relu.is_relu
    assert not identity.is_relu
    assert relu.top_k is None
    assert relu.plain_fields() == {}
    assert relu.select(torch.tensor([1])) is relu
    assert not as_nonlinearity(nn.LeakyReLU()).is_relu
