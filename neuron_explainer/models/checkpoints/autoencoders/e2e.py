"""Apollo's end-to-end dictionaries: a torch state dict, of one or of several places.

    encoder.0.weight [l, n]   encoder.0.bias [l]   decoder.weight [n, l]   decoder.bias [n]

    latents = relu(We x + be),   recons = latents · (Wd with columns of norm 1)ᵀ + bd

The decoder is normalised whenever it is applied, and is so once and for all on reading. A file of a
whole run has these keys once a place, after ``blocks-6-hook_resid_pre.`` or the like: state the
location that is wanted.

As read in e2e_sae 2.1.1: ``models/sparsifiers.py``, ``models/transformers.py``.
"""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch.nn.functional as F

from neuron_explainer.errors import CheckpointError
from neuron_explainer.models.checkpoints.autoencoders.common import (
    LoadedAutoencoder,
    Stated,
    at_least_float32,
    check_tensors,
    location_of,
    matrix_shape,
    settle,
    settle_location,
)
from neuron_explainer.models.locations import ActivationLocation

_MARK = "encoder.0.weight"
_KEY = re.compile(r"((?:.*\.)?)encoder\.0\.(?:weight|bias)")


def places(content: Mapping[str, Any]) -> list[str]:
    """The prefixes under which the content of a torch file has dictionaries of this format."""
    found = [_KEY.fullmatch(key) for key in content if isinstance(key, str)]
    return list(dict.fromkeys(match[1] for match in found if match))


def read_e2e(where: str | Path, content: Mapping[str, Any], stated: Stated) -> LoadedAutoencoder:
    """From the content of the torch file ``where``."""
    prefix, location = _choose(where, content, stated)
    tensors = {k.removeprefix(prefix): v for k, v in content.items() if k.startswith(prefix)}
    n_latents, n_inputs = matrix_shape(where, tensors, _MARK)
    check_tensors(
        where,
        tensors,
        {
            _MARK: (n_latents, n_inputs),
            "encoder.0.bias": (n_latents,),
            "decoder.weight": (n_inputs, n_latents),
            "decoder.bias": (n_inputs,),
        },
    )
    state: dict[str, Any] = {
        "encoder.weight": tensors[_MARK],
        "latent_bias": tensors["encoder.0.bias"],
        "decoder.weight": F.normalize(at_least_float32(tensors["decoder.weight"]), dim=0),
        "pre_bias": tensors["decoder.bias"].new_zeros(n_inputs),
        "post_bias": tensors["decoder.bias"],
        "activation": "ReLU",
        "activation_state_dict": {},
    }
    return LoadedAutoencoder(
        state,
        settle(
            where, "this format", "none", stated.get("input_normalization"), "input_normalization"
        ),
        location,
        metadata={"format": "e2e", "place": prefix.rstrip(".")},
    )


def _choose(
    where: str | Path, content: Mapping[str, Any], stated: Stated
) -> tuple[str, ActivationLocation | None]:
    """The prefix that is meant, and the location it names."""
    found = {prefix: _location(prefix) for prefix in places(content)}
    given = stated.get("location")
    if len(found) == 1:
        prefix, location = next(iter(found.items()))
        return prefix, settle_location(where, location, given)
    listed = ", ".join(prefix.rstrip(".") for prefix in found)
    if given is None:
        raise CheckpointError(
            f"{where}: holds {len(found)} dictionaries ({listed}); which one is wanted? Give it: "
            "`Autoencoder.load(source, location=…)`."
        )
    wanted = ActivationLocation.parse(given)
    for prefix, location in found.items():
        if location == wanted:
            return prefix, location
    raise CheckpointError(f"{where}: expected a dictionary of {wanted}, found {listed}.")


def _location(prefix: str) -> ActivationLocation | None:
    name = prefix.rstrip(".").rpartition(".")[2]
    return location_of(name.replace("-", "."))
