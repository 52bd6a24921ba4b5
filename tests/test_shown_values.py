"""``repr`` of values that hold tensors shows shapes; numbers by the thousand help nobody."""

from typing import Any

import pytest
import torch

from neuron_explainer.activations import ActivationBatch, TokenBatch
from neuron_explainer.evaluation.geometry import WeightGeometry
from neuron_explainer.models.autoencoder import Autoencoder, TopK
from neuron_explainer.models.autoencoders.fista import fista
from neuron_explainer.models.locations import ActivationLocation

IDS = torch.zeros(2, 5, dtype=torch.long)


def some() -> dict[str, Any]:
    torch.manual_seed(0)
    ae = Autoencoder(12, 4, TopK(3), input_normalization="layer_norm")
    x = torch.randn(2, 5, 4)
    place = ActivationLocation("mlp.post_act", 3)
    values = [
        ae.encode_sparse(x),
        ae(x),
        ae.code(x),
        ae.code_sparse(x),
        ae.normalize(x)[1],
        fista(x, torch.randn(4, 12), 0.1),
        TokenBatch(IDS, IDS, IDS),
        ActivationBatch({place: x[0]}, IDS[0], IDS[0], IDS[0]),
        WeightGeometry.of(ae),
    ]
    return {type(value).__name__: value for value in values}


@pytest.mark.parametrize("name", list(some()))
def test_it_shows_shapes_and_no_numbers(name: str) -> None:
    shown = repr(some()[name])
    assert shown.startswith(f"{name}(")
    assert "tensor(" not in shown
    assert "] float32" in shown or "] int64" in shown
    assert len(shown) < 300


def test_the_exact_form() -> None:
    found = some()
    assert repr(found["Latents"]) == (
        "Latents(values=[2, 5, 3] float32, indices=[2, 5, 3] int64, n_latents=12)"
    )
    assert repr(found["TokenBatch"]).endswith(
        "position=[2, 5] int64, pad=None, bos=None, corpus_position=None)"
    )
    assert "activations={3/mlp.post_act: [5, 4] float32}" in repr(found["ActivationBatch"])
    assert "stats=InputStats(mean=[2, 5, 1] float32, std=" in repr(found["Code"])
