"""The wire under :class:`~neuron_explainer.analysis.explaining.client.EndpointJudge`: one request at a time.

What may leave the machine is decided here: plain http to this machine only, and then past every proxy; the
key to the endpoint's own address alone, from an environment variable, and in nothing that is kept or said;
no password from ``.netrc``; redirects within the same address only, and without the key.
"""

import contextlib
import email.utils
import json
import math
import os
import time
from collections.abc import Mapping
from typing import Any
from urllib.parse import urljoin, urlunsplit

from neuron_explainer.analysis.explaining.replies import one_line
from neuron_explainer.analysis.explaining.spending import StoppedError
from neuron_explainer.errors import InputError, SourceError, did_you_mean, shown
from neuron_explainer.files.names import checked_host, is_loopback, split_url

KEY_VARIABLE = "NEURON_EXPLAINER_API_KEY"
"""Where the key is by default. Not ``OPENAI_API_KEY``: that one is not for any endpoint that is named."""
LARGEST_ANSWER = 32_000_000
"""Bytes of a response that are read; a longer one is refused."""
_RETRIED = frozenset({408, 409, 425, 429, 500, 502, 503, 504, 520, 522, 524, 529})
_NOT_UNDERSTOOD = frozenset({400, 404, 415, 422, 501})
_STATUS = range(400, 600)  # of errors
_MOST_REDIRECTS = 3
_TIMEOUT_RETRIES = 2  # a server that is too slow is so the next time too
_CONNECT_SECONDS = 10.0


class FailedError(Exception):
    """This request gets no answer now; the next one may."""


class RetryError(Exception):
    """This try failed, and the next one may not.

    Args:
        reason: why it failed.
        wait: seconds that the server asks to wait.
        most: how often it is worth trying again, at most.
    """

    def __init__(self, reason: str, *, wait: float = 0.0, most: int | None = None) -> None:
        super().__init__(reason)
        self.wait, self.most = wait, most


class UnreachableError(Exception):
    """There is no connection."""


class NotUnderstoodError(Exception):
    """The server does not accept the request as it is.

    Args:
        reason: for users.
        message: what the server said.
        status: of the response.
    """

    def __init__(self, reason: str, message: str, status: int) -> None:
        super().__init__(reason)
        self.message, self.status = message, status


def base_url(url: str) -> str:
    """The address under which ``/chat/completions`` is; a SourceError if it may not be asked."""
    found = split_url(url.strip())
    if found.scheme not in ("http", "https"):
        raise SourceError(f"{shown(url)}: expected an http:// or https:// URL of an endpoint.")
    host = checked_host(found, urlunsplit((found.scheme, found.netloc, found.path, "", "")))
    if found.query or found.fragment:
        raise SourceError(
            f"{found.scheme}://{host}{found.path}: an endpoint's URL has no query and no fragment; a key "
            f"belongs in the environment variable {KEY_VARIABLE}."
        )
    path = found.path.rstrip("/").removesuffix("/chat/completions") or "/v1"
    return urlunsplit((found.scheme, host, path, "", ""))


