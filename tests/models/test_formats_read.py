"""Published autoencoders: encode and decode agree with the libraries that they are of.

``tests/fixtures/peers`` holds what SAELens, dictionary_learning and sparsify made of dictionaries of
their own (``benchmarks/peers/make_fixtures.py``); formats without an installable library are compared with
their formulas in numpy.
"""

import json
import shutil
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from benchmarks.peers.write_ours import FIXTURES, fixtures, source_in
from neuron_explainer.errors import CheckpointError, InputError
from neuron_explainer.models.autoencoder import Autoencoder, UnstatedNormalizationWarning
from neuron_explainer.models.autoencoder_context import AutoencoderConfig, AutoencoderContext
from neuron_explainer.models.autoencoders.nonlinearities import activation_name
from neuron_explainer.models.checkpoints.autoencoders import Stated
from neuron_explainer.models.locations import ActivationLocation
from tests.blob_server import BlobServer
from tests.reference import published_autoencoders as published

CASES = {name: (folder, told) for name, folder, told in fixtures()}
TOLERANCE = 1e-5  # of the largest value


def assert_agrees(found: torch.Tensor, expected: Any) -> None:
    expected = torch.as_tensor(np.asarray(expected))
    assert found.shape == expected.shape
    assert (found - expected).abs().max() <= TOLERANCE * expected.abs().max()


def load(name: str, **more: Any) -> Autoencoder:
    folder, told = CASES[name]
    return Autoencoder.load(source_in(folder), **told, **more)


def test_every_class_of_every_peer_is_there():
    counts = {peer: len(list((FIXTURES / peer).iterdir())) for peer in ("sae-lens", "sparsify")}
    assert counts == {"sae-lens": 23, "sparsify": 6}
    assert len(list((FIXTURES / "dictionary-learning").iterdir())) == 7


@pytest.mark.parametrize("name", CASES)
@torch.no_grad()
def test_encode_and_decode_are_the_peers(name):
    expected = load_file(CASES[name][0] / "expected.safetensors")
    ae, x = load(name), expected["x"]
    assert_agrees(ae.encode(x), expected["latents"])
    assert_agrees(ae.decode(expected["latents"], ae.normalize(x)[1]), expected["recons"])
    assert_agrees(ae.reconstruct(x), expected["recons"])
    # However the file's matrices lie, in memory each latent's weights lie together.
    assert ae.encoder.weight.is_contiguous()
    assert ae.decoder.weight.t().is_contiguous() or ae.tied
    assert ae.glu is None or ae.glu.weight.is_contiguous()
    one = ae(x[2])  # a row alone
    assert_agrees(one.latents, expected["latents"][2])
    assert ae.metadata["format"] in ("saelens", "dictionary_learning", "sparsify", "e2e")
    assert (ae.latents_activation_frequency == 1).all()


@pytest.mark.parametrize(
    ("name", "location", "output", "model"),
    [
        ("sae-lens-standard", "3/resid.torso.delta_mlp", None, "gpt2-small"),
        ("sae-lens-old-standard", "4/resid.torso.post_mlp", None, "gpt2-small"),
        ("sae-lens-standard-hook_z", "3/attn.v_out", None, "gpt2-small"),
        (
            "sae-lens-transcoder",
            "3/resid.torso.ln_mlp.post_scale",
            "3/resid.torso.delta_mlp",
            "gpt2-small",
        ),
        ("sae-lens-batchtopk", None, None, None),
        ("sparsify-plain", None, None, None),
        (
            "dictionary-learning-AutoEncoder",
            "3/resid.torso.post_mlp",
            None,
            "EleutherAI/pythia-70m-deduped",
        ),
    ],
)
def test_where_it_belongs_is_read_or_stays_unknown(name, location, output, model):
    ae = load(name)
    assert (None if ae.location is None else str(ae.location)) == location
    assert (None if ae.output_location is None else str(ae.output_location)) == output
    assert ae.model_name == model


