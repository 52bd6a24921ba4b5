"""The sources of a buffer: chunks of activations by number, from a model or a store."""

from typing import Any, Protocol

from neuron_explainer.activations.corpus import Ints, permutation
from neuron_explainer.activations.harvest import ActivationBatch, Harvester, check_context_length
from neuron_explainer.activations.store import ActivationStore
from neuron_explainer.activations.windows import TokenWindows, check_rank
from neuron_explainer.errors import InputError


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


class StoreSource:
    """Activations on disk: a chunk is a run of neighbouring rows, and the runs come in random order.

    Neighbouring rows come into the buffer together, and the buffer mixes them.

    Args:
        store: the store to read.
        chunk_rows: length of the runs; the last run of the store may be shorter.
        seed: decides the order of the runs; None: the order of the store.
        epochs: how often the store is read; None: without end.
        rank: take runs ``rank``, ``rank + world``, … only, for process ``rank`` of ``world``.
        world: see ``rank``.
    """

    forward_s = 0.0

    def __init__(
        self,
        store: ActivationStore,
        chunk_rows: int = 4096,
        *,
        seed: int | None = 0,
        epochs: int | None = 1,
        rank: int = 0,
        world: int = 1,
    ) -> None:
        if not len(store):
            raise InputError(f"the store {store.folder} holds no rows.")
        if chunk_rows < 1 or (epochs is not None and epochs < 1):
            raise InputError(f"chunk_rows {chunk_rows} and epochs {epochs} must be at least 1.")
        check_rank(rank, world)
        self.store, self.chunk_rows, self.seed, self.epochs = store, chunk_rows, seed, epochs
        self.rank, self.world = rank, world
        self._order: tuple[int, Ints] | None = None

    def chunk(self, number: int) -> ActivationBatch | None:
        """The rows of a run."""
        n_runs = -(-len(self.store) // self.chunk_rows)
        epoch, index = divmod(self.rank + number * self.world, n_runs)
        if self.epochs is not None and epoch >= self.epochs:
            return None
        run = index if self.seed is None else int(self._order_of(epoch, n_runs, self.seed)[index])
        begin = run * self.chunk_rows
        return self.store.rows(begin, min(begin + self.chunk_rows, len(self.store)))

    def _order_of(self, epoch: int, n_runs: int, seed: int) -> Ints:
        if self._order is None or self._order[0] != epoch:
            self._order = epoch, permutation(n_runs, seed, epoch)
        return self._order[1]

    def describe(self) -> dict[str, Any]:
        """Settings of store and order."""
        return {
            **self.store.header.to_json(),
            "n_rows": len(self.store),
            "chunk_rows": self.chunk_rows,
            "seed": self.seed,
            "epochs": self.epochs,
            "rank": self.rank,
            "world": self.world,
        }
