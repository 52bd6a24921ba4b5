"""Names of a transformer's weights and of the axes of tensors, as in the original.

Places among the *activations* are named by
:class:`~neuron_explainer.models.locations.ActivationLocation`.
"""

from enum import StrEnum, unique

from neuron_explainer.errors import InputError

LayerIndex = int | None
"""A layer; None for something that exists once in a model."""


@unique
class Dimension(StrEnum):
    """What an axis of a tensor runs over."""

    SEQUENCE_TOKENS = "sequence_tokens"
    ATTENDED_TO_SEQUENCE_TOKENS = "attended_to_sequence_tokens"
    MAX_CONTEXT_LENGTH = "max_context_length"
    RESIDUAL_STREAM_CHANNELS = "residual_stream_channels"
    VOCAB_SIZE = "vocab_size"
    ATTN_HEADS = "attn_heads"
    QUERY_AND_KEY_CHANNELS = "query_and_key_channels"
    VALUE_CHANNELS = "value_channels"
    MLP_ACTS = "mlp_acts"
    LAYERS = "layers"
    SINGLETON = "singleton"
    AUTOENCODER_LATENTS = "autoencoder_latents"


@unique
class WeightLocationType(StrEnum):
    """The weights that :meth:`~neuron_explainer.models.model_context.ModelContext.get_weight` returns."""

    MLP_TO_HIDDEN = "mlp.to_hidden"
    MLP_TO_RESIDUAL = "mlp.to_residual"
    EMBEDDING = "embedding"
    UNEMBEDDING = "unembedding"
    POSITION_EMBEDDING = "position_embedding"
    ATTN_TO_QUERY = "attn.to_query"
    ATTN_TO_KEY = "attn.to_key"
    ATTN_TO_VALUE = "attn.to_value"
    ATTN_TO_RESIDUAL = "attn.to_residual"
    LAYER_NORM_GAIN_FINAL = "layer_norm_gain.final"
    LAYER_NORM_BIAS_FINAL = "layer_norm_bias.final"
    LAYER_NORM_GAIN_PRE_ATTN = "layer_norm_gain.pre_attn"
    LAYER_NORM_GAIN_PRE_MLP = "layer_norm_gain.pre_mlp"

    @property
    def has_no_layers(self) -> bool:
        """True if a model has this weight once, not in each layer."""
        return self in (
            self.EMBEDDING,
            self.UNEMBEDDING,
            self.POSITION_EMBEDDING,
            self.LAYER_NORM_GAIN_FINAL,
            self.LAYER_NORM_BIAS_FINAL,
        )

    @property
    def shape_spec(self) -> tuple[Dimension, ...]:
        """What its axes run over."""
        return weight_shape_by_location_type[self]


_D = Dimension.RESIDUAL_STREAM_CHANNELS

weight_shape_by_location_type: dict[WeightLocationType, tuple[Dimension, ...]] = {
    WeightLocationType.MLP_TO_HIDDEN: (_D, Dimension.MLP_ACTS),
    WeightLocationType.MLP_TO_RESIDUAL: (Dimension.MLP_ACTS, _D),
    WeightLocationType.EMBEDDING: (Dimension.VOCAB_SIZE, _D),
    WeightLocationType.UNEMBEDDING: (_D, Dimension.VOCAB_SIZE),
    WeightLocationType.POSITION_EMBEDDING: (Dimension.MAX_CONTEXT_LENGTH, _D),
    WeightLocationType.ATTN_TO_QUERY: (Dimension.ATTN_HEADS, _D, Dimension.QUERY_AND_KEY_CHANNELS),
    WeightLocationType.ATTN_TO_KEY: (Dimension.ATTN_HEADS, _D, Dimension.QUERY_AND_KEY_CHANNELS),
    WeightLocationType.ATTN_TO_VALUE: (Dimension.ATTN_HEADS, _D, Dimension.VALUE_CHANNELS),
    WeightLocationType.ATTN_TO_RESIDUAL: (Dimension.ATTN_HEADS, Dimension.VALUE_CHANNELS, _D),
    WeightLocationType.LAYER_NORM_GAIN_FINAL: (_D,),
    WeightLocationType.LAYER_NORM_BIAS_FINAL: (_D,),
    WeightLocationType.LAYER_NORM_GAIN_PRE_ATTN: (_D,),
    WeightLocationType.LAYER_NORM_GAIN_PRE_MLP: (_D,),
}
"""Every weight's axes, in order: a vector times a matrix goes from the first axis to the last."""


def get_dimension_index_of_weight_location_type(
    weight_location_type: WeightLocationType, dimension: Dimension
) -> int:
    """Which axis of the weight runs over ``dimension``."""
    spec = weight_location_type.shape_spec
    if dimension not in spec:
        raise InputError(
            f"{weight_location_type.value} has no axis {Dimension(dimension).value!r}; "
            f"it has {', '.join(axis.value for axis in spec)}."
        )
    return spec.index(dimension)