def test_what_is_stated_is_added_and_not_contradicted():
    ae = load("sparsify-plain", location="5/resid_delta_mlp", input_normalization="none")
    assert ae.location == ActivationLocation("resid.torso.delta_mlp", 5)
    said = load("sae-lens-standard", location="resid_delta_mlp")  # less than the file says
    assert str(said.location) == "3/resid.torso.delta_mlp"
    with pytest.raises(CheckpointError, match=r"says location '3/resid.*', the call says '4/resid"):
        load("sae-lens-standard", location="4/resid_delta_mlp")
    with pytest.raises(CheckpointError, match="says input_normalization 'layer_norm', the call"):
        load("sae-lens-topk-layer_norm", input_normalization="none")
    with pytest.raises(CheckpointError, match="this format says input_normalization 'none'"):
        load("sparsify-plain", input_normalization="layer_norm")
    with pytest.raises(
        InputError, match=r"of the format 'sparsify', which has no norm_factor; .*sae"
    ):
        load("sparsify-plain", norm_factor=2.0)
    with pytest.raises(
        InputError, match=r"unknown argument 'norm_facto'\. Did you mean 'norm_factor'"
    ):
        load("sparsify-plain", norm_facto=2.0)
    with pytest.raises(
        CheckpointError, match="transcode says false, the call says output_location"
    ):
        load("sparsify-plain", output_location="5/resid_delta_mlp")


# ---- SAELens -------------------------------------------------------------------------------------


def edited(tmp_path: Path, name: str, **changes: Any) -> Path:
    """A copy of a fixture with other fields in its JSON file; ``...`` takes one out."""
    folder = tmp_path / "edited"
    shutil.copytree(CASES[name][0] / "saved", folder)
    path = next(folder.glob("*.json"))
    config = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({key: v for key, v in config.items() if v is not ...}))
    return folder


@pytest.mark.parametrize("name", ["standard-expected_average_only_in", "old-bool-normalize"])
def test_a_factor_that_is_not_in_the_folder_must_be_given(name):
    saved = CASES[f"sae-lens-{name}"][0] / "saved"
    with pytest.raises(
        CheckpointError, match=r"cfg\.json: normalize_activations is .*norm_factor="
    ):
        Autoencoder.load(saved)
    assert Autoencoder.load(saved, norm_factor=1.0).metadata["norm_factor"] == 1.0
    with pytest.raises(InputError, match="norm_factor must be a number > 0, found -1"):
        Autoencoder.load(saved, norm_factor=-1)
    with pytest.raises(CheckpointError, match="says 'none', the call says norm_factor 2"):
        load("sae-lens-standard", norm_factor=2.0)


def test_fields_that_may_change_numbers_are_refused_and_others_kept(tmp_path):
    harmless = {"lr": 1e-3, "wandb_id": "x", "use_some_norm": False, "weird_scale": None}
    folder = edited(tmp_path, "sae-lens-old-standard", **harmless)
    assert Autoencoder.load(folder).metadata["cfg"]["wandb_id"] == "x"
    path = folder / "cfg.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"output_rescaling": 2.0}))
    with pytest.raises(
        CheckpointError, match=r"cfg\.json: unknown settings .*output_rescaling = 2\.0"
    ):
        Autoencoder.load(folder)


@pytest.mark.parametrize(
    ("name", "changes", "message"),
    [
        (
            "standard",
            {"architecture": "toppk"},
            "architecture: expected 'standard', .*found 'toppk'. Did you mean 'topk'",
        ),
        ("standard", {"architecture": ...}, "architecture: expected 'standard', .*found None"),
        ("standard", {"architecture": "gated"}, r"b_gate: missing, expected \[24\]"),
        ("standard", {"d_in": 9}, r"W_enc: expected shape \[9, 24\], found \[8, 24\]"),
        ("standard", {"d_in": ...}, "d_in: expected a whole number >= 1, found no such field"),
        ("standard", {"d_sae": "24"}, "d_sae: expected a whole number >= 1, found '24'"),
        ("standard", {"apply_b_dec_to_input": "yes"}, "apply_b_dec_to_input: expected true or"),
        (
            "standard",
            {"normalize_activations": "covariance_whitening"},
            "normalize_activations: exp",
        ),
        ("standard", {"reshape_activations": "heads"}, "reshape_activations: expected 'none'"),
        ("standard", {"rescale_acts_by_decoder_norm": True}, "rescale_acts_by_decoder_norm: expec"),
        (
            "standard",
            {"finetuning_scaling_factor": True},
            "finetuning_scaling_factor: expected fal",
        ),
        ("topk", {"k": ...}, "k: expected a whole number >= 1, found no such field"),
        ("topk", {"k": 25}, r"TopK\(k=25\) on 24 latents"),
        ("transcoder", {"apply_b_dec_to_input": True}, "expected false for a transcoder"),
        ("transcoder", {"d_out": 7}, r"W_dec: expected shape \[24, 7\], found \[24, 6\]"),
        ("old-standard", {"activation_fn_str": "tanh-relu"}, "activation_fn: expected 'relu' or"),
        (
            "old-topk-layer_norm",
            {"activation_fn_kwargs": {"k": 4, "signed": True}},
            "activation_fn_kwargs: expected k only",
        ),
        (
            "old-topk-layer_norm",
            {"architecture": "gated"},
            "'topk' and architecture 'gated' contrad",
        ),
    ],
)
def test_saelens_configs_that_contradict_or_are_not_known(tmp_path, name, changes, message):
    with pytest.raises((CheckpointError, InputError), match=message) as error:
        Autoencoder.load(edited(tmp_path, f"sae-lens-{name}", **changes))
    assert "edited" in str(error.value)


