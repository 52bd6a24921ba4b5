"""A store's file, opened for reading. Damage is found before anything of it is used."""

import json
import math
import sqlite3
import threading
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from neuron_explainer import files
from neuron_explainer.analysis.store_format import (
    APPLICATION_ID,
    COLUMN_DTYPES,
    FTS_TABLES,
    KIND,
    LABEL_SCHEMA,
    META,
    READABLE_VERSIONS,
    SCHEMA,
    UnitRow,
    column_values,
    content_sha256,
    decode_unit,
    decompressor,
    peak_positions,
    unit_crc,
)
from neuron_explainer.analysis.token_store import mark_of
from neuron_explainer.errors import CheckpointError, shown

_LARGEST_UNIT = 64 << 20
"""Bytes that the row of a unit may have when it is decompressed."""


class StoreFile:
    """A store's file, opened read-only. Damage is found when the file is opened or the row is read.

    Args:
        path: a file that :func:`write_store` wrote.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = files.fetch(path)
        _check_header(self.path)
        self.mark = mark_of(self.path)
        self._lock = threading.Lock()
        # immutable: no locks and no journal, so that read-only disks and many readers are fine.
        uri = f"{self.path.absolute().as_uri()}?mode=ro&immutable=1"
        self._connection = sqlite3.connect(
            uri, uri=True, check_same_thread=False, isolation_level=None
        )
        try:
            for pragma in ("trusted_schema = OFF", "query_only = ON", "cell_size_check = ON"):
                self._query(f"PRAGMA {pragma}")
            self.has_labels = self._check_schema()
            self.meta = self._read_meta()
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """Close the file."""
        self._connection.close()

    def query(self, sql: str, values: Sequence[Any] = ()) -> list[tuple[Any, ...]]:
        """The rows of a query; a CheckpointError if the file has changed or is damaged."""
        if mark_of(self.path) != self.mark:
            raise CheckpointError(f"{self.path} has changed since it was opened. Open it again.")
        return self._query(sql, values)

    def _query(self, sql: str, values: Sequence[Any] = ()) -> list[tuple[Any, ...]]:
        with self._lock:
            try:
                return self._connection.execute(sql, values).fetchall()
            except sqlite3.DatabaseError as error:
                raise CheckpointError(f"{self.path}: damaged: {error}.") from None

    def _check_schema(self) -> bool:
        """Refuse tables, views and triggers that are not of this format. Whether there are labels."""
        found = dict(self._query("SELECT name, sql FROM sqlite_master"))
        labelled = "labels" in found
        expected = SCHEMA | (LABEL_SCHEMA if labelled else {})
        wrong = [name for name, sql in expected.items() if found.get(name) != sql]
        wrong += found.keys() - expected.keys() - (FTS_TABLES if labelled else set())
        if wrong:
            raise CheckpointError(
                f"{self.path}: not a store of examples of this format: "
                f"{', '.join(map(shown, sorted(wrong)[:5]))} differ from what a store holds."
            )
        return labelled

    def _read_meta(self) -> dict[str, Any]:
        rows = self._query("SELECT content, crc FROM meta")
        if len(rows) != 1 or zlib.crc32(str(rows[0][0]).encode()) != rows[0][1]:
            raise CheckpointError(f"{self.path}: damaged: the checksum of meta differs.")
        meta = json.loads(rows[0][0])
        if meta.get("kind") != KIND or meta.get("format_version") not in READABLE_VERSIONS:
            versions = " or ".join(map(str, READABLE_VERSIONS))
            raise CheckpointError(
                f"{self.path}: expected kind {KIND!r} of format_version {versions}, found "
                f"{shown(meta.get('kind'))} of {shown(meta.get('format_version'))}; a newer version of "
                "this library may read it."
            )
        expected = META if meta["format_version"] == 1 else (*META, "dictionary")
        if missing := [key for key in expected if key not in meta]:
            raise CheckpointError(f"{self.path}: damaged: meta lacks {', '.join(missing)}.")
        return dict(meta)

    def column(self, name: str) -> npt.NDArray[Any] | None:
        """A figure of all units; None if the store does not have it."""
        rows = self.query("SELECT dtype, shape, crc, data FROM columns WHERE name = ?", (name,))
        if not rows:
            return None
        dtype, shape, crc, data = rows[0]
        kind, sizes = COLUMN_DTYPES.get(name.partition(".")[2] or name), json.loads(shape)
        if zlib.crc32(data) != crc or dtype != kind or sizes[:1] != [self.meta["n_units"]]:
            raise CheckpointError(f"{self.path}: damaged: the column {name} does not fit.")
        size = math.prod(sizes) * np.dtype(dtype).itemsize
        found: npt.NDArray[Any] = column_values(
            self._decompressed(data, size), dtype, sizes, self.meta
        )
        return found

    def unit(self, unit: int) -> UnitRow:
        """What is stored about a unit."""
        rows = self.query("SELECT unit, crc, data FROM units WHERE unit = ?", (unit,))
        if not rows:
            raise CheckpointError(f"{self.path}: damaged: there is no row of unit {unit}.")
        return self._decoded(*rows[0])

    def all_units(self) -> Iterator[UnitRow]:
        """What is stored about each unit, in order."""
        for begin in range(0, self.meta["n_units"], 256):
            rows = self.query(
                "SELECT unit, crc, data FROM units WHERE unit >= ? AND unit < ? ORDER BY unit",
                (begin, begin + 256),
            )
            if [row[0] for row in rows] != list(
                range(begin, min(begin + 256, self.meta["n_units"]))
            ):
                raise CheckpointError(f"{self.path}: damaged: rows of units are missing.")
            yield from (self._decoded(*row) for row in rows)

    def all_peaks(self, most: int) -> Iterator[npt.NDArray[np.int64]]:
        """Of each unit, corpus positions of the peaks of its first examples; see ``peak_positions``."""
        for begin in range(0, self.meta["n_units"], 256):
            sql = "SELECT unit, crc, data FROM units WHERE unit >= ? AND unit < ? ORDER BY unit"
            for unit, crc, data in self.query(sql, (begin, begin + 256)):
                raw = self._checked(unit, crc, data)
                try:
                    yield peak_positions(raw, self.meta, most)
                except (ValueError, IndexError):  # numpy's, where the parts do not add up
                    raise self._not_decoded(unit) from None

    def _decoded(self, unit: int, crc: int, data: bytes) -> UnitRow:
        raw = self._checked(unit, crc, data)
        try:
            return decode_unit(raw, unit, self.meta)
        except (ValueError, IndexError):  # numpy's, where the parts do not add up
            raise self._not_decoded(unit) from None

    def _checked(self, unit: int, crc: int, data: bytes) -> bytes:
        """The content of a unit's row, whose checksum is right."""
        if unit_crc(unit, data) != crc:
            raise CheckpointError(
                f"{self.path}: damaged or changed: the checksum of unit {unit} differs."
            )
        return self._decompressed(data, None)

    def _decompressed(self, data: bytes, size: int | None) -> bytes:
        """The content of compressed data, which must have this many bytes."""
        limit = _LARGEST_UNIT if size is None else size
        try:
            reader = decompressor(self.meta, of_unit=size is None)
            raw: bytes = reader.decompress(data, limit + 1)
        except (zlib.error, OverflowError, ValueError) as error:
            raise CheckpointError(f"{self.path}: damaged: {error}.") from None
        if len(raw) > limit or not reader.eof or (size is not None and len(raw) != size):
            raise CheckpointError(
                f"{self.path}: damaged: compressed data of another size than expected."
            )
        return raw

    def _not_decoded(self, unit: int) -> CheckpointError:
        return CheckpointError(f"{self.path}: damaged: unit {unit} cannot be decoded.")

    def verify(self) -> None:
        """Read everything and compare it with the hash that was written."""
        problems = self._query("PRAGMA integrity_check(1)")
        if problems != [("ok",)]:
            raise CheckpointError(f"{self.path}: damaged: {problems[0][0]}.")
        with self._lock:
            found = content_sha256(self._connection)
        expected = self._query("SELECT sha256 FROM content")
        if expected != [(found,)]:
            raise CheckpointError(
                f"{self.path} is not what was written: expected SHA-256 "
                f"{shown(expected[0][0] if expected else None)} of its content, found {found}."
            )
        for _ in self.all_units():
            pass


def _check_header(path: Path) -> None:
    """Refuse, before SQLite sees it, what is no store and what has lost or gained bytes."""
    with path.open("rb") as file:
        header = file.read(100)
    if len(header) < 100 or not header.startswith(b"SQLite format 3\0"):
        raise CheckpointError(f"{path}: expected a store of examples, found another kind of file.")
    if int.from_bytes(header[68:72], "big") != APPLICATION_ID:
        raise CheckpointError(f"{path}: an SQLite file, but not a store of examples.")
    page = int.from_bytes(header[16:18], "big")
    expected = (65536 if page == 1 else page) * int.from_bytes(header[28:32], "big")
    found = path.stat().st_size
    if found != expected:
        raise CheckpointError(
            f"{path}: expected {expected} bytes, found {found}: truncated or damaged."
        )
