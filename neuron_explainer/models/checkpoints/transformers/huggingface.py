"""Hugging Face's GPT-2 folders: ``config.json`` and safetensors, one file or shards.

Differences from our state dict: names have a prefix ``transformer.``, which some files lack; linear
layers are ``Conv1D``, whose weights are transposed (ours are views of theirs, not copies); q, k and v are
one matrix; the unembedding is usually the embedding ("tied") and stored under one of the two names.
Settings that change numbers and that our transformer does not have are refused by name.
"""

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from neuron_explainer import files
from neuron_explainer.errors import CheckpointError, SourceError
from neuron_explainer.models.checkpoints.problems import Report, Shape, TensorInfo, compare
from neuron_explainer.models.checkpoints.tensor_files import (
    SafetensorsFile,
    TensorFile,
    TorchFile,
    take,
)
from neuron_explainer.models.checkpoints.transformers.common import (
    FITS_CONFIG,
    LoadedCheckpoint,
    StateDict,
    check_for_saving,
    expected_shapes,
    make_config,
    same_bytes,
    wanted_keys,
)
from neuron_explainer.models.config import TransformerConfig
from neuron_explainer.models.tokenizer_files import TokenizerSpec
from neuron_explainer.models.tokenizers import NO_TOKENIZER

_GPT2_VOCABULARY = 50257
_PREFIX = "transformer."
_LM_HEAD = "lm_head.weight"
# Causal masks, which old versions saved as if they were weights.
_MASKS = re.compile(r"h\.\d+\.attn\.(bias|masked_bias)")

_ACTIVATIONS = {
    "gelu_new": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "gelu": "gelu",
    "relu": "relu",
}
_ACTIVATION_NAMES = {"gelu_tanh": "gelu_new", "gelu": "gelu", "relu": "relu"}

# Fields that change numbers, with the only supported value, which is also what an absent field means.
# reorder_and_upcast_attn is not among them: it only changes the precision of half-precision models.
_FIXED: dict[str, Any] = {
    "scale_attn_weights": True,
    "scale_attn_by_inverse_layer_idx": False,
    "add_cross_attention": False,
    "is_encoder_decoder": False,
    "pruned_heads": {},
    "quantization_config": None,
}
_SIZES = ("vocab_size", "n_positions", "n_embd", "n_layer", "n_head")


@dataclass(frozen=True)
class _Place:
    """Where one of our tensors is in a Hugging Face state dict."""

    name: str
    transposed: bool = False
    third: int | None = None
    """Which third of c_attn's columns it is: q, k or v."""

    def take(self, tensor: torch.Tensor) -> torch.Tensor:
        """Our tensor as a view of theirs."""
        if self.third is not None:
            tensor = tensor.chunk(3, dim=-1)[self.third]
        return tensor.t() if self.transposed else tensor


_BLOCK = {
    "attn.q_proj": ("attn.c_attn", 0),
    "attn.k_proj": ("attn.c_attn", 1),
    "attn.v_proj": ("attn.c_attn", 2),
    "attn.out_proj": ("attn.c_proj", None),
    "mlp.in_layer": ("mlp.c_fc", None),
    "mlp.out_layer": ("mlp.c_proj", None),
}


def _places(n_layers: int, *, tied: bool) -> dict[str, _Place]:
    """Each of our keys with its place in their state dict (without the prefix)."""
    places = {"tok_embed.weight": _Place("wte.weight"), "pos_embed.weight": _Place("wpe.weight")}
    for layer in range(n_layers):
        for ours, (theirs, third) in _BLOCK.items():
            for part, transposed in (("weight", True), ("bias", False)):
                places[f"xf_layers.{layer}.{ours}.{part}"] = _Place(
                    f"h.{layer}.{theirs}.{part}", transposed, third
                )
        for norm in ("ln_1", "ln_2"):
            for part in ("weight", "bias"):
                places[f"xf_layers.{layer}.{norm}.{part}"] = _Place(f"h.{layer}.{norm}.{part}")
    for part in ("weight", "bias"):
        places[f"final_ln.{part}"] = _Place(f"ln_f.{part}")
    places["unembed.weight"] = _Place("wte.weight" if tied else _LM_HEAD)
    return places


