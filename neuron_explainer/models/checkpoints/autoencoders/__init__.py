"""Published autoencoders: every format that is read, and those that are written.

A format is one :class:`Format` object in a file of its own and one line in :data:`FORMATS`; everything
else (recognising, statements, errors, flags of the command line) follows from the objects. A reader is
a function without side effects: a source and statements in, :class:`LoadedAutoencoder` out, in the
layout of :class:`~neuron_explainer.models.autoencoder.Autoencoder`, which is not known here. What a file
does not say and changes numbers has to be stated (:class:`Stated`); it is never guessed.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import safetensors.torch
import torch

from neuron_explainer import files
from neuron_explainer.errors import InputError, did_you_mean
from neuron_explainer.models.checkpoints.autoencoders.circuit_tracer import CIRCUIT_TRACER
from neuron_explainer.models.checkpoints.autoencoders.detect import open_source
from neuron_explainer.models.checkpoints.autoencoders.dictionary_learning import DICTIONARY_LEARNING
from neuron_explainer.models.checkpoints.autoencoders.e2e import E2E
from neuron_explainer.models.checkpoints.autoencoders.format import (
    COMMON,
    Exported,
    Format,
    LoadedAutoencoder,
    Stated,
)
from neuron_explainer.models.checkpoints.autoencoders.gemma_scope import GEMMA_SCOPE
from neuron_explainer.models.checkpoints.autoencoders.gemma_scope_2 import GEMMA_SCOPE_2
from neuron_explainer.models.checkpoints.autoencoders.language_model_saes import LANGUAGE_MODEL_SAES
from neuron_explainer.models.checkpoints.autoencoders.llama_scope import LLAMA_SCOPE, LLAMA_SCOPE_R1
from neuron_explainer.models.checkpoints.autoencoders.matrices import (
    ATTN_SAES,
    GOODFIRE,
    QWEN_SCOPE,
)
from neuron_explainer.models.checkpoints.autoencoders.native import NATIVE
from neuron_explainer.models.checkpoints.autoencoders.openai import OPENAI
from neuron_explainer.models.checkpoints.autoencoders.sae_training import SAE_TRAINING
from neuron_explainer.models.checkpoints.autoencoders.saelens import SAELENS
from neuron_explainer.models.checkpoints.autoencoders.sparsify import SPARSIFY
from neuron_explainer.models.checkpoints.autoencoders.transformer_vis import TRANSFORMER_VIS
from neuron_explainer.models.checkpoints.autoencoders.unsupported import UNSUPPORTED

__all__ = [
    "FORMATS",
    "WRITTEN_FORMATS",
    "Exported",
    "Format",
    "LoadedAutoencoder",
    "Stated",
    "format_of",
    "read_autoencoder",
    "write_autoencoder",
]

FORMATS = [
    NATIVE,
    OPENAI,
    SAELENS,
    DICTIONARY_LEARNING,
    SPARSIFY,
    LANGUAGE_MODEL_SAES,
    TRANSFORMER_VIS,
    E2E,
    GEMMA_SCOPE,
    GEMMA_SCOPE_2,
    SAE_TRAINING,
    ATTN_SAES,
    QWEN_SCOPE,
    GOODFIRE,
    CIRCUIT_TRACER,
    LLAMA_SCOPE,
    LLAMA_SCOPE_R1,
    *UNSUPPORTED,
]
"""Every known format. Of the content of a single file the first format that it fits is meant."""

WRITTEN_FORMATS = [form.name for form in FORMATS if form.write is not None]
"""The names of other libraries' formats that are written."""


def read_autoencoder(path: str | Path, stated: Stated) -> LoadedAutoencoder:
    """What the file or folder at a path or URL holds, whatever its format."""
    source, form = open_source(path, FORMATS)
    _check_stated(path, form, stated)
    return form.read(source, stated)


def format_of(folder: str | Path) -> str:
    """The name of the format that a folder is of."""
    return open_source(folder, FORMATS)[1].name


def _check_stated(where: str | Path, found: Format, stated: Stated) -> None:
    """Refuse statements that a format has no use for: they would be ignored without a word."""
    for name, value in stated.items():
        if name not in Stated.__annotations__:
            known = did_you_mean(name, Stated.__annotations__)
            raise InputError(f"{where}: unknown argument {name!r}.{known}")
        if value is not None and name not in COMMON | found.states:
            raise InputError(
                f"{where}: is of the format {found.name!r}, which has no {name}; that is for "
                f"{', '.join(form.name for form in FORMATS if name in form.states)}."
            )


def write_autoencoder(folder: str | Path, it: Exported, *, overwrite: bool = False) -> None:
    """Write a folder of the format ``it.format``, whole or not at all."""
    write = next((form.write for form in FORMATS if form.name == it.format), None)
    if write is None:
        raise InputError(
            f"the format {it.format!r} is not written.{did_you_mean(it.format, WRITTEN_FORMATS)} "
            f"Written: {', '.join(WRITTEN_FORMATS)}."
        )
    contents = write(it)
    for content in contents.values():
        _check_finite(it, content)
    with files.atomic_folder(folder, overwrite=overwrite) as temporary:
        for name, content in contents.items():
            _write_file(temporary / name, content)


def _check_finite(it: Exported, content: Mapping[str, Any]) -> None:
    for name, value in content.items():
        if isinstance(value, torch.Tensor) and not torch.isfinite(value).all():
            it.refuse(f"{name} with NaN or infinity")


def _write_file(path: Path, content: Mapping[str, Any]) -> None:
    if path.suffix == ".json":
        files.write_json(path, dict(content))
        return
    tensors = {name: value.detach().cpu().clone().contiguous() for name, value in content.items()}
    with files.plain_write(path):
        if path.suffix == ".pt":
            torch.save(tensors, path)
        else:
            safetensors.torch.save_file(tensors, path)
