"""The file of a store of examples: one SQLite file for a dictionary or a location, written once.

Tables (all numbers little-endian; ``datasets.md`` has the same list and a reader of ten lines):

- ``meta(content, crc)``: one row, a JSON object: ``format_version``, what the units are, how many, the
  settings and the provenance of the collation, and the SHA-256 of the token file.
- ``columns(name, dtype, shape, crc, data)``: a figure of all units in each row, by planes, compressed.
- ``units(unit, crc, data)``: for each unit its histogram, examples and partners, compressed.
- ``labels(id, unit, text, source, score)`` and the index ``labels_fts`` (FTS5), if there are labels.
- ``content(sha256)``: one row, the hash of all of the above, see :func:`content_sha256`.

What a row of ``units`` holds, in this order, with ``n`` examples, ``b`` bins, ``p`` partners and ``k`` keys::

    n, first bin, b, p, k                u2 [5]
    group, interval                      u1 [n] each
    length, peak                         u2 [n] each
    partner, tokens with both            u4 [p] each
    which activations are stored         bits [n, width], six in a byte, each row filled up to whole bytes,
                                         lowest bit first
    counts of the bins                   u4 [b]
    start                                meta["start_dtype"] [n]
    value                                f4 [n]
    sampling keys                        meta["key_dtype"] [k]
    these activations                    u2 [number of bits set]: the bits of ``value`` in float16 minus those
                                         of the activation, both as numbers of 16 bits, modulo 2**16

Each line is one array of numbers (``bits``: of bytes) and is stored *by planes*: the highest bytes of all
numbers, then the second highest, and so on; of similar numbers the high bytes are similar. The last five
arrays come in two parts: first the upper planes of all five, then the lower ones, which are nearly random.
Upper are three planes of the counts, one of value and activations, half of start, a quarter of keys. The
activation at the peak is ``value`` and is not stored a second time. The rank of an example is its place among
those of the same group and interval. Keys belong to the examples of the groups "stratum", "uniform",
"weighted" and "inactive"; those of "top" and "bottom" are their values. Where ``meta["hashed_keys"]`` is
true, they belong to "weighted" alone: all others are the hash ``u`` that
:mod:`~neuron_explainer.analysis.collation.reservoirs` describes, with ``settings["key_seed"]``, in float32.

Compressed is: with deflate alone, without zlib's header and checksum; rows of ``units`` with
``meta["dictionary"]`` as preset dictionary (in base64: parts of some rows, for rows are alike). ``crc`` is
``zlib.crc32`` of the compressed data, which for ``units`` begins with the number of the unit (``i8``).

Stores of version 1 are read too. In them counts come second, eight bits stand in a byte, partners stand
before the activations, which are stored as they are (``f2``), no array is in two parts, columns are not by
planes, there is no dictionary, and the compressed data have zlib's header and checksum.
"""

import base64
import itertools
import json
import math
import sqlite3
import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from hashlib import sha256
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from neuron_explainer import __version__, files
from neuron_explainer.analysis.collation.reservoirs import uniform, unit_hashes
from neuron_explainer.analysis.records import (
    GROUPS,
    N_BINS,
    Collected,
    ExampleTable,
    Moments,
    UnitStatistics,
)
from neuron_explainer.analysis.token_store import TokenStore
from neuron_explainer.errors import InputError, SourceError, shown

Ints = npt.NDArray[np.int64]

FORMAT_VERSION = 2
READABLE_VERSIONS = (1, 2)
KIND = "example_store"
APPLICATION_ID = 0x4E455853  # "NEXS": SQLite keeps it in the file's header
_SAMPLE = 1000
"""Rows from which the dictionary and the size of pages are chosen."""
_IN_A_BYTE = 6
_LONGEST_ALONE = 1024
"""Bytes of a row that may be better with one code for all of it."""
_MODELS, _LONGEST_MODEL = 8, 512
"""How many rows the dictionary is made of, and how many bytes of each."""
_ROW, _PAGE = 16, 8
"""Bytes that SQLite adds to the data of a row, and to a page of rows."""

