"""A chat-completions endpoint on loopback whose answers a test writes."""

import json
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any


@dataclass
class Answer:
    """What is sent back."""

    body: Any
    """JSON, or bytes that are sent as they are."""
    status: int = 200
    headers: dict[str, str] = field(default_factory=dict)
    delay: float = 0.0
    cut_after: int | None = None
    """Close the connection after so many bytes of the body."""
    pause: float = 0.0
    """Seconds between the bytes of the body."""


@dataclass
class Seen:
    """A request that came."""

    path: str
    headers: dict[str, str]
    body: Any

    @property
    def prompt(self) -> str:
        """The text of the last message."""
        text: str = self.body["messages"][-1]["content"]
        return text


Script = Callable[[Seen], Answer | str]


def completion(text: str | None, finish: str = "stop", **more: Any) -> dict[str, Any]:
    """The JSON of a chat completion; ``more`` goes into the message, but for logprobs."""
    choice: dict[str, Any] = {"index": 0, "finish_reason": finish}
    if (logprobs := more.pop("logprobs", None)) is not None:
        choice["logprobs"] = {"content": logprobs}
    choice["message"] = {"role": "assistant", "content": text, **more}
    return {
        "choices": [choice],
        "usage": {"prompt_tokens": 100, "completion_tokens": 10},
    }


def error(status: int, message: str, **headers: str) -> Answer:
    """An error as OpenAI writes it."""
    named = {name.replace("_", "-"): value for name, value in headers.items()}
    return Answer({"error": {"message": message, "type": "error", "code": None}}, status, named)


class FakeEndpoint(ThreadingHTTPServer):
    """``endpoint.seen`` lists the requests, ``endpoint.under_way_most`` how many there were at a time."""

    daemon_threads = True
    request_queue_size = 64

    def __init__(self, script: Script) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.script = script
        self.seen: list[Seen] = []
        self.under_way = self.under_way_most = 0
        self.lock = threading.Lock()

    @property
    def url(self) -> str:
        """Its address."""
        return f"http://127.0.0.1:{self.server_address[1]}/v1"

    def chats(self) -> list[Seen]:
        """The requests for completions."""
        return [each for each in self.seen if each.path == "/v1/chat/completions"]

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that went away is no news."""


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    server: FakeEndpoint

    def log_message(self, format: str, *args: Any) -> None:
        pass

    def do_GET(self) -> None:
        self._answer(None)

    def do_POST(self) -> None:
        self._answer(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))

    def _answer(self, body: Any) -> None:
        server, seen = self.server, Seen(self.path, dict(self.headers), body)
        with server.lock:
            server.seen.append(seen)
            server.under_way += 1
            server.under_way_most = max(server.under_way, server.under_way_most)
        answer = server.script(seen)
        if isinstance(answer, str):
            answer = Answer(completion(answer))
        if answer.delay:
            time.sleep(answer.delay)
        with server.lock:
            server.under_way -= 1
        self._write(answer)

    def _write(self, answer: Answer) -> None:
        content = answer.body
        if not isinstance(content, bytes):
            content = json.dumps(content).encode()
        head = [f"HTTP/1.1 {answer.status} said", f"Content-Length: {len(content)}"]
        head += [f"{name}: {value}" for name, value in answer.headers.items()]
        if answer.cut_after is not None:
            content, self.close_connection = content[: answer.cut_after], True
        first = ("\r\n".join(head) + "\r\n\r\n").encode()
        if not answer.pause:
            self.wfile.write(first + content)
            return
        self.wfile.write(first)
        for number in range(len(content)):
            time.sleep(answer.pause)
            self.wfile.write(content[number : number + 1])


@contextmanager
def serving(script: Script) -> Iterator[FakeEndpoint]:
    """An endpoint that runs while the block does."""
    endpoint = FakeEndpoint(script)
    thread = threading.Thread(target=endpoint.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    try:
        yield endpoint
    finally:
        endpoint.shutdown()
        endpoint.server_close()
        thread.join()


if __name__ == "__main__":  # for the benchmark: a process of its own that answers until it is ended
    with serving(lambda seen: '{"1": true, "2": false, "3": true, "4": false, "5": true}') as found:
        print(found.url, flush=True)
        threading.Event().wait()
