"""This library's sweeps, and the loop that one would write without them."""

from typing import Any

import torch
from torch import Tensor

from benchmarks.contestants.ours import load
from benchmarks.workloads import Work
from neuron_explainer.analysis.sweeps import Grid, heads, sweep
from neuron_explainer.models.hooks import TransformerHooks
from neuron_explainer.models.interventions import patch_from


def difference(logits: Tensor) -> Tensor:
    return logits[:, 5] - logits[:, 6]


def patches(folder: str, source: list[list[int]], length: int) -> Grid:
    """The stream before each layer, at each position."""
    model = load(folder)
    found = model.capture(source, ["resid.post_emb", "resid.torso.post_mlp"])

    def build(layer: int, position: int) -> TransformerHooks:
        place = f"{layer - 1}/resid.torso.post_mlp" if layer else "resid.post_emb"
        return patch_from(place, found, positions=position)

    return Grid({"layer": range(model.n_layers), "position": range(length)}, build)


def patching(
    folder: str, tokens: list[list[int]], source: list[list[int]], loop: bool = False
) -> Work:
    grid = patches(folder, source, len(tokens[0]))
    return measured(folder, tokens, grid, loop)


def ablated_heads(folder: str, tokens: list[list[int]], loop: bool = False) -> Work:
    return measured(folder, tokens, heads(load(folder)), loop)


def measured(folder: str, tokens: list[list[int]], grid: Grid, loop: bool) -> Work:
    model = load(folder)

    def swept() -> dict[str, Any]:
        return {"metric": torch.from_numpy(sweep(model, tokens, grid, difference).values[..., 0])}

    def looped() -> dict[str, Any]:
        found = [difference(model(tokens, hooks=hooks)[0][:, -1]) for hooks in grid]
        return {"metric": torch.stack(found).view(grid.shape).double()}

    return looped if loop else swept
