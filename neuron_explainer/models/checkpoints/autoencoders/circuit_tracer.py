"""circuit-tracer: a folder of transcoders with ``config.yaml``; one file is one layer.

per layer: ``layer_3.safetensors``

    W_enc [l, n]   b_enc [l]   W_dec [l, n]   b_dec [n]   activation_function.threshold [l]   W_skip [n, n]

cross-layer: ``W_enc_3.safetensors`` and ``W_dec_3.safetensors``

    W_enc_3 [l, n]   b_enc_3 [l]   b_dec_3 [n]   threshold_3 [l]       W_dec_3 [l, layers, n]

    latents = relu(h), or h where h > threshold, h = W_enc x + b_enc
    recons  = latents W_dec + b_dec + W_skip x

Nothing is subtracted from the input. A layer of a cross-layer transcoder is read as a transcoder to its
own layer and all layers behind it: its output is the contributions to them side by side, ``[layers · n]``,
to be added to those of other layers' latents. ``metadata["output_layers"]`` names them.

As read in circuit-tracer 0.5.0: ``transcoder/*.py``, ``utils/hf_utils.py``.
"""

import re
from pathlib import Path
from typing import Any

from torch import Tensor

from neuron_explainer import files
from neuron_explainer.errors import CheckpointError
from neuron_explainer.models.checkpoints.autoencoders.common import (
    check_layout,
    encoder_by_latent,
    location_of,
    parameters,
    read_choice,
    side_by_side,
)
from neuron_explainer.models.checkpoints.autoencoders.format import (
    Content,
    Format,
    LoadedAutoencoder,
    Source,
    Stated,
    loaded,
    read_content,
)

CONFIG_FILE = "config.yaml"
_THRESHOLD = "activation_function.threshold"
_CROSS_LAYER = re.compile(r"W_enc_(\d+)")
_FILE = re.compile(r"layer_(\d+)\.safetensors")


def read(source: Source, stated: Stated) -> LoadedAutoencoder:
    """Read the file of one layer."""
    where = source.path
    if source.content is None:
        raise CheckpointError(
            f"{where}: a folder of circuit-tracer holds the transcoders of all layers; give the file of "
            "one: layer_3.safetensors or, of a cross-layer transcoder, W_enc_3.safetensors."
        )
    config = _config(source)
    layer = _layer_of_keys(source.content)
    more: dict[str, Any] = {}
    if layer is None:
        named = _FILE.fullmatch(str(where).rpartition("/")[2])
        layer = int(named[1]) if named else None
        state = _per_layer(where, source.content)
        output = _location(config, "feature_output_hook", layer)
    else:
        state, more = _cross_layer(source, source.content, layer)
        output = None
    return loaded(
        where,
        stated,
        state,
        location=_location(config, "feature_input_hook", layer),
        output_location=output,
        model_name=config.get("model_name"),
        metadata={"format": "circuit_tracer", "config": config, **more},
    )


def _per_layer(where: str | Path, tensors: Content) -> dict[str, Any]:
    layout = "W_enc [l, n]  W_dec [l, n]  b_enc [l]  b_dec [n]  W_skip [n, n]?"
    check_layout(where, tensors, f"{layout}  {_THRESHOLD} [l]?")
    state = parameters(
        tensors["W_enc"],
        tensors["W_dec"].T,
        tensors["b_enc"],
        post_bias=tensors["b_dec"],
        is_transcoder=True,
        **_nonlinearity(where, tensors.get(_THRESHOLD)),
    )
    if "W_skip" in tensors:
        state["skip.weight"] = tensors["W_skip"]
    return state


def _cross_layer(
    source: Source, content: Content, layer: int
) -> tuple[dict[str, Any], dict[str, Any]]:
    """The state dict of one layer, and the layers that it writes to for the metadata."""
    path = source.beside(f"W_dec_{layer}.safetensors")
    tensors = {**content, **read_content(files.fetch(path), path)}
    encoder, decoder = f"W_enc_{layer}", f"W_dec_{layer}"
    weight = tensors.get(decoder)
    n_layers = weight.shape[1] if isinstance(weight, Tensor) and weight.ndim == 3 else 1
    layout = f"{encoder} [l, n]  {decoder} [l, {n_layers}, n]  b_enc_{layer} [l]  b_dec_{layer} [n]"
    check_layout(source.path, tensors, f"{layout}  threshold_{layer} [l]?")
    wide, bias, _ = side_by_side(tensors[decoder], tensors[f"b_dec_{layer}"], None)
    state = parameters(
        tensors[encoder],
        wide.T,
        tensors[f"b_enc_{layer}"],
        post_bias=bias,
        is_transcoder=True,
        **_nonlinearity(source.path, tensors.get(f"threshold_{layer}")),
    )
    return state, {"output_layers": list(range(layer, layer + n_layers))}


def _nonlinearity(where: str | Path, threshold: Tensor | None) -> dict[str, Any]:
    if threshold is None:
        return {"nonlinearity": "ReLU"}
    if (threshold < 0).any():  # its JumpReLU has no ReLU inside: it would keep negative latents
        raise CheckpointError(
            f"{where}: expected thresholds >= 0, found {float(threshold.min())}: with it latents could "
            "be negative."
        )
    return {"nonlinearity": "JumpReLU", "threshold": threshold}


def _layer_of_keys(content: Content) -> int | None:
    found = [match[1] for key in content if (match := _CROSS_LAYER.fullmatch(str(key)))]
    return int(found[0]) if found else None


def _location(config: dict[str, str], name: str, layer: int | None) -> Any:
    return None if layer is None else location_of(f"blocks.{layer}.{config.get(name)}")


def _config(source: Source) -> dict[str, str]:
    """The fields of ``config.yaml`` that are plain text; none if there is no such file."""
    path = source.beside(CONFIG_FILE)
    if not files.exists(path):
        return {}
    text = Path(files.fetch(path)).read_text("utf-8", errors="replace")
    found = re.findall(r"^(\w+): *['\"]?([^'\"#\n\[{|>&]+?)['\"]? *(?:#.*)?$", text, re.MULTILINE)
    config = dict(found)
    read_choice(
        path, config, "model_kind", ("transcoder_set", "cross_layer_transcoder"), "transcoder_set"
    )
    read_choice(path, config, "activation", ("relu", "jump_relu", "jumprelu"), "relu")
    return config


def holds(content: Content) -> bool:
    """Whether a safetensors file is one layer of such a folder."""
    return (
        _layer_of_keys(content) is not None
        or _THRESHOLD in content
        or encoder_by_latent(content)  # SAELens's encoder is the other way round
    )


CIRCUIT_TRACER = Format(
    name="circuit_tracer",
    layout=f"{CONFIG_FILE} and layer_0.safetensors or W_enc_0.safetensors, … (circuit-tracer; give the "
    "file of one layer)",
    read=read,
    states=frozenset({"output_location"}),
    marks=(CONFIG_FILE, "layer_*.safetensors", "W_enc_*.safetensors"),
    holds={"safetensors": holds},
)
