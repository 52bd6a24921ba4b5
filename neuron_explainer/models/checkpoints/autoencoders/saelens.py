"""SAELens: a folder with ``cfg.json``, ``sae_weights.safetensors``, perhaps ``sparsity.safetensors``.

    W_enc [n, l]   W_dec [l, o]   b_enc [l] (not gated)   b_dec [o]
    threshold [l] (jumprelu)      b_gate, r_mag, b_mag [l] (gated)      W_skip [o, n] (skip)

``apply_b_dec_to_input`` says whether ``b_dec`` is also subtracted from the input, after normalisation.
``normalize_activations``: ``layer_norm`` is that of OpenAI, ``constant_norm_rescale`` is ``"rms"``
here, and ``expected_average_only_in`` is one factor that is *not in the folder*: it has to be stated
and is folded in. ``rescale_acts_by_decoder_norm`` chooses the top k among latents times the length of
their directions; it is folded in last, as SAELens applies it to the decoder that it has then. Before
version 6 the config was flat, with other names.

As read in sae-lens 6.54.12: ``saes/*.py`` and ``loading/pretrained_sae_loaders.py``.
"""

import logging
from collections.abc import Mapping
from functools import reduce
from typing import Any

import torch
from torch import Tensor

from neuron_explainer import files
from neuron_explainer.errors import CheckpointError, SourceError
from neuron_explainer.models.checkpoints.autoencoders.common import (
    check_factor,
    check_tensors,
    check_unknown_fields,
    fold_latent_bias_into_gates,
    fold_latent_scale,
    fold_norm_factor,
    fold_pre_bias,
    is_on_the_stream,
    location_of,
    parameters,
    read_choice,
    read_flag,
    read_size,
    read_text,
    refuse_scaled_latents,
)
from neuron_explainer.models.checkpoints.autoencoders.format import (
    Content,
    Exported,
    Format,
    LoadedAutoencoder,
    Source,
    Stated,
    loaded,
    read_content,
    settle_location,
)
from neuron_explainer.models.checkpoints.autoencoders.state import InputNormalization
from neuron_explainer.models.checkpoints.problems import Shape
from neuron_explainer.models.locations import ActivationLocation

logger = logging.getLogger(__name__)

CONFIG_FILE, WEIGHTS_FILE = "cfg.json", "sae_weights.safetensors"
SPARSITY_FILE = "sparsity.safetensors"
# What every version from 6 on reads alike.
_VERSION = "6.0.0"

_RENAMED = {
    "hook_point": "hook_name",
    "hook_point_head_index": "hook_head_index",
    "hook_point_layer": "hook_layer",
    "activation_fn_str": "activation_fn",
}
_KNOWN = {
    "architecture",
    "d_in",
    "d_sae",
    "d_out",
    "k",
    "apply_b_dec_to_input",
    "normalize_activations",
    "rescale_acts_by_decoder_norm",
    "reshape_activations",
    "activation_fn",
    "activation_fn_kwargs",
    "finetuning_scaling_factor",
}
_HARMLESS = {
    "metadata",
    "mse_loss_normalization",
    "normalize_sae_decoder",
    "noise_scale",
    "scale_sparsity_penalty_by_decoder_norm",
    "b_dec_init_method",
    "decoder_bias_init_method",
    "decoder_heuristic_init",
    "decoder_heuristic_init_norm",
    "decoder_init_norm",
    "decoder_orthogonal_init",
    "init_encoder_as_decoder_transpose",
    "lp_norm",
    "dead_feature_threshold",
    "dead_feature_estimation_method",
    "jumprelu_init_threshold",
    "finetuning_method",
    "use_cached_activations",
    "cached_activations_path",
    "n_batches_in_buffer",
    "training_tokens",
    "model_from_pretrained_kwargs",
    "dtype",
    "n_batches_for_norm_estimate",
    "jumprelu_tanh_scale",
    "topk_threshold_lr",
    "feature_reinit_scale",
    "resample_scale",
    "device",
}
_ARCHITECTURES = (
    "standard",
    "topk",
    "jumprelu",
    "gated",
    "transcoder",
    "skip_transcoder",
    "jumprelu_transcoder",
    "jumprelu_skip_transcoder",
)
# Architectures of SAELens that cannot be an Autoencoder, and why.
_NOT_READ = {
    "abstopk": "it keeps the k latents that are largest in magnitude, of either sign",
    "matching_pursuit": "it finds latents one after the other, by what is left of the input",
    "temporal": "its latents also depend on the tokens before, through attention",
}
_NORMALIZATIONS: dict[str, InputNormalization] = {
    "none": "none",
    "layer_norm": "layer_norm",
    "constant_norm_rescale": "rms",
    "expected_average_only_in": "none",  # once its factor is folded in
}


