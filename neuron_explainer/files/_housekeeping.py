"""Looking at the cache and tidying it: what ``neuron-explainer cache`` does."""

import contextlib
import fnmatch
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath

from neuron_explainer.errors import CheckpointError, SourceError, did_you_mean
from neuron_explainer.files._folder import cache_dir
from neuron_explainer.files._json import read_json
from neuron_explainer.files._names import is_remote, parse
from neuron_explainer.files._records import Record, damage, read_record, verified


@dataclass(frozen=True)
class CacheEntry:
    """One file of the cache. ``problem`` is None where nothing wrong was found.

    A file that someone has put there by hand has its path as ``source``, and no hash or date.
    """

    source: str
    path: Path
    size: int
    etag: str | None = None
    sha256: str | None = None
    date: str | None = None
    problem: str | None = None


def list_cache() -> list[CacheEntry]:
    """Every file of the cache, by source, with what a look at names and sizes shows."""
    return _entries(rehash=False)


def verify_cache() -> list[CacheEntry]:
    """:func:`list_cache`, with every file read and its SHA-256 compared."""
    return _entries(rehash=True)


def _entries(*, rehash: bool) -> list[CacheEntry]:
    root = cache_dir()
    found = [
        entry
        for state in sorted((root / "state").glob("*"))
        if (entry := _entry(root, state, rehash)) is not None
    ]
    recorded = {entry.path for entry in found}
    files = (path for path in (root / "files").rglob("*") if path.is_file())
    by_hand = [
        CacheEntry(path.relative_to(root).as_posix(), path, path.stat().st_size)
        for path in files
        if path not in recorded
    ]
    return sorted(found + by_hand, key=lambda entry: (entry.source, str(entry.path)))


def _entry(root: Path, state: Path, rehash: bool) -> CacheEntry | None:
    try:
        record = read_record(state)
    except CheckpointError as error:
        return CacheEntry(state.name, state / "record.json", 0, problem=str(error))
    if record is None:
        return _unfinished(state)
    path = root.joinpath(*PurePosixPath(record.path).parts)
    entry = CacheEntry(record.source, path, record.size, record.etag, record.sha256, record.date)
    return replace(entry, problem=_entry_problem(root, path, record, rehash))


def _unfinished(state: Path) -> CacheEntry | None:
    partial = state / "partial"
    if not partial.exists():
        return None
    source = state.name
    with contextlib.suppress(SourceError, CheckpointError):
        source = str(read_json(state / "partial.json").get("source", source))
    problem = "an unfinished download, to be continued when the file is next asked for"
    return CacheEntry(source, partial, partial.stat().st_size, problem=problem)


def _entry_problem(root: Path, path: Path, record: Record, rehash: bool) -> str | None:
    if not path.resolve().is_relative_to(root.resolve()):
        return f"{path} leads out of the cache"
    if not path.is_file():
        return "the file is missing, and will be downloaded again"
    if rehash:
        return damage(path, record, rehash=True)
    size = path.stat().st_size
    return None if size == record.size else f"{size} bytes, expected {record.size}"


def remove_from_cache(source_or_pattern: str) -> list[CacheEntry]:
    """Delete the cached files of one source, or of all that match (``*``, ``?``); what went.

    ``list_cache`` shows the names. Nothing matching is an error: a slip should not look like work
    done.
    """
    entries = list_cache()
    wanted = [entry for entry in entries if _matches(entry, source_or_pattern)]
    if not wanted:
        near = did_you_mean(source_or_pattern, (entry.source for entry in entries))
        raise SourceError(f"nothing in {cache_dir()} matches {source_or_pattern!r}.{near}")
    for entry in wanted:
        _remove(entry)
    return wanted


def _matches(entry: CacheEntry, pattern: str) -> bool:
    if fnmatch.fnmatchcase(entry.source, pattern) or str(entry.path) == pattern:
        return True
    with contextlib.suppress(SourceError):  # the same file by its other name, az:// or https://
        return is_remote(pattern) and parse(pattern).path == entry.path
    return False


def _remove(entry: CacheEntry) -> None:
    import filelock

    root = cache_dir()
    if not entry.path.parent.resolve().is_relative_to(root.resolve()):
        raise SourceError(f"{entry.path} leads out of the cache; remove it, or the link, yourself")
    verified.pop(str(entry.path), None)
    for state in _states_of(entry, root):
        # The lock itself stays: to delete it would let two processes in at once.
        with filelock.FileLock(state / "lock"):
            entry.path.unlink(missing_ok=True)
            for name in ("record.json", "partial", "partial.json"):
                (state / name).unlink(missing_ok=True)
    entry.path.unlink(missing_ok=True)
    for folder in entry.path.parents:
        if folder in (root / "files", root / "state", root) or not folder.is_relative_to(root):
            break
        with contextlib.suppress(OSError):  # not empty
            folder.rmdir()


def _states_of(entry: CacheEntry, root: Path) -> Iterator[Path]:
    """Where the record of an entry lies: a partial download lies in its own state folder."""
    if entry.path.parent.parent == root / "state":
        yield entry.path.parent
        return
    for state in (root / "state").glob("*"):
        with contextlib.suppress(CheckpointError):
            record = read_record(state)
            if record is not None and root / record.path == entry.path:
                yield state
