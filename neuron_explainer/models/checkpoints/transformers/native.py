"""Our own format: ``config.json`` and ``model.safetensors`` in a folder, with its tokenizer.

Tensors with the same bits, such as a tied ``unembed.weight``, are stored once; ``shared`` in the config
says which name stands for which. Each gets its own map when it is loaded, so that a change of one never
changes the other: a tensor with two names in a model would silently be trained twice as fast.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import torch

from neuron_explainer import files
from neuron_explainer.errors import CheckpointError, shown
from neuron_explainer.models.checkpoints.problems import Report, Shape, compare
from neuron_explainer.models.checkpoints.tensor_files import SafetensorsFile, take
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
from neuron_explainer.models.tokenizers import TOKENIZER_FILE, write_tiktoken
from neuron_explainer.settings.fields import read_fields

FORMAT_VERSION = 1
KIND = "transformer"
WEIGHTS_FILE = "model.safetensors"

_CONFIG_FIELDS = tuple(field.name for field in fields(TransformerConfig))


@dataclass(frozen=True)
class _StoredTokenizer:
    """``tokenizer`` in ``config.json``: only a name, or everything that its file does not contain."""

    name: str
    pattern: str | None
    special_tokens: dict[str, int] | None
    file: str | None


@dataclass(frozen=True)
class _StoredConfig:
    """``config.json``."""

    format_version: int
    kind: str
    config: dict[str, Any]
    tokenizer: _StoredTokenizer | None
    metadata: dict[str, Any]
    shared: dict[str, str]
    """Name of a tensor that is not stored -> name of the stored one with the same bits."""


def save_native(
    folder: str | Path,
    cfg: TransformerConfig,
    state_dict: Mapping[str, torch.Tensor],
    tokenizer: TokenizerSpec | None = None,
    metadata: dict[str, Any] | None = None,
    *,
    overwrite: bool = False,
) -> None:
    """Write a model's folder; it appears whole or not at all.

    ``tokenizer`` is needed only if its vocabulary is in files, which are then written too.
    ``overwrite`` allows an earlier saved folder to be replaced.
    """
    from safetensors.torch import save_file

    check_for_saving(cfg, state_dict)
    shared = shared_names(state_dict)
    config: dict[str, Any] = {
        "format_version": FORMAT_VERSION,
        "kind": KIND,
        "config": cfg.to_dict(),
        "tokenizer": None,
        "metadata": metadata or {},
        "shared": shared,
    }
    tensors = {
        name: tensor.detach().cpu().contiguous()
        for name, tensor in sorted(state_dict.items())
        if name not in shared
    }
    with files.atomic_folder(folder, overwrite=overwrite) as temporary:
        if tokenizer is not None:
            config["tokenizer"] = _save_tokenizer(temporary, tokenizer)
        files.write_json(temporary / "config.json", config)
        with files.plain_write(temporary / WEIGHTS_FILE) as path:
            save_file(_without_shared_memory(tensors), path, {"format": "pt"})


def shared_names(state_dict: Mapping[str, torch.Tensor]) -> dict[str, str]:
    """Names that have the same bits as an earlier one in alphabetical order: ``{later: first}``."""
    alike: dict[object, list[str]] = {}  # names of different tensors whose first bits are the same
    shared: dict[str, str] = {}
    for name in sorted(state_dict):
        tensor = state_dict[name]
        head = tensor.detach().flatten()[:16].cpu().view(torch.uint8).numpy().tobytes()
        candidates = alike.setdefault((tensor.dtype, tensor.shape, head), [])
        twin = next((c for c in candidates if same_bytes(state_dict[c], tensor)), None)
        if twin is None:
            candidates.append(name)
        else:
            shared[name] = twin
    return shared


def _without_shared_memory(tensors: StateDict) -> StateDict:
    """safetensors refuses views of one storage even if they do not overlap."""
    seen: set[int] = set()
    result = {}
    for name, tensor in tensors.items():
        storage = tensor.untyped_storage().data_ptr()
        result[name] = tensor.clone() if storage in seen else tensor
        seen.add(storage)
    return result


def _save_tokenizer(folder: Path, spec: TokenizerSpec) -> dict[str, Any]:
    if not spec.files:
        return {"name": spec.name, "pattern": None, "special_tokens": {}, "file": None}
    resolved = write_tiktoken(spec, folder / TOKENIZER_FILE)
    return {
        "name": resolved.name,
        "pattern": resolved.pattern,
        "special_tokens": dict(resolved.special_tokens),
        "file": TOKENIZER_FILE,
    }


def load_native(
    source: str | Path,
    config: dict[str, Any],
    *,
    dtype: torch.dtype | None,
    device: torch.device | str,
    keys: Iterable[str] | None,
) -> LoadedCheckpoint:
    """Load the folder ``source``; ``config`` is the content of its ``config.json``."""
    where = str(files.join(source, "config.json"))
    stored = _stored(config, where)
    cfg = make_config(stored.config, f"{where}, in config", _CONFIG_FIELDS)
    shared = stored.shared
    expected = expected_shapes(cfg)
    wanted = wanted_keys(expected, keys)
    state_dict: StateDict = {}
    if wanted:
        file = SafetensorsFile(files.fetch(files.join(source, WEIGHTS_FILE)))
        _check_tensors(file, expected, shared)
        state_dict = {
            name: take(file, shared.get(name, name), dtype, device, again=name in shared)
            for name in wanted
        }
    return LoadedCheckpoint(
        config=cfg,
        state_dict=state_dict,
        tokenizer=_load_tokenizer(source, stored.tokenizer, where),
        metadata=stored.metadata,
        format="native",
    )


def _check_tensors(
    file: SafetensorsFile, expected: dict[str, Shape], shared: dict[str, str]
) -> None:
    report = Report(str(file.path))
    found = dict(file.infos)
    for name, target in shared.items():
        if name in found:
            report.add(name, "config.json says it is shared, yet it is stored too")
        elif target not in file.infos:
            report.add(name, f"config.json says it is shared with {target!r}, which is not stored")
        else:
            found[name] = file.infos[target]
    compare(report, expected, found)
    report.raise_if_any(FITS_CONFIG)


def _stored(config: dict[str, Any], where: str) -> _StoredConfig:
    version, kind = config.get("format_version"), config.get("kind")
    if kind != KIND:
        raise CheckpointError(f"{where}: expected kind {KIND!r}, found {shown(kind)}.")
    if version != FORMAT_VERSION or isinstance(version, bool):
        raise CheckpointError(
            f"{where}: format_version {shown(version)} is not known here, expected "
            f"{FORMAT_VERSION}. A newer version of neuron_explainer may have written it."
        )
    return read_fields(_StoredConfig, config, where, error=CheckpointError)


def _load_tokenizer(
    source: str | Path, found: _StoredTokenizer | None, where: str
) -> TokenizerSpec | None:
    if found is None:
        return None
    if found.file is None:
        return TokenizerSpec(found.name)
    if found.pattern is None or found.special_tokens is None or found.file != TOKENIZER_FILE:
        raise CheckpointError(
            f"{where}: tokenizer: expected a pattern, special tokens and the file "
            f"{TOKENIZER_FILE!r}, found {shown(vars(found))}."
        )
    file = files.fetch(files.join(source, TOKENIZER_FILE))
    special = tuple(found.special_tokens.items())
    return TokenizerSpec(found.name, found.pattern, special, (str(file),))
