"""The routes that compute, over HTTP: replies, streams, and requests of every kind."""

import json
import logging
import time
from collections.abc import Iterator
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from starlette.testclient import TestClient

from neuron_explainer.server.compute.operations import OPERATIONS
from neuron_explainer.server.limits import Limits
from neuron_explainer.server.worker import Worker
from tests.server.clients import API, app_with, client_of
from tests.server.computed import assert_same, make_setup, result_of
from tests.server.stores import make_stores
from tests.server.test_openapi import COMPUTES, FOUND, check, fuzzed, requests

IDS = ["mlp.0", "attn.1", "acts.0", "neurons.0", "nothing"]


@pytest.fixture(scope="module")
def client(tmp_path_factory: pytest.TempPathFactory) -> Iterator[TestClient]:
    """A client of a server whose tiny model runs in a thread."""
    worker = Worker(make_setup(tmp_path_factory.mktemp("model")), in_thread=True)
    stores = [make_stores(tmp_path_factory.mktemp("stores"))]
    app = app_with(stores, compute=worker, limits=Limits(compute_per_second=1e6))
    with client_of(app) as found:
        while worker.state != "ready":
            time.sleep(0.01)
        yield found


DEBUG: dict[str, Any] = {"prompts": [{"text": "the cats", "target": ["a"]}], "top_k": 3}


def test_the_model_tells_about_itself(client: TestClient) -> None:
    found = client.get(f"{API}/model").json()
    assert (found["state"], found["n_layers"], found["d_model"]) == ("ready", 2, 16)
    assert "compute" in found["capabilities"]
    assert {"path": "attn.v_out", "shape": ["b", "q", "h", "d_head"], "layers": True,
            "units": "head", "group": "attention"} in found["sites"]  # fmt: skip
    assert len(found["heads"]) == 8
    assert result_of(found).n_layers == 2


def test_what_the_debugger_replies(client: TestClient) -> None:
    reply = client.post(f"{API}/debug", json=DEBUG).json()
    assert_same(result_of(reply)["values"], reply["values"])
    two = {**DEBUG, "prompts": [DEBUG["prompts"][0], {"text": "old cats"}], "position": "all"}
    reply = client.post(f"{API}/debug", json=two).json()
    # A node at a token that only one prompt has no value in the other: null, and no NaN.
    alone = [n["position"] is None or n["position_b"] is None for n in reply["nodes"]]
    values = zip(reply["values"]["direct"]["A"], reply["values"]["direct"]["B"], strict=True)
    assert [None in pair for pair in values] == alone


def events_of(text: str) -> list[tuple[str, Any]]:
    found = []
    for block in text.strip().split("\n\n"):
        name, data = block.split("\n")
        found.append((name.removeprefix("event: "), json.loads(data.removeprefix("data: "))))
    return found


def test_a_text_comes_token_by_token(client: TestClient) -> None:
    body = {"prompt": "cats", "max_new": 3, "temperature": 0}
    with client.stream("POST", f"{API}/generate", json=body) as reply:
        assert reply.headers["content-type"].startswith("text/event-stream")
        events = events_of(reply.read().decode())
    assert [name for name, _ in events] == ["token", "token", "token", "done"]
    assert result_of(events[-1][1])["baseline"] == [each["id"] for _, each in events[:-1]]
    refused = client.post(f"{API}/generate", json={"prompt": "cats" * 9})
    assert (refused.status_code, refused.json()["code"]) == (413, "too_many_tokens")


def test_the_debugger_comes_in_parts_where_events_are_accepted(client: TestClient) -> None:
    plain = client.post(f"{API}/debug", json=DEBUG).json()
    accept = {"Accept": "application/json;q=0.5, Text/Event-Stream"}
    reply = client.post(f"{API}/debug", json=DEBUG, headers=accept)
    assert reply.headers["content-type"].startswith("text/event-stream")
    events = events_of(reply.text)
    n = events[0][1]["sublayers"]
    assert [name for name, _ in events] == ["started", *["nodes"] * n, "done"]
    del events[-1][1]["timings"], plain["timings"]
    assert events[-1][1] == plain
    wrong = client.post(f"{API}/debug", json=DEBUG | {"position": 99}, headers=accept)
    assert (wrong.status_code, wrong.json()["code"]) == (422, "no_such_position")


def test_computing_takes_its_own_method_alone(client: TestClient) -> None:
    for path, allowed in (
        ("debug", "POST"),
        ("generate", "POST"),
        ("dictionaries/mlp.0/map", "GET"),
    ):
        reply = client.head(f"{API}/{path}")
        assert (reply.status_code, reply.headers["allow"]) == (405, allowed)


