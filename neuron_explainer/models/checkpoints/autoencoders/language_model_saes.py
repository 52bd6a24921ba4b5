"""gpt2-dictionary, the early Language-Model-SAEs of OpenMOSS: a torch file ``{"sae": {…}, …}``.

    encoder [n, l]   encoder_bias [l]   decoder [l, n]   decoder_bias [n] (if it has one)
    encoder_glu [n, l], encoder_bias_glu [l] (GLU)       feature_act_mask, feature_act_scale [l]

    x̂ = x · √n / ‖x‖  (norm_activation "token-wise"),   minus decoder_bias
    h = x̂ E + b       (GLU: · sigmoid(x̂ Eg + bg))
    f = mask · scale · relu(h),   recons = (f D + decoder_bias) / (√n / ‖x‖)

Mask and scale are folded into the encoder: scale · relu(h) = relu(scale · h). The normalisation is
not in the file but in ``hyperparams.json``, looked for beside it and one folder further out; where
there is none it has to be stated (``"rms"`` for token-wise).

As read in OpenMOSS/gpt2-dictionary at bd7a871.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from neuron_explainer.errors import CheckpointError
from neuron_explainer.models.checkpoints.autoencoders.common import (
    LoadedAutoencoder,
    Stated,
    check_tensors,
    fold_latent_scale,
    location_of,
    matrix_shape,
    read_flag,
    read_text,
    settle,
    settle_location,
)
from neuron_explainer.models.checkpoints.autoencoders.state import InputNormalization
from neuron_explainer.models.checkpoints.problems import Shape

HYPERPARAMETERS_FILE, MODEL_FILE = "hyperparams.json", "lm_config.json"

_NORMALIZATIONS: dict[Any, InputNormalization] = {"token-wise": "rms", "none": "none"}


def has_keys(content: Mapping[str, Any]) -> bool:
    """Whether the content of a torch file is of this format, be it incomplete."""
    inner = content.get("sae")
    return (
        isinstance(inner, Mapping)
        or "encoder_bias" in content
        or {"encoder", "decoder"} <= set(content)
    )


def read_language_model_saes(
    where: str | Path,
    content: Mapping[str, Any],
    hyperparameters: Mapping[str, Any] | None,
    model: Mapping[str, Any] | None,
    stated: Stated,
) -> LoadedAutoencoder:
    """From the content of the torch file ``where`` and of the two JSON files, if any."""
    tensors = content.get("sae", content)
    check_tensors(where, tensors, _shapes(where, tensors))
    _check_hyperparameters(where, hyperparameters or {}, tensors)
    n_inputs = tensors["encoder"].shape[0]
    bias = tensors.get("decoder_bias", tensors["encoder"].new_zeros(n_inputs))
    state: dict[str, Any] = {
        "encoder.weight": tensors["encoder"].T,
        "decoder.weight": tensors["decoder"].T,
        "latent_bias": tensors["encoder_bias"],
        "pre_bias": bias,
        "activation": "ReLU",
        "activation_state_dict": {},
    }
    _fold_scale(where, state, tensors)
    if "encoder_glu" in tensors:
        state["glu.weight"] = tensors["encoder_glu"].T
        state["glu.bias"] = tensors["encoder_bias_glu"]
    found = location_of((model or {}).get("hook_point"))
    return LoadedAutoencoder(
        state,
        _normalization(where, hyperparameters, stated),
        settle_location(where, found, stated.get("location")),
        model_name=read_text(model or {}, "model_name"),
        metadata={
            "format": "language_model_saes",
            "hyperparams": dict(hyperparameters or {}),
            "lm_config": dict(model or {}),
        },
    )


def _shapes(where: str | Path, tensors: Mapping[str, Any]) -> dict[str, Shape]:
    n_inputs, n_latents = matrix_shape(where, tensors, "encoder")
    shapes: dict[str, Shape] = {
        "encoder": (n_inputs, n_latents),
        "encoder_bias": (n_latents,),
        "decoder": (n_latents, n_inputs),
    }
    if "decoder_bias" in tensors:
        shapes["decoder_bias"] = (n_inputs,)
    if "encoder_glu" in tensors or "encoder_bias_glu" in tensors:
        shapes |= {"encoder_glu": (n_inputs, n_latents), "encoder_bias_glu": (n_latents,)}
    for name in ("feature_act_mask", "feature_act_scale"):
        if name in tensors:
            shapes[name] = (n_latents,)
    return shapes


def _check_hyperparameters(
    where: str | Path, fields: Mapping[str, Any], tensors: Mapping[str, Tensor]
) -> None:
    n_inputs, n_latents = tensors["encoder"].shape
    facts: dict[str, Any] = {"d_model": n_inputs, "d_sae": n_latents}
    for name, key in (("use_decoder_bias", "decoder_bias"), ("use_glu_encoder", "encoder_glu")):
        if name in fields:
            read_flag(f"{where}: {HYPERPARAMETERS_FILE}", fields, name, False)
            facts[name] = key in tensors
    wrong = [
        f"{name}: expected {value!r} as in the tensors, found {fields[name]!r}"
        for name, value in facts.items()
        if fields.get(name) is not None and fields[name] != value
    ]
    if wrong:
        raise CheckpointError(f"{where}: {HYPERPARAMETERS_FILE}: {'; '.join(wrong)}.")


def _fold_scale(where: str | Path, state: dict[str, Any], tensors: Mapping[str, Tensor]) -> None:
    for name in ("feature_act_mask", "feature_act_scale"):
        if name not in tensors or bool((tensors[name] == 1).all()):
            continue
        if (tensors[name] < 0).any():
            raise CheckpointError(
                f"{where}: {name}: expected numbers >= 0, found {float(tensors[name].min())}."
            )
        fold_latent_scale(state, tensors[name], decoder_too=False)


def _normalization(
    where: str | Path, hyperparameters: Mapping[str, Any] | None, stated: Stated
) -> InputNormalization:
    found = None
    if hyperparameters is not None and "norm_activation" in hyperparameters:
        value = hyperparameters["norm_activation"]
        if value not in _NORMALIZATIONS:
            why = ": with it a row's latents depend on its batch" if value == "batch-wise" else ""
            raise CheckpointError(
                f"{where}: {HYPERPARAMETERS_FILE}: norm_activation: expected "
                f"{' or '.join(map(repr, _NORMALIZATIONS))}, found {value!r}{why}."
            )
        found = _NORMALIZATIONS[value]
    given = stated.get("input_normalization")
    settled: InputNormalization | None = settle(
        where, HYPERPARAMETERS_FILE, found, given, "input_normalization"
    )
    if settled is None:
        raise CheckpointError(
            f"{where}: input_normalization: the file does not say it, and there is no "
            f"{HYPERPARAMETERS_FILE} beside it that does. Give it: `Autoencoder.load(source, "
            "input_normalization='rms')` for norm_activation 'token-wise', or 'none'."
        )
    return settled
