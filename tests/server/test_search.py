"""Finding units: the table, and the search, agree with the store."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from starlette.testclient import TestClient

from neuron_explainer.analysis.store import COLUMNS, ExampleStore
from neuron_explainer.analysis.store_format import Label
from neuron_explainer.server import search, shapes
from neuron_explainer.server.limits import Limits
from tests.analysis.examples import VOCABULARY
from tests.server.clients import API, app_with, client_of
from tests.server.stores import HOSTILE, N_UNITS, make_stores
from tests.server.test_reading import fitting, result_of

TABLE = f"{API}/dictionaries/made-up.2/features"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_stores(tmp_path_factory.mktemp("search"))


@pytest.fixture(scope="module")
def store(folder: Path) -> Iterator[ExampleStore]:
    with ExampleStore.open(folder, "made-up.2") as found:
        yield found


@pytest.fixture(scope="module")
def client(folder: Path) -> TestClient:
    return client_of(app_with([folder]))


def units_of(reply: Any) -> list[int]:
    assert reply.status_code == 200, reply.text
    return [item["unit"] for item in reply.json()["items"]]


@pytest.mark.parametrize("sort", COLUMNS)
@pytest.mark.parametrize("order", ["asc", "desc"])
def test_sorted(client: TestClient, store: ExampleStore, sort: str, order: str) -> None:
    found = units_of(client.get(TABLE, params={"sort": sort, "order": order}))
    assert found == store.sort(sort, descending=order == "desc").tolist()


def test_rows_hold_what_the_store_holds(client: TestClient, store: ExampleStore) -> None:
    content = fitting(shapes.FeatureRows, client.get(TABLE).json())
    assert content["total"] == N_UNITS
    for row in content["items"]:
        record = store[row["unit"]]
        assert row["density"] == record.statistics.density
        assert row["label"] == (record.label or None)
        if record.alive:
            example = record.all_examples[0]
            assert row["peek"]["ids"] == example.tokens.tolist()
            assert dict(row["peek"]["acts"])[row["peek"]["peak"]] == example.value
        else:
            assert row["peek"] is None


def test_of_heads_the_row_of_the_peak_is_shown(client: TestClient, folder: Path) -> None:
    peek = client.get(f"{API}/dictionaries/heads/features").json()["items"][1]["peek"]
    with ExampleStore.open(folder, "heads") as heads:
        example = heads[1].all_examples[0]
    row = example.pattern[example.query]
    assert peek["peak"] == example.query
    assert {place: np.float32(value) for place, value in peek["acts"]} == {
        place: row[place] for place in np.flatnonzero(row)
    }


def test_scores_come_first_and_what_has_none_last(client: TestClient) -> None:
    found = units_of(client.get(TABLE, params={"sort": "score"}))
    assert found == [2, 1, 0, 3, 4, 5, 6, 7]
    assert units_of(client.get(TABLE, params={"sort": "score", "order": "asc"}))[:2] == [1, 2]


def test_filters(client: TestClient, store: ExampleStore) -> None:
    density = store.column("density")
    middle = float(np.median(density))
    low = units_of(client.get(TABLE, params={"density_max": middle}))
    assert low == np.flatnonzero(density <= middle).tolist()
    assert units_of(client.get(TABLE, params={"alive": False})) == store.dead.tolist()
    assert units_of(client.get(TABLE, params={"alive": True})) == store.alive.tolist()
    assert units_of(client.get(TABLE, params={"q": "king"})) == [1, 2, 3]
    assert units_of(client.get(TABLE, params={"q": "kings"})) == [1]
    assert units_of(client.get(TABLE, params={"q": "nothing"})) == []
    at = units_of(client.get(TABLE, params={"token": "KING"}))
    peaks = {
        unit
        for unit in store.alive.tolist()
        for e in store[unit].all_examples[:3]
        if e.pieces[e.query] == b" king"
    }
    assert at == sorted(peaks)


def test_pages_follow_each_other(client: TestClient) -> None:
    found: list[int] = []
    cursor: dict[str, str] = {}
    while True:
        content = client.get(TABLE, params={"limit": "3", "sort": "max", **cursor}).json()
        found += [item["unit"] for item in content["items"]]
        if content["next_cursor"] is None:
            break
        cursor = {"cursor": content["next_cursor"]}
    assert found == units_of(client.get(TABLE, params={"sort": "max"}))


@pytest.mark.parametrize(
    "params",
    [
        {"sort": "max", "limit": "3", "cursor": "2"},
        {"sort": "max", "order": "asc", "alive": "true"},
        {"order": "desc", "density_min": "0.001"},
        {"sort": "score", "q": "king"},
        {"token": " king", "alive": "true", "sort": "count"},
    ],
)
def test_the_python_of_the_table(client: TestClient, params: dict[str, str]) -> None:
    reply = client.get(TABLE, params=params)
    assert result_of(reply.json()["python"]).tolist() == units_of(reply)


@pytest.mark.parametrize(
    ("params", "code"),
    [
        ({"sort": "beauty"}, "unknown_sort"),
        ({"order": "up"}, "invalid_request"),
        ({"limit": "201"}, "invalid_request"),
        ({"density_min": "nan"}, "invalid_request"),
        ({"density_min": "inf"}, "invalid_request"),
        ({"cursor": "-1"}, "invalid_request"),
        ({"q": "x" * 201}, "invalid_request"),
    ],
)
def test_requests_that_are_wrong(client: TestClient, params: dict[str, str], code: str) -> None:
    reply = client.get(TABLE, params=params)
    assert (reply.status_code, reply.json()["code"]) == (422, code)
    if code == "unknown_sort":
        assert reply.json()["allowed"] == list(search.SORTS)
    if "order" in params:
        assert reply.json()["allowed"] == ["asc", "desc"]


# --- all dictionaries ---


def hits(client: TestClient, **params: str) -> list[tuple[str, int]]:
    reply = client.get(f"{API}/search", params=params)
    assert reply.status_code == 200, reply.text
    return [(x["dictionary"], x["unit"]) for x in fitting(shapes.Hits, reply.json())["items"]]


def test_labels_are_found_by_their_words(stores: Path) -> None:
    client = client_of(app_with([stores]))
    assert hits(client, q="king") == [("made-up.2", n) for n in (2, 3, 1)]  # whole words first
    assert hits(client, q="king", limit="1") == [("made-up.2", 2)]
    assert hits(client, q="england queens") == [("made-up.2", 1)]
    assert hits(client, q="king", dict="made-up.1") == []
    with ExampleStore.open(stores, "made-up.1") as other:
        other.workspace.set_label(5, "king of my own")
    assert hits(client, q="king")[0] == ("made-up.1", 5)
    assert hits(client, q="king", dict="made-up.1") == [("made-up.1", 5)]
    content = client.get(f"{API}/search", params={"q": "king"}).json()
    assert content["items"][0]["why"] == "label by user"


@pytest.mark.parametrize("text", HOSTILE)
def test_hostile_labels_are_found_and_come_back_as_they_are(client: TestClient, text: str) -> None:
    content = client.get(f"{API}/search", params={"q": text}).json()
    known = [item["label"] for item in content["items"]]
    assert known == [] or text.strip() in [label.strip() for label in known]


def test_units_are_found_by_their_token(client: TestClient, store: ExampleStore) -> None:
    found = hits(client, q="king", mode="token")
    assert {unit for name, unit in found if name == "made-up.2"} == set(
        store.units_at_token("king").tolist()
    )
    assert {name for name, _ in found} == {"heads", "made-up.1", "made-up.2"}
    texts = [piece.decode(errors="replace") for piece in VOCABULARY]
    scores = [
        [x["score"] for x in client.get(f"{API}/search", params=params).json()["items"]]
        for params in ({"q": text, "mode": "token"} for text in texts)
    ]
    assert any(len(set(each)) > 1 for each in scores)
    assert all(each == sorted(each, reverse=True) for each in scores)


def test_a_search_by_token_that_takes_too_long_says_so(folder: Path) -> None:
    client = client_of(app_with([folder], limits=Limits(token_search_seconds=0)))
    content = client.get(f"{API}/search", params={"q": "king", "mode": "token"}).json()
    assert not content["complete"]
    assert {item["dictionary"] for item in content["items"]} == {"heads"}


def test_units_are_found_by_number(client: TestClient) -> None:
    assert hits(client, q="7", mode="id") == [("made-up.1", 7), ("made-up.2", 7)]
    assert hits(client, q="made-up.2/7", mode="id") == [("made-up.2", 7)]
    assert hits(client, q="UP/1 #3", mode="id") == [("made-up.1", 3)]
    assert hits(client, q="99999", mode="id") == hits(client, q="word", mode="id") == []


def test_everything_is_numbers_then_labels_then_tokens(client: TestClient) -> None:
    found = hits(client, q="7", mode="all")
    assert found[:2] == hits(client, q="7", mode="id")
    labels, tokens = (hits(client, q="king", mode=mode) for mode in ("label", "token"))
    assert labels
    assert set(tokens) - set(labels)
    assert hits(client, q="king", mode="all") == list(dict.fromkeys([*labels, *tokens]))[:50]
    assert hits(client, q="king", mode="all", limit="1") == labels[:1]


def test_peaks_are_those_of_the_records(folder: Path) -> None:
    for name in ("made-up.2", "heads"):
        with ExampleStore.open(folder, name) as found:
            for unit in range(len(found)):
                examples = [e for e in found[unit].all_examples if e.group != "inactive"][:3]
                expected = [int(e.tokens[e.query]) for e in examples]
                peaks = found.peak_tokens[unit]
                assert peaks[peaks >= 0].tolist() == expected


def test_first_labels(stores: Path) -> None:
    with ExampleStore.open(stores, "made-up.2") as found:
        found.workspace.set_labels([Label(1, "mine", "user"), Label(7, "too", "user", 0.5)])
        labels = found.first_labels(range(N_UNITS))
        assert {unit: label.text for unit, label in labels.items()} == {
            unit: found[unit].label for unit in (1, 2, 3, 4, 7)
        }
        assert labels[1].text == "mine"
