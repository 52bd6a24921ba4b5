"""From a name to a local file: plain HTTP, the Hugging Face hub, private Azure blobs.

The functions under "one try" try once; :func:`download` tries as often as necessary. A failure that may
not happen again is a :class:`RetryError`, any other a ``SourceError``.
"""

import contextlib
import errno
import logging
import os
import random
import shutil
import threading
from base64 import b64encode
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath
from typing import Any

from neuron_explainer.errors import SourceError, optional_module
from neuron_explainer.files.cache import ABSENT, Partial, Version, install, why_unusable
from neuron_explainer.files.names import (
    CACHE_VARIABLE,
    REMOTE_PREFIXES,
    Remote,
    cache_dir,
    checked_host,
    is_remote,
    parse,
    split_url,
    without_query,
)
from neuron_explainer.files.writing import (
    DISK_FULL,
    disk_reason,
    local_file,
    local_path,
    make_folder,
    md5_of,
    sha256_of,
)

logger = logging.getLogger("neuron_explainer.files")


@dataclass
class Options:
    """How long downloads try; change the fields of :data:`options`."""

    attempts: int = 5
    """A download is given up after this many tries in a row that bring no new bytes. A try that brings
    some starts the count again, so that a slow, broken line still delivers the file."""
    backoff_seconds: float = 0.5
    """Wait after the first such try; it doubles with each further one."""
    chunk_bytes: int = 256 * 1024
    """Number of bytes that are read from a connection at a time."""


options = Options()
"""The settings of all downloads in this process."""


# --- one try ---


TIMEOUT_SECONDS = (10, 60)  # to connect, between two reads
LONGEST_WAIT_SECONDS = 30.0
MOST_REDIRECTS = 10
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


class RetryError(Exception):
    """This try failed, and the next one may not. (Not an OSError: those are errors of the disk.)"""

    def __init__(self, reason: str, *, wait_seconds: float = 0.0, anew: bool = False) -> None:
        super().__init__(reason)
        self.wait_seconds = wait_seconds
        self.anew = anew  # start again: the received bytes cannot be used


class UnreachableError(RetryError):
    """There was no connection at all: no use to try again, unless this call has received bytes."""


class _RefusedError(SourceError):
    """The server refused, and would refuse again."""

    def __init__(self, reason: str, status: int) -> None:
        super().__init__(reason)
        self.status = status


@dataclass(frozen=True)
class _Body:
    """An answer whose bytes can be read: those of one version of the file, from ``start`` on."""

    start: int
    version: Version
    chunks: Iterator[bytes]


def new_session(threads: int) -> Any:
    """Connections that some threads share."""
    import requests
    from requests.adapters import HTTPAdapter

    session = requests.Session()
    for scheme in ("https://", "http://"):
        # We retry ourselves: requests would start from the first byte.
        session.mount(scheme, HTTPAdapter(pool_maxsize=threads, max_retries=0))
    return session


def open_remote(
    remote: Remote, session: Any, start: int, etag: str | None, stack: contextlib.ExitStack
) -> _Body:
    """The file from ``start`` on if its ETag is still ``etag``, else the whole file.

    Everything that is opened is closed with ``stack``.
    """
    try:
        return _open_http(remote, session, start, etag, stack)
    except _RefusedError as refused:
        if remote.azure is None or not _has_azure_credentials():
            raise
        try:
            return _open_blob(remote.azure, start, etag, stack)
        except SourceError as error:
            raise SourceError(f"{refused}; with your Azure credentials: {error}") from error


def exists_at(remote: Remote, session: Any) -> bool:
    """Whether the server has the file; an exception if it does not say."""
    try:
        with _request(session, "HEAD", *_http_target(remote)):
            return True
    except _RefusedError as refused:
        if remote.azure is not None and _has_azure_credentials():
            return _blob_exists(remote.azure)
        if refused.status in (404, 410):
            return False
        raise


