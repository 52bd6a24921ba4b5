"""Check by measuring that an autoencoder is applied as it was trained.

With another nonlinearity, without its input normalisation, or at another location, an autoencoder
still gives latents and nothing fails, but its reconstructions become bad.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from neuron_explainer.activations.corpus import start_token
from neuron_explainer.errors import InputError
from neuron_explainer.evaluation.passage import PASSAGE
from neuron_explainer.evaluation.pieces import coded_pieces
from neuron_explainer.evaluation.placed import Placed, placed_at
from neuron_explainer.evaluation.running import ReconstructionStats
from neuron_explainer.evaluation.spliced_passes import SplicedPasses
from neuron_explainer.models.autoencoder import Autoencoder
from neuron_explainer.models.autoencoder_context import AutoencoderContext, Layers
from neuron_explainer.models.language_model import LanguageModel
from neuron_explainer.models.locations import ActivationLocation
from neuron_explainer.models.model_context import ModelContext
from neuron_explainer.models.weight_names import Dimension, LayerIndex

WORST_FVU = 0.6
"""With more of the variance unexplained than this, an autoencoder is suspected of misuse.

The shipped residual autoencoders in a wrong layer leave 0.58 to 28 unexplained; one of 512 latents that
was trained for forty steps, at its own location, 0.53.
"""
MARGIN = 0.15
"""How far FVU may exceed the recorded one, which was measured on other text."""


@dataclass(frozen=True)
class Verification:
    """The figures of an autoencoder on a text, and those that were recorded with it."""

    location: ActivationLocation
    n_tokens: int
    """Tokens measured: all but the first of each window, whose activation is unlike the others."""
    fvu: float
    """Fraction of variance unexplained, :func:`~neuron_explainer.evaluation.metrics.fvu`."""
    l0: float
    """Mean number of latents that fire on a token: :func:`~neuron_explainer.evaluation.metrics.l0`."""
    dead_share: float
    """Share of latents that fire on none of these tokens:
    :func:`~neuron_explainer.evaluation.metrics.dead_share`."""
    recorded: Mapping[str, float] = field(default_factory=dict)
    """The same figures as recorded with the autoencoder, on other text; empty if none are recorded."""

    @property
    def problem(self) -> str | None:
        """Why this seems to be the wrong autoencoder, or one that is applied wrongly; or None."""
        most = self.recorded["fvu"] + MARGIN if "fvu" in self.recorded else WORST_FVU
        if self.fvu <= most:
            return None
        recorded = f" (recorded: {self.recorded['fvu']:.3f})" if "fvu" in self.recorded else ""
        # Enough digits that the two numbers differ, as they do.
        digits = next(d for d in range(3, 18) if f"{self.fvu:.{d}f}" != f"{most:.{d}f}")
        return (
            f"{self.location}: {self.fvu:.{digits}f} of the variance is unexplained{recorded}; expected "
            f"at most {most:.{digits}f}. Check that the autoencoder belongs to this model and location, "
            "and that its nonlinearity and input normalisation are stated correctly; or it has been "
            "trained too little."
        )


def verify(
    context: AutoencoderContext,
    model_context: ModelContext,
    text: str | None = None,
    layers: Layers = None,
    bos: bool = False,
) -> dict[LayerIndex, Verification]:
    """Measure the autoencoders of a context on a text.

    Args:
        context: the autoencoders of one location.
        model_context: the model that they were trained on.
        text: the text to run; None for a built-in passage.
        layers: the layers whose autoencoders to measure; None for all.
        bos: begin each window with the start token, for autoencoders that were trained so.

    Returns:
        ``{layer: figures}``; :attr:`Verification.problem` says what is suspicious.
    """
    chosen = context.chosen_layers(layers)
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
        autoencoder: the autoencoder to measure.
        location: where its inputs come from; without a layer, all layers are measured together.
        model_context: the model that it was trained on.
        text: the text to run, cut into windows of the model's context length.
        bos: begin each window with the start token, for autoencoders that were trained so.
    """
    model = model_context.get_or_create_model()
    stats = ReconstructionStats()
    sources = location.expand(model_context.get_dim_size(Dimension.LAYERS))
    subjects = [placed_at(source, autoencoder) for source in sources]
    for tokens in _windows(model_context, text, bos):
        _add_window(model, tokens, subjects, stats)
    recorded = autoencoder.metadata.get("held_out") or {}
    return Verification(
        location,
        stats.n_tokens,
        float(stats.fvu),
        float(stats.l0),
        float(stats.dead_share),
        {name: recorded[name] for name in ("fvu", "l0", "dead_share") if name in recorded},
    )


def _add_window(
    model: LanguageModel, tokens: Tensor, subjects: Sequence[Placed], stats: ReconstructionStats
) -> None:
    """Add all tokens ``[1, s]`` but the first."""
    locations = [place for each in subjects for place in (each.source, each.target)]
    passes = SplicedPasses(model, tokens, None, locations, logits=False)
    for each in subjects:
        x, target = (passes.activation(place)[0, 1:] for place in (each.source, each.target))
        for piece, coded in coded_pieces(each.autoencoder, x):
            stats.update(target[piece], coded.recons.to(target.device), coded.latents)


def _windows(model_context: ModelContext, text: str, bos: bool) -> list[Tensor]:
    """Token ids ``[1, s]`` of consecutive pieces of the text, after the start token if ``bos``."""
    ids = model_context.encode(text)
    start = [start_token(model_context)] if bos else []
    size = model_context.get_dim_size(Dimension.MAX_CONTEXT_LENGTH) - len(start)
    windows = [torch.tensor([[*start, *ids[i : i + size]]]) for i in range(0, len(ids), size)]
    windows = [tokens for tokens in windows if tokens.shape[1] > 1]
    if not windows:
        raise InputError(f"text must have at least two tokens to be measured, found {len(ids)}.")
    return windows
