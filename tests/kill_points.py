"""What becomes of a command that is killed, or runs out of disk, at any of its steps on disk.

The steps are those of ``neuron_explainer/files/steps.py``: everything that the package writes passes there.
A command runs in a forked child, in a fresh copy of its inputs that has the same path each time, so that
its results can be compared byte for byte with those of a run that nobody disturbed.
"""

import contextlib
import errno
import io
import os
import re
import shutil
import signal
import sqlite3
import sys
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NamedTuple

from neuron_explainer import files
from neuron_explainer.errors import NeuronExplainerError
from neuron_explainer.files.steps import Kind

Harm = Literal["kill", "full disk", "moved", "replaced", "emptied"]


@dataclass(frozen=True)
class Command:
    """Something that writes files.

    Args:
        name: of the test.
        run: does it, in the folder that holds a copy of the inputs; returns an exit status.
        out: what it writes: a folder, or a file.
        harms: what is tried at its steps.
        refuses_again: a function, not a command: it refuses a result that is there and whole.
    """

    name: str
    run: Callable[[], int]
    out: str
    harms: tuple[Harm, ...] = ("kill", "full disk", "moved")
    refuses_again: bool = False


class Point(NamedTuple):
    """One step of a command: the process (of several), and the running number of the step in it."""

    rank: str
    number: int
    kind: str
    path: str


class Ended(NamedTuple):
    """How a command ended."""

    status: int
    said: str


class Laboratory:
    """Runs one command again and again.

    Args:
        command: which one.
        inputs: folder that is copied for each run.
        scratch: a folder for what is written.
    """

    def __init__(self, command: Command, inputs: Path, scratch: Path) -> None:
        self.command, self.inputs = command, inputs
        self.work, self.trace, self.said = scratch / "work", scratch / "trace", scratch / "said"
        self.trace.unlink(missing_ok=True)
        self.fresh()
        self._undisturbed()
        self.expected = contents(self.work)
        self.trace.touch()
        self.points = _numbered(self.trace.read_text("utf-8").splitlines())

    def fresh(self) -> None:
        """A copy of the inputs and nothing else."""
        shutil.rmtree(self.work, ignore_errors=True)
        shutil.copytree(self.inputs, self.work)

    def _undisturbed(self) -> None:
        """Run in this process, so that its children need not import or compute anew what it has then."""
        environment = dict(os.environ)
        try:
            with (
                contextlib.chdir(self.work),
                contextlib.redirect_stdout(io.StringIO()),
                files.watch_steps(self._noting),
            ):
                assert self.command.run() == 0
        finally:
            os.environ.clear()
            os.environ.update(environment)

    def run(self, watcher: Callable[[Kind, Path], None] | None = None) -> Ended:
        """The command, in a child."""
        sys.stdout.flush()
        sys.stderr.flush()
        self.said.write_text("")
        child = os.fork()
        if child == 0:
            os._exit(self._as_child(watcher))
        status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        return Ended(status, self.said.read_text("utf-8"))

    def _as_child(self, watcher: Callable[[Kind, Path], None] | None) -> int:
        os.chdir(self.work)
        os.fsync = lambda fd: None  # what it protects from, power cuts, is not tested here
        said = os.open(self.said, os.O_WRONLY | os.O_APPEND)
        os.dup2(said, 1)
        os.dup2(said, 2)
        sys.stdout = sys.stderr = os.fdopen(said, "w", encoding="utf-8")
        status = 99
        try:
            if watcher is None:
                status = self.command.run()
            else:
                with files.watch_steps(watcher):
                    status = self.command.run()
        except NeuronExplainerError as error:  # of a function; commands print it themselves
            print(error)
            status = 2
        except BaseException:
            traceback.print_exc()
        sys.stdout.flush()
        return status

    def _noting(self, kind: Kind, path: Path) -> None:
        line = f"{os.environ.get('RANK', '0')} {kind} {path}\n"
        handle = os.open(self.trace, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)
        os.write(handle, line.encode())
        os.close(handle)

    # ---- harm ----------------------------------------------------------------------------------

    def disturb(self, point: Point, harm: Harm) -> Ended:
        """Run in a fresh copy, with some harm at a point."""
        self.fresh()
        left = point.number

        def watcher(kind: Kind, path: Path) -> None:
            nonlocal left
            if os.environ.get("RANK", "0") != point.rank:
                return
            left -= 1
            if left < 0 and harm == "full disk" and kind != "remove":  # and stays full
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))
            if left == -1:
                self._harm(harm, kind, path)

        return self.run(watcher)

    def _harm(self, harm: Harm, kind: Kind, path: Path) -> None:
        if harm == "kill":
            _leave_half(kind, path)
            os.kill(os.getpid(), signal.SIGKILL)
        out, elsewhere = self.work / self.command.out, self.work / "elsewhere"
        if harm == "emptied":
            for each in out.iterdir() if out.is_dir() else ():
                shutil.rmtree(each) if each.is_dir() else each.unlink()
        elif harm in ("moved", "replaced") and out.exists():
            out.rename(elsewhere)
            if harm == "replaced":
                shutil.copytree(elsewhere, out)

    def check(self, point: Point, harm: Harm) -> None:
        """Disturb the command, give it again, and compare."""
        ended = self.disturb(point, harm)
        if harm == "kill":
            assert ended.status, (point, ended)
        else:
            self._check_said(point, ended)
        if harm in ("moved", "replaced"):
            self._put_back(point)
        again = self.run()
        if not (self.command.refuses_again and again.status == 2):
            assert again.status == 0, (point, harm, ended, again)
        found = contents(self.work)
        assert sorted(found) == sorted(self.expected), (point, harm, ended)
        differ = [name for name in found if found[name] != self.expected[name]]
        assert not differ, (point, harm, differ)

    def _check_said(self, point: Point, ended: Ended) -> None:
        """An error is one line; what a run has told before it is not counted."""
        assert ended.status in (0, 2), (point, ended)
        assert "Traceback" not in ended.said, (point, ended)
        if ended.status == 2:
            last = ended.said.strip().splitlines()[-1]
            assert _OF_THE_HARM.search(last), (point, ended)

    def _put_back(self, point: Point) -> None:
        out, elsewhere = self.work / self.command.out, self.work / "elsewhere"
        if elsewhere.exists():
            if out.exists():  # a copy, or made anew after the move: nothing was written there since
                shutil.rmtree(out)
            elsewhere.rename(out)


