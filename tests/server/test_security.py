"""Who may ask for what: every route is walked, so that a new one cannot be forgotten."""

import asyncio
import logging
import re
from collections import defaultdict
from collections.abc import Iterator
from typing import Any
from urllib.parse import urljoin

import pytest
from fastapi import APIRouter, FastAPI, Request
from fastapi.routing import iter_route_contexts
from starlette.testclient import TestClient

from neuron_explainer.errors import InputError
from neuron_explainer.server import security
from neuron_explainer.server.limits import MOST_CLIENTS, Limits, RateLimit
from neuron_explainer.server.security import Guard, make_policy
from tests.server.clients import API, TOKEN, app_with, client_of

STORE = "tiny-tales/ae-resid-delta-mlp/2"
COOKIE = "neuron_explainer_8321"
READS = f"{API}/dictionaries/ae-resid-delta-mlp.2"


@pytest.fixture(scope="module")
def app() -> FastAPI:
    return app_with([STORE], read_only=True)


@pytest.fixture(scope="module")
def client(app: FastAPI) -> TestClient:
    return client_of(app)


def routes_of(app: FastAPI) -> Iterator[tuple[str, str, str | None]]:
    """Method, an address, and the mark, of every route."""
    for route in iter_route_contexts(app.routes):
        address = re.sub(r"\{\w+\}", "0", str(route.path))
        for method in sorted(route.methods or ()):
            yield method, address, (route.openapi_extra or {}).get("x-access")


def send(client: TestClient, method: str, address: str, **settings: Any) -> Any:
    body: Any = None if method in ("GET", "HEAD") else {}
    return client.request(method, address, json=body, **settings)


def test_every_route_needs_the_token_and_has_a_mark(app: FastAPI) -> None:
    stranger, public = client_of(app, None), set()
    routes = list(routes_of(app))
    assert len(routes) > 6
    for method, address, mark in routes:
        assert mark in ("public", "read", "write", "compute"), (method, address)
        reply = send(stranger, method, address)
        if mark == "public":
            assert reply.status_code == 200
            public.add(address)
        else:
            assert (reply.status_code, reply.json()["code"]) == (401, "no_token"), address
            assert reply.headers["www-authenticate"] == "Bearer"
    api = {address for address in public if address.startswith(API)}
    assert api == {f"{API}/health"}
    assert stranger.get("/no/such/page").status_code == 401
    assert stranger.get(f"{API}/../../etc/passwd").status_code == 401


def test_what_changes_something_is_marked_so(app: FastAPI) -> None:
    for method, address, mark in routes_of(app):
        if method in ("PUT", "DELETE", "PATCH"):
            assert mark == "write", address
        if method == "GET":
            assert mark in ("public", "read", "compute"), address


def test_read_only_refuses_every_route_that_writes(app: FastAPI, client: TestClient) -> None:
    for method, address, mark in routes_of(app):
        reply = send(client, method, address)
        refused = reply.status_code == 403 and reply.json()["code"] == "read_only"
        # A body that is wrong is refused before it is known whether the route writes.
        assert not refused or mark == "write"
        assert mark != "write" or refused or reply.status_code in (404, 415, 422)


def test_a_route_without_a_mark_is_refused() -> None:
    app = app_with([STORE])
    router = APIRouter()

    @router.get("/forgotten")
    def forgotten() -> str:
        return "secret"

    app.include_router(router, prefix=API)
    reply = client_of(app).get(f"{API}/forgotten")
    assert (reply.status_code, reply.json()["code"]) == (403, "unmarked_route")


@pytest.mark.parametrize(
    "headers",
    [
        {},
        {"Authorization": "Bearer wrong"},
        {"Authorization": f"Basic {TOKEN}"},
        {"Authorization": f"Bearer {TOKEN[:-1]}"},
        {"Authorization": "Bearer é".encode("latin-1")},
        {"Cookie": f"{COOKIE}={TOKEN}"},
        {"Cookie": f"neuron_explainer_80={make_policy(TOKEN).cookie_value}"},
        {"Cookie": "a=" + "b" * 20_000},
    ],
)
def test_other_credentials_do_not_do(app: FastAPI, headers: Any) -> None:
    assert client_of(app, None).get(READS, headers=headers).status_code == 401


