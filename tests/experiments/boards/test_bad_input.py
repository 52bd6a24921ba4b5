"""What the commands say about input that cannot be right: one line, and nothing is lost."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from neuron_explainer.experiments.boards.__main__ import main
from neuron_explainer.experiments.boards.dataset import BoardDataset
from neuron_explainer.experiments.boards.gpt import BoardGPT, GPTSizes
from neuron_explainer.experiments.boards.model_files import save_model
from neuron_explainer.experiments.boards.objects import BoardConfig

SMALL = ["--board-size", "5", "--root-size", "2", "--root-cells", "4", "--boards-per-epoch", "8"]
TRAIN = ["train", *SMALL, "--pace", "3000", "--evaluate-every", "0", "--epoch", "1"]


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a run of each architecture, and a folder that holds something else."""
    folder = tmp_path_factory.mktemp("runs")
    for model in ("gpt", "lea"):
        main([*TRAIN, "--model", model, "--run", str(folder / model)])
    (folder / "other").mkdir()
    (folder / "other" / "file").write_text("x")
    return folder


@pytest.fixture
def run(runs: Path, tmp_path: Path) -> Path:
    """A copy of a run, to damage."""
    return Path(shutil.copytree(runs / "gpt", tmp_path / "run"))


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        ("train --type fctor", "expected one of factor, vanilla, found 'fctor'. Did you mean"),
        ("train --model lae", "model: expected one of gpt, lea, found 'lae'. Did you mean 'lea'"),
        ("train --split stringend", "Did you mean 'stringent'"),
        ("train --batch 0", "--batch must be at least 1"),
        ("train --batch-size -3", "batch_size must be at least 1, found -3"),
        ("train --epochs 0", "epochs must be at least 1, found 0"),
        ("train --pace 0", "pace must be above 0"),
        ("train --pace inf", "pace: expected a finite number"),
        ("train --learning-rate nan", "learning_rate: expected a finite number, found nan"),
        ("train --device banana", "no device 'banana' here"),
        ("train --log-to foo", "unknown logger 'foo'"),
        ("train --board-size 60", "make board_size, n_roots or n_backgrounds smaller"),
        ("train --n-roots 1", "found only 1 different composites of 4 roots, 5 were asked for"),
        ("train --split fraction --test 0.6 --val 0.6", "leave no boards for training"),
        ("train --split fraction --test 1", "test must be a share from 0 to below 1, found 1"),
        ("train --run other", "other is not empty and holds no run"),
        ("train --run gpt --model lea", "training.model: 'gpt' there, 'lea' now"),
        ("train --run gpt --boards-seed 4", "boards.checksum: .* use what it trained"),
        ("evaluate other", "holds no board model"),
        ("evaluate gpt --mask 2", "lies in 0 to 1, found 2.0"),
        ("evaluate gpt --boards 0", "expected a number of boards, at least 1, found 0"),
        ("figures gpt gpt --out f", "at most one model of each architecture"),
        ("figures --out f --boards 3", "at least 10 boards of each kind, found 3"),
        ("figures --out f --only bords", "unknown figure 'bords'. Did you mean 'boards'"),
        ("figures --out other/file --only learning", "is a file where a folder is expected"),
        ("export gpt --out gpt --overwrite", "gpt is a run, not a model"),
        ("export gpt --out other", "other is there; give --overwrite"),
        ("export gpt --out other --overwrite", "so it is no saved model"),
        ("boards --seed-layout", "say where with --out"),
        ("boards --seed-layout --out other", "other holds file, no data set"),
        ("boards --out other", "other is there; choose another --out"),
        ("speed --repeats 0", "steps to time, at least 1"),
    ],
)
def test_commands_say_in_one_line_what_is_wrong(
    runs: Path, monkeypatch: pytest.MonkeyPatch, argv: str, message: str
) -> None:
    monkeypatch.chdir(runs)
    command, *flags = argv.split()
    own = [*TRAIN[1:], *([] if "--run" in flags else ["--save", "0"])]
    with pytest.raises(SystemExit, match=message) as refused:
        main([command, *(own if command == "train" else []), *flags])
    assert str(refused.value).startswith("error: ")
    assert str(refused.value).count("\n") == 0
    assert [path.name for path in (runs / "other").iterdir()] == ["file"]
    assert (runs / "gpt" / "finished.json").exists()


