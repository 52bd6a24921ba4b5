"""What the writers of formats share: an autoencoder taken apart, refusals, biases folded together.

Shape legend: ``n`` inputs, ``o`` outputs, ``l`` latents.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NoReturn

from torch import Tensor

from neuron_explainer.errors import InputError
from neuron_explainer.models.checkpoints.autoencoders.state import (
    InputNormalization,
    at_least_float32,
)
from neuron_explainer.models.locations import ActivationLocation


@dataclass
class Exported:
    """An autoencoder as a writer sees it."""

    format: str
    state_dict: Mapping[str, Any]
    """That of ``Autoencoder.state_dict()``."""
    n_inputs: int
    n_latents: int
    is_transcoder: bool
    input_normalization: InputNormalization
    group_sizes: tuple[int, ...] | None
    location: ActivationLocation | None
    output_location: ActivationLocation | None
    model_name: str | None

    @property
    def nonlinearity(self) -> str:
        """Its stored name."""
        return str(self.state_dict["activation"])

    @property
    def fields(self) -> dict[str, Any]:
        """The fields of the nonlinearity."""
        return dict(self.state_dict["activation_state_dict"])

    @property
    def decoder_weight(self) -> Tensor:
        """``[o, l]``, also where it is tied to the encoder."""
        state = self.state_dict
        weight: Tensor = state.get("decoder.weight", state["encoder.weight"].T)
        return weight

    def has(self, name: str) -> bool:
        """Whether the state dict has this tensor."""
        return name in self.state_dict

    def refuse(self, what: str) -> NoReturn:
        """Raise an error: the format has no way to say ``what``."""
        raise InputError(f"the format {self.format!r} cannot express {what}; nothing was written.")

    def refuse_parts(self, *names: str) -> None:
        """Refuse each of these optional parts that is there."""
        for name in names:
            if self.has(f"{name}.weight"):
                self.refuse("a GLU encoder" if name == "glu" else "a skip connection")

    def refuse_normalization(self) -> None:
        """Refuse any normalisation of the input."""
        if self.input_normalization != "none":
            self.refuse(f"input_normalization {self.input_normalization!r}")

    def refuse_width(self) -> None:
        """Refuse a transcoder whose output is not as wide as its input."""
        if len(self.decoder_weight) != self.n_inputs:
            self.refuse("a transcoder whose input and output differ in width")

    def refuse_groups(self) -> None:
        """Refuse Matryoshka groups."""
        if self.group_sizes is not None:
            self.refuse(f"Matryoshka groups with {self.nonlinearity}")


# Folded biases are float32 in files of any dtype: in half precision a sum over the whole input would
# be rounded to three digits, and could overflow.


def fold_pre_bias(state_dict: Mapping[str, Any]) -> dict[str, Any]:
    """The same autoencoder without a bias of the input: (x - b) W + e = x W + (e - b W)."""
    state = dict(state_dict)
    if not state["pre_bias"].any():
        return state
    weight, pre_bias = at_least_float32(state["encoder.weight"]), state["pre_bias"]
    shift = weight @ pre_bias.to(weight)
    state["latent_bias"] = state["latent_bias"].to(shift) - shift
    state["pre_bias"] = pre_bias.new_zeros(pre_bias.shape)
    return state


def fold_latent_bias_into_gates(
    latent_bias: Tensor, fields: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """``b_gate``, ``r_mag`` and ``b_mag`` of a gated autoencoder that has no bias before its gates."""
    if not latent_bias.any():
        return {name: fields[name] for name in ("b_gate", "r_mag", "b_mag")}
    b_gate, r_mag, b_mag, bias = (
        at_least_float32(value)
        for value in (fields["b_gate"], fields["r_mag"], fields["b_mag"], latent_bias)
    )
    return {"b_gate": b_gate + bias, "r_mag": fields["r_mag"], "b_mag": b_mag + bias * r_mag.exp()}
