"""TransformerLens: its bridge around transformers' model, or (``hooked``) its own HookedTransformer.

Weights as they are: nothing folded, nothing centred.
"""

import contextlib
import importlib
import inspect
import logging
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.workloads import Prepared, Refusal, Work

lens: Any = importlib.import_module("transformer_lens")
bridge: Any = importlib.import_module("transformer_lens.model_bridge")
transformers: Any = importlib.import_module("transformers")
transformers.logging.set_verbosity_error()
transformers.logging.disable_progress_bar()
logging.disable(logging.WARNING)  # that there is no tokenizer


def load_model(folder: str, variant: str) -> Any:
    if variant == "bridge":
        return bridge.TransformerBridge.boot_transformers(folder, device="cpu").eval()
    theirs = transformers.GPT2LMHeadModel.from_pretrained(folder)
    # It takes only names that it knows; from here, the name is that of the folder.
    with contextlib.chdir(Path(folder).parent):
        return lens.HookedTransformer.from_pretrained_no_processing(
            Path(folder).name, hf_model=theirs, device="cpu"
        ).eval()


load = cache(load_model)


def ablation(layer: int, neuron: int) -> list[tuple[str, Callable[..., Any]]]:
    def ablate(x: Tensor, hook: Any) -> Tensor:
        x[..., neuron] = 0
        return x

    return [(f"blocks.{layer}.mlp.hook_post", ablate)]


def logits(folder: str, variant: str, tokens: list[list[int]]) -> Work:
    model, ids = load(folder, variant), torch.tensor(tokens)
    return lambda: {"logits": model(ids, return_type="logits")}


def ablated_logits(
    folder: str, variant: str, tokens: list[list[int]], layer: int, neuron: int
) -> Work:
    model, ids, hooks = load(folder, variant), torch.tensor(tokens), ablation(layer, neuron)
    return lambda: {"logits": model.run_with_hooks(ids, return_type="logits", fwd_hooks=hooks)}


def keep_post_act(folder: str, variant: str, tokens: list[list[int]]) -> Prepared:
    model = load(folder, variant)
    names = [f"blocks.{i}.mlp.hook_post" for i in range(model.cfg.n_layers)]
    return keep(model, tokens, names, {"post_act": names})


def keep_all(folder: str, variant: str, tokens: list[list[int]]) -> Prepared:
    model = load(folder, variant)
    blocks = [f"blocks.{i}" for i in range(model.cfg.n_layers)]
    compared = {
        "post_act": [f"{block}.mlp.hook_post" for block in blocks],
        "pattern": [f"{block}.attn.hook_pattern" for block in blocks],
        "resid": [f"{block}.hook_resid_post" for block in blocks[:-1]],
    }
    return keep(model, tokens, None, compared)


def keep(
    model: Any, tokens: list[list[int]], names: list[str] | None, compared: dict[str, list[str]]
) -> Prepared:
    ids = torch.tensor(tokens)

    def run() -> tuple[Tensor, Any]:
        found: tuple[Tensor, Any] = model.run_with_cache(ids, names_filter=names)
        return found

    def work() -> dict[str, Any]:
        logits, kept = run()
        return {"logits": logits} | {
            key: [kept[name] for name in places] for key, places in compared.items()
        }

    kept = run()[1]
    tensors = [kept[name] for name in kept]
    mib = sum({x.data_ptr(): x.nbytes for x in tensors}.values()) / 2**20
    return Prepared(work, f"keeps {mib:.0f} MiB")


def greedy(folder: str, variant: str, prompts: list[list[int]], n_new: int) -> Work:
    """Shorter prompts are padded on the left, with a mask that says so, where one is taken."""
    model = load(folder, variant)
    longest = max(map(len, prompts))
    ids = torch.tensor([[0] * (longest - len(row)) + row for row in prompts])
    mask = torch.tensor([[0] * (longest - len(row)) + [1] * len(row) for row in prompts])
    more = {} if mask.all() else {"attention_mask": mask}
    if more and "attention_mask" not in inspect.signature(model.generate).parameters:
        raise Refusal("not offered: generate takes no mask for padded token ids, only text")

    def work() -> dict[str, list[list[int]]]:
        out = model.generate(
            ids,
            max_new_tokens=n_new,
            do_sample=False,
            stop_at_eos=False,
            verbose=False,
            return_type="tokens",
            **more,
        )
        return {"ids": out[:, longest:].tolist()}

    return work


def ablated_greedy(
    folder: str, variant: str, prompts: list[list[int]], n_new: int, layer: int, neuron: int
) -> Work:
    model, hooks = load(folder, variant), ablation(layer, neuron)
    generate = greedy(folder, variant, prompts, n_new)

    def work() -> Any:
        with model.hooks(fwd_hooks=hooks):
            return generate()

    return work


def load_and_run(folder: str, variant: str, tokens: list[list[int]], first_folder: str) -> Work:
    def run(folder: str) -> dict[str, Tensor]:
        model = load_model(folder, variant)
        return {"logits": model(torch.tensor(tokens), return_type="logits")}

    run(first_folder)
    return lambda: run(folder)


def calls_no_op_hook(calls: int, width: int, variant: str) -> Work:
    """Of a hook point, which all of its models consist of."""
    point, x = lens.hook_points.HookPoint(), torch.zeros(1, 1, width)
    point.name = "site"
    point.add_hook(lambda x, hook: x)

    def work() -> dict[str, Tensor]:
        for _ in range(calls):
            point(x)
        return {}

    return work
