"""From token windows to activations, at any locations that hold one vector for each token.

Shape legend: ``b`` windows, ``s`` positions, ``n`` tokens that come out, ``d`` width of a location.
"""

import math
import time
from collections.abc import Iterable
from contextlib import nullcontext
from dataclasses import fields, replace
from typing import Any

import torch
from torch import Tensor

from neuron_explainer.activations.chunks import ActivationBatch
from neuron_explainer.activations.windows import TokenBatch, TokenWindows
from neuron_explainer.errors import InputError, LocationError
from neuron_explainer.models.locations import ActivationLocation, LocationLike, parse_locations
from neuron_explainer.models.model_context import ModelContext

DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
_SHORT = {"fp32": "float32", "fp16": "float16", "bf16": "bfloat16"}


def parse_dtype(dtype: str | torch.dtype) -> torch.dtype:
    """The dtype with this name (``"bfloat16"``, ``"bf16"``), if it is one of ``DTYPES``."""
    name = str(dtype).removeprefix("torch.")
    name = _SHORT.get(name, name)
    if name not in DTYPES:
        raise InputError(f"unknown dtype {str(dtype)!r}. Known: {', '.join([*DTYPES, *_SHORT])}.")
    return DTYPES[name]


class Harvester:
    """Runs windows through a model and returns the activations of their tokens, never those of pads.

    One forward pass serves all locations and stops after the last one that is needed. The activations
    carry no gradient, and can be trained on.

    Args:
        context: the model and its device.
        locations: such as ``"3/mlp.post_act"``; a location without a layer stands for every layer. At
            locations with heads, these are side by side: ``[n, h * d_head]``.
        keep_bos: return the activations of start tokens and separators (``batch.bos``) too.
        max_norm_multiple: leave out tokens whose norm, at any of the locations, is more than this
            many times the median norm of the batch; None: leave out none.
        dtype: of the activations; default: the dtype in which the model computes.
        autocast_bf16: let the model compute in bfloat16 where it can; the activations are float32.
    """

    def __init__(
        self,
        context: ModelContext,
        locations: LocationLike | Iterable[LocationLike],
        *,
        keep_bos: bool = True,
        max_norm_multiple: float | None = None,
        dtype: str | torch.dtype | None = None,
        autocast_bf16: bool = False,
    ) -> None:
        if max_norm_multiple is not None and not max_norm_multiple > 0:
            raise InputError(f"max_norm_multiple must be above 0, found {max_norm_multiple}.")
        self.context = context
        self.locations = single_locations(context, locations)
        self.keep_bos, self.max_norm_multiple = keep_bos, max_norm_multiple
        self.autocast_bf16 = autocast_bf16
        self.dtype = None if dtype is None else parse_dtype(dtype)
        self.forward_s = 0.0
        """Seconds spent in the model so far."""

    def describe(self) -> dict[str, Any]:
        """Everything that decides the values, as JSON values."""
        return {
            "model": self.context.short_name,
            "locations": [str(place) for place in self.locations],
            "keep_bos": self.keep_bos,
            "max_norm_multiple": self.max_norm_multiple,
            "dtype": None if self.dtype is None else str(self.dtype).removeprefix("torch."),
            "autocast_bf16": self.autocast_bf16,
        }

    @torch.no_grad()
    def __call__(self, batch: TokenBatch) -> ActivationBatch:
        """The activations of a batch's tokens, row by row.

        Raises:
            InputError: the windows are longer than the model's context, an id is beyond its
                vocabulary, or a value is not finite (says where).
        """
        check_context_length(self.context, batch.tokens.shape[1])
        captured, batch = self._forward(batch)
        keep = torch.ones_like(batch.tokens, dtype=torch.bool)
        if batch.pad is not None:
            keep &= ~batch.pad
        if batch.bos is not None and not self.keep_bos:
            keep &= ~batch.bos
        which = keep.flatten().nonzero()[:, 0]
        found = ActivationBatch(
            {place: self._rows(x, which) for place, x in captured.items()},
            *(x.flatten()[which] for x in (batch.tokens, batch.document, batch.position)),
        )
        check_finite(found)
        return found if self.max_norm_multiple is None else self._without_outliers(found)

    def _forward(self, batch: TokenBatch) -> tuple[dict[ActivationLocation, Tensor], TokenBatch]:
        model = self.context.get_or_create_model()
        began, device = time.perf_counter(), model.device
        parts = {field.name: getattr(batch, field.name) for field in fields(batch)}
        batch = replace(batch, **{name: x.to(device) for name, x in parts.items() if x is not None})
        bf16 = torch.autocast(device.type, torch.bfloat16) if self.autocast_bf16 else nullcontext()
        with bf16:
            captured = model.capture(batch.tokens, self.locations, pad=batch.pad)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        self.forward_s += time.perf_counter() - began
        return {place: captured[place] for place in self.locations}, batch

    def _rows(self, x: Tensor, which: Tensor) -> Tensor:
        """``[b, s, …] -> [n, d]``."""
        rows = x.flatten(2).flatten(0, 1)
        rows = rows if len(which) == len(rows) else rows[which]
        return rows.to(self.dtype or (torch.float32 if self.autocast_bf16 else rows.dtype))

    def _without_outliers(self, found: ActivationBatch) -> ActivationBatch:
        assert self.max_norm_multiple is not None
        keep = torch.ones(len(found), dtype=torch.bool, device=found.tokens.device)
        for x in found.activations.values():
            norm = x.float().norm(dim=-1)
            if len(norm):
                keep &= norm <= self.max_norm_multiple * norm.median()
        return found.rows(keep)


