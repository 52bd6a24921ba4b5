"""SAELens: a folder with ``cfg.json``, ``sae_weights.safetensors``, perhaps ``sparsity.safetensors``.

    W_enc [n, l]   W_dec [l, o]   b_enc [l] (not gated)   b_dec [o]
    threshold [l] (jumprelu)      b_gate, r_mag, b_mag [l] (gated)      W_skip [o, n] (skip)

``apply_b_dec_to_input`` says whether ``b_dec`` is also taken off the input, after normalisation.
``normalize_activations``: ``layer_norm`` is that of OpenAI, ``constant_norm_rescale`` is ``"rms"``
here, and ``expected_average_only_in`` is one factor that is *not in the folder*: it has to be stated
and is folded in. ``rescale_acts_by_decoder_norm`` chooses the top k among latents times the norm of
their decoder rows, and is folded in too. Before version 6 the config was flat, with other names.

As read in sae-lens 6.54.12: ``saes/*.py`` and ``loading/pretrained_sae_loaders.py``.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from neuron_explainer.errors import CheckpointError, did_you_mean
from neuron_explainer.models.checkpoints.autoencoders.common import (
    LoadedAutoencoder,
    Stated,
    check_factor,
    check_tensors,
    check_unknown_fields,
    fold_latent_scale,
    fold_norm_factor,
    location_of,
    read_flag,
    read_size,
    read_text,
    settle,
    settle_location,
)
from neuron_explainer.models.checkpoints.autoencoders.export import (
    Exported,
    fold_latent_bias_into_gates,
    fold_pre_bias,
)
from neuron_explainer.models.checkpoints.autoencoders.state import InputNormalization
from neuron_explainer.models.checkpoints.problems import Shape
from neuron_explainer.models.locations import ActivationLocation

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
_NORMALIZATIONS: dict[Any, InputNormalization] = {
    "none": "none",
    "layer_norm": "layer_norm",
    "constant_norm_rescale": "rms",
    "expected_average_only_in": "none",  # once its factor is folded in
}


def read_saelens(
    where: str | Path, config: Mapping[str, Any], tensors: Mapping[str, Tensor], stated: Stated
) -> LoadedAutoencoder:
    """From the config and tensors of the folder ``where``."""
    cfg_file = f"{where}/{CONFIG_FILE}"
    cfg = _flat(config)
    architecture = _architecture(cfg_file, cfg, old="metadata" not in config)
    cfg["architecture"] = architecture
    check_unknown_fields(cfg_file, cfg, _KNOWN, _HARMLESS | _metadata_names(config))
    _refuse_scaling(cfg_file, where, cfg, tensors)
    state = _state(cfg_file, where, cfg, tensors)
    normalization = _normalization(cfg_file, cfg, state, stated)
    metadata: dict[str, Any] = {"format": "saelens", "cfg": dict(config)}
    if stated.get("norm_factor") is not None:
        metadata["norm_factor"] = stated["norm_factor"]
    # Of one head's activations there is no location here.
    hook = None if cfg.get("hook_head_index") is not None else cfg.get("hook_name")
    output = location_of(cfg.get("hook_name_out"))
    location = settle_location(cfg_file, location_of(hook), stated.get("location"))
    return LoadedAutoencoder(
        state,
        _centred(cfg_file, cfg, normalization, location, stated.get("input_normalization")),
        location,
        settle_location(cfg_file, output, stated.get("output_location")),
        read_text(cfg, "model_name"),
        metadata,
    )


def _centred(
    cfg_file: str,
    cfg: Mapping[str, Any],
    normalization: InputNormalization,
    location: ActivationLocation | None,
    given: InputNormalization | None,
) -> InputNormalization:
    """The normalisation, with the mean over the width taken off where TransformerLens had done so.

    Autoencoders of a model loaded with ``center_writing_weights`` saw a residual stream, and what is
    added to it, without its mean. Models are not edited when they are loaded here, so that step
    belongs to the autoencoder. (A layer norm takes the mean off anyway.)
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
    found: InputNormalization = "center" if centred else normalization
    settle(cfg_file, "the file", found, given, "input_normalization")
    return found


def _on_the_stream(cfg_file: str, location: ActivationLocation | None, given: Any) -> bool:
    if location is None:
        if given is None:
            raise CheckpointError(
                f"{cfg_file}: center_writing_weights is true, and the place is not one that is known "
                "here: expected input_normalization='center' or 'none' as an argument."
            )
        return bool(given == "center")
    return location.path.startswith("resid.") and "ln" not in location.path


