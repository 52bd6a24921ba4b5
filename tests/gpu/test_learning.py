"""Learning on CUDA: harvests, steps of every objective, checkpoints, several processes, evaluation."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from neuron_explainer.activations import Harvester, TokenWindows, tokenize
from neuron_explainer.dictionaries import (
    BatchTopKConfig,
    GatedConfig,
    JumpReLUConfig,
    MatryoshkaConfig,
    ObjectiveConfig,
    PAnnealConfig,
    ReLUConfig,
    StepReport,
    TopKConfig,
    TrainConfig,
    evaluate,
    train,
)
from neuron_explainer.dictionaries.sparse_coding import SparseCodingConfig, train_sparse_coding
from neuron_explainer.models.autoencoder import Autoencoder
from neuron_explainer.models.model_context import ModelContext
from neuron_explainer.models.model_registry import make_autoencoder_context
from tests.conftest import assert_close
from tests.dictionaries.planted import planted

ROOT = Path(__file__).parent.parent.parent
LOCATION = "2/resid.torso.delta_mlp"
TEXTS = ["The king had three sons, and the youngest went into the forest. " * 4] * 6


def config(objective: ObjectiveConfig, **settings: Any) -> TrainConfig:
    fields = {
        "n_latents": 128,
        "steps": 12,
        "batch_size": 128,
        "lr": 3e-3,
        "dead_after_tokens": 300,
    }
    return TrainConfig(objective, **(fields | settings))


def windows(context: ModelContext) -> TokenWindows:
    return TokenWindows(tokenize(TEXTS, context), 32, 4)


def test_a_harvest_is_that_of_the_cpu(device: torch.device) -> None:
    """The clock of the harvester waits for the device, so that its time is that of the work."""
    found = []
    for where in (torch.device("cpu"), device):
        context = ModelContext.from_model_type("tiny-tales", device=where)
        harvester = Harvester(context, LOCATION)
        found.append(
            [next(iter(harvester(batch).activations.values())) for batch in windows(context)]
        )
        assert harvester.forward_s > 0
    assert found[1][0].device.type == device.type
    for a, b in zip(*found, strict=True):
        assert_close(b.cpu().float(), a.float(), 2e-3)  # tiny-tales is stored in float16


@pytest.mark.parametrize(
    "objective",
    [
        TopKConfig(k=4),
        TopKConfig(k=4, multi_k=8),
        BatchTopKConfig(k=4),
        MatryoshkaConfig(k=4),
        ReLUConfig(),
        PAnnealConfig(),
        GatedConfig(),
        JumpReLUConfig(),
    ],
    ids=lambda objective: type(objective).__name__,
)
def test_every_objective_learns_as_on_the_cpu(
    device: torch.device, objective: ObjectiveConfig
) -> None:
    """The losses of the first steps; Adam is fused on both."""
    rows = planted(128 * 12)[0]
    losses: list[list[float]] = []
    for where in (torch.device("cpu"), device):
        curve: list[float] = []

        def note(report: StepReport, curve: list[float] = curve) -> None:
            curve.append(float(next(iter(report.losses.values())).total))

        trained = train(
            config(objective, device=str(where)), rows, progress=False, callbacks=[note]
        )
        losses.append(curve)
        assert all(bool(torch.isfinite(p).all()) for p in trained.parameters())
    assert losses[1] == pytest.approx(losses[0], rel=2e-2)


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("objective", [TopKConfig(k=4), ReLUConfig()], ids=["topk", "relu"])
def test_a_longer_run_explains_the_data(
    device: torch.device, objective: ObjectiveConfig, autocast: bool
) -> None:
    rows = planted(20_000)[0].to(device)
    longer = config(objective, steps=300, batch_size=512, autocast=autocast, device=str(device))
    autoencoder = train(longer, rows, progress=False)
    with torch.no_grad():
        error = (autoencoder.reconstruct(rows) - rows).square().sum()
    assert float(error / (rows - rows.mean(0)).square().sum()) < 0.3


def test_a_run_goes_on_from_its_checkpoint_here_and_elsewhere(
    device: torch.device, tmp_path: Path
) -> None:
    rows = planted(128 * 12)[0]

    class StopError(Exception):
        pass

    def stop(report: StepReport) -> None:
        if report.step == 8:
            raise StopError

    whole = train(config(TopKConfig(k=4), device=str(device)), rows, progress=False)
    for name, where in (("same", device), ("cpu", torch.device("cpu"))):
        folder = tmp_path / name
        first = config(TopKConfig(k=4), device=str(device), checkpoint_every=4)
        with pytest.raises(StopError):
            train(first, rows, folder, progress=False, callbacks=[stop])
        later = config(TopKConfig(k=4), device=str(where), checkpoint_every=4)
        found = train(later, rows, folder, progress=False)
        assert_close(found.encoder.weight.cpu(), whole.encoder.weight.cpu(), 2e-2, name)


def test_sparse_coding(device: torch.device) -> None:
    rows = planted(2000)[0]
    settings = SparseCodingConfig(64, 0.2, step_size=0.05, tolerance=1e-2)
    found = [
        train_sparse_coding(settings, [x.to(where) for x in rows.split(200)], progress=False)
        for where in (torch.device("cpu"), device)
    ]
    snr = [autoencoder.metadata["snr"] for autoencoder in found]
    assert snr[1] == pytest.approx(snr[0], rel=0.05)


def test_an_evaluation_is_that_of_the_cpu(device: torch.device) -> None:
    found = []
    for where in (torch.device("cpu"), device):
        context = ModelContext.from_model_type("tiny-tales", device=where)
        known = make_autoencoder_context("tiny-tales", "ae-resid-delta-mlp", device=where)
        found.append(evaluate(context, known.get_autoencoder(2), windows(context), progress=False))
    here, there = found
    assert there.fvu == pytest.approx(here.fvu, rel=1e-2)
    assert there.l0 == pytest.approx(here.l0, rel=1e-2)
    assert here.losses is not None
    assert there.losses is not None
    assert there.losses.ce_spliced == pytest.approx(here.losses.ce_spliced, rel=1e-2)


@pytest.mark.parametrize("divide", ["data", "latents"])
def test_processes_over_nccl(device: torch.device, tmp_path: Path, divide: str) -> None:
    """As many processes as there are devices; what they find is what one finds."""
    (tmp_path / "text.txt").write_text(" ".join(TEXTS))
    n_devices = max(1, torch.cuda.device_count())
    options = (
        f"train {tmp_path / 'text.txt'} --location 1/mlp.post_act --steps 8 --batch-size 64 "
        "--n-latents 64 --k 4 --context-length 32 --windows-per-forward 4 --buffer-tokens 512 "
        f"--hold-out 0 --json --device {device.type}"
    )
    launcher = f"-m torch.distributed.run --standalone --nproc-per-node {n_devices}"
    found = []
    for name, start in (
        ("one", f"-m neuron_explainer {options}"),
        ("all", f"{launcher} -m tests.dictionaries.left {options} --divide {divide}"),
    ):
        run = subprocess.run(
            [sys.executable, *start.split(), "--out", str(tmp_path / name)],
            cwd=ROOT,
            capture_output=True,
            text=True,
            check=False,
        )
        assert run.returncode == 0, run.stderr
        assert json.loads(run.stdout)["steps"] == 8
        found.append(Autoencoder.load(tmp_path / name / "autoencoder").encoder.weight.detach())
    assert_close(found[1], found[0], 1e-2)
