"""TransformerLens's patching functions, and a loop over its hooks for what they do not offer."""

import importlib
from typing import Any

import torch
from torch import Tensor

from benchmarks.contestants.transformer_lens import load
from benchmarks.workloads import Work

patching_functions: Any = importlib.import_module("transformer_lens.patching")


def difference(logits: Tensor) -> Tensor:
    return logits[0, -1, 5] - logits[0, -1, 6]


def patching(folder: str, variant: str, tokens: list[list[int]], source: list[list[int]]) -> Work:
    model, ids = load(folder, variant), torch.tensor(tokens)
    _, cache = model.run_with_cache(torch.tensor(source))
    get = patching_functions.get_act_patch_resid_pre
    return lambda: {"metric": get(model, ids, cache, difference).double()}


def ablated_heads(folder: str, variant: str, tokens: list[list[int]]) -> Work:
    model, ids = load(folder, variant), torch.tensor(tokens)

    def one(layer: int, head: int) -> Tensor:
        def ablate(z: Tensor, hook: Any) -> Tensor:
            z[:, :, head] = 0
            return z

        hooks = [(f"blocks.{layer}.attn.hook_z", ablate)]
        return difference(model.run_with_hooks(ids, return_type="logits", fwd_hooks=hooks))

    def work() -> dict[str, Tensor]:
        cfg = model.cfg
        rows = [[one(i, j) for j in range(cfg.n_heads)] for i in range(cfg.n_layers)]
        return {"metric": torch.tensor(rows).double()}

    return work
