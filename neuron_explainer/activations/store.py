"""Activations on disk: a folder of safetensors shards and a ``manifest.json``, mapped when read.

The manifest holds model, locations, widths, dtype, settings, and the rows and SHA-256 of each shard. It
is rewritten, whole, after each shard: a process that is killed loses the rows since the last shard and
nothing else, and the next one continues after it. A shard holds ``[n, d]`` by location, and ``tokens``,
``document``, ``position`` ``[n]`` (int64): every vector knows where it is from. ``source.json`` says which
text the rows are of, and how it was read and cut: ``evaluate`` needs it to find the text held out.

Shape legend: ``n`` rows (tokens), ``d`` width of a location.
"""

import contextlib
import math
import os
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NotRequired, TypedDict

import numpy as np
import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor

from neuron_explainer import files
from neuron_explainer.activations.chunks import ActivationBatch
from neuron_explainer.activations.corpus import Ints, permutation
from neuron_explainer.activations.harvest import (
    DTYPES,
    Harvester,
    check_finite,
    parse_dtype,
)
from neuron_explainer.activations.token_files import MANIFEST_FILE, read_manifest
from neuron_explainer.activations.windows import TokenWindows, check_rank, check_same_settings
from neuron_explainer.errors import CheckpointError, InputError, shown
from neuron_explainer.files import origins
from neuron_explainer.models.locations import ActivationLocation
from neuron_explainer.progress import progress_bar
from neuron_explainer.settings.fields import read_fields

SOURCE_FILE = "source.json"
_LOCK_FILE = ".lock"
_SHARD_NAME = re.compile(r"shard-\d+\.safetensors")
_KIND, _VERSION = "activation_store", 1
_WHERE = ("tokens", "document", "position")


@dataclass
class StoreHeader:
    """What all rows of a store have in common."""

    model: str
    widths: dict[ActivationLocation, int]
    dtype: torch.dtype
    settings: list[dict[str, Any]]
    """The settings that made the rows (seed, context length, …), one entry for each harvest."""

    def to_json(self) -> dict[str, Any]:
        """The header as it stands in the manifest."""
        return {
            "model": self.model,
            "locations": {str(place): width for place, width in self.widths.items()},
            "dtype": str(self.dtype).removeprefix("torch."),
            "settings": self.settings,
        }

    @classmethod
    def of(
        cls, batch: ActivationBatch, model: str, dtype: torch.dtype, settings: Mapping[str, Any]
    ) -> "StoreHeader":
        """The header of a store whose first batch is ``batch``."""
        widths = {place: x.shape[1] for place, x in batch.activations.items()}
        return cls(model, widths, dtype, [dict(settings)])


@dataclass(frozen=True)
class Shard:
    """One file of a store."""

    file: str
    rows: int
    size: int
    """In bytes."""
    sha256: str


@dataclass(frozen=True)
class _StoreManifest:
    """``manifest.json`` of a store."""

    format_version: int
    kind: str
    model: str
    locations: dict[str, int]
    dtype: Literal["float32", "float16", "bfloat16"]
    settings: list[dict[str, Any]]
    n_rows: int
    n_batches: int
    shards: list[Shard]

    @property
    def header(self) -> StoreHeader:
        widths = {ActivationLocation.parse(text): width for text, width in self.locations.items()}
        return StoreHeader(self.model, widths, DTYPES[self.dtype], self.settings)

    def __post_init__(self) -> None:
        if min([self.n_rows, self.n_batches, *self.locations.values()]) < 0:
            raise CheckpointError("n_rows, n_batches and widths must not be negative.")
        for shard in self.shards:
            if shard.rows < 1 or Path(shard.file).name != shard.file:
                raise CheckpointError(f"a shard of {shard.rows} rows in {shown(shard.file)}.")
        _ = self.header  # an error if a location is none


class _Source(TypedDict):
    """``source.json`` of a store, see :func:`source_of`."""

    model: NotRequired[str | None]
    source: NotRequired[str | None]
    source_fingerprint: NotRequired[str | None]
    data: NotRequired[dict[str, Any]]


