"""Who may ask for what. Everything needs the token, except what is listed as public.

:class:`Guard` stands before all routes. It refuses foreign hosts (421, against DNS rebinding), requests
without the token (401) and requests of other web pages (403), and adds the headers that keep a browser
from running or showing what it should not. A route says with a mark whether it reads, writes or computes;
:func:`admitted` refuses routes without one.
"""

import asyncio
import hashlib
import hmac
import ipaddress
import logging
import secrets
import time
from collections.abc import Iterable, Mapping, MutableMapping
from dataclasses import dataclass
from typing import Any, Literal
from urllib.parse import parse_qsl, urlencode, urlsplit

from fastapi import Request
from starlette.datastructures import Headers, MutableHeaders
from starlette.exceptions import HTTPException
from starlette.requests import cookie_parser
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from neuron_explainer.errors import InputError, shown
from neuron_explainer.server.limits import RateLimit
from neuron_explainer.server.problems import Problem, problem_reply

log = logging.getLogger("neuron_explainer.server.access")

Access = Literal["public", "read", "write", "compute"]
LOOPBACK_HOSTS = frozenset({"localhost", "127.0.0.1", "::1"})
SAFE_METHODS = frozenset({"GET", "HEAD", "OPTIONS"})
JSON_TYPES = frozenset({"application/json", "application/x-ndjson", "application/jsonl"})
_LONGEST_URL = 16 << 10
_LONGEST_COOKIE = 16 << 10
_BYTES_OF_A_TOKEN = 32
_SHORTEST_TOKEN = 16


def marked(access: Access) -> dict[str, Any]:
    """The mark of a route: ``@router.get("/model", **marked("read"))``. The OpenAPI shows it too."""
    return {"openapi_extra": {"x-access": access}}


READ, WRITE, COMPUTE, PUBLIC = (
    marked("read"),
    marked("write"),
    marked("compute"),
    marked("public"),
)


def is_loopback(host: str) -> bool:
    """Whether a name or address means this machine only."""
    if host in LOOPBACK_HOSTS:
        return True
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return False


@dataclass(frozen=True)
class Policy:
    """What the guard asks for."""

    token: str
    hosts: frozenset[str] = LOOPBACK_HOSTS
    """Names in the Host header that are answered, in lower case and without port."""
    any_address: bool = False
    """Whether every Host that is an IP address is answered: rebinding needs a name."""
    origins: frozenset[str] = frozenset()
    """Origins of other web pages that may use the API, such as ``"https://lab.example"``."""
    base_path: str = ""
    """The path under which a proxy shows this application."""
    frame_ancestors: str = "'self'"
    """Pages that may show this one in a frame, for the Content-Security-Policy."""

    @property
    def cookie_value(self) -> str:
        """What the cookie holds: derived from the token, which it does not disclose."""
        return hmac.new(self.token.encode(), b"neuron_explainer cookie", hashlib.sha256).hexdigest()

    @property
    def content_security_policy(self) -> str:
        """No script, style or connection but our own; nothing inline."""
        return (
            "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data: blob:; "
            "connect-src 'self'; base-uri 'none'; form-action 'none'; "
            f"frame-ancestors {self.frame_ancestors}"
        )


def make_policy(
    token: str | None = None,
    *,
    hosts: Iterable[str] = (),
    any_address: bool = False,
    origins: Iterable[str] = (),
    base_path: str = "",
    frame_ancestors: str = "'self'",
) -> Policy:
    """A policy from a user's settings.

    Args:
        token: what clients must know; None: a random one of 256 bits.
        hosts: names, beside those of this machine, under which the server is reached.
        any_address: answer under every IP address too.
        origins: other web pages that may use the API.
        base_path: the path under which a proxy shows this application.
        frame_ancestors: who may show the pages in a frame.
    """
    if token is None:
        token = secrets.token_urlsafe(_BYTES_OF_A_TOKEN)
    if len(token) < _SHORTEST_TOKEN or not token.isascii() or not token.isprintable():
        raise InputError(
            f"a token must have at least {_SHORTEST_TOKEN} characters, all of them printable ASCII; "
            f"found {len(token)} characters."
        )
    for origin in origins:
        parts = urlsplit(origin)
        if origin != f"{parts.scheme}://{parts.netloc}" or not parts.netloc or "*" in origin:
            raise InputError(
                f"expected an exact origin such as 'https://lab.example:8080', found {shown(origin)}."
            )
    if any(letter in frame_ancestors for letter in ";,\r\n"):
        raise InputError(
            f"expected a list of sources for frame-ancestors, found {shown(frame_ancestors)}."
        )
    path = base_path.strip("/")
    return Policy(
        token,
        LOOPBACK_HOSTS | {host.lower().strip("[]") for host in hosts},
        any_address,
        frozenset(origins),
        f"/{path}" if path else "",
        frame_ancestors,
    )


