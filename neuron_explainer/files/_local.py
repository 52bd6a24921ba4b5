"""Local files and folders, and what stands in their way."""

import errno
import hashlib
import shutil
from base64 import b64encode
from itertools import islice
from pathlib import Path

from neuron_explainer.errors import SourceError, did_you_mean

REMOTE_PREFIXES = ("az://", "https://", "http://", "hf:")
DISK_FULL = frozenset({errno.ENOSPC, errno.EFBIG, getattr(errno, "EDQUOT", errno.ENOSPC)})

FORBIDDEN = frozenset({errno.EACCES, errno.EPERM, errno.EROFS})


def local_path(source: str | Path) -> Path:
    """``source`` as it is, but for a leading ``~``."""
    return Path(source).expanduser() if str(source).startswith("~") else Path(source)


def local_file(source: str | Path, size: int | None, sha256: str | None) -> Path:
    """The path of a file that is there and has these figures, where given."""
    path = local_path(source)
    try:
        if path.is_dir():
            raise SourceError(f"{path} is a folder where a file is expected")
        if not path.exists():
            near = _nearby(path) + _unknown_scheme(str(source))
            raise SourceError(f"there is no file {source}{near}")
        check_expected(path, str(source), size, sha256 and sha256.lower())
    except OSError as error:  # no permission, a name too long
        raise SourceError(f"cannot read {source}: {error.strerror}") from error
    return path


def _nearby(path: Path) -> str:
    for parent in path.parents:
        if parent.is_file():
            return f": {parent} is a file where a folder is expected"
    if not path.parent.is_dir():
        return f": there is no folder {path.parent} either"
    # A folder may hold a file for each of 100,000 latents; comparing with some is enough.
    return did_you_mean(path.name, (p.name for p in islice(path.parent.iterdir(), 1000)))


def _unknown_scheme(source: str) -> str:
    scheme, separator, _ = source.partition("://")
    if not separator:
        return ""
    known = ", ".join(REMOTE_PREFIXES)
    return f" ({scheme}:// is not among the known prefixes {known})"


def check_expected(path: Path, source: str, size: int | None, sha256: str | None) -> None:
    """Refuse a file that is not the one that the caller means."""
    found = path.stat().st_size
    if size is not None and found != size:
        raise SourceError(f"{source}: expected {size} bytes, found {found} in {path}")
    if sha256 is not None and (digest := sha256_of(path)) != sha256:
        raise SourceError(f"{source}: expected SHA-256 {sha256}, found {digest} in {path}")


def make_folder(folder: Path) -> None:
    """The folder and its parents, where they are not there."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise SourceError(f"cannot make the folder {folder}: {in_way(error, folder)}") from error


def in_way(error: OSError, path: Path) -> str:
    """What stands in the way, said better than ``FileExistsError`` does."""
    for part in (path, *path.parents):
        if part.is_file():
            return f"{part} is a file where a folder is expected"
    return f"{type(error).__name__}: {error.strerror or error}"


def disk_reason(error: OSError, folder: Path) -> str:
    """Why nothing could be written in ``folder``."""
    if error.errno not in DISK_FULL:
        return in_way(error, Path(error.filename or folder))
    free = shutil.disk_usage(folder).free
    return f"no room ({error.strerror}; {free} bytes are free in {folder})"


def sha256_of(path: str | Path) -> str:
    """The SHA-256 of a file, in hex."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def md5_of(path: Path) -> str:
    """As servers state it, in base64. Against accidents of transfer only."""
    with open(path, "rb") as file:
        digest = hashlib.file_digest(file, lambda: hashlib.md5(usedforsecurity=False))
    return b64encode(digest.digest()).decode()
