"""dictionary_learning: ``ae.pt``, a torch state dict, and ``config.json`` with the trainer's fields.

Seven classes, known by their keys; ``f`` latents, ``W`` and ``b`` of encoder (e) and decoder (d):

    AutoEncoder             f = relu(We (x - bias) + be)                 x̂ = Wd f + bias
    AutoEncoderNew          f = relu(We x + be)                          x̂ = Wd f + bd
    GatedAutoEncoder        u = We (x - bd); gate, magnitude of u        x̂ = Wd f + bd
    JumpReluAutoEncoder     f = jumprelu(x We + be)                      x̂ = f Wd + bd
    AutoEncoderTopK         f = topk(relu(We (x - bd) + be))             x̂ = Wd f + bd
    BatchTopKSAE            f = relu(…) where > threshold                x̂ = Wd f + bd
    MatryoshkaBatchTopKSAE  the same, transposed, in groups              x̂ = f Wd + bd

``AutoEncoder`` is the one class whose loader there moves the norms of the decoder's columns into the
encoder, which leaves the output and changes the latents; it is done here too unless it is switched
off. ``AutoEncoderTopK`` and ``BatchTopKSAE`` have the same keys: the config, or the caller, has to
say which it is.

As read in dictionary-learning 0.1.0: ``dictionary.py``, ``trainers/*.py``, ``utils.py``.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from neuron_explainer.errors import CheckpointError, InputError, did_you_mean
from neuron_explainer.models.checkpoints.autoencoders.common import (
    LoadedAutoencoder,
    Stated,
    check_tensors,
    fold_latent_scale,
    location_of,
    matrix_shape,
    read_text,
    settle,
    settle_location,
)
from neuron_explainer.models.checkpoints.autoencoders.export import (
    Exported,
    fold_latent_bias_into_gates,
    fold_pre_bias,
)
from neuron_explainer.models.checkpoints.problems import Shape

WEIGHTS_FILE, CONFIG_FILE = "ae.pt", "config.json"

_LINEAR = {"encoder.weight", "encoder.bias", "decoder.weight"}
_MATRICES = {"W_enc", "b_enc", "W_dec", "b_dec"}
_KEYS: dict[str, set[str]] = {
    "AutoEncoder": _LINEAR | {"bias"},
    "AutoEncoderNew": _LINEAR | {"decoder.bias"},
    "GatedAutoEncoder": {
        "encoder.weight",
        "decoder.weight",
        "decoder_bias",
        "r_mag",
        "gate_bias",
        "mag_bias",
    },
    "JumpReluAutoEncoder": _MATRICES | {"threshold"},
    "AutoEncoderTopK": _LINEAR | {"b_dec", "k", "threshold"},
    "BatchTopKSAE": _LINEAR | {"b_dec", "k", "threshold"},
    "MatryoshkaBatchTopKSAE": _MATRICES | {"k", "threshold", "group_sizes"},
}
_MAY_BE_MISSING = {"AutoEncoderTopK": {"k", "threshold"}, "BatchTopKSAE": {"k", "threshold"}}


def classes_with_keys(keys: set[str]) -> list[str]:
    """The classes whose state dicts have these keys."""
    return [
        name
        for name, known in _KEYS.items()
        if known - _MAY_BE_MISSING.get(name, set()) <= keys <= known
    ]


def read_dictionary_learning(
    where: str | Path, config: Mapping[str, Any] | None, tensors: Mapping[str, Any], stated: Stated
) -> LoadedAutoencoder:
    """From the content of ``ae.pt`` at ``where`` and of the ``config.json`` beside it, if any."""
    trainer = _trainer(where, config)
    name = _class(where, trainer, set(tensors), stated)
    shapes = _shapes(where, name, tensors)
    _check_config(where, trainer, tensors, name)
    check_tensors(
        where,
        tensors,
        shapes,
        integers=("k", "group_sizes"),
        why=f"Expected is what {name} has, in sizes that go with its encoder.",
    )
    state = _state(where, name, tensors, trainer, stated)
    metadata: dict[str, Any] = {"format": "dictionary_learning", "dict_class": name}
    if config is not None:
        metadata["config"] = dict(config)
    buffer = (config or {}).get("buffer")
    transcoder = isinstance(buffer, dict) and buffer.get("io") == "in_and_out"
    if transcoder or stated.get("output_location") is not None:
        state.setdefault("post_bias", state["pre_bias"])
        state["n_outputs"] = len(state["pre_bias"])
    location = location_of(trainer.get("submodule_name"))
    return LoadedAutoencoder(
        state,
        settle(
            where,
            "this format",
            "none",
            stated.get("input_normalization"),
            "input_normalization",
        ),
        settle_location(where, location, stated.get("location")),
        settle_location(where, None, stated.get("output_location")),
        read_text(trainer, "lm_name"),
        metadata,
    )


def _trainer(where: str | Path, config: Mapping[str, Any] | None) -> Mapping[str, Any]:
    """The trainer's fields; none for the configs of early versions, which had no such part."""
    trainer = (config or {}).get("trainer", {})
    if not isinstance(trainer, dict):
        raise CheckpointError(
            f"{where}: {CONFIG_FILE} beside it: trainer: expected an object, found {trainer!r}."
        )
    return trainer


