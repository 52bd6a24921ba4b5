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
encoder, which keeps the output and changes the latents; that is done here too unless it is switched
off. ``AutoEncoderTopK`` and ``BatchTopKSAE`` have the same keys: the config, or the caller, has to
say which it is.

As read in dictionary-learning 0.1.0: ``dictionary.py``, ``trainers/*.py``, ``utils.py``.
"""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from neuron_explainer.errors import CheckpointError, InputError, did_you_mean
from neuron_explainer.models.checkpoints.autoencoders.common import (
    check_facts,
    check_layout,
    fold_latent_bias_into_gates,
    fold_latent_scale,
    fold_pre_bias,
    location_of,
    parameters,
    read_layout,
    read_text,
)
from neuron_explainer.models.checkpoints.autoencoders.format import (
    Content,
    Exported,
    Format,
    LoadedAutoencoder,
    Source,
    Stated,
    loaded,
    settle,
)
from neuron_explainer.models.locations import ActivationLocation

WEIGHTS_FILE, CONFIG_FILE = "ae.pt", "config.json"

_LINEAR = "encoder.weight [l, n]  encoder.bias [l]  decoder.weight [n, l]"
_MATRICES = "W_enc [n, l]  b_enc [l]  W_dec [l, n]  b_dec [n]"
_GATES = "r_mag [l]  gate_bias [l]  mag_bias [l]"
_LAYOUTS = {
    "AutoEncoder": f"{_LINEAR}  bias [n]",
    "AutoEncoderNew": f"{_LINEAR}  decoder.bias [n]",
    "GatedAutoEncoder": f"encoder.weight [l, n]  decoder.weight [n, l]  decoder_bias [n]  {_GATES}",
    "JumpReluAutoEncoder": f"{_MATRICES}  threshold [l]",
    "AutoEncoderTopK": f"{_LINEAR}  b_dec [n]  k []?  threshold []?",
    "BatchTopKSAE": f"{_LINEAR}  b_dec [n]  k []?  threshold []?",
    "MatryoshkaBatchTopKSAE": f"{_MATRICES}  k []  threshold []  group_sizes [groups]",
}
# The classes that a statement is for.
_SETTINGS = {
    "k": {"AutoEncoderTopK", "BatchTopKSAE"},
    "threshold": {"BatchTopKSAE", "MatryoshkaBatchTopKSAE"},
    "normalize_decoder": {"AutoEncoder"},
}


def classes_with_keys(keys: set[str]) -> list[str]:
    """The classes whose state dicts have these keys."""
    found = []
    for name, layout in _LAYOUTS.items():
        parts = {key: optional for key, _, optional in read_layout(layout)}
        if {key for key in parts if not parts[key]} <= keys <= parts.keys():
            found.append(name)
    return found


def read(source: Source, stated: Stated) -> LoadedAutoencoder:
    """Read ``ae.pt`` and the ``config.json`` beside it, if there is one."""
    where, tensors = source.weights(WEIGHTS_FILE)
    config = source.json_if_any(CONFIG_FILE)
    trainer = _trainer(where, config)
    name = _class(where, trainer, set(tensors), stated)
    k = tensors.get("k")
    if isinstance(k, Tensor) and (k.ndim or k.is_floating_point() or k.is_complex()):
        dtype = str(k.dtype).removeprefix("torch.")
        raise CheckpointError(
            f"{where}: k: expected a whole number, found {dtype} {list(k.shape)}."
        )
    sizes = check_layout(
        where,
        tensors,
        _LAYOUTS[name],
        integers=("k", "group_sizes"),
        why=f"Expected is what {name} has, in sizes that go with its encoder.",
    )
    facts: dict[str, Any] = {"activation_dim": sizes["n"], "dict_size": sizes["l"]}
    if isinstance(k, Tensor):
        facts["k"] = int(k)
    check_facts(f"{where}: {CONFIG_FILE} beside it", trainer, facts, WEIGHTS_FILE)
    state = _state(where, name, tensors, trainer, stated)
    metadata: dict[str, Any] = {"format": "dictionary_learning", "dict_class": name}
    if config is not None:
        metadata["config"] = dict(config)
    buffer = (config or {}).get("buffer")
    io = buffer.get("io") if isinstance(buffer, dict) else "out"
    model_name = read_text(trainer, "lm_name")
    location, output_location = _locations(trainer.get("submodule_name"), io, model_name)
    if io == "in_and_out" or stated.get("output_location") is not None:
        state.setdefault("post_bias", state["pre_bias"])
        state["n_outputs"] = len(state["pre_bias"])
    return loaded(
        where,
        stated,
        state,
        location=location,
        output_location=output_location,
        model_name=model_name,
        metadata=metadata,
    )


# Below a layer's module: what a part reads and what it adds to the stream. Only for models in which no norm
# and no sum stands between a part and the stream: a name alone does not say it (in Gemma 2 and OLMo 2 a norm
# follows ``model.layers.3.mlp``, and BLOOM's ``transformer.h.3.mlp`` returns the stream).
_MLP = ("resid.torso.post_ln_mlp", "resid.torso.delta_mlp")
_ATTENTION = ("resid.torso.post_ln_attn", "resid.torso.delta_attn")
_PARTS = {
    "gpt_neox.layers": {"mlp": _MLP, "attention": _ATTENTION},
    "transformer.h": {"mlp": _MLP, "attn": _ATTENTION},
}
_SUBMODULE = re.compile(
    r"\.?(gpt_neox\.layers|transformer\.h|model\.layers)(?:\.|\[)([0-9]{1,9})\]?(?:\.(\w+))?"
)


def _locations(
    name: Any, io: Any, model_name: str | None
) -> tuple[ActivationLocation | None, ActivationLocation | None]:
    """What the name of a submodule means: where the inputs come from, and a transcoder's outputs.

    ``resid_post_layer_3`` is the name that the library's own script gives to a layer's output. A path
    such as ``gpt_neox.layers.3.mlp`` is that of the module whose input or output (``io``) was read.
    A name that is not known to mean one place here means none.
    """
    name = str(name)
    if (found := re.fullmatch("resid_post_layer_([0-9]{1,9})", name)) and io == "out":
        return ActivationLocation("resid.torso.post_mlp", int(found[1])), None
    if not (found := _SUBMODULE.fullmatch(name)):
        return location_of(name), None
    layers, layer, part = found[1], int(found[2]), found[3]
    if part is None:
        before = location_of(f"blocks.{layer}.hook_resid_pre")
        reads, writes = before, ActivationLocation("resid.torso.post_mlp", layer)
    elif part in _PARTS.get(layers, {}) and (
        layers != "transformer.h" or "gpt2" in str(model_name)
    ):
        reads, writes = (ActivationLocation(path, layer) for path in _PARTS[layers][part])
    else:
        return None, None
    return {"in": (reads, None), "out": (writes, None), "in_and_out": (reads, writes)}.get(
        str(io), (None, None)
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
    said, given = trainer.get("dict_class"), stated.get("dict_class")
    for name in (said, given):
        if name is not None and not (isinstance(name, str) and name in _LAYOUTS):
            raise CheckpointError(
                f"{where}: dict_class: expected one of {', '.join(_LAYOUTS)}, found {name!r}."
                f"{did_you_mean(str(name), _LAYOUTS)}"
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
        f"`Autoencoder.load(source, dict_class={possible[0]!r})`, in the shell "
        f"`--dict-class {possible[0]}`."
    )


def _state(
    where: str | Path, name: str, tensors: Content, trainer: Mapping[str, Any], stated: Stated
) -> dict[str, Any]:
    for setting, classes in _SETTINGS.items():
        if stated.get(setting) is not None and name not in classes:
            raise InputError(
                f"{where}: is of the class {name}, which has no {setting}; that is for "
                f"{', '.join(sorted(classes))}."
            )
    turned = "W_enc" in tensors
    bias = {
        "AutoEncoder": "bias",
        "AutoEncoderNew": "decoder.bias",
        "GatedAutoEncoder": "decoder_bias",
    }.get(name, "b_dec")
    bare = name in ("AutoEncoderNew", "JumpReluAutoEncoder")  # nothing is subtracted from the input
    nonlinearity, fields = _nonlinearity(where, name, tensors, trainer, stated)
    state = parameters(
        tensors["W_enc"].T if turned else tensors["encoder.weight"],
        tensors["W_dec"].T if turned else tensors["decoder.weight"],
        tensors.get("encoder.bias", tensors.get("b_enc")),
        pre_bias=None if bare else tensors[bias],
        post_bias=tensors[bias] if bare else None,
        nonlinearity=nonlinearity,
        **fields,
    )
    if "group_sizes" in tensors:
        state["group_sizes"] = tensors["group_sizes"].tolist()
    if name == "AutoEncoder" and stated.get("normalize_decoder", True):
        norms = state["decoder.weight"].float().norm(dim=0)
        if not torch.allclose(norms, torch.ones_like(norms)):  # the condition of its loader
            fold_latent_scale(state, norms, decoder_too=True)
    return state


def _nonlinearity(
    where: str | Path, name: str, tensors: Content, trainer: Mapping[str, Any], stated: Stated
) -> tuple[str, dict[str, Any]]:
    """The nonlinearity of a class: its name here, and its fields."""
    if name == "GatedAutoEncoder":
        renamed = {"b_gate": "gate_bias", "r_mag": "r_mag", "b_mag": "mag_bias"}
        return "Gated", {ours: tensors[theirs] for ours, theirs in renamed.items()}
    if name == "JumpReluAutoEncoder":
        return "JumpReLU", {"threshold": tensors["threshold"]}
    if name in ("AutoEncoder", "AutoEncoderNew"):
        return "ReLU", {}
    k = _k(where, tensors, trainer, stated)
    if name == "AutoEncoderTopK":
        return "TopK", {"k": k, "postact_fn": "ReLU"}
    return "BatchTopK", {"threshold": _threshold(where, tensors, stated), "k": k}


def _k(where: str | Path, tensors: Content, trainer: Mapping[str, Any], stated: Stated) -> int:
    found = int(tensors["k"]) if "k" in tensors else trainer.get("k")
    k = settle(where, "the file", found, stated.get("k"), "k")
    if k is None:
        raise CheckpointError(
            f"{where}: k: expected a whole number, found none in the file or in {CONFIG_FILE}; give it: "
            "`Autoencoder.load(source, k=…)`, in the shell `--k …`."
        )
    return k  # type: ignore[no-any-return]  # judged with the nonlinearity


def _threshold(where: str | Path, tensors: Content, stated: Stated) -> Tensor:
    """-1 is what training starts from: where it is left, that library applies a plain ReLU."""
    known = tensors.get("threshold")
    if known is not None and float(known) >= 0:
        settle(where, "the file", float(known), stated.get("threshold"), "threshold")
        return known  # type: ignore[no-any-return]  # checked to be a tensor
    given = stated.get("threshold")
    if given is None:
        raise CheckpointError(
            f"{where}: threshold: expected a number >= 0, found "
            f"{'none' if known is None else float(known)}: training ended before it was known. Give "
            "it, `Autoencoder.load(source, threshold=…)`, in the shell `--threshold …`; 0.0 keeps "
            "every positive latent, as dictionary_learning does then."
        )
    return torch.tensor(float(given))


# ---- writing -------------------------------------------------------------------------------------


def write(it: Exported) -> dict[str, dict[str, Any]]:
    """The files of a folder that ``load_dictionary`` reads.

    Which class follows from the nonlinearity and from whether the output has a bias of its own. A
    transcoder is written where its bias can be; ``io`` in the config says that it is one.
    """
    it.refuse_parts("glu", "skip")
    it.refuse_normalization()
    it.refuse_width()
    name, tensors = _export(it)
    trainer = {
        "dict_class": name,
        "trainer_class": None,
        "activation_dim": it.n_inputs,
        "dict_size": it.n_latents,
        "layer": None if it.location is None else it.location.layer,
        "lm_name": it.model_name,
        "submodule_name": None if it.location is None else str(it.location),
    }
    if "k" in tensors:
        trainer["k"] = int(tensors["k"])
    buffer = {"io": "in_and_out" if it.is_transcoder else "out", "d_submodule": it.n_inputs}
    return {CONFIG_FILE: {"trainer": trainer, "buffer": buffer}, WEIGHTS_FILE: tensors}


def _export(it: Exported) -> tuple[str, dict[str, Tensor]]:
    """Class and state dict."""
    name = it.nonlinearity
    if name != "BatchTopK":
        it.refuse_groups()
    if name == "ReLU":
        return _export_relu(it)
    if name == "JumpReLU":
        bias = it.state_dict.get("post_bias", it.state_dict["pre_bias"])
        own = {"b_dec": bias, "threshold": it.fields["threshold"]}
        return "JumpReluAutoEncoder", _matrices(it, fold_pre_bias(it.state_dict)) | own
    if it.has("post_bias"):
        it.refuse(f"{name} with an output bias that is not that of the input")
    if name == "Gated":
        gates = fold_latent_bias_into_gates(it.state_dict["latent_bias"], it.fields)
        return "GatedAutoEncoder", {
            "encoder.weight": it.state_dict["encoder.weight"],
            "decoder.weight": it.decoder_weight,
            "decoder_bias": it.state_dict["pre_bias"],
            "r_mag": gates["r_mag"],
            "gate_bias": gates["b_gate"],
            "mag_bias": gates["b_mag"],
        }
    return _export_top_k(it)


def _export_top_k(it: Exported) -> tuple[str, dict[str, Tensor]]:
    name, fields = it.nonlinearity, it.fields
    if name not in ("TopK", "BatchTopK") or fields.get("postact_fn", "ReLU") != "ReLU":
        it.refuse(f"the nonlinearity {name}")
    if fields["k"] is None:
        it.refuse("a BatchTopK whose k is not known")
    threshold = fields["threshold"].float() if name == "BatchTopK" else torch.tensor(-1.0)
    if name == "BatchTopK" and threshold < 0:
        it.refuse("a threshold below zero: it stands for one that is not known")
    shared = {"k": torch.tensor(fields["k"], dtype=torch.int32), "threshold": threshold}
    if it.group_sizes is not None:
        groups = {"group_sizes": torch.tensor(it.group_sizes)}
        return "MatryoshkaBatchTopKSAE", _matrices(it, it.state_dict) | shared | groups
    kind = "AutoEncoderTopK" if name == "TopK" else "BatchTopKSAE"
    return kind, _linear(it, it.state_dict) | {"b_dec": it.state_dict["pre_bias"]} | shared


def _export_relu(it: Exported) -> tuple[str, dict[str, Tensor]]:
    norms = it.decoder_weight.float().norm(dim=0)
    # AutoEncoder's loader would scale latents by the norms of the decoder's columns.
    if it.has("post_bias") or not torch.allclose(norms, torch.ones_like(norms)):
        bias = it.state_dict.get("post_bias", it.state_dict["pre_bias"])
        return "AutoEncoderNew", _linear(it, fold_pre_bias(it.state_dict)) | {"decoder.bias": bias}
    return "AutoEncoder", _linear(it, it.state_dict) | {"bias": it.state_dict["pre_bias"]}


def _linear(it: Exported, state: Mapping[str, Any]) -> dict[str, Tensor]:
    return {
        "encoder.weight": state["encoder.weight"],
        "encoder.bias": state["latent_bias"],
        "decoder.weight": it.decoder_weight,
    }


def _matrices(it: Exported, state: Mapping[str, Any]) -> dict[str, Tensor]:
    return {
        "W_enc": state["encoder.weight"].T,
        "b_enc": state["latent_bias"],
        "W_dec": it.decoder_weight.T,
        "b_dec": state["pre_bias"],
    }


DICTIONARY_LEARNING = Format(
    name="dictionary_learning",
    layout=f"{WEIGHTS_FILE} (dictionary_learning)",
    read=read,
    states=frozenset({"output_location", "k", "threshold", "dict_class", "normalize_decoder"}),
    marks=(WEIGHTS_FILE,),
    configs={CONFIG_FILE: lambda config: "trainer" in config},
    holds={"torch": lambda content: bool(classes_with_keys(set(content)))},
    write=write,
)
