"""The cache: the record of each file in it, and the functions behind ``neuron-explainer cache``."""

import contextlib
import dataclasses
import fnmatch
import logging
import os
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path, PurePosixPath

from neuron_explainer.errors import CheckpointError, SourceError, did_you_mean
from neuron_explainer.files.names import Remote, cache_dir, is_remote, parse
from neuron_explainer.files.steps import plain_write, step
from neuron_explainer.files.writing import (
    check_expected,
    local_path,
    make_folder,
    read_json,
    remove,
    replace,
    sha256_of,
    write_json,
)

logger = logging.getLogger("neuron_explainer.files")


ABSENT = "it is not in the cache"
# Files whose hash this process has checked: path -> size, time and inode at that moment.
verified: dict[str, tuple[int, int, int]] = {}


@dataclass(frozen=True)
class Record:
    """What is known about a downloaded file, as ``record.json`` holds it."""

    source: str
    path: str  # below the cache, with "/"
    size: int
    etag: str | None
    sha256: str
    date: str


def read_record(state: Path) -> Record | None:
    """The record of a file; None if there is none; CheckpointError if it is damaged."""
    file = state / "record.json"
    if not file.exists():
        return None
    found = read_json(file)
    try:
        record = Record(**found)
    except TypeError as error:
        raise CheckpointError(f"{file}: not a record of this cache: {error}") from None
    texts = (record.source, record.path, record.sha256, record.date)
    if type(record.size) is not int or not all(isinstance(text, str) for text in texts):
        raise CheckpointError(f"{file}: not a record of this cache: a field of another type")
    try:
        local_path(record.path)
    except SourceError as error:
        raise CheckpointError(f"{file}: not a record of this cache: {error}") from None
    return record


def why_unusable(remote: Remote) -> str | None:
    """What is wrong with the cached copy; None if it can be used."""
    path = remote.path
    if not path.exists():
        return ABSENT
    if not path.is_file():
        raise SourceError(f"{remote.source}: {path} is a folder where a file is expected")
    try:
        record = read_record(remote.state)
    except CheckpointError as error:
        return str(error)
    if record is None:
        # A download writes the record first, so a user has put this file here. It can only be compared
        # with the caller's figures, and must not be replaced.
        check_expected(path, remote.source, remote.size, remote.sha256)
        return None
    if remote.size not in (None, record.size) or remote.sha256 not in (None, record.sha256):
        return f"{path} is another version than the one asked for"
    problem = damage(path, record)
    if problem is None:
        Partial(remote).forget()
    return problem


def damage(path: Path, record: Record, *, rehash: bool = False) -> str | None:
    """How the file differs from the one that was downloaded; None if it does not.

    Size, time and inode are compared in every call, the hash once in each process, or with ``rehash``.
    """
    found = path.stat()
    if found.st_size != record.size:
        return f"{path} has {found.st_size} bytes, and had {record.size} on {record.date}"
    mark = (found.st_size, found.st_mtime_ns, found.st_ino)
    if not rehash and verified.get(str(path)) == mark:
        return None
    if sha256_of(path) != record.sha256:
        return f"{path} has changed since it was downloaded on {record.date} (its SHA-256 differs)"
    verified[str(path)] = mark
    return None


# --- unfinished and finished downloads ---


@dataclass(frozen=True)
class Version:
    """What the server says about a file; all parts of a download must agree in it."""

    etag: str | None = None
    total: int | None = None
    md5: str | None = None  # in base64


