"""What the documents say is run: snippets, examples, commands, and the numbers that code knows."""

import ast
import io
import json
import re
import runpy
import shlex
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from neuron_explainer import cli
from neuron_explainer.dictionaries.objectives import base
from neuron_explainer.evaluation.passage import PASSAGE
from neuron_explainer.models import model_registry
from neuron_explainer.models.autoencoder import Autoencoder
from neuron_explainer.models.hooks import TransformerHooks
from neuron_explainer.models.locations import SITES
from neuron_explainer.models.model_context import ModelContext
from neuron_explainer.models.transformer import Transformer, TransformerConfig
from neuron_explainer.models.weight_names import WeightLocationType

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text("utf-8")


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", README, re.M | re.S)


SNIPPETS = blocks("python")
EXAMPLES = sorted((ROOT / "examples").glob("*.py"))
NOTEBOOKS = sorted((ROOT / "examples" / "notebooks").glob("*.ipynb"))
COMMANDS = [
    commands
    for block in blocks("sh")[1:]
    if (commands := [line for line in block.splitlines() if line.startswith("neuron-explainer ")])
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
    monkeypatch.chdir(tmp_path)  # a snippet reads the file from the working folder

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
    monkeypatch.setenv("NEURON_EXPLAINER_DATA", str(tmp_path / "data"))


@pytest.mark.parametrize("snippet", [s for s in SNIPPETS if "tiny-tales" not in s])
@pytest.mark.usefixtures("published_files")
def test_readme_snippets_run_as_written(snippet: str) -> None:
    exec(compile(snippet, "README.md", "exec"), {})


@pytest.mark.parametrize("snippet", [s for s in SNIPPETS if "tiny-tales" in s])
@pytest.mark.usefixtures("texts")
def test_readme_snippets_on_the_embedded_model(snippet: str) -> None:
    exec(compile(snippet, "README.md", "exec"), {})


def test_readme_snippets_were_found() -> None:
    assert len(SNIPPETS) == 11
    assert [len(commands) for commands in COMMANDS] == [5, 7, 2, 4, 8]


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.name)
def test_examples_run(
    path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert len(path.read_text("utf-8").splitlines()) <= 60
    monkeypatch.setattr(sys, "argv", [str(path)])
    runpy.run_path(str(path), run_name="__main__")
    assert capsys.readouterr().out


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_notebooks_run(
    path: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Cell by cell, with what a notebook shows of the last expression of each."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    cells = json.loads(path.read_text("utf-8"))["cells"]
    code = ["".join(cell["source"]) for cell in cells if cell["cell_type"] == "code"]
    assert not any(cell.get("outputs") for cell in cells)
    names: dict[str, Any] = {}
    for number, source in enumerate(code):
        tree = ast.parse(source)
        last = tree.body.pop() if isinstance(tree.body[-1], ast.Expr) else None
        exec(compile(tree, f"{path.name}, cell {number}", "exec"), names)
        if isinstance(last, ast.Expr):
            value = eval(compile(ast.Expression(last.value), path.name, "eval"), names)
            shown = getattr(value, "_repr_html_", value.__repr__)()
            assert shown or capsys.readouterr().out
    assert len(code) >= 5


@pytest.mark.parametrize("commands", COMMANDS, ids=lambda commands: commands[0].split()[1])
@pytest.mark.usefixtures("texts")
def test_readme_commands_run(commands: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Even where the terminal's encoding has only ASCII."""
    for command in commands:  # in order: each may need what those before it have written
        written = io.BytesIO()
        monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(written, encoding="ascii"))
        assert cli.main(shlex.split(command)[1:]) == 0, command
        assert written.getvalue().isascii()
        assert written.getvalue()


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


# --- the table for those who come from another library ---

HEAD = r"^\| (?:TransformerLens|SAELens|nnsight) \| here \| \|\n\|---\|---\|---\|\n((?:\|.*\n)+)"
ROWS = [
    line.strip("| ").split(" | ")
    for table in re.findall(HEAD, README, re.M)
    for line in table.splitlines()
]


@pytest.fixture(scope="module")
def names() -> dict[str, Any]:
    """What the lines of the table speak of."""
    context = ModelContext.from_model_type("tiny-tales", device="cpu")
    model = context.get_or_create_model()
    saes = model_registry.make_autoencoder_context("tiny-tales", "ae-resid-delta-mlp", "cpu")
    text = "The king gave his daughter"
    with torch.no_grad():
        x = model.capture(text, "2/resid.torso.delta_mlp")["2/resid.torso.delta_mlp"]
    return {
        "torch": torch,
        "Transformer": Transformer,
        "TransformerHooks": TransformerHooks,
        "ModelContext": ModelContext,
        "make_autoencoder_context": model_registry.make_autoencoder_context,
        "W": WeightLocationType,
        "model": model,
        "context": context,
        "sae": saes.get_autoencoder(2),
        "saes": saes,
        "text": text,
        "tokens": model.to_batch(text)[0],
        "x": x,
        "f": lambda x, layer: x * 0,
        "d": 192,
        "v": model.n_vocab,
        "h": context.n_attention_heads,
        "d_head": 192 // context.n_attention_heads,
        "l": saes.get_autoencoder(2).n_latents,
        "n": 192,
    } | {"f_size": context.n_neurons}


@pytest.mark.parametrize("row", ROWS, ids=[row[0] for row in ROWS])
@torch.no_grad()
def test_each_line_of_the_table_of_names_runs(row: list[str], names: dict[str, Any]) -> None:
    (code,) = re.findall("`([^`]+)`", row[1])
    value = eval(code, dict(names))
    assert value is not None
    if (shape := re.match(r"`\[([\w, ]+)\]`", row[2] if len(row) > 2 else "")) is not None:
        axes = [names["f_size" if axis == "f" else axis] for axis in shape[1].split(", ")]
        assert list(value.shape) == axes


@torch.no_grad()
def test_the_table_of_names_says_the_same_things(names: dict[str, Any]) -> None:
    """By value, what shapes alone do not tell; theirs by their own definitions."""

    def here(theirs: str) -> Any:
        (row,) = [row for row in ROWS if row[0].startswith(f"`{theirs}`")]
        return eval(row[1].strip("`"), dict(names))

    model, tokens, text = names["model"], names["tokens"], names["text"]
    places = ["resid.post_emb", "resid.post_ln_f", "logits", "2/attn.v_out", "2/mlp.post_act"]
    places += ["2/resid.torso.delta_attn", "2/resid.torso.delta_mlp", "2/resid.torso.post_ln_mlp"]
    at = model.capture(tokens, [*places, "2/mlp.pre_act"])
    close = torch.testing.assert_close
    close(at["resid.post_ln_f"] @ here("model.W_U"), at["logits"], atol=1e-4, rtol=1e-4)
    positions = names["context"].get_weight("position_embedding")[: tokens.shape[1]]
    close(here("model.W_E")[tokens] + positions, at["resid.post_emb"])

    def up_to_a_bias(found: torch.Tensor, expected: torch.Tensor) -> None:
        rest = expected - found
        close(rest, rest[:, :1].expand_as(rest), atol=1e-4, rtol=1e-4)

    written = torch.einsum("bshe,hed->bsd", at["2/attn.v_out"], here("model.W_O[2]"))
    up_to_a_bias(written, at["2/resid.torso.delta_attn"])
    up_to_a_bias(at["2/resid.torso.post_ln_mlp"] @ here("model.W_in[2]"), at["2/mlp.pre_act"])
    up_to_a_bias(at["2/mlp.post_act"] @ here("model.W_out[2]"), at["2/resid.torso.delta_mlp"])
    assert here("model.to_tokens(text)")[:, 1:].equal(tokens)
    assert "".join(here("model.to_str_tokens(text)")) == here("model.to_string(tokens)") == text
    sae, x = names["sae"], names["x"]
    close(sae.encode(x), torch.relu(sae.encode(x)))
    close(sae.encode(x) @ here("sae.W_dec") + here("sae.b_enc")[1], here("sae(x)"))
    assert here("sae.cfg.metadata.hook_name") == "blocks.2.hook_mlp_out"
    without, _ = here("model.run_with_hooks(tokens, fwd_hooks=[(name, f)])")
    assert not torch.equal(without, at["logits"])


# --- the table of places ---


@torch.no_grad()
def test_the_table_of_places() -> None:
    table = README.partition("| path | shape | |")[2].partition("\n\n")[0]
    for path in SITES:
        assert path.rpartition(".")[2] in table or path.rpartition(".")[0] + ".*" in table, path
    config = TransformerConfig("tiny-tales", 16, 8, 2, 1, 2, 3, n_vocab=11)
    model = Transformer(config, seed=0, device="cpu")
    for parameter in model.parameters():  # gains and biases too
        parameter.add_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)))
    model.double()
    tokens = torch.tensor([[1, 2, 3, 4], [5, 6, 7, 8]])
    found = model.capture(tokens, list(SITES))
    layer, close = list(model.layers)[1], torch.testing.assert_close

    def at(path: str) -> torch.Tensor:
        return found[f"1/{path}"]

    for row in table.splitlines():
        paths = re.findall(r"`((?:resid|attn|mlp)\.[\w.]+)`", row.split(" | ")[0])
        shape = re.search(r"`\[([\w, ]+)\]`", row)
        sizes = {
            "b": 2,
            "s": 4,
            "q": 4,
            "k": 4,
            "1": 1,
            "h": 2,
            "d_head": 4,
            "d": 8,
            "f": 24,
            "v": 11,
        }
        for path in paths:
            if shape is None:
                continue
            value = found[path if not SITES[path].per_layer else f"1/{path}"]
            assert list(value.shape) == [sizes[axis] for axis in shape[1].split(", ")], path
    x, norm = found["0/resid.torso.post_mlp"], "resid.torso.ln_attn"
    close(at(f"{norm}.post_mean_subtraction"), x - x.mean(-1, keepdim=True))
    mean_square = at(f"{norm}.post_mean_subtraction").square().mean(-1, keepdim=True)
    close(at(f"{norm}.scale"), (mean_square + config.norm_eps).sqrt())
    close(at(f"{norm}.post_scale"), at(f"{norm}.post_mean_subtraction") / at(f"{norm}.scale"))
    gain, bias = layer.ln_1.weight, layer.ln_1.bias
    close(at("resid.torso.post_ln_attn"), at(f"{norm}.post_scale") * gain + bias)
    q = layer.attn.q_proj(at("resid.torso.post_ln_attn")).unflatten(-1, (2, 4))
    close(at("attn.q"), q * 4**-0.25)
    scores = torch.einsum("bqhe,bkhe->bqkh", at("attn.q"), at("attn.k"))
    visible = torch.ones(4, 4).tril().bool()[None, :, :, None]
    close(at("attn.qk_logits"), scores.masked_fill(~visible, -torch.inf))
    exps = (at("attn.qk_logits") - at("attn.qk_logits").amax(2, keepdim=True)).exp()
    close(at("attn.qk_softmax_denominator"), exps.sum(2, keepdim=True))
    close(at("attn.qk_probs"), exps / at("attn.qk_softmax_denominator"))
    close(at("attn.v_out"), torch.einsum("bqkh,bkhe->bqhe", at("attn.qk_probs"), at("attn.v")))
    close(at("resid.torso.delta_attn"), layer.attn.out_proj(at("attn.v_out").flatten(2)))
    close(at("mlp.pre_act"), layer.mlp.in_layer(at("resid.torso.post_ln_mlp")))
    close(at("resid.torso.delta_mlp"), layer.mlp.out_layer(at("mlp.post_act")))
    close(found["logits"], found["resid.post_ln_f"] @ model.unembed.weight.T)
