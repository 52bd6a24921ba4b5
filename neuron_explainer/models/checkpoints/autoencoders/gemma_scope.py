"""Gemma Scope: ``params.npz``, a JumpReLU dictionary.

    W_enc [n, l]   b_enc [l]   W_dec [l, n]   b_dec [n]   threshold [l]

    latents = relu(h) where h > threshold, h = x W_enc + b_enc,   recons = latents W_dec + b_dec

Nothing is taken off the input. The file does not say where its inputs come from, nor whether it is a
transcoder: state ``location`` and, for a transcoder, ``output_location``. Those of the embedding are
for inputs times a factor that only the name of their folder tells: where the place is not stated, or
is the embedding, ``norm_factor`` has to be (1.0 for all others).

Lieberum et al. 2024, "Gemma Scope", section 2, and its tutorial.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from neuron_explainer.errors import CheckpointError
from neuron_explainer.models.checkpoints.autoencoders.common import (
    LoadedAutoencoder,
    Stated,
    check_factor,
    check_tensors,
    fold_norm_factor,
    matrix_shape,
    settle,
    settle_location,
)
from neuron_explainer.models.locations import ActivationLocation

WEIGHTS_FILE = "params.npz"


def read_gemma_scope(
    where: str | Path, tensors: Mapping[str, Tensor], stated: Stated
) -> LoadedAutoencoder:
    """From the arrays of the file ``where``."""
    tensors = dict(tensors)
    factor = tensors.pop("scaling_factor", None)
    if factor is not None and not torch.equal(factor, torch.ones_like(factor)):
        raise CheckpointError(
            f"{where}: scaling_factor: expected ones, found other values: latents scaled by "
            "fine-tuning cannot be applied."
        )
    n_inputs, n_latents = matrix_shape(where, tensors, "W_enc")
    # As wide as its bias: the output of a transcoder need not be as wide as its input.
    bias = tensors.get("b_dec")
    n_outputs = len(bias) if isinstance(bias, Tensor) and bias.ndim == 1 else n_inputs
    transcoder = stated.get("output_location") is not None or n_outputs != n_inputs
    check_tensors(
        where,
        tensors,
        {
            "W_enc": (n_inputs, n_latents),
            "b_enc": (n_latents,),
            "W_dec": (n_latents, n_outputs),
            "b_dec": (n_outputs,),
            "threshold": (n_latents,),
        },
    )
    state: dict[str, Any] = {
        "encoder.weight": tensors["W_enc"].T,
        "decoder.weight": tensors["W_dec"].T,
        "latent_bias": tensors["b_enc"],
        "pre_bias": tensors["b_enc"].new_zeros(n_inputs),
        "post_bias": tensors["b_dec"],
        "activation": "JumpReLU",
        "activation_state_dict": {"threshold": tensors["threshold"]},
    }
    if transcoder:
        state["n_outputs"] = n_outputs
    location = settle_location(where, None, stated.get("location"))
    _apply_norm_factor(where, state, location, stated.get("norm_factor"))
    return LoadedAutoencoder(
        state,
        settle(
            where, "this format", "none", stated.get("input_normalization"), "input_normalization"
        ),
        location,
        settle_location(where, None, stated.get("output_location")),
        metadata={"format": "gemma_scope"},
    )


def _apply_norm_factor(
    where: str | Path,
    state: dict[str, Any],
    location: ActivationLocation | None,
    factor: float | None,
) -> None:
    """Folds a stated factor in; asks for it where numbers may depend on it."""
    if factor is not None:
        fold_norm_factor(state, check_factor("norm_factor", factor))
    elif location is None or location.path == "resid.post_emb":
        place = "unknown" if location is None else str(location)
        raise CheckpointError(
            f"{where}: inputs of Gemma Scope's embedding autoencoders are scaled, which the file does "
            f"not say; expected location=… (not the embedding) or norm_factor=… (1.0 if inputs are not "
            f"scaled) as an argument, found location {place} and no norm_factor."
        )