def _class(where: str | Path, trainer: Mapping[str, Any], keys: set[str], stated: Stated) -> str:
    said = trainer.get("dict_class")
    given = stated.get("dict_class")
    for name in (said, given):
        if name is not None and name not in _KEYS:
            raise CheckpointError(
                f"{where}: dict_class: expected one of {', '.join(_KEYS)}, found {name!r}."
                f"{did_you_mean(str(name), _KEYS)}"
            )
    name = settle(where, CONFIG_FILE, said, given, "dict_class")
    if name is not None:
        return str(name)
    possible = classes_with_keys(keys)
    if len(possible) == 1:
        return possible[0]
    if not possible:
        raise CheckpointError(
            f"{where}: the keys are those of no class of dictionary_learning, found "
            f"{', '.join(sorted(keys))}."
        )
    raise CheckpointError(
        f"{where}: the keys are those of {' and of '.join(possible)}, whose latents differ, and no "
        f"{CONFIG_FILE} says which it is. Expected dict_class as an argument, "
        f"`Autoencoder.load(source, dict_class={possible[0]!r})`."
    )


def _shapes(where: str | Path, name: str, tensors: Mapping[str, Any]) -> dict[str, Shape]:
    if "W_enc" in _KEYS[name]:
        d, f = matrix_shape(where, tensors, "W_enc")
    else:
        f, d = matrix_shape(where, tensors, "encoder.weight")
    every: dict[str, Shape] = {
        "bias": (d,),
        "decoder.bias": (d,),
        "decoder_bias": (d,),
        "b_dec": (d,),
        "encoder.weight": (f, d),
        "decoder.weight": (d, f),
        "W_enc": (d, f),
        "W_dec": (f, d),
        "k": (),
    }
    shapes = {key: every.get(key, (f,)) for key in _KEYS[name]}
    if name in ("AutoEncoderTopK", "BatchTopKSAE", "MatryoshkaBatchTopKSAE"):
        shapes["threshold"] = ()
    if "group_sizes" in shapes:
        groups = tensors.get("group_sizes")
        shapes["group_sizes"] = (groups.numel(),) if isinstance(groups, Tensor) else (1,)
    missing = _MAY_BE_MISSING.get(name, set()) - set(tensors)
    return {key: shape for key, shape in shapes.items() if key not in missing}


def _check_config(
    where: str | Path, trainer: Mapping[str, Any], tensors: Mapping[str, Any], name: str
) -> None:
    """The sizes that the config states are those of the tensors."""
    if "W_enc" in _KEYS[name]:
        d, f = matrix_shape(where, tensors, "W_enc")
    else:
        f, d = matrix_shape(where, tensors, "encoder.weight")
    facts: dict[str, Any] = {"activation_dim": d, "dict_size": f}
    k = tensors.get("k")
    if isinstance(k, Tensor) and k.numel() == 1:
        facts["k"] = int(k)
    wrong = [
        f"{key}: expected {value} as in {WEIGHTS_FILE}, found {trainer[key]!r}"
        for key, value in facts.items()
        if trainer.get(key) is not None and trainer[key] != value
    ]
    if wrong:
        raise CheckpointError(f"{where}: {CONFIG_FILE} beside it: {'; '.join(wrong)}.")


