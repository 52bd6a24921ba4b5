"""What the documents say is run: snippets, examples, commands, and the numbers that code knows."""

import re
import runpy
import shlex
from pathlib import Path

import pytest
import torch

from neuron_explainer import cli
from neuron_explainer.dictionaries.objectives import base
from neuron_explainer.evaluation.passage import PASSAGE
from neuron_explainer.models import model_registry
from neuron_explainer.models.autoencoder import Autoencoder
from neuron_explainer.models.transformer import Transformer, TransformerConfig

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text("utf-8")


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", README, re.M | re.S)


SNIPPETS = blocks("python")
EXAMPLES = sorted((ROOT / "examples").glob("*.py"))
COMMANDS = [
    [line for line in block.splitlines() if line.startswith("neuron-explainer ")]
    for block in blocks("sh")[1:]
]


@pytest.fixture
def published_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Small random stand-ins where the snippets name files that only the network has.

    The snippets run as written; what they fetch has the published layout: a model of GPT-2's kind,
    and an autoencoder as OpenAI's state dict in a ``.pt`` file behind an ``az://`` path.
    """
    tiny = Transformer.load("tiny-tales", device="cpu")
    config = TransformerConfig("tiny-tales", 160, 32, 5, 1, 4, 10, n_vocab=tiny.n_vocab)
    model = Transformer(config, seed=0, tokenizer=tiny.tokenizer)
    model.save(tmp_path / "gpt2-small")
    monkeypatch.setattr(
        "neuron_explainer.models.checkpointed.resolve_model_source",
        lambda name: tmp_path / str(name).replace("/", "-"),
    )
    state_dict = Autoencoder(64, 32).state_dict()
    torch.save(state_dict, tmp_path / "0.pt")

    def open_blob(path: str, mode: str):
        assert path.startswith("az://openaipublic/sparse-autoencoder/gpt2-small/")
        return (tmp_path / path.rpartition("/")[2]).open(mode)

    monkeypatch.setattr("blobfile.BlobFile", open_blob)


@pytest.fixture(autouse=True)
def own_objectives(monkeypatch: pytest.MonkeyPatch) -> None:
    """What snippets and examples register is known to them alone."""
    monkeypatch.setattr(base, "_OBJECTIVES", dict(base._OBJECTIVES))
    monkeypatch.setattr(base.ObjectiveConfig, "_members", dict(base.ObjectiveConfig._members))


@pytest.fixture
def texts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The ``books`` and ``sentences.csv`` that the page speaks of, in the working directory."""
    paragraphs = PASSAGE.split("\n\n")
    (tmp_path / "books").mkdir()
    for number, paragraph in enumerate(paragraphs):
        (tmp_path / "books" / f"{number}.txt").write_text(paragraph, "utf-8")
    rows = ["sentence", "The ferry left a little after six.", "Nobody knows exactly."]
    (tmp_path / "sentences.csv").write_text("\n".join(rows), "utf-8")
    monkeypatch.chdir(tmp_path)


@pytest.mark.parametrize("snippet", [s for s in SNIPPETS if "tiny-tales" not in s])
@pytest.mark.usefixtures("published_files")
def test_readme_snippets_run_as_written(snippet: str) -> None:
    exec(compile(snippet, "README.md", "exec"), {})


@pytest.mark.parametrize("snippet", [s for s in SNIPPETS if "tiny-tales" in s])
@pytest.mark.usefixtures("texts")
def test_readme_snippets_on_the_embedded_model(snippet: str) -> None:
    exec(compile(snippet, "README.md", "exec"), {})


def test_readme_snippets_were_found() -> None:
    assert len(SNIPPETS) == 6
    assert [len(commands) for commands in COMMANDS] == [5, 8]


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.name)
def test_examples_run(path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert len(path.read_text("utf-8").splitlines()) <= 60
    runpy.run_path(str(path), run_name="__main__")
    assert capsys.readouterr().out


@pytest.mark.parametrize("commands", COMMANDS, ids=lambda commands: commands[0].split()[1])
@pytest.mark.usefixtures("texts")
def test_readme_commands_run(commands: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    for command in commands:  # in order: each may need what those before it have written
        assert cli.main(shlex.split(command)[1:]) == 0, command
        assert capsys.readouterr().out


def test_the_first_block_is_the_two_commands() -> None:
    assert blocks("sh")[0].splitlines() == [
        "pip install -c constraints.txt . && neuron-explainer demo",
        'pip install -c constraints.txt -e ".[test]" && pytest',
    ]


def test_datasets_md_agrees_with_the_registry() -> None:
    text = (ROOT / "datasets.md").read_text("utf-8")
    for name in model_registry.list_model_names():
        assert f"`{name}`" in text
    # 24 + 36 + 96 files, as the table says
    counts: dict[str, int] = {"": 0, "_v4": 0, "_v5": 0}
    names = model_registry.list_autoencoder_names("gpt2-small")
    assert "gpt2-small-res-jb" in text
    for name in filter(lambda name: name.startswith("ae-"), names):
        spec = model_registry.get_autoencoder_spec("gpt2-small", name)
        for path in spec.autoencoder_path_by_layer_index.values():
            version = re.search(r"(_v\d)?(_\d+k)?/autoencoders/\d+\.pt$", str(path))
            assert version is not None
            counts[version[1] or ""] += 1
    assert counts == {"": 24, "_v4": 36, "_v5": 96}
    assert re.search(r"\(none, \"v1\"\).*\| 24 \|", text)
    assert re.search(r"`_v4`.*\| 36 \|", text)
    assert re.search(r"`_v5_32k`.*\| 96 \|", text)
