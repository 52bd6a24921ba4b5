"""What figures are said to mean: one sentence each, and marked where they are unusual."""

from dataclasses import replace
from typing import Any

import pytest
import torch

from neuron_explainer.analysis.verdict import target_l0, verdict
from neuron_explainer.evaluation import Evaluation, measure
from neuron_explainer.evaluation.figures import Losses
from neuron_explainer.evaluation.geometry import WeightGeometry
from neuron_explainer.models.autoencoder import Autoencoder, TopK


@pytest.fixture(scope="module")
def good() -> Evaluation:
    """Nothing unusual: 8 of 400 latents on each token, which all fire now and then."""
    torch.manual_seed(0)
    found = measure(Autoencoder(400, 6, TopK(8)), [torch.randn(2000, 6)])
    frequency = torch.full((400,), 8 / 400)
    return replace(
        found,
        fvu=0.1,
        explained_variance=0.9,
        l0=8.0,
        dead_share=0.0,
        frequency=frequency,
        relative_reconstruction_bias=1.0,
        losses=losses(2.1),
    )


def losses(spliced: float) -> Losses:
    zero, mean = (4 - spliced) / 2, (3 - spliced) / 1
    return Losses(100, 2.0, spliced, 4.0, 3.0, zero, mean, 0.1, 1.0, 0.8)


def unusual(evaluation: Evaluation) -> list[str]:
    return [remark.text for remark in verdict(evaluation) if remark.unusual]


def test_nothing_unusual(good: Evaluation) -> None:
    texts = [remark.text for remark in verdict(good, 8)]
    assert unusual(good) == []
    assert texts[0] == "The reconstructions explain 90.0% of the variance (FVU 0.100)."
    assert "from 2.000 to 2.100 nats" in texts[1]
    assert "95% of the loss that zeros" in texts[1]
    assert texts[2] == "8.0 latents are active per token (L0), as 8 were asked for."
    assert texts[3] == "No latent is dead: each of the 400 fired."
    assert len(verdict(replace(good, losses=None))) == len(texts) - 1


@pytest.mark.parametrize(
    ("changed", "text"),
    [
        ({"fvu": 0.6, "explained_variance": 0.4}, "explain 40.0% of the variance"),
        ({"losses": losses(2.9)}, "10% of what the mean activation costs"),
        ({"losses": losses(3.1)}, "worse than the mean activation"),
        ({"l0": 9.0}, "9.0 latents are active per token (L0), but 8 were asked for."),
        ({"relative_reconstruction_bias": 0.8}, "too short: 1.25 times as long"),
    ],
)
def test_each_unusual_figure_is_marked(
    good: Evaluation, changed: dict[str, Any], text: str
) -> None:
    (found,) = [r.text for r in verdict(replace(good, **changed), 8) if r.unusual]
    assert text in found


def test_dead_and_dense_latents(good: Evaluation) -> None:
    frequency = good.frequency.clone()
    frequency[:60], frequency[60:70] = 0, 0.5
    found = replace(good, frequency=frequency, dead_share=0.15)
    dead, dense = unusual(found)
    assert dead.startswith("60 of the 400 latents (15.0%) never fired")
    assert dense.startswith("10 latents are dense (active on more than 10% of tokens)")
    frequency[61:70] = 0.01
    assert "1 latent is dense" in verdict(replace(good, frequency=frequency))[4].text


def test_near_copies(good: Evaluation) -> None:
    autoencoder = Autoencoder(400, 6)
    with torch.no_grad():
        autoencoder.decoder.weight[:, 1] = autoencoder.decoder.weight[:, 0]
    geometry = WeightGeometry.of(autoencoder)
    nearest = torch.zeros(100)
    nearest[:3] = 0.95
    (text,) = [
        r.text
        for r in verdict(good, geometry=replace(geometry, nearest_cosine=nearest))
        if r.unusual
    ]
    assert text == "3.0% of decoder directions have a near copy (cosine above 0.9)."


def test_a_run_that_ended_too_early(good: Evaluation) -> None:
    falling = [(100.0 * i, 1 / i) for i in range(1, 41)]
    level = [(x, 0.2) for x, _ in falling]
    (text,) = [r.text for r in verdict(good, fvu_curve=falling) if r.unusual]
    assert text.startswith("FVU was still falling when training ended after 4,000 tokens")
    assert not any(r.unusual for r in verdict(good, fvu_curve=level))
    assert not any(r.unusual for r in verdict(good, fvu_curve=falling[:5]))


def test_figures_that_are_not_defined(good: Evaluation) -> None:
    """Of a dictionary whose reconstructions are all 0, of activations that never vary."""
    nan = float("nan")
    nothing = replace(
        good,
        explained_variance=nan,
        fvu=nan,
        relative_reconstruction_bias=nan,
        losses=replace(losses(2.0), recovered_zero=nan, recovered_mean=nan),
    )
    texts = [r.text for r in verdict(nothing, fvu_curve=[(100.0 * i, 0.0) for i in range(40)])]
    assert texts[0].startswith("The reconstructions explain an undefined share of the variance")
    assert "recover an undefined share of the loss" in texts[1]
    assert not any("nan%" in text or "nan times" in text or "falling" in text for text in texts)


def test_the_l0_that_was_asked_for() -> None:
    assert target_l0({"objective": {"name": "topk", "k": 16}}) == 16
    assert target_l0({"objective": {"name": "jumprelu", "target_l0": 20.0}}) == 20
    assert target_l0({"objective": {"name": "relu"}}) is None
    assert target_l0({}) is None
