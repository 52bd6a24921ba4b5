"""The pieces of a TopK training step that cost what is active, not what there is.

A step has to look at all ``b · l`` pre-activations once, to find the ``k`` largest of each token. All
else concerns ``b · k`` pairs (token, latent): the decoder's output gathers rows of the decoder, and
the gradient of a weight matrix gathers, for each latent, rows of the batch. Both functions equal
their dense twins in value and in every gradient:

    encode_top_k   F.linear(x, weight, bias).topk(k)
    decode_rows    (zeros[b, l] with values at indices) @ decoder

Losses are built of these two: with ``latents`` the search is among some latents only (AuxK: the dead
ones), and as values come in descending order, one search with a larger ``k`` serves several
(multi-TopK: ``values[:, :k]``). Gao et al. 2024, "Scaling and evaluating sparse autoencoders",
sections 2.3, 2.4, A.2, D.

Shape legend: ``b`` tokens of a batch, ``n`` inputs, ``o`` outputs, ``l`` latents, ``m`` latents that
are searched, ``k`` chosen latents of a token.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from neuron_explainer.errors import InputError

_CHUNK_ELEMENTS = 1 << 24  # pre-activations that exist at a time: 64 MiB in float32
_GROUP = 8  # of pre-activations, in the search for the largest


def encode_top_k(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    k: int,
    *,
    latents: Tensor | None = None,
    certified: bool | None = None,
) -> tuple[Tensor, Tensor]:
    """The ``k`` largest pre-activations of each token, largest first, and whose they are.

    ``[b, n], [l, n], [l] -> [b, k], [b, k]``: values, differentiable with respect to ``x``, ``weight``
    and ``bias``, and int64 indices. Values are pre-activations: they may be negative, and what is
    done about it (a ReLU) is the caller's. No ``[b, l]`` tensor exists, before or after.

    Args:
        latents: ``[m]`` int64: look among these rows of ``weight`` only; each at most once. Indices
            are still rows of ``weight``.
        certified: how the largest are found, the result being the same: True, by products in
            bfloat16 and a proof that nothing was missed; False, by exact products throughout; None,
            whichever is faster here.

    Raises:
        InputError: ``k`` is not between 1 and the number of latents searched.
    """
    n_searched = len(weight if latents is None else latents)
    if not 1 <= k <= n_searched:
        raise InputError(
            f"encode_top_k: expected k from 1 to the {n_searched} latents searched, found {k}."
        )
    outputs: tuple[Tensor, Tensor] = _EncodeTopK.apply(x, weight, bias, k, latents, certified)  # type: ignore[no-untyped-call]
    return outputs


def decode_rows(values: Tensor, indices: Tensor, decoder: Tensor) -> Tensor:
    """The sum of the chosen latents' rows of the decoder, each times its value.

    ``[b, k], [b, k], [l, o] -> [b, o]``, differentiable with respect to ``values`` and ``decoder``.
    A latent that is chosen twice counts twice.
    """
    output: Tensor = _DecodeRows.apply(values, indices, decoder)  # type: ignore[no-untyped-call]
    return output


class _EncodeTopK(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor,
        k: int,
        latents: Tensor | None,
        certified: bool | None,
    ) -> tuple[Tensor, Tensor]:
        if latents is None:
            values, indices = _search(x, weight, bias, k)
        else:
            values, chosen = _search(x, weight[latents], bias[latents], k)
            indices = latents[chosen]
        ctx.save_for_backward(x, weight, indices)
        ctx.mark_non_differentiable(indices)
        return values, indices

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, indices = ctx.saved_tensors
        grad_x = grad_weight = grad_bias = None
        if ctx.needs_input_grad[0]:
            grad_x = _gather_rows(grad, indices, weight)
        if ctx.needs_input_grad[1]:
            grad_weight = _collect_rows(grad, indices, x, len(weight))
        if ctx.needs_input_grad[2]:
            grad_bias = grad.new_zeros(len(weight))
            grad_bias.index_add_(0, indices.flatten(), grad.flatten())
        return grad_x, grad_weight, grad_bias, None, None, None


class _DecodeRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, values: Tensor, indices: Tensor, decoder: Tensor) -> Tensor:
        ctx.save_for_backward(values, indices, decoder)
        return _gather_rows(values, indices, decoder)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        values, indices, decoder = ctx.saved_tensors
        grad_values = grad_decoder = None
        if ctx.needs_input_grad[0]:
            grad_values = _dot_rows(grad, indices, decoder)
        if ctx.needs_input_grad[2]:
            grad_decoder = _collect_rows(values, indices, grad, len(decoder))
        return grad_values, None, grad_decoder


def _gather_rows(values: Tensor, indices: Tensor, rows: Tensor) -> Tensor:
    """``[b, k], [b, k], [l, n] -> [b, n]``: for each token, the weighted sum of its latents' rows."""
    return F.embedding_bag(indices, rows, per_sample_weights=values.contiguous(), mode="sum")


def _collect_rows(values: Tensor, indices: Tensor, rows: Tensor, n_latents: int) -> Tensor:
    """``[b, k], [b, k], [b, n] -> [l, n]``: for each latent, the weighted sum of its tokens' rows.

    The pairs in the order of latents are the bags of an ``embedding_bag`` over the batch, which
    writes each row of the result once, those of latents that are nobody's included.
    """
    latents, order = indices.flatten().sort(stable=True)
    first = torch.searchsorted(latents, torch.arange(n_latents + 1, device=latents.device))
    return F.embedding_bag(
        order.div(indices.shape[1], rounding_mode="floor"),
        rows.contiguous(),
        first,
        per_sample_weights=values.flatten()[order],
        mode="sum",
        include_last_offset=True,
    )


def _dot_rows(x: Tensor, indices: Tensor, rows: Tensor) -> Tensor:
    """``[b, n], [b, k], [l, n] -> [b, k]``: each token's products with its latents' rows."""
    token = torch.arange(len(x), device=x.device)
    k = indices.shape[1]
    products: Tensor = torch.ops.aten._embedding_bag_per_sample_weights_backward(
        x.contiguous(), rows, indices.flatten(), token * k, token.repeat_interleave(k), 0
    )
    return products.view_as(indices)


def _search(x: Tensor, weight: Tensor, bias: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """``[b, k], [b, k]``, by a few tokens at a time."""
    values = x.new_empty(len(x), k)
    indices = torch.empty(len(x), k, dtype=torch.long, device=x.device)
    step = max(1, _CHUNK_ELEMENTS // len(weight))
    buffer = x.new_empty(min(step, len(x)), len(weight))
    for start in range(0, len(x), step):
        rows = slice(start, min(start + step, len(x)))
        pre_act = torch.addmm(bias, x[rows], weight.t(), out=buffer[: rows.stop - rows.start])
        values[rows], indices[rows] = _largest(pre_act, k)
    return values, indices


def _largest(x: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """``x.topk(k, dim=1)``, by groups: the ``k`` largest lie within the ``k`` groups of largest maxima."""
    n_groups = x.shape[1] // _GROUP
    if x.shape[1] % _GROUP or n_groups < 2 * k:
        return x.topk(k, dim=1)
    groups = x.view(len(x), _GROUP, n_groups)  # a group is a column: maxima are taken row by row
    best = groups.amax(1).topk(k, dim=1, sorted=False).indices
    candidates = groups.gather(2, best[:, None].expand(-1, _GROUP, -1)).flatten(1)
    values, chosen = candidates.topk(k, dim=1)
    return values, chosen // k * n_groups + best.gather(1, chosen % k)