class LiveSource:
    """Activations that a model computes when they are needed: a chunk is a batch of windows."""

    def __init__(self, harvester: Harvester, windows: TokenWindows) -> None:
        check_context_length(harvester.context, windows.context_length)
        self.harvester, self.windows = harvester, windows

    @property
    def forward_s(self) -> float:
        """Seconds spent in the model so far."""
        return self.harvester.forward_s

    def chunk(self, number: int) -> ActivationBatch | None:
        """The activations of a batch of windows."""
        n_batches = self.windows.n_batches
        if n_batches is not None and number >= n_batches:
            return None
        return self.harvester(self.windows.batch(number))

    def describe(self) -> dict[str, Any]:
        """Settings of model and windows."""
        return {**self.harvester.describe(), **self.windows.describe()}


def single_locations(
    context: ModelContext, locations: LocationLike | Iterable[LocationLike]
) -> list[ActivationLocation]:
    """The locations with their layers, each once; an error if one has no single vector for a token."""
    places = [
        place
        for location in parse_locations(locations)
        for place in location.expand(context.n_layers)
    ]
    if not places:
        raise InputError("expected at least one location, found none.")
    for place in places:
        if "k" in place.site.shape[2:]:
            raise LocationError(
                f"{place} holds {list(place.site.shape)}, a number for each pair of tokens; "
                "expected a location with one vector for each token."
            )
    return list(dict.fromkeys(places))


def check_context_length(context: ModelContext, length: int) -> None:
    """Raise InputError if windows are longer than the context of the model."""
    try:
        longest = context.n_context
    except InputError:  # positions that are not learned may have no end
        return
    if length > longest:
        raise InputError(
            f"the windows are {length} tokens long, more than the context of {longest} of "
            f"{context.model_name}; set context_length to at most {longest}."
        )


def check_finite(batch: ActivationBatch) -> None:
    """Raise InputError, which names the place, if any value is NaN or infinite."""
    for place, x in batch.activations.items():
        if bool(torch.isfinite(x).all()):
            continue
        row, column = (~torch.isfinite(x)).nonzero()[0].tolist()
        value = float(x[row, column])
        raise InputError(
            f"the activation at {place} is {'NaN' if math.isnan(value) else value} in element "
            f"{column}: document {int(batch.document[row])}, position {int(batch.position[row])}, "
            f"token {int(batch.tokens[row])} ({x.dtype}). If the model is sound, a wider dtype helps."
        )
