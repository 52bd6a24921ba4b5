"""Where units write: the direction that one unit of activation adds to the residual stream.

A unit is a latent of an autoencoder, or a neuron, a channel of a head or a channel of the stream of the
model itself. What it writes is a vector if the way from it to the stream is linear:

- a latent of an autoencoder for the stream, or for what is added to it: its decoder row;
- a latent of an autoencoder for ``mlp.post_act``: its decoder row times the MLP's last matrix;
- a latent of an autoencoder for the joined heads ``attn.v_out``: its decoder row times attention's last
  matrix;
- a neuron, or a channel of a head: the row of that matrix;
- a latent of an autoencoder for ``resid.post_ln_f``: its decoder row, which the unembedding reads as it
  is.

A whole head moves information with a matrix, not with a vector, and is not among them.

Where an autoencoder normalises its inputs, its output is multiplied by the input's scale: the direction
is right and its length is that of a normalised input.

Shape legend: ``m`` units, ``l`` latents, ``o`` outputs of an autoencoder, ``h`` heads, ``d_head`` width
of a head, ``d`` model width, ``f`` MLP width.
"""

from collections.abc import Sequence
from functools import cached_property

import torch
from torch import Tensor

from neuron_explainer.errors import InputError, LocationError
from neuron_explainer.models.autoencoder import Autoencoder
from neuron_explainer.models.autoencoders.nonlinearities import as_nonlinearity
from neuron_explainer.models.locations import ActivationLocation, LocationLike
from neuron_explainer.models.model_context import ModelContext
from neuron_explainer.models.weight_names import WeightLocationType

STREAM = (
    "resid.post_emb",
    "resid.torso.delta_attn",
    "resid.torso.post_attn",
    "resid.torso.delta_mlp",
    "resid.torso.post_mlp",
)
"""Paths of the residual stream and of what is added to it."""
BEHIND_FINAL_NORM = "resid.post_ln_f"
_LAST_MATRIX = {
    "mlp.post_act": WeightLocationType.MLP_TO_RESIDUAL,
    "attn.v_out": WeightLocationType.ATTN_TO_RESIDUAL,
}
# What no part of the last layer reads any more: nothing stands between it and the final norm.
_LAST = ("resid.torso.delta_mlp", "resid.torso.post_mlp", "mlp.post_act", BEHIND_FINAL_NORM)

What = Autoencoder | LocationLike
"""An autoencoder, or a location of the model."""
UnitLike = int | str
"""The number of a unit, or its text: ``"17"``, or ``"3.17"`` for channel 17 of head 3."""