@pytest.mark.parametrize("base", ["", "/viewer"])
def test_the_token_in_the_address_becomes_a_cookie(base: str) -> None:
    client = client_of(app_with([STORE], base_path=base), None)
    reply = client.get(f"{base}/?token={TOKEN}&x=1", follow_redirects=False)
    assert (reply.status_code, reply.headers["location"]) == (303, "./?x=1")
    assert TOKEN not in reply.headers["set-cookie"]
    parts = reply.headers["set-cookie"].lower().split("; ")
    assert parts[0].startswith(f"{COOKIE}=")
    assert set(parts[1:]) == {"httponly", "samesite=strict", f"path={base}/"}
    assert client.get(base + READS).status_code == 200  # the client keeps the cookie
    assert client_of(app_with([STORE]), None).get("/?token=wrong").status_code == 401


def test_a_proxy_may_keep_the_base_path_or_take_it_away() -> None:
    client = client_of(app_with([STORE], base_path="viewer/"))
    for prefix in ("/viewer", ""):
        assert client.get(prefix + READS).status_code == 200
        assert client.get(f"{prefix}/").status_code == 200
    assert client.get("/viewers" + READS).status_code == 404
    assert client_of(app_with([STORE], base_path="/viewer"), None).get(READS).status_code == 401


def test_a_page_that_knows_the_token_gets_the_cookie(app: FastAPI) -> None:
    client = client_of(app, None)
    reply = client.post(f"{API}/login", headers={"Authorization": f"Bearer {TOKEN}"})
    assert (reply.status_code, reply.headers["cache-control"]) == (204, "no-store")
    assert client.get(READS).status_code == 200


def test_mounted_in_another_application_nothing_is_lost() -> None:
    outer = FastAPI()
    outer.mount("/tools/viewer", app_with([STORE]))
    stranger = client_of(outer, None)
    assert stranger.get(f"/tools/viewer{API}/health").status_code == 200
    assert stranger.get(f"/tools/viewer{READS}").status_code == 401
    evil = stranger.get(f"/tools/viewer{API}/health", headers={"Host": "evil.example"})
    assert evil.status_code == 421
    reply = stranger.get(f"/tools/viewer/?token={TOKEN}", follow_redirects=False)
    assert "; Path=/tools/viewer/;" in reply.headers["set-cookie"]
    assert stranger.get(f"/tools/viewer{READS}").status_code == 200


def test_mounted_behind_a_proxy_that_takes_a_part_of_the_path_away() -> None:
    outer = FastAPI()
    outer.mount("/tools/viewer", app_with([STORE], base_path="/lab/tools/viewer"))
    stranger = client_of(outer, None)
    reply = stranger.get(f"/tools/viewer/?token={TOKEN}", follow_redirects=False)
    assert "; Path=/lab/tools/viewer/;" in reply.headers["set-cookie"]
    assert urljoin("http://x/lab/tools/viewer/", reply.headers["location"]) == (
        "http://x/lab/tools/viewer/"
    )
    assert stranger.get(f"/tools/viewer{API}/health").status_code == 200


@pytest.mark.parametrize(
    ("host", "status"),
    [
        ("localhost:8321", 200),
        ("LOCALHOST", 200),
        ("127.0.0.1:9", 200),
        ("[::1]:8321", 200),
        ("evil.example", 421),
        ("127.0.0.1.evil.example:8321", 421),
        ("localhost.evil.example", 421),
        ("user@localhost", 421),
        ("localhost:port", 421),
        ("localhost?x", 421),
        ("localhost#x", 421),
        ("localhost/x", 421),
        ("local\thost", 421),
        ("[::1", 421),
        ("", 421),
        ("192.168.0.7:8321", 421),
    ],
)
def test_hosts(client: TestClient, host: str, status: int) -> None:
    assert client.get(f"{API}/health", headers={"Host": host}).status_code == status
    assert client.get("/", headers={"Host": host}).status_code == status


