"""What the API says about stores is what the stores hold."""

import subprocess
import sys
from typing import Any

import numpy as np
import pytest
from fastapi import FastAPI
from pydantic import BaseModel
from starlette.testclient import TestClient

from neuron_explainer.analysis.store import ExampleStore
from neuron_explainer.server import shapes
from tests.server.clients import API, app_with, client_of

DICTIONARY = f"{API}/dictionaries/ae-resid-delta-mlp.2"


@pytest.fixture(scope="module")
def app() -> FastAPI:
    return app_with()


@pytest.fixture(scope="module")
def client(app: FastAPI) -> TestClient:
    return client_of(app)


@pytest.fixture(scope="module")
def store() -> ExampleStore:
    return ExampleStore.open("tiny-tales/ae-resid-delta-mlp/2")


def fitting(shape: type[BaseModel], content: Any) -> Any:
    """The content, which has the shape that the OpenAPI promises, and nothing more."""
    again = shape.model_validate(content, strict=False).model_dump()
    assert again.keys() == content.keys()
    return content


def result_of(python: str) -> Any:
    """What the text of a panel computes."""
    names: dict[str, Any] = {}
    exec(python, names)
    return names["result"]


def test_health_and_model(client: TestClient) -> None:
    health = fitting(shapes.Health, client.get(f"{API}/health").json())
    assert health["model_state"] == "none"
    model = fitting(shapes.Model, client.get(f"{API}/model").json())
    assert (model["name"], model["n_layers"]) == ("tiny-tales", None)
    assert model["limits"]["max_tokens"] == 256
    rows = {row["id"]: row for row in model["dictionaries"]}
    assert len(rows) == 16
    row = rows["ae-resid-delta-mlp.2"]
    assert (row["name"], row["layer"], row["site"]) == (
        "ae-resid-delta-mlp/2",
        2,
        "resid.torso.delta_mlp",
    )
    assert row["n"] == row["n_alive"] + row["n_dead"]
    assert row["metrics"]["fvu"] == pytest.approx(0.1, abs=0.2)
    assert row["metrics"]["l0"] == 16
    assert rows["2.mlp.post_act.neurons"]["metrics"] is None


def test_a_dictionary(client: TestClient, store: ExampleStore) -> None:
    found = fitting(shapes.Dictionary, client.get(DICTIONARY).json())
    assert (found["n"], found["n_alive"]) == (len(store), len(store.alive))
    assert found["n_tokens"] == store.n_tokens
    assert sum(found["density_hist"]["counts"]) == len(store.alive)
    assert len(found["density_hist"]["edges"]) == len(found["density_hist"]["counts"]) + 1
    assert (found["prev_layer"], found["next_layer"]) == (
        "ae-resid-delta-mlp.1",
        "ae-resid-delta-mlp.3",
    )
    assert client.get(f"{API}/dictionaries/ae-resid-delta-mlp.3").json()["next_layer"] is None
    result = result_of(found["python"])
    assert result["provenance"] == found["provenance"] == store.provenance
    assert result["settings"] == found["settings"]
    assert result["counts"] == found["density_hist"]["counts"]


def test_a_feature(client: TestClient, store: ExampleStore) -> None:
    found = fitting(shapes.Feature, client.get(f"{DICTIONARY}/features/5").json())
    record = store[5]
    assert found["stats"]["max"] == record.statistics.max
    assert sum(found["hist"]["counts"]) == record.histogram.sum()
    assert len(found["examples"]) == len(record.all_examples)
    for shown, example in zip(found["examples"], record.all_examples, strict=True):
        dense = np.zeros(len(shown["ids"]), np.float32)
        for place, value in shown["acts"]:
            dense[place] = value
        np.testing.assert_array_equal(dense, example.activations)
        assert dense[shown["peak"]] == np.float32(shown["value"])
        text = "".join(found["vocab"][str(number)] for number in shown["ids"])
        assert text == "".join(p.decode(errors="replace") for p in example.pieces)
    python = result_of(found["python"])
    assert python.statistics == record.statistics
    alive = store.alive.tolist()
    assert found["prev_alive"] == max(u for u in alive if u < 5)
    assert found["next_alive"] == min(u for u in alive if u > 5)


def test_features_that_do_not_exist(client: TestClient) -> None:
    reply = client.get(f"{DICTIONARY}/features/2560")
    assert (reply.status_code, reply.json()["code"]) == (404, "index_out_of_range")
    assert reply.json()["allowed"] == ["0 to 2559"]
    assert client.get(f"{DICTIONARY}/features/-1").status_code == 422
    reply = client.get(f"{API}/dictionaries/ae-resid-delta-mpl.2")
    assert (reply.status_code, reply.json()["code"]) == (404, "unknown_dictionary")
    assert reply.json()["allowed"][0] == "ae-resid-delta-mlp.2"
    assert client.get(f"{API}/dictionaries/..%2F..").status_code == 404
    assert client.get(f"{API}/dictionaries/a b").status_code == 422


def test_a_page_that_is_there_is_not_sent_again(client: TestClient) -> None:
    reply = client.get(f"{DICTIONARY}/features/5")
    assert reply.headers["content-encoding"] == "gzip"
    tag = reply.headers["etag"]
    for given in (tag, f'"other", {tag}', tag.removeprefix("W/")):
        again = client.get(f"{DICTIONARY}/features/5", headers={"If-None-Match": given})
        assert (again.status_code, again.content) == (304, b"")
        assert again.headers["etag"] == tag
    other = client.get(f"{DICTIONARY}/features/6", headers={"If-None-Match": tag})
    assert other.status_code == 200
    plain = client.get(f"{DICTIONARY}/features/5", headers={"Accept-Encoding": "gzip;q=0, br"})
    assert "content-encoding" not in plain.headers
    assert plain.json() == reply.json()


def test_the_server_is_ready_without_torch() -> None:
    code = (
        "import sys; from tests.server.clients import app_with, client_of, API\n"
        "client = client_of(app_with())\n"
        f"for path in ('/', '{API}/model', '{DICTIONARY}/features/5', '{DICTIONARY}'):\n"
        "    assert client.get(path).status_code == 200, path\n"
        "heavy = sorted({'torch', 'pandas', 'matplotlib', 'tiktoken'} & set(sys.modules))\n"
        "assert not heavy, heavy"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)
