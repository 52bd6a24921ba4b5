"""OpenAI's layout: a torch state dict of openai/sparse_autoencoder or transformer-debugger.

    pre_bias [n]   latent_bias [l]   encoder.weight [l, n]   decoder.weight [n, l]
    stats_last_nonzero, latents_activation_frequency, latents_mean_square [l]
    activation (a name), activation_state_dict

It is the layout of ``Autoencoder`` itself, which judges the entries. Files without statistics are read
too: no result depends on them. How inputs were normalised is not in the file.

As read in openai/sparse_autoencoder at 4965b94: ``model.py``, ``paths.py``.
"""

from neuron_explainer.models.checkpoints.autoencoders.format import (
    Content,
    Format,
    LoadedAutoencoder,
    Source,
    Stated,
    with_statistics,
)
from neuron_explainer.models.locations import ActivationLocation


def read(source: Source, stated: Stated) -> LoadedAutoencoder:
    """Read a torch file of OpenAI's layout."""
    assert source.content is not None
    location = stated.get("location")
    return LoadedAutoencoder(
        with_statistics(source.content),
        stated.get("input_normalization"),
        None if location is None else ActivationLocation.parse(location),
        lenient=True,
    )


def holds(content: Content) -> bool:
    """Whether a torch file is of this layout, though perhaps incomplete: it has a key of its own."""
    return "pre_bias" in content or "latent_bias" in content


OPENAI = Format(
    name="openai",
    layout="a .pt file with pre_bias, latent_bias, encoder.weight and decoder.weight (OpenAI)",
    read=read,
    holds={"torch": holds},
)
