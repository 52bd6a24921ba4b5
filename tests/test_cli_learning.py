"""The verbs that learn and measure dictionaries: one flow, its JSON, what each bad input comes to."""

import csv
import errno
import itertools
import json
import logging
import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from neuron_explainer import cli
from neuron_explainer.activations import (
    DataConfig,
    harvest_to_store,
    open_buffer,
    open_harvester,
    open_windows,
)
from neuron_explainer.cli import measuring
from neuron_explainer.dictionaries import TopKConfig, TrainConfig, train, train_many
from neuron_explainer.dictionaries.runs import RunFolder
from neuron_explainer.errors import InputError
from neuron_explainer.evaluation.passage import PASSAGE
from neuron_explainer.models.autoencoder import Autoencoder
from neuron_explainer.models.autoencoders.convert import convert
from neuron_explainer.models.model_context import ModelContext
from neuron_explainer.models.transformer import Transformer

PLACES = ["1/resid.torso.delta_mlp", "2/resid.torso.delta_mlp"]
WINDOWS = ["--context-length", "32", "--windows-per-forward", "2"]
SMALL = ["--steps", "6", "--batch-size", "64", "--n-latents", "48", "--k", "4", "--lr", "3e-3"]
ROOT = Path(__file__).parent.parent
VERBS = ["harvest", "train", "evaluate", "prune", "finetune", "report", "sentences"]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of texts, a store of their activations and a run of two dictionaries on it."""
    folder = tmp_path_factory.mktemp("learning")
    (folder / "books").mkdir()
    for number, paragraph in enumerate(PASSAGE.split("\n\n")):
        (folder / "books" / f"{number}.txt").write_text(paragraph, "utf-8")
    (folder / "s.csv").write_text('sentence\nThe cat sat.\n"Once upon a time, a king."\n', "utf-8")
    before = Path.cwd()
    os.chdir(folder)
    try:
        argv = ["harvest", "books", "--location", *PLACES, *WINDOWS, "--out", "store", "--json"]
        assert cli.main(argv) == 0
        assert cli.main(["train", "store", *SMALL, "--out", "run", "--json"]) == 0
    finally:
        os.chdir(before)
    return folder


@pytest.fixture(autouse=True)
def in_a_copy(made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each test has its own files; nothing but what it asks for is written."""
    work = tmp_path / "work"
    shutil.copytree(made, work)
    monkeypatch.chdir(work)
    # The run says where its text was harvested from.
    for name in ("store/source.json", "run/config.json"):
        path = work / name
        path.write_text(path.read_text("utf-8").replace(str(made), str(work)), "utf-8")


def run(capsys: pytest.CaptureFixture[str], *argv: str) -> str:
    assert cli.main(argv) == 0, capsys.readouterr().err
    return capsys.readouterr().out


def as_json(capsys: pytest.CaptureFixture[str], *argv: str) -> dict[str, Any]:
    """The whole of standard output is one JSON object."""
    found = json.loads(run(capsys, *argv, "--json"))
    assert isinstance(found, dict)
    return found


def fail(capsys: pytest.CaptureFixture[str], *argv: str) -> str:
    """What a command that ends with 2 says, in one line, without having printed anything."""
    code: Any
    try:
        code = cli.main(argv)
    except SystemExit as stop:  # argparse, which shows the usage first
        code = stop.code
    out, err = capsys.readouterr()
    assert (code, out) == (2, "")
    lines = [line for line in err.splitlines() if line.startswith(f"neuron-explainer {argv[0]}: ")]
    assert len(lines) == 1, err
    assert "Traceback" not in err
    return lines[0]


def test_a_store_is_trained_on_and_measured(capsys: pytest.CaptureFixture[str]) -> None:
    for place, folder in zip(PLACES, sorted(Path("run/autoencoders").iterdir()), strict=True):
        autoencoder = Autoencoder.load(folder)
        assert (str(autoencoder.location), autoencoder.n_latents) == (place, 48)
        assert autoencoder.model_name == "tiny-tales"
    # Neither text nor model is given: the store has noted them, and what was set apart.
    found = as_json(capsys, "evaluate", "run")
    assert found["part"] == "held_out"
    assert Path(found["text"]).name == "books"
    assert list(found["evaluations"]) == PLACES
    for evaluation in found["evaluations"].values():
        assert 0 < evaluation["fvu"] < 1.5
        assert evaluation["l0"] <= 4
    held_out = found["evaluations"][PLACES[0]]["n_tokens"]
    everything = as_json(capsys, "evaluate", "run", "--text", "books", "--ce-every", "0")
    assert everything["part"] == "all"
    assert everything["evaluations"][PLACES[0]]["n_tokens"] > 2 * held_out
    text = run(capsys, "evaluate", "run", "--ce-every", "0")
    assert "FVU" in text
    assert text.splitlines()[-1] == "Next: neuron-explainer report run"


