"""sae_training: a torch file ``{"cfg": …, "state_dict": {…}}``, of gpt2-transcoders and early SAELens.

    W_enc [n, l]   b_enc [l]   W_dec [l, o]   b_dec [n]   b_dec_out [o] (transcoders)

    latents = relu((x - b_dec) W_enc + b_enc),   recons = latents W_dec + b_dec_out (or b_dec)

``b_dec`` is subtracted from the *input*, also by transcoders. ``cfg`` is a pickled object: its fields are
read, its class is neither looked up nor run. The models were TransformerLens's, with layer norms folded
and everything that writes to the residual stream centred. So the input ``ln2.hook_normalized`` of a
transcoder is the value before gain and bias, its output stands for the MLP's output minus its mean over
the width (``metadata["output_centred"]``), and autoencoders of the stream are ``"center"``.

As read in jacobdunefsky/transcoder_circuits at c7ae22d: ``sae_training/*.py``.
"""

from collections.abc import Mapping
from typing import Any

from neuron_explainer.errors import CheckpointError
from neuron_explainer.models.checkpoints.autoencoders.common import (
    check_facts,
    check_layout,
    is_on_the_stream,
    location_of,
    parameters,
    read_text,
    refuse_scaled_latents,
)
from neuron_explainer.models.checkpoints.autoencoders.format import (
    Content,
    Format,
    LoadedAutoencoder,
    Source,
    Stated,
    loaded,
)
from neuron_explainer.models.checkpoints.autoencoders.state import InputNormalization
from neuron_explainer.models.checkpoints.tensor_files import PickledConfig


def read(source: Source, stated: Stated) -> LoadedAutoencoder:
    """Read a torch file of this format."""
    assert source.content is not None
    where, cfg = source.path, _fields(source.content.get("cfg"))
    tensors = refuse_scaled_latents(where, source.content["state_dict"])
    is_transcoder = "b_dec_out" in tensors or cfg.get("is_transcoder") is True
    layout = "W_enc [n, l]  b_enc [l]  W_dec [l, o]  b_dec [n]"
    sizes = check_layout(where, tensors, layout + ("  b_dec_out [o]" if is_transcoder else ""))
    facts = {"d_in": sizes["n"], "d_sae": sizes["l"], "is_transcoder": is_transcoder}
    check_facts(f"{where}: cfg", cfg, facts, "the tensors")
    hook = None if cfg.get("hook_point_head_index") is not None else cfg.get("hook_point")
    location = location_of(hook)
    if location is None and stated.get("input_normalization") is None:
        raise CheckpointError(
            f"{where}: the location {hook!r} is not known here, so it is not known whether its inputs "
            "were centred. Give it: `Autoencoder.load(source, input_normalization='center')`, or "
            "'none'."
        )
    normalization: InputNormalization | None = None  # to be stated
    if location is not None:
        normalization = "center" if is_on_the_stream(location) else "none"
    metadata: dict[str, Any] = {"format": "sae_training", "cfg": _plain(cfg)}
    if is_transcoder:
        metadata["output_centred"] = True
    return loaded(
        where,
        stated,
        parameters(
            tensors["W_enc"].T,
            tensors["W_dec"].T,
            tensors["b_enc"],
            pre_bias=tensors["b_dec"],
            post_bias=tensors.get("b_dec_out"),
            is_transcoder=is_transcoder,
        ),
        said_by="the file",
        input_normalization=normalization,
        location=location,
        output_location=location_of(cfg.get("out_hook_point")) if is_transcoder else None,
        model_name=read_text(cfg, "model_name"),
        metadata=metadata,
    )


def _fields(cfg: Any) -> dict[str, Any]:
    """The fields of a config, whether an object or a dict."""
    if isinstance(cfg, PickledConfig):
        return dict(vars(cfg))
    return dict(cfg) if isinstance(cfg, Mapping) else {}


def _plain(cfg: Mapping[str, Any]) -> dict[str, Any]:
    """The fields that JSON can hold."""
    return {
        name: value
        for name, value in cfg.items()
        if value is None or isinstance(value, str | int | float)
    }


def holds(content: Content) -> bool:
    """Whether a torch file is of this format, though perhaps incomplete."""
    inner = content.get("state_dict")
    return isinstance(inner, Mapping) and "W_enc" in inner


SAE_TRAINING = Format(
    name="sae_training",
    layout="a .pt file with cfg and state_dict (gpt2-transcoders, early SAELens)",
    read=read,
    holds={"torch": holds},
)