def add_sparsity(
    where: str | Path, loaded: LoadedAutoencoder, tensors: Mapping[str, Tensor]
) -> None:
    """In place: how often each latent is active, from its log10 in ``sparsity`` ``[l]``."""
    n_latents = len(loaded.state_dict["encoder.weight"])
    check_tensors(where, tensors, {"sparsity": (n_latents,)})
    loaded.state_dict["latents_activation_frequency"] = 10.0 ** tensors["sparsity"].float()


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
    activation = cfg.get("activation_fn", "relu")
    arguments = cfg.get("activation_fn_kwargs") or {}
    if activation == "topk":
        if found not in ("standard", "topk") or not isinstance(arguments, dict):
            raise CheckpointError(
                f"{cfg_file}: activation_fn 'topk' and architecture {found!r} contradict each other."
            )
        if set(arguments) - {"k"} and any(arguments[name] for name in set(arguments) - {"k"}):
            raise CheckpointError(
                f"{cfg_file}: activation_fn_kwargs: expected k only, found {arguments!r}."
            )
        cfg["k"] = cfg.get("k", arguments.get("k"))
        return "topk"
    if activation != "relu":
        raise CheckpointError(
            f"{cfg_file}: activation_fn: expected 'relu' or 'topk', found {activation!r}."
        )
    if found not in _ARCHITECTURES:
        raise CheckpointError(
            f"{cfg_file}: architecture: expected one of {', '.join(_ARCHITECTURES)}, found {found!r}."
            f"{did_you_mean(str(found), _ARCHITECTURES)}"
        )
    return str(found)


def _refuse_scaling(
    cfg_file: str, where: str | Path, cfg: Mapping[str, Any], tensors: Mapping[str, Tensor]
) -> None:
    """Latents scaled after fine-tuning: SAELens itself no longer applies such factors."""
    factor = tensors.get("scaling_factor")
    ones = factor is None or bool(torch.equal(factor, torch.ones_like(factor)))
    if cfg.get("finetuning_scaling_factor") and not (factor is not None and ones):
        raise CheckpointError(
            f"{cfg_file}: finetuning_scaling_factor: expected false, found true: latents scaled by "
            "fine-tuning cannot be applied."
        )
    if not ones:
        raise CheckpointError(
            f"{where}/{WEIGHTS_FILE}: scaling_factor: expected ones, found other values: latents "
            "scaled by fine-tuning cannot be applied."
        )


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


def _state(
    cfg_file: str, where: str | Path, cfg: Mapping[str, Any], tensors: Mapping[str, Tensor]
) -> dict[str, Any]:
    architecture = cfg["architecture"]
    tensors = {name: value for name, value in tensors.items() if name != "scaling_factor"}
    check_tensors(
        f"{where}/{WEIGHTS_FILE}",
        tensors,
        _shapes(cfg_file, cfg),
        why=f"Expected is what architecture {architecture!r} and the sizes in {CONFIG_FILE} ask for.",
    )
    n_latents = tensors["W_dec"].shape[0]
    transcoder = "transcoder" in architecture
    subtract = read_flag(cfg_file, cfg, "apply_b_dec_to_input", not transcoder)
    b_dec = tensors["b_dec"]
    state: dict[str, Any] = {
        "encoder.weight": tensors["W_enc"].T,
        "decoder.weight": tensors["W_dec"].T,
        "latent_bias": tensors.get("b_enc", b_dec.new_zeros(n_latents)),
        "pre_bias": b_dec if subtract else b_dec.new_zeros(tensors["W_enc"].shape[0]),
    }
    if not subtract:
        state["post_bias"] = b_dec
    if transcoder:
        if subtract:
            raise CheckpointError(
                f"{cfg_file}: apply_b_dec_to_input: expected false for a transcoder, found true."
            )
        state["n_outputs"] = len(b_dec)
    if "W_skip" in tensors:
        state["skip.weight"] = tensors["W_skip"]
    return state | _activation(cfg_file, cfg, tensors, state)


