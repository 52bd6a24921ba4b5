"""An activation passed through an autoencoder inside a model, without gradients and with little to read.

Dense latents are made only for a hook that takes them. Elsewhere latents stay sparse: an edit of a few
latents reads and changes these alone. Decoding is affine, so what an edit adds is the decoded difference
of the latents, and with the error kept nothing else has to be decoded.

Shape legend: ``n`` width of the activation, ``l`` latents, ``u`` edited latents, ``…`` leading axes.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from neuron_explainer.models.autoencoders.fast_encode import SPARSE_SHARE, cheaper_to_decode
from neuron_explainer.models.autoencoders.latents import Latents


class LatentEdit(NamedTuple):
    """A change of some latents that depends on these alone."""

    latents: Tensor
    """``[u]`` int64, each once."""
    change: Callable[[Tensor], Tensor]
    """Their values ``[…, u]`` to new ones."""


def spliced_edits(
    autoencoder: Any, x: Tensor, edits: Sequence[LatentEdit], add_error: bool
) -> Tensor:
    """``[…, n]``: the reconstruction, or with ``add_error`` the activation, with some latents edited."""
    if not edits:
        reconstruction: Tensor = x if add_error else autoencoder.reconstruct(x)
        return reconstruction
    code = autoencoder.code_sparse(x)
    units = torch.cat([edit.latents for edit in edits]).to(x.device).sort().values
    units = torch.unique_consecutive(units)
    before = values_of(code.latents, units)
    now = before.clone()
    for edit in edits:
        place = torch.searchsorted(units, edit.latents.to(x.device))
        now[..., place] = edit.change(now[..., place])
    change = Latents(now - before, units.expand_as(now), autoencoder.n_latents)
    base = x if add_error else code.decode(code.latents)
    return base + _decoded_change(code, change)


def spliced_dense(
    autoencoder: Any, x: Tensor, on_latents: Callable[[Tensor], Tensor], add_error: bool
) -> Tensor:
    """The same for a function of dense latents ``[…, l]``, which may edit its argument in place."""
    code = autoencoder.code(x)
    hooked = on_latents(code.latents.clone())
    if not add_error:
        decoded: Tensor = code.decode(_cheaper(hooked))
        return decoded
    return x + _decoded_change(code, _cheaper(hooked - code.latents))


def values_of(latents: Latents, units: Tensor) -> Tensor:
    """``[…, u]``: the values of some latents; 0 where they are not active."""
    here = latents.indices[..., None] == units  # […, k, u]
    return (latents.values[..., None] * here).sum(dim=-2)


def _decoded_change(code: Any, change: Tensor | Latents) -> Tensor:
    """What a change of the latents adds to the output, on the scale of this input."""
    n_latents = change.shape[-1] if isinstance(change, Tensor) else change.n_latents
    some = change if isinstance(change, Tensor) else change.values
    values = some.new_zeros(*some.shape[:-1], 1)
    nothing = Latents(values, torch.zeros_like(values, dtype=torch.long), n_latents)
    difference: Tensor = code.decode(change) - code.decode(nothing)
    return difference


def _cheaper(latents: Tensor) -> Tensor | Latents:
    found = cheaper_to_decode(latents.reshape(-1, latents.shape[-1]), SPARSE_SHARE)
    return found.unflatten(latents.shape[:-1]) if isinstance(found, Latents) else latents
