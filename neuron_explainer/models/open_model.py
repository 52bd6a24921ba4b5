"""The one way from a name to a model of any kind: :func:`open_model`."""

from pathlib import Path

from neuron_explainer.models.devices import Device, check_device
from neuron_explainer.models.model_context import ModelContext


def open_model(name: str | Path = "tiny-tales", device: Device | None = None) -> ModelContext:
    """The context of a model; nothing is loaded before it is needed.

    Args:
        name: as :meth:`ModelContext.from_model_type` takes it; ``hf:NAME`` is any causal language model
            of transformers.
        device: default: CUDA where there is one, else the CPU.
    """
    where = None if device is None else check_device(device)
    return ModelContext.from_model_type(name, device=where)
