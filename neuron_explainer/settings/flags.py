"""Command-line flags made from config dataclasses, with the docstrings under their fields as help.

    add_flags(parser, TrainConfig)
    config = from_flags(parser.parse_args(), TrainConfig, read_values("run.toml"))

A field that holds a :class:`Variant` becomes a flag for its name, and a flag for each setting of any
member of the family; each member takes those that it has. A flag that is not given
leaves the value of the file, if there is one, or the default.
"""

import argparse
import ast
import dataclasses
import functools
import inspect
import textwrap
import types
import typing
from collections.abc import Collection, Mapping
from typing import Any, Literal, TypeVar, Union, get_args, get_origin

from neuron_explainer.errors import InputError
from neuron_explainer.settings.fields import Variant, field_names, to_dict, variant_fields
from neuron_explainer.settings.formats import from_dict, plain_value

T = TypeVar("T")


def add_flags(
    parser: argparse.ArgumentParser, config_type: type[Any], leave_out: Collection[str] = ()
) -> None:
    """Add a flag ``--some-field`` for each field of ``config_type`` that is not left out."""
    hints, docs = typing.get_type_hints(config_type), field_docs(config_type)
    families = dict(variant_fields([config_type]))
    group = parser.add_argument_group(config_type.__name__)
    for field in dataclasses.fields(config_type):
        if field.name in leave_out:
            continue
        if family := families.get(field.name):
            hint: Any = Literal[tuple(family.names())]
            add_flag(group, field.name, hint, docs[field.name], _default(field).name)
            _add_members(parser.add_argument_group(f"settings of {family.noun}s"), family)
        else:
            add_flag(group, field.name, hints[field.name], docs[field.name], field.default)


def from_flags(
    arguments: argparse.Namespace,
    config_type: type[T],
    base: Mapping[str, Any] | None = None,
    where: str = "flags",
) -> T:
    """The config that parsed flags describe, on top of the values of a file.

    Args:
        arguments: the result of the parser of :func:`add_flags`.
        config_type: the dataclass.
        base: values by field. Flags override them, and a flag that is an alternative to one of them
            (``num_tokens`` to ``steps``) replaces it.
        where: the name of the source in error messages.
    """
    given = {name: value for name, value in vars(arguments).items() if value is not None}
    values = dict(base or {})
    hints = typing.get_type_hints(config_type)
    families = dict(variant_fields([config_type]))
    flags = {name: given[name] for name in hints if name in given and name not in families}
    for names in getattr(config_type, "alternatives", ()):
        if not flags.keys().isdisjoint(names):
            values = {name: value for name, value in values.items() if name not in names}
    values |= flags
    for field in dataclasses.fields(typing.cast(Any, config_type)):
        if family := families.get(field.name):
            there = values.get(field.name, to_dict(_default(field)))
            values[field.name] = _member_values(field.name, family, given, there)
    return from_dict(config_type, values, where)


def _default(field: dataclasses.Field[Any]) -> Any:
    return (
        field.default if field.default_factory is dataclasses.MISSING else field.default_factory()
    )


def _add_members(group: Any, family: type[Variant]) -> None:
    """One flag for each setting of any member; its help says whose it is."""
    by_name: dict[str, tuple[Any, list[str]]] = {}
    for member in family.names():
        cls = family.member(member)
        hints, docs = typing.get_type_hints(cls), field_docs(cls)
        for field in dataclasses.fields(cls):
            hint, helps = by_name.setdefault(field.name, (hints[field.name], []))
            default = f" [{_shown(field.default)}]" if _shown(field.default) else ""
            helps.append(f"{member}{default}: {docs[field.name]}")
    for name, (hint, helps) in by_name.items():
        add_flag(group, name, hint, " ".join(_merged(helps)), dataclasses.MISSING)


def _merged(helps: list[str]) -> list[str]:
    """The help texts, where one that several members share stands once, with all their names."""
    merged: dict[str, list[str]] = {}
    for text in helps:
        member, doc = text.split(": ", 1)
        merged.setdefault(doc, []).append(member)
    return [f"{', '.join(members)}: {doc}" for doc, members in merged.items()]


def _member_values(field: str, family: type[Variant], given: dict[str, Any], base: Any) -> Any:
    """The file's member, or another one, with the settings that were given as flags."""
    base = plain_value(base)
    values = {"name": base} if isinstance(base, str) else base
    if not isinstance(values, Mapping) or not isinstance(values.get("name"), str):
        return base  # which the checker of fields will refuse
    values = dict(values)
    if given.get(field, values.get("name")) != values.get("name"):
        values = {"name": given[field]}
    known = set(field_names(family.member(values["name"])))
    for member in family.names():
        for name in field_names(family.member(member)):
            if name in given and name not in known:
                flag = f"--{name.replace('_', '-')}"
                raise InputError(
                    f"{flag} is no setting of the {family.noun} {values['name']}, which has: "
                    f"{', '.join(sorted(known)) or 'none'}."
                )
    return values | {name: given[name] for name in known if name in given}


def add_flag(group: Any, name: str, hint: Any, doc: str, default: Any) -> None:
    """Add a flag that is absent from the namespace unless it is given."""
    options: dict[str, Any] = {"dest": name, "default": argparse.SUPPRESS}
    options["help"] = (doc + (f" [{_shown(default)}]" if _shown(default) else "")).replace(
        "%", "%%"
    )
    if get_origin(hint) in (Union, types.UnionType):
        options_of = [option for option in get_args(hint) if option is not types.NoneType]
        hint = str if str in options_of else options_of[0]  # text stands for anything that it names
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
    """A default as the help shows it; empty if the text of the help explains it."""
    return "" if default is None or default is dataclasses.MISSING else str(default)


# --- docstrings under fields, which Python itself does not keep ---


def field_docs(cls: type[Any]) -> dict[str, str]:
    """The docstring of each field of a dataclass as one line, inherited fields included."""
    docs: dict[str, str] = {}
    for base in reversed(cls.__mro__):
        if dataclasses.is_dataclass(base):
            docs |= own_docs(base)
    return {field.name: docs.get(field.name, "") for field in dataclasses.fields(cls)}


@functools.cache  # parsing a module takes 20 ms, and a verb asks for a class several times
def own_docs(cls: type[Any]) -> dict[str, str]:
    """The docstrings under a class's own fields, by field; one without a docstring is left out."""
    try:
        (tree,) = ast.parse(textwrap.dedent(inspect.getsource(cls))).body
    except (OSError, TypeError):  # a class made where there is no file
        return {}
    assert isinstance(tree, ast.ClassDef)
    docs = {}
    for field, below in zip(tree.body, tree.body[1:], strict=False):
        if (
            isinstance(field, ast.AnnAssign)
            and isinstance(field.target, ast.Name)
            and isinstance(below, ast.Expr)
            and isinstance(below.value, ast.Constant)
            and isinstance(below.value.value, str)
        ):
            docs[field.target.id] = " ".join(below.value.value.split())
    return docs
