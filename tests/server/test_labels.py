"""What users say is kept, is refused where it would overwrite another's words, and comes back as it was."""

import json
import os
import signal
import sqlite3
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
from starlette.testclient import TestClient

from neuron_explainer.analysis.interchange import neuronpedia_rows, read_neuronpedia
from neuron_explainer.analysis.store import ExampleStore
from neuron_explainer.analysis.workspace import WORKSPACE_FILE
from neuron_explainer.server import shapes
from neuron_explainer.server.limits import Limits
from neuron_explainer.server.sessions import Sessions
from tests.server.clients import API, app_with, client_of
from tests.server.stores import HOSTILE
from tests.server.test_reading import fitting

UNIT = f"{API}/dictionaries/made-up.2/features/1"
LABELS = f"{UNIT}/labels"
LINES = {"Content-Type": "application/x-ndjson"}


@pytest.fixture
def client(stores: Path) -> TestClient:
    return client_of(app_with([stores]))


def texts(client: TestClient, address: str = LABELS) -> list[str]:
    content = fitting(shapes.Labels, client.get(address).json())
    return [item["text"] for item in content["items"]]


def test_labels_are_set_changed_and_removed(client: TestClient, stores: Path) -> None:
    assert texts(client) == ["kings and queens of England"]
    reply = client.put(LABELS, json={"text": "royalty", "score": 0.5})
    assert reply.status_code == 200
    first = reply.json()["items"][0]
    assert first == {
        "id": "user:user",
        "source": "user",
        "text": "royalty",
        "score": 0.5,
        "editable": True,
    }
    assert not reply.json()["items"][1]["editable"]
    client.put(LABELS, json={"text": "kings", "source": "me"})
    assert texts(client) == ["royalty", "kings", "kings and queens of England"]
    assert client.get(UNIT).json()["labels"] == client.get(LABELS).json()["items"]
    with ExampleStore.open(stores, "made-up.2") as store:
        assert [label.text for label in store.labels(1)] == texts(client)
    client.delete(LABELS, params={"source": "me"})
    assert texts(client) == ["royalty", "kings and queens of England"]
    client.delete(LABELS)
    client.delete(LABELS)  # nothing is left that could be removed
    assert texts(client) == ["kings and queens of England"]


def test_a_change_by_somebody_else_is_not_overwritten(client: TestClient) -> None:
    reply = client.get(LABELS)
    tag = reply.headers["etag"]
    assert not tag.startswith("W/")
    assert client.get(LABELS, headers={"If-None-Match": tag}).status_code == 304
    mine = client.put(LABELS, json={"text": "mine"}, headers={"If-Match": tag})
    assert mine.status_code == 200
    other = client.put(LABELS, json={"text": "theirs"}, headers={"If-Match": tag})
    assert (other.status_code, other.json()["code"]) == (412, "changed_meanwhile")
    assert client.delete(LABELS, headers={"If-Match": tag}).status_code == 412
    assert texts(client)[0] == "mine"
    now = {"If-Match": f'"other", {mine.headers["etag"]}'}
    assert client.put(LABELS, json={"text": "again"}, headers=now).status_code == 200
    assert client.put(LABELS, json={"text": "any"}, headers={"If-Match": "*"}).status_code == 200


def test_an_empty_list_of_tags_matches_nothing(client: TestClient) -> None:
    for given in ("", " , "):
        reply = client.put(LABELS, json={"text": "mine"}, headers={"If-Match": given})
        assert (reply.status_code, reply.json()["code"]) == (412, "changed_meanwhile")


def test_what_another_server_writes_meanwhile_is_not_overwritten(
    client: TestClient, stores: Path
) -> None:
    """The other one is between its first and its last word when this one is asked to compare."""
    tag = client.put(LABELS, json={"text": "mine"}).headers["etag"]
    other = sqlite3.connect(stores / WORKSPACE_FILE, isolation_level=None)
    with closing(other), ThreadPoolExecutor(1) as pool:
        other.execute("BEGIN IMMEDIATE")
        headers = {"If-Match": tag}
        asked = pool.submit(client.put, LABELS, json={"text": "again"}, headers=headers)
        time.sleep(0.2)  # it has come to where it must wait
        other.execute("UPDATE labels SET score = 0.5")
        other.execute("COMMIT")
        assert asked.result().status_code == 412
    assert client.get(LABELS).json()["items"][0]["text"] == "mine"


