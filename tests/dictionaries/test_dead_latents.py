"""Latents that nothing activates: found, counted, and brought back in two ways."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from neuron_explainer.dictionaries import (
    JumpReLUConfig,
    ReLUConfig,
    SparseLatents,
    TopKConfig,
    TrainConfig,
    train,
)
from neuron_explainer.dictionaries.dead_latents import (
    ActivityCounter,
    forget_moments,
    ghost_loss,
    resample,
)
from neuron_explainer.dictionaries.dictionary import LearnedDictionary
from neuron_explainer.dictionaries.trainee import Trainee
from neuron_explainer.errors import InputError
from neuron_explainer.evaluation.metrics import dead_share
from tests.conftest import assert_close
from tests.dictionaries.planted import planted

F64 = torch.float64


def test_tokens_are_counted() -> None:
    counter = ActivityCounter(4)
    counter.update(SparseLatents(torch.tensor([[1.0, 0.0]]), torch.tensor([[2, 3]])), 10)
    assert counter.silent[:-1].tolist() == [10, 10, 0, 10]  # a value of 0 is not active
    counter.update(torch.tensor([[0.0, 0.5, 0.0, -1.0], [0.0, 0.0, 0.0, 0.0]]), 2)
    assert counter.silent[:-1].tolist() == [12, 0, 2, 12]
    assert counter.dead(12).tolist() == [0, 3]
    counter.revive(torch.tensor([3]))
    assert counter.dead(12).tolist() == [0]


def a_dictionary(**fields: Any) -> tuple[LearnedDictionary, Tensor]:
    generator = torch.Generator().manual_seed(0)
    dictionary = LearnedDictionary(6, 4, dtype=F64, generator=generator, **fields)
    with torch.no_grad():
        for parameter in dictionary.parameters():
            parameter.add_(0.2 * torch.randn(parameter.shape, generator=generator, dtype=F64))
    return dictionary, torch.randn(5, 4, generator=generator, dtype=F64)


# ---- ghost gradients ---------------------------------------------------------------------------

DEAD = torch.tensor([1, 4])


def ghost_formula(x: Tensor, error: Tensor, p: dict[str, Tensor], at: dict[str, Tensor]) -> Tensor:
    """As the paper's code has it, token by token; ``at`` are the same parameters, held constant."""

    def ghost(q: dict[str, Tensor], token: int) -> Tensor:
        z = q["encoder"][DEAD] @ (x[token] - q["pre_bias"]) + q["latent_bias"][DEAD]
        return z.exp() @ q["decoder"][DEAD]

    centred = error - error.mean(0)
    total = torch.zeros((), dtype=F64)
    for token in range(len(x)):
        e = error[token]
        scale = e.norm() / (1e-6 + 2 * ghost(at, token).norm())
        # Both losses are divided by norms, which differ; what is left of them is in the tiny term.
        of_ghost = (scale * ghost(p, token) - e).square() / centred[token].norm()
        held = (scale * ghost(at, token) - e).square() / centred[token].norm()
        total += (e.square() / (held + 1e-12) * of_ghost).sum()
    return total / len(x)


def test_ghost_loss_is_the_formula_in_value_and_gradient() -> None:
    dictionary, x = a_dictionary()
    error = 2 * torch.randn(5, 4, generator=torch.Generator().manual_seed(1), dtype=F64)
    names, parameters = zip(*dictionary.named_parameters(), strict=True)
    loss = ghost_loss(dictionary, x, error, DEAD)
    found = torch.autograd.grad(loss, parameters)
    at = {name: p.detach().clone() for name, p in dictionary.named_parameters()}
    copies = {name: value.clone().requires_grad_() for name, value in at.items()}
    expected_loss = ghost_formula(x, error, copies, at)
    expected = torch.autograd.grad(expected_loss, [copies[name] for name in names])
    assert_close(loss, expected_loss, 1e-4)  # the tiny term is added at other places
    for name, one, other in zip(names, found, expected, strict=True):
        assert_close(one, other, 1e-4, name)
    assert_close(loss, error.square().sum() / 5, 1e-4)  # rescaled to the reconstruction loss


