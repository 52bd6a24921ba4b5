"""delphi's cache of latents, byte for byte as its own code writes it, and Parquet."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file
from safetensors.torch import load_file as load_tensors

import neuron_explainer
from neuron_explainer.activations import Harvester, TokenWindows, tokenize
from neuron_explainer.analysis.interchange.delphi import LatentCache, cache_latents
from neuron_explainer.analysis.interchange.parquet import write_parquet
from neuron_explainer.cli import main
from neuron_explainer.errors import InputError
from neuron_explainer.models.autoencoder import Autoencoder
from neuron_explainer.models.model_context import ModelContext
from tests.analysis.test_dashboards import made_up_store

PEER = Path(__file__).parents[1] / "fixtures" / "peers" / "delphi"
HOOK = "layers.1.mlp"
ASSETS = Path(neuron_explainer.__file__).parent / "assets" / "tiny-tales" / "autoencoders"


def test_the_cache_is_that_of_delphi_byte_for_byte(tmp_path):
    made = load_tensors(PEER / "latents.safetensors")
    cache = LatentCache(11)
    for rows in (slice(0, 2), slice(2, 4), slice(4, 6)):
        cache.add(made["tokens"][rows], made["latents"][rows].flatten(0, 1))
    folder = cache.write(tmp_path, HOOK, n_splits=3, model="gpt2", dataset="made-up text")
    expected = sorted((PEER / HOOK).iterdir())
    assert [path.name for path in sorted(folder.iterdir())] == [path.name for path in expected]
    for path in expected:
        assert (folder / path.name).read_bytes() == path.read_bytes(), path.name


def test_latents_of_windows(tmp_path):
    context = ModelContext.from_model_type("tiny-tales", device="cpu")
    autoencoder = Autoencoder.load(ASSETS / "mlp.post_act" / "0", device="cpu")
    windows = TokenWindows(tokenize(["A wolf met a fox. It rained."] * 3, context), 8, 2)
    cache = cache_latents(context, autoencoder, windows)
    folder = cache.write(tmp_path, "layers.0.mlp.act", n_splits=2)
    parts = [load_file(path) for path in sorted(folder.glob("*.safetensors"))]
    first = [int(path.name.split("_")[0]) for path in sorted(folder.glob("*.safetensors"))]
    dense = np.zeros((*parts[0]["tokens"].shape, autoencoder.n_latents), np.float16)
    for begin, part in zip(first, parts, strict=True):
        row, position, latent = part["locations"].astype(int).T
        dense[row, position, latent + begin] = part["activations"]
    row = 0
    for batch in windows:
        found = Harvester(context, "0/mlp.post_act")(batch)
        (values,) = found.activations.values()
        keep = torch.ones_like(batch.tokens, dtype=torch.bool) if batch.pad is None else ~batch.pad
        mine = torch.from_numpy(dense[row : row + len(batch.tokens)])[keep]
        torch.testing.assert_close(
            mine.float(), autoencoder.encode(values), atol=1e-3, rtol=1e-3, check_dtype=False
        )
        row += len(batch.tokens)
    assert row == cache.n_rows == len(dense)


def test_what_delphi_cannot_hold_is_said(tmp_path):
    cache = LatentCache(4)
    with pytest.raises(InputError, match="there are no tokens"):
        cache.write(tmp_path, HOOK)
    with pytest.raises(InputError, match=r"shape \[6, 4\], found \[5, 4\]"):
        cache.add(torch.zeros(2, 3, dtype=torch.int64), torch.zeros(5, 4))
    cache.add(torch.zeros(2, 3, dtype=torch.int64), torch.zeros(6, 4))
    with pytest.raises(InputError, match="the first have 3 tokens, these 2"):
        cache.add(torch.zeros(2, 2, dtype=torch.int64), torch.zeros(4, 4))
    for wrong in (0, 5):
        with pytest.raises(InputError, match=r"n_splits must lie between 1 and 4"):
            cache.write(tmp_path, HOOK, n_splits=wrong)
    folder = cache.write(tmp_path, HOOK, n_splits=4)  # delphi itself fails where nothing is active
    assert load_file(folder / "3_3.safetensors")["locations"].shape == (0, 3)


def test_parquet_has_all_units_and_examples(tmp_path):
    parquet = pytest.importorskip("pyarrow.parquet")
    store = made_up_store(tmp_path / "store")
    units, examples = (
        parquet.read_table(path).to_pylist() for path in write_parquet(store, tmp_path)
    )
    assert [row["unit"] for row in units] == list(range(len(store)))
    assert units[1]["label"] == "kings"
    for row in units:
        assert row["histogram"] == store[row["unit"]].histogram.tolist()
        for name in ("count", "density", "kurtosis_all"):
            assert row[name] == getattr(store[row["unit"]].statistics, name)
    whole = [each for unit in range(len(store)) for each in store[unit].all_examples]
    assert len(examples) == len(whole)
    for row, example in zip(examples, whole, strict=True):
        assert (row["group"], row["value"], row["peak"]) == (
            example.group, example.value, example.peak,
        )  # fmt: skip
        assert row["pieces"] == example.pieces
        assert row["activations"] == example.activations.tolist()


@pytest.mark.parametrize(
    ("form", "file"),
    [
        ("neuron-records", "6/1.json"),
        ("saedashboard", "batch-0.json"),
        ("neuronpedia", "features/batch-0.jsonl.gz"),
        ("parquet", "examples.parquet"),
    ],
)
def test_a_store_is_exported_from_the_shell(form, file, tmp_path, capsys):
    if form == "parquet":
        pytest.importorskip("pyarrow")
    store = made_up_store(tmp_path / "store")
    command = ["export-records", str(store.path), "--format", form, "--out", str(tmp_path / "out")]
    assert main([*command, "--units", "1-2", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["units"] == 2
    assert str(tmp_path / "out" / file) in found["files"]
    assert main(command) == 0
    assert "left out" in capsys.readouterr().out or form == "parquet"
    assert main([*command, "--units", "99"]) == 2
    assert "has no latent 99" in capsys.readouterr().err
