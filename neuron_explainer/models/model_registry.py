"""Names of models and of autoencoders, and where what they name is to be had."""

import importlib.resources
import os
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch

from neuron_explainer import files
from neuron_explainer.errors import SourceError, did_you_mean
from neuron_explainer.models.autoencoder import InputNormalization
from neuron_explainer.models.autoencoder_context import (
    AutoencoderConfig,
    AutoencoderContext,
    AutoencoderSpec,
)
from neuron_explainer.models.locations import ActivationLocation

# ----------------------------------------------------------------------------------------- models


@dataclass(frozen=True)
class StandardModelSpec:
    """A model that has a name."""

    model_path: str
    """URL or local path of its folder."""


_GPT2_URL = "https://openaipublic.blob.core.windows.net/neuron-explainer/subject-models/gpt2"
_ASSETS = importlib.resources.files("neuron_explainer") / "assets"

_MODEL_SPECS: dict[str, StandardModelSpec] = {
    "tiny-tales": StandardModelSpec(str(_ASSETS / "tiny-tales")),
    "gpt2-small": StandardModelSpec(f"{_GPT2_URL}/small"),
    "gpt2-medium": StandardModelSpec(f"{_GPT2_URL}/medium"),
    "gpt2-large": StandardModelSpec(f"{_GPT2_URL}/large"),
    "gpt2-xl": StandardModelSpec(f"{_GPT2_URL}/xl"),
}

# Hugging Face's names of the same weights.
_MODEL_ALIASES: dict[str, str] = {
    "gpt2": "gpt2-small",
    "openai-community/gpt2": "gpt2-small",
    "openai-community/gpt2-medium": "gpt2-medium",
    "openai-community/gpt2-large": "gpt2-large",
    "openai-community/gpt2-xl": "gpt2-xl",
}


def list_model_names() -> list[str]:
    """The names that :func:`get_standard_model_spec` knows, without other spellings of them."""
    return list(_MODEL_SPECS)


def get_standard_model_spec(name: str) -> StandardModelSpec:
    """The model called ``name``. ``gpt2/small`` is ``gpt2-small``: "-" and "/" mean the same."""
    spec = _find_model(name)
    if spec is None:
        raise _unknown_model(name)
    return spec


def resolve_model_source(name_or_path: str | Path) -> str | Path:
    """Where a model is: the folder's path, or the URL of a remote one.

    An existing folder comes before a name, so that nobody's own ``gpt2-small`` is passed over.
    """
    if isinstance(name_or_path, str) and files.is_remote(name_or_path):
        return name_or_path
    folder = Path(name_or_path).expanduser()
    # os.path, because Path's own tests raise where a name is too long to be one.
    if str(name_or_path) and os.path.isdir(folder):
        return folder
    if os.path.isfile(folder):
        raise SourceError(
            f"{folder} is a file; give the folder that holds config.json and the weights."
        )
    spec = None if isinstance(name_or_path, Path) else _find_model(name_or_path)
    if spec is None:
        raise _unknown_model(str(name_or_path))
    return spec.model_path if files.is_remote(spec.model_path) else Path(spec.model_path)


def _find_model(name: str) -> StandardModelSpec | None:
    spelled = {_spelling(known): known for known in (*_MODEL_ALIASES, *_MODEL_SPECS)}
    known = spelled.get(_spelling(name))
    return None if known is None else _MODEL_SPECS[_MODEL_ALIASES.get(known, known)]


def _spelling(name: str) -> str:
    return name.replace("/", "-")


def _unknown_model(name: str) -> SourceError:
    names = list_model_names()
    return SourceError(
        f"no model {name!r}: there is no such folder here ({os.getcwd()}) and no such name."
        f"{did_you_mean(_spelling(name), [*names, *_MODEL_ALIASES])} Names: {', '.join(names)}. Or "
        "give the path of a folder with config.json and weights (model.safetensors, model_pieces/ "
        "or a Hugging Face GPT-2), an https:// or az:// folder, or hf:owner/name."
    )


# ----------------------------------------------------------------------------------- autoencoders

_SAE_URL = "https://openaipublic.blob.core.windows.net/sparse-autoencoder/gpt2-small"


def _openai(location: str, version: str, normalization: InputNormalization) -> AutoencoderSpec:
    """A release for GPT-2 small: twelve files, which do not say how inputs were normalised."""
    paths = {
        layer: f"{_SAE_URL}/{location}{version}/autoencoders/{layer}.pt" for layer in range(12)
    }
    return AutoencoderSpec(location, paths, normalization)


