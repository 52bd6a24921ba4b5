"""The faults of ``test_files.py`` once more, against Microsoft's own imitation of Azure's blob store.

Not part of the suite, since it needs Node and a package from npm::

    python -m benchmarks.azurite_faults                     # starts it with npx
    python -m benchmarks.azurite_faults path/to/azurite-blob

Azurite answers as Azure does: its ETags, ranges, conditions, 404 for what may not be seen, signed
requests. A small proxy in between breaks connections at a byte of our choosing. Prints one line
for each fault and leaves with 1 if any of them was not survived.
"""

import base64
import contextlib
import hashlib
import hmac
import logging
import os
import shutil
import signal
import socket
import struct
import subprocess
import sys
import tempfile
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from email.utils import formatdate
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import requests
import urllib3

from neuron_explainer import files
from neuron_explainer.errors import SourceError
from neuron_explainer.files import cache, download
from tests.blob_server import ToLoopback

ACCOUNT = "devstoreaccount1"
# Azurite's published development key; it opens nothing else.
KEY = "Eby8vdM02xNOcqFlqUwJPLlmEtlCDXJ1OUzFT50uSRZ6IFsuFq2UVErCz4I6tq/K1SZFPTOtr/KBHBeksoGMGw=="
# With a name of this form for a host Azurite reads paths as Azure does: /container/blob.
HOST = f"{ACCOUNT}.blob.localhost"
DATA = os.urandom(4 << 20)
CUT = 1_500_000


class Proxy:
    """Passes bytes on to Azurite; the next connections end as ``plan`` says."""

    def __init__(self, target: int) -> None:
        self.target = target
        self.plan: deque[str] = deque()
        self.listener = socket.create_server(("127.0.0.1", 0))
        self.port = self.listener.getsockname()[1]
        threading.Thread(target=self._accept, daemon=True).start()

    def _accept(self) -> None:
        while True:
            client, _ = self.listener.accept()
            how = self.plan.popleft() if self.plan else "whole"
            server = socket.create_connection(("127.0.0.1", self.target))
            for pair in ((client, server, "whole"), (server, client, how)):
                threading.Thread(target=self._pass, args=pair, daemon=True).start()

    def _pass(self, source: socket.socket, sink: socket.socket, how: str) -> None:
        left = 1 << 60 if how == "whole" else CUT
        with contextlib.suppress(OSError):
            while left and (data := source.recv(min(left, 65_536))):
                sink.sendall(data)
                left -= len(data)
            if how == "stall":
                time.sleep(3600)
            if how == "reset":
                sink.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        with contextlib.suppress(OSError):
            if how != "reset":
                sink.shutdown(socket.SHUT_RDWR)
            sink.close()


class ToAzurite(ToLoopback):
    """Sends what is meant for Azure to Azurite."""

    def __init__(self, port: int) -> None:
        self.port = port
        super().__init__(f"http://127.0.0.1:{port}")

    def send(self, request: Any, *args: Any, **kwargs: Any) -> Any:
        request.headers["Host"] = f"{HOST}:{self.port}"
        return super().send(request, *args, **kwargs)


def route(port: int) -> None:
    """From now on, Azure is at ``port``, for anonymous requests and for blobfile's."""
    import blobfile

    real = download.new_session

    def session(threads: int) -> Any:
        made = real(threads)
        made.mount("https://", ToAzurite(port))
        return made

    class Pool(urllib3.PoolManager):
        def request(self, method: str, url: str, *args: Any, **kwargs: Any) -> Any:
            there = f"http://127.0.0.1:{port}{urllib3.util.parse_url(url).request_uri}"
            headers = dict(kwargs.get("headers") or {}) | {"Host": f"{HOST}:{port}"}
            return super().request(method, there, *args, **kwargs | {"headers": headers})

    pool = Pool()
    context = blobfile.create_context(
        retry_limit=2,
        save_access_token_to_disk=False,
        log_callback=logging.info,
        get_http_pool=lambda: pool,
    )
    download.new_session = session
    download._azure_context = lambda: context
    files.options.backoff_seconds = 0.01


def put(port: int, path: str, data: bytes = b"", **headers: str) -> None:
    """Make a blob or, with a query, a container; signed as Azure's documentation says."""
    found = urlsplit(path)
    given = {"x-ms-date": formatdate(usegmt=True), "x-ms-version": "2021-08-06"}
    given |= {name.replace("_", "-"): value for name, value in headers.items()}
    length = str(len(data)) if data else ""
    first = "\n".join(("PUT", "", "", length, "", "", "", "", "", "", "", "", ""))
    signed = "".join(f"{name}:{given[name]}\n" for name in sorted(given))
    resource = f"/{ACCOUNT}{found.path}" + "".join(
        f"\n{name}:{value}"
        for name, _, value in (p.partition("=") for p in found.query.split("&") if p)
    )
    text = (first + signed + resource).encode()
    digest = hmac.new(base64.b64decode(KEY), text, hashlib.sha256).digest()
    given["Authorization"] = f"SharedKey {ACCOUNT}:{base64.b64encode(digest).decode()}"
    given["Host"] = f"{HOST}:{port}"
    url = f"http://127.0.0.1:{port}{path}"
    with requests.put(url, data=data, headers=given, timeout=30) as answer:
        answer.raise_for_status()


def put_blob(port: int, path: str, data: bytes) -> str:
    put(port, path, data, x_ms_blob_type="BlockBlob")
    return f"az://{ACCOUNT}{path}"


