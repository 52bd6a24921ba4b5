"""Explanations and scores go to Neuronpedia's, OpenAI's and delphi's files, and come back."""

import gzip
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from neuron_explainer.analysis.explaining import scorers
from neuron_explainer.analysis.explaining.explanation import (
    Cost,
    Explanation,
    Failure,
    Prediction,
)
from neuron_explainer.analysis.explaining.interchange import (
    FORMATS,
    read_delphi,
    read_foreign,
    read_neuronpedia_explanations,
    read_simulation_results,
    set_texts,
    simulated_texts,
    simulation_results,
    write_delphi,
    write_neuronpedia_explanations,
    write_simulation_results,
)
from neuron_explainer.analysis.explaining.scorers import JudgedBy, Text
from neuron_explainer.errors import CheckpointError, InputError, SourceError
from tests.analysis.explaining.made import made_set

SET = made_set(10, 5, 5)
WORDS = "the word “the” — \u2028 and </script> "
EXPLANATION = Explanation(
    "made", 7, WORDS, "marked", "gpt", "abc", 3, SET.ids("train"), {"rule": "x"}, Cost(0, 50, 9)
)
BY = JudgedBy("gpt", "def", Cost(8, 100, 20))


def predict(texts: list[Text] | Any) -> list[Prediction]:
    found: list[Prediction] = [0.9 if 0 in text.tokens else 0.2 for text in texts]
    found[0], found[1] = Failure("failed", "late"), None
    return found


def values(texts: Any) -> list[Any]:
    found: list[Any] = [10 * (text.tokens == 0) for text in texts]
    found[0] = Failure("unparsable", "what?")
    return found


TEXTS = set_texts(SET)
SCORES = (
    scorers.detection(SET, predict, BY),
    scorers.fuzzing(SET, predict, BY),
    scorers.simulation(SET, values, BY),
)


def test_neuronpedia_and_back(tmp_path: Path) -> None:
    other = replace(EXPLANATION, unit=9, model="")
    found = [(EXPLANATION, SCORES), (other, ())]
    (path,) = write_neuronpedia_explanations(found, tmp_path, model="tiny", source="2-set")
    row = json.loads(gzip.decompress(path.read_bytes()).splitlines()[0])
    assert (row["modelId"], row["layer"], row["index"]) == ("tiny", "2-set", "7")
    assert (row["description"], row["typeName"], row["explanationModelName"]) == (
        WORDS,
        "marked",
        "gpt",
    )
    assert row["scoreV1"] == SCORES[0].value
    assert row["promptTokens"] == 50
    back = read_neuronpedia_explanations(tmp_path, "made")
    assert back == [(EXPLANATION, SCORES), (other, ())]
    assert read_neuronpedia_explanations(path, "made") == back
    with pytest.raises(
        CheckpointError, match=r"expected the number of a unit from 0 to 8, found '9'"
    ):
        read_neuronpedia_explanations(path, "made", 9)


def test_rows_that_others_wrote(tmp_path: Path) -> None:
    who = {"modelId": "gpt2-small", "layer": "6-res-jb", "description": "x"}
    rows: list[dict[str, Any]] = [
        {**who, "index": "5", "typeName": "oai_token-act-pair", "explanationModelName": "gpt-4o-mini",
         "id": "abc", "authorId": "me", "scoreV1": 0.5, "examples": "many", "seed": "x", "payload": [],
         "scores": [3, {"explanationScoreTypeName": "recall_alt", "value": 0.7, "jsonDetails": "{}"},
                    {"explanationScoreTypeName": "eleuther_fuzz", "value": None, "jsonDetails": None}]},
        {**who, "index": "6"},
    ]  # fmt: skip
    path = tmp_path / "batch-0.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    (first, scores), (second, none) = read_neuronpedia_explanations(path)
    assert first == Explanation("", 5, "x", "oai_token-act-pair", "gpt-4o-mini")
    assert [(score.name, score.value) for score in scores] == [
        ("recall_alt", 0.7),
        ("eleuther_fuzz", None),
    ]
    assert (second.method, none) == ("neuronpedia", ())
    path.write_text(json.dumps({**who, "index": "-1"}))
    with pytest.raises(CheckpointError, match="number of a unit"):
        read_neuronpedia_explanations(path)
    with pytest.raises(SourceError, match="holds no explanations"):
        read_neuronpedia_explanations(tmp_path / "..")


