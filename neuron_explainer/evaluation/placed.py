"""Which autoencoder belongs to which location, for autoencoders by name and for those of a context."""

from collections.abc import Mapping
from typing import NamedTuple

from neuron_explainer.errors import InputError, LocationError
from neuron_explainer.models.autoencoder import Autoencoder
from neuron_explainer.models.autoencoder_context import AutoencoderContext
from neuron_explainer.models.locations import ActivationLocation


class Placed(NamedTuple):
    """An autoencoder and its two locations, each in one layer."""

    autoencoder: Autoencoder
    source: ActivationLocation
    """Where its inputs come from."""
    target: ActivationLocation
    """Which activation its output reconstructs: ``source``, or another one for a transcoder."""


def placed(
    autoencoders: Mapping[str, Autoencoder] | AutoencoderContext, n_layers: int
) -> dict[str, Placed]:
    """Each autoencoder with its locations, by name.

    An autoencoder that does not say where its inputs come from must have its location as its name. An
    autoencoder of a context that serves several layers is listed once for each.
    """
    if isinstance(autoencoders, AutoencoderContext):
        return {
            str(source): placed_at(source, autoencoders.get_autoencoder(layer))
            for layer in sorted(autoencoders.layer_indices, key=lambda layer: layer or 0)
            for source in autoencoders.location.at(layer).expand(n_layers)
        }
    if not autoencoders:
        raise InputError("no autoencoder was given.")
    return {
        name: placed_at(_source(name, autoencoder.location, n_layers), autoencoder)
        for name, autoencoder in autoencoders.items()
    }


def placed_at(source: ActivationLocation, autoencoder: Autoencoder) -> Placed:
    """An autoencoder whose inputs come from ``source``, with the location that it reconstructs."""
    if not autoencoder.is_transcoder:
        return Placed(autoencoder, source, source)
    target = autoencoder.output_location
    if target is None:
        raise InputError(
            f"the transcoder at {source} does not say which activation its output stands for; state "
            "output_location= when it is loaded."
        )
    if target.site.per_layer and target.layer is None:
        target = target.at(source.layer)
    return Placed(autoencoder, source, target)


def _source(name: str, location: ActivationLocation | None, n_layers: int) -> ActivationLocation:
    """The one location of an autoencoder's inputs: as it says, or as its name does."""
    if location is None or (location.site.per_layer and location.layer is None):
        try:
            location = ActivationLocation.parse(name)
        except LocationError:
            raise InputError(
                f"autoencoder {name!r} does not say where its inputs come from; state location= when it "
                "is loaded (--location in commands), or name it by its location, such as "
                "'3/mlp.post_act'."
            ) from None
    found = location.expand(n_layers)
    if len(found) != 1:
        raise InputError(
            f"autoencoder {name!r}: expected a location in one layer, found {location}."
        )
    return found[0]
