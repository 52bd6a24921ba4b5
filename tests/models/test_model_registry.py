"""Names of models: what each stands for, and what a user is told who mistypes one."""

from pathlib import Path

import pytest
import torch

from neuron_explainer.errors import InputError, SourceError
from neuron_explainer.models.huggingface.context import HuggingFaceModelContext
from neuron_explainer.models.model_context import ModelContext, StandardModelContext
from neuron_explainer.models.model_registry import (
    StandardModelSpec,
    get_standard_model_spec,
    list_model_names,
    make_autoencoder_context,
    resolve_model_source,
)
from neuron_explainer.models.open_model import open_model
from neuron_explainer.models.transformer import Transformer

URL = "https://openaipublic.blob.core.windows.net/neuron-explainer/subject-models/gpt2"


@pytest.fixture(autouse=True)
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In an empty folder, so that no name is the name of a folder."""
    monkeypatch.chdir(tmp_path)


def test_names() -> None:
    assert list_model_names() == [
        "tiny-tales",
        "gpt2-small",
        "gpt2-medium",
        "gpt2-large",
        "gpt2-xl",
    ]


@pytest.mark.parametrize(
    ("name", "size"),
    [
        ("gpt2-small", "small"),
        ("gpt2/small", "small"),
        ("gpt2", "small"),
        ("openai-community/gpt2", "small"),
        ("gpt2-medium", "medium"),
        ("gpt2/large", "large"),
        ("gpt2-xl", "xl"),
        ("openai-community/gpt2-xl", "xl"),
    ],
)
def test_every_spelling_of_gpt2(name: str, size: str) -> None:
    assert get_standard_model_spec(name) == StandardModelSpec(f"{URL}/{size}")
    assert resolve_model_source(name) == f"{URL}/{size}"


@pytest.mark.parametrize("name", ["tiny-tales", "tiny/tales"])
def test_the_packaged_model(name: str) -> None:
    source = resolve_model_source(name)
    assert isinstance(source, Path)
    assert source.parts[-3:] == ("neuron_explainer", "assets", "tiny-tales")
    assert source.is_absolute()


def test_an_existing_folder_comes_before_a_name() -> None:
    Path("gpt2-small").mkdir()
    Path("gpt2/medium").mkdir(parents=True)
    assert resolve_model_source("gpt2-small") == Path("gpt2-small")
    assert resolve_model_source("gpt2/medium") == Path("gpt2/medium")
    assert resolve_model_source("gpt2/small") == f"{URL}/small"
    assert resolve_model_source("gpt2-medium") == f"{URL}/medium"


def test_folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "home/model").mkdir(parents=True)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    assert resolve_model_source(tmp_path) == tmp_path
    assert resolve_model_source("~/model") == tmp_path / "home/model"
    assert resolve_model_source("home/model/") == Path("home/model")


@pytest.mark.parametrize("url", ["https://example.org/m", "az://account/c/m"])
def test_remote_folders(url: str) -> None:
    assert resolve_model_source(url) == url


@pytest.mark.parametrize("name", ["hf:owner/name", "hf://owner/name"])
def test_hf_is_a_model_of_transformers_and_not_a_folder(name: str) -> None:
    for opened in (resolve_model_source, Transformer.load, StandardModelContext):
        with pytest.raises(SourceError, match="names a model that transformers runs") as caught:
            opened(name)
        assert f"ModelContext.from_model_type({name!r})" in str(caught.value)
        assert "https://huggingface.co/owner/name/resolve/main" in str(caught.value)
    Path("own").mkdir()
    with pytest.raises(SourceError, match="give its folder, own"):
        Transformer.load("hf:own")


def test_hf_names_the_same_model_for_every_opener() -> None:
    for opened in (ModelContext.from_model_type, open_model):
        context = opened("hf:owner/name")
        assert isinstance(context, HuggingFaceModelContext)
        assert (context.model_name, context.reference) == ("owner/name", "hf:owner/name")
        assert isinstance(opened("tiny-tales"), StandardModelContext)
    context = ModelContext.from_model_type("hf:owner/name", device="cpu", dtype=torch.bfloat16)
    assert isinstance(context, HuggingFaceModelContext)
    assert context.dtype is torch.bfloat16


def test_unknown_names(tmp_path: Path) -> None:
    with pytest.raises(SourceError) as caught:
        resolve_model_source("gpt2-smal")
    text = str(caught.value)
    assert "no model 'gpt2-smal'" in text
    assert "Did you mean 'gpt2-small'" in text
    assert "tiny-tales" in text
    assert str(tmp_path) in text
    assert "config.json" in text
    with pytest.raises(SourceError, match="Did you mean 'gpt2-xl'"):
        get_standard_model_spec("gpt2-xxl")


@pytest.mark.parametrize("name", ["", "x" * 5000, "a\0b", "./gone", "/gone/away"])
def test_what_is_neither_folder_nor_name(name: str) -> None:
    with pytest.raises(SourceError, match="no such folder"):
        resolve_model_source(name)


def test_a_path_object_is_never_a_name() -> None:
    with pytest.raises(SourceError, match="no such folder"):
        resolve_model_source(Path("gpt2-small"))


def test_a_file_is_no_folder(tmp_path: Path) -> None:
    file = tmp_path / "model.safetensors"
    file.write_bytes(b"")
    with pytest.raises(SourceError, match="is a file; give the folder"):
        resolve_model_source(file)


def test_autoencoders_go_where_models_go() -> None:
    context = make_autoencoder_context("tiny-tales", "ae-resid-delta-mlp")
    assert context.device == Transformer.load("tiny-tales").device
    with pytest.raises(InputError, match="no device 'cuda:99' here"):
        make_autoencoder_context("tiny-tales", "ae-resid-delta-mlp", "cuda:99")
