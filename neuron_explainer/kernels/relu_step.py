"""A ReLU autoencoder's step: five matrix products while latents are dense, one when they are sparse.

    latents = relu((x - pre_bias) · weightᵀ + bias)
    output  = latents · decoder
    sums    = Σ latents · scale       of each token: the L1 penalty

Early in training half of all latents are active, and a step is five products; everything around them is done
in place and in few passes. Later one latent in a hundred is active, and all products but the first concern
only the active pairs (token, latent), as in :mod:`.top_k_step`. The latents of the first tokens decide which
way is taken; results and gradients are the same.

Shape legend: ``b`` tokens of a batch, ``n`` inputs, ``o`` outputs, ``l`` latents, ``m`` active pairs.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from neuron_explainer.kernels.products import product
from neuron_explainer.kernels.top_k_step import (
    bags,
    collect_rows,
    pair_products,
    sort_by_latent,
)
from neuron_explainer.kernels.workspace import Workspace, empty, row_blocks


class ReLUOutput(NamedTuple):
    """What :func:`relu_autoencoder` computes."""

    output: Tensor
    """``[b, o]``, without a bias of its own; differentiable."""
    sums: Tensor
    """``[b]``: the sum of each token's latents; differentiable."""
    values: Tensor
    """Latents, without gradient: ``[b, l]``, or only the active ones, ``[m]``."""
    indices: Tensor | None
    """``[m]`` int64: which latents the active ones are; None if ``values`` holds all of them."""


class Tuning(NamedTuple):
    """What decides speed and memory, and no result."""

    forward_elements: int = 1 << 22
    """Pre-activations at a time going forward: few enough that malloc gives the same memory again."""
    backward_elements: int = 1 << 24
    """Pre-activations at a time going backward: enough that adding to the weights' gradient is rare."""
    sparse_share: float = 0.1
    """Dense products are used where more than this share of latents is active (they are faster from about
    0.15 on, as measured)."""


_DEFAULTS = Tuning()


def relu_autoencoder(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    decoder: Tensor,
    *,
    pre_bias: Tensor | None = None,
    scale: Tensor | None = None,
    workspace: Workspace | None = None,
    tuning: Tuning = _DEFAULTS,
) -> ReLUOutput:
    """Encode ``[b, n]``, rectify, decode, add up. The module says what is computed.

    Differentiable with respect to ``x``, ``weight`` ``[l, n]``, ``bias`` ``[l]``, ``decoder``
    ``[l, o]``, ``pre_bias`` ``[n]`` and ``scale`` ``[l]``, which is 1 if not given. ``workspace`` holds the
    gradients of ``weight`` and ``decoder``; without one their memory is new each time.
    """
    workspace = workspace or Workspace()
    centred = x if pre_bias is None else x - pre_bias.detach()
    latents = _latents(centred.detach(), weight.detach(), bias.detach(), tuning)
    inputs = _Inputs(x, weight, bias, decoder, pre_bias, scale)
    if isinstance(latents, Tensor):
        output, sums = _Dense.apply(  # type: ignore[no-untyped-call]
            *inputs, centred.detach(), latents, workspace, tuning.backward_elements
        )
        return ReLUOutput(output, sums, latents, None)
    output, sums = _Sparse.apply(  # type: ignore[no-untyped-call]
        *inputs, centred.detach(), *latents, workspace
    )
    return ReLUOutput(output, sums, latents.values, latents.latents)


class _Inputs(NamedTuple):
    """One entry for each input that may have a gradient: the input, its gradient, or whether it needs one."""

    x: Any
    weight: Any
    bias: Any
    decoder: Any
    pre_bias: Any
    scale: Any


class _Active(NamedTuple):
    """Active latents, token by token."""

    values: Tensor
    """``[m]``"""
    tokens: Tensor
    """``[m]`` int64, ascending."""
    latents: Tensor
    """``[m]`` int64."""


@torch.no_grad()
def _latents(x: Tensor, weight: Tensor, bias: Tensor, tuning: Tuning) -> Tensor | _Active:
    """``[b, l]``, or the active ones if few of the first tokens' are."""
    step = max(1, tuning.forward_elements // len(weight))
    first = product(x[:step], weight, bias, relu=True)
    if int(first.count_nonzero()) > tuning.sparse_share * first.numel():  # NaN counts as active
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
        given, (centred, latents, ctx.workspace, ctx.elements) = _Inputs(*inputs[:6]), inputs[6:]
        ctx.save_for_backward(given.weight, given.decoder, given.scale, centred, latents)
        sums = latents.sum(1) if given.scale is None else latents @ given.scale
        return latents @ given.decoder, sums

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor, grad_sums: Tensor) -> tuple[Tensor | None, ...]:
        weight, decoder, _, _, latents = ctx.saved_tensors
        needs, workspace = _Inputs(*ctx.needs_input_grad[:6]), ctx.workspace
        grad_x, grad_weight, grad_bias = _encoder_gradients(ctx, needs, grad, grad_sums)
        grad_decoder = None
        if needs.decoder:
            where = workspace.gradient(decoder.shape, like=decoder)
            grad_decoder = torch.mm(latents.t(), grad, out=where)
        grads = _Inputs(
            x=grad_x,
            weight=grad_weight,
            bias=grad_bias,
            decoder=grad_decoder,
            pre_bias=-(grad_bias @ weight) if needs.pre_bias else None,
            scale=grad_sums @ latents if needs.scale else None,
        )
        return *grads, None, None, None, None


