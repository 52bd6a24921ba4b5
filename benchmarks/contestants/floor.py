"""The GEMM floor: a model's matrix products and nothing else, written into preallocated memory.

Each product uses the memory layout and the kernel that were fastest when tried. Attention computes only
the products of the causal triangle, in blocks. The numbers are random, so the result is no model's.
"""

import json
import time
from functools import cache
from pathlib import Path
from typing import Literal, get_args

import torch
from torch import Tensor

from benchmarks.workloads import Work

BLOCK = 128  # queries at a time, so that keys after them can be left out


Layout = Literal["as is", "transposed", "oneDNN"]
"""How a weight ``[n_in, n_out]`` lies in memory: row by row, column by column, in oneDNN's blocks."""


def layouts() -> list[Layout]:
    """The layouts that this build of torch supports."""
    known: list[Layout] = list(get_args(Layout))
    return known if torch.backends.mkldnn.is_available() else known[:2]


def laid_out(weight: Tensor, layout: Layout, rows: int) -> Tensor:
    if layout == "oneDNN":
        blocks: Tensor = torch.ops.mkldnn._reorder_linear_weight(weight.t().contiguous(), rows)
        return blocks
    return weight.t().contiguous().t() if layout == "transposed" else weight


def multiply(x: Tensor, weight: Tensor, out: Tensor) -> Tensor:
    """Compute into ``out``, except for oneDNN's product: torch offers it only with an output of its own."""
    if weight.is_mkldnn:
        result: Tensor = torch.ops.mkldnn._linear_pointwise(x, weight, None, "none", [], "")
        return result
    return torch.mm(x, weight, out=out)


@cache
def fastest(rows: int, n_in: int, n_out: int) -> Layout:
    """The layout in which ``[rows, n_in] @ [n_in, n_out]`` takes the least time."""
    x, out, weight = torch.randn(rows, n_in), torch.empty(rows, n_out), torch.randn(n_in, n_out)
    weights = {layout: laid_out(weight, layout, rows) for layout in layouts()}
    best = dict.fromkeys(weights, float("inf"))
    for _ in range(4):
        for layout, stored in weights.items():
            start = time.perf_counter()
            multiply(x, stored, out)
            best[layout] = min(best[layout], time.perf_counter() - start)
    return min(weights, key=best.__getitem__)


@cache
def weight(place: str, rows: int, n_in: int, n_out: int) -> Tensor:
    """One weight for each place in a model, because reading them from memory is part of the work."""
    return laid_out(torch.randn(n_in, n_out), fastest(rows, n_in, n_out), rows)


@cache
def scratch(*shape: int) -> Tensor:
    return torch.randn(*shape)


Product = tuple[Tensor, Tensor, Tensor]
"""Two factors and the tensor for their product."""


def linear(place: str, rows: int, n_in: int, n_out: int) -> Product:
    return scratch(rows, n_in), weight(place, rows, n_in, n_out), torch.empty(rows, n_out)


def attention(heads: int, new: int, past: int, width: int) -> list[Product]:
    """Scores and weighted values of ``new`` queries, in blocks."""
    products = []
    for start in range(0, new, BLOCK):
        end = min(start + BLOCK, new)
        q, k = scratch(heads, end - start, width), scratch(heads, past + end, width)
        scores = torch.empty(heads, end - start, past + end)
        products += [(q, k.transpose(1, 2), scores), (scores, k, torch.empty_like(q))]
    return products


def forward_pass(
    folder: str, batch: int, new: int, past: int = 0, last_only: bool = False
) -> list[Product]:
    """The products of ``batch`` rows of ``new`` tokens after ``past`` earlier ones."""
    c = json.loads((Path(folder) / "config.json").read_text())
    width, rows = c["n_embd"], batch * new
    shapes = [(width, 3 * width), (width, width), (width, 4 * width), (4 * width, width)]
    one_layer = attention(batch * c["n_head"], new, past, width // c["n_head"])
    products = []
    for i in range(c["n_layer"]):
        products += [linear(f"{i}.{j}", rows, *shape) for j, shape in enumerate(shapes)]
        products += one_layer
    unembedded = batch if last_only else rows
    return [*products, linear("unembed", unembedded, width, c["vocab_size"])]


def run(products: list[Product]) -> dict[str, Tensor]:
    for a, b, out in products:
        if b.ndim == 2:
            multiply(a, b, out)
        else:
            torch.matmul(a, b, out=out)
    return {}


def logits(folder: str, tokens: list[list[int]]) -> Work:
    products = forward_pass(folder, len(tokens), len(tokens[0]))
    return lambda: run(products)


def keep_post_act(folder: str, tokens: list[list[int]]) -> Work:
    return logits(folder, tokens)


def keep_all(folder: str, tokens: list[list[int]]) -> Work:
    return logits(folder, tokens)


def ablated_logits(folder: str, tokens: list[list[int]], layer: int, neuron: int) -> Work:
    return logits(folder, tokens)


def greedy(folder: str, prompts: list[list[int]], n_new: int) -> Work:
    """All prompts are taken to be as long as the longest."""
    batch, length = len(prompts), max(map(len, prompts))
    steps = [forward_pass(folder, batch, length, last_only=True)]
    steps += [forward_pass(folder, batch, 1, length + i) for i in range(n_new - 1)]
    products = [product for step in steps for product in step]
    return lambda: run(products)


def ablated_greedy(
    folder: str, prompts: list[list[int]], n_new: int, layer: int, neuron: int
) -> Work:
    return greedy(folder, prompts, n_new)


def load_and_run(folder: str, tokens: list[list[int]], first_folder: str) -> Work:
    """The file's bytes, read into memory once, and the products of the first pass."""
    products = forward_pass(folder, len(tokens), len(tokens[0]))

    def work() -> dict[str, Tensor]:
        size = (Path(folder) / "model.safetensors").stat().st_size
        room = bytearray(size)
        with (Path(folder) / "model.safetensors").open("rb", buffering=0) as file:
            file.readinto(room)
        return run(products)

    return work