class Units:
    """All units of an autoencoder or of a location, and what they write to the residual stream.

    The model's matrices are read when they are first needed and held as long as this object lives; an
    edit of the model after that is not seen.

    Args:
        context: the model.
        what: an autoencoder, or a location of the model such as ``"3/mlp.post_act"``.
        location: where the autoencoder writes; None: the location that it records itself.
    """

    def __init__(
        self, context: ModelContext, what: What, location: LocationLike | None = None
    ) -> None:
        self.context = context
        self.autoencoder = what if isinstance(what, Autoencoder) else None
        self.location = _write_location(what, location)
        """Where they write."""
        self._check_location()
        if self.location.site.per_layer:
            self.location.expand(context.n_layers)  # a layer outside the model is an error
        width = self._width()
        self.n_units = width if self.autoencoder is None else self.autoencoder.n_latents
        if self.autoencoder is not None and self.autoencoder.n_outputs != width:
            raise InputError(
                f"{self.autoencoder._name()}: its output has width {self.autoencoder.n_outputs}; "
                f"{context.model_name} has width {width} at {self.location}."
            )

    @property
    def name(self) -> str:
        """What they are, such as ``"latents of 2/resid.torso.delta_mlp"``."""
        kind = "latents" if self.autoencoder is not None else f"{self._kind}s"
        return f"{kind} of {self.location}"

    def name_of(self, unit: int) -> str:
        """Such as ``"latent 1234 of 2/resid.torso.delta_mlp"``."""
        if self.autoencoder is not None:
            return f"latent {unit} of {self.location}"
        if self.location.path == "attn.v_out":
            head, channel = divmod(unit, self._head_width)
            return f"channel {channel} of head {head} of {self.location}"
        return f"{self._kind} {unit} of {self.location}"

    @property
    def behind_final_norm(self) -> bool:
        """Whether they write behind the final norm, where the unembedding reads."""
        return self.location.path == BEHIND_FINAL_NORM

    @property
    def direct_path_only(self) -> bool:
        """Whether parts of the model that are not looked at read what these units write.

        False only where nothing but the final norm follows. True also for a location without a layer,
        and for attention of the last layer, although some models run it beside the MLP.
        """
        last = self.location.layer == self.context.n_layers - 1
        return not (self.behind_final_norm or (last and self.location.path in _LAST))

    @property
    def signed(self) -> bool:
        """Whether a unit is active below 0 too, as in a collation: latents that can be negative, and
        channels; not neurons, which most nonlinearities keep near 0 there."""
        if self.autoencoder is None:
            return self._kind != "neuron"
        nonlinearity = as_nonlinearity(self.autoencoder.activation)
        return nonlinearity.can_be_negative(self.autoencoder.encoder.weight)

    def index(self, unit: UnitLike) -> int:
        """The number of a unit; an InputError with the range if there is no such unit."""
        number = self._parsed(unit) if isinstance(unit, str) else unit
        if isinstance(number, bool) or not isinstance(number, int):
            raise InputError(f"expected the number of a unit, found {unit!r}.")
        if not 0 <= number < self.n_units:
            raise InputError(
                f"there is no unit {unit} among the {self.name}: they are 0 to {self.n_units - 1}."
            )
        return number

    def rows(self, units: Sequence[int] | slice = slice(None)) -> Tensor:
        """What each unit adds to the stream, ``[m, d]`` float32; zeros for latents that write nothing."""
        chosen: slice | list[int] = units if isinstance(units, slice) else list(units)
        if self.autoencoder is None:
            return self._matrix_or_identity(chosen)
        rows = self.autoencoder.directions.detach()[chosen]
        rows = rows.to(self.context.device, torch.float32)
        return rows if self._matrix is None else rows @ self._matrix

    def write(self, units: Sequence[int]) -> list[bool]:
        """Whether each unit writes anything: not latents left out of memory, whose rows are zeros."""
        found: list[bool] = self.rows(units).any(dim=1).tolist()
        return found

    # --- parts ---

    @property
    def _kind(self) -> str:
        return {"mlp.post_act": "neuron"}.get(self.location.path, "channel")

    def _check_location(self) -> None:
        path = self.location.path
        if path not in (*STREAM, *_LAST_MATRIX, BEHIND_FINAL_NORM):
            raise LocationError(
                f"what is written at {self.location} does not reach the residual stream by a linear map. "
                f"Directions are known for {', '.join((*STREAM, *_LAST_MATRIX, BEHIND_FINAL_NORM))}."
            )
        if path not in _LAST_MATRIX:
            return
        if self.location.layer is None:
            raise LocationError(
                f"{self.location} is in every layer, and each has a matrix of its own: name one with "
                f"location='0/{path}'."
            )
        if self.context.norms_what_is_added:
            raise LocationError(
                f"{self.context.model_name} norms what attention and the MLP compute before it is added to "
                f"the stream, so the rows of the matrix behind {self.location} are not what is added."
            )

    @property
    def _head_width(self) -> int:
        return self.location.site.width(self.context.get_dim_size)

    def _width(self) -> int:
        width = self.location.site.width(self.context.get_dim_size)
        return width * self.context.n_attention_heads if self._of_heads else width

    @property
    def _of_heads(self) -> bool:
        return self.location.path == "attn.v_out"

    def _parsed(self, unit: str) -> int:
        head, dot, channel = unit.partition(".")
        of_head = bool(dot) and self._of_heads and self.autoencoder is None
        if not head.isdecimal() or (dot and not (of_head and channel.isdecimal())):
            example = "'3.17' for channel 17 of head 3" if self._of_heads else "'17'"
            raise InputError(f"expected a unit such as {example}, found {unit!r}.")
        if not of_head:
            return int(head)
        if int(channel) >= self._head_width:
            raise InputError(
                f"there is no channel {channel}: a head has channels 0 to {self._head_width - 1}."
            )
        return int(head) * self._head_width + int(channel)

    @cached_property
    def _matrix(self) -> Tensor | None:
        """``[f or h * d_head, d]`` from the location to the stream; None if it is the stream."""
        kind = _LAST_MATRIX.get(self.location.path)
        if kind is None:
            return None
        weight = self.context.get_weight(kind, self.location.layer)
        return weight.reshape(-1, weight.shape[-1]).to(self.context.device, torch.float32)

    def _matrix_or_identity(self, chosen: slice | list[int]) -> Tensor:
        if self._matrix is not None:
            return self._matrix[chosen]
        numbers = torch.arange(self.n_units, device=self.context.device)[chosen]
        return torch.nn.functional.one_hot(numbers, self.n_units).float()


def _write_location(what: What, location: LocationLike | None) -> ActivationLocation:
    if not isinstance(what, Autoencoder):
        if location is not None:
            raise InputError("location= is for autoencoders; the location was given already.")
        return ActivationLocation.parse(what)
    if location is not None:
        return ActivationLocation.parse(location)
    known = what.output_location if what.is_transcoder else what.location
    if known is None:
        raise InputError(
            f"{what._name()}: it does not record where in the model it writes; say so with location=, such "
            "as location='3/resid.torso.delta_mlp'."
        )
    return known
