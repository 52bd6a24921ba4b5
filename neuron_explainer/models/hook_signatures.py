"""What a hook can be given: the keywords that its signature accepts, looked up once when it is appended."""

import difflib
import inspect
from collections.abc import Callable, Collection
from functools import partial
from typing import Any, NamedTuple

from torch import nn

Hook = Callable[..., Any]
"""``hook(x, **keywords) -> x``; it gets the keywords of the site that its signature accepts."""


class Signature(NamedTuple):
    """What a function can be given, next to its first argument."""

    text: str
    """As written, for errors."""
    takes_x: bool
    """Whether it takes a positional argument at all."""
    by_position: tuple[str, ...]
    """Further arguments that it needs and that only a position can fill."""
    required: tuple[str, ...]
    """Keywords that it needs."""
    optional: tuple[str, ...]
    """Keywords that have a default, but for those that ``functools.partial`` has filled."""
    keywords: frozenset[str] | None
    """All keywords that it takes; None: any."""

    @classmethod
    def of(cls, hook: Hook) -> "Signature":
        """That of a function, a bound method, a module, any object with ``__call__``."""
        try:
            # Calling a module calls its forward, whose signature nn.Module.__call__ hides.
            found = inspect.signature(hook.forward if isinstance(hook, nn.Module) else hook)
        except (TypeError, ValueError):  # functions written in C, such as torch.relu
            return cls("(…)", True, (), (), (), frozenset())
        parameters = list(found.parameters.values())
        takes_x = any(
            p.kind in (*_BY_POSITION, inspect.Parameter.VAR_POSITIONAL) for p in parameters
        )
        if parameters and parameters[0].kind is not inspect.Parameter.VAR_POSITIONAL:
            parameters = parameters[1:]  # the first is x
        named = [p for p in parameters if p.kind in _BY_NAME]
        filled = hook.keywords if isinstance(hook, partial) else {}
        return cls(
            str(found),
            takes_x,
            tuple(
                p.name for p in parameters if p.kind is p.POSITIONAL_ONLY and p.default is p.empty
            ),
            tuple(p.name for p in named if p.default is p.empty),
            tuple(p.name for p in named if p.default is not p.empty and p.name not in filled),
            None
            if any(p.kind is p.VAR_KEYWORD for p in parameters)
            else frozenset(p.name for p in named),
        )


_BY_POSITION = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
_BY_NAME = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)


def missing(signature: Signature, available: Collection[str] | None) -> list[str]:
    """What a function needs and would not be given; ``available`` None: any keyword may come."""
    if available is None:
        return list(signature.by_position)
    absent = [name for name in signature.required if name not in available]
    return [*signature.by_position, *absent]


def misspelt(signature: Signature, available: Collection[str]) -> dict[str, str]:
    """Optional keywords that no call fills, each with the keyword that is spelt nearly so."""
    close = {
        name: difflib.get_close_matches(name, available, n=1, cutoff=0.75)
        for name in signature.optional
        if name not in available
    }
    # A function that takes both names has a parameter of its own beside ours.
    taken = {*signature.required, *signature.optional}
    return {name: near[0] for name, near in close.items() if near and near[0] not in taken}
