"""collate, inspect and page: what they print, as text and as JSON, and how they fail."""

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from neuron_explainer import cli
from neuron_explainer.activations import TokenWindows, start_token, tokenize
from neuron_explainer.analysis import CollateConfig, ExampleStore, collate
from neuron_explainer.analysis.collation.quantiles import windows_of_store
from neuron_explainer.analysis.directions import top_logits
from neuron_explainer.analysis.interchange.dashboards import (
    import_dashboards,
    read_dashboards,
    read_neuronpedia,
)
from neuron_explainer.errors import InputError
from neuron_explainer.evaluation.passage import PASSAGE
from neuron_explainer.models.autoencoder import Autoencoder, TopK
from neuron_explainer.models.locations import ActivationLocation
from neuron_explainer.models.model_context import ModelContext
from neuron_explainer.models.model_registry import make_autoencoder_context
from tests.test_cli import fail, run

TEXT = "The king gave his daughter a golden"
NAME = "2.resid.torso.delta_mlp"
PLACE = "2/resid.torso.delta_mlp"
SMALL = ["--context-length", "32", "--windows-per-forward", "8", "--window", "16"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Stores of latents, neurons and heads over a short text."""
    folder = tmp_path_factory.mktemp("inspect")
    books = folder / "books"
    books.mkdir()
    for number, paragraph in enumerate(PASSAGE.split("\n\n")):
        (books / f"{number}.txt").write_text(paragraph, "utf-8")
    argv = ["collate", str(books), "--autoencoder", "ae-resid-delta-mlp", "--layer", "2"]
    argv += ["--location", "1/mlp.post_act", "1/attn.write_norm", *SMALL]
    assert cli.main([*argv, "--out", str(folder / "stores"), "--json"]) == 0
    return folder


@pytest.fixture
def store(folder: Path) -> ExampleStore:
    return ExampleStore.open(folder / "stores" / f"{NAME}.store")


@pytest.fixture
def path(folder: Path) -> str:
    return str(folder / "stores" / NAME)


# --- collate ---


def test_collate_is_the_librarys(folder: Path, store: ExampleStore, tmp_path: Path) -> None:
    context = ModelContext.from_model_type("tiny-tales")
    saes = make_autoencoder_context("tiny-tales", "ae-resid-delta-mlp", device=context.device)
    texts = [(folder / "books" / f"{i}.txt").read_text("utf-8") for i in range(7)]
    corpus, start = tokenize(texts, context), start_token(context)
    windows = TokenWindows(corpus, 32, 8, bos=start, seed=None)
    what = {PLACE: saes.get_autoencoder(2).float()}
    made = collate(
        context, what, windows, tmp_path / "out", CollateConfig(window=16), progress=False
    )
    expected = ExampleStore.open(made[PLACE])
    assert store.provenance["autoencoder_sha256"] == expected.provenance["autoencoder_sha256"]
    for unit in store.sort("max", limit=5).tolist():
        assert repr(store[unit]) == repr(expected[unit])
    assert store.provenance["autoencoder"] == "ae-resid-delta-mlp/2"
    assert store.provenance["model"] == "tiny-tales"


def test_collate_says_what_it_read_and_what_is_next(
    capsys: pytest.CaptureFixture[str], folder: Path, tmp_path: Path
) -> None:
    place, out = "0/mlp.post_act", str(tmp_path / "out")
    argv = ["collate", str(folder / "books"), "--location", place, "--out", out, *SMALL]
    said = run(capsys, *argv, "--no-pack", "--top", "2")
    assert re.search(r"\d+ documents, 699 tokens of ", said)
    assert "768 neurons" in said
    next_one = said.splitlines()[-1].removeprefix("Next: neuron-explainer ")
    assert "768" in run(capsys, *next_one.split())
    assert "collated already" in fail(capsys, *argv)
    store = ExampleStore.open(out)
    assert len(store[3].top) <= 2
    # Each row holds one piece of a document: what stands before it does not matter.
    assert store.settings["windows"]["concat"] is False


def test_an_interrupted_collation_continues(
    capsys: pytest.CaptureFixture[str], folder: Path, path: str, tmp_path: Path, monkeypatch
) -> None:
    out = str(tmp_path / "out")
    argv = ["collate", str(folder / "books"), "--autoencoder", "ae-resid-delta-mlp", "--layer", "2"]
    argv += ["--out", out, *SMALL]
    batch = TokenWindows.batch

    def stopped(self: TokenWindows, number: int) -> object:
        if number == 2:
            raise KeyboardInterrupt
        return batch(self, number)

    monkeypatch.setattr(TokenWindows, "batch", stopped)
    assert cli.main(argv) == 130
    assert "the same command continues" in capsys.readouterr().err
    monkeypatch.setattr(TokenWindows, "batch", batch)
    run(capsys, *argv)
    whole, resumed = ExampleStore.open(path), ExampleStore.open(out)
    for unit in whole.alive[:20].tolist():
        assert repr(whole[unit]) == repr(resumed[unit])


# --- inspect ---


def test_inspect_a_unit(capsys: pytest.CaptureFixture[str], store: ExampleStore, path: str) -> None:
    unit = int(store.sort("max", limit=1)[0])
    said = run(capsys, "inspect", path, str(unit))
    assert said.startswith(store[unit].text(5))
    assert "raises" in said
    assert "excited most by" in said
    found = json.loads(run(capsys, "inspect", path, str(unit), "--json"))
    first = store[unit].top[0]
    assert found["examples"][0]["tokens"] == first.strings
    assert found["examples"][0]["value"] == pytest.approx(first.value)
    assert found["statistics"]["count"] == store[unit].statistics.count
    context = ModelContext.from_model_type("tiny-tales")
    saes = make_autoencoder_context("tiny-tales", "ae-resid-delta-mlp", device=context.device)
    expected = top_logits(context, saes.get_autoencoder(2).float(), unit)
    assert [each["token"] for each in found["tokens"]["logits"]["top"]] == [
        each.token for each in expected.top
    ]
    short = json.loads(run(capsys, "inspect", path, str(unit), "--no-model", "--json"))
    assert short["tokens"] is None


def test_inspect_needs_no_model(path: str) -> None:
    argv = ["inspect", path, "1234", "--no-model"]
    script = (
        f"import sys; from neuron_explainer import cli; cli.main({argv}); "
        "assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", script], check=True, capture_output=True)


def test_colours_only_where_they_are_wanted(
    capsys: pytest.CaptureFixture[str], store: ExampleStore, path: str, monkeypatch
) -> None:
    argv = ["inspect", path, str(int(store.sort("max", limit=1)[0])), "--no-model"]
    monkeypatch.delenv("NO_COLOR", raising=False)
    monkeypatch.setenv("TERM", "xterm-256color")
    assert "\x1b" not in run(capsys, *argv)  # not a terminal
    monkeypatch.setattr("sys.stdout.isatty", lambda: True, raising=False)
    assert "\x1b[1;4;38;5;16;48;5;208m" in run(capsys, *argv)
    for name, value in (("NO_COLOR", "1"), ("TERM", "dumb")):
        with monkeypatch.context() as other:
            other.setenv(name, value)
            assert "\x1b" not in run(capsys, *argv)
    text = store[int(argv[2])].top[0].text
    assert "\x1b" in run(capsys, "inspect", path, argv[2], "--on", text)


def test_lists_of_units(capsys: pytest.CaptureFixture[str], store: ExampleStore, path: str) -> None:
    found = json.loads(run(capsys, "inspect", path, "--sort", "density", "--top", "3", "--json"))
    assert [each["unit"] for each in found["units"]] == store.sort("density", limit=3).tolist()
    argv = ["inspect", path, "--sort", "skewness", "--ascending", "--json"]
    found = json.loads(run(capsys, *argv))
    expected = store.sort("skewness", descending=False, limit=20, among=store.alive)
    assert [each["unit"] for each in found["units"]] == expected.tolist()
    assert "skewness" in found["units"][0]
    said = run(capsys, "inspect", path)
    assert f"{len(store.dead):,}" in said
    unit = int(store.sort("max", limit=1)[0])
    assert f"'{store[unit].top[0].strings[store[unit].top[0].peak]}'" in said
    assert f"Next: neuron-explainer inspect {path} {unit}" in said
    listed = run(capsys, "inspect", str(Path(path).parent))
    assert {"1/attn.write_norm.heads", "1/mlp.post_act.neurons", PLACE} <= set(listed.split())


def test_labels(capsys: pytest.CaptureFixture[str], path: str, store: ExampleStore) -> None:
    said = run(capsys, "inspect", path, "7", "--label", "royal \x1b[2J titles", "--no-model")
    assert "“royal \\x1b[2J titles”" in said
    assert "\x1b" not in said
    found = json.loads(run(capsys, "inspect", path, "--search", "roy", "--json"))
    assert [(each["unit"], each["source"]) for each in found["found"]] == [(7, "user")]
    assert "7" in run(capsys, "inspect", path, "--search", "titles")
    assert "no label" in run(capsys, "inspect", path, "--search", "peasants")
    run(capsys, "inspect", path, "7", "--label", "", "--no-model")
    assert "no label" in run(capsys, "inspect", path, "--search", "royal")


def test_units_on_a_text(
    capsys: pytest.CaptureFixture[str], store: ExampleStore, path: str
) -> None:
    context = ModelContext.from_model_type("tiny-tales")
    saes = make_autoencoder_context("tiny-tales", "ae-resid-delta-mlp", device=context.device)
    with torch.no_grad():
        x = context.get_or_create_model().capture([TEXT], PLACE)[PLACE][0]
        latents = saes.get_autoencoder(2).float().encode(x)
    unit = int(latents[3].argmax())
    store.workspace.set_label(unit, "what is told")
    found = json.loads(run(capsys, "inspect", path, "--on", TEXT, "--top", "2", "--json"))
    assert "".join(each["token"] for each in found["tokens"]) == TEXT
    for each, row in zip(found["tokens"], latents, strict=True):
        values, units = row.topk(2)
        assert [u["unit"] for u in each["units"]] == units.tolist()
        assert [u["activation"] for u in each["units"]] == pytest.approx(values.tolist(), abs=1e-4)
    assert "what is told" in run(capsys, "inspect", path, "--on", TEXT)
    lines = run(capsys, "inspect", path, str(unit), "--on", TEXT).splitlines()
    assert "[[" in lines[0]
    neurons = str(Path(path).with_name("1.mlp.post_act.neurons"))
    found = json.loads(run(capsys, "inspect", neurons, "--on", TEXT, "--json"))
    assert found["kind"] == "neuron"
    store.workspace.set_label(unit, "")


def test_errors(
    capsys: pytest.CaptureFixture[str], path: str, folder: Path, tmp_path: Path
) -> None:
    heads = str(Path(path).with_name("1.attn.write_norm.heads"))
    for argv, said in (
        ([path, "2560"], "0 to 2559"),
        ([path, "7", "--sort", "max"], "leave UNIT out"),
        ([path, "--sort", "max", "--search", "x"], "one of --search, --sort"),
        ([path, "--sort", "densty"], "Did you mean 'density'"),
        ([path, "--label", "x"], "give its number"),
        ([path, "--ascending"], "needs --sort"),
        ([heads, "--on", "x"], "one for each pair"),
        ([str(folder / "stores"), "7"], "give one of these names"),
        ([str(tmp_path / "nothing"), "7"], "no store of examples"),
        (["tiny-tails/ae", "7"], "tiny-tales comes with the package"),
        ([path, "--on", "x", "--model", "nothing"], "nothing"),
    ):
        assert said in fail(capsys, "inspect", *argv), argv
    argv = ["collate", str(folder / "books"), "--out", str(tmp_path / "o")]
    assert "--autoencoder, --location" in fail(capsys, *argv)
    Autoencoder(8, 192, TopK(2)).save(tmp_path / "ae")
    said = fail(capsys, *argv, "--autoencoder", str(tmp_path / "ae"))
    assert "does not say where in the model it belongs" in said


def test_another_autoencoder_is_refused_and_a_moved_one_is_found(
    capsys: pytest.CaptureFixture[str], folder: Path, tmp_path: Path
) -> None:
    torch.manual_seed(0)
    for name in "ab":
        Autoencoder(16, 192, TopK(2), location="0/resid.torso.delta_mlp").save(tmp_path / name)
    out = str(tmp_path / "out")
    argv = ["collate", str(folder / "books"), "--autoencoder", str(tmp_path / "a"), "--out", out]
    run(capsys, *argv, *SMALL)
    assert "raises" in run(capsys, "inspect", out, "3")
    other = ["--autoencoder", str(tmp_path / "b")]
    assert "another autoencoder" in fail(capsys, "inspect", out, "--on", TEXT, *other)
    (tmp_path / "a").rename(tmp_path / "c")
    said = run(capsys, "inspect", out, "3")
    assert "are left out" in said
    assert "raises" not in said
    assert "raises" in run(capsys, "inspect", out, "3", "--autoencoder", str(tmp_path / "c"))


# --- page ---


def test_page(
    capsys: pytest.CaptureFixture[str], store: ExampleStore, path: str, tmp_path: Path
) -> None:
    units = [(path, int(store.sort("max", limit=1)[0])), (path, int(store.dead[0]))]
    units += [(str(Path(path).with_name(f"1.{name}")), 3) for name in ("mlp.post_act.neurons",)]
    units += [(str(Path(path).with_name("1.attn.write_norm.heads")), 3)]
    for name, unit in units:
        file = tmp_path / f"{unit}.html"
        said = run(capsys, "page", name, str(unit), "--out", str(file))
        page = file.read_text("utf-8")
        assert f"{len(page.encode()) / 1000:.1f} kB" in said
        assert len(page.encode()) <= 60_000
        assert "<script" not in page
        assert not re.search(r"""(src|href)\s*=|url\(|@import""", page)
        heads = "heads" in name
        assert ("Next tokens" in page) is not heads
        assert ("are left out" in said) is heads
    assert "2559" in fail(capsys, "page", path, "2560", "--out", str(tmp_path / "x.html"))
    assert not (tmp_path / "x.html").exists()


def test_numbers_of_json_are_plain(capsys: pytest.CaptureFixture[str], path: str) -> None:
    found = json.loads(run(capsys, "inspect", path, "--json"))
    assert found["n_units"] == 2560
    assert np.isfinite(found["units"][0]["max"])


def test_exported_cards_have_the_tokens_that_a_latent_promotes(
    capsys: pytest.CaptureFixture[str], path: str, store: ExampleStore, tmp_path: Path
) -> None:
    units = [int(unit) for unit in store.sort("max", limit=2)]
    chosen = ",".join(map(str, units))
    context = ModelContext.from_model_type("tiny-tales")
    saes = make_autoencoder_context("tiny-tales", "ae-resid-delta-mlp", device=context.device)
    expected = top_logits(context, saes.get_autoencoder(2).float(), units[1])
    for form in ("saedashboard", "neuronpedia"):
        argv = ["export-records", path, "--format", form, "--units", chosen]
        said = run(capsys, *argv, "--out", str(tmp_path / form))
        assert "promote" not in said
        if form == "saedashboard":
            cards: Any = read_dashboards(tmp_path / form)[0].features
        else:
            cards = read_neuronpedia(tmp_path / form).features
        assert cards[1].pos_str == [each.text for each in expected.top]
        assert cards[1].neg_str == [each.text for each in expected.bottom]
        assert cards[1].pos_values == pytest.approx([each.value for each in expected.top], rel=1e-4)
        assert sum(cards[1].logits_hist_data_bar_heights) == sum(expected.counts)
        said = run(capsys, *argv, "--no-model", "--out", str(tmp_path / "without" / form))
        assert "tokens that units promote are left out: --no-model" in said
    assert read_dashboards(tmp_path / "without" / "saedashboard")[0].features[1].pos_str == []


@pytest.mark.parametrize("name", [NAME, "1.mlp.post_act.neurons", "1.attn.write_norm.heads"])
def test_quantiles_are_those_of_the_store_and_its_text(
    capsys: pytest.CaptureFixture[str], folder: Path, name: str
) -> None:
    path = str(folder / "stores" / name)
    store = ExampleStore.open(path)
    unit = str(int(store.sort("count", limit=1)[0]))
    argv = ["inspect", path, unit, "--quantiles", "3"]
    found = json.loads(run(capsys, *argv, "--top", "1000", "--json"))["quantiles"]
    values = [[e["value"] for e in part["examples"]] for part in found]
    assert [part["contexts"] for part in found] == [*map(len, values)]
    assert max(map(len, values)) - min(map(len, values)) <= 1
    assert [part["largest"] for part in found] == [*map(max, values)]
    assert [part["smallest"] for part in found] == [*map(min, values)]
    assert min(values[0]) >= max(values[1]) >= min(values[1]) >= max(values[2])
    # All of the store's examples are among them. (Passes that look at other places too round differently.)
    ours = {(e["document"], e["position"]): e for part in found for e in part["examples"]}
    for example in store[int(unit)].all_examples:
        again = ours[example.document, example.position]
        assert (again["ids"], again["peak"]) == (example.tokens.tolist(), example.peak)
        assert again["value"] == pytest.approx(example.value, rel=1e-4)
        assert again["activations"] == pytest.approx(example.activations.tolist(), abs=0.01)
    assert cli.main(argv) == 0
    said, shown = capsys.readouterr()
    assert "reading: 100%" in shown
    assert f"quantile 3: {len(values[2]):,} contexts" in said
    assert said.count("\n  ") == 6  # two examples of each


def test_quantiles_need_a_unit_the_model_and_a_collated_store(
    capsys: pytest.CaptureFixture[str], path: str, tmp_path: Path
) -> None:
    peer = Path(__file__).parent / "fixtures" / "peers" / "sae-dashboard" / "batch-0.json"
    for more, message in [
        (["--quantiles", "3"], "give its number"),
        (["3", "--quantiles", "3", "--no-model"], "run the model"),
        (["3", "--quantiles", "101"], "n must be 1 to 100"),
        (["3", "--quantiles", "3", "--on", "a"], "no other option"),
    ]:
        assert message in fail(capsys, "inspect", path, *more)
    (imported,) = import_dashboards(peer, tmp_path)
    with pytest.raises(InputError, match="imported, not collated"):
        windows_of_store(ExampleStore.open(imported))


# --- collate: several texts, other dictionaries, several processes ---


def test_several_texts_are_read_one_after_the_other(
    capsys: pytest.CaptureFixture[str], folder: Path, store: ExampleStore, tmp_path: Path
) -> None:
    books = [str(folder / "books" / f"{number}.txt") for number in range(7)]
    argv = ["--autoencoder", "ae-resid-delta-mlp", "--layer", "2"]
    argv += ["--location", "1/mlp.post_act", "1/attn.write_norm", *SMALL]
    said = run(capsys, "collate", *books, *argv, "--out", str(tmp_path / "all"))
    assert f"7 documents, 699 tokens of {', '.join(books)}" in said
    found = ExampleStore.open(tmp_path / "all" / f"{NAME}.store")
    assert found.tokens.corpus.name == " + ".join(f"{number}.txt" for number in range(7))
    for unit in store.sort("max", limit=5).tolist():
        assert repr(found[unit]) == repr(store[unit])
    some = ["--corpus-tokens", "150", "--out", str(tmp_path / "some"), "--json"]
    assert json.loads(run(capsys, "collate", *books, *argv, *some))["n_documents"] == 2
    assert "no file or folder" in fail(capsys, "collate", books[0], "gone", *argv, *some)


@pytest.mark.parametrize("kind", ["transcoder", "signed"])
def test_transcoders_and_signed_latents(
    kind: str, capsys: pytest.CaptureFixture[str], folder: Path, tmp_path: Path
) -> None:
    torch.manual_seed(0)
    if kind == "signed":
        made = Autoencoder(40, 192, activation=TopK(36, postact_fn=torch.nn.Identity()))
        made.location = ActivationLocation.parse(PLACE)
    else:
        made = Autoencoder(40, 192, activation=TopK(4), n_outputs=192)
        made.location = ActivationLocation.parse("2/resid.torso.post_ln_mlp")
        made.output_location = ActivationLocation.parse(PLACE)
    with torch.no_grad():
        made.encoder.weight.add_(torch.randn(made.encoder.weight.shape))
        made.decoder.weight.add_(torch.randn(made.decoder.weight.shape))
    made.save(tmp_path / "a")
    made = Autoencoder.load(tmp_path / "a")
    out = str(tmp_path / "stores")
    argv = ["collate", str(folder / "books"), "--autoencoder", str(tmp_path / "a"), *SMALL]
    run(capsys, *argv, "--out", out)
    store = ExampleStore.open(out)
    assert (store.location, store.signed) == (str(made.location), kind == "signed")
    by = "min" if kind == "signed" else "max"
    unit = int(store.sort(by, descending=by == "max", limit=1)[0])
    record = store[unit]
    assert bool(record.examples("bottom")) == (kind == "signed")
    said = run(capsys, "inspect", out, str(unit))
    assert said.startswith(record.text(5))
    assert "raises" in said  # by what it writes, at its output
    assert "excited most by" in said or "Input tokens" in said
    context = ModelContext.from_model_type("tiny-tales")
    expected = top_logits(context, made, unit)
    found = json.loads(run(capsys, "inspect", out, str(unit), "--json"))["tokens"]["logits"]
    assert [e["token"] for e in found["top"]] == [e.token for e in expected.top]
    page = tmp_path / "page.html"
    run(capsys, "page", out, str(unit), "--out", str(page))
    assert ("Most negative values" in page.read_text("utf-8")) == (kind == "signed")
    text = record.examples("bottom" if kind == "signed" else "top")[0].text
    assert str(unit) in run(capsys, "inspect", out, str(unit), "--on", text)


@pytest.mark.slow
def test_collate_under_torchrun(folder: Path, tmp_path: Path) -> None:
    command = (
        f"-m torch.distributed.run --standalone --nproc-per-node 2 -m neuron_explainer collate "
        f"{folder}/books --autoencoder ae-resid-delta-mlp --layer 2 --device cpu "
        "--location 1/mlp.post_act 1/attn.write_norm "
        f"--out {tmp_path}/two --json"
    )
    done = subprocess.run(
        [sys.executable, *command.split(), *SMALL],
        capture_output=True,
        text=True,
        check=True,
    )
    assert json.loads(done.stdout)["n_tokens"] == 699  # printed once
    for path in (tmp_path / "two").glob("*.store"):
        assert path.read_bytes() == (folder / "stores" / path.name).read_bytes()
    assert len(list((tmp_path / "two").glob("*.store"))) == 3