@pytest.mark.parametrize(
    ("body", "loc"),
    [
        ({"text": ""}, "text"),
        ({"text": "  "}, "text"),
        ({"text": "x" * 2001}, "text"),
        ({"text": 5}, "text"),
        ({"text": "x", "source": "s" * 81}, "source"),
        ({"text": "x", "score": "high"}, "score"),
        ({"text": "x", "colour": "red"}, "colour"),
        ({}, "text"),
    ],
)
def test_labels_that_are_none(client: TestClient, body: dict[str, Any], loc: str) -> None:
    reply = client.put(LABELS, json=body)
    assert (reply.status_code, reply.json()["loc"][-1]) == (422, loc)
    assert texts(client) == ["kings and queens of England"]


@pytest.mark.parametrize(
    "body",
    ['{"text": "x", "score": NaN}', '{"text": "\\ud800"}', '{"text": 1e999}', "[" * 5000, "{"],
)
def test_what_is_no_json(client: TestClient, body: str) -> None:
    reply = client.put(LABELS, content=body, headers={"Content-Type": "application/json"})
    assert (reply.status_code, reply.json()["code"]) == (422, "invalid_request")


@pytest.mark.parametrize("text", HOSTILE)
def test_hostile_labels_come_back_as_they_are(client: TestClient, text: str) -> None:
    assert client.put(LABELS, json={"text": text, "source": text}).status_code == 200
    reply = client.get(LABELS)
    assert reply.headers["content-type"] == "application/json"
    assert reply.json()["items"][0]["text"] == text.strip()
    assert reply.json()["items"][0]["source"] == text


def test_read_only(stores: Path) -> None:
    client = client_of(app_with([stores], read_only=True))
    for reply in (
        client.put(LABELS, json={"text": "x"}),
        client.delete(LABELS),
        client.post(f"{API}/bookmarks", json={"dictionary": "made-up.2", "unit": 1}),
        client.post(f"{API}/labels/import", content="{}", headers=LINES),
        client.post(f"{API}/sessions", json={"state": {}}),
    ):
        assert (reply.status_code, reply.json()["code"]) == (403, "read_only")
    assert not (stores / WORKSPACE_FILE).exists()
    assert client.get(f"{API}/model").json()["read_only"]


def test_bookmarks(client: TestClient) -> None:
    mark = {"dictionary": "made-up.2", "unit": 1, "note": "look again"}
    content = client.post(f"{API}/bookmarks", json=mark).json()
    expected = [{**mark, "label": "kings and queens of England"}]
    assert fitting(shapes.Bookmarks, content)["items"] == expected
    assert client.get(UNIT).json()["bookmarked"]
    other = client.post(f"{API}/bookmarks", json={"dictionary": "made-up.1", "unit": 7}).json()
    assert [item["unit"] for item in other["items"]] == [7, 1]
    assert client.get(f"{API}/bookmarks").json() == other
    where = {"dictionary": "made-up.2", "unit": "1"}
    assert len(client.delete(f"{API}/bookmarks", params=where).json()["items"]) == 1
    wrong = client.post(f"{API}/bookmarks", json={"dictionary": "made-up.2", "unit": 99})
    assert (wrong.status_code, wrong.json()["code"]) == (404, "index_out_of_range")
    wrong = client.post(f"{API}/bookmarks", json={"dictionary": "none", "unit": 1})
    assert (wrong.status_code, wrong.json()["code"]) == (404, "unknown_dictionary")


# --- import and export ---


def explanation(layer: int, unit: int, text: str, score: float) -> dict[str, Any]:
    scored = {"scored_sequence_simulations": [], "ev_correlation_score": score}
    return {
        "neuron_id": {"layer_index": layer, "neuron_index": unit},
        "scored_explanations": [{"explanation": text, "scored_simulation": scored}],
    }


def send(client: TestClient, *lines: Any, **params: str) -> dict[str, Any]:
    body = "\n".join(line if isinstance(line, str) else json.dumps(line) for line in lines)
    reply = client.post(f"{API}/labels/import", content=body, headers=LINES, params=params)
    assert reply.status_code == 200, reply.text
    content: dict[str, Any] = fitting(shapes.Imported, reply.json())
    return content


