"""What is kept from one request to the next: results within a budget of bytes, passes that others go on from.

A pass of the model is kept with its graph, by its tokens, its goal and the interventions on it. A request
with another goal runs a backward pass. One with other interventions from layer ``L`` on runs the layers from
``L`` on. One that asks for other positions, or chooses other nodes, runs nothing. What dictionaries see at a
place is kept by the interventions up to there. The numbers are those of a request that finds nothing kept,
bit for bit: what is taken over is what would have been computed.
"""

from collections import OrderedDict
from collections.abc import Callable, Collection, Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass, fields, is_dataclass
from typing import Any

import numpy as np
from torch import Tensor

from neuron_explainer.analysis.node_parts import Encoding, Pass
from neuron_explainer.kernels.graph_memory import storages_of
from neuron_explainer.models.locations import SITES, ActivationLocation
from neuron_explainer.models.transformer import Transformer

_SMALL = 100  # bytes, about, of a number, a short text or an empty container


@dataclass
class _Entry:
    value: Any
    size: int
    dictionaries: frozenset[str]


class Kept:
    """Results by key, together of at most ``limit`` bytes; those used longest ago are forgotten first."""

    def __init__(self, limit: int) -> None:
        self.limit, self.bytes = limit, 0
        """``bytes`` is the sum over the entries; what two of them share counts twice."""
        self._entries: OrderedDict[Hashable, _Entry] = OrderedDict()

    def __len__(self) -> int:
        return len(self._entries)

    def beginning_with(self, *begin: Hashable) -> list[tuple[tuple[Any, ...], Any]]:
        """The keys that begin so, each with its result; this is no use of them."""
        entries = [(k, each.value) for k, each in self._entries.items() if isinstance(k, tuple)]
        return [(key, value) for key, value in entries if key[: len(begin)] == begin]

    def get(self, key: Hashable) -> Any:
        """A result; None if it is not there."""
        if key not in self._entries:
            return None
        self._entries.move_to_end(key)
        return self._entries[key].value

    def put(self, key: Hashable, value: Any, size: int, dictionaries: Collection[str] = ()) -> None:
        """Keep a result, unless it is larger than the limit.

        Args:
            size: its bytes.
            dictionaries: those that it depends on, see :meth:`forget`.
        """
        self._remove([key] if key in self._entries else [])
        if size > self.limit:
            return
        self._entries[key] = _Entry(value, size, frozenset(dictionaries))
        self.bytes += size
        while self.bytes > self.limit:
            self._remove([next(iter(self._entries))])

    def forget(self, dictionary: str) -> None:
        """Drop what depends on a dictionary."""
        self._remove([k for k, entry in self._entries.items() if dictionary in entry.dictionaries])

    def clear(self) -> None:
        """Drop everything."""
        self._remove(list(self._entries))

    def _remove(self, keys: Iterable[Hashable]) -> None:
        for key in keys:
            self.bytes -= self._entries.pop(key).size


def bytes_of(value: Any) -> int:
    """About how much memory a result of plain values, arrays and tensors takes."""
    if isinstance(value, Tensor):
        return _SMALL + value.untyped_storage().nbytes()
    if isinstance(value, np.ndarray):
        return _SMALL + int(value.nbytes)
    if isinstance(value, str | bytes | bytearray):
        return _SMALL + len(value)
    if is_dataclass(value):
        return _SMALL + sum(bytes_of(getattr(value, field.name)) for field in fields(value))
    if isinstance(value, Mapping):
        return _SMALL + sum(bytes_of(k) + bytes_of(v) for k, v in value.items())
    if isinstance(value, list | tuple | set | frozenset):
        return _SMALL + sum(map(bytes_of, value))
    return _SMALL


@dataclass(frozen=True)
class Changed:
    """An intervention, as far as results depend on it."""

    place: ActivationLocation
    rest: Hashable
    """All that tells it from other interventions at the place."""


@dataclass
class PassMemory:
    """What is kept of one prompt; a :class:`~neuron_explainer.analysis.node_parts.Memory`."""

    kept: Kept
    prompt: Hashable
    """The tokens, and all else besides the interventions that the forward pass depends on."""
    goal: Hashable
    """What tells the goal from other goals."""
    changes: tuple[Changed, ...]
    """The interventions, the first one first."""
    positions: tuple[int, ...] | None
    """Of which tokens dictionaries are asked for."""
    dictionaries: Mapping[str, tuple[str, Hashable]]
    """Location -> the id of its dictionary, and what tells it from others of that id."""
    inside: frozenset[str]
    """The dictionaries that interventions and the goal depend on."""
    weights: Collection[int]
    """The storages of the model and of the dictionaries ``inside``, which are there anyway: what is kept
    goes before a dictionary does."""
    _forward: Hashable = None

    def run(self, wanted: Sequence[str], make: Callable[[tuple[Pass, int] | None], Pass]) -> Pass:
        """See :class:`~neuron_explainer.analysis.node_parts.Memory`."""
        self._forward = self.prompt, tuple(wanted)
        key = "pass", self._forward, self.goal, self.changes
        found: Pass | None = self.kept.get(key)
        if found is None:
            found = make(self._nearest())
            own = storages_of(found.tensors())
            size = sum(n_bytes for place, n_bytes in own.items() if place not in self.weights)
            self.kept.put(key, found, size, self.inside)
        return found

    def _nearest(self) -> tuple[Pass, int] | None:
        """The pass that does the same as this one for most layers, and their number."""
        best: tuple[Pass, int] | None = None
        of_prompt: list[tuple[Any, Pass]] = self.kept.beginning_with("pass", self._forward)
        for key, earlier in of_prompt:
            same = self._shared_with(key[3], earlier.model.n_layers)
            if same and isinstance(earlier.model, Transformer) and (not best or same > best[1]):
                best, used = (earlier, same), key
        if best is not None:
            self.kept.get(used)  # it has been used now
        return best

    def _shared_with(self, changes: tuple[Changed, ...], n_layers: int) -> int:
        """How many layers run before one in which different interventions act."""

        def at(layer: int, several: tuple[Changed, ...]) -> list[Changed]:
            return [each for each in several if each.place.depth(n_layers) == layer]

        layers = range(n_layers + 1)
        differ = (n for n in layers if at(n, changes) != at(n, self.changes))
        return min(next(differ, n_layers), n_layers)

    def encoding(self, place: ActivationLocation, make: Callable[[], Encoding]) -> Encoding:
        """See :class:`~neuron_explainer.analysis.node_parts.Memory`."""
        id, which = self.dictionaries[str(place)]
        before = tuple(each for each in self.changes if _reaches(each.place, place))
        key = "encoding", self._forward, self.positions, place, which, before
        found: Encoding | None = self.kept.get(key)
        if found is None:
            found = make()
            size = sum(storages_of(found.tensors()).values()) + found.write_norm.nbytes
            self.kept.put(key, found, size, self.inside | {id})
        return found


def _reaches(changed: ActivationLocation, place: ActivationLocation) -> bool:
    """Whether what is changed at one place can be seen at another, of a layer."""
    assert place.layer is not None
    if changed.layer is None:
        return changed.site.stage == "embed"
    order = list(SITES)
    return (changed.layer, order.index(changed.path)) <= (place.layer, order.index(place.path))
