"""transformers' GPT-2, with fused (``sdpa``) or explicit (``eager``) attention.

Work that it has no function for is done as its users do it, with torch's forward hooks on the modules.
"""

import importlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

import torch
from torch import Tensor

from benchmarks.workloads import Prepared, Work

transformers: Any = importlib.import_module("transformers")
transformers.logging.set_verbosity_error()
transformers.logging.disable_progress_bar()


def load_model(folder: str, variant: str) -> Any:
    model = transformers.GPT2LMHeadModel.from_pretrained(
        folder, attn_implementation=variant, dtype=torch.float32
    )
    return model.eval()


load = cache(load_model)


@contextmanager
def hooked(module: Any, hook: Callable[..., Any]) -> Iterator[None]:
    handle = module.register_forward_hook(hook)
    try:
        yield
    finally:
        handle.remove()


def ablation(neuron: int) -> Callable[..., Any]:
    def ablate(_module: Any, _inputs: Any, output: Tensor) -> Tensor:
        output[..., neuron] = 0
        return output

    return ablate


def logits(folder: str, variant: str, tokens: list[list[int]]) -> Work:
    model, ids = load(folder, variant), torch.tensor(tokens)
    return lambda: {"logits": model(ids, use_cache=False).logits}


def ablated_logits(
    folder: str, variant: str, tokens: list[list[int]], layer: int, neuron: int
) -> Work:
    model, ids = load(folder, variant), torch.tensor(tokens)

    def work() -> dict[str, Tensor]:
        with hooked(model.transformer.h[layer].mlp.act, ablation(neuron)):
            return {"logits": model(ids, use_cache=False).logits}

    return work


def keep_post_act(folder: str, variant: str, tokens: list[list[int]]) -> Work:
    model, ids = load(folder, variant), torch.tensor(tokens)

    def work() -> dict[str, Any]:
        kept: list[Tensor] = []
        handles = [
            block.mlp.act.register_forward_hook(lambda _m, _i, output: kept.append(output))
            for block in model.transformer.h
        ]
        out = model(ids, use_cache=False)
        for handle in handles:
            handle.remove()
        return {"logits": out.logits, "post_act": kept}

    return work


def keep_all(folder: str, variant: str, tokens: list[list[int]]) -> Work | Prepared:
    """The output of every module that gives a tensor, all hidden states, and the patterns."""
    if variant == "sdpa":
        return Prepared(logits(folder, variant, tokens), "keeps nothing")
    model, ids = load(folder, variant), torch.tensor(tokens)

    def run() -> tuple[Any, dict[str, Tensor]]:
        kept: dict[str, Tensor] = {}

        def keeper(name: str) -> Callable[..., None]:
            def keep(_module: Any, _inputs: Any, output: Any) -> None:
                if isinstance(output, Tensor):
                    kept[name] = output

            return keep

        handles = [m.register_forward_hook(keeper(name)) for name, m in model.named_modules()]
        out = model(ids, use_cache=False, output_hidden_states=True, output_attentions=True)
        for handle in handles:
            handle.remove()
        return out, kept

    def work() -> dict[str, Any]:
        out, kept = run()
        return {
            "logits": out.logits,
            "post_act": [kept[f"transformer.h.{i}.mlp.act"] for i in range(len(out.attentions))],
            "pattern": list(out.attentions),
            "resid": list(out.hidden_states[1:-1]),
        }

    out, kept = run()
    tensors = [*kept.values(), *out.attentions, *out.hidden_states]
    mib = sum({x.data_ptr(): x.nbytes for x in tensors}.values()) / 2**20
    return Prepared(work, f"keeps {mib:.0f} MiB")


def greedy(folder: str, variant: str, prompts: list[list[int]], n_new: int) -> Work:
    """Shorter prompts are padded on the left, as ``generate`` requires."""
    model = load(folder, variant)
    longest = max(map(len, prompts))
    ids = torch.tensor([[0] * (longest - len(row)) + row for row in prompts])
    mask = torch.tensor([[0] * (longest - len(row)) + [1] * len(row) for row in prompts])

    def work() -> dict[str, list[list[int]]]:
        out = model.generate(
            ids,
            attention_mask=mask,
            max_new_tokens=n_new,
            min_new_tokens=n_new,
            do_sample=False,
            pad_token_id=0,
            eos_token_id=None,
        )
        return {"ids": out[:, longest:].tolist()}

    return work


def ablated_greedy(
    folder: str, variant: str, prompts: list[list[int]], n_new: int, layer: int, neuron: int
) -> Work:
    model, generate = load(folder, variant), greedy(folder, variant, prompts, n_new)

    def work() -> Any:
        with hooked(model.transformer.h[layer].mlp.act, ablation(neuron)):
            return generate()

    return work


def load_and_run(folder: str, variant: str, tokens: list[list[int]], first_folder: str) -> Work:
    def run(folder: str) -> dict[str, Tensor]:
        model = load_model(folder, variant)
        return {"logits": model(torch.tensor(tokens), use_cache=False).logits}

    run(first_folder)
    return lambda: run(folder)


def calls_no_op_hook(calls: int, width: int, variant: str) -> Work:
    """Calls of a module that does nothing, with one of torch's forward hooks."""
    module, x = torch.nn.Identity(), torch.zeros(1, 1, width)
    module.register_forward_hook(lambda _module, _inputs, output: output)

    def work() -> dict[str, Tensor]:
        for _ in range(calls):
            module(x)
        return {}

    return work