class Partial:
    """An unfinished download: the bytes received so far, and the version of the file they belong to."""

    def __init__(self, remote: Remote) -> None:
        self.source = remote.source
        self.path = remote.state / "partial"
        self.info = remote.state / "partial.json"

    def size(self) -> int:
        return self.path.stat().st_size if self.path.exists() else 0

    def version(self) -> Version:
        """The version that the received bytes belong to; empty if it is not known."""
        try:
            found = read_json(self.info)
            return Version(found["etag"], found["total"], found["md5"])
        except (SourceError, CheckpointError, KeyError):
            return Version()

    def begin(self, version: Version) -> None:
        """Start again. The old bytes are deleted first, so that they never lie beside the new ETag."""
        self.discard()
        write_json(self.info, {"source": self.source} | asdict(version))

    def discard(self) -> None:
        remove(self.path)
        remove(self.info)

    def forget(self) -> None:
        """Remove what a process left that was killed when the file had just got its name."""
        if self.info.exists() and not self.path.exists():
            with contextlib.suppress(SourceError):  # a cache that is only read
                remove(self.info)

    def append(self, chunks: Iterator[bytes], received: Callable[[int], None]) -> None:
        """Write the chunks and sync them to disk; ``received`` is called with the size of each."""
        flags = os.O_WRONLY | os.O_CREAT | os.O_APPEND | getattr(os, "O_BINARY", 0)
        with plain_write(self.path), open(os.open(self.path, flags, 0o600), "wb") as file:
            for chunk in chunks:
                file.write(chunk)
                file.flush()
                received(len(chunk))
            step("sync", self.path)
            os.fsync(file.fileno())


def install(remote: Remote, partial: Partial) -> None:
    """Write the record, and then give the received file its final name.

    A process killed between the two leaves a record without a file, which is fetched again. In the other
    order, the file would look like one that the user has put there.
    """
    path = remote.path
    found = partial.path.stat()
    record = Record(
        source=remote.source,
        path=PurePosixPath("files", *remote.parts).as_posix(),
        size=found.st_size,
        etag=partial.version().etag,
        sha256=sha256_of(partial.path),
        date=time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
    )
    _warn_if_other_version(remote, record)
    make_folder(path.parent)
    write_json(remote.state / "record.json", asdict(record))
    replace(partial.path, path)
    partial.discard()
    verified[str(path)] = (found.st_size, found.st_mtime_ns, found.st_ino)


def _warn_if_other_version(remote: Remote, record: Record) -> None:
    with contextlib.suppress(CheckpointError):
        before = read_record(remote.state)
        if before is not None and before.sha256 != record.sha256:
            logger.warning(
                "%s is not the file that it was on %s: SHA-256 %s then, %s now",
                *(remote.source, before.date, before.sha256, record.sha256),
            )


# --- looking at the cache and tidying it ---


@dataclass(frozen=True)
class CacheEntry:
    """One file of the cache. ``problem`` is None if nothing wrong was found.

    A file that a user has put there has its path as ``source``, and no hash or date.
    """

    source: str
    path: Path
    size: int
    etag: str | None = None
    sha256: str | None = None
    date: str | None = None
    problem: str | None = None


def list_cache() -> list[CacheEntry]:
    """Every file of the cache, sorted by source; names and sizes are checked, contents are not."""
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
    return dataclasses.replace(entry, problem=_entry_problem(root, path, record, rehash))


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
    """Delete the cached files whose source matches (``*``, ``?``), and return their entries.

    ``list_cache`` shows the names. If nothing matches, that is an error: a typing error must not look
    like success.
    """
    entries = list_cache()
    wanted = [entry for entry in entries if _matches(entry, source_or_pattern)]
    if not wanted:
        _remove_empty_folders(
            cache_dir() / "files"
        )  # of a process that was killed as its last step
        near = did_you_mean(source_or_pattern, (entry.source for entry in entries))
        raise SourceError(f"nothing in {cache_dir()} matches {source_or_pattern!r}.{near}")
    for entry in wanted:
        _remove(entry)
    _remove_empty_folders(cache_dir() / "files")
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
        # The lock stays: if it were deleted, two processes could hold one at the same time.
        with filelock.FileLock(state / "lock"):
            remove(entry.path)
            for name in ("record.json", "partial", "partial.json"):
                remove(state / name)
    remove(entry.path)


def _remove_empty_folders(folder: Path) -> None:
    """Remove the folders below that hold no file."""
    for path in sorted(folder.rglob("*"), reverse=True):
        with contextlib.suppress(OSError):  # a download has put something there
            if path.is_dir() and not any(path.iterdir()):
                step("remove", path)
                path.rmdir()


def _states_of(entry: CacheEntry, root: Path) -> Iterator[Path]:
    """The folders that hold the record of an entry; an unfinished download lies in its own."""
    if entry.path.parent.parent == root / "state":
        yield entry.path.parent
        return
    for state in (root / "state").glob("*"):
        with contextlib.suppress(CheckpointError):
            record = read_record(state)
            if record is not None and root / record.path == entry.path:
                yield state