def test_one_head_has_no_location_here(tmp_path):
    folder = edited(tmp_path, "sae-lens-old-standard", hook_point_head_index=3)
    assert Autoencoder.load(folder).location is None


def test_saelens_scaling_factors(tmp_path):
    folder = edited(tmp_path, "sae-lens-old-standard", finetuning_scaling_factor=True)
    tensors = load_file(folder / "sae_weights.safetensors")
    save_file(tensors | {"scaling_factor": torch.ones(24)}, folder / "sae_weights.safetensors")
    expected = load_file(CASES["sae-lens-old-standard"][0] / "expected.safetensors")
    assert_agrees(Autoencoder.load(folder).reconstruct(expected["x"]).detach(), expected["recons"])
    save_file(tensors | {"scaling_factor": torch.ones(24) * 2}, folder / "sae_weights.safetensors")
    with pytest.raises(CheckpointError, match="scaling_factor: expected ones, found other values"):
        Autoencoder.load(folder)
    config = json.loads((folder / "cfg.json").read_text()) | {"finetuning_scaling_factor": False}
    (folder / "cfg.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match="scaling_factor: expected ones, found other values"):
        Autoencoder.load(folder)


def test_saelens_sparsity_becomes_the_frequency_of_latents(tmp_path):
    folder = edited(tmp_path, "sae-lens-standard")
    sparsity = torch.linspace(-10, 0, 24)
    save_file({"sparsity": sparsity}, folder / "sparsity.safetensors")
    frequency = Autoencoder.load(folder).latents_activation_frequency
    torch.testing.assert_close(frequency, 10**sparsity)
    save_file({"sparsity": sparsity[:3]}, folder / "sparsity.safetensors")
    with pytest.raises(CheckpointError, match=r"sparsity: expected shape \[24\], found \[3\]"):
        Autoencoder.load(folder)


# ---- dictionary_learning -------------------------------------------------------------------------

DL_CLASSES = [path.name for path in sorted((FIXTURES / "dictionary-learning").iterdir())]


@pytest.mark.parametrize("how", ["file", "folder", "other config"])
@pytest.mark.parametrize("name", DL_CLASSES)
@torch.no_grad()
def test_without_a_readable_config_the_keys_tell_the_class(tmp_path, name, how):
    source = FIXTURES / "dictionary-learning" / name
    (tmp_path / "dictionary").mkdir()
    path = Path(shutil.copy(source / "saved" / "ae.pt", tmp_path / "dictionary" / "ae.pt"))
    if how == "other config":
        (path.parent / "config.json").write_text('{"entity": "x", "lr": 0.1}')
    place = path if how == "file" else path.parent
    told = {}
    if name in ("AutoEncoderTopK", "BatchTopKSAE"):
        with pytest.raises(
            CheckpointError, match="of AutoEncoderTopK and of BatchTopKSAE, whose lat"
        ):
            Autoencoder.load(place)
        told = {"dict_class": name}
    expected = load_file(source / "expected.safetensors")
    ae = Autoencoder.load(place, **told)
    assert ae.metadata["dict_class"] == name
    assert_agrees(ae.encode(expected["x"]), expected["latents"])
    assert_agrees(ae.reconstruct(expected["x"]), expected["recons"])


@torch.no_grad()
def test_the_norms_of_the_decoder_may_stay_where_they_are():
    expected = load_file(CASES["dictionary-learning-AutoEncoder"][0] / "expected.safetensors")
    ae = load("dictionary-learning-AutoEncoder", normalize_decoder=False)
    assert_agrees(ae.encode(expected["x"]), expected["raw_latents"])
    assert_agrees(ae.reconstruct(expected["x"]), expected["recons"])
    assert not torch.allclose(expected["raw_latents"], expected["latents"])
    folded = load("dictionary-learning-AutoEncoder")
    torch.testing.assert_close(folded.decoder.weight.norm(dim=0), torch.ones(24))
    with pytest.raises(InputError, match="class GatedAutoEncoder, which has no normalize_decoder"):
        load("dictionary-learning-GatedAutoEncoder", normalize_decoder=False)


@torch.no_grad()
def test_matryoshka_groups_are_kept_and_prefixes_decode():
    ae = load("dictionary-learning-MatryoshkaBatchTopKSAE")
    assert ae.group_sizes == (4, 8, 12)
    expected = load_file(
        CASES["dictionary-learning-MatryoshkaBatchTopKSAE"][0] / "expected.safetensors"
    )
    latents = expected["latents"]
    prefix = latents[:, :12] @ ae.decoder.weight[:, :12].T + ae.pre_bias
    torch.testing.assert_close(ae.decode_prefix(latents, 12), prefix)
    torch.testing.assert_close(ae.decode_prefix(latents, 24), ae.decode(latents))


def resaved(
    tmp_path: Path, name: str, config: dict[str, Any] | None = None, **changes: Any
) -> Path:
    """A copy of a dictionary_learning fixture with other entries; ``...`` takes one out."""
    folder = edited(tmp_path, f"dictionary-learning-{name}", **(config or {}))
    state = torch.load(folder / "ae.pt", weights_only=True) | changes
    torch.save({key: value for key, value in state.items() if value is not ...}, folder / "ae.pt")
    return folder


def test_a_threshold_that_was_never_estimated_must_be_given(tmp_path):
    folder = resaved(tmp_path, "BatchTopKSAE", threshold=torch.tensor(-1.0))
    with pytest.raises(
        CheckpointError, match=r"ae\.pt: threshold: expected a number >= 0, found -1"
    ):
        Autoencoder.load(folder)
    assert (
        repr(Autoencoder.load(folder, threshold=0.5).activation) == "BatchTopK(threshold=0.5, k=4)"
    )
    with pytest.raises(CheckpointError, match=r"says threshold 0\.8.*, the call says 0\.5"):
        load("dictionary-learning-BatchTopKSAE", threshold=0.5)


def test_k_of_early_files_comes_from_the_config_or_the_caller(tmp_path):
    folder = resaved(tmp_path, "AutoEncoderTopK", k=..., threshold=...)
    assert repr(Autoencoder.load(folder).activation) == "TopK(k=4, postact_fn=ReLU)"
    (folder / "config.json").unlink()
    told: dict[str, Any] = {"dict_class": "AutoEncoderTopK"}
    with pytest.raises(CheckpointError, match="k: expected a whole number, found none"):
        Autoencoder.load(folder, **told)
    assert Autoencoder.load(folder, k=7, **told).activation.k == 7


@pytest.mark.parametrize(
    ("trainer", "message"),
    [
        ({"dict_class": "AutoEncoderTopk"}, "dict_class: expected one of .*'AutoEncoderTopK'"),
        ({"dict_class": "GatedAutoEncoder"}, r"decoder_bias: missing, expected \[8\]"),
        ({"activation_dim": 9}, r"activation_dim: expected 8 as in ae\.pt, found 9"),
        ({"dict_size": 9}, r"dict_size: expected 24 as in ae\.pt, found 9"),
        ({"k": 5}, r"k: expected 4 as in ae\.pt, found 5"),
    ],
)
def test_dictionary_learning_configs_that_contradict(tmp_path, trainer, message):
    config = json.loads(
        (CASES["dictionary-learning-AutoEncoderTopK"][0] / "saved" / "config.json").read_text()
    )
    folder = resaved(tmp_path, "AutoEncoderTopK", {"trainer": config["trainer"] | trainer})
    with pytest.raises(CheckpointError, match=message) as error:
        Autoencoder.load(folder)
    assert "ae.pt" in str(error.value)


def test_the_buffer_says_that_it_is_a_transcoder(tmp_path):
    folder = resaved(tmp_path, "AutoEncoderNew", {"buffer": {"io": "in_and_out"}})
    assert Autoencoder.load(folder).is_transcoder
    x = load_file(CASES["dictionary-learning-AutoEncoderNew"][0] / "expected.safetensors")["x"]
    plain = load("dictionary-learning-AutoEncoderNew")
    assert not plain.is_transcoder
    assert torch.equal(Autoencoder.load(folder).reconstruct(x), plain.reconstruct(x))


# ---- sparsify ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"activation": "relu"}, "activation: expected 'topk' or 'groupmax', found 'relu'"),
        ({"signed": True}, "signed: expected false, found True"),
        ({"k": 0}, "k: expected a whole number >= 1, found 0"),
        ({"num_latents": 32}, r"W_dec: expected shape \[32, 8\], found \[24, 8\]"),
        ({"num_latents": 0, "expansion_factor": 4}, r"expected shape \[32, 8\]"),
        ({"skip_connection": True}, r"W_skip: missing, expected \[8, 8\]"),
        ({"transcode": "yes"}, "transcode: expected true or false, found 'yes'"),
        ({"activation_scale": 3.0}, r"unknown settings .*activation_scale = 3\.0"),
    ],
)
def test_sparsify_configs_that_contradict_or_are_not_known(tmp_path, changes, message):
    with pytest.raises(CheckpointError, match=message):
        Autoencoder.load(edited(tmp_path, "sparsify-plain", **changes))


