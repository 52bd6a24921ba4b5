"""What readers of autoencoders share: parameters, checks of tensors and configs, folding.

Everything that is wrong with a file is reported at once, in the file's own words.

Shape legend: ``n`` inputs, ``o`` outputs, ``l`` latents.
"""

import math
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch.nn.functional as F
from torch import Tensor

from neuron_explainer.errors import CheckpointError, InputError, LocationError, did_you_mean
from neuron_explainer.models.checkpoints.autoencoders.state import at_least_float32
from neuron_explainer.models.checkpoints.problems import Report, Shape, described, tensor_problems
from neuron_explainer.models.locations import ActivationLocation

# ---- parameters ----------------------------------------------------------------------------------


def parameters(
    encoder: Tensor,
    decoder: Tensor,
    latent_bias: Tensor | None,
    *,
    pre_bias: Tensor | None = None,
    post_bias: Tensor | None = None,
    nonlinearity: str = "ReLU",
    is_transcoder: bool = False,
    **fields: Any,
) -> dict[str, Any]:
    """The state dict of an ``Autoencoder``; statistics of latents are unknown in it.

    Args:
        encoder: ``[l, n]``
        decoder: ``[o, l]``
        latent_bias: ``[l]``; zeros if None.
        pre_bias: ``[n]``, subtracted from the input; zeros if None.
        post_bias: ``[o]``, added to the output; if None, ``pre_bias`` is.
        nonlinearity: its stored name.
        is_transcoder: whether the output stands for something else than the input.
        fields: of the nonlinearity.
    """
    state: dict[str, Any] = {
        "encoder.weight": encoder,
        "decoder.weight": decoder,
        "latent_bias": encoder.new_zeros(len(encoder)) if latent_bias is None else latent_bias,
        "pre_bias": encoder.new_zeros(encoder.shape[1]) if pre_bias is None else pre_bias,
        "activation": nonlinearity,
        "activation_state_dict": fields,
    }
    if post_bias is not None:
        state["post_bias"] = post_bias
    if is_transcoder:
        state["n_outputs"] = len(decoder)
    return state


# ---- locations -----------------------------------------------------------------------------------


def is_on_the_stream(location: ActivationLocation) -> bool:
    """Whether TransformerLens centres the activations there when it processes a model's weights."""
    return location.path.startswith("resid.") and "ln" not in location.path


def location_of(hook_name: Any) -> ActivationLocation | None:
    """The location that another library's name means; None for a name that means none here."""
    if not isinstance(hook_name, str):
        return None
    try:
        return ActivationLocation.parse(hook_name)
    except LocationError:
        return None


# ---- tensors -------------------------------------------------------------------------------------


def check_tensors(
    where: str | Path,
    tensors: Mapping[str, Any],
    expected: Mapping[str, Shape],
    *,
    integers: Iterable[str] = (),
    why: str = "",
) -> None:
    """Raise one error that lists every tensor that is missing, unknown, of a wrong shape or kind.

    ``integers`` need not be floating point; ``why`` says what the expected shapes come from.
    """
    report = Report(str(where), tensor_problems(tensors, expected, integers))
    report.raise_if_any(why)


def check_layout(
    where: str | Path, tensors: Mapping[str, Any], layout: str, **how: Any
) -> dict[str, int]:
    """Check tensors by a layout, such as ``"W_enc [n, l]  b_enc [l]?"``; returns the size of each letter.

    The first tensor is a matrix, from which its two sizes are read. Another letter is the length of the
    first vector that has it, or else ``n``: a transcoder's output need not be as wide as its input. What
    has a ``?`` may be missing. ``how`` is as of :func:`check_tensors`.
    """
    axes = {
        name: letters
        for name, letters, optional in read_layout(layout)
        if name in tensors or not optional
    }
    first = next(iter(axes))
    sizes = dict(zip(axes[first], matrix_shape(where, tensors, first), strict=True))
    for name, letters in axes.items():
        vector = tensors.get(name)
        if len(letters) == 1 and isinstance(vector, Tensor) and vector.ndim == 1:
            sizes.setdefault(letters[0], len(vector))
    expected = {
        name: tuple(int(x) if x.isdecimal() else sizes.get(x, sizes["n"]) for x in letters)
        for name, letters in axes.items()
    }
    check_tensors(where, tensors, expected, **how)
    return sizes


