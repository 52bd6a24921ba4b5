"""A command that is killed, runs out of disk or loses its folder at any step, and is given again.

Whatever it wrote before, the same command then succeeds, with the results of a run that nobody disturbed, and
nothing else in the folder. Every step of every verb: ``-m slow``. By default some steps of each.
"""

import contextlib
import os
import signal
import sqlite3
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, get_args

import pytest

from neuron_explainer import cli, files
from neuron_explainer.activations import DataConfig, open_windows, read_documents
from neuron_explainer.activations.token_files import write_token_file
from neuron_explainer.analysis import CollateConfig, collate
from neuron_explainer.analysis.collation.merging import merge_stores
from neuron_explainer.analysis.decoder_map import decoder_map
from neuron_explainer.analysis.interchange.delphi import cache_latents
from neuron_explainer.analysis.store import ExampleStore
from neuron_explainer.analysis.workspace import Workspace
from neuron_explainer.dictionaries import TopKConfig, train
from neuron_explainer.dictionaries.distributed import Split, open_world
from neuron_explainer.evaluation.passage import PASSAGE
from neuron_explainer.experiments.boards import __main__ as boards
from neuron_explainer.experiments.tiny_tales import __main__ as tiny_tales
from neuron_explainer.experiments.tiny_tales.data import HELD_OUT_BOOKS
from neuron_explainer.experiments.tiny_tales.tokenizer import TOKENIZER_FILE, save_tokenizer
from neuron_explainer.models.autoencoder import Autoencoder
from neuron_explainer.models.checkpoints.transformers.huggingface import save_huggingface
from neuron_explainer.models.config import TransformerConfig
from neuron_explainer.models.model_context import ModelContext, StandardModelContext
from neuron_explainer.models.transformer import Transformer
from tests.blob_server import BlobServer
from tests.conftest import make_model
from tests.dictionaries import sparse_coding_runs, world_runs
from tests.kill_points import Command, Harm, Laboratory

if not hasattr(os, "fork"):
    pytest.skip("needs fork", allow_module_level=True)

PLACE = "1/mlp.post_act"
PLACE_STORE = "1.mlp.post_act.neurons.store"
WINDOWS = ["--context-length", "24", "--windows-per-forward", "4"]
SMALL = ["--steps", "2", "--batch-size", "16", "--n-latents", "20", "--lr", "3e-3"]
OFTEN = ["--checkpoint-every", "1", "--keep-checkpoints", "1", "--log-every", "2"]
LEARN = ["--k", "4", *SMALL, *OFTEN, "--out", "out"]
OF_BOOKS = ["books", "--model", "model", *WINDOWS, "--buffer-tokens", "64"]
MEASURE = ["--text", "books", "--num-tokens", "200"]


def verb(name: str, *argv: str, out: str = "out", **options: Any) -> Command:
    return Command(name, lambda: cli.main([*argv, "--json"]), out, **options)


def verbs(name: str, *argvs: list[str], out: str = "out", **options: Any) -> Command:
    """Several commands, one after the other, as a script would give them."""

    def run() -> int:
        return next(filter(None, (cli.main([*argv, "--json"]) for argv in argvs)), 0)

    return Command(name, run, out, **options)


def objective(name: str, *more: str) -> Command:
    """Its results are written by other code; the rest of the run is that of the others."""
    argv = ["train", "store", "--location", PLACE, "--objective", name, *SMALL, *more]
    return verb(f"train {name}", *argv, "--out", "out", harms=("kill",))


def function(name: str, run: Any, out: str = "out", **options: Any) -> Command:
    def command() -> int:
        run()
        return 0

    return Command(name, command, out, **options)


def context() -> ModelContext:
    return StandardModelContext("model", "cpu")


