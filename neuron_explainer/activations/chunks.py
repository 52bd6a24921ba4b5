"""Chunks of activations by number: what every source of activations gives.

Shape legend: ``n`` tokens, ``d`` width of a location.
"""

from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from neuron_explainer.models.locations import ActivationLocation
from neuron_explainer.tables import by_shape


@dataclass(frozen=True)
class ActivationBatch:
    """Activations of some tokens, and where these tokens stand."""

    activations: dict[ActivationLocation, Tensor]
    """``[n, d]`` at each location."""
    tokens: Tensor
    """Token ids, ``[n]`` int64."""
    document: Tensor
    """Number of each token's document, ``[n]`` int64."""
    position: Tensor
    """Position of each token in its window, ``[n]`` int64."""

    def __repr__(self) -> str:
        return by_shape(self)

    def __len__(self) -> int:
        return len(self.tokens)

    def rows(self, which: Tensor | slice) -> "ActivationBatch":
        """The batch of some of the tokens."""
        return ActivationBatch(
            {place: x[which] for place, x in self.activations.items()},
            self.tokens[which],
            self.document[which],
            self.position[which],
        )

    @staticmethod
    def cat(batches: "list[ActivationBatch]") -> "ActivationBatch":
        """One batch of the tokens of several batches."""
        return ActivationBatch(
            {
                place: torch.cat([batch.activations[place] for batch in batches])
                for place in batches[0].activations
            },
            torch.cat([batch.tokens for batch in batches]),
            torch.cat([batch.document for batch in batches]),
            torch.cat([batch.position for batch in batches]),
        )


class ActivationSource(Protocol):
    """Chunks of activations by number; a number always stands for the same chunk."""

    @property
    def forward_s(self) -> float:
        """Seconds spent in a model so far."""

    def chunk(self, number: int) -> ActivationBatch | None:
        """The rows of a chunk; None beyond the last chunk."""

    def describe(self) -> dict[str, Any]:
        """Everything that decides the chunks, as JSON values."""
