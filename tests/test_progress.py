"""Bars where no terminal is: lines, not too many."""

import io

import pytest

from neuron_explainer.progress import progress_bar


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_a_file_gets_lines_at_intervals() -> None:
    file = io.StringIO()
    for _ in progress_bar(range(1000), file=file, desc="steps"):
        pass
    text = file.getvalue()
    assert "\r" not in text
    lines = text.splitlines()
    assert len(lines) == 2  # at the start, and when it is done: ten seconds have not passed between
    assert all(line.startswith("steps: ") for line in lines)
    assert "1000/1000" in lines[-1]
    assert text.isascii()
    file = io.StringIO()
    for _ in progress_bar(range(4), file=file, mininterval=0):
        pass
    assert len(file.getvalue().splitlines()) >= 4


def test_a_terminal_gets_a_bar() -> None:
    file = Terminal()
    for _ in progress_bar(range(3), file=file):
        pass
    assert file.getvalue().count("\n") == 1
    assert "\r" in file.getvalue()


def test_stderr_may_be_closed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.stderr", None)
    assert list(progress_bar(range(3), disable=True)) == [0, 1, 2]