def test_only_dead_rows_get_a_ghost_gradient() -> None:
    dictionary, x = a_dictionary()
    error = torch.randn(5, 4, generator=torch.Generator().manual_seed(1), dtype=F64)
    ghost_loss(dictionary, x, error, DEAD).backward()
    for parameter in (dictionary.encoder, dictionary.decoder, dictionary.latent_bias):
        assert parameter is not None
        assert parameter.grad is not None
        touched = parameter.grad.reshape(6, -1).abs().sum(1) > 0
        assert touched.tolist() == [latent in DEAD for latent in range(6)]


def test_ghosts_of_large_activations_are_finite() -> None:
    dictionary, x = a_dictionary()
    error = torch.ones_like(x)
    large = ghost_loss(dictionary, 1e4 * x, error, DEAD)
    large.backward()
    assert bool(torch.isfinite(large))
    assert dictionary.encoder.grad is not None
    assert bool(torch.isfinite(dictionary.encoder.grad).all())


def test_ghosts_need_a_reconstruction_to_be_scaled_to() -> None:
    rows = planted(64)[0]
    config = TrainConfig(ReLUConfig(), n_latents=40, steps=9, remedy="ghost", dead_after_tokens=100)
    trainee = Trainee(config, 24, None, rows.device).measure([(rows, rows)])
    loss = trainee.objective.loss

    def unnamed(*arguments: Any) -> Any:
        return loss(*arguments)._replace(terms={"mine": torch.zeros(())})

    trainee.objective.loss = unnamed  # type: ignore[method-assign, assignment]
    with pytest.raises(InputError, match=r"'reconstruction', which the objective relu .* has mine"):
        trainee.loss(rows, rows, 0)


def test_ghosts_are_off_when_none_is_dead() -> None:
    config = TrainConfig(ReLUConfig(), n_latents=40, steps=9, remedy="ghost", dead_after_tokens=100)
    rows = planted(64)[0]
    trainee = Trainee(config, 24, None, rows.device).measure([(rows, rows)])
    assert "ghost" not in trainee.loss(rows, rows, 0).terms
    trainee.counter.silent[:2] = 100
    loss = trainee.loss(rows, rows, 0)
    terms = {name: float(value) for name, value in loss.terms.items()}
    assert terms["ghost"] == pytest.approx(terms["reconstruction"], rel=1e-3)
    assert float(loss.total.detach()) == pytest.approx(sum(terms.values()))


@pytest.mark.parametrize(("remedy", "chance"), [("ghost", 190), ("resample", 150)])
def test_a_remedy_that_cannot_start(remedy: Any, chance: int) -> None:
    def run(dead_after: int | None) -> None:
        config = TrainConfig(
            ReLUConfig(), n_latents=40, steps=20, remedy=remedy, dead_after_tokens=dead_after
        )
        train(config, [planted(10)[0]], progress=False)

    run(None)
    run(chance)
    message = f"remedy = {remedy} can never start: .* {chance + 1} is more than the {chance} tokens"
    with pytest.raises(InputError, match=message):
        run(chance + 1)


def test_the_dead_are_logged_with_their_window(tmp_path: Path) -> None:
    config = TrainConfig(
        TopKConfig(k=1),
        n_latents=200,
        steps=40,
        log_every=10,
        dead_after_tokens=200,
        checkpoint_every=40,
    )
    rows, active = planted(10)[0], []

    def watch(report: Any) -> None:
        latents = report.losses["autoencoder"].latents
        active.append(set(latents.indices[latents.values > 0].tolist()))

    train(config, [rows], tmp_path / "run", progress=False, callbacks=[watch])
    lines = [json.loads(line) for line in (tmp_path / "run" / "log.jsonl").read_text().splitlines()]
    for line, n_steps in zip(lines, (10, 20, 20, 20), strict=True):
        metrics, last = line["dictionaries"]["autoencoder"], line["step"]
        assert metrics["dead_window"] == 10 * n_steps
        assert metrics["dead"] == 200 - len(set.union(*active[last - n_steps : last]))


