"""Command-line flags made from config dataclasses, with the docstrings under their fields as help.

    add_flags(parser, TrainConfig)
    config = from_flags(parser.parse_args(), TrainConfig, read_values("run.toml"))

Settings of objectives are flags too; each objective takes those that it has. Only flags that were
given count: all else comes from a file's values, if there are any, or is the default.
"""

import argparse
import dataclasses
import types
import typing
from collections.abc import Collection, Mapping
from typing import Any, Literal, TypeVar, Union, get_args, get_origin

from neuron_explainer.dictionaries.objectives import ObjectiveConfig, config_class, registered
from neuron_explainer.errors import InputError
from neuron_explainer.settings.field_docs import field_docs
from neuron_explainer.settings.from_files import from_dict

T = TypeVar("T")


def add_flags(
    parser: argparse.ArgumentParser, config_type: type[Any], leave_out: Collection[str] = ()
) -> None:
    """Add ``--some-field`` for each field of ``config_type``, but for some."""
    hints, docs = typing.get_type_hints(config_type), field_docs(config_type)
    group = parser.add_argument_group(config_type.__name__)
    for field in dataclasses.fields(config_type):
        if field.name in leave_out:
            continue
        if hints[field.name] is ObjectiveConfig:
            _add(group, "objective", Literal[tuple(registered())], docs[field.name], "topk")
            _add_objectives(parser.add_argument_group("settings of objectives"))
        else:
            _add(group, field.name, hints[field.name], docs[field.name], field.default)


def from_flags(
    arguments: argparse.Namespace,
    config_type: type[T],
    base: Mapping[str, Any] | None = None,
    where: str = "flags",
) -> T:
    """The config that parsed flags describe, on top of the values of a file.

    Args:
        arguments: what the parser of :func:`add_flags` found.
        config_type: the dataclass.
        base: values by field, which flags win over; a flag that is an alternative to one of them
            (``num_tokens`` to ``steps``) takes its place.
        where: what error messages name as the source.
    """
    given = {name: value for name, value in vars(arguments).items() if value is not None}
    values = dict(base or {})
    hints = typing.get_type_hints(config_type)
    flags = {name: given[name] for name in hints if name in given and name != "objective"}
    for names in getattr(config_type, "alternatives", ()):
        if not flags.keys().isdisjoint(names):
            values = {name: value for name, value in values.items() if name not in names}
    values |= flags
    if ObjectiveConfig in hints.values():
        values["objective"] = _objective_values(given, values.get("objective", "topk"))
    return from_dict(config_type, values, where)


def _add_objectives(group: Any) -> None:
    """One flag for each setting of any objective; its help says whose it is."""
    by_name: dict[str, tuple[Any, list[str]]] = {}
    for objective in registered():
        cls = config_class(objective)
        hints, docs = typing.get_type_hints(cls), field_docs(cls)
        for field in dataclasses.fields(cls):
            hint, helps = by_name.setdefault(field.name, (hints[field.name], []))
            default = f" [{_shown(field.default)}]" if _shown(field.default) else ""
            helps.append(f"{objective}{default}: {docs[field.name]}")
    for name, (hint, helps) in by_name.items():
        _add(group, name, hint, " ".join(_merged(helps)), dataclasses.MISSING)


def _merged(helps: list[str]) -> list[str]:
    """Those that say the same of several objectives, once."""
    merged: dict[str, list[str]] = {}
    for text in helps:
        objective, doc = text.split(": ", 1)
        merged.setdefault(doc, []).append(objective)
    return [f"{', '.join(objectives)}: {doc}" for doc, objectives in merged.items()]


def _objective_values(given: dict[str, Any], base: Any) -> dict[str, Any]:
    """The file's objective, or another one, with the settings that were given as flags."""
    values = {"name": base} if isinstance(base, str) else dict(base)
    if given.get("objective", values.get("name")) != values.get("name"):
        values = {"name": given["objective"]}
    known = {field.name for field in dataclasses.fields(config_class(values["name"]))}
    for objective in registered():
        for field in dataclasses.fields(config_class(objective)):
            if field.name in given and field.name not in known:
                flag = f"--{field.name.replace('_', '-')}"
                raise InputError(
                    f"{flag} is no setting of the objective {values['name']}, which has: "
                    f"{', '.join(sorted(known)) or 'none'}."
                )
    return values | {name: given[name] for name in known if name in given}


def _add(group: Any, name: str, hint: Any, doc: str, default: Any) -> None:
    """Add a flag that is absent from the namespace unless it is given."""
    options: dict[str, Any] = {"dest": name, "default": argparse.SUPPRESS}
    options["help"] = (doc + (f" [{_shown(default)}]" if _shown(default) else "")).replace(
        "%", "%%"
    )
    if get_origin(hint) in (Union, types.UnionType):
        (hint,) = (option for option in get_args(hint) if option is not types.NoneType)
    if hint is bool:
        options["action"] = argparse.BooleanOptionalAction
    elif get_origin(hint) is Literal:
        options["choices"] = get_args(hint)
    elif get_origin(hint) is tuple:
        options |= {"nargs": "+", "type": get_args(hint)[0], "metavar": "X"}
    else:
        options |= {"type": hint, "metavar": {int: "N", float: "X"}.get(hint, "TEXT")}
    group.add_argument(f"--{name.replace('_', '-')}", **options)


def _shown(default: Any) -> str:
    """A default as help shows it; nothing for one that its text explains."""
    return "" if default is None or default is dataclasses.MISSING else str(default)
