"""Fine-tuning the decoder: nothing of the encoder moves, shrinkage goes, steps are Adam's own."""

from typing import Any

import numpy as np
import pytest
import torch

from neuron_explainer.dictionaries.finetune import finetune_decoder
from neuron_explainer.errors import InputError
from neuron_explainer.evaluation.evaluate import measure
from neuron_explainer.models.autoencoder import Autoencoder, TopK

N, N_LATENTS = 6, 20


def dictionary(activation: Any = None, tied: bool = False, **kwargs: Any) -> Autoencoder:
    torch.manual_seed(0)
    found = Autoencoder(N_LATENTS, N, activation, tied, dtype=torch.float64, **kwargs)
    with torch.no_grad():
        for parameter in found.parameters():
            parameter.normal_(0, 0.5)
    return found.requires_grad_(False)


def tokens(n: int = 64, seed: int = 1, width: int = N) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(n, width, generator=generator, dtype=torch.float64) + 0.3


def planted() -> tuple[Autoencoder, torch.Tensor]:
    """Sparse combinations of known directions, and an encoder that finds them 40 % too small."""
    torch.manual_seed(0)
    directions = torch.eye(N, dtype=torch.float64)
    found = Autoencoder(N, N, dtype=torch.float64)
    codes = torch.rand(4000, N, dtype=torch.float64) * (torch.rand(4000, N) < 0.4)
    with torch.no_grad():
        found.encoder.weight.copy_(0.6 * directions)
        found.decoder.weight.copy_(directions)
    return found.requires_grad_(False), codes @ directions


def test_shrinkage_goes() -> None:
    shrunk, x = planted()
    found = finetune_decoder(shrunk, list(x.split(100)) * 3, lr=1e-2, progress=False)
    before, after = measure(shrunk, [x]), measure(found, [x])
    assert before.norm_ratio == pytest.approx(0.6)
    assert after.norm_ratio == pytest.approx(1, abs=0.01)
    assert after.fvu < 1e-3 < before.fvu
    assert after.l1 == before.l1


@pytest.mark.parametrize(
    "kwargs",
    [
        {},
        {"tied": True},
        {"activation": TopK(4), "input_normalization": "layer_norm"},
        {"post_bias": True, "input_normalization": "rms", "skip": True},
        {"glu": True, "input_normalization": "center"},
    ],
    ids=str,
)
def test_latents_stay_and_the_loss_falls(kwargs: dict[str, Any]) -> None:
    whole, x = dictionary(**kwargs), tokens()
    before = {name: value.clone() for name, value in whole.named_parameters()}
    found = finetune_decoder(whole, [x.view(2, 32, N)] * 30, lr=1e-2, progress=False)
    assert torch.equal(found.encode(x), whole.encode(x))
    old, new = measure(whole, [x]), measure(found, [x])
    assert new.fvu < 0.7 * old.fvu
    assert not found.tied
    assert found.input_normalization == whole.input_normalization
    assert found.metadata["finetuned"] == {"n_tokens": 30 * 64, "lr": 1e-2}
    assert all(torch.equal(value, before[name]) for name, value in whole.named_parameters())


@pytest.mark.parametrize("skip", [False, True])
def test_each_token_counts_by_its_normalised_error(skip: bool) -> None:
    """So the length of an input, which normalisation takes away, makes no difference."""
    whole, x = dictionary(input_normalization="rms", skip=skip), tokens()
    lengths = torch.linspace(0.1, 1000, len(x)).double()[:, None]
    one, other = (
        finetune_decoder(whole, [batch] * 3, lr=1e-2, progress=False) for batch in (x, lengths * x)
    )
    torch.testing.assert_close(one.decoder.weight, other.decoder.weight)


def test_a_transcoder_learns_its_target() -> None:
    whole = dictionary(n_outputs=3, skip=True, output_location="0/mlp.post_act")
    x, y = tokens(), tokens(seed=2, width=3)
    found = finetune_decoder(whole, [(x, y)] * 60, lr=2e-2, progress=False)
    assert torch.equal(found.encode(x), whole.encode(x))
    assert measure(found, [(x, y)]).fvu < 0.7 * measure(whole, [(x, y)]).fvu
    assert found.output_location == whole.output_location
    own = [(x, whole.reconstruct(x))]  # nothing is left to learn, given what the skip adds
    torch.testing.assert_close(
        finetune_decoder(whole, own, lr=0.1, progress=False).decoder.weight, whole.decoder.weight
    )
    with pytest.raises(InputError, match="a transcoder is trained on pairs"):
        finetune_decoder(whole, [x], progress=False)


def test_two_steps_are_adams_in_numpy() -> None:
    """Gradients by their formulas, for scale, directions and bias; Adam's update written out."""
    whole, lr, b1, b2 = dictionary(), 0.01, 0.9, 0.99
    batches = [tokens(8, seed) for seed in (1, 2)]
    found = finetune_decoder(whole, batches, lr=lr, betas=(b1, b2), progress=False)
    p = {
        "scale": np.ones(N_LATENTS),
        "rows": whole.decoder.weight.numpy().T.copy(),
        "bias": whole.pre_bias.numpy().copy(),
    }
    first = {k: np.zeros_like(v) for k, v in p.items()}
    second = {k: np.zeros_like(v) for k, v in p.items()}
    for step, batch in enumerate(batches, 1):
        x, f = batch.numpy(), whole.encode(batch).numpy()
        error = (f * p["scale"]) @ p["rows"] + p["bias"] - x
        g = 2 * error / ((x - x.mean(0)) ** 2).sum()
        gradients = {
            "scale": ((g @ p["rows"].T) * f).sum(0),
            "rows": (f * p["scale"]).T @ g,
            "bias": g.sum(0),
        }
        for name, grad in gradients.items():
            first[name] = b1 * first[name] + (1 - b1) * grad
            second[name] = b2 * second[name] + (1 - b2) * grad**2
            m, v = first[name] / (1 - b1**step), second[name] / (1 - b2**step)
            p[name] = p[name] - lr * m / (np.sqrt(v) + 1e-8)
    np.testing.assert_allclose(
        found.decoder.weight.detach().numpy().T,
        p["scale"][:, None] * p["rows"],
        rtol=1e-8,
        atol=1e-10,
    )
    assert found.post_bias is not None
    np.testing.assert_allclose(found.post_bias.detach().numpy(), p["bias"], rtol=1e-8)
    assert torch.equal(found.pre_bias, whole.pre_bias)


def test_bad_input() -> None:
    with pytest.raises(InputError, match="no tokens were given"):
        finetune_decoder(dictionary(), [], progress=False)
    with pytest.raises(InputError, match="the loss after 0 tokens is nan"):
        finetune_decoder(dictionary(), [tokens() * float("nan")], progress=False)
    with pytest.raises(InputError, match="at least two different tokens"):
        finetune_decoder(dictionary(), [tokens(1)], progress=False)
