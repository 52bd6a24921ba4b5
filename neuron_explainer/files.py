"""Paths and URLs to local files: a private cache that is never wrong, and writes that never tear.

Every read of the library goes through :func:`fetch`, every write through :func:`atomic_write` or
:func:`atomic_folder`. A remote file is had once and checked ever after:

- it is received into ``state/<key>/partial``, continued with a ``Range`` request where the server
  still has the same ETag, compared with every length and checksum that is known, synced to disk
  and only then renamed to ``files/<host>/<path>``, under a lock that other processes respect;
- ``state/<key>/record.json`` says source, size, ETag, SHA-256 and date. A load compares the size,
  and the hash once in each process; bytes that differ are fetched again or refused, never used;
- a file that is there and right is used without asking any server, so a warm cache works offline.

Public blobs of Azure (``az://account/container/name``) are read over plain anonymous https, and
``blobfile`` is asked only where that is refused and the user has Azure credentials: blobfile looks
for credentials first, so that an expired ``az login`` would end the download of a public file, and
needs the right to list the container, which a public blob need not give.
"""

import contextlib
import ctypes
import errno
import fnmatch
import hashlib
import ipaddress
import json
import logging
import os
import random
import secrets
import shutil
import stat
import sys
import threading
import time
from base64 import b64encode
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import asdict, dataclass, replace
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any
from urllib.parse import SplitResult, quote, unquote, urlsplit, urlunsplit

from neuron_explainer.errors import (
    CheckpointError,
    InputError,
    MissingExtraError,
    SourceError,
    did_you_mean,
)

__all__ = [
    "CacheEntry",
    "atomic_folder",
    "atomic_write",
    "cache_dir",
    "exists",
    "fetch",
    "fetch_all",
    "is_remote",
    "join",
    "list_cache",
    "read_json",
    "remove_from_cache",
    "sha256_of",
    "verify_cache",
    "write_json",
]

logger = logging.getLogger(__name__)

CACHE_VARIABLE = "NEURON_EXPLAINER_CACHE"
CHUNK_BYTES = 256 * 1024
# A try that brings new bytes starts the count again: a slow, broken line still ends with the file.
ATTEMPTS = 5
BACKOFF_SECONDS = 0.5
LONGEST_WAIT_SECONDS = 30.0
TIMEOUT_SECONDS = (10, 60)  # to connect, between two reads

_REMOTE_PREFIXES = ("az://", "https://", "http://", "hf:")
_AZURE_HOST = ".blob.core.windows.net"
_AZURE_CREDENTIALS = (
    "AZURE_STORAGE_KEY",
    "AZURE_STORAGE_ACCOUNT_KEY",
    "AZURE_STORAGE_CONNECTION_STRING",
    "AZURE_APPLICATION_CREDENTIALS",
    "AZURE_CLIENT_ID",
    "AZURE_USE_IDENTITY",
)
_RETRIED_STATUS = frozenset({408, 425, 429, 500, 502, 503, 504})
# Azure answers 404 or 409, not 401, where a container may not be read anonymously.
_REFUSED_STATUS = frozenset({401, 403, 404, 409, 410})
_DISK_FULL = frozenset({errno.ENOSPC, errno.EFBIG, getattr(errno, "EDQUOT", errno.ENOSPC)})
_ABSENT = "it is not in the cache"
_SAVED_FOLDER_MARKS = ("config.json", "cfg.json")
_AT_FDCWD = -100
_RENAME_EXCHANGE = 2

# Hashed once in a process: path -> what the file system said about the file then.
_verified: dict[str, tuple[int, int, int]] = {}


class _RetryError(Exception):
    """This try failed in a way that another may mend. Not an OSError: those are the disk's."""

    def __init__(self, reason: str, *, wait_seconds: float = 0.0, anew: bool = False) -> None:
        super().__init__(reason)
        self.wait_seconds = wait_seconds
        self.anew = anew  # what has been received is of no use


class _UnreachableError(_RetryError):
    """No connection came about at all: hopeless unless bytes have already come in this call."""


class _RefusedError(SourceError):
    """The server answered, and will answer the same again."""

    def __init__(self, reason: str, status: int) -> None:
        super().__init__(reason)
        self.status = status


# ---------------------------------------------------------------------------------- the cache


def cache_dir() -> Path:
    """The private folder of downloaded files, made when it is not there.

    ``$NEURON_EXPLAINER_CACHE``, or the user's cache folder. A folder that others own or can write
    to is refused: who can plant a file there chooses which weights are loaded.
    """
    chosen = os.environ.get(CACHE_VARIABLE)
    folder = Path(os.path.abspath(Path(chosen).expanduser())) if chosen else _user_cache()
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    except OSError as error:
        where = f" ({CACHE_VARIABLE})" if chosen else f"; set {CACHE_VARIABLE} to another"
        raise SourceError(
            f"cannot make the cache folder {folder}{where}: {_in_way(error, folder)}"
        ) from error
    _check_private(folder)
    return folder


def _user_cache() -> Path:
    if sys.platform == "win32":
        local = os.environ.get("LOCALAPPDATA")
        return (Path(local) if local else Path.home() / "AppData/Local") / "neuron_explainer/Cache"
    if sys.platform == "darwin":
        return Path.home() / "Library/Caches/neuron_explainer"
    xdg = os.environ.get("XDG_CACHE_HOME", "")
    # A relative XDG path is to be ignored, says the specification.
    base = Path(xdg) if os.path.isabs(xdg) else Path.home() / ".cache"
    return base / "neuron_explainer"


