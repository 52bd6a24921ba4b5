"""Gemma Scope: ``params.npz``, a JumpReLU dictionary.

    W_enc [n, l]   b_enc [l]   W_dec [l, n]   b_dec [n]   threshold [l]

    latents = relu(h) where h > threshold, h = x W_enc + b_enc,   recons = latents W_dec + b_dec

Nothing is subtracted from the input. The file does not say where its inputs come from, nor whether it
is a transcoder: state ``location`` and, for a transcoder, ``output_location``. Those of the embedding
are for inputs times a factor that only the name of their folder tells: where the place is not stated,
or is the embedding, ``norm_factor`` has to be stated (1.0 for all others).

Lieberum et al. 2024, "Gemma Scope", section 2, and its tutorial.
"""

from pathlib import Path
from typing import Any

from neuron_explainer.errors import CheckpointError
from neuron_explainer.models.checkpoints.autoencoders.common import (
    check_factor,
    check_layout,
    fold_norm_factor,
    parameters,
    refuse_scaled_latents,
)
from neuron_explainer.models.checkpoints.autoencoders.format import (
    Format,
    LoadedAutoencoder,
    Source,
    Stated,
    is_always,
    loaded,
)
from neuron_explainer.models.locations import ActivationLocation

WEIGHTS_FILE = "params.npz"


def read(source: Source, stated: Stated) -> LoadedAutoencoder:
    """Read the arrays of a file or folder."""
    where, content = source.weights(WEIGHTS_FILE)
    tensors = refuse_scaled_latents(where, content)
    layout = "W_enc [n, l]  b_enc [l]  W_dec [l, o]  b_dec [o]  threshold [l]"
    sizes = check_layout(where, tensors, layout)
    state = parameters(
        tensors["W_enc"].T,
        tensors["W_dec"].T,
        tensors["b_enc"],
        post_bias=tensors["b_dec"],
        nonlinearity="JumpReLU",
        threshold=tensors["threshold"],
        is_transcoder=stated.get("output_location") is not None or sizes["o"] != sizes["n"],
    )
    found = loaded(where, stated, state, metadata={"format": "gemma_scope"})
    _apply_norm_factor(where, found.state_dict, found.location, stated.get("norm_factor"))
    return found


def _apply_norm_factor(
    where: str | Path,
    state: dict[str, Any],
    location: ActivationLocation | None,
    factor: float | None,
) -> None:
    """Fold a stated factor in; ask for it where numbers may depend on it."""
    if factor is not None:
        fold_norm_factor(state, check_factor("norm_factor", factor))
    elif location is None or location.path == "resid.post_emb":
        place = "unknown" if location is None else str(location)
        raise CheckpointError(
            f"{where}: inputs of Gemma Scope's embedding autoencoders are scaled, which the file does "
            f"not say; expected location=… (not the embedding) or norm_factor=… (1.0 if inputs are not "
            f"scaled) as an argument, found location {place} and no norm_factor."
        )


GEMMA_SCOPE = Format(
    name="gemma_scope",
    layout=f"{WEIGHTS_FILE} (Gemma Scope)",
    read=read,
    states=frozenset({"output_location", "norm_factor"}),
    marks=(WEIGHTS_FILE,),
    holds={"npz": is_always},
)
