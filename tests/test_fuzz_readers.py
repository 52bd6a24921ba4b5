"""Whatever a file holds, a reader answers with the thing or with one of our errors, and soon.

Every reader of the package gets a valid file or folder, of which one thing is changed: a JSON field
becomes a value of another type, a field goes or comes, bytes are cut, flipped or put in, a safetensors
header says something else, a file becomes a folder, a pipe or an endless link. Any other exception, a
warning or a wait is a failure. All choices come from fixed seeds.
"""

import contextlib
import copy
import csv
import gzip
import json
import os
import random
import resource
import shutil
import signal
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from safetensors.torch import save_file

from neuron_explainer.activations import (
    ActivationStore,
    Harvester,
    TokenWindows,
    harvest_to_store,
    open_token_file,
    read_documents,
    tokenize,
    write_token_file,
)
from neuron_explainer.analysis.interchange.collated_sets import import_records
from neuron_explainer.analysis.interchange.dashboards import import_dashboards, write_neuronpedia
from neuron_explainer.analysis.interchange.neuron_records import read_explanations
from neuron_explainer.analysis.store import ExampleStore
from neuron_explainer.analysis.store_format import Label
from neuron_explainer.dictionaries import TopKConfig, TrainConfig, read_config, train
from neuron_explainer.dictionaries.params_json import read_params
from neuron_explainer.errors import NeuronExplainerError
from neuron_explainer.models.autoencoder import Autoencoder
from neuron_explainer.models.model_context import ModelContext
from neuron_explainer.models.transformer import Transformer
from tests.analysis.examples import VOCABULARY, make_coactivation, make_collected, make_corpus
from tests.analysis.test_dashboards import rows
from tests.conftest import make_model
from tests.models.test_formats_bad import SOURCES

SECONDS = 10
"""A reader that takes longer than this for a file of a few kilobytes is taken to hang."""
MEMORY = 2**30
"""Bytes of addresses that reading such a file may take."""
CHANGES = 60
"""Changes for each reader and kind of change, unless it has fewer places."""


class Reader(NamedTuple):
    """A valid thing on disk, and what reads it."""

    make: Callable[[Path], Path]
    """Writes it below a folder and says where."""
    load: Callable[[Path], object]


def context() -> ModelContext:
    return ModelContext.from_model_type("tiny-tales", device="cpu")


def written(name: str, content: str | bytes) -> Callable[[Path], Path]:
    def make(folder: Path) -> Path:
        data = content.encode("utf-8") if isinstance(content, str) else content
        (folder / name).write_bytes(data)
        return folder / name

    return make


def saved_model(form: str) -> Callable[[Path], Path]:
    def make(folder: Path) -> Path:
        model = make_model(enc="gpt2")
        if form == "native":
            model.save(folder / form)
        elif form == "pieces":
            model.save_checkpoint(folder / form)
        else:
            (folder / form).mkdir()
            config = {"model_type": "gpt2", "n_embd": 8, "n_layer": 1, "n_head": 2, "vocab_size": 7}
            config |= {"n_positions": 6, "n_ctx": 6, "activation_function": "gelu_new"}
            (folder / form / "config.json").write_text(json.dumps(config), "utf-8")
            save_file(huggingface_tensors(), folder / form / "model.safetensors")
        return folder / form

    return make


def huggingface_tensors() -> dict[str, torch.Tensor]:
    shapes = {"wte.weight": (7, 8), "wpe.weight": (6, 8), "ln_f.weight": (8,), "ln_f.bias": (8,)}
    for name, width in (("attn.c_attn", (8, 24)), ("attn.c_proj", (8, 8)), ("mlp.c_fc", (8, 32))):
        shapes |= {f"h.0.{name}.weight": width, f"h.0.{name}.bias": width[1:]}
    shapes |= {"h.0.mlp.c_proj.weight": (32, 8), "h.0.mlp.c_proj.bias": (8,)}
    for norm in ("ln_1", "ln_2"):
        shapes |= {f"h.0.{norm}.weight": (8,), f"h.0.{norm}.bias": (8,)}
    generator = torch.Generator().manual_seed(0)
    return {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}