def _their_shapes(cfg: TransformerConfig, places: Mapping[str, _Place]) -> dict[str, Shape]:
    ours = expected_shapes(cfg)
    shapes: dict[str, Shape] = {}
    for key, place in places.items():
        shape = ours[key][::-1] if place.transposed else ours[key]
        if place.third is not None:
            shape = (*shape[:-1], 3 * shape[-1])
        shapes[place.name] = shape
    return shapes


# ------------------------------------------------------------------------------------------ load


def load_huggingface(
    source: str | Path,
    config: dict[str, Any],
    *,
    dtype: torch.dtype | None,
    device: torch.device | str,
    keys: Iterable[str] | None,
) -> LoadedCheckpoint:
    """Load the folder ``source``; ``config`` is the content of its ``config.json``."""
    where = str(files.join(source, "config.json"))
    tokenizer = _find_tokenizer(source)
    cfg = _read_config(config, where, tokenizer)
    tied = config.get("tie_word_embeddings", True)
    places = _places(cfg.n_layers, tied=tied)
    wanted = wanted_keys(places, keys)
    state_dict: StateDict = {}
    if wanted:
        tensors = _Tensors(source, _weight_files(source))
        tensors.check(_their_shapes(cfg, places), tied=tied)
        for key in wanted:
            place = places[key]
            again = tied and key == "unembed.weight"
            part, full = tensors.at(place.name)
            state_dict[key] = take(part, full, dtype, device, place.take, again=again)
    sizes = {*_SIZES, "n_inner", "n_ctx", "activation_function", "layer_norm_epsilon"}
    rest = {name: value for name, value in config.items() if name not in sizes}
    return LoadedCheckpoint(cfg, state_dict, tokenizer, {"huggingface": rest}, "huggingface")


def _read_config(
    config: dict[str, Any], where: str, tokenizer: TokenizerSpec | None
) -> TransformerConfig:
    if "n_positions" not in config and "n_ctx" in config:  # as the oldest files have it
        config = config | {"n_positions": config["n_ctx"]}
    _check_config(config, where)
    d_model = config["n_embd"]
    d_ff = config.get("n_inner") or 4 * d_model
    fields = {
        "enc": _tokenizer_name(tokenizer, config["vocab_size"]),
        "ctx_window": config["n_positions"],
        "d_model": d_model,
        "n_layers": config["n_layer"],
        "m_attn": 1,
        "n_heads": config["n_head"],
        "m_mlp": d_ff // d_model if d_ff % d_model == 0 else d_ff / d_model,
        "n_vocab": config["vocab_size"],
        "activation": _ACTIVATIONS[config.get("activation_function", "gelu_new")],
        "norm_eps": config.get("layer_norm_epsilon", 1e-5),
    }
    return make_config(fields, where)


def _check_config(config: dict[str, Any], where: str) -> None:
    report = Report(where)
    if config.get("model_type") != "gpt2":
        report.add("model_type", f"supported is 'gpt2', found {config.get('model_type')!r}")
        report.raise_if_any()
    for name in _SIZES:
        if not _is_size(config.get(name)):
            report.add(name, f"expected a whole number >= 1, found {config.get(name)!r}")
    if config.get("n_inner") is not None and not _is_size(config["n_inner"]):
        report.add("n_inner", f"expected null or a whole number >= 1, found {config['n_inner']!r}")
    for name, supported in _FIXED.items():
        found = config.get(name, supported)
        if found != supported and not (found is None and not supported):
            report.add(name, f"supported is {supported!r}, found {found!r}")
    activation = config.get("activation_function", "gelu_new")
    if activation not in tuple(_ACTIVATIONS):  # a tuple, because JSON may hold a list here
        report.add(
            "activation_function", f"supported are {', '.join(_ACTIVATIONS)}, found {activation!r}"
        )
    tie = config.get("tie_word_embeddings", True)
    if not isinstance(tie, bool):
        report.add("tie_word_embeddings", f"expected true or false, found {tie!r}")
    report.raise_if_any("These settings change what a model computes, so they are not ignored.")


def _is_size(value: object) -> bool:
    return type(value) is int and value >= 1


