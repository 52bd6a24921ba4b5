"""Formats that are known and cannot be an ``Autoencoder``: refused by name, with the reason."""

from collections.abc import Callable

from neuron_explainer.models.checkpoints.autoencoders.format import Content, Format, refused


def _has_prefix(prefix: str) -> Callable[[Content], bool]:
    return lambda content: any(str(key).startswith(prefix) for key in content)


def _of_one_file(name: str, what: str, prefix: str) -> Format:
    """A format known by how a key of its tensors begins."""
    holds = _has_prefix(prefix)
    return Format(name, layout="", read=refused(what), holds={"safetensors": holds, "torch": holds})


TEMPORAL = Format(
    name="temporal",
    layout="",
    read=refused(
        "this is a temporal sparse autoencoder (Temporal Feature Analysis), which is not supported: its "
        "latents also depend on the tokens before, through attention."
    ),
    marks=("latest_ckpt.safetensors",),
    holds={"safetensors": _has_prefix("attn_layers.")},
)
CROSSLAYER_CODING = _of_one_file(
    "crosslayer_coding",
    "this is a cross-layer transcoder of crosslayer-coding, which is not supported; circuit-tracer's "
    "layout of such transcoders (W_enc_0.safetensors, …) is.",
    "encoder_module.encoders.",
)


def _language_model_saes(sae_type: str, what: str) -> Format:
    """A kind of Language-Model-SAEs' present layout, known by its config's ``sae_type``."""
    return Format(
        name=sae_type,
        layout="",
        read=refused(f"this is {what} of Language-Model-SAEs, which is not supported."),
        marks=("sae_weights.safetensors",),  # others' too: the config decides
        configs={"config.json": lambda config: config.get("sae_type") == sae_type},
    )


UNSUPPORTED = [
    TEMPORAL,
    CROSSLAYER_CODING,
    _language_model_saes("crosscoder", "a crosscoder (several models or layers at once)"),
    _language_model_saes("clt", "a cross-layer transcoder (all layers in one file)"),
    _language_model_saes("lorsa", "a Lorsa (attention in the place of an encoder)"),
    _language_model_saes("molt", "a MOLT (a mixture of linear transforms)"),
]