TEXTS = ["A wolf met a fox.", "The king had three sons.", "It rained, and rained."] * 4


def token_file(folder: Path) -> Path:
    write_token_file(folder / "tokens", TEXTS, context())
    return folder / "tokens"


def store(folder: Path) -> Path:
    windows = TokenWindows(tokenize(TEXTS, context()), 16, 2)
    harvest_to_store(folder / "store", Harvester(context(), "0/mlp.post_act"), windows)
    return folder / "store"


def example_store(folder: Path) -> Path:
    corpus = make_corpus(200)
    documents = [corpus.document(i).tolist() for i in range(len(corpus))]
    collected = make_collected(corpus, 2, coactivation=make_coactivation(2))
    labels = [Label(1, "kings")]
    ExampleStore.from_arrays(
        folder / "out", collected, documents, VOCABULARY, labels=labels
    ).close()
    return folder / "out"


def read_examples(path: Path) -> object:
    with ExampleStore.open(path) as opened:
        opened.verify()
        return [(repr(record), record.html()) for record in opened], opened.search("king")


CONFIG = TrainConfig(TopKConfig(k=2), n_latents=8, steps=4, batch_size=4, checkpoint_every=2)


def resumed(folder: Path) -> object:
    batches = torch.randn(64, 4, generator=torch.Generator().manual_seed(1))
    return train(CONFIG, batches, folder, progress=False)


def unfinished_run(folder: Path) -> Path:
    """As a run leaves it that ends between two checkpoints."""

    def stop(report: Any) -> None:
        if report.step == 3:
            raise KeyboardInterrupt

    batches = torch.randn(64, 4, generator=torch.Generator().manual_seed(1))
    with contextlib.suppress(KeyboardInterrupt):
        train(CONFIG, batches, folder / "run", callbacks=[stop], progress=False)
    return folder / "run"


def table(folder: Path, delimiter: str, name: str) -> Path:
    with (folder / name).open("w", encoding="utf-8", newline="") as file:
        rows = csv.writer(file, delimiter=delimiter)
        rows.writerows([["text", "n"], *([text, number] for number, text in enumerate(TEXTS))])
    return folder / name


def documents(path: Path) -> object:
    return list(read_documents(path))


JSONL = "".join(json.dumps({"text": text}) + "\n" for text in TEXTS)
PARAMS = json.dumps(
    {"layer": 1, "sae_batch_size": {"value": 8, "description": "rows"}, "random_seed": 3}
)
TOML = 'steps = 3\nn_latents = 8\nobjective = { name = "topk", k = 2 }\n'

READERS: dict[str, Reader] = {
    **{
        f"model {form}": Reader(saved_model(form), lambda p: Transformer.load(p, device="cpu"))
        for form in ("native", "pieces", "huggingface")
    },
    "token file": Reader(token_file, lambda p: open_token_file(p, context(), verify=True)),
    "store": Reader(store, lambda p: list(ActivationStore(p).batches(64))),
    "examples": Reader(example_store, read_examples),
    "run": Reader(unfinished_run, resumed),
    "toml": Reader(written("c.toml", TOML), lambda p: read_config(TrainConfig, p)),
    "json": Reader(
        written("c.json", '{"steps": 3, "n_latents": 8, "objective": {"name": "topk", "k": 2}}'),
        lambda p: read_config(TrainConfig, p),
    ),
    "params": Reader(written("params.json", PARAMS), read_params),
    "txt": Reader(written("a.txt", "\n\n".join(TEXTS)), documents),
    "jsonl": Reader(written("a.jsonl", JSONL), documents),
    "jsonl.gz": Reader(written("a.jsonl.gz", gzip.compress(JSONL.encode(), mtime=0)), documents),
    "csv": Reader(lambda folder: table(folder, ",", "a.csv"), documents),
    "tsv": Reader(lambda folder: table(folder, "\t", "a.tsv"), documents),
}


