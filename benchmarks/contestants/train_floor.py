"""The matrix products that a step must compute, by the fastest kernel available."""

import torch
from torch import Tensor

from benchmarks.contestants.encode_floor import fastest_product
from benchmarks.contestants.training import activations, directions
from benchmarks.workloads import Work
from neuron_explainer.kernels.top_k import top_k


def topk_step(
    tokens: int, width: int, latents: int, k: int, aux: bool = False, variant: str = "ours"
) -> Work:
    """Encode and find the largest.

    Args:
        variant: ``ours`` or ``torch``, by whose search, products by the fastest kernel; ``plain``, as one
            writes it down: ``torch.mm`` of all tokens, then ``torch.topk``.
    """
    x, weight = activations(tokens, width), directions(latents, width)
    if variant == "plain":
        out = torch.empty(tokens, latents).fill_(0.0)

        def plain() -> dict[str, Tensor]:
            torch.mm(x, weight.t(), out=out).topk(k, dim=1, sorted=False)
            return {}

        return plain

    def search(part: Tensor) -> None:
        if variant == "torch":
            part.topk(k, dim=1, sorted=False)
        else:
            top_k(part, k)

    step = fastest_product(x, weight, search)

    def work() -> dict[str, Tensor]:
        step()
        return {}

    return work


def five_products(tokens: int, width: int, latents: int) -> Work:
    """Encode, decode, and the gradients of decoder, latents and encoder, all dense."""
    x, weight = activations(tokens, width), directions(latents, width)
    latent = torch.empty(tokens, latents).fill_(0.0)
    output, grad_weight = torch.empty_like(x), torch.empty(latents, width).fill_(0.0)
    encode = fastest_product(x, weight, lambda _: None)
    grad_latent = fastest_product(output, weight, lambda _: None)

    def work() -> dict[str, Tensor]:
        encode()
        torch.mm(latent, weight, out=output)
        torch.mm(latent.t(), output, out=grad_weight)
        grad_latent()
        torch.mm(latent.t(), x, out=grad_weight)
        return {}

    return work
