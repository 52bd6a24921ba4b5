"""Activations that the processes of a run compute in turn, so that each forward pass runs only once."""

from typing import Any

import torch
from torch import Tensor

from neuron_explainer.activations.chunks import ActivationBatch, ActivationSource
from neuron_explainer.dictionaries.distributed import World
from neuron_explainer.errors import InputError, NeuronExplainerError
from neuron_explainer.models.locations import ActivationLocation


class SharedSource:
    """The chunks of a source, the same in every process, each computed by one of them.

    Process ``i % n`` computes chunk ``i``, while the others compute the next chunks. All processes have to
    ask for the same chunks in the same order, from the thread that trains: buffers must not prefetch. The
    chunks do not depend on the number of processes, so any number of them can resume a run.
    """

    def __init__(self, source: ActivationSource, world: World) -> None:
        self.source, self.world = source, world
        self._number = -1
        self._own: ActivationBatch | NeuronExplainerError | None = None

    @property
    def forward_s(self) -> float:
        """Seconds that this process has spent in the model so far."""
        return self.source.forward_s

    def describe(self) -> dict[str, Any]:
        """What the source says of itself."""
        return self.source.describe()

    def chunk(self, number: int) -> ActivationBatch | None:
        """The rows of a chunk; None after the last one."""
        turn, owner = divmod(number, self.world.size)
        own = turn * self.world.size + self.world.rank
        if own != self._number:
            self._number = own
            try:
                self._own = self.source.chunk(own)
            except NeuronExplainerError as error:
                self._own = error
        header = self.world.broadcast_object(self._header(), owner)
        if header is None:
            return None
        if "error" in header:
            raise InputError(header["error"])
        return self._exchange(header, owner)

    def _header(self) -> dict[str, Any] | None:
        """What other processes need to know before they can receive this process's chunk."""
        own = self._own
        if own is None:
            return None
        if isinstance(own, NeuronExplainerError):
            return {"error": str(own)}
        return {
            "rows": len(own),
            "places": {
                str(place): [x.shape[1], str(x.dtype).removeprefix("torch.")]
                for place, x in own.activations.items()
            },
        }

    def _exchange(self, header: dict[str, Any], owner: int) -> ActivationBatch:
        n, own, device = header["rows"], self._own, self.world.device

        def same(of_owner: Tensor | None, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
            if owner != self.world.rank or of_owner is None:
                of_owner = torch.empty(shape, dtype=dtype, device=device)
            return self.world.broadcast(of_owner.contiguous(), owner)

        mine = own if isinstance(own, ActivationBatch) else None
        activations = {}
        for name, (width, dtype) in header["places"].items():
            place = ActivationLocation.parse(name)
            x = None if mine is None else mine.activations[place]
            activations[place] = same(x, (n, width), getattr(torch, dtype))
        which = None
        if mine is not None:
            which = torch.stack([mine.tokens, mine.document, mine.position])
        return ActivationBatch(activations, *same(which, (3, n), torch.int64))