# --- marks ---


async def admitted(request: Request) -> None:
    """Refuse routes without a mark, writing where that is switched off, and clients that ask too fast.

    A dependency of the whole application; it runs when the route is known.
    """
    route: Any = request.scope.get("route")
    access = (getattr(route, "openapi_extra", None) or {}).get("x-access")
    served = request.app.state.serving
    served.compute.start()  # an application that is mounted in another is not told when it begins
    if access not in ("public", "read", "write", "compute"):
        raise Problem(403, "unmarked_route", "This route does not say whether it reads or writes.")
    if access == "write" and served.read_only:
        raise Problem(403, "read_only", "This server was started with --read-only.")
    if access == "compute" and (wait := served.rate.wait_of(request)):
        raise Problem(
            429,
            "too_many_requests",
            f"At most {served.limits.compute_per_second:g} requests to the model a second.",
            retry_after=wait,
        )


class ClientRate(RateLimit):
    """The rate of each client that is not on this machine."""

    def wait_of(self, request: Request) -> float:
        """Seconds that this client must wait; 0 for clients on this machine."""
        host = request.client.host if request.client else ""
        return 0.0 if is_loopback(host) else self.wait(host)


# --- the guard ---


class Guard:
    """Stands before an application, see the head of this module.

    Args:
        app: the application.
        policy: what is asked for.
        public: paths below the base path that need no token.
        sizes: bytes that a body may have, by path.
        seconds: in which a body must have arrived.
    """

    def __init__(
        self,
        app: ASGIApp,
        policy: Policy,
        public: frozenset[str],
        sizes: Mapping[str, int],
        seconds: float,
    ) -> None:
        self.app, self.policy, self.public = app, policy, public
        self.sizes, self.seconds = sizes, seconds

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Refuse a request, or pass it on."""
        if scope["type"] == "lifespan":
            await self.app(scope, receive, send)
            return
        if scope["type"] != "http":
            await send({"type": "websocket.close", "code": 1008})
            return
        if not scope.get("root_path"):
            scope["root_path"] = self.policy.base_path
        request_id = secrets.token_hex(8)
        scope.setdefault("state", {})["request_id"] = request_id
        answer = _Answer(scope, send, self.policy, request_id)
        try:
            reply = self._login(scope) or self._preflight(scope)
            if reply is None:
                self._check(scope)
        except Problem as problem:
            reply = problem_reply(problem, request_id)
        try:
            if reply is not None:
                await reply(scope, receive, answer.send)
            else:
                await self.app(scope, self._limited(scope, receive), answer.send)
        except asyncio.CancelledError:
            if answer.status:
                raise
            # The server ends, and has waited for this request as long as it would.
            text = "The server was shut down before this answer was ready."
            late = Problem(503, "shutting_down", text, retry_after=5)
            await problem_reply(late, request_id)(scope, receive, answer.send)
        finally:
            answer.note()

    def _check(self, scope: Scope) -> None:
        """A Problem unless the request may go on."""
        headers, path = Headers(scope=scope), path_below(scope)
        self._check_size(scope, headers)
        self._check_host(headers)
        public = path in self.public
        if not (public or self._is_known(scope, headers)):
            raise Problem(
                401,
                "no_token",
                "This server needs its token: open the address that it printed when it was started, or "
                "send the header Authorization: Bearer TOKEN.",
                headers={"WWW-Authenticate": "Bearer"},
            )
        if not public or scope["method"] not in SAFE_METHODS:
            self._check_site(scope["method"], headers)
        self._check_type(scope["method"], headers)

    def _check_size(self, scope: Scope, headers: Headers) -> None:
        if len(scope.get("raw_path") or b"") + len(scope["query_string"]) > _LONGEST_URL:
            raise Problem(414, "url_too_long", f"Expected at most {_LONGEST_URL} bytes of URL.")
        length, most = headers.get("content-length", "0"), self.sizes[path_below(scope)]
        if not length.isdecimal() or int(length[:20]) > most:
            raise Problem(413, "body_too_large", f"Expected a body of at most {most} bytes.")
        if "content-encoding" in headers:  # what was compressed may grow without limit
            raise Problem(415, "compressed_body", "Send the body without Content-Encoding.")

    def _limited(self, scope: Scope, receive: Receive) -> Receive:
        """``receive`` that stops at a body that is too long, or takes too long."""
        most, end, size = self.sizes[path_below(scope)], time.monotonic() + self.seconds, 0
        whole = False

        async def limited() -> Message:
            nonlocal size, whole
            if whole:  # what follows is the news that the client has gone, whenever that is
                return await receive()
            try:
                message = await asyncio.wait_for(receive(), max(0.0, end - time.monotonic()))
            except TimeoutError:
                raise HTTPException(408, "The body did not arrive in time.") from None
            whole = not message.get("more_body", False)
            size += len(message.get("body", b""))
            if size > most:
                raise HTTPException(413, f"Expected a body of at most {most} bytes.")
            return message

        return limited

    def _check_host(self, headers: Headers) -> None:
        given = headers.getlist("host")
        name = _host_name(given[0]) if len(given) == 1 else ""
        if name in self.policy.hosts or (self.policy.any_address and _is_address(name)):
            return
        raise Problem(
            421,
            "unknown_host",
            f"This server does not answer under the name {shown(name)}; start it with --allow-host "
            "NAME if it should.",
        )

    def _is_known(self, scope: Scope, headers: Headers) -> bool:
        scheme, _, given = headers.get("authorization", "").partition(" ")
        if scheme.lower() == "bearer" and _same(given.strip(), self.policy.token):
            return True
        return _same(_cookie(headers, cookie_name(scope)), self.policy.cookie_value)

    def _check_site(self, method: str, headers: Headers) -> None:
        """Refuse what another web page asks for in the name of this user."""
        origin, site = headers.get("origin"), headers.get("sec-fetch-site")
        if origin is not None and origin in self.policy.origins:
            return
        own = origin is None or _netloc(origin) == headers.get("host", "").lower()
        if site is not None and site not in ("same-origin", "none"):
            # A link from elsewhere may open a page, and nothing more.
            own = method == "GET" and headers.get("sec-fetch-mode") == "navigate"
        if not own:
            raise Problem(
                403,
                "other_origin",
                f"A page of another origin ({shown(origin)}) asked for this; start the server with "
                "--allow-origin ORIGIN if it may.",
            )

    def _check_type(self, method: str, headers: Headers) -> None:
        if method in SAFE_METHODS:
            return
        kind = headers.get("content-type", "").partition(";")[0].strip().lower()
        empty = headers.get("content-length", "0") == "0" and "transfer-encoding" not in headers
        if kind not in JSON_TYPES and not (empty and not kind):
            raise Problem(
                415,
                "not_json",
                f"Expected a body of type application/json, found {shown(kind)}.",
                allowed=sorted(JSON_TYPES),
            )

    # --- other origins that are allowed ---

    def _preflight(self, scope: Scope) -> Response | None:
        """The answer to a browser that asks whether a page of an allowed origin may send a request."""
        headers = Headers(scope=scope)
        asked = "access-control-request-method" in headers
        if scope["method"] != "OPTIONS" or not asked:
            return None
        self._check_host(headers)
        if headers.get("origin") not in self.policy.origins:
            raise Problem(403, "other_origin", "Pages of this origin may not use this server.")
        allowed = {
            "Access-Control-Allow-Methods": "GET, POST, PUT, DELETE",
            "Access-Control-Allow-Headers": "authorization, content-type, if-match, if-none-match",
            "Access-Control-Max-Age": "600",
        }
        return Response(status_code=204, headers=allowed)

    # --- from token to cookie ---

    def _login(self, scope: Scope) -> Response | None:
        """``/?token=…``: the cookie, and the same page without the token in its address."""
        if (
            scope["method"] != "GET"
            or path_below(scope) != "/"
            or b"token=" not in scope["query_string"]
        ):
            return None
        pairs = parse_qsl(scope["query_string"].decode("latin-1"), keep_blank_values=True)
        given = dict(pairs).get("token")
        if given is None:
            return None
        self._check_size(scope, Headers(scope=scope))
        self._check_host(Headers(scope=scope))
        if not _same(given, self.policy.token):
            raise Problem(
                401, "wrong_token", "The token in this address is not that of this server."
            )
        rest = urlencode([pair for pair in pairs if pair[0] != "token"])
        reply = Response(status_code=303, headers={"Location": "./" + f"?{rest}" * bool(rest)})
        set_cookie(reply, scope, self.policy)
        return reply


class _Answer:
    """Adds headers to what an application answers, and notes size and time in the log."""

    def __init__(self, scope: Scope, send: Send, policy: Policy, request_id: str) -> None:
        self.scope, self.policy, self.request_id, self._send = scope, policy, request_id, send
        self.begin, self.status, self.bytes = time.perf_counter(), 0, 0

    async def send(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            self.status = message["status"]
            self._add_headers(message)
        elif message["type"] == "http.response.body":
            self.bytes += len(message.get("body", b""))
        await self._send(message)

    def _add_headers(self, message: MutableMapping[str, Any]) -> None:
        headers = MutableHeaders(scope=message)
        secure(headers, self.policy)
        headers["X-Request-Id"] = self.request_id
        origin = Headers(scope=self.scope).get("origin")
        if origin in self.policy.origins:
            headers["Access-Control-Allow-Origin"] = str(origin)
            headers["Access-Control-Expose-Headers"] = "etag, x-request-id, retry-after"
            headers.add_vary_header("Origin")

    def note(self) -> None:
        """A line of the log: the route but not what stood in its place, and never the query or body."""
        route = getattr(self.scope.get("route"), "path", "-")
        ms = 1000 * (time.perf_counter() - self.begin)
        log.debug(
            "%s %s %d %d bytes %.1f ms %s",
            *(self.scope["method"], route, self.status, self.bytes, ms, self.request_id),
        )


def secure(headers: MutableHeaders, policy: Policy) -> None:
    """The headers that every reply has."""
    headers["Content-Security-Policy"] = policy.content_security_policy
    headers["X-Content-Type-Options"] = "nosniff"
    headers["Referrer-Policy"] = "no-referrer"
    headers["Cross-Origin-Resource-Policy"] = "same-origin"
    headers["Cross-Origin-Opener-Policy"] = "same-origin"
    headers.setdefault("Cache-Control", "private, no-cache")


def set_cookie(reply: Response, scope: Scope, policy: Policy) -> None:
    """The cookie of a client that has shown the token: for this port and this path only."""
    reply.set_cookie(
        cookie_name(scope),
        policy.cookie_value,
        # A proxy may show a mounted application under a path that only the user knows.
        path=(policy.base_path or scope.get("root_path") or "") + "/",
        httponly=True,
        samesite="strict",
        secure=scope.get("scheme") == "https",
    )
    reply.headers["Cache-Control"] = "no-store"


def cookie_name(scope: Scope) -> str:
    """Cookies do not tell ports apart, so that the name has to."""
    server = scope.get("server") or ("", 0)
    return f"neuron_explainer_{server[1] or 0}"


def path_below(scope: Scope) -> str:
    """The path of a request below the path that the application is mounted at."""
    path, root = str(scope["path"]), str(scope.get("root_path") or "")
    inside = root and (path == root or path.startswith(f"{root}/"))
    return (path[len(root) :] if inside else path) or "/"


def _cookie(headers: Headers, name: str) -> str:
    text = "; ".join(headers.getlist("cookie"))
    return "" if len(text) > _LONGEST_COOKIE else cookie_parser(text).get(name, "")


def _same(given: str, expected: str) -> bool:
    """Whether two texts are equal; the time it takes does not tell how far they are."""
    return hmac.compare_digest(given.encode("utf-8", "surrogateescape"), expected.encode())


def _host_name(host: str) -> str:
    """The name in a Host header, without the port; empty if it is not a name and perhaps a port."""
    try:
        found = urlsplit(f"//{host}")
        _ = found.port  # a ValueError if it is no number
    except ValueError:
        return ""
    # Paths, queries, fragments, and the control characters that urlsplit leaves out.
    plain = found.netloc == host and found.username is None
    return (found.hostname or "").lower() if plain else ""


def _netloc(origin: str) -> str:
    try:
        return urlsplit(origin).netloc.lower()
    except ValueError:
        return ""


def _is_address(name: str) -> bool:
    try:
        ipaddress.ip_address(name)
    except ValueError:
        return False
    return True
