"""Losses against numbers worked out by hand, gradients against finite differences of the formulas."""

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from neuron_explainer.dictionaries import (
    BatchTopKConfig,
    GatedConfig,
    JumpReLUConfig,
    Loss,
    MatryoshkaConfig,
    Objective,
    ObjectiveConfig,
    PAnnealConfig,
    ReLUConfig,
    SparseLatents,
    StepFacts,
    TopKConfig,
    TrainConfig,
    register,
    train,
)
from neuron_explainer.dictionaries.dictionary import LearnedDictionary
from neuron_explainer.dictionaries.objectives import make_objective
from neuron_explainer.dictionaries.objectives.batch_topk import batch_top_k
from neuron_explainer.dictionaries.objectives.jumprelu import JumpReLU, jump_relu, step
from neuron_explainer.dictionaries.objectives.relu import PAnneal
from neuron_explainer.dictionaries.objectives.topk import aux_k_loss
from neuron_explainer.errors import InputError
from neuron_explainer.evaluation.metrics import dead_share, fvu
from tests.conftest import assert_close
from tests.dictionaries.planted import planted, recovered

F64 = torch.float64
NONE_DEAD = torch.empty(0, dtype=torch.int64)
X = torch.tensor([[3.0, 1.0], [0.0, 2.0]], dtype=F64)


def moment(step: int = 0, dead: Tensor = NONE_DEAD, sparsity: float = 1.0) -> StepFacts:
    return StepFacts(step, 100, sparsity, dead)


def identity() -> LearnedDictionary:
    """Two latents, each an axis of the plane; no biases; variance 1."""
    dictionary = LearnedDictionary(2, 2, dtype=F64)
    with torch.no_grad():
        dictionary.encoder.copy_(torch.eye(2))
        dictionary.rows.copy_(torch.eye(2))
    return dictionary


def hand_loss(config: ObjectiveConfig, at: StepFacts | None = None, **parameters: float) -> Loss:
    dictionary = identity()
    objective = make_objective(config, dictionary)
    for name, value in parameters.items():
        getattr(objective, name).data.fill_(value)
    loss: Loss = objective.loss(dictionary, X, X, at or moment())
    return loss._replace(total=loss.total.detach())


def dense(loss: Loss) -> Tensor:
    assert isinstance(loss.latents, Tensor)
    return loss.latents


def test_topk_by_hand() -> None:
    # 3 and 2 stay; the 1 is lost: 1² over two tokens.
    loss = hand_loss(TopKConfig(k=1))
    assert float(loss.total) == 0.5
    assert loss.error.tolist() == [[0, 1], [0, 0]]
    assert isinstance(loss.latents, SparseLatents)
    assert loss.latents.values.tolist() == [[3], [2]]
    assert loss.latents.indices.tolist() == [[0], [1]]


def test_aux_k_by_hand() -> None:
    # Latent 1 explains the errors [0 1], [0 0] as [0 1], [0 2]: 2² / 2 = 2, and their deviation from
    # their mean [0 ½] is ¼.
    loss = hand_loss(TopKConfig(k=1, aux_k=1), moment(dead=torch.tensor([1])))
    assert float(loss.terms["aux"]) == pytest.approx(8)
    assert float(loss.total) == pytest.approx(0.5 + 8 / 32)


def test_multi_top_k_by_hand() -> None:
    loss = hand_loss(TopKConfig(k=1, multi_k=2))
    assert float(loss.terms["multi"]) == 0  # both latents: perfect
    assert float(loss.total) == 0.5


def test_losses_are_shares_of_the_variance() -> None:
    dictionary = identity()
    dictionary.variance.fill_(4.0)
    for config in (TopKConfig(k=1), BatchTopKConfig(k=1)):
        loss = make_objective(config, dictionary).loss(dictionary, X, X, moment())
        assert float(loss.total.detach()) == 0.5 / 4


def test_annealed_k() -> None:
    config = TopKConfig(k=1, k_anneal_steps=10, k_start=2)
    assert float(hand_loss(config, moment(0)).total) == 0
    assert float(hand_loss(config, moment(10)).total) == 0.5