class ActivationStore:
    """Reads a store; its rows are mapped into memory.

    The sizes of all files are checked when the store is opened, the SHA-256 of a file when it is first
    read.

    Args:
        folder: written by :class:`StoreWriter`, finished or not.
        verify: False: do not check the SHA-256.
    """

    def __init__(self, folder: str | Path, *, verify: bool = True) -> None:
        self.folder, self.verify = files.local_path(folder), verify
        manifest = read_manifest(self.folder, _StoreManifest, _KIND, _VERSION)
        self.header, self.shards = manifest.header, manifest.shards
        self.n_batches = manifest.n_batches
        """Batches that have been written; an interrupted harvest goes on after them."""
        for shard in self.shards:
            _check_size(self.folder / shard.file, shard)
        self._ends = np.cumsum([shard.rows for shard in self.shards], dtype=np.int64)
        self._mapped: dict[int, dict[str, Tensor]] = {}

    @property
    def record(self) -> dict[str, Any]:
        """Model, text and settings of the harvest; empty if the store does not hold them."""
        path = self.folder / SOURCE_FILE
        if not path.exists():
            return {}
        found = read_fields(_Source, files.read_json(path), str(path), error=CheckpointError)
        source = found.get("source")
        if source is not None and not (files.is_remote(source) or source.startswith(("/", "."))):
            found["source"] = f"./{source}"  # as earlier versions wrote a path below the store's
        return origins.from_folder(found, self.folder)

    @property
    def locations(self) -> list[ActivationLocation]:
        """The locations of the activations in each row."""
        return list(self.header.widths)

    def __len__(self) -> int:
        return int(self._ends[-1]) if self.shards else 0

    def rows(self, begin: int, end: int) -> ActivationBatch:
        """Rows ``begin`` to ``end - 1`` in the order in which they were written, copied to memory."""
        if not 0 <= begin < end <= len(self):
            raise InputError(f"{self.folder} has rows 0 to {len(self) - 1}; found {begin}:{end}.")
        pieces = []
        first = int(np.searchsorted(self._ends, begin, side="right"))
        for index in range(first, len(self.shards)):
            front = int(self._ends[index]) - self.shards[index].rows
            if front >= end:
                break
            span = slice(max(begin - front, 0), min(end - front, self.shards[index].rows))
            pieces.append(self._shard(index).rows(span))
        return ActivationBatch.cat(pieces)

    def batches(self, batch_size: int) -> Iterator[ActivationBatch]:
        """All rows in the order in which they were written, ``batch_size`` at a time."""
        for begin in range(0, len(self), batch_size):
            yield self.rows(begin, min(begin + batch_size, len(self)))

    def _shard(self, index: int) -> ActivationBatch:
        if index not in self._mapped:
            self._mapped[index] = self._map(self.folder / self.shards[index].file, index)
        tensors = self._mapped[index]
        activations = {place: tensors[str(place)] for place in self.locations}
        return ActivationBatch(activations, *(tensors[name] for name in _WHERE))

    def _map(self, path: Path, index: int) -> dict[str, Tensor]:
        shard = self.shards[index]
        if self.verify and (digest := files.sha256_of(path)) != shard.sha256:
            raise CheckpointError(
                f"{path}: damaged: expected SHA-256 {shard.sha256}, found {digest}. "
                f"The other {len(self.shards) - 1} shards are not touched by it."
            )
        try:
            tensors = safetensors.torch.load_file(path)  # maps, does not read
        except SafetensorError as error:
            raise CheckpointError(f"{path} cannot be read: {error}") from error
        n, dtype = shard.rows, self.header.dtype
        expected = {str(place): ([n, d], dtype) for place, d in self.header.widths.items()}
        expected |= dict.fromkeys(_WHERE, ([n], torch.int64))
        found = {name: (list(x.shape), x.dtype) for name, x in tensors.items()}
        if found != expected:
            raise CheckpointError(f"{path}: expected {expected}, found {found}.")
        return tensors

    def __repr__(self) -> str:
        places = ", ".join(f"{place} [{d}]" for place, d in self.header.widths.items())
        return (
            f"ActivationStore({str(self.folder)!r}, {len(self)} rows of {places}, "
            f"{self.header.dtype}, {len(self.shards)} shards)"
        )


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


