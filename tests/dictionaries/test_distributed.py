"""Two processes give what one gives, and a run one of whose processes dies stops and goes on."""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from torch import Tensor

from neuron_explainer import cli
from neuron_explainer.dictionaries import ReLUConfig, TopKConfig, train
from neuron_explainer.dictionaries.dictionary import LearnedDictionary
from neuron_explainer.dictionaries.distributed import World
from neuron_explainer.dictionaries.objectives.relu import ReLU
from neuron_explainer.errors import InputError
from neuron_explainer.models.autoencoder import Autoencoder
from tests.dictionaries import world_runs
from tests.dictionaries.world_runs import CASES, KILLED_AT, STEPS

ROOT = Path(__file__).parent.parent.parent


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs")
    subprocess.run(
        [sys.executable, "-m", "tests.dictionaries.world_runs", str(folder)],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        check=True,
    )
    return folder


def statuses(runs: Path, group: str) -> list[int]:
    found: list[int] = json.loads((runs / "statuses.json").read_text())[group]
    return found


def said(runs: Path, group: str) -> str:
    return "".join(path.read_text() for path in sorted((runs / group).glob("said*")))


def split(tensors: dict[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Curves of losses, and weights."""
    curves = {name: x for name, x in tensors.items() if name.startswith("curve ")}
    return curves, {name: x for name, x in tensors.items() if name not in curves}


@pytest.mark.parametrize("name", CASES)
def test_two_processes_are_as_one(runs: Path, name: str) -> None:
    assert statuses(runs, "cases") == [0, 0], said(runs, "cases")
    curves, weights = split(safetensors.torch.load_file(runs / "cases" / f"{name}.safetensors"))
    expected_curves, expected_weights = split(world_runs.found(CASES[name]))
    assert curves.keys() == expected_curves.keys()
    in_float32 = CASES[name].config.dtype == "float32"
    for what, curve in expected_curves.items():
        torch.testing.assert_close(
            curves[what], curve, rtol=1e-4 if in_float32 else 1e-9, atol=1e-9, msg=what
        )
    assert len(curves["curve total"]) == STEPS
    assert weights.keys() == expected_weights.keys()
    for what, weight in expected_weights.items():
        assert float((weights[what] - weight).abs().max()) < (1e-3 if in_float32 else 1e-7), what


def test_the_cases_say_something(runs: Path) -> None:
    """AuxK, resampling and clipping happened in them."""
    curves = safetensors.torch.load_file(runs / "cases" / "topk.safetensors")
    assert len(curves["curve aux"]) > 5
    assert "curve multi" in curves
    for name, without in (("topk", {"grad_clip": None}), ("resample", {"remedy": "none"})):
        case = CASES[name]._replace(config=replace(CASES[name].config, **without))
        found = safetensors.torch.load_file(runs / "cases" / f"{name}.safetensors")
        difference = world_runs.found(case)["encoder.weight"] - found["encoder.weight"]
        assert float(difference.abs().max()) > 1e-3, name


def test_many_at_once(runs: Path) -> None:
    many, cases = runs / "cases" / "many", runs / "cases"
    for name in ("topk", "resample"):
        alone = safetensors.torch.load_file(cases / f"{name}.safetensors")
        found = Autoencoder.load(many / "autoencoders" / name)
        assert torch.equal(found.encoder.weight, alone["encoder.weight"].float())
    lines = [json.loads(line) for line in (many / "log.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == list(range(10, STEPS + 1, 10))


@pytest.mark.parametrize("part", ["data", "latents"])
def test_a_process_that_dies_stops_the_others_and_the_run_resumes(runs: Path, part: str) -> None:
    assert statuses(runs, f"whole {part}") == [0, 0], said(runs, f"whole {part}")
    assert statuses(runs, f"killed {part}") == [2, -9]
    message = (runs / f"broken {part}" / "said when killed").read_text()
    assert "process 0 of 2: another process of this run is gone" in message
    assert "Start the same command again" in message
    assert statuses(runs, f"resumed {part}") == [0, 0], said(runs, f"broken {part}")
    found, expected = (
        Autoencoder.load(runs / f"{what} {part}" / "run" / "autoencoder")
        for what in ("broken", "whole")
    )
    for name, parameter in expected.named_parameters():
        assert torch.equal(found.get_parameter(name), parameter), name
    assert found.n_latents == 64
    assert log(runs / f"broken {part}" / "run") == log(runs / f"whole {part}" / "run")
    assert KILLED_AT > 5  # a checkpoint was there


def log(folder: Path) -> list[dict[str, Any]]:
    lines = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    return [{**line, "tokens_per_second": None} for line in lines]


def test_a_log_says_of_two_processes_what_it_says_of_one(runs: Path, tmp_path: Path) -> None:
    config = world_runs.case(world_runs.TOPK, dtype="float32", checkpoint_every=5).config
    train(config, world_runs.batches(config), tmp_path / "run", progress=False)
    for part in ("data", "latents"):
        for found, line in zip(
            log(runs / f"whole {part}" / "run"), log(tmp_path / "run"), strict=True
        ):
            metrics = line["dictionaries"]["autoencoder"]
            assert found["tokens"] == line["tokens"]
            assert found["dictionaries"]["autoencoder"] == pytest.approx(metrics, rel=1e-4)


def test_a_run_is_gone_on_with_by_any_number_of_processes(runs: Path, tmp_path: Path) -> None:
    """Where data are divided: a checkpoint of two processes, the rest in one."""
    config = world_runs.case(world_runs.TOPK, dtype="float32", checkpoint_every=5).config
    shutil.copytree(runs / "whole data" / "run", tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / "checkpoints" / f"{STEPS:08d}")
    (tmp_path / "run" / "finished.json").unlink()
    found = train(config, world_runs.batches(config), tmp_path / "run", progress=False)
    expected = Autoencoder.load(runs / "whole data" / "run" / "autoencoder")
    difference = found.encoder.weight.detach() - expected.encoder.weight.detach()
    assert float(difference.abs().max()) < 1e-4


def test_a_checkpoint_of_parts_needs_as_many_processes(runs: Path, tmp_path: Path) -> None:
    config = world_runs.case(world_runs.TOPK, dtype="float32", checkpoint_every=5).config
    shutil.copytree(runs / "whole latents" / "run", tmp_path / "run")
    parts = sorted(path.name for path in (tmp_path / "run" / "checkpoints").glob("*/*"))
    assert "state-2-of-2.safetensors" in parts
    assert "state.safetensors" not in parts
    (tmp_path / "run" / "finished.json").unlink()
    with pytest.raises(InputError, match="processes: 2 there, None now"):
        train(config, world_runs.batches(config), tmp_path / "run", progress=False)


def test_activations_are_computed_once_for_all(runs: Path) -> None:
    assert statuses(runs, "shared") == [0, 0], said(runs, "shared")
    alone = world_runs.Counted()
    whole, rest = (torch.cat(batches) for batches in world_runs.shuffled(alone))
    assert len(whole) == sum(range(20, 27))
    for rank in range(2):
        found = safetensors.torch.load_file(runs / "shared" / f"{rank}.safetensors")
        assert torch.equal(found["whole"], whole)
        assert torch.equal(found["rest"], rest)
        assert set((found["asked"] % 2).tolist()) == {rank}
    assert set(alone.asked) == set(range(7))


def test_a_process_that_hangs_is_given_up(runs: Path) -> None:
    assert statuses(runs, "hung")[0] == 2
    assert "Timed out waiting 1000ms" in said(runs, "hung")


def test_an_error_of_the_first_process_is_everyones(runs: Path) -> None:
    assert statuses(runs, "refused") == [2, 2]
    assert said(runs, "refused").count("is not empty and holds no run") == 2


def test_parts_of_a_batch() -> None:
    """Rows are divided without gap or overlap, as evenly as can be."""
    slices = [World(rank, 3).rows(11) for rank in range(3)]
    assert [list(range(11))[part] for part in slices] == [[0, 1, 2], [3, 4, 5, 6], [7, 8, 9, 10]]
    assert sum(World(rank, 3).share(11) for rank in range(3)) == pytest.approx(1)
    with pytest.raises(InputError, match="a batch of 2 rows cannot be divided among 3 processes"):
        World(0, 3).rows(2)


def test_what_cannot_be_divided_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ReLU, "splits_latents", False)  # as is that of an outsider who says nothing
    world = World(0, 2, "latents")
    with pytest.raises(InputError, match=r"65 latents cannot be divided evenly .* 64 or 66"):
        world.latents(65)
    for config, message in (
        (world_runs.case(ReLUConfig()).config, "relu needs all latents in one process"),
        (
            world_runs.case(TopKConfig(k=2), remedy="resample").config,
            "remedy = resample needs all latents",
        ),
        (world_runs.case(TopKConfig(k=40)).config, "k = 40 .* 32 latents of each process"),
    ):
        with pytest.raises(InputError, match=message):
            train(config, world_runs.batches(config), progress=False, world=world)


def test_rows_are_drawn_as_if_at_once() -> None:
    """The first directions do not depend on how many processes hold them."""
    n_latents = 4096 * 3 + 8
    whole = LearnedDictionary(n_latents, 5, generator=torch.Generator().manual_seed(3))
    parts = [
        LearnedDictionary(
            n_latents,
            5,
            generator=torch.Generator().manual_seed(3),
            world=World(rank, 2, "latents"),
        )
        for rank in range(2)
    ]
    assert torch.equal(torch.cat([part.encoder for part in parts]), whole.encoder)


def test_train_under_torchrun(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """From text to autoencoder: what two processes find is what one finds, and one of them speaks."""
    words = ["once", "upon", "a", "time", "a", "girl", "had", "a", "dog", "and", "it", "sang"]
    text = " ".join(words[i * i % len(words)] for i in range(4000))
    (tmp_path / "text.txt").write_text(text)
    train_options = (
        f"train {tmp_path / 'text.txt'} --location 1/mlp.post_act --steps 8 --batch-size 65 "
        "--n-latents 64 --k 4 --context-length 32 --windows-per-forward 4 --buffer-tokens 512 "
        "--hold-out 0 --checkpoint-every 4 --log-every 4 --dead-after-tokens 200 --json --device cpu"
    )
    torchrun = (
        "-m torch.distributed.run --standalone --nproc-per-node 2 -m tests.dictionaries.left "
    )
    assert cli.main(f"{train_options} --out {tmp_path / 'one'}".split()) == 0
    run = subprocess.run(
        [sys.executable, *f"{torchrun}{train_options} --out {tmp_path / 'two'}".split()],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == 0, run.stderr
    for said_by_one_process in (capsys.readouterr().out, run.stdout):
        assert json.loads(said_by_one_process)["steps"] == 8
    found = [
        Autoencoder.load(tmp_path / name / "autoencoder").encoder.weight.detach()
        for name in ("one", "two")
    ]
    assert float((found[0] - found[1]).abs().max()) < 1e-5
