"""The loop: what it does to parameters each step, what it says, what it refuses."""

import json
import sys
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from neuron_explainer.dictionaries import (
    BatchTopKConfig,
    GatedConfig,
    JumpReLUConfig,
    ObjectiveConfig,
    PAnnealConfig,
    ReLUConfig,
    TopKConfig,
    TrainConfig,
    train,
    train_many,
)
from neuron_explainer.dictionaries.dictionary import LearnedDictionary
from neuron_explainer.dictionaries.first_batches import first_bias, geometric_median, mean_and_scale
from neuron_explainer.dictionaries.schedules import annealed_k, learning_rate_factor, ramp
from neuron_explainer.dictionaries.trainee import Trainee
from neuron_explainer.errors import InputError, MissingExtraError
from neuron_explainer.evaluation.metrics import fvu
from neuron_explainer.models.autoencoder import Autoencoder
from tests.conftest import assert_close
from tests.dictionaries.planted import planted

F64 = torch.float64
ROWS = planted(600)[0]


def config(objective: ObjectiveConfig | None = None, **fields: Any) -> TrainConfig:
    values: dict[str, Any] = {"n_latents": 40, "steps": 6, "batch_size": 32, "lr": 1e-2, **fields}
    return TrainConfig(objective or TopKConfig(k=2), **values)


def run(c: TrainConfig, batches: Any = ROWS, *args: Any, **kwargs: Any) -> Autoencoder:
    return train(c, batches, *args, progress=False, **kwargs)


@pytest.mark.parametrize("objective", [TopKConfig(k=2), PAnnealConfig(), BatchTopKConfig(k=2)])
def test_a_loss_may_be_computed_twice(objective: ObjectiveConfig) -> None:
    """A loss is a formula: computing it changes nothing that training depends on."""
    x = planted(64)[0]
    trainee = Trainee(config(objective), x.shape[1], None, x.device).measure([(x, x)])
    before = {name: value.clone() for name, value in trainee.state_dict().items()}
    losses = [trainee.loss(*trainee.normalize(x, x), 0).total for _ in range(2)]
    assert torch.equal(*losses)
    assert all(torch.equal(value, before[name]) for name, value in trainee.state_dict().items())


# ---- the same function of raw activations --------------------------------------------------------


def away_from_zero(trainee: Trainee) -> None:
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in trainee.parameters():
            noise = torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype)
            parameter.add_(0.1 * noise)


@pytest.mark.parametrize("normalization", ["none", "constant", "center", "layer_norm", "rms"])
@pytest.mark.parametrize(
    "objective",
    [
        TopKConfig(k=3),
        ReLUConfig(),
        JumpReLUConfig(first_threshold=0.1),
        GatedConfig(),
        BatchTopKConfig(k=3),
    ],
    ids=lambda o: o.name,
)
def test_what_is_returned_is_what_was_trained(objective: Any, normalization: Any) -> None:
    x = 5 + 3 * ROWS.double()
    c = config(objective, dtype="float64", input_normalization=normalization)
    trainee = Trainee(c, 24, None, x.device).measure([(x, x)])
    away_from_zero(trainee)
    x_hat, target = trainee.normalize(x, x)
    loss = trainee.loss(x_hat, target, 0)
    if isinstance(objective, BatchTopKConfig):  # the threshold at which this batch was cut
        trainee.objective.after_step(trainee.dictionary, loss, trainee.facts(0, x.long()[:0, 0]))
        threshold = trainee.objective.threshold
        assert isinstance(threshold, Tensor)
        threshold.mul_(1 - 1e-9)
    autoencoder = trainee.finish()
    recons = autoencoder.reconstruct(x)
    if normalization == "constant":
        error = loss.error * trainee.dictionary.target_scale
    else:
        _, stats = autoencoder.normalize(x)
        scale: Any = 1.0 if stats is None or stats.std is None else stats.std
        error = loss.error * scale
        if normalization == "layer_norm":  # 1e-5 is added to the deviation, not undone
            assert_close(x - recons, error, 1e-4)
            return
    assert_close(x - recons, error, 1e-10)