class StoreWriter:
    """Writes batches to a new or an existing store; a context manager.

    The batch with which a shard reaches ``shard_rows`` closes it, so a shard holds whole batches. Leaving
    the block closes the last shard, also if an error ends the block. ``n_batches`` is the number of the
    batch to continue with.

    Args:
        folder: new or empty; with ``append`` it may hold a store.
        model: the name of the model whose activations the rows are.
        dtype: of the values on disk: float32, float16 or bfloat16, as a name or a ``torch.dtype``.
        shard_rows: number of rows that closes a shard.
        settings: the settings that made the rows, as JSON values.
        append: add to the store in ``folder`` if there is one; it must have the same model, locations,
            widths and dtype.
    """

    def __init__(
        self,
        folder: str | Path,
        model: str,
        *,
        dtype: str | torch.dtype = "float32",
        shard_rows: int = 1 << 18,
        settings: Mapping[str, Any] | None = None,
        append: bool = False,
    ) -> None:
        if shard_rows < 1:
            raise InputError(f"shard_rows must be at least 1, found {shard_rows}.")
        self.folder, self.shard_rows = files.local_path(folder), shard_rows
        self._model, self._dtype = model, parse_dtype(dtype)
        self._settings = dict(settings or {})
        self._header: StoreHeader | None = None
        self._shards: list[Shard] = []
        self._pending: list[ActivationBatch] = []
        self.n_batches = 0
        """Number of batches in closed shards."""
        self.n_rows = 0
        """Number of rows added so far, including those not yet written."""
        self._append = append
        self._claim = contextlib.ExitStack()

    def __enter__(self) -> "StoreWriter":
        check_store_folder(self.folder)
        with contextlib.ExitStack() as stack:
            stack.enter_context(files.claim(self.folder, "store"))
            self._take_up()
            self._claim = stack.pop_all()
        return self

    def __exit__(self, kind: object, error: object, trace: object) -> None:
        with self._claim:
            self.close_shard()  # after an error too: what came before it is whole

    def _take_up(self) -> None:
        """Continue after the rows that are there, and delete what an earlier process left unfinished."""
        if files.list_folder(self.folder, but=_LOCK_FILE) and not self._append:
            raise InputError(f"{self.folder} is not empty; pass append=True to add to a store.")
        files.remove_leftovers(self.folder)
        if (self.folder / MANIFEST_FILE).exists():
            store = ActivationStore(self.folder)
            self._header, self._shards = store.header, list(store.shards)
            self.n_batches, self.n_rows = store.n_batches, len(store)
            self._check_same(StoreHeader(self._model, store.header.widths, self._dtype, []))
            if self._settings not in self._header.settings:
                self._header.settings.append(self._settings)
        known = {shard.file for shard in self._shards}
        for path in self.folder.iterdir():  # written, but not yet in the manifest
            if _SHARD_NAME.fullmatch(path.name) and path.name not in known:
                files.remove(path)

    def _check_same(self, here: StoreHeader) -> None:
        assert self._header is not None
        there, now = self._header.to_json(), here.to_json()
        differing = [
            f"{key} {there[key]!r}, not {now[key]!r}"
            for key in ("model", "locations", "dtype")
            if there[key] != now[key]
        ]
        if differing:
            raise InputError(
                f"the store {self.folder} cannot take these rows: it has {'; '.join(differing)}."
            )

    def check_only_settings(self) -> None:
        """Raise CheckpointError if any stored row was made with other settings than these."""
        for there in self._header.settings if self._header else []:
            for part in there.keys() | self._settings.keys():
                check_same_settings(
                    there.get(part, {}), self._settings.get(part, {}), f"{part} settings"
                )

    def add(self, batch: ActivationBatch) -> None:
        """Add a batch; it is written when its shard is closed."""
        batch = ActivationBatch(
            {place: x.detach().to("cpu", self._dtype) for place, x in batch.activations.items()},
            *(getattr(batch, name).cpu().long() for name in _WHERE),
        )
        check_finite(batch)
        here = StoreHeader.of(batch, self._model, self._dtype, self._settings)
        if self._header is None:
            self._header = here
        self._check_same(here)
        self._pending.append(batch)
        self.n_rows += len(batch)
        if sum(map(len, self._pending)) >= self.shard_rows:
            self.close_shard()

    def close_shard(self) -> None:
        """Write the rows that have been added since the last shard."""
        if not self._pending:
            return
        rows = ActivationBatch.cat(self._pending)
        if len(rows):
            self._shards.append(self._write_shard(rows))
        self.n_batches += len(self._pending)
        self._pending = []
        self._write_manifest()

    def _write_shard(self, rows: ActivationBatch) -> Shard:
        name = f"shard-{len(self._shards):05d}.safetensors"
        tensors = {str(place): x.contiguous() for place, x in rows.activations.items()}
        tensors |= {name: getattr(rows, name).contiguous() for name in _WHERE}
        with files.atomic_write(self.folder / name) as temporary:
            safetensors.torch.save_file(tensors, temporary)
        path = self.folder / name
        return Shard(name, len(rows), path.stat().st_size, files.sha256_of(path))

    def _write_manifest(self) -> None:
        assert self._header is not None
        manifest = {
            "format_version": _VERSION,
            "kind": _KIND,
            **self._header.to_json(),
            "n_rows": sum(shard.rows for shard in self._shards),
            "n_batches": self.n_batches,
            "shards": [vars(shard) for shard in self._shards],
        }
        files.write_json(self.folder / MANIFEST_FILE, manifest)