def read_layout(layout: str) -> list[tuple[str, list[str], bool]]:
    """The tensors of a layout: name, letters of the axes, whether it may be missing."""
    found = re.findall(r"(\S+) \[(.*?)\](\??)", layout)
    return [(name, axes.split(", ") if axes else [], bool(mark)) for name, axes, mark in found]


def matrix_shape(where: str | Path, tensors: Mapping[str, Any], name: str) -> tuple[int, int]:
    """The two sizes of the matrix from which all others follow."""
    value = tensors.get(name)
    if not isinstance(value, Tensor) or value.ndim != 2 or 0 in value.shape:
        found = "nothing" if value is None else described(value)
        raise CheckpointError(f"{where}: {name}: expected a matrix, found {found}.")
    return value.shape[0], value.shape[1]


def encoder_by_latent(tensors: Mapping[str, Any]) -> bool:
    """Whether ``W_enc`` is ``[l, n]``; False where the biases do not tell, being of equal length."""
    found = [tensors.get(name) for name in ("W_enc", "b_enc", "b_dec")]
    if not all(isinstance(value, Tensor) for value in found):
        return False
    encoder, *biases = [list(value.shape) for value in found if value is not None]
    return encoder == biases[0] + biases[1] and biases[0] != biases[1]


def check_facts(
    where: str | Path, config: Mapping[str, Any], facts: Mapping[str, Any], source: str
) -> None:
    """Refuse a config that states other facts than the tensors, ``source``, show."""
    wrong = [
        f"{name}: expected {value!r} as in {source}, found {config[name]!r}"
        for name, value in facts.items()
        if config.get(name) is not None and config[name] != value
    ]
    if wrong:
        raise CheckpointError(f"{where}: {'; '.join(wrong)}.")


def refuse_scaled_latents(where: str | Path, tensors: Mapping[str, Any]) -> dict[str, Any]:
    """The tensors without ``scaling_factor``, which must be ones.

    Factors by which fine-tuning scaled latents are not applied any more, even by SAELens itself.
    """
    factor = tensors.get("scaling_factor")
    plain = isinstance(factor, Tensor) and not tensor_problems({"": factor}, {"": factor.shape})
    if factor is not None and not (plain and (factor == 1).all()):
        raise CheckpointError(
            f"{where}: scaling_factor: expected ones, found other values: latents scaled by "
            "fine-tuning cannot be applied."
        )
    return {name: value for name, value in tensors.items() if name != "scaling_factor"}


# ---- folding -------------------------------------------------------------------------------------


def fold_norm_factor(state: dict[str, Any], factor: float) -> None:
    """In place: the autoencoder of ``x`` from that of ``factor · x``, with the same latents.

    (c x - b) W + e = (x - b/c) (c W) + e, and the output is divided by c.
    """
    for name in ("encoder.weight", "glu.weight"):
        if name in state:
            state[name] = at_least_float32(state[name]) * factor
    for name in ("decoder.weight", "pre_bias", "post_bias"):
        if name in state:
            state[name] = at_least_float32(state[name]) / factor


def fold_latent_scale(state: dict[str, Any], scale: Tensor, decoder_too: bool) -> None:
    """In place: latents ``scale`` ``[l]`` times as large, for nonlinearities that scale along.

    ``decoder_too`` divides the decoder's columns, so that the output stays what it is.
    """
    state["encoder.weight"] = at_least_float32(state["encoder.weight"]) * scale[:, None]
    state["latent_bias"] = at_least_float32(state["latent_bias"]) * scale
    if decoder_too:
        state["decoder.weight"] = at_least_float32(state["decoder.weight"]) / scale


