"""Gemma Scope: ``params.npz``, a JumpReLU dictionary.

    W_enc [n, l]   b_enc [l]   W_dec [l, n]   b_dec [n]   threshold [l]

    latents = relu(h) where h > threshold, h = x W_enc + b_enc,   recons = latents W_dec + b_dec

Nothing is taken off the input. The file does not say where its inputs come from, nor whether it is a
transcoder: state ``location`` and, for a transcoder, ``output_location``.

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
    check_tensors,
    matrix_shape,
    settle,
    settle_location,
)

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
    return LoadedAutoencoder(
        state,
        settle(
            where, "this format", "none", stated.get("input_normalization"), "input_normalization"
        ),
        settle_location(where, None, stated.get("location")),
        settle_location(where, None, stated.get("output_location")),
        metadata={"format": "gemma_scope"},
    )
