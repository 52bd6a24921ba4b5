"""Products with weights, each by the fastest kernel at hand.

``F.linear`` defines what a product is, and it runs wherever a gradient is wanted. Where none is wanted,
in float32 on a CPU, two things are faster. They differ from it by rounding alone:

- oneDNN's own product, which adds the bias and applies the nonlinearity in the same pass. It pays for
  products that are large enough (:data:`LARGE`). It reads the parameter itself, so nothing is kept.
- Within :func:`weight_copies`, copies of the weights in oneDNN's blocked layout, with queries, keys and
  values as one matrix. A generation multiplies a few rows with every weight at each step, and the layout
  decides how long that takes: 8 rows through GPT-2 small's weights take 37 ms from blocks, 55 ms from
  the parameters and 74 ms with ``F.linear``; making the blocks takes 0.3 s. (*Rejected for one row:*
  30 ms from copies, 32 ms to 38 ms without.)

A copy that differs from its parameter would give wrong results silently. So copies live in one ``with``
block, whose owner makes sure that nothing in it can change the weights.

Shape legend: ``...`` rows, ``i`` inputs, ``o`` outputs of a linear map.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.nn.modules import module as torch_module

LARGE = 2**21
"""Number of multiplications from which oneDNN's product is used. Below it, the set-up that oneDNN makes
for each new shape takes longer than it saves."""

STEPS_WORTH_COPIES = 32
ROWS_WORTH_COPIES = 3
"""Number of steps, and of rows in each, from which copies of the weights pay."""

Maps = tuple[nn.Linear, ...]
"""Linear maps that read the same input."""

_After = Literal["none", "gelu", "relu"]
"""What oneDNN applies to a product: nothing, GPT-2's GELU, or a ReLU (whose value at NaN is 0)."""


def _operator(name: str) -> Any:
    """One of torch's oneDNN operators; None if this torch lacks it (they are no public interface)."""
    try:
        return getattr(torch.ops.mkldnn, name) if torch._C._has_mkldnn else None
    except (AttributeError, RuntimeError):
        return None


_onednn_product = _operator("_linear_pointwise")
_onednn_blocks = _operator("_reorder_linear_weight")


def _has_onednn() -> bool:
    """Whether oneDNN is there and switched on (``torch.backends.mkldnn.flags`` switches it off)."""
    there = _onednn_product is not None and _onednn_blocks is not None
    return there and bool(torch.backends.mkldnn.enabled)


def product(
    x: Tensor, weight: Tensor, bias: Tensor | None, relu: bool = False, large: int = LARGE
) -> Tensor:
    """``F.linear(x, weight, bias)``, with a ReLU if asked: ``[..., i], [o, i], [o] -> [..., o]``."""
    onednn = _is_plain(x, weight, bias) and _is_large(x, weight, large)
    # oneDNN's ReLU of NaN is 0. Ruling NaN out reads the weights once. That pays if there are more
    # results than weights, because a separate ReLU reads and writes the results once more.
    many = x.numel() > weight.shape[1] ** 2
    if relu and onednn and many and _stays_finite(x, weight, bias):
        return _multiply(x, weight, bias, onednn, "relu")
    result = _multiply(x, weight, bias, onednn, "none")
    return result.relu_() if relu else result


def linear(x: Tensor, layer: nn.Linear, gelu: bool = False) -> Tensor:
    """``layer(x)``, with GPT-2's GELU if asked: ``[..., i] -> [..., o]``."""
    return _linears(x, (layer,), "gelu" if gelu else "none")[0]


def linears(x: Tensor, layers: Maps) -> Sequence[Tensor]:
    """Each layer's result for the same input: ``[..., i] -> [..., o]`` each."""
    return _linears(x, layers, "none")


@contextmanager
def weight_copies(n_rows: int, n_steps: int) -> Iterator[None]:
    """Within this block :func:`linear` and :func:`linears` multiply with copies of the weights, if it pays.

    Each copy is made when its layer is first used, and all are dropped at the end. Nothing may change
    the weights in between: what is computed would not follow. Only this thread is affected.

    Args:
        n_rows: how many rows most products have.
        n_steps: how often each weight will be multiplied with.
    """
    pays = _has_onednn() and n_rows >= ROWS_WORTH_COPIES and n_steps >= STEPS_WORTH_COPIES
    token = _copies.set(_Copies(n_rows) if pays else None)
    try:
        yield
    finally:
        _copies.reset(token)


def _linears(x: Tensor, layers: Maps, after: _After) -> Sequence[Tensor]:
    if not all(_is_unobserved(x, layer) for layer in layers):
        return _plain(x, layers, after)
    copies = _copies.get()
    return _products(x, layers, after) if copies is None else copies.products(x, layers, after)


def _plain(x: Tensor, layers: Maps, after: _After) -> Sequence[Tensor]:
    """By torch's modules and functions, which everything that torch offers can follow."""
    results = [layer(x) for layer in layers]
    if after == "gelu":
        return [F.gelu(result, approximate="tanh") for result in results]
    return results


