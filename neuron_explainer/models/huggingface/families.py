"""Where the places of our hook tree are in the models of Hugging Face: one data table.

A family's entry names, for each hook path, the module whose input or output it is. Module names are
those of transformers. Each place means the same as everywhere in this package: ``delta_attn`` and
``delta_mlp`` are what is added to the residual stream, ``mlp.post_act`` is what the MLP's last matrix
reads, and ``attn.v_out`` is what attention's last matrix reads.

Shape legend: ``d`` model width, ``f`` MLP width, ``h`` heads, ``g`` heads of keys and values (``h``,
or fewer if heads share them), ``d_head`` width of a head, ``v`` vocabulary.
"""

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from neuron_explainer.errors import LocationError
from neuron_explainer.models.locations import SITES, ActivationLocation
from neuron_explainer.models.weight_layouts import (
    Layout,
    Sizes,
    Weight,
    as_stored,
    into_heads,
    out_of_heads,
    transposed,
)
from neuron_explainer.models.weight_names import Dimension, WeightLocationType

W = WeightLocationType


class Tap(NamedTuple):
    """A tensor's place: the input or the output of a module."""

    side: Literal["in", "out"]
    module: str
    """Path of the module below the layer; "" is the layer itself."""
    is_stream: bool = False
    """True for an input that is the residual stream itself, which the layer also uses after the module.
    A hook's result is then written into the tensor, so that both see it."""


def _no_one(config: Any) -> Collection[str]:
    return ()


@dataclass(frozen=True)
class Architecture:
    """Where the places are in one family of models. Write one for a family that is not in the table::

        Architecture(
            layers="backbone.blocks",
            final_norm="backbone.norm",
            sites={"resid.torso.delta_mlp": Tap("out", "ffn"), "mlp.post_act": Tap("in", "ffn.down")},
        )

    ``resid.post_emb`` (input of the first layer), ``resid.torso.post_mlp`` (output of each layer)
    and ``logits`` need no entry.
    """

    layers: str
    """Path of the list of layers."""
    sites: Mapping[str, Tap] = field(default_factory=dict)
    """Hook path -> its place in each layer."""
    final_norm: str | None = None
    """Path of the norm before the unembedding: its output is ``resid.post_ln_f``."""
    attention: str | None = None
    """Path, below a layer, of the module in which a single softmax computes ``attn.qk_probs``."""
    weights: Mapping[WeightLocationType, Weight] = field(default_factory=dict)
    lacks: Callable[[Any], Collection[str]] = _no_one
    """For a config: the hook paths and weights of this entry that such a model does not have."""
    works_in_place: bool = True
    """Whether the model's code may change its tensors in place. The model then continues with copies of
    what hooks get, so that a tensor that a hook keeps does not change."""

    def __post_init__(self) -> None:
        for path in self.sites:
            if path != ActivationLocation(path).path or not SITES[path].per_layer:
                raise LocationError(
                    f"Architecture.sites: {path!r} is not the path of a place in each layer. "
                    f"They are: {', '.join(p for p, site in SITES.items() if site.per_layer)}."
                )

    def for_config(self, config: Any) -> "Architecture":
        """This entry without the places that the variant described by ``config`` lacks."""
        missing = set(self.lacks(config))
        return replace(
            self,
            sites={path: tap for path, tap in self.sites.items() if path not in missing},
            weights={kind: weight for kind, weight in self.weights.items() if kind not in missing},
            final_norm=None if "resid.post_ln_f" in missing else self.final_norm,
            lacks=_no_one,
        )

    @property
    def paths(self) -> list[str]:
        """The hook paths that exist, in the order of a forward pass."""
        found = {"resid.post_emb", "resid.torso.post_mlp", "logits", *self.sites}
        found |= {"resid.post_ln_f"} if self.final_norm is not None else set()
        found |= {"attn.qk_probs"} if self.attention is not None else set()
        return [path for path in SITES if path in found]


# --- sites ---


def _sites(
    *,
    ln_attn: str,
    attn_out: str,
    delta_attn: str,
    ln_mlp: str,
    act_in: str,
    mlp_out: str,
    delta_mlp: str,
) -> dict[str, Tap]:
    """The sites of a layer that adds attention and then an MLP, each of which reads the normed stream.

    Args:
        ln_attn, ln_mlp: the norms before attention and before the MLP.
        attn_out, mlp_out: the last matrices of attention and of the MLP.
        delta_attn, delta_mlp: the modules whose outputs are added to the stream.
        act_in: the matrix whose output the nonlinearity is applied to (in a gated MLP: the gate).
    """
    return {
        "resid.torso.post_ln_attn": Tap("out", ln_attn),
        "attn.v_out": Tap("in", attn_out),
        "resid.torso.delta_attn": Tap("out", delta_attn),
        "resid.torso.post_attn": Tap("in", ln_mlp, is_stream=True),
        "resid.torso.post_ln_mlp": Tap("out", ln_mlp),
        "mlp.pre_act": Tap("out", act_in),
        "mlp.post_act": Tap("in", mlp_out),
        "resid.torso.delta_mlp": Tap("out", delta_mlp),
    }


