"""Damaged, contradictory and hostile files: one error that names file, field, expected and found."""

import contextlib
import io
import json
import os
import pickle
import random
import re
import shutil
import warnings
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from benchmarks.peers.write_ours import FIXTURES
from neuron_explainer.errors import CheckpointError, NeuronExplainerError, SourceError
from neuron_explainer.models.autoencoder import Autoencoder
from neuron_explainer.models.checkpoints.autoencoders.state import STATISTICS
from neuron_explainer.models.checkpoints.tensor_files import check_claims, torch_load
from neuron_explainer.models.transformer import Transformer, TransformerConfig
from tests.reference import published_autoencoders as published

Tensors = dict[str, Any]


class Source(NamedTuple):
    """A valid autoencoder on disk, and how its tensors are read and written there."""

    path: Path
    """What is loaded."""
    weights: Path
    """The file with the tensors."""
    matrix: str
    """The name of one matrix."""
    told: dict[str, Any]

    def read(self) -> Tensors:
        suffix = self.weights.suffix
        if suffix == ".safetensors":
            return load_file(self.weights)
        if suffix == ".npy":
            return {self.matrix: torch.from_numpy(np.load(self.weights))}
        if suffix == ".npz":
            with np.load(self.weights) as arrays:
                return {name: torch.from_numpy(arrays[name]) for name in arrays.files}
        content: Tensors = torch.load(self.weights, weights_only=True)
        for name in ("sae", "state_dict"):
            content = content.get(name, content)
        return content

    def write(self, tensors: Tensors) -> None:
        suffix = self.weights.suffix
        if suffix == ".safetensors":
            save_file({k: v.contiguous() for k, v in tensors.items()}, self.weights)
        elif suffix == ".npy":
            np.save(self.weights, tensors[self.matrix].numpy())
        elif suffix == ".npz":
            np.savez(self.weights, **{k: v.numpy() for k, v in tensors.items()})
        else:
            if "encoder_bias" in tensors or "encoder" in tensors:
                tensors = {"sae": tensors}
            elif self.weights.name == "early.pt":
                tensors = {"cfg": {"is_transcoder": True}, "state_dict": tensors}
            torch.save(tensors, self.weights)


def copied(tmp_path: Path, peer: str, name: str, weights: str, matrix: str) -> Source:
    folder = tmp_path / name
    shutil.copytree(FIXTURES / peer / name / "saved", folder)
    return Source(folder, folder / weights, matrix, {})


def single(path: Path, tensors: Tensors, matrix: str, **told: Any) -> Source:
    source = Source(path, path, matrix, told)
    source.write(tensors)
    return source


def tensors_of(it: published.Published) -> Tensors:
    return {name: torch.from_numpy(value) for name, value in it.arrays.items()}


def native(tmp_path: Path) -> Source:
    torch.manual_seed(0)
    Autoencoder(12, 5).save(tmp_path / "native")
    return Source(
        tmp_path / "native", tmp_path / "native/autoencoder.safetensors", "encoder.weight", {}
    )


def openai(tmp_path: Path) -> Source:
    tensors = tensors_of(published.openai("v1"))
    tensors["stats_last_nonzero"] = torch.zeros(published.L, dtype=torch.int64)
    return single(tmp_path / "openai.pt", tensors, "decoder.weight")


def llama_scope_r1(folder: Path) -> Source:
    folder.mkdir()
    fields = {"hook_point_in": "blocks.1.hook_resid_post", "norm_activation": "inference"}
    (folder / "config.json").write_text(json.dumps(fields))
    weights = folder / "sae_weights.safetensors"
    save_file(tensors_of(published.llama_scope(1.0, 1.0, None)), weights)
    return Source(folder, weights, "decoder.weight", {})


