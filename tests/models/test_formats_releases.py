"""Releases whose own libraries are not installed: read, and equal to their formulas in numpy."""

import json
import pickle
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from neuron_explainer.errors import CheckpointError, InputError
from neuron_explainer.models.autoencoder import Autoencoder
from neuron_explainer.models.autoencoders.convert import save_as
from neuron_explainer.models.autoencoders.nonlinearities import Nonlinearity
from neuron_explainer.models.checkpoints import autoencoders as checkpoints_of_autoencoders
from neuron_explainer.models.checkpoints.autoencoders import FORMATS, Stated
from neuron_explainer.models.checkpoints.autoencoders.common import (
    check_tensors,
    matrix_shape,
    parameters,
)
from neuron_explainer.models.checkpoints.autoencoders.format import (
    Format,
    LoadedAutoencoder,
    Source,
    has_keys,
    loaded,
)
from neuron_explainer.models.locations import ActivationLocation
from tests.reference import published_autoencoders as published

N, L = published.N, published.L


def tensors_of(expected: published.Published) -> dict[str, torch.Tensor]:
    return {name: torch.from_numpy(value) for name, value in expected.arrays.items()}


def assert_is(ae: Autoencoder, expected: published.Published, inputs: Any = None) -> None:
    """Latents and reconstructions of rows are those of the formula."""
    x = published.inputs() if inputs is None else inputs
    rows = [expected.apply(row) for row in x]
    with torch.no_grad():
        out = ae(torch.tensor(x, dtype=ae.dtype))
    for found, wanted in ((out.latents, [r[0] for r in rows]), (out.recons, [r[1] for r in rows])):
        reference = torch.from_numpy(np.stack(wanted))
        assert found.shape == reference.shape
        assert (found - reference).abs().max() <= 1e-5 * reference.abs().max()


def write_json(path: Path, value: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value))


# ---- gpt2-transcoders and early SAELens ----------------------------------------------------------


class LanguageModelSAERunnerConfig:
    """Stands for the class of the same name in the library that wrote the files."""

    def __init__(self, **fields: Any) -> None:
        self.__dict__.update(fields)


def save_with_config(path: Path, expected: published.Published, **fields: Any) -> None:
    """As ``SparseAutoencoder.save_model`` wrote it: the config is a pickled object."""
    cls = LanguageModelSAERunnerConfig
    own = cls.__module__
    buffer = path.with_suffix(".tmp")
    torch.save({"cfg": cls(**fields), "state_dict": tensors_of(expected)}, buffer)
    # The pickle names the module of the class.
    with zipfile.ZipFile(buffer) as here, zipfile.ZipFile(path, "w") as there:
        for entry in here.infolist():
            content = here.read(entry)
            if entry.filename.endswith("data.pkl"):
                assert own.encode() in content
                content = content.replace(own.encode(), b"sae_training.config")
            there.writestr(entry, content)
    buffer.unlink()


FIELDS: dict[str, Any] = {
    "model_name": "gpt2-small",
    "hook_point": "blocks.8.ln2.hook_normalized",
    "hook_point_head_index": None,
    "d_in": N,
    "d_sae": L,
    "is_transcoder": True,
    "out_hook_point": "blocks.8.hook_mlp_out",
    "device": torch.device("cuda"),
    "dtype": torch.float32,
    "use_ghost_grads": (False,),
    "lr": 0.0004,
}


def test_gpt2_transcoders(tmp_path):
    """The class of the config is not looked up: there is no module of that name here."""
    expected = published.sae_training(is_transcoder=True, n_outputs=5)
    save_with_config(tmp_path / "8.pt", expected, **FIELDS)
    ae = Autoencoder.load(tmp_path / "8.pt")
    assert_is(ae, expected)
    assert ae.is_transcoder
    # TransformerLens had folded gain and bias into the MLP: the value before them.
    assert str(ae.location) == "8/resid.torso.ln_mlp.post_scale"
    assert str(ae.output_location) == "8/resid.torso.delta_mlp"
    assert ae.model_name == "gpt2-small"
    assert ae.input_normalization == "none"
    assert ae.metadata["output_centred"] is True
    assert ae.metadata["cfg"]["lr"] == 0.0004
    ae.save(tmp_path / "ours")
    assert_is(Autoencoder.load(tmp_path / "ours"), expected)


