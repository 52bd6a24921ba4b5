"""The pieces of a TopK training step, at a cost that depends on the number of active latents.

A step computes all ``b · l`` pre-activations once, to find the ``k`` largest of each token. Everything else
concerns only ``b · k`` pairs (token, latent): the decoder's output gathers directions of latents, and the
gradient of a weight matrix gathers, for each latent, rows of the batch. Both functions equal their dense
twins in value and in every gradient:

    encode_top_k   F.linear(x, weight, bias).topk(k)
    decode_rows    (zeros[b, l] with values at indices) @ decoder

Losses are built from these two. With ``latents``, the search is among some latents only (AuxK: the dead
ones). Values come in descending order, so that one search with a larger ``k`` serves several losses
(multi-TopK: ``values[:, :k]``). Gao et al. 2024, "Scaling and evaluating sparse autoencoders",
sections 2.3, 2.4, A.2, D.

Shape legend: ``b`` tokens of a batch, ``n`` inputs, ``o`` outputs, ``l`` latents, ``c`` latents that
are searched, ``k`` chosen latents of a token, ``m`` pairs (token, latent).
"""

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from neuron_explainer.errors import InputError
from neuron_explainer.kernels import encode_top_k as topk
from neuron_explainer.kernels.workspace import Workspace

BLOCK_ELEMENTS = 1 << 19  # of a weight's gradient that are computed at a time


def encode_top_k(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    k: int,
    *,
    pre_bias: Tensor | None = None,
    latents: Tensor | None = None,
    certified: bool | None = None,
    workspace: Workspace | None = None,
    chunk_bytes: int | None = None,
    block_elements: int = BLOCK_ELEMENTS,
) -> tuple[Tensor, Tensor]:
    """The ``k`` largest pre-activations of each token, largest first, and their latents.

    ``[b, n], [l, n], [l] -> [b, k], [b, k]``: values, differentiable with respect to ``x``, ``weight``
    and ``bias``, and int64 indices. Values are pre-activations and may be negative; a ReLU is left to the
    caller. No ``[b, l]`` tensor exists at any time.

    Args:
        pre_bias: ``[n]``, subtracted from ``x`` first; differentiable. Its gradient is a single product, of
        the
            bias's gradient with ``weight``; computing it from ``x - pre_bias`` takes one for each token.
        latents: ``[c]`` int64: search only these rows of ``weight``, each given at most once. Indices
            still refer to rows of ``weight``.
        certified: how the search works, with the same result. True: products in bfloat16 and a proof that
            nothing was missed. False: exact products. None: whichever is faster here.
        workspace: where the gradient of ``weight`` is computed; without one its memory is new each time.
        chunk_bytes: size of the pre-activations that exist at a time, if not the fastest.
        block_elements: elements of the gradient that are computed at a time.

    Raises:
        InputError: ``k`` is not between 1 and the number of latents searched.
    """
    n_searched = len(weight if latents is None else latents)
    if not 1 <= k <= n_searched:
        raise InputError(
            f"encode_top_k: expected k from 1 to the {n_searched} latents searched, found {k}."
        )
    outputs: tuple[Tensor, Tensor] = _EncodeTopK.apply(  # type: ignore[no-untyped-call]
        x, weight, bias, pre_bias, k, latents, certified, workspace, chunk_bytes, block_elements
    )
    return outputs


def decode_rows(
    values: Tensor,
    indices: Tensor,
    decoder: Tensor,
    *,
    workspace: Workspace | None = None,
    block_elements: int = BLOCK_ELEMENTS,
) -> Tensor:
    """The sum of the chosen latents' directions, each times its value.

    ``[b, k], [b, k], [l, o] -> [b, o]``, differentiable with respect to ``values`` and ``decoder``.
    A latent that is chosen twice counts twice.
    """
    output: Tensor = _DecodeRows.apply(  # type: ignore[no-untyped-call]
        values, indices, decoder, workspace, block_elements
    )
    return output


class _EncodeTopK(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor,
        pre_bias: Tensor | None,
        k: int,
        latents: Tensor | None,
        certified: bool | None,
        workspace: Workspace | None,
        chunk_bytes: int | None,
        block_elements: int,
    ) -> tuple[Tensor, Tensor]:
        centred = x if pre_bias is None else x - pre_bias
        if latents is None:
            values, indices = topk.encode_top_k(
                centred, weight, bias, k, certified=certified, chunk_bytes=chunk_bytes
            )
        else:
            values, chosen = topk.encode_top_k(
                centred,
                weight[latents],
                bias[latents],
                k,
                certified=certified,
                chunk_bytes=chunk_bytes,
            )
            indices = latents[chosen]
        ctx.save_for_backward(centred, weight, indices)
        ctx.workspace, ctx.block_elements = workspace, block_elements
        ctx.mark_non_differentiable(indices)
        return values, indices

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        centred, weight, indices = ctx.saved_tensors
        of_x, of_weight, of_bias, of_pre_bias = ctx.needs_input_grad[:4]
        grad_x = _gather_rows(grad, indices, weight) if of_x else None
        grad_weight = grad_bias = grad_pre_bias = None
        if of_weight:
            pairs = _by_latent(indices, len(weight))
            values = grad.flatten()[pairs.order]
            grad_weight = collect_rows(values, pairs, centred, ctx.workspace, ctx.block_elements)
        if of_bias or of_pre_bias:
            grad_bias = grad.new_zeros(len(weight))
            grad_bias.index_add_(0, indices.flatten(), grad.flatten())
        if of_pre_bias:
            grad_pre_bias = -(grad_bias @ weight)
        return grad_x, grad_weight, grad_bias, grad_pre_bias, *(None,) * 6


