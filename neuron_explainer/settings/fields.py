"""The one checker of fields: dataclasses from mappings of foreign origin, and back.

:func:`read_fields` turns a mapping (JSON, TOML, flags) into a dataclass or a ``TypedDict``. All that
is wrong is said in one error: each unknown or missing field, and each value of another type, with
what was expected and found. Types are taken strictly: ``True`` and ``1.0`` are no integers, NaN is no
number, and no integer is wider than 64 bits.

:class:`Variant` is a setting that is one of several dataclasses, told by a name::

    @dataclass(frozen=True)
    class Penalty(Variant, noun="penalty"):  # a family
        ...

    @dataclass(frozen=True)
    class L1(Penalty):
        strength: float = 1.0

    Penalty.add("l1", L1)

A config with a field ``penalty: Penalty`` is then written as ``{"penalty": {"name": "l1", …}}``, read
from the same, and set by the flags ``--penalty l1 --strength 2``.
"""

import dataclasses
import math
import types
import typing
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, Self, TypeVar, Union, cast, get_args, get_origin

from neuron_explainer.errors import InputError, NeuronExplainerError, did_you_mean, shown

T = TypeVar("T")

_MOST_PROBLEMS = 10
_KIND_NAMES: dict[Any, str] = {
    int: "a whole number",
    float: "a finite number",
    bool: "true or false",
    str: "text",
    tuple: "a list",
    list: "a list",
    dict: "an object",
}


@dataclass(frozen=True)
class Variant:
    """Base of a family of dataclasses; a direct subclass is a family, with names of its own."""

    noun: ClassVar[str]
    """What a member is, in messages: "objective"."""
    _members: ClassVar[dict[str, type[Any]]]

    def __init_subclass__(cls, noun: str | None = None, **options: Any) -> None:
        super().__init_subclass__(**options)
        if Variant in cls.__bases__:
            cls.noun, cls._members = noun or cls.__name__, {}

    def __post_init__(self) -> None:
        check_types(self)

    @property
    def name(self) -> str:
        """The name under which the class of these settings is known."""
        for name, member in self._members.items():
            if type(self) is member:
                return name
        raise InputError(
            f"{type(self).__name__} is not registered as the settings of any {self.noun}."
        )

    @classmethod
    def add(cls, name: str, member: type[Self]) -> None:
        """Make ``member`` known as ``name``."""
        cls._members[name] = member

    @classmethod
    def names(cls) -> list[str]:
        """All known names, sorted."""
        return sorted(cls._members)

    @classmethod
    def member(cls, name: str) -> type[Self]:
        """The class known as ``name``."""
        if name not in cls._members:
            raise InputError(
                f"unknown {cls.noun} {shown(name)}.{did_you_mean(name, cls._members)} "
                f"Known: {', '.join(cls.names())}."
            )
        return cast(type[Self], cls._members[name])


def read_fields(
    kind: type[T],
    values: object,
    where: str = "",
    *,
    only: Sequence[str] | None = None,
    error: type[NeuronExplainerError] = InputError,
) -> T:
    """A dataclass or ``TypedDict`` made of the fields in ``values``.

    Args:
        kind: the class; fields with a default (of a ``TypedDict``: not required ones) may be absent.
        values: a mapping with text keys, of any origin.
        where: what messages begin with: the file, or the place in it.
        only: the fields that all have to be there, with no others; default: as ``kind`` has them.
        error: the class of the error that is raised.
    """
    problems: list[str] = []
    try:
        found = _object(kind, values, "", problems, only)
    except NeuronExplainerError as wrong:  # the class's own check of its values
        described = type(wrong) if error is InputError else error
        raise described(f"{where}: {wrong}" if where else str(wrong)) from None
    raise_problems(problems, where, error)
    return cast(T, found)


def raise_problems(
    problems: Sequence[str], where: str, error: type[NeuronExplainerError] = InputError
) -> None:
    """One error that lists the first of ``problems`` and counts the rest; nothing if there is none."""
    if not problems:
        return
    first = [_sentence(problem) for problem in problems[:_MOST_PROBLEMS]]
    if len(problems) == 1:
        raise error(f"{where}: {first[0]}" if where else first[0])
    more = len(problems) - len(first)
    lines = [f"  {text}" for text in first] + ([f"  … and {more} more."] if more else [])
    raise error("\n".join([f"{where or 'settings'}: {len(problems)} problems:", *lines]))


def check_types(config: Any) -> None:
    """An error if a field of a dataclass holds something of another type than it declares.

    Python itself does not look: ``keep_checkpoints=1.0`` would fail hours later, or not at all.
    """
    problems: list[str] = []
    hints = _hints(type(config))
    for field in dataclasses.fields(config):
        _value(hints[field.name], getattr(config, field.name), field.name, problems)
    raise_problems(problems, type(config).__name__)


def to_dict(config: Any) -> dict[str, Any]:
    """All fields as JSON can hold them; a :class:`Variant` is told by its ``name``."""
    found: dict[str, Any] = {}
    if isinstance(config, Variant):
        found["name"] = config.name
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if dataclasses.is_dataclass(value):
            value = to_dict(value)
        found[field.name] = list(value) if isinstance(value, tuple) else value
    return found


def field_names(config_type: type[Any]) -> list[str]:
    """The names of a dataclass's fields, in their order."""
    return [field.name for field in dataclasses.fields(config_type)]


def variant_fields(config_types: Sequence[type[Any]]) -> list[tuple[str, type[Variant]]]:
    """The fields of some dataclasses that hold a :class:`Variant`, each with its family."""
    return [
        (name, hint)
        for config_type in config_types
        for name, hint in _hints(config_type).items()
        if isinstance(hint, type) and issubclass(hint, Variant)
    ]


