"""``python -m benchmarks gpu``: its plumbing, on the CPU with tiny sizes; no time is judged."""

import json
from pathlib import Path

import pytest
import torch

from benchmarks import __main__, gpu


def test_without_a_device_it_says_so(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    if torch.cuda.is_available():
        pytest.skip("there is a CUDA device")
    with pytest.raises(SystemExit) as ended:
        __main__.main(["gpu", "--out", str(tmp_path / "gpu.json")])
    assert ended.value.code == 1
    assert "There is no CUDA device here" in capsys.readouterr().out
    assert not any(tmp_path.iterdir())


def test_it_runs_alone(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        __main__.main(["gpu", "forward"])
    assert "gpu runs alone, not with gpu, forward" in capsys.readouterr().err


def test_everything_goes_into_one_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "gpu.json"
    assert gpu.run(out, quick=True, device="cpu") == 0
    found = json.loads(out.read_text())
    assert found["machine"]["torch"] == torch.__version__
    assert found["tests"]["exit"] == 0
    assert "1 passed" in found["tests"]["summary"] or "1 skipped" in found["tests"]["summary"]
    counts = {line["table"]: 0 for line in found["tables"]}
    for line in found["tables"]:
        counts[line["table"]] += 1
        assert 0 < line["min_ms"] <= line["median_ms"] <= line["max_ms"]
        assert line["ratio"] == pytest.approx(line["median_ms"] / line["floor_ms"])
    assert counts == {"forward": 6, "sample": 4, "encode": 4, "train_step": 12}
    assert capsys.readouterr().out.count("| train_step |") == 12


def test_a_failing_test_is_the_exit_status(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    failed = {"exit": 1, "summary": "1 failed", "output": "why"}
    monkeypatch.setattr(gpu, "tests", lambda device, quick: failed)
    monkeypatch.setattr(gpu, "tables", lambda device, quick: iter(()))
    assert gpu.run(tmp_path / "gpu.json", device="cpu") == 1
    assert json.loads((tmp_path / "gpu.json").read_text())["tests"] == failed
    assert "tests: 1 failed" in capsys.readouterr().out
