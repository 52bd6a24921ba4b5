"""The committed OpenAPI is the server's, and no request that it allows or forbids makes the server fail.

python -m tests.server.test_openapi        # writes the file anew, after a change that is meant
"""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import quote

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from starlette.testclient import TestClient

from neuron_explainer.server import app as server_app
from tests.server.clients import app_with, client_of
from tests.server.stores import HOSTILE, make_stores

FILE = Path(server_app.__file__).with_name("openapi.json")
METHODS = ("get", "post", "put", "delete")
IDS = ["made-up.1", "made-up.2", "heads", "none", "..", "a b", "x" * 200, ".", "%2e%2e"]
TEXT = st.one_of(
    st.sampled_from(
        [*HOSTILE, "", " ", "king", "user", "0", "-1", "1e9", "nan", "true", "é\ud7ff"]
    ),
    st.text(st.characters(exclude_categories=["Cs"]), max_size=30),
)
JSON_VALUES = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**70), 2**70) | st.floats(allow_nan=False) | TEXT,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXT, inner, max_size=3),
    max_leaves=6,
)


def fuzzed(n_examples: int) -> settings:
    """The same examples in every run, however long one takes."""
    return settings(
        max_examples=n_examples,
        deadline=None,
        database=None,
        derandomize=True,
        suppress_health_check=list(HealthCheck),
    )


def schema() -> dict[str, Any]:
    found: dict[str, Any] = app_with(["tiny-tales/ae-resid-delta-mlp/2"]).openapi()
    return found


def in_order(part: Any) -> Any:
    """Without the order of alternatives: typing gives equal Literals the order of the first it saw."""
    if isinstance(part, dict):
        return {
            name: sorted(value, key=str) if name == "enum" else in_order(value)
            for name, value in part.items()
        }
    return [in_order(each) for each in part] if isinstance(part, list) else part


def text_of(found: dict[str, Any]) -> str:
    return json.dumps(in_order(found), indent=1, sort_keys=True, ensure_ascii=False) + "\n"


def test_the_committed_openapi_is_that_of_the_server() -> None:
    command = "python -m tests.server.test_openapi"
    assert FILE.read_text("utf-8") == text_of(schema()), f"run {command} if the change is meant"


def operations(found: dict[str, Any]) -> Iterator[tuple[str, str, dict[str, Any]]]:
    for path, methods in found["paths"].items():
        for method in METHODS:
            if method in methods:
                yield method, path, methods[method]


def test_every_operation_is_described() -> None:
    found = schema()
    ids = [operation["operationId"] for _, _, operation in operations(found)]
    assert len(ids) == len(set(ids)) > 10
    for method, path, operation in operations(found):
        assert operation["description"].strip().endswith((".", "again.")), path
        assert operation["x-access"] in ("public", "read", "write", "compute"), path
        described = operation["responses"].get("422", {}).get("content", {})
        assert "ProblemReply" in str(described), (method, path)


# --- requests of every kind ---


def resolve(found: dict[str, Any], part: dict[str, Any]) -> dict[str, Any]:
    while "$ref" in part:
        part = found["components"]["schemas"][part["$ref"].rpartition("/")[2]]
    return part


def values_of(
    found: dict[str, Any], part: dict[str, Any], depth: int = 0
) -> st.SearchStrategy[Any]:
    """Values that mostly fit a schema."""
    part = resolve(found, part)
    if "anyOf" in part:
        return st.one_of([values_of(found, each, depth) for each in part["anyOf"]])
    if "enum" in part or "const" in part:
        return st.sampled_from(part.get("enum") or [part["const"]])
    kind = part.get("type")
    if kind == "integer":
        return st.integers(part.get("minimum", -5), min(part.get("maximum", 12), 12))
    if kind == "number":
        return st.floats(-10, 10)
    if kind == "boolean":
        return st.booleans()
    if kind == "array" and depth < 4:
        return st.lists(values_of(found, part.get("items", {}), depth + 1), max_size=3)
    if kind == "object" and "properties" in part and depth < 4:
        inner = {
            name: values_of(found, each, depth + 1) for name, each in part["properties"].items()
        }
        needed = set(part.get("required", ()))
        return st.fixed_dictionaries(
            {name: inner[name] for name in inner if name in needed},
            optional={name: inner[name] for name in inner if name not in needed},
        )
    if kind == "string":
        return st.sampled_from(IDS) | TEXT if "pattern" in part else TEXT
    return JSON_VALUES