def _tokenizer_name(tokenizer: TokenizerSpec | None, n_vocab: int) -> str:
    """The folder's own tokenizer, else GPT-2's if the embedding has enough rows for it."""
    if tokenizer is not None:
        return tokenizer.name
    return "gpt2" if n_vocab >= _GPT2_VOCABULARY else NO_TOKENIZER


class _Tensors:
    """The tensors of one or several files, by their names without the prefix."""

    def __init__(self, source: str | Path, parts: list[TensorFile]) -> None:
        self._report = Report(str(source))
        self._at: dict[str, tuple[TensorFile, str]] = {}
        for part in parts:
            for full in part.infos:
                self._add(part, full)

    def _add(self, part: TensorFile, full: str) -> None:
        name = full.removeprefix(_PREFIX)
        if _MASKS.fullmatch(name):
            return
        if name in self._at:
            other, other_name = self._at[name]
            self._report.add(
                full, f"in {part.path.name}, and as {other_name} in {other.path.name} too"
            )
        self._at[name] = (part, full)

    def at(self, name: str) -> tuple[TensorFile, str]:
        """The file that contains a tensor, and its name in that file."""
        return self._at[name]

    def _read(self, name: str) -> torch.Tensor:
        part, full = self._at[name]
        return part.read_apart(full)

    def _info(self, name: str) -> TensorInfo:
        part, full = self._at[name]
        return part.infos[full]

    def check(self, expected: dict[str, Shape], *, tied: bool) -> None:
        """Raise one error that lists everything that does not fit."""
        if tied and "wte.weight" not in self._at and _LM_HEAD in self._at:
            # Of two names for one tensor, safetensors' save_model writes the first alone.
            self._at["wte.weight"] = self._at.pop(_LM_HEAD)
        if tied and _LM_HEAD in self._at:
            expected = expected | {_LM_HEAD: expected["wte.weight"]}
        compare(self._report, expected, {name: self._info(name) for name in self._at})
        self._report.raise_if_any(FITS_CONFIG)
        if tied and _LM_HEAD in self._at:
            self._check_tie()

    def _check_tie(self) -> None:
        if not same_bytes(self._read(_LM_HEAD), self._read("wte.weight")):
            raise CheckpointError(
                f"{self._report.where}: config.json says the unembedding is the embedding "
                f"(tie_word_embeddings), yet {_LM_HEAD} differs from wte.weight. Set "
                "tie_word_embeddings to false to use it, or remove it from the file."
            )


def _weight_files(source: str | Path) -> list[TensorFile]:
    if not files.is_remote(source):
        single, index = (
            Path(source, "model.safetensors"),
            Path(source, "model.safetensors.index.json"),
        )
        if single.exists() and index.exists():
            raise CheckpointError(
                f"{source}: holds both {single.name} and {index.name}; remove the one not meant."
            )
    names = (
        "model.safetensors",
        "model.safetensors.index.json",
        "pytorch_model.bin",
        "pytorch_model.bin.index.json",
    )
    name = first_existing(source, names)
    if name is None:
        raise CheckpointError(f"{source}: no weights; expected one of {', '.join(names)}.")
    found = files.fetch(files.join(source, name))
    paths = _shards(source, found) if name.endswith(".index.json") else [found]
    return [TorchFile(path) if path.suffix == ".bin" else SafetensorsFile(path) for path in paths]


def _shards(source: str | Path, index: Path) -> list[Path]:
    weight_map = files.read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(f"{index}: weight_map must be an object of tensors and their files.")
    names = set(weight_map.values())
    wrong = [
        name
        for name in names
        if not isinstance(name, str)
        or "/" in name
        or "\\" in name
        or not name.endswith((".safetensors", ".bin"))
    ]
    if wrong:
        raise CheckpointError(
            f"{index}: shards must be *.safetensors or *.bin in the same folder, found {wrong}."
        )
    locations = [files.join(source, name) for name in sorted(names)]
    if files.is_remote(source):
        return files.fetch_all([str(location) for location in locations])
    absent = [Path(location).name for location in locations if not Path(location).is_file()]
    if absent:
        raise CheckpointError(
            f"{index}: {len(absent)} of {len(names)} shards are not in the folder: "
            f"{', '.join(absent)}. Copy or download them too."
        )
    return [Path(location) for location in locations]


