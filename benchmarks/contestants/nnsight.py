"""nnsight around transformers' GPT-2 (fused attention, as it loads by default)."""

import importlib
from functools import cache
from typing import Any

import torch
from torch import Tensor

from benchmarks.workloads import Prepared, Work

nnsight: Any = importlib.import_module("nnsight")
transformers: Any = importlib.import_module("transformers")
transformers.logging.set_verbosity_error()
transformers.logging.disable_progress_bar()


def load_model(folder: str, attention: str = "sdpa") -> Any:
    """A tokenizer it must have; this one knows one word and is not used."""
    tokenizers: Any = importlib.import_module("tokenizers")
    words = tokenizers.models.WordLevel({"a": 0}, unk_token="a")
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizers.Tokenizer(words), pad_token="a"
    )
    theirs = transformers.GPT2LMHeadModel.from_pretrained(folder, attn_implementation=attention)
    return nnsight.TransformersModel(theirs.eval(), tokenizer=tokenizer, task="text-generation")


load = cache(load_model)


def logits(folder: str, tokens: list[list[int]]) -> Work:
    model, ids = load(folder), torch.tensor(tokens)

    def work() -> dict[str, Tensor]:
        with model.trace(ids, use_cache=False):
            out = model.lm_head.output.save()
        return {"logits": out}

    return work


def ablated_logits(folder: str, tokens: list[list[int]], layer: int, neuron: int) -> Work:
    model, ids = load(folder), torch.tensor(tokens)

    def work() -> dict[str, Tensor]:
        with model.trace(ids, use_cache=False):
            model.transformer.h[layer].mlp.act.output[..., neuron] = 0
            out = model.lm_head.output.save()
        return {"logits": out}

    return work


def keep_post_act(folder: str, tokens: list[list[int]]) -> Work:
    model, ids = load(folder), torch.tensor(tokens)

    def work() -> dict[str, Any]:
        with model.trace(ids, use_cache=False):
            kept = nnsight.save([])
            for block in model.transformer.h:
                kept.append(block.mlp.act.output)
            out = model.lm_head.output.save()
        return {"logits": out, "post_act": kept}

    return work


def keep_all(folder: str, tokens: list[list[int]]) -> Prepared:
    """What a module of a block returns, in the order in which it is computed, and the patterns."""
    model, ids = load(folder, "eager"), torch.tensor(tokens)

    def run() -> tuple[Tensor, list[Tensor], list[Tensor], list[Tensor], list[Tensor]]:
        with model.trace(ids, use_cache=False):
            post_act, pattern, resid, others = (nnsight.save([]) for _ in range(4))
            for block in model.transformer.h:
                others.append(block.ln_1.output)
                others.append(block.attn.c_attn.output)
                others.append(block.attn.c_proj.output)
                pattern.append(block.attn.output[1])
                others.append(block.ln_2.output)
                others.append(block.mlp.c_fc.output)
                post_act.append(block.mlp.act.output)
                others.append(block.mlp.c_proj.output)
                resid.append(block.output)
            others.append(model.transformer.ln_f.output)
            out = model.lm_head.output.save()
        return out, post_act, pattern, resid, others

    def work() -> dict[str, Any]:
        out, post_act, pattern, resid, _ = run()
        return {"logits": out, "post_act": post_act, "pattern": pattern, "resid": resid[:-1]}

    _, *kept = run()
    tensors = [x for group in kept for x in group]
    mib = sum({x.data_ptr(): x.nbytes for x in tensors}.values()) / 2**20
    return Prepared(work, f"keeps {mib:.0f} MiB")


def generation(prompts: list[list[int]], n_new: int) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Input, padded on the left, and settings."""
    longest = max(map(len, prompts))
    ids = torch.tensor([[0] * (longest - len(row)) + row for row in prompts])
    mask = torch.tensor([[0] * (longest - len(row)) + [1] * len(row) for row in prompts])
    settings = {"max_new_tokens": n_new, "min_new_tokens": n_new, "do_sample": False}
    return {"input_ids": ids, "attention_mask": mask}, {
        **settings,
        "pad_token_id": 0,
        "eos_token_id": None,
    }


def greedy(folder: str, prompts: list[list[int]], n_new: int) -> Work:
    model, (inputs, settings) = load(folder), generation(prompts, n_new)
    longest = inputs["input_ids"].shape[1]

    def work() -> dict[str, list[list[int]]]:
        with model.generate(inputs, **settings) as tracer:
            out = tracer.result.save()
        return {"ids": out[:, longest:].tolist()}

    return work


def ablated_greedy(
    folder: str, prompts: list[list[int]], n_new: int, layer: int, neuron: int
) -> Work:
    model, (inputs, settings) = load(folder), generation(prompts, n_new)
    longest = inputs["input_ids"].shape[1]

    def work() -> dict[str, list[list[int]]]:
        with model.generate(inputs, **settings) as tracer:
            for _ in tracer.iter[:n_new]:
                model.transformer.h[layer].mlp.act.output[..., neuron] = 0
            out = tracer.result.save()
        return {"ids": out[:, longest:].tolist()}

    return work


def load_and_run(folder: str, tokens: list[list[int]], first_folder: str) -> Work:
    def run(folder: str) -> dict[str, Tensor]:
        model = load_model(folder)
        with model.trace(torch.tensor(tokens), use_cache=False):
            out = model.lm_head.output.save()
        return {"logits": out}

    run(first_folder)
    return lambda: run(folder)
