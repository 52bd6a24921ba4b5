"""Transformer factors over HTTP are those of the library."""

from pathlib import Path
from typing import Any

import pytest

from neuron_explainer.analysis.factors import FactorExamples, SaliencyFile, importance
from tests.server.clients import API, app_with, client_of
from tests.server.factor_files import N_FACTORS, write_factors


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_factors(tmp_path_factory.mktemp("factors") / "tales")


def ask(folder: Path, path: str) -> Any:
    with client_of(app_with(factors=[folder])) as client:
        return client.get(f"{API}/{path}")


def result_of(python: str) -> Any:
    names: dict[str, Any] = {}
    exec(python, names)
    return names["result"]


def test_the_table_of_a_run(folder: Path) -> None:
    found = importance(FactorExamples.load(folder))
    reply = ask(folder, "factors").json()
    (run,) = reply["runs"]
    assert (run["id"], run["n_factors"]) == ("tales", N_FACTORS)
    assert run["levels"] == {"low": 2, "mid": 1, "high": 1, "silent": 1}
    rows = {row["factor"]: row["importance"] for row in run["factors"]}
    assert rows == result_of(run["python"])
    assert list(rows) == found.strongest()
    assert {str(i) for row in run["factors"] for i in row["words"]} == set(reply["vocab"])


def test_a_factor_has_its_sentences_and_saliencies(folder: Path) -> None:
    examples = FactorExamples.load(folder)
    found = ask(folder, "factors/tales/0").json()
    assert found["level"] == "low"
    result = result_of(found["python"])
    assert found["importance"] == result["importance"]
    for layer, scores in zip(found["layers"], result["scores"], strict=True):
        assert [one["score"] for one in layer["examples"]] == scores
        expected = examples.examples(0, layer["location"])
        assert [one["score"] for one in layer["examples"]] == [each.score for each in expected]
        assert [tuple(one["ids"]) for one in layer["examples"]] == [e.tokens for e in expected]
    (known,) = SaliencyFile(folder).read()
    first, *others = found["layers"][0]["examples"]
    assert (first["saliency"], first["r2"]) == (list(known.weights), known.r2)
    assert [one["saliency"] for one in others] == [None, None]


@pytest.mark.parametrize(
    ("path", "code"),
    [("factors/tales/5", "index_out_of_range"), ("factors/other/0", "unknown_factors")],
)
def test_what_is_not_there(folder: Path, path: str, code: str) -> None:
    reply = ask(folder, path)
    assert (reply.status_code, reply.json()["code"]) == (404, code)


def test_a_server_without_factors_has_an_empty_list() -> None:
    with client_of(app_with()) as client:
        assert client.get(f"{API}/factors").json()["runs"] == []
