"""One matrix product by the fastest kernel available, written into preallocated memory."""

import time
from collections.abc import Callable

import torch
from torch import Tensor

from benchmarks.contestants.encoding import activations, directions
from benchmarks.contestants.floor import laid_out, layouts, multiply
from benchmarks.workloads import Work

CHUNK_BYTES = 2**24
"""Size of the results that oneDNN computes at a time. It allocates its output, and malloc keeps this much."""


def product(tokens: int, width: int, latents: int, variant: str) -> Work:
    """``variant`` is a dtype."""
    dtype = getattr(torch, variant)
    x, weight = activations(tokens, width).to(dtype), directions(latents, width).to(dtype)
    multiplied = fastest_product(x, weight, lambda _: None)

    def work() -> dict[str, Tensor]:
        multiplied()
        return {}

    return work


def fastest_product(
    x: Tensor, weight: Tensor, then: Callable[[Tensor], None]
) -> Callable[[], None]:
    """``x · weightᵀ``, as a whole or some rows at a time, the weights laid out beforehand.

    Args:
        then: what is done with each part of the result.
    """
    rows = max(1, CHUNK_BYTES // (weight.element_size() * len(weight)))
    out = torch.empty(len(x), len(weight), dtype=x.dtype).fill_(0.0)
    ways: list[Callable[[], None]] = []
    for layout in layouts():
        stored = laid_out(weight.t(), layout, rows)

        def in_parts(stored: Tensor = stored) -> None:
            for part, room in zip(x.split(rows), out.split(rows), strict=True):
                then(multiply(part, stored, room))

        def whole(stored: Tensor = stored) -> None:
            multiply(x, stored, out)
            for part in out.split(rows):
                then(part)

        ways += [in_parts] if layout == "oneDNN" else [in_parts, whole]
    best = dict.fromkeys(ways, float("inf"))
    for _ in range(3):
        for way in ways:
            start = time.perf_counter()
            way()
            best[way] = min(best[way], time.perf_counter() - start)
    return min(ways, key=best.__getitem__)