def test_early_saelens_was_trained_on_a_centred_stream(tmp_path):
    expected = published.sae_training(is_transcoder=False)
    fields = {"is_transcoder": False, "hook_point": "blocks.3.hook_resid_pre"}
    save_with_config(tmp_path / "ae.pt", expected, **FIELDS | fields)
    ae = Autoencoder.load(tmp_path / "ae.pt")
    assert ae.input_normalization == "center"
    assert str(ae.location) == "2/resid.torso.post_mlp"
    x = published.inputs()
    mean = x.mean(axis=1, keepdims=True)
    latents = ae.encode(torch.tensor(x, dtype=torch.float32)).detach()
    wanted = np.stack([expected.apply(row)[0] for row in x - mean])
    assert np.abs(latents.numpy() - wanted).max() <= 1e-5 * wanted.max()
    torch.save({"cfg": {}, "state_dict": tensors_of(expected)}, tmp_path / "bare.pt")
    with pytest.raises(CheckpointError, match="input_normalization='center'"):
        Autoencoder.load(tmp_path / "bare.pt")
    assert_is(Autoencoder.load(tmp_path / "bare.pt", input_normalization="none"), expected)


class Hostile:
    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> Any:
        return Path.mkdir, (self.mark,)


def test_no_other_object_is_read_beside_the_config(tmp_path):
    expected = published.sae_training(is_transcoder=True)
    save_with_config(tmp_path / "8.pt", expected, **FIELDS, other=Hostile(tmp_path / "was-run"))
    with pytest.raises(CheckpointError, match="refused, and nothing in it was run"):
        Autoencoder.load(tmp_path / "8.pt")
    assert not (tmp_path / "was-run").exists()
    (tmp_path / "bare.pt").write_bytes(pickle.dumps({"cfg": Hostile(tmp_path / "was-run")}))
    with pytest.raises(CheckpointError, match="refused"):
        Autoencoder.load(tmp_path / "bare.pt")
    assert not (tmp_path / "was-run").exists()


def test_a_transcoder_whose_config_says_otherwise(tmp_path):
    expected = published.sae_training(is_transcoder=True)
    save_with_config(tmp_path / "8.pt", expected, **FIELDS | {"is_transcoder": False})
    with pytest.raises(CheckpointError, match="is_transcoder: expected True as in the tensors"):
        Autoencoder.load(tmp_path / "8.pt")


# ---- four tensors in a torch file ----------------------------------------------------------------


def test_attention_output_autoencoders_of_gpt2(tmp_path):
    expected = published.sae_training(is_transcoder=False)  # the same formula
    path = tmp_path / "gpt2-small_L5_Hcat_z_v9.pt"
    torch.save(tensors_of(expected), path)
    with pytest.raises(CheckpointError, match=r"expected gpt2-small_L5_Hcat_z_v9_cfg\.json beside"):
        Autoencoder.load(path)
    config = {"act_name": "blocks.5.attn.hook_z", "act_size": N, "dict_size": L, "lr": 1e-3}
    write_json(tmp_path / "gpt2-small_L5_Hcat_z_v9_cfg.json", config)
    ae = Autoencoder.load(path)
    assert_is(ae, expected)
    assert str(ae.location) == "5/attn.v_out"
    assert ae.metadata["cfg"] == config
    write_json(tmp_path / "gpt2-small_L5_Hcat_z_v9_cfg.json", config | {"dict_size": 9})
    with pytest.raises(CheckpointError, match="dict_size: expected 24 as in the tensors, found 9"):
        Autoencoder.load(path)


def test_qwen_scope(tmp_path):
    expected = published.qwen_scope()
    path = tmp_path / "layer7.sae.pt"
    torch.save(tensors_of(expected), path)
    with pytest.raises(CheckpointError, match=r"k: only the name of a release .*`--k 50`"):
        Autoencoder.load(path)
    ae = Autoencoder.load(path, k=published.K, location="7/resid_post_mlp")
    assert_is(ae, expected)
    assert str(ae.location) == "7/resid.torso.post_mlp"
    save_as(ae, tmp_path / "new", "saelens")
    assert_is(Autoencoder.load(tmp_path / "new"), expected)


def test_goodfire(tmp_path):
    expected = published.goodfire()
    torch.save(tensors_of(expected), tmp_path / "Llama-l19.pth")
    assert_is(Autoencoder.load(tmp_path / "Llama-l19.pth"), expected)


