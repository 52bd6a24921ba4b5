"""Formats on disk: each read and written right, and every damage told in one clear error."""

import contextlib
import json
import pickle
import re
import shutil
import subprocess
import sys
from base64 import b64encode
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load as load_bytes
from safetensors.torch import load_file, save_file
from torch.nn import functional

from neuron_explainer.errors import CheckpointError, InputError, SourceError
from neuron_explainer.models.checkpoints import (
    StateDict,
    expected_shapes,
    load_checkpoint,
    save_huggingface,
    save_native,
    save_pieces,
)
from neuron_explainer.models.config import TransformerConfig
from neuron_explainer.models.tokenizer_files import TokenizerSpec
from neuron_explainer.models.tokenizers import load_encoding
from tests.blob_server import BlobServer

CFG = TransformerConfig(ctx_window=7, d_model=8, n_layers=2, n_heads=2, n_vocab=11)
Save = Callable[..., None]
SAVES: list[Save] = [save_native, save_pieces, save_huggingface]


def random_state(
    cfg: TransformerConfig = CFG, dtype: torch.dtype = torch.float32, seed: int = 1
) -> StateDict:
    generator = torch.Generator().manual_seed(seed)
    return {
        name: torch.randn(shape, generator=generator).to(dtype)
        for name, shape in expected_shapes(cfg).items()
    }


def assert_same(found: StateDict, expected: StateDict) -> None:
    assert list(found) == list(expected)
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype, name
        assert torch.equal(found[name], tensor), name


def contents(folder: Path) -> dict[str, bytes]:
    return {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def edit_json(path: Path, **changes: Any) -> None:
    content = json.loads(path.read_text())
    content.update(changes)
    path.write_text(json.dumps({k: v for k, v in content.items() if v != "REMOVED"}))


def error_of(folder: Path, **options: Any) -> str:
    with pytest.raises(CheckpointError) as caught:
        load_checkpoint(folder, **options)
    return str(caught.value)


# ---------------------------------------------------------------------------------- every format


def test_expected_shapes_are_gpt2s() -> None:
    gpt2 = TransformerConfig(d_model=768, n_layers=12, n_heads=12)
    shapes = expected_shapes(gpt2)
    assert len(shapes) == 197
    assert sum(torch.Size(shape).numel() for shape in shapes.values()) == 163_037_184
    assert shapes["tok_embed.weight"] == shapes["unembed.weight"] == (50257, 768)
    assert shapes["xf_layers.11.mlp.in_layer.weight"] == (3072, 768)
    assert shapes["xf_layers.0.attn.q_proj.bias"] == (768,)


def test_expected_shapes_with_other_widths() -> None:
    cfg = replace(CFG, m_attn=0.5, m_mlp=3.0)
    shapes = expected_shapes(cfg)
    assert shapes["xf_layers.0.attn.q_proj.weight"] == (4, 8)
    assert shapes["xf_layers.0.attn.out_proj.weight"] == (8, 4)
    assert shapes["xf_layers.0.mlp.out_layer.weight"] == (8, 24)


@pytest.mark.parametrize("save", SAVES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64])
def test_round_trip_is_exact_and_byte_equal(save: Save, dtype: torch.dtype, tmp_path: Path) -> None:
    state = random_state(dtype=dtype)
    save(tmp_path / "a", CFG, state)
    loaded = load_checkpoint(tmp_path / "a")
    assert_same(loaded.state_dict, state)
    assert replace(loaded.config, enc="gpt2") == CFG
    save(tmp_path / "b", loaded.config, loaded.state_dict)
    assert contents(tmp_path / "a") == contents(tmp_path / "b")


@pytest.mark.parametrize("save", SAVES)
@pytest.mark.parametrize("other", SAVES)
def test_formats_convert_into_each_other(save: Save, other: Save, tmp_path: Path) -> None:
    state = random_state()
    save(tmp_path / "a", CFG, state)
    loaded = load_checkpoint(tmp_path / "a")
    other(tmp_path / "b", replace(loaded.config, enc="gpt2"), loaded.state_dict)
    assert_same(load_checkpoint(tmp_path / "b").state_dict, state)


@pytest.mark.parametrize("save", SAVES)
def test_dtype_is_cast_tensor_by_tensor(save: Save, tmp_path: Path) -> None:
    state = random_state(dtype=torch.float16)
    save(tmp_path / "a", CFG, state)
    loaded = load_checkpoint(tmp_path / "a", dtype=torch.float64)
    assert_same(loaded.state_dict, {k: v.double() for k, v in state.items()})
    with pytest.raises(InputError, match="floating-point"):
        load_checkpoint(tmp_path / "a", dtype=torch.int64)


@pytest.mark.parametrize("dtype", [None, torch.float64])
@pytest.mark.parametrize("save", SAVES)
def test_changes_of_loaded_tensors_stay_apart(
    save: Save, dtype: torch.dtype | None, tmp_path: Path
) -> None:
    """Tied weights are two parameters here; neither a file nor another tensor sees a change."""
    state = random_state()
    state["unembed.weight"] = state["tok_embed.weight"]
    save(tmp_path / "a", CFG, state)
    before = contents(tmp_path / "a")
    loaded = load_checkpoint(tmp_path / "a", dtype=dtype).state_dict
    for number, name in enumerate(loaded):
        loaded[name].fill_(number)
    assert all(bool((loaded[name] == number).all()) for number, name in enumerate(loaded))
    assert contents(tmp_path / "a") == before
    assert_same(load_checkpoint(tmp_path / "a").state_dict, state)


@pytest.mark.parametrize("save", SAVES)
def test_files_may_be_replaced_or_deleted_while_a_model_is_used(save: Save, tmp_path: Path) -> None:
    state = random_state()
    save(tmp_path / "a", CFG, state)
    loaded = load_checkpoint(tmp_path / "a").state_dict
    save(tmp_path / "a", CFG, random_state(seed=1), overwrite=True)
    shutil.rmtree(tmp_path / "a")
    assert_same(loaded, state)


