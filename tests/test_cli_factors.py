"""Transformer factors from the shell: one flow from a text to pages, its JSON, and bad input."""

import json
import os
import re
import shlex
import shutil
from pathlib import Path
from typing import Any

import pytest

from neuron_explainer import cli
from neuron_explainer.activations import open_token_file
from neuron_explainer.analysis.factors import FactorExamples, SaliencyFile, read_records
from neuron_explainer.cli import factors
from neuron_explainer.dictionaries.runs import Run
from neuron_explainer.evaluation.passage import PASSAGE

PLACE = "resid.torso.post_mlp"
LEARN = [
    *("--location", PLACE, "--n-latents", "24", "--penalty", "12", "--tolerance", "0.05"),
    *("--step-size", "0.05", "--sentence-length", "20", "--windows-per-forward", "8"),
]


def run(capsys: pytest.CaptureFixture[str], *argv: str) -> str:
    assert cli.main(["factors", *argv]) == 0, capsys.readouterr().err
    return capsys.readouterr().out


def as_json(capsys: pytest.CaptureFixture[str], *argv: str) -> dict[str, Any]:
    found = json.loads(run(capsys, *argv, "--json"))
    assert isinstance(found, dict)
    return found


def fail(capsys: pytest.CaptureFixture[str], *argv: str) -> str:
    assert cli.main(["factors", *argv]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    return err


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A text, a run of one dictionary for layers 0, 2 and 3, and its examples."""
    folder = tmp_path_factory.mktemp("factors")
    (folder / "text.txt").write_text(PASSAGE, "utf-8")
    before = Path.cwd()
    os.chdir(folder)
    try:
        argv = ["learn", "text.txt", *LEARN, "--layers", "0", "2", "3", "--out", "run", "--json"]
        assert cli.main(["factors", *argv]) == 0
        argv = ["collate", "run", "--out", "examples", "--n-examples", "20", "--json"]
        assert cli.main(["factors", *argv]) == 0
    finally:
        os.chdir(before)
    return folder


@pytest.fixture(autouse=True)
def in_a_copy(made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    work = tmp_path / "work"
    shutil.copytree(made, work)
    monkeypatch.chdir(work)
    for name in ("run/config.json", "examples/config.json"):
        path = work / name
        path.write_text(path.read_text("utf-8").replace(str(made), str(work)), "utf-8")


def test_every_step_says_the_next_one(capsys: pytest.CaptureFixture[str]) -> None:
    """From a text to pages, with the commands that are printed, at small sizes."""
    small = {
        "learn": ["--sentence-length", "20", "--tolerance", "0.05", "--layers", "1", "2"],
        "saliency": ["--num-samples", "30", "--num-factors", "2", "--num-sentences", "2"],
    }
    folders = {"RUN": "r", "EXAMPLES": "e", "PAGES": "p", "500": "24", "0.3": "12"}
    out = run(capsys, "prepare", "text.txt", "--split", r"\n\n", "--out", "tokens")
    verbs = []
    while "Next: neuron-explainer factors" in (last := out.splitlines()[-1]):
        argv = [folders.get(word, word) for word in shlex.split(last)[3:]]
        verbs.append(argv[0])
        out = run(capsys, *argv, *small.get(argv[0], []))
    assert verbs == ["learn", "collate", "importance", "saliency", "pages"]
    assert last == f"Next: open {Path('p/index.html')} in a browser"
    pages = sorted(path.name for path in Path("p").iterdir())
    assert "index.html" in pages
    assert len(pages) > 2
    explained = SaliencyFile("e").read()
    assert len({each.factor for each in explained}) == 2
    html = Path("p", f"factor-{explained[0].factor:04d}.html").read_text("utf-8")
    assert re.search(r'class="(target )?(up|down)" style="--w:', html)


def test_one_dictionary_for_the_chosen_layers(capsys: pytest.CaptureFixture[str]) -> None:
    assert [path.name for path in Run.open("run").results.values()] == [PLACE]
    examples = FactorExamples.load("examples")
    assert list(map(str, examples.locations)) == [f"{n}/{PLACE}" for n in (0, 2, 3)]
    assert examples.settings["n_layers"] == 4
    longest = max(
        len(each.tokens) for n in (0, 2, 3) for each in examples.examples(0, f"{n}/{PLACE}")
    )
    assert longest <= 20
    # The same command finds the run finished; more epochs continue it.
    again = ["learn", "text.txt", *LEARN, "--layers", "0", "2", "3", "--out", "run"]
    steps = [as_json(capsys, *again, "--epochs", str(n))["steps"] for n in (1, 2)]
    assert steps[1] == 2 * steps[0]
    assert "other settings" in fail(capsys, *again, "--seed", "3", "--json")
    found = as_json(capsys, "importance", "examples", "--num-factors", "3", "--csv", "i.csv")
    assert sum(found["levels"].values()) == 24
    assert len(found["factors"]) == 3
    assert len(Path("i.csv").read_text("utf-8").splitlines()) == 25
    some = found["factors"][0]["factor"]
    other = as_json(capsys, "importance", "examples", "--factor", str(some), "--relative")
    divided = [
        x / rms for x, rms in zip(found["factors"][0]["importance"], found["rms"], strict=True)
    ]
    assert other["factors"][0]["importance"] == pytest.approx(divided)
    assert "--relative" in run(capsys, "importance", "examples")


def test_a_dictionary_for_each_layer(capsys: pytest.CaptureFixture[str]) -> None:
    layers = ["--layers", "0", "1", "--no-across-layers", "--no-token-weights"]
    run(capsys, "learn", "text.txt", *LEARN, *layers, "--out", "own")
    found = as_json(capsys, "collate", "own", "--out", "both", "--n-examples", "5")
    names = [Path(each["examples"]).name for each in found["dictionaries"]]
    assert names == [f"0-{PLACE}", f"1-{PLACE}"]
    as_json(capsys, "saliency", f"both/1-{PLACE}", "--num-samples", "10", "--num-factors", "1",
            "--num-sentences", "1")  # fmt: skip
    # One of them, looked at in all layers.
    argv = ["--location", f"1/{PLACE}", "--layers", "0", "1", "2", "3", "--text", "text.txt"]
    run(capsys, "collate", "own", *argv, "--out", "all", "--n-examples", "5")
    assert len(FactorExamples.load("all").locations) == 4


def test_any_autoencoder_has_factors(capsys: pytest.CaptureFixture[str]) -> None:
    name, place = "ae-resid-delta-mlp", "2/resid.torso.delta_mlp"
    argv = ["--location", place, "--text", "text.txt", "--n-examples", "3"]
    run(capsys, "collate", name, *argv, "--out", "ae")
    argv = ["--num-factors", "1", "--num-sentences", "1", "--num-samples", "10"]
    assert as_json(capsys, "saliency", "ae", *argv)["computed"] == 1


def test_saliency_continues(capsys: pytest.CaptureFixture[str]) -> None:
    argv = ["saliency", "examples", "--num-factors", "2", "--num-samples", "20"]
    first = as_json(capsys, *argv, "--num-sentences", "1")
    assert (first["computed"], first["already_there"]) == (2, 0)
    assert first["replacement"] == " "
    second = as_json(capsys, *argv, "--num-sentences", "2")
    assert (second["computed"], second["already_there"]) == (2, 2)
    assert "num_samples" in fail(capsys, "saliency", "examples", "--num-samples", "21")


def test_records_are_json_lines(capsys: pytest.CaptureFixture[str]) -> None:
    found = as_json(capsys, "records", "examples", "--layer", "2", "--top", "4", "--out", "r.jsonl")
    records = read_records("r.jsonl")
    assert sum(map(len, records.values())) == found["n_records"]
    assert all(len(some) <= 4 for some in records.values())
    assert "choose one of" in fail(capsys, "records", "examples", "--out", "s.jsonl")
    assert "pickle" in fail(capsys, "records", "examples", "--layer", "2", "--out", "s.npy")


def test_a_penalty_that_is_too_small_is_said(capsys: pytest.CaptureFixture[str]) -> None:
    for l0, said in ((50.0, False), (70.4, True)):
        factors.show_learn(
            {"run": "run", "steps": 3, "metrics": {"a": {"l0": 2.0}, "b": {"l0": l0}}}
        )
        assert ("70 factors are active on a token" in capsys.readouterr().out) == said


def test_articles_of_wikitext(capsys: pytest.CaptureFixture[str]) -> None:
    long = "word " * 500
    Path("wiki.txt").write_text(
        f" \n = First = \n \n {long} \n = = Section = = \n {long}\n"
        f" = Too short = \n \n few words \n = Second @-@ one = \n \n {long}\n",
        "utf-8",
    )
    found = as_json(capsys, "prepare", "wiki.txt", "--articles", "--out", "tokens")
    assert found["n_documents"] == 2
    corpus = open_token_file("tokens")
    assert sorted(corpus.lengths.tolist())[1] > 1.8 * min(corpus.lengths)
    found = as_json(
        capsys, "prepare", "wiki.txt", "--articles", "--num-documents", "1", "--out", "one"
    )
    assert found["n_documents"] == 1
    assert "no document of more than 9999" in fail(
        capsys, "prepare", "wiki.txt", "--min-chars", "9999", "--out", "none"
    )
    assert "not both" in fail(
        capsys, "prepare", "wiki.txt", "--articles", "--split", "x", "--out", "none"
    )


def test_what_does_not_fit_is_said(capsys: pytest.CaptureFixture[str]) -> None:
    assert "holds no config.json" in fail(capsys, "importance", "run/checkpoints")
    assert "factor_examples" in fail(capsys, "pages", "run", "--out", "p")
    assert "numbered 0 to 23; found 24" in fail(capsys, "importance", "examples", "--factor", "24")
    assert "is not empty" in fail(capsys, "collate", "run", "--out", "examples")
    assert "layers 0 to 3" in fail(
        capsys, "learn", "text.txt", *LEARN, "--layers", "9", "--out", "x"
    )
    long = [*LEARN, "--sentence-length", "9999"]
    assert "--sentence-length 255 is the most" in fail(
        capsys, "learn", "text.txt", *long, "--out", "x"
    )
    shutil.rmtree("run")
    run(capsys, "learn", "text.txt", *LEARN, "--seed", "1", "--layers", "0", "--out", "run")
    assert "is not the dictionary" in fail(capsys, "saliency", "examples")


@pytest.mark.parametrize(
    "verb", ["prepare", "learn", "collate", "importance", "saliency", "pages", "records"]
)
def test_help_of_each_verb(verb: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        cli.main(["factors", verb, "--help"])
    assert stop.value.code == 0
    out = capsys.readouterr().out
    assert out.startswith(f"example: neuron-explainer factors {verb}")


def test_titles_of_articles() -> None:
    lines = [" = Title = ", " = A = B = ", " = = Section = = ", " text = more", " = x"]
    assert [bool(re.search(factors.ARTICLE_TITLE, line)) for line in lines] == [
        True,
        True,
        False,
        False,
        False,
    ]
