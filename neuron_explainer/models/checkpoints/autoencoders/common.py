"""What all readers and writers of autoencoders share: results, statements, checks.

A reader is a pure function from tensors and a config to :class:`LoadedAutoencoder`, whose state dict
is in the layout of :class:`~neuron_explainer.models.autoencoder.Autoencoder`. Everything that is
wrong with a file is told at once, in the file's own words.

Shape legend: ``n`` inputs, ``o`` outputs, ``l`` latents.
"""

import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, TypedDict, get_args

import torch
from torch import Tensor

from neuron_explainer.errors import CheckpointError, InputError, LocationError, did_you_mean
from neuron_explainer.models.checkpoints.autoencoders.state import STATISTICS, InputNormalization
from neuron_explainer.models.checkpoints.problems import Report, Shape
from neuron_explainer.models.locations import ActivationLocation, LocationLike

AutoencoderFormat = Literal[
    "native",
    "openai",
    "saelens",
    "dictionary_learning",
    "sparsify",
    "language_model_saes",
    "transformer_vis",
    "e2e",
    "gemma_scope",
]
FORMATS: tuple[AutoencoderFormat, ...] = get_args(AutoencoderFormat)


class Stated(TypedDict, total=False):
    """What a caller says about a file. Each is needed only where the file does not say it."""

    input_normalization: InputNormalization | None
    """What was done to each input vector before encoding."""
    location: LocationLike | None
    """Where in the model the inputs come from."""
    output_location: LocationLike | None
    """What the output stands for; makes a transcoder of a file that does not say that it is one."""
    norm_factor: float
    """SAELens (``expected_average_only_in``), Gemma Scope: what inputs were multiplied by in training."""
    k: int
    """dictionary_learning: latents active at a time, for early files."""
    threshold: float
    """dictionary_learning: of BatchTopK, for files whose training ended before it was known."""
    dict_class: str
    """dictionary_learning: the class of a dictionary without a ``config.json``."""
    normalize_decoder: bool
    """dictionary_learning, ``AutoEncoder``: move the norms of the decoder's columns into the encoder,
    as that library does on loading (the default); False keeps latents as they are stored."""
    penalty: float
    """TransformerVis: weight of the latents in the objective, ``reg`` in its programs."""
    max_iterations: int
    """TransformerVis: of FISTA; 500 if not given, as in its programs."""
    tolerance: float
    """TransformerVis: at which FISTA stops."""


COMMON = {"input_normalization", "location"}
_USED: dict[AutoencoderFormat, set[str]] = {
    "native": COMMON | {"output_location"},
    "openai": COMMON,
    "saelens": COMMON | {"output_location", "norm_factor"},
    "dictionary_learning": COMMON
    | {"output_location", "k", "threshold", "dict_class", "normalize_decoder"},
    "sparsify": COMMON | {"output_location"},
    "language_model_saes": COMMON,
    "transformer_vis": COMMON | {"penalty", "max_iterations", "tolerance"},
    "e2e": COMMON,
    "gemma_scope": COMMON | {"output_location", "norm_factor"},
}


@dataclass
class LoadedAutoencoder:
    """What a file or folder held."""

    state_dict: dict[str, Any]
    """In the layout of ``Autoencoder``; may hold views of mapped files."""
    input_normalization: InputNormalization | None = "none"
    location: ActivationLocation | None = None
    output_location: ActivationLocation | None = None
    model_name: str | None = None
    metadata: dict[str, Any] = field(default_factory=dict)
    statistics: Literal["none", "all", "vary"] = "none"
    """Of latents: whether the format has no place for them, always holds them, or it varies."""


def with_statistics(state_dict: Mapping[str, Any]) -> dict[str, Any]:
    """With the values of statistics that are not known, where a format has no place for them."""
    n_latents = len(state_dict["encoder.weight"])
    unknown = {
        name: torch.full((n_latents,), value, dtype=dtype)
        for name, (value, dtype) in STATISTICS.items()
    }
    return unknown | dict(state_dict)


# ---- what the caller says ------------------------------------------------------------------------


def check_stated(where: str | Path, found: AutoencoderFormat, stated: Stated) -> None:
    """Refuse statements that a format has no use for: they would be ignored without a word."""
    known = {name for used in _USED.values() for name in used}
    for name, value in stated.items():
        if name not in known:
            raise InputError(f"{where}: unknown argument {name!r}.{did_you_mean(name, known)}")
        if value is not None and name not in _USED[found]:
            formats = [other for other in FORMATS if name in _USED[other]]
            raise InputError(
                f"{where}: is of the format {found!r}, which has no {name}; that is for "
                f"{', '.join(formats)}."
            )