SCHEMA = {
    "meta": "CREATE TABLE meta (content TEXT NOT NULL, crc INTEGER NOT NULL)",
    "columns": "CREATE TABLE columns (name TEXT PRIMARY KEY, dtype TEXT NOT NULL, shape TEXT NOT NULL, "
    "crc INTEGER NOT NULL, data BLOB NOT NULL) WITHOUT ROWID",
    "units": "CREATE TABLE units (unit INTEGER PRIMARY KEY, crc INTEGER NOT NULL, data BLOB NOT NULL)",
    "content": "CREATE TABLE content (sha256 TEXT NOT NULL)",
}
LABEL_SCHEMA = {
    "labels": "CREATE TABLE labels (id INTEGER PRIMARY KEY, unit INTEGER NOT NULL, text TEXT NOT NULL, "
    "source TEXT NOT NULL, score REAL)",
    "labels_unit": "CREATE INDEX labels_unit ON labels (unit)",
    "labels_fts": "CREATE VIRTUAL TABLE labels_fts USING fts5(text, content='labels', content_rowid='id')",
}
FTS_TABLES = {f"labels_fts_{part}" for part in ("data", "idx", "docsize", "config")}
_SAMPLED = GROUPS.index("stratum")  # from this group on, keys are not the values
_WEIGHTED = GROUPS.index("weighted")


class Label(NamedTuple):
    """What somebody or something says that a unit means."""

    unit: int
    text: str
    source: str = ""
    """Who says so: a person, a method, a data set."""
    score: float | None = None


# --- writing ---


def write_store(
    path: str | Path,
    collected: Collected,
    tokens: TokenStore,
    labels: Iterable[Label] = (),
) -> None:
    """Write a store. The file appears whole or not at all.

    Args:
        path: ``NAME.store`` in the folder that ``tokens`` lies in.
        collected: what is known about the units.
        tokens: the corpus that the examples point into.
        labels: what is known about the meaning of units, such as published explanations.
    """
    check_collected(collected, tokens)
    labels = [_checked_label(label, collected.n_units) for label in labels]
    with files.atomic_write(path) as temporary:
        try:
            connection = sqlite3.connect(temporary, isolation_level=None)
            try:
                _write(connection, collected, tokens, labels)
            finally:
                connection.close()
        except sqlite3.OperationalError as error:
            free = _free_bytes(temporary)
            raise SourceError(f"cannot write {path}: {error} ({free} bytes are free).") from error


def _write(
    connection: sqlite3.Connection,
    collected: Collected,
    tokens: TokenStore,
    labels: Sequence[Label],
) -> None:
    execute = connection.execute
    meta = _meta(collected, tokens)
    meta["dictionary"] = _dictionary(collected, meta)
    rows = _unit_rows(collected, meta)
    first = list(itertools.islice(rows, _SAMPLE))
    execute(f"PRAGMA page_size = {_page_size([len(row[2]) for row in first], collected.n_units)}")
    execute("PRAGMA journal_mode = OFF")  # nobody reads the file before it is whole
    execute("PRAGMA synchronous = OFF")  # atomic_write brings it to the disk
    execute(f"PRAGMA application_id = {APPLICATION_ID}")
    execute("BEGIN")
    for statement in SCHEMA.values():
        execute(statement)
    text = json.dumps(meta, allow_nan=False, sort_keys=True)
    execute("INSERT INTO meta VALUES (?, ?)", (text, zlib.crc32(text.encode())))
    connection.executemany(
        "INSERT INTO columns VALUES (?, ?, ?, ?, ?)", _column_rows(collected, meta)
    )
    connection.executemany("INSERT INTO units VALUES (?, ?, ?)", first)
    connection.executemany("INSERT INTO units VALUES (?, ?, ?)", rows)
    if labels:
        for statement in LABEL_SCHEMA.values():
            execute(statement)
        connection.executemany(
            "INSERT INTO labels (unit, text, source, score) VALUES (?, ?, ?, ?)", labels
        )
        execute("INSERT INTO labels_fts (labels_fts) VALUES ('rebuild')")
        execute("INSERT INTO labels_fts (labels_fts) VALUES ('optimize')")
    execute("INSERT INTO content VALUES (?)", (content_sha256(connection),))
    execute("COMMIT")


def _free_bytes(path: Path) -> int:
    import shutil

    return shutil.disk_usage(path.parent).free


