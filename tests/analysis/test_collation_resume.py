"""Killed at any moment, or divided among processes, a collation gives the same stores to the bit."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parent.parent.parent


def contents(folder: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def check_runs(folder: Path, n_kills: int) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "tests.analysis.collation_runs", str(folder), str(n_kills)],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    found: dict[str, Any] = json.loads((folder / "found.json").read_text())
    assert found["whole"] == [0], done.stderr
    expected = contents(folder / "whole")
    assert any(name.endswith(".store") for name in expected)
    for size in (2, 4):
        assert found[f"{size} processes"] == [0] * size, done.stderr
        assert contents(folder / f"{size} processes") == expected
    kills = [name for name in found if name.startswith("killed")]
    assert len(kills) == n_kills
    for name in kills:
        assert -9 in found[name]["begun"], found[name]
        assert not any(found[name]["finished"]), (found[name], done.stderr)
        assert contents(folder / name) == expected, found[name]


def test_killed_and_divided(tmp_path: Path) -> None:
    check_runs(tmp_path, 3)


@pytest.mark.slow
def test_killed_at_twenty_moments(tmp_path: Path) -> None:
    check_runs(tmp_path, 20)
