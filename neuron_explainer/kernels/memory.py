"""Large tensors at every step: made without the price of small pages, gone through once.

An allocator gives memory of tens of MiB back to the system when it is freed, so that each step touches
fresh pages again: a fault for every 4 KiB. Measured on two cores of a virtual machine, filling a
fresh 48 MiB tensor takes 60 ms, and 4 ms in pages of 2 MiB.
"""

import math
import mmap
import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress

import torch
from torch import Tensor

_BLOCK = 1 << 20  # bytes of each tensor; three of them fit in a core's cache
_WORTH_IT = 8 << 20  # bytes; below, the allocator keeps what is freed
_of_thread = threading.local()  # .pools: by size in bytes, what was made while kept


def empty(shape: Sequence[int], like: Tensor) -> Tensor:
    """An uninitialised tensor of ``like``'s dtype and device, on large pages where there are any."""
    n_bytes = math.prod(shape) * like.element_size()
    advice: int | None = getattr(mmap, "MADV_HUGEPAGE", None)  # Linux
    if like.device.type != "cpu" or n_bytes < _WORTH_IT or advice is None:
        return like.new_empty(shape)
    return torch.frombuffer(_memory(n_bytes, advice), dtype=like.dtype).view(tuple(shape))


def _memory(n_bytes: int, advice: int) -> mmap.mmap:
    pools = getattr(_of_thread, "pools", None)
    pool: list[mmap.mmap] = [] if pools is None else pools.setdefault(n_bytes, [])
    for index in range(len(pool)):  # a variable for the memory would be a reference to it
        if _references(pool, index) == _OF_A_POOL:
            return pool[index]
    memory = mmap.mmap(-1, n_bytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    with suppress(OSError):  # a kernel without them: the pages are small then
        memory.madvise(advice)
    pool.append(memory)
    return memory


def _references(pool: Sequence[object], index: int) -> int:
    """A tensor has one to its memory, as long as it or a view of it or a graph lives."""
    return sys.getrefcount(pool[index])


_OF_A_POOL = _references([object()], 0)  # how a call itself counts, Python's versions differ in


@contextmanager
def kept() -> Iterator[None]:
    """Within, what :func:`empty` made is kept when its tensor has gone, for the next of the same size.

    A training step wants the same sizes again and again, and new pages have to be cleared first.
    """
    before = getattr(_of_thread, "pools", None)
    _of_thread.pools = {} if before is None else before
    try:
        yield
    finally:
        _of_thread.pools = before


def row_blocks(*tensors: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """The same rows of each ``[l, n]``, some at a time, for several in-place operations in one pass.

    What is done to a block finds it in the cache, and intermediate results stay small. On other
    devices than CPUs there is one block.
    """
    rows = tensors[0]
    n = len(rows)
    if rows.device.type == "cpu" and rows.numel():
        n = max(1, _BLOCK // (rows.element_size() * rows.shape[1]))
    return zip(*(torch.split(tensor, max(1, n)) for tensor in tensors), strict=True)
