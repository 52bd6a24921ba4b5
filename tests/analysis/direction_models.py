"""Tiny models of several families, with every parameter random, and autoencoders for them."""

import copy
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from neuron_explainer.models.autoencoder import Autoencoder
from neuron_explainer.models.model_context import ModelContext, StandardModelContext
from tests.conftest import make_model

D, F, V, LAYERS, HEADS = 16, 48, 29, 2, 4

HUGGING_FACE: dict[str, tuple[str, dict[str, Any]]] = {
    "gpt2": (
        "GPT2Config",
        {"n_embd": D, "n_layer": LAYERS, "n_head": HEADS, "n_positions": 24, "n_inner": F},
    ),
    "gpt_neox": ("GPTNeoXConfig", {}),
    "llama": ("LlamaConfig", {"num_key_value_heads": 2}),
    "gemma": ("GemmaConfig", {"num_key_value_heads": 2, "head_dim": 4}),
    "gemma2": ("Gemma2Config", {"num_key_value_heads": 2, "head_dim": 4}),
    "qwen3": ("Qwen3Config", {"num_key_value_heads": 2, "head_dim": 4}),
    "phi": ("PhiConfig", {}),
    "olmo": ("OlmoConfig", {}),
}
BASE = {
    "hidden_size": D,
    "intermediate_size": F,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": HEADS,
    "max_position_embeddings": 24,
}


def own_context(folder: Path, seed: int = 0) -> StandardModelContext:
    """The context of a model of our own, saved in a folder."""
    make_model(seed=seed).save(folder)
    return StandardModelContext(folder, device="cpu")


def hugging_face_context(family: str) -> ModelContext:
    """The context of a model of transformers in memory, in float64 and without a tokenizer."""
    import transformers

    from neuron_explainer.models.huggingface.context import HuggingFaceModelContext

    name, sizes = HUGGING_FACE[family]
    shared = {"vocab_size": V, "bos_token_id": 0, "eos_token_id": 0, "pad_token_id": None}
    config = getattr(transformers, name)(**shared, **({} if family == "gpt2" else BASE) | sizes)
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(copy.deepcopy(config)).double()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.3 * torch.randn(parameter.shape, dtype=torch.float64))
    return HuggingFaceModelContext.from_model(model)


def autoencoder(
    location: str | None, n: int = D, n_latents: int = 40, **options: Any
) -> Autoencoder:
    """An autoencoder with random weights and biases."""
    torch.manual_seed(1)
    made = Autoencoder(n_latents, n, location=location, **options)
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.copy_(torch.randn(parameter.shape))
    return made.requires_grad_(False)


def array(x: Tensor) -> np.ndarray:
    """As float64."""
    return x.detach().double().cpu().numpy()
