"""dictionary_learning's names of submodules mean the same numbers as there.

The fixtures are what its tracer reads at each submodule (``benchmarks/peers/make_submodules.py``), of models
whose gains and biases are random.
"""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from neuron_explainer.models.autoencoder import Autoencoder

FIXTURES = Path(__file__).parents[1] / "fixtures" / "peers"
SAVED = FIXTURES / "dictionary-learning" / "AutoEncoderNew" / "saved"
NAMES = [
    (folder.name, key.split(":")[0], key.split(":")[1])
    for folder in sorted((FIXTURES / "submodules").iterdir())
    for key in sorted(load_file(folder / "activations.safetensors"))
    if key != "tokens"
]
MODELS = {"gpt2": "openai-community/gpt2", "gpt_neox": "EleutherAI/pythia-70m-deduped"}


def load(folder: Path, name: str, io: str, model: str = MODELS["gpt_neox"]) -> Autoencoder:
    """A dictionary whose config says that it was trained at this submodule."""
    shutil.copytree(SAVED, folder, dirs_exist_ok=True)
    config = json.loads((SAVED / "config.json").read_text("utf-8"))
    config["trainer"] |= {"submodule_name": name, "lm_name": model}
    config["buffer"]["io"] = io
    (folder / "config.json").write_text(json.dumps(config), "utf-8")
    return Autoencoder.load(folder)


@pytest.mark.parametrize(("kind", "path", "side"), NAMES)
def test_a_submodule_means_the_same_numbers(
    kind: str, path: str, side: str, tmp_path: Path
) -> None:
    pytest.importorskip("transformers")
    from neuron_explainer.models.huggingface.context import HuggingFaceModelContext

    assert len(NAMES) == 12
    theirs = load_file(FIXTURES / "submodules" / kind / "activations.safetensors")
    context = HuggingFaceModelContext(FIXTURES / "submodules" / kind, "cpu", torch.float32)
    with_index = path.replace(".1", "[1]", 1)
    for name in (path, f".{path}", with_index):
        place = load(tmp_path, name, side, MODELS[kind]).location
        assert place is not None, name
        found = context.get_or_create_model().capture(theirs["tokens"], place)[place]
        assert torch.allclose(found, theirs[f"{path}:{side}"], rtol=1e-5, atol=1e-5)


def test_the_name_that_its_script_gives_is_a_layers_output(tmp_path: Path) -> None:
    assert str(load(tmp_path, "resid_post_layer_3", "out").location) == "3/resid.torso.post_mlp"
    assert load(tmp_path, "resid_post_layer_3", "in").location is None


def test_a_transcoder_has_both_sides(tmp_path: Path) -> None:
    both = load(tmp_path, "gpt_neox.layers.1.mlp", "in_and_out")
    assert str(both.location) == "1/resid.torso.post_ln_mlp"
    assert str(both.output_location) == "1/resid.torso.delta_mlp"


@pytest.mark.parametrize(
    ("name", "model"),
    [
        ("model.layers.3.mlp", "google/gemma-2-2b"),  # a norm follows
        ("transformer.h.3.mlp", "bigscience/bloom-560m"),  # it returns the stream
        ("gpt_neox.layers.3.attention.dense", MODELS["gpt_neox"]),
        ("mlp3", MODELS["gpt_neox"]),
    ],
)
def test_a_name_that_is_not_known_to_mean_one_place_means_none(
    name: str, model: str, tmp_path: Path
) -> None:
    assert load(tmp_path, name, "out", model).location is None