@st.composite
def requests(draw: st.DrawFn, found: dict[str, Any], operation: Any) -> dict[str, Any]:
    method, path, content = operation
    query = {}
    for parameter in content.get("parameters", ()):
        good = values_of(found, parameter["schema"])
        value = draw(good | TEXT)
        if parameter["in"] == "path":
            text = draw(st.sampled_from(IDS)) if parameter["name"] == "d" else str(value)
            path = path.replace("{" + parameter["name"] + "}", quote(text, safe="") or "%20")
        elif parameter["in"] == "query" and (parameter.get("required") or draw(st.booleans())):
            query[parameter["name"]] = str(value).lower() if isinstance(value, bool) else str(value)
    request: dict[str, Any] = {"method": method.upper(), "url": path, "params": query}
    body = content.get("requestBody", {}).get("content", {})
    if "application/json" in body:
        good = values_of(found, body["application/json"]["schema"])
        value = draw(st.one_of(good, good, good, JSON_VALUES))
        request["content"] = json.dumps(value).encode()
        request["headers"] = {"Content-Type": "application/json"}
    elif body:
        lines = draw(st.lists(JSON_VALUES.map(json.dumps) | TEXT, max_size=4))
        request["content"] = "\n".join(lines).encode()
        request["headers"] = {"Content-Type": "application/x-ndjson"}
    return request


@pytest.fixture(scope="module")
def client(tmp_path_factory: pytest.TempPathFactory) -> TestClient:
    return client_of(app_with([make_stores(tmp_path_factory.mktemp("any"))]))


FOUND = schema()
READS = [each for each in operations(FOUND) if each[2]["x-access"] != "compute"]
COMPUTES = [each for each in operations(FOUND) if each[2]["x-access"] == "compute"]


def check(client: TestClient, request: dict[str, Any], allowed: tuple[int, ...] = ()) -> None:
    reply = client.request(**request)
    assert reply.status_code < 500 or reply.status_code in allowed, (request, reply.text)
    if reply.status_code >= 400:
        assert reply.headers["content-type"] == "application/problem+json", request
        problem = reply.json()
        assert problem["status"] == reply.status_code
        assert problem["code"]
        assert problem["detail"]


@pytest.mark.parametrize("operation", READS, ids=lambda each: each[2]["operationId"])
@fuzzed(20)
@given(data=st.data())
def test_no_request_makes_the_server_fail(
    client: TestClient, operation: Any, data: st.DataObject
) -> None:
    check(client, data.draw(requests(FOUND, operation)))


@pytest.mark.parametrize(
    "path", ["/", "/%00", "/api/v1/%ff", "/..%2f..", "/api/v1/features?x=%ff%00"]
)
def test_addresses_that_are_none(client: TestClient, path: str) -> None:
    for method in ("GET", "POST", "DELETE", "PATCH", "HEAD", "TRACE", "OPTIONS"):
        reply = client.request(method, path, headers={"Content-Type": "application/json"})
        assert reply.status_code < 500, (method, path)


@fuzzed(60)
@given(data=st.data())
def test_without_a_model_every_computation_says_so(client: TestClient, data: st.DataObject) -> None:
    operation = data.draw(st.sampled_from(COMPUTES))
    check(client, data.draw(requests(FOUND, operation)), allowed=(501, 503))


if __name__ == "__main__":
    FILE.write_text(text_of(schema()), "utf-8")
    print(f"{FILE} has {len(list(operations(schema())))} operations")