def read(source: Source, stated: Stated) -> LoadedAutoencoder:
    """Read a folder of this format."""
    where = source.path
    config, cfg_file = source.json(CONFIG_FILE), f"{where}/{CONFIG_FILE}"
    cfg = _flat(config)
    cfg["architecture"] = _architecture(cfg_file, cfg, old="metadata" not in config)
    check_unknown_fields(cfg_file, cfg, _KNOWN, _HARMLESS | _metadata_names(config))
    weights_file, tensors = source.weights(WEIGHTS_FILE)
    ones = "scaling_factor" in tensors
    tensors = refuse_scaled_latents(weights_file, tensors)
    if cfg.get("finetuning_scaling_factor") and not ones:
        raise CheckpointError(
            f"{cfg_file}: finetuning_scaling_factor: expected false, found true: latents scaled by "
            "fine-tuning cannot be applied."
        )
    check_tensors(
        weights_file,
        tensors,
        _shapes(cfg_file, cfg),
        why=f"Expected is what architecture {cfg['architecture']!r} and the sizes in {CONFIG_FILE} ask "
        "for.",
    )
    state = _state(cfg_file, cfg, tensors)
    normalization = _normalization(cfg_file, cfg, state, stated)
    _fold_decoder_norm(cfg_file, cfg, state)
    metadata: dict[str, Any] = {"format": "saelens", "cfg": dict(config)}
    if stated.get("norm_factor") is not None:
        metadata["norm_factor"] = stated["norm_factor"]
    # The activations of a single head have no location here.
    hook = None if cfg.get("hook_head_index") is not None else cfg.get("hook_name")
    location = settle_location(cfg_file, location_of(hook), stated.get("location"))
    given = stated.get("input_normalization")
    found = loaded(
        cfg_file,
        stated,
        state,
        said_by="the file",
        input_normalization=_centred(cfg_file, cfg, normalization, location, given),
        location=location,
        output_location=location_of(cfg.get("hook_name_out")),
        model_name=read_text(cfg, "model_name"),
        metadata=metadata,
    )
    _add_sparsity(source, found)
    return found


def _centred(
    cfg_file: str,
    cfg: Mapping[str, Any],
    normalization: InputNormalization,
    location: ActivationLocation | None,
    given: InputNormalization | None,
) -> InputNormalization:
    """The normalisation, ``"center"`` where TransformerLens had centred what the model writes.

    Autoencoders of a model loaded with ``center_writing_weights`` saw a residual stream, and what is
    added to it, without its mean. Models are not edited when they are loaded here, so that step
    belongs to the autoencoder. (A layer norm subtracts the mean anyway.)
    """
    kwargs = cfg.get("model_from_pretrained_kwargs") or {}
    said = kwargs.get("center_writing_weights") if isinstance(kwargs, dict) else None
    centred = (
        bool(said) and normalization != "layer_norm" and _on_the_stream(cfg_file, location, given)
    )
    if centred and normalization != "none":
        raise CheckpointError(
            f"{cfg_file}: center_writing_weights with normalize_activations "
            f"{cfg.get('normalize_activations')!r}: expected one of the two; both cannot be applied."
        )
    if normalization == "none" and said is None and given == "center":
        return "center"  # how the model was loaded is often not in the folder
    return "center" if centred else normalization


