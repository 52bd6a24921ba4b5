"""SAELens: ``HookedSAETransformer`` with an SAE in every layer, which replaces the activation."""

import contextlib
import importlib
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.contestants.encode_sae_lens import _filled, saes
from benchmarks.workloads import Work

lens: Any = importlib.import_module("sae_lens")
transformers: Any = importlib.import_module("transformers")


@cache
def model_with(folder: str, latents: int, k: int) -> tuple[Any, list[Any]]:
    theirs = transformers.GPT2LMHeadModel.from_pretrained(folder)
    with contextlib.chdir(Path(folder).parent):
        model = lens.HookedSAETransformer.from_pretrained_no_processing(
            Path(folder).name, hf_model=theirs, device="cpu"
        ).eval()
    width, found = model.cfg.d_model, []
    for layer in range(model.cfg.n_layers):
        settings = saes.TopKSAEConfig(d_in=width, d_sae=latents, k=k, apply_b_dec_to_input=True)
        settings.metadata.hook_name = f"blocks.{layer}.hook_mlp_out"
        found.append(_filled(saes.TopKSAE(settings), width, latents))
    return model, found


def logits(folder: str, tokens: list[list[int]], latents: int, k: int) -> Work:
    model, found = model_with(folder, latents, k)
    ids = torch.tensor(tokens)

    def work() -> dict[str, Tensor]:
        return {"reconstructed": model.run_with_saes(ids, saes=found, return_type="logits")}

    return work


def greedy(folder: str, prompts: list[list[int]], n_new: int, latents: int, k: int) -> Work:
    model, found = model_with(folder, latents, k)
    ids = torch.tensor(prompts)

    def work() -> dict[str, Any]:
        with model.saes(saes=found):
            out = model.generate(
                ids, max_new_tokens=n_new, do_sample=False, stop_at_eos=False, verbose=False
            )
        return {"reconstructed": out[:, ids.shape[1] :].tolist()}

    return work