META = (
    *("name", "unit", "location", "signed", "n_units", "n_tokens", "n_examples", "width"),
    *("hashed_keys", "key_dtype", "start_dtype", "coactivation_tokens", "partners", "tokens"),
    *("all_from_active", "settings", "provenance"),
)
"""What ``meta`` of every store holds, among other things."""


def _meta(collected: Collected, tokens: TokenStore) -> dict[str, Any]:
    corpus, coactivation = tokens.corpus, collected.coactivation
    hashed = _are_hashed(collected)
    keys = collected.examples.key[_keys_are_stored(collected.examples.group, hashed)]
    meta = {
        "format_version": FORMAT_VERSION,
        "kind": KIND,
        "name": collected.name,
        "unit": collected.kind,
        "location": collected.location,
        "signed": collected.signed,
        "n_units": collected.n_units,
        "n_tokens": collected.statistics.n_tokens,
        "n_examples": len(collected.examples),
        "width": int(collected.examples.activations.shape[1]),
        "start_dtype": "<u4" if len(corpus.tokens) <= 1 << 32 else "<i8",
        "hashed_keys": hashed,
        "key_dtype": "<f4" if np.array_equal(keys, keys.astype(np.float32)) else "<f8",
        "coactivation_tokens": None if coactivation is None else coactivation.n_tokens,
        "partners": 0 if coactivation is None else coactivation.partner.shape[1],
        "groups": list(GROUPS),
        "histogram": "bin i ends below 2**((i - 80) / 4); the last bin has no end",
        "tokens": {
            "source": corpus.name,
            "n_tokens": len(corpus.tokens),
            "n_documents": len(corpus.starts) - 1,
            "sha256": tokens.sha256,
        },
        "all_from_active": _all_from_active(collected.statistics),
        "settings": collected.settings,
        "provenance": collected.provenance,
        "written_by": f"neuron_explainer {__version__}",
    }
    try:
        json.dumps(meta, allow_nan=False)
    except (TypeError, ValueError) as error:
        raise InputError(
            f"settings and provenance of a store must be JSON values: {error}."
        ) from None
    return meta


def _keys_are_stored(group: npt.NDArray[np.uint8], hashed: bool) -> npt.NDArray[np.bool_]:
    return group == _WEIGHTED if hashed else group >= _SAMPLED


def hashed_keys(table: ExampleTable, seed: int, n_units: int, pairs: bool) -> ExampleTable:
    """The table with the keys that are hashes filled in."""
    peak = table.peak.astype(np.int64)
    query = (np.sqrt(8 * peak + 1).astype(np.int64) - 1) // 2 if pairs else peak
    key = uniform(unit_hashes(seed, n_units)[table.unit], table.start + query)
    hashed = (table.group >= _SAMPLED) & (table.group != _WEIGHTED)
    found = np.where(hashed, key.astype(np.float32), table.key)
    return replace(table, key=found)


def _are_hashed(collected: Collected) -> bool:
    """Whether the keys are those of a collation, so that they need not be stored."""
    seed, table = collected.settings.get("key_seed"), collected.examples
    if type(seed) is not int or (table.unit >= collected.n_units).any():
        return False
    found = hashed_keys(table, seed, collected.n_units, collected.kind == "head")
    return np.array_equal(found.key, table.key)


MOMENTS = ("count", "mean", "m2", "m3", "m4")


def all_from_active(active: Moments, n_tokens: int) -> Moments:
    """The moments over all tokens where a unit that is not active has the value 0."""
    return active.with_zeros(n_tokens - active.count)


def _all_from_active(statistics: UnitStatistics) -> bool:
    """Whether the moments over all tokens need not be stored."""
    found = all_from_active(statistics.active, statistics.n_tokens)
    return all(
        np.array_equal(getattr(found, part), getattr(statistics.all, part)) for part in MOMENTS
    )


def _column_rows(
    collected: Collected, meta: Mapping[str, Any]
) -> Iterator[tuple[str, str, str, int, bytes]]:
    statistics = collected.statistics
    columns: dict[str, npt.NDArray[Any]] = {
        f"{of}.{part}": getattr(getattr(statistics, of), part)
        for of in (("active",) if meta["all_from_active"] else ("active", "all"))
        for part in MOMENTS
    }
    columns |= {name: getattr(statistics, name) for name in ("max", "min", "last_active")}
    if collected.coactivation is not None:
        columns["coactivation.count"] = collected.coactivation.count
    if collected.stratum_limits is not None:
        columns["stratum_limits"] = collected.stratum_limits
    for name, values in columns.items():
        kind = COLUMN_DTYPES[name.partition(".")[2] or name]
        data = _deflated(_planes(values.astype(kind).reshape(-1)))
        yield name, kind, json.dumps(list(values.shape)), zlib.crc32(data), data


