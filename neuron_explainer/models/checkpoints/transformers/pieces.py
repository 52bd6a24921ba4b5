"""The original's layout: ``config.json`` with seven fields, and ``model_pieces/<key>.pt`` for each tensor.

The number of tokens is not in the config; it is the number of rows of ``tok_embed.weight``.
"""

from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from neuron_explainer import files
from neuron_explainer.errors import CheckpointError, did_you_mean
from neuron_explainer.models.checkpoints.problems import Report, TensorInfo, compare, own_copy
from neuron_explainer.models.checkpoints.tensor_files import torch_load_all
from neuron_explainer.models.checkpoints.transformers.common import (
    LoadedCheckpoint,
    StateDict,
    check_for_saving,
    expected_shapes,
    make_config,
    wanted_keys,
)
from neuron_explainer.models.config import TransformerConfig
from neuron_explainer.models.tokenizer_files import TokenizerSpec, is_gpt2
from neuron_explainer.models.tokenizers import builtin_names

CONFIG_FIELDS = ("enc", "ctx_window", "d_model", "n_layers", "m_attn", "n_heads", "m_mlp")
PIECES_FOLDER = "model_pieces"
_EMBEDDING = "tok_embed.weight"
_FITS = (
    "Expected is what the sizes in config.json ask for and, for the number of tokens, the rows of "
    f"{_EMBEDDING}."
)


def save_pieces(
    folder: str | Path,
    cfg: TransformerConfig,
    state_dict: Mapping[str, torch.Tensor],
    tokenizer: TokenizerSpec | None = None,
    *,
    overwrite: bool = False,
) -> None:
    """Write the original's layout, whole or not at all; refuse what its seven fields cannot express.

    A ``tokenizer`` with files can be named there only if it is GPT-2's.
    """
    if tokenizer is not None and is_gpt2(tokenizer):
        cfg = replace(cfg, enc="gpt2")
    _check_expressible(cfg)
    check_for_saving(cfg, state_dict)
    with files.atomic_folder(folder, overwrite=overwrite) as temporary:
        everything = cfg.to_dict()
        files.write_json(temporary / "config.json", {n: everything[n] for n in CONFIG_FIELDS})
        files.make_folder(temporary / PIECES_FOLDER)
        for name, tensor in state_dict.items():
            with files.plain_write(temporary / PIECES_FOLDER / f"{name}.pt") as path:
                torch.save(own_copy(tensor, None, "cpu"), path)


def _check_expressible(cfg: TransformerConfig) -> None:
    """Refuse what the original would load silently and compute differently."""
    report = Report(
        "the original's layout cannot hold this model, nothing was saved; use the native format"
    )
    default = TransformerConfig()
    for name in ("activation", "norm_eps"):
        found, fixed = getattr(cfg, name), getattr(default, name)
        if found != fixed:
            report.add(name, f"the layout stands for {fixed!r}, found {found!r}")
    if cfg.enc not in builtin_names():
        near = did_you_mean(cfg.enc, builtin_names())
        report.add(
            "enc",
            f"expected the name of one of tiktoken's own tokenizers, found {cfg.enc!r}.{near}",
        )
    report.raise_if_any()


def load_pieces(
    source: str | Path,
    config: dict[str, Any],
    *,
    dtype: torch.dtype | None,
    device: torch.device | str,
    keys: Iterable[str] | None,
) -> LoadedCheckpoint:
    """Load the folder ``source``; ``config`` is the content of its ``config.json``."""
    where = str(files.join(source, "config.json"))
    sizes = make_config(config, where, CONFIG_FIELDS)
    wanted = wanted_keys(expected_shapes(sizes), keys)
    needed = {*wanted, _EMBEDDING}
    report = Report(str(files.join(source, PIECES_FOLDER)))
    # Unknown pieces in the folder matter only if the whole model is loaded.
    paths = _find_pieces(source, needed, others_too=keys is None)
    read = _read_all(paths, report)
    cfg = _with_vocabulary(sizes, read.get(_EMBEDDING), where)
    expected = expected_shapes(cfg)
    unreadable = paths.keys() - read.keys()
    compare(
        report,
        {name: expected[name] for name in needed - unreadable},
        {name: TensorInfo.of(piece) for name, piece in read.items()},
    )
    report.raise_if_any(_FITS)
    state_dict: StateDict = {}
    for name in wanted:
        # The map of a file is closed as soon as its tensor has been copied.
        piece = read[name] if name == _EMBEDDING else read.pop(name)
        as_stored = dtype in (None, piece.dtype) and torch.device(device).type == "cpu"
        keep = as_stored and piece.is_contiguous()
        state_dict[name] = piece.detach() if keep else own_copy(piece, dtype, device)
    return LoadedCheckpoint(cfg, state_dict, tokenizer=None, metadata={}, format="pieces")


def _with_vocabulary(
    sizes: TransformerConfig, embedding: torch.Tensor | None, where: str
) -> TransformerConfig:
    if embedding is None or embedding.ndim != 2 or not len(embedding):
        return sizes  # the report will say so
    return make_config(sizes.to_dict() | {"n_vocab": len(embedding)}, where)


def _find_pieces(source: str | Path, needed: set[str], *, others_too: bool) -> dict[str, Path]:
    """The files of the needed pieces that exist and, if ``others_too``, of all others.

    A remote folder cannot be listed: there all needed ones must exist, and others stay unknown.
    """
    if files.is_remote(source):
        names = sorted(needed)
        urls = [str(files.join(source, PIECES_FOLDER, f"{name}.pt")) for name in names]
        return dict(zip(names, files.fetch_all(urls), strict=True))
    folder = Path(source, PIECES_FOLDER)
    if not folder.is_dir():
        raise CheckpointError(
            f"{folder}: no such folder; the weights of this layout are {folder}/<name>.pt."
        )
    found = {path.name.removesuffix(".pt"): path for path in folder.glob("[!.]*.pt")}
    return {name: path for name, path in found.items() if others_too or name in needed}


def _read_all(paths: dict[str, Path], report: Report) -> dict[str, torch.Tensor]:
    read: dict[str, torch.Tensor] = {}
    for (name, path), load in zip(paths.items(), torch_load_all(paths.values()), strict=True):
        try:
            piece = load()
        except CheckpointError as error:
            report.add(name, str(error))
            continue
        if isinstance(piece, torch.Tensor):
            read[name] = piece
        else:
            report.add(name, f"{path}: expected one tensor, found {type(piece).__name__}")
    return read