def test_openai_and_back(tmp_path: Path) -> None:
    texts = simulated_texts(SET, values([Text(each) for each in SET.test]))
    assert len(texts) == 19  # that without a reply is left out
    results = simulation_results(2, 7, [(EXPLANATION, SCORES)], {EXPLANATION.key: texts})
    (path,) = write_simulation_results([results], tmp_path)
    assert path == tmp_path / "2" / "7.jsonl"
    ((explanation, scores),) = read_simulation_results(path, "made")
    assert (explanation.unit, explanation.text, explanation.method) == (7, WORDS, "openai")
    assert [(s.name, s.metric, s.value) for s in scores] == [
        ("simulation", "Pearson r", SCORES[2].value)
    ]
    assert read_simulation_results(tmp_path / "2", "made") == [(explanation, scores)]
    kept = json.loads(path.read_text())["scored_explanations"][0]["scored_simulation"]
    assert kept["rsquared_score"] == SCORES[2].details["uncentred R²"]
    assert len(kept["scored_sequence_simulations"]) == 19
    names = {"sequence_simulation", "simulation"}
    assert kept["scored_sequence_simulations"][0].keys() & names == {"sequence_simulation"}
    (path,) = write_simulation_results(
        [results], tmp_path / "old", library="automated-interpretability"
    )
    kept = json.loads(path.read_text())["scored_explanations"][0]["scored_simulation"]
    assert kept["scored_sequence_simulations"][0].keys() & names == {"simulation"}
    assert read_simulation_results(path, "made") == [(explanation, scores)]  # both are read
    with pytest.raises(InputError, match="expected explanations of unit 8, found one of 7"):
        simulation_results(2, 8, [(EXPLANATION, ())])
    with pytest.raises(SourceError, match="holds no explanations of OpenAI's"):
        read_simulation_results(tmp_path)


def test_delphi_and_back(tmp_path: Path) -> None:
    paths = write_delphi([(EXPLANATION, SCORES, TEXTS)], tmp_path, "layers.2.mlp")
    assert [path.relative_to(tmp_path).as_posix() for path in paths] == [
        "explanations/layers.2.mlp_latent7.txt",
        "scores/detection/layers.2.mlp_latent7.txt",
        "scores/fuzz/layers.2.mlp_latent7.txt",
    ]
    rows = json.loads(paths[1].read_text())
    assert [*rows[0]] == [
        *("str_tokens", "activations", "distance", "activating", "prediction", "probability"),
        "correct",
    ]
    assert [row["prediction"] for row in rows[:2]] == [None, None]
    assert {row["distance"] for row in rows} == {-1, 1, 2, 3, 4, 5}
    found = read_delphi(tmp_path, "made")
    ((explanation, scores),) = found["layers.2.mlp"]
    assert explanation == Explanation("made", 7, WORDS, "delphi")
    for mine, theirs in zip(SCORES, scores, strict=False):
        assert theirs.name == mine.name
        assert theirs.value == mine.value
        assert mine.counts is not None is not theirs.counts
        assert theirs.counts.judged == mine.counts.judged == 18
        assert theirs.counts.unparsable == mine.counts.failed + mine.counts.unparsable == 2
        assert theirs.details["F1"] == mine.details["F1"]
    assert read_delphi(tmp_path, hookpoint="other") == {}
    assert write_delphi([(EXPLANATION, SCORES, None)], tmp_path / "x", "h") == [
        tmp_path / "x" / "explanations" / "h_latent7.txt"
    ]
    with pytest.raises(InputError, match="give those of the set that was scored"):
        write_delphi([(EXPLANATION, SCORES, set_texts(made_set(2, 2)))], tmp_path / "y", "h")
    with pytest.raises(InputError, match="delphi's name of a place"):
        write_delphi([], tmp_path, "layers/2")


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        ("3", "expected a list of texts"),
        ("[3]", "text 0: expected an object"),
        ('[{"distance": 1}]', "missing are activating, prediction"),
        ('[{"distance": null, "activating": true, "prediction": true}]', "expected a quantile"),
        (
            '[{"distance": 1, "activating": 1, "prediction": true}]',
            "expected true or false, found 1",
        ),
        ("[", "not valid JSON"),
    ],
)
def test_delphi_files_that_are_none(tmp_path: Path, content: str, reason: str) -> None:
    write_delphi([(EXPLANATION, SCORES, TEXTS)], tmp_path, "h")
    (tmp_path / "scores" / "fuzz" / "h_latent7.txt").write_text(content)
    with pytest.raises(CheckpointError, match=reason):
        read_delphi(tmp_path)
    (tmp_path / "explanations" / "h_latent7.txt").write_text("[1]")
    with pytest.raises(CheckpointError, match="expected a JSON text, found list"):
        read_delphi(tmp_path)


def test_any_format_for_one_dictionary(tmp_path: Path) -> None:
    write_neuronpedia_explanations([(EXPLANATION, SCORES)], tmp_path / "a", model="m", source="s")
    write_simulation_results([simulation_results(0, 7, [(EXPLANATION, SCORES)])], tmp_path / "b")
    write_delphi([(EXPLANATION, SCORES, TEXTS)], tmp_path / "c", "h")
    places = {"neuronpedia": "a", "openai": "b/0", "delphi": "c"}
    for name in FORMATS:
        ((explanation, scores),) = read_foreign(tmp_path / places[name], name, "made", 8)
        assert (explanation.unit, explanation.subject) == (7, "made")
        assert explanation.text == "the word “the” — and </script>"  # one line, for a page
        assert scores
        with pytest.raises(CheckpointError, match="from 0 to 6, found '7'"):
            read_foreign(tmp_path / places[name], name, "made", 7)
    write_delphi([(EXPLANATION, (), None)], tmp_path / "c", "other")
    with pytest.raises(InputError, match="explanations of 2 places"):
        read_foreign(tmp_path / "c", "delphi", "made", 8)
    assert np.isfinite(SCORES[2].value or np.nan)
