"""How a dictionary learns from the codes of a batch: a quasi-Newton step for each atom.

    H    ← (1 - 1/T) H + (1/T) mean_r a²                       recent mean square of each latent
    G    = (1/r) Σ_r w_r (x_r - Φ a_r) a_rᵀ                    minus the gradient of ½ w ‖x - Φ a‖²
    Φ_i  ← Φ_i + step · G_i / (H_i + floor)                    for every atom i
    Φ_i  ← Φ_i / ‖Φ_i‖

The Hessian of ½ ‖x - Φ a‖² in Φ is mean(a aᵀ), in which H is the diagonal: dividing by it lets an
atom that is rarely or weakly active learn as fast as the others. ``w_r`` is the weight of the row's token
(:mod:`~neuron_explainer.dictionaries.sparse_coding.frequency`). H starts at zero and is too small in the
first T batches, so these take larger steps, as in the published program; ``floor`` limits them.

Yun et al. 2021, "Transformer visualization via dictionary learning: contextualized embedding as a
linear superposition of transformer factors", appendix, with the constants of its program: T = 300,
step = 0.005, floor = 0.001.

Shape legend: ``n`` inputs, ``l`` latents (atoms of the dictionary), ``r`` rows.
"""

import torch
import torch.nn.functional as F
from torch import Tensor


def initial_dictionary(n_inputs: int, n_latents: int, seed: int) -> Tensor:
    """Random directions ``[n, l]`` in float64, each column of length 1; the same on every device."""
    generator = torch.Generator().manual_seed(seed)
    columns = torch.randn(n_inputs, n_latents, generator=generator, dtype=torch.float64)
    return normalize_columns(columns)


def moving_average(average: Tensor, value: Tensor, history: int) -> Tensor:
    """``(1 - 1/T) · average + (1/T) · value``, of any shape; T is ``history``, in batches."""
    return average + (value - average) / history


def updated_dictionary(
    dictionary: Tensor,
    residual: Tensor,
    latents: Tensor,
    hessian: Tensor,
    *,
    step_size: float,
    floor: float,
    weights: Tensor | None = None,
) -> Tensor:
    """The dictionary ``[n, l]`` after one step; every column has length 1.

    Args:
        dictionary: Φ, ``[n, l]``.
        residual: x - Φ a, ``[r, n]``.
        latents: a, ``[r, l]``.
        hessian: H, ``[l]``, which includes these latents already.
        step_size: fraction of a Newton step.
        floor: added to H.
        weights: weights of the rows, ``[r]``; None: all are 1.
    """
    if weights is not None:
        residual = residual * weights[:, None]
    descent = residual.T @ latents / len(latents)
    return normalize_columns(dictionary + step_size * descent / (hessian + floor))


def normalize_columns(dictionary: Tensor) -> Tensor:
    """``[n, l]`` with every column scaled to length 1; a column of zeros stays zero."""
    return F.normalize(dictionary, dim=0, eps=torch.finfo(dictionary.dtype).tiny)