def _activation(
    cfg_file: str, cfg: Mapping[str, Any], tensors: Mapping[str, Tensor], state: dict[str, Any]
) -> dict[str, Any]:
    architecture = cfg["architecture"]
    if architecture == "topk":
        k = read_size(cfg_file, cfg, "k")
        if read_flag(cfg_file, cfg, "rescale_acts_by_decoder_norm", False):
            fold_latent_scale(state, tensors["W_dec"].float().norm(dim=-1), decoder_too=True)
        fields: dict[str, Any] = {"k": k, "postact_fn": "ReLU"}
        return {"activation": "TopK", "activation_state_dict": fields}
    if cfg.get("rescale_acts_by_decoder_norm"):
        raise CheckpointError(
            f"{cfg_file}: rescale_acts_by_decoder_norm: expected for the architecture 'topk' only, "
            f"found with {architecture!r}."
        )
    if architecture == "gated":
        fields = {name: tensors[name] for name in ("b_gate", "r_mag", "b_mag")}
        return {"activation": "Gated", "activation_state_dict": fields}
    if "jumprelu" in architecture:
        fields = {"threshold": tensors["threshold"]}
        return {"activation": "JumpReLU", "activation_state_dict": fields}
    return {"activation": "ReLU", "activation_state_dict": {}}


def _normalization(
    cfg_file: str, cfg: Mapping[str, Any], state: dict[str, Any], stated: Stated
) -> InputNormalization:
    """Folds a stated factor into ``state``."""
    found = cfg.get("normalize_activations")
    if isinstance(found, bool) or found is None:  # as earlier versions wrote it
        found = "expected_average_only_in" if found else "none"
    if found not in _NORMALIZATIONS:
        raise CheckpointError(
            f"{cfg_file}: normalize_activations: expected one of {', '.join(_NORMALIZATIONS)}, "
            f"found {found!r}."
        )
    if cfg.get("reshape_activations", "none") not in ("none", "hook_z", None):
        raise CheckpointError(
            f"{cfg_file}: reshape_activations: expected 'none' or 'hook_z', found "
            f"{cfg['reshape_activations']!r}."
        )
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


def export_saelens(it: Exported) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Config and tensors of a folder that SAELens 6 reads.

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
        it.refuse(f"input_normalization {it.input_normalization!r}")
    state = fold_pre_bias(it.state_dict) if it.has("post_bias") else dict(it.state_dict)
    b_dec = state.get("post_bias", state["pre_bias"])
    tensors = {
        "W_enc": state["encoder.weight"].T,
        "W_dec": it.decoder_weight.T,
        "b_dec": b_dec,
        "b_enc": state["latent_bias"],
    }
    config: dict[str, Any] = {
        "d_in": it.n_inputs,
        "d_sae": it.n_latents,
        "dtype": str(it.decoder_weight.dtype).removeprefix("torch."),
        "device": "cpu",
        "apply_b_dec_to_input": not it.has("post_bias"),
        "normalize_activations": normalizations[it.input_normalization],
        "reshape_activations": "hook_z" if _is_of_heads(it) else "none",
        "metadata": _metadata(it),
    }
    config |= _export_activation(it, state, tensors)
    if it.is_transcoder:
        kind = {"standard": "transcoder", "jumprelu": "jumprelu_transcoder"}
        if config["architecture"] not in kind:
            it.refuse(f"a transcoder with {it.activation}")
        config["architecture"] = kind[config["architecture"]]
        config["d_out"] = len(b_dec)
        if it.has("skip.weight"):
            config["architecture"] = config["architecture"].replace("transc", "skip_transc")
            tensors["W_skip"] = state["skip.weight"]
    return config, tensors


def _is_of_heads(it: Exported) -> bool:
    """Whether inputs are ``[…, heads, d_head]`` there, and are merged before encoding."""
    return it.location is not None and it.location.path == "attn.v_out" and not it.is_transcoder


def _export_activation(
    it: Exported, state: Mapping[str, Any], tensors: dict[str, Tensor]
) -> dict[str, Any]:
    """Config fields; tensors are added to ``tensors``."""
    fields = it.activation_fields
    if it.activation == "ReLU":
        return {"architecture": "standard"}
    if it.activation == "TopK" and fields["postact_fn"] == "ReLU":
        return {"architecture": "topk", "k": fields["k"], "rescale_acts_by_decoder_norm": False}
    if it.activation in ("JumpReLU", "BatchTopK"):
        tensors["threshold"] = fields["threshold"].to(tensors["b_enc"]).expand(it.n_latents)
        return {"architecture": "jumprelu"}
    if it.activation == "Gated":
        tensors |= fold_latent_bias_into_gates(state["latent_bias"], fields)
        del tensors["b_enc"]
        return {"architecture": "gated"}
    return it.refuse(f"the activation {it.activation}")


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
