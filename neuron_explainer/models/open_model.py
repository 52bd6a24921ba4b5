"""The one way from a name to a model of any kind: :func:`open_model`."""

from pathlib import Path

from neuron_explainer.models.devices import Device, check_device
from neuron_explainer.models.huggingface.context import HuggingFaceModelContext
from neuron_explainer.models.model_context import ModelContext, StandardModelContext

HUGGING_FACE = "hf:"
"""What the name of a model begins with that transformers is to load."""


def open_model(name: str | Path = "tiny-tales", device: Device | None = None) -> ModelContext:
    """The context of a model; nothing is loaded before it is needed.

    Args:
        name: ``hf:NAME`` or ``hf:FOLDER`` for any causal language model of transformers. Anything else
            is a model of this library: a name (``"gpt2-small"``), a folder, or the URL of a folder.
        device: default: CUDA where there is one, else the CPU.
    """
    where = None if device is None else check_device(device)
    if isinstance(name, str) and name.startswith(HUGGING_FACE):
        return HuggingFaceModelContext(name.removeprefix(HUGGING_FACE), where)
    return StandardModelContext(name, device=where)
