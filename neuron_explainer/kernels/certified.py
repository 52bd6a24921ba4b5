"""The largest pre-activations of each row by a bfloat16 product, proven to be the right ones.

The product only says which latents *may* be among the ``k`` largest. These few are computed again in
float32, and the answer is kept only where it is proven that no other latent belongs to it. The plain
twin is :func:`~neuron_explainer.kernels.top_k.top_k` of a float32 product.

**The bound.** Let x be a row, w a latent's weights, β the latent's bias, and x̂ and ŵ the row and the
weights rounded to bfloat16, whose unit roundoff is u = 2⁻⁸. By the inequality of Cauchy and Schwarz,

    |x·w - x̂·ŵ| = |(x - x̂)·w + x̂·(w - ŵ)| <= ‖x - x̂‖ ‖w‖ + ‖x̂‖ ‖w - ŵ‖

The residuals x - x̂ and w - ŵ are measured, not estimated: a float32 minus its rounding is exact. Products
of two bfloat16 numbers are exact in float32. A sum of N of them, added in any order with a relative error
of at most ε in each addition, is off by at most g Σ|terms|, where g = 1.25 N ε. Here ε = 2⁻²², four times
the roundoff of float32, to cover hardware that truncates or aligns before it adds. So

    x·w + β <= x̂·ŵ + β + (‖x - x̂‖ + g ‖x̂‖) ‖w‖ + ‖x̂‖ ‖w - ŵ‖ + g |β| + tiny

up to the last rounding. The right side is itself an inner product. With eight more columns,

    row     x̂   ‖x - x̂‖ + g ‖x̂‖   ‖x̂‖       1   1   1   1              0
    latent  ŵ   ‖w‖               ‖w - ŵ‖   β₁  β₂  β₃  g |β| + tiny   0

where norms are rounded upwards and β = β₁ + β₂ + β₃ exactly, one matrix product gives an upper bound
U for every latent. Nothing is assumed about how large the norms are or how much they differ.
``tiny`` = 2⁻¹⁰⁰ covers products below the normal range, which hardware may treat as zero. 2⁻⁵⁴ is
added to every norm, because entries below 2⁻⁶³ have squares below that range, and contribute at most
√n 2⁻⁶³ to a norm. Rows that might overflow are not tried.

**The proof.** The product gives U rounded to bfloat16, which is off by at most u|U|. Let T be the largest U
of the latents that were left out: none of these exceeds T + u|T|. If the k-th largest of the float32 values
that were computed is above T + u|T|, then the k largest latents are exactly the ones found. What remains is
the float32 rounding of the values themselves, at most (n + 1) 2⁻²³ (‖x‖ ‖w‖ + |β|) in any order of adding:
the choice is that of a float32 product wherever ranks k and k + 1 differ by more than the errors of both,
and where they differ by less, either choice is right.

Latents are left out if U < min over the k largest U of (U - 1.1 × the part of U that allows for errors).
The proof then succeeds if the true error is a tenth of the bound or less, which is nearly always so. For
Gaussian rows with n = 768, l = 32768 and k = 32 the bound is 0.09 standard deviations, and about 50 latents
are computed. Rows that cannot be proven, such as those with NaN or infinity, are left to the caller, who
computes them in float32.

Shape legend: ``b`` rows, ``n`` inputs, ``l`` latents, ``c`` candidates of a row, ``k`` wanted.
"""

import contextlib
import os
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor

from neuron_explainer.errors import InputError
from neuron_explainer.kernels.top_k import search, settle_ties

_ROUNDOFF = 2.0**-8
_ADDITION = 2.0**-22
_TINY = 2.0**-100
_TINY_NORM = 2.0**-54
_LARGEST = 2.0**120
_EXTRA_COLUMNS = 8
_MAX_INPUTS = 2**16
_MIN_ROWS = 512
_MIN_LATENTS = 4096
_SWITCH = "NEURON_EXPLAINER_CERTIFIED"


@dataclass(frozen=True)
class Prepared:
    """An encoder's weights as the bound needs them.

    It is a copy. Make it inside the call that uses it, and drop it there: if the weights changed later, a
    search through the old copy would be silently wrong.
    """

    operand: Tensor
    """``[l, n + 8]`` bfloat16: rounded weights and the columns that make the product a bound."""
    largest: Tensor
    """The largest ``‖w‖``; NaN where the weights or the biases allow no proof."""


