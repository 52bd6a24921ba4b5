"""Documents: where text comes from. Each source is an iterable of ``str`` that can be read again.

A document's number is its place in its source, counted from 0, with empty documents included, so it
leads back to the text. The name of a file tells its format: ``.txt``, ``.csv``, ``.tsv``, ``.jsonl``,
``.ndjson`` (each also ``.gz`` or ``.zst``) and ``.parquet``. A folder stands for its files, sorted by
name, without those in its sub-folders; what is left out is logged.

A compressed file may inflate to 256 MiB, and beyond that to 100 times its own size, which text never
reaches: a small file that was made to fill the memory is refused.
"""

import csv
import gzip
import io
import json
import logging
import os
import re
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from importlib import import_module
from pathlib import Path
from typing import IO, Any, Literal, NamedTuple

from neuron_explainer import files
from neuron_explainer.errors import InputError, SourceError, did_you_mean, optional_module

logger = logging.getLogger(__name__)

_LONGEST_FIELD = 2**31 - 1
_COMPRESSED = (".gz", ".zst")
_MOST_INFLATION = 100


@dataclass(frozen=True)
class Documents:
    """Texts that are read again at each ``iter()``."""

    name: str
    """The name of the source in errors and manifests."""
    read: Callable[[], Iterator[str]]
    origin: Mapping[str, Any] = field(default_factory=dict)
    """How to read the same again, see :class:`~neuron_explainer.activations.corpus.TokenCorpus`."""

    def __iter__(self) -> Iterator[str]:
        return self.read()


def read_documents(
    path: str | Path,
    column: str = "text",
    *,
    split: str | None = None,
    inflated_bytes: int = 256 << 20,
) -> Documents:
    """The documents in a file, or in all files of a folder, in the order of their names.

    Args:
        path: a local path, or a URL as :func:`neuron_explainer.files.fetch` takes it.
        column: the field that holds the text, in files of rows.
        split: a regular expression; a ``.txt`` file is cut into documents at its matches, which are
            left out. Examples: ``"<\\|endoftext\\|>"``, ``"\\n\\n\\n+"``. Default: a file is one document.
        inflated_bytes: a compressed file may inflate to this, and beyond it to 100 times its own size.
    """
    if split is not None:
        check_pattern(split)
    local = files.fetch(path) if files.is_remote(str(path)) else files.local_path(path)
    with _as_source_errors(local):
        if local.is_dir():
            _tell_left_out(local)
        else:
            _reader_of(local)  # an error now, not at the first document, if there is none

    how = _How(column, split, inflated_bytes)

    def read() -> Iterator[str]:
        n_documents = 0
        with _as_source_errors(local):
            found = _files_of(local)
        for file in found:
            with _as_source_errors(file):
                for text in _reader_of(file)(file, how):
                    n_documents += 1
                    yield text
        if not n_documents:
            raise SourceError(f"{path} is empty: it holds no document.")

    source = str(path) if files.is_remote(str(path)) else os.path.realpath(local)
    return Documents(str(path), read, {"source": source, "column": column, "split": split})


def row_documents(
    rows: Iterable[Mapping[str, Any]], column: str = "text", name: str = "rows"
) -> Documents:
    """The texts in a field of mappings, such as the rows of a ``datasets.Dataset`` in memory."""
    return Documents(name, lambda: _texts(rows, column, name))