def test_batch_top_k_by_hand() -> None:
    loss = hand_loss(BatchTopKConfig(k=1))  # the two largest of all four: 3 and 2
    assert float(loss.total) == 0.5
    active = batch_top_k(torch.tensor([[5.0, 4.0, 3.0], [1.0, -1.0, 0.5]]), 2)
    assert active.values.tolist() == [5, 4, 3, 1]
    assert active.indices.tolist() == [0, 1, 2, 0]
    assert active.starts is not None
    assert active.starts.tolist() == [0, 3]


def test_matryoshka_by_hand() -> None:
    # Latent 0 alone leaves [0 1], [0 2]: 5 / 2; both leave 1 / 2.
    loss = hand_loss(MatryoshkaConfig(k=1, group_fractions=(0.5, 0.5)))
    assert float(loss.terms["prefix_0"]) == 2.5
    assert float(loss.terms["prefix_1"]) == 0.5
    assert float(loss.terms["reconstruction"]) == float(loss.total) == 1.5


def test_relu_by_hand() -> None:
    loss = hand_loss(ReLUConfig(l1_coefficient=0.5), moment(sparsity=0.5))
    assert float(loss.terms["reconstruction"]) == 0
    assert float(loss.total) == 0.5 * 0.5 * (3 + 1 + 2) / 2
    assert dense(loss).tolist() == X.tolist()


def test_weighted_l1_by_hand() -> None:
    dictionary = identity()
    dictionary.rows.data.copy_(torch.tensor([[1.0, 0.0], [0.0, 2.0]]))
    config = ReLUConfig(l1_coefficient=1, weighted=True)
    loss = make_objective(config, dictionary).loss(dictionary, X, X, moment())
    assert float(loss.terms["sparsity"]) == (3 + 2 * 1 + 2 * 2) / 2
    assert float(loss.terms["reconstruction"]) == (1 + 4) / 2


def test_p_anneal_by_hand() -> None:
    config = PAnnealConfig(p_end=0.5, n_updates=1, anneal_start=50)
    assert float(hand_loss(config, moment(49)).total) == 3
    expected = (math.sqrt(3) + 1 + math.sqrt(2)) / 2
    assert float(hand_loss(config, moment(50)).total) == pytest.approx(expected)


def test_p_anneal_keeps_the_penalty() -> None:
    config = PAnnealConfig(p_end=0.5, n_updates=1, anneal_start=50, memory=3)
    dictionary = identity()
    objective = make_objective(config, dictionary)
    for at in range(46, 50):
        loss = objective.loss(dictionary, X, X, moment(at))
        objective.after_step(dictionary, loss, moment(at))
    after = objective.loss(dictionary, X, X, moment(50))
    assert float(after.terms["sparsity"]) == pytest.approx(3)  # what it was with p = 1
    assert isinstance(objective, PAnneal)
    assert objective.sums.tolist() == [0, 0]


def test_p_falls_in_steps() -> None:
    objective = make_objective(PAnnealConfig(p_end=0.5, n_updates=5, anneal_start=50), identity())
    assert isinstance(objective, PAnneal)
    assert [objective.updates(at, 100) for at in (0, 49, 50, 59, 60, 90, 99)] == [
        0,
        0,
        1,
        1,
        2,
        5,
        5,
    ]


def test_p_is_1_at_first() -> None:
    objective = make_objective(PAnnealConfig(p_end=0.5, n_updates=4), identity())
    assert isinstance(objective, PAnneal)
    assert [objective.updates(at, 100) for at in (0, 19, 20, 39, 40, 79, 80, 99)] == [
        0, 0, 1, 1, 2, 3, 4, 4,
    ]  # fmt: skip
    assert objective.p_after(4) == 0.5
    with pytest.raises(InputError, match="anneal_start must be at least 1"):
        PAnnealConfig(anneal_start=0)


def test_jump_relu_by_hand() -> None:
    loss = hand_loss(JumpReLUConfig(target_l0=2, coefficient=4, first_threshold=1.5))
    assert dense(loss).tolist() == [[3, 0], [0, 2]]
    assert float(loss.terms["reconstruction"]) == 0.5
    assert float(loss.terms["sparsity"]) == 4 * (1 / 2 - 1) ** 2
    plain = hand_loss(JumpReLUConfig(target_l0=None, coefficient=4, first_threshold=1.5))
    assert float(plain.terms["sparsity"]) == 4 * 1


