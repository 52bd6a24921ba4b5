"""Interventions along directions: add one, or remove several.

Shape legend: ``w`` width at a location, ``n`` directions.
"""

from collections.abc import Sequence
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor

from neuron_explainer.errors import InputError
from neuron_explainer.models.autoencoder import Autoencoder
from neuron_explainer.models.hooks import TransformerHooks
from neuron_explainer.models.interventions.edit import finite, make_hooks, one_number
from neuron_explainer.models.interventions.positions import PositionsLike
from neuron_explainer.models.locations import ActivationLocation, LocationLike

Direction = Tensor | tuple[Autoencoder, int]
"""A vector ``[w]``, or an autoencoder and the number of a latent, which means its decoder row."""
SteeringUnit = Literal["raw", "norm", "max"]


def steer(
    location: LocationLike,
    direction: Direction,
    strength: float,
    positions: PositionsLike = None,
    *,
    unit: SteeringUnit = "raw",
    maximum: float | None = None,
) -> TransformerHooks:
    """Add ``strength`` times a direction to the activation.

    Args:
        direction: a vector ``[w]``, or ``(autoencoder, latent)`` for a latent's decoder row.
        unit: what a strength of 1 adds. "raw": the direction as it is given. "norm": a vector along the
            direction that is as long as the token's activation. "max": ``maximum`` times the direction;
            with a latent's decoder row and its largest activation, this is what the latent adds when it
            is at its strongest.
        maximum: for ``unit="max"``.
    """
    vector = _direction(direction, location)
    by = one_number(strength, "strength")
    if unit not in ("raw", "norm", "max"):
        raise InputError(f"unit must be 'raw', 'norm' or 'max', found {unit!r}.")
    if (unit == "max") != (maximum is not None):
        raise InputError("unit='max' and maximum= belong together: give both or neither.")
    if unit == "norm":
        vector = vector / vector.norm()
    amount = by * one_number(1.0 if maximum is None else maximum, "maximum")
    change = partial(_steered, vector=vector, amount=amount, by_norm=unit == "norm")
    words = {"raw": "", "norm": " times the norm", "max": f" times {maximum}"}[unit]
    needs = _needs_width(location, len(vector))
    return make_hooks(f"steering by {by:g}{words}", location, None, positions, change, needs=needs)


def _steered(x: Tensor, _: Tensor | None, vector: Tensor, amount: float, by_norm: bool) -> Tensor:
    added = amount * vector.to(x.device, x.dtype)
    return x + (added * x.norm(dim=-1, keepdim=True) if by_norm else added)


def _needs_width(location: LocationLike, width: int) -> tuple[int | None, ...]:
    """The :attr:`Edit.needs` of a direction: activations of its width."""
    return (*[None] * (len(ActivationLocation.parse(location).site.shape) - 3), width)


def project_out(
    location: LocationLike,
    directions: Direction | Sequence[Direction],
    positions: PositionsLike = None,
) -> TransformerHooks:
    """Remove the part of the activation that lies in the span of one or several directions."""
    single = isinstance(directions, Tensor) or (
        isinstance(directions, tuple) and isinstance(directions[0], Autoencoder)
    )
    given: list[Any] = [directions] if single else list(directions)
    if not given:
        raise InputError("project_out needs at least one direction.")
    rows = torch.stack([_direction(direction, location) for direction in given])
    basis, sizes, _ = torch.linalg.svd(rows.double().T, full_matrices=False)  # [w, n]
    change = partial(_projected, basis=basis[:, sizes > sizes[0] * 1e-7])
    what, needs = f"projecting out {len(given)} directions", _needs_width(location, len(basis))
    return make_hooks(what, location, None, positions, change, needs=needs)


def _projected(x: Tensor, _: Tensor | None, basis: Tensor) -> Tensor:
    span: Tensor = basis.to(x.device, torch.promote_types(x.dtype, torch.float32))
    wide = x.to(span.dtype)
    rest: Tensor = wide - (wide @ span) @ span.T
    return rest


def _direction(direction: Direction, location: LocationLike) -> Tensor:
    if isinstance(direction, tuple):
        autoencoder, latent = direction
        if not 0 <= latent < autoencoder.n_latents:
            raise InputError(f"latents are 0 to {autoencoder.n_latents - 1}, found {latent}.")
        direction = autoencoder.directions[latent].detach()
    vector = finite(direction, "direction")
    if vector.dim() != 1 or not bool(vector.any()):
        raise InputError(
            f"{location}: a direction is a vector [w] that is not all zero, found {list(vector.shape)}."
        )
    return vector
