"""Our own format: a folder with ``config.json`` and ``autoencoder.safetensors``.

Written by :meth:`Autoencoder.save <neuron_explainer.models.autoencoder.Autoencoder.save>`. It says all
that applying an autoencoder takes; what a caller states may add to it (a layer, an unknown location)
and not contradict it.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from neuron_explainer.errors import CheckpointError
from neuron_explainer.models.checkpoints.autoencoders.common import (
    LoadedAutoencoder,
    Stated,
    settle,
    settle_location,
)
from neuron_explainer.models.checkpoints.autoencoders.state import check_config
from neuron_explainer.models.locations import ActivationLocation, LocationLike

CONFIG_FILE, WEIGHTS_FILE = "config.json", "autoencoder.safetensors"


def read_native(
    where: str | Path, config: Any, tensors: Mapping[str, Tensor], stated: Stated
) -> LoadedAutoencoder:
    """From the config and tensors of the folder ``where``."""
    fields = check_config(config, f"{where}/{CONFIG_FILE}")
    _check_sizes(where, fields, tensors)
    activation = dict(fields["activation"])
    state: dict[str, Any] = {
        **tensors,
        "activation": activation.pop("name"),
        "activation_state_dict": activation,
        "tied": fields["tied"],
        **{name: fields[name] for name in ("n_outputs", "group_sizes") if name in fields},
    }
    if stated.get("output_location") is not None and "n_outputs" not in fields:
        raise CheckpointError(f"{where}: {CONFIG_FILE} is of no transcoder: no output_location.")
    normalization = settle(
        where,
        CONFIG_FILE,
        fields["input_normalization"],
        stated.get("input_normalization"),
        "input_normalization",
    )
    return LoadedAutoencoder(
        state,
        normalization,
        settle_location(where, _location(fields["location"]), stated.get("location")),
        settle_location(
            where, _location(fields.get("output_location")), stated.get("output_location")
        ),
        fields["model_name"],
        fields["metadata"],
        statistics="all",
    )


def _location(text: LocationLike | None) -> ActivationLocation | None:
    return None if text is None else ActivationLocation.parse(text)


def _check_sizes(
    where: str | Path, fields: Mapping[str, Any], tensors: Mapping[str, Tensor]
) -> None:
    encoder = tensors.get("encoder.weight")
    if encoder is None:
        return  # what is missing is told with all else that is
    found = [list(encoder.shape), str(encoder.dtype).removeprefix("torch.")]
    said = [[fields["n_latents"], fields["n_inputs"]], fields["dtype"]]
    if found != said:
        raise CheckpointError(
            f"{where}/{WEIGHTS_FILE}: {CONFIG_FILE} says {said[0]} of {said[1]}, encoder.weight is "
            f"{found[0]} of {found[1]}."
        )