def _check_private(folder: Path) -> None:
    if not hasattr(os, "geteuid"):
        return  # Windows: access lists, not modes, and the user's folder is the user's
    found = folder.stat()
    if found.st_uid != os.geteuid():
        raise SourceError(
            f"the cache folder {folder} belongs to user {found.st_uid}, not to you "
            f"({os.geteuid()}), who could change what you load. "
            f"Set {CACHE_VARIABLE} to a folder of your own."
        )
    if found.st_mode & stat.S_IWOTH:
        raise SourceError(
            f"everyone may write to the cache folder {folder} and so change what you load. "
            f"Run chmod o-w on it, or set {CACHE_VARIABLE} to a private folder."
        )


def _in_way(error: OSError, path: Path) -> str:
    """What stands in the way, said better than ``FileExistsError`` does."""
    for part in (path, *path.parents):
        if part.is_file():
            return f"{part} is a file where a folder is expected"
    return f"{type(error).__name__}: {error.strerror or error}"


@dataclass(frozen=True)
class _Remote:
    """One remote file: how the user wrote it, where it is, and where its copy lies."""

    source: str  # for people: never with the query, which may hold a secret
    url: str  # https://, http:// (loopback) or hf:// with everything
    parts: tuple[str, ...]  # the copy's path below files/
    size: int | None = None  # what the caller says of the file
    sha256: str | None = None

    @property
    def path(self) -> Path:
        return _inside_cache("files", *self.parts)

    @property
    def state(self) -> Path:
        """The folder of the record, the lock and the unfinished download.

        Flat and hashed, so that no remote name can stand for one of these.
        """
        return _inside_cache("state", hashlib.sha256(self.url.encode()).hexdigest()[:32])

    @property
    def azure(self) -> tuple[str, str] | None:
        """``(account, path)`` of an Azure blob."""
        found = urlsplit(self.url)
        host = found.hostname or ""
        if not host.endswith(_AZURE_HOST):
            return None
        return host.removesuffix(_AZURE_HOST), unquote(found.path.lstrip("/"))


def _inside_cache(*parts: str) -> Path:
    root = cache_dir()
    path = root.joinpath(*parts)
    real = path.resolve()
    if not real.is_relative_to(root.resolve()):
        raise SourceError(
            f"{path} leads out of the cache, to {real}, through a symbolic link; "
            "remove the link, or give the file's own path instead of a URL"
        )
    return path


def is_remote(source: str | Path) -> bool:
    """Whether ``source`` is an ``az://``, ``https://``, ``http://`` or ``hf:`` name.

    ``http://`` is remote by form; :func:`fetch` accepts it from this machine only. A ``Path`` is
    always local.
    """
    return isinstance(source, str) and source.startswith(_REMOTE_PREFIXES)


def _parse(source: str) -> _Remote:
    if source.startswith("az://"):
        account, _, rest = source.removeprefix("az://").partition("/")
        if not (account.isascii() and account.isalnum() and account == account.lower()):
            raise SourceError(f"{source}: {account!r} is no name of an Azure storage account")
        found = urlsplit(f"https://{account}{_AZURE_HOST}/{quote(rest)}")
    elif source.startswith("hf:"):
        return _parse_hf(source)
    else:
        found = urlsplit(source)
    shown = _shown(source) if found.query else source
    host = _checked_host(found, shown)
    names = [unquote(name) for name in found.path.split("/")[1:]]
    _check_names(names, shown)
    parts = [_file_name(name) for name in names]
    if found.query:
        parts[-1] += "@" + hashlib.sha256(found.query.encode()).hexdigest()[:16]
    path = quote("/" + "/".join(names), safe="/:@!$&'()*+,;=~")
    url = urlunsplit((found.scheme, host, path, found.query, ""))
    return _Remote(shown, url, (found.scheme, _file_name(host), *parts))


def _parse_hf(source: str) -> _Remote:
    text = source.removeprefix("hf:").removeprefix("//")
    names = text.split("/")
    _check_names(names, source)
    if len(names) < 3:
        raise SourceError(f"{source}: expected hf:owner/name/path or hf:owner/name@revision/path")
    return _Remote(source, f"hf://{text}", ("hf", *map(_file_name, names)))


def _checked_host(found: SplitResult, shown: str) -> str:
    if "@" in found.netloc:
        raise SourceError(f"{found.scheme}://{found.hostname}: no passwords in a URL, please")
    if not found.hostname:
        raise SourceError(f"{shown}: a URL without a host")
    if found.scheme == "http" and not _is_loopback(found.hostname):
        raise SourceError(
            f"{shown}: plain http can be changed on its way and is accepted from this machine "
            "only; use https"
        )
    return found.netloc.lower()


def _is_loopback(host: str) -> bool:
    with contextlib.suppress(ValueError):
        return ipaddress.ip_address(host).is_loopback
    return host == "localhost"


def _check_names(names: Sequence[str], source: str) -> None:
    """Refuse what could lead out of a folder, on any system: names come from remote indexes too."""
    for name in names:
        if name in ("", ".", "..") or any(c in "/\\" or ord(c) < 32 for c in name):
            hint = " (a folder's name, not a file's?)" if name == names[-1] == "" else ""
            raise SourceError(f"{source}: the part {name!r} is not accepted in a name{hint}")


