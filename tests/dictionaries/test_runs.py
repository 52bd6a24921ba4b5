"""Reading the folder of a run."""

import json
import shutil
from pathlib import Path

import pytest
import torch

from neuron_explainer.dictionaries import TopKConfig, TrainConfig, train, train_many
from neuron_explainer.dictionaries.runs import Run
from neuron_explainer.errors import InputError
from neuron_explainer.models.autoencoder import Autoencoder

ROWS = [torch.randn(16, 8, generator=torch.Generator().manual_seed(seed)) for seed in range(4)]
RECORD = {"model": "tiny-tales", "source": "books"}


def config(location: str | None = None, keep: int = 3) -> TrainConfig:
    return TrainConfig(
        TopKConfig(k=2),
        n_latents=12,
        steps=4,
        batch_size=16,
        checkpoint_every=2,
        keep_checkpoints=keep,
        location=location,
    )


@pytest.fixture
def several(tmp_path: Path) -> Path:
    configs = {place: config(place) for place in ("0/mlp.post_act", "1/mlp.post_act")}
    train_many(configs, ROWS, tmp_path / "several", progress=False, record=RECORD)
    return tmp_path / "several"


def test_what_a_run_holds(several: Path) -> None:
    run = Run.open(several)
    assert list(run.results) == list(run.dictionaries) == ["0/mlp.post_act", "1/mlp.post_act"]
    for place, folder in run.results.items():
        assert str(Autoencoder.load(folder).location) == place
        found = Run.containing(folder)
        assert found is not None
        assert found.path == several.resolve()
    assert run.dictionaries["0/mlp.post_act"]["n_latents"] == 12
    assert run.record == RECORD
    assert run.finished["step"] == 4
    assert set(run.finished["metrics"]) == set(run.results)
    assert [folder.name for folder in run.checkpoints] == ["00000004", "00000002"]
    assert len(run.log.read_text("utf-8").splitlines()) >= 1


def test_a_run_of_one(tmp_path: Path) -> None:
    train(config(), ROWS, tmp_path / "one", progress=False)
    run = Run.open(tmp_path / "one")
    assert run.results == {"autoencoder": tmp_path / "one" / "autoencoder"}
    assert run.record == {}


def test_folders_that_hold_no_run_or_none_that_is_finished(several: Path) -> None:
    folder = Run.open(several).results["0/mlp.post_act"]
    for other in (folder, several.parent, several / "nowhere"):
        assert Run.find(other) is None
        with pytest.raises(InputError, match="holds no run"):
            Run.open(other)
    assert Run.containing(several) is None
    (several / "finished.json").unlink()
    run = Run.open(several)
    assert not run.is_finished
    with pytest.raises(InputError, match="has not finished; give its train command again"):
        _ = run.results


def test_leftovers_are_no_results_and_go_when_the_run_is_resumed(several: Path) -> None:
    """What a killed process leaves: a folder and a file that were to be renamed."""
    left = [
        several / "autoencoders" / ".0-mlp.post_act.0123456789ab.tmp",
        several / ".autoencoder.0123456789ab.tmp",
    ]
    for folder in left:
        folder.mkdir()
        (folder / "config.json").write_text(json.dumps({"kind": "autoencoder"}), "utf-8")
    left.append(several / ".finished.json.0123456789ab.tmp")
    left[-1].write_text("{", "utf-8")
    assert list(Run.open(several).results) == ["0/mlp.post_act", "1/mlp.post_act"]
    (several / "finished.json").unlink()
    configs = {place: config(place) for place in ("0/mlp.post_act", "1/mlp.post_act")}
    train_many(configs, ROWS, several, progress=False, record=RECORD)
    assert not [path for path in left if path.exists()]
    assert not list(several.rglob("*.tmp"))


def test_checkpoints_that_a_killed_process_was_to_remove_go_when_the_run_is_resumed(
    tmp_path: Path,
) -> None:
    train(config(), ROWS, tmp_path, progress=False)
    (tmp_path / "finished.json").unlink()
    newest = tmp_path / "checkpoints" / "00000004" / "state.json"
    content = newest.read_bytes()
    newest.write_bytes(content[:-9])
    train(config(keep=1), ROWS, tmp_path, progress=False)  # writes the damaged one again
    assert [folder.name for folder in Run.open(tmp_path).checkpoints] == ["00000004"]
    shutil.copytree(newest.parent, newest.parent.parent / "00000002")
    (tmp_path / "finished.json").unlink()
    train(config(keep=1), ROWS, tmp_path, progress=False)
    assert [folder.name for folder in Run.open(tmp_path).checkpoints] == ["00000004"]
