"""Our own format: a folder with ``config.json`` and ``autoencoder.safetensors``.

Written by :meth:`Autoencoder.save <neuron_explainer.models.autoencoder.Autoencoder.save>`. It says all
that is needed to apply an autoencoder. What a caller states may add to it (a layer, an unknown
location) but not contradict it.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from neuron_explainer.errors import CheckpointError, LocationError
from neuron_explainer.models.checkpoints.autoencoders.common import loaded
from neuron_explainer.models.checkpoints.autoencoders.format import (
    Format,
    LoadedAutoencoder,
    Source,
    Stated,
)
from neuron_explainer.models.checkpoints.autoencoders.state import (
    NORMALIZATIONS,
    STATISTICS,
    unknown_normalization,
)
from neuron_explainer.models.locations import ActivationLocation, LocationLike

CONFIG_FILE, WEIGHTS_FILE = "config.json", "autoencoder.safetensors"
FORMAT_VERSION = 1


def read(source: Source, stated: Stated) -> LoadedAutoencoder:
    """Read our own folder."""
    where = source.path
    fields = check_config(source.json(CONFIG_FILE), f"{where}/{CONFIG_FILE}")
    _, tensors = source.weights(WEIGHTS_FILE)
    _check_sizes(where, fields, tensors)
    nonlinearity = dict(fields["activation"])
    state: dict[str, Any] = {
        **tensors,
        "activation": nonlinearity.pop("name"),
        "activation_state_dict": nonlinearity,
        "tied": fields["tied"],
        **{name: fields[name] for name in ("n_outputs", "group_sizes") if name in fields},
    }
    if stated.get("output_location") is not None and "n_outputs" not in fields:
        raise CheckpointError(f"{where}: {CONFIG_FILE} is not of a transcoder: no output_location.")
    return loaded(
        where,
        stated,
        state,
        said_by=CONFIG_FILE,
        input_normalization=fields["input_normalization"],
        location=_location(fields["location"]),
        output_location=_location(fields.get("output_location")),
        model_name=fields["model_name"],
        metadata=fields["metadata"],
    )


def _location(text: LocationLike | None) -> ActivationLocation | None:
    return None if text is None else ActivationLocation.parse(text)


def _check_sizes(where: str | Path, fields: Mapping[str, Any], tensors: Mapping[str, Any]) -> None:
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


_CONFIG_FIELDS: dict[str, type | tuple[type, ...]] = {
    "format_version": int,
    "kind": str,
    "n_latents": int,
    "n_inputs": int,
    "activation": dict,
    "tied": bool,
    "input_normalization": str,
    "location": (str, type(None)),
    "model_name": (str, type(None)),
    "dtype": str,
    "metadata": dict,
}
# Only where they are needed: a reader that does not know them refuses the folder, rightly.
_OPTIONAL_CONFIG_FIELDS: dict[str, type | tuple[type, ...]] = {
    "n_outputs": int,
    "output_location": str,
    "group_sizes": list,
}


def check_config(config: Any, path: str | Path) -> dict[str, Any]:
    if not isinstance(config, dict):
        raise CheckpointError(f"{path}: expected a JSON object, found {type(config).__name__}.")
    if config.get("kind") != "autoencoder":
        raise CheckpointError(
            f"{path}: expected kind 'autoencoder', found {config.get('kind')!r}: this folder holds "
            "something else."
        )
    if config.get("format_version") != FORMAT_VERSION:
        raise CheckpointError(
            f"{path}: format_version {config.get('format_version')!r} cannot be read; this version "
            f"of neuron_explainer reads {FORMAT_VERSION}."
        )
    known = _CONFIG_FIELDS | _OPTIONAL_CONFIG_FIELDS
    problems = [f"unknown field {key!r}" for key in config if key not in known]
    for key, kind in known.items():
        if key not in config:
            if key in _CONFIG_FIELDS:
                problems.append(f"missing field {key!r}")
        elif not isinstance(config[key], kind):
            problems.append(f"{key}: found {config[key]!r}")
    if not problems:
        problems = _check_values(config)
    if problems:
        raise CheckpointError(f"{path}: {'; '.join(problems)}.")
    return config


def _check_values(config: dict[str, Any]) -> list[str]:
    problems = []
    if not isinstance(config["activation"].get("name"), str):
        problems.append(f"activation: expected a 'name', found {config['activation']!r}")
    if config["input_normalization"] not in NORMALIZATIONS:
        problems.append(unknown_normalization(config["input_normalization"]))
    for key in ("location", "output_location"):
        if config.get(key) is not None:
            try:
                ActivationLocation.parse(config[key])
            except LocationError as error:
                problems.append(str(error))
    return problems


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
