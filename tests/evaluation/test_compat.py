"""Peers' figures: against what their own code gave, and against their definitions in numpy."""

import json
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from benchmarks.peers import make_metrics as toy
from benchmarks.peers.write_ours import FIXTURES
from neuron_explainer.activations.windows import TokenBatch
from neuron_explainer.evaluation.compat import PEERS
from neuron_explainer.evaluation.evaluate import evaluate, measure
from neuron_explainer.evaluation.figures import Evaluation
from neuron_explainer.models.autoencoder import Autoencoder, TopK
from neuron_explainer.models.language_model import LanguageModel
from neuron_explainer.models.locations import ActivationLocation
from neuron_explainer.models.model_context import StubModelContext
from neuron_explainer.models.weight_names import Dimension
from tests.reference import peer_metrics

PLACE = ActivationLocation("resid.torso.delta_mlp", 0)


class ToyModel:
    """The peers' toy, hookable as our models are."""

    device = torch.device("cpu")

    def __call__(
        self, tokens: Tensor, H: Any = None, pad: Any = None, hooks: Any = None
    ) -> tuple[Tensor, None]:
        x = toy.activations(tokens).double()
        if hooks is not None:
            x = hooks.resid.torso.delta_mlp(x, layer=0)
        return x @ toy.wave(toy.N, toy.N_VOCAB, seed=0.6).double(), None

    def capture(self, tokens: Tensor, locations: Any, pad: Any = None, **kwargs: Any) -> Any:
        found = {
            PLACE: toy.activations(tokens).double(),
            ActivationLocation("logits"): self(tokens)[0],
        }
        return {location: found[location] for location in locations}


class ToyContext(StubModelContext):
    """Of one layer."""

    def get_or_create_model(self, device: Any = None, simplify: bool = False) -> LanguageModel:
        model: Any = ToyModel()
        return model  # type: ignore[no-any-return]  # it has no sample()


def autoencoder(activation: Any = None) -> Autoencoder:
    w = toy.weights()
    found = Autoencoder(toy.N_LATENTS, toy.N, activation, location=PLACE)
    with torch.no_grad():
        found.encoder.weight.copy_(w["encoder"])
        found.latent_bias.copy_(w["encoder_bias"])
        found.decoder.weight.copy_(w["decoder"].T)
        found.pre_bias.copy_(w["bias"])
    return found.double()


def evaluated(peer: str, activation: Any = None) -> Evaluation:
    batches = [
        TokenBatch(tokens, torch.zeros_like(tokens), torch.arange(7).expand_as(tokens))
        for tokens in toy.batches()
    ]
    context = ToyContext({Dimension.LAYERS: 1})
    return evaluate(context, autoencoder(activation), batches, compat=peer, progress=False)


@pytest.mark.parametrize(
    ("peer", "ours", "activation"),
    [
        ("sae-lens", "saelens_legacy", None),
        ("dictionary-learning", "dictionary_learning", None),
        ("sparsify", "sparsify", TopK(toy.K)),
    ],
)
def test_the_peers_own_code_gave_these_figures(peer: str, ours: str, activation: Any) -> None:
    expected = json.loads((toy.FOLDER / f"{peer}.json").read_text())["figures"]
    found = evaluated(ours, activation).compat[ours]
    assert expected.keys() <= found.keys()
    for name, value in expected.items():
        assert found[name] == pytest.approx(value, rel=1e-5, abs=1e-6), name


def rows() -> list[tuple[Any, Any, Any]]:
    found = []
    with torch.no_grad():
        for tokens in toy.batches():
            x = toy.activations(tokens).flatten(0, 1).double()
            _, latents, recons = autoencoder()(x)
            found.append((x.numpy(), recons.numpy(), latents.numpy()))
    return found


def test_figures_are_the_definitions_in_numpy() -> None:
    expected = {
        "saelens_legacy": peer_metrics.saelens_legacy(rows()),
        "dictionary_learning": peer_metrics.dictionary_learning(rows()),
        "sparsify": {"fvu": peer_metrics.sparsify_fvu(rows())},
        "openai": peer_metrics.openai(rows()),
    }
    assert expected.keys() == PEERS.keys()
    found = measure(autoencoder(), [torch.from_numpy(x) for x, _, _ in rows()], compat=list(PEERS))
    for peer, figures in expected.items():
        for name, value in figures.items():
            assert found.compat[peer][name] == pytest.approx(value, rel=1e-9), (peer, name)


@pytest.mark.parametrize("name", ["AutoEncoder", "AutoEncoderNew", "JumpReluAutoEncoder"])
def test_the_l1_loss_of_a_class_is_that_of_what_it_calls_features(name: str) -> None:
    """``AutoEncoderNew.forward`` multiplies them by the norms of decoder columns; no other class does."""
    ae = Autoencoder.load(FIXTURES / "dictionary-learning" / name / "saved").double()
    x = torch.randn(
        30, ae.n_inputs, dtype=torch.float64, generator=torch.Generator().manual_seed(0)
    )
    batches = [x[:10], x[10:]]
    norms = np.sqrt((ae.decoder.weight.detach().numpy() ** 2).sum(axis=0))
    scale = norms if name == "AutoEncoderNew" else np.ones_like(norms)
    expected = np.mean(
        [(ae.encode(batch).detach().numpy() * scale).sum(axis=1).mean() for batch in batches]
    )
    found = measure(ae, batches, compat=["dictionary_learning", "openai"])
    assert found.compat["dictionary_learning"]["l1_loss"] == pytest.approx(expected, rel=1e-9)
    assert not np.allclose(norms, 1) or name == "AutoEncoder"


def test_loss_recovered_is_a_mean_of_ratios() -> None:
    losses: list[Any] = []
    ae = autoencoder()
    with torch.no_grad():
        for tokens in toy.batches():
            x = toy.activations(tokens).double()
            unembed = toy.wave(toy.N, toy.N_VOCAB, seed=0.6).double()
            variants = (x, ae.reconstruct(x), torch.zeros_like(x))
            losses.append(tuple(toy.ce(v @ unembed, tokens).flatten().numpy() for v in variants))
    evaluation = evaluated("dictionary_learning")
    found = evaluation.compat["dictionary_learning"]
    assert found["frac_recovered"] == pytest.approx(peer_metrics.frac_recovered(losses), rel=1e-9)
    for i, name in enumerate(("loss_original", "loss_reconstructed", "loss_zero")):
        expected = np.mean([np.mean(batch[i]) for batch in losses])
        assert found[name] == pytest.approx(expected, rel=1e-9)
    # Ours: the means over all tokens first.
    assert evaluation.losses is not None
    assert evaluation.losses.recovered_zero != pytest.approx(found["frac_recovered"], rel=1e-3)
