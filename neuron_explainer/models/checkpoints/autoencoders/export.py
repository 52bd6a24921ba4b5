"""What the writers of other libraries' formats share: an autoencoder taken apart, and refusals.

Shape legend: ``n`` inputs, ``o`` outputs, ``l`` latents.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NoReturn

from torch import Tensor

from neuron_explainer.errors import InputError
from neuron_explainer.models.checkpoints.autoencoders.common import at_least_float32
from neuron_explainer.models.checkpoints.autoencoders.state import InputNormalization
from neuron_explainer.models.locations import ActivationLocation


@dataclass
class Exported:
    """An autoencoder as a writer sees it."""

    format: str
    state_dict: Mapping[str, Any]
    """Of ``Autoencoder.state_dict()``."""
    n_inputs: int
    n_latents: int
    is_transcoder: bool
    input_normalization: InputNormalization
    group_sizes: tuple[int, ...] | None
    location: ActivationLocation | None
    output_location: ActivationLocation | None
    model_name: str | None

    @property
    def activation(self) -> str:
        """Its name."""
        return str(self.state_dict["activation"])

    @property
    def activation_fields(self) -> dict[str, Any]:
        """Its numbers."""
        return dict(self.state_dict["activation_state_dict"])

    @property
    def decoder_weight(self) -> Tensor:
        """``[o, l]``, written out where it is tied to the encoder."""
        state = self.state_dict
        weight: Tensor = state.get("decoder.weight", state["encoder.weight"].T)
        return weight

    def has(self, name: str) -> bool:
        """Whether there is such a tensor."""
        return name in self.state_dict

    def refuse(self, what: str) -> NoReturn:
        """The format has no way to say ``what``."""
        raise InputError(f"the format {self.format!r} cannot express {what}; nothing was written.")

    def refuse_parts(self, *names: str) -> None:
        """Refuse each of these optional parts that is there."""
        for name in names:
            if self.has(f"{name}.weight"):
                self.refuse("a GLU encoder" if name == "glu" else "a skip connection")


def fold_pre_bias(state_dict: Mapping[str, Any]) -> dict[str, Any]:
    """The same autoencoder without anything taken off its input: (x - b) W + e = x W + (e - b W)."""
    state = dict(state_dict)
    if not state["pre_bias"].any():
        return state
    weight, pre_bias = at_least_float32(state["encoder.weight"]), state["pre_bias"]
    shift = weight @ pre_bias.to(weight)
    state["latent_bias"] = (state["latent_bias"].to(shift) - shift).to(state["latent_bias"].dtype)
    state["pre_bias"] = pre_bias.new_zeros(pre_bias.shape)
    return state


def fold_latent_bias_into_gates(
    latent_bias: Tensor, fields: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """``b_gate``, ``r_mag`` and ``b_mag`` of a gated autoencoder that has no bias before its gates."""
    return {
        "b_gate": fields["b_gate"] + latent_bias,
        "r_mag": fields["r_mag"],
        "b_mag": fields["b_mag"] + latent_bias * fields["r_mag"].exp(),
    }