def test_a_run_is_probed_on_what_it_was_not_trained_on(
    capsys: pytest.CaptureFixture[str],
) -> None:
    found = as_json(capsys, "probe", "run", "--splits", "1", "--k", "1")
    assert found["part"] == "held_out"
    assert list(found["probed"]) == PLACES
    assert Path(found["text"]).name == "books"


def test_training_from_text_from_a_file_of_settings(capsys: pytest.CaptureFixture[str]) -> None:
    Path("run.toml").write_text(
        'location = "1/resid.torso.delta_mlp"\nsteps = 9\nbatch_size = 64\nn_latents = 48\n'
        'context_length = 24\nwindows_per_forward = 3\nhold_out = 0.3\ndevice = "cpu"\n'
        '[objective]\nname = "relu"\nl1_coefficient = 0.5\n',
        "utf-8",
    )
    argv = ["train", "books", "--config", "run.toml", "--num-tokens", "200", "--hold-out", "0.2"]
    found = as_json(capsys, *argv, "--out", "live")
    assert found["steps"] == 3  # flags win: 200 tokens in the place of nine steps
    settings = json.loads(Path("live/config.json").read_text("utf-8"))
    data = settings["record"]["data"]
    assert [data[name] for name in ("context_length", "windows_per_forward")] == [24, 3]
    assert data["hold_out"] == 0.2
    assert settings["dictionaries"]["autoencoder"]["device"] == "cpu"
    objective = settings["dictionaries"]["autoencoder"]["objective"]
    assert objective == {"name": "relu", "l1_coefficient": 0.5, "weighted": False}
    assert Autoencoder.load("live/autoencoder").activation.__class__.__name__ == "ReLU"


def test_training_from_the_scripts_params(capsys: pytest.CaptureFixture[str]) -> None:
    params = {
        "context_length": 32,
        "llm_batch_size": 2,
        "sae_batch_size": 64,
        "device": "cpu",
        "save_dir": "results/",
        "model_name": "tiny-tales",
        "random_seed": 1,
        "layer": 1,
        "dataset_name": "books",
        "num_tokens": 200,
    }
    entries = {key: {"value": value, "description": "…"} for key, value in params.items()}
    Path("params.json").write_text(json.dumps(entries), "utf-8")
    found = as_json(capsys, "train", "--params", "params.json")
    assert (found["run"], found["steps"]) == ("results/", 3)
    flags = [
        "--num-tokens",
        "128",
        "--location",
        "0/mlp.post_act",
        "--objective",
        "topk",
        "--k",
        "3",
    ]
    found = as_json(
        capsys,
        "train",
        "--params",
        "params.json",
        *flags,
        "--context-length",
        "16",
        "--out",
        "other",
    )
    assert found["steps"] == 2
    settings = json.loads(Path("other/config.json").read_text("utf-8"))
    assert settings["dictionaries"]["autoencoder"]["objective"]["name"] == "topk"
    assert settings["record"]["data"]["context_length"] == 16
    assert str(Autoencoder.load("other/autoencoder").location) == "0/mlp.post_act"
    autoencoder = Autoencoder.load("results/autoencoder")
    assert str(autoencoder.location) == "1/resid.torso.post_mlp"
    assert autoencoder.n_latents == 8 * autoencoder.n_inputs