COLUMN_DTYPES = {
    "count": "<i8",
    **dict.fromkeys(("mean", "m2", "m3", "m4", "stratum_limits"), "<f8"),
    **dict.fromkeys(("max", "min"), "<f4"),
    "last_active": "<i8",
}


def _unit_rows(collected: Collected, meta: Mapping[str, Any]) -> Iterator[tuple[int, int, bytes]]:
    dictionary = base64.b64decode(meta["dictionary"])
    for unit, blocks in enumerate(_blocks(collected, meta, range(collected.n_units))):
        data = _deflated(blocks, dictionary)
        yield unit, unit_crc(unit, data), data


def _blocks(
    collected: Collected, meta: Mapping[str, Any], units: Iterable[int]
) -> Iterator[list[bytes]]:
    """What is stored about each of these units, in blocks of bytes of a kind."""
    table, coactivation = collected.examples, collected.coactivation
    ends = np.searchsorted(table.unit, np.arange(collected.n_units + 1))
    for unit in units:
        rows = table.rows(slice(ends[unit], ends[unit + 1]))
        partners, both = np.zeros(0, np.int64), np.zeros(0, np.int64)
        if coactivation is not None:
            real = coactivation.partner[unit] >= 0
            partners, both = coactivation.partner[unit][real], coactivation.both[unit][real]
        yield _encode_unit(rows, collected.statistics.histogram[unit], partners, both, meta)