def _http_target(remote: Remote) -> tuple[str, dict[str, str]]:
    """URL and headers of a file; for the Hugging Face hub, with the user's endpoint and token."""
    # identity: lengths and checksums must be those of the file, not of a compressed form
    headers = {"Accept-Encoding": "identity"}
    if not remote.url.startswith("hf:"):
        return remote.url, headers
    optional_module("huggingface_hub", remote.source)
    from huggingface_hub import constants, get_token, hf_hub_url

    if constants.HF_HUB_OFFLINE:
        raise SourceError("HF_HUB_OFFLINE is set")
    owner, name, path = remote.url.removeprefix("hf://").split("/", 2)
    name, _, revision = name.partition("@")
    url = hf_hub_url(f"{owner}/{name}", path, revision=revision or None)
    # Not build_hf_headers: it asks the hub for a list first.
    token = None if constants.HF_HUB_DISABLE_IMPLICIT_TOKEN else get_token()
    return url, headers | ({"Authorization": f"Bearer {token}"} if token else {})


def _open_http(
    remote: Remote, session: Any, start: int, etag: str | None, stack: contextlib.ExitStack
) -> _Body:
    url, headers = _http_target(remote)
    if start and etag:
        headers |= {"Range": f"bytes={start}-", "If-Range": etag}
    response = stack.enter_context(_request(session, "GET", url, headers))
    given = response.headers
    if given.get("Content-Encoding", "identity") != "identity":
        how = given["Content-Encoding"]
        raise SourceError(f"{without_query(url)} came as {how} though not asked for")
    found = _strong(given.get("ETag"))
    md5 = given.get("x-ms-blob-content-md5")
    chunks = _chunks(response, url)
    if response.status_code == 206:
        # A server without If-Range continues whatever version it has now; the ETag shows which.
        first, total = _content_range(given.get("Content-Range", ""))
        if first != start or found != etag:
            raise RetryError("the server continued another file than the one begun", anew=True)
        return _Body(start, Version(found, total, md5), chunks)
    length = given.get("Content-Length", "")
    total = int(length) if length.isdecimal() else None
    return _Body(0, Version(found, total, md5 or given.get("Content-MD5")), chunks)


def _strong(etag: str | None) -> str | None:
    """The ETag if it is a strong one: a weak one does not promise the same bytes, nor fits If-Range."""
    return None if etag is None or etag.startswith("W/") else etag


def _content_range(text: str) -> tuple[int | None, int | None]:
    """``bytes 5-9/10`` -> (5, 10)."""
    span, _, total = text.removeprefix("bytes ").partition("/")
    first = span.partition("-")[0]
    return (int(first) if first.isdecimal() else None), (int(total) if total.isdecimal() else None)


@contextlib.contextmanager
def _request(session: Any, method: str, url: str, headers: dict[str, str]) -> Iterator[Any]:
    """The answer to a request, if the server accepts it; every other outcome is an exception."""
    import requests

    with contextlib.ExitStack() as stack:
        options = {"stream": True, "timeout": TIMEOUT_SECONDS, "allow_redirects": False}
        try:
            response = session.request(method, url, headers=headers, **options)
            stack.callback(response.close)
            for _ in range(MOST_REDIRECTS):
                if (hop := response.next) is None:
                    break
                _check_hop(response.url, hop.url)
                settings = session.merge_environment_settings(hop.url, {}, True, None, None)
                response = session.send(hop, **settings | options)
                stack.callback(response.close)
        except (
            requests.RequestException,
            ValueError,
        ) as error:  # ValueError: a Location that is no URL
            raise _network_error(error, url) from error
        if response.next is not None:
            raise SourceError(f"{without_query(url)} redirects more than {MOST_REDIRECTS} times")
        _check_status(response, url)
        yield response


def _check_hop(here: str, there: str) -> None:
    """Refuse a redirect before it is followed.

    Each hop must be as safe as a URL that the user gives: a plain http server in the middle could send
    the next request anywhere.
    """
    found = split_url(there)
    checked_host(found, without_query(there))
    if found.scheme != "https" and not here.startswith("http://"):
        raise SourceError(
            f"{without_query(here)} redirects to {without_query(there)}: from https to plain "
            f"{found.scheme}, which can be changed on its way"
        )


def _check_status(response: Any, url: str) -> None:
    status = response.status_code
    if status in (200, 206):
        return
    said = f"{without_query(url)} answered {status} {response.reason}".rstrip()
    if status in _RETRIED_STATUS:
        after = response.headers.get("Retry-After", "")
        seconds = float(after) if after.isdecimal() else 0.0
        raise RetryError(said, wait_seconds=min(seconds, LONGEST_WAIT_SECONDS))
    if status == 416:
        raise RetryError(f"{said}: the file is shorter now than the part received", anew=True)
    if status in _REFUSED_STATUS:
        raise _RefusedError(said, status)
    raise SourceError(said)


