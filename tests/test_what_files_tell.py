"""No file that a command writes names the folders of its user; folders that lie side by side can be moved."""

import contextlib
from pathlib import Path

import pytest

from neuron_explainer import cli, files
from neuron_explainer.activations import ActivationStore, open_token_file, write_token_file
from neuron_explainer.activations.documents import read_documents
from neuron_explainer.dictionaries.runs import Run
from neuron_explainer.evaluation.passage import PASSAGE
from neuron_explainer.files import origins
from neuron_explainer.models.autoencoder import Autoencoder
from neuron_explainer.models.model_context import StandardModelContext
from neuron_explainer.models.transformer import Transformer
from tests.blob_server import BlobServer

PLACE = "1/mlp.post_act"
USER = "alice-of-the-lab"
SMALL = ["--steps", "2", "--batch-size", "16", "--n-latents", "20", "--k", "4", "--log-every", "1"]
MEASURE = ["--num-tokens", "200"]
WINDOWS = ["--context-length", "24", "--windows-per-forward", "4"]


def work(home: Path) -> None:
    """Everything that writes, given absolute paths."""
    model, books = str(home / "model"), str(home / "books")
    pruned = ["--min-max-activation", "0", "--min-decoder-norm", "0"]
    for name, *argv in (
        ("store", "harvest", books, "--location", PLACE, "--model", model, *WINDOWS),
        ("run", "train", str(home / "store"), *SMALL),
        ("live", "train", books, "--location", PLACE, "--model", model, *WINDOWS, *SMALL),
        ("pruned", "prune", str(home / "run" / "autoencoder"), *MEASURE, *pruned),
        ("tuned", "finetune", str(home / "live"), *MEASURE, "--batch-size", "32"),
        ("run/report.html", "report", str(home / "run"), *MEASURE),
    ):
        assert cli.main([*argv, "--out", str(home / name), "--json"]) == 0
    for format in ("native", "saelens", "dictionary_learning", "sparsify"):
        argv = [str(home / "live"), str(home / format), "--format", format, "--json"]
        assert cli.main(["convert", *argv]) == 0
    deep = [str(home / "pruned"), str(home / "further" / "down" / "native"), "--format", "native"]
    for _ in range(2):  # the second time it is there already
        assert cli.main(["convert", *deep, "--json"]) == 0
    argv = [str(home / "s.csv"), "--autoencoder", str(home / "run")]
    assert cli.main(["sentences", *argv, "--csv-out", str(home / "out.csv"), "--json"]) == 0
    write_token_file(home / "tokens", read_documents(books), StandardModelContext(model, "cpu"))


@pytest.fixture(scope="module")
def lab(tmp_path_factory: pytest.TempPathFactory, text_model: Transformer) -> Path:
    """A user's folder, in which everything has been done once."""
    home = tmp_path_factory.mktemp("home") / USER
    (home / "books").mkdir(parents=True)
    for number, paragraph in enumerate(PASSAGE.split("\n\n")[:6]):
        (home / "books" / f"{number}.txt").write_text(paragraph[:150], "utf-8")
    (home / "s.csv").write_text("sentence\nThe cat sat.\nA king.\n", "utf-8")
    text_model.save(home / "model")
    work(home)
    return home


def test_no_file_names_a_folder_of_the_user(lab: Path) -> None:
    written = [path for path in lab.rglob("*") if path.is_file()]
    assert {"config.json", "source.json", "report.html", "log.jsonl", "state.json", "cfg.json"} <= {
        path.name for path in written
    }
    told = [path for path in written if USER.encode() in path.read_bytes()]
    assert not told
    above = str(lab.parent.parent).encode()
    assert not [path for path in written if above in path.read_bytes()]


