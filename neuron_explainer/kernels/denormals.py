"""Numbers so small that CPUs compute with them a hundred times more slowly."""

import contextlib
from collections.abc import Iterator

import torch


@contextlib.contextmanager
def flush_denormals() -> Iterator[None]:
    """Take them for zero inside the block: Adam's moments of latents at rest decay into them."""
    was_on = float(torch.tensor(1e-40) + torch.zeros(())) == 0.0
    torch.set_flush_denormal(True)
    try:
        yield
    finally:
        torch.set_flush_denormal(was_on)