def _chunks(response: Any, url: str) -> Iterator[bytes]:
    import requests

    try:
        yield from response.iter_content(options.chunk_bytes)
    except requests.RequestException as error:
        raise _network_error(error, url) from error


def _network_error(error: Exception, url: str) -> Exception:
    import requests
    import urllib3

    inner = error.args[0] if error.args else error
    cause = getattr(inner, "reason", None) or inner
    query = split_url(url).query
    text = f"{type(error).__name__}: {cause}"
    said = f"tried {without_query(url)}, {text.replace(query, '…') if query else text}"
    hopeless = (urllib3.exceptions.NewConnectionError, urllib3.exceptions.ConnectTimeoutError)
    if isinstance(cause, hopeless) or isinstance(error, requests.exceptions.ProxyError):
        return UnreachableError(said)
    if isinstance(error, requests.exceptions.SSLError):
        return SourceError(said)
    broken = requests.exceptions.ChunkedEncodingError
    again = (requests.ConnectionError, requests.Timeout, broken)
    return RetryError(said) if isinstance(error, again) else SourceError(said)


def _has_azure_credentials() -> bool:
    """Whether there are credentials in the places where blobfile looks for them."""
    login = Path.home() / ".azure" / "msal_token_cache.json"
    return any(os.environ.get(name) for name in _AZURE_CREDENTIALS) or login.exists()


def _azure_context() -> Any:
    """A context of blobfile that gives up after two tries and writes nothing to the home folder."""
    import blobfile

    return blobfile.create_context(
        retry_limit=2, save_access_token_to_disk=False, log_callback=logger.info
    )


def _open_blob(
    blob: tuple[str, str], start: int, etag: str | None, stack: contextlib.ExitStack
) -> _Body:
    """A private blob, opened with the credentials that blobfile finds."""
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
    return _Body(start, Version(found.version, found.size, md5), _blob_chunks(file))


def _blob_chunks(file: Any) -> Iterator[bytes]:
    with _blobfile_errors():
        while chunk := file.read(options.chunk_bytes):
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
        raise RetryError("the blob has changed", anew=True) from error
    except (blobfile.Error, urllib3.exceptions.HTTPError) as error:
        raise SourceError(str(getattr(error, "message", error))) from error


# --- what the downloads of one call share ---


class Transfer:
    """The connections, the progress bar and the stop signal of one call."""

    def __init__(self, *, progress: bool, threads: int = 1) -> None:
        self.stopped = threading.Event()
        self._progress, self._threads = progress, threads
        self._lock = threading.Lock()
        self._session: Any = None
        self._bar: Any = None
        self._got: dict[str, int] = {}  # bytes of each source that the bar has counted

    def __enter__(self) -> "Transfer":
        return self

    def __exit__(self, *_: object) -> None:
        if self._session is not None:
            self._session.close()
        if self._bar is not None:
            self._bar.close()

    def session(self) -> Any:
        """The connections, made when they are first needed: a full cache does not even import requests."""
        with self._lock:
            if self._session is None:
                self._session = new_session(self._threads)
            return self._session

    def began(self, source: str, total: int | None, have: int) -> None:
        """Show that a try has begun, for a file of ``total`` bytes of which ``have`` are present."""
        if not self._progress:
            return
        from tqdm import tqdm

        with self._lock:
            if self._bar is None:
                name = source.rpartition("/")[2] if self._threads == 1 else "downloading"
                # disable=None: no bar if stderr is not a terminal
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
        """Sleep; KeyboardInterrupt if the call is stopped meanwhile."""
        if self.stopped.wait(seconds):
            raise KeyboardInterrupt


# --- as many tries as necessary ---


def download(remote: Remote, transfer: Transfer, why: str) -> None:
    """Download a file into the cache. The caller holds the lock of the file."""
    if why != ABSENT:
        logger.warning("%s; downloading %s again", why, remote.source)
    partial = Partial(remote)
    try:
        _receive(remote, partial, transfer)
        install(remote, partial)
    except SourceError as error:
        damaged = "" if why == ABSENT else f" What the cache holds cannot be used: {why}."
        text = f"cannot get {remote.source}: {error}.{damaged} {_advice(remote)}"
        raise SourceError(text) from None  # the text has the cause; six tracebacks would hide it
    except OSError as error:
        if error.errno in DISK_FULL:
            partial.discard()  # else the disk stays full
        where = cache_dir()
        text = f"cannot store {remote.source} in {where}: {disk_reason(error, where)}"
        raise SourceError(text) from None


