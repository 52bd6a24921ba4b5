"""What the state dict of an autoencoder holds, in OpenAI's layout and in this package's.

Everything that is wrong is found here and reported together, before an
:class:`~neuron_explainer.models.autoencoder.Autoencoder` is made.

Shape legend: ``n`` inputs, ``o`` outputs (as many as inputs but in a transcoder), ``l`` latents.
"""

from collections.abc import Mapping, Sequence
from typing import Any, Literal, NamedTuple, get_args

import torch
from torch import Tensor, nn

from neuron_explainer.errors import CheckpointError, InputError, did_you_mean, shown
from neuron_explainer.models.autoencoders.nonlinearities import (
    ACTIVATIONS_CLASSES,
    as_nonlinearity,
    make_activation,
    select_fields,
)
from neuron_explainer.models.checkpoints.problems import (
    Shape,
    described,
    not_plain,
    tensor_problems,
)

InputNormalization = Literal["none", "center", "layer_norm", "rms"]
NORMALIZATIONS: tuple[str, ...] = get_args(InputNormalization)

PARAMETERS = ("pre_bias", "latent_bias", "encoder.weight", "decoder.weight")
# Optional parts, which OpenAI's layout does not have: a bias of the output that is not that of the
# input, a linear path past the latents, a second encoder that gates the first.
OPTIONAL_PARAMETERS = ("post_bias", "skip.weight", "glu.weight", "glu.bias")
# name -> (value where nothing is known, dtype). The dtype does not follow that of the weights:
# frequencies of 1e-8, which tell rare latents from dead ones, vanish in float16.
STATISTICS: dict[str, tuple[float, torch.dtype]] = {
    "stats_last_nonzero": (0, torch.int64),
    "latents_activation_frequency": (1, torch.float32),
    "latents_mean_square": (0, torch.float32),
}


def at_least_float32(tensor: Tensor) -> Tensor:
    """For folding factors in: in half precision their product would be rounded twice."""
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


def check_sizes(
    n_latents: int,
    n_inputs: int,
    activation: object,
    normalization: str,
    n_outputs: int | None = None,
) -> None:
    """Refuse sizes that no autoencoder has; ``n_outputs`` is None if there are as many as inputs."""
    sizes = {"n_latents": n_latents, "n_inputs": n_inputs}
    for name, value in (sizes if n_outputs is None else sizes | {"n_outputs": n_outputs}).items():
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise InputError(
                f"Autoencoder: {name} must be a whole number >= 1, found {shown(value)}."
            )
        if value >= 2**31:
            raise InputError(f"Autoencoder: {name} must be below 2**31, found {shown(value)}.")
    if normalization not in NORMALIZATIONS:
        raise InputError(unknown_normalization(normalization))
    if normalization == "layer_norm" and n_inputs < 2:
        raise InputError(
            "Autoencoder: layer_norm needs n_inputs >= 2: one number has no deviation."
        )
    if activation is not None and not isinstance(activation, nn.Module):
        raise InputError(
            f"Autoencoder: activation must be a module such as TopK(32), found {activation!r}."
        )
    if activation is not None:
        as_nonlinearity(activation).check(n_latents)


def read_group_sizes(sizes: Any, n_latents: int) -> tuple[int, ...] | None:
    """The sizes of Matryoshka groups, which have to add up to all latents; None for no groups."""
    if sizes is None:
        return None
    found = list(sizes) if isinstance(sizes, Sequence) and not isinstance(sizes, str) else [0]
    if any(type(size) is not int or size < 1 for size in found) or sum(found) != n_latents:
        raise InputError(
            f"Autoencoder: group_sizes must be whole numbers >= 1 that add up to the {n_latents} "
            f"latents, found {sizes!r}."
        )
    return tuple(found)


def unknown_normalization(value: Any) -> str:
    return (
        f"unknown input_normalization {value!r}.{did_you_mean(str(value), NORMALIZATIONS)} "
        f"Known: {', '.join(NORMALIZATIONS)}."
    )


class Entries(NamedTuple):
    """A state dict taken apart."""

    tensors: dict[str, Tensor]
    """Parameters and buffers by key."""
    activation: str
    activation_fields: dict[str, Any]
    tied: bool
    input_normalization: str | None
    """None: the file does not say."""
    n_outputs: int | None = None
    """The width of a transcoder's output; None for an autoencoder, whose output stands for its input."""
    group_sizes: tuple[int, ...] | None = None


def parse_state_dict(
    state_dict: Mapping[str, Any], strict: bool
) -> tuple[Entries, list[str], list[str]]:
    """Take a state dict apart; also returns what is wrong with it, and what is only worth a warning."""
    rest = {str(key): value for key, value in state_dict.items()}
    problems: list[str] = []
    name, fields = _pop_activation(rest, problems)
    tied = _pop_tied(rest, problems)
    normalization = rest.pop("input_normalization", None)
    if normalization is not None and not (
        isinstance(normalization, str) and normalization in NORMALIZATIONS
    ):
        problems.append(unknown_normalization(normalization))
    n_outputs, group_sizes = rest.pop("n_outputs", None), rest.pop("group_sizes", None)
    known = (*PARAMETERS, *OPTIONAL_PARAMETERS, *STATISTICS)
    tensors = {key: rest.pop(key) for key in known if key in rest}
    notes = [] if not rest else [f"unknown entries {', '.join(sorted(rest))}"]
    missing = [key for key in STATISTICS if key not in tensors]
    if missing:
        notes.append(f"missing statistics {', '.join(missing)}")
    if strict:
        problems, notes = problems + notes, []
    problems += _tensor_problems(tensors, tied, n_outputs)
    if not problems:
        shape = tensors["encoder.weight"].shape
        problems += _check_activation(name, fields, shape)
        try:
            group_sizes = read_group_sizes(group_sizes, shape[0])
        except InputError as error:
            problems.append(str(error))
    return (
        Entries(tensors, name, fields, tied, normalization, n_outputs, group_sizes),
        problems,
        notes,
    )


