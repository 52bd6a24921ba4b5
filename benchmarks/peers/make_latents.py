"""delphi's cache of made-up latents, by its own code: what our writer must write.

    peer/bin/python benchmarks/peers/make_latents.py

in an environment with eai-delphi 0.1.3, torch, transformers, datasets, simple_parsing, jaxtyping, beartype,
asyncer, orjson and blobfile; vLLM and FAISS are not needed. It writes ``tests/fixtures/peers/delphi``: the
input ``latents.safetensors`` and the cache ``layers.1.mlp/``. ``make_latents.py FOLDER`` reads a cache that
this library wrote instead, with delphi's loader, and prints what it found.
"""

import sys
from importlib import import_module
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import MagicMock

import torch
from safetensors.torch import save_file

FIXTURES = Path(__file__).resolve().parents[2] / "tests" / "fixtures" / "peers" / "delphi"
HOOK = "layers.1.mlp"
for heavy in ("transformers", "datasets"):
    import_module(heavy)
for absent in ("faiss", "sentence_transformers", "vllm", "torchtyping"):
    sys.modules.setdefault(absent, MagicMock())


def write() -> None:
    cache, config = import_module("delphi.latents.cache"), import_module("delphi.config")
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(0, 50, (6, 8), generator=generator)
    latents = torch.randn(6, 8, 11, generator=generator).clamp_min(0)
    latents *= torch.rand(latents.shape, generator=generator) < 0.3
    latents[0, 0, 0], latents[1, 2, 3] = 5e-6, -0.5
    made = cache.LatentCache(SimpleNamespace(), {HOOK: None}, batch_size=2, transcode=False)
    made.width = 11
    for number in range(3):
        rows = slice(2 * number, 2 * number + 2)
        made.cache.add(latents[rows], tokens[rows], number, HOOK)
    made.cache.save()
    made.save_splits(3, FIXTURES)
    settings = config.CacheConfig(
        dataset_repo="made-up text", dataset_split="", batch_size=2, cache_ctx_len=8, n_tokens=48,
        n_splits=3,
    )  # fmt: skip
    made.save_config(FIXTURES, settings, "gpt2")
    save_file({"tokens": tokens, "latents": latents}, FIXTURES / "latents.safetensors")


def read(folder: Path) -> None:
    loader: Any = import_module("delphi.latents.loader")
    for path in sorted(folder.glob("*/*.safetensors")):
        buffer = loader.TensorBuffer(str(path), path.parent.name)
        found = list(buffer)
        print(
            f"{path.relative_to(folder)}: {len(found)} latents, tokens {list(buffer.tokens.shape)}"
        )


if __name__ == "__main__":
    read(Path(sys.argv[1])) if len(sys.argv) > 1 else write()