PEERS = Path(__file__).parent / "fixtures" / "peers"


def copied_from(*names: str) -> Callable[[Path], Path]:
    """Files of fixtures, in a folder of their own."""

    def make(folder: Path) -> Path:
        for name in names:
            target = folder / "set" / Path(*Path(name).parts[1:])
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(PEERS / name, target)
        return folder / "set"

    return make


def export(folder: Path) -> Path:
    write_neuronpedia(rows(), folder / "export")
    return folder / "export"


RECORDS = [f"neuron-records/{name}" for name in ("0/0.json", "1/2.json", "explanations/0/1.jsonl")]
READERS |= {
    "neuron records": Reader(
        copied_from(*RECORDS[:2]), lambda p: import_records(p, p.parent / "out")
    ),
    "explanations": Reader(
        copied_from(RECORDS[2]),
        lambda p: [read_explanations(each) for each in sorted(p.rglob("*.jsonl"))],
    ),
    "sae-dashboard": Reader(
        copied_from("sae-dashboard/batch-0.json"), lambda p: import_dashboards(p, p.parent / "out")
    ),
    "neuronpedia": Reader(export, lambda p: import_dashboards(p, p.parent / "out")),
}


def autoencoder_reader(name: str) -> Reader:
    told: dict[str, Any] = {}

    def make(folder: Path) -> Path:
        source = SOURCES[name](folder)
        told.update(source.told)
        return source.path

    return Reader(make, lambda path: Autoencoder.load(path, **told))


READERS |= {f"autoencoder {name}": autoencoder_reader(name) for name in SOURCES}


# ---- changes ---------------------------------------------------------------------------------------

OTHER_VALUES: list[Any] = [
    None, True, False, 0, -1, 1.5, 1e400, float("nan"), 2**70, "", "x", "\x1b[31m", "../..",
    [], {}, [None], {"x": None}, "9" * 5000, 10**30, [[]] * 3, {"value": 1, "description": 2},
]  # fmt: skip