def llama_scope(folder: Path) -> Source:
    weights = folder / "checkpoints" / "final.safetensors"
    weights.parent.mkdir(parents=True)
    fields = {
        "hook_point_in": "blocks.1.hook_resid_post",
        "hook_point_out": "blocks.1.hook_resid_post",
        "jump_relu_threshold": 0.5,
        "dataset_average_activation_norm": {"in": 2.0, "out": 2.0},
        "sparsity_include_decoder_norm": True,
        "act_fn": "jumprelu",
    }
    (folder / "hyperparams.json").write_text(json.dumps(fields))
    save_file(tensors_of(published.llama_scope(2.0, 2.0, 0.5)), weights)
    return Source(folder, weights, "decoder.weight", {})


def attn_saes(path: Path) -> Source:
    fields = {"act_name": "blocks.0.attn.hook_z", "act_size": published.N, "dict_size": published.L}
    path.with_name("0_cfg.json").write_text(json.dumps(fields))
    return single(path, tensors_of(published.sae_training(is_transcoder=False)), "W_dec")


SOURCES: dict[str, Callable[[Path], Source]] = {
    "native": native,
    "openai": openai,
    "saelens": lambda p: copied(p, "sae-lens", "standard", "sae_weights.safetensors", "W_dec"),
    "saelens gated": lambda p: copied(p, "sae-lens", "gated", "sae_weights.safetensors", "W_dec"),
    "saelens old": lambda p: copied(
        p, "sae-lens", "old-standard", "sae_weights.safetensors", "W_enc"
    ),
    "dictionary_learning": lambda p: copied(
        p, "dictionary-learning", "AutoEncoder", "ae.pt", "decoder.weight"
    ),
    "dictionary_learning transposed": lambda p: copied(
        p, "dictionary-learning", "JumpReluAutoEncoder", "ae.pt", "W_dec"
    ),
    "sparsify": lambda p: copied(p, "sparsify", "plain", "sae.safetensors", "W_dec"),
    "language_model_saes": lambda p: single(
        p / "final.pt",
        tensors_of(published.language_model_saes(bias=True, glu=True, token_wise=True)),
        "decoder",
        input_normalization="rms",
    ),
    "transformer_vis": lambda p: single(
        p / "dictionary.npy", tensors_of(published.transformer_vis()), "dictionary", penalty=0.3
    ),
    "sae_training": lambda p: single(
        p / "early.pt",
        tensors_of(published.sae_training(is_transcoder=True)),
        "W_dec",
        input_normalization="none",
    ),
    "goodfire": lambda p: single(
        p / "goodfire.pt", tensors_of(published.goodfire()), "decoder_linear.weight"
    ),
    "gemma_scope_2": lambda p: single(
        p / "params.safetensors", tensors_of(published.gemma_scope_2(skip=True)), "w_dec"
    ),
    "circuit_tracer": lambda p: single(
        p / "layer_2.safetensors",
        tensors_of(published.circuit_tracer(jumps=True, skip=True)),
        "W_dec",
    ),
    "llama_scope_r1": lambda p: llama_scope_r1(p / "llama"),
    "llama_scope": lambda p: llama_scope(p / "llama"),
    "attn_saes": lambda p: attn_saes(p / "0.pt"),
    "e2e": lambda p: single(
        p / "run.pt", tensors_of(published.e2e()), "decoder.weight", input_normalization="none"
    ),
    "gemma_scope": lambda p: single(
        p / "params.npz",
        tensors_of(published.gemma_scope()),
        "W_dec",
        location="1/resid.torso.post_mlp",
    ),
}


@pytest.fixture(params=SOURCES)
def source(request: pytest.FixtureRequest, tmp_path: Path) -> Source:
    return SOURCES[request.param](tmp_path)


@pytest.fixture(params=[name for name in SOURCES if name != "transformer_vis"])
def named(request: pytest.FixtureRequest, tmp_path: Path) -> Source:
    """Those whose tensors have names."""
    return SOURCES[request.param](tmp_path)


def error_of(source: Source, path: Path | None = None) -> str:
    with pytest.raises(NeuronExplainerError) as caught:
        Autoencoder.load(path or source.path, **source.told)
    return str(caught.value)


def test_the_valid_ones_are_read(source):
    assert Autoencoder.load(source.path, **source.told).n_latents in (12, 24)


