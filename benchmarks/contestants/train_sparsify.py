"""sparsify: its ``SparseCoder`` in the steps of its trainer's ``fit``, which cannot run without a model.

Its optimiser where bitsandbytes is missing is ``torch.optim.Adam`` as it comes.
"""

from typing import Any

import torch

from benchmarks.contestants.training import LR, activations, dead, directions
from benchmarks.workloads import Prepared

sparsify: Any = __import__("sparsify")


def topk_step(tokens: int, width: int, latents: int, k: int, aux: bool = False) -> Prepared:
    coder = sparsify.SparseCoder(width, sparsify.SparseCoderConfig(num_latents=latents, k=k))
    rows = directions(latents, width)
    coder.encoder.weight.data.copy_(rows)
    coder.W_dec.data.copy_(rows)
    optimizer = torch.optim.Adam(coder.parameters(), lr=LR)
    since_fired = torch.zeros(latents, dtype=torch.long)
    silent = dead(latents) if aux else torch.empty(0, dtype=torch.long)
    x = activations(tokens, width)

    def work() -> dict[str, torch.Tensor]:
        since_fired[silent] = 10**9
        coder.set_decoder_norm_to_unit_norm()
        variance = (x - x.mean(0)).pow(2).sum()
        dead_mask = since_fired > 10**7 if aux else None
        out = coder(x, dead_mask=dead_mask, total_variance=variance)
        fired = torch.zeros(latents, dtype=torch.bool)
        fired[out.latent_indices.flatten()] = True
        (out.fvu + out.auxk_loss / 32 + out.multi_topk_fvu / 8).backward()
        coder.remove_gradient_parallel_to_decoder_directions()
        optimizer.step()
        optimizer.zero_grad()
        since_fired.add_(tokens)
        since_fired[fired] = 0
        return {"squared error": out.fvu.detach() * variance / tokens}

    return Prepared(work, "no gradient of AuxK in its encoder" if aux else "")
