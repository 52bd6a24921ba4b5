"""What a model computes on boards whose every cell is labelled: the ground of all probes and pictures.

Shape legend: ``n`` boards, ``s`` cells, ``d`` width of an activation, ``c`` chosen cells.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray

from neuron_explainer.errors import InputError, did_you_mean
from neuron_explainer.experiments.boards.dataset import BoardDataset, Part
from neuron_explainer.experiments.boards.drawing import ARRAYS, Boards, Flags, hide
from neuron_explainer.experiments.boards.gpt import BoardGPT
from neuron_explainer.experiments.boards.lea import LEA
from neuron_explainer.experiments.boards.objects import EMPTY, KINDS, Ints, Kind
from neuron_explainer.experiments.boards.sites import location
from neuron_explainer.models.locations import ActivationLocation, LocationLike

Floats = NDArray[np.float32]
Target = Literal["root", "cell", "composite", "background", "place"]
TARGETS: tuple[Target, ...] = ("root", "cell", "composite", "background", "place")
"""What can be asked about a cell: its root; its position in the root; the composite that it is part of; the
background of its board; its place on the board."""

_STREAM = ("resid.torso.post_attn", "resid.torso.post_mlp")
_UPDATES = ("resid.torso.post_ln_attn", "resid.torso.delta_attn")
_UPDATES_MLP = ("resid.torso.post_ln_mlp", "resid.torso.delta_mlp")


def stream_points(n_layers: int) -> list[ActivationLocation]:
    """The residual stream along depth: embedding, after each attention and each MLP, after the last norm."""
    inside = [ActivationLocation(path, layer) for layer in range(n_layers) for path in _STREAM]
    return [ActivationLocation("resid.post_emb"), *inside, ActivationLocation("resid.post_ln_f")]


def record_points(n_layers: int) -> list[ActivationLocation]:
    """Every record point that is a vector of the stream's width, and the logits, along depth."""
    order = (*_UPDATES, _STREAM[0], *_UPDATES_MLP, _STREAM[1])
    inside = [ActivationLocation(path, layer) for layer in range(n_layers) for path in order]
    ends = [ActivationLocation("resid.post_ln_f"), ActivationLocation("logits")]
    return [ActivationLocation("resid.post_emb"), *inside, *ends]


@dataclass(frozen=True, eq=False, repr=False)
class Recording:
    """Boards, what was hidden of them, what is known of their cells, and activations."""

    tokens: Ints
    """``[n, s]``."""
    masked: Ints
    """``[n, s]``."""
    roots: Ints
    """``[n, s]``; see :class:`~.drawing.Boards`."""
    cells: Ints
    """``[n, s]``."""
    parts: Ints
    """``[n, s]``."""
    composites: Ints
    """``[n]``."""
    backgrounds: Ints
    """``[n]``."""
    kinds: Ints
    """``[n]``: number of the kind of board in ``KINDS``."""
    activations: dict[ActivationLocation, Floats] = field(default_factory=dict)
    """``[n, s, d]`` by location."""

    def __len__(self) -> int:
        return len(self.tokens)

    @property
    def hidden(self) -> Flags:
        """``[n, s]``: cells that the model does not see."""
        return np.asarray(self.masked != self.tokens)

    @property
    def on_objects(self) -> Flags:
        """``[n, s]``: cells of a root's footprint."""
        return np.asarray(self.roots != EMPTY)

    def labels(self, target: Target) -> Ints:
        """What there is to know about each cell, ``[n, s]``; ``EMPTY`` where there is nothing."""
        if target not in TARGETS:
            hint = did_you_mean(str(target), TARGETS)
            raise InputError(f"unknown target {target!r}.{hint} Known: {', '.join(TARGETS)}.")
        if target == "root":
            return self.roots
        if target == "cell":
            return self.cells
        shape = self.tokens.shape
        if target == "place":
            return np.broadcast_to(np.arange(shape[1]), shape)
        if target == "background":
            return np.broadcast_to(self.backgrounds[:, None], shape)
        return np.where(self.on_objects, self.composites[:, None], EMPTY)

    def at(self, place: LocationLike) -> Floats:
        """The activations at a place, ``[n, s, d]``."""
        found = location(place)
        if found not in self.activations:
            known = ", ".join(map(str, self.activations))
            raise InputError(f"nothing was recorded at {found}; recorded: {known}.")
        return self.activations[found]

    def where(self, chosen: Flags) -> "Recording":
        """Some of the boards ``[n]``."""
        names = (
            "tokens",
            "masked",
            "roots",
            "cells",
            "parts",
            "composites",
            "backgrounds",
            "kinds",
        )
        arrays: dict[str, Any] = {name: getattr(self, name)[chosen] for name in names}
        kept = {place: x[chosen] for place, x in self.activations.items()}
        return Recording(**arrays, activations=kept)


@torch.no_grad()
def activations(
    model: BoardGPT | LEA, masked: Ints, places: Sequence[LocationLike], batch: int = 128
) -> dict[ActivationLocation, Floats]:
    """Activations ``[n, s, d]`` by location, for boards ``[n, s]`` (heads side by side in ``d``).

    Those of LEA are of its picture stream while it reads the board.
    """
    parts: list[dict[ActivationLocation, Floats]] = []
    for start in range(0, len(masked), batch):
        tokens = torch.from_numpy(masked[start : start + batch]).to(model.device)
        found = model.capture(tokens, list(places))
        parts.append({place: x.flatten(2).float().cpu().numpy() for place, x in found.items()})
    return {place: np.concatenate([part[place] for part in parts]) for place in parts[0]}


def record(
    model: BoardGPT | LEA,
    dataset: BoardDataset,
    places: Sequence[LocationLike] = (),
    *,
    part: Part = "train",
    kinds: Sequence[Kind] = KINDS,
    n: int = 100,
    mask: float = 0.25,
    patch: float = 0.0,
    seed: int = 0,
) -> Recording:
    """Random boards of a part, at most ``n`` of each kind, masked, with activations at ``places``."""
    rng = np.random.default_rng([seed, 11])
    boards = [b for kind in kinds if (b := dataset.sample(kind, part, n, seed)) is not None]
    if not boards:
        raise InputError(f"this data set holds no {part} boards of {', '.join(kinds)}.")
    masked = np.concatenate([hide(b, mask, patch, rng) for b in boards])
    return of_boards(model, boards, masked, places)


def of_boards(
    model: BoardGPT | LEA,
    boards: Sequence[Boards],
    masked: Ints,
    places: Sequence[LocationLike] = (),
) -> Recording:
    """The recording of given boards, masked as given ``[n, s]``."""
    arrays = {
        name: np.concatenate([getattr(b, name) for b in boards])
        for name in ARRAYS
        if name != "rows"
    }
    kinds = np.concatenate([np.full(len(b), KINDS.index(b.kind)) for b in boards])
    return Recording(
        **arrays,
        masked=masked,
        composites=np.concatenate([b.composites for b in boards]),
        backgrounds=np.concatenate([b.backgrounds for b in boards]),
        kinds=kinds,
        activations=activations(model, masked, places) if places else {},
    )