@pytest.mark.parametrize("share", [0.0, 0.3, 0.9, 0.999])
def test_truncated(source, share):
    content = source.weights.read_bytes()
    source.weights.write_bytes(content[: int(len(content) * share)])
    text = error_of(source)
    assert str(source.weights) in text
    assert "damaged" in text or "refused, and nothing in it was run" in text


def test_a_key_is_missing(named):
    source = named
    for name in source.read():
        tensors = source.read()
        removed = tensors.pop(name)
        optional = (
            *("scale", "feature_act_scale", "feature_act_mask", "decoder_bias"),
            *("affine_skip_connection", "W_skip", "activation_function.threshold"),
        )
        if name in optional or (name in STATISTICS and source.path.suffix == ".pt"):
            continue  # may be absent
        kept = source.weights.read_bytes()
        source.write(tensors)
        text = error_of(source)
        source.weights.write_bytes(kept)
        assert str(source.path) in text
        assert name in text, (name, removed.shape)


def test_a_key_too_many(named):
    named.write(named.read() | {"surprise": torch.ones(3)})
    text = error_of(named)
    assert str(named.path) in text
    assert "surprise" in text


def test_transposed(source):
    tensors = source.read()
    found = list(tensors[source.matrix].shape)
    tensors[source.matrix] = tensors[source.matrix].T.contiguous()
    source.write(tensors)
    text = error_of(source)
    assert str(source.path) in text
    if source.weights.suffix == ".npy":
        assert "it is transposed" in text
    elif source.matrix not in ("encoder.weight", "W_enc"):
        assert source.matrix in text
        assert f"{found}" in text  # expected
        assert f"{found[::-1]}" in text  # found
    if source.matrix == "W_dec" or source.matrix == "decoder":
        assert "(transposed?)" in text


@pytest.mark.parametrize("dtype", [torch.int32, torch.int8, torch.bool])
def test_of_another_dtype(source, dtype):
    tensors = source.read()
    tensors[source.matrix] = tensors[source.matrix].to(dtype)
    source.write(tensors)
    text = error_of(source)
    assert str(source.path) in text
    assert "floating-point" in text or "of float32" in text
    assert str(dtype).removeprefix("torch.") in text
    assert source.matrix in text or source.weights.suffix == ".npy"


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_not_finite(source, bad):
    tensors = source.read()
    tensors[source.matrix][0, 1] = bad
    source.write(tensors)
    text = error_of(source)
    assert str(source.path) in text
    assert "holds NaN or infinity" in text
    assert source.matrix in text or source.weights.suffix == ".npy"


def test_everything_wrong_in_one_error(tmp_path):
    source = SOURCES["saelens"](tmp_path)
    tensors = source.read()
    del tensors["b_dec"]
    tensors |= {"W_dec": tensors["W_dec"].T.contiguous(), "b_encc": torch.ones(2)}
    tensors["b_enc"] = tensors["b_enc"].to(torch.int32)
    source.write(tensors)
    text = error_of(source)
    assert "4 problems" in text
    for part in ("W_dec: expected shape [24, 8], found [8, 24] (transposed?)", "b_dec: missing"):
        assert part in text
    assert "b_enc: expected a floating-point dtype, found int32" in text
    assert "b_encc: unexpected" in text


# ---- folders -------------------------------------------------------------------------------------


@pytest.mark.parametrize("other", ["sparsify", "dictionary_learning", "native", "gemma_scope"])
def test_a_folder_of_two_formats(tmp_path, other):
    source, second = SOURCES["saelens"](tmp_path), SOURCES[other](tmp_path)
    shutil.copy(second.weights, source.path)
    text = error_of(source)
    assert "holds files of several formats" in text
    assert "sae_weights.safetensors" in text
    assert second.weights.name in text


def test_a_folder_whose_config_is_of_another_format(tmp_path):
    source = SOURCES["saelens"](tmp_path)
    (source.path / "config.json").write_text('{"kind": "autoencoder"}')
    assert "native (config.json), saelens (sae_weights.safetensors)" in error_of(source)
    other = SOURCES["sparsify"](tmp_path)
    (other.path / "sae.safetensors").rename(other.path / "sae_weights.safetensors")
    assert "sparsify (cfg.json), saelens (sae_weights.safetensors)" in error_of(other)