def _on_the_stream(cfg_file: str, location: ActivationLocation | None, given: Any) -> bool:
    if location is None:
        if given is None:
            raise CheckpointError(
                f"{cfg_file}: center_writing_weights is true, and the place is not one that is known "
                "here: expected input_normalization='center' or 'none' as an argument."
            )
        return bool(given == "center")
    return is_on_the_stream(location)


def _add_sparsity(source: Source, found: LoadedAutoencoder) -> None:
    """In place: how often each latent is active, from its log10 in ``sparsity`` ``[l]``, if known."""
    path = source.beside(SPARSITY_FILE)
    try:
        if not files.exists(path):
            return
    except SourceError as error:  # offline: nothing that is computed depends on it
        logger.warning("%s: statistics of latents stay unknown: %s", source.path, error)
        return
    tensors = read_content(files.fetch(path), path)
    check_tensors(path, tensors, {"sparsity": (len(found.state_dict["encoder.weight"]),)})
    found.state_dict["latents_activation_frequency"] = 10.0 ** tensors["sparsity"].float()


def _flat(config: Mapping[str, Any]) -> dict[str, Any]:
    """One object under today's names; from version 6 on, facts about the model are in ``metadata``."""
    inner = config.get("metadata")
    flat = dict(inner) if isinstance(inner, dict) else {}
    flat |= {_RENAMED.get(name, name): value for name, value in config.items()}
    return flat


def _metadata_names(config: Mapping[str, Any]) -> set[str]:
    inner = config.get("metadata")
    return set(inner) if isinstance(inner, dict) else set()


def _architecture(cfg_file: str, cfg: dict[str, Any], old: bool) -> str:
    found = cfg.get("architecture", "standard" if old else None)
    if isinstance(found, str) and found in _NOT_READ:
        raise CheckpointError(
            f"{cfg_file}: architecture {found!r} is not supported: {_NOT_READ[found]}. Supported: "
            f"{', '.join(_ARCHITECTURES)}."
        )
    activation = read_choice(cfg_file, cfg, "activation_fn", ("relu", "topk"), "relu")
    arguments = cfg.get("activation_fn_kwargs") or {}
    if activation == "topk":
        if found not in ("standard", "topk") or not isinstance(arguments, dict):
            raise CheckpointError(
                f"{cfg_file}: activation_fn 'topk' and architecture {found!r} contradict each other."
            )
        if any(value for name, value in arguments.items() if name != "k"):
            raise CheckpointError(
                f"{cfg_file}: activation_fn_kwargs: expected k only, found {arguments!r}."
            )
        cfg["k"] = cfg.get("k", arguments.get("k"))
        return "topk"
    return read_choice(cfg_file, {"architecture": found}, "architecture", _ARCHITECTURES)


def _shapes(cfg_file: str, cfg: Mapping[str, Any]) -> dict[str, Shape]:
    architecture = cfg["architecture"]
    d_in, d_sae = read_size(cfg_file, cfg, "d_in"), read_size(cfg_file, cfg, "d_sae")
    d_out = read_size(cfg_file, cfg, "d_out") if "transcoder" in architecture else d_in
    shapes: dict[str, Shape] = {"W_enc": (d_in, d_sae), "W_dec": (d_sae, d_out), "b_dec": (d_out,)}
    if architecture == "gated":
        return shapes | dict.fromkeys(("b_gate", "r_mag", "b_mag"), (d_sae,))
    shapes["b_enc"] = (d_sae,)
    if "jumprelu" in architecture:
        shapes["threshold"] = (d_sae,)
    if "skip" in architecture:
        shapes["W_skip"] = (d_out, d_in)
    return shapes


