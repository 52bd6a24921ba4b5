"""Large tensors of a training step: on large pages, and in the same memory at every step.

An allocator gives memory of tens of MiB back to the system when it is freed, so that each step touches
fresh pages again: a page fault for every 4 KiB. Measured on two cores of a virtual machine, filling a
fresh 48 MiB tensor takes 60 ms, and 4 ms in pages of 2 MiB.
"""

import math
import mmap
from collections.abc import Iterator, Sequence
from contextlib import suppress

import torch
from torch import Tensor

BLOCK_BYTES = 1 << 20  # of each tensor; three of them fit in a core's cache
MIN_BYTES = 8 << 20  # smaller tensors are the allocator's, which keeps what is freed


def empty(shape: Sequence[int], like: Tensor, min_bytes: int = MIN_BYTES) -> Tensor:
    """An uninitialised tensor of ``like``'s dtype and device, on large pages where there are any."""
    n_bytes = _mapped_bytes(shape, like, min_bytes)
    return _view(_map(n_bytes), shape, like) if n_bytes else like.new_empty(shape)


class Workspace:
    """Memory that a training loop keeps from step to step.

    What :meth:`gradient` returns is good until :meth:`next_step` is called, and what :meth:`scratch` returns
    until it is called again. After that another tensor has the same memory, so nothing that outlives a step
    (latents, for example, which callbacks may keep) belongs here: take :func:`empty` for it.

    Args:
        min_bytes: smaller tensors are made anew each time.
    """

    def __init__(self, min_bytes: int = MIN_BYTES) -> None:
        self._min_bytes = min_bytes
        self._kept: dict[int, list[mmap.mmap]] = {}  # by size in bytes, in the order of first use
        self._used: dict[int, int] = {}  # by size, how many of them this step has used so far
        self._scratch: mmap.mmap | None = None

    def next_step(self) -> None:
        """The gradients of the last step are not needed any more: their memory is free again."""
        self._used.clear()

    def gradient(self, shape: Sequence[int], like: Tensor) -> Tensor:
        """An uninitialised tensor that no other call in this step shares memory with."""
        n_bytes = _mapped_bytes(shape, like, self._min_bytes)
        if not n_bytes:
            return like.new_empty(shape)
        kept, used = self._kept.setdefault(n_bytes, []), self._used.get(n_bytes, 0)
        if used == len(kept):
            kept.append(_map(n_bytes))
        self._used[n_bytes] = used + 1
        return _view(kept[used], shape, like)

    def scratch(self, shape: Sequence[int], like: Tensor) -> Tensor:
        """An uninitialised tensor for an intermediate result, to be done with before the next call."""
        n_bytes = _mapped_bytes(shape, like, self._min_bytes)
        if not n_bytes:
            return like.new_empty(shape)
        if self._scratch is None or len(self._scratch) < n_bytes:
            self._scratch = _map(n_bytes)
        return _view(self._scratch, shape, like)


def _mapped_bytes(shape: Sequence[int], like: Tensor, min_bytes: int) -> int:
    """Bytes of a tensor that is worth mapping; 0 if it is not, or cannot be."""
    n_bytes = math.prod(shape) * like.element_size()
    possible = like.device.type == "cpu" and hasattr(mmap, "MADV_HUGEPAGE")  # Linux
    return n_bytes if possible and n_bytes >= min_bytes else 0


def _map(n_bytes: int) -> mmap.mmap:
    memory = mmap.mmap(-1, n_bytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    with suppress(OSError):  # a kernel without large pages: then they are small
        memory.madvise(mmap.MADV_HUGEPAGE)
    return memory


def _view(memory: mmap.mmap, shape: Sequence[int], like: Tensor) -> Tensor:
    count = math.prod(shape)
    return torch.frombuffer(memory, dtype=like.dtype, count=count).view(tuple(shape))


def row_blocks(*tensors: Tensor, block_bytes: int = BLOCK_BYTES) -> Iterator[tuple[Tensor, ...]]:
    """The same rows of each ``[l, n]``, some at a time, for several in-place operations in one pass.

    Every operation after the first finds its block in the cache, and intermediate results stay small. On
    devices other than CPUs there is one block.
    """
    rows = tensors[0]
    n = len(rows)
    if rows.device.type == "cpu" and rows.numel():
        n = max(1, block_bytes // (rows.element_size() * rows.shape[1]))
    return zip(*(torch.split(tensor, max(1, n)) for tensor in tensors), strict=True)
