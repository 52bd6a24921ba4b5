"""What is known about each cached file, and whether the file still is what it was."""

from dataclasses import dataclass
from pathlib import Path

from neuron_explainer.errors import CheckpointError, SourceError
from neuron_explainer.files._json import read_json
from neuron_explainer.files._local import check_expected, sha256_of
from neuron_explainer.files._names import Remote

ABSENT = "it is not in the cache"
# Hashed once in a process: path -> what the file system said about the file then.
verified: dict[str, tuple[int, int, int]] = {}


@dataclass(frozen=True)
class Record:
    """What is known about a downloaded file; ``record.json``."""

    source: str
    path: str  # below the cache, with "/"
    size: int
    etag: str | None
    sha256: str
    date: str


def read_record(state: Path) -> Record | None:
    """None where nothing is recorded; CheckpointError where it cannot be believed."""
    file = state / "record.json"
    if not file.exists():
        return None
    found = read_json(file)
    try:
        record = Record(**found)
    except TypeError as error:
        raise CheckpointError(f"{file}: not a record of this cache: {error}") from None
    texts = (record.source, record.path, record.sha256, record.date)
    if not isinstance(record.size, int) or not all(isinstance(text, str) for text in texts):
        raise CheckpointError(f"{file}: not a record of this cache: a field of another type")
    return record


def why_unusable(remote: Remote) -> str | None:
    """None if the cached copy may be used, else what is wrong with it."""
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
        # Downloads write the record first, so a user has put this file here. There is nothing to
        # hold it against but the caller's figures, and it is not ours to replace.
        check_expected(path, remote.source, remote.size, remote.sha256)
        return None
    if remote.size not in (None, record.size) or remote.sha256 not in (None, record.sha256):
        return f"{path} is another version than the one asked for"
    return damage(path, record)


def damage(path: Path, record: Record, *, rehash: bool = False) -> str | None:
    """None where the file is what was downloaded, else what is not.

    Size, time and inode are compared at every call, the hash once in a process or on ``rehash``.
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