def _file_name(name: str) -> str:
    """A name that every file system takes, the same for the same name and no other."""
    safe = quote(name, safe=" !#$&'()+,;=@[]^_`{}~.-")
    if len(safe) <= 120:
        return safe
    return f"{safe[:80]}~{hashlib.sha256(name.encode()).hexdigest()[:32]}"


@dataclass(frozen=True)
class _Record:
    """What is known about a downloaded file; ``record.json``."""

    source: str
    path: str  # below the cache, with "/"
    size: int
    etag: str | None
    sha256: str
    date: str


def _read_record(state: Path) -> _Record | None:
    file = state / "record.json"
    if not file.exists():
        return None
    found = read_json(file)
    try:
        record = _Record(**found)
    except TypeError as error:
        raise CheckpointError(f"{file}: not a record of this cache: {error}") from None
    if not (isinstance(record.size, int) and isinstance(record.sha256, str)):
        raise CheckpointError(f"{file}: not a record of this cache: size or sha256 is missing")
    return record


def _why_unusable(remote: _Remote) -> str | None:
    """None if the cached copy may be used, else what is wrong with it."""
    path = remote.path
    if not path.exists():
        return _ABSENT
    if not path.is_file():
        raise SourceError(f"{remote.source}: {path} is a folder where a file is expected")
    try:
        record = _read_record(remote.state)
    except CheckpointError as error:
        return str(error)
    if record is None:
        # Downloads write the record first, so a user has put this file here. There is nothing to
        # hold it against but the caller's figures, and it is not ours to replace.
        _check_expected(path, remote.source, remote.size, remote.sha256)
        return None
    if remote.size not in (None, record.size) or remote.sha256 not in (None, record.sha256):
        return f"{path} is another version than the one asked for"
    return _damage(path, record)


def _damage(path: Path, record: _Record, *, rehash: bool = False) -> str | None:
    found = path.stat()
    if found.st_size != record.size:
        return f"{path} has {found.st_size} bytes, and had {record.size} on {record.date}"
    mark = (found.st_size, found.st_mtime_ns, found.st_ino)
    if not rehash and _verified.get(str(path)) == mark:
        return None
    if sha256_of(path) != record.sha256:
        return f"{path} has changed since it was downloaded on {record.date} (its SHA-256 differs)"
    _verified[str(path)] = mark
    return None


# ---------------------------------------------------------------------------------- fetching


def fetch(
    source: str | Path,
    *,
    size: int | None = None,
    sha256: str | None = None,
    progress: bool = True,
) -> Path:
    """The local file of ``source``: a local path itself, a remote file's checked copy.

    ``size`` in bytes and ``sha256`` in hex, where given, must be those of the file.
    """
    if not is_remote(source):
        return _local_file(source, size, sha256)
    with _Transfer(progress=progress) as transfer:
        return _fetch(str(source), transfer, size, sha256)


def fetch_all(sources: Sequence[str], *, threads: int = 8, progress: bool = True) -> list[Path]:
    """:func:`fetch` of many at once, in their order, with one bar and one error for all."""
    with _Transfer(progress=progress, threads=threads) as transfer:
        futures = _run_all(sources, transfer, threads)
    failures = [str(error) for future in futures if (error := future.exception()) is not None]
    for future in futures:
        error = future.exception()
        if error is not None and not isinstance(error, SourceError):
            raise error
    if failures:
        listed = "\n".join(f"- {text}" for text in failures)
        raise SourceError(f"{len(failures)} of {len(sources)} files cannot be had:\n{listed}")
    return [future.result() for future in futures]


def _run_all(sources: Sequence[str], transfer: "_Transfer", threads: int) -> list[Future[Path]]:
    with ThreadPoolExecutor(max(1, threads), thread_name_prefix="fetch") as pool:
        futures = [pool.submit(_fetch, source, transfer, None, None) for source in sources]
        try:
            wait(futures)
        except BaseException:  # Ctrl-C: let the threads stop at their next chunk, not at the end
            transfer.stopped.set()
            pool.shutdown(wait=False, cancel_futures=True)
            raise
    return futures


def _local_file(source: str | Path, size: int | None, sha256: str | None) -> Path:
    path = Path(source)
    if str(source).startswith("~"):
        path = path.expanduser()
    if path.is_dir():
        raise SourceError(f"{path} is a folder where a file is expected")
    if not path.exists():
        raise SourceError(f"there is no file {source}{_nearby(path)}{_unknown_scheme(str(source))}")
    _check_expected(path, str(source), size, sha256)
    return path


def _nearby(path: Path) -> str:
    for parent in path.parents:
        if parent.is_file():
            return f": {parent} is a file where a folder is expected"
    if not path.parent.is_dir():
        return f": there is no folder {path.parent} either"
    return did_you_mean(path.name, (p.name for p in path.parent.iterdir()))


def _unknown_scheme(source: str) -> str:
    scheme, separator, _ = source.partition("://")
    if not separator:
        return ""
    known = ", ".join(_REMOTE_PREFIXES)
    return f" ({scheme}:// is not among the known prefixes {known})"


def _check_expected(path: Path, source: str, size: int | None, sha256: str | None) -> None:
    found = path.stat().st_size
    if size is not None and found != size:
        raise SourceError(f"{source}: expected {size} bytes, found {found} in {path}")
    if sha256 is not None and (digest := sha256_of(path)) != sha256:
        raise SourceError(f"{source}: expected SHA-256 {sha256}, found {digest} in {path}")


