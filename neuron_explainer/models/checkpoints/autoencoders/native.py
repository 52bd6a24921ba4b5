"""Our own format: a folder with ``config.json`` and ``autoencoder.safetensors``.

Written by :meth:`Autoencoder.save <neuron_explainer.models.autoencoder.Autoencoder.save>`. It says all
that is needed to apply an autoencoder. What a caller states may add to it (a layer, an unknown
location) but not contradict it.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, NotRequired, TypedDict

from neuron_explainer import files
from neuron_explainer.errors import CheckpointError, LocationError
from neuron_explainer.files.origins import metadata_from_folder
from neuron_explainer.models.checkpoints.autoencoders.format import (
    Format,
    LoadedAutoencoder,
    Source,
    Stated,
    loaded,
)
from neuron_explainer.models.checkpoints.autoencoders.state import (
    STATISTICS,
    InputNormalization,
)
from neuron_explainer.models.locations import ActivationLocation
from neuron_explainer.settings.fields import read_fields

CONFIG_FILE, WEIGHTS_FILE = "config.json", "autoencoder.safetensors"
FORMAT_VERSION = 1


class _Config(TypedDict):
    """``config.json``. A field that is not required is there only where it is needed."""

    format_version: int
    kind: str
    n_latents: int
    n_inputs: int
    activation: dict[str, Any]
    tied: bool
    input_normalization: InputNormalization
    location: str | None
    model_name: str | None
    dtype: str
    metadata: dict[str, Any]
    n_outputs: NotRequired[int]
    output_location: NotRequired[str]
    group_sizes: NotRequired[list[int]]


def read(source: Source, stated: Stated) -> LoadedAutoencoder:
    """Read our own folder."""
    where = source.path
    config_file = f"{where}/{CONFIG_FILE}"
    config = source.json(CONFIG_FILE)
    fields = _check_config(config, config_file)
    _, tensors = source.weights(WEIGHTS_FILE)
    _check_sizes(where, fields, tensors)
    nonlinearity = dict(fields["activation"])
    state: dict[str, Any] = {
        **tensors,
        "activation": nonlinearity.pop("name"),
        "activation_state_dict": nonlinearity,
        "tied": fields["tied"],
        **{name: config[name] for name in ("n_outputs", "group_sizes") if name in config},
    }
    if stated.get("output_location") is not None and "n_outputs" not in fields:
        raise CheckpointError(f"{where}: {CONFIG_FILE} is not of a transcoder: no output_location.")
    return loaded(
        where,
        stated,
        state,
        said_by=CONFIG_FILE,
        input_normalization=fields["input_normalization"],
        location=_location(fields["location"], config_file),
        output_location=_location(fields.get("output_location"), config_file),
        model_name=fields["model_name"],
        metadata=metadata_from_folder(fields["metadata"], _folder(source)),
    )


def _folder(source: Source) -> str | Path:
    config = source.beside(CONFIG_FILE)
    return str(config).rpartition("/")[0] if files.is_remote(config) else Path(config).parent


def _check_sizes(where: str | Path, fields: _Config, tensors: Mapping[str, Any]) -> None:
    missing = [name for name in STATISTICS if name not in tensors]
    if missing:
        raise CheckpointError(f"{where}/{WEIGHTS_FILE}: missing statistics {', '.join(missing)}.")
    encoder = tensors.get("encoder.weight")
    if encoder is None:
        return  # it is reported with all else that is missing
    found = [list(encoder.shape), str(encoder.dtype).removeprefix("torch.")]
    said = [[fields["n_latents"], fields["n_inputs"]], fields["dtype"]]
    if found != said:
        raise CheckpointError(
            f"{where}/{WEIGHTS_FILE}: {CONFIG_FILE} says {said[0]} of {said[1]}, encoder.weight is "
            f"{found[0]} of {found[1]}."
        )


def _check_config(config: Mapping[str, Any], path: str) -> _Config:
    if config.get("kind") != "autoencoder":
        raise CheckpointError(
            f"{path}: expected kind 'autoencoder', found {config.get('kind')!r}: this folder holds "
            "something else."
        )
    version = config.get("format_version")
    if type(version) is not int or version != FORMAT_VERSION:
        raise CheckpointError(
            f"{path}: format_version {version!r} cannot be read; this version of neuron_explainer "
            f"reads {FORMAT_VERSION}."
        )
    fields = read_fields(_Config, config, path, error=CheckpointError)
    if not isinstance(fields["activation"].get("name"), str):
        raise CheckpointError(
            f"{path}: activation: expected a 'name', found {fields['activation']!r}."
        )
    return fields


def _location(text: str | None, path: str) -> ActivationLocation | None:
    try:
        return None if text is None else ActivationLocation.parse(text)
    except LocationError as error:
        raise CheckpointError(f"{path}: {error}") from None


def is_native(config: Mapping[str, Any]) -> bool:
    """Whether a ``config.json`` is one of ours."""
    return "kind" in config or "format_version" in config


NATIVE = Format(
    name="native",
    layout=f"{CONFIG_FILE} and {WEIGHTS_FILE} (saved by this library)",
    read=read,
    states=frozenset({"output_location"}),
    marks=(WEIGHTS_FILE,),
    configs={CONFIG_FILE: is_native},
)
