"""A run that is killed at any moment ends with the weights of one that is not, bit for bit."""

import contextlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from neuron_explainer.dictionaries import StepReport, TopKConfig, TrainConfig, train
from neuron_explainer.errors import CheckpointError, InputError, SourceError
from neuron_explainer.models.autoencoder import Autoencoder
from tests.dictionaries import killed_run
from tests.dictionaries.planted import planted

ROOT = Path(__file__).parent.parent.parent


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def weights(folder: Path) -> dict[str, Tensor]:
    found: dict[str, Tensor] = {}
    for name in killed_run.configs():
        autoencoder = Autoencoder.load(folder / "autoencoders" / name.replace("/", "-"))
        found |= {f"{name} {key}": value for key, value in autoencoder.named_parameters()}
    return found


def log(folder: Path) -> list[dict[str, Any]]:
    """The log but for what depends on the clock."""
    lines = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    for line in lines:
        del line["tokens_per_second"]
    return lines


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("undisturbed") / "run"
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    killed_run.run(folder)
    torch.set_num_threads(threads)
    return folder


def assert_same(folder: Path, undisturbed: Path, what: str) -> None:
    found, expected = weights(folder), weights(undisturbed)
    for name, value in expected.items():
        assert torch.equal(found[name], value), f"{what}: {name}"
    assert log(folder) == log(undisturbed), what
    ends = [json.loads((f / "finished.json").read_text()) for f in (folder, undisturbed)]
    assert ends[0] == ends[1], what
    assert ends[0]["metrics"] == log(folder)[-1]["dictionaries"], what


@pytest.mark.parametrize("times", [1, pytest.param(3, marks=pytest.mark.slow)])
def test_killed_at_any_moment(times: int, undisturbed: Path, tmp_path: Path) -> None:
    rng = random.Random(times)
    points: list[tuple[str, int]] = [("results", killed_run.STEPS)]
    for _ in range(times):
        points += [
            *((moment, rng.randint(1, killed_run.STEPS)) for moment in ("step", "write", "rename")),
            ("tidy", rng.randint(15, killed_run.STEPS)),
            ("outside", rng.randint(10, 200)),
        ]
    run = subprocess.run(
        [sys.executable, "-m", "tests.dictionaries.killed_run", str(tmp_path), json.dumps(points)],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == 0, run.stderr
    for index, (moment, step) in enumerate(points):
        assert_same(tmp_path / str(index), undisturbed, f"{moment} {step}")


class Stop(Exception):
    """Raised in the middle of a run."""


def stop_at(step: int) -> Any:
    def callback(report: Any) -> None:
        if report.step == step:
            raise Stop

    return callback


@pytest.mark.parametrize("plain", [False, True])
def test_batches_go_on_where_they_were(plain: bool, undisturbed: Path, tmp_path: Path) -> None:
    """Put back to their place, or, where they do not know it, skipped forward."""
    with pytest.raises(Stop):
        killed_run.run(tmp_path / "run", stop_at(25), plain=plain)
    killed_run.run(tmp_path / "run", plain=plain)
    assert_same(tmp_path / "run", undisturbed, "stopped")


def test_a_checkpoint_before_the_sample_is_used_up(tmp_path: Path) -> None:
    config = TrainConfig(
        TopKConfig(k=2), n_latents=40, steps=12, sample_batches=6, checkpoint_every=1, batch_size=16
    )
    rows = planted(64)[0]
    with pytest.raises(Stop):
        train(config, rows, tmp_path / "run", callbacks=[stop_at(3)], progress=False)
    resumed = train(config, rows, tmp_path / "run", progress=False)
    whole = train(config, rows, progress=False)
    assert torch.equal(resumed.decoder.weight, whole.decoder.weight)


def small(**fields: Any) -> TrainConfig:
    values: dict[str, Any] = {"steps": 9, "checkpoint_every": 2, "batch_size": 16, **fields}
    return TrainConfig(TopKConfig(k=2), n_latents=40, **values)


def half_done(folder: Path, **fields: Any) -> TrainConfig:
    config = small(**fields)
    with pytest.raises(Stop):
        train(config, planted(64)[0], folder, callbacks=[stop_at(7)], progress=False)
    return config


def checkpoints(folder: Path) -> list[str]:
    return sorted(os.listdir(folder / "checkpoints"))


def test_the_last_checkpoints_are_kept(tmp_path: Path) -> None:
    half_done(tmp_path / "run", keep_checkpoints=2)
    assert checkpoints(tmp_path / "run") == ["00000004", "00000006"]


@pytest.mark.parametrize("cut_off", [True, False])
def test_a_damaged_checkpoint_is_passed_over(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, cut_off: bool
) -> None:
    folder = tmp_path / "run"
    config = half_done(folder)
    tensors = folder / "checkpoints" / "00000006" / "state.safetensors"
    content = tensors.read_bytes()
    middle = len(content) // 2
    flipped = content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :]
    tensors.write_bytes(content[:-100] if cut_off else flipped)
    resumed = train(config, planted(64)[0], folder, progress=False)
    assert "00000006 is damaged" in caplog.text
    whole = train(config, planted(64)[0], progress=False)
    assert torch.equal(resumed.decoder.weight, whole.decoder.weight)