def _fetch(source: str, transfer: "_Transfer", size: int | None, sha256: str | None) -> Path:
    if not is_remote(source):
        return _local_file(source, size, sha256)
    remote = replace(_parse(source), size=size, sha256=sha256)
    if _why_unusable(remote) is None:
        return remote.path
    import filelock

    _make_folder(remote.state)
    with filelock.FileLock(remote.state / "lock"):
        why = _why_unusable(remote)  # again: another process may have been here
        if why is not None:
            _download(remote, transfer, why)
    return remote.path


def _download(remote: _Remote, transfer: "_Transfer", why: str) -> None:
    """Bring the file into the cache. The caller holds its lock."""
    if why != _ABSENT:
        logger.warning("%s; downloading %s again", why, remote.source)
    partial = _Partial(remote)
    try:
        _receive(remote, partial, transfer)
        _install(remote, partial)
    except SourceError as error:
        damaged = "" if why == _ABSENT else f" What the cache holds cannot be used: {why}."
        text = f"cannot get {remote.source}: {error}.{damaged} {_advice(remote)}"
        raise SourceError(text) from error
    except OSError as error:
        if error.errno in _DISK_FULL:
            partial.discard()  # else the disk stays full
        where = cache_dir()
        text = f"cannot store {remote.source} in {where}: {_disk_reason(error, where)}"
        raise SourceError(text) from error


def _advice(remote: _Remote) -> str:
    return (
        f"Without a network: give a local path instead of this name, or put the file at "
        f"{remote.path}, or set {CACHE_VARIABLE} to a folder that holds it as "
        f"{PurePosixPath('files', *remote.parts)}."
    )


def _disk_reason(error: OSError, folder: Path) -> str:
    if error.errno not in _DISK_FULL:
        return _in_way(error, Path(error.filename or folder))
    free = shutil.disk_usage(folder).free
    return f"no room ({error.strerror}; {free} bytes are free in {folder})"