def test_gated_by_hand() -> None:
    loss = hand_loss(GatedConfig(l1_coefficient=1), b_gate=-1.5, b_mag=0.5)
    assert dense(loss).tolist() == [[3.5, 0], [0, 2.5]]
    assert float(loss.terms["reconstruction"]) == (0.25 + 1 + 0.25) / 2
    assert float(loss.terms["sparsity"]) == (1.5 + 0.5) / 2
    assert float(loss.terms["gate"]) == (1.5**2 + 1 + 1.5**2) / 2


# ---- gradients ---------------------------------------------------------------------------------


class Total(nn.Module):
    """The loss as a function of all parameters."""

    def __init__(self, config: ObjectiveConfig, seed: int = 0, **fields: Any) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        self.dictionary = LearnedDictionary(10, 5, dtype=F64, generator=generator, **fields)
        self.objective = make_objective(config, self.dictionary)
        for parameter in self.parameters():
            noise = torch.randn(parameter.shape, generator=generator, dtype=F64)
            parameter.data += 0.3 * noise
        self.dictionary.variance.fill_(3.0)
        self.x = torch.randn(6, 5, generator=generator, dtype=F64)
        self.target = self.x
        if self.dictionary.is_transcoder:
            self.target = torch.randn(6, self.dictionary.n_outputs, generator=generator, dtype=F64)

    def forward(self, at: StepFacts) -> Tensor:
        return self.objective.loss(self.dictionary, self.x, self.target, at).total

    def gradients(self, at: StepFacts) -> dict[str, Tensor]:
        names, parameters = zip(*self.named_parameters(), strict=True)
        found = torch.autograd.grad(self(at), parameters, allow_unused=True)
        return {
            name: torch.zeros_like(p) if grad is None else grad
            for name, p, grad in zip(names, parameters, found, strict=True)
        }


def assert_is_derivative(total: Total, at: StepFacts, but: tuple[str, ...] = ()) -> None:
    names, values = [], []
    for name, parameter in total.named_parameters():
        if name not in but:
            names.append(name)
            values.append(parameter.detach().clone().requires_grad_())

    def function(*parameters: Tensor) -> Tensor:
        state = dict(zip(names, parameters, strict=True))
        found: Tensor = torch.func.functional_call(total, state, (at,))
        return found

    assert torch.autograd.gradcheck(function, values)


SHAPES = pytest.mark.parametrize(
    "fields", [{}, {"tied": True}, {"n_outputs": 4, "skip": True}], ids=str
)


@SHAPES
@pytest.mark.parametrize(
    "config",
    [
        TopKConfig(k=2),
        TopKConfig(k=2, multi_k=5),
        ReLUConfig(l1_coefficient=0.3),
        ReLUConfig(l1_coefficient=0.3, weighted=True),
        PAnnealConfig(l1_coefficient=0.3, p_end=0.5, n_updates=1),
        BatchTopKConfig(k=2),
        MatryoshkaConfig(k=2, group_fractions=(0.2, 0.3, 0.5)),
    ],
    ids=lambda c: f"{c.name}{'+' if getattr(c, 'multi_k', None) else ''}",
)
def test_gradients_are_derivatives(config: ObjectiveConfig, fields: dict[str, Any]) -> None:
    assert_is_derivative(Total(config, **fields), moment(10))


@SHAPES
def test_jump_relu_gradients_are_derivatives_but_for_thresholds(fields: dict[str, Any]) -> None:
    config = JumpReLUConfig(bandwidth=0.5, first_threshold=0.1)
    total = Total(config, **fields)
    assert_is_derivative(total, moment(), but=("objective.threshold_exponent",))


