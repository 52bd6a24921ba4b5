"""A small blob server on loopback whose faults the tests choose, one request at a time."""

import socket
import struct
import threading
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import unquote, urlsplit

from requests.adapters import HTTPAdapter


@dataclass
class Fault:
    """What happens to one request instead of a full answer."""

    status: int = 0  # answer this and no body
    headers: dict[str, str] = field(default_factory=dict)
    reset_after: int | None = None  # that many body bytes, then a TCP reset
    cut_after: int | None = None  # that many body bytes, then an orderly close
    stall_after: int | None = None  # that many body bytes, then silence until server.release
    drop_headers: tuple[str, ...] = ()
    extra_headers: dict[str, str] = field(default_factory=dict)
    body: bytes | None = None  # lie about the content
    ignore_if_range: bool = False


@dataclass
class Blob:
    data: bytes
    etag: str | None = '"1"'
    faults: deque[Fault] = field(default_factory=deque)
    always: Fault | None = None
    needs_header: str | None = None


@dataclass
class Seen:
    method: str
    path: str
    headers: dict[str, str]


class BlobServer(ThreadingHTTPServer):
    """``server.blobs["/name"] = Blob(b"…")``; ``server.seen`` lists the requests."""

    daemon_threads = True
    block_on_close = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.blobs: dict[str, Blob] = {}
        self.seen: list[Seen] = []
        self._arrived = threading.Condition()
        self.release = threading.Event()
        self.listing: Callable[[_Handler], bool] | None = None

    @property
    def base(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"

    def put(self, path: str, data: bytes, *faults: Fault, **settings: Any) -> str:
        self.blobs[path] = Blob(data, faults=deque(faults), **settings)
        return self.base + path

    def requests(self, method: str = "GET") -> list[Seen]:
        return [seen for seen in self.seen if seen.method == method]

    def note(self, request: Seen) -> None:
        with self._arrived:
            self.seen.append(request)
            self._arrived.notify_all()

    def wait_for_requests(self, count: int) -> None:
        with self._arrived:
            assert self._arrived.wait_for(lambda: len(self.seen) >= count, 20), "waited in vain"

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Clients that are killed or give up are what the tests are about."""

    def __enter__(self) -> "BlobServer":
        self._thread = threading.Thread(target=self.serve_forever, args=(0.01,), daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.release.set()
        self.shutdown()
        self._thread.join()
        self.server_close()


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: BlobServer
    timeout = 5

    def log_message(self, format: str, *args: object) -> None:
        pass

    def do_HEAD(self) -> None:
        self._answer(body=False)

    def do_GET(self) -> None:
        self._answer(body=True)

    def _answer(self, *, body: bool) -> None:
        server = self.server
        server.note(Seen(self.command, self.path, dict(self.headers.items())))
        if server.listing is not None and server.listing(self):
            return None
        blob = server.blobs.get(unquote(urlsplit(self.path).path))
        if blob is None or (blob.needs_header and blob.needs_header not in self.headers):
            return self._plain(404)
        fault = blob.faults.popleft() if blob.faults else blob.always or Fault()
        if fault.status:
            return self._plain(fault.status, fault.headers)
        return self._send(blob, fault, body)

    def _plain(self, status: int, headers: dict[str, str] | None = None) -> None:
        self.send_response(status)
        for name, value in (headers or {}).items():
            self.send_header(name, value)
        self.send_header("Content-Length", "0")
        self.end_headers()

    def _send(self, blob: Blob, fault: Fault, body: bool) -> None:
        data = blob.data if fault.body is None else fault.body
        start = self._start(blob, fault)
        if start is not None and start >= len(data):
            return self._plain(416)
        headers = {"Content-Length": str(len(data) - (start or 0)), "Last-Modified": "never"}
        if blob.etag:
            headers["ETag"] = blob.etag
        if start is not None:
            headers["Content-Range"] = f"bytes {start}-{len(data) - 1}/{len(data)}"
        headers |= fault.extra_headers
        self.send_response(200 if start is None else 206)
        for name, value in headers.items():
            if name not in fault.drop_headers:
                self.send_header(name, value)
        if "Content-Length" in {*fault.drop_headers, *fault.extra_headers}:
            self.close_connection = True
        self.end_headers()
        if body:
            self._send_body(data[start or 0 :], fault)
        return None

    def _start(self, blob: Blob, fault: Fault) -> int | None:
        wanted = self.headers.get("Range")
        if wanted is None or blob.etag is None:
            return None
        condition = self.headers.get("If-Range")
        if condition not in (None, blob.etag) and not fault.ignore_if_range:
            return None
        return int(wanted.removeprefix("bytes=").partition("-")[0])

    def _send_body(self, data: bytes, fault: Fault) -> None:
        ends = (fault.reset_after, fault.cut_after, fault.stall_after)
        end = next((n for n in ends if n is not None), len(data))
        self.wfile.write(data[:end])
        self.wfile.flush()
        if fault.stall_after is not None:
            self.server.release.wait(30)
        if end < len(data):
            self.close_connection = True
        if fault.reset_after is not None:
            # Zero linger: close() sends RST, as a died server or a firewall would.
            linger = struct.pack("ii", 1, 0)
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
            self.connection.close()


class ToLoopback(HTTPAdapter):
    """Sends what is meant for some https host to a server at ``base`` instead."""

    def __init__(self, base: str) -> None:
        self.base = base
        super().__init__()

    def send(self, request: Any, *args: Any, **kwargs: Any) -> Any:
        found = urlsplit(request.url)
        asked = request.url
        request.url = self.base + found.path + (f"?{found.query}" if found.query else "")
        response = super().send(request, *args, **kwargs)
        response.url = request.url = asked
        return response