# ---- resampling --------------------------------------------------------------------------------


def test_resampled_latents_point_to_what_is_badly_reconstructed() -> None:
    dictionary, x = a_dictionary()
    before = {name: p.detach().clone() for name, p in dictionary.named_parameters()}
    error = torch.zeros_like(x)
    error[2] = 1.0  # the only token that can be drawn
    changed = resample(dictionary, torch.tensor([3]), x, x, error, torch.Generator())
    assert changed.tolist() == [3]
    direction = x[2] - before["pre_bias"]
    direction = direction / direction.norm()
    alive = [0, 1, 2, 4, 5]
    length = 0.2 * before["encoder"][alive].norm(dim=1).mean()
    assert dictionary.decoder is not None
    assert_close(dictionary.decoder[3], direction, 1e-12)
    assert_close(dictionary.encoder[3], direction * length, 1e-6)
    assert float(dictionary.latent_bias.detach()[3]) == 0
    for name, parameter in dictionary.named_parameters():
        if name != "pre_bias":
            assert torch.equal(parameter[alive], before[name][alive]), name


def test_tokens_are_drawn_by_the_square_of_their_squared_error() -> None:
    dictionary, x = a_dictionary()
    error = torch.zeros_like(x)
    error[0, 0], error[1, 0] = 1.0, 2.0  # squared errors 1 and 4: drawn as 1 to 16
    generator, first = torch.Generator().manual_seed(0), 0
    direction = torch.nn.functional.normalize((x[0] - dictionary.pre_bias).detach(), dim=0)
    for _ in range(1000):
        resample(dictionary, torch.tensor([3]), x, x, error, generator)
        assert dictionary.decoder is not None
        first += torch.allclose(dictionary.decoder[3], direction)
    assert first / 1000 == pytest.approx(1 / 17, abs=0.025)


def test_more_dead_latents_than_tokens_wait() -> None:
    dictionary, x = a_dictionary()
    error = torch.zeros_like(x)
    error[:2] = 1.0
    assert len(resample(dictionary, torch.arange(5), x, x, error, torch.Generator())) == 2
    nothing = resample(dictionary, torch.arange(5), x, x, 0 * error, torch.Generator())
    assert len(nothing) == 0


def test_those_that_wait_do_not_count_as_living() -> None:
    dictionary, x = a_dictionary()
    dead = torch.arange(1, dictionary.n_latents)
    with torch.no_grad():
        dictionary.encoder[0] *= 3 / dictionary.encoder[0].norm()
        dictionary.encoder[1:] *= 100
    error = torch.zeros_like(x)
    error[0] = 1.0
    changed = resample(dictionary, dead, x, x, error, torch.Generator())
    assert changed.tolist() == [1]
    assert float(dictionary.encoder.detach()[1].norm()) == pytest.approx(0.2 * 3)


def test_a_tied_dictionary_and_a_transcoder_are_resampled() -> None:
    dictionary, x = a_dictionary(tied=True)
    resample(dictionary, torch.tensor([3]), x, x, torch.ones_like(x), torch.Generator())
    assert float(dictionary.encoder.detach()[3].norm()) == pytest.approx(1)
    dictionary, x = a_dictionary(n_outputs=3)
    target = torch.randn(5, 3, dtype=F64, generator=torch.Generator().manual_seed(2))
    error = torch.zeros_like(target)
    error[4] = 1
    resample(dictionary, torch.tensor([3]), x, target, error, torch.Generator())
    assert dictionary.post_bias is not None
    direction = torch.nn.functional.normalize(target[4] - dictionary.post_bias, dim=0)
    assert dictionary.decoder is not None
    assert_close(dictionary.decoder[3], direction.detach(), 1e-12)