def collate_and_show() -> None:
    """Stores of examples, and a page about a unit."""
    data = DataConfig(context_length=24, windows_per_forward=32)
    windows = open_windows(context(), "books", data, part="all")
    config = CollateConfig(top=2, intervals=2, per_interval=1, uniform=1, window=6, parts=2)
    places = [PLACE, "0/attn.qk_probs"]
    stores = collate(context(), places, windows, "out", config, progress=False, save_every_s=0.0)
    with ExampleStore.open(next(iter(stores.values()))) as store:
        store[int(store.alive[0])].to_html("page/unit.html")


def exchange() -> int:
    """Stores in the formats of other programs, and a store of one of those again."""
    for form in ("neuron-records", "saedashboard", "neuronpedia", "parquet"):
        argv = ["export-records", f"examples/{PLACE_STORE}", "--format", form, "--units", "0-5"]
        if status := cli.main([*argv, "--out", f"out/{form}", "--json"]):
            return status
    argv = ["import-records", "out/neuron-records", "--location", "mlp.post_act", "--json"]
    return cli.main([*argv, "--out", "out/stores"])


def merge() -> None:
    """A store of two texts."""
    merge_stores(f"examples/{PLACE_STORE}", f"others/{PLACE_STORE}", "out/merged")


def draw_map() -> None:
    """The map of a dictionary."""
    decoder_map(Autoencoder.load("run/autoencoder"), "pca", cache="out/maps")


def cache_for_delphi() -> None:
    """The latents of a dictionary for delphi."""
    data = DataConfig(context_length=24, windows_per_forward=32)
    windows = open_windows(context(), "books", data, part="all")
    found = cache_latents(context(), Autoencoder.load("run/autoencoder"), windows)
    found.write("out/delphi", "layers.1.mlp", n_splits=2)


def learn_boards() -> int:
    """A data set of boards, a model that learns them, and the model in a folder of its own."""
    sizes = ["--board-size", "5", "--root-size", "2", "--root-cells", "4", "--n-roots", "3"]
    sizes += ["--n-composites", "2"]
    learn = ["--epochs", "1", "--boards-per-epoch", "8", "--batch-size", "8", "--pace", "400"]
    learn += ["--evaluate-every", "0", "--checkpoint-every", "1", "--run", "out/run"]
    try:
        boards.main(["boards", *sizes, "--out", "out/boards"])
        boards.main(["boards", *sizes, "--out", "out/theirs", "--seed-layout"])
        boards.main(["train", *sizes, *learn])
        boards.main(["export", "out/run", "--out", "out/model"])
    except SystemExit as error:
        print(error)
        return 2
    return 0


def draw_boards() -> int:
    """A page with figures of the models of the package."""
    boards.main(
        ["figures", "--out", "out", "--boards", "10", "--only", "learning", "masked_speech"]
    )
    return 0


def learn_sparse_codes() -> None:
    sparse_coding_runs.run(Path("out"), checkpoint_every=4, epochs=1, log_every=4)


def write_tokens() -> None:
    write_token_file("out/tokens", read_documents("books"), context())


def save_model(layout: str) -> None:
    if layout == "native":
        Transformer.load("model").save("out/model", overwrite=True)
    elif layout == "huggingface":
        model = make_model()
        save_huggingface("out/model", model.cfg, model.state_dict(), overwrite=True)
    else:
        make_model(enc="gpt2").save_checkpoint("out/model")


def distributed(split: Split) -> int:
    """Two processes that learn one dictionary."""
    fields: dict[str, Any] = {"steps": 4, "checkpoint_every": 2, "keep_checkpoints": 1}
    config = world_runs.case(TopKConfig(k=3), dtype="float32", **fields).config

    def learn(folder: Path) -> None:
        with open_world(split, timeout=20) as world:
            batches = world_runs.batches(config)
            train(config, batches, folder / "out", progress=False, world=world)

    return max(map(abs, world_runs.together(Path(), learn)))


