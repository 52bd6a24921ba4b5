"""Another autoencoder from the weights of one."""

from collections.abc import Mapping
from typing import Any

from neuron_explainer.models.autoencoder import Autoencoder


def rebuilt(
    autoencoder: Autoencoder, state: Mapping[str, Any], metadata: Mapping[str, Any]
) -> Autoencoder:
    """An autoencoder of other weights that says of itself what this one does."""
    return Autoencoder.from_state_dict(
        state,
        input_normalization=autoencoder.input_normalization,
        location=autoencoder.location,
        output_location=autoencoder.output_location,
        model_name=autoencoder.model_name,
        metadata=metadata,
    )
