"""EleutherAI's sparsify: a folder with ``cfg.json`` and ``sae.safetensors``.

    encoder.weight [l, n]   encoder.bias [l]   W_dec [l, n]   b_dec [n]   W_skip [n, n] (skip)

    latents = topk(relu(We (x - b_dec) + be)),   recons = latents W_dec + b_dec [+ W_skip x]

A transcoder (``transcode``) subtracts nothing from its input. ``groupmax`` keeps the largest latent of
each of k groups of neighbours. The folder does not say where its inputs come from; its name usually
does, but a name is not content: state the location.

As read in eai-sparsify 1.3.3: ``sparse_coder.py``, ``fused_encoder.py``, ``config.py``.
"""

from collections.abc import Mapping
from typing import Any

from neuron_explainer.errors import CheckpointError
from neuron_explainer.models.checkpoints.autoencoders.common import (
    check_tensors,
    check_unknown_fields,
    fold_pre_bias,
    parameters,
    read_choice,
    read_flag,
    read_size,
)
from neuron_explainer.models.checkpoints.autoencoders.format import (
    Exported,
    Format,
    LoadedAutoencoder,
    Source,
    Stated,
    loaded,
)
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
# Their name, ours, and the fields of ours besides k.
_NONLINEARITIES: dict[str, tuple[str, dict[str, Any]]] = {
    "topk": ("TopK", {"postact_fn": "ReLU"}),
    "groupmax": ("GroupMax", {}),
}


def read(source: Source, stated: Stated) -> LoadedAutoencoder:
    """Read a folder of this format."""
    where = source.path
    config, cfg_file = source.json(CONFIG_FILE), f"{where}/{CONFIG_FILE}"
    check_unknown_fields(cfg_file, config, _KNOWN, _HARMLESS)
    if config.get("signed"):
        raise CheckpointError(f"{cfg_file}: signed: expected false, found {config['signed']!r}.")
    transcode = read_flag(cfg_file, config, "transcode", False)
    _, tensors = source.weights(WEIGHTS_FILE)
    check_tensors(
        f"{where}/{WEIGHTS_FILE}",
        tensors,
        _shapes(cfg_file, config),
        why=f"Expected is what {CONFIG_FILE} asks for.",
    )
    if not transcode and stated.get("output_location") is not None:
        raise CheckpointError(
            f"{cfg_file}: transcode says false, the call says output_location "
            f"{str(stated['output_location'])!r}."
        )
    name = read_choice(cfg_file, config, "activation", _NONLINEARITIES, "topk")
    nonlinearity, fields = _NONLINEARITIES[name]
    state = parameters(
        tensors["encoder.weight"],
        tensors["W_dec"].T,
        tensors["encoder.bias"],
        pre_bias=None if transcode else tensors["b_dec"],
        post_bias=tensors["b_dec"] if transcode else None,
        nonlinearity=nonlinearity,
        is_transcoder=transcode,
        k=read_size(cfg_file, config, "k"),
        **fields,
    )
    if "W_skip" in tensors:
        state["skip.weight"] = tensors["W_skip"]
    metadata = {"format": "sparsify", "cfg": dict(config)}
    return loaded(where, stated, state, metadata=metadata)


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


# ---- writing -------------------------------------------------------------------------------------


def write(it: Exported) -> dict[str, dict[str, Any]]:
    """The files of a folder that ``SparseCoder.load_from_disk`` reads."""
    it.refuse_parts("glu")
    it.refuse_normalization()
    it.refuse_groups()
    if it.is_transcoder:
        it.refuse_width()
    elif it.has("post_bias"):
        it.refuse("an output bias that is not that of the input, but in a transcoder")
    fields = it.fields
    names = {ours: theirs for theirs, (ours, _) in _NONLINEARITIES.items()}
    if it.nonlinearity not in names or fields.get("postact_fn", "ReLU") != "ReLU":
        it.refuse(f"the nonlinearity {it.nonlinearity}")
    state = fold_pre_bias(it.state_dict) if it.is_transcoder else it.state_dict
    tensors = {
        "encoder.weight": state["encoder.weight"],
        "encoder.bias": state["latent_bias"],
        "W_dec": it.decoder_weight.T,
        "b_dec": state.get("post_bias", state["pre_bias"]),
    }
    if it.has("skip.weight"):
        tensors["W_skip"] = state["skip.weight"]
    config = {
        "activation": names[it.nonlinearity],
        "expansion_factor": max(1, it.n_latents // it.n_inputs),
        "normalize_decoder": False,
        "num_latents": it.n_latents,
        "k": fields["k"],
        "multi_topk": False,
        "skip_connection": it.has("skip.weight"),
        "transcode": it.is_transcoder,
        "d_in": it.n_inputs,
    }
    return {CONFIG_FILE: config, WEIGHTS_FILE: tensors}


SPARSIFY = Format(
    name="sparsify",
    layout=f"{CONFIG_FILE} and {WEIGHTS_FILE} (sparsify)",
    read=read,
    states=frozenset({"output_location"}),
    marks=(WEIGHTS_FILE,),
    configs={CONFIG_FILE: lambda config: {"d_in", "k"} <= set(config) and "d_sae" not in config},
    write=write,
)
