"""Encoding and decoding without a graph: the formula's results, with less time and memory.

Shape legend: ``r`` rows, ``n`` inputs, ``l`` latents, ``k`` latents kept of a row, ``…`` leading axes.
"""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from neuron_explainer.kernels.encode_top_k import encode_top_k
from neuron_explainer.models.autoencoders.latents import Latents
from neuron_explainer.models.autoencoders.nonlinearities import Nonlinearity

# Size of the dense latents that are held at a time where they are not the result.
_CHUNK_BYTES = 2**24
SPARSE_SHARE = 1 / 32
"""Decoding row by row beats a matrix product below this share of active latents."""


def needs_graph(module: nn.Module, x: Tensor) -> bool:
    """Whether something would notice that a computation took another way than the formula's.

    Gradients would, and automatic casting, and hooks on modules inside.
    """
    if torch.is_autocast_enabled(x.device.type):
        return True
    if torch.is_grad_enabled() and (
        x.requires_grad or any(parameter.requires_grad for parameter in module.parameters())
    ):
        return True
    return any(inside._forward_hooks or inside._forward_pre_hooks for inside in module.modules())


def searched_latents(
    centred: Tensor,
    weight: Tensor,
    bias: Tensor,
    nonlinearity: Nonlinearity,
    chunk_bytes: int | None,
) -> Latents:
    """``[…, n] -> […, k]``: the ``top_k`` largest pre-activations, found without keeping the others.

    ``centred`` is the normalised input minus ``pre_bias``.
    """
    k = nonlinearity.top_k
    assert k is not None
    rows = centred.reshape(-1, centred.shape[-1])
    values, indices = encode_top_k(rows, weight, bias, k, chunk_bytes=chunk_bytes)
    values, shape = nonlinearity.after_top_k(values), (*centred.shape[:-1], k)
    return Latents(values.view(shape), indices.view(shape), len(weight))


def in_pieces(rows: Tensor, n_latents: int, chunk_bytes: int | None) -> tuple[Tensor, ...]:
    """``[r, n]`` in pieces whose dense latents have ``chunk_bytes`` at most."""
    size = (chunk_bytes or _CHUNK_BYTES) // (n_latents * rows.element_size())
    return torch.split(rows, max(1, size))


def sparse_latents(
    x_hat: Tensor, encode: Callable[[Tensor], Tensor], n_latents: int, chunk_bytes: int | None
) -> Latents:
    """The active latents of ``[…, n]``, by a dense ``encode`` of a piece of the rows at a time."""
    rows = x_hat.reshape(-1, x_hat.shape[-1])
    parts = [Latents.of(encode(part)) for part in in_pieces(rows, n_latents, chunk_bytes)]
    return Latents.cat(parts).unflatten(x_hat.shape[:-1])


def cheaper_to_decode(latents: Tensor, sparse_share: float) -> Tensor | Latents:
    """Dense latents ``[r, l]`` as they are, or their active entries where these are few."""
    few = torch.count_nonzero(latents) < sparse_share * latents.numel()
    return Latents.of(latents) if few else latents
