"""Interventions that set, scale or clamp units.

The changes are functions of this module, not closures, so that interventions can be pickled.

Shape legend: ``b`` batch, ``s`` positions of this call, ``u`` chosen units.
"""

import math
from functools import partial

import torch
from torch import Tensor

from neuron_explainer.errors import InputError
from neuron_explainer.models.hooks import TransformerHooks
from neuron_explainer.models.interventions.edit import (
    Autoencoders,
    constant,
    finite,
    make_hooks,
    one_number,
)
from neuron_explainer.models.interventions.positions import PositionsLike
from neuron_explainer.models.interventions.units import Units, UnitsLike
from neuron_explainer.models.locations import ActivationLocation, LocationLike


def ablate(
    location: LocationLike,
    units: UnitsLike = None,
    positions: PositionsLike = None,
    *,
    autoencoders: Autoencoders | None = None,
) -> TransformerHooks:
    """Set units to zero.

    The package's docstring describes locations, units, positions and ``autoencoders``.
    """
    return make_hooks("zero ablation", location, units, positions, _zeros, autoencoders, sets=True)


def _zeros(x: Tensor, _: Tensor | None) -> Tensor:
    return torch.zeros_like(x)


def set_to(
    location: LocationLike,
    value: float | Tensor,
    units: UnitsLike = None,
    positions: PositionsLike = None,
    *,
    autoencoders: Autoencoders | None = None,
) -> TransformerHooks:
    """Set units to ``value``: a number, or a tensor that broadcasts to ``[b, s, u]``, which for heads is
    ``[b, s, u, d_head]``."""
    given = finite(value, "value")
    place = ActivationLocation.parse(location)
    chosen = Units.of(place, units, autoencoders is not None)
    single = len(chosen.highest) == 2  # channels of heads lie along one axis of the values
    n_axes = 3 if autoencoders is not None else len(place.site.shape) - single
    if given.dim() > n_axes:
        raise InputError(
            f"{place}: a value has at most the {n_axes} axes of what it sets, found "
            f"{list(given.shape)}."
        )
    padded = [1] * (n_axes - given.dim()) + list(given.shape)
    needs = tuple(None if length == 1 else length for length in padded[2:])
    what = f"set to {float(given):g}" if given.numel() == 1 else "set to a given tensor"
    change = partial(constant, value=given)
    whole = padded[1] > 1
    return make_hooks(what, place, units, positions, change, autoencoders, True, needs, whole)


def scale(
    location: LocationLike,
    factor: float,
    units: UnitsLike = None,
    positions: PositionsLike = None,
    *,
    autoencoders: Autoencoders | None = None,
) -> TransformerHooks:
    """Multiply units by ``factor``."""
    by = one_number(factor, "factor")
    change = partial(_scaled, factor=by)
    return make_hooks(f"scaling by {by:g}", location, units, positions, change, autoencoders)


def _scaled(x: Tensor, _: Tensor | None, factor: float) -> Tensor:
    return x * factor


def clamp(
    location: LocationLike,
    minimum: float | None = None,
    maximum: float | None = None,
    units: UnitsLike = None,
    positions: PositionsLike = None,
    *,
    autoencoders: Autoencoders | None = None,
) -> TransformerHooks:
    """Keep units at or above ``minimum`` and at or below ``maximum``."""
    if minimum is None and maximum is None:
        raise InputError("clamp needs minimum, maximum or both.")
    low = -math.inf if minimum is None else one_number(minimum, "minimum")
    high = math.inf if maximum is None else one_number(maximum, "maximum")
    if low > high:
        raise InputError(f"minimum {minimum} is above maximum {maximum}.")
    what = f"clamping to [{low:g}, {high:g}]"
    change = partial(_clamped, low=low, high=high)
    return make_hooks(what, location, units, positions, change, autoencoders)


def _clamped(x: Tensor, _: Tensor | None, low: float, high: float) -> Tensor:
    return x.clamp(low, high)
