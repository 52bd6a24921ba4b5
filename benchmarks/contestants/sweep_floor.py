"""The matrix products that a sweep has to redo: those of the layers after each intervention, of the positions
from it on, and of the last token's logits. Attention's own products are left out. The last layer's MLP counts
for every position, although this library runs it for the last token only where the metric reads no other."""

import json
from collections.abc import Iterable
from pathlib import Path

import torch

from benchmarks.contestants.floor import Product, linear, multiply, scratch, weight
from benchmarks.workloads import Work

_ROWS_AT_ONCE = 4096
_TYPICAL_ROWS = 256


def patching(folder: str, tokens: list[list[int]], source: list[list[int]]) -> Work:
    sizes, length = _sizes(folder), len(tokens[0])
    joined = [
        (layer + 1) * (length - p) for p in range(length) for layer in range(sizes["n_layer"])
    ]
    numbers = [
        (row, layer) for row, layer in zip(joined, [*range(sizes["n_layer"])] * length, strict=True)
    ]
    return _work(sizes, numbers, length * [sizes["n_layer"]])


def ablated_heads(folder: str, tokens: list[list[int]]) -> Work:
    sizes, length = _sizes(folder), len(tokens[0])
    numbers = []
    for layer in range(sizes["n_layer"]):
        rows = (layer + 1) * sizes["n_head"] * length
        while rows > 0:
            numbers.append((min(rows, _ROWS_AT_ONCE), layer))
            rows -= _ROWS_AT_ONCE
    return _work(sizes, numbers, [sizes["n_layer"] * sizes["n_head"]])


def _sizes(folder: str) -> dict[str, int]:
    found: dict[str, int] = json.loads((Path(folder) / "config.json").read_text())
    return found


def _work(
    sizes: dict[str, int], passes: Iterable[tuple[int, int]], unembedded: Iterable[int]
) -> Work:
    """``passes``: (rows, layer) of each product with a layer's weights."""
    width, passes = sizes["n_embd"], list(passes)
    most = max(rows for rows, _ in passes)
    outputs = {n: torch.empty(most, n) for n in (width, 3 * width, 4 * width)}
    products: list[Product] = []
    for rows, layer in passes:
        for name, n_in, n_out in [
            ("qkv", width, 3 * width),
            ("out", width, width),
            ("up", width, 4 * width),
            ("down", 4 * width, width),
        ]:
            # One copy of each weight, laid out for a typical number of rows.
            laid_out = weight(f"{layer}.{name}", _TYPICAL_ROWS, n_in, n_out)
            products.append((scratch(most, n_in)[:rows], laid_out, outputs[n_out][:rows]))
    products += [linear("unembed", rows, width, sizes["vocab_size"]) for rows in unembedded]

    def work() -> dict[str, torch.Tensor]:
        for x, laid_out, out in products:
            multiply(x, laid_out, out)
        return {}

    return work
