"""Where batches come from, and how a resumed run gets the one after the last it had.

Any iterable of batches will do. One with ``state_dict`` and ``load_state_dict`` is put back to its place. A
plain one that gives the same batches each time is started again and skipped forward, and the last batch
skipped is compared with what it was. An iterator that can be read only once cannot be resumed: it is refused.
"""

import functools
import hashlib
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from neuron_explainer.activations.chunks import ActivationBatch, ActivationSource
from neuron_explainer.errors import InputError


class BatchSource:
    """Batches one by one, from the start again when they end; knows its place.

    Args:
        batches: any iterable.
        passes: how many times to go through the batches; None: without end.
    """

    def __init__(self, batches: Iterable[Any], passes: int | None = None) -> None:
        self._batches, self._passes = batches, passes
        self._iterator: Iterator[Any] | None = None
        self._done = 0  # passes that have ended
        self._taken = 0  # batches of the current pass, those waiting included
        self._last: Any = None  # the newest of them
        self._waiting: list[Any] = []

    @property
    def epoch(self) -> int:
        """How many passes over the batches have ended."""
        return self._done

    def next(self) -> Any:
        """The next batch; None after the last pass."""
        return self._waiting.pop(0) if self._waiting else self._draw()

    def peek(self, n: int) -> list[Any]:
        """The next ``n`` batches, which :meth:`next` will still give."""
        while len(self._waiting) < n:
            self._waiting.append(self._draw())
        return self._waiting[:n]

    def _draw(self) -> Any:
        while self._done != self._passes:
            if self._iterator is None:
                self._iterator, self._taken = iter(self._batches), 0
            for batch in self._iterator:
                self._taken += 1
                self._last = batch
                return batch
            if not self._taken:
                raise InputError(
                    "the batches have come to an end and cannot be started again. Give fewer steps or "
                    "epochs, or an object that can be iterated over more than once (a list, a class "
                    "with __iter__)."
                    if self._done
                    else "there are no batches to train on."
                )
            self._iterator, self._taken, self._done = None, 0, self._done + 1
        return None

    @property
    def _stateful(self) -> Any:
        """The iterator or the batches themselves, whichever knows its own place; None if neither does."""
        for candidate in (self._iterator, self._batches):
            if hasattr(candidate, "state_dict") and hasattr(candidate, "load_state_dict"):
                return candidate
        return None

    def state(self) -> dict[str, Any]:
        """Tensors and plain values from which :meth:`restore` finds back to this place."""
        stateful = self._stateful
        return {
            "done": self._done,
            "taken": self._taken,
            "waiting": list(self._waiting),
            "source": None if stateful is None else stateful.state_dict(),
            "last": None if stateful is not None else _digest(self._last),
        }

    def restore(self, state: dict[str, Any]) -> None:
        """Go to the place where ``state`` was taken."""
        self._waiting, self._taken = state["waiting"], state["taken"]
        self._done = state.get("done", 0)
        if self._passes is not None and (self._done, self._taken) > (self._passes, 0):
            raise InputError(
                f"the run is in pass {self._done + 1} over its batches, which is more than the "
                f"{self._passes} passes (epochs) asked for now. Ask for more epochs, or take another folder."
            )
        if state["source"] is None and not self._taken:  # between two passes
            return
        self._iterator = iter(self._batches)
        if state["source"] is not None:
            if self._stateful is None:
                raise InputError(
                    "the run was started with batches that have state_dict and load_state_dict; "
                    "these have neither, so their place cannot be found again."
                )
            self._stateful.load_state_dict(state["source"])
            return
        self._skip(state["last"])

    def _skip(self, last: str) -> None:
        """Pass over what was used already, and check that it is the same as before."""
        assert self._iterator is not None
        if self._iterator is self._batches:
            raise InputError(
                "a run is to be resumed, but its batches are an iterator that cannot be "
                "started again. Give an object that can be iterated over more than once (a list, a "
                "class with __iter__), or one with state_dict and load_state_dict."
            )
        for skipped in range(self._taken):
            self._last = next(self._iterator, self)
            if self._last is self:
                raise InputError(
                    f"the run had {self._taken} batches, and now they end after {skipped}: "
                    "these are other batches."
                )
        if _digest(self._last) != last:
            raise InputError(
                f"a run is to be resumed, but batch {self._taken} is not what it was: the "
                "batches come in another order, or are others. Give batches in the same order each time "
                "(a DataLoader that shuffles does not), or batches with state_dict and load_state_dict."
            )


class ChunkBatches:
    """The chunks of an activation source as batches that know their place, so that none is computed twice."""

    def __init__(self, source: ActivationSource) -> None:
        self._source = source
        self._next = 0

    def __iter__(self) -> Iterator[ActivationBatch]:
        while (chunk := self._source.chunk(self._next)) is not None:
            self._next += 1
            yield chunk
        self._next = 0

    def state_dict(self) -> dict[str, int]:
        return {"next": self._next}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self._next = state["next"]


def _digest(batch: Any) -> str:
    """A hash of the values of a tensor, or of several tensors by name or place."""
    digest = hashlib.sha256()
    if isinstance(batch, Tensor):
        digest.update(f"{batch.dtype} {list(batch.shape)}".encode())
        digest.update(batch.detach().cpu().contiguous().view(torch.uint8).numpy().data)
    elif isinstance(batch, Mapping):
        for name, part in batch.items():
            digest.update(f"{name} {_digest(part)} ".encode())
    elif isinstance(batch, list | tuple):
        for part in batch:
            digest.update(_digest(part).encode())
    elif isinstance(batch, ActivationBatch):
        digest.update(_digest((batch.activations, batch.tokens)).encode())
    return digest.hexdigest()


class TensorBatches:
    """Rows of one tensor ``[N, n]`` in batches, in another seeded order each time through.

    What is left over at the end of a pass is not used in it, so that all batches are of one size.
    """

    def __init__(self, rows: Tensor, batch_size: int, seed: int) -> None:
        if rows.ndim != 2 or len(rows) < batch_size:
            raise InputError(
                f"expected a tensor [N, n] of at least one batch of {batch_size} activations, found "
                f"{list(rows.shape)}; give more of them, or a smaller batch_size."
            )
        self._rows, self._batch_size, self._seed = rows, batch_size, seed
        self._next = 0  # batch, over all passes
        self._order = torch.empty(0, dtype=torch.int64)
        self._pass = -1

    def __iter__(self) -> Iterator[Tensor]:
        return self

    def __next__(self) -> Tensor:
        per_pass = len(self._rows) // self._batch_size
        which, within = divmod(self._next, per_pass)
        if which != self._pass:
            generator = torch.Generator().manual_seed((self._seed * 1_000_003 + which) % 2**64)
            self._order, self._pass = torch.randperm(len(self._rows), generator=generator), which
        chosen = self._order[within * self._batch_size :][: self._batch_size]
        self._next += 1
        return self._rows[chosen.to(self._rows.device)]

    @functools.cached_property
    def _fingerprint(self) -> str:
        return _digest(torch.split(self._rows, 1 << 14))

    def state_dict(self) -> dict[str, Any]:
        return {"next": self._next, "rows": self._fingerprint}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        if state["rows"] != self._fingerprint:
            raise InputError(
                "a run is to be resumed, but its activations are not what they were. Give the same tensor, "
                "or train in another folder."
            )
        self._next = state["next"]
