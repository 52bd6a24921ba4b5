"""Which neurons, heads, channels or latents an intervention changes.

Shape legend: ``b`` batch, ``s`` positions, ``w`` width at a location, ``h`` heads.
"""

import operator
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from neuron_explainer.errors import HookError, InputError, shown
from neuron_explainer.models.locations import ActivationLocation

UnitsLike = int | str | Sequence[int | str] | None
"""The forms in which a caller may give units."""


@dataclass(frozen=True)
class Units:
    """Some entries of a location: what to call them, and the index that picks them out of its tensors."""

    name: str
    index: tuple[Any, ...] | None
    """``x[index]`` holds the chosen units of an activation ``x``. None: all of them."""
    highest: tuple[int, ...] = ()
    """The highest chosen number along each axis of units (``[w]``, or ``[h]`` or ``[h, d_head]``)."""
    latents: bool = False
    """Whether the units are latents of an autoencoder."""

    @classmethod
    def of(cls, place: ActivationLocation, given: UnitsLike, latents: bool) -> "Units":
        """Units in any form that a caller may give."""
        if given is None:
            return cls("all latents" if latents else "all units", None, latents=latents)
        several: list[Any] = [given]
        if isinstance(given, Sequence) and not isinstance(given, str):
            several = list(given)
        numbers: list[tuple[int, ...]]
        if latents or place.path == "logits":
            word = "latent" if latents else "token"
            numbers = [(_number(unit, place),) for unit in several]
        else:
            units = [place.site.unit(str(_text(unit, place))) for unit in several]
            numbers = [tuple(n for n in unit.where if isinstance(n, int)) for unit in units]
            word = units[0].name.rpartition(" ")[0] if units else ""
        if not numbers or len({len(number) for number in numbers}) > 1:
            raise InputError(
                f"{place}: units must be some numbers, and either heads or channels of heads, not both; "
                f"found {shown(given)}."
            )
        axes = tuple(torch.tensor(axis) for axis in zip(*numbers, strict=True))
        heads = not latents and len(axes) == 1 and place.site.shape[-1] == "d_head"
        index = (..., *axes, slice(None)) if heads else (..., *axes)
        text = ", ".join(".".join(map(str, number)) for number in numbers)
        word = "channel" if len(axes) == 2 else word
        return cls(
            f"{word}{'s' * (len(numbers) > 1)} {text}",
            index,
            tuple(max(axis) for axis in zip(*numbers, strict=True)),
            latents,
        )

    def n_axes(self, place: ActivationLocation) -> int:
        """How many of the last axes number the units: 2 for heads and their channels, otherwise 1."""
        return 2 if place.site.shape[-1] == "d_head" and not self.latents else 1

    def chosen_axes(
        self, axes: Sequence[int | None], place: ActivationLocation
    ) -> list[int | None]:
        """The shape of the chosen units after ``[b, s]``, where ``axes`` is that of the location."""
        if self.index is None:
            return list(axes)
        n_axes = self.n_axes(place)
        rest = [axes[-1]] if n_axes > len(self.highest) else []  # heads keep their channels
        return [*axes[: len(axes) - n_axes], len(self.index[1]), *rest]

    def check_widths(self, widths: Sequence[int | None], place: ActivationLocation) -> None:
        """Refuse units that the location's axes of units, of these lengths, do not have."""
        for number, width in zip(self.highest, widths, strict=False):
            if width is not None and number >= width:
                raise HookError(
                    f"{place} has no {self.name}: the numbers are 0 to {width - 1}, found {number}."
                )


def _text(unit: int | str, place: ActivationLocation) -> str:
    return unit if isinstance(unit, str) else str(_number(unit, place))


def _number(unit: Any, place: ActivationLocation) -> int:
    try:
        number = operator.index(unit) if not isinstance(unit, str | bool) else -1
    except TypeError:
        number = -1
    if number < 0:
        raise InputError(f"{place}: a unit is a whole number from 0, found {shown(unit)}.")
    return number