def test_labels_of_three_kinds_are_imported(client: TestClient) -> None:
    heads = {
        "attention_head_id": {"layer_index": 1, "neuron_index": 3},
        "scored_explanations": [
            {
                "explanation": "looks back",
                "scored_attention_simulation": {"attention_simulations": [], "roc_auc_score": 0.7},
            }
        ],
    }
    found = send(
        client,
        {"dictionary": "made-up/1", "unit": 2, "text": "ours", "source": "me", "score": 0.1},
        {"modelId": "m", "layer": "made-up.1", "index": "3", "description": "theirs", "scoreV2": 1},
        "",
        heads,
    )
    assert found == {"imported": 3, "skipped": 0, "errors": []}
    for where, text in [("made-up.1/features/2", "ours"), ("made-up.1/features/3", "theirs")]:
        assert texts(client, f"{API}/dictionaries/{where}/labels") == [text]
    label = client.get(f"{API}/dictionaries/heads/features/3/labels").json()["items"][0]
    assert (label["text"], label["score"], label["source"]) == ("looks back", 0.7, "explanation")
    found = send(client, explanation(5, 6, "said of latents", 0.3), dictionary="made-up.1")
    assert found["imported"] == 1
    assert texts(client, f"{API}/dictionaries/made-up.1/features/6/labels") == ["said of latents"]


def test_lines_that_cannot_be_used_are_named(client: TestClient) -> None:
    found = send(
        client,
        "{not json",
        "[]",
        {"dictionary": "made-up.2", "unit": 800, "text": "x"},
        {"dictionary": "made-up.3", "unit": 1, "text": "x"},
        {"dictionary": "made-up.2", "unit": True, "text": "x"},
        {"dictionary": "made-up.2", "unit": 1, "text": "x" * 3000},
        {"dictionary": {}, "unit": 1, "text": "x"},
        explanation(5, 6, "x", 0.3),
        {"modelId": "m", "layer": "made-up.1", "index": "²", "description": "x"},
        '{"dictionary": "made-up.2", "unit": 1, "text": "' + "\\ud800" + '"}',
        {"dictionary": "made-up.2", "unit": 2, "text": "good", "score": float("nan")},
    )
    assert (found["imported"], found["skipped"]) == (2, 9)
    assert [error["line"] for error in found["errors"]] == list(range(1, 10))
    details = [error["detail"] for error in found["errors"]]
    assert "not valid JSON" in details[0]
    assert "there are 0 to 7" in details[2]
    assert "Did you mean 'made-up" in details[3]
    assert "no dictionary of neurons of layer 5" in details[7]
    assert texts(client)[0] == "?"


@pytest.mark.parametrize("format", ["jsonl", "neuronpedia"])
def test_what_is_exported_can_be_imported(client: TestClient, tmp_path: Path, format: str) -> None:
    for unit, text in enumerate(HOSTILE):
        client.put(f"{API}/dictionaries/made-up.1/features/{unit}/labels", json={"text": text})
    reply = client.get(f"{API}/labels/export", params={"format": format})
    assert reply.headers["content-disposition"] == 'attachment; filename="labels.jsonl"'
    assert len(reply.text.splitlines()) >= len(HOSTILE)
    other = client_of(app_with([_copy(tmp_path)]))
    found = other.post(f"{API}/labels/import", content=reply.content, headers=LINES).json()
    assert found == {"imported": len(HOSTILE), "skipped": 0, "errors": []}
    for unit, text in enumerate(HOSTILE):
        address = f"{API}/dictionaries/made-up.1/features/{unit}/labels"
        assert texts(other, address) == [text.strip()]


def _copy(folder: Path) -> Path:
    from tests.server.stores import make_stores

    return make_stores(folder / "copy")


def test_export_of_one_dictionary_with_what_came_with_it(client: TestClient) -> None:
    found = client.get(f"{API}/labels/export?dictionary=made-up.2&stored=true")
    rows = [json.loads(line) for line in found.text.split("\n") if line]
    assert rows[0] == {
        "dictionary": "made-up.2",
        "unit": 1,
        "text": "kings and queens of England",
        "source": "published",
        "score": 0.4,
    }
    assert client.get(f"{API}/labels/export?dictionary=made-up.2").text == ""
    assert client.get(f"{API}/labels/export?dictionary=none").status_code == 404