def first_existing(folder: str | Path, names: Iterable[str]) -> str | None:
    """The first of ``names`` that exists. What is in the cache is found without a network."""
    failure: SourceError | None = None
    for name in names:
        try:
            if files.exists(files.join(folder, name)):
                return name
        except SourceError as error:
            failure = error
    if failure is not None:
        raise failure
    return None


def _find_tokenizer(source: str | Path) -> TokenizerSpec | None:
    """The folder's own vocabulary. Its name contains a "/", so that it is not one of tiktoken's."""
    name = f"{str(source).rstrip('/').rpartition('/')[2] or 'folder'}/tokenizer"
    found = first_existing(source, ("tokenizer.json", "vocab.json"))
    if found is None:
        return None
    parts = [found]
    if found == "vocab.json":
        beside = ("merges.txt", "added_tokens.json", "tokenizer_config.json")
        parts += [part for part in beside if files.exists(files.join(source, part))]
    paths = [files.fetch(files.join(source, part)) for part in parts]
    return TokenizerSpec(name, files=tuple(str(path) for path in paths))


# ------------------------------------------------------------------------------------------ save


def save_huggingface(
    folder: str | Path,
    cfg: TransformerConfig,
    state_dict: Mapping[str, torch.Tensor],
    *,
    overwrite: bool = False,
) -> None:
    """Write a folder that transformers' ``GPT2LMHeadModel`` loads; no tokenizer is written."""
    from safetensors.torch import save_file

    if cfg.d_attn_qk != cfg.d_model:
        raise CheckpointError(
            f"Hugging Face's GPT-2 cannot hold this model, nothing was saved: m_attn is fixed at 1 "
            f"there, found {cfg.m_attn!r}."
        )
    check_for_saving(cfg, state_dict)
    tied = same_bytes(state_dict["tok_embed.weight"], state_dict["unembed.weight"])
    with files.atomic_folder(folder, overwrite=overwrite) as temporary:
        files.write_json(temporary / "config.json", _their_config(cfg, tied=tied))
        tensors = _their_tensors(cfg, state_dict, tied=tied)
        with files.plain_write(temporary / "model.safetensors") as path:
            save_file(tensors, path, {"format": "pt"})


def _their_tensors(
    cfg: TransformerConfig, state_dict: Mapping[str, torch.Tensor], *, tied: bool
) -> StateDict:
    parts: dict[str, list[torch.Tensor]] = {}
    for key, place in _places(cfg.n_layers, tied=tied).items():
        if tied and key == "unembed.weight":
            continue
        tensor = state_dict[key].detach().cpu()
        name = place.name if place.name == _LM_HEAD else _PREFIX + place.name
        # q, k and v are in the order of their thirds.
        parts.setdefault(name, []).append(tensor.t() if place.transposed else tensor)
    return {name: torch.cat(tensors, dim=-1).contiguous() for name, tensors in parts.items()}


def _their_config(cfg: TransformerConfig, *, tied: bool) -> dict[str, Any]:
    end_of_text = 50256 if cfg.enc == "gpt2" and cfg.n_vocab >= _GPT2_VOCABULARY else None
    return {
        "architectures": ["GPT2LMHeadModel"],
        "model_type": "gpt2",
        "vocab_size": cfg.n_vocab,
        "n_positions": cfg.ctx_window,
        "n_embd": cfg.d_model,
        "n_layer": cfg.n_layers,
        "n_head": cfg.n_heads,
        "n_inner": cfg.d_ff,
        "activation_function": _ACTIVATION_NAMES[cfg.activation],
        "layer_norm_epsilon": cfg.norm_eps,
        "scale_attn_weights": True,
        "scale_attn_by_inverse_layer_idx": False,
        "reorder_and_upcast_attn": False,
        "add_cross_attention": False,
        "tie_word_embeddings": tied,
        "bos_token_id": end_of_text,
        "eos_token_id": end_of_text,
        **dict.fromkeys(("attn_pdrop", "embd_pdrop", "resid_pdrop"), 0.0),
    }
