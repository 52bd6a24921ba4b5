"""One remote file into the cache, in as many tries as it takes."""

import contextlib
import errno
import logging
import os
import random
import shutil
import time
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import PurePosixPath

from neuron_explainer.errors import CheckpointError, SourceError
from neuron_explainer.files._folder import CACHE_VARIABLE, cache_dir
from neuron_explainer.files._json import read_json, write_json
from neuron_explainer.files._local import DISK_FULL, disk_reason, make_folder, md5_of, sha256_of
from neuron_explainer.files._names import Remote
from neuron_explainer.files._records import ABSENT, Record, read_record, verified
from neuron_explainer.files._routes import RetryError, UnreachableError, Version, open_remote
from neuron_explainer.files._transfer import Transfer
from neuron_explainer.files._writing import sync_folder

logger = logging.getLogger("neuron_explainer.files")

# A try that brings new bytes starts the count again: a slow, broken line still ends with the file.
ATTEMPTS = 5
BACKOFF_SECONDS = 0.5


class Partial:
    """An unfinished download: its bytes, and which version of the file they begin."""

    def __init__(self, remote: Remote) -> None:
        self.source = remote.source
        self.path = remote.state / "partial"
        self.info = remote.state / "partial.json"

    def size(self) -> int:
        return self.path.stat().st_size if self.path.exists() else 0

    def version(self) -> Version:
        """Of the bytes that are there; empty where unknown."""
        try:
            found = read_json(self.info)
            return Version(found["etag"], found["total"], found["md5"])
        except (SourceError, CheckpointError, KeyError):
            return Version()

    def begin(self, version: Version) -> None:
        """Start anew. The old bytes go first, so that they never lie beside the new ETag."""
        self.discard()
        write_json(self.info, {"source": self.source} | asdict(version))

    def discard(self) -> None:
        self.path.unlink(missing_ok=True)
        self.info.unlink(missing_ok=True)

    def append(self, chunks: Iterator[bytes], transfer: Transfer) -> None:
        flags = os.O_WRONLY | os.O_CREAT | os.O_APPEND | getattr(os, "O_BINARY", 0)
        with open(os.open(self.path, flags, 0o600), "wb") as file:
            for chunk in chunks:
                file.write(chunk)
                file.flush()
                transfer.received(self.source, len(chunk))
            os.fsync(file.fileno())


def download(remote: Remote, transfer: Transfer, why: str) -> None:
    """Bring the file into the cache. The caller holds its lock."""
    if why != ABSENT:
        logger.warning("%s; downloading %s again", why, remote.source)
    partial = Partial(remote)
    try:
        _receive(remote, partial, transfer)
        _install(remote, partial)
    except SourceError as error:
        damaged = "" if why == ABSENT else f" What the cache holds cannot be used: {why}."
        text = f"cannot get {remote.source}: {error}.{damaged} {_advice(remote)}"
        raise SourceError(text) from error
    except OSError as error:
        if error.errno in DISK_FULL:
            partial.discard()  # else the disk stays full
        where = cache_dir()
        text = f"cannot store {remote.source} in {where}: {disk_reason(error, where)}"
        raise SourceError(text) from error


def _advice(remote: Remote) -> str:
    return (
        f"Without a network: give a local path instead of this name, or put the file at "
        f"{remote.path}, or set {CACHE_VARIABLE} to a folder that holds it as "
        f"{PurePosixPath('files', *remote.parts)}."
    )


def _receive(remote: Remote, partial: Partial, transfer: Transfer) -> None:
    """Fill ``partial`` with the whole, checked file, in as many tries as it takes."""
    failures, most, came = 0, partial.size(), False
    while True:
        try:
            return _try_once(remote, partial, transfer)
        except RetryError as error:
            if partial.size() > most:
                failures, most, came = 0, partial.size(), True
            if error.anew:
                partial.discard()
            failures += 1
            hopeless = isinstance(error, UnreachableError) and not came
            if hopeless or failures >= ATTEMPTS:
                tries = "" if hopeless else f" ({failures} tries in vain)"
                raise SourceError(f"{error}{tries}") from error
            logger.info("%s: %s; trying again", remote.source, error)
            transfer.pause(max(error.wait_seconds, backoff(failures)))


def backoff(failures: int) -> float:
    # Jitter, so that the threads of one fetch_all do not come back all at once.
    return BACKOFF_SECONDS * 2.0 ** (failures - 1) * random.uniform(0.75, 1.25)


def _try_once(remote: Remote, partial: Partial, transfer: Transfer) -> None:
    version, have = partial.version(), partial.size()
    resumed = have > 0
    if not resumed or have != version.total:
        with contextlib.ExitStack() as stack:
            body = open_remote(
                remote, transfer.session(), have if version.etag else 0, version.etag, stack
            )
            version, resumed = body.version, body.start > 0
            _check_declared(remote, version)
            if not resumed:
                partial.begin(version)
            _check_room(partial, version)
            transfer.began(remote.source, version.total, body.start)
            partial.append(body.chunks, transfer)
    _check_received(remote, partial, version, resumed)


def _check_declared(remote: Remote, version: Version) -> None:
    total = version.total
    if remote.size is not None and total not in (None, remote.size):
        raise SourceError(f"expected {remote.size} bytes, and the server offers {total}")
    if total is None and remote.size is None and remote.sha256 is None:
        raise SourceError(
            "the server does not say how long the file is, so that a cut-off copy could not be "
            "told from a whole one; give size= or sha256="
        )


def _check_room(partial: Partial, version: Version) -> None:
    need = (version.total or 0) - partial.size()
    if need > shutil.disk_usage(partial.path.parent).free:
        raise OSError(errno.ENOSPC, f"{need} more bytes are needed")


def _check_received(remote: Remote, partial: Partial, version: Version, resumed: bool) -> None:
    found = partial.size()
    total = remote.size if version.total is None else version.total
    if total is not None and found < total:
        raise RetryError(f"the connection ended after {found} of {total} bytes")
    if total is not None and found > total:
        raise RetryError(f"expected {total} bytes, received {found}", anew=True)
    if version.md5 is not None and (digest := md5_of(partial.path)) != version.md5:
        raise RetryError(f"the server says MD5 {version.md5}, received {digest}", anew=True)
    if remote.sha256 is not None and (digest := sha256_of(partial.path)) != remote.sha256:
        wrong = f"expected SHA-256 {remote.sha256}, received {digest}"
        if resumed:  # the bytes from an earlier try may be at fault
            raise RetryError(wrong, anew=True)
        partial.discard()
        raise SourceError(wrong)


def _install(remote: Remote, partial: Partial) -> None:
    """Give the received file its name. The record comes first.

    A process killed between the two leaves a record without its file, which is fetched again; the
    other way round the new file would look like one put there by hand.
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
    os.replace(partial.path, path)
    sync_folder(path.parent)
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