def test_sparsify_kinds():
    assert activation_name(load("sparsify-groupmax").activation) == "GroupMax"
    assert load("sparsify-transcoder").is_transcoder
    assert not load("sparsify-skip").is_transcoder
    assert load("sparsify-skip").skip is not None


# ---- formats without an installable library ------------------------------------------------------


def assert_is(ae: Autoencoder, expected: published.Published) -> None:
    x = published.inputs()
    rows = [expected.apply(row) for row in x]
    with torch.no_grad():
        out = ae(torch.tensor(x, dtype=ae.dtype))
    assert_agrees(out.latents, np.stack([latents for latents, _ in rows]))
    assert_agrees(out.recons, np.stack([recons for _, recons in rows]))


def tensors_of(expected: published.Published) -> dict[str, torch.Tensor]:
    return {name: torch.from_numpy(value) for name, value in expected.arrays.items()}


@pytest.mark.parametrize("version", ["v1", "v4", "v5"])
def test_openai(tmp_path, version):
    expected = published.openai(version)
    state: dict[str, Any] = tensors_of(expected)
    state["stats_last_nonzero"] = torch.zeros(published.L, dtype=torch.int64)
    told: dict[str, Any] = {"location": "3/resid_delta_mlp"}
    if version == "v4":
        state |= {"activation": "ReLU", "activation_state_dict": {}}
    if version == "v5":
        k = {"k": published.K, "postact_fn": "ReLU"}
        state |= {"activation": "TopK", "activation_state_dict": k}
    torch.save(state, tmp_path / "3.pt")
    if version == "v5":
        with pytest.warns(UnstatedNormalizationWarning):
            Autoencoder.load(tmp_path / "3.pt")
        told["input_normalization"] = "layer_norm"
    ae = Autoencoder.load(tmp_path / "3.pt", **told)
    assert_is(ae, expected)
    assert str(ae.location) == "3/resid.torso.delta_mlp"
    assert (ae.latents_activation_frequency == 0.1).all()


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("glu", [False, True])
@pytest.mark.parametrize("token_wise", [False, True])
def test_language_model_saes(tmp_path, bias, glu, token_wise):
    expected = published.language_model_saes(bias=bias, glu=glu, token_wise=token_wise)
    (tmp_path / "checkpoints").mkdir()
    path = tmp_path / "checkpoints" / "final.pt"
    torch.save({"sae": tensors_of(expected), "n_training_steps": 7}, path)
    with pytest.raises(CheckpointError, match=r"final\.pt: input_normalization: the file does not"):
        Autoencoder.load(path)
    told: Stated = {"input_normalization": "rms" if token_wise else "none"}
    assert_is(Autoencoder.load(path, **told), expected)
    hyperparameters = {
        "norm_activation": "token-wise" if token_wise else "none",
        "use_decoder_bias": bias,
        "use_glu_encoder": glu,
        "d_model": published.N,
        "d_sae": published.L,
    }
    (tmp_path / "hyperparams.json").write_text(json.dumps(hyperparameters))
    model = {"hook_point": "blocks.9.hook_mlp_out", "model_name": "gpt2"}
    (tmp_path / "lm_config.json").write_text(json.dumps(model))
    for source in (path, tmp_path):
        ae = Autoencoder.load(source)
        assert_is(ae, expected)
        assert str(ae.location) == "9/resid.torso.delta_mlp"
        assert ae.model_name == "gpt2"
    torch.save(tensors_of(expected), path)  # the state dict alone
    assert_is(Autoencoder.load(path), expected)
    x = torch.randn(20, published.N, generator=torch.Generator().manual_seed(0))
    assert not ae.encode(x)[:, 3].any()  # whose mask is 0
    assert (ae.encode(x) != 0).any(0).sum() > 1
    if token_wise:
        scaled = ae.reconstruct(7 * x)
        torch.testing.assert_close(scaled, 7 * ae.reconstruct(x), rtol=1e-4, atol=1e-3)
        lengths = torch.linalg.vector_norm(ae.normalize(x)[0], dim=-1)
        torch.testing.assert_close(lengths, torch.full((20,), published.N**0.5))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"norm_activation": "batch-wise"},
            "norm_activation: expected 'token-wise' or 'none'.*batch",
        ),
        (
            {"use_glu_encoder": True},
            "use_glu_encoder: expected False as in the tensors, found True",
        ),
        ({"d_sae": 9}, "d_sae: expected 24 as in the tensors, found 9"),
    ],
)
def test_language_model_saes_hyperparameters_that_contradict(tmp_path, changes, message):
    expected = published.language_model_saes(bias=True, glu=False, token_wise=True)
    torch.save({"sae": tensors_of(expected)}, tmp_path / "final.pt")
    fields = {"norm_activation": "token-wise"} | changes
    (tmp_path / "hyperparams.json").write_text(json.dumps(fields))
    with pytest.raises(CheckpointError, match=message):
        Autoencoder.load(tmp_path / "final.pt")
    torch.save({}, tmp_path / "other.pt")
    with pytest.raises(
        CheckpointError, match=r"expected one \.pt file, found final\.pt, other\.pt"
    ):
        Autoencoder.load(tmp_path)


