"""JSON objects as dataclasses: each value is checked, and an error says where a wrong one stands.

A class of a format is a dataclass whose fields have the names of the file. What the format adds to that
(earlier names of fields, fields that are dropped) is in its :class:`Names`.
"""

import functools
import gzip
import json
import math
import types
import typing
import zlib
from collections.abc import Callable, Hashable, Iterator, Mapping
from dataclasses import MISSING, dataclass, field, fields
from pathlib import Path
from typing import Any, TypeVar

from neuron_explainer import files
from neuron_explainer.errors import CheckpointError, InputError, SourceError, shown

T = TypeVar("T")
Check = Callable[[Any, str], Any]

LONGEST_LINE = 1 << 28
"""Bytes of a line of JSON; a longer one is refused before it fills the memory."""
_CLASS_NAME = "dataclass_name"  # OpenAI's field with the name of the class
_LARGEST = 2**63


@dataclass(frozen=True)
class Names:
    """How the objects of a class may be written."""

    classes: tuple[str, ...] = ()
    """Accepted values of ``dataclass_name``; empty: the format has no such field."""
    renamed: Mapping[str, str] = field(default_factory=dict)
    """Earlier names of fields, and what they are called now."""
    dropped: frozenset[str] = frozenset()
    """Fields of earlier versions that are read and left out."""
    left_out: frozenset[str] = frozenset()
    """Fields that are not written where they are None."""
    more: str | None = None
    """The field that takes whatever else an object holds; None: anything else is an error."""


def read_object(cls: type[T], value: Any, where: str) -> T:
    """An instance of a dataclass from a JSON value; CheckpointError if it does not fit.

    Args:
        cls: the dataclass. Its ``NAMES``, if it has one, is the :class:`Names` of its objects.
        value: what JSON gave.
        where: the file and the place in it, for errors.
    """
    if not isinstance(value, dict):
        raise _wrong(where, f"an object with the fields of {cls.__name__}", value)
    names, checks, required = _form(typing.cast(Hashable, cls))
    if _CLASS_NAME in value and names.classes:
        found = value[_CLASS_NAME]
        if found not in names.classes:
            raise _wrong(f"{where}, {_CLASS_NAME}", " or ".join(names.classes), found)
    given: dict[str, Any] = {}
    more: dict[str, Any] = {}
    for old, item in value.items():
        key = names.renamed.get(old, old)
        if key in names.dropped or (key == _CLASS_NAME and names.classes):
            continue
        if key in given:
            raise CheckpointError(f"{where}: {shown(old)} says again what {shown(key)} says.")
        if key in checks:
            given[key] = checks[key](item, f"{where}, {old}")
        else:
            more[old] = item
    missing = sorted(required - given.keys())
    if missing or (more and names.more is None):
        unknown = f", and unknown are {', '.join(map(shown, sorted(more)[:5]))}" if more else ""
        raise CheckpointError(
            f"{where}: expected the fields of {cls.__name__} ({', '.join(checks)}); missing are "
            f"{', '.join(missing) or 'none'}{unknown}."
        )
    if names.more is not None:
        given[names.more] = more
    return cls(**given)


@functools.cache
def _form(cls: Any) -> tuple[Names, dict[str, Check], frozenset[str]]:
    names: Names = getattr(cls, "NAMES", Names())
    hints = typing.get_type_hints(cls)
    used = [each for each in fields(cls) if each.init and each.name != names.more]
    required = frozenset(
        each.name for each in used if each.default is MISSING and each.default_factory is MISSING
    )
    return names, {each.name: _check_of(hints[each.name]) for each in used}, required


def _check_of(hint: Any) -> Check:
    """What checks a value of this type."""
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        (inner,) = (_check_of(each) for each in arguments if each is not type(None))
        return lambda value, where: None if value is None else inner(value, where)
    if origin is list:
        return _list_check(arguments[0])
    if hint in _PLAIN:
        return _PLAIN[hint]
    return lambda value, where: read_object(hint, value, where)


def _list_check(item: Any) -> Check:
    inner, plain = _check_of(item), item in _PLAIN

    def check(value: Any, where: str) -> list[Any]:
        if not isinstance(value, list):
            raise _wrong(where, "a list", value)
        quick = plain and all(type(each) is item for each in value)
        if quick and (item is not int or all(-_LARGEST <= each < _LARGEST for each in value)):
            return value
        return [inner(each, f"{where}[{index}]") for index, each in enumerate(value)]

    return check


def _number(value: Any, where: str) -> float:
    """A number; null, which some writers put for NaN, is NaN."""
    if value is None:
        return math.nan
    if type(value) not in (int, float):
        raise _wrong(where, "a number", value)
    try:
        float(value)
    except OverflowError:
        raise _wrong(where, "a number that a float can hold", value) from None
    found: float = value  # 1 stays 1, so that it is written as it was read
    return found