@pytest.mark.parametrize("save", SAVES)
def test_keys_limit_what_is_read(save: Save, tmp_path: Path) -> None:
    state = random_state()
    save(tmp_path / "a", CFG, state)
    wanted = ["xf_layers.1.attn.k_proj.weight", "unembed.weight"]
    loaded = load_checkpoint(tmp_path / "a", keys=wanted)
    assert_same(loaded.state_dict, {name: state[name] for name in wanted})
    assert load_checkpoint(tmp_path / "a", keys=()).config.n_vocab == CFG.n_vocab
    with pytest.raises(
        InputError, match=r"no tensor 'unembed.bias'. Did you mean 'unembed.weight'"
    ):
        load_checkpoint(tmp_path / "a", keys=["unembed.bias"])


@pytest.mark.parametrize("save", SAVES)
def test_saving_takes_parameters_and_views(save: Save, tmp_path: Path) -> None:
    state = random_state()
    wide = torch.randn(24, 8)
    for third, name in enumerate("qkv"):
        state[f"xf_layers.0.attn.{name}_proj.weight"] = wide[8 * third : 8 * third + 8]
    state["xf_layers.1.mlp.in_layer.weight"] = torch.randn(8, 32).t()
    parameters = {name: torch.nn.Parameter(tensor) for name, tensor in state.items()}
    save(tmp_path / "a", CFG, parameters)
    assert_same(load_checkpoint(tmp_path / "a").state_dict, state)


@pytest.mark.parametrize("save", SAVES)
def test_saving_what_does_not_fit_writes_nothing(save: Save, tmp_path: Path) -> None:
    state = random_state()
    del state["final_ln.bias"]
    state["final_ln.weight"] = torch.ones(9)
    state["pos_embed.weight"] = torch.ones(7, 8, dtype=torch.int64)
    state["pos_embed.weights"] = torch.ones(7, 8)
    with pytest.raises(CheckpointError) as caught:
        save(tmp_path / "a", CFG, state)
    assert str(caught.value).splitlines()[1:] == [
        "  final_ln.bias: missing, expected [8]",
        "  final_ln.weight: expected shape [8], found [9]",
        "  pos_embed.weight: expected a floating-point dtype, found int64",
        "  pos_embed.weights: unexpected, found [7, 8].",
    ]
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("save", SAVES)
def test_saving_over_a_folder_needs_to_be_asked_for(save: Save, tmp_path: Path) -> None:
    state = random_state()
    save(tmp_path / "a", CFG, state)
    before = contents(tmp_path / "a")
    with pytest.raises(InputError, match="overwrite=True"):
        save(tmp_path / "a", CFG, state)
    assert contents(tmp_path / "a") == before
    state["final_ln.bias"] += 1
    save(tmp_path / "a", CFG, state, overwrite=True)
    assert_same(load_checkpoint(tmp_path / "a").state_dict, state)


def test_nan_weights_are_the_users_business(tmp_path: Path) -> None:
    state = random_state()
    state["final_ln.bias"][3] = torch.nan
    for number, save in enumerate(SAVES):
        save(tmp_path / str(number), CFG, state)
        found = load_checkpoint(tmp_path / str(number)).state_dict["final_ln.bias"]
        assert found.isnan().tolist() == state["final_ln.bias"].isnan().tolist()