def huggingface_documents(
    dataset: str,
    column: str = "text",
    *,
    split: str = "train",
    streaming: bool = True,
    **options: Any,
) -> Documents:
    """The texts of a dataset of Hugging Face, by name or folder; needs the extra ``data``.

    Args:
        dataset: as ``datasets.load_dataset`` takes it.
        column: the field that holds the text.
        split: which split of the dataset.
        streaming: read over the network as needed, and store nothing.
        options: for ``load_dataset``, such as ``name=`` or ``revision=``.
    """
    datasets = optional_module("datasets", "datasets of Hugging Face")
    try:
        rows = datasets.load_dataset(dataset, split=split, streaming=streaming, **options)
    except (OSError, ValueError, KeyError) as error:
        first_line = (str(error).strip().splitlines() or ["no details"])[0]
        raise SourceError(
            f"the dataset {dataset!r} (split {split!r}) cannot be had: {type(error).__name__}: "
            f"{first_line}. A dataset that lies on this machine is read by read_documents(folder)."
        ) from error
    found = row_documents(rows, column, f"{dataset} ({split})")
    if split != "train" or options or Path(dataset).exists():  # not what ``hf:OWNER/NAME`` means
        return found
    return replace(found, origin={"source": f"hf:{dataset}", "column": column})


# --- files ---


class _How(NamedTuple):
    """How the files of one source are read."""

    column: str
    split: str | None
    inflated_bytes: int


_Reader = Callable[[Path, _How], Iterator[str]]


def _read_text(path: Path, how: _How) -> Iterator[str]:
    with _open_text(path, how) as file:
        text = file.read()
    if not text:
        return
    if how.split is None:
        yield text
        return
    pattern = re.compile(how.split)
    # re.split gives what the groups matched too, between any two pieces.
    yield from filter(None, pattern.split(text)[:: 1 + pattern.groups])


def _read_csv(path: Path, how: _How) -> Iterator[str]:
    csv.field_size_limit(_LONGEST_FIELD)  # the module's own limit is 128 KiB, less than a book
    tabs = _kind_of(path) == ".tsv"
    literal = tabs and not _is_quoted_as_csv(path, how)
    quoting: Literal[0, 3] = csv.QUOTE_NONE if literal else csv.QUOTE_MINIMAL
    with _open_text(path, how, newline="") as file:
        # strict: a quote that is not closed would take all rows after it into one field.
        delimiter = "\t" if tabs else ","
        reader = csv.DictReader(file, delimiter=delimiter, quoting=quoting, strict=True)
        with _as_csv_errors(path, 1):
            columns = reader.fieldnames or ()
        _check_column(how.column, columns, str(path))
        while True:
            with _as_csv_errors(path, reader.line_num + 1):
                row = next(reader, None)
            if row is None:
                return
            if row[how.column] is None:
                raise SourceError(
                    f"{path}, line {reader.line_num}: the row ends before the column {how.column!r}."
                )
            if None in row:
                raise SourceError(
                    f"{path}, line {reader.line_num}: the row has more fields than the header; a text "
                    f"with {delimiter!r} in it must stand in quotes."
                )
            yield row[how.column]


@contextmanager
def _as_csv_errors(path: Path, first_line: int) -> Iterator[None]:
    try:
        yield
    except csv.Error as error:
        raise SourceError(
            f"{path}: the row that begins in line {first_line} is not valid CSV: {error}. A quote "
            'that opens a field must be closed; a quote within a quoted field is written "".'
        ) from None


def _is_quoted_as_csv(path: Path, how: _How) -> bool:
    """Whether the quotes in a ``.tsv`` file enclose fields, as in CSV, or are part of the text.

    Both kinds of file are common. Quotes enclose fields if they do so in the header, or if some field
    holds what only an enclosed one can (a tab, the end of a line, doubled quotes), and if the whole file
    is valid when read in this way.
    """
    found = False

    def watched(lines: Iterable[str]) -> Iterator[str]:
        nonlocal found
        for number, line in enumerate(lines):
            fields = line.rstrip("\r\n").split("\t")
            marked = [len(x) > 1 and x[0] == x[-1] == '"' for x in fields]
            doubled = any(m and '""' in x[1:-1] for x, m in zip(fields, marked, strict=True))
            found |= doubled or (number == 0 and all(marked))
            yield line

    try:
        with _open_text(path, how, newline="") as file:
            rows = csv.reader(watched(file), delimiter="\t", strict=True)
            width = len(next(rows, []))
            for row in rows:
                if row and len(row) != width:
                    return False
                found |= any("\t" in field or "\n" in field for field in row)
    except csv.Error:
        return False
    return found