def _state(
    where: str | Path,
    name: str,
    tensors: Mapping[str, Tensor],
    trainer: Mapping[str, Any],
    stated: Stated,
) -> dict[str, Any]:
    for setting, classes in _SETTINGS.items():
        if stated.get(setting) is not None and name not in classes:
            raise InputError(
                f"{where}: is of the class {name}, which has no {setting}; that is for "
                f"{', '.join(sorted(classes))}."
            )
    turned = "W_enc" in tensors
    encoder = tensors["W_enc"].T if turned else tensors["encoder.weight"]
    zeros = encoder.new_zeros(encoder.shape[0])
    state: dict[str, Any] = {
        "encoder.weight": encoder,
        "decoder.weight": tensors["W_dec"].T if turned else tensors["decoder.weight"],
        "latent_bias": tensors.get("encoder.bias", tensors.get("b_enc", zeros)),
    }
    if name in ("AutoEncoderNew", "JumpReluAutoEncoder"):  # nothing is taken off the input
        state["post_bias"] = tensors["decoder.bias" if name == "AutoEncoderNew" else "b_dec"]
        state["pre_bias"] = state["post_bias"].new_zeros(encoder.shape[1])
    else:
        bias = {"AutoEncoder": "bias", "GatedAutoEncoder": "decoder_bias"}.get(name, "b_dec")
        state["pre_bias"] = tensors[bias]
    state |= _activation(where, name, tensors, trainer, stated)
    if name == "AutoEncoder" and stated.get("normalize_decoder", True):
        norms = state["decoder.weight"].float().norm(dim=0)
        if not torch.allclose(norms, torch.ones_like(norms)):  # the condition of its loader
            fold_latent_scale(state, norms, decoder_too=True)
    return state


_SETTINGS = {
    "k": {"AutoEncoderTopK", "BatchTopKSAE"},
    "threshold": {"BatchTopKSAE", "MatryoshkaBatchTopKSAE"},
    "normalize_decoder": {"AutoEncoder"},
}


def _activation(
    where: str | Path,
    name: str,
    tensors: Mapping[str, Tensor],
    trainer: Mapping[str, Any],
    stated: Stated,
) -> dict[str, Any]:
    fields: dict[str, Any] = {}
    if name == "GatedAutoEncoder":
        fields = {
            "b_gate": tensors["gate_bias"],
            "r_mag": tensors["r_mag"],
            "b_mag": tensors["mag_bias"],
        }
        return {"activation": "Gated", "activation_state_dict": fields}
    if name == "JumpReluAutoEncoder":
        fields = {"threshold": tensors["threshold"]}
        return {"activation": "JumpReLU", "activation_state_dict": fields}
    if name in ("AutoEncoder", "AutoEncoderNew"):
        return {"activation": "ReLU", "activation_state_dict": fields}
    k = _k(where, tensors, trainer, stated)
    if name == "AutoEncoderTopK":
        fields = {"k": k, "postact_fn": "ReLU"}
        return {"activation": "TopK", "activation_state_dict": fields}
    fields = {"threshold": _threshold(where, tensors, stated), "k": k}
    result: dict[str, Any] = {"activation": "BatchTopK", "activation_state_dict": fields}
    if "group_sizes" in tensors:
        result["group_sizes"] = tensors["group_sizes"].tolist()
    return result


def _k(
    where: str | Path, tensors: Mapping[str, Tensor], trainer: Mapping[str, Any], stated: Stated
) -> int:
    found = int(tensors["k"]) if "k" in tensors else trainer.get("k")
    k = settle(where, "the file", found, stated.get("k"), "k")
    if k is None:
        raise CheckpointError(
            f"{where}: k: expected a whole number, found none in the file or in {CONFIG_FILE}; give it: "
            "`Autoencoder.load(source, k=…)`."
        )
    return k  # type: ignore[no-any-return]  # judged with the activation


def _threshold(where: str | Path, tensors: Mapping[str, Tensor], stated: Stated) -> Tensor:
    """-1 is what the training starts from: after it, that library applies a plain ReLU."""
    known = tensors.get("threshold")
    if known is not None and float(known) >= 0:
        settle(where, "the file", float(known), stated.get("threshold"), "threshold")
        return known
    given = stated.get("threshold")
    if given is None:
        raise CheckpointError(
            f"{where}: threshold: expected a number >= 0, found "
            f"{'none' if known is None else float(known)}: training ended before it was known. Give "
            "it, `Autoencoder.load(source, threshold=…)`; 0.0 keeps every positive latent, as "
            "dictionary_learning does then."
        )
    return torch.tensor(float(given))


# ---- writing -------------------------------------------------------------------------------------


