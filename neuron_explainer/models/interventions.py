"""Interventions: hooks for the experiments that everyone runs, as values that compose with ``+``.

    hooks = ablate("9/attn.v_out", units=[6]) + steer("6/resid.torso.post_mlp", direction, 4.0, unit="norm")
    model.sample("The capital of France is", hooks=hooks)

Every function takes a location (without a layer: every layer), units and positions, and returns
:class:`~neuron_explainer.models.hooks.TransformerHooks`. Printed, they say what they do. ``a + b`` runs
``a`` before ``b`` at each place.

**Units** are entries of the location's last axis: neurons, channels of the stream, or, where there are
heads, heads (``3``; ``"3.17"`` is a channel of one). With ``autoencoders=``, units are latents: the
autoencoders are spliced in, what they do not capture is added back, and only the edit changes anything.

**Positions** are counted from 0 in each row, pads do not count, and a generation goes on counting:

- None: every token;
- an int, several ints, or a slice;
- ``"last"``: the last token of each row in a call. While sampling, this is the last token of the prompt
  and then each new token. (A model that keeps no keys and values reads the whole text at every step, and
  there it is only the latest.)
- a bool tensor ``[b, s]`` or ``[s]`` by row and position, such as :func:`positions_where` makes.

Units and positions that a model or a text does not have are refused when the hooks are used, before the
forward pass runs.

Shape legend: ``b`` batch, ``s`` positions of this call, ``w`` width at a location, ``u`` chosen units,
``r`` rows and ``t`` positions of another run.
"""

import difflib
import math
import operator
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor

from neuron_explainer.errors import HookError, InputError
from neuron_explainer.models.autoencoder import Autoencoder
from neuron_explainer.models.autoencoder_context import AutoencoderContext, MultiAutoencoderContext
from neuron_explainer.models.hooks import DescribedHook, TransformerHooks
from neuron_explainer.models.language_model import Activations, LanguageModel, Prompts
from neuron_explainer.models.locations import ActivationLocation, LocationLike
from neuron_explainer.models.weight_names import Dimension

__all__ = [
    "Edit",
    "ablate",
    "add",
    "align",
    "clamp",
    "freeze",
    "mean_ablate",
    "patch_from",
    "positions_where",
    "project_out",
    "resample_ablate",
    "scale",
    "set_to",
    "steer",
]

UnitsLike = int | str | Sequence[int | str] | None
PositionsLike = int | slice | str | Sequence[int] | Tensor | None
Autoencoders = AutoencoderContext | MultiAutoencoderContext
Direction = Tensor | tuple[Autoencoder, int]
"""A vector ``[w]``, or an autoencoder and the latent whose decoder row is meant."""
SteeringUnit = Literal["raw", "norm", "max"]
Change = Callable[[Tensor, Tensor | None], Tensor]
"""From the chosen units ``[b, s, …]`` and the positions ``[b, s]`` to their new values."""


# --- which positions ---


