"""How a stored weight gets the axes that :data:`weight_shape_by_location_type` names.

Shape legend: ``d`` model width, ``h`` heads, ``g`` heads of keys and values (``h``, or fewer if heads
share them), ``d_head`` width of a head.
"""

from collections.abc import Callable, Mapping
from typing import NamedTuple

from torch import Tensor

from neuron_explainer.models.weight_names import Dimension

Sizes = Mapping[Dimension, int]
"""Length of each axis of a model."""
Layout = Callable[[Tensor, Sizes], Tensor]
"""Turns a stored weight into one with our axes; may return a view."""


class Weight(NamedTuple):
    """Where a weight is stored, and how it gets our axes."""

    parameter: str
    """Path of the parameter below the layer, or below the model."""
    layout: Layout


def as_stored(weight: Tensor, sizes: Sizes) -> Tensor:
    """The weight itself."""
    return weight


def transposed(weight: Tensor, sizes: Sizes) -> Tensor:
    """``[o, i] -> [i, o]``."""
    return weight.T


def into_heads(weight: Tensor, sizes: Sizes) -> Tensor:
    """``[g * d_head, d] -> [h, d, d_head]``; heads that share a matrix each get it."""
    heads = weight.reshape(-1, sizes[Dimension.VALUE_CHANNELS], weight.shape[1]).transpose(1, 2)
    shared_by = sizes[Dimension.ATTN_HEADS] // heads.shape[0]
    return heads if shared_by == 1 else heads.repeat_interleave(shared_by, dim=0)


def out_of_heads(weight: Tensor, sizes: Sizes) -> Tensor:
    """``[d, h * d_head] -> [h, d_head, d]``."""
    return weight.T.reshape(sizes[Dimension.ATTN_HEADS], sizes[Dimension.VALUE_CHANNELS], -1)
