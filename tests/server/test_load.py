"""Many clients at once: every request is answered, and what they write does not get mixed up."""

import threading
from collections import Counter
from pathlib import Path

from tests.server.clients import API, app_with, client_of
from tests.server.stores import N_UNITS

CLIENTS, TURNS = 6, 9


def test_many_clients_read_and_write(stores: Path) -> None:
    app = app_with([stores], store_budget=1)  # stores are opened and closed all the time
    statuses: Counter[tuple[str, int]] = Counter()
    lock = threading.Lock()

    def work(number: int) -> None:
        client = client_of(app)
        for turn in range(TURNS):
            unit = f"{API}/dictionaries/made-up.{1 + turn % 2}/features/{turn % N_UNITS}"
            label = {"text": f"turn {turn}", "source": f"client {number}"}
            replies = {
                "read": client.get(unit),
                "search": client.get(f"{API}/search", params={"q": "turn"}),
                "label": client.put(f"{unit}/labels", json=label),
                "model": client.get(f"{API}/model"),
            }
            shared = {"If-Match": client.get(f"{unit}/labels").headers["etag"]}
            replies["match"] = client.put(f"{unit}/labels", json={"text": "x"}, headers=shared)
            with lock:
                statuses.update((name, reply.status_code) for name, reply in replies.items())

    threads = [threading.Thread(target=work, args=(number,)) for number in range(CLIENTS)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    every = CLIENTS * TURNS
    assert statuses["match", 200] + statuses["match", 412] == every
    del statuses["match", 200], statuses["match", 412]
    assert statuses == {(name, 200): every for name in ("read", "search", "label", "model")}
    client = client_of(app)
    for layer in (1, 2):
        for unit in range(N_UNITS):
            address = f"{API}/dictionaries/made-up.{layer}/features/{unit}/labels"
            said = {
                item["source"]: item["text"]
                for item in client.get(address).json()["items"]
                if item["source"].startswith("client")
            }
            turns = [n for n in range(TURNS) if (1 + n % 2, n % N_UNITS) == (layer, unit)]
            expected = {f"client {n}": f"turn {turns[-1]}" for n in range(CLIENTS)} if turns else {}
            assert said == expected