# --- layouts of weights ---


def _third(which: int) -> Layout:
    """GPT-2's ``[d, 3 * h * d_head]``: all of q, then k, then v."""
    return lambda weight, sizes: into_heads(weight.chunk(3, dim=1)[which].T, sizes)


def _third_in_each_head(which: int) -> Layout:
    """GPT-NeoX's ``[h * 3 * d_head, d]``: q, k and v of the first head, then of the second, …"""
    return lambda weight, sizes: weight.reshape(
        sizes[Dimension.ATTN_HEADS], 3, sizes[Dimension.VALUE_CHANNELS], -1
    )[:, which].transpose(1, 2)


def _one_more(weight: Tensor, sizes: Sizes) -> Tensor:
    """Gemma stores a norm's gain minus 1."""
    return 1 + weight


def _scaled_embedding(weight: Tensor, sizes: Sizes) -> Tensor:
    """Gemma multiplies embeddings by sqrt(d), rounded to the weights' dtype."""
    factor = torch.tensor(sizes[Dimension.RESIDUAL_STREAM_CHANNELS] ** 0.5)
    return weight * factor.to(weight.dtype).item()


def _after_two(weight: Tensor, sizes: Sizes) -> Tensor:
    """OPT's positions start at row 2."""
    return weight[2:]


def _linear_weights(
    *,
    embedding: str,
    final_norm: str,
    ln_attn: str,
    ln_mlp: str,
    attn: str,
    attn_out: str,
    mlp_in: str,
    mlp_out: str,
) -> dict[WeightLocationType, Weight]:
    """Weights of models made of ``nn.Linear`` with q, k and v apart."""
    return {
        W.EMBEDDING: Weight(embedding, as_stored),
        W.UNEMBEDDING: Weight("lm_head", transposed),
        W.ATTN_TO_QUERY: Weight(f"{attn}.q_proj", into_heads),
        W.ATTN_TO_KEY: Weight(f"{attn}.k_proj", into_heads),
        W.ATTN_TO_VALUE: Weight(f"{attn}.v_proj", into_heads),
        W.ATTN_TO_RESIDUAL: Weight(f"{attn}.{attn_out}", out_of_heads),
        W.MLP_TO_HIDDEN: Weight(mlp_in, transposed),
        W.MLP_TO_RESIDUAL: Weight(mlp_out, transposed),
        W.LAYER_NORM_GAIN_PRE_ATTN: Weight(ln_attn, as_stored),
        W.LAYER_NORM_GAIN_PRE_MLP: Weight(ln_mlp, as_stored),
        W.LAYER_NORM_GAIN_FINAL: Weight(final_norm, as_stored),
        W.LAYER_NORM_BIAS_FINAL: Weight(f"{final_norm}:bias", as_stored),
    }


# --- the table ---

_GPT2 = Architecture(
    layers="transformer.h",
    works_in_place=False,
    final_norm="transformer.ln_f",
    attention="attn",
    sites=_sites(
        ln_attn="ln_1",
        attn_out="attn.c_proj",
        delta_attn="attn",
        ln_mlp="ln_2",
        act_in="mlp.c_fc",
        mlp_out="mlp.c_proj",
        delta_mlp="mlp",
    ),
    weights={  # Conv1D stores matrices as [in, out]
        W.EMBEDDING: Weight("transformer.wte", as_stored),
        W.POSITION_EMBEDDING: Weight("transformer.wpe", as_stored),
        W.UNEMBEDDING: Weight("lm_head", transposed),
        W.ATTN_TO_QUERY: Weight("attn.c_attn", _third(0)),
        W.ATTN_TO_KEY: Weight("attn.c_attn", _third(1)),
        W.ATTN_TO_VALUE: Weight("attn.c_attn", _third(2)),
        W.ATTN_TO_RESIDUAL: Weight("attn.c_proj", lambda w, sizes: out_of_heads(w.T, sizes)),
        W.MLP_TO_HIDDEN: Weight("mlp.c_fc", as_stored),
        W.MLP_TO_RESIDUAL: Weight("mlp.c_proj", as_stored),
        W.LAYER_NORM_GAIN_PRE_ATTN: Weight("ln_1", as_stored),
        W.LAYER_NORM_GAIN_PRE_MLP: Weight("ln_2", as_stored),
        W.LAYER_NORM_GAIN_FINAL: Weight("transformer.ln_f", as_stored),
        W.LAYER_NORM_BIAS_FINAL: Weight("transformer.ln_f:bias", as_stored),
    },
)

