"""Names of models, and the folders or URLs that they stand for.

This is a module of its own because a transformer looks names up when it is loaded, and
``model_registry``, which loads what is named, imports the transformer.
"""

import importlib.resources
import os
from dataclasses import dataclass
from pathlib import Path

from neuron_explainer import files
from neuron_explainer.errors import SourceError, did_you_mean


@dataclass(frozen=True)
class StandardModelSpec:
    """A model that has a name."""

    model_path: str
    """URL or local path of its folder."""


_GPT2_URL = "https://openaipublic.blob.core.windows.net/neuron-explainer/subject-models/gpt2"
ASSETS = importlib.resources.files("neuron_explainer") / "assets"

MODEL_SPECS: dict[str, StandardModelSpec] = {
    "tiny-tales": StandardModelSpec(str(ASSETS / "tiny-tales")),
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
    """The names that :func:`get_standard_model_spec` knows, each in one spelling."""
    return list(MODEL_SPECS)


def get_standard_model_spec(name: str) -> StandardModelSpec:
    """The model called ``name``. ``gpt2/small`` is ``gpt2-small``: "-" and "/" mean the same."""
    spec = _find_model(name)
    if spec is None:
        raise _unknown_model(name)
    return spec


def resolve_model_source(name_or_path: str | Path) -> str | Path:
    """The path of a model's folder, or its URL, for a model of this library.

    An existing folder wins over a name, so that a user's own folder ``gpt2-small`` is found.
    """
    if not isinstance(name_or_path, str | Path):
        raise SourceError(
            f"expected the name, folder or URL of a model, found {type(name_or_path).__name__}."
        )
    if isinstance(name_or_path, str) and files.is_remote(name_or_path):
        if name_or_path.startswith("hf:"):
            raise _model_of_transformers(name_or_path)
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
    spelled = {_spelling(known): known for known in (*_MODEL_ALIASES, *MODEL_SPECS)}
    known = spelled.get(_spelling(name))
    return None if known is None else MODEL_SPECS[_MODEL_ALIASES.get(known, known)]


def _spelling(name: str) -> str:
    return name.replace("/", "-")


def _model_of_transformers(name: str) -> SourceError:
    there = name.removeprefix("hf:").removeprefix("//")
    own = (
        f"its folder, {there}"
        if os.path.isdir(there)
        else f"their address, https://huggingface.co/{there}/resolve/main"
    )
    return SourceError(
        f"{name}: hf: names a model that transformers runs; open it with "
        f"ModelContext.from_model_type({name!r}). For GPT-2's files in this library's own model, give "
        f"{own}."
    )


def _unknown_model(name: str) -> SourceError:
    names = list_model_names()
    return SourceError(
        f"no model {name!r}: there is no such folder here ({os.getcwd()}) and no such name."
        f"{did_you_mean(_spelling(name), [*names, *_MODEL_ALIASES])} Names: {', '.join(names)}. Or "
        "give the path of a folder with config.json and weights (model.safetensors, model_pieces/ "
        "or a Hugging Face GPT-2), or an https:// or az:// folder. Contexts and commands also take "
        "hf:NAME for a model of transformers."
    )