def _numbered(lines: list[str]) -> list[Point]:
    counts: dict[str, int] = {}
    points = []
    for line in lines:
        rank, kind, path = line.split(" ", 2)
        points.append(Point(rank, counts.get(rank, 0), kind, Path(path).name))
        counts[rank] = counts.get(rank, 0) + 1
    return points


def _leave_half(kind: Kind, path: Path) -> None:
    """What a process leaves that is killed in the middle of the step."""
    if kind == "write" and path.parent.is_dir() and ".safetensors" in path.name:
        (path.parent / ".tmpAb3xYz").write_bytes(b"safetensors writes here first")
    if kind == "written" and path.is_file():
        text = path.read_bytes()
        kept = text[:-1].rfind(b"\n") + 1 if path.suffix == ".jsonl" else 0  # a log only grows
        os.truncate(path, (kept + len(text)) // 2)
    if kind == "remove" and path.is_dir():
        for half in sorted(path.iterdir())[::2]:
            shutil.rmtree(half) if half.is_dir() else half.unlink()


_OF_THE_HARM = re.compile(
    "No space left|no room|renamed, replaced or emptied|cannot (write|make|remove|read)|there is no file"
    "|No tokenizer at"
)
_DATE = re.compile(r"20\d\d-\d\d-\d\dT[\d:.+Z-]+")
_CLOCK = re.compile(rb'("(tokens_per_second|seconds\w*|date)": )[^,}\n]+')


def contents(folder: Path) -> dict[str, bytes | None]:
    """Every file below a folder, but for what depends on the clock, and every folder (None)."""
    found: dict[str, bytes | None] = {}
    for path in folder.rglob("*"):
        text = path.read_bytes() if path.is_file() else None
        if text is not None and path.suffix == ".sqlite":
            with contextlib.closing(sqlite3.connect(path)) as opened:
                rows = [row for row in opened.iterdump() if "_fts_" not in row]  # FTS5's own
                text = _DATE.sub("", "\n".join(rows)).encode()
        if text is not None and path.suffix in (".json", ".jsonl"):
            text = _CLOCK.sub(rb"\1", text)
        found[str(path.relative_to(folder))] = text
    return found
