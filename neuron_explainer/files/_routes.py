"""How bytes come: plain HTTP, the Hugging Face hub, private Azure blobs.

One try each; who calls decides whether there is another. Every failure is a :class:`RetryError`,
which another try may mend, or a ``SourceError``, which it will not.
"""

import contextlib
import logging
import os
from base64 import b64encode
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from neuron_explainer.errors import MissingExtraError, SourceError
from neuron_explainer.files._names import Remote, checked_host, without_query

logger = logging.getLogger("neuron_explainer.files")

CHUNK_BYTES = 256 * 1024
TIMEOUT_SECONDS = (10, 60)  # to connect, between two reads
LONGEST_WAIT_SECONDS = 30.0
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
    """This try failed in a way that another may mend. Not an OSError: those are the disk's."""

    def __init__(self, reason: str, *, wait_seconds: float = 0.0, anew: bool = False) -> None:
        super().__init__(reason)
        self.wait_seconds = wait_seconds
        self.anew = anew  # what has been received is of no use


class UnreachableError(RetryError):
    """No connection came about at all: hopeless unless bytes have already come in this call."""


class _RefusedError(SourceError):
    """The server answered, and will answer the same again."""

    def __init__(self, reason: str, status: int) -> None:
        super().__init__(reason)
        self.status = status


@dataclass(frozen=True)
class Version:
    """What the server says of a file: what the parts of one download must agree in."""

    etag: str | None = None
    total: int | None = None
    md5: str | None = None  # in base64


@dataclass(frozen=True)
class _Body:
    """An answer that has begun: the bytes of a version of the file from ``start`` on."""

    start: int
    version: Version
    chunks: Iterator[bytes]


def new_session(threads: int) -> Any:
    """Connections for some threads to share."""
    import requests
    from requests.adapters import HTTPAdapter

    session = requests.Session()
    session.max_redirects = 10
    for scheme in ("https://", "http://"):
        # Retries are ours: these would not know of Range.
        session.mount(scheme, HTTPAdapter(pool_maxsize=threads, max_retries=0))
    return session


def open_remote(
    remote: Remote, session: Any, start: int, etag: str | None, stack: contextlib.ExitStack
) -> _Body:
    """The file from ``start`` on if its ETag still is ``etag``, else from its beginning.

    What is opened is closed with ``stack``.
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
    """Whether the server has the file; an exception where it does not tell."""
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
        # A server that knows no If-Range continues with what it has now: its ETag tells.
        first, total = _content_range(given.get("Content-Range", ""))
        if first != start or found != etag:
            raise RetryError("the server continued another file than the one begun", anew=True)
        return _Body(start, Version(found, total, md5), chunks)
    length = given.get("Content-Length", "")
    total = int(length) if length.isdecimal() else None
    return _Body(0, Version(found, total, md5 or given.get("Content-MD5")), chunks)


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
        # Where redirects have led must be as safe as where they began.
        checked_host(urlsplit(response.url), without_query(response.url))
        _check_status(response, url)
        yield response


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
    """Whether blobfile would find any: the places that it documents."""
    login = Path.home() / ".azure" / "msal_token_cache.json"
    return any(os.environ.get(name) for name in _AZURE_CREDENTIALS) or login.exists()


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
    return _Body(start, Version(found.version, found.size, md5), _blob_chunks(file))


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
        raise RetryError("the blob has changed", anew=True) from error
    except (blobfile.Error, urllib3.exceptions.HTTPError) as error:
        raise SourceError(str(getattr(error, "message", error))) from error