def recipe() -> None:
    """The embedded model's: its vocabulary, the model, its autoencoders, their figures."""
    Path("out").mkdir(exist_ok=True)
    save_tokenizer({bytes([i]): i for i in range(256)}, Path("out") / TOKENIZER_FILE)
    for argv in (
        ["train", "--steps", "2", "--decay-steps", "1", "--run", "out"],
        ["evaluate", "--model", "out/tiny-tales", "--model-only"],
    ):
        args = tiny_tales.parser().parse_args([*argv, "--corpus", "corpus"])
        args.model_config = lambda n: TransformerConfig(
            enc="tiny-tales", ctx_window=8, d_model=8, n_layers=1, n_heads=1, n_vocab=n
        )
        args.run_command(args)


ALL: Any = {"harms": get_args(Harm)}
HARVEST = verb(
    *("harvest", "harvest", *OF_BOOKS[:-2], "--location", PLACE, "--shard-rows", "300"),
    *("--out", "out"),
    **ALL,
)
TRAIN = verb("train", "train", *OF_BOOKS, "--location", PLACE, *LEARN, **ALL)
SPARSE = function("sparse coding", learn_sparse_codes, **ALL)
PRUNE = verb(
    *("prune", "prune", "run/autoencoder", *MEASURE, "--min-max-activation", "0"),
    *("--min-decoder-norm", "0", "--out", "out/pruned"),
)
COLLATE = function("collate", collate_and_show, harms=("kill", "full disk", "moved"))
FACTORS = verbs(
    "factors",
    [
        *("factors", "collate", "run", "--text", "books", "--sentence-length", "30"),
        *(
            "--windows-per-forward",
            "8",
            "--n-examples",
            "3",
            "--shard-size",
            "16",
            "--out",
            "out/e",
        ),
    ],
    ["factors", "importance", "out/e", "--csv", "out/i.csv"],
    [
        *("factors", "saliency", "out/e", "--num-factors", "2", "--num-sentences", "1"),
        *("--num-samples", "10"),
    ],
    ["factors", "records", "out/e", "--out", "out/r.jsonl"],
    ["factors", "pages", "out/e", "--factor", "0", "1", "--out", "out/p"],
    harms=("kill",),
)
BOARDS = Command("boards", learn_boards, "out", harms=("kill",))
FIGURES = Command("figures of boards", draw_boards, "out", harms=("kill",))
COMMANDS = [
    HARVEST,
    TRAIN,
    SPARSE,
    PRUNE,
    COLLATE,
    FACTORS,
    BOARDS,
    FIGURES,
    Command("exchange", exchange, "out", harms=("kill", "full disk")),
    function("merge", merge, harms=("kill", "full disk"), refuses_again=True),
    function("map", draw_map, harms=("kill", "full disk")),
    function("latents for delphi", cache_for_delphi, refuses_again=True),
    verb("site", "export", f"examples/{PLACE_STORE}", "0-2", "--no-model", "--out", "out"),
    verbs(
        "explanations",
        [
            *("explain", f"examples/{PLACE_STORE}", "--latents", "0", "1", "--method", "tokens"),
            *("--no-model", "--no-score"),
        ],
        *(
            ["export-explanations", f"examples/{PLACE_STORE}", "--format", name, "--out", out]
            for name, out in (("neuronpedia", "out/n"), ("openai", "out/o"))
        ),
        harms=("kill", "full disk"),
    ),
    verbs(
        "train two",
        ["harvest", *OF_BOOKS[:-2], "--location", PLACE, "0/mlp.post_act", "--out", "out/store"],
        ["train", "out/store", *LEARN[:-1], "out/run"],
        harms=("kill", "full disk"),
    ),
    objective("topk", "--k", "4"),
    objective("batch_topk", "--k", "4"),
    objective("relu"),
    objective("jumprelu"),
    objective("gated"),
    objective("p_anneal"),
    objective("matryoshka", "--k", "4", "--group-fractions", "0.4", "0.6"),
    verb(
        *("transcoder", "train", *OF_BOOKS, "--location", "1/mlp.post_act", "--transcoder"),
        *("--output-location", "1/resid.torso.delta_mlp", *LEARN),
        harms=("kill",),
    ),
    verb(
        "finetune", "finetune", "run/autoencoder", *MEASURE, "--batch-size", "32", "--out", "out/f"
    ),
    verb("report", "report", "run", *MEASURE, "--out", "out/report.html"),
    verb("sentences", "sentences", "s.csv", "--autoencoder", "run", "--csv-out", "out/t.csv"),
    verb("convert native", "convert", "run/autoencoder", "out/c", "--format", "native"),
    verb("convert saelens", "convert", "run/autoencoder", "out/c", "--format", "saelens"),
    verb("convert to .pt", "convert", "run", "out/c", "--format", "dictionary_learning"),
    verb("convert sparsify", "convert", "run", "out/c", "--format", "sparsify"),
    verb("convert over", "convert", "run", "kept", "--format", "native", "--overwrite", out="kept"),
    function("token file", write_tokens, refuses_again=True),
    function("model native", partial(save_model, "native")),
    function("model huggingface", partial(save_model, "huggingface")),
    function("model pieces", partial(save_model, "pieces")),
    function("recipe", recipe),
]
WORLDS = [
    Command(f"processes share {split}", partial(distributed, split), "out", harms=("kill",))
    for split in get_args(Split)
]


