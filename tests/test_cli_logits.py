"""The verbs explain and score: what a latent does, which needs the model that comes with the package."""

import pytest

from tests.test_cli_explaining import as_json, run

STORE = "tiny-tales/ae-resid-delta-mlp/2"
LITTLE = ["--most-tokens", "3000", "--train", "4", "--test", "4"]


@pytest.fixture(autouse=True)
def _own_data(monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory) -> None:
    folder = tmp_path_factory.getbasetemp() / "logits"
    monkeypatch.setenv("NEURON_EXPLAINER_DATA", str(folder))


def test_logits_need_no_examples_of_tokens(capsys: pytest.CaptureFixture[str]) -> None:
    text = run(
        capsys, "explain", STORE, "--latents", "7", "--method", "logits", "--no-score", *LITTLE
    )
    assert "raises “" in text


def test_what_a_latent_does_is_scored_by_steering(capsys: pytest.CaptureFixture[str]) -> None:
    found = as_json(capsys, "explain", STORE, "--latents", "3", "7", "--method", "logits", *LITTLE)
    by_name = {each["name"]: each for each in found["summary"]}
    assert list(by_name) == ["intervention", "embedding"]
    assert by_name["intervention"]["floors"]["chance"] == 0.5
    table = run(
        capsys,
        "score",
        STORE,
        "--latents",
        "3",
        "--method",
        "logits",
        "--scorers",
        "surprisal",
        *LITTLE,
    )
    assert "surprisal" in table
    refused = run(
        capsys, "score", STORE, "--latents", "3", "--scorers", "surprisal", "--no-model", code=2
    )
    assert "surprisal: the model is needed, and was not asked (--no-model)" in refused
