"""Is this the autoencoder that was published, applied as it was trained? Measured, not believed.

An autoencoder that is read with another activation, without its input normalisation, or at another
place still gives latents; nothing fails. Its reconstructions are what gives it away.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from neuron_explainer.errors import InputError
from neuron_explainer.evaluation.metrics import ReconstructionStats
from neuron_explainer.evaluation.passage import PASSAGE
from neuron_explainer.models.autoencoder import Autoencoder
from neuron_explainer.models.autoencoder_context import AutoencoderContext
from neuron_explainer.models.locations import ActivationLocation
from neuron_explainer.models.model_context import ModelContext
from neuron_explainer.models.weight_names import Dimension, LayerIndex

WORST_FVU = 0.5
"""A reconstruction that leaves more of the variance unexplained is taken for a sign of misuse."""
MARGIN = 0.15
"""By how much FVU may exceed the recorded one, which was measured on other text."""


@dataclass(frozen=True)
class Verification:
    """What an autoencoder does to a text, beside what was recorded of it."""

    location: ActivationLocation
    n_tokens: int
    """Tokens measured: all but the first of each window, whose activations are unlike the others."""
    fvu: float
    """Fraction of variance unexplained, :func:`~neuron_explainer.evaluation.metrics.fvu`."""
    l0: float
    """Mean number of latents that fire on a token."""
    dead_share: float
    """Share of latents that fire on none of these tokens."""
    recorded: Mapping[str, float] = field(default_factory=dict)
    """The same figures as recorded with the autoencoder, measured elsewhere; empty if none are."""

    @property
    def problem(self) -> str | None:
        """What speaks against this being the right autoencoder, rightly applied, or None."""
        most = self.recorded["fvu"] + MARGIN if "fvu" in self.recorded else WORST_FVU
        if self.fvu <= most:
            return None
        recorded = f", recorded {self.recorded['fvu']:.3f}" if "fvu" in self.recorded else ""
        return (
            f"{self.location}: {self.fvu:.3f} of the variance is unexplained{recorded}; expected at "
            f"most {most:.3f}. Is it for this model and place, and are its activation function and "
            "input normalisation stated rightly?"
        )


def verify(
    context: AutoencoderContext,
    model_context: ModelContext,
    text: str | None = None,
    layers: Iterable[LayerIndex] | None = None,
    bos: bool = False,
) -> dict[LayerIndex, Verification]:
    """Measure the autoencoders of a context on a text.

    Args:
        context: the autoencoders of one location.
        model_context: the model that they were trained on.
        text: what to run; None for a built-in passage.
        layers: which of them; None for all.
        bos: begin with the start token, for autoencoders that were trained so.

    Returns:
        ``{layer: figures}``, with those recorded at training where they are known;
        :attr:`Verification.problem` says what is suspicious.
    """
    chosen = list(context.autoencoder_config.paths if layers is None else layers)
    context.check_model(model_context, chosen)
    return {
        layer: verify_autoencoder(
            context.get_autoencoder(layer),
            context.location.at(layer),
            model_context,
            PASSAGE if text is None else text,
            bos,
        )
        for layer in chosen
    }


@torch.no_grad()
def verify_autoencoder(
    autoencoder: Autoencoder,
    location: ActivationLocation,
    model_context: ModelContext,
    text: str = PASSAGE,
    bos: bool = False,
) -> Verification:
    """Measure one autoencoder on a text.

    Args:
        autoencoder: what to measure.
        location: where its inputs come from; without a layer, every layer that has the place.
        model_context: the model that it was trained on.
        text: what to run; as many windows of the model's context as it fills.
        bos: begin each window with the start token, for autoencoders that were trained so.
    """
    model = model_context.get_or_create_model()
    stats = ReconstructionStats()
    places = location.expand(model_context.get_dim_size(Dimension.LAYERS))
    targets = [_target(autoencoder, place) for place in places]
    for tokens in _windows(model_context, text, bos):
        found = model.capture(tokens.to(model.device), [*places, *targets], bos=bos)
        for place, target in zip(places, targets, strict=True):
            _, latents, recons = autoencoder(found[place][0, 1:].to(autoencoder.dtype))
            stats.update(found[target][0, 1:], recons, latents)
    recorded = autoencoder.metadata.get("held_out") or {}
    return Verification(
        location,
        stats.n_tokens,
        float(stats.fvu),
        float(stats.l0),
        float(stats.dead_share),
        {name: recorded[name] for name in ("fvu", "l0", "dead_share") if name in recorded},
    )


def _windows(model_context: ModelContext, text: str, bos: bool) -> list[Tensor]:
    """Token ids ``[1, s]`` of consecutive pieces of the text."""
    ids = model_context.encode(text)
    size = model_context.get_dim_size(Dimension.MAX_CONTEXT_LENGTH) - int(bos)
    windows = [torch.tensor([ids[i : i + size]]) for i in range(0, len(ids), size)]
    windows = [tokens for tokens in windows if tokens.shape[1] + int(bos) > 1]
    if not windows:
        raise InputError(f"text must have at least two tokens to be measured, found {len(ids)}.")
    return windows


def _target(autoencoder: Autoencoder, location: ActivationLocation) -> ActivationLocation:
    """What the output stands for: the input, or a transcoder's own place in the same layer."""
    if not autoencoder.is_transcoder:
        return location
    if autoencoder.output_location is None:
        raise InputError(
            f"the transcoder of {location} does not say what its output stands for; state "
            "output_location= when it is loaded."
        )
    return autoencoder.output_location.at(location.layer)
