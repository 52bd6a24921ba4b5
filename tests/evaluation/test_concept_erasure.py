"""Latents of planted concepts are found; switching them off removes one concept and leaves the others."""

import pytest
import torch
from torch import Tensor

from neuron_explainer.errors import InputError
from neuron_explainer.evaluation.concept_erasure import Subject, exchange, scr, tpp
from neuron_explainer.models.autoencoders.latents import Latents

N_TOKENS, WIDTH, N_LATENTS = 2400, 96, 60


def planted(n_concepts: int = 3) -> tuple[Subject, dict[str, Tensor]]:
    """Concepts that a latent each stands for, among sparse others; there is an error of reconstruction."""
    generator = torch.Generator().manual_seed(0)
    directions = torch.randn(N_LATENTS, WIDTH, generator=generator)
    directions[:n_concepts] = torch.linalg.qr(directions[:n_concepts].t())[0].t()
    directions = torch.nn.functional.normalize(directions, dim=1)
    values = torch.rand(N_TOKENS, N_LATENTS, generator=generator)
    values *= torch.rand(N_TOKENS, N_LATENTS, generator=generator) < 0.03
    labels = torch.rand(N_TOKENS, n_concepts, generator=generator) < 0.5
    values[:, :n_concepts] = labels * (2 + torch.rand(N_TOKENS, n_concepts, generator=generator))
    error = 0.05 * torch.randn(N_TOKENS, WIDTH, generator=generator)
    subject = Subject(Latents.of(values), values @ directions + error, directions)
    return subject, {f"concept {i}": labels[:, i] for i in range(n_concepts)}


def test_tpp_removes_the_planted_concept_only() -> None:
    subject, classes = planted()
    found = tpp(subject, classes, ns=(1, 2))
    assert found.accuracy.mean > 0.98
    for n in (1, 2):
        assert found.own[n].mean >= 0.4
        assert abs(found.others[n].mean) <= 0.05
        assert found.score[n].mean >= 0.35
        assert abs(found.floor[n].mean) <= 0.02


def test_what_is_switched_off_is_taken_away_and_the_error_stays() -> None:
    subject, _ = planted()
    some = subject.checked().of(torch.arange(50))
    off = torch.tensor([1, 7])
    dense = some.latents.dense()
    expected = some.activations - dense[:, off] @ some.directions[off]
    torch.testing.assert_close(some.without(off), expected)
    assert torch.equal(some.without(torch.tensor([], dtype=torch.int64)), some.activations)


def test_scr_frees_a_probe_from_what_it_should_not_use() -> None:
    """Of two concepts that come together in training, the wanted one is the weaker. A latent each stands for
    having the unwanted one and for not having it, so that without both there is neither."""
    generator = torch.Generator().manual_seed(0)
    wanted, unwanted = torch.rand(2, N_TOKENS, generator=generator) < 0.5
    directions = torch.linalg.qr(torch.randn(WIDTH, 12, generator=generator))[0].t()
    directions = torch.cat([directions, -directions[:2]])
    values = torch.rand(N_TOKENS, 14, generator=generator)
    values *= torch.rand(N_TOKENS, 14, generator=generator) < 0.1
    for latents, label, strength in (((0, 12), wanted, 1.0), ((1, 13), unwanted, 2.0)):
        for latent, here in zip(latents, (label, ~label), strict=True):
            values[:, latent] = here * strength
    x = values @ directions
    x += 0.2 * torch.randn(N_TOKENS, WIDTH, generator=generator)
    subject = Subject(Latents.of(values), x, directions)
    found = scr(subject, wanted, unwanted, ns=(2,))
    assert found.clean.mean > found.biased.mean + 0.1
    assert found.score[2].mean > 0.9
    assert abs(found.floor[2].mean) < 0.1


def attributes(seed: int = 0) -> tuple[Subject, Tensor, Tensor]:
    """Two attributes of four values; each value of each has a latent, and there are ten others."""
    generator = torch.Generator().manual_seed(seed)
    first, second = (torch.randint(0, 4, (2000,), generator=generator) for _ in range(2))
    values = torch.rand(2000, 18, generator=generator)
    values *= torch.rand(2000, 18, generator=generator) < 0.2
    values[:, :8] = 0
    values[torch.arange(2000), first] = 1 + torch.rand(2000, generator=generator)
    values[torch.arange(2000), 4 + second] = 1 + torch.rand(2000, generator=generator)
    directions = torch.linalg.qr(torch.randn(24, 18, generator=generator))[0].t()
    return Subject(Latents.of(values), values @ directions, directions), first, second


def test_attributes_are_exchanged_by_their_own_latents() -> None:
    subject, first, second = attributes()
    for attribute, other, chosen in ((first, second, (0, 1, 2, 3)), (second, first, (4, 5, 6, 7))):
        found = exchange(subject, attribute, other)
        assert found.chosen == chosen
        assert found.cause.mean >= 0.95
        assert found.isolation.mean >= 0.95
        assert found.disentangle.mean >= 0.95
        assert found.floor.mean < 0.6


def test_all_of_it_can_be_written_as_json() -> None:
    import json

    subject, first, second = attributes()
    assert json.loads(json.dumps(exchange(subject, first, second).to_dict()))["chosen"]
    subject, classes = planted(2)
    wanted, unwanted = classes.values()
    assert (
        json.loads(json.dumps(tpp(subject, classes, ns=(1,)).to_dict()))["score"]["1"]["mean"] > 0
    )
    assert json.loads(json.dumps(scr(subject, wanted, unwanted, ns=(1,)).to_dict()))["score"]["1"]


def test_what_cannot_be_measured_is_refused() -> None:
    subject, classes = planted(2)
    wanted, unwanted = classes.values()
    with pytest.raises(InputError, match="two classes"):
        tpp(subject, {"one": wanted})
    with pytest.raises(InputError, match="all four combinations"):
        scr(subject, wanted, wanted)
    with pytest.raises(InputError, match="all or none have the label"):
        tpp(subject, {"all": wanted | True, "one": unwanted})
    with pytest.raises(InputError, match="expected latents of"):
        tpp(subject._replace(directions=subject.directions[:5]), classes)