def test_adam_forgets_resampled_latents() -> None:
    dictionary, x = a_dictionary()
    optimizer = torch.optim.Adam(dictionary.parameters(), fused=True)
    dictionary.decode(dictionary.pre_act(x), x).square().sum().backward()
    optimizer.step()
    forget_moments(dictionary.per_latent(), optimizer, DEAD)
    for parameter in (dictionary.encoder, dictionary.rows, dictionary.latent_bias):
        for moment in ("exp_avg", "exp_avg_sq"):
            zero = optimizer.state[parameter][moment].reshape(6, -1).abs().sum(1) == 0
            assert zero.tolist() == [latent in DEAD for latent in range(6)]
    assert float(optimizer.state[dictionary.pre_bias]["exp_avg"].abs().min()) > 0


def test_adam_keeps_what_is_not_of_latents() -> None:
    """Of as many inputs as latents, a bias of the input's width looks like one of latents."""
    rows = planted(64)[0]
    config = TrainConfig(
        ReLUConfig(),
        n_latents=24,
        steps=8,
        remedy="resample",
        resample_every=4,
        dead_after_tokens=64,
        decoder_bias="mean",
    )
    trainee = Trainee(config, 24, None, rows.device).measure([(rows, rows)])
    optimizer = torch.optim.Adam(trainee.parameters(), fused=True)
    trainee.loss(rows, rows, 0).total.backward()
    optimizer.step()
    loss = trainee.loss(rows, rows, 3)
    loss = loss._replace(latents=torch.zeros(64, 24))  # none is active in the last 64 tokens
    trainee.after_step(rows, rows, loss, 3, 64, optimizer)
    moments = optimizer.state[trainee.dictionary.latent_bias]["exp_avg"]
    assert float(moments.abs().min()) == 0
    assert float(optimizer.state[trainee.dictionary.pre_bias]["exp_avg"].abs().min()) > 0


def kill_half(report: Any) -> None:
    """At the first step, latents that no activation can reach."""
    if report.step == 1:
        dictionary = report.trainees["autoencoder"].dictionary
        with torch.no_grad():
            dictionary.latent_bias[:32] = -12.0


@pytest.mark.parametrize("remedy", ["none", "resample", "ghost"])
def test_the_dead_are_revived(remedy: Any) -> None:
    config = TrainConfig(
        ReLUConfig(l1_coefficient=0.5),
        n_latents=64,
        steps=200,
        lr=1e-2,
        batch_size=128,
        remedy=remedy,
        resample_every=60,
        dead_after_tokens=4000,
    )
    rows = planted(5000)[0]
    autoencoder = train(config, rows, progress=False, callbacks=[kill_half])
    share = float(dead_share(autoencoder.encode(rows)))
    assert share >= 0.4 if remedy == "none" else share < 0.1, share


def test_thresholds_are_revived_too() -> None:
    config = TrainConfig(
        JumpReLUConfig(first_threshold=0.25),
        n_latents=64,
        steps=100,
        batch_size=128,
        remedy="resample",
        resample_every=50,
        dead_after_tokens=2000,
    )
    seen = []

    def watch(report: Any) -> None:
        objective = report.trainees["autoencoder"].objective
        if report.step == 1:
            objective.threshold_exponent.data[:5] = 0.5
        if report.step == 50:
            seen.append(objective.thresholds.detach()[:5].clone())

    train(config, planted(5000)[0], progress=False, callbacks=[watch])
    assert_close(seen[0], [0.25] * 5, 1e-6)


def test_aux_k_revives_the_dead() -> None:
    shared: dict[str, Any] = {"n_latents": 64, "steps": 150, "lr": 3e-3, "batch_size": 128}
    rows = planted(5000)[0]
    alive = {}
    for coefficient in (0.0, 1 / 32):
        objective = TopKConfig(k=2, aux_coefficient=coefficient)
        config = TrainConfig(objective, dead_after_tokens=3000, **shared)

        def kill(report: Any) -> None:
            if report.step == 1:
                with torch.no_grad():
                    report.trainees["autoencoder"].dictionary.encoder[:32] *= 0.02

        autoencoder = train(config, rows, progress=False, callbacks=[kill])
        alive[coefficient] = 1 - float(dead_share(autoencoder.encode(rows)))
    assert alive[0.0] <= 0.5 < alive[1 / 32]
