"""A ReLU autoencoder's step: all five matrix products when latents are dense, one when they are sparse.

    latents = relu((x - pre_bias) · weightᵀ + bias)
    output  = latents · decoder
    sums    = Σ latents · scale       of each token: the L1 penalty

Early in training half of all latents are active, and a step is five products; what surrounds them is
done in place and in few passes. Later one in a hundred is, and all but the first product concern the
active pairs (token, latent) alone, as in :mod:`.sparse_step`. Which of the two is done depends on the
latents of the first tokens; results and gradients are the same.

Shape legend: ``b`` tokens of a batch, ``n`` inputs, ``o`` outputs, ``l`` latents, ``m`` active pairs.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from neuron_explainer.kernels.memory import empty, row_blocks
from neuron_explainer.kernels.products import product
from neuron_explainer.kernels.top_k_step import (
    bags,
    collect_rows,
    pair_products,
    sort_by_latent,
)

# Pre-activations at a time: of the forward pass, few enough that malloc gives the same memory again; of the
# backward pass, enough that adding to the weights' gradient is rare.
_FORWARD_ELEMENTS = 1 << 22
_CHUNK_ELEMENTS = 1 << 24
# Share of latents that are active above which dense products are faster (measured: about 0.15).
_SPARSE = 0.1


class ReLUOutput(NamedTuple):
    """What :func:`relu_autoencoder` computes."""

    output: Tensor
    """``[b, o]``, without a bias of its own; differentiable."""
    sums: Tensor
    """``[b]``: latents added up; differentiable."""
    values: Tensor
    """Latents, without gradient: ``[b, l]``, or ``[m]`` the active ones."""
    indices: Tensor | None
    """``[m]`` int64 which latents the active ones are; None if all are given."""


def relu_autoencoder(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    decoder: Tensor,
    *,
    pre_bias: Tensor | None = None,
    scale: Tensor | None = None,
) -> ReLUOutput:
    """Encode ``[b, n]``, rectify, decode, add up. The module says what is computed.

    Differentiable with respect to ``x``, ``weight`` ``[l, n]``, ``bias`` ``[l]``, ``decoder``
    ``[l, o]``, ``pre_bias`` ``[n]`` and ``scale`` ``[l]``, which is 1 if not given.
    """
    centred = x if pre_bias is None else x - pre_bias.detach()
    latents = _latents(centred.detach(), weight.detach(), bias.detach())
    inputs = (x, weight, bias, decoder, pre_bias, scale, centred.detach())
    if isinstance(latents, Tensor):
        output, sums = _Dense.apply(*inputs, latents)  # type: ignore[no-untyped-call]
        return ReLUOutput(output, sums, latents, None)
    output, sums = _Sparse.apply(*inputs, *latents)  # type: ignore[no-untyped-call]
    return ReLUOutput(output, sums, latents.values, latents.latents)


class _Active(NamedTuple):
    """Active latents, token by token."""

    values: Tensor
    """``[m]``"""
    tokens: Tensor
    """``[m]`` int64, ascending."""
    latents: Tensor
    """``[m]`` int64."""


@torch.no_grad()
def _latents(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor | _Active:
    """``[b, l]``, or the active ones if few of the first tokens' are."""
    step = max(1, _FORWARD_ELEMENTS // len(weight))
    first = product(x[:step], weight, bias, relu=True)
    if int(first.count_nonzero()) > _SPARSE * first.numel():  # NaN counts as active
        dense = empty((len(x), len(weight)), like=x)
        dense[:step] = first
        for start in range(step, len(x), step):
            rows = slice(start, start + step)
            dense[rows] = product(x[rows], weight, bias, relu=True)
        return dense
    parts = []
    for start in range(0, max(1, len(x)), step):
        chunk = product(x[start : start + step], weight, bias, relu=True) if start else first
        tokens, latents = chunk.nonzero(as_tuple=True)
        parts.append(_Active(chunk[tokens, latents], tokens + start, latents))
    return _Active(*map(torch.cat, zip(*parts, strict=True)))


class _Dense(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> tuple[Tensor, Tensor]:
        _, weight, _, decoder, _, scale, centred, latents = inputs
        ctx.save_for_backward(weight, decoder, scale, centred, latents)
        return latents @ decoder, latents.sum(1) if scale is None else latents @ scale

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor, grad_sums: Tensor) -> tuple[Tensor | None, ...]:
        weight, decoder, scale, centred, latents = ctx.saved_tensors
        of_x, of_weight, _, of_decoder, _, of_scale = ctx.needs_input_grad[:6]
        grad_x = torch.empty_like(centred) if of_x else None
        grad_weight = empty(weight.shape, like=weight).zero_() if of_weight else None
        grad_bias = weight.new_zeros(len(weight))
        ones = scale if scale is not None else weight.new_ones(())
        step = max(1, _CHUNK_ELEMENTS // len(weight))
        buffer = empty((min(step, len(latents)), len(weight)), like=latents)
        for start in range(0, len(latents), step):
            rows = slice(start, start + step)
            active = latents[rows]
            inner = torch.mm(grad[rows], decoder.t(), out=buffer[: len(active)])
            for part, gate, of_sum in row_blocks(inner, active, grad_sums[rows, None]):
                part.addcmul_(of_sum, ones)
                torch.ops.aten.threshold_backward(part, gate, 0, grad_input=part)
                grad_bias += part.sum(0)
            if grad_weight is not None:
                grad_weight.addmm_(inner.t(), centred[rows])
            if grad_x is not None:
                torch.mm(inner, weight, out=grad_x[rows])
        grad_decoder = grad_scale = None
        if of_decoder:
            grad_decoder = torch.mm(latents.t(), grad, out=empty(decoder.shape, like=decoder))
        if of_scale:
            grad_scale = grad_sums @ latents
        grad_pre_bias = -(grad_bias @ weight) if ctx.needs_input_grad[4] else None
        first = (grad_x, grad_weight, grad_bias, grad_decoder, grad_pre_bias, grad_scale)
        return *first, None, None


class _Sparse(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> tuple[Tensor, Tensor]:
        _, weight, _, decoder, _, scale, centred, values, tokens, latents = inputs
        ctx.save_for_backward(weight, decoder, scale, centred, values, tokens, latents)
        every = torch.arange(len(centred) + 1, device=tokens.device)
        output = bags(latents, decoder, torch.searchsorted(tokens, every), values)
        scaled = values if scale is None else values * scale[latents]
        return output, values.new_zeros(len(centred)).index_add_(0, tokens, scaled)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor, grad_sums: Tensor) -> tuple[Tensor | None, ...]:
        weight, decoder, scale, centred, values, tokens, latents = ctx.saved_tensors
        of_x, of_weight, _, of_decoder, _, of_scale = ctx.needs_input_grad[:6]
        grad = grad.contiguous()
        pairs = sort_by_latent(tokens, latents, len(weight))
        values, sums = values[pairs.order], grad_sums[pairs.tokens]
        inner = pair_products(pairs, decoder, grad)
        inner += sums if scale is None else sums * scale[pairs.latents]
        zeros = weight.new_zeros(len(weight))
        grad_bias = zeros.index_add(0, pairs.latents, inner)
        grad_x = grad_weight = grad_decoder = grad_scale = None
        if of_x:
            unsorted = torch.empty_like(inner)
            unsorted[pairs.order] = inner
            every = torch.arange(len(centred) + 1, device=tokens.device)
            grad_x = bags(latents, weight, torch.searchsorted(tokens, every), unsorted)
        if of_weight:
            grad_weight = collect_rows(inner, pairs, centred)
        if of_decoder:
            grad_decoder = collect_rows(values, pairs, grad)
        if of_scale:
            grad_scale = zeros.index_add(0, pairs.latents, values * sums)
        grad_pre_bias = -(grad_bias @ weight) if ctx.needs_input_grad[4] else None
        first = (grad_x, grad_weight, grad_bias, grad_decoder, grad_pre_bias, grad_scale)
        return *first, None, None, None, None
