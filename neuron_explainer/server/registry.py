"""The dictionaries that a server shows: stores of examples by id, opened when they are asked for.

Ids are made when the server starts, and a client's id is only ever looked up: it is never part of a path.
Stores whose figures take more memory than the budget are closed again, those used longest ago first. A
store that is replaced on disk is opened again at the next request.
"""

import contextlib
import logging
import re
import threading
from collections import OrderedDict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

from neuron_explainer import files
from neuron_explainer.analysis.store import ExampleStore
from neuron_explainer.analysis.store_names import ASSETS, SUFFIX, find_stores, is_built_in
from neuron_explainer.analysis.token_store import mark_of
from neuron_explainer.errors import (
    CheckpointError,
    InputError,
    NeuronExplainerError,
    SourceError,
    nearest,
    shown,
)
from neuron_explainer.server.problems import Problem

log = logging.getLogger(__name__)
ID = re.compile(r"[A-Za-z0-9._-]{1,128}")
ID_PATTERN = f"^{ID.pattern}$"
BUDGET = 512 << 20
_BYTES_OF_A_UNIT = (
    13 * 8 + 10 * 8 + 13 * 8
)  # figures, the columns that they are made of, and orders


@dataclass
class Shelf:
    """A store that the server shows, whether it is open or not."""

    id: str
    path: Path
    name: str
    kind: str
    location: str
    n: int
    signed: bool
    model: str | None
    autoencoder: str | None
    """What the store says its units belong to."""
    store: ExampleStore | None = None
    mark: tuple[int, ...] = ()
    counts: tuple[int, int] | None = None
    """How many units are alive, and how many are dense; None before somebody asks."""
    missing: bool = False
    """Whether it could not be opened the last time."""
    readers: dict[int, int] = field(default_factory=dict)
    """How many requests read which opened store; one that was replaced is closed after the last."""

    @property
    def site(self) -> str:
        """The location without the layer."""
        return self.location.partition("/")[2] if self.layer is not None else self.location

    @property
    def layer(self) -> int | None:
        """The number of the layer; None for locations outside the layers."""
        first = self.location.partition("/")[0]
        return int(first) if first.isdecimal() else None

    @property
    def source(self) -> str:
        """What :meth:`ExampleStore.open` takes: the name of a store of the package, or a path."""
        if not is_built_in(self.path.parent):
            return str(self.path)
        return f"{self.path.parent.parent.name}/{self.path.name.removesuffix(SUFFIX)}"

    @cached_property
    def metrics(self) -> dict[str, float] | None:
        """What was measured of an autoencoder of the package, by name; None for others.

        A path that a store names is not read: the store may be somebody else's.
        """
        if self.kind != "latent" or not is_built_in(self.path.parent):
            return None
        folder = ASSETS / self.path.parent.parent.name / "autoencoders"
        config = folder / self.site / str(self.layer) / "config.json"
        if not config.is_file():
            return None
        measured = files.read_json(config).get("metadata", {}).get("held_out", {})
        return {name: value for name, value in measured.items() if isinstance(value, int | float)}