def _encoder_gradients(
    ctx: Any, needs: _Inputs, grad: Tensor, grad_sums: Tensor
) -> tuple[Tensor | None, Tensor | None, Tensor]:
    """Gradients of ``x``, ``weight`` and ``bias``, by chunks of tokens."""
    weight, decoder, scale, centred, latents = ctx.saved_tensors
    workspace = ctx.workspace
    grad_x = torch.empty_like(centred) if needs.x else None
    grad_weight = None
    if needs.weight:
        grad_weight = workspace.gradient(weight.shape, like=weight).zero_()
    grad_bias = weight.new_zeros(len(weight))
    ones = scale if scale is not None else weight.new_ones(())
    step = max(1, ctx.elements // len(weight))
    buffer = workspace.scratch((min(step, len(latents)), len(weight)), like=latents)
    for start in range(0, len(latents), step):
        rows = slice(start, start + step)
        active = latents[rows]
        inner = torch.mm(grad[rows], decoder.t(), out=buffer[: len(active)])
        _through_relu(inner, active, grad_sums[rows, None], ones, grad_bias)
        if grad_weight is not None:
            grad_weight.addmm_(inner.t(), centred[rows])
        if grad_x is not None:
            torch.mm(inner, weight, out=grad_x[rows])
    return grad_x, grad_weight, grad_bias


def _through_relu(
    inner: Tensor, active: Tensor, of_sums: Tensor, ones: Tensor, grad_bias: Tensor
) -> None:
    """Gradients of latents ``inner`` ``[c, l]`` become those of pre-activations, in place and in one pass;
    their sum over tokens is added to ``grad_bias``."""
    for part, gate, of_sum in row_blocks(inner, active, of_sums):
        part.addcmul_(of_sum, ones)
        torch.ops.aten.threshold_backward(part, gate, 0, grad_input=part)
        grad_bias += part.sum(0)


class _Sparse(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> tuple[Tensor, Tensor]:
        given = _Inputs(*inputs[:6])
        centred, values, tokens, latents, ctx.workspace = inputs[6:]
        saved = (given.weight, given.decoder, given.scale, centred, values, tokens, latents)
        ctx.save_for_backward(*saved)
        every = torch.arange(len(centred) + 1, device=tokens.device)
        output = bags(latents, given.decoder, torch.searchsorted(tokens, every), values)
        scaled = values if given.scale is None else values * given.scale[latents]
        return output, values.new_zeros(len(centred)).index_add_(0, tokens, scaled)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor, grad_sums: Tensor) -> tuple[Tensor | None, ...]:
        weight, decoder, scale, centred, values, tokens, latents = ctx.saved_tensors
        needs, workspace = _Inputs(*ctx.needs_input_grad[:6]), ctx.workspace
        grad = grad.contiguous()
        pairs = sort_by_latent(tokens, latents, len(weight))
        values, sums = values[pairs.order], grad_sums[pairs.tokens]
        inner = pair_products(pairs, decoder, grad)
        inner += sums if scale is None else sums * scale[pairs.latents]
        zeros = weight.new_zeros(len(weight))
        grad_bias = zeros.index_add(0, pairs.latents, inner)
        grad_x = None
        if needs.x:
            unsorted = torch.empty_like(inner)
            unsorted[pairs.order] = inner
            every = torch.arange(len(centred) + 1, device=tokens.device)
            grad_x = bags(latents, weight, torch.searchsorted(tokens, every), unsorted)
        grads = _Inputs(
            x=grad_x,
            weight=collect_rows(inner, pairs, centred, workspace) if needs.weight else None,
            bias=grad_bias,
            decoder=collect_rows(values, pairs, grad, workspace) if needs.decoder else None,
            pre_bias=-(grad_bias @ weight) if needs.pre_bias else None,
            scale=zeros.index_add(0, pairs.latents, values * sums) if needs.scale else None,
        )
        return *grads, *(None,) * 5