def test_transformer_vis(tmp_path):
    expected = published.transformer_vis()
    path = tmp_path / "dictionary.npy"
    np.save(path, expected.arrays["dictionary"])
    with pytest.raises(
        CheckpointError, match=r"dictionary\.npy: penalty: the file does not say it"
    ):
        Autoencoder.load(path)
    settings: Stated = {"penalty": published.PENALTY, "max_iterations": 20_000, "tolerance": 1e-8}
    ae = Autoencoder.load(path, **settings, dtype=torch.float64)
    assert_is(ae, expected)
    default = Autoencoder.load(path, penalty=published.PENALTY).activation
    assert repr(default) == "Fista(penalty=0.3, max_iterations=500, tolerance=1e-05)"
    ae.save(tmp_path / "ours")
    assert_is(Autoencoder.load(tmp_path / "ours", dtype=None), expected)


def test_e2e(tmp_path):
    expected, path = published.e2e(), tmp_path / "run.pt"
    torch.save(tensors_of(expected), path)
    with pytest.raises(
        CheckpointError, match=r"run\.pt: input_normalization: .*stream was centred"
    ):
        Autoencoder.load(path)
    assert_is(Autoencoder.load(path, location="3/mlp.post_act"), expected)  # is never centred
    plain: Any = {"input_normalization": "none"}
    assert_is(Autoencoder.load(path, **plain), expected)
    run = {
        f"saes.blocks-{layer}-hook_resid_pre.{name}": value + (layer != 6)
        for layer in (2, 6)
        for name, value in tensors_of(expected).items()
    }
    torch.save(run, path)
    with pytest.raises(CheckpointError, match=r"holds 2 dictionaries \(saes\.blocks-2.*location="):
        Autoencoder.load(path)
    with pytest.raises(
        CheckpointError, match=r"expected a dictionary of 5/mlp\.post_act, found saes"
    ):
        Autoencoder.load(path, location="5/mlp.post_act")
    ae = Autoencoder.load(path, location="blocks.6.hook_resid_pre", **plain)
    assert_is(ae, expected)
    assert str(ae.location) == "5/resid.torso.post_mlp"
    x = torch.tensor(published.inputs(), dtype=torch.float32)
    mean = x.mean(-1, keepdim=True)
    centred = Autoencoder.load(path, location="5/resid_post_mlp", input_normalization="center")
    assert_agrees(centred.encode(x).detach(), ae.encode(x - mean).detach())


