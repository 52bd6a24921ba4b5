"""Clients that send the head of a request too slowly are sent away; others are not."""

import asyncio
import socket
import threading
import time
from collections.abc import Iterator
from typing import Any

import pytest
import uvicorn

from neuron_explainer.server.connections import protocol_with_deadline

SECONDS = 0.4
REQUEST = b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n"


async def slow_app(scope: Any, receive: Any, send: Any) -> None:
    """Answers after longer than a head may take."""
    if scope["type"] == "http":
        await asyncio.sleep(1.5 * SECONDS)
        await send({"type": "http.response.start", "status": 204, "headers": []})
        await send({"type": "http.response.body", "body": b""})


@pytest.fixture(scope="module")
def port() -> Iterator[int]:
    with socket.create_server(("127.0.0.1", 0)) as listening:
        config = uvicorn.Config(
            slow_app,
            http=protocol_with_deadline(SECONDS),
            log_config=None,
            lifespan="off",
            timeout_keep_alive=20,
        )
        server = uvicorn.Server(config)
        thread = threading.Thread(target=server.run, args=([listening],))
        thread.start()
        yield listening.getsockname()[1]
        server.should_exit = True
        thread.join(20)


def connect(port: int) -> socket.socket:
    return socket.create_connection(("127.0.0.1", port), timeout=10)


def drip(connection: socket.socket) -> tuple[bytes, float]:
    """Send a head byte by byte; what the server says, and after how long it closes."""
    begin, said = time.monotonic(), b""
    connection.settimeout(SECONDS / 8)
    for letter in b"GET / HTTP/1.1\r\nX: " + b"x" * 1000:
        try:
            connection.sendall(bytes([letter]))
            got = connection.recv(1000)
        except TimeoutError:
            continue
        except ConnectionError:  # it had been closed when the byte arrived
            break
        if not got:
            break
        said += got
    return said, time.monotonic() - begin


def test_a_head_that_drips_is_cut_off(port: int) -> None:
    with connect(port) as connection:
        said, seconds = drip(connection)
    assert said.startswith(b"HTTP/1.1 408 ")
    assert SECONDS * 0.9 <= seconds < 10 * SECONDS


def test_a_client_that_says_nothing_is_cut_off(port: int) -> None:
    with connect(port) as connection:
        assert connection.recv(100) == b""


def test_answers_may_take_longer_and_the_next_head_has_a_deadline_too(port: int) -> None:
    with connect(port) as connection:
        for _ in range(2):
            connection.sendall(REQUEST[:9])
            time.sleep(SECONDS / 4)
            connection.sendall(REQUEST[9:])
            assert connection.recv(1000).startswith(b"HTTP/1.1 204")
        assert drip(connection)[0].startswith(b"HTTP/1.1 408 ")