def test_hosts_that_were_allowed() -> None:
    client = client_of(app_with([STORE], hosts=["Lab.example"], any_address=True))
    for host, status in [
        ("lab.example:80", 200),
        ("10.1.2.3", 200),
        ("[fe80::1]:8321", 200),
        ("other.example", 421),
    ]:
        assert client.get(READS, headers={"Host": host}).status_code == status


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ({}, 204),
        ({"Origin": "http://127.0.0.1:8321"}, 204),
        ({"Origin": "http://127.0.0.1:8321", "Sec-Fetch-Site": "same-origin"}, 204),
        ({"Sec-Fetch-Site": "none"}, 204),
        ({"Origin": "http://127.0.0.1:8322"}, 403),
        ({"Origin": "http://evil.example"}, 403),
        ({"Origin": "null"}, 403),
        ({"Sec-Fetch-Site": "same-site"}, 403),  # another port of this machine
        ({"Sec-Fetch-Site": "cross-site"}, 403),
        ({"Sec-Fetch-Site": "cross-site", "Sec-Fetch-Mode": "navigate"}, 403),
        ({"Content-Type": "text/plain"}, 415),
        ({"Content-Type": "application/x-www-form-urlencoded"}, 415),
        ({"Content-Encoding": "gzip"}, 415),
    ],
)
def test_other_pages_cannot_send_in_the_name_of_the_user(
    client: TestClient, headers: dict[str, str], status: int
) -> None:
    assert client.post(f"{API}/login", headers=headers).status_code == status


def test_reading_from_other_pages(client: TestClient) -> None:
    assert client.get(READS, headers={"Sec-Fetch-Site": "cross-site"}).status_code == 403
    link = {"Sec-Fetch-Site": "cross-site", "Sec-Fetch-Mode": "navigate"}
    assert client.get(READS, headers=link).status_code == 200
    reply = client.get(READS, headers={"Origin": "http://evil.example"})
    assert reply.status_code == 403
    assert not any(name.startswith("access-control") for name in reply.headers)


def test_an_origin_that_was_allowed() -> None:
    origin = "https://lab.example:444"
    client = client_of(app_with([STORE], origins=[origin]))
    asked = {"Origin": origin, "Access-Control-Request-Method": "POST"}
    reply = client.options(READS, headers=asked)
    assert reply.status_code == 204
    assert reply.headers["access-control-allow-origin"] == origin
    assert "access-control-allow-credentials" not in reply.headers
    reply = client.get(READS, headers={"Origin": origin, "Sec-Fetch-Site": "cross-site"})
    assert (reply.status_code, reply.headers["access-control-allow-origin"]) == (200, origin)
    asked["Origin"] = "https://lab.example"
    assert client.options(READS, headers=asked).status_code == 403


@pytest.mark.parametrize(
    "address", [f"{API}/health", READS, "/", f"{API}/nothing", f"{API}/dictionaries/none"]
)
def test_headers_of_every_reply(client: TestClient, address: str) -> None:
    headers = client.get(address).headers
    policy = headers["content-security-policy"]
    assert policy.startswith("default-src 'none'; script-src 'self'; style-src 'self';")
    assert "unsafe" not in policy
    assert "frame-ancestors 'self'" in policy
    assert headers["x-content-type-options"] == "nosniff"
    assert headers["referrer-policy"] == "no-referrer"
    assert headers["cross-origin-resource-policy"] == "same-origin"
    assert len(headers["x-request-id"]) == 16


def test_an_unforeseen_error_tells_nothing_and_has_the_headers(
    caplog: pytest.LogCaptureFixture,
) -> None:
    app = app_with([STORE])

    @app.get("/breaks", **security.READ)
    def breaks() -> None:
        raise RuntimeError("the prompt was: secret")

    reply = client_of(app).get("/breaks")
    assert (reply.status_code, reply.json()["code"]) == (500, "internal_error")
    assert "secret" not in reply.text
    assert reply.json()["request_id"] == reply.headers["x-request-id"]
    assert reply.headers["content-security-policy"]


def test_sizes() -> None:
    app = app_with([STORE], limits=Limits(body_bytes=100))

    @app.post("/takes", **security.READ)
    async def takes(request: Request) -> int:
        return len(await request.body())

    client = client_of(app)
    kind = {"Content-Type": "application/json"}
    assert client.post("/takes", content=b" " * 100, headers=kind).json() == 100
    reply = client.post("/takes", content=b" " * 101, headers=kind)
    assert (reply.status_code, reply.json()["code"]) == (413, "body_too_large")
    parts = (b" " * 60 for _ in range(2))  # the length is not known beforehand
    assert client.post("/takes", content=parts, headers=kind).status_code == 413
    reply = client.get(READS, params={"q": "x" * 20_000})
    assert (reply.status_code, reply.json()["code"]) == (414, "url_too_long")