def named(command: Command) -> str:
    return command.name.replace(" ", "-")


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory, text_model: Transformer) -> Path:
    """A model, texts, a store of activations and a run, none larger than it must be."""
    folder = tmp_path_factory.mktemp("inputs")
    for name in ("books", "corpus"):
        (folder / name).mkdir()
    for number, paragraph in enumerate(PASSAGE.split("\n\n")[:6]):
        (folder / "books" / f"{number}.txt").write_text(paragraph[:150], "utf-8")
    for name in (*HELD_OUT_BOOKS, "another"):
        (folder / "corpus" / f"{name}.txt").write_text(PASSAGE[:500], "utf-8")
    (folder / "s.csv").write_text("sentence\nThe cat sat.\nA king.\n", "utf-8")
    text_model.save(folder / "model")
    with contextlib.chdir(folder):
        store = ["harvest", *OF_BOOKS[:-2], "--location", PLACE, "--out", "store", "--json"]
        assert cli.main(store) == 0
        argv = ["train", "store", "--location", PLACE, "--k", "4", *SMALL, "--out", "run", "--json"]
        assert cli.main(argv) == 0
        assert cli.main(["convert", "run", "kept", "--format", "native"]) == 0
    return folder


@pytest.fixture(scope="module")
def stores(inputs: Path) -> Path:
    """The same, with stores of examples of two texts."""
    with contextlib.chdir(inputs):
        for folder, text in (("examples", "books"), ("others", "corpus")):
            argv = ["collate", text, "--model", "model", *WINDOWS, "--location", PLACE]
            assert cli.main([*argv, "--top", "2", "--out", folder, "--json"]) == 0
    return inputs