@pytest.mark.parametrize("skip", [False, True])
@pytest.mark.parametrize("normalization", ["none", "constant"])
def test_transcoders_too(skip: bool, normalization: Any) -> None:
    x = 5 + 3 * ROWS.double()
    target = 2 - 0.1 * (x @ torch.randn(24, 7, generator=torch.Generator().manual_seed(0)).double())
    c = config(
        dtype="float64", input_normalization=normalization, transcoder=True, skip=skip,
        location="1/resid.torso.post_ln_mlp", output_location="1/resid.torso.delta_mlp",
    )  # fmt: skip
    trainee = Trainee(c, 24, 7, x.device).measure([(x, target)])
    away_from_zero(trainee)
    loss = trainee.loss(*trainee.normalize(x, target), 0)
    transcoder = trainee.finish()
    assert transcoder.is_transcoder
    assert (transcoder.skip is not None) == skip
    assert str(transcoder.output_location) == "1/resid.torso.delta_mlp"
    error = loss.error * trainee.dictionary.target_scale
    assert_close(target - transcoder.reconstruct(x), error, 1e-10)


def test_a_transcoder_learns_another_location() -> None:
    rows = planted(4000)[0]
    mix = torch.randn(24, 10, generator=torch.Generator().manual_seed(0))
    pairs = [(x, (x @ mix).relu()) for x in rows.split(100)]
    c = config(TopKConfig(k=4), n_latents=64, steps=100, transcoder=True)
    transcoder = run(c, pairs)
    x, target = (torch.cat(side) for side in zip(*pairs, strict=True))
    assert float(fvu(target, transcoder.reconstruct(x))) < 0.5
    with_skip = run(
        config(TopKConfig(k=4), n_latents=64, steps=100, transcoder=True, skip=True), pairs
    )
    assert float(fvu(target, with_skip.reconstruct(x))) < 0.35


def test_normalisation_of_whole_numbers() -> None:
    mean, scale = mean_and_scale(torch.tensor([[1.0, 4.0], [3.0, 8.0]]))
    assert mean.tolist() == [2, 6]
    assert float(scale) == pytest.approx(2.5**0.5)  # deviations 1, 2, 1, 2
    assert float(mean_and_scale(torch.ones(3, 2))[1]) == 1


def test_geometric_median() -> None:
    rows = torch.randn(200, 3, generator=torch.Generator().manual_seed(0), dtype=F64)
    rows[0] = 1e6  # one enormous activation moves the mean far away
    median = geometric_median(rows, tolerance=1e-12)
    distance = (rows - median).norm(dim=1, keepdim=True)
    assert float(((rows - median) / distance).sum(0).norm()) < 1e-3  # the gradient vanishes
    assert float(median.norm()) < 0.3
    assert float(rows.mean(0).norm()) > 1000
    assert torch.equal(geometric_median(torch.ones(4, 2)), torch.ones(2))
    assert first_bias(rows, "zeros").tolist() == [0, 0, 0]
    assert torch.equal(first_bias(rows, "mean"), rows.mean(0))


# ---- the length of directions --------------------------------------------------------------------


def constrained(norm: Any) -> LearnedDictionary:
    generator = torch.Generator().manual_seed(0)
    dictionary = LearnedDictionary(30, 8, generator=generator)
    with torch.no_grad():
        dictionary.rows.mul_(torch.linspace(0.5, 1.0, 30)[:, None] if norm != "unit" else 1.0)
    dictionary.rows.grad = torch.randn(30, 8, generator=generator)
    return dictionary


def test_unit_rows_have_no_gradient_along_them() -> None:
    dictionary = constrained("unit")
    assert dictionary.rows.grad is not None
    before = dictionary.rows.grad.clone()
    dictionary.constrain_gradient("unit")
    rows = dictionary.rows.detach()
    assert float(torch.linalg.vecdot(dictionary.rows.grad, rows).abs().max()) < 1e-6
    across = before - (before * rows).sum(1, keepdim=True) * rows
    assert_close(dictionary.rows.grad, across, 1e-6)


def test_rows_of_at_most_unit_norm_may_shrink() -> None:
    dictionary = constrained("at_most_unit")
    assert dictionary.rows.grad is not None
    before = dictionary.rows.grad.clone()
    dictionary.constrain_gradient("at_most_unit")
    along = torch.linalg.vecdot(before, dictionary.rows.detach())
    at_the_edge = dictionary.rows.detach().norm(dim=1) > 0.9999
    changed = (dictionary.rows.grad != before).any(1)
    assert torch.equal(changed, at_the_edge & (along < 0))


