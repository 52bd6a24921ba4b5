"""Leave out the latents of an autoencoder that do next to nothing.

A latent is kept if it fires on more than a share of tokens, is somewhere larger than a bound, and has
a decoder direction of nearly full length. These are the criteria and bounds of He et al. 2024
("Dictionary learning improves patch-free circuit discovery in mechanistic interpretability"); the
bounds on activation and length are of their autoencoders: latents in units in which an input has norm
√n (``input_normalization="rms"``), decoder directions held to length 1 at most. With other units, say
other bounds.

Shape legend: ``n`` inputs, ``l`` latents, ``…`` any leading axes.
"""

from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from neuron_explainer.errors import InputError
from neuron_explainer.evaluation.evaluate import Activations
from neuron_explainer.evaluation.latent_activity import LatentActivity
from neuron_explainer.models.autoencoder import Autoencoder
from neuron_explainer.models.checkpoints.autoencoders.state import select_latents


@dataclass(frozen=True)
class Pruning:
    """What was left out, and why."""

    autoencoder: Autoencoder
    """The result."""
    kept: Tensor = field(repr=False)
    """``[l]`` bool, over the latents of the autoencoder that was given."""
    n_kept: int
    n_tokens: int
    """Tokens on which activity was measured."""
    too_rare: int
    """Latents that fired too seldom; one may fail by several criteria."""
    too_weak: int
    """Latents that were never large enough."""
    too_short: int
    """Latents with too short a decoder direction."""


def prune(
    autoencoder: Autoencoder,
    batches: Activations,
    *,
    min_frequency: float = 1e-6,
    min_max_activation: float = 1.0,
    min_decoder_norm: float = 0.99,
    keep_indices: bool = True,
) -> Pruning:
    """Measure latents on activations and leave out those that do next to nothing.

    Args:
        autoencoder: left as it is.
        batches: activations as the model has them ``[…, n]``, pairs or not; ten million tokens, if a
            frequency of 1e-6 is to be told from none.
        min_frequency: a latent is kept if it is active on more than this share of the tokens,
        min_max_activation: and larger than this on one of them, in the autoencoder's own units,
        min_decoder_norm: and if its decoder direction is at least this long.
        keep_indices: if True, the result has all latents where they were, those left out with weights
            of zero and zero for ever; :func:`~neuron_explainer.models.autoencoders.pruned.omit_dead_latents`
            takes them out of memory. If False, it is a smaller autoencoder in which the latents that
            are left have moved together.
    """
    inputs = (batch[0] if isinstance(batch, tuple) else batch for batch in batches)
    activity = LatentActivity.of(autoencoder, inputs)
    return prune_by(
        autoencoder,
        activity,
        min_frequency=min_frequency,
        min_max_activation=min_max_activation,
        min_decoder_norm=min_decoder_norm,
        keep_indices=keep_indices,
    )


def prune_by(
    autoencoder: Autoencoder,
    activity: LatentActivity,
    *,
    min_frequency: float = 1e-6,
    min_max_activation: float = 1.0,
    min_decoder_norm: float = 0.99,
    keep_indices: bool = True,
) -> Pruning:
    """:func:`prune` by an activity measured elsewhere."""
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
            f"too seldom, {counts['too_weak']} were never above {min_max_activation} (largest: "
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
    """A state dict in which all others are zero, whatever the activation function."""
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
