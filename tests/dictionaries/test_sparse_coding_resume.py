"""A run that is interrupted, at any moment, ends with the same bytes as one that is not."""

import json
import os
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch

from neuron_explainer.activations.chunks import ActivationBatch
from neuron_explainer.dictionaries.runs import Run
from neuron_explainer.dictionaries.sparse_coding import SparseCodingConfig, train_sparse_coding
from neuron_explainer.errors import InputError
from neuron_explainer.models.locations import ActivationLocation
from tests.dictionaries.sparse_coding_runs import (
    CONFIG,
    COUNTS,
    N_BATCHES,
    Batches,
    contents,
    log_of,
    run,
)


class Interrupted(Exception):
    """Stands for a power cut."""


@pytest.fixture(scope="module", autouse=True)
def _one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """What a run leaves that nobody interrupts."""
    folder = tmp_path_factory.mktemp("whole")
    run(folder)
    return contents(folder)


def stop_at(number):
    def on_read(n):
        if n == number:
            raise Interrupted

    return on_read


def test_what_a_run_leaves(whole):
    assert sorted(whole) == [
        "autoencoder/autoencoder.safetensors",
        "autoencoder/config.json",
        "checkpoints/00000012/state.json",
        "checkpoints/00000012/state.safetensors",
        "checkpoints/00000014/state.json",
        "checkpoints/00000014/state.safetensors",
        "config.json",
        "finished.json",
        "log.jsonl",
    ]
    assert whole["log.jsonl"].count(b"\n") == 2 * N_BATCHES


@pytest.mark.parametrize("number", [1, 2, 3, 4, 7, 8, 10, 14])
def test_interrupted_at_any_batch(number, whole, tmp_path):
    with pytest.raises(Interrupted):
        run(tmp_path, Batches(stop_at(number)))
    seen: list[int] = []
    run(tmp_path, Batches(seen.append))
    assert contents(tmp_path) == whole
    if number == 10:  # after eight batches, one of them in the second epoch: seven do not run again
        assert len(seen) == 7


def test_interrupted_while_writing(whole, tmp_path, monkeypatch):
    """At every file that is synced to disk, one after the other, in one and the same run."""
    usual, n_interrupted = os.fsync, 0
    while True:
        left = n_interrupted % 5 + 1  # fsyncs until the next interruption

        def fsync(handle):
            nonlocal left
            left -= 1
            if not left:
                raise Interrupted
            usual(handle)

        monkeypatch.setattr(os, "fsync", fsync)
        try:
            run(tmp_path, checkpoint_every=2 - n_interrupted % 2)
        except Interrupted:
            n_interrupted += 1
            if n_interrupted == 12:
                break
            continue
        break
    monkeypatch.setattr(os, "fsync", usual)
    assert n_interrupted > 6
    run(tmp_path)
    assert {k: v for k, v in contents(tmp_path).items() if "config.json" not in k} == {
        k: v for k, v in whole.items() if "config.json" not in k
    }


@pytest.mark.parametrize(
    ("moment", "number"),
    [("sync", 17), *(pytest.param("batch", n, marks=pytest.mark.slow) for n in (2, 6))],
)
def test_killed(moment, number, whole, tmp_path):
    command = [sys.executable, "-m", "tests.dictionaries.sparse_coding_runs"]
    root = Path(__file__).parents[2]
    killed = subprocess.run(
        [*command, str(tmp_path), moment, str(number)],
        cwd=root,
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": str(root)},
    )
    assert killed.returncode == -9, killed.stderr
    assert contents(tmp_path) != whole
    run(tmp_path)
    assert contents(tmp_path) == whole


def test_leftovers_of_a_killed_process_are_removed(whole, tmp_path):
    with pytest.raises(Interrupted):
        run(tmp_path, Batches(stop_at(6)))
    checkpoints = tmp_path / "checkpoints"
    for name in (".00000006.0123456789ab.tmp", ".00000008.ba9876543210.tmp"):
        (checkpoints / name).mkdir()
        (checkpoints / name / "state.safetensors").write_bytes(b"half")
    with open(tmp_path / "log.jsonl", "a") as file:
        file.write('{"step": 6, "dictionaries": {"activ')
    run(tmp_path)
    assert contents(tmp_path) == whole