def change(name: str, **values: Any) -> Callable[[Path], None]:
    """Change, or take away (None), entries of one of a run's JSON files."""

    def damage(run: Path) -> None:
        content = json.loads((run / name).read_text()) | values
        kept = {key: value for key, value in content.items() if value is not None}
        (run / name).write_text(json.dumps(kept))

    return damage


def write(name: str, content: bytes) -> Callable[[Path], None]:
    """Write something else into one of a run's files."""

    def damage(run: Path) -> None:
        (run / name).write_bytes(content)

    return damage


def without_result(damage: Callable[[Path], None]) -> Callable[[Path], None]:
    """A run whose model is in its checkpoint alone."""

    def both(run: Path) -> None:
        shutil.rmtree(run / "model")
        damage(run)

    return both


def other_architecture(run: Path) -> None:
    training = json.loads((run / "config.json").read_text())["training"]
    change("config.json", training=training | {"model": "lea"})(run)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (write("model/model.safetensors", b"abc"), "model.safetensors cannot be read"),
        (write("model/config.json", b"{"), "config.json, line 1, column 2: not valid JSON"),
        (change("model/config.json", sizes=None), "expected an object"),
        (change("model/config.json", kind="board_lea"), "does not fit a board_lea: blocks.0.fc"),
        (change("model/config.json", format_version=9), "of a format known here"),
        (write("model/boards/boards.npz", b"abc"), "boards.npz cannot be read"),
        (change("model/boards/config.json", config=None), "expected an object"),
        (without_result(change("config.json", boards=None)), "config.json lacks boards"),
        (without_result(other_architecture), "checkpoint of .* does not fit a board_lea"),
        (without_result(lambda run: shutil.rmtree(run / "boards")), "no file .*boards/config.json"),
        (without_result(lambda run: shutil.rmtree(run / "checkpoints")), "checkpoints were remov"),
    ],
)
def test_damaged_runs_are_named(run: Path, damage: Callable[[Path], None], message: str) -> None:
    damage(run)
    with pytest.raises(SystemExit, match=f"error: .*{message}"):
        main(["evaluate", str(run)])


def test_boards_of_another_size_are_refused(run: Path, tmp_path: Path) -> None:
    main([*TRAIN, "--board-size", "6", "--run", str(tmp_path / "six")])
    shutil.rmtree(run / "model" / "boards")
    shutil.copytree(tmp_path / "six" / "boards", run / "model" / "boards")
    with pytest.raises(SystemExit, match="was trained on boards of checksum"):
        main(["evaluate", str(run)])


def test_a_loss_that_is_not_finite_ends_the_run_and_keeps_what_was_before(tmp_path: Path) -> None:
    run = [*TRAIN, "--epoch", "4", "--checkpoint-every", "1", "--run", str(tmp_path / "r")]
    with pytest.raises(SystemExit, match="the loss is not finite any more with a learning rate"):
        main([*run, "--learning-rate", "1e30"])
    assert len((tmp_path / "r" / "log.jsonl").read_text().splitlines()) >= 1
    main(["evaluate", str(tmp_path / "r")])  # the checkpoint before it


def test_a_model_without_a_record_of_its_training_is_exported(tmp_path: Path) -> None:
    boards = BoardDataset(BoardConfig(n_roots=2, n_backgrounds=2, n_composites=2))
    save_model(BoardGPT(GPTSizes(n_layers=1, width=4)), tmp_path / "m", boards, {})
    main(["export", str(tmp_path / "m"), "--out", str(tmp_path / "n")])
    assert "training" not in json.loads((tmp_path / "n" / "config.json").read_text())


def test_a_log_that_a_killed_process_left(run: Path, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    log, figures = run / "log.jsonl", ["figures", str(run), "--only", "learning", "--boards", "10"]
    whole = log.read_text()
    log.write_text(whole + '{"step": 3, "ep')
    main([*figures, "--out", str(tmp_path / "f")])
    main(["export", str(run), "--out", str(tmp_path / "m")])
    assert (tmp_path / "m" / "log.jsonl").read_text() == whole
    log.write_text('{"step": 3}\n')
    with pytest.raises(SystemExit, match=r"log.jsonl, line 1: expected JSON with a step"):
        main([*figures, "--out", str(tmp_path / "f")])
    log.write_text("")
    main(["export", str(run), "--out", str(tmp_path / "n")])
