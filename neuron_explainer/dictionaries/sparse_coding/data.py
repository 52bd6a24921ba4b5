"""Reads batches of activations in any of their forms, and puts their rows in an order that can be resumed.

Shape legend: ``n`` inputs, ``r`` rows, ``v`` vocabulary.
"""

import json
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from neuron_explainer.activations.chunks import ActivationBatch, ActivationSource
from neuron_explainer.dictionaries.sparse_coding.config import SparseCodingConfig
from neuron_explainer.dictionaries.sparse_coding.frequency import frequency_weights
from neuron_explainer.errors import InputError
from neuron_explainer.models.locations import ActivationLocation

Place = ActivationLocation | None
"""Where activations come from; None if unknown."""

PlainBatch = Tensor | tuple[Tensor, Tensor | None]
"""Activations ``[r, n]``, alone or with their token ids ``[r]``."""
LocatedBatch = ActivationBatch | Mapping[ActivationLocation, Tensor]
"""Activations at several locations, with or without token ids."""


class Batch(NamedTuple):
    """Activations of the same tokens at one or more locations."""

    activations: dict[Place, Tensor]
    """``[r, n]`` by location."""
    tokens: Tensor | None
    """Token ids ``[r]``, if known."""


def read_batch(raw: Any) -> Batch:
    """A batch in any of the forms that training accepts, checked."""
    tokens: Tensor | None = None
    if isinstance(raw, Tensor):
        activations: dict[Place, Tensor] = {None: raw}
    elif isinstance(raw, tuple) and len(raw) == 2 and isinstance(raw[0], Tensor):
        activations, tokens = {None: raw[0]}, raw[1]
    elif isinstance(raw, Mapping):
        activations = _located(raw)
    elif isinstance(raw, ActivationBatch):
        activations, tokens = _located(raw.activations), raw.tokens
    else:
        raise InputError(
            "sparse coding: a batch must be a tensor [r, n], a pair of it and token ids [r], an "
            f"ActivationBatch or a dict of tensors by location; found {type(raw).__name__}."
        )
    _check(activations, tokens)
    return Batch(activations, tokens)


def _located(raw: Mapping[Any, Tensor]) -> dict[Place, Tensor]:
    return {ActivationLocation.parse(location): x for location, x in raw.items()}


def _check(activations: dict[Place, Tensor], tokens: Tensor | None) -> None:
    if not activations:
        raise InputError("sparse coding: a batch holds activations of no location.")
    n_rows = len(next(iter(activations.values())))
    for location, x in activations.items():
        name = "activations" if location is None else str(location)
        if x.ndim != 2 or not x.is_floating_point() or len(x) != n_rows:
            raise InputError(
                f"sparse coding: {name} must be floating point, [r, n] with r = {n_rows} as in the "
                f"rest of the batch; found {list(x.shape)} of {x.dtype}."
            )
        if not torch.isfinite(x).all():
            raise InputError(f"sparse coding: {name} hold NaN or infinity in this batch.")
    if tokens is not None and tokens.shape != (n_rows,):
        raise InputError(
            f"sparse coding: expected one token id a row, [{n_rows}], found {list(tokens.shape)}."
        )


def describe_source(source: Iterable[Any] | ActivationSource) -> dict[str, Any]:
    """How a source describes its batches, as JSON; empty for a plain iterable."""
    described = {} if isinstance(source, Iterable) else source.describe()
    plain: dict[str, Any] = json.loads(json.dumps(described))
    return plain


def group_locations(batch: Batch, across_layers: bool) -> dict[Place, list[Place]]:
    """For each dictionary, the locations that it learns from.

    The name of a dictionary is its location; if it has several layers, their hook path without a layer.
    """
    if not across_layers:
        return {location: [location] for location in batch.activations}
    by_path: dict[str | None, list[Place]] = {}
    for location in batch.activations:
        by_path.setdefault(None if location is None else location.path, []).append(location)
    groups: dict[Place, list[Place]] = {}
    for members in by_path.values():
        first = members[0]
        groups[first if len(members) == 1 or first is None else first.at(None)] = members
    return groups


def shuffled_parts(
    batch: Batch,
    members: list[Place],
    config: SparseCodingConfig,
    number: int,
    token_counts: Tensor | None,
) -> Iterator[tuple[Tensor, Tensor | None]]:
    """Yield rows ``[r, n]`` and weights ``[r]`` of equal parts of the ``number``-th batch, in random order.

    The order depends only on the seed and the number, so that checkpoints need not hold it.
    """
    x = torch.cat([batch.activations[location] for location in members])
    generator = torch.Generator().manual_seed((config.seed << 32) + number)
    order = torch.randperm(len(x), generator=generator).to(x.device)
    x = x.to(torch.promote_types(x.dtype, torch.float32))[order]
    n_parts = -(-len(x) // config.batch_size)
    if token_counts is None:
        yield from ((part, None) for part in x.tensor_split(n_parts)) if n_parts else ()
        return
    if batch.tokens is None:
        raise InputError(
            "sparse coding: token_counts are given, but the batches come without token ids."
        )
    weights = frequency_weights(batch.tokens, token_counts).to(x).repeat(len(members))[order]
    if n_parts:
        yield from zip(x.tensor_split(n_parts), weights.tensor_split(n_parts), strict=True)
