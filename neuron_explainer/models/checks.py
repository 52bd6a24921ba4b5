"""Checks of what a caller gives: tensors, counts and seeds."""

import torch
from torch import Tensor

from neuron_explainer.errors import InputError, shown


def check_tensor(x: object, what: str, device: torch.device | None = None) -> None:
    """Refuse what is no dense tensor, and a tensor on another device than ``device``.

    numpy arrays and lists would end in an error about a missing attribute; sparse tensors, and those on
    "meta", which have no values, in one about an operator.
    """
    if not isinstance(x, Tensor):
        how = "torch.as_tensor(x) makes one of numbers"
        raise InputError(f"{what} must be a tensor, found {type(x).__name__}; {how}.")
    if x.layout != torch.strided:
        kind = str(x.layout).removeprefix("torch.")
        raise InputError(
            f"{what} must be a dense tensor, found one of layout {kind}; x.to_dense() makes one."
        )
    if x.device.type == "meta":
        raise InputError(f"{what} must have values, found a tensor on 'meta', which has none.")
    if device is not None and x.device != device:
        raise InputError(
            f"{what} must be on {device}, found it on {x.device}; move it with .to({str(device)!r})."
        )


def check_dtype(dtype: object) -> None:
    """Refuse what is no dtype of torch for floating-point numbers, such as the name of one."""
    if not isinstance(dtype, torch.dtype) or not dtype.is_floating_point:
        raise InputError(
            f"dtype must be one of torch for floating-point numbers, such as torch.float32, found "
            f"{shown(dtype)}."
        )


def check_count(number: object, name: str, least: int = 1) -> None:
    """Refuse anything but a whole number of at least ``least``."""
    if isinstance(number, bool) or not isinstance(number, int) or number < least:
        raise InputError(
            f"{name} must be a whole number of at least {least}, found {shown(number)}."
        )


def check_seed(seed: object, name: str = "seed") -> None:
    """Refuse what torch's generators do not take as a seed."""
    if isinstance(seed, bool) or not isinstance(seed, int) or not -(2**63) <= seed < 2**64:
        raise InputError(f"{name} must be a whole number of at most 64 bits, found {shown(seed)}.")
