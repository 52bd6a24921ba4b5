"""The sources of a buffer: chunks of activations by number, and those that a model computes."""

from typing import Any, Protocol

from neuron_explainer.activations.harvest import ActivationBatch, Harvester, check_context_length
from neuron_explainer.activations.windows import TokenWindows


class ActivationSource(Protocol):
    """Chunks of activations by number; a number always stands for the same chunk."""

    @property
    def forward_s(self) -> float:
        """Seconds spent in a model so far."""

    def chunk(self, number: int) -> ActivationBatch | None:
        """The rows of a chunk; None beyond the last chunk."""

    def describe(self) -> dict[str, Any]:
        """Everything that decides the chunks, as JSON values."""


class LiveSource:
    """Activations that a model computes when they are needed: a chunk is a batch of windows."""

    def __init__(self, harvester: Harvester, windows: TokenWindows) -> None:
        check_context_length(harvester.context, windows.context_length)
        self.harvester, self.windows = harvester, windows

    @property
    def forward_s(self) -> float:
        """Seconds spent in the model so far."""
        return self.harvester.forward_s

    def chunk(self, number: int) -> ActivationBatch | None:
        """The activations of a batch of windows."""
        n_batches = self.windows.n_batches
        if n_batches is not None and number >= n_batches:
            return None
        return self.harvester(self.windows.batch(number))

    def describe(self) -> dict[str, Any]:
        """Settings of model and windows."""
        return {**self.harvester.describe(), **self.windows.describe()}
