"""Which autoencoder is for which place: autoencoders as users name them, and a context's."""

from collections.abc import Mapping
from typing import NamedTuple

from neuron_explainer.errors import InputError, LocationError
from neuron_explainer.models.autoencoder import Autoencoder
from neuron_explainer.models.autoencoder_context import AutoencoderContext
from neuron_explainer.models.locations import ActivationLocation


class Subject(NamedTuple):
    """An autoencoder and its places, each in one layer."""

    autoencoder: Autoencoder
    source: ActivationLocation
    """Where its inputs come from."""
    target: ActivationLocation
    """What its output stands for."""


def subjects_of(
    autoencoders: Mapping[str, Autoencoder] | AutoencoderContext, n_layers: int
) -> dict[str, Subject]:
    """By name: each with the one place that it is for.

    An autoencoder that does not say where its inputs come from is named by it; one of a context that
    serves all layers stands here once for each.
    """
    if isinstance(autoencoders, AutoencoderContext):
        return {
            str(place): _subject(str(place), autoencoders.get_autoencoder(layer), place)
            for layer in sorted(autoencoders.layer_indices, key=lambda layer: layer or 0)
            for place in autoencoders.location.at(layer).expand(n_layers)
        }
    if not autoencoders:
        raise InputError("no autoencoder is given.")
    return {
        name: _subject(name, autoencoder, _single(name, autoencoder.location, n_layers))
        for name, autoencoder in autoencoders.items()
    }


def _single(name: str, location: ActivationLocation | None, n_layers: int) -> ActivationLocation:
    """The one place that an autoencoder's inputs come from: as it says, or as its name does."""
    if location is None or (location.site.per_layer and location.layer is None):
        try:
            location = ActivationLocation.parse(name)
        except LocationError:
            raise InputError(
                f"autoencoder {name!r} does not say which place its inputs come from; state "
                "location= when it is loaded (--location in commands), or name it by its location, such "
                "as '3/mlp.post_act'."
            ) from None
    places = location.expand(n_layers)
    if len(places) != 1:
        raise InputError(f"autoencoder {name!r}: expected a place in one layer, found {location}.")
    return places[0]


def _subject(name: str, autoencoder: Autoencoder, source: ActivationLocation) -> Subject:
    if not autoencoder.is_transcoder:
        return Subject(autoencoder, source, source)
    target = autoencoder.output_location
    if target is None:
        raise InputError(
            f"transcoder {name!r} does not say what its output stands for; state output_location= "
            "when it is loaded."
        )
    if target.site.per_layer and target.layer is None:
        target = target.at(source.layer)
    return Subject(autoencoder, source, target)