@pytest.mark.parametrize("save", SAVES)
def test_a_relative_folder_is_read_in_place(
    save: Save, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    state = random_state()
    save("a", CFG, state)
    assert_same(load_checkpoint("a").state_dict, state)
    state["final_ln.bias"] += 1
    save("a", CFG, state, overwrite=True)
    assert_same(load_checkpoint("a").state_dict, state)


def test_what_is_no_saved_model(tmp_path: Path) -> None:
    with pytest.raises(SourceError, match="no such folder"):
        load_checkpoint(tmp_path / "nowhere")
    assert "found: nothing" in error_of(tmp_path)
    (tmp_path / "weights.bin").write_bytes(b"")
    assert "no config.json in it (found: weights.bin)" in error_of(tmp_path)
    (tmp_path / "config.json").write_text("{}")
    assert "no known format" in error_of(tmp_path)
    (tmp_path / "config.json").write_text("{")
    assert "not valid JSON" in error_of(tmp_path)
    with pytest.raises(SourceError, match="give the folder"):
        load_checkpoint(tmp_path / "config.json")


ODD_VALUES: list[Any] = [
    None, True, -1, 0, 2.5, 1e400, float("nan"), "", "x", "../x", [], [1], {}, {"a": 1}, "REMOVED"
]  # fmt: skip


@pytest.mark.parametrize("save", SAVES)
def test_odd_configs_end_in_our_errors(save: Save, tmp_path: Path) -> None:
    save(tmp_path / "a", CFG, random_state())
    file = tmp_path / "a/config.json"
    original = json.loads(file.read_text())
    for field in original:
        for value in ODD_VALUES:
            file.write_text(json.dumps(original))
            edit_json(file, **{field: value})
            with contextlib.suppress(CheckpointError, SourceError):
                load_checkpoint(tmp_path / "a", keys=())
    for field in original.get("config", {}):
        for value in ODD_VALUES:
            file.write_text(json.dumps(original))
            edit_json(file, config=original["config"] | {field: value})
            with contextlib.suppress(CheckpointError):
                load_checkpoint(tmp_path / "a", keys=())


def test_two_formats_in_one_folder(tmp_path: Path) -> None:
    for number, save in enumerate(SAVES):
        save(tmp_path / str(number), CFG, random_state())
    native, pieces, huggingface = (tmp_path / str(number) for number in range(3))
    (native / "model_pieces").mkdir()
    assert "holds two formats" in error_of(native)
    (pieces / "model.safetensors").write_bytes(b"")
    assert "holds two formats" in error_of(pieces)
    (huggingface / "model_pieces").mkdir()
    assert "holds two formats" in error_of(huggingface)
    edit_json(native / "config.json", model_type="gpt2")
    assert "several formats (native, huggingface)" in error_of(native)


# ---------------------------------------------------------------------------------- native


def test_native_stores_equal_tensors_once(tmp_path: Path) -> None:
    state = random_state()
    state["unembed.weight"] = state["tok_embed.weight"].clone()  # equal content, not one storage
    state["final_ln.weight"] = torch.zeros(8)
    state["final_ln.bias"] = -torch.zeros(8)  # equal by ==, not by bits
    save_native(tmp_path / "a", CFG, state)
    config = json.loads((tmp_path / "a/config.json").read_text())
    assert config["shared"] == {"unembed.weight": "tok_embed.weight"}
    assert "unembed.weight" not in load_file(tmp_path / "a/model.safetensors")
    loaded = load_checkpoint(tmp_path / "a")
    assert loaded.state_dict["final_ln.bias"].signbit().all()
    assert not loaded.state_dict["final_ln.weight"].signbit().any()
    assert_same(loaded.state_dict, state)
    save_native(tmp_path / "b", loaded.config, loaded.state_dict)
    assert contents(tmp_path / "a") == contents(tmp_path / "b")


def test_native_metadata_and_tokenizer(tmp_path: Path) -> None:
    ranks = {bytes([byte]): byte for byte in range(256)} | {b"th": 256, b"the": 257}
    vocabulary = tmp_path / "own.tiktoken"
    vocabulary.write_bytes(b"".join(b64encode(t) + b" %d\n" % i for t, i in ranks.items()))
    spec = TokenizerSpec("own", r"\w+|\W+", (("<|endoftext|>", 258),), (str(vocabulary),))
    cfg = replace(CFG, enc="own", activation="relu", norm_eps=1e-6, n_vocab=259)
    metadata = {"steps": 5, "data": ["é"], "held_out": {"bits": 1.5}}
    save_native(tmp_path / "a", cfg, random_state(cfg), spec, metadata)
    vocabulary.unlink()
    loaded = load_checkpoint(tmp_path / "a")
    assert (loaded.config, loaded.metadata, loaded.format) == (cfg, metadata, "native")
    assert loaded.tokenizer is not None
    enc = load_encoding(loaded.tokenizer)
    assert enc.encode("the th<|endoftext|>", allowed_special="all") == [257, 32, 256, 258]
    save_native(tmp_path / "b", cfg, loaded.state_dict, loaded.tokenizer, loaded.metadata)
    assert contents(tmp_path / "a") == contents(tmp_path / "b")
    # the folder may move
    (tmp_path / "a").rename(tmp_path / "c")
    moved = load_checkpoint(tmp_path / "c", keys=()).tokenizer
    assert moved is not None
    assert load_encoding(moved).encode("the") == [257]


def test_native_builtin_tokenizer(tmp_path: Path) -> None:
    save_native(tmp_path / "a", CFG, random_state(), TokenizerSpec("gpt2"))
    assert load_checkpoint(tmp_path / "a").tokenizer == TokenizerSpec("gpt2")
    save_native(tmp_path / "b", CFG, random_state())
    assert load_checkpoint(tmp_path / "b").tokenizer is None


def test_native_config_errors(tmp_path: Path) -> None:
    folder = tmp_path / "a"
    save_native(folder, CFG, random_state())
    original = (folder / "config.json").read_text()

    def error(**changes: Any) -> str:
        (folder / "config.json").write_text(original)
        edit_json(folder / "config.json", **changes)
        return error_of(folder)

    assert "format_version 2 is not known here, expected 1" in error(format_version=2)
    assert "format_version None" in error(format_version="REMOVED")
    assert "format_version True" in error(format_version=True)
    assert "expected kind 'transformer', found 'autoencoder'" in error(kind="autoencoder")
    assert "unknown field 'extra'" in error(extra=1)
    assert "the field 'shared' is missing" in error(shared="REMOVED")
    assert "metadata: expected an object, found []" in error(metadata=[])
    assert "shared.unembed.weight: expected text" in error(shared={"unembed.weight": 3})
    assert "tokenizer: expected an object" in error(tokenizer="gpt2")
    sizes = CFG.to_dict()
    both = error(config={k: v for k, v in sizes.items() if k != "n_heads"} | {"n_head": 3})
    assert "unknown field 'n_head'. Did you mean 'n_heads'" in both
    assert "the field 'n_heads' is missing" in both
    assert "n_heads: expected a whole number" in error(config=sizes | {"n_heads": 2.5})
    assert "not divisible by n_heads" in error(config=sizes | {"n_heads": 3})
    assert "activation: expected one of" in error(config=sizes | {"activation": "swish"})
    assert "norm_eps: expected a finite number" in error(config=sizes | {"norm_eps": "tiny"})
    assert "norm_eps: expected a finite number" in error(config=sizes | {"norm_eps": float("nan")})
    assert "m_mlp" in error(config=sizes | {"m_mlp": "4"})
    assert "config.json" in error(config=sizes | {"m_mlp": float("nan")})
    assert "enc: expected text" in error(config=sizes | {"enc": None})
    tokenizer = {"name": "x", "pattern": ".", "special_tokens": {}, "file": "../../etc/passwd"}
    assert "the file 'tokenizer.tiktoken'" in error(tokenizer=tokenizer)
    no_target = error(shared={"unembed.weight": "tok_embed.weights"})
    assert "config.json says it is shared, yet it is stored too" in no_target


def test_native_tensor_errors_are_told_together(tmp_path: Path) -> None:
    folder = tmp_path / "a"
    save_native(folder, CFG, random_state())
    tensors = load_file(folder / "model.safetensors")
    del tensors["pos_embed.weight"]
    tensors["final_ln.bias"] = torch.zeros(8, dtype=torch.int32)
    tensors["final_ln.weight"] = torch.zeros(2, 4)
    tensors["final_ln.gain"] = torch.zeros(8)
    save_file(tensors, folder / "model.safetensors")
    lines = error_of(folder).splitlines()
    assert lines[0] == f"{folder / 'model.safetensors'}: 4 problems:"
    assert [line.partition(":")[0].strip() for line in lines[1:5]] == [
        "final_ln.bias",
        "final_ln.gain",
        "final_ln.weight",
        "pos_embed.weight",
    ]
    assert "found I32" in lines[1]
    assert "config.json" in lines[5]


def test_native_config_that_contradicts_the_tensors(tmp_path: Path) -> None:
    folder = tmp_path / "a"
    save_native(folder, CFG, random_state())
    edit_json(folder / "config.json", config=CFG.to_dict() | {"n_layers": 3, "n_vocab": 12})
    text = error_of(folder)
    assert "tok_embed.weight: expected shape [12, 8], found [11, 8]" in text
    assert len(re.findall(r"xf_layers\.2\.\S+: missing", text)) == 16


@pytest.mark.parametrize("save", [save_native, save_huggingface])
def test_damaged_safetensors(save: Save, tmp_path: Path) -> None:
    save(tmp_path / "a", CFG, random_state())
    file = tmp_path / "a/model.safetensors"
    content = file.read_bytes()
    for damaged in (content[:-1], content[:100], b"", b"<html>not found</html>", content + b"x"):
        file.write_bytes(damaged)
        text = error_of(tmp_path / "a")
        assert str(file) in text
        assert "download it again" in text


def test_missing_weights(tmp_path: Path) -> None:
    save_native(tmp_path / "a", CFG, random_state())
    (tmp_path / "a/model.safetensors").unlink()
    with pytest.raises(SourceError, match=r"model\.safetensors"):
        load_checkpoint(tmp_path / "a")


MEMORY_PROBE = """
import sys
from neuron_explainer.models.checkpoints import load_checkpoint
def status(name):
    lines = open("/proc/self/status").read().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(name)) / 1024
for folder in sys.argv[1:]:
    load_checkpoint(folder, keys=["final_ln.bias"])
    before = status("VmRSS")
    with open("/proc/self/clear_refs", "w") as file:
        file.write("5")  # the peak is counted from here
    loaded = load_checkpoint(folder)
    sum(float(tensor.sum()) for tensor in loaded.state_dict.values())  # reads the pages
    print(status("VmHWM") - before)
    del loaded
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_peak_memory_is_that_of_the_tensors(tmp_path: Path) -> None:
    cfg = TransformerConfig(ctx_window=64, d_model=256, n_layers=16, n_heads=2, n_vocab=500)
    state = random_state(cfg)
    folders = [tmp_path / str(number) for number in range(len(SAVES))]
    for save, folder in zip(SAVES, folders, strict=True):
        save(folder, cfg, state)
    size = sum(tensor.nbytes for tensor in state.values()) / 2**20
    assert size > 48
    probe = [sys.executable, "-c", MEMORY_PROBE, *map(str, folders)]
    run = subprocess.run(probe, capture_output=True, text=True, check=False)
    if "clear_refs" in run.stderr:
        pytest.skip("this system does not let the peak be counted anew")
    peaks = [float(line) for line in run.stdout.split()]
    assert len(peaks) == len(SAVES), run.stderr
    assert max(peaks) < 1.25 * size, peaks
    assert max(peaks) > 0.9 * size, peaks  # what is measured is the load


# ---------------------------------------------------------------------------------- pieces


def test_pieces_have_the_originals_layout(tmp_path: Path) -> None:
    cfg = replace(CFG, n_vocab=13)
    save_pieces(tmp_path / "a", cfg, random_state(cfg))
    config = json.loads((tmp_path / "a/config.json").read_text())
    assert config == {
        "enc": "gpt2",
        "ctx_window": 7,
        "d_model": 8,
        "n_layers": 2,
        "m_attn": 1,
        "n_heads": 2,
        "m_mlp": 4,
    }
    pieces = {path.name for path in (tmp_path / "a/model_pieces").iterdir()}
    assert pieces == {f"{name}.pt" for name in expected_shapes(cfg)}
    piece = torch.load(tmp_path / "a/model_pieces/xf_layers.0.attn.q_proj.weight.pt")
    assert type(piece) is torch.Tensor
    assert load_checkpoint(tmp_path / "a").config == cfg


def test_pieces_that_are_views_of_a_larger_storage_or_old(tmp_path: Path) -> None:
    state = random_state()
    save_pieces(tmp_path / "a", CFG, state)
    pieces = tmp_path / "a/model_pieces"
    combined = torch.randn(8, 24)
    for third, name in enumerate("qkv"):  # as a converter of Hugging Face's c_attn leaves them
        key = f"xf_layers.0.attn.{name}_proj.weight"
        state[key] = combined.t().chunk(3, dim=0)[third]
        torch.save(state[key], pieces / f"{key}.pt")
    legacy = {"_use_new_zipfile_serialization": False}
    torch.save(state["final_ln.bias"], pieces / "final_ln.bias.pt", **legacy)
    parameter = torch.nn.Parameter(state["final_ln.weight"])
    torch.save(parameter, pieces / "final_ln.weight.pt")
    state = {name: tensor.contiguous() for name, tensor in state.items()}
    loaded = load_checkpoint(tmp_path / "a").state_dict
    assert_same(loaded, state)
    assert not loaded["final_ln.weight"].requires_grad


def test_pieces_errors_are_told_together(tmp_path: Path) -> None:
    save_pieces(tmp_path / "a", CFG, random_state())
    pieces = tmp_path / "a/model_pieces"
    (pieces / "pos_embed.weight.pt").unlink()
    torch.save(torch.zeros(9), pieces / "final_ln.bias.pt")
    torch.save({"weight": torch.zeros(8)}, pieces / "final_ln.weight.pt")
    torch.save(torch.zeros(8), pieces / "ln_f.weight.pt")
    torch.save(torch.zeros(12, 8), pieces / "unembed.weight.pt")
    torch.save(torch.zeros(8, dtype=torch.int64), pieces / "xf_layers.0.ln_1.bias.pt")
    cut = pieces / "xf_layers.0.ln_1.weight.pt"
    cut.write_bytes(cut.read_bytes()[:-50])
    (pieces / ".hidden.pt").write_bytes(b"")
    (pieces / "notes.txt").write_bytes(b"")
    lines = error_of(tmp_path / "a").splitlines()
    assert lines[0].endswith("model_pieces: 7 problems:")
    assert [line.strip().partition(": ")[0] for line in lines[1:8]] == [
        "final_ln.bias",
        "final_ln.weight",
        "ln_f.weight",
        "pos_embed.weight",
        "unembed.weight",
        "xf_layers.0.ln_1.bias",
        "xf_layers.0.ln_1.weight",
    ]
    assert "expected one tensor, found dict" in lines[2]
    assert "expected shape [11, 8], found [12, 8]" in lines[5]
    assert str(cut) in lines[7]
    assert "rows of tok_embed.weight" in lines[8]


def test_pieces_without_an_embedding(tmp_path: Path) -> None:
    save_pieces(tmp_path / "a", CFG, random_state())
    piece = tmp_path / "a/model_pieces/tok_embed.weight.pt"
    piece.unlink()
    assert "tok_embed.weight: missing" in error_of(tmp_path / "a")
    torch.save(torch.zeros(3), piece)
    assert "tok_embed.weight: expected shape" in error_of(tmp_path / "a")
    for other in piece.parent.iterdir():
        other.unlink()
    piece.parent.rmdir()
    assert "model_pieces: no such folder" in error_of(tmp_path / "a")


def damages(content: bytes) -> list[bytes]:
    flipped = bytearray(content)
    flipped[len(content) // 2] ^= 1
    return [content[:-1], content[: len(content) // 2], b"", b"<html>", bytes(flipped)]


def test_damaged_pieces(tmp_path: Path) -> None:
    save_pieces(tmp_path / "a", CFG, random_state())
    file = tmp_path / "a/model_pieces/xf_layers.1.mlp.in_layer.weight.pt"
    for damaged in damages(file.read_bytes()):
        file.write_bytes(damaged)
        text = error_of(tmp_path / "a")
        assert str(file) in text
        assert "damaged" in text


class Hostile:
    """Unpickled, it would create a file."""

    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self) -> Any:
        return (Path.touch, (self.target,))


@pytest.mark.parametrize("kind", ["zip", "legacy", "pickle 2", "pickle 5"])
def test_hostile_pickles_are_refused(kind: str, tmp_path: Path) -> None:
    evil = tmp_path / "evil"
    pickle.loads(pickle.dumps(Hostile(evil)))
    assert evil.exists(), "the test's own pickle must work"
    evil.unlink()
    save_pieces(tmp_path / "a", CFG, random_state())
    file = tmp_path / "a/model_pieces/final_ln.bias.pt"
    if kind.startswith("pickle"):
        file.write_bytes(pickle.dumps(Hostile(evil), protocol=int(kind[-1])))
    else:
        torch.save(Hostile(evil), file, _use_new_zipfile_serialization=kind == "zip")
    text = error_of(tmp_path / "a")
    assert "refused, and nothing in it was run" in text
    assert str(file) in text
    assert "weights_only" not in text  # no advice to switch the guard off
    assert not evil.exists()


def test_pieces_config_errors(tmp_path: Path) -> None:
    save_pieces(tmp_path / "a", CFG, random_state())
    config = tmp_path / "a/config.json"
    edit_json(config, n_heads="REMOVED", n_head=2)
    text = error_of(tmp_path / "a")
    assert "the field 'n_heads' is missing" in text
    assert "unknown field 'n_head'. Did you mean 'n_heads'" in text


def test_pieces_refuse_what_seven_fields_cannot_say(tmp_path: Path) -> None:
    cfg = replace(CFG, activation="relu", norm_eps=1e-6, enc="own/tokenizer")
    with pytest.raises(CheckpointError) as caught:
        save_pieces(tmp_path / "a", cfg, random_state())
    text = str(caught.value)
    assert "activation: the layout stands for 'gelu_tanh', found 'relu'" in text
    assert "norm_eps: the layout stands for 1e-05, found 1e-06" in text
    assert "enc: expected the name of one of tiktoken's own tokenizers" in text
    assert not (tmp_path / "a").exists()


# ---------------------------------------------------------------------------------- Hugging Face


def reference_logits(
    cfg: TransformerConfig, state: StateDict, tokens: torch.Tensor
) -> torch.Tensor:
    """GPT-2 in a few lines, for one sequence, from our state dict; without hooks or cache."""

    def linear(x: torch.Tensor, name: str) -> torch.Tensor:
        return x @ state[f"{name}.weight"].T + state[f"{name}.bias"]

    def norm(x: torch.Tensor, name: str) -> torch.Tensor:
        weight, bias = state[f"{name}.weight"], state[f"{name}.bias"]
        return functional.layer_norm(x, (cfg.d_model,), weight, bias, cfg.norm_eps)

    def act(x: torch.Tensor) -> torch.Tensor:
        if cfg.activation == "relu":
            return x.relu()
        return functional.gelu(x, approximate="tanh" if cfg.activation == "gelu_tanh" else "none")

    x = state["tok_embed.weight"][tokens] + state["pos_embed.weight"][: len(tokens)]
    for layer in range(cfg.n_layers):
        at = f"xf_layers.{layer}"
        y = norm(x, f"{at}.ln_1")
        q, k, v = [
            linear(y, f"{at}.attn.{name}_proj").unflatten(-1, (cfg.n_heads, -1)).transpose(0, 1)
            for name in "qkv"
        ]
        z = functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + linear(z.transpose(0, 1).flatten(1), f"{at}.attn.out_proj")
        x = x + linear(
            act(linear(norm(x, f"{at}.ln_2"), f"{at}.mlp.in_layer")), f"{at}.mlp.out_layer"
        )
    return norm(x, "final_ln") @ state["unembed.weight"].T


def hf_model(**changes: Any) -> Any:
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(3)
    sizes = {"vocab_size": 11, "n_positions": 7, "n_embd": 8, "n_layer": 2, "n_head": 2}
    ids = {"bos_token_id": None, "eos_token_id": None}
    config = transformers.GPT2Config(**sizes | ids | changes)
    model = transformers.GPT2LMHeadModel(config).eval()
    with torch.no_grad():  # fresh ones have zero biases and unit gains, which hide mistakes
        for parameter in model.parameters():
            parameter.copy_(torch.randn_like(parameter) * 0.3)
    return model


TOKENS = torch.tensor([3, 1, 4, 10, 5])


def assert_same_logits(folder: Path, model: Any) -> None:
    loaded = load_checkpoint(folder)
    found = reference_logits(loaded.config, loaded.state_dict, TOKENS)
    with torch.no_grad():
        expected = model(TOKENS[None]).logits[0]
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"activation_function": "gelu", "layer_norm_epsilon": 1e-2},
        {"activation_function": "relu", "n_inner": 20},
        {"activation_function": "gelu_pytorch_tanh", "tie_word_embeddings": False},
        {"reorder_and_upcast_attn": True},
    ],
)
def test_huggingface_models_keep_their_logits(changes: dict[str, Any], tmp_path: Path) -> None:
    model = hf_model(**changes)
    model.save_pretrained(tmp_path / "a")
    assert_same_logits(tmp_path / "a", model)
    assert load_checkpoint(tmp_path / "a").format == "huggingface"


@pytest.mark.parametrize("tied", [True, False])
def test_transformers_loads_what_is_written(tied: bool, tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    cfg = replace(CFG, activation="relu", norm_eps=1e-3, m_mlp=2.5)
    state = random_state(cfg)
    if tied:
        state["unembed.weight"] = state["tok_embed.weight"].clone()
    save_huggingface(tmp_path / "a", cfg, state)
    model, info = transformers.GPT2LMHeadModel.from_pretrained(
        tmp_path / "a", output_loading_info=True, local_files_only=True
    )
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    with torch.no_grad():
        expected = model.eval()(TOKENS[None]).logits[0]
    torch.testing.assert_close(reference_logits(cfg, state, TOKENS), expected, rtol=1e-4, atol=1e-4)
    assert_same(load_checkpoint(tmp_path / "a").state_dict, state)


def test_huggingface_slices_of_c_attn(tmp_path: Path) -> None:
    """The mapping without anyone's model: column j of the third t is row j of q, k or v."""
    save_huggingface(tmp_path / "a", CFG, random_state())
    theirs = load_file(tmp_path / "a/model.safetensors")
    ours = load_checkpoint(tmp_path / "a").state_dict
    combined = theirs["transformer.h.1.attn.c_attn.weight"]
    assert combined.shape == (8, 24)
    for third, name in enumerate("qkv"):
        for j in range(8):
            row = ours[f"xf_layers.1.attn.{name}_proj.weight"][j]
            assert torch.equal(combined[:, 8 * third + j], row)
        bias = theirs["transformer.h.1.attn.c_attn.bias"][8 * third : 8 * third + 8]
        assert torch.equal(bias, ours[f"xf_layers.1.attn.{name}_proj.bias"])


def rewrite(folder: Path, change: Callable[[StateDict], StateDict]) -> None:
    file = folder / "model.safetensors"
    tensors = change(load_file(file))
    save_file(tensors, file)


@pytest.fixture
def hf_folder(tmp_path: Path) -> Path:
    """An untied one, as saved here."""
    save_huggingface(tmp_path / "hf", CFG, random_state())
    return tmp_path / "hf"


@pytest.fixture
def tied_folder(tmp_path: Path) -> Path:
    state = random_state()
    state["unembed.weight"] = state["tok_embed.weight"]
    save_huggingface(tmp_path / "tied", CFG, state)
    return tmp_path / "tied"


def test_huggingface_without_prefix_and_with_masks(tied_folder: Path) -> None:
    expected = load_checkpoint(tied_folder).state_dict

    def old(tensors: StateDict) -> StateDict:
        bare = {name.removeprefix("transformer."): tensor for name, tensor in tensors.items()}
        masks = {f"h.{i}.attn.bias": torch.ones(1, 1, 7, 7, dtype=torch.uint8) for i in range(2)}
        return bare | masks | {f"h.{i}.attn.masked_bias": torch.tensor(-1e4) for i in range(2)}

    rewrite(tied_folder, old)
    assert_same(load_checkpoint(tied_folder).state_dict, expected)


def test_huggingface_tied_unembedding_present(tied_folder: Path) -> None:
    expected = load_checkpoint(tied_folder).state_dict
    embedding = expected["tok_embed.weight"]
    rewrite(tied_folder, lambda t: t | {"lm_head.weight": embedding.clone()})
    assert_same(load_checkpoint(tied_folder).state_dict, expected)
    rewrite(tied_folder, lambda t: t | {"lm_head.weight": embedding + 1})
    assert "lm_head.weight differs from wte.weight" in error_of(tied_folder)
    edit_json(tied_folder / "config.json", tie_word_embeddings=False)
    found = load_checkpoint(tied_folder).state_dict["unembed.weight"]
    assert torch.equal(found, embedding + 1)


@pytest.mark.parametrize("suffix", [".safetensors", ".bin"])
@pytest.mark.parametrize("prefix", ["transformer.", ""])
def test_huggingface_tied_tensor_under_the_other_name(
    suffix: str, prefix: str, tied_folder: Path
) -> None:
    """Of two names for one tensor, safetensors' save_model writes the first alone."""
    expected = load_checkpoint(tied_folder).state_dict

    def under_the_other_name(tensors: StateDict) -> StateDict:
        bare = {name.removeprefix("transformer."): tensor for name, tensor in tensors.items()}
        head = bare.pop("wte.weight")
        return {prefix + name: t for name, t in bare.items()} | {"lm_head.weight": head}

    rewrite(tied_folder, under_the_other_name)
    if suffix == ".bin":
        file = tied_folder / "model.safetensors"
        torch.save(load_file(file), tied_folder / "pytorch_model.bin")
        file.unlink()
    found = load_checkpoint(tied_folder).state_dict
    assert_same(found, expected)
    found["tok_embed.weight"].zero_()  # each name has a tensor of its own
    assert torch.equal(found["unembed.weight"], expected["unembed.weight"])
    one = load_checkpoint(tied_folder, keys=["unembed.weight"]).state_dict
    assert_same(one, {"unembed.weight": expected["unembed.weight"]})
    edit_json(tied_folder / "config.json", tie_word_embeddings=False)
    assert "wte.weight: missing, expected [11, 8]" in error_of(tied_folder)


def test_huggingface_untied_unembedding_missing(hf_folder: Path) -> None:
    rewrite(hf_folder, lambda t: {k: v for k, v in t.items() if k != "lm_head.weight"})
    assert "lm_head.weight: missing, expected [11, 8]" in error_of(hf_folder)


def shard(folder: Path, suffix: str = "safetensors") -> None:
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    weight_map: dict[str, str] = {}
    for number in range(3):
        name = f"model-{number + 1:05}-of-00003.{suffix}"
        part = {key: tensors[key] for key in sorted(tensors)[number::3]}
        if suffix == "bin":
            torch.save(part, folder / name)
        else:
            save_file(part, folder / name)
        weight_map |= dict.fromkeys(part, name)
    index = "pytorch_model.bin" if suffix == "bin" else "model.safetensors"
    (folder / f"{index}.index.json").write_text(json.dumps({"weight_map": weight_map}))


@pytest.mark.parametrize("suffix", ["safetensors", "bin"])
def test_huggingface_shards(suffix: str, hf_folder: Path) -> None:
    expected = load_checkpoint(hf_folder).state_dict
    shard(hf_folder, suffix)
    assert_same(load_checkpoint(hf_folder).state_dict, expected)


def test_huggingface_shard_errors(hf_folder: Path) -> None:
    single = (hf_folder / "model.safetensors").read_bytes()
    shard(hf_folder)
    index = hf_folder / "model.safetensors.index.json"
    second = hf_folder / "model-00002-of-00003.safetensors"
    content, map_text = second.read_bytes(), index.read_text()
    second.unlink()
    assert "1 of 3 shards are not in the folder: model-00002" in error_of(hf_folder)
    second.write_bytes(content[:-1])
    assert str(second) in error_of(hf_folder)
    save_file({k: v for k, v in load_bytes(content).items() if "ln_f" not in k}, second)
    assert re.search(r"ln_f\.\w+: missing", error_of(hf_folder))
    save_file(load_bytes(content) | {"transformer.wpe.weight": torch.ones(7, 8)}, second)
    if "transformer.wpe.weight" not in load_bytes(content):
        assert "and as transformer.wpe.weight in" in error_of(hf_folder)
    second.write_bytes(content)
    for wrong in ("../evil.safetensors", "/etc/passwd", "a.txt", 3):
        index.write_text(json.dumps({"weight_map": {"wte.weight": wrong}}))
        assert "shards must be" in error_of(hf_folder)
    index.write_text("{}")
    assert "weight_map must be" in error_of(hf_folder)
    index.write_text(map_text)
    (hf_folder / "model.safetensors").write_bytes(single)
    assert "holds both" in error_of(hf_folder)


def test_huggingface_pytorch_bin(hf_folder: Path) -> None:
    expected = load_checkpoint(hf_folder).state_dict
    single = hf_folder / "model.safetensors"
    tensors = load_file(single)
    single.unlink()
    assert "no weights; expected one of model.safetensors" in error_of(hf_folder)
    file = hf_folder / "pytorch_model.bin"
    torch.save(tensors, file)
    assert_same(load_checkpoint(hf_folder).state_dict, expected)
    for damaged in damages(file.read_bytes()):
        file.write_bytes(damaged)
        assert str(file) in error_of(hf_folder)
    torch.save([torch.ones(2)], file)
    assert "expected a dict of tensors, found list" in error_of(hf_folder)
    torch.save({"model": tensors, "step": 3}, file)
    assert "found also: 'model' (OrderedDict), 'step' (int)" in error_of(hf_folder).replace(
        "(dict)", "(OrderedDict)"
    )
    evil = hf_folder / "evil"
    torch.save({"x": Hostile(evil)}, file)
    assert "refused" in error_of(hf_folder)
    assert not evil.exists()


def test_huggingface_tensor_errors_are_told_together(hf_folder: Path) -> None:
    def change(tensors: StateDict) -> StateDict:
        del tensors["transformer.wpe.weight"]
        tensors["transformer.h.0.attn.c_attn.weight"] = torch.ones(24, 8)  # not transposed
        tensors["transformer.h.0.ln_1.bias"] = torch.ones(8, dtype=torch.int64)
        tensors["rotary.inv_freq"] = torch.ones(2, 8)
        return tensors

    rewrite(hf_folder, change)
    lines = error_of(hf_folder).splitlines()
    assert lines[1:5] == [
        "  h.0.attn.c_attn.weight: expected shape [8, 24], found [24, 8]",
        "  h.0.ln_1.bias: expected a floating-point dtype, found I64",
        "  rotary.inv_freq: unexpected, found [2, 8].",
        "  wpe.weight: missing, expected [7, 8]",
    ]


def test_huggingface_vocabulary_padded_or_contradictory(tmp_path: Path, hf_folder: Path) -> None:
    cfg = replace(CFG, n_vocab=50304)
    save_huggingface(tmp_path / "padded", cfg, random_state(cfg))
    loaded = load_checkpoint(tmp_path / "padded")
    assert (loaded.config.n_vocab, loaded.config.enc) == (50304, "gpt2")
    edit_json(tmp_path / "padded/config.json", vocab_size=50257)
    assert "wte.weight: expected shape [50257, 8], found [50304, 8]" in error_of(
        tmp_path / "padded"
    )
    assert load_checkpoint(hf_folder).config.enc == "none"


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("scale_attn_weights", False, "supported is True, found False"),
        ("scale_attn_by_inverse_layer_idx", True, "supported is False, found True"),
        ("add_cross_attention", True, "supported is False, found True"),
        ("is_encoder_decoder", True, "supported is False"),
        ("pruned_heads", {"0": [1]}, "supported is {}"),
        ("quantization_config", {"bits": 4}, "supported is None"),
        ("activation_function", "silu", "supported are gelu_new, gelu_pytorch_tanh, gelu, relu"),
        ("model_type", "gpt_neo", "supported is 'gpt2', found 'gpt_neo'"),
        ("n_embd", "8", "expected a whole number >= 1, found '8'"),
        ("n_head", "REMOVED", "expected a whole number >= 1, found None"),
        ("n_inner", 0, "expected null or a whole number"),
        ("activation_function", ["relu"], "supported are gelu_new"),
        ("tie_word_embeddings", None, "expected true or false, found None"),
        ("layer_norm_epsilon", None, "norm_eps: expected a finite number"),
        ("n_head", 3, "not divisible by n_heads 3"),
        ("n_positions", 6, "wpe.weight: expected shape [6, 8], found [7, 8]"),
        ("n_layer", 1, "unexpected"),
    ],
)
def test_huggingface_settings_are_refused(
    field: str, value: Any, message: str, hf_folder: Path
) -> None:
    edit_json(hf_folder / "config.json", **{field: value})
    text = error_of(hf_folder)
    assert message in text
    assert message == "unexpected" or field in text or "norm_eps" in text or field[0] == "n"