def _state(cfg_file: str, cfg: Mapping[str, Any], tensors: Content) -> dict[str, Any]:
    is_transcoder = "transcoder" in cfg["architecture"]
    subtract = read_flag(cfg_file, cfg, "apply_b_dec_to_input", not is_transcoder)
    if is_transcoder and subtract:
        raise CheckpointError(
            f"{cfg_file}: apply_b_dec_to_input: expected false for a transcoder, found true."
        )
    nonlinearity, fields = _nonlinearity(cfg_file, cfg, tensors)
    state = parameters(
        tensors["W_enc"].T,
        tensors["W_dec"].T,
        tensors.get("b_enc"),
        pre_bias=tensors["b_dec"] if subtract else None,
        post_bias=None if subtract else tensors["b_dec"],
        nonlinearity=nonlinearity,
        is_transcoder=is_transcoder,
        **fields,
    )
    if "W_skip" in tensors:
        state["skip.weight"] = tensors["W_skip"]
    return state


def _nonlinearity(
    cfg_file: str, cfg: Mapping[str, Any], tensors: Content
) -> tuple[str, dict[str, Any]]:
    """The nonlinearity of an architecture: its name here, and its fields."""
    architecture = cfg["architecture"]
    if architecture == "topk":
        return "TopK", {"k": read_size(cfg_file, cfg, "k"), "postact_fn": "ReLU"}
    if architecture == "gated":
        return "Gated", {name: tensors[name] for name in ("b_gate", "r_mag", "b_mag")}
    if "jumprelu" in architecture:
        return "JumpReLU", {"threshold": tensors["threshold"]}
    return "ReLU", {}


def _fold_decoder_norm(cfg_file: str, cfg: Mapping[str, Any], state: dict[str, Any]) -> None:
    """In place: latents in SAELens's units, where they are scaled by the lengths of directions."""
    if not read_flag(cfg_file, cfg, "rescale_acts_by_decoder_norm", False):
        return
    if cfg["architecture"] != "topk":
        raise CheckpointError(
            f"{cfg_file}: rescale_acts_by_decoder_norm: expected for the architecture 'topk' only, "
            f"found with {cfg['architecture']!r}."
        )
    fold_latent_scale(state, state["decoder.weight"].float().norm(dim=0), decoder_too=True)


def _normalization(
    cfg_file: str, cfg: Mapping[str, Any], state: dict[str, Any], stated: Stated
) -> InputNormalization:
    """The normalisation; a stated factor is folded into ``state``."""
    found = cfg.get("normalize_activations")
    if isinstance(found, bool) or found is None:  # as earlier versions wrote it
        found = "expected_average_only_in" if found else "none"
    config = {"normalize_activations": found}
    found = read_choice(cfg_file, config, "normalize_activations", _NORMALIZATIONS)
    if cfg.get("reshape_activations") is not None:
        read_choice(cfg_file, cfg, "reshape_activations", ("none", "hook_z"))
    factor = stated.get("norm_factor")
    if found == "expected_average_only_in":
        if factor is None:
            raise CheckpointError(
                f"{cfg_file}: normalize_activations is {cfg.get('normalize_activations')!r}: inputs "
                "were multiplied by one factor, which is not in this folder. Expected it as an "
                "argument, `Autoencoder.load(source, norm_factor=…)` (norm_scaling_factor in "
                "SAELens's list of releases; 1.0 if it was folded into the weights)."
            )
        fold_norm_factor(state, check_factor("norm_factor", factor))
    elif factor is not None:
        raise CheckpointError(
            f"{cfg_file}: normalize_activations says {found!r}, the call says norm_factor {factor!r}."
        )
    return _NORMALIZATIONS[found]


# ---- writing -------------------------------------------------------------------------------------


