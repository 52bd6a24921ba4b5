"""Files to keep hold what the store holds, and nothing in them runs."""

import csv
import io
import json
import sys
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


def test_a_parquet_table(client: TestClient, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    parquet = pytest.importorskip("pyarrow.parquet")
    with ExampleStore.open(folder, "made-up.2") as store:
        store.workspace.set_label(0, "=1+1")
        reply = client.get(f"{API}/export/made-up.2.parquet")
        assert reply.headers["content-type"] == "application/vnd.apache.parquet"
        assert reply.headers["content-disposition"] == 'attachment; filename="made-up.2.parquet"'
        found = parquet.read_table(io.BytesIO(reply.content)).to_pydict()
        assert list(found) == ["unit", *COLUMNS, "label"]
        assert found["unit"] == list(range(N_UNITS))
        for name in COLUMNS:
            assert found[name] == store.column(name).tolist()
        labels = store.first_labels(range(N_UNITS))
        assert found["label"] == [
            labels[unit].text if unit in labels else None for unit in range(N_UNITS)
        ]
    assert found["label"][0] == "=1+1"
    assert client.get(f"{API}/export/none.parquet").status_code == 404
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    missing = client.get(f"{API}/export/made-up.2.parquet")
    assert (missing.status_code, missing.json()["code"]) == (501, "missing_extra")