def harvest_to_store(
    folder: str | Path,
    harvester: Harvester,
    windows: TokenWindows,
    *,
    dtype: str | torch.dtype = "float32",
    shard_rows: int = 1 << 18,
    num_tokens: int | None = None,
    progress: bool = False,
) -> ActivationStore:
    """Write the activations of windows to a folder; the same call resumes an interrupted one.

    Args:
        folder: new, or that of the interrupted call, with the same arguments.
        harvester: computes the activations.
        windows: the tokens to compute them on.
        dtype: of the values on disk.
        shard_rows: as for :class:`StoreWriter`.
        num_tokens: stop with the batch that reaches this many rows; None: go through all windows.
        progress: show a progress bar on stderr.
    """
    if num_tokens is None and windows.n_batches is None:
        raise InputError("windows without end need num_tokens to stop at.")
    settings = {"harvest": harvester.describe(), "windows": windows.describe()}
    writer = StoreWriter(
        folder,
        harvester.context.short_name,
        dtype=dtype,
        shard_rows=shard_rows,
        settings=settings,
        append=True,
    )
    with writer, progress_bar(total=num_tokens, unit=" tokens", disable=not progress) as bar:
        writer.check_only_settings()
        source = origins.for_folder(source_of(harvester, windows), folder)
        files.write_json(writer.folder / SOURCE_FILE, source)
        bar.update(writer.n_rows)
        number = writer.n_batches
        while number != windows.n_batches and writer.n_rows < (num_tokens or math.inf):
            batch = harvester(windows.batch(number))
            writer.add(batch)
            bar.update(len(batch))
            number += 1
    return ActivationStore(folder)


def source_of(harvester: Harvester, windows: TokenWindows) -> dict[str, Any]:
    """The content of ``source.json``: model, text and settings of a harvest.

    ``data`` holds fields of :class:`~neuron_explainer.activations.data_config.DataConfig`. ``source`` is
    None if the tokens were not read from a file, a folder or a data set with a name.
    """
    context, origin = harvester.context, dict(windows.corpus.origin)
    source = origin.pop("source", None)
    return {
        "model": origins.full_path(context.reference),
        "source": source,
        "source_fingerprint": windows.corpus.source_fingerprint,
        "data": {
            "hold_out": 0.0,
            "data_seed": windows.seed or 0,
            "context_length": windows.context_length,
            "windows_per_forward": windows.batch_size,
            "pack": windows.concat,
            "bos": windows.bos is not None,
            "keep_bos": harvester.keep_bos,
            "max_norm_multiple": harvester.max_norm_multiple,
            "model_autocast": harvester.autocast_bf16,
            **origin,
        },
    }


def check_store_folder(folder: str | Path) -> None:
    """Raise InputError if a folder holds anything but a store or the beginning of one."""
    path = files.local_path(folder)
    if not os.path.exists(path):
        return
    if not path.is_dir():
        raise InputError(f"{path} is a file; a store of activations is a folder.")
    if (path / MANIFEST_FILE).exists():
        read_manifest(path, _StoreManifest, _KIND, _VERSION)
        return
    # An earlier process may have been killed before it wrote the first manifest.
    foreign = [
        name
        for name in files.list_folder(path, but=_LOCK_FILE)
        if not (name == SOURCE_FILE or _SHARD_NAME.fullmatch(name) or files.is_leftover(name))
    ]
    if foreign:
        raise InputError(
            f"{path} holds {foreign[0]!r} and is no store of activations; choose another folder."
        )


# --- the manifest ---


def _check_size(path: Path, shard: Shard) -> None:
    found = path.stat().st_size if path.exists() else None
    if found != shard.size:
        raise CheckpointError(
            f"{path}: expected {shard.size} bytes, found {'no file' if found is None else found}: "
            "the shard is cut off or missing. The other shards are not touched by it."
        )
