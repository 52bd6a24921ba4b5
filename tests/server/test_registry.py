"""Stores by id: opened when they are asked for, closed when memory is short, opened again when replaced."""

import os
import shutil
import threading
from pathlib import Path

import pytest
from starlette.testclient import TestClient

from neuron_explainer.analysis.store import ExampleStore
from neuron_explainer.analysis.store_format import write_store
from neuron_explainer.errors import CheckpointError, InputError, SourceError
from neuron_explainer.server.problems import Problem
from neuron_explainer.server.registry import Registry, not_remote
from tests.analysis.examples import VOCABULARY, make_collected, make_corpus
from tests.server.clients import API, app_with, client_of
from tests.server.stores import N_UNITS


def test_ids(stores: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    shutil.copytree(stores, other)
    registry = Registry([stores, other / "heads.store", stores / "heads.store"])
    assert [shelf.id for shelf in registry] == ["heads", "made-up.1", "made-up.2", "heads-2"]
    assert registry.model == "made-up-model"
    assert not_remote("https://evil.example/model") is not_remote("hf:evil/model") is None
    assert not_remote("gpt2-small") == "gpt2-small"
    strange = stores / "naïve näme (1)é.store"
    shutil.copy(stores / "heads.store", strange)
    assert next(iter(Registry([strange]))).id == "na-ve-n-me--1--"
    hidden = stores / "....store"
    shutil.copy(stores / "heads.store", hidden)
    assert next(iter(Registry([hidden]))).id == "store"
    with pytest.raises(SourceError, match="no store of examples"):
        Registry([tmp_path / "missing"])
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match="holds no store of examples"):
        Registry([tmp_path / "empty"])


def test_an_id_is_looked_up_and_is_no_path(stores: Path) -> None:
    registry = Registry([stores])
    for id in ("../stores/heads", "heads.store", str(stores / "heads"), "", "Heads", "heads\0"):
        with pytest.raises(Problem) as caught:
            registry[id]
        assert (caught.value.status, caught.value.code) == (404, "unknown_dictionary")


def test_a_store_that_is_open_is_taken_as_it_is(stores: Path) -> None:
    with ExampleStore.open(stores, "heads") as store:
        registry = Registry([store])
        with registry.reading("heads") as found:
            assert found is store


def test_layers_of_the_same_site_are_neighbours(stores: Path) -> None:
    registry = Registry([stores])
    after = registry.beside(registry["made-up.1"], 1)
    assert after is not None
    assert after.id == "made-up.2"
    assert registry.beside(after, 1) is None
    assert registry.beside(registry["heads"], 1) is None


def opened(registry: Registry) -> list[str]:
    return [shelf.id for shelf in registry if shelf.store is not None]


def test_stores_beyond_the_budget_are_closed(stores: Path) -> None:
    registry = Registry([stores], budget=1)
    assert opened(registry) == []
    with registry.reading("made-up.1") as first:
        with registry.reading("made-up.2") as second:
            assert opened(registry) == ["made-up.2"]
            assert first[1].unit == second[1].unit == 1  # the first one is still read
        assert first.column("max")[1]
    with pytest.raises(Exception, match="closed"):
        first[2]
    plenty = Registry([stores])
    assert len(opened(plenty)) == 3
    plenty.close()
    assert opened(plenty) == []
    with plenty.reading("heads") as store:
        assert len(store) == 4


def replace_store(stores: Path, n_units: int, content: bytes = b"") -> None:
    """Another collation of the same text takes the place of a store, or of what is left of it."""
    if content:
        (stores / "made-up.2.store").write_bytes(content)
    with ExampleStore.open(stores, "made-up.2") as old:
        tokens = old.tokens
    found = make_collected(
        make_corpus(800), n_units, seed=9, name="made-up/2", location="2/resid.torso.delta_mlp"
    )
    write_store(stores / "made-up.2.store", found, tokens)


def test_a_store_that_is_replaced_is_opened_again(stores: Path) -> None:
    client = client_of(app_with([stores]))
    address = f"{API}/dictionaries/made-up.2/features/9"
    assert client.get(address).status_code == 404
    before = client.get(f"{API}/dictionaries/made-up.2/features/1")
    replace_store(stores, 12)
    assert client.get(address).status_code == 200
    after = client.get(
        f"{API}/dictionaries/made-up.2/features/1",
        headers={"If-None-Match": before.headers["etag"]},
    )
    assert after.status_code == 200
    assert after.json()["examples"] != before.json()["examples"]
    rows = {row["id"]: row["n"] for row in client.get(f"{API}/model").json()["dictionaries"]}
    assert rows["made-up.2"] == 12


def test_a_store_that_is_replaced_while_it_is_read(stores: Path) -> None:
    registry = Registry([stores])

    def replaced() -> None:
        with registry.reading("made-up.2") as store:
            replace_store(stores, 12)
            store[1]

    with pytest.raises(CheckpointError, match="has changed"):
        replaced()
    with registry.reading("made-up.2") as store:
        assert len(store) == 12


def problem(client: TestClient, address: str) -> tuple[int, str]:
    reply = client.get(f"{API}{address}")
    return reply.status_code, reply.json()["code"]


def test_a_store_that_is_gone_or_damaged_is_not_available(
    stores: Path, caplog: pytest.LogCaptureFixture
) -> None:
    client = client_of(app_with([stores]))
    path = stores / "made-up.2.store"
    content = path.read_bytes()
    path.unlink()
    gone = 503, "store_unavailable"
    assert problem(client, "/dictionaries/made-up.2/features/1") == gone
    assert client.get(f"{API}/dictionaries/made-up.1").status_code == 200
    path.write_bytes(content[:-100])
    assert problem(client, "/dictionaries/made-up.2") == gone
    reply = client.get(f"{API}/model")  # the others are shown
    assert reply.status_code == 200
    assert [row["id"] for row in reply.json()["dictionaries"]] == ["heads", "made-up.1"]
    assert client.get(f"{API}/search?q=king").json()["items"] == []
    assert client.get(f"{API}/bookmarks").status_code == 200
    assert [record.getMessage()[:38] for record in caplog.records] == [
        "the store of made-up.2 cannot be opene"
    ]
    replace_store(stores, 12, content)
    found = client.get(f"{API}/dictionaries/made-up.2").json()
    assert (found["n"], found["n_alive"]) == (12, 11)


def test_a_text_that_was_changed_is_noticed(stores: Path) -> None:
    client = client_of(app_with([stores]))
    path = stores / "tokens" / "tokens.bin"
    content = path.read_bytes()
    assert client.get(f"{API}/dictionaries/made-up.2/features/1").status_code == 200
    path.write_bytes(bytes(len(content)))
    assert problem(client, "/dictionaries/made-up.2/features/1") == (503, "store_unavailable")
    path.write_bytes(content)
    os.utime(path)
    assert client.get(f"{API}/dictionaries/made-up.2/features/1").status_code == 200


def test_many_threads_and_little_memory(stores: Path) -> None:
    registry = Registry([stores], budget=1)
    errors: list[BaseException] = []

    def read(seed: int) -> None:
        try:
            for n in range(40):
                with registry.reading(("made-up.1", "made-up.2")[(n + seed) % 2]) as store:
                    assert store[n % N_UNITS].unit == n % N_UNITS
        except BaseException as error:  # looked at by the test
            errors.append(error)

    threads = [threading.Thread(target=read, args=(n,)) for n in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors
    assert all(not shelf.readers for shelf in registry)


def test_vocabulary_of_the_fixture_is_hostile() -> None:
    assert b"\x1b[2J" in VOCABULARY
