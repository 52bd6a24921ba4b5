"""The commands on the embedded model: what they print, as text and as JSON, and how they fail."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from neuron_explainer import cli, demo
from neuron_explainer.models.autoencoder import Autoencoder, TopK
from neuron_explainer.models.checkpoints.autoencoders import Stated
from neuron_explainer.models.model_registry import make_autoencoder_context
from neuron_explainer.models.transformer import Transformer

TEXT = "The king gave his daughter a golden"


def run(capsys: pytest.CaptureFixture[str], *argv: str) -> str:
    assert cli.main(argv) == 0
    return capsys.readouterr().out


def fail(capsys: pytest.CaptureFixture[str], *argv: str) -> str:
    assert cli.main(argv) == 2
    return capsys.readouterr().err


def test_sample_is_the_librarys(capsys: pytest.CaptureFixture[str]) -> None:
    out = json.loads(
        run(capsys, "sample", TEXT, "The wolf", "--seed", "1", "--num-tokens", "6", "--json")
    )
    model = Transformer.load("tiny-tales", dtype=torch.float32)
    expected = model.sample([TEXT, "The wolf"], 6, 0.8, seed=1)
    assert [s["tokens"] for s in out["samples"]] == expected["tokens"]
    assert [s["text"] for s in out["samples"]] == expected["strings"]
    plain = run(capsys, "sample", TEXT, "--seed", "1", "--num-tokens", "6")
    assert plain.startswith(TEXT)


def test_latents_are_the_librarys(capsys: pytest.CaptureFixture[str]) -> None:
    argv = ["latents", TEXT, "--layer", "1", "--top", "3"]
    out = json.loads(run(capsys, *argv, "--json"))
    model = Transformer.load("tiny-tales", dtype=torch.float32)
    context = make_autoencoder_context("tiny-tales", "ae-resid-delta-mlp", device=model.device)
    location = context.location.at(1)
    with torch.no_grad():
        latents = context.get_autoencoder(1).encode(model.capture([TEXT], location)[location][0])
    assert out["location"] == str(location)
    assert "".join(token["token"] for token in out["tokens"]) == TEXT
    for token, row in zip(out["tokens"], latents, strict=True):
        assert len(token["latents"]) == min(3, int((row > 0).sum()))
        for shown in token["latents"]:
            assert shown["activation"] == pytest.approx(float(row[shown["latent"]]), abs=1e-5)
    assert "█" in run(capsys, *argv)


def test_latents_of_a_folder_that_does_not_fit_warn(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    torch.manual_seed(0)
    width = Transformer.load("tiny-tales").cfg.d_model
    for location in ("1/resid.torso.delta_mlp", None):
        Autoencoder(2 * width, width, location=location).save(tmp_path / str(location is None))
    argv = ["latents", TEXT, "--json", "--autoencoder"]
    assert cli.main([*argv, str(tmp_path / "False")]) == 0
    out, err = capsys.readouterr()
    assert json.loads(out)["location"] == "1/resid.torso.delta_mlp"
    assert json.loads(out)["fvu"] > 0.5
    assert "warning" in err
    assert "variance is unexplained" in err
    assert "where in the model it belongs" in fail(capsys, *argv, str(tmp_path / "True"))


def test_ablate_a_neuron_a_location_and_a_latent(capsys: pytest.CaptureFixture[str]) -> None:
    whole = json.loads(run(capsys, "ablate", TEXT, "--location", "2/mlp.post_act", "--json"))
    assert whole["kl_divergence"] > 0
    model = Transformer.load("tiny-tales", dtype=torch.float32)
    tokens = torch.tensor([model.enc.encode(TEXT)], device=model.device)
    with torch.no_grad():
        probs = model(tokens)[0][0, -1].softmax(-1)
    for row in whole["next_tokens"]:
        assert row["before"] == pytest.approx(
            float(probs[model.enc.encode(row["token"])[0]]), abs=1e-5
        )
    one = json.loads(
        run(capsys, "ablate", TEXT, "--location", "2/mlp.post_act", "--unit", "3", "--json")
    )
    assert one["kl_divergence"] < whole["kl_divergence"]
    latent = run(capsys, "ablate", TEXT, "--autoencoder", "ae-resid-delta-mlp", "--layer", "2")
    assert "latents of ae-resid-delta-mlp in layer 2" in latent


def test_models_lists_every_name(capsys: pytest.CaptureFixture[str]) -> None:
    listed = json.loads(run(capsys, "models", "--json"))["models"]
    names = {model["name"]: model["autoencoders"] for model in listed}
    assert set(names) >= {"tiny-tales", "gpt2-small", "gpt2-xl"}
    assert {"ae-mlp-post-act", "ae-resid-delta-mlp", "ae-resid-delta-attn"} <= set(
        names["tiny-tales"]
    )
    assert "ae-resid-delta-attn-v4" in names["gpt2-small"]
    assert "tiny-tales" in run(capsys, "models")


def test_cache_verbs(capsys: pytest.CaptureFixture[str], tmp_path, monkeypatch) -> None:
    monkeypatch.setenv("NEURON_EXPLAINER_CACHE", str(tmp_path / "cache"))
    assert json.loads(run(capsys, "cache", "list", "--json"))["files"] == []
    assert "0 files" in run(capsys, "cache", "verify")


@pytest.mark.parametrize(
    ("argv", "parts"),
    [
        (["sample", "x", "--model", "tiny-tails"], ["tiny-tails", "tiny-tales"]),
        (["sample", "x", "--num-tokens", "0"], ["num_tokens", "0"]),
        (["sample", "x", "--top-p", "2"], ["top_p", "2"]),
        (["latents", "x", "--autoencoder", "ae-nonsense"], ["ae-nonsense", "ae-resid-delta-mlp"]),
        (["latents", "x", "--layer", "9"], ["9"]),
        (["ablate", "x", "--location", "9/mlp.post_act"], ["layers 0 to"]),
        (["ablate", "x", "--location", "1/mlp.post_akt"], ["mlp.post_akt", "mlp.post_act"]),
        (["ablate", "x", "--location", "1/mlp.post_act", "--unit", "99999"], ["--unit", "99999"]),
    ],
)
def test_errors_are_one_line_and_name_the_thing(
    capsys: pytest.CaptureFixture[str], argv: list[str], parts: list[str]
) -> None:
    error = fail(capsys, *argv)
    assert "Traceback" not in error
    assert all(part in error for part in parts), error


def test_demo_shows_what_it_runs(capsys: pytest.CaptureFixture[str]) -> None:
    out = run(capsys, "demo")
    for step in demo.STEPS:
        assert step.title in out
        assert step.code.splitlines()[0] in out
    assert "->" in out
    result = json.loads(run(capsys, "demo", "--json"))
    assert [step["title"] for step in result["steps"]] == [step.title for step in demo.STEPS]
    assert all(step["output"] for step in result["steps"])


def test_python_dash_m() -> None:
    out = subprocess.run(
        [sys.executable, "-m", "neuron_explainer", "--version"],
        capture_output=True,
        text=True,
        check=True,
    )
    assert out.stdout.strip()


@pytest.mark.parametrize(
    "verb", ["demo", "sample", "latents", "ablate", "models", "convert", "cache"]
)
def test_help_of_each_verb(verb: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        cli.main([verb, "--help"])
    assert stop.value.code == 0
    assert verb in capsys.readouterr().out


def test_everything_that_can_be_stated_of_a_file_can_be_given_to_convert(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    with pytest.raises(SystemExit):
        cli.main(["convert", "--help"])
    shown = capsys.readouterr().out
    for name in Stated.__annotations__:
        assert f"--{name.replace('_', '-')}" in shown
    np.save(tmp_path / "codes.npy", np.eye(6, 9, dtype=np.float32) + np.eye(6, 9, 6))
    source, new = str(tmp_path / "codes.npy"), str(tmp_path / "new")
    flags = ["--penalty", "0.25", "--max-iterations", "7", "--location", "2/mlp.post_act"]
    assert "--penalty" in fail(capsys, "convert", source, new, "--format", "native")
    run(capsys, "convert", source, new, "--format", "native", *flags)
    found = Autoencoder.load(new)
    assert "penalty=0.25, max_iterations=7" in repr(found.activation)
    assert str(found.location) == "2/mlp.post_act"
    state = {"encoder.weight": torch.ones(9, 6), "encoder.bias": torch.ones(9)}
    state |= {"decoder.weight": torch.ones(6, 9), "b_dec": torch.ones(6), "k": torch.tensor(3)}
    torch.save(state | {"threshold": torch.tensor(-1.0)}, tmp_path / "ae.pt")
    source, new = str(tmp_path / "ae.pt"), str(tmp_path / "other")
    assert "--dict-class" in fail(capsys, "convert", source, new, "--format", "saelens")
    flags = ["--dict-class", "BatchTopKSAE", "--threshold", "0.5"]
    run(capsys, "convert", source, new, "--format", "native", *flags)
    assert repr(Autoencoder.load(new).activation) == "BatchTopK(threshold=0.5, k=3)"


def test_convert_there_and_back(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    torch.manual_seed(0)
    autoencoder = Autoencoder(24, 8, TopK(4), location="1/resid.torso.post_mlp")
    autoencoder.save(tmp_path / "a")
    a, b, c = (str(tmp_path / name) for name in "abc")
    assert "as saelens" in run(capsys, "convert", a, b, "--format", "saelens")
    assert (tmp_path / "b" / "sae_weights.safetensors").exists()
    out = json.loads(run(capsys, "convert", b, c, "--format", "native", "--json"))
    assert out == {"source": b, "destination": c, "format": "native"}
    back, x = Autoencoder.load(c), torch.randn(5, 8)
    torch.testing.assert_close(back(x).recons, autoencoder(x).recons)
    assert str(back.location) == "1/resid.torso.post_mlp"
    assert "overwrite" in fail(capsys, "convert", a, b, "--format", "sparsify")
    error = fail(
        capsys, "convert", a, str(tmp_path / "d"), "--format", "native", "--location", "0/logits"
    )
    assert "0/logits" in error or "once" in error
    assert not (tmp_path / "d").exists()
