"""Llama Scope: JumpReLU autoencoders of OpenMOSS's Language-Model-SAEs.

Llama Scope: ``hyperparams.json`` and ``checkpoints/final.safetensors``
its distillation of R1: ``config.json`` and ``sae_weights.safetensors``

    encoder.weight [l, n]   encoder.bias [l]   decoder.weight [n, l]   decoder.bias [n]
    log_jumprelu_threshold [l] (R1)            dataset_average_activation_norm.HOOK [] (R1)

    h = We (c x) + be,   latents = h where h > threshold,   recons = (Wd latents + bd) / c'

c = √n / (average norm of the inputs), c' = √n / (that of the outputs); both are folded in. Llama Scope
has one threshold for all latents, in units of inputs that are not scaled: here it is ``c · threshold``,
as in SAELens, whose latents these are. Where decoder norms count in choosing latents
(``sparsity_include_decoder_norm``) they have to be 1, as they are in the releases.

As read in OpenMOSS/Language-Model-SAEs (``sae.py``) and in the loaders of sae-lens 6.54.12.
"""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from neuron_explainer.errors import CheckpointError
from neuron_explainer.models.checkpoints.autoencoders.common import (
    check_factor,
    check_layout,
    fold_norm_factor,
    location_of,
    matrix_shape,
    parameters,
    read_choice,
    read_flag,
    read_number,
    read_text,
)
from neuron_explainer.models.checkpoints.autoencoders.format import (
    Content,
    Format,
    LoadedAutoencoder,
    Source,
    Stated,
    loaded,
)

HYPERPARAMETERS_FILE, WEIGHTS_FILE = "hyperparams.json", "checkpoints/final.safetensors"
R1_CONFIG_FILE, R1_WEIGHTS_FILE = "config.json", "sae_weights.safetensors"
_NORM = "dataset_average_activation_norm"
_LOG_THRESHOLD = "log_jumprelu_threshold"


def read(source: Source, stated: Stated) -> LoadedAutoencoder:
    """Read a folder of Llama Scope."""
    where = f"{source.path}/{HYPERPARAMETERS_FILE}"
    config = source.json(HYPERPARAMETERS_FILE)
    _, tensors = source.weights(WEIGHTS_FILE)
    norms = config.get(_NORM)
    if not isinstance(norms, dict):
        raise CheckpointError(f"{where}: {_NORM}: expected an object, found {norms!r}.")
    factors = {
        side: math.sqrt(_width(source, tensors)) / read_number(f"{where}: {_NORM}", norms, side)
        for side in ("in", "out")
    }
    read_choice(where, config, "act_fn", ("jumprelu",), "jumprelu")
    threshold = read_number(where, config, "jump_relu_threshold") * factors["in"]
    return _loaded(source, stated, config, tensors, factors, threshold)


def read_r1(source: Source, stated: Stated) -> LoadedAutoencoder:
    """Read a folder of the distillation of R1."""
    where = f"{source.path}/{R1_CONFIG_FILE}"
    config = source.json(R1_CONFIG_FILE)
    _, content = source.weights(R1_WEIGHTS_FILE)
    norms = {name.removeprefix(f"{_NORM}."): content[name] for name in content if _NORM in name}
    tensors = {name: value for name, value in content.items() if _NORM not in name}
    factors = {}
    for side, key in (("in", "hook_point_in"), ("out", "hook_point_out")):
        norm = norms.get(str(config.get(key)), norms.get(side))
        if stated.get("norm_factor") is not None:
            factors[side] = check_factor("norm_factor", stated["norm_factor"])
        elif config.get("norm_activation") == "inference":
            factors[side] = 1.0
        elif norm is not None:
            found = {side: float(norm)}
            factors[side] = math.sqrt(_width(source, tensors)) / read_number(
                f"{where}: {_NORM}", found, side
            )
        else:
            raise CheckpointError(
                f"{where}: inputs were multiplied by one factor, which is not in this folder. Expected "
                "it as an argument, `Autoencoder.load(source, norm_factor=…)` (norm_scaling_factor in "
                "SAELens's list of releases)."
            )
    return _loaded(source, stated, config, tensors, factors, None)