def _nested(state: dict[str, Any]) -> dict[str, Any]:
    counters: dict[str, Any] = state["state"]["map"]
    return counters


def _more_tokens(state: dict[str, Any]) -> None:
    _nested(state)["tokens"]["value"] += 1


def _another_type(state: dict[str, Any]) -> None:
    _nested(state)["tokens"]["value"] = float(_nested(state)["tokens"]["value"])


def _text_for_a_number(state: dict[str, Any]) -> None:
    _nested(state)["step"]["value"] = str(_nested(state)["step"]["value"])


def _another_place(state: dict[str, Any]) -> None:
    source = _nested(state)["source"]["map"]["source"]["map"]
    source["next"]["value"] -= 1


def _another_tensor(state: dict[str, Any]) -> None:
    module = _nested(state)["trainees"]["map"]["autoencoder"]["map"]["module"]["map"]
    module["dictionary.encoder"], module["dictionary.decoder"] = (
        module["dictionary.decoder"],
        module["dictionary.encoder"],
    )


def _another_step(state: dict[str, Any]) -> None:
    state["step"] = 5


def _no_checksum(state: dict[str, Any]) -> None:
    del state["checksum"]


@pytest.mark.parametrize(
    "change",
    [
        _more_tokens,
        _another_type,
        _text_for_a_number,
        _another_place,
        _another_tensor,
        _another_step,
        _no_checksum,
        lambda state: state.clear(),
    ],
)
def test_a_changed_state_is_passed_over(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, change: Any
) -> None:
    folder = tmp_path / "run"
    config = half_done(folder)
    file = folder / "checkpoints" / "00000006" / "state.json"
    state = json.loads(file.read_text())
    change(state)
    file.write_text(json.dumps(state))
    resumed = train(config, planted(64)[0], folder, progress=False)
    assert "00000006 is damaged" in caplog.text
    whole = train(config, planted(64)[0], progress=False)
    assert torch.equal(resumed.decoder.weight, whole.decoder.weight)