# ---- Gemma Scope 2 -------------------------------------------------------------------------------


@pytest.mark.parametrize("skip", [False, True])
def test_gemma_scope_2(tmp_path, skip):
    expected = published.gemma_scope_2(skip=skip)
    save_file(tensors_of(expected), tmp_path / "params.safetensors")
    config = {
        "architecture": "jump_relu",
        "model_name": "gemma-3-1b-pt",
        "hf_hook_point_in": "model.layers.13.output",
        "affine_connection": skip,
    }
    write_json(tmp_path / "config.json", config)
    for source in (tmp_path, tmp_path / "params.safetensors"):
        ae = Autoencoder.load(source)
        assert_is(ae, expected)
        assert ae.is_transcoder == skip
        assert str(ae.location) == "13/resid.torso.post_mlp"
        assert ae.model_name == "gemma-3-1b-pt"
    write_json(tmp_path / "config.json", config | {"architecture": "topk"})
    with pytest.raises(CheckpointError, match="architecture: expected 'jump_relu', found 'topk'"):
        Autoencoder.load(tmp_path)


@pytest.mark.parametrize("skip", [False, True])
def test_a_layer_of_a_cross_layer_transcoder_of_gemma_scope_2(tmp_path, skip):
    expected = published.gemma_scope_2(skip=skip, n_layers=4, own=1)
    path = tmp_path / "layer_1.safetensors"
    save_file(tensors_of(expected), path)
    with pytest.raises(CheckpointError, match="does not say which layer it is"):
        Autoencoder.load(path)
    with pytest.raises(CheckpointError, match="expected a layer below 4, found 4"):
        Autoencoder.load(path, location="4/resid.torso.post_ln_mlp")
    ae = Autoencoder.load(path, location=ActivationLocation("resid.torso.post_ln_mlp", 1))
    assert_is(ae, expected)
    assert ae.metadata["output_layers"] == [1, 2, 3]
    assert ae.n_outputs == 3 * N


# ---- circuit-tracer ------------------------------------------------------------------------------

YAML = """# a set
model_name: "gpt2"
model_kind: {kind}
feature_input_hook: "hook_resid_mid"
feature_output_hook: hook_mlp_out  # of the MLP
scan:
  - one
  - two
"""


@pytest.mark.parametrize("jumps", [False, True])
@pytest.mark.parametrize("skip", [False, True])
def test_per_layer_transcoders(tmp_path, jumps, skip):
    expected = published.circuit_tracer(jumps=jumps, skip=skip)
    path = tmp_path / "layer_3.safetensors"
    save_file(tensors_of(expected), path)
    unknown = Autoencoder.load(path)
    assert_is(unknown, expected)
    assert unknown.location is None
    (tmp_path / "config.yaml").write_text(YAML.format(kind="transcoder_set"))
    ae = Autoencoder.load(path)
    assert_is(ae, expected)
    assert str(ae.location) == "3/resid.torso.post_attn"
    assert str(ae.output_location) == "3/resid.torso.delta_mlp"
    assert ae.model_name == "gpt2"
    with pytest.raises(CheckpointError, match=r"give the file of one: layer_3\.safetensors"):
        Autoencoder.load(tmp_path)
    (tmp_path / "config.yaml").write_text(YAML.format(kind="lorsa"))
    with pytest.raises(CheckpointError, match="model_kind: expected 'transcoder_set' or"):
        Autoencoder.load(path)


