"""nnsight's batched idiom: many invokes of one prompt in a trace, each with an edit of its own."""

from typing import Any

import torch
from torch import Tensor

from benchmarks.contestants.nnsight import load, nnsight
from benchmarks.workloads import Work

BATCH = 16  # invokes of a trace


def difference(last: Tensor) -> Tensor:
    return last[:, 5] - last[:, 6]


def patching(folder: str, tokens: list[list[int]], source: list[list[int]]) -> Work:
    model, ids = load(folder), torch.tensor(tokens)
    with model.trace(torch.tensor(source), use_cache=False):
        streams = nnsight.save([])
        for block in model.transformer.h:
            streams.append(block.input.clone())

    def batch(layer: int, positions: list[int]) -> list[Tensor]:
        with model.trace(use_cache=False) as tracer:
            found: list[Tensor] = nnsight.save([])
            for position in positions:
                with tracer.invoke(ids):
                    model.transformer.h[layer].input[:, position] = streams[layer][:, position]
                    found.append(difference(model.lm_head.output[:, -1]))
        return found

    def work() -> dict[str, Tensor]:
        places = range(len(tokens[0]))
        rows = [_all(batch, layer, list(places)) for layer in range(len(model.transformer.h))]
        return {"metric": torch.stack(rows).double()}

    return work


def ablated_heads(folder: str, tokens: list[list[int]]) -> Work:
    model, ids = load(folder), torch.tensor(tokens)
    n_heads = model.config.n_head
    width = model.config.n_embd // n_heads

    def batch(layer: int, heads: list[int]) -> list[Tensor]:
        with model.trace(use_cache=False) as tracer:
            found: list[Tensor] = nnsight.save([])
            for head in heads:
                with tracer.invoke(ids):
                    mixed = model.transformer.h[layer].attn.c_proj.input
                    mixed[..., head * width : (head + 1) * width] = 0
                    found.append(difference(model.lm_head.output[:, -1]))
        return found

    def work() -> dict[str, Tensor]:
        layers = range(len(model.transformer.h))
        rows = [_all(batch, layer, list(range(n_heads))) for layer in layers]
        return {"metric": torch.stack(rows).double()}

    return work


def _all(batch: Any, layer: int, units: list[int]) -> Tensor:
    found = [batch(layer, units[i : i + BATCH]) for i in range(0, len(units), BATCH)]
    return torch.cat([value for values in found for value in values])
