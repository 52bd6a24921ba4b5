"""Proof on load: a right autoencoder passes, one that is applied wrongly is told from it."""

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from neuron_explainer.errors import InputError
from neuron_explainer.evaluation import Verification
from neuron_explainer.models.autoencoder import Autoencoder
from neuron_explainer.models.autoencoder_context import AutoencoderConfig, AutoencoderContext
from neuron_explainer.models.locations import ActivationLocation
from neuron_explainer.models.model_context import StandardModelContext
from neuron_explainer.models.transformer import Transformer

TEXT = "a text of some length, long enough to fill more than one window of the model"


@pytest.fixture
def context(text_model: Transformer, tmp_path: Path) -> StandardModelContext:
    text_model.save(tmp_path / "model")
    return StandardModelContext(str(tmp_path / "model"), device="cpu")


def exact(n: int, **kwargs) -> Autoencoder:
    """Each direction and its opposite is a latent: ReLU loses nothing."""
    autoencoder = Autoencoder(2 * n, n, **kwargs)
    both = torch.cat([torch.eye(n), -torch.eye(n)])
    with torch.no_grad():
        autoencoder.encoder.weight.copy_(both)
        autoencoder.decoder.weight.copy_(both.T)
    return autoencoder


def saved(autoencoder: Autoencoder, folder: Path, layers=(0, 1)) -> AutoencoderContext:
    for layer in layers:
        autoencoder.save(folder / str(layer), overwrite=True)
    paths = {layer: str(folder / str(layer)) for layer in layers}
    return AutoencoderContext(AutoencoderConfig("resid_post_mlp", paths), "cpu")


def rows(context: StandardModelContext, layer: int, bos: bool = False) -> Tensor:
    """What is to be measured, gathered by hand: all but the first token of each window."""
    model = context.get_or_create_model()
    ids = context.encode(TEXT)
    size = context.n_context - int(bos)
    found = []
    for start in range(0, len(ids), size):
        piece = ids[start : start + size]
        tokens = torch.tensor([[context.get_encoding().eot_token, *piece] if bos else piece])
        location = f"{layer}/resid.torso.post_mlp"
        found.append(model.capture(tokens, location)[location][0, 1:])
    return torch.cat(found).detach()


@pytest.mark.parametrize("bos", [False, True])
def test_an_exact_autoencoder_passes(
    context: StandardModelContext, tmp_path: Path, bos: bool
) -> None:
    n = context.n_residual_stream_channels
    figures = saved(exact(n), tmp_path / "ae").verify(context, TEXT, bos=bos)
    assert set(figures) == {0, 1}
    for layer, found in figures.items():
        assert layer is not None
        x = rows(context, layer, bos)
        assert found.n_tokens == len(x)
        assert found.fvu == pytest.approx(0, abs=1e-10)
        assert found.l0 == pytest.approx(float((x != 0).sum(-1).double().mean()))
        assert found.problem is None
        latents = torch.cat([x.relu(), (-x).relu()], dim=-1)
        assert found.dead_share == pytest.approx(float((latents == 0).all(0).double().mean()))


def test_fvu_is_that_of_numpy(context: StandardModelContext, tmp_path: Path) -> None:
    n = context.n_residual_stream_channels
    torch.manual_seed(0)
    autoencoder = Autoencoder(3 * n, n)
    found = saved(autoencoder, tmp_path / "ae").verify(context, TEXT, layers=[1])[1]
    x = rows(context, 1).double().numpy()
    w, d = (m.weight.detach().double().numpy() for m in (autoencoder.encoder, autoencoder.decoder))
    error = x - np.maximum(x @ w.T, 0) @ d.T
    assert found.fvu == pytest.approx((error**2).sum() / ((x - x.mean(0)) ** 2).sum(), rel=1e-5)


def test_forgotten_input_normalisation_is_noticed(
    context: StandardModelContext, tmp_path: Path
) -> None:
    """The fault that this is for: trained on layer-normed inputs, read as if not."""
    model = context.get_or_create_model()
    assert isinstance(model, Transformer)
    with torch.no_grad():  # a stream a hundred times smaller than what layer norm makes of it
        for name, parameter in model.named_parameters():
            if name.startswith(("tok_embed", "pos_embed")) or "out_" in name:
                parameter.mul_(0.01)
    right = exact(context.n_residual_stream_channels, input_normalization="layer_norm")
    with torch.no_grad():
        right.latent_bias.fill_(-0.3)  # what is small beside a deviation of 1 does not count
    assert saved(right, tmp_path / "right").verify(context, TEXT)[0].problem is None
    wrong = Autoencoder.from_state_dict(
        {k: v for k, v in right.state_dict().items() if k != "input_normalization"}
    )
    problem = saved(wrong, tmp_path / "wrong").verify(context, TEXT)[0].problem
    assert problem is not None
    assert "0/resid.torso.post_mlp" in problem
    assert "input normalisation" in problem


def test_recorded_figures_are_compared(context: StandardModelContext, tmp_path: Path) -> None:
    n = context.n_residual_stream_channels
    autoencoder = exact(n, metadata={"held_out": {"fvu": 0.1, "l0": 3.0, "loss_recovered": 1.0}})
    with torch.no_grad():
        autoencoder.decoder.weight.mul_(0.45)
    found = saved(autoencoder, tmp_path / "ae").verify(context, TEXT, layers=[0])[0]
    assert found.recorded == {"fvu": 0.1, "l0": 3.0}
    assert 0.25 < found.fvu < 0.5  # fine without the record
    assert "(recorded: 0.100)" in (found.problem or "")


def test_the_two_numbers_of_a_problem_differ() -> None:
    place = ActivationLocation("mlp.post_act", 3)
    assert Verification(place, 9, 0.6, 1.0, 0.0).problem is None
    problem = Verification(place, 9, 0.60002, 1.0, 0.0).problem or ""
    assert "0.60002 of the variance" in problem
    assert "at most 0.60000." in problem


def test_a_transcoder_is_measured_against_its_target(
    context: StandardModelContext, tmp_path: Path
) -> None:
    n = context.n_residual_stream_channels
    transcoder = Autoencoder(4, n, n_outputs=n, output_location="resid_delta_mlp")
    with torch.no_grad():
        for parameter in transcoder.parameters():
            parameter.zero_()
    found = saved(transcoder, tmp_path / "ae").verify(context, TEXT, layers=[1])[1]
    model = context.get_or_create_model()
    ids, target = context.encode(TEXT), "1/resid.torso.delta_mlp"
    y = torch.cat(
        [
            model.capture(torch.tensor([ids[i : i + context.n_context]]), target)[target][
                0, 1:
            ].detach()
            for i in range(0, len(ids), context.n_context)
        ]
    ).double()
    assert found.fvu == pytest.approx(float(y.square().sum() / (y - y.mean(0)).square().sum()))


def test_bad_input(context: StandardModelContext, tmp_path: Path) -> None:
    autoencoders = saved(exact(context.n_residual_stream_channels), tmp_path / "ae")
    with pytest.raises(InputError, match=r"at least two tokens.*found 1"):
        autoencoders.verify(context, "a")
    with pytest.raises(InputError, match="width"):
        saved(exact(3), tmp_path / "narrow").verify(context, TEXT)
    assert not math.isnan(autoencoders.verify(context, "ab", layers=[0])[0].l0)