def prepare(weight: Tensor, bias: Tensor | None, latents_at_once: int = 1024) -> Prepared:
    """Return what :func:`certified_top_k` needs of ``weight`` ``[l, n]`` and ``bias`` ``[l]``, both float32.

    The weights are read once, ``latents_at_once`` rows at a time. That takes less than a tenth of the
    time of a product with 1024 rows, so it pays in every call with that many rows.
    """
    weight, bias = weight.detach(), None if bias is None else bias.detach()
    n_latents, n_inputs = weight.shape
    operand = weight.new_zeros(n_latents, n_inputs + _EXTRA_COLUMNS, dtype=torch.bfloat16)
    largest = weight.new_zeros(())
    for start in range(0, n_latents, latents_at_once):
        some = slice(start, start + latents_at_once)
        rows, out = weight[some], operand[some]
        norm, residual = _round_into(rows, out[:, :n_inputs])
        out[:, n_inputs] = _up(norm)
        out[:, n_inputs + 1] = _up(residual)
        largest = torch.maximum(largest, norm.max())
    if bias is not None:
        rest = bias.clone()
        for column in range(n_inputs + 2, n_inputs + 5):
            operand[:, column] = rest
            rest -= operand[:, column]
        operand[:, n_inputs + 5] = _up(bias.abs() * _accumulation(n_inputs) + _TINY)
        largest = torch.where(bias.abs().max() < _LARGEST, largest, torch.nan)
    else:
        operand[:, n_inputs + 5] = 2 * _TINY
    return Prepared(operand, largest)


