"""Data of which it is known what made it: sparse sums of planted directions."""

import torch
import torch.nn.functional as F
from torch import Tensor


def planted(
    n_tokens: int, n_atoms: int = 48, width: int = 24, active: float = 2.0, seed: int = 0
) -> tuple[Tensor, Tensor]:
    """Tokens ``[N, width]`` and the atoms ``[n_atoms, width]`` they are sums of."""
    generator = torch.Generator().manual_seed(seed)
    atoms = F.normalize(torch.randn(n_atoms, width, generator=generator), dim=1)
    on = torch.rand(n_tokens, n_atoms, generator=generator) < active / n_atoms
    strength = 0.5 + torch.rand(n_tokens, n_atoms, generator=generator)
    return (on * strength) @ atoms, atoms


def recovered(atoms: Tensor, rows: Tensor, cosine: float = 0.95) -> float:
    """Share of atoms that some row of a decoder points to."""
    similarity = atoms @ F.normalize(rows.detach(), dim=1).t()
    return float((similarity.amax(1) > cosine).float().mean())