def test_a_copy_of_an_older_checkpoint_is_passed_over(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = tmp_path / "run"
    config = half_done(folder)
    shutil.rmtree(folder / "checkpoints" / "00000006")
    shutil.copytree(folder / "checkpoints" / "00000004", folder / "checkpoints" / "00000006")
    train(config, planted(64)[0], folder, progress=False)
    assert "00000006 is damaged" in caplog.text


def written(folder: Path) -> dict[str, int]:
    """When each file in a folder was last written."""
    return {str(path): path.stat().st_mtime_ns for path in folder.rglob("*.*") if path.is_file()}


def test_a_finished_run_answers_the_same_command(tmp_path: Path) -> None:
    """The process may have been killed just after its last write."""
    folder, rows = tmp_path / "run", planted(64)[0]
    whole = train(small(), rows, folder, progress=False)
    before = written(folder)
    again = train(small(log_every=7), rows, folder, progress=False)
    for one, other in zip(whole.parameters(), again.parameters(), strict=True):
        assert torch.equal(one, other)
    assert written(folder) == before
    with pytest.raises(InputError, match="its activations are not what they were"):
        train(small(), planted(64, seed=5)[0], folder, progress=False)
    shutil.rmtree(folder / "checkpoints")
    with pytest.raises(InputError, match="whose checkpoints were removed: use what it trained"):
        train(small(), rows, folder, progress=False)
    assert written(folder).keys() == {name for name in before if "checkpoints" not in name}


def _rename(folder: Path) -> None:
    folder.rename(folder.with_name("elsewhere"))


def _replace(folder: Path) -> None:
    _rename(folder)
    shutil.copytree(folder.with_name("elsewhere"), folder)


def _empty(folder: Path) -> None:
    for path in folder.iterdir():
        shutil.rmtree(path) if path.is_dir() else path.unlink()


@pytest.mark.parametrize("harm", [_rename, _replace, _empty, shutil.rmtree])
@pytest.mark.parametrize("step", [1, 5, 9])  # before a checkpoint, between two, before results
@pytest.mark.parametrize("log_every", [1, 100])
def test_a_folder_that_goes_away_ends_the_run(
    tmp_path: Path, harm: Any, step: int, log_every: int
) -> None:
    """With an error, instead of two folders that each hold a part of it."""
    folder, config = tmp_path / "run", small(log_every=log_every)
    left: list[set[Path]] = []

    def callback(report: StepReport) -> None:
        if report.step == step:
            harm(folder)
            left.append(set(tmp_path.rglob("*")))

    with pytest.raises(SourceError, match="run was renamed, replaced or emptied"):
        train(config, planted(64)[0], folder, callbacks=[callback], progress=False)
    assert {path for path in tmp_path.rglob("*") if path.name != ".lock"} == {
        path for path in left[0] if path.name != ".lock"
    }


def test_no_checkpoint_that_can_be_read(tmp_path: Path) -> None:
    config = half_done(tmp_path / "run")
    for state in (tmp_path / "run").glob("checkpoints/*/state.json"):
        state.write_text("{")
    with pytest.raises(CheckpointError, match="none of the checkpoints"):
        train(config, planted(64)[0], tmp_path / "run", progress=False)


@contextlib.contextmanager
def no_room(n_bytes: int) -> Iterator[None]:
    """Files cannot become longer, as on a full disk: what writes them gets the system's own error."""
    resource = pytest.importorskip("resource", reason="limits of Unix")
    old = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (n_bytes, old[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, old)


def test_a_full_disk_loses_nothing(tmp_path: Path) -> None:
    folder, config = tmp_path / "run", small()
    with contextlib.ExitStack() as stack:

        def fill_the_disk(report: StepReport) -> None:
            if report.step == 6:
                stack.enter_context(no_room(5000))

        with pytest.raises(SourceError, match=r"cannot write .*00000006: no room .*File too large"):
            train(config, planted(64)[0], folder, callbacks=[fill_the_disk], progress=False)
    assert checkpoints(folder) == ["00000002", "00000004"]
    resumed = train(config, planted(64)[0], folder, progress=False)
    whole = train(config, planted(64)[0], progress=False)
    assert torch.equal(resumed.decoder.weight, whole.decoder.weight)


def test_a_full_disk_when_the_log_is_written(tmp_path: Path) -> None:
    folder, config = tmp_path / "run", small(log_every=1)
    with contextlib.ExitStack() as stack:

        def fill_the_disk(report: StepReport) -> None:
            if report.step == 3:
                stack.enter_context(no_room((folder / "log.jsonl").stat().st_size + 10))

        with pytest.raises(SourceError, match=r"cannot write .*log\.jsonl: no room"):
            train(config, planted(64)[0], folder, callbacks=[fill_the_disk], progress=False)
    train(config, planted(64)[0], folder, progress=False)
    lines = (folder / "log.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == list(range(1, 10))


def test_a_folder_is_never_overwritten(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    config = half_done(folder)
    with pytest.raises(InputError, match=r"other settings .*lr: None there, 0.01 now"):
        train(small(lr=0.01), planted(64)[0], folder, progress=False)
    train(config, planted(64)[0], folder, progress=False)
    with pytest.raises(InputError, match=r"finished run with other .*: use what it trained"):
        train(small(lr=0.01), planted(64)[0], folder, progress=False)
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "thesis.txt").write_text("mine")
    with pytest.raises(InputError, match="not empty and holds no run"):
        train(config, planted(64)[0], tmp_path / "other", progress=False)
    with pytest.raises(InputError, match="is a file"):
        train(config, planted(64)[0], tmp_path / "other" / "thesis.txt", progress=False)


def test_what_alters_no_number_may_change(tmp_path: Path) -> None:
    half_done(tmp_path / "run")
    other = small(log_every=3, checkpoint_every=5, keep_checkpoints=1, device="cpu")
    resumed = train(other, planted(64)[0], tmp_path / "run", progress=False)
    whole = train(small(), planted(64)[0], progress=False)
    assert torch.equal(resumed.decoder.weight, whole.decoder.weight)
    assert checkpoints(tmp_path / "run") == ["00000009"]


@pytest.fixture
def _ctrl_c_interrupts() -> Iterator[None]:
    """As in a terminal; in the background a shell has it ignored."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("_ctrl_c_interrupts")
def test_an_interrupted_run_loses_nothing(tmp_path: Path) -> None:
    """Ctrl-C far from any checkpoint: the step is finished and kept."""
    folder, config = tmp_path / "run", small(checkpoint_every=100)

    def press(report: StepReport) -> None:
        if report.step == 5:
            signal.raise_signal(signal.SIGINT)

    with pytest.raises(KeyboardInterrupt):
        train(config, planted(64)[0], folder, callbacks=[press], progress=False)
    assert checkpoints(folder) == ["00000005"]
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    resumed = train(config, planted(64)[0], folder, progress=False)
    whole = train(config, planted(64)[0], progress=False)
    assert torch.equal(resumed.decoder.weight, whole.decoder.weight)


@pytest.mark.usefixtures("_ctrl_c_interrupts")
def test_pressed_again_it_ends_at_once(tmp_path: Path) -> None:
    def press_twice(report: StepReport) -> None:
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGINT)
        pytest.fail("goes on")

    with pytest.raises(KeyboardInterrupt):
        train(small(), planted(64)[0], tmp_path / "run", callbacks=[press_twice], progress=False)
    assert not (tmp_path / "run" / "checkpoints").exists()


def test_one_process_at_a_time(tmp_path: Path) -> None:
    def again(report: Any) -> None:
        with pytest.raises(InputError, match="another process"):
            train(small(), planted(64)[0], tmp_path / "run", progress=False)

    train(small(), planted(64)[0], tmp_path / "run", callbacks=[again], progress=False)


def test_an_iterator_cannot_be_resumed(tmp_path: Path) -> None:
    rows = planted(400)[0]
    config = small()
    with pytest.raises(Stop):
        train(
            config, iter(rows.split(16)), tmp_path / "run", callbacks=[stop_at(5)], progress=False
        )
    with pytest.raises(InputError, match="an iterator that cannot be started again"):
        train(config, iter(rows.split(16)), tmp_path / "run", progress=False)
    train(config, rows.split(16), tmp_path / "run", progress=False)


def test_batches_in_another_order_are_noticed(tmp_path: Path) -> None:
    """A DataLoader that shuffles has no place to go back to: better no run than another one."""
    rows, config = planted(64)[0], small()
    dataset: Any = rows
    loader = torch.utils.data.DataLoader[Tensor](dataset, batch_size=16, shuffle=True)
    with pytest.raises(Stop):
        train(config, loader, tmp_path / "run", callbacks=[stop_at(7)], progress=False)
    with pytest.raises(InputError, match="batch 2 is not what it was: the batches come in another"):
        train(config, loader, tmp_path / "run", progress=False)
    in_order = torch.utils.data.DataLoader[Tensor](dataset, batch_size=16)
    with pytest.raises(Stop):
        train(config, in_order, tmp_path / "order", callbacks=[stop_at(7)], progress=False)
    resumed = train(config, in_order, tmp_path / "order", progress=False)
    whole = train(config, in_order, progress=False)
    assert torch.equal(resumed.decoder.weight, whole.decoder.weight)


def test_other_batches_are_noticed(tmp_path: Path) -> None:
    rows, config = planted(400)[0], small()
    with pytest.raises(Stop):
        train(config, rows.split(16), tmp_path / "run", callbacks=[stop_at(7)], progress=False)
    with pytest.raises(InputError, match="these are other batches"):
        train(config, rows[:32].split(16), tmp_path / "run", progress=False)
    half_done(tmp_path / "own")
    with pytest.raises(InputError, match="their place cannot be found again"):
        train(config, rows.split(16), tmp_path / "own", progress=False)
