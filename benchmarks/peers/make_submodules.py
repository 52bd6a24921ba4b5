"""What dictionary_learning's buffer reads at a submodule, by its own tracer: what our aliases must equal.

    python -m venv peer && peer/bin/pip install -r benchmarks/peers/dictionary-learning.txt
    peer/bin/python benchmarks/peers/make_submodules.py

writes ``tests/fixtures/peers/submodules/<model>/``: a tiny random model in Hugging Face's layout, and
``activations.safetensors`` with ``tokens`` and one tensor for each submodule's path and side, such as
``gpt_neox.layers.1.mlp:out``. dictionary_learning's ``ActivationBuffer`` reads ``submodule.output`` and
``submodule.inputs`` of nnsight, as is done here.
"""

from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

FIXTURES = Path(__file__).parents[2] / "tests" / "fixtures" / "peers" / "submodules"
LAYER = 1
PARTS = {
    "gpt2": ("transformer.h", ["mlp", "attn"]),
    "gpt_neox": ("gpt_neox.layers", ["mlp", "attention"]),
}


def tiny(kind: str) -> Any:
    """A model whose every parameter is random."""
    transformers = import_module("transformers")
    sizes = {"vocab_size": 19, "bos_token_id": 0, "eos_token_id": 0}
    if kind == "gpt2":
        config = transformers.GPT2Config(**sizes, n_positions=16, n_embd=8, n_layer=2, n_head=2)
    else:
        config = transformers.GPTNeoXConfig(
            **sizes,
            hidden_size=8,
            intermediate_size=12,
            num_hidden_layers=2,
            num_attention_heads=2,
            max_position_embeddings=16,
        )
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.5)
    return model


def first(value: Any) -> torch.Tensor:
    """The tensor in what a module takes or returns."""
    while not isinstance(value, torch.Tensor):
        value = next(iter(value.values())) if isinstance(value, dict) else value[0]
    return value.detach().float().contiguous().clone()


def read(model: Any, path: str, tokens: torch.Tensor) -> dict[str, torch.Tensor]:
    """The input and the output of a submodule, by nnsight."""
    traced = import_module("nnsight").NNsight(model)
    module = traced
    for part in path.split("."):
        module = module[int(part)] if part.isdecimal() else getattr(module, part)
    with torch.no_grad(), traced.trace(tokens):
        output = module.output.save()
        given = module.inputs.save()
    args, kwargs = getattr(given, "value", given)
    return {
        f"{path}:out": first(getattr(output, "value", output)),
        f"{path}:in": first(args[0] if args else kwargs["hidden_states"]),
    }


def main() -> None:
    tokens = torch.randint(0, 19, (2, 7), generator=torch.Generator().manual_seed(1))
    for kind, (layers, parts) in PARTS.items():
        folder = FIXTURES / kind
        model = tiny(kind)
        model.save_pretrained(folder)
        (folder / "generation_config.json").unlink(missing_ok=True)
        found = {"tokens": tokens}
        for part in ["", *parts]:
            found |= read(model, f"{layers}.{LAYER}" + (f".{part}" if part else ""), tokens)
        save_file(found, folder / "activations.safetensors")


if __name__ == "__main__":
    main()
