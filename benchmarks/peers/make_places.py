"""Every activation that TransformerLens names, by TransformerLens itself: what our aliases must equal.

    python -m venv peer && peer/bin/pip install -r benchmarks/peers/transformer-lens-3.txt
    peer/bin/python benchmarks/peers/make_places.py

and likewise with ``transformer-lens-4.txt``. Each writes ``tests/fixtures/peers/transformer-lens/<major>/``:
``gpt2/``, a tiny random model in Hugging Face's layout (gains and biases of the norms are random too, so
that a value before them is not the value after them), and ``<kind>.safetensors`` with ``tokens``, ``logits``
and one tensor for each hook name, for TransformerLens's two kinds of model: ``hooked`` and ``bridge``.
"""

import contextlib
import json
import logging
import tempfile
from importlib import import_module, metadata
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

FIXTURES = Path(__file__).parents[2] / "tests" / "fixtures" / "peers" / "transformer-lens"
SIZES = {"vocab_size": 19, "n_positions": 16, "n_ctx": 16, "n_embd": 8, "n_layer": 2, "n_head": 2}


def tiny_gpt2() -> Any:
    """A ``GPT2LMHeadModel`` whose every parameter is random."""
    transformers = import_module("transformers")
    config = transformers.GPT2Config(**SIZES, bos_token_id=0, eos_token_id=0)
    model = transformers.GPT2LMHeadModel(config).eval()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.5)
    return model


def models(folder: Path) -> dict[str, Any]:
    """TransformerLens's two kinds around the model saved in ``folder``; nothing folded or centred."""
    lens = import_module("transformer_lens")
    bridge = import_module("transformer_lens.model_bridge").TransformerBridge
    with contextlib.chdir(folder.parent):  # it takes only names that it knows: here a folder's
        hooked = lens.HookedTransformer.from_pretrained_no_processing(
            folder.name, hf_model=tiny_gpt2(), device="cpu"
        )
    return {
        "hooked": hooked.eval(),
        "bridge": bridge.boot_transformers(str(folder), device="cpu").eval(),
    }


def main() -> None:
    logging.disable(logging.WARNING)  # that there is no tokenizer
    version = metadata.version("transformer-lens")
    out = FIXTURES / version.split(".")[0]
    out.mkdir(parents=True, exist_ok=True)
    tokens = torch.randint(0, 19, (2, 7), generator=torch.Generator().manual_seed(1))
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary, "gpt2")
        tiny_gpt2().save_pretrained(folder)
        for kind, model in models(folder).items():
            with torch.no_grad():
                logits, cache = model.run_with_cache(tokens, return_type="logits")
            found = {name: cache[name].float().contiguous().clone() for name in cache}
            save_file({"tokens": tokens, "logits": logits, **found}, out / f"{kind}.safetensors")
        saved = out / "gpt2"
        saved.mkdir(exist_ok=True)
        for name in ("config.json", "model.safetensors"):
            (saved / name).write_bytes((folder / name).read_bytes())
    note = {"transformer-lens": version, "torch": torch.__version__, **SIZES}
    (out / "made_by.json").write_text(json.dumps(note, indent=1) + "\n", "utf-8")


if __name__ == "__main__":
    main()
