"""Published autoencoders: every format read, three of them written.

A reader is a pure function: tensors and a config in, :class:`LoadedAutoencoder` out, in the layout of
:class:`~neuron_explainer.models.autoencoder.Autoencoder`, which is not known here. Which format a
source has is found from its content, never from a name alone. What a file does not say and changes
numbers has to be stated (:class:`Stated`); it is never guessed.

    native               config.json, autoencoder.safetensors: ``Autoencoder.save``
    openai               .pt state dict of openai/sparse_autoencoder and transformer-debugger
    saelens              cfg.json, sae_weights.safetensors                           (written too)
    dictionary_learning  ae.pt, config.json                                          (written too)
    sparsify             cfg.json, sae.safetensors                                   (written too)
    language_model_saes  .pt {"sae": …}, hyperparams.json: OpenMOSS gpt2-dictionary
    transformer_vis      .npy dictionary for non-negative sparse codes
    e2e                  .pt of Apollo's end-to-end dictionaries
    gemma_scope          params.npz
"""

import logging
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal, get_args

import safetensors.torch
import torch
from torch import Tensor

from neuron_explainer import files
from neuron_explainer.errors import CheckpointError, InputError, SourceError, did_you_mean
from neuron_explainer.models.checkpoints.autoencoders import (
    dictionary_learning,
    gemma_scope,
    language_model_saes,
    native,
    saelens,
    sparsify,
)
from neuron_explainer.models.checkpoints.autoencoders.common import (
    FORMATS,
    AutoencoderFormat,
    LoadedAutoencoder,
    Stated,
    check_stated,
    with_statistics,
)
from neuron_explainer.models.checkpoints.autoencoders.detect import (
    file_kind,
    folder_format,
    is_file,
    torch_format,
)
from neuron_explainer.models.checkpoints.autoencoders.dictionary_learning import (
    export_dictionary_learning,
    read_dictionary_learning,
)
from neuron_explainer.models.checkpoints.autoencoders.e2e import read_e2e
from neuron_explainer.models.checkpoints.autoencoders.export import Exported
from neuron_explainer.models.checkpoints.autoencoders.gemma_scope import read_gemma_scope
from neuron_explainer.models.checkpoints.autoencoders.language_model_saes import (
    read_language_model_saes,
)
from neuron_explainer.models.checkpoints.autoencoders.saelens import export_saelens, read_saelens
from neuron_explainer.models.checkpoints.autoencoders.sparsify import (
    export_sparsify,
    read_sparsify,
)
from neuron_explainer.models.checkpoints.autoencoders.state import read_pt, read_safetensors
from neuron_explainer.models.checkpoints.autoencoders.transformer_vis import read_transformer_vis
from neuron_explainer.models.checkpoints.problems import damaged
from neuron_explainer.models.locations import ActivationLocation

__all__ = [
    "FORMATS",
    "WRITTEN_FORMATS",
    "AutoencoderFormat",
    "Exported",
    "LoadedAutoencoder",
    "Stated",
    "WrittenFormat",
    "check_stated",
    "read_autoencoder",
    "write_autoencoder",
]

logger = logging.getLogger(__name__)

WrittenFormat = Literal["saelens", "dictionary_learning", "sparsify"]
WRITTEN_FORMATS: tuple[WrittenFormat, ...] = get_args(WrittenFormat)


def read_autoencoder(source: str | Path, stated: Stated) -> LoadedAutoencoder:
    """What a file or folder of any format holds, path or URL."""
    if is_file(source):
        loaded = _read_file(source, stated)
    else:
        found = folder_format(source)
        check_stated(source, found, stated)
        loaded = _FOLDER_READERS[found](source, stated)
    if loaded.statistics != "none":
        return loaded
    return replace(loaded, state_dict=with_statistics(loaded.state_dict))


# ---- folders -------------------------------------------------------------------------------------