@dataclass(frozen=True, eq=False)
class Positions:
    """Which tokens of a row; see the module's docstring."""

    chosen: tuple[int, ...] | slice | Literal["last"] | Tensor | None

    @classmethod
    def of(cls, given: PositionsLike) -> "Positions":
        """From any form that interventions take."""
        if given is None:
            return cls(None)
        if isinstance(given, str) and given == "last":
            return cls("last")
        if isinstance(given, slice):
            bounds = (given.start or 0, given.stop or 0, given.step or 1)
            if min(bounds[:2]) < 0 or bounds[2] < 1:
                raise InputError(
                    f"positions count from 0; found {given}. The last token is 'last'."
                )
            return cls(given)
        if isinstance(given, Tensor) and given.dtype == torch.bool and given.dim() in (1, 2):
            return cls(given if given.dim() == 2 else given[None])
        try:
            numbers = (
                given if isinstance(given, Iterable) and not isinstance(given, str) else [given]
            )
            chosen = tuple(operator.index(number) for number in numbers)  # type: ignore[arg-type]
            if any(isinstance(number, bool) for number in numbers):
                raise TypeError
        except TypeError:
            raise InputError(
                "positions must be None, a whole number, several, a slice, 'last', or a bool tensor "
                f"[b, s]; found {given!r}."
            ) from None
        if not chosen or min(chosen) < 0:
            raise InputError(f"positions count from 0; found {given!r}. The last token is 'last'.")
        return cls(tuple(sorted(set(chosen))))

    @property
    def all(self) -> bool:
        """Whether every token is meant."""
        return self.chosen is None

    def mask(self, positions: Tensor) -> Tensor:
        """Bool ``[b, s]``: which of the tokens at ``positions`` ``[b, s]`` are meant."""
        chosen = self.chosen
        if chosen is None:
            return torch.ones_like(positions, dtype=torch.bool)
        if isinstance(chosen, str):
            return positions == positions.amax(dim=1, keepdim=True)
        if isinstance(chosen, slice):
            start, step = chosen.start or 0, chosen.step or 1
            found = (positions >= start) & ((positions - start) % step == 0)
            return found if chosen.stop is None else found & (positions < chosen.stop)
        if isinstance(chosen, Tensor):
            if chosen.shape[0] not in (1, positions.shape[0]):
                raise HookError(
                    f"positions are a mask of {chosen.shape[0]} rows, for a batch of {positions.shape[0]}."
                )
            rows = chosen.to(positions.device).expand(positions.shape[0], -1)
            inside = positions < rows.shape[1]
            return rows.gather(1, positions.clamp(max=rows.shape[1] - 1)) & inside
        return torch.isin(positions, torch.tensor(chosen, device=positions.device))

    def first(self, lengths: Sequence[int]) -> int:
        """The lowest position meant in any of some rows of these lengths; the longest length for none."""
        chosen = self.chosen
        if chosen is None:
            return 0
        if isinstance(chosen, str):
            return min(lengths) - 1
        if isinstance(chosen, slice):
            return chosen.start or 0
        if isinstance(chosen, Tensor):
            columns = chosen.any(dim=0).nonzero()
            return int(columns[0]) if len(columns) else max(lengths)
        return chosen[0]

    def check_end(self, end: int) -> None:
        """Refuse positions of which a text of ``end`` tokens has none."""
        chosen = self.chosen
        if isinstance(chosen, tuple):
            outside = [number for number in chosen if number >= end]
        elif isinstance(chosen, slice):
            outside = [chosen.start] if (chosen.start or 0) >= end else []
        else:
            outside = []
        if outside:
            raise HookError(
                f"position {outside[0]} is outside the text: positions are 0 to {end - 1} in a batch whose "
                f"longest row has {end} tokens, those still to be sampled included."
            )

    def __str__(self) -> str:
        if self.chosen is None:
            return "every position"
        if isinstance(self.chosen, Tensor):
            return f"{int(self.chosen.sum())} positions of a mask"
        if isinstance(self.chosen, slice):
            start, stop = self.chosen.start or 0, self.chosen.stop
            step = "" if self.chosen.step in (None, 1) else f" in steps of {self.chosen.step}"
            return f"positions {start} to {'the end' if stop is None else stop - 1}{step}"
        if self.chosen == "last":
            return "the last position"
        return f"position{'s' * (len(self.chosen) > 1)} {', '.join(map(str, self.chosen))}"


def positions_where(
    model: LanguageModel,
    prompts: Prompts,
    predicate: Callable[[str], bool],
    bos: bool | int = False,
) -> Tensor:
    """Bool ``[b, s]``: the positions of the prompts whose token, as text, satisfies ``predicate``.

    ``positions_where(model, prompts, lambda token: token.strip().isdigit())``
    """
    ids = model.prompt_ids(prompts, bos)
    mask = torch.zeros(len(ids), max(map(len, ids)), dtype=torch.bool)
    for row, tokens in enumerate(ids):
        for place, token in enumerate(tokens):
            mask[row, place] = bool(predicate(model._decode([token])))
    return mask


# --- which units ---


