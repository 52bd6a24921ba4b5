"""Jobs: what the background finds is what the library finds, and it can be followed and stopped."""

import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from starlette.testclient import TestClient

from neuron_explainer.analysis.explaining.work import Step
from neuron_explainer.server import background, jobs
from neuron_explainer.server.jobs import JobReply
from tests.server.clients import API, app_with, client_of
from tests.server.test_reading import fitting

NAME = "ae-resid-delta-mlp.2"
STORE = "tiny-tales/ae-resid-delta-mlp/2"


@pytest.fixture
def client(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[TestClient]:
    monkeypatch.setenv("NEURON_EXPLAINER_DATA", str(tmp_path))
    with client_of(app_with([STORE])) as found:
        yield found


def ended(client: TestClient, id: str) -> Any:
    while True:
        found = fitting(JobReply, client.get(f"{API}/jobs/{id}").json())
        if found["state"] in background.ENDED:
            return found
        time.sleep(0.01)


def test_a_unit_is_explained_scored_and_labelled(client: TestClient) -> None:
    reply = client.post(f"{API}/jobs/explain", json={"dictionary": NAME, "units": [18, 17]})
    assert reply.status_code == 202
    found = ended(client, reply.json()["id"])
    assert (found["state"], found["done"], found["total"]) == ("done", 4, 4)
    namespace: dict[str, Any] = {}
    exec(found["python"], namespace)
    for item, step in zip(found["items"], namespace["result"], strict=True):
        assert (item["unit"], item["text"]) == (step.unit, step.explanation.text)
        assert [each["name"] for each in item["scores"]] == [each.name for each in step.scores]
        values = [each["value"] for each in item["scores"]]
        assert values == pytest.approx([each.value for each in step.scores], abs=1e-5)
    labels = client.get(f"{API}/dictionaries/{NAME}/features/17/labels").json()["items"]
    assert found["items"][1]["text"] in [label["text"] for label in labels]


def test_explanations_are_scored_again(client: TestClient) -> None:
    reply = client.post(f"{API}/jobs/score", json={"dictionary": NAME, "units": [17]})
    found = ended(client, reply.json()["id"])
    assert "explain it first" in found["items"][0]["error"]
    ended(
        client,
        client.post(f"{API}/jobs/explain", json={"dictionary": NAME, "units": [17]}).json()["id"],
    )
    reply = client.post(f"{API}/jobs/score", json={"dictionary": NAME, "units": [17]})
    assert ended(client, reply.json()["id"])["items"][0]["scores"]


def test_a_job_is_followed_and_stopped(client: TestClient, monkeypatch: pytest.MonkeyPatch) -> None:
    def slow(store: Any, units: Any, method: str) -> Iterator[Step]:
        for number, unit in enumerate(units, 1):
            time.sleep(0.05)
            yield Step(unit, number, len(units), error="nothing")

    monkeypatch.setattr(jobs, "explain_units", slow)
    body = {"dictionary": NAME, "units": list(range(60))}
    id = client.post(f"{API}/jobs/explain", json=body).json()["id"]
    while client.get(f"{API}/jobs/{id}").json()["done"] < 2:
        time.sleep(0.01)
    assert client.delete(f"{API}/jobs/{id}").status_code == 200
    events = client.get(f"{API}/jobs/{id}/events").text.strip().split("\n\n")
    last = json.loads(events[-1].split("data: ")[1])
    assert last["state"] == "cancelled"
    assert 2 <= last["done"] < 60


def test_an_error_is_the_end_of_its_job_only(
    client: TestClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: Any) -> Iterator[Step]:
        raise ZeroDivisionError("secret path")

    monkeypatch.setattr(jobs, "explain_units", broken)
    id = client.post(f"{API}/jobs/explain", json={"dictionary": NAME, "units": [1]}).json()["id"]
    found = ended(client, id)
    assert (found["state"], found["error"]) == ("failed", "internal error")
    monkeypatch.undo()
    assert client.get(f"{API}/health").status_code == 200


def test_what_cannot_be_a_job_is_refused(client: TestClient) -> None:
    for body, status in (
        ({"dictionary": "none", "units": [1]}, 404),
        ({"dictionary": NAME, "units": [99_999]}, 404),
        ({"dictionary": NAME, "units": []}, 422),
        ({"dictionary": NAME, "units": [1], "method": "gpt"}, 422),
    ):
        assert client.post(f"{API}/jobs/explain", json=body).status_code == status
    assert client.get(f"{API}/jobs/{'0' * 32}").status_code == 404
    readers = client_of(app_with([STORE], read_only=True))
    reply = readers.post(f"{API}/jobs/explain", json={"dictionary": NAME, "units": [1]})
    assert reply.status_code == 403


def test_only_so_many_jobs_wait(client: TestClient, monkeypatch: pytest.MonkeyPatch) -> None:
    def slow(store: Any, units: Any, method: str) -> Iterator[Step]:
        time.sleep(0.3)
        yield Step(units[0], 1, 1, error="nothing")

    monkeypatch.setattr(jobs, "explain_units", slow)
    body = {"dictionary": NAME, "units": [1]}
    replies = [client.post(f"{API}/jobs/explain", json=body) for _ in range(9)]
    assert [reply.status_code for reply in replies] == [202] * 8 + [429]
    assert replies[-1].headers["retry-after"]
    for reply in replies[:-1]:
        client.delete(f"{API}/jobs/{reply.json()['id']}")