@pytest.mark.parametrize("norm", ["unit", "at_most_unit", "free"])
def test_norms_after_training(norm: Any) -> None:
    # Weighted, so that shorter rows cost less and there is something to shrink for.
    objective = ReLUConfig(l1_coefficient=3.0, weighted=norm != "unit")
    autoencoder = run(config(objective, decoder_norm=norm, steps=30))
    norms = autoencoder.decoder.weight.detach().norm(dim=0)
    if norm == "unit":
        assert float((norms - 1).abs().max()) < 1e-6
    elif norm == "at_most_unit":
        assert float(norms.max()) <= 1 + 1e-6
        assert float(norms.min()) < 0.999
    else:
        assert float((norms - 1).abs().max()) > 1e-3


# ---- schedules -----------------------------------------------------------------------------------


def test_learning_rate() -> None:
    def factor(step: int, **more: Any) -> float:
        return learning_rate_factor(step, 100_000, 5000, "linear", 10_000, 0.0, **more)

    assert factor(0) == 1 / 5000
    assert factor(4999) == factor(50_000) == factor(90_000) == 1
    assert factor(95_000) == pytest.approx(0.5)
    assert factor(99_999) == pytest.approx(1 / 10_000)
    assert factor(25_000, restart_every=25_000) == 1 / 5000
    cosine = [learning_rate_factor(s, 100, 0, "cosine", 100, 0.1) for s in (0, 50, 99)]
    assert cosine == pytest.approx([1, 0.55, 0.1], abs=3e-4)
    assert learning_rate_factor(99, 100, 0, "none", 0, 0.0) == 1


def test_other_schedules() -> None:
    assert [ramp(s, 4) for s in (0, 3, 9)] == [0.25, 1, 1]
    assert ramp(0, 0) == 1
    assert [annealed_k(s, 4, 24, 10) for s in (0, 5, 10, 50)] == [24, 14, 4, 4]


