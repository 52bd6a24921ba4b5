"""The models and autoencoders that have a name, and how to load them."""

from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch

from neuron_explainer import files
from neuron_explainer.errors import SourceError, did_you_mean
from neuron_explainer.models.autoencoder import InputNormalization
from neuron_explainer.models.autoencoder_context import (
    AutoencoderConfig,
    AutoencoderContext,
    AutoencoderSpec,
)
from neuron_explainer.models.devices import Device, check_device, default_device
from neuron_explainer.models.locations import ActivationLocation
from neuron_explainer.models.names import (
    ASSETS,
    MODEL_SPECS,
    StandardModelSpec,
    get_standard_model_spec,
    list_model_names,
    resolve_model_source,
)
from neuron_explainer.models.transformer import Transformer

__all__ = [
    "StandardModelSpec",
    "get_autoencoder_spec",
    "get_standard_model_spec",
    "list_autoencoder_names",
    "list_model_names",
    "load_standard_transformer",
    "load_standard_transformer_from_model_spec",
    "make_autoencoder_context",
    "resolve_model_source",
]

# ----------------------------------------------------------------------------------------- models


def load_standard_transformer(model_name: str, device: Device) -> Transformer:
    """Load the model of that name in float32."""
    return load_standard_transformer_from_model_spec(get_standard_model_spec(model_name), device)


def load_standard_transformer_from_model_spec(
    model_spec: StandardModelSpec, device: Device
) -> Transformer:
    """Load the model of a spec in float32."""
    return Transformer.from_checkpoint(model_spec.model_path, device, torch.float32)


# ----------------------------------------------------------------------------------- autoencoders

_SAE_URL = "https://openaipublic.blob.core.windows.net/sparse-autoencoder/gpt2-small"


def _openai(location: str, version: str, normalization: InputNormalization) -> AutoencoderSpec:
    """A release for GPT-2 small: twelve files, which do not say how inputs were normalised."""
    paths = {
        layer: f"{_SAE_URL}/{location}{version}/autoencoders/{layer}.pt" for layer in range(12)
    }
    return AutoencoderSpec(location, paths, normalization)


_JB_URL = "hf:jbloom/GPT2-Small-SAEs-Reformatted"


def _saelens_jb() -> AutoencoderSpec:
    """SAELens's ``gpt2-small-res-jb``, but for the one before layer 0 (``…-emb``).

    Named there by the stream before a layer, which is the stream after the layer before. They were
    trained on a model whose stream had been centred, which their folders do not say.
    """
    paths = {layer - 1: f"{_JB_URL}/blocks.{layer}.hook_resid_pre" for layer in range(1, 12)}
    paths[11] = f"{_JB_URL}/blocks.11.hook_resid_post"
    return AutoencoderSpec("resid_post_mlp", paths, "center")


def _saelens_jb_embedding() -> AutoencoderSpec:
    return AutoencoderSpec("resid.post_emb", {None: f"{_JB_URL}/blocks.0.hook_resid_pre"}, "center")


def _saelens_feature_splitting(n_latents: int) -> AutoencoderSpec:
    """One of the eight sizes of ``gpt2-small-res-jb-feature-splitting``, before layer 8."""
    url = "hf:jbloom/GPT2-Small-Feature-Splitting-Experiment-Layer-8"
    paths = {7: f"{url}/blocks.8.hook_resid_pre_{n_latents}"}
    return AutoencoderSpec("resid_post_mlp", paths, "center")


# By layer: version of the folder, and what inputs were multiplied by (SAELens's list of releases).
_MLP_RUNS = (
    *((1, 1.049317316132615), (0, 2.3693984005104283), (0, 1.6411934982190302)),
    *((0, 1.8958522157897557), (0, 1.81673478700627), (0, 1.550234472245924)),
    *((0, 1.3237742807210804), (0, 1.1042905114723296), (1, 0.9123762783479742)),
    *((0, 0.6955335635232373), (0, 0.3619728926727644), (2, 0.2851548652550073)),
)