# --- one value ---


def _hints(kind: type[Any]) -> dict[str, Any]:
    """The type of each field."""
    hints = typing.get_type_hints(kind)
    if not dataclasses.is_dataclass(kind):
        return hints
    return {field.name: hints[field.name] for field in dataclasses.fields(kind)}


def _required(kind: type[Any]) -> set[str]:
    if not dataclasses.is_dataclass(kind):
        return set(getattr(kind, "__required_keys__", ()))
    missing = dataclasses.MISSING
    return {
        field.name
        for field in dataclasses.fields(kind)
        if field.default is missing and field.default_factory is missing
    }


def _object(
    kind: type[Any],
    values: object,
    at: str,
    problems: list[str],
    only: Sequence[str] | None = None,
) -> Any:
    """``values`` as a dataclass or ``TypedDict``; what is wrong is added to ``problems``."""
    if not isinstance(values, Mapping):
        problems.append(_expected(dict, values, at))
        return None
    hints, required = _hints(kind), _required(kind)
    if only is not None:
        hints, required = {name: hints[name] for name in only}, set(only)
    prefix, before = f"{at}: " if at else "", len(problems)
    unknown = [name for name in values if name not in hints]
    missing = [name for name in hints if name in required and name not in values]
    problems += [f"{prefix}the field {name!r} is missing" for name in missing]
    # The nearest names only of those that will be shown: a file may hold any number of fields.
    for index, name in enumerate(unknown[:_MOST_PROBLEMS]):
        near = did_you_mean(str(name), hints)
        known = "" if index else f" Known: {', '.join(hints) or 'none'}"
        problems.append(f"{prefix}unknown field {shown(name)}.{near}{known}")
    problems += [""] * len(unknown[_MOST_PROBLEMS:])
    read = {
        name: _value(hint, values[name], f"{prefix}{name}", problems)
        for name, hint in hints.items()
        if name in values
    }
    return None if len(problems) > before else kind(**read)


def _value(hint: Any, value: Any, at: str, problems: list[str]) -> Any:
    """``value`` as a field of type ``hint`` holds it; what is wrong is added to ``problems``."""
    origin, args = get_origin(hint), get_args(hint)
    if origin in (typing.Required, typing.NotRequired):
        return _value(args[0], value, at, problems)
    if hint is Any:
        return value
    if origin in (Union, types.UnionType):
        return _one_of(args, value, at, problems)
    if origin is Literal:
        if type(value) in map(type, args) and value in args:
            return value
        near = did_you_mean(value, map(str, args)) if isinstance(value, str) else ""
        problems.append(
            f"{at}: expected one of {', '.join(map(str, args))}, found {shown(value)}.{near}"
        )
        return None
    if origin in (tuple, list):
        if isinstance(value, list | tuple):
            item = args[0]
            return origin(_value(item, x, f"{at}[{i}]", problems) for i, x in enumerate(value))
    elif origin is dict:
        if isinstance(value, Mapping) and all(isinstance(key, str) for key in value):
            return {key: _value(args[1], x, f"{at}.{key}", problems) for key, x in value.items()}
    elif isinstance(hint, type) and issubclass(hint, Variant):
        return value if isinstance(value, hint) else _variant(hint, value, at, problems)
    elif dataclasses.is_dataclass(hint) or typing.is_typeddict(hint):
        whole = dataclasses.is_dataclass(hint) and isinstance(value, cast(type, hint))
        return value if whole else _object(cast(type, hint), value, at, problems)
    elif _is_plain(hint, value):
        return value
    problems.append(_expected(origin or hint, value, at))
    return None


def _is_plain(hint: type[Any], value: object) -> bool:
    if isinstance(value, bool):
        return hint is bool
    if isinstance(value, int) and hint in (int, float):
        return -(2**63) <= value < 2**64
    return isinstance(value, hint) and (hint is not float or math.isfinite(cast(float, value)))


def _one_of(hints: tuple[Any, ...], value: Any, at: str, problems: list[str]) -> Any:
    """The value of a union: None where it may be, else what the first type that fits makes of it."""
    if value is None and types.NoneType in hints:
        return None
    for hint in (others := [hint for hint in hints if hint is not types.NoneType]):
        wrong: list[str] = []
        found = _value(hint, value, at, wrong)
        if not wrong:
            return found
    if len(others) == 1:
        problems += wrong
    else:
        names = " or ".join(_KIND_NAMES.get(hint, str(hint)) for hint in others)
        problems.append(f"{at}: expected {names}, found {shown(value)}")
    return None


def _variant(family: type[Variant], value: Any, at: str, problems: list[str]) -> Variant | None:
    """A member of ``family`` from its name alone, or from a table with a ``name``."""
    if isinstance(value, str):
        value = {"name": value}
    if not isinstance(value, Mapping) or not isinstance(value.get("name"), str):
        problems.append(
            f"{at}: expected a name, or a table with a name and settings, found {shown(value)}"
        )
        return None
    settings = {key: item for key, item in value.items() if key != "name"}
    member = family.member(value["name"])
    return cast("Variant | None", _object(member, settings, f"{at} ({value['name']})", problems))


def _expected(kind: Any, value: object, at: str) -> str:
    name = _KIND_NAMES.get(kind) or getattr(kind, "__name__", str(kind))
    return (
        f"{at}: expected {name}, found {shown(value)}"
        if at
        else f"expected {name}, found {shown(value)}"
    )


def _sentence(text: str) -> str:
    return text if text.endswith(("?", ".")) else f"{text}."
