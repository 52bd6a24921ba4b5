"""What the tests of the pages start and watch: a server process, and what a page does that it should not."""

import contextlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from types import TracebackType
from typing import Any, Self
from urllib.parse import urlsplit
from urllib.request import urlopen

READY_S = 60.0
"""A server that has not printed its URL by then is broken: on an idle machine it takes 2 seconds."""
LOOPBACK = ("127.0.0.1", "localhost", "[::1]", "::1")
BROWSERS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")


class NoBrowser(Exception):
    """There is no browser here; the message says how to get one."""


def chromium_path() -> str:
    """The Chromium that ``NEURON_EXPLAINER_CHROMIUM`` names, or one that the system has."""
    if find_spec("playwright") is None:
        raise NoBrowser(
            'playwright is not installed: pip install -c constraints.txt -e ".[test,browser]"'
        )
    named = os.environ.get("NEURON_EXPLAINER_CHROMIUM")
    path = named or next(filter(None, map(shutil.which, BROWSERS)), None)
    if path is None:
        raise NoBrowser(
            "no Chromium: install it (Debian: apt-get install chromium), or name one in "
            "NEURON_EXPLAINER_CHROMIUM"
        )
    return path


@contextmanager
def chromium() -> Iterator[Any]:
    """A new Chromium without a window, which reaches nothing but this machine."""
    path = chromium_path()
    from playwright.sync_api import sync_playwright

    only_here = "MAP * ~NOTFOUND, EXCLUDE 127.0.0.1, EXCLUDE localhost"
    with sync_playwright() as playwright:
        launched = playwright.chromium.launch(
            executable_path=path, args=["--no-sandbox", f"--host-resolver-rules={only_here}"]
        )
        try:
            yield launched
        finally:
            launched.close()


class Server:
    """A ``neuron-explainer serve`` process; a context manager that stops it."""

    def __init__(
        self,
        process: "subprocess.Popen[str]",
        url: str,
        lines: list[str],
        reader: threading.Thread,
    ) -> None:
        self.process, self.url, self.lines, self.reader = process, url, lines, reader

    @classmethod
    def start(cls, *flags: str, **environment: str) -> Self:
        """Start one on a free port, and wait until it says where it is."""
        process = subprocess.Popen(
            [sys.executable, "-m", "neuron_explainer", "serve", "--port", "0", *flags],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1", **environment},
        )
        found, lines, says = threading.Event(), list[str](), list[str]()

        def read() -> None:
            assert process.stdout is not None
            with process.stdout as output:
                for line in output:  # to the end: a full pipe would stop the server
                    lines.append(line)
                    if not says and (match := re.search(r"http://\S+", line)):
                        says.append(match.group())
                        found.set()
            found.set()

        reader = threading.Thread(target=read, daemon=True)
        reader.start()
        found.wait(READY_S)
        if not says:
            process.kill()
            raise AssertionError(f"the server did not start; it said:\n{''.join(lines)}")
        return cls(process, says[0], lines, reader)

    @property
    def origin(self) -> str:
        """Such as ``http://127.0.0.1:43210``."""
        parts = urlsplit(self.url)
        return f"{parts.scheme}://{parts.netloc}"

    def url_of(self, route: str = "") -> str:
        """The URL of a route of the viewer, such as ``#/p``, with the token that signs the browser in."""
        return self.url + route

    def wait_for_model(self) -> None:
        """Until the model can be asked."""
        end = time.monotonic() + READY_S
        while "ready" not in (state := self._model_state()):
            assert state != "failed", "the model could not be loaded"
            assert time.monotonic() < end, f"the model is still {state}"
            time.sleep(0.1)

    def _model_state(self) -> str:
        with urlopen(f"{self.origin}/api/v1/health", timeout=10) as reply:
            return str(json.load(reply)["model_state"])

    def model_process(self) -> int:
        """The number of the process in which the model runs; waits until there is one."""
        end = time.monotonic() + READY_S
        while time.monotonic() < end:
            for tasks in Path(f"/proc/{self.process.pid}/task").glob("*/children"):
                for child in tasks.read_text().split():  # of each thread
                    if b"spawn_main" in Path(f"/proc/{child}/cmdline").read_bytes():
                        return int(child)
            time.sleep(0.01)
        raise AssertionError("the server has started no process for the model")

    @contextmanager
    def model_held(self) -> Iterator[int]:
        """Within the block, the model's process stands still: it loads nothing and answers nothing."""
        process = self.model_process()
        os.kill(process, signal.SIGSTOP)
        try:
            yield process
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.kill(process, signal.SIGCONT)

    @contextmanager
    def model_slowed(self, share: float = 0.05, period: float = 0.02) -> Iterator[None]:
        """Within the block, the model's process runs for this share of the time, a moment at a time."""
        process, over = self.model_process(), threading.Event()

        def slow() -> None:
            while not over.wait(period * share):
                os.kill(process, signal.SIGSTOP)
                over.wait(period * (1 - share))
                os.kill(process, signal.SIGCONT)

        thread = threading.Thread(target=slow, daemon=True)
        thread.start()
        try:
            yield
        finally:
            over.set()
            thread.join()

    def kill(self) -> None:
        """End it at once, as a crash does."""
        self.process.kill()
        self.process.wait()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, why: BaseException | None, at: TracebackType | None
    ) -> None:
        self.process.terminate()
        try:
            self.process.wait(10)
        except subprocess.TimeoutExpired:
            self.kill()
        self.reader.join(10)


@dataclass
class Watch:
    """Errors of a page, and what it asked for outside the loopback interface."""

    errors: list[str] = field(default_factory=list)
    outside: list[str] = field(default_factory=list)
    requests: list[str] = field(default_factory=list)
    expected: list[str] = field(default_factory=list)

    def expect(self, pattern: str) -> None:
        """An error that this test provokes: a regular expression."""
        self.expected.append(pattern)

    def check(self) -> None:
        """Fail if anything was seen that nobody expects."""
        left = [e for e in self.errors if not any(re.search(p, e) for p in self.expected)]
        assert not left, "the page has errors:\n" + "\n".join(left)
        assert not self.outside, f"the page asked for {self.outside}"


def watched(page: Any, watch: Watch) -> Any:
    """The page, with its errors and requests noted in ``watch`` (which is also ``page.watch``)."""

    def on_console(message: Any) -> None:
        if message.type == "error":
            watch.errors.append(f"console: {message.text} ({message.location.get('url', '')})")

    def on_request(request: Any) -> None:
        url = urlsplit(request.url)
        watch.requests.append(f"{request.method} {url.path}")
        if url.scheme in ("http", "https", "ws", "wss") and url.hostname not in LOOPBACK:
            watch.outside.append(request.url)

    page.on("console", on_console)
    page.on("pageerror", lambda error: watch.errors.append(f"error: {error}"))
    page.on("request", on_request)
    page.watch = watch
    return page