def _packaged(location: str) -> AutoencoderSpec:
    """Autoencoders of tiny-tales: whatever layers were trained; their folders say everything."""
    wanted = ActivationLocation.parse(location)
    root = Path(str(_ASSETS / "tiny-tales" / "autoencoders"))
    folders = [
        folder
        for folder in sorted(root.glob("*"))
        if folder.is_dir() and ActivationLocation.parse(folder.name) == wanted
    ]
    layers = [path for folder in folders for path in folder.iterdir() if path.name.isdecimal()]
    if not layers:
        raise SourceError(
            f"the autoencoders of tiny-tales at {wanted} belong to the package and are missing from "
            f"this installation: there are none in {root}. Install neuron_explainer again."
        )
    return AutoencoderSpec(wanted, {int(path.name): str(path) for path in sorted(layers)})


# model -> name -> how to make its spec; packaged files are looked for only when they are asked for.
_AUTOENCODER_SPECS: dict[str, dict[str, Callable[[], AutoencoderSpec]]] = {
    "tiny-tales": {
        "ae-mlp-post-act": partial(_packaged, "mlp_post_act"),
        "ae-resid-delta-mlp": partial(_packaged, "resid_delta_mlp"),
        "ae-resid-delta-attn": partial(_packaged, "resid_delta_attn"),
    },
    "gpt2-small": {
        "ae-mlp-post-act-v1": partial(_openai, "mlp_post_act", "", "none"),
        "ae-resid-delta-mlp-v1": partial(_openai, "resid_delta_mlp", "", "none"),
        "ae-mlp-post-act-v4": partial(_openai, "mlp_post_act", "_v4", "none"),
        "ae-resid-delta-mlp-v4": partial(_openai, "resid_delta_mlp", "_v4", "none"),
        "ae-resid-delta-attn-v4": partial(_openai, "resid_delta_attn", "_v4", "none"),
        # TopK with k = 32, trained on layer-normed inputs.
        **{
            f"ae-{location.replace('_', '-')}-v5-{size}": partial(
                _openai, location, f"_v5_{size}", "layer_norm"
            )
            for size in ("32k", "128k")
            for location in (
                "resid_delta_attn",
                "resid_delta_mlp",
                "resid_post_attn",
                "resid_post_mlp",
            )
        },
    },
}


def list_autoencoder_names(model_name: str = "gpt2-small") -> list[str]:
    """The names of the autoencoders that are known for a model; none for some models."""
    return list(_AUTOENCODER_SPECS.get(_known_model(model_name), {}))


def get_autoencoder_spec(model_name: str, autoencoder_name: str) -> AutoencoderSpec:
    """Where the autoencoders called ``autoencoder_name`` of a model are."""
    model = _known_model(model_name)
    names = _AUTOENCODER_SPECS.get(model, {})
    if autoencoder_name not in names:
        known = f"Known for {model}: {', '.join(names) or 'none'}."
        others = [other for other, found in _AUTOENCODER_SPECS.items() if autoencoder_name in found]
        elsewhere = f" There is one of that name for {', '.join(others)}." if others else ""
        raise SourceError(
            f"no autoencoder {autoencoder_name!r} for {model}."
            f"{did_you_mean(autoencoder_name, names)}{elsewhere} {known} For files of your own: "
            "AutoencoderContext(AutoencoderConfig(location, {layer: path}), device)."
        )
    return names[autoencoder_name]()


def make_autoencoder_context(
    model_name: str,
    autoencoder_name: str,
    device: torch.device | str,
    omit_dead_latents: bool = False,
) -> AutoencoderContext:
    """The autoencoders of that name, loaded when they are first asked for.

    Args:
        model_name: ``"gpt2-small"``, ``"tiny-tales"``; see :func:`list_autoencoder_names`.
        autoencoder_name: such as ``"ae-resid-delta-mlp-v4"``.
        device: where to put them.
        omit_dead_latents: leave latents that never fired in training out of memory.
    """
    spec = get_autoencoder_spec(model_name, autoencoder_name)
    return AutoencoderContext(AutoencoderConfig.from_spec(spec), device, omit_dead_latents)


def _known_model(name: str) -> str:
    spec = get_standard_model_spec(name)
    return next(known for known, other in _MODEL_SPECS.items() if other is spec)