@pytest.mark.parametrize("jumps", [False, True])
def test_the_layers_of_a_cross_layer_transcoder_add_up(tmp_path, jumps):
    """Each layer is a transcoder to all later ones; their contributions are the whole output."""
    n_layers = 3
    (tmp_path / "config.yaml").write_text(YAML.format(kind="cross_layer_transcoder"))
    layers = [published.cross_layer(i, n_layers, jumps=jumps) for i in range(n_layers)]
    x = np.stack([published.inputs() + i for i in range(n_layers)])
    total, wanted = np.zeros((n_layers, len(x[0]), N)), np.zeros((n_layers, len(x[0]), N))
    for i, expected in enumerate(layers):
        tensors = tensors_of(expected)
        decoder = {f"W_dec_{i}": tensors.pop(f"W_dec_{i}")}
        save_file(tensors, tmp_path / f"W_enc_{i}.safetensors")
        save_file(decoder, tmp_path / f"W_dec_{i}.safetensors")
        ae = Autoencoder.load(tmp_path / f"W_enc_{i}.safetensors")
        assert_is(ae, expected, x[i])
        assert str(ae.location) == f"{i}/resid.torso.post_attn"
        assert ae.metadata["output_layers"] == list(range(i, n_layers))
        recons = ae.reconstruct(torch.tensor(x[i], dtype=torch.float32)).detach().numpy()
        for place, layer in enumerate(ae.metadata["output_layers"]):
            total[layer] += recons[:, place * N : (place + 1) * N]
    for layer in range(n_layers):
        for i in range(layer + 1):
            latents = np.stack([layers[i].apply(row)[0] for row in x[i]])
            wanted[layer] += latents @ layers[i].arrays[f"W_dec_{i}"][:, layer - i].astype(float)
        wanted[layer] += layers[layer].arrays[f"b_dec_{layer}"]
    assert np.abs(total - wanted).max() <= 1e-5 * np.abs(wanted).max()


def test_thresholds_that_let_negative_latents_through_are_refused(tmp_path):
    tensors = tensors_of(published.circuit_tracer(jumps=True, skip=False))
    tensors["activation_function.threshold"][2] = -0.5
    save_file(tensors, tmp_path / "layer_0.safetensors")
    with pytest.raises(CheckpointError, match=r"expected thresholds >= 0, found -0\.5"):
        Autoencoder.load(tmp_path / "layer_0.safetensors")


# ---- Llama Scope ---------------------------------------------------------------------------------

LLAMA: dict[str, Any] = {
    "hook_point_in": "blocks.15.hook_resid_post",
    "hook_point_out": "blocks.15.hook_resid_post",
    "act_fn": "jumprelu",
    "jump_relu_threshold": 0.4,
    "dataset_average_activation_norm": {"in": 11.5, "out": 11.5},
    "sparsity_include_decoder_norm": True,
    "d_model": N,
}


def test_llama_scope(tmp_path):
    expected = published.llama_scope(11.5, 11.5, 0.4)
    write_json(tmp_path / "hyperparams.json", LLAMA)
    (tmp_path / "checkpoints").mkdir()
    save_file(tensors_of(expected), tmp_path / "checkpoints" / "final.safetensors")
    ae = Autoencoder.load(tmp_path)
    assert_is(ae, expected)
    assert str(ae.location) == "15/resid.torso.post_mlp"
    assert not ae.is_transcoder
    outside: dict[str, Any] = {"hook_point_out": "blocks.15.hook_mlp_out"}
    write_json(tmp_path / "hyperparams.json", LLAMA | outside)
    with pytest.raises(CheckpointError, match=r"sparsity_include_decoder_norm.*found a transcoder"):
        Autoencoder.load(tmp_path)
    norms = {"in": 11.5, "out": 0.6}
    outside |= {"sparsity_include_decoder_norm": False, "dataset_average_activation_norm": norms}
    write_json(tmp_path / "hyperparams.json", LLAMA | outside)
    transcoder = Autoencoder.load(tmp_path)
    assert_is(transcoder, published.llama_scope(11.5, 0.6, 0.4))
    assert str(transcoder.output_location) == "15/resid.torso.delta_mlp"
    write_json(tmp_path / "hyperparams.json", LLAMA | {"dataset_average_activation_norm": {}})
    with pytest.raises(CheckpointError, match=r"in: expected a number > 0, found no such field"):
        Autoencoder.load(tmp_path)


def test_the_distillation_of_r1(tmp_path):
    expected = published.llama_scope(9.5, 9.5, None)
    write_json(tmp_path / "config.json", LLAMA | {"norm_activation": "dataset-wise"})
    tensors = tensors_of(expected)
    save_file(tensors, tmp_path / "sae_weights.safetensors")
    with pytest.raises(CheckpointError, match="norm_factor="):
        Autoencoder.load(tmp_path)
    stated = Autoencoder.load(tmp_path, norm_factor=N**0.5 / 9.5)
    assert_is(stated, expected)
    norm = {f"dataset_average_activation_norm.{LLAMA['hook_point_in']}": torch.tensor(9.5)}
    save_file(tensors | norm, tmp_path / "sae_weights.safetensors")
    assert_is(Autoencoder.load(tmp_path), expected)


