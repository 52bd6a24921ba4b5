"""Settings in TOML and JSON files.

A value may also be written as ``{"value": …, "description": …}``, as in the ``params.json`` of other
tools.
"""

import tomllib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

from neuron_explainer import files
from neuron_explainer.errors import InputError, did_you_mean
from neuron_explainer.settings.fields import field_names, read_fields, variant_fields

T = TypeVar("T")


def from_dict(config_type: type[T], values: Mapping[str, Any], where: str = "config") -> T:
    """The config that ``values`` describe; fields that are absent keep their defaults."""
    return read_fields(config_type, _plain(values), where)


def split_fields(
    values: Mapping[str, Any], config_types: Sequence[type[Any]], where: str
) -> list[dict[str, Any]]:
    """The values of a file for several configs, split by config. No field is in two configs."""
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


def read_config(config_type: type[T], path: str | Path) -> T:
    """A config from a ``.toml`` or ``.json`` file."""
    return from_dict(config_type, read_values(path), str(path))


def read_values(path: str | Path) -> dict[str, Any]:
    """The values in a ``.toml`` or ``.json`` file."""
    path = Path(path)
    if path.suffix == ".json":
        return files.read_json(path)
    if path.suffix != ".toml":
        raise InputError(f"{path}: expected a .toml or .json file.")
    files.check_regular(path)
    try:
        return tomllib.loads(path.read_text("utf-8"))
    except (ValueError, RecursionError) as error:  # integers of thousands of digits, deep nesting
        raise InputError(f"{path}: not valid TOML: {error}") from None
    except OSError as error:
        raise InputError(f"{path}: cannot be read: {error.strerror}") from None


def plain_value(entry: Any) -> Any:
    """The ``value`` of ``{"value": …, "description": …}``; anything else unchanged."""
    described = isinstance(entry, Mapping) and {"value"} <= set(entry) <= {"value", "description"}
    return entry["value"] if described else entry


def _plain(values: Any) -> Any:
    """:func:`plain_value` of every value of a mapping, and of those inside."""
    value = plain_value(values)
    if isinstance(value, Mapping):
        return {name: _plain(inner) for name, inner in value.items()}
    return value
