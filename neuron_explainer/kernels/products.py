"""Products with weights by the fastest kernel at hand, and the copies of weights that a generation keeps.

``F.linear`` is what a product means, and what runs wherever a gradient is wanted. Where none is, in
float32 on a CPU, two things are faster and differ from it by rounding alone:

- oneDNN's own product, with the bias and the activation function in the same pass, for products that
  are large enough to be worth its set-up. It reads the parameter itself: nothing is kept.
- In a generation each step multiplies a few rows with every weight, and the layout of the weights in
  memory decides how long that takes. :class:`WeightCopies` holds them as that wants it: for one row
  an output's weights side by side, for several in oneDNN's blocks; queries, keys and values as one
  matrix. For one row a native model's own weights lie so already, and are not copied. (oneDNN's
  product of one row is faster from them than BLAS's from any layout; its own blocks gain little.)

A copy that differs from its parameter would be silently wrong. So copies serve only
``Transformer.sample``, are dropped as soon as a parameter is another one or its version has changed,
and are compared with the weights (:func:`_fingerprint`) at the beginning of each generation, because
torch does not count changes made through ``.data`` or numpy.

Shape legend: ``...`` rows, ``i`` inputs, ``o`` outputs of a linear map.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.nn.modules import module as torch_module

LARGE = 2**21
"""Multiplications from which a product goes to oneDNN: below, its set-up for each new shape shows."""

Maps = tuple[nn.Linear, ...]
"""Linear maps that read the same input."""

_After = Literal["none", "gelu", "relu"]
"""What oneDNN does with a product: GPT-2's GELU; a ReLU, whose value at NaN is 0."""


def _operator(name: str) -> Any:
    """One of torch's oneDNN operators, or None: they are no public interface and may go."""
    try:
        return getattr(torch.ops.mkldnn, name)
    except (AttributeError, RuntimeError):
        return None


_product = _operator("_linear_pointwise") if torch._C._has_mkldnn else None
_pack = _operator("_reorder_linear_weight") if _product is not None else None


def product(x: Tensor, weight: Tensor, bias: Tensor | None, relu: bool = False) -> Tensor:
    """``F.linear(x, weight, bias)``, and its ReLU: ``[..., i], [o, i], [o] -> [..., o]``."""
    onednn = _is_plain(x, weight, bias) and _is_large(x, weight)
    # oneDNN's ReLU of NaN is 0. Looking for what could become NaN reads the weights once: it pays
    # where there are more results than weights, which a ReLU apart would read and write once more.
    many = x.numel() > weight.shape[1] ** 2
    if relu and onednn and many and _stays_finite(x, weight, bias):
        return _multiply(x, weight, bias, onednn, "relu")
    result = _multiply(x, weight, bias, onednn, "none")
    return result.relu_() if relu else result


def _stays_finite(x: Tensor, weight: Tensor, bias: Tensor | None) -> bool:
    """Whether no partial sum of the product can overflow, in whatever order they are added."""
    largest = [
        float(torch.linalg.vector_norm(tensor, ord=torch.inf))
        for tensor in (x, weight, bias)
        if tensor is not None
    ]
    bound = weight.shape[1] * largest[0] * largest[1] + sum(largest[2:])
    return bound < 2.0**126  # which NaN is not


def linear(
    x: Tensor, layer: nn.Linear, copies: "WeightCopies | None" = None, gelu: bool = False
) -> Tensor:
    """``layer(x)``, and GPT-2's GELU of it: ``[..., i] -> [..., o]``."""
    return _linears(x, (layer,), copies, "gelu" if gelu else "none")[0]


def linears(x: Tensor, layers: Maps, copies: "WeightCopies | None" = None) -> Sequence[Tensor]:
    """Each layer of the same input: ``[..., i] -> [..., o]`` each."""
    return _linears(x, layers, copies, "none")