def test_the_scripts_params_name_things_on_the_hub(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """With the script's own values; the hub is played by what is here."""
    from neuron_explainer.activations import data_config
    from neuron_explainer.models.model_context import ModelContext, StandardModelContext

    asked: list[tuple[str, ...]] = []

    def documents(dataset: str, column: str) -> Iterator[str]:
        asked.append((dataset, column))
        for number in itertools.count():  # more than any memory holds
            yield f"Once upon a time there were {number} frogs, who asked for a king. " * 20

    def model(name: str, device: Any) -> StandardModelContext:
        asked.append((name,))
        return StandardModelContext("tiny-tales", device=device)

    monkeypatch.setattr(data_config, "huggingface_documents", documents)
    monkeypatch.setitem(ModelContext.kinds, "hf:", model)
    Path("params.json").write_text(json.dumps({"device": {"value": "cpu"}}), "utf-8")
    flags = ["--n-latents", "48", "--batch-size", "4096", "--out", "hub"]
    assert as_json(capsys, "train", "--params", "params.json", *flags)["steps"] == 2
    assert asked == [("EleutherAI/pythia-70m-deduped",), ("monology/pile-uncopyrighted", "text")]
    asked.clear()
    assert as_json(capsys, "evaluate", "hub", "--num-tokens", "500")["part"] == "held_out"
    assert asked[-1] == ("monology/pile-uncopyrighted", "text")


def test_several_of_one_place_are_all_measured(capsys: pytest.CaptureFixture[str]) -> None:
    rows = torch.randn(200, 192, generator=torch.Generator().manual_seed(0))
    configs = {
        f"k{k}": TrainConfig(
            TopKConfig(k=k), n_latents=48, steps=2, batch_size=64, location=PLACES[0]
        )
        for k in (2, 7)
    }
    train_many(configs, [rows[:64], rows[64:128]], "sweep", progress=False)
    found = as_json(capsys, "evaluate", "sweep", "--text", "books", "--ce-every", "0")
    assert [(name, round(e["l0"])) for name, e in found["evaluations"].items()] == [
        ("k2", 2),
        ("k7", 7),
    ]


def test_a_file_that_does_not_say_where_it_belongs(capsys: pytest.CaptureFixture[str]) -> None:
    Path("mlp_out_layer1").mkdir()
    state = {
        "bias": torch.zeros(192),
        "encoder.weight": torch.randn(48, 192),
        "encoder.bias": torch.zeros(48),
    }
    state["decoder.weight"] = state["encoder.weight"].T.clone() / 192
    torch.save(state, "mlp_out_layer1/ae.pt")
    path, place = "mlp_out_layer1/ae.pt", ("--location", PLACES[0])
    assert "--location" in fail(capsys, "evaluate", path, "--text", "books")
    found = as_json(capsys, "evaluate", path, "--text", "books", *place, "--ce-every", "0")
    assert list(found["evaluations"]) == [PLACES[0]]
    found = as_json(capsys, "sentences", "s.csv", "--autoencoder", path, *place, "--layer", "1")
    assert found["sentences"]


def test_text_that_has_changed_since(capsys: pytest.CaptureFixture[str]) -> None:
    """The split is one of the documents that there were: others would be called held out now."""
    Path("books/new.txt").write_text("Another tale. " * 50, "utf-8")
    message = fail(capsys, "evaluate", "run")
    assert "is not what it was in training" in message
    assert "--text" in message
    assert as_json(capsys, "evaluate", "run", "--text", "books", "--ce-every", "0")["part"] == "all"


def test_without_held_out_text_another_one_is_asked_for(capsys: pytest.CaptureFixture[str]) -> None:
    argv = ["train", "books", *SMALL, *WINDOWS, "--location", PLACES[0], "--hold-out", "0"]
    out = run(capsys, *argv, "--out", "all")
    assert "evaluate all --text ANOTHER_TEXT; " in out.splitlines()[-1]
    assert "measure on another text" in fail(capsys, "evaluate", "all")


@pytest.mark.parametrize("flag", [("--hold-out", "0.5"), ("--data-seed", "1")])
def test_what_was_held_out_is_not_a_matter_of_flags(
    capsys: pytest.CaptureFixture[str], flag: tuple[str, str]
) -> None:
    message = fail(capsys, "evaluate", "run", *flag)
    assert f"{flag[0]} is part of what was held out in training" in message
    assert as_json(capsys, "evaluate", "run", "--text", "books", *flag, "--ce-every", "0")


def test_flags_for_text_are_not_for_a_store(capsys: pytest.CaptureFixture[str]) -> None:
    argv = ("train", "store", *SMALL, "--location", PLACES[0], "--out", "again")
    message = fail(capsys, *argv, "--hold-out", "0.3", "--no-bos")
    assert "--hold-out, --bos: the store holds activations" in message
    assert as_json(capsys, *argv, "--buffer-tokens", "300", "--data-seed", "2")["steps"] == 6


def test_a_run_is_repeated_from_its_own_config(capsys: pytest.CaptureFixture[str]) -> None:
    argv = ["train", "books", *SMALL, *WINDOWS, "--location", PLACES[0]]
    as_json(capsys, *argv, "--out", "first")
    as_json(capsys, "train", "books", "--config", "first/config.json", "--out", "second")
    weights = [Autoencoder.load(f"{out}/autoencoder").encoder.weight for out in ("first", "second")]
    assert torch.equal(*weights)
    message = fail(capsys, "train", "store", "--config", "run/config.json", "--out", "third")
    assert "a run of several dictionaries" in message


def test_settings_of_objectives_are_told_from_those_of_the_run(
    capsys: pytest.CaptureFixture[str],
) -> None:
    Path("run.toml").write_text("steps = 3\nk = 8\n", "utf-8")
    message = fail(capsys, "train", "store", "--config", "run.toml", "--out", "x")
    assert "It is a setting of objectives: objective = { name = " in message


def test_files_that_are_there_stay(capsys: pytest.CaptureFixture[str]) -> None:
    before = Path("s.csv").read_bytes()
    message = fail(capsys, "sentences", "s.csv", "--autoencoder", "run", "--csv-out", "s.csv")
    assert "s.csv is there; choose another --csv-out" in message
    assert Path("s.csv").read_bytes() == before
    Path("there").mkdir()
    Path("there", "notes.txt").touch()
    Path("t.csv").touch()
    # What is to be read is not there: whoever looks at it first says that instead.
    for argv in (
        ("convert", "nothing", "there", "--format", "native"),
        ("convert", "nothing", "t.csv", "--format", "native"),
        ("sentences", "s.csv", "--autoencoder", "nothing", "--csv-out", "t.csv"),
    ):
        assert "is there; " in fail(capsys, *argv)
    with pytest.raises(InputError, match="exists and is not empty"):
        convert("nothing", "there", "native")
    Path("cut.csv").write_text("sentence\nHello, comma\n", "utf-8")
    assert "must stand in quotes" in fail(capsys, "sentences", "cut.csv", "--autoencoder", "run")


def test_what_cannot_be_written_is_known_before_the_work(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Root may write anywhere, so the system's refusal is played."""

    def refuse(*args: Any, **kwargs: Any) -> Any:
        raise OSError(errno.EROFS, os.strerror(errno.EROFS))

    monkeypatch.setattr("tempfile.TemporaryFile", refuse)
    # What is to be read is not there: whoever looks at it first says that instead.
    for argv in (
        ("prune", "nothing", "--out", "lean"),
        ("finetune", "nothing", "--out", "fine"),
        ("report", "nothing", "--out", "page.html"),
        ("sentences", "nothing.csv", "--csv-out", "t.csv"),
    ):
        message = fail(capsys, *argv)
        assert "cannot write" in message
        assert "Read-only file system" in message


def test_a_run_stands_for_its_one_autoencoder(capsys: pytest.CaptureFixture[str]) -> None:
    as_json(capsys, "train", "books", *SMALL, *WINDOWS, "--location", PLACES[0], "--out", "one")
    assert as_json(capsys, "latents", "Hello", "--autoencoder", "one")["location"] == PLACES[0]
    run(capsys, "convert", "one", "moved", "--format", "saelens")
    assert Path("moved/cfg.json").exists()


def test_a_run_of_several_dictionaries_in_every_verb(capsys: pytest.CaptureFixture[str]) -> None:
    looked = ("latents", "Hello", "--autoencoder", "run")
    assert as_json(capsys, *looked)["location"] == PLACES[1]  # the last layer, as of a name
    for choice in (("--layer", "1"), ("--location", PLACES[0])):
        assert as_json(capsys, *looked, *choice)["location"] == PLACES[0]
    message = fail(capsys, *looked, "--layer", "3")
    assert "run has nothing for layer 3; it has 1/resid" in message
    changed = as_json(capsys, "ablate", "Hello", "--autoencoder", "run", "--unit", "3")
    assert "latent 3 = 0.0" in changed["ablated"]
    assert "stands for several" in fail(capsys, "convert", "run", "new", "--format", "native")
    run(capsys, "convert", "run", "moved", "--layer", "2", "--format", "native")
    assert str(Autoencoder.load("moved").location) == PLACES[1]
    pruned = as_json(capsys, "prune", "run", "--location", PLACES[0], "--out", "lean")
    assert pruned["n_latents"] == 48
    assert str(Autoencoder.load("lean").location) == PLACES[0]
    found = as_json(capsys, "evaluate", "run", "--location", PLACES[0], "--ce-every", "0")
    assert list(found["evaluations"]) == [PLACES[0]]


def test_names_in_every_verb(capsys: pytest.CaptureFixture[str]) -> None:
    name, text = "ae-resid-delta-mlp", ("--text", "books")
    few = ("--num-tokens", "200", "--ce-every", "0")
    message = fail(capsys, "evaluate", name)
    assert "ae-resid-delta-mlp does not say what text it was trained on; give --text" in message
    found = as_json(capsys, "evaluate", name, *text, *few)["evaluations"]
    assert PLACES[0] in found
    assert len(found) > 2
    one = as_json(capsys, "evaluate", name, *text, *few, "--location", PLACES[0])["evaluations"]
    assert list(one) == [PLACES[0]]
    assert one[PLACES[0]]["fvu"] == pytest.approx(found[PLACES[0]]["fvu"], rel=1e-5)
    run(capsys, "convert", name, "moved", "--layer", "1", "--format", "saelens")
    assert str(Autoencoder.load("moved").location) == PLACES[0]
    assert "stands for several" in fail(capsys, "finetune", name, "--out", "new", *text)
    assert "Did you mean 'ae-resid-delta-mlp'" in fail(capsys, "evaluate", "ae-resid-delta-mpl")


def test_several_autoencoders_are_compared(capsys: pytest.CaptureFixture[str]) -> None:
    few = ("--text", "books", "--num-tokens", "200", "--ce-every", "0", "--location", PLACES[0])
    argv = ("evaluate", "run", "ae-resid-delta-mlp", *few)
    found = as_json(capsys, *argv)
    assert found["autoencoder"] == "run ae-resid-delta-mlp"
    assert [name.partition(",")[0] for name in found["evaluations"]] == [
        "1-resid.torso.delta_mlp",
        "ae-resid-delta-mlp",
    ]
    assert "1-resid.torso.delta_mlp" in run(capsys, *argv)
    message = fail(capsys, "evaluate", "run", "ae-resid-delta-mlp", "--location", PLACES[0])
    assert "not trained on the same text in the same way; give --text" in message


def test_a_store_made_in_python_is_measured_by_the_shell(
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Text and settings are noted by the library, so that what was held out is known."""
    context = ModelContext.from_model_type("tiny-tales", device="cpu")
    data = DataConfig(context_length=32, windows_per_forward=2, hold_out=0.2)
    windows = open_windows(context, "books", data)
    store = harvest_to_store("made", open_harvester(context, PLACES[0], data), windows)
    assert store.record["data"]["hold_out"] == 0.2
    config = TrainConfig(TopKConfig(k=4), n_latents=48, steps=4, batch_size=64, location=PLACES[0])
    for source, out in (("made", "from-store"), ("books", "from-text")):
        places, size = [PLACES[0]], config.batch_size
        with open_buffer(context, source, places, data, size, num_tokens=4 * size) as batches:
            train(config, batches, out, progress=False)
        found = as_json(capsys, "evaluate", out, "--ce-every", "0")
        assert found["part"] == "held_out"
        assert Path(found["text"]).name == "books"


def test_an_autoencoder_of_all_layers_needs_one(capsys: pytest.CaptureFixture[str]) -> None:
    Autoencoder(8, 192, location="resid.torso.post_mlp", model_name="tiny-tales").save("all")
    message = fail(capsys, "latents", "Hello", "--autoencoder", "all")
    assert "of every layer; say which one: --layer N" in message
    found = as_json(capsys, "latents", "Hello", "--autoencoder", "all", "--layer", "1")
    assert found["location"] == "1/resid.torso.post_mlp"


def test_figures_that_are_not_finite_are_null(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    zero = Autoencoder(4, 192, location=PLACES[0], model_name="tiny-tales")
    with torch.no_grad():
        for parameter in zero.parameters():
            parameter.zero_()
    zero.save("zero")
    argv = ["evaluate", "zero", "--text", "books", "--ce-every", "0"]
    (evaluation,) = as_json(capsys, *argv)["evaluations"].values()
    assert evaluation["relative_reconstruction_bias"] is None
    assert "nan" in run(capsys, *argv)


def test_pruned_and_finetuned_know_their_text(capsys: pytest.CaptureFixture[str]) -> None:
    one = str(sorted(Path("run/autoencoders").iterdir())[0])
    pruned = as_json(capsys, "prune", one, "--min-frequency", "0.08", "--out", "lean")
    assert pruned["part"] == "training"
    assert 0 < pruned["n_kept"] < pruned["n_latents"] == 48
    assert cli.main(["prune", one, "--min-frequency", "0.08", "--out", "again"]) == 0
    assert re.search(r"pruning: \d+batch", capsys.readouterr().err)
    out = run(capsys, "finetune", "lean", "--batch-size", "64", "--lr", "1e-3", "--out", "fine")
    assert out.splitlines()[-1] == "Next: neuron-explainer evaluate fine"
    assert as_json(capsys, "evaluate", "fine", "--ce-every", "0")["part"] == "held_out"
    before, after = Autoencoder.load("lean"), Autoencoder.load("fine")
    assert torch.equal(before.encoder.weight, after.encoder.weight)
    assert not torch.equal(before.decoder.weight, after.decoder.weight)


@pytest.mark.parametrize(("rank", "speaks"), [(None, True), ("0", True), ("1", False)])
def test_of_the_processes_of_torchrun_the_first_speaks(
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    rank: str | None,
    speaks: bool,
) -> None:
    if rank is not None:
        monkeypatch.setenv("RANK", rank)
    with cli._log_on_stderr():
        logging.getLogger("neuron_explainer.activations").info("read 3 files")
        logging.getLogger("neuron_explainer.models").warning("this is slow")
    assert capsys.readouterr().err == ("read 3 files\nthis is slow\n" if speaks else "")


def test_a_missing_picture_library_is_said_before_the_work(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    argv = ["report", "run", "--out", "other.html", "--text", "no-such-text"]
    assert "pip install matplotlib" in fail(capsys, *argv)
    assert not Path("other.html").exists()
    # A run that is not there is a mistake that no library mends.
    assert "no such file or folder" in fail(capsys, "report", "nothing", "--out", "other.html")


def test_a_report_is_one_page(capsys: pytest.CaptureFixture[str]) -> None:
    found = as_json(capsys, "report", "run")
    assert found["report"] == str(Path("run/report.html"))
    page = Path(found["report"]).read_text("utf-8")
    assert PLACES[0] in page
    assert "objective.name" in page  # what was trained
    assert found["measured_on"] in page
    assert "promotes" in page
    assert str(Path.cwd()) not in page
    assert "data.context_length" in page  # and on what
    assert "http://" not in page
    measuring.show_report(found)
    assert "Next: neuron-explainer prune run/autoencoders/1-" in capsys.readouterr().out


def test_sentences_as_table_csv_and_json(capsys: pytest.CaptureFixture[str]) -> None:
    argv = ["sentences", "s.csv", "--autoencoder", "run"]
    found = as_json(capsys, *argv, "--csv-out", "t.csv")["sentences"]
    assert [row["location"] for row in found] == [p for p in PLACES for _ in range(2)]
    with open("t.csv", encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    for row, summary in zip(rows, found, strict=True):
        assert float(row["Sparse Mean"]) == summary["mean_of_codes"]["mean"]
        assert summary["mean_of_codes"] != summary["code_of_mean"]
    one = run(capsys, *argv, "--layer", "2", "--code", "code_of_mean")
    assert f"{found[2]['code_of_mean']['max']:.6g}" in one
    assert f"{found[0]['code_of_mean']['max']:.6g}" not in one
    assert "--csv-out FILE" in one.splitlines()[-1]
    *_, written, following = run(capsys, *argv, "--csv-out", "u.csv").splitlines()
    assert written == "u.csv: the table as CSV"
    assert "--csv-out" not in following


def test_what_harvest_recommends_works(capsys: pytest.CaptureFixture[str]) -> None:
    argv = ("harvest", "books", "--location", PLACES[0], *WINDOWS, "--shard-rows", "300")
    text = run(capsys, *argv, "--out", "more")
    assert len(list(Path("more").glob("shard-*"))) > 1
    command = text.splitlines()[-1].removeprefix("Next: neuron-explainer ").split()
    assert as_json(capsys, *command, "--n-latents", "48", "--k", "4")["steps"] == 8


@pytest.mark.parametrize("verb", VERBS)
def test_help_of_each_verb(verb: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        cli.main([verb, "--help"])
    assert stop.value.code == 0
    usage, _, rest = capsys.readouterr().out.partition("\n\n")
    assert len(usage.splitlines()) <= 2
    assert "--json" in rest


TRAIN = ["train", "books", "--location", PLACES[0], *SMALL, *WINDOWS, "--out", "new"]
STORED = ["train", "store", "--location", PLACES[0], *SMALL, "--out", "new"]


def swap(argv: list[str], **values: str | list[str]) -> list[str]:
    """A command with another source or other values of options; an option is left out by []."""
    argv = list(argv)
    if "source" in values:
        argv[1] = str(values.pop("source"))
    for name, value in values.items():
        flag = f"--{name.replace('_', '-')}"
        if flag in argv:
            where = argv.index(flag)
            del argv[where : where + 2]
        if value:
            argv += [flag, str(value)]
    return argv


@pytest.mark.parametrize(
    ("argv", "parts"),
    [
        (swap(TRAIN, steps=[], num_tokens="50"), ["num_tokens = 50", "batch of 64"]),
        (swap(TRAIN, location="9/resid.torso.delta_mlp"), ["9/resid", "layers 0 to 3"]),
        (swap(TRAIN, location="1/resid.torso.delta_mpl"), ["Did you mean", "delta_mlp"]),
        (swap(STORED, location="3/resid.torso.delta_mlp"), ["store has no 3/", PLACES[0]]),
        (swap(TRAIN, location=[]), ["--location is missing"]),
        (swap(TRAIN, source="bokks"), ["bokks", "Did you mean 'books'"]),
        (swap(TRAIN, source="empty.txt"), ["empty.txt is empty"]),
        (swap(TRAIN, source="none"), ["none holds no file of text"]),
        (swap(TRAIN, source="rows.csv"), ["rows.csv has no column 'text'", "'prose'"]),
        (swap(TRAIN, source="bytes.txt"), ["bytes.txt", "not UTF-8"]),
        (swap(TRAIN, source="one.txt"), ["one.txt is a single document", "too short", "hold_out"]),
        (swap(TRAIN, config="bad.toml"), ["bad.toml", "'n_latent'", "Did you mean 'n_latents'"]),
        (swap(TRAIN, params="bad.json"), ["bad.json", "'layr'", "Did you mean 'layer'"]),
        ([*TRAIN, "--objective", "relu"], ["--k is no setting of the objective relu"]),
        (swap(TRAIN, out="books"), ["books is not empty and holds no run"]),
        (swap(TRAIN, out="run"), ["run holds a finished run"]),
        (swap(TRAIN, model="tiny-tails"), ["tiny-tails", "tiny-tales"]),
        (["train"], ["text or store"]),
        (["harvest", "books", "--location", "1/nonsense", "--out", "new"], ["nonsense"]),
        (["harvest", "books", "--location", PLACES[0], "--out", "books"], ["no store"]),
        (
            ["harvest", "books", "--location", PLACES[0], "--out", "new", "--num-tokens", "0"],
            ["--num-tokens", ">= 1"],
        ),
        (["evaluate", "nothing"], ["nothing: no such file or folder"]),
        (["evaluate", "run", "--text", "empty.txt"], ["empty.txt is empty"]),
        (["evaluate", "run", "--text", "store"], ["store of activations", "--text"]),
        (["evaluate", "loose"], ["loose does not say what text", "--text"]),
        (["prune", "run", "--out", "new"], ["several autoencoders", "run/autoencoders/1-resid"]),
        (["prune", "loose", "--text", "books", "--out", "books"], ["books", "another --out"]),
        (
            ["finetune", "loose", "--text", "books", "--out", "new", *WINDOWS],
            ["less than one batch of 4096", "--batch-size"],
        ),
        (["report", "nothing"], ["nothing is not a folder", "--out"]),
        (["report", "nothing", "--out", "new"], ["nothing: no such file or folder"]),
        (["sentences", "nothing.csv"], ["nothing.csv"]),
        (["sentences", "rows.csv"], ["'sentence'", "'prose'"]),
        (["sentences", "empty.txt"], ["empty.txt", "found nothing"]),
        (["sentences", "s.csv", "--autoencoder", "run", "--layer", "3"], ["layer 3", PLACES[1]]),
    ],
    ids=lambda value: None if isinstance(value[0], str) and " " in value[0] else value[0],
)
def test_bad_input_is_one_line_and_loses_nothing(
    capsys: pytest.CaptureFixture[str], argv: list[str], parts: list[str]
) -> None:
    Path("empty.txt").write_text("", "utf-8")
    Path("none").mkdir()
    Path("rows.csv").write_text("prose,n\nonce,1\n", "utf-8")
    Path("bytes.txt").write_bytes(b"\xff\xfe\x00once")
    Path("one.txt").write_text("Only a few words.", "utf-8")
    Path("bad.toml").write_text("n_latent = 5\n", "utf-8")
    Path("bad.json").write_text('{"layr": {"value": 1}}', "utf-8")
    width = Transformer.load("tiny-tales").cfg.d_model
    Autoencoder(8, width, location=PLACES[0]).save("loose")
    before = contents()
    error = fail(capsys, *argv)
    assert all(part in error for part in parts), error
    assert contents() == before
    assert not Path("new").exists()


def contents() -> dict[str, bytes]:
    """All files here but locks, which are empty."""
    return {
        str(path): path.read_bytes()
        for path in Path().rglob("*")
        if path.is_file() and path.name != ".lock"
    }


@pytest.mark.parametrize("harm", ["cut off", "changed", "missing"])
def test_an_unreadable_shard(capsys: pytest.CaptureFixture[str], harm: str) -> None:
    shard = Path("store/shard-00000.safetensors")
    whole = shard.read_bytes()
    if harm == "missing":
        shard.unlink()
    else:
        shard.write_bytes(whole[:-1] + (b"" if harm == "cut off" else bytes([whole[-1] ^ 1])))
    error = fail(capsys, *STORED)
    assert "shard-00000.safetensors" in error
    assert "not touched" in error
    shard.write_bytes(whole)  # found again: the same command works
    assert as_json(capsys, *STORED)["steps"] == 6


def test_activations_that_are_not_finite(capsys: pytest.CaptureFixture[str]) -> None:
    model: Any = Transformer.load("tiny-tales")
    with torch.no_grad():
        model.xf_layers[1].mlp.out_layer.bias[3] = float("nan")
    model.save("broken")
    argv = [*swap(TRAIN, model="broken")]
    for command in (argv, ["harvest", *argv[1:4], *WINDOWS, "--model", "broken", "--out", "acts"]):
        error = fail(capsys, *command)
        assert PLACES[0] in error
        assert "finite" in error or "NaN" in error
    assert not [*Path("new").rglob("*.safetensors"), *Path("acts").rglob("*.safetensors")]


def test_an_interrupted_run_goes_on(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    argv = swap(STORED, steps="60", checkpoint_every="20", log_every="20")
    whole = as_json(capsys, *swap(argv, out="whole"))
    save = RunFolder.save_checkpoint

    def interrupted(self: RunFolder, step: int, state: dict[str, Any]) -> None:
        save(self, step, state)
        if step == 40:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(RunFolder, "save_checkpoint", interrupted)
        assert cli.main(argv) == 130
    out, err = capsys.readouterr()
    assert not out
    assert "the same command goes on from the last checkpoint in new" in err
    # Other settings are refused, and lose nothing; what is not finished is not measured.
    assert "unfinished run with other settings" in fail(capsys, *swap(argv, lr="0.1"))
    assert "has not finished" in fail(capsys, "evaluate", "new")
    assert as_json(capsys, *argv)["metrics"] == whole["metrics"]
    lines = Path("new/log.jsonl").read_text("utf-8").splitlines()
    assert [json.loads(line)["step"] for line in lines] == [20, 40, 60]
    one, other = Autoencoder.load("new/autoencoder"), Autoencoder.load("whole/autoencoder")
    assert torch.equal(one.encoder.weight, other.encoder.weight)


# ``neuron-explainer …`` that kills itself, as the system would, in the middle of its n-th step.
DYING = """
import os, signal, sys
from neuron_explainer import cli
from neuron_explainer.dictionaries.logs import Logs

steps_left = int(sys.argv.pop(1))
step = Logs.step

def dying(self):
    global steps_left
    steps_left -= 1
    if not steps_left:
        os.kill(os.getpid(), signal.SIGKILL)
    step(self)

Logs.step = dying
sys.exit(cli.main(sys.argv[1:]))
"""


@pytest.mark.parametrize("objective", ["batch_topk", pytest.param("relu", marks=pytest.mark.slow)])
def test_a_command_that_is_killed_goes_on_to_the_same_weights(
    objective: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """SIGKILL of the whole of it: model, buffer, steps, checkpoints."""
    argv = ["train", "books", "--location", PLACES[0]]
    argv += ["--objective", objective, "--steps", "30", "--batch-size", "64", "--n-latents", "64"]
    argv += [*WINDOWS, "--buffer-tokens", "400", "--checkpoint-every", "7", "--log-every", "1"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    run(capsys, *argv, "--out", "whole")
    for steps in (5, 24):  # before the first checkpoint; between two, after a start from none
        dying = [sys.executable, "-c", DYING, str(steps), *argv, "--out", "killed"]
        process = subprocess.run(dying, env=environment, capture_output=True, check=False)
        assert process.returncode == -signal.SIGKILL, process.stderr
    run(capsys, *argv, "--out", "killed")
    weights = [
        Path(run, "autoencoder", "autoencoder.safetensors").read_bytes()
        for run in ("whole", "killed")
    ]
    assert weights[0] == weights[1]
