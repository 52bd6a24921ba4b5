"""Gemma Scope 2: ``config.json`` and ``params.safetensors``, JumpReLU autoencoders and transcoders.

    w_enc [n, l]   b_enc [l]   w_dec [l, o]   b_dec [o]   threshold [l]
    affine_skip_connection [n, o] (transcoders with a skip)
    w_dec [l, layers, n], b_dec [n] of the own layer (one layer of a cross-layer transcoder)

    latents = relu(h) where h > threshold, h = x w_enc + b_enc,   recons = latents w_dec + b_dec

Nothing is subtracted from the input. A layer of a cross-layer transcoder is read as a transcoder to its
own layer and all layers behind it: its output is the contributions to them side by side, ``[layers · n]``,
to be added to those of other layers' latents. ``metadata["output_layers"]`` names them.

As read in sae-lens 6.54.12 and circuit-tracer 0.5.0.
"""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from neuron_explainer.errors import CheckpointError
from neuron_explainer.models.checkpoints.autoencoders.common import (
    check_layout,
    location_of,
    parameters,
    read_choice,
    read_text,
    side_by_side,
)
from neuron_explainer.models.checkpoints.autoencoders.format import (
    Content,
    Format,
    LoadedAutoencoder,
    Source,
    Stated,
    loaded,
)
from neuron_explainer.models.locations import ActivationLocation

CONFIG_FILE, WEIGHTS_FILE = "config.json", "params.safetensors"
_LAYER = re.compile(r"model\.layers\.(\d+)\.(output|self_attn\.o_proj\.input)")


def read(source: Source, stated: Stated) -> LoadedAutoencoder:
    """Read a folder, or its file of weights."""
    where, tensors = source.weights(WEIGHTS_FILE)
    config = source.json_if_any(CONFIG_FILE) or {}
    if config:
        read_choice(f"{where}: {CONFIG_FILE}", config, "architecture", ("jump_relu",))
    check_layout(where, tensors, _layout(tensors, config))
    weight, bias, skip = (tensors.get(n) for n in ("w_dec", "b_dec", "affine_skip_connection"))
    metadata: dict[str, Any] = {"format": "gemma_scope_2", "config": dict(config)}
    if tensors["w_dec"].ndim == 3:
        own, n_layers = _own_layer(where, stated), tensors["w_dec"].shape[1]
        if own >= n_layers:
            raise CheckpointError(f"{where}: expected a layer below {n_layers}, found {own}.")
        metadata["output_layers"] = list(range(own, n_layers))
        weight, bias, skip = side_by_side(tensors["w_dec"][:, own:], tensors["b_dec"], skip)
    assert weight is not None
    state = parameters(
        tensors["w_enc"].T,
        weight.T,
        tensors["b_enc"],
        post_bias=bias,
        nonlinearity="JumpReLU",
        threshold=tensors["threshold"],
        is_transcoder=(
            skip is not None
            or len(tensors["w_enc"]) != weight.shape[-1]
            or "output_layers" in metadata
            or config.get("hf_hook_point_out") is not None
            or stated.get("output_location") is not None
        ),
    )
    if skip is not None:
        state["skip.weight"] = skip.T
    return loaded(
        where,
        stated,
        state,
        location=location_of(_hook_name(config.get("hf_hook_point_in"))),
        model_name=read_text(config, "model_name"),
        metadata=metadata,
    )


def _layout(tensors: Content, config: Mapping[str, Any]) -> str:
    decoder = tensors.get("w_dec")
    is_cross_layer = isinstance(decoder, Tensor) and decoder.ndim == 3
    layers = f"{decoder.shape[1]}, " if isinstance(decoder, Tensor) and is_cross_layer else ""
    layout = f"w_enc [n, l]  b_enc [l]  w_dec [l, {layers}o]  b_dec [o]  threshold [l]"
    if "affine_skip_connection" in tensors or config.get("affine_connection") is True:
        layout += "  affine_skip_connection [n, o]"
    return layout


def _own_layer(where: str | Path, stated: Stated) -> int:
    """The layer that a part of a cross-layer transcoder reads from, as the caller states it."""
    given = stated.get("location")
    layer = None if given is None else ActivationLocation.parse(given).layer
    if layer is None:
        raise CheckpointError(
            f"{where}: one layer of a cross-layer transcoder does not say which layer it is: give the "
            "location of its input with the layer, `Autoencoder.load(source, "
            "location='3/resid.torso.post_ln_mlp')`."
        )
    return layer


def _hook_name(name: Any) -> str | None:
    """The location that a module of Hugging Face's Gemma 3 means; None if it has no name here."""
    match = _LAYER.fullmatch(name) if isinstance(name, str) else None
    if match is None:
        return None
    path = "resid.torso.post_mlp" if match[2] == "output" else "attn.v_out"
    return f"{match[1]}/{path}"


GEMMA_SCOPE_2 = Format(
    name="gemma_scope_2",
    layout=f"{CONFIG_FILE} and {WEIGHTS_FILE} (Gemma Scope 2)",
    read=read,
    states=frozenset({"output_location"}),
    marks=(WEIGHTS_FILE,),
    configs={CONFIG_FILE: lambda config: "hf_hook_point_in" in config},
    holds={"safetensors": lambda content: bool({"w_enc", "w_dec"} & set(content))},
)
