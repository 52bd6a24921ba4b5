"""EleutherAI's sparsify: a folder with ``cfg.json`` and ``sae.safetensors``.

    encoder.weight [l, n]   encoder.bias [l]   W_dec [l, n]   b_dec [n]   W_skip [n, n] (skip)

    latents = topk(relu(We (x - b_dec) + be)),   recons = latents W_dec + b_dec [+ W_skip x]

A transcoder (``transcode``) takes nothing off its input. ``groupmax`` keeps the largest latent of
each of k groups of neighbours. The folder does not say where its inputs come from; its name usually
does, and a name is no content: state the location.

As read in eai-sparsify 1.3.3: ``sparse_coder.py``, ``fused_encoder.py``, ``config.py``.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from neuron_explainer.errors import CheckpointError
from neuron_explainer.models.checkpoints.autoencoders.common import (
    LoadedAutoencoder,
    Stated,
    check_tensors,
    check_unknown_fields,
    read_flag,
    read_size,
    settle,
    settle_location,
)
from neuron_explainer.models.checkpoints.autoencoders.export import Exported, fold_pre_bias
from neuron_explainer.models.checkpoints.problems import Shape

CONFIG_FILE, WEIGHTS_FILE = "cfg.json", "sae.safetensors"

_KNOWN = {
    "activation",
    "d_in",
    "expansion_factor",
    "num_latents",
    "k",
    "skip_connection",
    "transcode",
    "signed",
}
_HARMLESS = {"normalize_decoder", "multi_topk"}  # of training: both act on weights or losses


def read_sparsify(
    where: str | Path, config: Mapping[str, Any], tensors: Mapping[str, Tensor], stated: Stated
) -> LoadedAutoencoder:
    """From the config and tensors of the folder ``where``."""
    cfg_file = f"{where}/{CONFIG_FILE}"
    check_unknown_fields(cfg_file, config, _KNOWN, _HARMLESS)
    if config.get("signed"):
        raise CheckpointError(f"{cfg_file}: signed: expected false, found {config['signed']!r}.")
    transcode = read_flag(cfg_file, config, "transcode", False)
    check_tensors(
        f"{where}/{WEIGHTS_FILE}",
        tensors,
        _shapes(cfg_file, config),
        why=f"Expected is what {CONFIG_FILE} asks for.",
    )
    b_dec = tensors["b_dec"]
    state: dict[str, Any] = {
        "encoder.weight": tensors["encoder.weight"],
        "decoder.weight": tensors["W_dec"].T,
        "latent_bias": tensors["encoder.bias"],
        "pre_bias": b_dec.new_zeros(b_dec.shape) if transcode else b_dec,
        **_activation(cfg_file, config),
    }
    if transcode:
        state |= {"post_bias": b_dec, "n_outputs": len(b_dec)}
    elif stated.get("output_location") is not None:
        raise CheckpointError(
            f"{cfg_file}: transcode says false, the call says output_location "
            f"{str(stated['output_location'])!r}."
        )
    if "W_skip" in tensors:
        state["skip.weight"] = tensors["W_skip"]
    return LoadedAutoencoder(
        state,
        settle(
            where, "this format", "none", stated.get("input_normalization"), "input_normalization"
        ),
        settle_location(where, None, stated.get("location")),
        settle_location(where, None, stated.get("output_location")),
        metadata={"format": "sparsify", "cfg": dict(config)},
    )


def _shapes(cfg_file: str, config: Mapping[str, Any]) -> dict[str, Shape]:
    d_in = read_size(cfg_file, config, "d_in")
    if config.get("num_latents"):
        n_latents = read_size(cfg_file, config, "num_latents")
    else:  # 0 or, in early versions, no such field
        n_latents = d_in * read_size(cfg_file, config, "expansion_factor")
    shapes: dict[str, Shape] = {
        "encoder.weight": (n_latents, d_in),
        "encoder.bias": (n_latents,),
        "W_dec": (n_latents, d_in),
        "b_dec": (d_in,),
    }
    if read_flag(cfg_file, config, "skip_connection", False):
        shapes["W_skip"] = (d_in, d_in)
    return shapes


def _activation(cfg_file: str, config: Mapping[str, Any]) -> dict[str, Any]:
    k, name = read_size(cfg_file, config, "k"), config.get("activation", "topk")
    if name == "topk":
        fields: dict[str, Any] = {"k": k, "postact_fn": "ReLU"}
        return {"activation": "TopK", "activation_state_dict": fields}
    if name == "groupmax":
        return {"activation": "GroupMax", "activation_state_dict": {"k": k}}
    raise CheckpointError(f"{cfg_file}: activation: expected 'topk' or 'groupmax', found {name!r}.")


# ---- writing -------------------------------------------------------------------------------------


def export_sparsify(it: Exported) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Config and tensors of a folder that ``SparseCoder.load_from_disk`` reads."""
    it.refuse_parts("glu")
    if it.input_normalization != "none":
        it.refuse(f"input_normalization {it.input_normalization!r}")
    if it.is_transcoder and it.decoder_weight.shape[0] != it.n_inputs:
        it.refuse("a transcoder whose input and output differ in width")
    if it.has("post_bias") and not it.is_transcoder:
        it.refuse("an output bias that is not that of the input, but in a transcoder")
    if it.group_sizes is not None:
        it.refuse("Matryoshka groups")
    names = {"TopK": "topk", "GroupMax": "groupmax"}
    fields = it.activation_fields
    if it.activation not in names or fields.get("postact_fn", "ReLU") != "ReLU":
        it.refuse(f"the activation {it.activation}")
    state = fold_pre_bias(it.state_dict) if it.is_transcoder else dict(it.state_dict)
    tensors = {
        "encoder.weight": state["encoder.weight"],
        "encoder.bias": state["latent_bias"],
        "W_dec": it.decoder_weight.T,
        "b_dec": state.get("post_bias", state["pre_bias"]),
    }
    if it.has("skip.weight"):
        tensors["W_skip"] = state["skip.weight"]
    config = {
        "activation": names[it.activation],
        "expansion_factor": max(1, it.n_latents // it.n_inputs),
        "normalize_decoder": False,
        "num_latents": it.n_latents,
        "k": fields["k"],
        "multi_topk": False,
        "skip_connection": it.has("skip.weight"),
        "transcode": it.is_transcoder,
        "d_in": it.n_inputs,
    }
    return config, tensors