def _products(x: Tensor, layers: Maps, after: _After) -> Sequence[Tensor]:
    """From the parameters themselves."""
    joined = _joined(layers)
    if joined is not None:
        result = _multiply(x, joined, _joined_bias(layers), _is_large(x, joined), after)
        return _split(result, layers)
    return [
        _multiply(x, layer.weight, layer.bias, _is_large(x, layer.weight), after)
        for layer in layers
    ]


class _Copy(NamedTuple):
    """The weights of several maps in oneDNN's blocks, ``[o, i]`` of all maps together, and their bias."""

    weight: Tensor
    bias: Tensor | None


class _Copies:
    """Copies of weights for products of about ``n_rows`` rows."""

    def __init__(self, n_rows: int) -> None:
        self._n_rows = n_rows
        self._made: dict[Maps, _Copy] = {}

    def products(self, x: Tensor, layers: Maps, after: _After) -> Sequence[Tensor]:
        """From copies."""
        if layers not in self._made:
            self._made[layers] = self._make(layers)
        weight, bias = self._made[layers]
        return _split(_multiply(x, weight, bias, True, after), layers)

    def _make(self, layers: Maps) -> _Copy:
        weight: Tensor = layers[0].weight
        bias: Tensor | None = layers[0].bias
        if len(layers) > 1:
            weight, bias = torch.cat([layer.weight for layer in layers]), _joined_bias(layers)
        return _Copy(_onednn_blocks(weight.detach(), self._n_rows), bias)


_copies: ContextVar[_Copies | None] = ContextVar("copies of weights", default=None)


def _split(result: Tensor, layers: Maps) -> Sequence[Tensor]:
    if len(layers) == 1:
        return [result]
    return torch.split(result, [layer.out_features for layer in layers], dim=-1)


def _multiply(
    x: Tensor, weight: Tensor, bias: Tensor | None, onednn: bool, after: _After
) -> Tensor:
    if onednn and _has_onednn():
        algorithm = "tanh" if after == "gelu" else ""
        result: Tensor = _onednn_product(x, weight, bias, after, [], algorithm)
        return result
    result = F.linear(x, weight, bias)
    # In place: nothing else has seen the result.
    return torch.ops.aten.gelu_(result, approximate="tanh") if after == "gelu" else result


def _is_large(x: Tensor, weight: Tensor, large: int = LARGE) -> bool:
    """Whether oneDNN has an advantage. It is very slow if the weight is a part of a larger matrix."""
    dense = weight.is_contiguous() or weight.t().is_contiguous()
    return dense and x.numel() * weight.shape[0] >= large


def _joined(layers: Maps) -> Tensor | None:
    """The matrix ``[o, i]`` of all weights, if they are neighbouring columns of one ``[i, o]`` in memory.

    Queries, keys and values of a model that was loaded from a Hugging Face folder are. None if not.
    """
    first, n_in = layers[0].weight, layers[0].in_features
    n_out = sum(layer.out_features for layer in layers)
    start = first.storage_offset()
    for layer in layers:
        weight = layer.weight
        if (
            weight.stride() != (1, n_out)
            or weight.storage_offset() != start
            or weight.untyped_storage().data_ptr() != first.untyped_storage().data_ptr()
        ):
            return None
        start += layer.out_features
    return first.as_strided((n_out, n_in), (1, n_out)) if len(layers) > 1 else None


def _joined_bias(layers: Maps) -> Tensor | None:
    if any(layer.bias is None for layer in layers):
        return None
    return torch.cat([layer.bias for layer in layers])


def _stays_finite(x: Tensor, weight: Tensor, bias: Tensor | None) -> bool:
    """Whether no partial sum of the product can overflow, in whatever order they are added."""
    largest = [
        float(torch.linalg.vector_norm(tensor, ord=torch.inf))
        for tensor in (x, weight, bias)
        if tensor is not None
    ]
    bound = weight.shape[1] * largest[0] * largest[1] + sum(largest[2:])
    return bound < 2.0**126  # False for NaN


def _is_unobserved(x: Tensor, layer: nn.Linear) -> bool:
    """Whether nothing observes this layer: no gradient, no module hook, no patched ``forward``."""
    return (
        type(layer) is nn.Linear
        and _is_plain(x, layer.weight, layer.bias)
        and not (layer._forward_hooks or layer._forward_pre_hooks or "forward" in layer.__dict__)
    )


def _is_plain(x: Tensor, weight: Tensor, bias: Tensor | None) -> bool:
    """Whether these are plain float32 tensors on a CPU, without gradient and without any torch mode."""
    return (
        type(x) is Tensor
        and x.dtype is torch.float32 is weight.dtype
        and x.is_cpu
        and weight.is_cpu
        and not (
            torch.is_grad_enabled()
            and (
                x.requires_grad or weight.requires_grad or (bias is not None and bias.requires_grad)
            )
        )
        and not is_transformed()
    )


def is_transformed() -> bool:
    """Whether torch traces, transforms, casts or counts what is computed now."""
    return bool(
        torch.compiler.is_compiling()
        or torch._C._functorch.peek_interpreter_stack() is not None
        or forward_ad._current_level >= 0
        or torch._C._len_torch_dispatch_stack() > 0
        or torch._C._len_torch_function_stack() > 0
        or torch.is_autocast_enabled("cpu")
        or torch_module._global_forward_hooks
        or torch_module._global_forward_pre_hooks
    )
