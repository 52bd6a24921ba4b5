"""Which tokens a latent's decoder direction makes more or less likely, read off the unembedding.

The logit lens (nostalgebraist 2020) applied to decoder directions: what a latent adds to the residual
stream is read as if nothing came between it and the logits. Later layers and the final norm's
division by its scale are ignored, so the nearer a latent is to the end of the model, the more it says.

Shape legend: ``m`` latents, ``d`` model width, ``v`` vocabulary.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from neuron_explainer.errors import NeuronExplainerError, shown
from neuron_explainer.models.autoencoder import Autoencoder
from neuron_explainer.models.autoencoders.pruned import get_decoder_weight
from neuron_explainer.models.model_context import ModelContext, get_unembedding_with_ln_gain

RESIDUAL_STREAM = (
    "resid.post_emb",
    "resid.torso.delta_attn",
    "resid.torso.post_attn",
    "resid.torso.delta_mlp",
    "resid.torso.post_mlp",
)
"""Paths of the residual stream and of what is added to it."""


@dataclass(frozen=True)
class Promoted:
    """Tokens by what a direction does to their logits, strongest first, as printable text."""

    up: list[str]
    down: list[str]


def logit_lens(
    context: ModelContext, autoencoder: Autoencoder, latents: Sequence[int], n_tokens: int = 6
) -> list[Promoted] | None:
    """What the decoders of some latents promote and suppress.

    None if the decoders do not write to the residual stream, or if the model's unembedding cannot be
    had.
    """
    place = autoencoder.output_location if autoencoder.is_transcoder else autoencoder.location
    if place is None or place.path not in RESIDUAL_STREAM:
        return None
    try:
        unembedding = get_unembedding_with_ln_gain(context).float()  # [d, v]
    except NeuronExplainerError:  # of a model whose architecture table does not say where it is
        return None
    rows = get_decoder_weight(autoencoder).detach()[list(latents)].to(unembedding)  # [m, d]
    # The final norm subtracts the mean over the width, the softmax that over the vocabulary.
    logits = (rows - rows.mean(dim=1, keepdim=True)) @ unembedding
    logits -= logits.mean(dim=1, keepdim=True)

    def tokens(logits: torch.Tensor) -> list[str]:
        top = logits.topk(min(n_tokens, len(logits))).indices.tolist()
        return [shown(context.decode_token(token))[1:-1] for token in top]  # without quotes

    return [Promoted(tokens(row), tokens(-row)) for row in logits]
