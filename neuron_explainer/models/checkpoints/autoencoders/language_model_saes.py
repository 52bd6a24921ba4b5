"""gpt2-dictionary, the early Language-Model-SAEs of OpenMOSS: a torch file ``{"sae": {…}, …}``.

    encoder [n, l]   encoder_bias [l]   decoder [l, n]   decoder_bias [n] (if it has one)
    encoder_glu [n, l], encoder_bias_glu [l] (GLU)       feature_act_mask, feature_act_scale [l]

    x̂ = x · √n / ‖x‖  (norm_activation "token-wise"),   minus decoder_bias
    h = x̂ E + b       (GLU: · sigmoid(x̂ Eg + bg))
    f = mask · scale · relu(h),   recons = (f D + decoder_bias) / (√n / ‖x‖)

Mask and scale are folded into the encoder: scale · relu(h) = relu(scale · h). The normalisation is
not in the file but in ``hyperparams.json``, which is looked for beside it and in the folder around
that one. Without that file the normalisation has to be stated (``"rms"`` for token-wise).

As read in OpenMOSS/gpt2-dictionary at bd7a871.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from neuron_explainer import files
from neuron_explainer.errors import CheckpointError
from neuron_explainer.models.checkpoints.autoencoders.common import (
    check_facts,
    check_layout,
    fold_latent_scale,
    location_of,
    parameters,
    read_choice,
    read_flag,
    read_text,
)
from neuron_explainer.models.checkpoints.autoencoders.format import (
    Content,
    Format,
    LoadedAutoencoder,
    Source,
    Stated,
    loaded,
    read_content,
)
from neuron_explainer.models.checkpoints.autoencoders.state import InputNormalization

HYPERPARAMETERS_FILE, MODEL_FILE = "hyperparams.json", "lm_config.json"

_NORMALIZATIONS: dict[str, InputNormalization] = {"token-wise": "rms", "none": "none"}


def holds(content: Content) -> bool:
    """Whether a torch file is of this format, though perhaps incomplete."""
    inner = content.get("sae")
    return (
        isinstance(inner, Mapping)
        or "encoder_bias" in content
        or {"encoder", "decoder"} <= set(content)
    )


def read(source: Source, stated: Stated) -> LoadedAutoencoder:
    """Read a torch file, or the one that is in a run's folder."""
    where, content = _weights(source)
    source = Source(where, content)
    hyperparameters, model = (_json(source, name) for name in (HYPERPARAMETERS_FILE, MODEL_FILE))
    inner = content.get("sae")
    tensors = inner if isinstance(inner, Mapping) else content
    glu = "?" if "encoder_glu" not in tensors and "encoder_bias_glu" not in tensors else ""
    check_layout(
        where,
        tensors,
        f"encoder [n, l]  encoder_bias [l]  decoder [l, n]  decoder_bias [n]?  encoder_glu [n, l]{glu}"
        f"  encoder_bias_glu [l]{glu}  feature_act_mask [l]?  feature_act_scale [l]?",
    )
    _check_hyperparameters(where, hyperparameters or {}, tensors)
    state = parameters(
        tensors["encoder"].T,
        tensors["decoder"].T,
        tensors["encoder_bias"],
        pre_bias=tensors.get("decoder_bias"),
    )
    _fold_scale(where, state, tensors)
    if "encoder_glu" in tensors:
        state["glu.weight"] = tensors["encoder_glu"].T
        state["glu.bias"] = tensors["encoder_bias_glu"]
    found = loaded(
        where,
        stated,
        state,
        said_by=HYPERPARAMETERS_FILE,
        input_normalization=_normalization(where, hyperparameters),
        location=location_of((model or {}).get("hook_point")),
        model_name=read_text(model or {}, "model_name"),
        metadata={
            "format": "language_model_saes",
            "hyperparams": dict(hyperparameters or {}),
            "lm_config": dict(model or {}),
        },
    )
    if found.input_normalization is None:
        raise CheckpointError(
            f"{where}: input_normalization: the file does not say it, and there is no "
            f"{HYPERPARAMETERS_FILE} beside it that does. Give it: `Autoencoder.load(source, "
            "input_normalization='rms')` for norm_activation 'token-wise', or 'none'."
        )
    return found


def _weights(source: Source) -> tuple[str | Path, Content]:
    """The path and content of the one file of weights in a run's folder, or in its ``checkpoints``."""
    if source.content is not None:
        return source.path, source.content
    if files.is_remote(source.path):
        raise CheckpointError(
            f"{source.path}: a remote folder cannot be listed; give the .pt file in it, and "
            "input_normalization."
        )
    folder = Path(source.path).expanduser()
    found = sorted([*folder.glob("*.pt"), *folder.glob("checkpoints/*.pt")])
    if len(found) != 1:
        listed = ", ".join(str(path.relative_to(folder)) for path in found) or "none"
        raise CheckpointError(
            f"{source.path}: expected one .pt file, found {listed}; give the path of the file."
        )
    return found[0], read_content(found[0], found[0])


def _json(source: Source, name: str) -> dict[str, Any] | None:
    """A JSON file beside the weights or, locally, in the folder around theirs."""
    if files.is_remote(source.path):
        return source.json_if_any(name)
    return source.json_if_any(name) or Source(source.path, {}).json_if_any(f"../{name}")


def _check_hyperparameters(where: str | Path, fields: Mapping[str, Any], tensors: Content) -> None:
    n_inputs, n_latents = tensors["encoder"].shape
    facts: dict[str, Any] = {"d_model": n_inputs, "d_sae": n_latents}
    for name, key in (("use_decoder_bias", "decoder_bias"), ("use_glu_encoder", "encoder_glu")):
        if name in fields:
            read_flag(f"{where}: {HYPERPARAMETERS_FILE}", fields, name, False)
            facts[name] = key in tensors
    check_facts(f"{where}: {HYPERPARAMETERS_FILE}", fields, facts, "the tensors")


def _fold_scale(where: str | Path, state: dict[str, Any], tensors: Content) -> None:
    for name in ("feature_act_mask", "feature_act_scale"):
        if name not in tensors or bool((tensors[name] == 1).all()):
            continue
        if (tensors[name] < 0).any():
            raise CheckpointError(
                f"{where}: {name}: expected numbers >= 0, found {float(tensors[name].min())}."
            )
        fold_latent_scale(state, tensors[name], decoder_too=False)


def _normalization(
    where: str | Path, hyperparameters: Mapping[str, Any] | None
) -> InputNormalization | None:
    if hyperparameters is None or "norm_activation" not in hyperparameters:
        return None
    batches = hyperparameters["norm_activation"] == "batch-wise"
    found = read_choice(
        f"{where}: {HYPERPARAMETERS_FILE}",
        hyperparameters,
        "norm_activation",
        _NORMALIZATIONS,
        hint=" With it a row's latents would depend on its batch." if batches else "",
    )
    return _NORMALIZATIONS[found]


LANGUAGE_MODEL_SAES = Format(
    name="language_model_saes",
    layout=f"{HYPERPARAMETERS_FILE} and a .pt file (Language-Model-SAEs)",
    read=read,
    configs={HYPERPARAMETERS_FILE: lambda config: "hook_point_in" not in config},
    holds={"torch": holds},
)