def write(it: Exported) -> dict[str, dict[str, Any]]:
    """The files of a folder that SAELens 6 reads.

    BatchTopK becomes a JumpReLU of equal thresholds, as SAELens itself saves it. A tied decoder is
    written out. Matryoshka groups are kept in the metadata.
    """
    it.refuse_parts("glu")
    if it.has("skip.weight") and not it.is_transcoder:
        it.refuse("a skip connection outside of a transcoder")
    normalizations = {
        value: key for key, value in _NORMALIZATIONS.items() if key != "expected_average_only_in"
    }
    if it.input_normalization not in normalizations:
        it.refuse_normalization()
    state = fold_pre_bias(it.state_dict) if it.has("post_bias") else it.state_dict
    tensors = {
        "W_enc": state["encoder.weight"].T,
        "W_dec": it.decoder_weight.T,
        "b_dec": state.get("post_bias", state["pre_bias"]),
        "b_enc": state["latent_bias"],
    }
    architecture = _export_nonlinearity(it, tensors)
    if it.is_transcoder:
        architecture |= _export_transcoder(it, architecture["architecture"], tensors)
    config: dict[str, Any] = {
        "d_in": it.n_inputs,
        "d_sae": it.n_latents,
        # SAELens casts all tensors to this dtype, so that it has to hold every one of them.
        "dtype": _name(reduce(torch.promote_types, (value.dtype for value in tensors.values()))),
        "device": "cpu",
        "apply_b_dec_to_input": not it.has("post_bias"),
        "normalize_activations": normalizations[it.input_normalization],
        "reshape_activations": "hook_z" if _is_of_heads(it) else "none",
        "metadata": _metadata(it),
    }
    return {CONFIG_FILE: config | architecture, WEIGHTS_FILE: tensors}


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _is_of_heads(it: Exported) -> bool:
    """Whether inputs are ``[…, heads, d_head]`` there, and are merged before encoding."""
    return it.location is not None and it.location.path == "attn.v_out" and not it.is_transcoder


def _export_nonlinearity(it: Exported, tensors: dict[str, Tensor]) -> dict[str, Any]:
    """The config fields of the nonlinearity; its tensors are added to ``tensors``."""
    name, fields = it.nonlinearity, it.fields
    if name == "ReLU":
        return {"architecture": "standard"}
    if name == "TopK" and fields["postact_fn"] == "ReLU":
        return {"architecture": "topk", "k": fields["k"], "rescale_acts_by_decoder_norm": False}
    if name in ("JumpReLU", "BatchTopK"):
        tensors["threshold"] = fields["threshold"].expand(it.n_latents)
        return {"architecture": "jumprelu"}
    if name == "Gated":
        tensors |= fold_latent_bias_into_gates(tensors.pop("b_enc"), fields)
        return {"architecture": "gated"}
    return it.refuse(f"the nonlinearity {name}")


def _export_transcoder(
    it: Exported, architecture: str, tensors: dict[str, Tensor]
) -> dict[str, Any]:
    """The config fields of a transcoder; a skip is added to ``tensors``."""
    kinds = {"standard": "transcoder", "jumprelu": "jumprelu_transcoder"}
    if architecture not in kinds:
        it.refuse(f"a transcoder with {it.nonlinearity}")
    kind = kinds[architecture]
    if it.has("skip.weight"):
        kind = kind.replace("transcoder", "skip_transcoder")
        tensors["W_skip"] = it.state_dict["skip.weight"]
    return {"architecture": kind, "d_out": len(tensors["b_dec"])}


def _metadata(it: Exported) -> dict[str, Any]:
    metadata: dict[str, Any] = {
        "sae_lens_version": _VERSION,
        "sae_lens_training_version": None,
        "model_name": it.model_name,
        "hook_name": None if it.location is None else it.location.transformer_lens_name,
    }
    if it.output_location is not None:
        metadata["hook_name_out"] = it.output_location.transformer_lens_name
    if it.group_sizes is not None:
        metadata["matryoshka_group_sizes"] = list(it.group_sizes)
    return metadata


def is_saelens(config: Mapping[str, Any]) -> bool:
    """Whether a ``cfg.json`` is SAELens's."""
    return "d_sae" in config


SAELENS = Format(
    name="saelens",
    layout=f"{CONFIG_FILE} and {WEIGHTS_FILE} (SAELens)",
    read=read,
    states=frozenset({"output_location", "norm_factor"}),
    marks=(WEIGHTS_FILE,),
    configs={CONFIG_FILE: is_saelens},
    write=write,
)
