"""``neuron-explainer serve``, as a process: ready soon, and ended in good order."""

import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from neuron_explainer.analysis.workspace import DATA_VARIABLE
from neuron_explainer.cli import main, serving
from tests.server.stores import make_stores

API = "/api/v1"


@contextmanager
def running(folder: Path, *options: str) -> Iterator[tuple[subprocess.Popen[str], str, str]]:
    """A server of a folder of stores; its address without a path, and its token."""
    command = [sys.executable, "-m", "neuron_explainer", "serve", "--store", str(folder)]
    process = subprocess.Popen(
        [*command, "--no-model", "--port", "0", *options],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, DATA_VARIABLE: str(folder)},
    )
    try:
        assert process.stdout is not None
        lines = [process.stdout.readline() for _ in range(3)]
        match = re.search(r"(http://\S+?)/\?token=(\S+)", "".join(lines))
        assert match, lines
        yield process, match[1], match[2]
    finally:
        process.kill()
        process.communicate()


def get(address: str, token: str | None = None) -> Any:
    headers = {"Authorization": f"Bearer {token}"} if token else {}
    with urllib.request.urlopen(urllib.request.Request(address, headers=headers)) as reply:
        return json.loads(reply.read())


def test_served_and_ended(tmp_path: Path) -> None:
    begin = time.monotonic()
    with running(make_stores(tmp_path)) as (process, address, token):
        assert get(f"{address}{API}/health")["model_state"] == "none"
        ready = time.monotonic() - begin
        found = get(f"{address}{API}/dictionaries/made-up.2/features/1", token)
        assert found["unit"] == 1
        with pytest.raises(urllib.error.HTTPError, match="401"):
            get(f"{address}{API}/model")
        leave_early(address, token)
        six = address.replace("127.0.0.1", "[::1]")
        if socket.has_ipv6:
            assert get(f"{six}{API}/health")["queue_depth"] == 0
        process.send_signal(signal.SIGTERM)
        assert process.wait(20) in (0, -signal.SIGTERM)
        assert process.stderr is not None
        assert set(process.stderr.read().splitlines()) <= {"Invalid HTTP request received."}
    assert ready < 10  # 0.7 s on an idle core; the suite runs on all of them


def leave_early(address: str, token: str) -> None:
    """Clients that are gone before their request is whole, or before its answer."""
    host, port = address.removeprefix("http://").split(":")
    head = f"GET {API}/model HTTP/1.1\r\nHost: {host}\r\nAuthorization: Bearer {token}\r\n\r\n"
    for sent in (head, head[:40], head * 20, "POST / HTTP/1.1\r\nContent-Length: 9\r\n\r\n{", "\0"):
        for _ in range(3):
            with socket.create_connection((host, int(port)), timeout=20) as connection:
                connection.sendall(sent.encode())
    assert get(f"{address}{API}/health")["queue_depth"] == 0


def test_answers_are_sent_at_once() -> None:
    listening = serving._listen("127.0.0.1", 0)
    # What asyncio looks at before it switches off the wait for acknowledgements.
    assert {each.proto for each in listening} == {socket.IPPROTO_TCP}
    for each in listening:
        each.close()


def test_requests_that_run_are_answered_before_it_ends(tmp_path: Path) -> None:
    with running(make_stores(tmp_path)) as (process, address, token):
        host, port = address.removeprefix("http://").split(":")
        body = json.dumps({"text": "kept"})
        head = (
            f"PUT {API}/dictionaries/made-up.2/features/1/labels HTTP/1.1\r\nHost: {host}\r\n"
            f"Authorization: Bearer {token}\r\nContent-Type: application/json\r\n"
            f"Content-Length: {len(body)}\r\n\r\n"
        )
        with socket.create_connection((host, int(port)), timeout=20) as connection:
            connection.sendall((head + body[:5]).encode())
            get(f"{address}{API}/health")  # by now the request has begun
            process.send_signal(signal.SIGTERM)
            time.sleep(0.3)
            connection.sendall(body[5:].encode())
            assert connection.recv(100).startswith(b"HTTP/1.1 200")
        process.wait(20)
    with running(tmp_path) as (_, address, token):
        found = get(f"{address}{API}/dictionaries/made-up.2/features/1/labels", token)
        assert found["items"][0]["text"] == "kept"


def test_the_token_of_a_file_and_a_path(tmp_path: Path) -> None:
    secret = tmp_path / "secret"
    secret.write_text("a-token-of-my-own-choice\n")
    options = ["--token-file", str(secret), "--base-path", "/lab/viewer", "--read-only"]
    options += ["--cache", "0.25", "--memory", "3"]
    with running(make_stores(tmp_path / "s"), *options) as (_, address, token):
        assert token == "a-token-of-my-own-choice"
        assert address.endswith("/lab/viewer")
        model = get(f"{address}{API}/model", token)
        assert model["read_only"]
        limits = model["limits"]
        assert (limits["kept_bytes"], limits["autoencoder_bytes"]) == (1 << 28, 3 << 30)


def failure(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    assert main(["serve", *arguments]) == 2
    return capsys.readouterr().err


def test_what_cannot_be_served(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    text = failure(capsys, "--host", "0.0.0.0")
    assert "shows this server to other machines" in text
    assert "--token-file" in text
    assert "at least 16 characters" in failure(capsys, "--port", "0", "--token", "short")
    assert "no store of examples" in failure(capsys, "--port", "0", "--store", str(tmp_path / "x"))
    assert "from 0 to 65535" in failure(capsys, "--port", "70000")
    assert "cannot read the token" in failure(capsys, "--token-file", str(tmp_path / "none"))
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = ("--port", str(taken.getsockname()[1]))
        assert "--port 0 takes any free port" in failure(capsys, *port)
        # Other arguments come first: with the right port they would still be wrong.
        assert "no store of examples" in failure(capsys, *port, "--store", str(tmp_path / "x"))
        assert "exact origin" in failure(capsys, *port, "--allow-origin", "*")
    for memory in ("nan", "0", "-1", "inf", "much"):
        with pytest.raises(SystemExit):
            main(["serve", "--memory", memory])
        assert "--memory" in capsys.readouterr().err
    assert "exact origin" in failure(capsys, "--port", "0", "--allow-origin", "*")