def test_folders_and_files_of_no_format(tmp_path):
    source = Source(tmp_path, tmp_path, "", {})
    assert "of no known format (found: nothing). Expected a folder with" in error_of(source)
    (tmp_path / "notes.txt").write_text("hello")
    assert "(found: notes.txt)" in error_of(source)
    assert "notes.txt" in error_of(source, tmp_path / "notes.txt")
    with pytest.raises(SourceError, match=r"nothing-there: no such file or folder"):
        Autoencoder.load(tmp_path / "nothing-there")
    torch.save([1, 2], tmp_path / "list.pt")
    assert "list.pt: expected a state dict, found list" in error_of(source, tmp_path / "list.pt")


@pytest.mark.parametrize("name", ["saelens", "sparsify"])
def test_a_config_without_its_tensors_or_the_other_way_round(tmp_path, name):
    source = SOURCES[name](tmp_path)
    config = (source.path / "cfg.json").read_text()
    (source.path / "cfg.json").unlink()
    assert "cfg.json" in error_of(source)
    (source.path / "cfg.json").write_text(config)
    source.weights.unlink()
    assert source.weights.name in error_of(source)


@pytest.mark.parametrize("content", ["", "{", "[1]", '{"d_in": 1, "d_in": 2}', "\xff"])
@pytest.mark.parametrize("name", ["saelens", "sparsify", "dictionary_learning", "native"])
def test_a_config_that_is_not_json(tmp_path, name, content):
    source = SOURCES[name](tmp_path)
    path = next(source.path.glob("*.json"))
    path.write_bytes(content.encode("latin1"))
    assert path.name in error_of(source)


def test_the_tensors_alone_do_not_say_enough(tmp_path):
    source = SOURCES["saelens"](tmp_path)
    text = error_of(source, source.weights)
    assert "give the folder, with its config.json or cfg.json or hyperparams.json" in text


@pytest.mark.parametrize("config", [{"trainer": 3}, {"trainer": {"dict_class": 3}}])
def test_odd_values_in_configs(tmp_path, config):
    source = SOURCES["dictionary_learning"](tmp_path)
    (source.path / "config.json").write_text(json.dumps(config))
    assert "trainer: expected an object" in error_of(source) or "dict_class: " in error_of(source)


# ---- hostile files -------------------------------------------------------------------------------