def test_what_is_needed_to_go_on_is_found(
    lab: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """From any folder, and after all folders have been moved together."""
    moved = tmp_path / "moved" / "deeper"
    moved.parent.mkdir()
    lab.rename(moved)
    try:
        with contextlib.chdir(tmp_path):
            for name in ("run", "live", "pruned", "tuned", "further/down/native"):
                argv = ["evaluate", f"moved/deeper/{name}", *MEASURE, "--json"]
                assert cli.main(argv) == 0, capsys.readouterr().err
            again = ["train", "moved/deeper/books", "--model", "moved/deeper/model"]
            again += ["--location", PLACE, *WINDOWS, *SMALL, "--out", "moved/deeper/live"]
            assert cli.main(again) == 0, capsys.readouterr().err
        assert Run.open(moved / "run").record["source"] == str(moved / "store")
        assert Run.open(moved / "run").record["harvest"]["source"] == str(moved / "books")
        assert ActivationStore(moved / "store").record["model"] == str(moved / "model")
        assert open_token_file(moved / "tokens").name == "books"
        assert Autoencoder.load(moved / "run" / "autoencoder").model_name == "model"
    finally:
        moved.rename(lab)


def test_a_run_may_be_moved_away_from_its_text(lab: Path, tmp_path: Path) -> None:
    """The same command, with its new folder, still finds it done; other text is still refused."""
    (lab / "live").rename(tmp_path / "live")
    try:
        argv = ["train", "--location", PLACE, "--model", str(lab / "model"), *WINDOWS, *SMALL]
        argv += ["--out", str(tmp_path / "live"), "--json"]
        assert cli.main([*argv, str(lab / "books")]) == 0
        (tmp_path / "other.txt").write_text(PASSAGE[:900], "utf-8")
        assert cli.main([*argv, str(tmp_path / "other.txt")]) == 2
    finally:
        (tmp_path / "live").rename(lab / "live")


def test_a_record_comes_back_from_its_folder(tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "books").mkdir()
    record = {
        "model": f"hf:{tmp_path / 'model'}",
        "source": str(tmp_path / "run" / "inside.txt"),
        "data": {"split": "/not/a/path"},
        "harvest": {"model": "gpt2-small", "source": str(tmp_path / "books"), "data": {}},
    }
    stored = origins.for_folder(record, tmp_path / "run")
    assert stored["model"] == "hf:../model"
    assert stored["source"] == "./inside.txt"
    assert stored["harvest"]["source"] == "../books"
    assert origins.from_folder(stored, tmp_path / "run") == record
    for name in ("hf:OWNER/NAME", "https://host/model", "tiny-tales", None):
        assert origins.for_folder({"source": name}, tmp_path) == {"source": name}
    assert origins.full_path("tiny-tales") == "tiny-tales"
    with contextlib.chdir(tmp_path):
        assert origins.full_path("books") == str(tmp_path / "books")
    assert files.is_remote("hf:OWNER/NAME")


@pytest.mark.parametrize(
    ("folder", "found"),
    [
        ("https://host/lab/run/autoencoder", "https://host/lab/books"),
        ("az://account/lab/run/autoencoder", "az://account/lab/books"),
        ("https://host/run", "books"),  # it would lie above the server
    ],
)
def test_a_record_that_was_downloaded_names_nothing_on_this_machine(
    folder: str, found: str
) -> None:
    record = origins.from_folder({"source": "../../books", "model": "tiny-tales"}, folder)
    assert record == {"source": found, "model": "tiny-tales"}


def test_an_autoencoder_from_a_server_names_what_lies_beside_it_there(tmp_path: Path) -> None:
    (tmp_path / "books").mkdir()
    autoencoder = Autoencoder(6, 4)
    autoencoder.metadata["record"] = {"source": str(tmp_path / "books"), "model": "tiny-tales"}
    autoencoder.save(tmp_path / "lab")
    assert Autoencoder.load(tmp_path / "lab").metadata["record"] == autoencoder.metadata["record"]
    with BlobServer() as server:
        for path in (tmp_path / "lab").iterdir():
            url = server.put(f"/place/lab/{path.name}", path.read_bytes())
        found = Autoencoder.load(url.rpartition("/")[0])
    assert found.metadata["record"]["source"] == f"{url.partition('/lab/')[0]}/books"