def _mlp_output() -> AutoencoderSpec:
    """McGrath's autoencoders of the MLPs' outputs, on TransformerLens's centred weights."""
    url = "hf:tommmcgrath/gpt2-small-mlp-out-saes/sae_group_gpt2_blocks"
    runs = dict(enumerate(_MLP_RUNS))
    return AutoencoderSpec(
        "resid_delta_mlp",
        {i: f"{url}.{i}.hook_mlp_out_24576:v{version}" for i, (version, _) in runs.items()},
        "center",
        stated_by_layer={i: {"norm_factor": factor} for i, (_, factor) in runs.items()},
    )


def _end_to_end(kind: str) -> AutoencoderSpec:
    """Apollo's dictionaries as Neuronpedia has them; trained on TransformerLens's centred stream."""
    url = f"hf:neuronpedia/gpt2-small__res_{kind}-ajt"
    paths = {layer - 1: f"{url}/{layer}-res_{kind}-ajt" for layer in (2, 6, 10)}
    return AutoencoderSpec("resid_post_mlp", paths, "center")


# What distinguishes the runs that were published, by layer: l1, latents, dead-latent threshold, run.
_ATTENTION_RUNS = (
    *(("1.80e+00", 24576, "1.00e-06", 9), ("8.00e-01", 24576, "1.00e-06", 5)),
    *(("1.00e+00", 24576, "1.00e-06", 4), ("9.00e-01", 24576, "1.00e-06", 9)),
    *(("1.10e+00", 24576, "1.00e-06", 7), ("1.00e+00", 49152, "1.00e-06", 9)),
    *(("1.10e+00", 24576, "1.00e-06", 9), ("1.10e+00", 49152, "1.00e-06", 9)),
    *(("1.30e+00", 24576, "1.00e-05", 6), ("1.20e+00", 24576, "1.00e-06", 9)),
    *(("1.30e+00", 24576, "1.00e-05", 9), ("3.00e+00", 24576, "3.16e-06", 9)),
)


def _attention_output() -> AutoencoderSpec:
    """Kissane and others' autoencoders of the heads' outputs; named as SAELens names the release."""
    paths = {
        layer: "hf:ckkissane/attn-saes-gpt2-small-all-layers/"
        f"gpt2-small_L{layer}_Hcat_z_lr1.20e-03_l1{l1}_ds{size}_bs4096_dc{dead}_rsanthropic_rie25000"
        f"_nr4_v{run}.pt"
        for layer, (l1, size, dead, run) in enumerate(_ATTENTION_RUNS)
    }
    return AutoencoderSpec("attn.v_out", paths)


def _transcoders() -> AutoencoderSpec:
    """Dunefsky and Chlenski's transcoders of the MLPs; their inputs are before gain and bias."""
    paths = {
        layer: "hf:pchlenski/gpt2-transcoders/final_sparse_autoencoder_gpt2-small_"
        f"blocks.{layer}.ln2.hook_normalized_24576.pt"
        for layer in range(12)
    }
    return AutoencoderSpec("resid.torso.ln_mlp.post_scale", paths)


def _packaged(location: str) -> AutoencoderSpec:
    """Autoencoders of tiny-tales: whatever layers were trained; their folders say everything."""
    wanted = ActivationLocation.parse(location)
    root = Path(str(ASSETS / "tiny-tales" / "autoencoders"))
    folders = [
        folder
        for folder in sorted(root.glob("*"))
        if folder.is_dir() and ActivationLocation.parse(folder.name) == wanted
    ]
    layers = [path for folder in folders for path in folder.iterdir() if path.name.isdecimal()]
    if not layers:
        raise SourceError(
            f"the autoencoders of tiny-tales at {wanted} belong to the package and are missing from "
            f"this installation: there are none in {root}. Install neuron_explainer again."
        )
    return AutoencoderSpec(wanted, {int(path.name): str(path) for path in sorted(layers)})