# ---- SAELens: a factor and a scale that meet -----------------------------------------------------


def test_a_norm_factor_is_folded_before_the_norms_of_the_decoder(tmp_path):
    """SAELens divides the decoder by the factor first: its latents are that much smaller."""
    factor = 0.37
    expected = published.saelens_topk(factor)
    save_file(tensors_of(expected), tmp_path / "sae_weights.safetensors")
    config = {
        "architecture": "topk",
        "k": published.K,
        "d_in": N,
        "d_sae": L,
        "apply_b_dec_to_input": True,
        "normalize_activations": "expected_average_only_in",
        "rescale_acts_by_decoder_norm": True,
        "metadata": {},
    }
    write_json(tmp_path / "cfg.json", config)
    assert_is(Autoencoder.load(tmp_path, norm_factor=factor), expected)


V5: dict[str, Any] = {  # as SAELens's republished folders of OpenAI's v5 have it
    "model_name": "gpt2-small",
    "hook_name": "blocks.6.hook_resid_mid",
    "hook_layer": 6,
    "hook_head_index": None,
    "activation_fn_str": "topk",
    "activation_fn_kwargs": {"k": published.K},
    "apply_b_dec_to_input": True,
    "finetuning_scaling_factor": False,
    "normalize_activations": "layer_norm",
    "prepend_bos": False,
    "context_size": 64,
    "architecture": "standard",
    "d_in": N,
    "d_sae": L,
    "dtype": "torch.float32",
    "sae_lens_training_version": None,
}


def test_openai_v5_as_saelens_republished_it(tmp_path):
    """The architecture says "standard"; the activation function is what counts."""
    expected = published.openai("v5")
    renamed = {
        "encoder.weight": "W_enc",
        "decoder.weight": "W_dec",
        "latent_bias": "b_enc",
        "pre_bias": "b_dec",
    }
    tensors = {
        new: torch.from_numpy(np.ascontiguousarray(expected.arrays[old].T))
        for old, new in renamed.items()
    }
    save_file(tensors, tmp_path / "sae_weights.safetensors")
    write_json(tmp_path / "cfg.json", V5)
    ae = Autoencoder.load(tmp_path)
    assert_is(ae, expected)
    assert str(ae.location) == "6/resid.torso.post_attn"


# ---- refused by name -----------------------------------------------------------------------------


@pytest.mark.parametrize("architecture", ["abstopk", "matching_pursuit", "temporal"])
def test_architectures_that_are_not_supported_say_why(tmp_path, architecture):
    config = {"architecture": architecture, "d_in": N, "d_sae": L, "metadata": {}}
    write_json(tmp_path / "cfg.json", config)
    with pytest.raises(CheckpointError, match=f"'{architecture}' is not supported: it"):
        Autoencoder.load(tmp_path)


def test_temporal_autoencoders_in_their_own_layout(tmp_path):
    tensors = {"D": torch.zeros(L, N), "b": torch.zeros(N), "attn_layers.0.W": torch.zeros(2, 2)}
    save_file(tensors, tmp_path / "latest_ckpt.safetensors")
    for source in (tmp_path, tmp_path / "latest_ckpt.safetensors"):
        with pytest.raises(CheckpointError, match=r"temporal sparse autoencoder.*not supported"):
            Autoencoder.load(source)


@pytest.mark.parametrize("sae_type", ["crosscoder", "clt", "lorsa", "molt"])
def test_other_kinds_of_language_model_saes(tmp_path, sae_type):
    config = {"sae_type": sae_type, "d_model": N, "hook_point_in": "a", "hook_point_out": "b"}
    write_json(tmp_path / "config.json", config)
    save_file({"W_E": torch.zeros(N, L)}, tmp_path / "sae_weights.safetensors")
    with pytest.raises(CheckpointError, match=r"this is a .* of Language-Model-SAEs, which is not"):
        Autoencoder.load(tmp_path)


def test_another_library_of_cross_layer_transcoders(tmp_path):
    tensors = {"encoder_module.encoders.0.weight": torch.zeros(L, N)}
    save_file(tensors, tmp_path / "clt_checkpoint_latest.safetensors")
    with pytest.raises(CheckpointError, match="crosslayer-coding, which is not supported"):
        Autoencoder.load(tmp_path / "clt_checkpoint_latest.safetensors")