def test_gemma_scope(tmp_path):
    expected = published.gemma_scope()
    np.savez(tmp_path / "params.npz", **expected.arrays)
    for source in (tmp_path, tmp_path / "params.npz"):
        ae = Autoencoder.load(source, norm_factor=1.0)
        assert_is(ae, expected)
        assert not ae.is_transcoder
    told = Autoencoder.load(
        tmp_path, location="blocks.3.ln2.hook_normalized", output_location="3/resid_delta_mlp"
    )
    assert told.is_transcoder
    assert str(told.output_location) == "3/resid.torso.delta_mlp"
    wide = published.gemma_scope(n_outputs=5)
    np.savez_compressed(tmp_path / "params.npz", **wide.arrays)
    ae = Autoencoder.load(tmp_path, norm_factor=1.0)
    assert ae.is_transcoder
    assert_is(ae, wide)
    arrays = wide.arrays | {"scaling_factor": np.full(published.L, 2.0, np.float32)}
    np.savez(tmp_path / "params.npz", **arrays)
    with pytest.raises(CheckpointError, match="scaling_factor: expected ones, found other values"):
        Autoencoder.load(tmp_path)


def test_gemma_scope_where_inputs_may_be_scaled(tmp_path):
    """Those of the embedding are, and only the name of their folder tells."""
    expected = published.gemma_scope()
    np.savez(tmp_path / "params.npz", **expected.arrays)
    plain = Autoencoder.load(tmp_path, location="0/resid_post_mlp")
    assert_is(plain, expected)
    unsaid: list[Stated] = [{}, {"location": "resid.post_emb"}]
    for told in unsaid:
        with pytest.raises(CheckpointError, match=r"params\.npz.*norm_factor=…"):
            Autoencoder.load(tmp_path, **told)
    scaled = Autoencoder.load(tmp_path, location="resid.post_emb", norm_factor=3.0)
    x = torch.tensor(published.inputs(), dtype=torch.float32)
    assert_agrees(scaled.encode(x).detach(), plain.encode(3 * x).detach())
    assert_agrees(scaled.reconstruct(x).detach(), plain.reconstruct(3 * x).detach() / 3)


