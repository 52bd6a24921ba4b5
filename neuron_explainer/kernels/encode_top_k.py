"""TopK encoders without the dense latents: the ``k`` largest pre-activations of each row.

Rows are taken in chunks, so that no ``[b, l]`` is ever held. Where the hardware is quick at bfloat16,
the search is done in bfloat16 and proven right (:mod:`neuron_explainer.kernels.certified`); the result
is float32 either way.

Shape legend: ``b`` rows, ``n`` inputs, ``l`` latents, ``k`` wanted.
"""

import torch
from torch import Tensor

from neuron_explainer.errors import InputError
from neuron_explainer.kernels.certified import certified_top_k, prepare, use_certified
from neuron_explainer.kernels.products import product
from neuron_explainer.kernels.top_k import top_k

# Pre-activations that are held at a time. On a CPU they are few enough to stay in caches, and for
# malloc to give the same memory again.
_CHUNK_BYTES = 2**24
_CHUNK_BYTES_ELSEWHERE = 2**28


@torch.no_grad()
def encode_top_k(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    k: int,
    certified: bool | None = None,
    chunk_bytes: int | None = None,
) -> tuple[Tensor, Tensor]:
    """The ``k`` largest entries of each row of ``x · weightᵀ + bias``, and where they are.

    ``x`` ``[b, n]``, ``weight`` ``[l, n]``, ``bias`` ``[l]`` to values ``[b, k]`` and indices
    ``[b, k]`` int64, in the order of :func:`top_k`, ties to the lowest index. Without gradient.

    Args:
        certified: whether to search in bfloat16; None: where it pays
            (:func:`~neuron_explainer.kernels.certified.use_certified`), which the environment
            variable NEURON_EXPLAINER_CERTIFIED (0 or 1) overrides.
        chunk_bytes: size of the pre-activations that are held at a time; None: what suits the device.
    """
    if not 1 <= k <= len(weight):
        raise InputError(
            f"encode_top_k: k={k!r} of {len(weight)} latents; k must lie between 1 and their number."
        )
    if chunk_bytes is None:
        on_cpu = x.device.type == "cpu"
        chunk_bytes = _CHUNK_BYTES if on_cpu else _CHUNK_BYTES_ELSEWHERE
    x, weight, bias = x.detach(), weight.detach(), None if bias is None else bias.detach()
    if not use_certified(x, weight, certified):
        return _encode_plain(x, weight, bias, k, chunk_bytes)
    values, indices, proven = certified_top_k(x, weight, bias, k, prepare(weight, bias))
    left = (~proven).nonzero().squeeze(1)
    if len(left):
        values[left], indices[left] = _encode_plain(x[left], weight, bias, k, chunk_bytes)
    return values, indices


def _encode_plain(
    x: Tensor, weight: Tensor, bias: Tensor | None, k: int, chunk_bytes: int
) -> tuple[Tensor, Tensor]:
    """The same by products in the dtype of the weights."""
    values = x.new_empty(len(x), k)
    indices = torch.empty(len(x), k, dtype=torch.int64, device=x.device)
    step = max(1, chunk_bytes // (weight.element_size() * len(weight)))
    for start in range(0, len(x), step):
        rows = slice(start, start + step)
        values[rows], indices[rows] = top_k(product(x[rows], weight, bias), k)
    return values, indices