def settle(where: str | Path, field_name: str, found: Any, given: Any, name: str) -> Any:
    """What a file says, or else the caller (either may be None); a contradiction is an error."""
    if found is not None and given is not None and found != given:
        raise CheckpointError(
            f"{where}: {field_name} says {name} {_shown(found)}, the call says {_shown(given)}."
        )
    return given if found is None else found


def _shown(value: Any) -> str:
    return repr(str(value) if isinstance(value, ActivationLocation) else value)


def settle_location(
    where: str | Path, found: ActivationLocation | None, given: LocationLike | None
) -> ActivationLocation | None:
    """Likewise for a location; where one of the two names no layer, the other's holds."""
    said = None if given is None else ActivationLocation.parse(given)
    if found is not None and said is not None:
        said = said.at(found.layer) if said.layer is None else said
        found = found.at(said.layer) if found.layer is None else found
    settled: ActivationLocation | None = settle(where, "the file", found, said, "location")
    return settled


def location_of(hook_name: Any) -> ActivationLocation | None:
    """The location that another library's name means; None for a name without one here."""
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
    report = Report(str(where))
    for name in expected.keys() - tensors.keys():
        report.add(name, f"missing, expected {list(expected[name])}")
    for name in tensors.keys() - expected.keys():
        near = did_you_mean(name, expected.keys() - tensors.keys())
        report.add(name, f"unexpected, found {_described(tensors[name])}.{near}")
    for name in expected.keys() & tensors.keys():
        value = tensors[name]
        if not isinstance(value, Tensor):
            report.add(name, f"expected a tensor, found {_described(value)}")
            continue
        if tuple(value.shape) != tuple(expected[name]):
            wanted, found = list(expected[name]), list(value.shape)
            turned = " (transposed?)" if len(found) == 2 and found == wanted[::-1] else ""
            report.add(name, f"expected shape {wanted}, found {found}{turned}")
        if name in integers:
            continue
        if not value.is_floating_point():
            dtype = str(value.dtype).removeprefix("torch.")
            report.add(name, f"expected a floating-point dtype, found {dtype}")
        elif not torch.isfinite(value).all():
            report.add(name, "holds NaN or infinity")
    report.raise_if_any(why)


def _described(value: Any) -> str:
    return str(list(value.shape)) if isinstance(value, Tensor) else f"a {type(value).__name__}"


def matrix_shape(where: str | Path, tensors: Mapping[str, Any], name: str) -> tuple[int, int]:
    """The two sizes of the matrix from which all others follow."""
    value = tensors.get(name)
    if not isinstance(value, Tensor) or value.ndim != 2 or 0 in value.shape:
        found = "nothing" if value is None else _described(value)
        raise CheckpointError(f"{where}: {name}: expected a matrix, found {found}.")
    return value.shape[0], value.shape[1]


def at_least_float32(tensor: Tensor) -> Tensor:
    """For folding factors in: in half precision their product would be rounded twice."""
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


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
    """In place: latents ``scale`` ``[l]`` times as large, for activations that scale along.

    ``decoder_too`` divides the decoder's columns, so that the output stays what it is.
    """
    state["encoder.weight"] = at_least_float32(state["encoder.weight"]) * scale[:, None]
    state["latent_bias"] = at_least_float32(state["latent_bias"]) * scale
    if decoder_too:
        state["decoder.weight"] = at_least_float32(state["decoder.weight"]) / scale


def check_factor(name: str, value: Any) -> float:
    """A positive number that a caller stated."""
    number = isinstance(value, int | float) and not isinstance(value, bool)
    if not number or not 0 < value < math.inf:
        raise InputError(f"{name} must be a number > 0, found {value!r}.")
    return float(value)


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
    """Refuse fields that are not known here, by whose names they may change numbers.

    Others (learning rates, names of runs, …) say how a dictionary was trained, not how it is
    applied, and so does everything that is switched off.
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


def read_flag(where: str | Path, config: Mapping[str, Any], name: str, default: bool) -> bool:
    """A truth value in a config."""
    value = config.get(name, default)
    if not isinstance(value, bool):
        raise CheckpointError(f"{where}: {name}: expected true or false, found {value!r}.")
    return value


def read_text(config: Mapping[str, Any], name: str) -> str | None:
    """Text in a config, None for anything else: for what is only recorded."""
    value = config.get(name)
    return value if isinstance(value, str) else None
