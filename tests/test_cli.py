"""The commands on the embedded model: what they print, as text and as JSON, and how they fail."""

import json
import os
import shlex
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from neuron_explainer import cli, demo
from neuron_explainer.cli.common import in_flags
from neuron_explainer.models.autoencoder import Autoencoder, TopK
from neuron_explainer.models.checkpoints.autoencoders import Stated
from neuron_explainer.models.hooks import TransformerHooks
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
        (
            ["ablate", "x", "--location", "1/mlp.post_act", "--unit", "99999"],
            ["no neuron 99999", "0 to"],
        ),
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
    for step in demo.steps():
        assert step.title in out
        assert step.code.splitlines()[0] in out
    assert "->" in out
    result = json.loads(run(capsys, "demo", "--json"))
    assert [step["title"] for step in result["steps"]] == [step.title for step in demo.steps()]
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


# --- models of Hugging Face ---


@pytest.fixture(scope="module")
def on_hub(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A tiny model of another family than GPT-2, with a tokenizer, as ``--model`` takes it."""
    transformers = pytest.importorskip("transformers")
    tokenizers = pytest.importorskip("tokenizers")
    folder = tmp_path_factory.mktemp("hub") / "neox"
    words = ["<|endoftext|>", "the", "king", "gave", "a", "golden", "frog", ".", "[UNK]"]
    tokenizer = tokenizers.Tokenizer(
        tokenizers.models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="[UNK]")
    )
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token="[UNK]", bos_token=words[0], eos_token=words[0]
    ).save_pretrained(folder)
    torch.manual_seed(0)
    config = transformers.GPTNeoXConfig(
        vocab_size=len(words), hidden_size=16, num_hidden_layers=2, num_attention_heads=4,
        intermediate_size=32, max_position_embeddings=64, bos_token_id=0, eos_token_id=0,
    )  # fmt: skip
    transformers.GPTNeoXForCausalLM(config).save_pretrained(folder)
    return f"hf:{folder}"


def test_a_model_of_hugging_face_in_every_verb(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, on_hub: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    text, place, model = (
        "the king gave a golden frog",
        "1/resid.torso.delta_mlp",
        ("--model", on_hub),
    )
    found = json.loads(
        run(capsys, "sample", text, *model, "--num-tokens", "3", "--seed", "0", "--json")
    )
    assert (found["model"], len(found["samples"][0]["tokens"])) == (on_hub, 3)
    found = json.loads(run(capsys, "ablate", text, *model, "--location", place, "--json"))
    assert found["kl_divergence"] > 0
    # Its norms do not show their scale, so that this is not frozen.
    effects = ["effects", text, *model, "--target", "frog", "--against", "king"]
    found = json.loads(run(capsys, *effects, "--json"))
    assert (found["freeze"], len(found["nodes"]) > 5) == ([], True)
    assert "freeze=()" in found["python"]
    assert "scale is not frozen" in run(capsys, *effects)
    circuit = ["circuit", text, "--corrupt", text, *model, "--target", "frog"]
    assert "own Transformer" in fail(capsys, *circuit)
    Path("books").mkdir()
    for number in range(8):
        Path(f"books/{number}.txt").write_text(f"{text} . " * (9 + number), "utf-8")
    cut = ["--context-length", "16", "--windows-per-forward", "4", "--hold-out", "0.2"]
    run(capsys, "harvest", "books", *model, "--location", place, *cut, "--out", "store")
    size = ["--steps", "3", "--batch-size", "32", "--n-latents", "24", "--k", "4"]
    run(capsys, "train", "store", *size, "--out", "run")
    # The run knows its model, and by which of the two ways it is opened.
    shown = json.loads(run(capsys, "evaluate", "run", "--json"))
    assert list(shown["evaluations"]) == [place]
    shown = json.loads(run(capsys, "latents", text, "--autoencoder", "run", "--json"))
    assert (shown["model"], shown["location"]) == (on_hub, place)
    shown = json.loads(run(capsys, "ablate", text, "--autoencoder", "run", "--unit", "3", "--json"))
    assert shown["model"] == on_hub
    collate = ["collate", "books", "--autoencoder", "run", "--context-length", "16"]
    run(capsys, *collate, "--location", "1/attn.qk_probs", "--out", "stores")
    assert "raises" in run(capsys, "inspect", "stores/1.resid.torso.delta_mlp", "3")
    shown = json.loads(run(capsys, "inspect", "stores/1.attn.qk_probs.heads", "3", "--json"))
    assert shown["provenance"]["model"] == on_hub
    assert set(shown["tokens"]["missing"]) == {"Next tokens", "Input tokens"}
    run(capsys, "prune", "run", "--out", "lean", "--min-max-activation", "0")
    run(capsys, "report", "run")
    Path("s.csv").write_text(f"sentence\n{text}\n", "utf-8")
    run(capsys, "sentences", "s.csv", "--autoencoder", "run")
    size = [
        "--n-latents",
        "12",
        "--penalty",
        "1e-4",
        "--tolerance",
        "0.1",
        "--sentence-length",
        "8",
    ]
    run(capsys, "factors", "learn", "books", *model, "--location", place, *size, "--out", "factors")
    run(capsys, "factors", "collate", "factors", "--out", "examples", "--n-examples", "5")
    few = ["--num-factors", "1", "--num-sentences", "1", "--num-samples", "9"]
    assert json.loads(run(capsys, "factors", "saliency", "examples", *few, "--json"))["computed"]
    run(capsys, "factors", "pages", "examples", "--out", "pages")


# --- autoencoders ---


def test_an_autoencoder_is_read_once(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    width = Transformer.load("tiny-tales").cfg.d_model
    Autoencoder(8, width, location="1/resid.torso.delta_mlp").save(tmp_path / "ae")
    load, loaded = Autoencoder.load, []

    def counted(path: Any, *args: Any, **kwargs: Any) -> Autoencoder:
        loaded.append(str(path))
        return load(path, *args, **kwargs)

    monkeypatch.setattr(Autoencoder, "load", counted)
    for argv in (["latents", TEXT], ["ablate", TEXT, "--unit", "3"]):
        loaded.clear()
        run(capsys, *argv, "--autoencoder", str(tmp_path / "ae"))
        assert loaded == [str(tmp_path / "ae")]
    loaded.clear()
    run(capsys, "latents", TEXT, "--layer", "1")  # of a name only what is asked for
    assert len(loaded) == 1


@pytest.mark.parametrize("model", ["tiny-tales", "half"])
def test_a_unit_where_there_are_heads_is_a_head(
    model: str, capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    if model == "half":
        Transformer.load("tiny-tales", dtype=torch.float16).save(tmp_path / "half")
    argv = ["ablate", TEXT, "--model", model, "--location", "2/attn.v_out", "--json", "--unit"]
    xf = Transformer.load(model, dtype=torch.float32)
    tokens = torch.tensor([xf.enc.encode(TEXT)])

    def kl(edit: Callable[[Tensor], Tensor]) -> float:
        hooks = TransformerHooks().append_at("2/attn.v_out", edit)
        with torch.no_grad():
            before, after = (
                xf(tokens, hooks=tree)[0][0, -1].log_softmax(-1) for tree in (None, hooks)
            )
        return float((before.exp() * (before - after)).sum())

    def head(x: Tensor) -> Tensor:
        x[:, :, 3] = 0
        return x

    def channel(x: Tensor) -> Tensor:
        x[:, :, 3, 17] = 0
        return x

    for unit, edit, name in (("3", head, "head 3"), ("3.17", channel, "channel 17 of head 3")):
        found = json.loads(run(capsys, *argv, unit))
        assert found["ablated"] == f"{name} of 2/attn.v_out = 0.0"
        assert found["kl_divergence"] == pytest.approx(kl(edit), abs=2e-6)
    assert "2/attn.v_out has no head 99: the numbers are 0 to" in fail(capsys, *argv, "99")
    assert "2/attn.v_out has no channel 3.99: the numbers are 0 to" in fail(capsys, *argv, "3.99")
    assert "3.17 for a channel of a head" in fail(capsys, *argv, "3.x")


# --- help, and what is said ---


def test_without_a_verb_there_is_help(capsys: pytest.CaptureFixture[str]) -> None:
    out = run(capsys)
    assert "Begin with: neuron-explainer demo" in out
    groups = [
        line
        for line in out.splitlines()
        if line in ("look", "intervene", "learn", "measure", "files")
    ]
    assert groups == ["look", "intervene", "learn", "measure", "files"]
    listed = {line.split()[0] for line in out.splitlines() if line.startswith("  ")}
    assert listed == set(cli._parser()[1])


@pytest.mark.parametrize(
    ("argv", "said", "unsaid"),
    [
        (["smaple", "x"], "no verb 'smaple'. Did you mean 'sample'?", "intr"),
        (["nothere"], "no verb 'nothere'. neuron-explainer --help", "Did you mean"),
        (["train", "x", "--step", "3"], "unexpected --step. Did you mean '--steps'", "Traceback"),
        (["sample", "x", "--num-token", "3"], "Did you mean '--num-tokens'", "Traceback"),
    ],
)
def test_misspelt_verbs_and_flags(
    argv: list[str], said: str, unsaid: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stop:
        cli.main(argv)
    assert stop.value.code == 2
    err = capsys.readouterr().err
    assert said in err
    assert unsaid not in err


@pytest.mark.parametrize("verb", [*cli._parser()[1]])
def test_help_begins_with_a_command_that_works(
    verb: str, capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    parser, verbs = cli._parser()
    with pytest.raises(SystemExit):
        cli.main([verb, "--help"])
    first = capsys.readouterr().out.splitlines()[0]
    assert first == f"example: {verbs[verb].example}"
    name, *argv = shlex.split(verbs[verb].example)
    assert name == "neuron-explainer"
    args = parser.parse_args(argv)
    assert args.verb == verb
    if verb in ("sample", "latents", "ablate", "inspect", "page", "models", "cache", "convert"):
        monkeypatch.chdir(tmp_path)
        monkeypatch.setenv("NEURON_EXPLAINER_CACHE", str(tmp_path / "cache"))
        run(capsys, *argv)


def test_messages_speak_of_flags() -> None:
    arguments = {"bos": False, "overwrite": False, "hold_out": 0.1, "run": None, "k": None}
    for message, expected in (
        ("give it one, or bos=True to start", "give it one, or --bos to start"),
        ("replace it with overwrite=True.", "replace it with --overwrite."),
        ("hold_out=0 and k=5, seed=3", "--hold-out 0 and --k 5, seed=3"),
        ("'k=5' and run=1", "'k=5' and run=1"),
    ):
        assert in_flags(message, arguments) == expected


def test_an_empty_prompt_is_told_the_flag(capsys: pytest.CaptureFixture[str]) -> None:
    assert "or --bos to start" in fail(capsys, "sample", "")


def test_control_characters_are_escaped(capsys: pytest.CaptureFixture[str]) -> None:
    evil = "\x1b[31mred"
    assert "\x1b" not in run(capsys, "sample", evil, "--num-tokens", "2")
    assert "\x1b" not in fail(capsys, "sample", "x", "--model", evil)
    assert "\x1b" not in fail(capsys, "evaluate", evil)
    with pytest.raises(SystemExit):
        cli.main([evil])
    assert "\x1b" not in capsys.readouterr().err


def shell(command: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        ["sh", "-c", command.replace("EXPLAIN", f"{sys.executable} -m neuron_explainer")],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.mark.parametrize("flags", ["", " --json"])
def test_output_that_cannot_be_encoded(flags: str) -> None:
    done = shell(f"EXPLAIN latents 'ein König' --top 1{flags}", PYTHONIOENCODING="ascii")
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.isascii()
    if flags:
        assert json.loads(done.stdout)["location"]


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full on this system")
@pytest.mark.parametrize(
    ("verb", "unbuffered"),
    [("cache list --json", ""), ("demo", ""), ("--help", ""), ("sample --help", "1"), ("", "1")],
)
def test_a_full_stdout(verb: str, unbuffered: str, tmp_path: Path) -> None:
    full = shell(
        f"EXPLAIN {verb} > /dev/full",
        NEURON_EXPLAINER_CACHE=str(tmp_path / "cache"),
        PYTHONUNBUFFERED=unbuffered,
    )
    assert full.returncode == 2
    lines = full.stderr.strip().splitlines()
    assert len(lines) == 1
    assert "cannot write to standard output: No space left" in lines[0]


@pytest.mark.parametrize("verb", ["cache list", "demo", "cache list --json"])
def test_a_closed_stdout(verb: str, tmp_path: Path) -> None:
    cache = str(tmp_path / "cache")
    closed = shell(f"EXPLAIN {verb} >&-", NEURON_EXPLAINER_CACHE=cache)
    assert (closed.returncode, closed.stderr) == (0, "")
    gone = shell(f"EXPLAIN {verb} | true", NEURON_EXPLAINER_CACHE=cache)
    assert gone.stderr == ""


@pytest.mark.parametrize(
    ("argv", "near"),
    [
        (["cache", "lst"], "list"),
        (["cache", "remve", "x"], "remove"),
        (["convert", "a", "b", "--format", "saelen"], "saelens"),
        (["convert", "a", "b", "--format", "saelens", "--input-normalization", "centre"], "center"),
    ],
)
def test_a_wrong_choice_names_the_near_one(
    argv: list[str], near: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stop:
        cli.main(argv)
    assert stop.value.code == 2
    assert capsys.readouterr().err.rstrip().endswith(f"Did you mean '{near}'?")
