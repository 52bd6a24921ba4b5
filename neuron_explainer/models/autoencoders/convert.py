"""Autoencoders written in the formats of other libraries: :func:`save_as` and :func:`convert`."""

from collections.abc import Mapping
from functools import reduce
from pathlib import Path
from typing import Any, Unpack

import torch

from neuron_explainer import files
from neuron_explainer.models.autoencoder import Autoencoder
from neuron_explainer.models.checkpoints.autoencoders import (
    Exported,
    Stated,
    read_autoencoder,
    write_autoencoder,
)
from neuron_explainer.models.checkpoints.autoencoders.state import OPTIONAL_PARAMETERS, PARAMETERS
from neuron_explainer.models.checkpoints.problems import FLOATING_DTYPES


def save_as(
    autoencoder: Autoencoder,
    folder: str | Path,
    format: str,
    *,
    overwrite: bool = False,
) -> None:
    """Write ``folder`` in a format, so that the format's own library applies it as it is applied here.

    What a format cannot express is refused, and nothing is written. What changes no number may be
    lost: statistics of latents, the mark that a decoder is tied (it is written out). Biases that have
    to be folded together are written in float32, so that nothing is rounded twice.

    Args:
        autoencoder: any.
        folder: absent or empty, unless ``overwrite``.
        format: ``"native"``, or one of ``checkpoints.autoencoders.WRITTEN_FORMATS``.
        overwrite: replace a saved thing that is there.
    """
    if format == "native":
        autoencoder.save(folder, overwrite=overwrite)
        return
    exported = Exported(
        format=format,
        state_dict=autoencoder.state_dict(),
        input_normalization=autoencoder.input_normalization,
        location=autoencoder.location,
        output_location=autoencoder.output_location,
        model_name=autoencoder.model_name,
    )
    write_autoencoder(folder, exported, overwrite=overwrite)


def convert(
    src: str | Path,
    dst: str | Path,
    format: str,
    *,
    overwrite: bool = False,
    **stated: Unpack[Stated],
) -> Autoencoder:
    """Read ``src`` of any format, write the folder ``dst`` in ``format``, return the autoencoder.

    ``stated`` is what the files at ``src`` do not say, see :meth:`Autoencoder.load`.
    """
    files.check_replaceable(dst, overwrite=overwrite)
    dtype = _common_dtype(read_autoencoder(src, stated).state_dict)
    autoencoder = Autoencoder.load(src, dtype=dtype, **stated)
    save_as(autoencoder, dst, format, overwrite=overwrite)
    return autoencoder


def _common_dtype(state_dict: Mapping[str, Any]) -> torch.dtype | None:
    """The dtype that holds every weight as it is stored; None for that of the encoder.

    Our own folders of half precision hold biases and thresholds in float32.
    """
    weights = [state_dict.get(name) for name in (*PARAMETERS, *OPTIONAL_PARAMETERS)]
    fields = state_dict.get("activation_state_dict")
    weights += fields.values() if isinstance(fields, Mapping) else []
    found = [value.dtype for value in weights if isinstance(value, torch.Tensor)]
    floating = [dtype for dtype in found if dtype in FLOATING_DTYPES]
    return reduce(torch.promote_types, floating) if floating else None