def test_one_epoch_and_another_are_two(whole, tmp_path):
    run(tmp_path, epochs=1)
    assert len(log_of(tmp_path)) == N_BATCHES
    assert Run.open(tmp_path).results == {"autoencoder": tmp_path / "autoencoder"}
    with pytest.raises(Interrupted):  # it is not finished while it goes on
        run(tmp_path, Batches(stop_at(2)))
    with pytest.raises(InputError, match="has not finished"):
        _ = Run.open(tmp_path).results
    found = run(tmp_path)
    assert torch.equal(found.encoder.weight, run(None).encoder.weight)
    for name in ("autoencoder/autoencoder.safetensors", "finished.json"):
        assert contents(tmp_path)[name] == whole[name]
    with pytest.raises(InputError, match=r"the run is in pass 2 .* more than the 1 passes"):
        run(tmp_path, epochs=1)
    assert contents(tmp_path)["finished.json"] == whole["finished.json"]  # still


def test_a_finished_run_is_left_alone(tmp_path: Path) -> None:
    run(tmp_path, epochs=1)
    times = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*.*")}
    again = run(tmp_path, epochs=1)
    assert torch.equal(again.encoder.weight, run(None, epochs=1).encoder.weight)
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*.*")} == times
    run(tmp_path, epochs=2)
    assert json.loads((tmp_path / "config.json").read_text())["config"]["epochs"] == 2


def test_without_the_hessian_it_would_be_another(tmp_path, monkeypatch, whole):
    with pytest.raises(Interrupted):
        run(tmp_path, Batches(stop_at(6)))
    load = safetensors.torch.load_file

    def without(path):
        tensors = load(path)
        return {k: v * 0 if "hessian" in k else v for k, v in tensors.items()}

    monkeypatch.setattr(safetensors.torch, "load_file", without)
    run(tmp_path)
    weights = "autoencoder/autoencoder.safetensors"
    assert contents(tmp_path)[weights] != whole[weights]


def test_ctrl_c_finishes_the_batch_and_keeps_it(whole, tmp_path):
    def press(number):
        if number == 5:
            signal.raise_signal(signal.SIGINT)

    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # as in a terminal
    try:
        with pytest.raises(KeyboardInterrupt):
            run(tmp_path, Batches(press), checkpoint_every=100)
    finally:
        signal.signal(signal.SIGINT, before)
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["00000005"]
    run(tmp_path)
    assert contents(tmp_path) == whole


def test_the_last_checkpoints_are_kept(tmp_path):
    run(tmp_path, keep_checkpoints=3)
    names = sorted(path.name for path in (tmp_path / "checkpoints").iterdir())
    assert names == ["00000010", "00000012", "00000014"]


def test_a_run_is_not_continued_with_other_settings_or_data(tmp_path):
    run(tmp_path, epochs=1)
    with pytest.raises(InputError, match=r"other settings \(config.penalty: 0.2 there, 0.3 now"):
        run(tmp_path, penalty=0.3)
    config = SparseCodingConfig(24, 0.2, epochs=3, batch_size=16, step_size=0.05)
    with pytest.raises(InputError, match=r"other settings \(token_counts: "):
        train_sparse_coding(config, Batches(), tmp_path, token_counts=COUNTS + 1)
    with pytest.raises(Interrupted):
        run(tmp_path, Batches(stop_at(7)), epochs=2)
    with pytest.raises(InputError, match="had 5 batches, and now they end after 2"):
        train_sparse_coding(
            replace(CONFIG, epochs=2), list(Batches())[:2], tmp_path, token_counts=COUNTS
        )


PLACE = ActivationLocation("resid.torso.post_mlp", 1)


class Chunks:
    """An activation source: batches by number."""

    forward_s = 0.0

    def __init__(self, on_read=lambda number: None, name="seven"):
        self.on_read, self.name = on_read, name
        nothing = torch.zeros(40, dtype=torch.int64)
        self.batches = [
            ActivationBatch({PLACE: x}, tokens, nothing, nothing) for x, tokens in Batches()
        ]

    def chunk(self, number: int) -> ActivationBatch | None:
        self.on_read(number)
        return self.batches[number] if number < N_BATCHES else None

    def describe(self) -> dict[str, Any]:
        return {"name": self.name}


def test_a_source_goes_on_where_it_was(tmp_path):
    config = SparseCodingConfig(24, 0.2, epochs=2, batch_size=16, checkpoint_every=2)
    expected = train_sparse_coding(config, list(Batches()))
    with pytest.raises(Interrupted):
        train_sparse_coding(config, Chunks(stop_at(5)), tmp_path)
    with pytest.raises(InputError, match=r"source\.name: 'seven' there, 'other' now"):
        train_sparse_coding(config, Chunks(name="other"), tmp_path)
    seen: list[int] = []
    found = train_sparse_coding(config, Chunks(seen.append), tmp_path)
    assert torch.equal(found[PLACE].encoder.weight, expected.encoder.weight)
    assert seen == [4, 5, 6, 7, *range(8)]
    assert found[PLACE].metadata["source"] == {"name": "seven"}