class _DecodeRows(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        values: Tensor,
        indices: Tensor,
        decoder: Tensor,
        workspace: Workspace | None,
        block_elements: int,
    ) -> Tensor:
        ctx.save_for_backward(values, indices, decoder)
        ctx.workspace, ctx.block_elements = workspace, block_elements
        return _gather_rows(values, indices, decoder)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        values, indices, decoder = ctx.saved_tensors
        grad = grad.contiguous()
        pairs = _by_latent(indices, len(decoder))
        grad_values = grad_decoder = None
        if ctx.needs_input_grad[0]:
            grad_values = torch.empty_like(values)
            grad_values.view(-1)[pairs.order] = pair_products(pairs, decoder, grad)
        if ctx.needs_input_grad[2]:
            values = values.flatten()[pairs.order]
            grad_decoder = collect_rows(values, pairs, grad, ctx.workspace, ctx.block_elements)
        return grad_values, None, grad_decoder, None, None


class Pairs(NamedTuple):
    """The pairs (token, latent) of a batch, in the order of latents."""

    latents: Tensor
    """``[m]`` int64, ascending."""
    tokens: Tensor
    """``[m]`` int64."""
    order: Tensor
    """``[m]`` int64: the index of each pair before sorting."""
    first: Tensor
    """``[l + 1]`` int64: the index of each latent's first pair, then the number of all pairs."""


def sort_by_latent(tokens: Tensor, latents: Tensor, n_latents: int) -> Pairs:
    """Sort pairs by latent; tokens and latents are ``[m]`` int64 each, in any order."""
    latents, order = latents.sort(stable=True)
    every = torch.arange(n_latents + 1, device=latents.device)
    return Pairs(latents, tokens[order], order, torch.searchsorted(latents, every))


def _by_latent(indices: Tensor, n_latents: int) -> Pairs:
    tokens = torch.arange(len(indices), device=indices.device)
    return sort_by_latent(tokens.repeat_interleave(indices.shape[1]), indices.flatten(), n_latents)


def _gather_rows(values: Tensor, indices: Tensor, rows: Tensor) -> Tensor:
    """``[b, k], [b, k], [l, n] -> [b, n]``: for each token, the weighted sum of its latents' rows."""
    return F.embedding_bag(indices, rows, per_sample_weights=values.contiguous(), mode="sum")


def collect_rows(
    values: Tensor,
    pairs: Pairs,
    rows: Tensor,
    workspace: Workspace | None = None,
    block_elements: int = BLOCK_ELEMENTS,
) -> Tensor:
    """``[m], pairs, [b, n] -> [l, n]``: for each latent, the weighted sum of its tokens' rows.

    A latent's pairs are one bag of an ``embedding_bag`` over the batch. A latent without pairs has an empty
    bag, and a row of zeros.

    Rejected, at 768 wide with 4,096 x 32 pairs and 16,384 latents on two cores: a CSR matrix times
    the batch took 1.8 times as long, ``index_add_`` 9 times, ``segment_reduce`` 15 times.
    """
    n_latents, rows = len(pairs.first) - 1, rows.contiguous()
    step = max(1, block_elements // max(1, rows.shape[1]))
    if rows.device.type != "cpu" or n_latents <= step:
        return bags(pairs.tokens, rows, pairs.first, values)
    # By blocks of latents, so that malloc keeps what embedding_bag allocates: memory for all latents
    # would be mapped and unmapped each time.
    collected = (workspace or Workspace()).gradient((n_latents, rows.shape[1]), like=rows)
    for start in range(0, n_latents, step):
        first = pairs.first[start : start + step + 1]
        own = slice(int(first[0]), int(first[-1]))
        collected[start : start + step] = bags(
            pairs.tokens[own], rows, first - first[0], values[own]
        )
    return collected


def bags(indices: Tensor, rows: Tensor, first: Tensor, values: Tensor) -> Tensor:
    """``[m], [r, n], [s + 1], [m] -> [s, n]``: weighted sums of rows; sum i is over ``indices`` from
    ``first[i]`` to ``first[i + 1]``."""
    return F.embedding_bag(
        indices, rows, first, per_sample_weights=values, mode="sum", include_last_offset=True
    )


def pair_products(pairs: Pairs, rows: Tensor, x: Tensor) -> Tensor:
    """``pairs, [l, n], [b, n] -> [m]``: for each pair, the product of its latent's row and its token's."""
    products: Tensor = torch.ops.aten._embedding_bag_per_sample_weights_backward(
        rows.contiguous(), x, pairs.tokens, pairs.first[:-1], pairs.latents, 0
    )
    return products