def _whole(value: Any, where: str) -> int:
    if type(value) is not int or not -_LARGEST <= value < _LARGEST:
        raise _wrong(where, "a whole number of at most 64 bits", value)
    return value


def _text(value: Any, where: str) -> str:
    if not isinstance(value, str):
        raise _wrong(where, "a text", value)
    return value


def _bool(value: Any, where: str) -> bool:
    if not isinstance(value, bool):
        raise _wrong(where, "true or false", value)
    return value


_PLAIN: dict[Any, Check] = {
    float: _number,
    int: _whole,
    str: _text,
    bool: _bool,
    Any: lambda value, where: value,
}


def _wrong(where: str, expected: str, found: Any) -> CheckpointError:
    return CheckpointError(f"{where}: expected {expected}, found {shown(found)}.")


# --- writing ---


def plain(value: Any, where: str = "the object") -> Any:
    """A dataclass as JSON values. NaN becomes null; a tuple is refused: it would come back as a list."""
    if isinstance(value, list):
        if all(type(each) is str for each in value):
            return value
        return [plain(each, where) for each in value]
    if isinstance(value, dict):
        return {key: plain(each, f"{where}, {key}") for key, each in value.items()}
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if value is None or isinstance(value, int | str):
        return value
    if isinstance(value, type) or not hasattr(value, "__dataclass_fields__"):
        raise InputError(
            f"{where}: expected numbers, texts, lists and objects, found a {type(value).__name__}. "
            "Tuples come back from JSON as lists: give lists."
        )
    names: Names = getattr(value, "NAMES", Names())
    found = dict(
        pair for each in fields(value) for pair in _plain_field(value, each.name, names, where)
    )
    return found | ({_CLASS_NAME: type(value).__name__} if names.classes else {})


def _plain_field(value: Any, name: str, names: Names, where: str) -> list[tuple[str, Any]]:
    found = plain(getattr(value, name), f"{where}, {name}")
    if name == names.more:
        return list(found.items())
    return [] if found is None and name in names.left_out else [(name, found)]


def dumps(value: Any, *, compact: bool = True, ascii_only: bool = False) -> str:
    """JSON of a dataclass of a format, without NaN."""
    separators = (",", ":") if compact else None
    try:
        text = json.dumps(
            plain(value), allow_nan=False, separators=separators, ensure_ascii=ascii_only
        )
        text.encode()
    except UnicodeEncodeError:  # half a surrogate pair, which has no form in bytes
        return json.dumps(plain(value), allow_nan=False, separators=separators)
    return text


# --- files ---


def parse(text: str | bytes, where: str) -> Any:
    """The value of a JSON text; NaN and Infinity are read."""
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise CheckpointError(
            f"{where}, line {error.lineno}, column {error.colno}: not valid JSON: {error.msg}"
        ) from None
    except UnicodeDecodeError as error:
        raise CheckpointError(f"{where}, byte {error.start}: not UTF-8 text") from None
    except (ValueError, RecursionError) as error:  # thousands of digits, or nested too deep
        raise CheckpointError(f"{where}: {error}") from None


def read_json_value(source: str | Path) -> tuple[Any, str]:
    """The value of a JSON file or URL, and its name for errors."""
    lines = list(read_lines(source, whole=True))
    if not lines:
        raise CheckpointError(f"{source}: expected JSON, found an empty file.")
    return lines[0]


def read_lines(source: str | Path, whole: bool = False) -> Iterator[tuple[Any, str]]:
    """The values of a file of JSON lines, plain or ``.gz``, and the place of each for errors.

    Args:
        source: file or URL.
        whole: take all of the file as one value.
    """
    path = files.fetch(source)
    files.check_regular(path)
    compressed = path.name.endswith(".gz")
    number = 0
    try:
        with gzip.open(path) if compressed else path.open("rb") as file:
            while line := file.read(LONGEST_LINE + 1) if whole else file.readline(LONGEST_LINE + 1):
                number += 1
                where = f"{path}" if whole else f"{path}, line {number}"
                if len(line) > LONGEST_LINE:
                    raise CheckpointError(f"{where}: more than {LONGEST_LINE} bytes.")
                if line.strip():
                    yield parse(line, where), where
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise CheckpointError(f"{path}: not a whole gzip file: {error}") from None
    except OSError as error:
        raise SourceError(f"cannot read {path}: {error.strerror or error}") from error


def write_lines(path: str | Path, lines: Iterator[str] | list[str]) -> Path:
    """Write lines of text, as ``.gz`` if the name says so; the file appears whole or not at all."""
    with files.atomic_write(path) as temporary:
        if str(path).endswith(".gz"):
            # Without name and time, so that equal content gives equal bytes.
            with temporary.open("wb") as raw, gzip.GzipFile("", "wb", 9, raw, 0) as file:
                for line in lines:
                    file.write(line.encode())
        else:
            with temporary.open("w", encoding="utf-8", newline="\n") as plain_file:
                plain_file.writelines(lines)
    return Path(path)
