"""Activations in random order within bounded memory: :class:`ShuffleBuffer`.

A buffer of ``capacity`` rows is filled, shuffled and read. When less than half of it is unread, the next
rows of the source replace the rows that were read, and everything is shuffled again (the buffer of
dictionary_learning, github.com/saprmarks/dictionary_learning). Each row of the source comes out exactly
once.

All randomness depends on the seed and the number of the refill alone, and a row that has seen two refills
comes out before the next one. So the rows in a buffer come from its last three refills, and a saved state
is small: it says which rows of which chunks are unread. Loading it fetches these chunks again (from a
model: at most about one and a half buffers' worth of forward passes).

Shape legend: ``n`` rows of a batch, ``d`` width of a location.
"""

import logging
from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from neuron_explainer.activations.chunks import ActivationBatch, ActivationSource
from neuron_explainer.activations.corpus import Ints, permutation
from neuron_explainer.activations.prefetch import Prefetcher
from neuron_explainer.activations.windows import check_same_settings
from neuron_explainer.errors import CheckpointError, InputError, LocationError
from neuron_explainer.models.locations import ActivationLocation, LocationLike

logger = logging.getLogger(__name__)


Batch = Tensor | dict[ActivationLocation, Tensor] | tuple[Tensor, Tensor]


class Cursor(NamedTuple):
    """A row of a source."""

    chunk: int = 0
    row: int = 0
    """Its place in the chunk."""