def test_texts_are_logged_only_where_that_was_asked_for(
    client: TestClient, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    swap = {"node": at("0/mlp.post_act"), "action": "swap", "source": "a\nhat"}
    requests = {
        "debug": DEBUG | {"interventions": [swap]},
        "generate": {"prompt": "cats", "max_new": 1},
        "activations": {"texts": ["one", "two"], "dictionary": "mlp.0", "top_k": 1},
    }
    app: Any = client.app
    for logs in (False, True):
        monkeypatch.setattr(app.state.serving, "log_prompts", logs)
        with caplog.at_level(logging.DEBUG, "neuron_explainer"):
            for route, body in requests.items():
                assert client.post(f"{API}/{route}", json=body).status_code == 200
        lines = [record.getMessage() for record in caplog.records]
        assert len(lines) == len(requests) * (1 + logs)
        said = [line.partition(" prompts ")[2] for line in lines if " prompts " in line]
        texts = ["['the cats', 'a\\nhat']", "['cats']", "['one', 'two']"]
        assert said == (texts if logs else [])
        assert any("cats" in line for line in lines) == logs
        caplog.clear()


def at(location: str, unit: int | None = None, position: int | None = None) -> dict[str, Any]:
    return {"location": location, "unit": unit, "position": position}


BAD: dict[str, list[dict[str, Any]]] = {
    "position": [{"node": at("0/mlp.post_act", 7, 99), "action": "zero"}],
    "neuron": [{"node": at("0/mlp.post_act", 999), "action": "zero"}],
    "head": [{"node": at("0/attn.v_out", 4), "action": "scale", "value": 2}],
    "channel": [{"node": at("1/resid.torso.post_mlp", 16), "action": "add", "value": 2}],
    "latent": [
        {
            "node": at("0/resid.torso.delta_mlp", 40) | {"dictionary": "mlp.0"},
            "action": "set",
            "value": 1,
        }
    ],
    "latents": [
        {"node": at("0/resid.torso.delta_mlp") | {"dictionary": "mlp.0"}, "action": "mean"}
    ],
    "place": [{"node": at("0/nothing", 1), "action": "zero"}],
    "layer": [{"node": at("2/mlp.post_act", 1), "action": "zero"}],
    "two that undo each other": [
        {"node": at("0/mlp.post_act", 7), "action": "zero"},
        {"node": at("0/resid.torso.delta_mlp"), "action": "zero"},
    ],
}


@pytest.mark.parametrize("name", BAD)
def test_what_is_wrong_with_a_request_is_said_before_a_stream_begins(
    name: str, client: TestClient
) -> None:
    bodies = {"generate": {"prompt": "cats", "max_new": 2}, "debug": DEBUG}
    for route, body in bodies.items():
        reply = client.post(
            f"{API}/{route}",
            json=body | {"interventions": BAD[name]},
            headers={"Accept": "text/event-stream"},
        )
        assert reply.status_code == 422, reply.text
        assert reply.headers["content-type"] == "application/problem+json"
        if name in ("position", "neuron", "head", "channel", "latent", "latents"):
            field = "position" if name == "position" else "unit"
            assert reply.json()["loc"] == ["body", "interventions", 0, "node", field]


def test_an_error_in_a_stream_is_an_event(
    client: TestClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(session: Any, request: Any) -> Any:
        yield "token", {"id": 1}
        raise MemoryError

    monkeypatch.setitem(OPERATIONS, "generate", fails)
    reply = client.post(f"{API}/generate", json={"prompt": "cats"})
    (first, _), (second, problem) = events_of(reply.text)
    assert (first, second) == ("token", "error")
    assert (problem["status"], problem["code"]) == (503, "out_of_memory")


def test_units_of_dictionaries_are_read_with_an_etag(client: TestClient) -> None:
    for what in ("features/3/logits?k=4", "features/3/neighbours?k=4", "map"):
        reply = client.get(f"{API}/dictionaries/mlp.0/{what}")
        assert reply.status_code == 200, reply.text
        again = client.get(
            f"{API}/dictionaries/mlp.0/{what}", headers={"If-None-Match": reply.headers["etag"]}
        )
        assert again.status_code == 304
    missing = client.get(f"{API}/dictionaries/mlp.0/features/99/logits").json()
    assert (missing["status"], missing["code"]) == (404, "index_out_of_range")
    unknown = client.get(f"{API}/dictionaries/mpl.0/map").json()
    assert "mlp.0" in unknown["allowed"]


@pytest.mark.parametrize(
    ("body", "loc", "allowed"),
    [
        ({"metrics": ["dirct"]}, ["body", "metrics", 0], ["activation", "write_norm"]),
        ({"units": {"mlp": "neurons"}}, ["body", "units", "mlp"], ["neuron", "latent"]),
        ({"prompts": []}, ["body", "prompts"], None),
        ({"top_k": 201}, ["body", "top_k"], None),
        ({"layer": 3}, ["body", "layer"], None),
        ({"interventions": [{}] * 65}, ["body", "interventions"], None),
    ],
)
def test_wrong_types_name_their_place(
    body: dict[str, Any], loc: list[Any], allowed: list[str] | None, client: TestClient
) -> None:
    reply = client.post(f"{API}/debug", json={**DEBUG, **body})
    assert reply.status_code == 422
    problem = reply.json()
    assert problem["loc"] == loc
    if allowed is not None:
        assert problem["allowed"][: len(allowed)] == allowed


NODES = st.fixed_dictionaries(
    {
        "location": st.sampled_from(
            ["0/mlp.post_act", "1/attn.v_out", "0/attn.qk_probs", "1/resid.torso.delta_mlp",
             "resid.post_emb", "logits", "9/mlp.post_act", "mlp.post_act", "0/nothing"]
        ),
        "unit": st.sampled_from([0, 3, 39, 40, 48, 300]),
    },
    optional={
        "position": st.sampled_from([-1, 0, 3, 7, 9]),
        "attended": st.sampled_from([-1, 0, 5]),
        "dictionary": st.sampled_from(IDS),
    },
)  # fmt: skip
THERE = st.tuples(
    st.sampled_from(
        [
            {"location": "0/resid.torso.delta_mlp", "dictionary": "mlp.0"},
            {"location": "1/resid.torso.delta_attn", "dictionary": "attn.1"},
            {"location": "0/mlp.post_act", "dictionary": "acts.0"},
            {"location": "0/mlp.post_act"},
            {"location": "1/attn.v_out"},
        ]
    ),
    st.fixed_dictionaries(
        {"unit": st.sampled_from([0, 3])},
        optional={"position": st.sampled_from([-1, 0, 3, 7, 9])},
    ),
).map(lambda parts: {**parts[0], **parts[1]})
"""Nodes that the model has."""
ACTIONS = ["zero", "mean", "set", "scale", "add", "swap"]
CHANGES = st.fixed_dictionaries(
    {
        "node": THERE | NODES.map(lambda node: {k: v for k, v in node.items() if k != "attended"}),
        "action": st.sampled_from(ACTIONS),
    },
    optional={
        "value": st.sampled_from([0, 2.5, -1e6]),
        "source": st.sampled_from(["cats", "the hats", "x"]),
    },
)
WHOLE = st.fixed_dictionaries(
    {
        "node": THERE,
        "action": st.sampled_from(ACTIONS),
        "value": st.just(2.5),
        "source": st.just("the hats"),
    }
)
"""Interventions that lack nothing, most of which can be done."""
PROMPTS = st.fixed_dictionaries(
    {"text": st.sampled_from(["cats", "the cats", "é", "<|endoftext|>a", "q"])},
    optional={"target": st.lists(st.sampled_from(["a", "", "ab", 3, 256, 257]), max_size=2)},
)
DEBUGS = st.fixed_dictionaries(
    {"prompts": st.lists(PROMPTS, min_size=1, max_size=2)},
    optional={
        "units": st.sampled_from(
            [{"mlp": "latent"}, {"attention": "latent"}, {"attention": "pair"}]
        ),
        "dictionaries": st.lists(st.sampled_from(IDS), max_size=3),
        "layers": st.sampled_from([[0], [1, 1], [7]]),
        "position": st.sampled_from([-1, 0, 2, 8, "all"]),
        "interventions": st.lists(CHANGES, max_size=2),
        "trace": st.fixed_dictionaries(
            {"node": NODES}, optional={"through": st.sampled_from(["q", "k", "qk", "v"])}
        ),
    },
)


@fuzzed(60)
@given(body=DEBUGS)
def test_no_request_for_nodes_makes_the_server_fail(client: TestClient, body: Any) -> None:
    check(client, {"method": "POST", "url": f"{API}/debug", "json": body})
    check_stream(client, "debug", body)


@fuzzed(60)
@given(changes=st.lists(WHOLE | CHANGES, min_size=1, max_size=2), length=st.integers(1, 4))
def test_no_generation_begins_and_then_fails(
    client: TestClient, changes: list[Any], length: int
) -> None:
    body = {"prompt": "the cats", "max_new": length, "interventions": changes}
    check_stream(client, "generate", body)


def check_stream(client: TestClient, route: str, body: Any) -> None:
    """What is wrong is known before the first event; a stream that begins ends with its answer."""
    headers = {"Accept": "text/event-stream"}
    reply = client.post(f"{API}/{route}", json=body, headers=headers)
    assert reply.status_code < 500, reply.text
    if reply.status_code == 200:
        assert events_of(reply.text)[-1][0] == "done", (body, reply.text[-500:])


@fuzzed(100)
@given(data=st.data())
def test_no_request_makes_the_model_fail(client: TestClient, data: st.DataObject) -> None:
    request = data.draw(requests(FOUND, data.draw(st.sampled_from(COMPUTES))))
    if data.draw(st.booleans()):
        request["url"] = request["url"].replace("made-up.1", "mlp.0")
    check(client, request, allowed=(501,))