def export_dictionary_learning(it: Exported) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Config and state dict of a folder that ``load_dictionary`` reads.

    Which class follows from the activation and from whether the output has a bias of its own. A
    transcoder is written where its bias can be; ``io`` in the config says that it is one.
    """
    it.refuse_parts("glu", "skip")
    if it.input_normalization != "none":
        it.refuse(f"input_normalization {it.input_normalization!r}")
    if it.is_transcoder and it.decoder_weight.shape[0] != it.n_inputs:
        it.refuse("a transcoder whose input and output differ in width")
    name, tensors, fields = _export(it)
    trainer = {
        "dict_class": name,
        "trainer_class": None,
        "activation_dim": it.n_inputs,
        "dict_size": it.n_latents,
        "layer": None if it.location is None else it.location.layer,
        "lm_name": it.model_name,
        "submodule_name": None if it.location is None else str(it.location),
        **fields,
    }
    return {
        "trainer": trainer,
        "buffer": {"io": "in_and_out" if it.is_transcoder else "out", "d_submodule": it.n_inputs},
    }, tensors


def _export(it: Exported) -> tuple[str, dict[str, Tensor], dict[str, Any]]:
    """Class, state dict, and fields of the trainer."""
    name = it.activation
    own_bias = it.has("post_bias")
    if name == "ReLU":
        return _export_relu(it, own_bias)
    if name == "JumpReLU":
        return _export_jumprelu(it)
    state = it.state_dict
    if own_bias:
        it.refuse(f"{name} with an output bias that is not that of the input")
    linear = {"encoder.weight": state["encoder.weight"], "decoder.weight": it.decoder_weight}
    fields = it.activation_fields
    if name == "Gated":
        gates = fold_latent_bias_into_gates(state["latent_bias"], fields)
        tensors = {
            "decoder_bias": state["pre_bias"],
            "r_mag": gates["r_mag"],
            "gate_bias": gates["b_gate"],
            "mag_bias": gates["b_mag"],
        }
        return "GatedAutoEncoder", linear | tensors, {}
    if name not in ("TopK", "BatchTopK") or fields.get("postact_fn", "ReLU") != "ReLU":
        it.refuse(f"the activation {name}")
    if fields["k"] is None:
        it.refuse("a BatchTopK whose k is not known")
    threshold = fields["threshold"].float() if name == "BatchTopK" else torch.tensor(-1.0)
    if name == "BatchTopK" and threshold < 0:
        it.refuse("a threshold below zero: it stands for one that is not known")
    shared = {"k": torch.tensor(fields["k"], dtype=torch.int32), "threshold": threshold}
    if it.group_sizes is not None and name == "BatchTopK":
        tensors = _matrices(it, state) | shared
        tensors["group_sizes"] = torch.tensor(it.group_sizes)
        return "MatryoshkaBatchTopKSAE", tensors, {"k": fields["k"]}
    if it.group_sizes is not None:
        it.refuse("Matryoshka groups with TopK")
    biases = {"encoder.bias": state["latent_bias"], "b_dec": state["pre_bias"]}
    kind = "AutoEncoderTopK" if name == "TopK" else "BatchTopKSAE"
    return kind, linear | biases | shared, {"k": fields["k"]}


def _export_relu(it: Exported, own_bias: bool) -> tuple[str, dict[str, Tensor], dict[str, Any]]:
    _refuse_groups(it)
    state = fold_pre_bias(it.state_dict) if own_bias else it.state_dict
    tensors = {
        "encoder.weight": state["encoder.weight"],
        "encoder.bias": state["latent_bias"],
        "decoder.weight": it.decoder_weight,
    }
    if own_bias:
        return "AutoEncoderNew", tensors | {"decoder.bias": state["post_bias"]}, {}
    # The loader there would scale latents by the norms of the decoder's columns.
    norms = it.decoder_weight.float().norm(dim=0)
    if not torch.allclose(norms, torch.ones_like(norms)):
        state = fold_pre_bias(state)
        tensors["encoder.bias"] = state["latent_bias"]
        return "AutoEncoderNew", tensors | {"decoder.bias": it.state_dict["pre_bias"]}, {}
    return "AutoEncoder", tensors | {"bias": state["pre_bias"]}, {}


def _export_jumprelu(it: Exported) -> tuple[str, dict[str, Tensor], dict[str, Any]]:
    _refuse_groups(it)
    bias = it.state_dict.get("post_bias", it.state_dict["pre_bias"])
    tensors = _matrices(it, fold_pre_bias(it.state_dict)) | {
        "b_dec": bias,
        "threshold": it.activation_fields["threshold"],
    }
    return "JumpReluAutoEncoder", tensors, {}


def _refuse_groups(it: Exported) -> None:
    if it.group_sizes is not None:
        it.refuse(f"Matryoshka groups with {it.activation}")


def _matrices(it: Exported, state: Mapping[str, Any]) -> dict[str, Tensor]:
    return {
        "W_enc": state["encoder.weight"].T,
        "b_enc": state["latent_bias"],
        "W_dec": it.decoder_weight.T,
        "b_dec": state["pre_bias"],
    }