_GPT_NEO = Architecture(
    layers="transformer.h",
    works_in_place=False,
    final_norm="transformer.ln_f",
    attention="attn.attention",
    sites=_sites(
        ln_attn="ln_1",
        attn_out="attn.attention.out_proj",
        delta_attn="attn",
        ln_mlp="ln_2",
        act_in="mlp.c_fc",
        mlp_out="mlp.c_proj",
        delta_mlp="mlp",
    ),
    weights=_linear_weights(
        embedding="transformer.wte",
        final_norm="transformer.ln_f",
        ln_attn="ln_1",
        ln_mlp="ln_2",
        attn="attn.attention",
        attn_out="out_proj",
        mlp_in="mlp.c_fc",
        mlp_out="mlp.c_proj",
    )
    | {W.POSITION_EMBEDDING: Weight("transformer.wpe", as_stored)},
)

_GPT_NEOX = Architecture(
    layers="gpt_neox.layers",
    works_in_place=False,
    final_norm="gpt_neox.final_layer_norm",
    attention="attention",
    sites=_sites(
        ln_attn="input_layernorm",
        attn_out="attention.dense",
        delta_attn="attention",
        ln_mlp="post_attention_layernorm",
        act_in="mlp.dense_h_to_4h",
        mlp_out="mlp.dense_4h_to_h",
        delta_mlp="mlp",
    ),
    weights={
        W.EMBEDDING: Weight("gpt_neox.embed_in", as_stored),
        W.UNEMBEDDING: Weight("lm_head", transposed),
        W.ATTN_TO_QUERY: Weight("attention.query_key_value", _third_in_each_head(0)),
        W.ATTN_TO_KEY: Weight("attention.query_key_value", _third_in_each_head(1)),
        W.ATTN_TO_VALUE: Weight("attention.query_key_value", _third_in_each_head(2)),
        W.ATTN_TO_RESIDUAL: Weight("attention.dense", out_of_heads),
        W.MLP_TO_HIDDEN: Weight("mlp.dense_h_to_4h", transposed),
        W.MLP_TO_RESIDUAL: Weight("mlp.dense_4h_to_h", transposed),
        W.LAYER_NORM_GAIN_PRE_ATTN: Weight("input_layernorm", as_stored),
        W.LAYER_NORM_GAIN_PRE_MLP: Weight("post_attention_layernorm", as_stored),
        W.LAYER_NORM_GAIN_FINAL: Weight("gpt_neox.final_layer_norm", as_stored),
        W.LAYER_NORM_BIAS_FINAL: Weight("gpt_neox.final_layer_norm:bias", as_stored),
    },
    # In a parallel block both parts read the same stream, so there is no stream between them.
    lacks=lambda config: ["resid.torso.post_attn"] if config.use_parallel_residual else [],
)


def _opt_lacks(config: Any) -> list[str]:
    lacks: list[str] = []
    if not config.do_layer_norm_before:
        # Norms come after the sums, so there is no normed copy of a stream, and no sum without a norm.
        lacks += ["resid.torso.post_ln_attn", "resid.torso.post_attn", "resid.torso.post_ln_mlp"]
        lacks += [W.LAYER_NORM_GAIN_PRE_ATTN, W.LAYER_NORM_GAIN_PRE_MLP]
    if not config.do_layer_norm_before or getattr(config, "_remove_final_layer_norm", False):
        lacks += ["resid.post_ln_f", W.LAYER_NORM_GAIN_FINAL, W.LAYER_NORM_BIAS_FINAL]
    if (
        config.word_embed_proj_dim != config.hidden_size
    ):  # tokens have another width than the stream
        lacks += [W.EMBEDDING, W.UNEMBEDDING]
    return lacks


_OPT = Architecture(
    layers="model.decoder.layers",
    works_in_place=False,
    final_norm="model.decoder.final_layer_norm",
    attention="self_attn",
    sites=_sites(
        ln_attn="self_attn_layer_norm",
        attn_out="self_attn.out_proj",
        delta_attn="self_attn",
        ln_mlp="final_layer_norm",
        act_in="fc1",
        mlp_out="fc2",
        delta_mlp="fc2",
    ),
    weights=_linear_weights(
        embedding="model.decoder.embed_tokens",
        final_norm="model.decoder.final_layer_norm",
        ln_attn="self_attn_layer_norm",
        ln_mlp="final_layer_norm",
        attn="self_attn",
        attn_out="out_proj",
        mlp_in="fc1",
        mlp_out="fc2",
    )
    | {W.POSITION_EMBEDDING: Weight("model.decoder.embed_positions", _after_two)},
    lacks=_opt_lacks,
)

