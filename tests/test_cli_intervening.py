"""The verbs that intervene: what they print, and that the Python they print gives their numbers."""

import json
from typing import Any

import pytest

from neuron_explainer.cli import main
from neuron_explainer.models.model_registry import make_autoencoder_context

KING = "The king gave his daughter a golden"
SON = "The king gave his son a golden"
TARGET = ["--target", " ring", "--against", " apple"]


def run(capsys: pytest.CaptureFixture[str], *command: str) -> dict[str, Any]:
    """The result of a verb as JSON, and the variables of its Python under ``"ran"``."""
    assert main([*command, "--json"]) == 0
    result: dict[str, Any] = json.loads(capsys.readouterr().out)
    result["ran"] = {}
    exec(result["python"], result["ran"])
    return result


@pytest.mark.parametrize(
    "more",
    [
        [],
        ["--bos", "--ablate", "--top", "3"],
        ["--attention", "pairs", "--prompt-b", "The king gave his son a golden", "--top", "3"],
        [
            "--autoencoder",
            "ae-resid-delta-mlp",
            "--autoencoder",
            "ae-resid-delta-attn",
            "--top",
            "3",
        ],
    ],
    ids=["plain", "ablate", "pairs", "latents"],
)
def test_effects(capsys: pytest.CaptureFixture[str], more: list[str]) -> None:
    result = run(capsys, "effects", KING, *TARGET, *more)
    table = result["ran"]["table"]
    assert result["value"] == pytest.approx(table.target)
    assert [node["node"] for node in result["nodes"]] == [
        str(table.nodes[i]) for i in table.order("act_grad")
    ]
    for name, values in table.values.items():
        found = [node[name] for node in result["nodes"]]
        assert found == pytest.approx([values[i] for i in table.order("act_grad")])
    assert ("ablation" in result["nodes"][0]) == ("--ablate" in more)


def test_effects_of_an_autoencoder_on_disk(capsys: pytest.CaptureFixture[str]) -> None:
    paths = make_autoencoder_context(
        "tiny-tales", "ae-resid-delta-mlp", "cpu"
    ).autoencoder_config.paths
    result = run(capsys, "effects", KING, *TARGET, "--autoencoder", paths[2])
    assert any("latent" in node["node"] for node in result["nodes"])
    assert result["value"] == pytest.approx(result["ran"]["table"].target)


def test_patch(capsys: pytest.CaptureFixture[str]) -> None:
    pair = ["The old king said to the", "--source", "The old queen said to the"]
    result = run(capsys, "patch", *pair, "--target", " queen", "--against", " king")
    ran = result["ran"]["result"]
    assert result["effect"] == ran.mean.tolist()
    assert result["value"] == pytest.approx(float(ran.baseline[0]))
    last = result["effect"][-1][-1]
    assert result["value"] + last == pytest.approx(result["source_value"], abs=1e-4)
    assert main(["patch", *pair, "--target", " queen"]) == 0
    out = capsys.readouterr().out
    assert "The same in Python:" in out
    assert out.count("\n3 ") == 1


def test_patch_from_a_shorter_prompt(capsys: pytest.CaptureFixture[str]) -> None:
    pair = ["The old king said to the", "--source", "The queen said to the"]
    result = run(capsys, "patch", *pair, "--target", " queen")
    assert result["tokens"] == ["The", " said", " to", " the"]
    assert result["effect"] == result["ran"]["result"].mean.tolist()
    alone = run(capsys, "effects", pair[2], "--target", " queen")
    assert result["source_value"] == pytest.approx(alone["value"], abs=1e-4)


def test_circuit(capsys: pytest.CaptureFixture[str]) -> None:
    pair = ["The old king said to the", "--corrupt", "The old queen said to the"]
    argv = ["circuit", *pair, "--target", " queen", "--against", " king", "--edges", "40", "--bos"]
    result = run(capsys, *argv, "--top", "3")
    ran = result["ran"]
    assert result["edges"] == [{"edge": e, "score": s} for e, s in ran["scores"].top(3)]
    assert result["circuit"]["edges"] == ran["circuit"].edges
    assert result["circuit"]["value"] == pytest.approx(ran["value"])
    assert result["curve"]["faithfulness"] == ran["curve"].faithfulness.tolist()
    assert result["value"] == pytest.approx(float(ran["runner"].clean[0]))
    assert main(argv) == 0
    said = capsys.readouterr().out
    assert f"Of the 40 best, {len(ran['circuit'])} lie on a way" in said
    assert "CPR (higher is better)" in said
    assert "-0.000" not in said
    assert main([*argv[:3], "The queen", *argv[4:]]) == 2
    assert "have 7 and 3 tokens" in capsys.readouterr().err


def test_steer(capsys: pytest.CaptureFixture[str]) -> None:
    where = ["--autoencoder", "ae-resid-delta-mlp", "--layer", "2", "--latent", "5"]
    result = run(capsys, "steer", "Once upon a time", *where, "--num-tokens", "8")
    assert result["steered"] == result["ran"]["steered"]
    nothing = run(capsys, "steer", "Once", *where, "--num-tokens", "8", "--strength", "0")
    assert nothing["steered"] == nothing["plain"]


@pytest.mark.parametrize(
    ("command", "noted"),
    [
        (["effects", KING, "--target", "ring"], "' ring', with a space before it, has "),
        (["effects", KING, "--target", " ring"], None),
        (["effects", KING + " ", "--target", " ring"], "'ring', without the space before it"),
        (["patch", KING, "--source", SON, "--target", " son", "--against", "ring"], "' ring'"),
        (["circuit", KING, "--corrupt", SON, "--target", "ring", "--ig-steps", "1"], "' ring'"),
    ],
)
def test_the_other_spelling_of_a_target_is_named_where_it_is_likelier(
    capsys: pytest.CaptureFixture[str], command: list[str], noted: str | None
) -> None:
    assert main(command) == 0
    said = capsys.readouterr().out
    assert said.count("Note: ") == (noted is not None)
    assert noted is None or noted in said
    assert main([*command, "--json"]) == 0
    notes = json.loads(capsys.readouterr().out)["notes"]
    assert [f"Note: {note}" in said for note in notes] == [True] * (noted is not None)


@pytest.mark.parametrize(
    ("command", "message"),
    [
        (["effects", KING, "--target", " extraordinarily"], "must be one token"),
        (["effects", KING, "--target", " ring", "--against", " ring"], "with the same tokens"),
        (["effects", KING, *TARGET, "--autoencoder", "ae-resid-delta-mpl"], "ae-resid-delta-mlp"),
        (
            [
                "effects",
                KING,
                *TARGET,
                "--autoencoder",
                "ae-mlp-post-act",
                "--autoencoder",
                "ae-resid-delta-mlp",
            ],
            "same part of the stream",
        ),
        (["patch", "a", "--source", "b", *TARGET, "--location", "mlp.post_atc"], "mlp.post_act"),
        (["patch", "dog", "--source", "The cat sat", *TARGET], "no token in common"),
        (["steer", "a", "--autoencoder", "ae-resid-delta-mlp", "--latent", "5"], "--layer"),
        (
            [
                "steer",
                "a",
                "--autoencoder",
                "ae-resid-delta-mlp",
                "--layer",
                "1",
                "--latent",
                "99999",
            ],
            "found 99999",
        ),
    ],
)
def test_bad_input(capsys: pytest.CaptureFixture[str], command: list[str], message: str) -> None:
    assert main(command) == 2
    assert message in capsys.readouterr().err
