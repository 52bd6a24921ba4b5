"""The work that every contestant gets: the same random weights, token ids and neuron.

Results are compared in these layouts: ``logits`` [b, s, v]; ``post_act`` [layer, b, s, f]; ``pattern``
[layer, b, h, q, k]; ``resid`` [layer, b, s, d], the stream after each layer except the last, which some
libraries return only after the norm; ``ids``, the new tokens of each row.
"""

import json
import random
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

GPT2_SMALL = {"n_layer": 12, "n_embd": 768, "n_head": 12, "n_positions": 1024, "vocab_size": 50257}
TINY = {"n_layer": 2, "n_embd": 64, "n_head": 4, "n_positions": 1024, "vocab_size": 500}

NEW_TOKENS = 50
PROMPT = 16
BATCH = 8
UNEQUAL = [16, 3, 11, 16, 7, 1, 14, 9]
"""Prompt lengths of the batch of unequal lengths."""


Work = Callable[[], Mapping[str, Any]]


@dataclass
class Prepared:
    """A call to time, and a remark to print beside the name."""

    work: Work
    note: str = ""


class Refusal(Exception):
    """Raised with the reason why a contestant does not take part."""


@dataclass
class Setup:
    """One run of the benchmarks: sizes, and a scratch folder with the weights."""

    scratch: Path
    quick: bool = False
    """A tiny model instead of GPT-2 small's shape, and fewer tokens."""
    pythons: dict[str, str] = field(default_factory=dict)
    """Interpreters by peer name, for tables that start processes themselves."""

    @property
    def sizes(self) -> dict[str, int]:
        """Sizes of the model, by the names of Hugging Face's GPT-2."""
        return TINY if self.quick else GPT2_SMALL

    @property
    def ablated(self) -> dict[str, int]:
        """The neuron whose activation is set to 0. It is strong: forgetting to ablate it shows."""
        return {"layer": 1 if self.quick else 3, "neuron": 100}

    @property
    def new_tokens(self) -> int:
        """How many tokens are generated after the prompt."""
        return 5 if self.quick else NEW_TOKENS

    @cached_property
    def folder(self) -> str:
        """A Hugging Face folder with the weights, written at its first use."""
        path = self.scratch / "gpt2"
        write_model(path, self.sizes, **self.ablated)
        return str(path)

    def tokens(self, batch: int, length: int) -> list[list[int]]:
        """Token ids ``[b][s]``, the same every time."""
        return self.ragged_tokens([length] * batch)

    def ragged_tokens(self, lengths: list[int]) -> list[list[int]]:
        """Rows of token ids of the given lengths, the same every time."""
        draw = random.Random(0)
        return [[draw.randrange(self.sizes["vocab_size"]) for _ in range(n)] for n in lengths]


def write_model(folder: Path, sizes: dict[str, int], layer: int, neuron: int) -> None:
    """Write a Hugging Face GPT-2 folder of random float32 weights, without using that library.

    Weights are larger than GPT-2's initial ones, biases are not 0 and gains are not 1, because fresh
    weights would hide most mistakes. The ablated neuron is always active and has a large effect.
    """
    import torch
    from safetensors.torch import save_file

    generator = torch.Generator().manual_seed(0)
    width, n_layer = sizes["n_embd"], sizes["n_layer"]

    def normal(*shape: int, std: float = 0.05, mean: float = 0.0) -> Any:
        return torch.empty(shape).normal_(mean, std, generator=generator)

    state = {
        "wte.weight": normal(sizes["vocab_size"], width),
        "wpe.weight": normal(sizes["n_positions"], width, std=0.2),
        "ln_f.weight": normal(width, std=0.1, mean=1.0),
        "ln_f.bias": normal(width),
    }
    linears = {
        "attn.c_attn": (width, 3 * width),
        "attn.c_proj": (width, width),
        "mlp.c_fc": (width, 4 * width),
        "mlp.c_proj": (4 * width, width),
    }
    for i in range(n_layer):
        for name in ("ln_1", "ln_2"):
            state[f"h.{i}.{name}.weight"] = normal(width, std=0.1, mean=1.0)
            state[f"h.{i}.{name}.bias"] = normal(width)
        for name, (n_in, n_out) in linears.items():
            state[f"h.{i}.{name}.weight"] = normal(n_in, n_out)
            state[f"h.{i}.{name}.bias"] = normal(n_out)
    state[f"h.{layer}.mlp.c_fc.bias"][neuron] = 3.0
    state[f"h.{layer}.mlp.c_proj.weight"][neuron] *= 8
    config = {
        **sizes,
        "model_type": "gpt2",
        "architectures": ["GPT2LMHeadModel"],
        "activation_function": "gelu_new",
        "layer_norm_epsilon": 1e-5,
        "tie_word_embeddings": True,
        "n_ctx": sizes["n_positions"],
        "bos_token_id": sizes["vocab_size"] - 1,
        "eos_token_id": sizes["vocab_size"] - 1,
    }
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(config, indent=1))
    save_file(
        {f"transformer.{name}": tensor for name, tensor in state.items()},
        folder / "model.safetensors",
        metadata={"format": "pt"},
    )