def assert_gradients(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, grad in expected.items():
        difference = float((found[name] - grad).abs().max())
        assert difference < 1e-7, f"{name}: off by {difference:.3g}"


def differences(total: Total, formula: Callable[[dict[str, Tensor]], Tensor]) -> dict[str, Tensor]:
    """Central finite differences of a formula of the parameters, which are plain tensors."""
    values = {name: p.detach().clone() for name, p in total.named_parameters()}
    found = {}
    for name, value in values.items():
        grad = torch.zeros_like(value)
        for index in range(value.numel()):
            sides = []
            for sign in (1, -1):
                moved = value.clone()
                moved.view(-1)[index] += sign * 1e-6
                sides.append(float(formula({**values, name: moved})))
            grad.view(-1)[index] = (sides[0] - sides[1]) / 2e-6
        found[name] = grad
    return found


def pre_act(p: dict[str, Tensor], x: Tensor) -> Tensor:
    return (x - p["dictionary.pre_bias"]) @ p["dictionary.encoder"].T + p["dictionary.latent_bias"]


@SHAPES
def test_gated_gradients_are_those_of_the_formula_with_a_frozen_decoder(
    fields: dict[str, Any],
) -> None:
    total = Total(GatedConfig(l1_coefficient=0.4), **fields)
    frozen = {name: p.detach().clone() for name, p in total.named_parameters()}
    x, target = total.x, total.target

    def decoded(latents: Tensor, p: dict[str, Tensor]) -> Tensor:
        rows = p.get("dictionary.decoder", p["dictionary.encoder"])
        recons = latents @ rows + p.get("dictionary.post_bias", p["dictionary.pre_bias"])
        return recons + x @ p["dictionary.skip"].T if "dictionary.skip" in p else recons

    def formula(p: dict[str, Tensor]) -> Tensor:
        z = pre_act(p, x)
        gate = z + p["objective.b_gate"]
        magnitude = (z * p["objective.r_mag"].exp() + p["objective.b_mag"]).clamp_min(0)
        # A step has no derivative: open or shut as it is at the point where this is taken.
        shut = pre_act(frozen, x) + frozen["objective.b_gate"] <= 0
        latents = magnitude.masked_fill(shut, 0)
        recons = decoded(latents, p)
        opening = gate.clamp_min(0)
        held = decoded(opening, frozen)
        errors = (target - recons).square().sum(1) + (target - held).square().sum(1)
        return (errors + 0.4 * opening.sum(1)).mean()

    assert_gradients(total.gradients(moment()), differences(total, formula))


def test_aux_k_gradients_are_those_of_the_formula_with_a_given_error() -> None:
    total = Total(TopKConfig(k=2, aux_k=2))
    dead = torch.tensor([1, 4, 8])
    x, d = total.x, total.dictionary
    error = total.objective.loss(d, x, x, moment()).error

    def formula(p: dict[str, Tensor]) -> Tensor:
        z = pre_act(p, x)
        latents = z.scatter(1, z.topk(2).indices, 0).neg() + z  # what is not among the largest: 0
        recons = latents.clamp_min(0) @ p["dictionary.decoder"] + p["dictionary.pre_bias"]
        top = z[:, dead].topk(2)
        ghost = torch.zeros(6, 3, dtype=F64).scatter(1, top.indices, top.values.clamp_min(0))
        explained = ghost @ p["dictionary.decoder"][dead]
        deviation = (error - error.mean(0)).square().sum(1).mean()
        aux = (error - explained).square().sum(1).mean() / deviation
        return (x - recons).square().sum(1).mean() / 3 + aux / 32

    assert_gradients(total.gradients(moment(dead=dead)), differences(total, formula))


def test_aux_k_of_a_perfect_reconstruction() -> None:
    dictionary = identity()
    aux = aux_k_loss(
        TopKConfig(k=1), dictionary, X, torch.zeros_like(X), moment(dead=torch.tensor([0]))
    )
    assert aux is not None
    aux.backward()
    assert float(aux.detach()) == 0
    gradient = dictionary.encoder.grad
    assert gradient is not None
    assert gradient.abs().max() == 0


def test_straight_through_gradients_of_thresholds() -> None:
    """The paper's pseudo-derivatives with the rectangle kernel, written out for each entry."""
    generator = torch.Generator().manual_seed(0)
    z = torch.rand(7, 4, generator=generator, dtype=F64).requires_grad_()
    threshold = (0.3 + 0.4 * torch.rand(4, generator=generator, dtype=F64)).requires_grad_()
    weight = torch.randn(7, 4, generator=generator, dtype=F64)
    width = 0.25
    for function, scale, passes in ((jump_relu, threshold, True), (step, torch.ones(4), False)):
        inputs = (z, threshold)
        found = torch.autograd.grad(
            (function(z, threshold, width) * weight).sum(), inputs, allow_unused=True
        )
        expected = torch.zeros(4, dtype=F64)
        for token in range(7):
            for latent in range(4):
                u = float((z - threshold).detach()[token, latent] / width)
                kernel = 1.0 if -0.5 <= u <= 0.5 else 0.0
                factor = -float(scale.detach()[latent]) / width * kernel
                expected[latent] += factor * weight[token, latent]
        assert expected.abs().min() > 0
        assert_close(found[1], expected, 1e-12)
        if passes:
            assert torch.equal(found[0], torch.where(z > threshold, weight, 0.0))
        else:
            assert found[0] is None


def test_jump_relu_thresholds_in_units_of_the_deviation() -> None:
    total = Total(
        JumpReLUConfig(bandwidth=0.5, first_threshold=0.1, target_l0=None, threshold_speed=7.0)
    )
    assert isinstance(total.objective, JumpReLU)
    unit = math.sqrt(3.0)
    x, d = total.x, total.dictionary
    z = d.pre_act(x).relu()
    threshold = total.objective.thresholds * unit
    latents = torch.where(z > threshold, z, 0.0)
    upstream = torch.autograd.grad(  # of the reconstruction loss
        ((x - d.decode(latents, x)).square().sum(1).mean() / 3), latents, retain_graph=True
    )[0]
    near = ((z - threshold).abs() <= 0.5 * unit / 2).to(F64)
    bandwidth = 0.5 * unit
    by_latents = (-(threshold / bandwidth) * near * upstream).sum(0)
    by_l0 = (-(1 / bandwidth) * near / len(x)).sum(0)
    expected = (by_latents + by_l0) * threshold * 7  # with respect to a seventh of the logarithm
    found = total.gradients(moment())["objective.threshold_exponent"]
    assert_close(found, expected.detach(), 1e-12)


def test_jump_relu_thresholds_are_learned_in_a_short_run() -> None:
    """With the defaults, in a few hundred steps; at the speed of all else nothing is sparse yet."""
    for speed, sparse in ((JumpReLUConfig.threshold_speed, True), (1.0, False)):
        config = JumpReLUConfig(target_l0=3, threshold_speed=speed)
        autoencoder, rows, _, _ = trained(config)
        l0 = float((autoencoder.encode(rows[:2000]) > 0).float().sum(1).mean())
        assert l0 < 8 if sparse else l0 > 50


# ---- what training makes of them ---------------------------------------------------------------


def trained(config: ObjectiveConfig, **fields: Any) -> tuple[Any, Tensor, Tensor, list[float]]:
    rows, atoms = planted(20_000)
    settings: dict[str, Any] = {
        "n_latents": 64,
        "steps": 400,
        "batch_size": 256,
        "lr": 5e-3,
        "warmup_steps": 20,
        "decay": "linear",
        "decay_steps": 200,
        **fields,
    }
    losses: list[float] = []
    autoencoder = train(
        TrainConfig(config, **settings),
        rows,
        progress=False,
        callbacks=[lambda report: losses.append(float(report.losses["autoencoder"].total))],
    )
    return autoencoder, rows, atoms, losses


@pytest.mark.parametrize("config", [TopKConfig(k=2), ReLUConfig(l1_coefficient=1.5)], ids=str)
def test_planted_atoms_are_recovered(config: ObjectiveConfig) -> None:
    autoencoder, _, atoms, _ = trained(config, dead_after_tokens=20_000, steps=300, decay_steps=150)
    assert recovered(atoms, autoencoder.decoder.weight.t()) >= 0.95
    norms = torch.linalg.vector_norm(autoencoder.decoder.weight, dim=0)
    assert float((norms - 1).detach().abs().max()) < 1e-6


def test_relu_explains_and_lives() -> None:
    autoencoder, rows, _, _ = trained(ReLUConfig(l1_coefficient=0.25))
    assert float(fvu(rows, autoencoder.reconstruct(rows))) < 0.05
    assert float(dead_share(autoencoder.encode(rows))) < 0.05


@pytest.mark.parametrize(
    ("config", "fields"),
    [
        (ReLUConfig(), {"tied": True}),
        (ReLUConfig(weighted=True), {"decoder_norm": "free"}),
        (PAnnealConfig(anneal_start=50, p_end=0.5), {}),
        (GatedConfig(), {"sparsity_warmup_steps": 10}),
        (TopKConfig(k=2, multi_k=4, aux_coefficient=0), {}),
    ],
    ids=lambda v: getattr(v, "name", ""),
)
def test_losses_fall(config: ObjectiveConfig, fields: dict[str, Any]) -> None:
    losses = trained(config, steps=100, decay_steps=50, **fields)[3]
    assert sum(losses[-10:]) < 0.75 * sum(losses[:10])


def active(autoencoder: Any, rows: Tensor) -> float:
    return float((autoencoder.encode(rows) > 0).sum(1).double().mean())


@pytest.mark.parametrize("config", [BatchTopKConfig(k=2), MatryoshkaConfig(k=2)], ids=str)
def test_the_threshold_gives_the_k_that_was_asked_for(config: ObjectiveConfig) -> None:
    autoencoder, rows, _, losses = trained(config, steps=200, decay_steps=100)
    assert active(autoencoder, rows) == pytest.approx(2, rel=0.1)
    assert losses[-1] < 0.85 * losses[0]


def test_longer_prefixes_explain_more() -> None:
    config = MatryoshkaConfig(k=2, group_fractions=(0.25, 0.25, 0.5))
    autoencoder, rows, _, _ = trained(config, steps=200, decay_steps=100)
    assert autoencoder.group_sizes == (16, 16, 32)
    latents = autoencoder.encode(rows)
    errors = [
        float((rows - autoencoder.decode_prefix(latents, n)).detach().square().mean())
        for n in (16, 32, 64)
    ]
    assert errors[0] > errors[1] > errors[2]


def test_jump_relu_reaches_its_target() -> None:
    config = JumpReLUConfig(target_l0=3, bandwidth=0.3, first_threshold=0.1)
    autoencoder, rows, _, losses = trained(config, lr=1e-2, steps=300)
    assert active(autoencoder, rows) == pytest.approx(3, rel=0.15)
    assert losses[-1] < 0.3 * losses[0]


def test_an_outsider_registers_without_touching_the_loop() -> None:
    from dataclasses import dataclass

    @dataclass(frozen=True)
    class ScaledConfig(ObjectiveConfig):
        factor: float = 2.0
        """Of the error."""

    @register("scaled_for_test", ScaledConfig)
    class Scaled(Objective[ScaledConfig]):
        def loss(
            self, dictionary: LearnedDictionary, x: Tensor, target: Tensor, at: StepFacts
        ) -> Loss:
            latents = dictionary.pre_act(x).relu()
            error = target - dictionary.decode(latents, x)
            total = self.config.factor * error.square().mean()
            terms = {"reconstruction": total.detach()}
            return Loss(total, terms, error.detach(), latents.detach())

        def activation(self, dictionary: LearnedDictionary) -> nn.Module:
            return nn.ReLU()

    assert "scaled_for_test" in ObjectiveConfig.names()
    _, _, _, losses = trained(ScaledConfig(factor=3.0), steps=30, decay_steps=10)
    assert losses[-1] < losses[0]
    with pytest.raises(InputError, match="registered already"):
        register("topk", ScaledConfig)(Scaled)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: TopKConfig(k=0), "k must be at least 1"),
        (lambda: TopKConfig(k=4, multi_k=4), "multi_k must be more than k"),
        (lambda: TopKConfig(k=4, k_start=8), "needs k_anneal_steps"),
        (lambda: MatryoshkaConfig(group_fractions=(0.5, 0.4)), "add up to 1"),
        (lambda: JumpReLUConfig(bandwidth=0), "bandwidth must be above 0"),
        (lambda: PAnnealConfig(p_end=0), "p_end must be in 0 to 1"),
        (
            lambda: make_objective(TopKConfig(k=3), identity()),
            "3 active latents are more than the 2",
        ),
    ],
)
def test_settings_that_cannot_be(make: Callable[[], Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        make()
