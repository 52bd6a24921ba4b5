"""GPT-2 in plain torch, without hooks and checks: how fast a model can be that cannot be looked into.

It uses fused attention, ``F.layer_norm``, ``F.gelu`` and a key-value cache of the final size.
"""

import json
from collections.abc import Callable
from functools import cache
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor

from benchmarks.workloads import Work

EPS = 1e-5
Edit = Callable[[int, Tensor], Tensor]
"""A function of a layer's index and its MLP activations."""


class Plain:
    """The weights and the plain forward pass."""

    def __init__(self, folder: str) -> None:
        config = json.loads((Path(folder) / "config.json").read_text())
        self.n_layer, self.n_head = config["n_layer"], config["n_head"]
        state = load_file(str(Path(folder) / "model.safetensors"))
        state = {name.removeprefix("transformer."): value for name, value in state.items()}
        # Stored [in, out]; F.linear is fastest on [out, in].
        self.w = {
            name: value.T.contiguous() if ".c_" in name and name.endswith("weight") else value
            for name, value in state.items()
        }

    def linear(self, x: Tensor, name: str) -> Tensor:
        return F.linear(x, self.w[f"{name}.weight"], self.w[f"{name}.bias"])

    def norm(self, x: Tensor, name: str) -> Tensor:
        return F.layer_norm(x, x.shape[-1:], self.w[f"{name}.weight"], self.w[f"{name}.bias"], EPS)

    def stream(
        self, ids: Tensor, past: Tensor | None = None, start: int = 0, edit: Edit | None = None
    ) -> Tensor:
        """The normed stream ``[b, s, d]``; ``past`` is ``[layer, 2, b, h, room, d_head]``."""
        b, s = ids.shape
        x = self.w["wte.weight"][ids] + self.w["wpe.weight"][start : start + s]
        for i in range(self.n_layer):
            qkv = self.linear(self.norm(x, f"h.{i}.ln_1"), f"h.{i}.attn.c_attn")
            q, k, v = qkv.view(b, s, 3, self.n_head, -1).permute(2, 0, 3, 1, 4)
            if past is not None:
                past[i, 0, :, :, start : start + s] = k
                past[i, 1, :, :, start : start + s] = v
                k, v = past[i, :, :, :, : start + s]
            attended = F.scaled_dot_product_attention(q, k, v, is_causal=s > 1)
            x = x + self.linear(attended.transpose(1, 2).reshape(b, s, -1), f"h.{i}.attn.c_proj")
            inner = self.linear(self.norm(x, f"h.{i}.ln_2"), f"h.{i}.mlp.c_fc")
            inner = F.gelu(inner, approximate="tanh")
            if edit is not None:
                inner = edit(i, inner)
            x = x + self.linear(inner, f"h.{i}.mlp.c_proj")
        return self.norm(x, "ln_f")

    def generate(self, ids: Tensor, n_new: int, edit: Edit | None = None) -> list[list[int]]:
        """Greedy continuations of prompts of one length."""
        b, length = ids.shape
        d_head = self.w["wte.weight"].shape[1] // self.n_head
        past = torch.empty(self.n_layer, 2, b, self.n_head, length + n_new, d_head)
        new, start = [], 0
        for _ in range(n_new):
            last = self.stream(ids, past, start, edit)[:, -1]
            start += ids.shape[1]
            ids = (last @ self.w["wte.weight"].T).argmax(-1, keepdim=True)
            new.append(ids)
        rows: list[list[int]] = torch.cat(new, 1).tolist()
        return rows


@cache
def load(folder: str) -> Plain:
    return Plain(folder)


def ablation(layer: int, neuron: int) -> Edit:
    def edit(at: int, inner: Tensor) -> Tensor:
        if at == layer:
            inner[..., neuron] = 0
        return inner

    return edit


def logits(folder: str, tokens: list[list[int]], edit: Edit | None = None) -> Work:
    model, ids = load(folder), torch.tensor(tokens)
    return lambda: {"logits": F.linear(model.stream(ids, edit=edit), model.w["wte.weight"])}


def ablated_logits(folder: str, tokens: list[list[int]], layer: int, neuron: int) -> Work:
    return logits(folder, tokens, ablation(layer, neuron))


def keep_post_act(folder: str, tokens: list[list[int]]) -> Work:
    def work() -> dict[str, Tensor | list[Tensor]]:
        kept: list[Tensor] = []

        def keep(_: int, inner: Tensor) -> Tensor:
            kept.append(inner)
            return inner

        return {**logits(folder, tokens, keep)(), "post_act": kept}

    return work


def greedy(folder: str, prompts: list[list[int]], n_new: int, edit: Edit | None = None) -> Work:
    model, ids = load(folder), torch.tensor(prompts)
    return lambda: {"ids": model.generate(ids, n_new, edit)}


def ablated_greedy(
    folder: str, prompts: list[list[int]], n_new: int, layer: int, neuron: int
) -> Work:
    return greedy(folder, prompts, n_new, ablation(layer, neuron))


def load_and_run(folder: str, tokens: list[list[int]], first_folder: str) -> Work:
    def run(folder: str) -> dict[str, Tensor]:
        model = Plain(folder)
        return {"logits": F.linear(model.stream(torch.tensor(tokens)), model.w["wte.weight"])}

    run(first_folder)
    return lambda: run(folder)