def test_the_optimiser_gets_the_schedule_and_clipped_gradients(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    seen, step = [], torch.optim.Adam.step

    def spy(optimizer: Any, *args: Any) -> Any:
        (group,) = optimizer.param_groups
        norms = [p.grad.norm() for p in group["params"] if p.grad is not None]
        seen.append((group["lr"], group["betas"], float(torch.stack(norms).norm())))
        return step(optimizer, *args)

    monkeypatch.setattr(torch.optim.Adam, "step", spy)
    run(config(warmup_steps=2, decay="linear", decay_steps=2, beta1=0.5, grad_clip=1e-3, steps=4))
    assert [lr for lr, _, _ in seen] == pytest.approx([5e-3, 1e-2, 1e-2, 5e-3])
    assert all(betas == (0.5, 0.999) for _, betas, _ in seen)
    assert all(norm <= 1.001e-3 for _, _, norm in seen)


# ---- one forward, several dictionaries -----------------------------------------------------------


def test_two_runs_of_one_seed_are_equal_bit_for_bit() -> None:
    one, other = (run(config(steps=20)) for _ in range(2))
    for name, value in one.named_parameters():
        assert torch.equal(value, dict(other.named_parameters())[name]), name
    assert not torch.equal(one.decoder.weight, run(config(steps=20, seed=1)).decoder.weight)


def test_together_is_the_same_as_alone() -> None:
    configs = {"0/mlp.post_act": config(), "b": config(ReLUConfig(), n_latents=30, seed=2, lr=1e-3)}
    batches = [{"0/mlp.post_act": x, "b": x[:, :12]} for x in ROWS.split(50)]
    together = train_many(configs, batches, progress=False)
    for name, c in configs.items():
        alone = run(c, [batch[name] for batch in batches])
        for key, value in alone.named_parameters():
            assert torch.equal(value, dict(together[name].named_parameters())[key]), f"{name} {key}"


def test_results_lie_in_the_folder(tmp_path: Path) -> None:
    c = config(location="2/mlp.post_act", model_name="tiny")
    autoencoder = run(c, [ROWS], tmp_path / "run")
    stored = json.loads((tmp_path / "run" / "autoencoder" / "config.json").read_text())
    assert stored["location"] == "2/mlp.post_act"
    assert stored["metadata"] == {}  # how it was trained stands in the run's config
    loaded = Autoencoder.load(tmp_path / "run" / "autoencoder")
    assert torch.equal(loaded.encode(ROWS), autoencoder.encode(ROWS))
    record = json.loads((tmp_path / "run" / "config.json").read_text())
    assert record["dictionaries"]["autoencoder"]["objective"]["k"] == 2
    finished = json.loads((tmp_path / "run" / "finished.json").read_text())
    folded = finished["folded_normalization"]["autoencoder"]
    assert folded["input_mean_norm"] == pytest.approx(float(ROWS.mean(0).norm()), rel=1e-5)
    variance = (ROWS - ROWS.mean(0)).square().mean()
    assert folded["input_scale"] == pytest.approx(float(variance.sqrt()), rel=1e-5)


@pytest.mark.parametrize(
    ("configs", "batch", "message"),
    [
        ({}, {}, "no configs"),
        ({"a": config(), "b": config(steps=7)}, {}, "need the same total_steps, found 6, 7"),
        ({"a": config(), "b": config()}, {"a": ROWS}, "nothing for b; it has a"),
        ({"a": config()}, [ROWS], "expected batches {name: tensor} for a, or a tensor for all"),
    ],
)
def test_configs_and_batches_that_do_not_go_together(
    configs: Any, batch: Any, message: str
) -> None:
    with pytest.raises(InputError, match=message):
        train_many(configs, [batch], progress=False)


# ---- batches -------------------------------------------------------------------------------------


def test_batches_are_gone_through_again() -> None:
    seen = []

    class Counting:
        def __iter__(self) -> Iterator[Tensor]:
            for index, x in enumerate(ROWS.split(150)):
                seen.append(index)
                yield x

    run(config(), Counting())
    assert seen == [0, 1, 2, 3, 0, 1]


def test_an_iterator_of_just_enough_batches() -> None:
    run(config(sample_batches=3), iter(ROWS.split(100)))
    with pytest.raises(InputError, match="come to an end and cannot be started again"):
        run(config(steps=7), iter(ROWS.split(100)))


def test_a_tensor_is_shuffled_into_whole_batches() -> None:
    sizes = []
    run(
        config(batch_size=250),
        ROWS,
        callbacks=[lambda r: sizes.append(len(r.losses["autoencoder"].error))],
    )
    assert sizes == [250] * 6
    with pytest.raises(InputError, match="at least one batch of 1000"):
        run(config(batch_size=1000))


@pytest.mark.parametrize(
    ("batch", "message"),
    [
        (
            torch.zeros(3),
            r"a tensor \[b, n\] of floating-point numbers, found \[3\] of torch.float32",
        ),
        (torch.zeros(0, 4), "found"),
        ("text", "found"),
        ((ROWS, ROWS), "expected a batch to be a tensor"),
        (torch.zeros(3, 4, dtype=torch.int64), r"found \[3, 4\] of torch.int64"),
    ],
)
def test_batches_that_are_none(batch: Any, message: str) -> None:
    with pytest.raises(InputError, match=message):
        run(config(), [batch])


def test_no_batches() -> None:
    with pytest.raises(InputError, match="there are no batches to train on"):
        run(config(), [])


def test_the_width_may_not_change() -> None:
    with pytest.raises(InputError, match="width was 24, and now it is 5"):
        run(config(), [ROWS, ROWS[:, :5]])


def test_nan_in_a_batch(tmp_path: Path) -> None:
    bad = ROWS.clone()
    bad[3, 3] = float("nan")
    batches = [ROWS, ROWS, ROWS, bad]
    with pytest.raises(InputError, match="step 4, autoencoder: the batch holds NaN"):
        run(config(checkpoint_every=2), batches, tmp_path / "run")
    assert [p.name for p in (tmp_path / "run" / "checkpoints").iterdir()] == ["00000002"]
    run(config(checkpoint_every=2), [ROWS] * 4, tmp_path / "run")  # mended, it goes on


def test_nan_in_a_loss() -> None:
    def poison(report: Any) -> None:
        if report.step == 2:
            report.trainees["autoencoder"].dictionary.pre_bias.data.fill_(float("inf"))

    with pytest.raises(
        InputError, match="step 3, autoencoder: the term reconstruction of the loss"
    ):
        run(config(), ROWS, callbacks=[poison])


# ---- logs ----------------------------------------------------------------------------------------


def test_the_log(tmp_path: Path) -> None:
    autoencoder = run(config(log_every=2, steps=5, dead_after_tokens=1000), ROWS, tmp_path / "run")
    lines = [json.loads(line) for line in (tmp_path / "run" / "log.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [2, 4, 5]
    assert [line["tokens"] for line in lines] == [64, 128, 160]
    metrics = lines[-1]["dictionaries"]["autoencoder"]
    assert set(metrics) == {"loss", "reconstruction", "fvu", "l0", "dead", "dead_window", "lr"}
    assert 0 < metrics["l0"] <= 2
    assert autoencoder.n_latents == 40


def test_batches_without_variance() -> None:
    with pytest.raises(
        InputError, match="the first 32 activations are all equal: there is nothing"
    ):
        train(config(), [torch.ones(32, 24)], progress=False)


def test_several_learn_from_the_same_tensors() -> None:
    """A sweep over one place: each is what it is when trained alone."""
    configs = {f"k{k}": config(TopKConfig(k=k)) for k in (2, 5)}
    together = train_many(configs, [ROWS], progress=False)
    for name, each in configs.items():
        alone = train(each, [ROWS], progress=False)
        assert torch.equal(together[name].encoder.weight, alone.encoder.weight)


@pytest.mark.parametrize("normalization", ["none", "constant", "center", "layer_norm", "rms"])
def test_fvu_in_the_log_is_that_of_the_metrics(tmp_path: Path, normalization: Any) -> None:
    rows = ROWS * torch.linspace(0.2, 5, len(ROWS))[:, None] + 1
    once = config(steps=1, lr=1e-12, input_normalization=normalization)
    run(once, [rows], tmp_path / "run")
    line = json.loads((tmp_path / "run" / "log.jsonl").read_text())
    autoencoder = Autoencoder.load(tmp_path / "run" / "autoencoder")
    expected = float(fvu(rows, autoencoder.reconstruct(rows)).detach())
    assert line["dictionaries"]["autoencoder"]["fvu"] == pytest.approx(expected, rel=1e-4)


def test_the_progress_bar(capsys: pytest.CaptureFixture[str]) -> None:
    train(config(log_every=1), ROWS)
    shown = capsys.readouterr().err
    for name in ("tokens/s", "loss", "fvu", "l0", "dead"):
        assert f"{name}=" in shown


class FakeWriter:
    made: list["FakeWriter"] = []  # noqa: RUF012  # of the test, not of an instance

    def __init__(self, folder: str, purge_step: int) -> None:
        self.folder, self.purge_step, self.scalars = folder, purge_step, list[Any]()
        self.made.append(self)

    def add_scalar(self, name: str, value: float, step: int) -> None:
        self.scalars.append((name, step))

    def close(self) -> None:
        self.scalars.append("closed")


def test_tensorboard_when_asked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    module = types.SimpleNamespace(SummaryWriter=FakeWriter)
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", module)
    run(config(log_every=3), ROWS, tmp_path / "run", log_to=["tensorboard"])
    (writer,) = FakeWriter.made
    assert ("fvu", 3) in writer.scalars
    assert writer.scalars[-1] == "closed"
    assert writer.purge_step == 1


def test_wandb_goes_on_with_its_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Any] = []
    logged: list[Any] = []

    class Run:
        id = "abc"

        def log(self, values: Any, step: int) -> None:
            logged.append((step, sorted(values)))

        def finish(self) -> None:
            logged.append("finished")

    def init(**settings: Any) -> Run:
        asked.append(settings["id"])
        return Run()

    monkeypatch.setitem(sys.modules, "wandb", types.SimpleNamespace(init=init))

    def stop(report: Any) -> None:
        if report.step == 4:
            raise KeyboardInterrupt

    c = config(log_every=2, checkpoint_every=2)
    with pytest.raises(KeyboardInterrupt):
        run(c, ROWS, tmp_path / "run", log_to=["wandb"], callbacks=[stop])
    run(c, ROWS, tmp_path / "run", log_to=["wandb"])
    assert asked == [None, "abc"]
    assert [entry if isinstance(entry, str) else entry[0] for entry in logged] == [
        2, 4, "finished", 4, 6, "finished",
    ]  # fmt: skip


def test_loggers_that_are_not_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(MissingExtraError, match="pip install wandb"):
        run(config(), ROWS, tmp_path / "run", log_to=["wandb"])
    with pytest.raises(InputError, match="Did you mean 'tensorboard'"):
        run(config(), ROWS, tmp_path / "run", log_to=["tensorbord"])
    with pytest.raises(InputError, match="needs a folder"):
        run(config(), ROWS, log_to=["wandb"])


def test_nothing_is_left_switched_on() -> None:
    small = torch.tensor(1e-40)
    assert float(small + torch.zeros(())) != 0
    run(config(steps=1), ROWS)
    assert float(small + torch.zeros(())) != 0


def test_p_anneal_runs_to_its_end() -> None:
    autoencoder = run(config(PAnnealConfig(n_updates=3, memory=2), steps=30))
    assert torch.isfinite(autoencoder.encoder.weight).all()