def _width(source: Source, tensors: Content) -> int:
    return matrix_shape(source.path, tensors, "encoder.weight")[1]


def _loaded(
    source: Source,
    stated: Stated,
    config: Mapping[str, Any],
    tensors: Content,
    factors: Mapping[str, float],
    threshold: float | None,
) -> LoadedAutoencoder:
    """The autoencoder whose inputs and outputs are scaled by ``factors``; folded together.

    ``threshold`` is the one of all latents; None if each has its own, in the tensors.
    """
    where = source.path
    layout = "encoder.weight [l, n]  encoder.bias [l]  decoder.weight [n, l]  decoder.bias [n]"
    if threshold is None:
        layout += f"  {_LOG_THRESHOLD} [l]"
    n_latents = check_layout(where, tensors, layout)["l"]
    hook_in, hook_out = config.get("hook_point_in"), config.get("hook_point_out")
    is_transcoder = hook_out is not None and hook_out != hook_in
    _check_decoder_norms(where, config, tensors, is_transcoder)
    state = parameters(
        tensors["encoder.weight"],
        tensors["decoder.weight"],
        tensors["encoder.bias"],
        post_bias=tensors["decoder.bias"],
        nonlinearity="JumpReLU",
        threshold=(
            tensors[_LOG_THRESHOLD].float().exp()
            if threshold is None
            else torch.full((n_latents,), threshold)
        ),
        is_transcoder=is_transcoder,
    )
    encoder = {"encoder.weight": state.pop("encoder.weight")}
    fold_norm_factor(encoder, factors["in"])
    fold_norm_factor(state, factors["out"])
    return loaded(
        where,
        stated,
        state | encoder,
        location=location_of(hook_in),
        output_location=location_of(hook_out) if is_transcoder else None,
        model_name=read_text(config, "model_name"),
        metadata={"format": "llama_scope", "config": dict(config)},
    )


def _check_decoder_norms(
    where: str | Path, config: Mapping[str, Any], tensors: Content, is_transcoder: bool
) -> None:
    read_flag(str(where), config, "use_decoder_bias", True)
    if read_flag(str(where), config, "apply_decoder_bias_to_pre_encoder", False):
        raise CheckpointError(
            f"{where}: apply_decoder_bias_to_pre_encoder: expected false, found true."
        )
    if not read_flag(str(where), config, "sparsity_include_decoder_norm", False):
        return
    off = float((tensors["decoder.weight"].float().norm(dim=0) - 1).abs().max())
    if off > 0.02 or is_transcoder:  # stored in bfloat16 they are 1 to within a percent
        found = "a transcoder" if is_transcoder else f"norms that differ from 1 by up to {off:.3g}"
        raise CheckpointError(
            f"{where}: sparsity_include_decoder_norm: latents are chosen by their size times the norm "
            f"of their decoder; expected an autoencoder with decoder norms of 1, found {found}."
        )


LLAMA_SCOPE = Format(
    name="llama_scope",
    layout=f"{HYPERPARAMETERS_FILE} and {WEIGHTS_FILE} (Llama Scope)",
    read=read,
    configs={HYPERPARAMETERS_FILE: lambda config: "hook_point_in" in config},
)
LLAMA_SCOPE_R1 = Format(
    name="llama_scope_r1",
    layout=f"{R1_CONFIG_FILE} and {R1_WEIGHTS_FILE} (Llama Scope R1)",
    read=read_r1,
    states=frozenset({"norm_factor"}),
    marks=(R1_WEIGHTS_FILE,),  # SAELens's too: the config decides
    configs={
        R1_CONFIG_FILE: lambda config: (
            "hook_point_in" in config and config.get("sae_type", "sae") == "sae"
        )
    },
)
