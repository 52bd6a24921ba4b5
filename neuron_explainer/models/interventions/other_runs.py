"""Interventions that take their values from another run: patch, add, freeze, and ablate by a reference.

Shape legend: ``b`` batch, ``s`` positions of this call, ``r`` rows and ``t`` positions of the other run,
``u`` chosen units.
"""

from functools import partial

import torch
from torch import Tensor

from neuron_explainer.errors import HookError, InputError
from neuron_explainer.models.checks import check_seed
from neuron_explainer.models.hooks import TransformerHooks
from neuron_explainer.models.interventions.edit import (
    Autoencoders,
    constant,
    context_at,
    finite,
    make_hooks,
)
from neuron_explainer.models.interventions.positions import PositionsLike
from neuron_explainer.models.interventions.units import Units, UnitsLike
from neuron_explainer.models.language_model import Activations
from neuron_explainer.models.locations import ActivationLocation, LocationLike


def patch_from(
    location: LocationLike,
    values: Activations | Tensor,
    units: UnitsLike = None,
    positions: PositionsLike = None,
    *,
    index_map: Tensor | None = None,
    autoencoders: Autoencoders | None = None,
) -> TransformerHooks:
    """Set units to the values that they have in another run. A position that the other run does not have
    stays as it is.

    Args:
        values: what :meth:`LanguageModel.capture` returned for the other prompts, or a tensor ``[r, t, …]``
            of this location by row and position. One row serves every row of a batch; otherwise row i of
            the batch takes row i.
        index_map: ``[b, s]`` or ``[s]`` int64: for each position here, the position in the other run, or -1
            if there is none. :func:`align` makes one. Default: the same position.
        autoencoders: set latents to those of the other run. ``values`` are activations all the same.
    """
    return _patch("patching", location, values, units, positions, index_map, autoencoders)


def add(
    location: LocationLike,
    values: Activations | Tensor,
    units: UnitsLike = None,
    positions: PositionsLike = None,
) -> TransformerHooks:
    """Add values to units by row and position; ``values`` has the forms that :func:`patch_from` takes."""
    return _patch("adding", location, values, units, positions, None, None)


def freeze(
    location: LocationLike,
    values: Activations | Tensor,
    units: UnitsLike = None,
    *,
    autoencoders: Autoencoders | None = None,
) -> TransformerHooks:
    """Keep units at the values that they have in another run, usually one of the same text: attention
    patterns (``attn.qk_probs``) or scales of norms (``resid.torso.ln_mlp.scale``)."""
    return _patch("freezing", location, values, units, None, None, autoencoders)


def _patch(
    what: str,
    location: LocationLike,
    values: Activations | Tensor,
    units: UnitsLike,
    positions: PositionsLike,
    index_map: Tensor | None,
    autoencoders: Autoencoders | None,
) -> TransformerHooks:
    place = ActivationLocation.parse(location)
    if place.site.per_layer and place.layer is None:
        if isinstance(values, Tensor):
            raise InputError(f"values of {place} are of one layer; name it, such as '0/{place}'.")
        found = [key for key in values if key.path == place.path]
        if not found:
            raise InputError(f"the other run holds nothing at {place}; capture it there.")
        hooks = [
            _patch(what, key, values, units, positions, index_map, autoencoders) for key in found
        ]
        return sum(hooks[1:], hooks[0])
    source, lengths = _source(values, place, units, autoencoders)
    if index_map is not None:
        if "k" in place.site.shape[2:]:
            raise InputError(
                f"{place} holds a number for each pair of tokens, and a pair with a token that the other run "
                "lacks has none there: leave index_map out, and use texts whose positions agree."
            )
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
    needs = () if autoencoders is not None else _needs_of(source, place)
    return make_hooks(what, place, units, positions, change, autoencoders, needs=needs)


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
        # From its positions the other run attends to no later key, so keys that it lacks get 0.
        short = x.shape[2] - taken.shape[2]
        taken = taken[:, :, : x.shape[2]] if short <= 0 else _padded_keys(taken, short)
    taken = x + taken.to(x.dtype) if what == "adding" else taken.to(x.dtype)
    return torch.where(known.view(*known.shape, *[1] * (x.dim() - 2)), taken, x)


def _needs_of(values: Tensor, place: ActivationLocation) -> tuple[int | None, ...]:
    """The :attr:`Edit.needs` of values ``[r, t, …]``: units of the same shape, with any number of keys."""
    axes = zip(place.site.shape[2:], values.shape[2:], strict=False)
    return tuple(None if axis == "k" else length for axis, length in axes)


def _source(
    values: Activations | Tensor,
    place: ActivationLocation,
    units: UnitsLike,
    autoencoders: Autoencoders | None,
) -> tuple[Tensor, Tensor]:
    """The values of the chosen units, or latents, in another run ``[r, t, …, u]``, and its rows' lengths."""
    rows, lengths = _by_position(values, place)
    if autoencoders is None:
        return _chosen_of(rows, place, units), lengths
    return _latents_of(rows, place, units, autoencoders), lengths