@contextlib.contextmanager
def azurite(command: list[str]) -> Iterator[int]:
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    with tempfile.TemporaryDirectory() as folder:
        options = ["--silent", "--blobHost", "127.0.0.1", "--blobPort", str(port)]
        options += ["--location", folder, "--skipApiVersionCheck", "--disableTelemetry"]
        process = subprocess.Popen([*command, *options], start_new_session=True)
        try:
            wait_for(port, process)
            yield port
        finally:
            os.killpg(process.pid, signal.SIGTERM)
            process.wait()


def wait_for(port: int, process: subprocess.Popen[bytes]) -> None:
    for _ in range(1200):
        if process.poll() is not None:
            raise SystemExit(f"Azurite ended with {process.returncode}")
        with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port)):
            return
        time.sleep(0.1)
    raise SystemExit("Azurite did not start")


def child(port: int, source: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "benchmarks.azurite_faults", "--fetch", str(port), source]
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True)


def partial_bytes() -> int:
    return sum(path.stat().st_size for path in files.cache_dir().glob("state/*/partial"))


def refused(source: str, part: str) -> None:
    said = "no error"
    try:
        files.fetch(source)
    except SourceError as error:
        said = str(error)
    assert part in said, said


class Faults:
    """Each method is one fault; an exception is a failure."""

    def __init__(self, direct: int, proxy: Proxy) -> None:
        self.direct, self.proxy = direct, proxy
        self.name = 0

    def blob(self, data: bytes = DATA, container: str = "public") -> str:
        self.name += 1
        return put_blob(self.direct, f"/{container}/{self.name}.bin", data)

    def right(self, source: str, data: bytes = DATA) -> None:
        assert files.fetch(source).read_bytes() == data

    def anonymous_read(self) -> None:
        source = self.blob()
        self.right(source)
        assert files.list_cache()[0].etag
        assert files.exists(source)

    def connection_cut(self) -> None:
        self.proxy.plan.extend(["cut"])
        self.right(self.blob())

    def connection_reset_twice(self) -> None:
        self.proxy.plan.extend(["reset", "reset"])
        self.right(self.blob())

    def kill_9_and_restart(self) -> None:
        source = self.blob()
        self.proxy.plan.append("stall")
        process = child(self.proxy.port, source)
        while partial_bytes() < 1 << 20:
            assert process.poll() is None
            time.sleep(0.01)
        process.kill()
        process.communicate()
        have = partial_bytes()
        self.right(source)
        assert have >= 1 << 20

    def body_changed_since(self) -> None:
        source = self.blob()
        self.proxy.plan.append("cut")
        attempts, files.options.attempts = files.options.attempts, 1
        with contextlib.suppress(SourceError):
            files.fetch(source)
        files.options.attempts = attempts
        assert partial_bytes()
        put_blob(self.direct, urlsplit(source).path, DATA[::-1])
        self.right(source, DATA[::-1])

    def two_processes_race(self) -> None:
        source = self.blob()
        racers = [child(self.proxy.port, source) for _ in range(2)]
        told = {racer.communicate()[0].strip() for racer in racers}
        assert len(told) == 1, told
        assert Path(told.pop()).read_bytes() == DATA

    def not_there(self) -> None:
        refused(f"az://{ACCOUNT}/public/none.bin", "answered 404")
        assert not files.exists(f"az://{ACCOUNT}/public/none.bin")

    def private_without_and_with_credentials(self) -> None:
        source = self.blob(container="private")
        refused(source, "answered 4")
        os.environ["AZURE_STORAGE_KEY"] = KEY
        try:
            self.right(source)
            assert files.exists(source)
            assert not files.exists(f"az://{ACCOUNT}/private/none.bin")
        finally:
            del os.environ["AZURE_STORAGE_KEY"]

    def offline_with_a_warm_cache(self) -> None:
        source = self.blob()
        self.right(source)
        cache.verified.clear()
        # None cannot be called: any connection that is made is an error.
        download.new_session, session = None, download.new_session  # type: ignore[assignment]  # on purpose no function
        self.right(source)
        download.new_session = session


def main(command: list[str]) -> int:
    faults: list[Callable[[Faults], None]] = [
        value
        for name, value in vars(Faults).items()
        if name[0] != "_" and name not in ("blob", "right")
    ]
    failed = 0
    with azurite(command) as direct, tempfile.TemporaryDirectory() as home:
        os.environ |= {"HOME": home, "NO_PROXY": "127.0.0.1"}
        put(direct, "/public?restype=container", x_ms_blob_public_access="blob")
        put(direct, "/private?restype=container")
        proxy = Proxy(direct)
        route(proxy.port)
        run = Faults(direct, proxy)
        for fault in faults:
            os.environ["NEURON_EXPLAINER_CACHE"] = f"{home}/{fault.__name__}"
            proxy.plan.clear()
            try:
                fault(run)
            except Exception as error:
                failed += 1
                print(f"FAILED {fault.__name__}: {type(error).__name__}: {error}")
            else:
                print(f"ok     {fault.__name__}")
    return int(failed > 0)


if __name__ == "__main__":
    if sys.argv[1:2] == ["--fetch"]:
        route(int(sys.argv[2]))
        print(files.fetch(sys.argv[3]))
    else:
        if len(sys.argv) == 1 and not shutil.which("npx"):
            raise SystemExit("npx is not there: install Node, or give the path of azurite-blob")
        sys.exit(main(sys.argv[1:] or ["npx", "--yes", "--package=azurite@3", "azurite-blob"]))