def _make_folder(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise SourceError(f"cannot make the folder {folder}: {_in_way(error, folder)}") from error


@dataclass(frozen=True)
class _Version:
    """What the server says of a file: what the parts of one download must agree in."""

    etag: str | None = None
    total: int | None = None
    md5: str | None = None  # in base64


class _Partial:
    """An unfinished download: its bytes, and which version of the file they begin."""

    def __init__(self, remote: _Remote) -> None:
        self.source = remote.source
        self.path = remote.state / "partial"
        self.info = remote.state / "partial.json"

    def size(self) -> int:
        return self.path.stat().st_size if self.path.exists() else 0

    def version(self) -> _Version:
        """Of the bytes that are there; empty where unknown."""
        try:
            found = read_json(self.info)
            return _Version(found["etag"], found["total"], found["md5"])
        except (SourceError, CheckpointError, KeyError):
            return _Version()

    def begin(self, version: _Version) -> None:
        """Start anew. The old bytes go first, so that they never lie beside the new ETag."""
        self.discard()
        write_json(self.info, {"source": self.source} | asdict(version))

    def discard(self) -> None:
        self.path.unlink(missing_ok=True)
        self.info.unlink(missing_ok=True)

    def append(self, chunks: Iterator[bytes], transfer: "_Transfer") -> None:
        flags = os.O_WRONLY | os.O_CREAT | os.O_APPEND | getattr(os, "O_BINARY", 0)
        with open(os.open(self.path, flags, 0o600), "wb") as file:
            for chunk in chunks:
                file.write(chunk)
                file.flush()
                transfer.received(self.source, len(chunk))
            os.fsync(file.fileno())


@dataclass(frozen=True)
class _Body:
    """An answer that has begun: the bytes of a version of the file from ``start`` on."""

    start: int
    version: _Version
    chunks: Iterator[bytes]


def _receive(remote: _Remote, partial: _Partial, transfer: "_Transfer") -> None:
    """Fill ``partial`` with the whole, checked file, in as many tries as it takes."""
    failures, most, came = 0, partial.size(), False
    while True:
        try:
            return _try_once(remote, partial, transfer)
        except _RetryError as error:
            if partial.size() > most:
                failures, most, came = 0, partial.size(), True
            if error.anew:
                partial.discard()
            failures += 1
            hopeless = isinstance(error, _UnreachableError) and not came
            if hopeless or failures >= ATTEMPTS:
                tries = "" if hopeless else f" ({failures} tries in vain)"
                raise SourceError(f"{error}{tries}") from error
            logger.info("%s: %s; trying again", remote.source, error)
            transfer.pause(max(error.wait_seconds, _backoff(failures)))


def _backoff(failures: int) -> float:
    # Jitter, so that the threads of one fetch_all do not come back all at once.
    return BACKOFF_SECONDS * 2.0 ** (failures - 1) * random.uniform(0.75, 1.25)


def _try_once(remote: _Remote, partial: _Partial, transfer: "_Transfer") -> None:
    version, have = partial.version(), partial.size()
    resumed = have > 0
    if not resumed or have != version.total:
        with contextlib.ExitStack() as stack:
            body = _open(remote, transfer, have if version.etag else 0, version.etag, stack)
            version, resumed = body.version, body.start > 0
            _check_declared(remote, version)
            if not resumed:
                partial.begin(version)
            _check_room(partial, version)
            transfer.began(remote.source, version.total, body.start)
            partial.append(body.chunks, transfer)
    _check_received(remote, partial, version, resumed)


def _check_declared(remote: _Remote, version: _Version) -> None:
    total = version.total
    if remote.size is not None and total not in (None, remote.size):
        raise SourceError(f"expected {remote.size} bytes, and the server offers {total}")
    if total is None and remote.size is None and remote.sha256 is None:
        raise SourceError(
            "the server does not say how long the file is, so that a cut-off copy could not be "
            "told from a whole one; give size= or sha256="
        )


def _check_room(partial: _Partial, version: _Version) -> None:
    need = (version.total or 0) - partial.size()
    if need > shutil.disk_usage(partial.path.parent).free:
        raise OSError(errno.ENOSPC, f"{need} more bytes are needed")


def _check_received(remote: _Remote, partial: _Partial, version: _Version, resumed: bool) -> None:
    found = partial.size()
    total = remote.size if version.total is None else version.total
    if total is not None and found < total:
        raise _RetryError(f"the connection ended after {found} of {total} bytes")
    if total is not None and found > total:
        raise _RetryError(f"expected {total} bytes, received {found}", anew=True)
    if version.md5 is not None and (digest := _md5_of(partial.path)) != version.md5:
        raise _RetryError(f"the server says MD5 {version.md5}, received {digest}", anew=True)
    if remote.sha256 is not None and (digest := sha256_of(partial.path)) != remote.sha256:
        wrong = f"expected SHA-256 {remote.sha256}, received {digest}"
        if resumed:  # the bytes from an earlier try may be at fault
            raise _RetryError(wrong, anew=True)
        partial.discard()
        raise SourceError(wrong)


def _install(remote: _Remote, partial: _Partial) -> None:
    """Give the received file its name. The record comes first.

    A process killed between the two leaves a record without its file, which is fetched again; the
    other way round the new file would look like one put there by hand.
    """
    path = remote.path
    found = partial.path.stat()
    record = _Record(
        source=remote.source,
        path=PurePosixPath("files", *remote.parts).as_posix(),
        size=found.st_size,
        etag=partial.version().etag,
        sha256=sha256_of(partial.path),
        date=time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
    )
    _warn_if_other_version(remote, record)
    _make_folder(path.parent)
    write_json(remote.state / "record.json", asdict(record))
    os.replace(partial.path, path)
    _sync_folder(path.parent)
    partial.discard()
    _verified[str(path)] = (found.st_size, found.st_mtime_ns, found.st_ino)


def _warn_if_other_version(remote: _Remote, record: _Record) -> None:
    with contextlib.suppress(CheckpointError):
        before = _read_record(remote.state)
        if before is not None and before.sha256 != record.sha256:
            logger.warning(
                "%s is not the file that it was on %s: SHA-256 %s then, %s now",
                *(remote.source, before.date, before.sha256, record.sha256),
            )


class _Transfer:
    """What the downloads of one call share: connections, the progress bar, the wish to stop."""

    def __init__(self, *, progress: bool, threads: int = 1) -> None:
        self.stopped = threading.Event()
        self._progress, self._threads = progress, threads
        self._lock = threading.Lock()
        self._session: Any = None
        self._bar: Any = None
        self._got: dict[str, int] = {}

    def __enter__(self) -> "_Transfer":
        return self

    def __exit__(self, *_: object) -> None:
        if self._session is not None:
            self._session.close()
        if self._bar is not None:
            self._bar.close()

    def session(self) -> Any:
        """Made when first needed: a warm cache does not even import requests."""
        with self._lock:
            if self._session is None:
                self._session = _new_session(self._threads)
            return self._session

    def began(self, source: str, total: int | None, have: int) -> None:
        if not self._progress:
            return
        from tqdm import tqdm

        with self._lock:
            if self._bar is None:
                name = source.rpartition("/")[2] if self._threads == 1 else "downloading"
                # disable=None: silent where nobody looks
                self._bar = tqdm(desc=name, unit="B", unit_scale=True, disable=None, total=0)
            if source not in self._got:
                self._bar.total += total or 0
            self._bar.update(have - self._got.get(source, 0))  # back, where a try starts anew
            self._got[source] = have

    def received(self, source: str, count: int) -> None:
        if self.stopped.is_set():
            raise KeyboardInterrupt
        if self._bar is not None:
            with self._lock:
                self._got[source] += count
                self._bar.update(count)

    def pause(self, seconds: float) -> None:
        if self.stopped.wait(seconds):
            raise KeyboardInterrupt


# ---------------------------------------------------------------------------------- the routes


def _new_session(threads: int) -> Any:
    import requests
    from requests.adapters import HTTPAdapter

    session = requests.Session()
    session.max_redirects = 10
    for scheme in ("https://", "http://"):
        # Retries are ours: these would not know of Range.
        session.mount(scheme, HTTPAdapter(pool_maxsize=threads, max_retries=0))
    return session


def _open(
    remote: _Remote,
    transfer: _Transfer,
    start: int,
    etag: str | None,
    stack: contextlib.ExitStack,
) -> _Body:
    try:
        return _open_http(remote, transfer.session(), start, etag, stack)
    except _RefusedError as refused:
        if remote.azure is None or not _has_azure_credentials():
            raise
        try:
            return _open_blob(remote.azure, start, etag, stack)
        except SourceError as error:
            raise SourceError(f"{refused}; with your Azure credentials: {error}") from error


def _has_azure_credentials() -> bool:
    """Whether blobfile would find any: the places that it documents."""
    login = Path.home() / ".azure" / "msal_token_cache.json"
    return any(os.environ.get(name) for name in _AZURE_CREDENTIALS) or login.exists()


def _http_target(remote: _Remote) -> tuple[str, dict[str, str]]:
    """URL and headers; for the Hugging Face hub, with the user's own endpoint and token."""
    # identity: the lengths and checksums are those of the file, not of a compressed form of it
    headers = {"Accept-Encoding": "identity"}
    if not remote.url.startswith("hf:"):
        return remote.url, headers
    try:
        from huggingface_hub import constants, get_token, hf_hub_url
    except ImportError as error:
        raise MissingExtraError(
            f"{remote.source} needs huggingface_hub: pip install huggingface_hub"
        ) from error
    if constants.HF_HUB_OFFLINE:
        raise SourceError("HF_HUB_OFFLINE is set")
    owner, name, path = remote.url.removeprefix("hf://").split("/", 2)
    name, _, revision = name.partition("@")
    url = hf_hub_url(f"{owner}/{name}", path, revision=revision or None)
    # Not build_hf_headers: it asks the hub for a list first.
    token = None if constants.HF_HUB_DISABLE_IMPLICIT_TOKEN else get_token()
    return url, headers | ({"Authorization": f"Bearer {token}"} if token else {})


def _open_http(
    remote: _Remote, session: Any, start: int, etag: str | None, stack: contextlib.ExitStack
) -> _Body:
    url, headers = _http_target(remote)
    if start and etag:
        headers |= {"Range": f"bytes={start}-", "If-Range": etag}
    response = stack.enter_context(_request(session, "GET", url, headers))
    given = response.headers
    if given.get("Content-Encoding", "identity") != "identity":
        raise SourceError(f"{_shown(url)} came as {given['Content-Encoding']} though not asked for")
    found = _strong(given.get("ETag"))
    md5 = given.get("x-ms-blob-content-md5")
    chunks = _chunks(response, url)
    if response.status_code == 206:
        first, total = _content_range(given.get("Content-Range", ""))
        if first != start or found != etag:
            raise _RetryError("the server continued another file than the one begun", anew=True)
        return _Body(start, _Version(found, total, md5), chunks)
    length = given.get("Content-Length", "")
    total = int(length) if length.isdecimal() else None
    return _Body(0, _Version(found, total, md5 or given.get("Content-MD5")), chunks)


def _strong(etag: str | None) -> str | None:
    """Only a strong ETag promises the same bytes; a weak one must not be used with If-Range."""
    return None if etag is None or etag.startswith("W/") else etag


def _content_range(text: str) -> tuple[int | None, int | None]:
    """``bytes 5-9/10`` -> (5, 10)."""
    span, _, total = text.removeprefix("bytes ").partition("/")
    first = span.partition("-")[0]
    return (int(first) if first.isdecimal() else None), (int(total) if total.isdecimal() else None)


@contextlib.contextmanager
def _request(session: Any, method: str, url: str, headers: dict[str, str]) -> Iterator[Any]:
    """The answer to a request that the server accepted; every other outcome is an exception."""
    import requests

    try:
        response = session.request(
            method,
            url,
            headers=headers,
            stream=True,
            timeout=TIMEOUT_SECONDS,
            allow_redirects=True,
        )
    except requests.RequestException as error:
        raise _network_error(error, url) from error
    with contextlib.closing(response):
        _checked_host(urlsplit(response.url), _shown(response.url))  # where redirects have led
        _check_status(response, url)
        yield response


def _check_status(response: Any, url: str) -> None:
    status = response.status_code
    if status in (200, 206):
        return
    said = f"{_shown(url)} answered {status} {response.reason}".rstrip()
    if status in _RETRIED_STATUS:
        after = response.headers.get("Retry-After", "")
        seconds = float(after) if after.isdecimal() else 0.0
        raise _RetryError(said, wait_seconds=min(seconds, LONGEST_WAIT_SECONDS))
    if status == 416:
        raise _RetryError(f"{said}: the file is shorter now than the part received", anew=True)
    if status in _REFUSED_STATUS:
        raise _RefusedError(said, status)
    raise SourceError(said)


def _chunks(response: Any, url: str) -> Iterator[bytes]:
    import requests

    try:
        yield from response.iter_content(CHUNK_BYTES)
    except requests.RequestException as error:
        raise _network_error(error, url) from error


def _network_error(error: Exception, url: str) -> Exception:
    import requests
    import urllib3

    inner = error.args[0] if error.args else error
    cause = getattr(inner, "reason", None) or inner
    query = urlsplit(url).query
    text = f"{type(error).__name__}: {cause}"
    said = f"tried {_shown(url)}, {text.replace(query, '…') if query else text}"
    hopeless = (urllib3.exceptions.NewConnectionError, urllib3.exceptions.ConnectTimeoutError)
    if isinstance(cause, hopeless) or isinstance(error, requests.exceptions.ProxyError):
        return _UnreachableError(said)
    if isinstance(error, requests.exceptions.SSLError):
        return SourceError(said)
    again = (
        requests.ConnectionError,
        requests.Timeout,
        requests.exceptions.ChunkedEncodingError,
    )
    return _RetryError(said) if isinstance(error, again) else SourceError(said)


def _shown(url: str) -> str:
    """The URL without its query, which may hold a signature."""
    head, mark, _ = url.partition("?")
    return head + ("?…" if mark else "")


def _azure_context() -> Any:
    """blobfile with an end to its patience, and nothing left in the home folder."""
    import blobfile

    return blobfile.create_context(
        retry_limit=2, save_access_token_to_disk=False, log_callback=logger.info
    )


def _open_blob(
    blob: tuple[str, str], start: int, etag: str | None, stack: contextlib.ExitStack
) -> _Body:
    """A private blob, with the credentials that blobfile finds."""
    context = _azure_context()
    path = f"az://{blob[0]}/{blob[1]}"
    with _blobfile_errors():
        found = context.stat(path)
        start = start if found.version == etag else 0
        file = stack.enter_context(
            context.BlobFile(path, "rb", file_size=found.size, version=found.version)
        )
        file.seek(start)
    md5 = b64encode(bytes.fromhex(found.md5)).decode() if found.md5 else None
    return _Body(start, _Version(found.version, found.size, md5), _blob_chunks(file))


def _blob_chunks(file: Any) -> Iterator[bytes]:
    with _blobfile_errors():
        while chunk := file.read(CHUNK_BYTES):
            yield chunk


def _blob_exists(blob: tuple[str, str]) -> bool:
    with _blobfile_errors():
        try:
            _azure_context().stat(f"az://{blob[0]}/{blob[1]}")
        except FileNotFoundError:
            return False
    return True


@contextlib.contextmanager
def _blobfile_errors() -> Iterator[None]:
    import blobfile
    import urllib3

    try:
        yield
    except FileNotFoundError as error:
        raise SourceError(str(error)) from error
    except blobfile.VersionMismatch as error:
        raise _RetryError("the blob has changed", anew=True) from error
    except (blobfile.Error, urllib3.exceptions.HTTPError) as error:
        raise SourceError(str(getattr(error, "message", error))) from error


def exists(source: str | Path) -> bool:
    """Whether there is such a local file or folder, or such a remote file.

    A remote file in the cache is not asked for again. SourceError where no answer can be had.
    """
    if not is_remote(source):
        return Path(source).expanduser().exists()
    remote = _parse(str(source))
    if _why_unusable(remote) is None:
        return True
    with _Transfer(progress=False) as transfer:
        return _exists_remotely(remote, transfer)


def _exists_remotely(remote: _Remote, transfer: _Transfer) -> bool:
    failures = 0
    while True:
        try:
            with _request(transfer.session(), "HEAD", *_http_target(remote)):
                return True
        except _RefusedError as refused:
            if remote.azure is not None and _has_azure_credentials():
                return _blob_exists(remote.azure)
            if refused.status in (404, 410):
                return False
            raise SourceError(f"cannot see {remote.source}: {refused}") from refused
        except _RetryError as error:
            failures += 1
            if failures >= ATTEMPTS or isinstance(error, _UnreachableError):
                raise SourceError(f"cannot see {remote.source}: {error}") from error
            transfer.pause(max(error.wait_seconds, _backoff(failures)))


def join(folder: str | Path, *parts: str) -> str | Path:
    """``folder/part/…`` of a path or a URL. Parts may hold ``/`` but never lead out of the folder.

    Parts are plain names, not URL-encoded ones: they are encoded here where the URL needs it.
    """
    for part in parts:
        if PureWindowsPath(part).drive:
            raise SourceError(f"{part!r}: a path of its own, expected one within {folder}")
        _check_names(part.split("/"), f"{folder} + {part!r}")
    if not is_remote(folder):
        return Path(folder, *parts)
    url = str(folder)
    if url.startswith(("az://", "hf:")):
        return "/".join((url.rstrip("/"), *parts))
    found = urlsplit(url)
    path = "/".join((found.path.rstrip("/"), *map(quote, parts)))
    return urlunsplit(found._replace(path=path))


# ---------------------------------------------------------------------------------- writing


@contextlib.contextmanager
def atomic_write(path: str | Path) -> Iterator[Path]:
    """A temporary file that becomes ``path``, on disk to the last byte, if the block ends well.

    If it does not, ``path`` is what it was. A symbolic link is written through; a process that is
    killed may leave a hidden ``.name.….tmp`` beside the target, which can be deleted.
    """
    target = Path(os.path.realpath(path))
    if target.is_dir():
        raise SourceError(f"{target} is a folder where a file is expected")
    _make_folder(target.parent)
    temporary = _temporary_beside(target)
    # Not mkstemp: its 0600 would stay on the file. This takes the usual mode, or the old one.
    os.close(os.open(temporary, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o666))
    try:
        if target.exists():
            shutil.copymode(target, temporary)
        yield temporary
        _sync_file(temporary)
        os.replace(temporary, target)
    except OSError as error:
        _raise_if_full(error, target)
        raise
    finally:
        temporary.unlink(missing_ok=True)
    _sync_folder(target.parent)


@contextlib.contextmanager
def atomic_folder(path: str | Path, *, overwrite: bool = False) -> Iterator[Path]:
    """A temporary folder that becomes ``path``, whole and on disk, if the block ends well.

    ``path`` must be absent or empty, unless ``overwrite``: then an existing folder is replaced as
    one whole (nothing of it remains), but only if it is a saved thing, that is, holds a
    ``config.json`` or ``cfg.json``: a mistyped path must not cost someone's home folder. On Linux
    the two folders change places in one step; elsewhere there is a moment, between two renames,
    when the old folder is only to be found under its ``.name.….tmp`` name.
    """
    target = Path(os.path.realpath(path))
    _check_replaceable(target, overwrite)
    _make_folder(target.parent)
    temporary = _temporary_beside(target)
    temporary.mkdir()
    try:
        yield temporary
        _sync_tree(temporary)
        _check_replaceable(target, overwrite)  # again: the block may have taken hours
        _swap_in(temporary, target)
    except OSError as error:
        _raise_if_full(error, target)
        raise
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    _sync_folder(target.parent)


def _temporary_beside(target: Path) -> Path:
    return target.parent / f".{target.name[:100]}.{secrets.token_hex(6)}.tmp"


def _raise_if_full(error: OSError, target: Path) -> None:
    """A full disk is the user's to mend; any other OSError says itself what it is."""
    if error.errno in _DISK_FULL:
        reason = _disk_reason(error, target.parent)
        raise SourceError(f"cannot write {target}: {reason}") from error


def _check_replaceable(target: Path, overwrite: bool) -> None:
    if not target.exists():
        return
    if not target.is_dir():
        raise SourceError(f"{target} is a file where a folder is expected")
    names = os.listdir(target)
    if not names:
        return
    if not overwrite:
        raise InputError(f"{target} exists and is not empty; pass overwrite=True to replace it")
    if not set(names) & set(_SAVED_FOLDER_MARKS):
        raise InputError(
            f"{target} is not replaced: it holds none of {', '.join(_SAVED_FOLDER_MARKS)}, so it "
            "is no saved model or autoencoder. Choose another path, or empty the folder yourself."
        )


def _swap_in(temporary: Path, target: Path) -> None:
    if not target.exists():
        os.rename(temporary, target)
        return
    if _exchange(temporary, target):
        return  # the old folder is now the temporary one, and goes with it
    old = _temporary_beside(target)
    os.rename(target, old)
    try:
        os.rename(temporary, target)
    except BaseException:
        os.rename(old, target)
        raise
    shutil.rmtree(old, ignore_errors=True)


def _exchange(one: Path, other: Path) -> bool:
    """Let two folders change places in one step; False where the system cannot."""
    if sys.platform != "linux":
        return False
    renameat2 = getattr(ctypes.CDLL(None), "renameat2", None)
    if renameat2 is None:
        return False
    names = os.fsencode(one), os.fsencode(other)
    return bool(renameat2(_AT_FDCWD, names[0], _AT_FDCWD, names[1], _RENAME_EXCHANGE) == 0)


def _sync_file(path: Path) -> None:
    with open(path, "rb+") as file:
        os.fsync(file.fileno())


def _sync_folder(path: Path) -> None:
    """Make a rename last. Windows cannot, and some network file systems will not."""
    if os.name == "nt":
        return
    handle = os.open(path, os.O_RDONLY)
    try:
        with contextlib.suppress(OSError):
            os.fsync(handle)
    finally:
        os.close(handle)


def _sync_tree(folder: Path) -> None:
    for root, _, names in os.walk(folder):
        for name in names:
            _sync_file(Path(root, name))
        _sync_folder(Path(root))


def write_json(path: str | Path, obj: object) -> None:
    """Write ``obj`` as JSON that every reader accepts: UTF-8, no NaN, whole or not at all."""
    try:
        text = json.dumps(obj, indent=2, ensure_ascii=False, allow_nan=False)
    except (TypeError, ValueError) as error:
        raise CheckpointError(f"{path}: this cannot be written as JSON: {error}") from error
    with atomic_write(path) as temporary:
        temporary.write_text(text + "\n", "utf-8")


def read_json(path: str | Path) -> dict[str, Any]:
    """The object in a JSON file. A key that stands twice is refused: which one was meant?

    ``NaN`` and ``Infinity`` are read, though they are not JSON, because others write them.
    """
    file = _local_file(path, None, None)
    try:
        found = json.loads(file.read_bytes().decode("utf-8-sig"), object_pairs_hook=_unique)
    except json.JSONDecodeError as error:
        raise CheckpointError(
            f"{file}, line {error.lineno}, column {error.colno}: not valid JSON: {error.msg}"
        ) from None
    except UnicodeDecodeError as error:
        raise CheckpointError(f"{file}, byte {error.start}: not UTF-8 text") from None
    except (ValueError, RecursionError) as error:  # a key twice, or nested too deep
        raise CheckpointError(f"{file}: {error}") from None
    if not isinstance(found, dict):
        raise CheckpointError(f"{file}: expected a JSON object, found {type(found).__name__}")
    return found


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        keys = [key for key, _ in pairs]
        twice = sorted({key for key in keys if keys.count(key) > 1})
        raise ValueError(f"the key {', '.join(map(repr, twice))} stands twice in one object")
    return found


def sha256_of(path: str | Path) -> str:
    """The SHA-256 of a file, in hex."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _md5_of(path: Path) -> str:
    """As servers state it, in base64. Against accidents of transfer only."""
    with open(path, "rb") as file:
        digest = hashlib.file_digest(file, lambda: hashlib.md5(usedforsecurity=False))
    return b64encode(digest.digest()).decode()


# ---------------------------------------------------------------------------------- housekeeping


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
        record = _read_record(state)
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


def _entry_problem(root: Path, path: Path, record: _Record, rehash: bool) -> str | None:
    if not path.resolve().is_relative_to(root.resolve()):
        return f"{path} leads out of the cache"
    if not path.is_file():
        return "the file is missing, and will be downloaded again"
    if rehash:
        return _damage(path, record, rehash=True)
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
        return is_remote(pattern) and _parse(pattern).path == entry.path
    return False


def _remove(entry: CacheEntry) -> None:
    import filelock

    root = cache_dir()
    _verified.pop(str(entry.path), None)
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
    if entry.path.parent.parent == root / "state":
        yield entry.path.parent
        return
    for state in (root / "state").glob("*"):
        with contextlib.suppress(CheckpointError):
            record = _read_record(state)
            if record is not None and root / record.path == entry.path:
                yield state