def check_factor(name: str, value: Any) -> float:
    """A positive number that a caller stated."""
    if not _is_positive(value):
        raise InputError(f"{name} must be a number > 0, found {value!r}.")
    return float(value)


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


def side_by_side(
    decoder: Tensor, bias: Tensor, skip: Tensor | None
) -> tuple[Tensor, Tensor, Tensor | None]:
    """The decoders ``[l, layers, n]`` as one, ``[l, layers · n]``; the first is that of the own layer.

    ``bias`` ``[n]`` and ``skip`` ``[n, n]`` belong to the own layer: they are zero for all others.
    """
    n_latents, n_layers, width = decoder.shape
    behind = (0, (n_layers - 1) * width)
    wide_skip = None if skip is None else F.pad(skip, behind)
    return decoder.reshape(n_latents, n_layers * width), F.pad(bias, behind), wide_skip


# ---- config fields -------------------------------------------------------------------------------

# Parts of names of settings that change what an autoencoder computes.
_NUMERIC = re.compile(
    r"norm|scal|bias|b_dec|activation_fn|nonlin|architec|threshold|top_?k|signed|gate|skip|whiten"
    r"|center|mean_sub|transpos|fold|tied|rotat|residual|quant|mask"
)
_OFF: tuple[Any, ...] = (None, False, 0, "", "none", "None", [], {})


def check_unknown_fields(
    where: str | Path, config: Mapping[str, Any], known: Iterable[str], harmless: Iterable[str]
) -> None:
    """Refuse fields that are not known here and whose names suggest that they change numbers.

    Others (learning rates, names of runs, …) say how a dictionary was trained, not how it is
    applied. Everything that is switched off is accepted too.
    """
    unread = set(config) - set(known) - set(harmless)
    doubtful = sorted(
        name for name in unread if _NUMERIC.search(name.lower()) and config[name] not in _OFF
    )
    if doubtful:
        listed = "; ".join(f"{name} = {config[name]!r}" for name in doubtful)
        raise CheckpointError(
            f"{where}: unknown settings that may change what the autoencoder computes: {listed}. "
            f"Expected of such settings only: {', '.join(sorted(known))}."
        )


def read_size(where: str | Path, config: Mapping[str, Any], name: str) -> int:
    """A whole number >= 1 in a config."""
    value = config.get(name)
    if type(value) is not int or value < 1:
        found = repr(value) if name in config else "no such field"
        raise CheckpointError(f"{where}: {name}: expected a whole number >= 1, found {found}.")
    return value


def read_number(where: str | Path, config: Mapping[str, Any], name: str) -> float:
    """A finite number > 0 in a config."""
    value: Any = config.get(name)
    if _is_positive(value):
        return float(value)
    found = repr(value) if name in config else "no such field"
    raise CheckpointError(f"{where}: {name}: expected a number > 0, found {found}.")


def _is_positive(value: Any) -> bool:
    return type(value) in (int, float) and 0 < value < math.inf


def read_flag(where: str | Path, config: Mapping[str, Any], name: str, default: bool) -> bool:
    """A truth value in a config."""
    value = config.get(name, default)
    if not isinstance(value, bool):
        raise CheckpointError(f"{where}: {name}: expected true or false, found {value!r}.")
    return value


def read_choice(
    where: str | Path,
    config: Mapping[str, Any],
    name: str,
    choices: Iterable[str],
    default: str | None = None,
    *,
    hint: str = "",
) -> str:
    """One of some texts in a config; ``hint`` is added to the error."""
    value, choices = config.get(name, default), list(choices)
    if isinstance(value, str) and value in choices:
        return value
    *others, last = map(repr, choices)
    expected = f"{', '.join(others)} or {last}" if others else last
    raise CheckpointError(
        f"{where}: {name}: expected {expected}, found {value!r}."
        f"{hint or did_you_mean(str(value), choices)}"
    )


def read_text(config: Mapping[str, Any], name: str) -> str | None:
    """Text in a config, None for anything else: for what is only recorded."""
    value = config.get(name)
    return value if isinstance(value, str) else None