# model -> name -> how to make its spec; packaged files are looked for only when they are asked for.
_AUTOENCODER_SPECS: dict[str, dict[str, Callable[[], AutoencoderSpec]]] = {
    "tiny-tales": {
        "ae-mlp-post-act": partial(_packaged, "mlp_post_act"),
        "ae-resid-delta-mlp": partial(_packaged, "resid_delta_mlp"),
        "ae-resid-delta-attn": partial(_packaged, "resid_delta_attn"),
    },
    "gpt2-small": {
        "ae-mlp-post-act-v1": partial(_openai, "mlp_post_act", "", "none"),
        "ae-resid-delta-mlp-v1": partial(_openai, "resid_delta_mlp", "", "none"),
        "ae-mlp-post-act-v4": partial(_openai, "mlp_post_act", "_v4", "none"),
        "ae-resid-delta-mlp-v4": partial(_openai, "resid_delta_mlp", "_v4", "none"),
        "ae-resid-delta-attn-v4": partial(_openai, "resid_delta_attn", "_v4", "none"),
        "gpt2-small-res-jb": _saelens_jb,
        "gpt2-small-res-jb-emb": _saelens_jb_embedding,
        **{
            f"gpt2-small-res-jb-feature-splitting-{size}": partial(_saelens_feature_splitting, size)
            for size in (768, 1536, 3072, 6144, 12288, 24576, 49152, 98304)
        },
        **{
            f"gpt2-small-res_{kind}-ajt": partial(_end_to_end, kind)
            for kind in ("sce", "scefr", "scl", "sle", "slefr", "sll")
        },
        "gpt2-small-mlp-tm": _mlp_output,
        "gpt2-small-hook-z-kk": _attention_output,
        "gpt2-transcoders": _transcoders,
        # TopK with k = 32, trained on layer-normed inputs.
        **{
            f"ae-{location.replace('_', '-')}-v5-{size}": partial(
                _openai, location, f"_v5_{size}", "layer_norm"
            )
            for size in ("32k", "128k")
            for location in (
                "resid_delta_attn",
                "resid_delta_mlp",
                "resid_post_attn",
                "resid_post_mlp",
            )
        },
    },
}


def list_autoencoder_names(model_name: str = "gpt2-small") -> list[str]:
    """The names of the autoencoders known for a model; some models have none."""
    return list(_AUTOENCODER_SPECS.get(_known_model(model_name), {}))


def get_autoencoder_spec(model_name: str, autoencoder_name: str) -> AutoencoderSpec:
    """Where the autoencoders called ``autoencoder_name`` of a model are."""
    model = _known_model(model_name)
    names = _AUTOENCODER_SPECS.get(model, {})
    if not isinstance(autoencoder_name, str):
        raise SourceError(
            f"expected the name of an autoencoder, found {type(autoencoder_name).__name__}."
        )
    if autoencoder_name not in names:
        known = f"Known for {model}: {', '.join(names) or 'none'}."
        others = [other for other, found in _AUTOENCODER_SPECS.items() if autoencoder_name in found]
        elsewhere = f" There is one of that name for {', '.join(others)}." if others else ""
        raise SourceError(
            f"no autoencoder {autoencoder_name!r} for {model}."
            f"{did_you_mean(autoencoder_name, names)}{elsewhere} {known} For files of your own: "
            "AutoencoderContext(AutoencoderConfig(location, {layer: path}), device)."
        )
    return names[autoencoder_name]()


def make_autoencoder_context(
    model_name: str,
    autoencoder_name: str,
    device: Device | None = None,
    omit_dead_latents: bool = False,
    dtype: torch.dtype = torch.float32,
) -> AutoencoderContext:
    """The autoencoders of that name. Each is loaded when it is first used.

    Args:
        model_name: ``"gpt2-small"``, ``"tiny-tales"``; see :func:`list_autoencoder_names`.
        autoencoder_name: such as ``"ae-resid-delta-mlp-v4"``.
        device: where to put them. Default: CUDA if there is one, else the CPU, as
            :meth:`Transformer.load` has it.
        omit_dead_latents: leave latents that never fired in training out of memory.
        dtype: of the weights in memory: that of the model they are to be spliced into.
    """
    spec = get_autoencoder_spec(model_name, autoencoder_name)
    where = default_device() if device is None else check_device(device)
    return AutoencoderContext(AutoencoderConfig.from_spec(spec), where, omit_dead_latents, dtype)


def _known_model(name: str) -> str:
    if not isinstance(name, str):
        raise SourceError(f"expected the name of a model, found {type(name).__name__}.")
    if files.is_remote(name) or Path(name).is_dir():
        raise SourceError(
            f"no autoencoders are known by name for the model in {name}; give the autoencoder's own "
            "folder or file."
        )
    spec = get_standard_model_spec(name)
    return next(known for known, other in MODEL_SPECS.items() if other is spec)