class Hostile:
    """Unpickling it makes a folder."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.mark),)


@pytest.mark.parametrize("legacy", [False, True])
@pytest.mark.parametrize("name", ["openai", "dictionary_learning", "language_model_saes", "e2e"])
def test_a_hostile_torch_file_is_refused_and_not_run(tmp_path, name, legacy):
    source, mark = SOURCES[name](tmp_path), tmp_path / "was-run"
    content = source.read() | {"surprise": Hostile(mark)}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.save(content, source.weights, _use_new_zipfile_serialization=not legacy)
    text = error_of(source)
    assert str(source.weights) in text
    assert "refused, and nothing in it was run" in text
    assert "mkdir" in text
    assert not mark.exists()


def test_a_bare_pickle_is_refused_whatever_its_name(tmp_path):
    source, mark = Source(tmp_path, tmp_path, "", {}), tmp_path / "was-run"
    for name in ("ae.pkl", "ae.pickle", "ae.pt", "ae.npy", "ae.npz", "ae"):
        path = tmp_path / name
        path.write_bytes(pickle.dumps(Hostile(mark)))
        text = error_of(source, path)
        assert str(path) in text
        assert "refused" in text
        assert not mark.exists()


def test_pickles_inside_of_arrays_are_refused(tmp_path):
    source, mark = Source(tmp_path, tmp_path, "", {"penalty": 0.3}), tmp_path / "was-run"
    objects = np.array([Hostile(mark)], dtype=object)
    buffer = io.BytesIO()
    np.save(buffer, objects, allow_pickle=True)
    (tmp_path / "dictionary.npy").write_bytes(buffer.getvalue())
    assert "dictionary.npy" in error_of(source, tmp_path / "dictionary.npy")
    with zipfile.ZipFile(tmp_path / "params.npz", "w") as archive:
        archive.writestr("W_enc.npy", buffer.getvalue())
    source = source._replace(told={})
    assert "params.npz" in error_of(source, tmp_path / "params.npz")
    assert not mark.exists()


ODD_VALUES: list[Any] = [
    None,
    True,
    -1,
    1.5,
    10**30,
    "x",
    "",
    [],
    [1],
    {},
    {"in": "x"},
    0,
    "blocks.1",
]


def with_odd_values(value: Any) -> Iterator[Any]:
    """JSON values that differ from ``value`` in one place, by type or by size."""
    yield from (odd for odd in ODD_VALUES if odd != value)
    if isinstance(value, dict):
        for key, inner in value.items():
            for odd in with_odd_values(inner):
                yield value | {key: odd}


def test_a_field_of_any_other_type_is_read_or_refused(source):
    """A config with one field of another type ends in one of our errors, or changes nothing read."""
    folder = source.path if source.path.is_dir() else source.path.parent
    for path in sorted(folder.glob("*.json")):
        text = path.read_text()
        for changed in with_odd_values(json.loads(text)):
            path.write_text(json.dumps(changed))
            with contextlib.suppress(NeuronExplainerError):
                Autoencoder.load(source.path, **source.told)
        path.write_text(text)


def odd_entries(value: Any) -> Iterator[Any]:
    """What may stand in a torch file where a tensor is expected."""
    yield from (None, 3, "x", [1.0], {}, torch.tensor(float("nan")), torch.zeros(0))
    if not isinstance(value, torch.Tensor):
        return
    yield value.float().to_sparse()
    yield value.to(torch.complex64)
    yield value.to("meta")
    yield value.float().to(torch.float8_e4m3fn)
    yield value.new_ones(1).expand(value.shape)  # fits, and is less than it claims
    yield value.new_ones(1).expand(2**20, 2**20)  # a terabyte in four bytes
    yield value.bool()


@pytest.mark.parametrize(
    "name",
    [
        *("openai", "dictionary_learning", "dictionary_learning transposed", "goodfire"),
        *("language_model_saes", "sae_training", "e2e", "attn_saes"),
    ],
)
def test_an_entry_of_any_other_kind_is_read_or_refused(tmp_path, name):
    source = SOURCES[name](tmp_path)
    tensors = source.read()
    for key, value in tensors.items():
        for odd in odd_entries(value):
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                source.write(tensors | {key: odd})
                with contextlib.suppress(NeuronExplainerError):
                    Autoencoder.load(source.path, **source.told)


@pytest.mark.parametrize("seed", range(12))
def test_whatever_is_changed_it_is_read_or_refused(source, seed):
    """No other exception, no warning: bytes changed, cut out or put in, in tensors and config."""
    rng = random.Random(seed)
    configs = sorted(source.path.glob("*.json")) if source.path.is_dir() else []
    path = rng.choice([source.weights, *configs])
    content = bytearray(path.read_bytes())
    place, length = rng.randrange(len(content)), rng.choice([1, 5, 40])
    content[place : place + rng.choice([0, length])] = rng.randbytes(rng.choice([0, length]))
    path.write_bytes(bytes(content))
    with contextlib.suppress(NeuronExplainerError):
        Autoencoder.load(source.path, **source.told)


def test_python_entries_of_any_other_kind(tmp_path):
    source = openai(tmp_path)
    path = tmp_path / "odd.pt"
    for key in ("tied", "input_normalization", "n_outputs", "group_sizes", "activation"):
        for odd in odd_entries(torch.ones(published.L)):
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                torch.save(source.read() | {key: odd}, path)
                with contextlib.suppress(NeuronExplainerError):
                    Autoencoder.load(path)


def test_odd_tensors_in_the_fields_of_a_nonlinearity(tmp_path):
    source = openai(tmp_path)
    for odd in odd_entries(torch.ones(published.L)):
        fields = {"activation": "JumpReLU", "activation_state_dict": {"threshold": odd}}
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            torch.save(source.read() | fields, tmp_path / "jumps.pt")
        assert "threshold" in error_of(source, tmp_path / "jumps.pt")


@pytest.mark.parametrize("name", ["data.pkl", "W_enc.npy"])
def test_archives_that_inflate_beyond_measure_are_refused_unread(tmp_path, name):
    path = tmp_path / "bomb.zip"
    with (
        zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED, compresslevel=1) as archive,
        archive.open(name, "w", force_zip64=True) as entry,
    ):
        for _ in range(257):
            entry.write(bytes(2**20))
    assert path.stat().st_size < 2**22
    text = error_of(Source(path, path, "", {}))
    assert "refused: " in text
    assert "bytes that inflate to 269,484,032" in text


REPEATED = {
    "strides of 0": lambda: torch.zeros(1).expand(20_000, 62_500),
    "a column": lambda: torch.zeros(20_000, 1).expand(20_000, 62_500),
    "many small": lambda: torch.zeros(1).expand(10, 1_000_000),
    "without memory": lambda: torch.empty(1 << 30, device="meta"),
}


@pytest.mark.parametrize("legacy", [False, True])
@pytest.mark.parametrize("kind", REPEATED)
def test_tensors_that_claim_more_than_the_file_holds_are_refused(tmp_path, kind, legacy):
    """Files of a few kilobytes; what they claim is gigabytes, which any copy would take."""
    path = tmp_path / "0.pt"
    claim = REPEATED[kind]()
    state = {f"encoder.{i}": claim for i in range(7 if kind == "many small" else 1)}
    nested = {"encoder.weight": torch.zeros(4), "nested": [{"more": state}]}
    for content in (state, nested):
        torch.save(content, path, _use_new_zipfile_serialization=not legacy)
        assert path.stat().st_size < 200_000
        text = error_of(Source(path, path, "", {}))
        assert "refused: its tensors would take" in text
        assert re.search(r"\(the largest is 'encoder.*'\), of which the file stores [\d,]+;", text)


def test_a_model_in_pieces_that_claims_more_than_its_files_hold_is_refused(tmp_path):
    Transformer(TransformerConfig("gpt2", 16, 8, 1, 1, 2, 3, n_vocab=11)).save_checkpoint(
        tmp_path / "model"
    )
    piece = tmp_path / "model" / "model_pieces" / "tok_embed.weight.pt"
    torch.save(torch.zeros(1).expand(1 << 26, 8), piece)
    with pytest.raises(CheckpointError, match=r"tok_embed.weight.pt: refused: its tensors would"):
        Transformer.load(tmp_path / "model")


def test_tensors_that_share_memory_are_not_taken_for_claims(tmp_path):
    weight = torch.zeros(1000, 1000)
    torch.save({"a": weight, "b": weight.t(), "c": weight[0], "self": []}, tmp_path / "0.pt")
    check_claims(torch_load(tmp_path / "0.pt"), tmp_path / "0.pt", claimed_bytes=0)
    itself: list[Any] = [weight]
    itself.append(itself)
    check_claims(itself, tmp_path / "0.pt", claimed_bytes=0)
    with pytest.raises(
        CheckpointError, match=r"take 20,000,000 bytes .*, of which the file stores 4,000,000;"
    ):
        check_claims([weight] * 5, tmp_path / "0.pt", claimed_bytes=0)


def test_one_byte_changed_is_noticed_in_archives(tmp_path):
    for name in ("openai", "gemma_scope"):
        source = SOURCES[name](tmp_path)
        content = bytearray(source.weights.read_bytes())
        middle = len(content) // 2
        content[middle] ^= 0x10
        source.weights.write_bytes(bytes(content))
        with pytest.raises(CheckpointError, match=source.weights.name):
            Autoencoder.load(source.path, **source.told)
