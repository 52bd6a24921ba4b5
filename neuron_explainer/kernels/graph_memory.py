"""What torch holds behind a tensor: the memory of its graph, and whether it has been written to."""

import functools
from collections.abc import Hashable, Iterable
from typing import Any

from torch import Tensor


def storages_of(tensors: Iterable[Tensor]) -> dict[int, int]:
    """The different storages of some tensors: address -> bytes."""
    found = {}
    for tensor in tensors:
        storage = tensor.untyped_storage()
        found[storage.data_ptr()] = storage.nbytes()
    return found


def saved_for_backward(outputs: Iterable[Tensor]) -> list[Tensor]:
    """The tensors that a backward pass from ``outputs`` would read; none where it has run and freed them."""
    found: list[Tensor] = []
    seen: set[Any] = set()
    waiting: list[Any] = [output.grad_fn for output in outputs if output.grad_fn is not None]
    while waiting:
        node = waiting.pop()
        if node in seen:
            continue
        seen.add(node)
        found += _saved_by(node)
        waiting += [before for before, _ in node.next_functions if before is not None]
    return found


def _saved_by(node: Any) -> list[Tensor]:
    kind: Any = type(node)
    saved: list[Any] = []
    try:
        saved = [getattr(node, name) for name in _names(kind)]
        saved += getattr(node, "saved_tensors", ())  # of a torch.autograd.Function
    except RuntimeError:
        pass  # they have been freed
    return [each for each in saved if isinstance(each, Tensor)]


@functools.cache
def _names(kind: Hashable) -> tuple[str, ...]:
    return tuple(name for name in dir(kind) if name.startswith("_saved_"))


def versions(tensors: Iterable[Tensor]) -> tuple[tuple[int, int], ...]:
    """Where each tensor is, and how often torch has written to it: different after every change in place
    but those through ``.data`` and numpy, which torch does not count."""
    return tuple((tensor.data_ptr(), tensor._version) for tensor in tensors)