def _read_both(
    source: str | Path, config_file: str, weights_file: str
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    config = files.read_json(files.fetch(files.join(source, config_file)))
    return config, read_safetensors(files.fetch(files.join(source, weights_file)))


def _native_folder(source: str | Path, stated: Stated) -> LoadedAutoencoder:
    config, tensors = _read_both(source, native.CONFIG_FILE, native.WEIGHTS_FILE)
    return native.read_native(source, config, tensors, stated)


def _saelens_folder(source: str | Path, stated: Stated) -> LoadedAutoencoder:
    config, tensors = _read_both(source, saelens.CONFIG_FILE, saelens.WEIGHTS_FILE)
    loaded = read_saelens(source, config, tensors, stated)
    path = files.join(source, saelens.SPARSITY_FILE)
    try:
        there = files.exists(path)
    except SourceError as error:  # offline: it only says how often latents are active
        logger.warning("%s: statistics of latents stay unknown: %s", source, error)
        return loaded
    if there:
        saelens.add_sparsity(path, loaded, read_safetensors(files.fetch(path)))
    return loaded


def _sparsify_folder(source: str | Path, stated: Stated) -> LoadedAutoencoder:
    config, tensors = _read_both(source, sparsify.CONFIG_FILE, sparsify.WEIGHTS_FILE)
    return read_sparsify(source, config, tensors, stated)


def _dictionary_learning_folder(source: str | Path, stated: Stated) -> LoadedAutoencoder:
    path = files.join(source, dictionary_learning.WEIGHTS_FILE)
    return _dictionary_learning(path, read_pt(files.fetch(path), path), stated)


def _gemma_scope_folder(source: str | Path, stated: Stated) -> LoadedAutoencoder:
    path = files.join(source, gemma_scope.WEIGHTS_FILE)
    return read_gemma_scope(path, _read_npz(files.fetch(path), path), stated)


def _language_model_saes_folder(source: str | Path, stated: Stated) -> LoadedAutoencoder:
    """A run's folder: the one file of weights in it, or in ``checkpoints``."""
    if files.is_remote(source):
        raise CheckpointError(
            f"{source}: a remote folder cannot be listed; give the .pt file in it, and "
            "input_normalization."
        )
    folder = Path(source).expanduser()
    found = sorted([*folder.glob("*.pt"), *folder.glob("checkpoints/*.pt")])
    if len(found) != 1:
        listed = ", ".join(str(path.relative_to(folder)) for path in found) or "none"
        raise CheckpointError(f"{source}: expected one .pt file, found {listed}; give the one.")
    return _language_model_saes(found[0], read_pt(found[0], found[0]), stated)


_FOLDER_READERS: dict[str, Callable[[str | Path, Stated], LoadedAutoencoder]] = {
    "native": _native_folder,
    "saelens": _saelens_folder,
    "sparsify": _sparsify_folder,
    "dictionary_learning": _dictionary_learning_folder,
    "gemma_scope": _gemma_scope_folder,
    "language_model_saes": _language_model_saes_folder,
}


# ---- single files --------------------------------------------------------------------------------


def _read_file(source: str | Path, stated: Stated) -> LoadedAutoencoder:
    path = files.fetch(source)
    kind = file_kind(path, source)
    if kind == "safetensors":
        raise CheckpointError(
            f"{source}: the tensors alone do not say how they are applied; give the folder, with its "
            "config.json or cfg.json."
        )
    if kind == "npy":
        check_stated(source, "transformer_vis", stated)
        return read_transformer_vis(source, _read_npy(path, source), stated)
    if kind == "npz":
        check_stated(source, "gemma_scope", stated)
        return read_gemma_scope(source, _read_npz(path, source), stated)
    content = read_pt(path, source)
    found = torch_format(content)
    check_stated(source, found, stated)
    if found == "language_model_saes":
        return _language_model_saes(source, content, stated)
    if found == "e2e":
        return read_e2e(source, content, stated)
    if found == "dictionary_learning":
        return _dictionary_learning(source, content, stated)
    # Of OpenAI's layout: what it says of itself is judged together with what is stated.
    location = stated.get("location")
    return LoadedAutoencoder(
        dict(content),
        stated.get("input_normalization"),
        None if location is None else ActivationLocation.parse(location),
        statistics="vary",
    )


def _dictionary_learning(
    source: str | Path, content: Mapping[str, Any], stated: Stated
) -> LoadedAutoencoder:
    config = _json_beside(source, dictionary_learning.CONFIG_FILE)
    return read_dictionary_learning(source, config, content, stated)


def _language_model_saes(
    source: str | Path, content: Mapping[str, Any], stated: Stated
) -> LoadedAutoencoder:
    names = (language_model_saes.HYPERPARAMETERS_FILE, language_model_saes.MODEL_FILE)
    hyperparameters, model = (
        _json_beside(source, name) or _json_beside(Path(source).parent, name)
        if not files.is_remote(source)
        else None
        for name in names
    )
    return read_language_model_saes(source, content, hyperparameters, model, stated)


def _json_beside(source: str | Path, name: str) -> dict[str, Any] | None:
    """The JSON file ``name`` in the folder that ``source`` lies in, if there is one."""
    if files.is_remote(source):
        path: str | Path = f"{str(source).rpartition('/')[0]}/{name}"
    else:
        path = Path(source).expanduser().parent / name
    return files.read_json(files.fetch(path)) if files.exists(path) else None


def _read_npy(path: Path, source: str | Path) -> Tensor:
    import numpy as np

    try:
        return torch.from_numpy(np.load(path, allow_pickle=False))
    except Exception as error:  # a damaged file fails in a dozen ways, none of them documented
        raise damaged(source, error) from error


def _read_npz(path: Path, source: str | Path) -> dict[str, Tensor]:
    import numpy as np

    try:
        with np.load(path, allow_pickle=False) as arrays:
            return {name: torch.from_numpy(arrays[name]) for name in arrays.files}
    except Exception as error:
        raise damaged(source, error) from error


# ---- writing -------------------------------------------------------------------------------------


def write_autoencoder(folder: str | Path, it: Exported, *, overwrite: bool = False) -> None:
    """Write a folder of the format ``it.format``, whole or not at all."""
    if it.format not in WRITTEN_FORMATS:
        raise InputError(
            f"the format {it.format!r} is not written.{did_you_mean(it.format, WRITTEN_FORMATS)} "
            f"Written: {', '.join(WRITTEN_FORMATS)}."
        )
    export = {
        "saelens": export_saelens,
        "dictionary_learning": export_dictionary_learning,
        "sparsify": export_sparsify,
    }[it.format]
    config, tensors = export(it)
    _check_finite(it, tensors)
    tensors = {name: value.detach().cpu().clone().contiguous() for name, value in tensors.items()}
    with files.atomic_folder(folder, overwrite=overwrite) as temporary:
        if it.format == "dictionary_learning":
            files.write_json(temporary / dictionary_learning.CONFIG_FILE, config)
            torch.save(tensors, temporary / dictionary_learning.WEIGHTS_FILE)
            return
        name = saelens.WEIGHTS_FILE if it.format == "saelens" else sparsify.WEIGHTS_FILE
        files.write_json(temporary / "cfg.json", config)
        safetensors.torch.save_file(tensors, temporary / name)


def _check_finite(it: Exported, tensors: Mapping[str, Tensor]) -> None:
    for name, value in tensors.items():
        if value.is_floating_point() and not torch.isfinite(value).all():
            it.refuse(f"{name} with NaN or infinity")