def test_requests_to_the_model_of_other_machines_are_counted() -> None:
    app = app_with([STORE], hosts=["testserver"], limits=Limits(compute_per_second=3))

    @app.post("/computes", **security.COMPUTE)
    async def computes() -> int:
        return 1

    here = client_of(app)
    headers = {"Authorization": f"Bearer {TOKEN}"}
    there = TestClient(app, headers=headers, client=("10.0.0.9", 5000))
    replies = [there.post("/computes") for _ in range(4)]
    assert [reply.status_code for reply in replies] == [200, 200, 200, 429]
    assert replies[3].headers["retry-after"] == "1"
    assert replies[3].json()["retry_after"] == 1
    there_too = TestClient(app, headers=headers, client=("10.0.0.10", 5000))
    assert there_too.post("/computes").status_code == 200
    local = TestClient(app, headers=headers, client=("127.0.0.1", 5000))
    assert {local.post("/computes").status_code for _ in range(9)} == {200}
    assert here.get(READS).status_code == 200


def test_a_rate_limit_fills_up_again_and_stays_small() -> None:
    now = [0.0]
    limit = RateLimit(2, clock=lambda: now[0])
    assert [limit.wait("a") for _ in range(3)] == [0, 0, 0.5]
    now[0] = 0.5
    assert limit.wait("a") == 0
    assert limit.wait("a") == 0.5
    for client in range(MOST_CLIENTS + 10):
        limit.wait(str(client))
    assert len(limit._buckets) == MOST_CLIENTS


def test_the_log_holds_no_text_of_a_request(
    client: TestClient, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.DEBUG, "neuron_explainer"):
        client.get(f"{READS}/features/5/examples?group=secret-words")
        client.get(f"{API}/dictionaries/secret-words")
        client.post(f"{API}/login", json={"text": "secret-words"})
    lines = [record.getMessage() for record in caplog.records]
    assert len(lines) == 3
    assert re.fullmatch(r"GET \S+ 422 \d+ bytes \d+\.\d ms [0-9a-f]{16}", lines[0])
    assert not any("secret" in line for line in lines)


@pytest.mark.parametrize("token", ["", "short", "é" * 20, "line\n" * 5])
def test_tokens_that_are_none(token: str) -> None:
    with pytest.raises(InputError, match="at least 16 characters"):
        make_policy(token)


@pytest.mark.parametrize("origin", ["*", "https://*.example", "lab.example", "https://a.b/c", ""])
def test_origins_that_are_none(origin: str) -> None:
    with pytest.raises(InputError, match="exact origin"):
        make_policy(TOKEN, origins=[origin])


def test_a_random_token_has_256_bits() -> None:
    first, second = make_policy().token, make_policy().token
    assert first != second
    assert len(first) == 43
    with pytest.raises(InputError, match="frame-ancestors"):
        make_policy(frame_ancestors="'self'; script-src *")


def test_what_the_end_of_the_server_cuts_off_is_answered() -> None:
    """A server that ends cancels what still runs; its client can try again, and reads no 500."""

    async def never(scope: Any, receive: Any, send: Any) -> None:
        if scope["path"] == "/begun":
            await send({"type": "http.response.start", "status": 200, "headers": []})
        await asyncio.Event().wait()

    async def cut_off(path: str) -> list[Any]:
        sent: list[Any] = []

        async def send(message: Any) -> None:
            sent.append(message)

        async def receive() -> Any:
            return {"type": "http.request"}

        headers = [(b"host", b"localhost"), (b"authorization", f"Bearer {TOKEN}".encode())]
        scope: dict[str, Any] = {"type": "http", "method": "GET", "path": path}
        scope |= {"query_string": b"", "headers": headers}
        guard = Guard(never, make_policy(TOKEN), frozenset(), defaultdict(int), 9.0)
        task = asyncio.create_task(guard(scope, receive, send))
        await asyncio.sleep(0.01)
        task.cancel("timeout graceful shutdown exceeded")
        await asyncio.wait([task])
        assert task.cancelled() == (path == "/begun")
        return sent

    start, body = asyncio.run(cut_off("/x"))
    assert (start["status"], b'"code":"shutting_down"' in body["body"]) == (503, True)
    assert [message["status"] for message in asyncio.run(cut_off("/begun"))] == [200]
