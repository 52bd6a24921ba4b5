"""Apollo's end-to-end dictionaries: a torch state dict of one place or of several.

    encoder.0.weight [l, n]   encoder.0.bias [l]   decoder.weight [n, l]   decoder.bias [n]

    latents = relu(We x + be),   recons = latents · (Wd with columns of norm 1)ᵀ + bd

The library normalises the decoder whenever it applies it; here that is done once, on reading. A file of
a whole run has these keys once for each place, after ``blocks-6-hook_resid_pre.`` or the like: state
the location that is wanted. Published models (GPT-2 small) were TransformerLens's, whose residual stream
is centred; models of one's own were not. The file does not say which: state ``input_normalization``.

As read in e2e_sae 2.1.1: ``models/sparsifiers.py``, ``models/transformers.py``.
"""

import re
from pathlib import Path

import torch.nn.functional as F

from neuron_explainer.errors import CheckpointError
from neuron_explainer.models.checkpoints.autoencoders.common import (
    check_layout,
    is_on_the_stream,
    location_of,
    parameters,
)
from neuron_explainer.models.checkpoints.autoencoders.format import (
    Content,
    Format,
    LoadedAutoencoder,
    Source,
    Stated,
    loaded,
)
from neuron_explainer.models.checkpoints.autoencoders.state import at_least_float32
from neuron_explainer.models.locations import ActivationLocation

_MARK = "encoder.0.weight"
_KEY = re.compile(r"((?:.*\.)?)encoder\.0\.(?:weight|bias)")


def places(content: Content) -> list[str]:
    """The prefixes of the keys of each dictionary in a torch file; none if it is of another format."""
    found = [_KEY.fullmatch(key) for key in content if isinstance(key, str)]
    return list(dict.fromkeys(match[1] for match in found if match))


def read(source: Source, stated: Stated) -> LoadedAutoencoder:
    """Read a torch file of this format."""
    assert source.content is not None
    where = source.path
    prefix, location = _choose(where, source.content, stated)
    tensors = {k.removeprefix(prefix): v for k, v in source.content.items() if k.startswith(prefix)}
    layout = f"{_MARK} [l, n]  encoder.0.bias [l]  decoder.weight [n, l]  decoder.bias [n]"
    check_layout(where, tensors, layout)
    state = parameters(
        tensors[_MARK],
        F.normalize(at_least_float32(tensors["decoder.weight"]), dim=0),
        tensors["encoder.0.bias"],
        post_bias=tensors["decoder.bias"],
    )
    found = loaded(
        where,
        stated,
        state,
        input_normalization=stated.get("input_normalization"),
        location=location,
        metadata={"format": "e2e", "place": prefix.rstrip(".")},
    )
    if found.input_normalization is None:
        if found.location is None or is_on_the_stream(found.location):
            raise CheckpointError(
                f"{where}: input_normalization: the file does not say whether the residual stream was "
                "centred. Give it: `Autoencoder.load(source, input_normalization='center')` for the "
                "published dictionaries of GPT-2 small (TransformerLens centres the stream), or 'none' "
                "for a model of your own; in the shell `--input-normalization center`."
            )
        found.input_normalization = "none"
    return found


def _choose(
    where: str | Path, content: Content, stated: Stated
) -> tuple[str, ActivationLocation | None]:
    """The prefix of the dictionary that is wanted, and the location that the prefix names."""
    found = {prefix: _location(prefix) for prefix in places(content)}
    given = stated.get("location")
    if len(found) == 1:
        return next(iter(found.items()))
    listed = ", ".join(prefix.rstrip(".") for prefix in found)
    if given is None:
        raise CheckpointError(
            f"{where}: holds {len(found)} dictionaries ({listed}); which one is wanted? Give it: "
            "`Autoencoder.load(source, location=…)`."
        )
    wanted = ActivationLocation.parse(given)
    for prefix, location in found.items():
        if location == wanted:
            return prefix, location
    raise CheckpointError(f"{where}: expected a dictionary of {wanted}, found {listed}.")


def _location(prefix: str) -> ActivationLocation | None:
    name = prefix.rstrip(".").rpartition(".")[2]
    return location_of(name.replace("-", "."))


E2E = Format(
    name="e2e",
    layout="a .pt file with encoder.0.weight and decoder.bias (Apollo's end-to-end dictionaries)",
    read=read,
    holds={"torch": lambda content: bool(places(content))},
)