_LLAMA = Architecture(
    layers="model.layers",
    works_in_place=False,
    final_norm="model.norm",
    attention="self_attn",
    sites=_sites(
        ln_attn="input_layernorm",
        attn_out="self_attn.o_proj",
        delta_attn="self_attn",
        ln_mlp="post_attention_layernorm",
        act_in="mlp.gate_proj",
        mlp_out="mlp.down_proj",
        delta_mlp="mlp",
    ),
    weights=_linear_weights(
        embedding="model.embed_tokens",
        final_norm="model.norm",
        ln_attn="input_layernorm",
        ln_mlp="post_attention_layernorm",
        attn="self_attn",
        attn_out="o_proj",
        mlp_in="mlp.gate_proj",
        mlp_out="mlp.down_proj",
    ),
    # A gated MLP has two input matrices, and RMS norms have no bias.
    lacks=lambda config: [W.MLP_TO_HIDDEN, W.LAYER_NORM_BIAS_FINAL],
)

_GEMMA2 = replace(
    _LLAMA,
    sites=_sites(
        ln_attn="input_layernorm",
        attn_out="self_attn.o_proj",
        delta_attn="post_attention_layernorm",  # added after a norm of its own
        ln_mlp="pre_feedforward_layernorm",
        act_in="mlp.gate_proj",
        mlp_out="mlp.down_proj",
        delta_mlp="post_feedforward_layernorm",
    ),
    weights={
        **_LLAMA.weights,
        W.EMBEDDING: Weight("model.embed_tokens", _scaled_embedding),
        W.LAYER_NORM_GAIN_PRE_ATTN: Weight("input_layernorm", _one_more),
        W.LAYER_NORM_GAIN_PRE_MLP: Weight("pre_feedforward_layernorm", _one_more),
        W.LAYER_NORM_GAIN_FINAL: Weight("model.norm", _one_more),
    },
)

FAMILIES: dict[str, Architecture] = {
    "gpt2": _GPT2,
    "gpt_neo": _GPT_NEO,
    "gpt_neox": _GPT_NEOX,
    "opt": _OPT,
    "llama": _LLAMA,
    "mistral": _LLAMA,
    "qwen2": _LLAMA,
    "gemma2": _GEMMA2,
}
"""By ``config.model_type``."""


def architecture_of(config: Any) -> Architecture:
    """The table's entry for a config; a LocationError that says what to do if there is none."""
    if config.model_type not in FAMILIES:
        raise LocationError(
            f"models of type {config.model_type!r} are not in the table ({', '.join(FAMILIES)}). "
            "Describe where their places are: architecture=Architecture(layers=…, sites={…}); see "
            "neuron_explainer.models.huggingface.families."
        )
    return FAMILIES[config.model_type].for_config(config)


# --- sizes ---


def sizes_of(config: Any) -> dict[Dimension, int]:
    """The sizes that a config of transformers states; one that it does not state is absent."""
    d_model = config.hidden_size
    sizes = {
        Dimension.RESIDUAL_STREAM_CHANNELS: d_model,
        Dimension.VOCAB_SIZE: config.vocab_size,
        Dimension.LAYERS: config.num_hidden_layers,
        Dimension.MAX_CONTEXT_LENGTH: getattr(config, "max_position_embeddings", None),
        Dimension.MLP_ACTS: _mlp_width(config),
    }
    n_heads = getattr(config, "num_attention_heads", None)
    if n_heads is not None:  # models without attention have none
        d_head = getattr(config, "head_dim", None) or d_model // n_heads
        sizes[Dimension.ATTN_HEADS] = n_heads
        sizes[Dimension.QUERY_AND_KEY_CHANNELS] = sizes[Dimension.VALUE_CHANNELS] = d_head
    return {dimension: size for dimension, size in sizes.items() if size is not None}


def _mlp_width(config: Any) -> int | None:
    widths = [getattr(config, name, None) for name in ("intermediate_size", "n_inner", "ffn_dim")]
    # GPT-2's n_inner of None means four times the width of the model.
    default = 4 * config.hidden_size if hasattr(config, "n_inner") else None
    return next((width for width in widths if width), default)


def attention_window(config: Any) -> int | None:
    """The smallest window of a layer, in tokens; None if all layers see all tokens."""
    kinds = getattr(config, "layer_types", None) or getattr(config, "attention_layers", None)
    if kinds is not None and not {"sliding_attention", "local"} & set(kinds):
        return None
    return getattr(config, "sliding_window", None) or getattr(config, "window_size", None)