def _dictionary(collected: Collected, meta: Mapping[str, Any]) -> str:
    """The beginnings of some rows, in base64: what most rows have in common is in them."""
    known = np.unique(collected.examples.unit[: _SAMPLE * _MODELS])
    chosen = known[:: max(1, len(known) // _MODELS)][:_MODELS].tolist()
    rows = (b"".join(blocks)[:_LONGEST_MODEL] for blocks in _blocks(collected, meta, chosen))
    return base64.b64encode(b"".join(rows)).decode()


def unit_crc(unit: int, data: bytes) -> int:
    return zlib.crc32(data, zlib.crc32(unit.to_bytes(8, "little", signed=True)))


def _encode_unit(
    rows: ExampleTable,
    histogram: npt.NDArray[Any],
    partners: npt.NDArray[Any],
    both: npt.NDArray[Any],
    meta: Mapping[str, Any],
) -> list[bytes]:
    n = len(rows)
    filled = np.flatnonzero(histogram)
    first, end = (int(filled[0]), int(filled[-1]) + 1) if len(filled) else (0, 0)
    # The peak is left out: its value is stored exactly.
    stored = rows.activations != 0
    stored[np.arange(n), rows.peak] = False
    # Beyond the range of float16: the largest number it has. The peak's value is exact in any case.
    activations = np.nan_to_num(rows.activations[stored], posinf=65504, neginf=-65504)
    below = np.repeat(_float16_bits(rows.value), stored.sum(1)) - _float16_bits(activations)
    keys = rows.key[_keys_are_stored(rows.group, meta["hashed_keys"])]
    whole = [
        np.array([n, first, end - first, len(partners), len(keys)], "<u2"),
        rows.group.astype("u1"),
        rows.interval.astype("u1"),
        rows.length.astype("<u2"),
        rows.peak.astype("<u2"),
        partners.astype("<u4"),
        both.astype("<u4"),
        _packed(stored),
    ]
    parted = [
        histogram[first:end].astype("<u4"),
        rows.start.astype(meta["start_dtype"]),
        rows.value.astype("<f4"),
        keys.astype(meta["key_dtype"]),
        below,
    ]
    planes = [_planes(column) for column in parted]
    sizes = _upper_planes(meta)
    *upper, last = [b"".join(x[:size]) for x, size in zip(planes, sizes, strict=True)]
    lower = [b"".join(x[size:]) for x, size in zip(planes, sizes, strict=True)]
    first_block = b"".join(plane for column in whole for plane in _planes(column))
    return [first_block + b"".join(upper), last, b"".join(lower)]


def _upper_planes(meta: Mapping[str, Any]) -> tuple[int, ...]:
    """How many planes of each array in two parts belong to the first: those in which numbers are alike."""
    start, key = (np.dtype(meta[f"{name}_dtype"]).itemsize for name in ("start", "key"))
    return 3, start // 2, 1, key // 4, 1


def _packed(bits: npt.NDArray[np.bool_]) -> npt.NDArray[np.uint8]:
    """Six bits of each row in a byte, which leaves fewer different bytes than eight do."""
    n, width = bits.shape
    per_row = -(-width // _IN_A_BYTE)
    filled = np.zeros((n, per_row * _IN_A_BYTE), bool)
    filled[:, :width] = bits
    groups = filled.reshape(n, per_row, _IN_A_BYTE)
    return np.packbits(groups, axis=2, bitorder="little").reshape(-1)


def _float16_bits(values: npt.NDArray[Any]) -> npt.NDArray[np.uint16]:
    """The bits of these values in float16, as numbers; of positive values, the larger has the larger."""
    with np.errstate(over="ignore"):
        return values.astype("<f2").view("<u2")


def _planes(column: npt.NDArray[Any]) -> list[bytes]:
    """The highest bytes of all numbers, the second highest, and so on."""
    planes = column.view("u1").reshape(len(column), column.itemsize).T
    return [plane.tobytes() for plane in planes[::-1]]


def _deflated(blocks: Sequence[bytes], dictionary: bytes = b"") -> bytes:
    """All bytes as one deflate stream, the smallest of several.

    Blocks of different kinds are best coded each by itself, if they are long enough to pay for their codes.
    Numbers that are nearly random have short repetitions by chance, which are no gain: ``Z_FILTERED``
    ignores them.
    """
    ways = [(blocks, zlib.Z_DEFAULT_STRATEGY), (blocks, zlib.Z_FILTERED)]
    if sum(map(len, blocks)) <= _LONGEST_ALONE:
        ways.append(([b"".join(blocks)], zlib.Z_DEFAULT_STRATEGY))
    return min((_stream(*way, dictionary) for way in ways), key=len)


def _stream(blocks: Sequence[bytes], strategy: int, dictionary: bytes) -> bytes:
    stream = zlib.compressobj(9, zlib.DEFLATED, -zlib.MAX_WBITS, 9, strategy, dictionary)
    out = []
    for block in blocks:
        out += [stream.compress(block), stream.flush(zlib.Z_BLOCK)]
    return b"".join([*out, stream.flush()])


def _page_size(sizes: Sequence[int], n_rows: int) -> int:
    """The size of SQLite's pages that makes the smallest file.

    Rows leave a part of their page empty, and of a few rows each table takes a whole page.
    """

    def total(page: int) -> float:
        pages, free = 0, 0
        for size in sizes:
            row = size + _ROW
            if row > page - _PAGE:  # has pages of its own
                pages, free = pages + -(-row // page), 0
            elif row > free:
                pages, free = pages + 1, page - _PAGE - row
            else:
                free -= row
        return page * (pages * n_rows / len(sizes) + len(SCHEMA) + 2)

    return min((4096, 8192, 16384, 32768, 65536), key=total)


# --- what may be written ---


def check_collected(collected: Collected, tokens: TokenStore) -> None:
    """An error that names the place if the columns do not fit each other or the corpus."""
    table, n_units, what = collected.examples, collected.n_units, collected.name
    _check_shapes(collected)
    if n_units == 0:
        raise InputError(f"{what}: there are no units.")
    _check_figures(collected)
    pairs = collected.kind == "head"
    length = table.length.astype(np.int64)
    size = length * (length + 1) // 2 if pairs else length
    document = np.searchsorted(tokens.corpus.starts, table.start, side="right") - 1
    inside = (table.start >= 0) & (table.start < len(tokens.corpus.tokens))
    end = tokens.corpus.starts[np.where(inside, document, 0) + 1]
    columns: list[npt.NDArray[Any]] = [table.rank, table.interval, table.group, table.unit]
    order = np.lexsort(columns)
    problems = {
        f"a unit between 0 and {n_units - 1}": (table.unit >= 0) & (table.unit < n_units),
        f"a group between 0 and {len(GROUPS) - 1}": table.group < len(GROUPS),
        "tokens within one document of the corpus": inside & (table.start + length <= end),
        f"1 to {table.activations.shape[1]} activations": (size > 0)
        & (size <= table.activations.shape[1]),
        "a peak among the activations": table.peak < size,
        "a finite value": np.isfinite(table.value),
        "activations that are numbers": ~np.isnan(table.activations).any(axis=1),
        "its place in the order (unit, group, interval, rank)": order == np.arange(len(table)),
        "ranks that count from 0 without a gap": table.rank == _ranks(table),
    }
    for expected, right in problems.items():
        if not right.all():
            row = int(np.flatnonzero(~right)[0])
            raise InputError(
                f"{what}: example {row} (unit {table.unit[row]}, group {table.group[row]}, start "
                f"{table.start[row]}, length {table.length[row]}, peak {table.peak[row]}, value "
                f"{table.value[row]}): expected {expected}."
            )


def _check_figures(collected: Collected) -> None:
    statistics, what = collected.statistics, collected.name
    for name, moments in (("active", statistics.active), ("all", statistics.all)):
        right = (moments.count >= 0) & (moments.count <= statistics.n_tokens)
        right &= (moments.m2 >= 0) & np.isfinite(
            [moments.mean, moments.m2, moments.m3, moments.m4]
        ).all(axis=0)
        if not right.all():
            unit = int(np.flatnonzero(~right)[0])
            raise InputError(
                f"{what}: {name} of unit {unit}: expected a count of 0 to {statistics.n_tokens} and finite "
                f"sums, found count {moments.count[unit]}, mean {moments.mean[unit]}, m2 "
                f"{moments.m2[unit]}, m3 {moments.m3[unit]}, m4 {moments.m4[unit]}."
            )


def _check_shapes(collected: Collected) -> None:
    statistics, table, coactivation = (
        collected.statistics,
        collected.examples,
        collected.coactivation,
    )
    n_units, n = collected.n_units, len(table)
    expected: dict[str, tuple[npt.NDArray[Any], tuple[int, ...]]] = {
        "histogram": (statistics.histogram, (n_units, N_BINS)),
        "activations": (table.activations, (n, *table.activations.shape[1:2])),
    }
    for of in ("active", "all"):
        moments = getattr(statistics, of)
        expected |= {f"{of}.{name}": (getattr(moments, name), (n_units,)) for name in MOMENTS}
    for name in ("min", "last_active"):
        expected[name] = getattr(statistics, name), (n_units,)
    for name in ("group", "interval", "rank", "start", "length", "peak", "value", "key"):
        expected[name] = getattr(table, name), (n,)
    if coactivation is not None:
        shape = (n_units, *coactivation.partner.shape[1:2])
        expected |= {
            "coactivation.count": (coactivation.count, (n_units,)),
            "coactivation.partner": (coactivation.partner, shape),
            "coactivation.both": (coactivation.both, shape),
        }
    for name, (values, shape) in expected.items():
        if values.shape != shape or values.ndim != len(shape):
            raise InputError(
                f"{collected.name}: {name} should have the shape {list(shape)}, found "
                f"{list(values.shape)}."
            )


def _ranks(table: ExampleTable) -> npt.NDArray[np.int64]:
    """Each example's place among those of the same unit, group and interval."""
    n = len(table)
    if not n:
        return np.zeros(0, np.int64)
    columns = (table.unit, table.group, table.interval)
    new = np.ones(n, dtype=bool)
    new[1:] = np.any([np.diff(column.astype(np.int64)) != 0 for column in columns], axis=0)
    begin = np.maximum.accumulate(np.where(new, np.arange(n), 0))
    return np.arange(n) - begin


def _checked_label(label: Label, n_units: int) -> Label:
    if not 0 <= label.unit < n_units:
        raise InputError(
            f"the label {shown(label.text)} is of unit {label.unit}; units are 0 to {n_units - 1}."
        )
    if label.score is not None and not math.isfinite(label.score):
        label = label._replace(score=None)
    # Half of a surrogate pair has no form in bytes.
    return label._replace(text=encodable(label.text), source=encodable(label.source))


def encodable(text: str) -> str:
    """The text with each half of a surrogate pair replaced."""
    return text.encode(errors="replace").decode()


# --- reading ---


@dataclass(frozen=True, eq=False)
class UnitRow:
    """What a row of ``units`` holds, decoded."""

    histogram: npt.NDArray[np.uint32]
    """``[N_BINS]``"""
    examples: ExampleTable
    partner: npt.NDArray[np.int32]
    """``[p]``"""
    both: npt.NDArray[np.int64]
    """``[p]``"""


def content_sha256(connection: sqlite3.Connection) -> str:
    """SHA-256 over the rows of all tables but ``content``, as JSON lines, with blobs by their own hash."""
    digest = sha256()
    tables = {"meta": "rowid", "columns": "name", "units": "unit", "labels": "id"}
    present = {row[0] for row in connection.execute("SELECT name FROM sqlite_master")}
    for table, order in tables.items():
        if table not in present:
            continue
        for row in connection.execute(f"SELECT * FROM {table} ORDER BY {order}"):
            plain = [sha256(v).hexdigest() if isinstance(v, bytes) else v for v in row]
            digest.update(json.dumps([table, *plain]).encode() + b"\n")
    return digest.hexdigest()


class _Arrays:
    """The arrays of a row of ``units``, one after the other."""

    def __init__(self, raw: bytes) -> None:
        self.raw, self.place = raw, 0

    def take(self, dtype: str, count: int) -> npt.NDArray[Any]:
        """The next array."""
        size = np.dtype(dtype).itemsize
        planes = np.frombuffer(self.raw, "u1", size * count, self.place).reshape(size, count)
        self.place += size * count
        return _numbers(planes, dtype)

    def parted(self, sizes: Sequence[int], *kinds: tuple[str, int]) -> list[npt.NDArray[Any]]:
        """The next arrays, which come in two parts.

        Args:
            sizes: how many planes of each belong to the first part.
            kinds: type and length of each.
        """
        upper = [size * count for size, (_, count) in zip(sizes, kinds, strict=True)]
        whole = [np.dtype(dtype).itemsize * count for dtype, count in kinds]
        lower = [size - part for size, part in zip(whole, upper, strict=True)]
        *places, end = itertools.accumulate([*upper, *lower], initial=self.place)
        parts = [
            np.frombuffer(self.raw, "u1", size, place)
            for size, place in zip([*upper, *lower], places, strict=True)
        ]
        self.place = end
        joined = map(np.concatenate, zip(parts[: len(kinds)], parts[len(kinds) :], strict=True))
        return [
            _numbers(planes.reshape(np.dtype(dtype).itemsize, count), dtype)
            for planes, (dtype, count) in zip(joined, kinds, strict=True)
        ]

    def stored(self, n: int, width: int, in_a_byte: int) -> npt.NDArray[np.bool_]:
        """The next array, of bits ``[n, width]``."""
        per_row = -(-width // in_a_byte)
        found = self.take("u1", n * per_row).reshape(n, per_row, 1)
        bits = np.unpackbits(found, axis=2, count=in_a_byte, bitorder="little")
        return bits.reshape(n, per_row * in_a_byte)[:, :width].astype(bool)


def _numbers(planes: npt.NDArray[np.uint8], dtype: str) -> npt.NDArray[Any]:
    found: npt.NDArray[Any] = planes[::-1].T.copy().view(dtype).reshape(planes.shape[1])
    return found


def decode_unit(raw: bytes, unit: int, meta: Mapping[str, Any]) -> UnitRow:
    """The content of a row of ``units``, decompressed."""
    width, arrays = int(meta["width"]), _Arrays(raw)
    take, old = arrays.take, meta["format_version"] == 1
    n, first, n_bins, n_partners, n_keys = map(int, take("<u2", 5))
    if old:
        counts = take("<u4", n_bins)
    group, interval = take("u1", n), take("u1", n)
    length, peak = take("<u2", n), take("<u2", n)
    if old:
        stored = arrays.stored(n, width, 8)
        start, value = take(meta["start_dtype"], n), take("<f4", n)
        keys = take(meta["key_dtype"], n_keys)
        partner, both = take("<u4", n_partners), take("<u4", n_partners)
        found = take("<u2", int(stored.sum()))
    else:
        partner, both = take("<u4", n_partners), take("<u4", n_partners)
        stored = arrays.stored(n, width, _IN_A_BYTE)
        counts, start, value, keys, below = arrays.parted(
            _upper_planes(meta),
            ("<u4", n_bins),
            (meta["start_dtype"], n),
            ("<f4", n),
            (meta["key_dtype"], n_keys),
            ("<u2", int(stored.sum())),
        )
        found = np.repeat(_float16_bits(value), stored.sum(1)) - below
    if arrays.place != len(raw):
        raise ValueError("bytes are left over")
    histogram = np.zeros(N_BINS, np.uint32)
    histogram[first : first + n_bins] = counts
    key = value.astype(np.float64)
    key[group >= _SAMPLED] = np.nan  # see hashed_keys
    key[_keys_are_stored(group, meta["hashed_keys"])] = keys
    activations = np.zeros((n, width), np.float16)
    activations[stored] = found.view("<f2")
    with np.errstate(over="ignore"):
        activations[np.arange(n), peak] = value
    table = ExampleTable(
        unit=np.full(n, unit, np.int32),
        group=group.astype(np.uint8),
        interval=interval.astype(np.uint8),
        rank=np.zeros(n, np.uint16),
        start=start.astype(np.int64),
        length=length.astype(np.uint16),
        peak=peak.astype(np.uint16),
        value=value.astype(np.float32),
        activations=activations,
        key=key,
    )
    table = replace(table, rank=_ranks(table).astype(np.uint16))
    return UnitRow(histogram, table, partner.astype(np.int32), both.astype(np.int64))


def decompressor(meta: Mapping[str, Any], *, of_unit: bool) -> Any:
    """A decompression object for a row of ``units`` or ``columns``."""
    if meta["format_version"] == 1:
        return zlib.decompressobj()
    dictionary = base64.b64decode(meta["dictionary"]) if of_unit else b""
    return zlib.decompressobj(-zlib.MAX_WBITS, dictionary)


def column_values(raw: bytes, kind: str, shape: Sequence[int], meta: Mapping[str, Any]) -> Any:
    """A figure of all units, from the decompressed data of its row of ``columns``."""
    if meta["format_version"] > 1:
        size = np.dtype(kind).itemsize
        raw = np.frombuffer(raw, "u1").reshape(size, -1)[::-1].T.tobytes()
    values = np.frombuffer(raw, kind).reshape(shape)
    return values.astype(values.dtype.newbyteorder("="))


def peak_positions(raw: bytes, meta: Mapping[str, Any], most: int) -> Ints:
    """Corpus positions of the peaks of a unit's first examples, without decoding the rest of its row.

    Args:
        raw: the content of a row of ``units``, decompressed.
        meta: that of the store.
        most: how many examples; those of the groups "bottom" and "inactive" do not count.

    Returns:
        positions ``[n]``; of heads, of the tokens that look.
    """
    arrays, old, width = _Arrays(raw), meta["format_version"] == 1, int(meta["width"])
    n, _, n_bins, n_partners, n_keys = map(int, arrays.take("<u2", 5))
    arrays.place += 4 * n_bins if old else 0
    group = arrays.take("u1", n)
    arrays.place += 3 * n
    peak = arrays.take("<u2", n).astype(np.int64)
    if old:
        arrays.place += n * -(-width // 8)
        start = arrays.take(meta["start_dtype"], n).astype(np.int64)
    else:
        arrays.place += 8 * n_partners
        n_bytes = n * -(-width // _IN_A_BYTE)
        n_stored = int.from_bytes(raw[arrays.place : arrays.place + n_bytes]).bit_count()
        arrays.place += n_bytes
        kinds = ("<f4", n), (meta["key_dtype"], n_keys), ("<u2", n_stored)
        parted = arrays.parted(
            _upper_planes(meta), ("<u4", n_bins), (meta["start_dtype"], n), *kinds
        )
        start = parted[1].astype(np.int64)
    if meta["unit"] == "head":
        peak = ((np.sqrt(8 * peak + 1) - 1) // 2).astype(np.int64)
    left_out = (group == GROUPS.index("bottom")) | (group == GROUPS.index("inactive"))
    positions: Ints = (start + peak)[~left_out][:most]
    return positions