def test_huggingface_settings_are_told_together(hf_folder: Path) -> None:
    edit_json(
        hf_folder / "config.json",
        scale_attn_weights=False,
        activation_function="silu",
        n_layer=None,
        n_positions="REMOVED",
        n_ctx=7,
    )
    lines = error_of(hf_folder).splitlines()
    names = [line.strip().partition(":")[0] for line in lines[1:-1]]
    assert names == ["activation_function", "n_layer", "scale_attn_weights"]


def test_huggingface_folders_own_vocabulary_wins(tmp_path: Path, hf_folder: Path) -> None:
    library = pytest.importorskip("tokenizers")
    made = library.Tokenizer(library.models.BPE())
    made.pre_tokenizer = library.pre_tokenizers.ByteLevel(add_prefix_space=False)
    trainer = library.trainers.BpeTrainer(
        special_tokens=["<|endoftext|>"],
        initial_alphabet=library.pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    made.train_from_iterator(["the mole and the rat and the toad"] * 2, trainer)
    made.save(str(hf_folder / "tokenizer.json"))
    loaded = load_checkpoint(hf_folder)
    assert loaded.tokenizer is not None
    assert loaded.config.enc == loaded.tokenizer.name == "hf/tokenizer"
    ids = made.encode("the toad").ids
    assert load_encoding(loaded.tokenizer).encode("the toad") == ids
    save_native(tmp_path / "a", loaded.config, loaded.state_dict, loaded.tokenizer)
    kept = load_checkpoint(tmp_path / "a").tokenizer
    assert kept is not None
    assert load_encoding(kept).encode("the toad") == ids
    with pytest.raises(CheckpointError, match="enc: expected the name of one of tiktoken's own"):
        save_pieces(tmp_path / "b", loaded.config, loaded.state_dict, loaded.tokenizer)


def test_huggingface_broken_vocabulary_leaves_token_ids(hf_folder: Path) -> None:
    (hf_folder / "vocab.json").write_text("{}")
    loaded = load_checkpoint(hf_folder)
    assert loaded.tokenizer is not None
    with pytest.raises(CheckpointError, match=r"merges.txt. The model still runs on token ids"):
        load_encoding(loaded.tokenizer)


def test_huggingface_cannot_hold_other_attention_widths(tmp_path: Path) -> None:
    cfg = replace(CFG, m_attn=0.5)
    with pytest.raises(CheckpointError, match="m_attn is fixed at 1"):
        save_huggingface(tmp_path / "a", cfg, random_state(cfg))


def test_another_models_config(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "t5", "d_model": 8, "n_heads": 3}')
    assert "model_type: supported is 'gpt2', found 't5'" in error_of(tmp_path)


# ---------------------------------------------------------------------------------- remote


@pytest.fixture
def served(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[Path], str]]:
    """Serves a folder on loopback; its URL. The cache is a fresh one."""
    monkeypatch.setenv("NEURON_EXPLAINER_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    with BlobServer() as server:

        def serve(folder: Path) -> str:
            for name, content in contents(folder).items():
                server.put(f"/models/{folder.name}/{name}", content)
            return f"{server.base}/models/{folder.name}"

        yield serve


@pytest.mark.parametrize("save", SAVES)
def test_remote_folders(save: Save, tmp_path: Path, served: Callable[[Path], str]) -> None:
    state = random_state()
    save(tmp_path / "a", CFG, state)
    url = served(tmp_path / "a")
    assert_same(load_checkpoint(url).state_dict, state)
    assert_same(load_checkpoint(url).state_dict, state)


def test_remote_pieces_that_are_missing(tmp_path: Path, served: Callable[[Path], str]) -> None:
    save_pieces(tmp_path / "a", CFG, random_state())
    for name in ("final_ln.bias", "unembed.weight"):
        (tmp_path / f"a/model_pieces/{name}.pt").unlink()
    with pytest.raises(
        SourceError, match=r"2 of 37 files[\s\S]*final_ln.bias[\s\S]*unembed.weight"
    ):
        load_checkpoint(served(tmp_path / "a"))