def _linears(
    x: Tensor, layers: Maps, copies: "WeightCopies | None", after: _After
) -> Sequence[Tensor]:
    if not all(_without_gradient(x, layer) for layer in layers):
        results = [layer(x) for layer in layers]
        if after == "gelu":
            return [F.gelu(result, approximate="tanh") for result in results]
        return results
    copy = None if copies is None else copies.of(layers, x.numel() // x.shape[-1])
    if copy is not None:
        result = _multiply(x, copy.weight, copy.bias, True, after)
        return torch.split(result, copy.sizes, dim=-1) if len(layers) > 1 else [result]
    joined = _joined(layers)
    if joined is not None:
        result = _multiply(x, joined, _joined_bias(layers), _is_large(x, joined), after)
        return torch.split(result, [layer.out_features for layer in layers], dim=-1)
    return [
        _multiply(x, layer.weight, layer.bias, _is_large(x, layer.weight), after)
        for layer in layers
    ]


def _is_large(x: Tensor, weight: Tensor) -> bool:
    """Whether oneDNN has an advantage; it is very slow with a weight that is a part of a matrix."""
    dense = weight.is_contiguous() or weight.t().is_contiguous()
    return dense and x.numel() * weight.shape[0] >= LARGE


def _joined(layers: Maps) -> Tensor | None:
    """The matrix ``[o, i]`` of all weights together, where they are columns of one ``[i, o]`` in memory.

    So are Hugging Face's queries, keys and values when a model was loaded from such a folder.
    """
    first, n_out, n_in = (
        layers[0].weight,
        sum(m.out_features for m in layers),
        layers[0].in_features,
    )
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


def _multiply(
    x: Tensor, weight: Tensor, bias: Tensor | None, onednn: bool, after: _After
) -> Tensor:
    if onednn and _product is not None:
        algorithm = "tanh" if after == "gelu" else ""
        return _product(x, weight, bias, after, [], algorithm)  # type: ignore[no-any-return]
    result = F.linear(x, weight, bias)
    # In place: no one else has seen it.
    return torch.ops.aten.gelu_(result, approximate="tanh") if after == "gelu" else result


def _without_gradient(x: Tensor, layer: nn.Linear) -> bool:
    """Whether a map is a plain product, in which no one is interested but for its result."""
    return (
        type(layer) is nn.Linear
        and _is_plain(x, layer.weight, layer.bias)
        and not (layer._forward_hooks or layer._forward_pre_hooks or "forward" in layer.__dict__)
    )


def _is_plain(x: Tensor, weight: Tensor, bias: Tensor | None) -> bool:
    """Whether these are float32 numbers on a CPU, without gradient, and torch does nothing more with them."""
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
    """Whether torch traces, transforms or casts what is computed now, or someone counts operators."""
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


@dataclass(frozen=True, eq=False)
class _Copy:
    """The weights of some maps in another layout, and what tells that they are still those."""

    weight: Tensor
    """``[o, i]`` of all maps together; contiguous, or in oneDNN's blocks."""
    bias: Tensor | None
    sizes: list[int]
    """Outputs of each map."""
    parameters: list[tuple[nn.Linear, Tensor, int, int]]
    """Of each weight and bias: its map, itself, its version and address."""
    fingerprints: list[Tensor] = field(default_factory=list)
    """Of each parameter that was copied; one that is used itself cannot differ from itself."""

    def has_these(self, layers: Maps) -> bool:
        """Whether these are the maps, with their parameters unchanged as far as torch counts."""
        return all(
            (parameter is layer.weight or parameter is layer.bias)
            and parameter._version == version
            and parameter.data_ptr() == address
            for layer, parameter, version, address in self.parameters
        ) and sum(1 + (layer.bias is not None) for layer in layers) == len(self.parameters)

    def copied(self) -> list[Tensor]:
        """The parameters whose numbers are kept here once more."""
        used = {x.data_ptr() for x in (self.weight, self.bias) if x is not None and not x.is_mkldnn}
        return [parameter for _, parameter, _, address in self.parameters if address not in used]


class WeightCopies:
    """Copies of a model's weights for steps of a generation, each made when it is first used.

    Args:
        single: whether a step has one row; else several.
    """

    def __init__(self, single: bool) -> None:
        self.single = single
        self._copies: dict[Maps, _Copy] = {}

    def of(self, layers: Maps, n_rows: int) -> _Copy | None:
        """The copy for a product of so many rows; None: the parameters themselves do."""
        if _product is None or (self.single and n_rows > 1):
            return None
        if any(p.is_inference() for p in _parameters(layers)):
            return None
        copy = self._copies.get(layers)
        if copy is None or not copy.has_these(layers):
            copy = self._copies[layers] = _copied(layers, self.single, n_rows)
        return copy

    def drop_stale(self) -> None:
        """Drop each copy whose parameters are not what they were, whoever changed them."""
        self._copies = {
            layers: copy
            for layers, copy in self._copies.items()
            if copy.has_these(layers)
            and all(map(_same_bits, map(_fingerprint, copy.copied()), copy.fingerprints))
        }

    @property
    def nbytes(self) -> int:
        """Memory that the copies take."""
        return sum(
            copy.weight.numel() * copy.weight.element_size()
            for copy in self._copies.values()
            if copy.copied()
        )


def _parameters(layers: Maps) -> list[Tensor]:
    return [
        parameter
        for layer in layers
        for parameter in (layer.weight, layer.bias)
        if parameter is not None
    ]


@torch.no_grad()
def _copied(layers: Maps, single: bool, n_rows: int) -> _Copy:
    weight: Tensor = layers[0].weight
    bias: Tensor | None = layers[0].bias
    if len(layers) > 1:
        weight, bias = torch.cat([layer.weight for layer in layers]), _joined_bias(layers)
    weight = weight.contiguous() if single or _pack is None else _pack(weight, n_rows)
    copy = _Copy(
        weight,
        bias,
        [layer.out_features for layer in layers],
        [(layer, p, p._version, p.data_ptr()) for layer in layers for p in _parameters((layer,))],
    )
    copy.fingerprints.extend(map(_fingerprint, copy.copied()))
    return copy


def _fingerprint(parameter: Tensor) -> Tensor:
    """A vector that a change of any element changes: ``[o, i] -> [i]``, at the cost of one reading.

    A weighted sum of the rows. A change so small that it is lost in rounding here is lost in the
    product that the copy is for.
    """
    values = parameter.detach()
    if values.dim() < 2:
        return values.clone()
    weights = torch.arange(values.shape[0], dtype=torch.float32).mul_(0.618034).frac_().add_(0.5)
    return torch.mv(values.t(), weights)


def _same_bits(a: Tensor, b: Tensor) -> bool:
    return torch.equal(a.view(torch.int32), b.view(torch.int32))