@pytest.fixture
def scratch(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("scratch")


def of_cache(run: Callable[[], Any]) -> Callable[[], Any]:
    """The same, with the private cache of downloads in the folder of the command."""

    def command() -> None:
        os.environ["NEURON_EXPLAINER_CACHE"] = "cache"
        run()

    return command


@pytest.fixture
def server() -> Iterator[BlobServer]:
    with BlobServer() as server:
        yield server


# ---- some steps --------------------------------------------------------------------------------------

SOME: list[tuple[Command, Harm, list[int]]] = [
    (HARVEST, "kill", [9, -3]),
    (HARVEST, "full disk", [5]),
    (HARVEST, "emptied", [12]),
    (HARVEST, "moved", [20]),
    (TRAIN, "kill", [21, -1]),
    (TRAIN, "full disk", [14]),
    (TRAIN, "moved", [-8]),
    (SPARSE, "replaced", [20]),
    (PRUNE, "kill", [-1]),
    (PRUNE, "moved", [5]),
    (COLLATE, "kill", [-16]),
    (FACTORS, "kill", [3]),
]


@pytest.mark.parametrize("command", list({one.name: one for one, *_ in SOME}.values()), ids=named)
def test_some_steps(command: Command, inputs: Path, scratch: Path) -> None:
    laboratory = Laboratory(command, inputs, scratch)
    for one, harm, numbers in SOME:
        for number in numbers if one is command else []:
            laboratory.check(laboratory.points[number], harm)


def test_evaluating_writes_nothing(inputs: Path, scratch: Path) -> None:
    evaluate = verb("evaluate", "evaluate", "run", *MEASURE)
    assert not Laboratory(evaluate, inputs, scratch).points


class Dying(sqlite3.Connection):
    """Kills the process before one of its statements."""

    left = 0

    def execute(self, *args: Any) -> sqlite3.Cursor:
        Dying.left -= 1
        if Dying.left < 0:
            os.kill(os.getpid(), signal.SIGKILL)
        return super().execute(*args)


@pytest.mark.parametrize("every", [pytest.param(1, marks=pytest.mark.slow), 6])
def test_labels_are_whole_whatever_statement_a_process_is_killed_at(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, every: int
) -> None:
    for number in range(0, 100, every):
        path = tmp_path / f"{number}.sqlite"
        child = os.fork()
        if child == 0:
            Dying.left = number
            monkeypatch.setattr(sqlite3, "connect", partial(sqlite3.connect, factory=Dying))
            workspace = Workspace(path, "subject", 8)
            workspace.set_label(1, "a first label")
            workspace.set_label(1, "a second label")
            os._exit(0)
        ended = os.waitpid(child, 0)[1]
        with contextlib.closing(Workspace(path, "subject", 8)) as workspace:
            there = [label.text for label in workspace.labels()]
            assert there in ([], ["a first label"], ["a second label"])
            assert [label.text for label in workspace.search("label")] == there
            workspace.set_label(1, "a third label")
            assert [label.text for label in workspace.search("label")] == ["a third label"]
        if ended == 0:
            break
    assert number > 15


# ---- every step ------------------------------------------------------------------------------------


def check_all(command: Command, inputs: Path, scratch: Path) -> None:
    laboratory = Laboratory(command, inputs, scratch)
    failed = []
    for harm in command.harms:
        for point in laboratory.points:
            try:
                laboratory.check(point, harm)
            except AssertionError as error:  # all are of interest
                failed.append(str(error))
                print(f"{command.name}: {harm}: {error}")
    steps = f"{command.name}: {len(laboratory.points)} steps, each with {', '.join(command.harms)}"
    print(f"{steps}: {len(failed)} failed")
    assert not failed, "\n\n".join(failed)


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("command", [*COMMANDS, *WORLDS], ids=named)
def test_every_step(command: Command, stores: Path, scratch: Path) -> None:
    check_all(command, stores, scratch)


@pytest.mark.slow
def test_every_step_of_a_download(
    tmp_path: Path, scratch: Path, server: BlobServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    url = server.put("/file.bin", bytes(range(256)) * 40)
    fetch = of_cache(partial(files.fetch, url, progress=False))
    check_all(function("download", fetch, harms=("kill", "full disk")), tmp_path, scratch)
    monkeypatch.setenv("NEURON_EXPLAINER_CACHE", str(tmp_path / "cache"))
    files.fetch(url, progress=False)
    again: Any = {"harms": ("kill",), "refuses_again": True}
    remove = function("remove", of_cache(partial(files.remove_from_cache, url)), **again)
    check_all(remove, tmp_path, scratch)