def test_an_export_of_neuronpedia_is_read(client: TestClient, stores: Path, tmp_path: Path) -> None:
    from neuron_explainer.analysis.interchange import write_neuronpedia

    with ExampleStore.open(stores, "made-up.2") as store:
        rows = neuronpedia_rows([store[1]], model="m", name="1-made-up")
    write_neuronpedia(rows, tmp_path / "np")
    assert read_neuronpedia(tmp_path / "np").explanations == rows.explanations
    import gzip

    body = gzip.decompress((tmp_path / "np/explanations/batch-0.jsonl.gz").read_bytes()).decode()
    assert send(client, body, dictionary="made-up.1")["imported"] == 1
    label = client.get(f"{API}/dictionaries/made-up.1/features/1/labels").json()["items"][0]
    assert (label["text"], label["source"]) == ("kings and queens of England", "published")


def test_only_an_import_may_be_large(stores: Path) -> None:
    limits = Limits(body_bytes=1000, import_bytes=5000)
    client = client_of(app_with([stores], limits=limits))
    line = json.dumps({"dictionary": "made-up.2", "unit": 1, "text": "x" * 1500})
    assert send(client, line)["imported"] == 1
    reply = client.post(f"{API}/labels/import", content=b" " * 5001, headers=LINES)
    assert reply.status_code == 413
    assert client.put(LABELS, json={"text": "x" * 1500}).status_code == 413


# --- sessions ---


@pytest.mark.parametrize("depth", [200, 260, 900])
def test_what_was_kept_can_be_read_again(depth: int, client: TestClient) -> None:
    """A parser nests deeper than a writer: what comes in must be able to go out."""
    body = '{"state":{"a":' + "[" * depth + "]" * depth + "}}"
    kept = client.post(
        f"{API}/sessions", content=body, headers={"Content-Type": "application/json"}
    )
    assert kept.status_code == (200 if depth == 200 else 422)
    if kept.status_code == 200:
        read = client.get(f"{API}/sessions/{kept.json()['id']}")
        assert read.json()["state"] == json.loads(body)["state"]


def test_states_are_kept_under_their_hash(client: TestClient) -> None:
    state = {"prompts": ["<script>", "🜁"], "k": 10, "nested": [{"a": [1.5, None, True]}]}
    id = client.post(f"{API}/sessions", json={"state": state}).json()["id"]
    assert client.post(f"{API}/sessions", json={"state": state}).json()["id"] == id
    assert client.get(f"{API}/sessions/{id}").json() == {"id": id, "state": state}
    other = client_of(app_with(["tiny-tales/ae-resid-delta-mlp/2"]))
    assert other.get(f"{API}/sessions/{id}").status_code == 200
    missing = client.get(f"{API}/sessions/{'0' * 32}")
    assert (missing.status_code, missing.json()["code"]) == (404, "unknown_session")
    assert client.get(f"{API}/sessions/..").status_code == 404
    assert client.get(f"{API}/sessions/{'x' * 32}").status_code == 422
    assert client.post(f"{API}/sessions", json={"state": [1]}).status_code == 422


def test_the_oldest_states_are_forgotten(tmp_path: Path) -> None:
    sessions = Sessions(tmp_path / "new" / "sessions.sqlite", most=3)
    assert sessions.find("0" * 32) is None
    ids = [sessions.keep({"n": n}) for n in range(3)]
    sessions.keep({"n": 0})  # used again
    last = sessions.keep({"n": 3})
    assert [sessions.find(id) is not None for id in [*ids, last]] == [True, False, True, True]
    sessions.path.write_bytes(b"something else entirely" * 100)
    from neuron_explainer.errors import SourceError

    with pytest.raises(SourceError, match="cannot use the file of sessions"):
        sessions.find(last)


def test_a_process_that_is_killed_keeps_what_was_said(stores: Path) -> None:
    code = (
        "import os, signal, sys\n"
        "from tests.server.clients import app_with, client_of\n"
        f"client = client_of(app_with([{str(stores)!r}]))\n"
        f"assert client.put({LABELS!r}, json={{'text': 'kept'}}).status_code == 200\n"
        "os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    run = subprocess.run([sys.executable, "-c", code], timeout=60, env=dict(os.environ))
    assert run.returncode == -signal.SIGKILL
    client = client_of(app_with([stores]))
    assert texts(client)[0] == "kept"
