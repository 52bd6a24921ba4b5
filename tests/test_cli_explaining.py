"""The verbs explain and score, on a store that comes with the package."""

import json
from typing import Any

import pytest

from neuron_explainer.cli import main

STORE = "tiny-tales/ae-resid-delta-mlp/2"
QUICK = ["--most-tokens", "9000", "--seed", "3", "--train", "10", "--test", "10"]


@pytest.fixture(autouse=True)
def _own_data(monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory) -> None:
    # One folder for all: what one test explains, another one scores.
    folder = tmp_path_factory.getbasetemp() / "explaining"
    monkeypatch.setenv("NEURON_EXPLAINER_DATA", str(folder))


def run(capsys: pytest.CaptureFixture[str], *argv: str, code: int = 0) -> str:
    assert main(list(argv)) == code
    found = capsys.readouterr()
    return found.err if code else found.out


def as_json(capsys: pytest.CaptureFixture[str], *argv: str) -> Any:
    return json.loads(run(capsys, *argv, "--json"))


def test_explaining_scores_too_and_says_what_the_floors_are(
    capsys: pytest.CaptureFixture[str],
) -> None:
    found = as_json(capsys, "explain", STORE, "--sample", "6", *QUICK)
    assert found["n_units"] == 6
    assert 0 < found["tokens_read"] <= 9000
    assert (
        found["n_explained"] + sum("error" in u and not u["explanation"] for u in found["units"])
        == 6
    )
    names = [each["name"] for each in found["summary"]]
    assert names == ["detection", "fuzzing", "simulation", "embedding"]
    floors = found["summary"][0]["floors"]
    assert list(floors) == ["chance", "token set", "other latent", "random autoencoder"]
    scores = [s for u in found["units"] for s in u["scores"] if s["name"] == "detection"]
    assert all(s["interval"][0] <= s["value"] <= s["interval"][1] for s in scores)
    assert "answers" not in scores[0]
    again = as_json(capsys, "explain", STORE, "--sample", "6", *QUICK)
    assert again["n_reused"] == found["n_explained"]
    assert again["summary"] == found["summary"]

    table = run(capsys, "score", STORE, "--top", "2", *QUICK)
    assert "medians" in table
    assert "above all floors" in table
    best = table.splitlines()[1].split()[0]  # the first row
    assert table.splitlines()[-1] == f"Next: neuron-explainer inspect {STORE} {best}"

    unit = next(u["unit"] for u in found["units"] if u["scores"])
    page = run(capsys, "inspect", STORE, str(unit), "--no-model")
    assert "(rules)" in page
    assert "detection " in page
    record = as_json(capsys, "inspect", STORE, str(unit), "--no-model")
    (explained,) = record["explanations"]
    assert explained["explanation"]["method"] == "rules"
    assert {each["name"] for each in explained["scores"]} == set(names)


def test_no_model_says_what_that_means(capsys: pytest.CaptureFixture[str]) -> None:
    text = run(
        capsys, "explain", STORE, "--latents", "1205", "5", "--no-model", "--method", "tokens", "--seed", "9"
    )  # fmt: skip
    assert "“ before”" in text
    assert "random texts are taken to be inactive" in text
    assert "random autoencoder " not in text


def test_a_dry_run_does_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    found = as_json(capsys, "explain", STORE, "--dry-run", "--sample", "4", "--seed", "99")
    assert (found["n_units"], found["n_explained"], found["requests"]) == (4, 0, 0)
    assert found["tokens_to_read_with_the_model"] == 130_048
    assert "nothing leaves this machine" in run(
        capsys, "score", STORE, "--latents", "3", "--dry-run"
    )


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["explain", STORE, "--latents", "99999"], "has no latent 99999: there are 0 to 2559"),
        (["explain", STORE, "--latents", "1", "--sample", "3"], "give --latents or --sample"),
        (["explain", STORE, "--method", "logits", "--no-model"], "leave --no-model out"),
        (["score", "tiny-tales/ae-mlp-post-act/0"], "has no explanations yet"),
        (["score", STORE, "--method", "poetry"], "no explanations by poetry yet"),
        (["explain", "tiny-tales/nothing"], "has no store nothing"),
        (["explain", STORE, "--latents", "1", "2", "--seed", "-1"], "seed must be at least 0"),
        (["score", STORE, "--latents", "1", "--seed", "-1"], "seed must be at least 0"),
    ],
)
def test_what_cannot_be_done_is_said(
    capsys: pytest.CaptureFixture[str], argv: list[str], message: str
) -> None:
    assert message in run(capsys, *argv, code=2)


def test_too_few_texts_are_counted(capsys: pytest.CaptureFixture[str]) -> None:
    text = run(capsys, "explain", STORE, "--latents", "1210", "--no-model", "--seed", "9")
    assert "has 5 different active texts; at least 6 are needed" in text
