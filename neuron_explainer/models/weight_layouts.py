"""How a stored weight gets the axes that :data:`weight_shape_by_location_type` names.

Shape legend: ``d`` model width, ``h`` heads, ``g`` heads of keys and values (``h``, or fewer if heads
share them), ``d_head`` width of a head.
"""

from collections.abc import Callable, Mapping
from typing import NamedTuple

from torch import Tensor

from neuron_explainer.models.weight_names import Dimension, WeightLocationType

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


TRANSFORMER_WEIGHTS: dict[WeightLocationType, Weight] = {
    WeightLocationType.MLP_TO_HIDDEN: Weight("mlp.in_layer.weight", transposed),
    WeightLocationType.MLP_TO_RESIDUAL: Weight("mlp.out_layer.weight", transposed),
    WeightLocationType.EMBEDDING: Weight("tok_embed.weight", as_stored),
    WeightLocationType.UNEMBEDDING: Weight("unembed.weight", transposed),
    WeightLocationType.POSITION_EMBEDDING: Weight("pos_embed.weight", as_stored),
    WeightLocationType.ATTN_TO_QUERY: Weight("attn.q_proj.weight", into_heads),
    WeightLocationType.ATTN_TO_KEY: Weight("attn.k_proj.weight", into_heads),
    WeightLocationType.ATTN_TO_VALUE: Weight("attn.v_proj.weight", into_heads),
    WeightLocationType.ATTN_TO_RESIDUAL: Weight("attn.out_proj.weight", out_of_heads),
    WeightLocationType.LAYER_NORM_GAIN_FINAL: Weight("final_ln.weight", as_stored),
    WeightLocationType.LAYER_NORM_BIAS_FINAL: Weight("final_ln.bias", as_stored),
    WeightLocationType.LAYER_NORM_GAIN_PRE_ATTN: Weight("ln_1.weight", as_stored),
    WeightLocationType.LAYER_NORM_GAIN_PRE_MLP: Weight("ln_2.weight", as_stored),
}
"""Where a :class:`~neuron_explainer.models.transformer.Transformer` keeps each weight."""
