"""Devices: their names, the default one, and the check that one exists here."""

import torch

from neuron_explainer.errors import InputError

Device = torch.device | str


def check_device(device: Device) -> torch.device:
    """The device, with its index (``cuda`` is ``cuda:0``); an InputError if it does not exist here."""
    try:
        return torch.empty(0, device=device).device
    except (RuntimeError, AssertionError, TypeError) as error:
        # torch goes on about its backends for many sentences.
        why = str(error).splitlines()[0].split(". ")[0].rstrip(".")
        raise InputError(
            f"no device {str(device)!r} here: {why}. Use 'cpu', or 'cuda' if torch has one."
        ) from None


def get_default_device() -> torch.device:
    """The first CUDA device; without one Apple's GPU; without that the CPU."""
    if torch.cuda.is_available():
        return torch.device("cuda:0")
    if torch.backends.mps.is_available():
        return torch.device("mps:0")
    return torch.device("cpu")


def default_device() -> torch.device:
    """CUDA if there is one, else the CPU: where models are loaded (Apple's GPU lacks float64)."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")