def certified_top_k(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    k: int,
    prepared: Prepared,
    chunk_bytes: int = 2**24,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the ``k`` largest entries of each row of ``x · weightᵀ + bias``, and which rows are proven.

    ``x`` is ``[b, n]``, ``weight`` ``[l, n]``, ``bias`` ``[l]``, all float32. The result is values
    ``[b, k]``, indices ``[b, k]``, and a bool ``[b]`` that is True where the row is proven; other rows hold
    nothing of use. Order and ties are those of :func:`~neuron_explainer.kernels.top_k.top_k`. Rows are
    searched in chunks, so that the bounds of all latents take ``chunk_bytes``.
    """
    n_latents = len(weight)
    values = x.new_empty(len(x), k)
    indices = torch.empty(len(x), k, dtype=torch.int64, device=x.device)
    proven = torch.zeros(len(x), dtype=torch.bool, device=x.device)
    n_candidates = 2 * k + 32
    if n_candidates >= n_latents:
        return values, indices, proven
    step = max(1, min(len(x), chunk_bytes // (2 * n_latents)))
    buffer = torch.empty(step, n_latents, dtype=torch.bfloat16, device=x.device)
    for start in range(0, len(x), step):
        rows = slice(start, start + step)
        values[rows], indices[rows], proven[rows] = _chunk(
            x[rows], weight, bias, k, prepared, n_candidates, buffer
        )
    return values, indices, proven


def _chunk(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    k: int,
    prepared: Prepared,
    n_candidates: int,
    buffer: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    operand, a, b = _row_operand(x, prepared.largest)
    with _full_precision_sums(x.device):
        upper = torch.mm(operand, prepared.operand.t(), out=buffer[: len(x)])
    # The bits of bfloat16 numbers, read as integers, have the order of the numbers, except where these are
    # negative: rows whose bound T is not positive are not proven below.
    bits, indices = search(upper.view(torch.int16), n_candidates + 1)
    bounds = bits.view(torch.bfloat16).float()
    slack = _slack(prepared.operand, indices[:, :k], a, b)
    needed = (bounds[:, :k] - 1.1 * slack).amin(1, keepdim=True) * (1 - 2 * _ROUNDOFF)
    counts = (bounds[:, :-1] >= needed).sum(1).clamp(min=k)
    left_out = bounds.gather(1, counts[:, None])
    indices, bounds = indices[:, :-1], bounds[:, :-1]
    kept = torch.arange(n_candidates, device=x.device) < counts[:, None]
    exact = _exact(x, weight, bias, indices, kept)
    top = exact.topk(k + 1)
    values, chosen = settle_ties(top.values, indices.gather(1, top.indices), k, exact, indices)
    limit = left_out.squeeze(1) * (1 + _ROUNDOFF)
    within = (exact <= bounds + _ROUNDOFF * bounds.abs()).all(1)
    return values, chosen, (values[:, -1] > limit) & (limit > 0) & within


def _row_operand(x: Tensor, largest: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """``[b, n + 8]`` bfloat16, and the two columns ``[b, 1]`` that multiply the norms of a latent."""
    n_inputs = x.shape[1]
    operand = x.new_zeros(len(x), n_inputs + _EXTRA_COLUMNS, dtype=torch.bfloat16)
    norm, residual = _round_into(x, operand[:, :n_inputs])
    rounded = norm + residual  # at least the norm of the rounded row
    operand[:, n_inputs] = _up(residual + _accumulation(n_inputs) * rounded)
    operand[:, n_inputs + 1] = _up(rounded)
    operand[:, n_inputs + 2 : n_inputs + 6] = 1
    # A NaN here makes the whole row NaN, which is never proven.
    operand[:, n_inputs].masked_fill_(~(norm * largest < _LARGEST), torch.nan)
    factors = operand[:, n_inputs : n_inputs + 2].float()
    return operand, factors[:, :1], factors[:, 1:]


def _slack(operand: Tensor, indices: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """``[b, k]``: the part of the bounds of latents ``indices`` ``[b, k]`` that allows for errors."""
    n_inputs = operand.shape[1] - _EXTRA_COLUMNS
    norms = operand[:, n_inputs : n_inputs + 2].float()
    return a * norms[:, 0][indices] + b * norms[:, 1][indices]


def _exact(x: Tensor, weight: Tensor, bias: Tensor | None, indices: Tensor, kept: Tensor) -> Tensor:
    """Float32 entries ``indices`` ``[b, c]`` of ``x · weightᵀ + bias``; -inf where not ``kept``."""
    if x.device.type == "cpu":
        starts = torch.nn.functional.pad(kept.sum(1).cumsum(0), (1, 0))
        _announce_sparse()
        pattern = torch.sparse_csr_tensor(
            starts,
            indices[kept],
            x.new_zeros(int(starts[-1])),
            size=(len(x), len(weight)),
            check_invariants=False,
        )
        products = torch.sparse.sampled_addmm(pattern, x, weight.t(), beta=0.0).values()
        exact = torch.full_like(indices, -torch.inf, dtype=x.dtype).masked_scatter_(kept, products)
    else:
        # Elementwise, so that no tensor core rounds it.
        products = (weight[indices] * x[:, None, :]).sum(-1)
        exact = products.masked_fill_(~kept, -torch.inf)
    return exact if bias is None else exact + bias[indices]


def _round_into(rows: Tensor, out: Tensor) -> tuple[Tensor, Tensor]:
    """Round ``[b, n]`` into ``out``; the norms ``[b]`` of the rows and of what was rounded off."""
    out.copy_(rows)
    residual = torch.linalg.vector_norm(rows - out, dim=1) + _TINY_NORM
    return torch.linalg.vector_norm(rows, dim=1) + _TINY_NORM, residual


def _up(x: Tensor) -> Tensor:
    """Non-negative numbers as bfloat16, rounded up by at least the error of a norm in float32."""
    return (x * (1 + 2 * _ROUNDOFF)).bfloat16()


def _accumulation(n_inputs: int) -> float:
    return 1.25 * (n_inputs + _EXTRA_COLUMNS) * _ADDITION


@contextlib.contextmanager
def _full_precision_sums(device: torch.device) -> Iterator[None]:
    """Make CUDA add up bfloat16 products in float32 throughout, as CPUs always do.

    On CUDA this sets a flag of the whole process, and threads that run it at once can restore each
    other's value. That is one reason why the search is not used there unless it is asked for.
    """
    if device.type != "cuda":
        yield
        return
    matmul = torch.backends.cuda.matmul
    before = matmul.allow_bf16_reduced_precision_reduction
    matmul.allow_bf16_reduced_precision_reduction = False
    try:
        yield
    finally:
        matmul.allow_bf16_reduced_precision_reduction = before


@cache
def _announce_sparse() -> None:
    """Swallow torch's one warning that sparse tensors are in beta: these never leave this module."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.sparse_csr_tensor([0, 0], [], [], size=(1, 1))


# ---- where it pays -----------------------------------------------------------------------------


def use_certified(
    x: Tensor, weight: Tensor, wanted: bool | None, fast_bfloat16: bool | None = None
) -> bool:
    """Return whether to use the certified search.

    ``wanted`` decides if it is not None, else NEURON_EXPLAINER_CERTIFIED (0 or 1), else a rule: at least 512
    rows, 4096 latents, and a CPU that multiplies bfloat16 faster than float32 (``fast_bfloat16``; None: look
    whether the CPU has AVX512-BF16 or AMX). CUDA devices use the search only if it is asked for. It is never
    used for other dtypes than float32, which have nothing to gain.
    """
    if x.dtype != torch.float32 or weight.dtype != torch.float32 or x.shape[1] > _MAX_INPUTS:
        return False
    if wanted is not None:
        return wanted
    switch = os.environ.get(_SWITCH, "")
    if switch not in ("", "0", "1"):
        raise InputError(f"{_SWITCH} must be 0 or 1, found {switch!r}.")
    if switch:
        return switch == "1"
    if len(x) < _MIN_ROWS or len(weight) < _MIN_LATENTS or x.device.type != "cpu":
        return False
    return _fast_bfloat16() if fast_bfloat16 is None else fast_bfloat16


@cache
def _fast_bfloat16() -> bool:
    """Whether this CPU multiplies bfloat16 faster than float32."""
    if not torch.backends.mkldnn.is_available():  # type: ignore[no-untyped-call]
        return False
    known: dict[str, Any] = getattr(torch.cpu, "get_capabilities", dict)()  # torch 2.10 has none
    return bool(known.get("avx512_bf16") or known.get("amx_bf16"))
