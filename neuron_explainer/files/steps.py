"""Every change on disk is a step: between any two of them the process may be killed.

Whatever makes, writes, syncs, renames or removes something calls :func:`step` first. The functions of this
package do so themselves; a plain write elsewhere stands in a :func:`plain_write` block. This gives one place

- for tests: :func:`watch_steps` counts the steps of a command, kills it at one of them, or fills the disk;
- for a check: in a folder under :func:`guard`, each step first makes sure that it is still that folder.
"""

import contextlib
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Literal

from neuron_explainer.errors import SourceError

Kind = Literal["make", "write", "written", "sync", "rename", "remove"]
Watcher = Callable[[Kind, Path], None]
_watchers: list[Watcher] = []
_guards: list["Guard"] = []


def step(kind: Kind, path: Path) -> None:
    """Say what is about to happen to ``path``; ``"written"`` says that a write has just ended.

    SourceError if ``path`` is in a guarded folder that is no longer there.
    """
    for watcher in _watchers:
        watcher(kind, path)
    if _guards:
        place = Path(os.path.realpath(path))
        for guard in [*_guards]:
            if place.is_relative_to(guard.folder):
                guard.check()


@contextlib.contextmanager
def watch_steps(watcher: Watcher) -> Iterator[None]:
    """Call ``watcher(kind, path)`` before every step of any thread. For tests: it may raise, or never
    return."""
    _watchers.append(watcher)
    try:
        yield
    finally:
        _watchers.remove(watcher)


@contextlib.contextmanager
def plain_write(path: Path) -> Iterator[Path]:
    """A block that writes ``path`` itself: a file in a folder of ``atomic_folder``, or lines at the end of
    a log. Every other file is written by ``atomic_write``."""
    step("write", path)
    yield path
    step("written", path)


class Guard:
    """Knows a folder again, whatever has its name now. See :func:`guard`."""

    def __init__(self, folder: Path, name: Path) -> None:
        self.folder, self._name = Path(os.path.realpath(folder)), name
        self._identity = self._now()
        self._kept: list[Path] = []

    def keep(self, path: Path) -> None:
        """A file that has to stay: if it goes, the folder was emptied."""
        self._kept.append(path)

    def check(self) -> None:
        """SourceError if the folder was renamed, replaced or emptied."""
        if self._now() != self._identity or not all(map(os.path.exists, self._kept)):
            raise SourceError(
                f"{self._name} was renamed, replaced or emptied while it was being written to. What was "
                "written is where the folder is now; put it back, and give the same command again."
            )

    def _now(self) -> tuple[int, int] | None:
        try:
            status = os.stat(self.folder)
        except OSError:
            return None
        return status.st_dev, status.st_ino


@contextlib.contextmanager
def guard(folder: Path, name: Path | None = None) -> Iterator[Guard]:
    """In this block, every step in ``folder`` is an error if the folder is another one than now: the later
    part of a result must not lie apart from the earlier part. The error calls it ``name``."""
    found = Guard(folder, name or folder)
    _guards.append(found)
    try:
        yield found
    finally:
        _guards.remove(found)
