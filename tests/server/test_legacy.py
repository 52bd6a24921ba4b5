"""Clients of the original server and of seed 003 get what they got, from our stores."""

import json
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from starlette.testclient import TestClient

from neuron_explainer.analysis.store import ExampleStore
from neuron_explainer.server.msgpack import packed
from tests.server.clients import app_with, client_of
from tests.server.stores import make_stores

NODE = {"dst": "mlp_autoencoder_latent", "layerIndex": 2, "activationIndex": 1}
SHORT = "made-up-model_made-up"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_stores(tmp_path_factory.mktemp("legacy"))


@pytest.fixture(scope="module")
def client(folder: Path) -> TestClient:
    return client_of(app_with([folder]))


@pytest.fixture(scope="module")
def store(folder: Path) -> ExampleStore:
    return ExampleStore.open(folder, "made-up.2")


def test_data_sets(client: TestClient) -> None:
    found = client.post("/neuron_datasets_metadata").json()
    assert [each["shortName"] for each in found] == ["model_heads", SHORT]
    assert found[1]["derivedScalarType"] == "mlp_autoencoder_latent"
    assert found[1].keys() == {
        "shortName",
        "derivedScalarType",
        "userVisibleName",
        "neuronDatasetPath",
    }


def test_a_record(client: TestClient, store: ExampleStore) -> None:
    found = client.post("/neuron_record", json={**NODE, "datasets": ["other", SHORT]}).json()
    assert found.keys() == {"dataset", "maxActivation", "topActivations", "randomSample"}
    record = store[1]
    assert found["maxActivation"] == record.statistics.max
    for sequence, example in zip(found["topActivations"], record.top, strict=True):
        assert [each["scalar"] for each in sequence] == example.activations.tolist()
        assert all(0 <= each["normalizedScalar"] <= 1.001 for each in sequence)
    assert 0 < len(found["randomSample"]) <= 10


@pytest.mark.parametrize(
    "name", ["https://evil.example/data", "/etc/passwd", "../made-up.2.store", "file:///etc", ""]
)
def test_no_path_and_no_url_is_opened(client: TestClient, name: str) -> None:
    wanted: list[tuple[str, dict[str, Any]]] = [
        ("/neuron_record", {"datasets": [name]}),
        ("/existing_explanations", {"explanationDatasets": [name]}),
        ("/existing_explanations", {"neuronDataset": name}),
    ]
    for address, more in wanted:
        reply = client.post(address, json={**NODE, **more})
        assert (reply.status_code, reply.json()["code"]) == (404, "unknown_dataset")
        assert SHORT in reply.json()["allowed"]


def test_explanations(client: TestClient) -> None:
    found = client.post("/existing_explanations", json={**NODE, "neuronDataset": SHORT}).json()
    assert found == [
        {"explanation": "kings and queens of England", "score": 0.4, "datasetName": "published"}
    ]
    reply = client.post("/existing_explanations", json=NODE)
    assert (reply.status_code, reply.json()["code"]) == (400, "one_of_two")


def test_the_model(client: TestClient) -> None:
    assert client.post("/model_info").json() == {
        "modelName": "made-up-model",
        "hasMlpAutoencoder": True,
        "mlpAutoencoderName": "made-up",
        "hasAttentionAutoencoder": False,
        "attentionAutoencoderName": None,
        "nLayers": 3,
    }


def unpacked(data: bytes) -> Any:
    """A reader of its own of MessagePack."""
    value, rest = _unpacked(data)
    assert rest == b""
    return value