class ShuffleBuffer(Iterator[Batch]):
    """Batches of activations in random order, float32; a context manager that ends its thread.

    A batch is ``[n, d]`` if the source has one location, ``{location: [n, d]}`` of the same tokens if
    it has several, and the tensors of the two locations of ``pair`` if that is given. The last batch of a
    source that ends may have fewer rows; no row is left out.

    Args:
        source: a :class:`LiveSource` or :class:`StoreSource`.
        capacity: rows in memory, at least two batches. With ``prefetch``, up to half as many more rows
            and one chunk are held ready.
        batch_size: rows of a batch.
        seed: decides the order.
        num_tokens: total number of rows to take from the source; None: all.
        pair: locations of input and target, for a dictionary that maps one to the other.
        device: of the rows in memory and of the batches; default: that of the source.
        prefetch: fetch chunks in a thread. The order is the same.
    """

    def __init__(
        self,
        source: ActivationSource,
        capacity: int,
        batch_size: int,
        *,
        seed: int = 0,
        num_tokens: int | None = None,
        pair: tuple[LocationLike, LocationLike] | None = None,
        device: torch.device | str | None = None,
        prefetch: bool = True,
    ) -> None:
        if batch_size < 1 or capacity < 2 * batch_size:
            raise InputError(
                f"capacity must be at least two batches of at least one row, found {capacity} with "
                f"batch_size {batch_size}."
            )
        if num_tokens is not None and num_tokens < batch_size:
            raise InputError(
                f"num_tokens is {num_tokens}, less than one batch of {batch_size}: there would be no "
                "step. Take more tokens or a smaller batch_size."
            )
        self.source, self.capacity, self.batch_size = source, capacity, batch_size
        self.seed, self.num_tokens, self.device = seed, num_tokens, device
        self.pair = None if pair is None else tuple(map(ActivationLocation.parse, pair))
        self.record: dict[str, Any] = {}
        """Which model, text and settings the activations are of, as ``open_buffer`` notes it."""
        self._prefetch = prefetch
        self._fetcher: Prefetcher[ActivationBatch] | None = None
        self._waited_s = 0.0  # of fetchers that were closed
        self._slots: dict[ActivationLocation, Tensor] = {}  # [capacity, d]
        self._reset()

    def _reset(self) -> None:
        # For each slot: chunk, row in the chunk, and refill that brought it; -1 in a free slot.
        self._origin = np.full((self.capacity, 3), -1, dtype=np.int64)
        self._order = np.empty(0, dtype=np.int64)  # slots in the order in which they are read
        self._read = 0  # how many slots of the order have been read
        self._refills = 0
        self._taken = 0  # rows taken from the source
        self._next = Cursor()  # the first row that has not been taken
        self._rest: ActivationBatch | None = None  # chunk `_next.chunk`, where it was begun
        self._exhausted = False
        self.close()

    @property
    def unread(self) -> int:
        """Number of rows in the buffer that have not come out."""
        return len(self._order) - self._read

    @property
    def refills(self) -> int:
        """Number of times that the buffer has been filled."""
        return self._refills

    @property
    def waited_s(self) -> float:
        """Seconds spent waiting for the fetching thread; 0 without one."""
        return self._waited_s + (self._fetcher.waited_s if self._fetcher else 0.0)

    @property
    def forward_s(self) -> float:
        """Seconds spent in the model so far."""
        return self.source.forward_s

    def __next__(self) -> Batch:
        if not self._exhausted and 2 * self.unread < self.capacity:
            self._refill()
        if not self.unread:
            raise StopIteration
        slots = self._order[self._read : self._read + self.batch_size]
        self._read += len(slots)
        self._origin[slots] = -1
        which = torch.from_numpy(slots)
        rows = {p: x[which.to(x.device)].float() for p, x in self._slots.items()}
        if self.pair is not None:
            return rows[self.pair[0]], rows[self.pair[1]]
        return next(iter(rows.values())) if len(rows) == 1 else rows

    # --- filling ---

    def _refill(self) -> None:
        """Fill the free slots from the source, and draw a new order of all slots."""
        free = np.flatnonzero(self._origin[:, 0] < 0)
        assert 2 * len(free) > self.capacity, "half of the buffer has been read"
        while len(free):
            taken = self._take(len(free))
            if taken is None:
                self._exhausted = True
                self.close()
                self._check_amount()
                break
            at, rows = taken
            slots, free = free[: len(rows)], free[len(rows) :]
            self._put(slots, rows)
            self._origin[slots, 0] = at.chunk
            self._origin[slots, 1] = np.arange(at.row, at.row + len(rows))
            self._origin[slots, 2] = self._refills
            self._taken += len(rows)
        self._shuffle()

    def _take(self, most: int) -> tuple[Cursor, ActivationBatch] | None:
        """The next rows of the source, at most ``most``, and where they begin; None at the end."""
        if self.num_tokens is not None:
            most = min(most, self.num_tokens - self._taken)
        if most and self._rest is None:
            self._rest = self._fetch()
        if not most or self._rest is None:
            return None
        at, rest = self._next, self._rest
        end = min(at.row + most, len(rest))
        if end < len(rest):
            self._next = Cursor(at.chunk, end)
        else:
            self._next, self._rest = Cursor(at.chunk + 1), None
        return at, rest.rows(slice(at.row, end))

    def _fetch(self) -> ActivationBatch | None:
        if not self._prefetch:
            return self.source.chunk(self._next.chunk)
        if self._fetcher is None:
            self._fetcher = Prefetcher(self.source.chunk, self._next.chunk, self.capacity // 2)
        return self._fetcher.get()

    def _put(self, slots: Ints, rows: ActivationBatch) -> None:
        if not self._slots:
            self._allocate(rows)
        for place, memory in self._slots.items():
            x = rows.activations[place]
            memory[torch.from_numpy(slots).to(memory.device)] = x.to(memory.device)

    def _allocate(self, rows: ActivationBatch) -> None:
        missing = [str(place) for place in self.pair or () if place not in rows.activations]
        if missing:
            raise LocationError(
                f"pair names {' and '.join(missing)}; the source has "
                f"{', '.join(map(str, rows.activations))}."
            )
        wanted = {p: x for p, x in rows.activations.items() if self.pair is None or p in self.pair}
        for place, x in wanted.items():
            device = x.device if self.device is None else torch.device(self.device)
            self._slots[place] = x.new_empty((self.capacity, x.shape[1]), device=device)

    def _shuffle(self) -> None:
        """Draw a new order of all rows, in which those of two refills ago come before the next refill."""
        occupied = np.flatnonzero(self._origin[:, 0] >= 0)
        order = occupied[permutation(len(occupied), self.seed, self._refills, 0)]
        if not self._exhausted:
            over_half = 2 * len(order) - self.capacity
            n_next = self.batch_size * (over_half // (2 * self.batch_size) + 1)
            is_old = self._origin[order, 2] <= self._refills - 2
            assert is_old.sum() <= n_next, "rows of two refills ago come out before the next refill"
            order = np.concatenate([order[is_old], order[~is_old]])
            order[:n_next] = order[permutation(n_next, self.seed, self._refills, 1)]
        self._order, self._read = order, 0
        self._refills += 1

    def _check_amount(self) -> None:
        if not self._taken:
            raise InputError(
                "the source gave no activations: it is empty, or all of its tokens are left out."
            )
        if self.num_tokens is not None and self._taken < self.num_tokens:
            logger.warning(
                "the source ended after %d activations, fewer than num_tokens = %d; give it more epochs",
                self._taken,
                self.num_tokens,
            )

    # --- saving and resuming ---

    def _settings(self) -> dict[str, Any]:
        return {
            "capacity": self.capacity,
            "batch_size": self.batch_size,
            "buffer_seed": self.seed,
            "num_tokens": self.num_tokens,
            "source": self.source.describe(),
        }

    def state_dict(self) -> dict[str, Any]:
        """The position of the reader: JSON values, and ``unread`` ``[rows, 4]`` int32.

        ``unread`` holds slot, chunk, row in the chunk and refill of each row that has not come out, in
        the order in which the rows will.
        """
        slots = self._order[self._read :]
        unread = np.column_stack([slots, self._origin[slots]]).astype(np.int32)
        return {
            "settings": self._settings(),
            "refills": self._refills,
            "taken": self._taken,
            "chunk": self._next.chunk,
            "chunk_row": self._next.row,
            "exhausted": self._exhausted,
            "unread": torch.from_numpy(unread),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from a saved position, with bitwise equal batches if the source repeats its values.

        Raises:
            CheckpointError: the state was saved with other settings, or the source has changed.
        """
        check_same_settings(state["settings"], self._settings(), "activations")
        self._reset()
        unread = state["unread"].cpu().numpy().astype(np.int64)
        self._order = unread[:, 0].copy()
        self._origin[self._order] = unread[:, 1:]
        self._refills, self._taken = int(state["refills"]), int(state["taken"])
        self._next = Cursor(int(state["chunk"]), int(state["chunk_row"]))
        self._exhausted = bool(state["exhausted"])
        for chunk in np.unique(unread[:, 1]).tolist():
            of_chunk = unread[unread[:, 1] == chunk]
            rows = self.source.chunk(chunk)
            if rows is None or len(rows) <= of_chunk[:, 2].max():
                raise CheckpointError(
                    f"the source no longer gives all rows of chunk {chunk} that the state refers to."
                )
            which = torch.from_numpy(of_chunk[:, 2].copy()).to(rows.tokens.device)
            self._put(of_chunk[:, 0], rows.rows(which))
        if self._next.row:
            self._rest = self.source.chunk(self._next.chunk)

    def close(self) -> None:
        """End the thread; reading on starts it again."""
        if self._fetcher is not None:
            self._waited_s = self.waited_s
            fetcher, self._fetcher = self._fetcher, None
            fetcher.close()

    def __enter__(self) -> "ShuffleBuffer":
        return self

    def __exit__(self, *error: object) -> None:
        self.close()
