"""TransformerVis: one ``.npy`` matrix Φ ``[n, l]``, a dictionary for non-negative sparse codes.

    latents = argmin over a >= 0 of ½ ‖x - Φ a‖² + penalty · Σ a,   recons = Φ latents

The penalty (``reg`` in its programs) has to be the one of training, and is not in the file. Every
column of Φ has norm 1: that tells which way round the matrix is.

Yun et al. 2021; as read in zeyuyun1/TransformerVis at f461073 and credwood/SparseCodingGPT at 97b84a7.
"""

from pathlib import Path
from typing import Any

from torch import Tensor

from neuron_explainer.errors import CheckpointError
from neuron_explainer.models.autoencoders.fista import MAX_ITERATIONS, TOLERANCE
from neuron_explainer.models.checkpoints.autoencoders.format import (
    Format,
    LoadedAutoencoder,
    Source,
    Stated,
    is_always,
    loaded,
)
from neuron_explainer.models.checkpoints.problems import tensor_problems


def read(source: Source, stated: Stated) -> LoadedAutoencoder:
    """Read the matrix in a file."""
    where, content = source.weights("")
    dictionary = content[""]
    _check(where, dictionary)
    if stated.get("penalty") is None:
        raise CheckpointError(
            f"{where}: penalty: the file does not say it. Give the one of training (reg): "
            "`Autoencoder.load(source, penalty=0.3)`, in the shell `--penalty 0.3`."
        )
    n_inputs, n_latents = dictionary.shape
    state = {
        "encoder.weight": dictionary.T,
        "latent_bias": dictionary.new_zeros(n_latents),
        "pre_bias": dictionary.new_zeros(n_inputs),
        "tied": True,
        "activation": "Fista",
        "activation_state_dict": {
            "penalty": stated["penalty"],
            "max_iterations": stated.get("max_iterations", MAX_ITERATIONS),
            "tolerance": stated.get("tolerance", TOLERANCE),
        },
    }
    return loaded(where, stated, state, metadata={"format": "transformer_vis"})


def _check(where: str | Path, dictionary: Tensor) -> None:
    if dictionary.ndim != 2 or 0 in dictionary.shape:
        raise CheckpointError(
            f"{where}: expected a matrix [n, l], found shape {list(dictionary.shape)}."
        )
    for _, problem in tensor_problems({"": dictionary}, {"": tuple(dictionary.shape)}):
        raise CheckpointError(f"{where}: {problem}.")
    off: Any = {axis: float((dictionary.norm(dim=axis) - 1).abs().max()) for axis in (0, 1)}
    if off[0] > 1e-3:
        turned = "; its rows have: it is transposed" if off[1] <= 1e-3 else ""
        raise CheckpointError(
            f"{where}: expected columns of norm 1, found norms that differ by up to {off[0]:.3g}"
            f"{turned}."
        )


TRANSFORMER_VIS = Format(
    name="transformer_vis",
    layout="a .npy matrix (TransformerVis)",
    read=read,
    states=frozenset({"penalty", "max_iterations", "tolerance"}),
    holds={"npy": is_always},
)