def _advice(remote: Remote) -> str:
    return (
        f"Without a network: give a local path instead of this name, or put the file at "
        f"{remote.path}, or set {CACHE_VARIABLE} to a folder that holds it as "
        f"{PurePosixPath('files', *remote.parts)}."
    )


def _receive(remote: Remote, partial: Partial, transfer: Transfer) -> None:
    """Fill ``partial`` with the whole file and check it, in as many tries as necessary."""
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
            if hopeless or failures >= options.attempts:
                tries = "" if hopeless else f" ({failures} tries in vain)"
                raise SourceError(f"{error}{tries}") from error
            logger.info("%s: %s; trying again", remote.source, error)
            transfer.pause(max(error.wait_seconds, backoff(failures)))


def backoff(failures: int) -> float:
    # Random, so that the threads of one fetch_all do not all come back at once.
    return options.backoff_seconds * 2.0 ** (failures - 1) * random.uniform(0.75, 1.25)


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
            partial.append(body.chunks, lambda n: transfer.received(remote.source, n))
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


# --- any number of files ---


def fetch(
    source: str | Path,
    *,
    size: int | None = None,
    sha256: str | None = None,
    progress: bool = True,
) -> Path:
    """The local file of ``source``: the path itself if it is local, a checked copy if it is remote.

    If ``size`` (in bytes) or ``sha256`` (in hex) are given, the file must have them.
    """
    if not is_remote(source):
        return _local(source, size, sha256)
    with Transfer(progress=progress) as transfer:
        return _fetch(str(source), transfer, size, sha256)


def _local(source: str | Path, size: int | None, sha256: str | None) -> Path:
    scheme, mark, _ = str(source).partition("://")
    if mark and not exists(source):
        known = ", ".join(REMOTE_PREFIXES)
        raise SourceError(f"{source}: {scheme}:// is not among the known prefixes {known}")
    return local_file(source, size, sha256)


def fetch_all(sources: Sequence[str], *, threads: int = 8, progress: bool = True) -> list[Path]:
    """:func:`fetch` of many at once, in their order, with one bar and one error for all."""
    with Transfer(progress=progress, threads=threads) as transfer:
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


def _run_all(sources: Sequence[str], transfer: Transfer, threads: int) -> list[Future[Path]]:
    with ThreadPoolExecutor(max(1, threads), thread_name_prefix="fetch") as pool:
        futures = [pool.submit(_fetch, source, transfer, None, None) for source in sources]
        try:
            wait(futures)
        except BaseException:  # Ctrl-C: let the threads stop at their next chunk, not at the end
            transfer.stopped.set()
            pool.shutdown(wait=False, cancel_futures=True)
            raise
    return futures


def _fetch(source: str, transfer: Transfer, size: int | None, sha256: str | None) -> Path:
    """One file of a call, in any thread."""
    if not is_remote(source):
        return _local(source, size, sha256)
    remote = replace(parse(source), size=size, sha256=sha256 and sha256.lower())
    if why_unusable(remote) is None:
        return remote.path
    import filelock

    make_folder(remote.state)
    with filelock.FileLock(remote.state / "lock"):
        why = why_unusable(remote)  # again: another process may have been here
        if why is not None:
            download(remote, transfer, why)
    return remote.path


def exists(source: str | Path) -> bool:
    """Whether a local file or folder, or a remote file, exists.

    A file in the cache exists without asking the server. SourceError if there is no answer.
    """
    if not is_remote(source):
        try:
            return local_path(source).exists()
        except OSError as error:
            raise SourceError(f"cannot see {source}: {error.strerror}") from error
    remote = parse(str(source))
    if why_unusable(remote) is None:
        return True
    with Transfer(progress=False) as transfer:
        return _exists_remotely(remote, transfer)


def _exists_remotely(remote: Remote, transfer: Transfer) -> bool:
    failures = 0
    while True:
        try:
            return exists_at(remote, transfer.session())
        except SourceError as error:
            raise SourceError(f"cannot see {remote.source}: {error}") from None
        except RetryError as error:
            failures += 1
            if failures >= options.attempts or isinstance(error, UnreachableError):
                raise SourceError(f"cannot see {remote.source}: {error}") from None
            transfer.pause(max(error.wait_seconds, backoff(failures)))
