"""The hook that every intervention is, and how the functions of this package make one.

Shape legend: ``b`` batch, ``s`` positions of this call.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from neuron_explainer.errors import HookError, InputError, shown
from neuron_explainer.models.autoencoder_context import AutoencoderContext, MultiAutoencoderContext
from neuron_explainer.models.hooks import DescribedHook, TransformerHooks
from neuron_explainer.models.interventions.positions import Positions, PositionsLike
from neuron_explainer.models.interventions.units import Units, UnitsLike
from neuron_explainer.models.locations import ActivationLocation, LocationLike
from neuron_explainer.models.weight_names import Dimension

Autoencoders = AutoencoderContext | MultiAutoencoderContext
Change = Callable[[Tensor, Tensor | None], Tensor]
"""Computes the new values of the chosen units ``[b, s, …]`` at the positions ``[b, s]``."""


@dataclass(frozen=True, eq=False)
class Edit(DescribedHook):
    """A hook that changes some units at some positions."""

    what: str
    """What it does, in words: ``zero ablation``."""
    place: ActivationLocation
    units: Units
    positions: Positions
    change: Change
    sets: bool = False
    """Whether the new values are independent of the old ones."""
    needs: tuple[int | None, ...] = ()
    """The shape after ``[b, s]`` that the chosen units must have to take the new values. None stands for
    any length; an empty tuple means that every shape will do."""
    whole: bool = False
    """Whether the new values are a tensor that has an entry for each position of a call."""

    def __call__(
        self, x: Tensor, layer: int | None = None, positions: Tensor | None = None
    ) -> Tensor:
        chosen = x if self.units.index is None else x[self.units.index]
        new = self.edit(chosen, positions)
        if self.units.index is None:
            return new
        result = x.clone()
        result[self.units.index] = new
        return result

    def edit(self, chosen: Tensor, positions: Tensor | None = None) -> Tensor:
        """The values that the chosen units ``[b, s, …]`` have afterwards, in the same shape."""
        new = self.change(chosen, positions).to(chosen.dtype)
        if not self.positions.all:
            if positions is None:
                raise HookError(f"{self!r}: the positions of the tokens are not known here.")
            mask = self.positions.mask(positions)
            new = torch.where(mask.view(*mask.shape, *[1] * (chosen.dim() - 2)), new, chosen)
        return new.expand_as(chosen)

    def changes_at(self, positions: Tensor) -> Tensor | None:
        return None if self.whole or self.positions.all else self.positions.mask(positions)

    @property
    def latents(self) -> bool:
        """Whether the units are latents of an autoencoder spliced in at ``place``."""
        return self.units.latents

    @property
    def only_latents(self) -> Tensor | None:
        return None if self.units.index is None or not self.latents else self.units.index[-1]

    @property
    def sets_all(self) -> bool:
        """Whether nothing remains of what was at the place."""
        # With latents, what the autoencoder does not capture stays as it was.
        return self.sets and not self.latents and self.positions.all and self.units.index is None

    def check(self, sizes: Mapping[Dimension, int], end: int | None) -> None:
        if end is not None:
            self.positions.check_end(end)
        if not self.latents:
            axes = _axes(self.place, sizes)
            self.units.check_widths(axes[-self.units.n_axes(self.place) :], self.place)
            self.check_needs(axes)

    def check_needs(self, axes: Sequence[int | None]) -> None:
        """Refuse values that do not fit the units; ``axes`` is the location's shape after ``[b, s]``."""
        there = self.units.chosen_axes(axes, self.place)
        fits = len(self.needs) == len(there) and all(
            None in (need, length) or need == length
            for need, length in zip(self.needs, there, strict=True)
        )
        if self.needs and not fits:
            raise HookError(
                f"{self.what} at {self.place}: the values are {_words(self.needs)} for each token, "
                f"expected {_words(there)}."
            )

    def __repr__(self) -> str:
        return f"{self.what} of {self.units.name} at {self.positions}"


def _axes(place: ActivationLocation, sizes: Mapping[Dimension, int]) -> list[int | None]:
    """The lengths of a location's axes after ``[b, s]``; None stands for the axis of attended positions."""
    lengths = {"1": 1, "k": None, "h": sizes[Dimension.ATTN_HEADS]}
    *before, _ = place.site.shape[2:]
    return [*(lengths[axis] for axis in before), place.site.width(sizes.__getitem__)]


def _words(axes: Sequence[int | None]) -> str:
    return f"[{', '.join('any' if length is None else str(length) for length in axes)}]"


def make_hooks(
    what: str,
    location: LocationLike,
    units: UnitsLike,
    positions: PositionsLike,
    change: Change,
    autoencoders: Autoencoders | None = None,
    sets: bool = False,
    needs: tuple[int | None, ...] = (),
    whole: bool = False,
) -> TransformerHooks:
    """Hooks with one :class:`Edit`, on the location's activation or on the latents of autoencoders there.

    ``what``, ``change``, ``sets``, ``needs`` and ``whole`` are fields of :class:`Edit`.
    """
    place = ActivationLocation.parse(location)
    chosen = Units.of(place, units, autoencoders is not None)
    edit = Edit(what, place, chosen, Positions.of(positions), change, sets, needs, whole)
    if autoencoders is None:
        return TransformerHooks().append_at(place, edit)
    context = context_at(autoencoders, place)
    layers = context.chosen_layers(place.layer)
    for layer in layers:
        n_latents = context.get_autoencoder(layer).n_latents
        chosen.check_widths([n_latents], place)
        edit.check_needs([n_latents])
    return context.hooks(edit, layers=layers)


def context_at(autoencoders: Autoencoders, place: ActivationLocation) -> AutoencoderContext:
    """The autoencoders of a location; an InputError if these are of another one."""
    context = autoencoders
    if isinstance(context, MultiAutoencoderContext):
        context = context.get_autoencoder_context(place)
    if context.location != place.at(None):
        raise InputError(
            f"the autoencoders are of {context.location}, the intervention is at {place}."
        )
    return context


def constant(x: Tensor, _: Tensor | None, value: Tensor) -> Tensor:
    """``value`` in the shape of the chosen units ``x``: the change that sets them."""
    try:
        return value.to(x.device, x.dtype).expand_as(x)
    except RuntimeError:
        raise HookError(
            f"a value of shape {list(value.shape)} does not broadcast to {list(x.shape)}, the units at "
            "these rows and positions."
        ) from None


def one_number(value: float | Tensor, name: str) -> float:
    """A finite number that a caller gave; an InputError with its name if it is anything else."""
    found = finite(value, name)
    if found.numel() != 1:
        raise InputError(f"{name} must be one number, found a tensor {list(found.shape)}.")
    return float(found)


def finite(value: float | Tensor, name: str) -> Tensor:
    """A number or tensor that a caller gave, as floats; an InputError with its name unless all are finite."""
    try:
        # A Python number has 53 bits, which torch's default dtype would round away.
        tensor = torch.as_tensor(value, dtype=None if isinstance(value, Tensor) else torch.float64)
        tensor = (tensor if tensor.is_floating_point() else tensor.double()).detach()
        if not bool(torch.isfinite(tensor).all()):
            raise InputError(f"{name} must be finite, found {shown(value)}.")
    except (TypeError, ValueError, RuntimeError) as error:
        if isinstance(error, InputError):
            raise
        raise InputError(f"{name} must be a number or a tensor, found {shown(value)}.") from None
    return tensor
