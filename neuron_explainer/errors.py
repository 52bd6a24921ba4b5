"""The errors that users see: one family, all of them ``ValueError``s.

A message names the thing, what was expected, what was found and, for names, the nearest valid one.
``assert`` is kept for the library's own invariants.
"""

import difflib
from collections.abc import Iterable


class NeuronExplainerError(ValueError):
    """Base of every error that this package raises for something a user can mend."""


class HookError(NeuronExplainerError):
    """A hook was attached at a wrong place, or returned something that cannot stand in for x."""


class LocationError(NeuronExplainerError):
    """A location in the network is unknown, lacks a layer, or does not exist in this model."""


class CheckpointError(NeuronExplainerError):
    """A saved model or autoencoder is incomplete, damaged, contradictory or of unknown kind."""


class SourceError(NeuronExplainerError):
    """A name, path or URL leads to nothing that can be had now."""


class InputError(NeuronExplainerError):
    """Tokens, prompts, tensors or settings that a call cannot work with."""


class DistributedError(NeuronExplainerError):
    """Another of the processes that share a run is gone, or did not answer in time."""


class MissingExtraError(NeuronExplainerError, ImportError):
    """An optional dependency is needed for this call and is not installed."""


def nearest(name: str, valid: Iterable[str], n: int = 3) -> list[str]:
    """The up to ``n`` valid names most like ``name``, best first; capitals do not matter."""
    names = {other.casefold(): other for other in valid}
    return [
        names[found] for found in difflib.get_close_matches(name.casefold(), names, n=n, cutoff=0.6)
    ]


def did_you_mean(name: str, valid: Iterable[str]) -> str:
    """`` Did you mean 'x' or 'y'?`` with a leading space, or an empty string."""
    close = nearest(name, valid)
    return f" Did you mean {' or '.join(map(repr, close))}?" if close else ""