def _read_jsonl(path: Path, how: _How) -> Iterator[str]:
    with _open_text(path, how) as file:
        yield from _texts(_json_rows(file, path), how.column, str(path))


def _json_rows(file: IO[str], path: Path) -> Iterator[Mapping[str, Any]]:
    for number, line in enumerate(file, start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:  # also integers of thousands of digits
            reason = getattr(error, "msg", error)
            raise SourceError(f"{path}, line {number}: not valid JSON: {reason}.") from None
        if not isinstance(row, dict):
            raise SourceError(
                f"{path}, line {number}: expected a JSON object, found {type(row).__name__}."
            )
        yield row


def _read_parquet(path: Path, how: _How) -> Iterator[str]:
    parquet = optional_module("pyarrow.parquet", f"{path} (Parquet)")
    arrow = import_module("pyarrow")
    try:
        with parquet.ParquetFile(path) as file:
            _check_column(how.column, file.schema_arrow.names, str(path))
            for batch in file.iter_batches(batch_size=1024, columns=[how.column]):
                yield from _texts(batch.to_pylist(), how.column, str(path))
    except arrow.ArrowException as error:
        raise SourceError(f"{path} cannot be read as Parquet: {error}") from error


_READERS: dict[str, _Reader] = {
    ".txt": _read_text,
    ".csv": _read_csv,
    ".tsv": _read_csv,
    ".jsonl": _read_jsonl,
    ".ndjson": _read_jsonl,
    ".parquet": _read_parquet,
}


def _kind_of(path: Path) -> str:
    suffixes = [suffix.lower() for suffix in path.suffixes]
    if suffixes and suffixes[-1] in _COMPRESSED:
        suffixes.pop()
    return suffixes[-1] if suffixes else ""


def _reader_of(path: Path) -> _Reader:
    kind = _kind_of(path)
    if kind not in _READERS:
        raise SourceError(
            f"{path}: expected a name that ends in {', '.join(_READERS)} (or one of these and "
            f"{' or '.join(_COMPRESSED)}), found {kind or 'no ending'!r}."
        )
    return _READERS[kind]


def _files_of(path: Path) -> list[Path]:
    if path.is_dir():
        found = [file for file in sorted(path.iterdir()) if _is_text(file)]
        if not found:
            raise SourceError(f"the folder {path} holds no file of text: {', '.join(_READERS)}.")
        return found
    if not path.exists():
        near = path.parent.iterdir() if path.parent.is_dir() else ()
        raise SourceError(
            f"there is no file {path}.{did_you_mean(path.name, [p.name for p in near])}"
        )
    files.check_regular(path)
    return [path]


def _is_text(path: Path) -> bool:
    return _kind_of(path) in _READERS and path.is_file()


def _tell_left_out(folder: Path) -> None:
    """Log which sub-folders and files of a folder are not read. Hidden ones go without saying."""
    rest = [p for p in sorted(folder.iterdir()) if not (_is_text(p) or p.name.startswith("."))]
    folders = [p.name for p in rest if p.is_dir()]
    for kind, names in (
        ("sub-folders", folders),
        ("files of no known kind", [p.name for p in rest if p.name not in folders]),
    ):
        if names:
            some = ", ".join(names[:3]) + (f", … ({len(names)})" if len(names) > 3 else "")
            logger.warning("%s: %s left out: %s", folder, kind, some)


def _open_text(path: Path, how: _How, newline: str | None = None) -> IO[str]:
    suffix = path.suffix.lower()
    if suffix not in _COMPRESSED:
        return path.open(encoding="utf-8-sig", newline=newline)
    raw: Any = (
        gzip.GzipFile(path)
        if suffix == ".gz"
        else _ZstandardFile(path, optional_module("zstandard", f"{path} (Zstandard)"))
    )
    limited = io.BufferedReader(_Limited(raw, path, how.inflated_bytes))
    return io.TextIOWrapper(limited, encoding="utf-8-sig", newline=newline)


class _Limited(io.RawIOBase):
    """The inflated bytes of a file, up to a limit that no text reaches."""

    def __init__(self, inflated: Any, path: Path, freely: int) -> None:
        self._inflated, self._path = inflated, path
        self._most = max(freely, _MOST_INFLATION * path.stat().st_size)
        self._read = 0

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any, /) -> int:
        n_bytes = int(self._inflated.readinto(buffer))
        self._read += n_bytes
        if self._read > self._most:
            raise SourceError(
                f"{self._path} inflates to more than {self._most} bytes, {_MOST_INFLATION} times its "
                "size or more, which text does not; if it is right, unpack it, or give inflated_bytes="
            )
        return n_bytes

    def close(self) -> None:
        self._inflated.close()
        super().close()


