"""Releases whose files are the four tensors of an autoencoder, in a torch file, and little more.

attn_saes, also 1L-Sparse-Autoencoder: ReLU, ``b_dec`` is also subtracted from the input

    W_enc [n, l]   b_enc [l]   W_dec [l, n]   b_dec [n]     and NAME_cfg.json beside NAME.pt

qwen_scope: TopK, nothing is subtracted from the input; ``k`` is in the name of the release only

    W_enc [l, n]   b_enc [l]   W_dec [n, l]   b_dec [n]

goodfire: ReLU, nothing is subtracted from the input

    encoder_linear.weight [l, n], .bias [l]   decoder_linear.weight [n, l], .bias [n]

The biases tell which way round the matrices are. As read in ckkissane/attn-saes-gpt2-small-all-layers,
in the model cards of Qwen Scope and Goodfire, and in the loaders of sae-lens 6.54.12.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from neuron_explainer.errors import CheckpointError
from neuron_explainer.models.checkpoints.autoencoders.common import (
    check_facts,
    check_layout,
    encoder_by_latent,
    location_of,
    parameters,
    read_text,
)
from neuron_explainer.models.checkpoints.autoencoders.format import (
    Format,
    LoadedAutoencoder,
    Source,
    Stated,
    has_keys,
    loaded,
)

_KEYS = ("W_enc", "W_dec", "b_enc", "b_dec")


# ---- attn_saes -----------------------------------------------------------------------------------


def read_attn_saes(source: Source, stated: Stated) -> LoadedAutoencoder:
    """Read a torch file and the config beside it."""
    assert source.content is not None
    where, tensors = source.path, source.content
    config_file = f"{Path(str(where)).stem}_cfg.json"
    config = source.json_if_any(config_file)
    if config is None:
        raise CheckpointError(
            f"{where}: W_enc, W_dec, b_enc and b_dec alone do not say how they are applied; expected "
            f"{config_file} beside it, as in the attention-output autoencoders of GPT-2 small."
        )
    sizes = check_layout(where, tensors, "W_enc [n, l]  b_enc [l]  W_dec [l, n]  b_dec [n]")
    check_facts(
        f"{where}: {config_file} beside it",
        config,
        {"act_size": sizes["n"], "dict_size": sizes["l"]},
        "the tensors",
    )
    return loaded(
        where,
        stated,
        parameters(
            tensors["W_enc"].T, tensors["W_dec"].T, tensors["b_enc"], pre_bias=tensors["b_dec"]
        ),
        location=location_of(config.get("act_name")),
        model_name=read_text(config, "model_name"),
        metadata={"format": "attn_saes", "cfg": config},
    )


ATTN_SAES = Format(
    name="attn_saes",
    layout="a .pt file with W_enc, W_dec, b_enc, b_dec and NAME_cfg.json beside it (attention-output "
    "autoencoders of GPT-2 small)",
    read=read_attn_saes,
    holds={"torch": lambda content: has_keys(*_KEYS)(content) and not encoder_by_latent(content)},
)


# ---- Qwen Scope ----------------------------------------------------------------------------------


def read_qwen_scope(source: Source, stated: Stated) -> LoadedAutoencoder:
    """Read a torch file; ``k`` has to be stated."""
    if stated.get("k") is None:
        raise CheckpointError(
            f"{source.path}: k: only the name of a release of Qwen Scope says it (…-L0_50: 50). Give it: "
            "`Autoencoder.load(source, k=50)`, in the shell `--k 50`."
        )
    return _linear(source, stated, "qwen_scope", _KEYS, stated["k"])


QWEN_SCOPE = Format(
    name="qwen_scope",
    layout="a .pt file with W_enc [l, n], W_dec, b_enc, b_dec (Qwen Scope)",
    read=read_qwen_scope,
    states=frozenset({"k"}),
    holds={"torch": lambda content: has_keys(*_KEYS)(content) and encoder_by_latent(content)},
)


# ---- Goodfire ------------------------------------------------------------------------------------


def read_goodfire(source: Source, stated: Stated) -> LoadedAutoencoder:
    """Read a torch file."""
    parts = ("encoder_linear", "decoder_linear")
    names = [f"{part}.{kind}" for kind in ("weight", "bias") for part in parts]
    return _linear(source, stated, "goodfire", names)


GOODFIRE = Format(
    name="goodfire",
    layout="a .pt or .pth file with encoder_linear.weight (Goodfire)",
    read=read_goodfire,
    holds={"torch": has_keys("encoder_linear.weight")},
)


def _linear(
    source: Source, stated: Stated, name: str, keys: Sequence[str], k: int | None = None
) -> LoadedAutoencoder:
    """Two matrices laid out as torch's linear layers, ``[l, n]`` and ``[n, l]``; TopK if ``k``."""
    assert source.content is not None
    where, tensors = source.path, source.content
    axes = ("[l, n]", "[n, l]", "[l]", "[n]")
    check_layout(where, tensors, "  ".join(map(" ".join, zip(keys, axes, strict=True))))
    encoder, decoder, latent_bias, bias = (tensors[key] for key in keys)
    fields: dict[str, Any] = {} if k is None else {"k": k, "postact_fn": "ReLU"}
    state = parameters(
        encoder,
        decoder,
        latent_bias,
        post_bias=bias,
        nonlinearity="ReLU" if k is None else "TopK",
        **fields,
    )
    return loaded(where, stated, state, metadata={"format": name})
