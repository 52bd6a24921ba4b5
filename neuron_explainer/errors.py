"""The errors that users see: one family of ``ValueError``s.

A message names the thing, what was expected and what was found, and suggests the nearest valid name.
``assert`` is used for the library's own invariants only.
"""

import contextlib
import difflib
import importlib
import itertools
from collections.abc import Iterable
from pathlib import Path
from typing import Any


class NeuronExplainerError(ValueError):
    """Base of every error that this package raises for something that a user can correct."""


class HookError(NeuronExplainerError):
    """A hook was attached at a wrong place, or returned something that cannot replace x."""


class LocationError(NeuronExplainerError):
    """A location in the network is unknown, lacks a layer, or does not exist in this model."""


class CheckpointError(NeuronExplainerError):
    """A saved model or autoencoder is incomplete, damaged, contradictory or of an unknown kind."""


class SourceError(NeuronExplainerError):
    """A name, path or URL cannot be read or written now."""


class InputError(NeuronExplainerError):
    """A call cannot work with these tokens, prompts, tensors or settings."""


class DistributedError(NeuronExplainerError):
    """Another process of the same run ended, or did not answer in time."""


class MissingExtraError(NeuronExplainerError, ImportError):
    """An optional dependency is needed for this call and is not installed."""


def optional_module(module: str, wanted_for: str, package: str = "") -> Any:
    """A module of an optional library, imported now because it is needed now.

    Args:
        module: its full name.
        wanted_for: what needs it, for the error.
        package: what to install, if that is not the first part of ``module``.

    Raises:
        MissingExtraError: it is not installed; the message says how to install it.
    """
    package = package or module.partition(".")[0]
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise MissingExtraError(
            f"{wanted_for}: the package {package} is needed and not installed: pip install {package}"
        ) from error


_LONGEST_SHOWN = 100
_NEAR = 0.6  # share of letters in common; below it names have nothing to do with each other
_MOST_NAMES = 5_000  # a foreign file may hold any number, and each takes time to compare


def nearest(name: str, valid: Iterable[str], n: int = 3) -> list[str]:
    """The up to ``n`` valid names most like ``name``, best first; capitals do not matter."""
    names = {other.casefold(): other for other in itertools.islice(valid, _MOST_NAMES)}
    wanted = name[:_LONGEST_SHOWN].casefold()
    return [names[found] for found in difflib.get_close_matches(wanted, names, n=n, cutoff=_NEAR)]


def did_you_mean(name: str, valid: Iterable[str]) -> str:
    """`` Did you mean 'x' or 'y'?`` with a leading space, or an empty string."""
    close = nearest(name, valid)
    return f" Did you mean {' or '.join(map(shown, close))}?" if close else ""


def shown(value: object) -> str:
    """``repr(value)`` for a message: shortened, and never an error of its own."""
    try:
        text = repr(value)
    except (ValueError, RecursionError):  # integers of thousands of digits, deep nesting
        text = f"a value of type {type(value).__name__} that is too large to show"
    return text if len(text) <= _LONGEST_SHOWN else f"{text[: _LONGEST_SHOWN - 1]}…"


def in_way(error: OSError, path: Path) -> str:
    """Why ``path`` cannot be made: a file in the place of a folder is named."""
    with contextlib.suppress(OSError):  # a name that is too long
        for part in (path, *path.parents):
            if part.exists() and not part.is_dir():
                return f"{part} is a file where a folder is expected"
    return f"{type(error).__name__}: {error.strerror or error}"