def test_stored_in_half_precision_and_loaded_in_single(tmp_path):
    folder, _ = CASES["sae-lens-topk-rescaled"]
    shutil.copytree(folder / "saved", tmp_path / "half")
    path = tmp_path / "half" / "sae_weights.safetensors"
    save_file({name: value.half() for name, value in load_file(path).items()}, path)
    expected = load_file(folder / "expected.safetensors")
    ae = Autoencoder.load(tmp_path / "half")
    assert ae.dtype == torch.float32
    torch.testing.assert_close(
        ae.reconstruct(expected["x"]).detach(), expected["recons"], rtol=1e-2, atol=1e-2
    )
    assert load("sae-lens-topk", dtype=torch.float64).dtype == torch.float64


# ---- models that SAELens edited before training --------------------------------------------------


def test_centred_writing_weights_become_a_step_of_the_autoencoder(tmp_path):
    """TransformerLens took the mean off the stream; models here are not edited when loaded."""
    kwargs = {"model_from_pretrained_kwargs": {"center_writing_weights": True}}
    hook = {"hook_point": "blocks.1.hook_resid_pre"}
    centred = Autoencoder.load(edited(tmp_path, "sae-lens-old-standard", **kwargs, **hook))
    assert centred.input_normalization == "center"
    plain = Autoencoder.load(CASES["sae-lens-old-standard"][0] / "saved")
    x = load_file(CASES["sae-lens-old-standard"][0] / "expected.safetensors")["x"]
    mean = x.mean(-1, keepdim=True)
    assert_agrees(centred.encode(x).detach(), plain.encode(x - mean).detach())
    assert_agrees(centred.reconstruct(x).detach(), (plain.reconstruct(x - mean) + mean).detach())


def test_centring_where_it_cannot_be_told_or_does_not_matter(tmp_path):
    kwargs = {"model_from_pretrained_kwargs": {"center_writing_weights": True}}
    name = "sae-lens-old-standard"
    neurons = edited(tmp_path / "n", name, **kwargs, hook_point="blocks.1.mlp.hook_post")
    assert Autoencoder.load(neurons).input_normalization == "none"
    unknown = edited(tmp_path / "u", name, **kwargs, hook_point="somewhere")
    with pytest.raises(CheckpointError, match="input_normalization='center' or 'none'"):
        Autoencoder.load(unknown)
    assert Autoencoder.load(unknown, input_normalization="none").input_normalization == "none"
    unsaid = edited(tmp_path / "s", name, hook_point="blocks.1.hook_resid_pre")
    assert Autoencoder.load(unsaid).input_normalization == "none"
    assert Autoencoder.load(unsaid, input_normalization="center").input_normalization == "center"
    layer_norm = edited(tmp_path / "l", "sae-lens-old-topk-layer_norm", **kwargs)
    assert Autoencoder.load(layer_norm).input_normalization == "layer_norm"


