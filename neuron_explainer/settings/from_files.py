"""Configs as JSON, TOML and back, strictly: a misspelt field is an error that names the nearest.

Any frozen dataclass of plain fields will do. ``{"value": …, "description": …}`` is accepted in the
place of a value, as others' ``params.json`` has it.
"""

import dataclasses
import tomllib
import types
import typing
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, TypeVar, Union, get_args, get_origin

from neuron_explainer import files
from neuron_explainer.errors import InputError, did_you_mean
from neuron_explainer.settings.variants import Variant

T = TypeVar("T")


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


def from_dict(config_type: type[T], values: Mapping[str, Any], where: str = "config") -> T:
    """The config that ``values`` describe; fields that are not there keep their defaults."""
    hints = typing.get_type_hints(config_type)
    names = [field.name for field in dataclasses.fields(typing.cast(Any, config_type))]
    read: dict[str, Any] = {}
    for name, value in values.items():
        if name not in names:
            raise InputError(
                f"{where}: unknown field {name!r}.{did_you_mean(name, names)} "
                f"Known: {', '.join(names)}."
            )
        read[name] = _read(hints[name], plain_value(value), f"{where}: {name}")
    return config_type(**read)


def split_fields(
    values: Mapping[str, Any], config_types: Sequence[type[Any]], where: str
) -> list[dict[str, Any]]:
    """The values of one file that is for several configs, by config; no field is in two of them."""
    names = [set(field_names(each)) for each in config_types]
    for name in values:
        if not any(name in some for some in names):
            known = sorted(set().union(*names))
            hint = did_you_mean(name, known)
            for field, family in variant_fields(config_types):
                for each in family.names():
                    if name in field_names(family.member(each)):
                        hint = (
                            f" It is a setting of {family.noun}s: "
                            f"{field} = {{ name = {each!r}, {name} = … }}."
                        )
                        break
            raise InputError(f"{where}: unknown field {name!r}.{hint} Known: {', '.join(known)}.")
    return [{name: value for name, value in values.items() if name in some} for some in names]


def variant_fields(config_types: Sequence[type[Any]]) -> list[tuple[str, type[Variant]]]:
    """The fields of some dataclasses that hold a :class:`Variant`, each with its family."""
    return [
        (name, hint)
        for config_type in config_types
        for name, hint in typing.get_type_hints(config_type).items()
        if isinstance(hint, type) and issubclass(hint, Variant)
    ]


def field_names(config_type: type[Any]) -> list[str]:
    """Of a dataclass."""
    return [field.name for field in dataclasses.fields(config_type)]


def read_config(config_type: type[T], path: str | Path) -> T:
    """A config from a ``.toml`` or ``.json`` file."""
    return from_dict(config_type, read_values(path), str(path))


def read_values(path: str | Path) -> dict[str, Any]:
    """What a ``.toml`` or ``.json`` file holds."""
    path = Path(path)
    if path.suffix == ".json":
        return files.read_json(path)
    if path.suffix != ".toml":
        raise InputError(f"{path}: expected a .toml or .json file.")
    try:
        return tomllib.loads(path.read_text("utf-8"))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise InputError(f"{path}: not valid TOML: {error}") from None
    except OSError as error:
        raise InputError(f"{path}: cannot be read: {error.strerror}") from None


def plain_value(entry: Any) -> Any:
    """``value`` of ``{"value": …, "description": …}``; anything else as it is."""
    described = isinstance(entry, Mapping) and {"value"} <= set(entry) <= {"value", "description"}
    return entry["value"] if described else entry


def _read(hint: Any, value: Any, where: str) -> Any:
    """``value`` as a field of type ``hint`` holds it, or an error that says what was expected."""
    if isinstance(hint, type) and issubclass(hint, Variant):
        return _read_variant(hint, value, where)
    if get_origin(hint) in (Union, types.UnionType):
        if value is None:
            return None
        (hint,) = (option for option in get_args(hint) if option is not types.NoneType)
        return _read(hint, value, where)
    if get_origin(hint) is Literal:
        if value not in get_args(hint):
            raise InputError(
                f"{where}: expected one of {', '.join(map(str, get_args(hint)))}, found "
                f"{value!r}.{did_you_mean(str(value), map(str, get_args(hint)))}"
            )
        return value
    if get_origin(hint) is tuple:
        if not isinstance(value, list | tuple):
            raise InputError(f"{where}: expected a list, found {value!r}.")
        return tuple(_read(get_args(hint)[0], item, where) for item in value)
    if hint is float and type(value) is int:
        return float(value)
    if type(value) is not hint:
        raise InputError(f"{where}: expected {hint.__name__}, found {value!r}.")
    return value


def _read_variant(family: type[Variant], value: Any, where: str) -> Variant:
    """A member of ``family`` from its name alone, or from a table with a ``name``."""
    if isinstance(value, str):
        value = {"name": value}
    if not isinstance(value, Mapping) or not isinstance(value.get("name"), str):
        raise InputError(
            f"{where}: expected a name, or a table with a name and settings, found {value!r}."
        )
    settings = {key: item for key, item in value.items() if key != "name"}
    return from_dict(family.member(value["name"]), settings, f"{where} ({value['name']})")
