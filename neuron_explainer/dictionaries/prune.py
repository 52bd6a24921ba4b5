"""Remove the latents of an autoencoder that do almost nothing.

A latent is kept if it fires on more than a given share of tokens, exceeds a bound on at least one token, and
has a decoder direction of nearly full length. These are the criteria and bounds of He et al. 2024
("Dictionary learning improves patch-free circuit discovery in mechanistic interpretability"). Their bounds on
activation and length suit their autoencoders: inputs have norm √n (``input_normalization="rms"``), and
decoder directions have length 1 at most. Autoencoders with other units need other bounds.

Shape legend: ``n`` inputs, ``l`` latents, ``…`` any leading axes.
"""

from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from neuron_explainer.errors import InputError
from neuron_explainer.evaluation.latent_activity import LatentActivity
from neuron_explainer.evaluation.pieces import Activations
from neuron_explainer.models.autoencoder import Autoencoder
from neuron_explainer.models.checkpoints.autoencoders.state import select_latents


@dataclass(frozen=True)
class Pruning:
    """What was removed, and why."""

    autoencoder: Autoencoder
    """The pruned autoencoder."""
    kept: Tensor = field(repr=False)
    """``[l]`` bool, for the latents of the original autoencoder."""
    n_kept: int
    n_tokens: int
    """Tokens on which activity was measured."""
    too_rare: int
    """Latents that fired too rarely. A latent may fail several criteria."""
    too_weak: int
    """Latents that were never large enough."""
    too_short: int
    """Latents with too short a decoder direction."""


def prune(
    autoencoder: Autoencoder,
    batches: Activations | LatentActivity,
    *,
    min_frequency: float = 1e-6,
    min_max_activation: float = 1.0,
    min_decoder_norm: float = 0.99,
    keep_indices: bool = True,
) -> Pruning:
    """Measure latents on activations and remove those that do almost nothing.

    Args:
        autoencoder: not changed.
        batches: activations as the model has them ``[…, n]``, or pairs with targets; or the activity
            that was measured on such before. A frequency of 1e-6 needs about ten million tokens to be
            told from zero.
        min_frequency: a latent is kept if it is active on more than this share of the tokens,
        min_max_activation: and larger than this on one of them, in the autoencoder's own units,
        min_decoder_norm: and if its decoder direction is at least this long.
        keep_indices: if True, all latents keep their indices, and the weights of removed latents are zero,
            so they are never active; :func:`~neuron_explainer.models.autoencoders.pruned.omit_dead_latents`
            takes them out of memory. If False, the result is a smaller autoencoder with new indices.
    """
    if isinstance(batches, LatentActivity):
        activity = batches
    else:
        inputs = (batch[0] if isinstance(batch, tuple) else batch for batch in batches)
        activity = LatentActivity.of(autoencoder, inputs)
    if not activity.n_tokens:
        raise InputError("pruning needs activations; no tokens were given.")
    norms = autoencoder.decoder.weight.detach().norm(dim=0).cpu()
    frequent = activity.fired > min_frequency * activity.n_tokens
    strong = activity.largest > min_max_activation
    long = norms >= min_decoder_norm
    kept = frequent & strong & long
    counts = {
        "n_kept": int(kept.sum()),
        "n_tokens": activity.n_tokens,
        "too_rare": int((~frequent).sum()),
        "too_weak": int((~strong).sum()),
        "too_short": int((~long).sum()),
    }
    if not kept.any():
        raise InputError(
            f"{autoencoder._name()}: no latent would be left: of {len(kept)}, {counts['too_rare']} fired "
            f"too rarely, {counts['too_weak']} were never above {min_max_activation} (largest: "
            f"{float(activity.largest.max()):.3g}), {counts['too_short']} have a decoder direction "
            f"shorter than {min_decoder_norm} (longest: {float(norms.max()):.3g}). Bounds are in the "
            "autoencoder's own units."
        )
    if keep_indices:
        state = _masked(autoencoder, kept)
    else:
        places = kept.nonzero().flatten().to(autoencoder.device)
        state = select_latents(autoencoder.state_dict(), places)
    facts = autoencoder.facts
    facts["metadata"] = {**autoencoder.metadata, "pruned": counts}
    pruned = Autoencoder.from_state_dict(state, **facts)
    return Pruning(autoencoder=pruned, kept=kept, **counts)


def _masked(autoencoder: Autoencoder, kept: Tensor) -> dict[str, Any]:
    """A state dict in which the weights of removed latents are zero, so that they are never active."""
    state = dict(autoencoder.state_dict())
    zero = (~kept).to(autoencoder.device)
    rows = ["latent_bias", "encoder.weight", "glu.weight", "glu.bias"]
    for key in [*rows, "latents_activation_frequency", "latents_mean_square"]:
        if key in state:
            state[key] = state[key].clone()
            state[key][zero] = 0
    if "decoder.weight" in state:
        state["decoder.weight"] = state["decoder.weight"].clone()
        state["decoder.weight"][:, zero] = 0
    fields = dict(state["activation_state_dict"])
    for key in autoencoder.nonlinearity.biases:  # they could let 0 pass
        fields[key] = fields[key].masked_fill(zero, 0)
    state["activation_state_dict"] = fields
    return state