class _ZstandardFile(io.RawIOBase):
    """The bytes in a ``.zst`` file of any number of frames.

    The package's own reader is not used because it does not notice a file that is cut off.
    """

    def __init__(self, path: Path, zstandard: Any) -> None:
        self._file, self._zstandard = path.open("rb"), zstandard
        self._frame: Any = None
        self._ready = b""

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any, /) -> int:
        while not self._ready:
            packed = self._file.read(1 << 12)  # a few KiB may inflate to a hundred MiB
            if not packed:
                if self._frame is not None and not self._frame.eof:
                    raise EOFError("the last frame is not whole")
                return 0
            self._ready = self._unpack(packed)
        n_bytes = min(len(buffer), len(self._ready))
        buffer[:n_bytes], self._ready = self._ready[:n_bytes], self._ready[n_bytes:]
        return n_bytes

    def _unpack(self, packed: bytes) -> bytes:
        pieces = []
        while packed:
            if self._frame is None or self._frame.eof:
                self._frame = self._zstandard.ZstdDecompressor().decompressobj()
            try:
                pieces.append(self._frame.decompress(packed))
            except self._zstandard.ZstdError as error:
                raise EOFError(str(error)) from error
            packed = self._frame.unused_data if self._frame.eof else b""
        return b"".join(pieces)

    def close(self) -> None:
        self._file.close()
        super().close()


@contextmanager
def _as_source_errors(path: Path) -> Iterator[None]:
    """Turn whatever is wrong with a file into one error that names it."""
    try:
        yield
    except UnicodeDecodeError as error:
        raise SourceError(f"{path}: not UTF-8 text ({error.reason}).") from error
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise SourceError(f"{path}: damaged or cut off: {error}") from error
    except OSError as error:
        raise SourceError(f"cannot read {path}: {error.strerror or error}") from error


def _texts(rows: Iterable[Mapping[str, Any]], column: str, name: str) -> Iterator[str]:
    for number, row in enumerate(rows):
        _check_column(column, row, f"{name}, row {number}")
        text = row[column]
        if not isinstance(text, str):
            raise SourceError(
                f"{name}, row {number}: {column!r} should be text, found {type(text).__name__}."
            )
        yield text


def _check_column(column: str, columns: Iterable[str], where: str) -> None:
    there = list(columns)
    if not there:
        raise SourceError(f"{where} is empty: it holds no document.")
    if column not in there:
        raise SourceError(
            f"{where} has no column {column!r}.{did_you_mean(column, there)} "
            f"It has: {', '.join(map(repr, there))}; choose one with column=."
        )


def check_pattern(split: str) -> None:
    """Raise InputError if ``split`` is no regular expression."""
    try:
        re.compile(split)
    except re.error as error:
        raise InputError(f"split={split!r} is not a regular expression: {error}.") from None