class HttpClient:
    """Posts JSON to an endpoint. Threads share one.

    Args:
        url: of the endpoint.
        key_variable: the environment variable that holds the key.
        timeout: seconds for a whole answer.
        connections: how many are kept open.
    """

    def __init__(self, url: str, key_variable: str, timeout: float, connections: int) -> None:
        from requests.adapters import HTTPAdapter

        self.base, self._timeout = base_url(url), timeout
        self._key_variable, self._key = key_variable, _key_in(key_variable)
        self._session = _session()
        for scheme in ("https://", "http://"):
            self._session.mount(scheme, HTTPAdapter(pool_maxsize=connections, max_retries=0))
        # An environment with a proxy would send even requests to this machine through it.
        self._session.trust_env = not is_loopback(split_url(self.base).hostname or "")

    def post(self, path: str, body: Any) -> dict[str, Any]:
        """The JSON object that answers a request; anything else is an exception."""
        return self._exchange("POST", path, json.dumps(body).encode())

    def check(self) -> None:
        """An UnreachableError if there is no connection to the endpoint; whatever it answers is fine."""
        with contextlib.suppress(FailedError, RetryError, NotUnderstoodError, SourceError):
            self._exchange("GET", "models", None)

    def models_hint(self, model: str) -> str:
        """A sentence that names the models that are served; empty if the server does not say."""
        try:
            rows = self._exchange("GET", "models", None).get("data")
        except (FailedError, RetryError, UnreachableError, NotUnderstoodError, SourceError):
            return ""
        some = rows if isinstance(rows, list) else []
        names = [row.get("id") for row in some if isinstance(row, dict)]
        known = [one_line(name) for name in names if isinstance(name, str)]
        if not known:
            return ""
        more = f" and {len(known) - 20} others" if len(known) > 20 else ""
        return f"{did_you_mean(model, known)} Served are {', '.join(known[:20])}{more}."

    def _exchange(self, method: str, path: str, body: bytes | None) -> dict[str, Any]:
        import requests
        import urllib3

        url, key = f"{self.base}/{path}", self._key
        deadline = time.monotonic() + self._timeout
        try:
            for _ in range(_MOST_REDIRECTS + 1):
                with self._session.request(
                    method,
                    url,
                    data=body,
                    headers={"Content-Type": "application/json"},
                    auth=_Bearer(key),
                    allow_redirects=False,
                    stream=True,
                    timeout=(min(_CONNECT_SECONDS, self._timeout), self._timeout),
                ) as response:
                    if not 300 <= response.status_code < 400:
                        return self._understood(response, _read(response, url, deadline), url)
                    url, key = self._redirected(response, url), ""
        except (requests.RequestException, urllib3.exceptions.HTTPError) as error:
            raise _explained(error, url) from None
        raise StoppedError(f"{self.base}/{path} redirects more than {_MOST_REDIRECTS} times.")

    def _redirected(self, response: Any, here: str) -> str:
        """Where a redirect leads, within the endpoint's own address."""
        try:
            there: str = urljoin(here, response.headers.get("Location", ""))
        except ValueError as error:
            raise StoppedError(f"{here} redirects to what is not a URL: {error}.") from None
        found, mine = split_url(there), split_url(self.base)
        place = urlunsplit((found.scheme, found.netloc.rpartition("@")[2], found.path, "", ""))
        same = (found.scheme, found.netloc.lower()) == (mine.scheme, mine.netloc.lower())
        if not same or response.status_code not in (307, 308):
            raise StoppedError(
                f"{here} redirects to {place}. Nothing was sent there: give that address itself if it is "
                "the endpoint."
            )
        return there

    def _understood(self, response: Any, content: bytes, url: str) -> dict[str, Any]:
        try:
            answer = self.scrubbed(json.loads(content))
        except (ValueError, RecursionError):
            answer = None
        status, error = response.status_code, _error_in(answer)
        if status == 200 and error is not None and type(error[1]) is int and error[1] in _STATUS:
            status = error[1]  # some servers that pass requests on say 200 to everything
        said = error[0] if error is not None else content[:300].decode("utf-8", "replace")
        said = one_line(self.scrubbed(said))[:300]
        if status == 200 and isinstance(answer, dict) and error is None:
            return answer
        reason = f"{url} answered {status}" + f": {said}" * bool(said)
        if status == 200:
            raise RetryError(f"{reason}. Expected a JSON object with a reply")
        if status in (401, 402, 403):
            raise StoppedError(f"{reason}. {self._about_key()}")
        if status in _RETRIED:
            raise RetryError(reason, wait=retry_after(response.headers))
        if status in _NOT_UNDERSTOOD:
            raise NotUnderstoodError(reason, said, status)
        if status in (413, 414, 451):
            raise FailedError(reason)
        raise StoppedError(f"{reason}. Is it the address of an OpenAI-compatible endpoint?")

    def _about_key(self) -> str:
        if self._key:
            return f"The key in {self._key_variable} was sent, unless the server redirects."
        return f"No key was sent: the environment variable {self._key_variable} is not set."

    def scrubbed(self, value: Any) -> Any:
        """A JSON value in whose texts the key, if it is there, is replaced by ``[key]``."""
        if not self._key:
            return value
        if isinstance(value, str):
            return value.replace(self._key, "[key]")
        if isinstance(value, dict):
            return {self.scrubbed(name): self.scrubbed(item) for name, item in value.items()}
        if isinstance(value, list | tuple):
            return [self.scrubbed(item) for item in value]
        return value


