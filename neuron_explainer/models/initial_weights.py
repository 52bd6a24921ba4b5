"""The weights that training begins with, drawn as GPT-2's are."""

import math
from typing import Any

import torch
from torch import nn

from neuron_explainer.models.checks import check_seed


def uninitialised_embedding(n_rows: int, width: int, **at: Any) -> nn.Embedding:
    """An embedding for :func:`draw_weights`; ``at`` are device and dtype."""
    # With a weight given, or torch would draw normal values, for which on "meta" it imports its
    # compiler: a second.
    return nn.Embedding(n_rows, width, _weight=torch.empty(n_rows, width, **at))


@torch.no_grad()
def draw_weights(model: nn.Module, n_layers: int, seed: int | None) -> None:
    """Standard deviation 0.02, for positions 0.01, and less where a layer adds to the stream.

    Args:
        model: a transformer with GPT-2's names, on any device but "meta"; its weights are set in place.
        n_layers: its number of layers.
        seed: None: torch's global generator.
    """
    generator = None
    if seed is not None:
        check_seed(seed)
        generator = torch.Generator(next(model.parameters()).device).manual_seed(seed)
    for name, parameter in model.named_parameters():
        if parameter.dim() < 2:  # biases, and the gains of norms
            parameter.fill_(1.0 if "ln" in name and name.endswith("weight") else 0.0)
            continue
        std = 0.01 if name == "pos_embed.weight" else 0.02
        if name.endswith(("out_proj.weight", "out_layer.weight")):
            std /= math.sqrt(2 * n_layers)
        parameter.normal_(0, std, generator=generator)
