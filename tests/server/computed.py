"""A tiny model of bytes with autoencoders, and the session and scripts of its server."""

from pathlib import Path
from typing import Any

import numpy as np
import torch

from neuron_explainer.models.autoencoder import Autoencoder
from neuron_explainer.models.autoencoders.nonlinearities import TopK
from neuron_explainer.server.compute.operations import Session, answer
from neuron_explainer.server.compute.setup import DictionarySource, Setup
from tests.analysis.byte_models import save_byte_context

N_LATENTS = 40
SITES = {"mlp": "resid.torso.delta_mlp", "attn": "resid.torso.delta_attn", "acts": "mlp.post_act"}


def make_setup(folder: Path, **settings: Any) -> Setup:
    """Two layers of width 16, twelve positions; dictionaries ``mlp.0``, ``mlp.1``, ``attn.0``, …,
    ``acts.0``, …, and ``neurons.0``, which has no autoencoder."""
    context = save_byte_context(folder)
    sources = [DictionarySource("neurons.0", "0/mlp.post_act", "neuron")]
    for name, site in SITES.items():
        for layer in range(2):
            torch.manual_seed(len(sources))
            width = 48 if name == "acts" else 16
            place = f"{layer}/{site}"
            autoencoder = Autoencoder(N_LATENTS, width, activation=TopK(5), location=place)
            with torch.no_grad():
                for parameter in autoencoder.parameters():
                    parameter.add_(0.3 * torch.randn(parameter.shape))
            path = folder / f"{name}.{layer}"
            autoencoder.save(path)
            sources.append(DictionarySource(f"{name}.{layer}", place, "latent", str(path)))
    return Setup(context, tuple(sources), device="cpu", **settings)


def ask(session: Session, operation: str, **request: Any) -> Any:
    """The answer to a request, as the worker gets it."""
    *_, (kind, payload) = answer(session, operation, request, lambda: None)
    assert kind == "done"
    return payload


def parts(session: Session, operation: str, **request: Any) -> list[Any]:
    """The parts of a stream."""
    return [p for kind, p in answer(session, operation, request, lambda: None) if kind == "part"]


def result_of(reply: Any) -> Any:
    """What the script of a reply gives."""
    names: dict[str, Any] = {}
    exec(compile(reply["python"], "the panel's script", "exec"), names)
    return names["result"]


def assert_same(found: Any, expected: Any, tolerance: float = 1e-5) -> None:
    """Equal structures whose numbers differ by no more than 1e-5; nothing for no number."""
    if isinstance(expected, dict):
        assert set(found) == set(expected)
        for key, value in expected.items():
            assert_same(found[key], value, tolerance)
    elif isinstance(expected, list | tuple) or hasattr(expected, "tolist"):
        found, expected = (
            x.tolist() if hasattr(x, "tolist") else list(x) for x in (found, expected)
        )
        assert len(found) == len(expected)
        for one, other in zip(found, expected, strict=True):
            assert_same(one, other, tolerance)
    elif isinstance(expected, float) and isinstance(found, float):
        np.testing.assert_allclose(found, expected, rtol=tolerance, atol=tolerance)
    else:
        assert found == expected
