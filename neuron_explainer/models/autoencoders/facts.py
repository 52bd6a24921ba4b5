"""What is known about an autoencoder besides its tensors: :class:`Facts`, which travel with it."""

from collections.abc import Mapping
from typing import Any, TypedDict

from neuron_explainer.models.checkpoints.autoencoders.state import InputNormalization
from neuron_explainer.models.locations import LocationLike


class Facts(TypedDict, total=False):
    """Keywords of ``Autoencoder`` and of its ``from_state_dict``; ``autoencoder.facts`` has them all.

    A copy with other weights is ``Autoencoder.from_state_dict(state_dict, **autoencoder.facts)``.
    """

    input_normalization: InputNormalization | None
    """What is done to each input vector before encoding and undone after decoding: ``"none"`` (or
    None); ``"center"`` subtracts its mean; ``"layer_norm"`` subtracts its mean and divides by its
    unbiased standard deviation + 1e-5 (the eps is added to the deviation, not to the variance), as
    OpenAI's v5 autoencoders were trained; ``"rms"`` divides by its root mean square, so that its norm
    is √n (a vector of zeros stays one)."""
    location: LocationLike | None
    """Where in the model the inputs come from; None if not known."""
    output_location: LocationLike | None
    """What a transcoder's output stands for; None if not known."""
    model_name: str | None
    """The model that it was trained on; None if not known."""
    metadata: Mapping[str, Any] | None
    """Anything else worth keeping that JSON can hold; it is saved."""


def check_names(facts: Mapping[str, Any]) -> None:
    """Raise TypeError for a keyword that is no fact, as a signature would."""
    for name in facts.keys() - Facts.__annotations__.keys():
        raise TypeError(f"Autoencoder got an unexpected keyword argument {name!r}")