def _session() -> Any:
    """A session of requests that looks at no redirect. Even where it is told not to follow one, requests
    reads its whole body, however long, and takes its address apart."""
    import requests

    class Session(requests.Session):
        def get_redirect_target(self, resp: Any) -> None:
            return None

    return Session()


class _Bearer:
    """Sends the key, if there is one; given in any case, so that requests looks into no ``.netrc``."""

    def __init__(self, key: str) -> None:
        self._key = key

    def __call__(self, request: Any) -> Any:
        if self._key:
            request.headers["Authorization"] = f"Bearer {self._key}"
        return request


def _key_in(variable: str) -> str:
    key = os.environ.get(variable, "").strip()
    if not (key.isascii() and key.isprintable()) or " " in key:
        raise InputError(
            f"the environment variable {variable} does not hold a key: expected ASCII letters, digits and "
            "signs without spaces. (Its value is not shown.)"
        )
    return key


def _read(response: Any, url: str, deadline: float) -> bytes:
    found = bytearray()
    # Not iter_content, which waits for a whole chunk, however slowly its bytes come.
    while chunk := response.raw.read1(1 << 16, decode_content=True):
        found += chunk
        if len(found) > LARGEST_ANSWER:
            raise FailedError(f"{url} answered with more than {LARGEST_ANSWER:,} bytes")
        if time.monotonic() > deadline:
            raise RetryError(f"{url} did not end its answer in time", most=_TIMEOUT_RETRIES)
    return bytes(found)


def _error_in(answer: Any) -> tuple[str, Any] | None:
    """Message and code of the error in an answer; None if there is none."""
    if not isinstance(answer, dict):
        return None
    error = answer.get("error")
    if isinstance(error, dict):
        return str(error.get("message") or error), error.get("code")
    if error:
        return str(error), None
    found = next((answer[name] for name in ("message", "detail") if name in answer), None)
    return None if found is None or "choices" in answer else (str(found), None)


def retry_after(headers: Mapping[str, str]) -> float:
    """The seconds that a server asks to wait, which it may say as a date; 0 if it does not say."""
    text = headers.get("Retry-After", "").strip()
    try:
        seconds = float(text)
    except ValueError:
        try:
            seconds = email.utils.parsedate_to_datetime(text).timestamp() - time.time()
        except (ValueError, OverflowError):
            return 0.0
    return min(max(0.0, seconds), 1e9) if math.isfinite(seconds) else 0.0


def _explained(error: Exception, url: str) -> Exception:
    """The exception that says what became of a request without an answer."""
    import requests
    import urllib3

    inner = error.args[0] if error.args else error
    cause = getattr(inner, "reason", None) or inner
    refused = (urllib3.exceptions.NewConnectionError, urllib3.exceptions.ConnectTimeoutError)
    proxy = isinstance(error, requests.exceptions.ProxyError)
    if proxy or isinstance(cause, refused):
        return UnreachableError(
            f"there is no answer at {url}: {cause}. Is the server running, and is this its address?"
        )
    if isinstance(error, requests.exceptions.SSLError):
        return StoppedError(f"{url} cannot be trusted: {cause}")
    late = urllib3.exceptions.ReadTimeoutError
    if isinstance(error, requests.Timeout | late) or isinstance(cause, late):
        return RetryError(f"{url} did not answer in time", most=_TIMEOUT_RETRIES)
    # The latter while the body is read, which goes past requests.
    if isinstance(error, requests.ConnectionError | urllib3.exceptions.HTTPError):
        return RetryError(f"the connection to {url} broke: {cause}")
    return StoppedError(f"cannot ask {url}: {cause}")