@dataclass(frozen=True)
class Units:
    """Which entries of a location: an index into its tensors, and what to call them."""

    name: str
    index: tuple[Any, ...] | None
    """``x[index]`` are the chosen units; None: all."""
    highest: tuple[int, ...] = ()
    """The highest number along each unit axis (``[w]``, or ``[h]`` or ``[h, d_head]``)."""
    latents: bool = False
    """Whether the units are latents of an autoencoder."""

    @classmethod
    def of(cls, place: ActivationLocation, given: UnitsLike, latents: bool) -> "Units":
        """From any form that interventions take."""
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
                f"found {given!r}."
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
        """How many of the location's last axes tell units apart: heads and their channels, or one."""
        return 2 if place.site.shape[-1] == "d_head" and not self.latents else 1

    def chosen_axes(
        self, axes: Sequence[int | None], place: ActivationLocation
    ) -> list[int | None]:
        """The shape after ``[b, s]`` of the chosen units, from that of the location."""
        if self.index is None:
            return list(axes)
        n_axes = self.n_axes(place)
        rest = [axes[-1]] if n_axes > len(self.highest) else []  # heads keep their channels
        return [*axes[: len(axes) - n_axes], len(self.index[1]), *rest]

    def check_widths(self, widths: Sequence[int | None], place: ActivationLocation) -> None:
        """Refuse units beyond the lengths of a location's unit axes."""
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
        raise InputError(f"{place}: a unit is a whole number from 0, found {unit!r}.")
    return number


# --- the hook ---


@dataclass(frozen=True, eq=False)
class Edit(DescribedHook):
    """A hook that changes some units at some positions."""

    what: str
    place: ActivationLocation
    units: Units
    positions: Positions
    change: Change
    sets: bool = False
    """Whether the new values do not depend on the old ones."""
    needs: tuple[int | None, ...] = ()
    """The shape after ``[b, s]`` that the chosen units must have for the new values; None: any length."""
    whole: bool = False
    """Whether the new values are a tensor with one entry for each position of a call."""

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
        """Whether nothing of what was at the place is left."""
        # Around latents, what the autoencoder does not capture stays.
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
    """The lengths of a location's axes after ``[b, s]``; None for the attended positions."""
    lengths = {"1": 1, "k": None, "h": sizes[Dimension.ATTN_HEADS]}
    *before, _ = place.site.shape[2:]
    return [*(lengths[axis] for axis in before), place.site.width(sizes.__getitem__)]


def _words(axes: Sequence[int | None]) -> str:
    return f"[{', '.join('any' if length is None else str(length) for length in axes)}]"


