"""The docstrings that stand under the fields of a dataclass, which Python itself does not keep."""

import ast
import dataclasses
import inspect
import textwrap
from typing import Any


def field_docs(cls: type[Any]) -> dict[str, str]:
    """By field, inherited ones included, as one line each."""
    docs: dict[str, str] = {}
    for base in reversed(cls.__mro__):
        if dataclasses.is_dataclass(base):
            docs |= own_docs(base)
    return {field.name: docs.get(field.name, "") for field in dataclasses.fields(cls)}


def own_docs(cls: type[Any]) -> dict[str, str]:
    """Likewise for any class, without what it inherits; a field without a docstring is left out."""
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