def test_a_torch_file_of_no_known_format(tmp_path):
    torch.save({"weight": torch.zeros(3), "other": 1}, tmp_path / "x.pt")
    with pytest.raises(CheckpointError, match="found the keys: other, weight") as error:
        Autoencoder.load(tmp_path / "x.pt")
    assert "damaged" not in str(error.value)
    assert "encoder.weight and decoder.weight (OpenAI)" in str(error.value)


# ---- what is stated, and the list of formats -----------------------------------------------------


def test_every_statement_has_a_format_that_takes_it():
    taken = {name for form in FORMATS for name in form.states}
    assert taken | {"input_normalization", "location"} == set(Stated.__annotations__)


def test_names_and_layouts_of_formats_are_their_own():
    names = [form.name for form in FORMATS]
    assert len(set(names)) == len(names)
    layouts = [form.layout for form in FORMATS if form.layout]
    assert len(set(layouts)) == len(layouts)


def test_a_statement_of_another_format_is_refused(tmp_path):
    torch.save(tensors_of(published.goodfire()), tmp_path / "x.pt")
    with pytest.raises(
        InputError, match=r"'goodfire', which has no k; that is for dictionary_lear"
    ):
        Autoencoder.load(tmp_path / "x.pt", k=3)


# ---- a new variant -------------------------------------------------------------------------------


class Shrunk(Nonlinearity):
    """``max(0, |x| - amount)``: a nonlinearity that the library does not know."""

    name = "Shrunk"
    fields = ("amount",)

    def __init__(self, amount: float) -> None:
        super().__init__()
        self.amount = amount

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.relu(x.abs() - self.amount)


def read_shrunk(source: Source, stated: Stated) -> LoadedAutoencoder:
    where, tensors = source.weights("shrunk.safetensors")
    n_latents, n_inputs = matrix_shape(where, tensors, "E")
    check_tensors(where, tensors, {"E": (n_latents, n_inputs), "D": (n_inputs, n_latents)})
    state = parameters(
        tensors["E"], tensors["D"], None, nonlinearity="Shrunk", amount=stated["penalty"]
    )
    return loaded(where, stated, state, metadata={"format": "shrunk"})


SHRUNK = Format(
    name="shrunk",
    layout="shrunk.safetensors (nobody)",
    read=read_shrunk,
    states=frozenset({"penalty"}),
    marks=("shrunk.safetensors",),
    holds={"safetensors": has_keys("E", "D")},
    write=lambda it: {"shrunk.safetensors": {"E": it.state_dict["encoder.weight"]}},
)


def test_a_new_variant_is_a_nonlinearity_a_format_and_a_line(tmp_path, monkeypatch):
    """Recognised as folder and file, stated, read, applied, saved, refused, listed: from two objects."""
    monkeypatch.setattr(checkpoints_of_autoencoders, "FORMATS", [*FORMATS, SHRUNK])
    weight = torch.randn(L, N, generator=torch.Generator().manual_seed(0))
    save_file({"E": weight, "D": weight.T.contiguous()}, tmp_path / "shrunk.safetensors")
    x = torch.randn(5, N, generator=torch.Generator().manual_seed(1))
    for source in (tmp_path, tmp_path / "shrunk.safetensors"):
        ae = Autoencoder.load(source, penalty=0.5)
        latents = torch.relu((x @ weight.T).abs() - 0.5)
        torch.testing.assert_close(ae.encode(x), latents)
        torch.testing.assert_close(ae.reconstruct(x), latents @ weight)
    ae.save(tmp_path / "ours")
    torch.testing.assert_close(Autoencoder.load(tmp_path / "ours").encode(x), latents)
    with pytest.raises(
        InputError, match="'shrunk', which has no k; that is for dictionary_learning"
    ):
        Autoencoder.load(tmp_path, k=3)
    (tmp_path / "empty").mkdir()
    with pytest.raises(CheckpointError, match=r"shrunk\.safetensors \(nobody\)"):
        Autoencoder.load(tmp_path / "empty")
    with pytest.raises(InputError, match="'saelens' cannot express the nonlinearity Shrunk"):
        save_as(ae, tmp_path / "new", "saelens")
    save_as(ae, tmp_path / "new", "shrunk")
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["shrunk.safetensors"]
