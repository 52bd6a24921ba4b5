"""Every change on disk is a step: between any two of them the process may be killed.

Whatever makes, writes, syncs, renames or removes something calls :func:`step` first. The functions of this
package do so themselves; a plain write elsewhere stands in a :func:`plain_write` block. This gives one place

- for tests: :func:`watch_steps` counts the steps of a command, kills it at one of them, or fills the disk;
- for a check: a folder under ``writing.guard`` is watched, so that each step in it first makes sure that it
  is still that folder.
"""

import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Literal

Kind = Literal["make", "write", "written", "sync", "rename", "remove"]
Watcher = Callable[[Kind, Path], None]
_watchers: list[Watcher] = []


def step(kind: Kind, path: Path) -> None:
    """Say what is about to happen to ``path``; ``"written"`` says that a write has just ended.

    SourceError if ``path`` is in a guarded folder that is no longer there.
    """
    for watcher in [*_watchers]:
        watcher(kind, path)


@contextlib.contextmanager
def watch_steps(watcher: Watcher) -> Iterator[None]:
    """Call ``watcher(kind, path)`` before every step of any thread. It may raise; in tests, it may also
    never return."""
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
