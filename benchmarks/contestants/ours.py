"""This library."""

from collections.abc import Iterable
from functools import cache
from typing import Any

import torch
from torch import Tensor

from benchmarks.workloads import Prepared, Work
from neuron_explainer.models.hooks import TransformerHooks
from neuron_explainer.models.locations import SITES
from neuron_explainer.models.transformer import Transformer


def mebibytes(tensors: Iterable[Tensor]) -> float:
    """Of distinct memory."""
    return sum({x.data_ptr(): x.nbytes for x in tensors}.values()) / 2**20


@cache
def load(folder: str, dtype: torch.dtype = torch.float32) -> Transformer:
    return Transformer.load(folder, device="cpu", dtype=dtype)


def ablation(layer: int, neuron: int) -> TransformerHooks:
    def ablate(x: Tensor) -> Tensor:
        x[..., neuron] = 0
        return x

    return TransformerHooks().append_at(f"{layer}/mlp.post_act", ablate)


def logits(folder: str, tokens: list[list[int]], hooks: TransformerHooks | None = None) -> Work:
    model, ids = load(folder), torch.tensor(tokens)
    return lambda: {"logits": model(ids, hooks=hooks)[0]}


def ablated_logits(folder: str, tokens: list[list[int]], layer: int, neuron: int) -> Work:
    return logits(folder, tokens, ablation(layer, neuron))


def logits_empty_hooks(folder: str, tokens: list[list[int]]) -> Work:
    return logits(folder, tokens, TransformerHooks())


def keep_post_act(folder: str, tokens: list[list[int]]) -> Prepared:
    return keep(folder, tokens, ["mlp.post_act"])


def keep_all(folder: str, tokens: list[list[int]]) -> Prepared:
    return keep(folder, tokens, list(SITES))


def keep(folder: str, tokens: list[list[int]], sites: list[str]) -> Prepared:
    model, ids = load(folder), torch.tensor(tokens)
    layers = range(model.cfg.n_layers)

    def work() -> dict[str, Any]:
        found = model.capture(ids, [*sites, "logits"])
        kept = {
            "logits": found["logits"],
            "post_act": [found[f"{i}/mlp.post_act"] for i in layers],
        }
        if len(sites) > 1:
            patterns = [found[f"{i}/attn.qk_probs"].permute(0, 3, 1, 2) for i in layers]
            kept |= {
                "pattern": patterns,
                "resid": [found[f"{i}/resid.torso.post_mlp"] for i in layers[:-1]],
            }
        return kept

    mib = mebibytes(model.capture(ids, sites).values())
    return Prepared(work, f"keeps {mib:.0f} MiB")


def greedy(
    folder: str, prompts: list[list[int]], n_new: int, hooks: TransformerHooks | None = None
) -> Work:
    model = load(folder)
    return lambda: {"ids": model.sample(prompts, n_new, temperature=0, hooks=hooks)["tokens"]}


def ablated_greedy(
    folder: str, prompts: list[list[int]], n_new: int, layer: int, neuron: int
) -> Work:
    return greedy(folder, prompts, n_new, ablation(layer, neuron))


def load_and_run(folder: str, tokens: list[list[int]], first_folder: str) -> Work:
    def run(folder: str) -> dict[str, Tensor]:
        return {"logits": Transformer.load(folder, device="cpu")(torch.tensor(tokens))[0]}

    run(first_folder)
    return lambda: run(folder)


def bf16_logits(folder: str, tokens: list[list[int]]) -> Prepared:
    half, ids = load(folder, torch.bfloat16), torch.tensor(tokens)
    reference = load(folder)(ids)[0].log_softmax(-1)
    found = half(ids)[0].float().log_softmax(-1)
    kl = (reference.exp() * (reference - found)).sum(-1)
    note = f"KL from fp32: mean {kl.mean():.1e}, worst {kl.max():.1e} nats"
    return Prepared(lambda: {"logits": half(ids)[0]}, note)


def compiled_logits(folder: str, tokens: list[list[int]]) -> Work:
    ids = torch.tensor(tokens)
    compiled = torch.compile(load(folder))
    return lambda: {"logits": compiled(ids)[0]}


def calls_no_hook(calls: int, width: int) -> Work:
    return _calls(TransformerHooks(), calls, width)


def calls_no_op_hook(calls: int, width: int) -> Work:
    return _calls(TransformerHooks().append_at("mlp.post_act", lambda x: x), calls, width)


def _calls(hooks: TransformerHooks, calls: int, width: int) -> Work:
    x, site = torch.zeros(1, 1, width), hooks.mlp.post_act

    def work() -> dict[str, Tensor]:
        for _ in range(calls):
            site(x, layer=0, positions=None, out_layer=None)
        return {}

    return work