def _pop_activation(rest: dict[str, Any], problems: list[str]) -> tuple[str, dict[str, Any]]:
    """Name and fields of the nonlinearity, from ``activation_state_dict`` or from flat entries.

    The original wrote both for TopK; then they have to agree.
    """
    flat = {key: rest.pop(key) for key in list(rest) if key.startswith("activation.")}
    fields = {key.removeprefix("activation."): value for key, value in flat.items()}
    folded = rest.pop("activation_state_dict", {})
    name = rest.pop("activation", "ReLU")
    if not isinstance(folded, Mapping):
        problems.append(f"activation_state_dict is {shown(folded)}, expected a dict")
        folded = {}
    for key, value in folded.items():
        if not _same(fields.setdefault(key, value), value):
            problems.append(f"activation_state_dict and activation.{key} contradict each other")
    if not isinstance(name, str) or name not in ACTIVATIONS_CLASSES:
        problems.append(
            f"unknown latent activation {name!r}.{did_you_mean(str(name), ACTIVATIONS_CLASSES)} "
            f"Known: {', '.join(ACTIVATIONS_CLASSES)}"
        )
        name = "ReLU"
        fields = {}
    return name, fields


def _pop_tied(rest: dict[str, Any], problems: list[str]) -> bool:
    """Whether the decoder is the encoder's transpose, as stated or by the original's entry."""
    stated = rest.pop("tied", None)
    linear = rest.pop("decoder.linear.weight", None)
    if stated is not None and not isinstance(stated, bool):
        problems.append(f"tied is {shown(stated)}, expected True or False")
    tied = stated is True or (stated is None and linear is not None)
    if linear is not None and not _same(linear, rest.get("encoder.weight")):
        problems.append("decoder.linear.weight (a tied decoder) differs from encoder.weight")
    if tied and "decoder.weight" in rest:
        problems.append("tied, and yet there is a decoder.weight")
    return tied


def _tensor_problems(tensors: Mapping[str, Any], tied: bool, n_outputs: Any) -> list[str]:
    weight = tensors.get("encoder.weight")
    if not isinstance(weight, Tensor) or weight.ndim != 2:
        found = "missing" if weight is None else f"found {described(weight)}"
        return [f"encoder.weight: expected a matrix [l, n], {found}"]
    n_latents, n_inputs = weight.shape
    if n_outputs is not None and (type(n_outputs) is not int or n_outputs < 1):
        return [f"n_outputs is {n_outputs!r}, expected a whole number >= 1"]
    is_transcoder = n_outputs is not None
    n_outputs = n_outputs if is_transcoder else n_inputs
    optional: dict[str, Shape] = {
        "post_bias": (n_outputs,),
        "skip.weight": (n_outputs, n_inputs),
        "glu.weight": (n_latents, n_inputs),
        "glu.bias": (n_latents,),
        **dict.fromkeys(STATISTICS, (n_latents,)),
    }
    present = set(tensors)
    if is_transcoder:
        present.add("post_bias")
    if present & {"glu.weight", "glu.bias"}:
        present |= {"glu.weight", "glu.bias"}
    expected: dict[str, Shape] = {
        "encoder.weight": (n_latents, n_inputs),
        "latent_bias": (n_latents,),
        "pre_bias": (n_inputs,),
        **{name: shape for name, shape in optional.items() if name in present},
    }
    if not tied:
        expected["decoder.weight"] = (n_outputs, n_latents)
    problems = [f"{name}: {it}" for name, it in tensor_problems(tensors, expected, STATISTICS)]
    if not tied and "decoder.weight" not in tensors:
        problems.append("a tied decoder has to be marked: tied=True")
    return problems


def _check_activation(name: str, fields: dict[str, Any], shape: torch.Size) -> list[str]:
    tensors = {key: value for key, value in fields.items() if isinstance(value, Tensor)}
    found = {key: tuple(value.shape) for key, value in tensors.items()}
    integers = [key for key, value in tensors.items() if not value.is_floating_point()]
    problems = [f"{name}: {key}: {it}" for key, it in tensor_problems(tensors, found, integers)]
    if problems:
        return problems
    try:
        check_sizes(shape[0], shape[1], make_activation(name, fields), "none")
    except (CheckpointError, InputError) as error:
        return [str(error)]
    return []


def select_latents(state_dict: Mapping[str, Any], kept: Tensor) -> dict[str, Any]:
    """The state dict of the autoencoder that has only the latents ``kept`` (indices).

    A ``k`` larger than their number becomes their number. Matryoshka groups are dropped; a
    nonlinearity whose latents depend on one another is refused.
    """
    result = dict(state_dict)
    name, fields = result.get("activation", "ReLU"), result.get("activation_state_dict", {})
    fields = select_fields(name, fields, kept)
    result.pop("group_sizes", None)
    for key in ("latent_bias", "encoder.weight", "glu.weight", "glu.bias", *STATISTICS):
        if key in result:
            result[key] = result[key][kept]
    if "decoder.weight" in result:
        result["decoder.weight"] = result["decoder.weight"][:, kept]
    return result | {"activation_state_dict": fields}


def _same(a: Any, b: Any) -> bool:
    if a is b:
        return True
    if not (isinstance(a, Tensor) or isinstance(b, Tensor)):
        return bool(a == b)
    plain = all(isinstance(it, Tensor) and not not_plain(it) for it in (a, b))
    return plain and torch.equal(a, b)