def _hooks(
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
    place = ActivationLocation.parse(location)
    chosen = Units.of(place, units, autoencoders is not None)
    edit = Edit(what, place, chosen, Positions.of(positions), change, sets, needs, whole)
    if autoencoders is None:
        return TransformerHooks().append_at(place, edit)
    context = autoencoders
    if isinstance(context, MultiAutoencoderContext):
        context = context.get_autoencoder_context(place)
    if context.location != place.at(None):
        raise InputError(
            f"the autoencoders are of {context.location}, the intervention is at {place}."
        )
    layers = context.chosen_layers(place.layer)
    for layer in layers:
        n_latents = context.get_autoencoder(layer).n_latents
        chosen.check_widths([n_latents], place)
        edit.check_needs([n_latents])
    return context.hooks(edit, layers=layers)


# --- setting values ---


def ablate(
    location: LocationLike,
    units: UnitsLike = None,
    positions: PositionsLike = None,
    *,
    autoencoders: Autoencoders | None = None,
) -> TransformerHooks:
    """Set units to zero. For the arguments see the module's docstring."""
    return _hooks("zero ablation", location, units, positions, _zeros, autoencoders, sets=True)


# What changes do is said by functions of this module, so that interventions can be pickled.
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
    """Set units to ``value``: a number, or a tensor that broadcasts to ``[b, s, u]`` (heads:
    ``[b, s, u, d_head]``)."""
    constant = _finite(value, "value")
    place = ActivationLocation.parse(location)
    chosen = Units.of(place, units, autoencoders is not None)
    single = len(chosen.highest) == 2  # channels of heads are one axis of what is set
    n_axes = 3 if autoencoders is not None else len(place.site.shape) - single
    if constant.dim() > n_axes:
        raise InputError(
            f"{place}: a value has at most the {n_axes} axes of what it sets, found "
            f"{list(constant.shape)}."
        )
    padded = [1] * (n_axes - constant.dim()) + list(constant.shape)
    needs = tuple(None if length == 1 else length for length in padded[2:])
    what = f"set to {float(constant):g}" if constant.numel() == 1 else "set to a given tensor"
    change = partial(_constant, value=constant)
    whole = padded[1] > 1
    return _hooks(what, place, units, positions, change, autoencoders, True, needs, whole)


def _constant(x: Tensor, _: Tensor | None, value: Tensor) -> Tensor:
    try:
        return value.to(x.device, x.dtype).expand_as(x)
    except RuntimeError:
        raise HookError(
            f"a value of shape {list(value.shape)} does not broadcast to {list(x.shape)}, the units at "
            "these rows and positions."
        ) from None


def scale(
    location: LocationLike,
    factor: float,
    units: UnitsLike = None,
    positions: PositionsLike = None,
    *,
    autoencoders: Autoencoders | None = None,
) -> TransformerHooks:
    """Multiply units by ``factor``."""
    by = _one_number(factor, "factor")
    change = partial(_scaled, factor=by)
    return _hooks(f"scaling by {by:g}", location, units, positions, change, autoencoders)


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
    low = -math.inf if minimum is None else _one_number(minimum, "minimum")
    high = math.inf if maximum is None else _one_number(maximum, "maximum")
    if low > high:
        raise InputError(f"minimum {minimum} is above maximum {maximum}.")
    what = f"clamping to [{low:g}, {high:g}]"
    change = partial(_clamped, low=low, high=high)
    return _hooks(what, location, units, positions, change, autoencoders)


def _clamped(x: Tensor, _: Tensor | None, low: float, high: float) -> Tensor:
    return x.clamp(low, high)


# --- directions ---


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
        unit: what a strength of 1 is. "raw": the direction as it is given. "norm": a vector along the
            direction that is as long as the activation of the token. "max": ``maximum`` times the
            direction; with a latent's decoder row and its largest activation, what the latent adds at
            its strongest.
        maximum: for ``unit="max"``.
    """
    vector = _direction(direction, location)
    by = _one_number(strength, "strength")
    if unit not in ("raw", "norm", "max"):
        raise InputError(f"unit must be 'raw', 'norm' or 'max', found {unit!r}.")
    if (unit == "max") != (maximum is not None):
        raise InputError("unit='max' and maximum= belong together: give both or neither.")
    if unit == "norm":
        vector = vector / vector.norm()
    amount = by * _one_number(1.0 if maximum is None else maximum, "maximum")
    change = partial(_steered, vector=vector, amount=amount, by_norm=unit == "norm")
    words = {"raw": "", "norm": " times the norm", "max": f" times {maximum}"}[unit]
    needs = _needs_width(location, len(vector))
    return _hooks(f"steering by {by:g}{words}", location, None, positions, change, needs=needs)


def _steered(x: Tensor, _: Tensor | None, vector: Tensor, amount: float, by_norm: bool) -> Tensor:
    added = amount * vector.to(x.device, x.dtype)
    return x + (added * x.norm(dim=-1, keepdim=True) if by_norm else added)


def _needs_width(location: LocationLike, width: int) -> tuple[int | None, ...]:
    """What a direction needs: activations of its width."""
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
    return _hooks(what, location, None, positions, change, needs=needs)


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
    vector = _finite(direction, "direction")
    if vector.dim() != 1 or not bool(vector.any()):
        raise InputError(
            f"{location}: a direction is a vector [w] that is not all zero, found {list(vector.shape)}."
        )
    return vector


def _one_number(value: float | Tensor, name: str) -> float:
    found = _finite(value, name)
    if found.numel() != 1:
        raise InputError(f"{name} must be one number, found a tensor {list(found.shape)}.")
    return float(found)


def _finite(value: float | Tensor, name: str) -> Tensor:
    try:
        # A Python number has 53 bits, which torch's default dtype would round away.
        tensor = torch.as_tensor(value, dtype=None if isinstance(value, Tensor) else torch.float64)
        tensor = (tensor if tensor.is_floating_point() else tensor.double()).detach()
        if not bool(torch.isfinite(tensor).all()):
            raise InputError(f"{name} must be finite, found {value!r}.")
    except (TypeError, ValueError, RuntimeError) as error:
        if isinstance(error, InputError):
            raise
        raise InputError(f"{name} must be a number or a tensor, found {value!r}.") from None
    return tensor


# --- values of other runs ---


def patch_from(
    location: LocationLike,
    values: Activations | Tensor,
    units: UnitsLike = None,
    positions: PositionsLike = None,
    *,
    index_map: Tensor | None = None,
) -> TransformerHooks:
    """Set units to the values that they have in another run.

    Args:
        values: what :meth:`LanguageModel.capture` returned for the other prompts, or a tensor ``[r, t, …]``
            of this location by row and position. One row serves every row of a batch; otherwise row i of
            the batch takes row i.
        index_map: ``[b, s]`` or ``[s]`` int64: for each position here, the position there; -1 for
            none. :func:`align` makes one. Default: equal positions.

    A position without a counterpart stays as it is.
    """
    return _patch("patching", location, values, units, positions, index_map)


def add(
    location: LocationLike,
    values: Activations | Tensor,
    units: UnitsLike = None,
    positions: PositionsLike = None,
) -> TransformerHooks:
    """Add values to units by row and position, in the forms that :func:`patch_from` takes."""
    return _patch("adding", location, values, units, positions, None)


def freeze(
    location: LocationLike, values: Activations | Tensor, units: UnitsLike = None
) -> TransformerHooks:
    """Keep units as they are in another run, usually of the same text: attention patterns
    (``attn.qk_probs``), norm scales (``resid.torso.ln_mlp.scale``)."""
    return _patch("freezing", location, values, units, None, None)


def _patch(
    what: str,
    location: LocationLike,
    values: Activations | Tensor,
    units: UnitsLike,
    positions: PositionsLike,
    index_map: Tensor | None,
) -> TransformerHooks:
    place = ActivationLocation.parse(location)
    if place.site.per_layer and place.layer is None:
        if isinstance(values, Tensor):
            raise InputError(f"values of {place} are of one layer; name it, such as '0/{place}'.")
        found = [key for key in values if key.path == place.path]
        if not found:
            raise InputError(f"the other run holds nothing at {place}; capture it there.")
        hooks = [_patch(what, key, values, units, positions, index_map) for key in found]
        return sum(hooks[1:], hooks[0])
    rows, lengths = _by_position(values, place)
    source = _chosen_of(rows, place, units)
    if index_map is not None:
        if (
            not isinstance(index_map, Tensor)
            or index_map.dtype != torch.long
            or not index_map.numel()
        ):
            raise InputError(
                "index_map must be an int64 tensor [b, s] or [s], such as align() makes."
            )
        index_map = index_map if index_map.dim() == 2 else index_map[None]
    change = partial(
        _patched, what=what, place=place, source=source, lengths=lengths, index_map=index_map
    )
    return _hooks(what, place, units, positions, change, needs=_needs_of(source, place))


def _patched(
    x: Tensor,
    at: Tensor | None,
    what: str,
    place: ActivationLocation,
    source: Tensor,
    lengths: Tensor,
    index_map: Tensor | None,
) -> Tensor:
    """The values of ``source`` ``[r, t, …]`` at the positions ``[b, s]``, set or added."""
    if at is None:
        raise HookError(f"{what} at {place}: the positions of the tokens are not known here.")
    pairs = "k" in place.site.shape[2:]
    if pairs:
        _check_pairs(at, place)
    _check_rows(len(source), at.shape[0], place)
    there = at if index_map is None else _mapped(index_map.to(at.device), at)
    known = (there >= 0) & (there < lengths.to(at.device)[:, None].expand(len(at), -1))
    row = torch.arange(len(at), device=at.device)[:, None] % len(source)
    taken = source.to(x.device)[row, there.clamp(0, source.shape[1] - 1)]
    if pairs:
        # Keys that the other run did not have yet are not attended to from its positions.
        short = x.shape[2] - taken.shape[2]
        taken = taken[:, :, : x.shape[2]] if short <= 0 else _padded_keys(taken, short)
    taken = x + taken.to(x.dtype) if what == "adding" else taken.to(x.dtype)
    return torch.where(known.view(*known.shape, *[1] * (x.dim() - 2)), taken, x)


def _needs_of(values: Tensor, place: ActivationLocation) -> tuple[int | None, ...]:
    """What values ``[…, …, u]`` by row and position need: units of their shape, with any keys."""
    axes = zip(place.site.shape[2:], values.shape[2:], strict=False)
    return tuple(None if axis == "k" else length for axis, length in axes)


def _chosen_of(rows: Tensor, place: ActivationLocation, units: UnitsLike) -> Tensor:
    """The chosen units of another run's values ``[r, t, …]``."""
    chosen = Units.of(place, units, False)
    chosen.check_widths(rows.shape[-chosen.n_axes(place) :], place)
    return rows if chosen.index is None else rows[chosen.index]


def _padded_keys(taken: Tensor, short: int) -> Tensor:
    return torch.cat([taken, taken.new_zeros(*taken.shape[:2], short, taken.shape[3])], dim=2)


def _check_pairs(at: Tensor, place: ActivationLocation) -> None:
    """Keys are known by their place in the batch, which is their position only without pads."""
    if at.shape[1] > 1 and bool((at[:, 1:] - at[:, :-1] != 1).any()):
        raise HookError(
            f"{place}: patterns of another run cannot be used in a padded batch; run rows of one length."
        )


def _check_rows(there: int, here: int, place: ActivationLocation) -> None:
    if there not in (1, here):
        raise HookError(
            f"{place}: the other run has {there} rows, the batch {here}; expected 1 or {here}."
        )


def _mapped(index_map: Tensor, at: Tensor) -> Tensor:
    """Positions there for positions ``[b, s]`` here; -1 beyond the map."""
    if index_map.shape[0] not in (1, at.shape[0]):
        raise HookError(f"index_map has {index_map.shape[0]} rows, the batch {at.shape[0]}.")
    rows = index_map.expand(at.shape[0], -1)
    inside = at < rows.shape[1]
    return rows.gather(1, at.clamp(max=rows.shape[1] - 1)).masked_fill(~inside, -1)


def _by_position(values: Activations | Tensor, place: ActivationLocation) -> tuple[Tensor, Tensor]:
    """The values of a location ``[r, t, …]`` with pads moved to the end, and the rows' lengths ``[r]``."""
    if isinstance(values, Activations):
        if place not in values:
            raise InputError(f"the other run holds nothing at {place}; capture it there.")
        x, pad = values[place].detach(), values.pad
    else:
        x, pad = _finite(values, "values"), None
        if x.dim() != len(place.site.shape):
            raise InputError(
                f"values of {place} must be a tensor {list(place.site.shape)}, found {list(x.shape)}."
            )
    if not x.numel():
        raise InputError(f"{place}: the other run holds no values, found {list(x.shape)}.")
    if pad is None or not bool(pad.any()):
        return x, torch.full((len(x),), x.shape[1])
    if "k" in place.site.shape[2:]:
        raise InputError(f"{place}: capture patterns of rows of one length, or one row at a time.")
    order = pad.to(x.device).int().argsort(dim=1, stable=True)
    order = order.view(*order.shape, *[1] * (x.dim() - 2)).expand_as(x)
    return x.gather(1, order), (~pad).sum(dim=1).cpu()


def align(here: Sequence[int], there: Sequence[int]) -> Tensor:
    """``[len(here)]`` int64: for each token here, the position of the same token there; -1 for none.

    Tokens are matched by an edit script (Python's ``difflib``), so texts of unequal length align where
    they agree. A replaced run of equal length is matched token by token.
    """
    index_map = torch.full((len(here),), -1)
    matcher = difflib.SequenceMatcher(None, list(here), list(there), autojunk=False)
    for kind, a, b, c, d in matcher.get_opcodes():
        if kind == "equal" or (kind == "replace" and b - a == d - c):
            index_map[a:b] = torch.arange(c, d)
    if bool((index_map < 0).all()):
        raise InputError("the two texts cannot be aligned: they have no token in common.")
    return index_map


def mean_ablate(
    location: LocationLike,
    reference: Activations | Tensor,
    units: UnitsLike = None,
    positions: PositionsLike = None,
    *,
    per_position: bool = False,
) -> TransformerHooks:
    """Set units to their mean over the tokens of a reference run.

    Args:
        reference: a capture, or a tensor ``[r, t, …]`` of this location.
        per_position: the mean over the rows at each position (prompts of one template), instead of over
            all tokens. A position that no row reaches is refused.
    """
    place = _one_place(location)
    rows, lengths = _by_position(reference, place)
    source = _chosen_of(rows, place, units).double()
    known = torch.arange(source.shape[1])[None] < lengths[:, None]
    weight = known.to(source.device, source.dtype).view(*known.shape, *[1] * (source.dim() - 2))
    total = (source * weight).sum(dim=0)
    means = total / weight.sum(dim=0) if per_position else total.sum(dim=0) / weight.sum()
    by_position = partial(_mean_at, means=means, place=place)
    change = by_position if per_position else partial(_constant, value=means)
    needs = _needs_of(source, place)
    return _hooks("mean ablation", place, units, positions, change, sets=True, needs=needs)


def _mean_at(x: Tensor, at: Tensor | None, means: Tensor, place: ActivationLocation) -> Tensor:
    if at is None or int(at.max()) >= len(means):
        raise HookError(f"mean ablation at {place}: no row of the reference is so long.")
    return means.to(x.device, x.dtype)[at]


def resample_ablate(
    location: LocationLike,
    reference: Activations | Tensor,
    units: UnitsLike = None,
    positions: PositionsLike = None,
    *,
    seed: int = 0,
) -> TransformerHooks:
    """Set units, at each position, to their values at a random token of a reference run.

    The token is drawn for each position by the seed alone, uniformly: a row gets the same values in any
    batch and with or without a cache. Use several seeds.
    """
    place = _one_place(location)
    rows, lengths = _by_position(reference, place)
    source = _chosen_of(rows, place, units)
    known = torch.arange(source.shape[1])[None] < lengths[:, None]
    tokens = source[known.to(source.device)]  # [n, …]
    what, needs = f"resample ablation (seed {seed})", _needs_of(source, place)
    change = partial(_resampled, tokens=tokens, seed=seed, place=place)
    return _hooks(what, place, units, positions, change, sets=True, needs=needs)


def _resampled(
    x: Tensor, at: Tensor | None, tokens: Tensor, seed: int, place: ActivationLocation
) -> Tensor:
    if at is None:
        raise HookError(f"resample ablation at {place}: the positions are not known here.")
    generator = torch.Generator().manual_seed(seed)
    # One draw a position, in the order of positions: the first are the same however many follow.
    drawn = torch.randint(len(tokens), (int(at.max()) + 1,), generator=generator)
    return tokens[drawn[at.cpu()]].to(x.device, x.dtype)


def _one_place(location: LocationLike) -> ActivationLocation:
    place = ActivationLocation.parse(location)
    if place.site.per_layer and place.layer is None:
        raise InputError(f"{place} is in every layer; name one, such as '0/{place}'.")
    if "k" in place.site.shape[2:]:
        raise InputError(
            f"{place} holds a number for each pair of tokens; use patch_from or freeze."
        )
    return place