def places_in(tree: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Where a JSON document has a value: the keys and indices that lead to it."""
    yield path
    items = (
        tree.items()
        if isinstance(tree, dict)
        else enumerate(tree)
        if isinstance(tree, list)
        else ()
    )
    for key, value in items:
        yield from places_in(value, (*path, key))


def with_other_value(tree: Any, rng: random.Random) -> Any:
    """One value is another, or is gone, or a key is another."""
    tree = copy.deepcopy(tree)
    path = rng.choice(list(places_in(tree)))
    value = rng.choice(OTHER_VALUES)
    if not path:
        return value
    parent = tree
    for key in path[:-1]:
        parent = parent[key]
    change = rng.randrange(4)
    if change == 0:
        del parent[path[-1]]
    elif change == 1 and isinstance(parent, dict):
        parent[f"{path[-1]}\u202e"] = parent.pop(path[-1])
    else:
        parent[path[-1]] = value
    return tree


def change_json(path: Path, rng: random.Random) -> None:
    whole = path.read_text("utf-8")
    lines = whole.splitlines() if path.suffix == ".jsonl" else [whole]
    at = rng.randrange(len(lines))
    lines[at] = json.dumps(with_other_value(json.loads(lines[at]), rng))
    if rng.randrange(12) == 0:
        lines[at] = "[" * 20_000
    if rng.randrange(12) == 0:
        lines[at] = lines[at].replace("1", "9" * 5000, 1)  # more digits than Python reads
    path.write_text("\n".join(lines), "utf-8")


def change_header(path: Path, rng: random.Random) -> None:
    """A safetensors file whose header says something else of the same bytes."""
    content = path.read_bytes()
    length = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + length])
    if rng.randrange(2):
        name = rng.choice([key for key in header if key != "__metadata__"])
        header[name]["dtype"] = rng.choice(["F8_E4M3", "F8_E5M2", "BOOL", "U64", "F16", "C64", "?"])
    else:
        header = with_other_value(header, rng)
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + content[8 + length :])


def change_bytes(path: Path, rng: random.Random) -> None:
    content = bytearray(path.read_bytes())
    place = rng.randrange(len(content))
    match rng.randrange(5):
        case 0:
            del content[place:]
        case 1:
            content[place] ^= 1 << rng.randrange(8)
        case 2:
            content[place:place] = rng.randbytes(rng.choice([1, 5, 400]))
        case 3:
            del content[place : place + rng.choice([1, 8, 64])]
        case 4:
            content[:8] = rng.randbytes(8)
    path.write_bytes(bytes(content))


def change_kind(path: Path, rng: random.Random) -> None:
    """The file becomes something that is no file."""
    path.unlink()
    match rng.randrange(5):
        case 0:
            path.mkdir()
        case 1:
            os.mkfifo(path)
        case 2:
            path.symlink_to(path.name)
        case 3:
            path.symlink_to("/dev/zero")
        case 4:
            path.touch()


CHANGERS: dict[str, tuple[Callable[[Path, random.Random], None], tuple[str, ...]]] = {
    "json": (change_json, (".json", ".jsonl")),
    "header": (change_header, (".safetensors",)),
    "bytes": (change_bytes, ()),
    "kind": (change_kind, ()),
}


@contextlib.contextmanager
def soon() -> Iterator[None]:
    """An error where the block takes longer than :data:`SECONDS`, or more than :data:`MEMORY`."""

    def hangs(*_: object) -> None:
        raise TimeoutError(f"not answered within {SECONDS} s")

    before = signal.signal(signal.SIGALRM, hangs)
    limits = resource.getrlimit(resource.RLIMIT_AS)
    pages = int(Path("/proc/self/statm").read_text("ascii").split()[0])
    most = pages * resource.getpagesize() + MEMORY
    resource.setrlimit(resource.RLIMIT_AS, (most, limits[1]))
    signal.alarm(SECONDS)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)
        resource.setrlimit(resource.RLIMIT_AS, limits)


@pytest.fixture(scope="module")
def originals(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], tuple[Path, Path]]:
    """By reader: a folder, and what in it is read. Made once."""
    made: dict[str, tuple[Path, Path]] = {}

    def get(name: str) -> tuple[Path, Path]:
        if name not in made:
            folder = tmp_path_factory.mktemp("original")
            made[name] = folder, READERS[name].make(folder)
        return made[name]

    return get


@pytest.mark.parametrize("kind", CHANGERS)
@pytest.mark.parametrize("name", READERS)
def test_a_changed_file_is_read_or_refused(name, kind, originals, tmp_path):
    change, endings = CHANGERS[kind]
    folder, target = originals(name)
    files = sorted(p.relative_to(folder) for p in folder.rglob("*") if p.is_file())
    files = [p for p in files if p.suffix in (endings or {p.suffix}) and p.name != ".lock"]
    files = [p for p in files if (folder / p).stat().st_size]
    if not files:
        return
    rng = random.Random(f"{name} {kind}")
    failures = []
    for number in range(CHANGES):
        copied = tmp_path / str(number)
        shutil.copytree(folder, copied)
        path = rng.choice(files)
        change(copied / path, rng)
        try:
            with soon(), warnings.catch_warnings():
                warnings.simplefilter("error")
                warnings.filterwarnings("ignore", category=UserWarning, module="neuron_explainer")
                READERS[name].load(copied / target.relative_to(folder))
        except NeuronExplainerError as error:
            text = str(error)
            if not text or "Traceback" in text or "\x1b" in text:
                failures.append(f"{number} {path}: message {text!r}")
        except Exception as error:
            failures.append(f"{number} {path}: {type(error).__name__}: {error}"[:300])
    assert not failures, "\n".join(failures)


def test_every_reader_reads_what_was_not_changed(originals):
    for name, reader in READERS.items():
        _, target = originals(name)
        assert reader.load(target) is not None, name