# ---- from a server -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name",
    [
        "sae-lens-topk",
        "dictionary-learning-AutoEncoderTopK",
        "sparsify-skip",
        "gemma_scope",
        "native",
    ],
)
def test_a_remote_folder_is_read_and_offline_again(tmp_path, monkeypatch, name):
    monkeypatch.setenv("NEURON_EXPLAINER_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    folder = tmp_path / "folder"
    if name in CASES:
        shutil.copytree(CASES[name][0] / "saved", folder)
    elif name == "native":
        load("sparsify-skip").save(folder)
    else:
        folder.mkdir()
        np.savez(folder / "params.npz", **published.gemma_scope().arrays)
    with BlobServer() as server:
        for path in folder.iterdir():
            server.put(f"/some/{path.name}", path.read_bytes())
        source = f"{server.base}/some"
        told: Stated = {"norm_factor": 1.0} if name == "gemma_scope" else {}
        found = Autoencoder.load(source, **told)
        with pytest.raises(
            CheckpointError, match=r"/other: of no known format\. Expected a folder"
        ):
            Autoencoder.load(f"{server.base}/other")
    for other in (Autoencoder.load(source, **told), Autoencoder.load(folder, **told)):
        x = torch.tensor(published.inputs(), dtype=torch.float32)
        assert torch.equal(other.reconstruct(x), found.reconstruct(x))
        assert repr(other) == repr(found)


@pytest.mark.parametrize("name", ["params.npz", "dictionary.npy", "openai.pt", "ae.pt"])
def test_a_remote_file(tmp_path, monkeypatch, name):
    monkeypatch.setenv("NEURON_EXPLAINER_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    path, told = tmp_path / name, Stated()
    if name == "params.npz":
        np.savez(path, **published.gemma_scope().arrays)
        told = {"norm_factor": 1.0}
    elif name == "dictionary.npy":
        np.save(path, published.transformer_vis().arrays["dictionary"])
        told = {"penalty": 0.3}
    elif name == "openai.pt":
        state: dict[str, Any] = tensors_of(published.openai("v1"))
        torch.save(state | {"stats_last_nonzero": torch.zeros(published.L)}, path)
    else:
        saved = CASES["dictionary-learning-BatchTopKSAE"][0] / "saved"
        shutil.copy(saved / "ae.pt", path)
    with BlobServer() as server:
        server.put(f"/{name}", path.read_bytes())
        if name == "ae.pt":  # the config beside it is looked for, too
            server.put("/config.json", (saved / "config.json").read_bytes())
        found = Autoencoder.load(f"{server.base}/{name}", **told)
    assert repr(found).startswith("Autoencoder(n_latents=24, n_inputs=8")


def test_a_context_passes_on_what_is_stated(tmp_path):
    saved = CASES["sae-lens-standard-expected_average_only_in"][0] / "saved"
    location = Autoencoder.load(saved, norm_factor=2.0).location
    place = "resid_post_mlp" if location is None else location.at(None)
    layer = 0 if location is None else location.layer
    config = AutoencoderConfig(place, {layer: saved}, stated={"norm_factor": 2.0})
    found = AutoencoderContext(config, "cpu").get_autoencoder(layer)
    expected = Autoencoder.load(saved, norm_factor=2.0)
    x = torch.ones(1, expected.n_inputs)
    assert torch.equal(found.encode(x), expected.encode(x))
    each: dict[int, Stated] = {0: {"norm_factor": 2.0}, 1: {"norm_factor": 3.0}}
    unplaced = edited(tmp_path, "sae-lens-standard-expected_average_only_in", metadata={})
    paths = {0: unplaced, 1: shutil.copytree(unplaced, tmp_path / "other")}
    by_layer = AutoencoderContext(AutoencoderConfig(place, paths, stated_by_layer=each), "cpu")
    for number, told in each.items():
        expected = Autoencoder.load(unplaced, **told)
        assert torch.equal(by_layer.get_autoencoder(number).encode(x), expected.encode(x))
    with pytest.raises(CheckpointError, match="norm_factor="):
        AutoencoderContext(AutoencoderConfig(place, {layer: saved}), "cpu").get_autoencoder(layer)


def test_a_file_that_was_saved_on_a_gpu(tmp_path: Path):
    """As ``torch.save`` writes there: the storages' place is "cuda:0", and there is none here."""
    saved = CASES["dictionary-learning-BatchTopKSAE"][0] / "saved"
    with (
        zipfile.ZipFile(saved / "ae.pt") as here,
        zipfile.ZipFile(tmp_path / "ae.pt", "w") as there,
    ):
        for entry in here.infolist():
            content = here.read(entry)
            if entry.filename.endswith("data.pkl"):
                cpu = b"X\x03\x00\x00\x00cpu"
                assert cpu in content
                content = content.replace(cpu, b"X\x06\x00\x00\x00cuda:0")
            there.writestr(entry, content)
    if not torch.cuda.is_available():
        with pytest.raises(RuntimeError, match="CUDA"):
            torch.load(tmp_path / "ae.pt", weights_only=True)
    shutil.copy(saved / "config.json", tmp_path / "config.json")
    found, expected = Autoencoder.load(tmp_path / "ae.pt"), Autoencoder.load(saved / "ae.pt")
    assert found.device == torch.device("cpu")
    assert torch.equal(found.encoder.weight, expected.encoder.weight)
