"""Files to keep hold what the store holds, and nothing in them runs."""

import csv
import io
import json
from pathlib import Path

import pytest
from starlette.testclient import TestClient

from neuron_explainer.analysis.store import COLUMNS, ExampleStore
from tests.server.clients import API, app_with, client_of
from tests.server.stores import HOSTILE, N_UNITS, make_stores


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_stores(tmp_path_factory.mktemp("export"))


@pytest.fixture(scope="module")
def client(folder: Path) -> TestClient:
    return client_of(app_with([folder]))


def test_a_unit(client: TestClient, folder: Path) -> None:
    page = client.get(f"{API}/export/made-up.2/4.html")
    assert page.headers["content-disposition"] == 'attachment; filename="made-up.2-4.html"'
    with ExampleStore.open(folder, "made-up.2") as store:
        assert page.text == store[4].html()
    assert "<script" not in page.text
    found = client.get(f"{API}/export/made-up.2/4.json")
    assert found.headers["content-disposition"].startswith("attachment")
    shown = client.get(f"{API}/dictionaries/made-up.2/features/4").json()
    assert json.loads(found.content).items() <= shown.items()
    assert client.get(f"{API}/export/made-up.2/99.html").status_code == 404
    assert client.get(f"{API}/export/none/1.json").status_code == 404
    assert client.get(f"{API}/export/made-up.2/1.exe").status_code == 404


def test_a_table(client: TestClient, folder: Path) -> None:
    with ExampleStore.open(folder, "made-up.2") as store:
        for unit, text in enumerate(["=1+1", "@SUM(A1)", "-2", HOSTILE[3]]):
            store.workspace.set_label(unit, text)
        reply = client.get(f"{API}/export/made-up.2.csv")
        assert reply.headers["content-type"].startswith("text/csv")
        rows = list(csv.DictReader(io.StringIO(reply.text, newline="")))
        assert len(rows) == N_UNITS
        for unit, row in enumerate(rows):
            for name in COLUMNS:
                assert float(row[name]) == store.column(name)[unit]
    assert [row["label"] for row in rows[:4]] == ["'=1+1", "'@SUM(A1)", "'-2", HOSTILE[3]]
    assert client.get(f"{API}/export/none.csv").status_code == 404
