"""Large tensors at every step: made without the price of small pages, gone through once.

An allocator gives memory of tens of MiB back to the system when it is freed, so that each step touches
fresh pages again: a fault for every 4 KiB. Measured on two cores of a virtual machine, filling a
fresh 48 MiB tensor takes 60 ms, and 4 ms in pages of 2 MiB.
"""

import math
import mmap
from collections.abc import Iterator, Sequence
from contextlib import suppress

import torch
from torch import Tensor

_BLOCK = 1 << 20  # bytes of each tensor; three of them fit in a core's cache
_WORTH_IT = 8 << 20  # bytes; below, the allocator keeps what is freed


def empty(shape: Sequence[int], like: Tensor) -> Tensor:
    """An uninitialised tensor of ``like``'s dtype and device, on large pages where there are any."""
    n_bytes = math.prod(shape) * like.element_size()
    advice: int | None = getattr(mmap, "MADV_HUGEPAGE", None)  # Linux
    if like.device.type != "cpu" or n_bytes < _WORTH_IT or advice is None:
        return like.new_empty(shape)
    memory = mmap.mmap(-1, n_bytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    with suppress(OSError):  # a kernel without them: the pages are small then
        memory.madvise(advice)
    return torch.frombuffer(memory, dtype=like.dtype).view(tuple(shape))


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
