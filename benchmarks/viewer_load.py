"""What the server bears: many clients at once for a minute, most of them reading, some of them computing."""

import gzip
import http.client
import json
import re
import threading
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

API = "/api/v1"
READERS, COMPUTERS = 40, 10
_PATIENCE = 0.2  # seconds that a client waits after a 429; a page waits as long as it is told

Ask = Callable[[str, str, Any], tuple[int, bytes]]
"""Method, path below the API and JSON body (None for none) to status and body."""


@dataclass
class Answers:
    """How some clients were answered."""

    seconds: list[float] = field(default_factory=list)
    statuses: Counter[str] = field(default_factory=Counter)
    lock: threading.Lock = field(default_factory=threading.Lock)

    def note(self, status: str, seconds: float) -> None:
        with self.lock:
            self.statuses[status] += 1
            self.seconds.append(seconds)

    def row(self, what: str, during: float, remark: str) -> str:
        """A row of the table; ``during`` is how long the clients asked."""
        p50, p95 = 1e3 * np.quantile(self.seconds or [float("nan")], [0.5, 0.95])
        busy = self.statuses["429"]
        wrong = {k: n for k, n in self.statuses.items() if k not in ("200", "429")}
        said = f"{sum(wrong.values())} errors{f' {wrong}' if wrong else ''}, {busy} times 429"
        rate = self.statuses["200"] / during
        return (
            f"| {what} | {p50:.0f} | {p95:.0f} | | {rate:.0f} answers a second for {during:.0f} s, {said}; "
            f"{remark} | no error but 429 |"
        )


def load(address: str, token: str, pid: int, seconds: float) -> list[str]:
    """Rows of the table of a server of ``tiny-tales`` and its model."""
    _wait_for_model(address, token)
    readers, computers = Answers(), Answers()
    end = time.perf_counter() + seconds
    threads = [
        threading.Thread(target=_client, args=(address, token, number, end, answers, step))
        for answers, step, n in ((readers, _read, READERS), (computers, _compute, COMPUTERS))
        for number in range(n)
    ]
    for thread in threads:
        thread.start()
    sizes = []
    for share in (0.1, 0.95):  # after what is read once has been read, and before clients leave
        time.sleep(max(0.0, end - (1 - share) * seconds - time.perf_counter()))
        sizes.append((resident(pid), sum(map(resident, children(pid)))))
    for thread in threads:
        thread.join()
    (first, first_model), (last, last_model) = sizes
    of_server = f"server {first:.0f} MiB after a tenth of it, {last:.0f} MiB at the end"
    of_model = f"model's process {first_model:.0f} and {last_model:.0f} MiB"
    return [
        readers.row(f"{READERS} clients that read and label", seconds, of_server),
        computers.row(f"beside them {COMPUTERS} clients that compute", seconds, of_model),
    ]


def _client(
    address: str,
    token: str,
    seed: int,
    end: float,
    answers: Answers,
    step: Callable[[Ask, np.random.Generator], int],
) -> None:
    """One client after its own plan, over one connection, until the time is over."""
    rng = np.random.default_rng(seed)
    connection = http.client.HTTPConnection(address, timeout=60)
    headers = {"Authorization": f"Bearer {token}", "Accept-Encoding": "gzip"}
    headers["Content-Type"] = "application/json"

    def ask(method: str, path: str, content: Any) -> tuple[int, bytes]:
        body = None if content is None else json.dumps(content)
        connection.request(method, API + path, body, headers)
        reply = connection.getresponse()
        return reply.status, reply.read()

    while time.perf_counter() < end:
        begin = time.perf_counter()
        try:
            status = str(step(ask, rng))
        except (OSError, http.client.HTTPException, ValueError, AssertionError) as error:
            status = type(error).__name__
            connection.close()  # the next request opens another one
        answers.note(status, time.perf_counter() - begin)
        if status == "429":
            time.sleep(_PATIENCE)
    connection.close()


def _read(ask: Ask, rng: np.random.Generator) -> int:
    """What a reader asks for next: mostly a unit; now and then a table, a search, the model, a label."""
    layer, unit = rng.integers(4), rng.integers(1000)
    dictionary = f"/dictionaries/ae-resid-delta-mlp.{layer}"
    kind = rng.integers(20)
    if kind == 0:
        status, body = ask("GET", f"{dictionary}/features?sort=density&limit=50", None)
    elif kind == 1:
        status, body = ask("GET", "/search?q=king", None)
    elif kind == 2:
        status, body = ask("GET", "/model", None)
    elif kind == 3:
        label = {"text": f"label {rng.integers(100)}", "source": "load"}
        status, body = ask("PUT", f"{dictionary}/features/{unit}/labels", label)
    else:
        status, body = ask("GET", f"{dictionary}/features/{unit}", None)
    json.loads(gzip.decompress(body) if body[:2] == b"\x1f\x8b" else body)
    return status


_WORDS = [
    "The",
    "king",
    "gave",
    "his",
    "daughter",
    "a",
    "golden",
    "ring",
    "and",
    "they",
    "went",
    "into",
    "the",
    "forest",
]


def _compute(ask: Ask, rng: np.random.Generator) -> int:
    """What a client of the model asks for next; a stream must end with its last event."""
    text = " ".join(rng.choice(_WORDS, 8))
    kind = rng.integers(3)
    if kind == 0:
        status, body = ask("POST", "/generate", {"prompt": text, "max_new": 5})
        assert status != 200 or b"event: done\n" in body, "cut off"
        return status
    if kind == 1:
        texts = {"texts": [text], "dictionary": "ae-resid-delta-mlp.2", "top_k": 5}
        return ask("POST", "/activations", texts)[0]
    node = {"location": f"{rng.integers(4)}/attn.v_out", "unit": int(rng.integers(4))}
    change = {"node": node, "action": "zero"}
    debug = {"prompts": [{"text": text}], "interventions": [change] * int(rng.integers(2))}
    return ask("POST", "/debug", debug)[0]


def _wait_for_model(address: str, token: str) -> None:
    connection = http.client.HTTPConnection(address, timeout=60)
    while True:
        connection.request("GET", f"{API}/health")
        state = json.loads(connection.getresponse().read())["model_state"]
        if state in ("ready", "failed"):
            assert state == "ready"
            connection.close()
            return
        time.sleep(0.1)


def resident(pid: int) -> float:
    """MiB of memory of a process."""
    status = Path(f"/proc/{pid}/status")
    if not status.exists():
        return float("nan")
    match = re.search(r"VmRSS:\s+(\d+)", status.read_text())
    return int(match[1]) / 1024 if match else float("nan")


def children(pid: int) -> list[int]:
    """The processes that the threads of a process have started."""
    lists = [path.read_text().split() for path in Path(f"/proc/{pid}/task").glob("*/children")]
    return [int(child) for each in lists for child in each]