@torch.no_grad()
def _latents_of(
    rows: Tensor, place: ActivationLocation, units: UnitsLike, autoencoders: Autoencoders
) -> Tensor:
    """``[r, t, u]``: the chosen latents of another run's activations ``[r, t, …]``."""
    autoencoder = context_at(autoencoders, place).get_autoencoder(place.layer)
    chosen = Units.of(place, units, True)
    chosen.check_widths([autoencoder.n_latents], place)
    x = rows if rows.shape[-1] == autoencoder.n_inputs else rows.flatten(2)
    x = x.to(autoencoder.device, autoencoder.dtype)
    # Row by row: all latents of all rows may take gigabytes, the chosen ones seldom do.
    latents = (autoencoder.encode(row[None]) for row in x)
    return torch.cat([each if chosen.index is None else each[chosen.index] for each in latents])


def _chosen_of(rows: Tensor, place: ActivationLocation, units: UnitsLike) -> Tensor:
    """The chosen units of another run's values ``[r, t, …]``."""
    chosen = Units.of(place, units, False)
    chosen.check_widths(rows.shape[-chosen.n_axes(place) :], place)
    return rows if chosen.index is None else rows[chosen.index]


def _padded_keys(taken: Tensor, short: int) -> Tensor:
    return torch.cat([taken, taken.new_zeros(*taken.shape[:2], short, taken.shape[3])], dim=2)


def _check_pairs(at: Tensor, place: ActivationLocation) -> None:
    """Refuse pads: keys are numbered by place in the batch, which is the position only without pads."""
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
    """Positions in the other run for positions ``[b, s]`` here; -1 beyond the map."""
    if index_map.shape[0] not in (1, at.shape[0]):
        raise HookError(f"index_map has {index_map.shape[0]} rows, the batch {at.shape[0]}.")
    rows = index_map.expand(at.shape[0], -1)
    inside = at < rows.shape[1]
    return rows.gather(1, at.clamp(max=rows.shape[1] - 1)).masked_fill(~inside, -1)


def _by_position(values: Activations | Tensor, place: ActivationLocation) -> tuple[Tensor, Tensor]:
    """A location's values in the other run ``[r, t, …]``, with pads moved to the end of each row, and the
    lengths of the rows ``[r]``."""
    if isinstance(values, Activations):
        if place not in values:
            raise InputError(f"the other run holds nothing at {place}; capture it there.")
        x, pad = values[place].detach(), values.pad
    else:
        x, pad = finite(values, "values"), None
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


def mean_ablate(
    location: LocationLike,
    reference: Activations | Tensor,
    units: UnitsLike = None,
    positions: PositionsLike = None,
    *,
    per_position: bool = False,
    autoencoders: Autoencoders | None = None,
) -> TransformerHooks:
    """Set units to their mean over the tokens of a reference run.

    Args:
        reference: a capture, or a tensor ``[r, t, …]`` of this location; with ``autoencoders``, whose
            latents are then set, it holds activations all the same.
        per_position: take the mean over the rows at each position, for prompts of one template, instead of
            the mean over all tokens. A position that no row of the reference reaches is refused.
    """
    place = _one_place(location)
    source, lengths = _source(reference, place, units, autoencoders)
    source = source.double()
    known = torch.arange(source.shape[1])[None] < lengths[:, None]
    weight = known.to(source.device, source.dtype).view(*known.shape, *[1] * (source.dim() - 2))
    total = (source * weight).sum(dim=0)
    means = total / weight.sum(dim=0) if per_position else total.sum(dim=0) / weight.sum()
    by_position = partial(_mean_at, means=means, place=place)
    change = by_position if per_position else partial(constant, value=means)
    needs = () if autoencoders is not None else _needs_of(source, place)
    return make_hooks("mean ablation", place, units, positions, change, autoencoders, True, needs)


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
    autoencoders: Autoencoders | None = None,
) -> TransformerHooks:
    """Set units, at each position, to their values at a random token of a reference run.

    The token for a position is drawn uniformly and depends on the seed alone, so a row gets the same
    values in every batch, with a cache or without. Repeat an experiment with several seeds.
    """
    check_seed(seed)
    place = _one_place(location)
    source, lengths = _source(reference, place, units, autoencoders)
    known = torch.arange(source.shape[1])[None] < lengths[:, None]
    tokens = source[known.to(source.device)]  # [n, …]
    what = f"resample ablation (seed {seed})"
    needs = () if autoencoders is not None else _needs_of(source, place)
    change = partial(_resampled, tokens=tokens, seed=seed, place=place)
    return make_hooks(what, place, units, positions, change, autoencoders, True, needs)


def _resampled(
    x: Tensor, at: Tensor | None, tokens: Tensor, seed: int, place: ActivationLocation
) -> Tensor:
    if at is None:
        raise HookError(f"resample ablation at {place}: the positions are not known here.")
    generator = torch.Generator().manual_seed(seed)
    # One draw for each position from 0 on, so the draws do not depend on how many positions follow.
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