class Registry:
    """Stores by id.

    Args:
        stores: files, folders, or names of stores of the package such as ``"tiny-tales"``; stores that
            are open already are taken as they are.
        budget: bytes of memory for the figures of open stores.
    """

    def __init__(
        self, stores: Iterable[str | Path | ExampleStore], *, budget: int = BUDGET
    ) -> None:
        self.budget = budget
        self._lock = threading.Lock()
        self._shelves: dict[str, Shelf] = {}
        self._open: OrderedDict[str, None] = OrderedDict()  # the one used last stands last
        for each in stores:
            for store in [each] if isinstance(each, ExampleStore) else _opened(each):
                self._add(store)

    def _add(self, store: ExampleStore) -> None:
        name = _id_of(store.path.name.removesuffix(SUFFIX))
        known = [shelf.path.absolute() for shelf in self._shelves.values()]
        if store.path.absolute() in known:
            return
        id, number = name, 2
        while id in self._shelves:
            id, number = f"{name[:120]}-{number}", number + 1
        found = store.provenance
        self._shelves[id] = Shelf(
            id,
            store.path,
            store.name,
            store.kind,
            store.location,
            len(store),
            store.signed,
            _text(found.get("model")),
            _text(found.get("autoencoder")),
            store,
            mark_of(store.path),
        )
        self._open[id] = None
        self._shrink()

    # --- what there is ---

    def __iter__(self) -> Iterator[Shelf]:
        return iter(self._shelves.values())

    def __len__(self) -> int:
        return len(self._shelves)

    def __getitem__(self, id: str) -> Shelf:
        """What is known about a dictionary; a 404 with the nearest ids if there is none."""
        found = self._shelves.get(id)
        if found is None:
            near = nearest(id, self._shelves)
            hint = f" Did you mean {' or '.join(map(shown, near))}?" if near else ""
            raise Problem(
                404,
                "unknown_dictionary",
                f"There is no dictionary {shown(id)}.{hint}",
                loc=("path", "d"),
                allowed=near,
            )
        return found

    @property
    def model(self) -> str | None:
        """The model that the stores name; the first one where there are several."""
        return next((shelf.model for shelf in self if shelf.model is not None), None)

    def beside(self, shelf: Shelf, step: int) -> Shelf | None:
        """The dictionary of the same kind at the same site, so many layers on; None if there is none."""
        if shelf.layer is None:
            return None
        return next(
            (
                other
                for other in self
                if (other.kind, other.site, other.layer)
                == (shelf.kind, shelf.site, shelf.layer + step)
                and other.model == shelf.model
            ),
            None,
        )

    def available(self) -> list[Shelf]:
        """The dictionaries whose stores can be opened; the log says what is wrong with the others."""
        found = []
        for shelf in self:
            with contextlib.suppress(Problem), self.reading(shelf.id):
                found.append(shelf)
        return found

    def counts(self, shelf: Shelf) -> tuple[int, int]:
        """How many units of a dictionary are alive, and how many are dense."""
        with self.reading(shelf.id) as store:
            found = shelf.counts  # another thread may open the store anew meanwhile
            if found is None:
                found = shelf.counts = len(store.alive), len(store.dense())
        return found

    # --- reading ---

    @contextlib.contextmanager
    def reading(self, id: str) -> Iterator[ExampleStore]:
        """An open store, which stays open inside the block."""
        shelf = self[id]
        store = self._take(shelf)
        try:
            yield store
        except (CheckpointError, SourceError):
            self._drop(shelf, store)  # so that the next request opens what is there then
            raise
        finally:
            self._give_back(shelf, store)

    def _take(self, shelf: Shelf) -> ExampleStore:
        with self._lock:
            if shelf.store is not None and mark_of(shelf.path) != shelf.mark:
                self._retire(shelf)
            opened = shelf.store is None
            if opened:
                self._reopen(shelf)
            store = shelf.store
            assert store is not None
            shelf.readers[id(store)] = shelf.readers.get(id(store), 0) + 1
            self._open[shelf.id] = None
            self._open.move_to_end(shelf.id)
            if opened:
                self._shrink(keep=shelf.id)
            return store

    def _reopen(self, shelf: Shelf) -> None:
        mark = mark_of(shelf.path)
        try:
            store = ExampleStore(shelf.path)
        except NeuronExplainerError as error:
            if not shelf.missing:
                log.warning("the store of %s cannot be opened: %s", shelf.id, error)
            shelf.missing = True
            raise Problem(
                503,
                "store_unavailable",
                f"The store of {shelf.id} cannot be opened: {error}",
                retry_after=5,
            ) from error
        shelf.store, shelf.missing = store, False
        shelf.name, shelf.kind, shelf.location = store.name, store.kind, store.location
        shelf.signed, shelf.n = store.signed, len(store)
        if mark != shelf.mark:
            shelf.mark, shelf.counts = mark, None

    def _give_back(self, shelf: Shelf, store: ExampleStore) -> None:
        with self._lock:
            shelf.readers[id(store)] -= 1
            if not shelf.readers[id(store)]:
                del shelf.readers[id(store)]
                if shelf.store is not store:
                    store.close()

    def _drop(self, shelf: Shelf, store: ExampleStore) -> None:
        with self._lock:
            if shelf.store is store:
                self._retire(shelf)

    def _retire(self, shelf: Shelf) -> None:
        """Close a store, or leave that to the last one who reads it."""
        store, shelf.store = shelf.store, None
        self._open.pop(shelf.id, None)
        if store is not None and id(store) not in shelf.readers:
            store.close()

    def _shrink(self, keep: str = "") -> None:
        """Close stores until the others fit into the budget."""
        total = sum(self._shelves[id].n for id in self._open) * _BYTES_OF_A_UNIT
        for id in list(self._open):
            if total <= self.budget:
                return
            if id != keep:
                total -= self._shelves[id].n * _BYTES_OF_A_UNIT
                self._retire(self._shelves[id])

    def close(self) -> None:
        """Close all stores; a later request opens them again."""
        with self._lock:
            for shelf in self:
                self._retire(shelf)


def _opened(source: str | Path) -> Sequence[ExampleStore]:
    """The stores of a file or folder."""
    path = find_stores(source)
    if not path.is_dir():
        return [ExampleStore(path)]
    paths = sorted(path.glob(f"*{SUFFIX}"))
    if not paths:
        raise InputError(f"{path} holds no store of examples (NAME{SUFFIX}); collate makes one.")
    return [ExampleStore(each) for each in paths]


def _id_of(name: str) -> str:
    """An id of a name: other characters than those of an id become ``-``."""
    found = re.sub(r"[^A-Za-z0-9._-]", "-", name)[:128]
    return found if found.strip(".") else "store"


def not_remote(name: str | None) -> str | None:
    """A name that a store gives; None if it is an address: only a user may name what is fetched."""
    return None if name is None or files.is_remote(name) else name


def _text(value: object) -> str | None:
    return None if value is None else str(value)[:500]