def _unpacked(data: bytes) -> tuple[Any, bytes]:
    code, rest = data[0], data[1:]
    if code < 0x80 or code >= 0xE0:
        return (code if code < 0x80 else code - 256), rest
    if code < 0xC0:
        kind = "str" if code >= 0xA0 else "list" if code >= 0x90 else "dict"
        return _content(kind, code & (0x1F if kind == "str" else 0x0F), rest)
    plain = {0xC0: None, 0xC2: False, 0xC3: True}
    if code in plain:
        return plain[code], rest
    numbers = {0xCB: ">d", 0xCF: ">Q", 0xD3: ">q"}
    if code in numbers:
        return struct.unpack(numbers[code], rest[:8])[0], rest[8:]
    kind, size = {
        **{0xC4 + n: ("bytes", 2**n) for n in range(3)},
        **{0xD9 + n: ("str", 2**n) for n in range(3)},
        **{0xDC + n: ("list", 2 ** (n + 1)) for n in range(2)},
        **{0xDE + n: ("dict", 2 ** (n + 1)) for n in range(2)},
    }[code]
    return _content(kind, int.from_bytes(rest[:size], "big"), rest[size:])


def _content(kind: str, length: int, rest: bytes) -> tuple[Any, bytes]:
    if kind in ("str", "bytes"):
        found = rest[:length]
        return (found.decode() if kind == "str" else found), rest[length:]
    parts = []
    for _ in range(length if kind == "list" else 2 * length):
        part, rest = _unpacked(rest)
        parts.append(part)
    return (parts if kind == "list" else dict(zip(parts[::2], parts[1::2], strict=True))), rest


@pytest.mark.parametrize(
    "value",
    [
        [None, True, False, 0, 127, 128, -1, -32, -33, 2**63, -(2**63), 1.5, float("inf")],
        {"a": b"\xff\x00", "é": [], "deep": {"x": [[1]]}},
        ["x" * n for n in (0, 31, 32, 255, 256, 65536)],
        [b"x" * n for n in (0, 255, 256, 65536)],
        [[0] * n for n in (15, 16, 65536)],
        {str(n): n for n in range(20)},
    ],
)
def test_messagepack(value: Any) -> None:
    assert unpacked(packed(value)) == value


def test_messagepack_of_the_specification() -> None:
    # The example on the front page of msgpack.org.
    assert packed({"compact": True, "schema": 0}).hex() == "82a7636f6d70616374c3a6736368656d6100"


def test_a_unit_as_messagepack(client: TestClient, store: ExampleStore) -> None:
    assert client.get("/dictionaries").json() == ["heads", "made-up.1", "made-up.2"]
    reply = client.get("/dictionaries/made-up.2/features/1")
    assert reply.headers["content-type"] == "application/x-msgpack"
    found, record = unpacked(reply.content), store[1]
    assert (found["feature_index"], found["dictionary_name"]) == (1, "made-up.2")
    assert (found["act_times"], found["max_feature_act"]) == (
        record.statistics.count,
        record.statistics.max,
    )
    assert sum(found["feature_activation_histogram"][0]["y"]) == record.histogram.sum()
    samples = [sample for group in found["sample_groups"] for sample in group["samples"]]
    for sample, example in zip(samples, record.all_examples, strict=True):
        assert sample["context"] == example.pieces  # bytes: together they are the exact text
        np.testing.assert_array_equal(np.float32(sample["feature_acts"]), example.activations)
    assert found["interpretation"]["text"] == "kings and queens of England"
    assert found["logits"] is None


def test_random_is_never_dead(client: TestClient) -> None:
    units = {
        unpacked(client.get("/dictionaries/made-up.2/features/random").content)["feature_index"]
        for _ in range(30)
    }
    assert 0 not in units  # the dead one
    assert len(units) > 1


@pytest.mark.parametrize(
    ("address", "status"),
    [
        ("made-up.2/features/x", 400),
        ("made-up.2/features/-1", 400),
        ("made-up.2/features/²", 400),
        ("made-up.2/features/99", 404),
        ("none/features/1", 404),
    ],
)
def test_addresses_that_are_wrong(client: TestClient, address: str, status: int) -> None:
    reply = client.get(f"/dictionaries/{address}")
    assert reply.status_code == status
    assert json.loads(reply.content)["status"] == status
