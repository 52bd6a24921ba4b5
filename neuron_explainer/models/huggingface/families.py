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
    """Path of the norm before the unembedding; its output is ``resid.post_ln_f``."""
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
            attention=None if "attn.qk_probs" in missing else self.attention,
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


def _sites_by_reader(
    *, attn: str, attn_out: str, mlp: str, act_in: str, mlp_out: str
) -> dict[str, Tap]:
    """The sites of a layer in which attention and the MLP may read the output of one shared norm.

    What a part reads is tapped where it reads it, so that an edit reaches that part alone.

    Args:
        attn, mlp: the modules whose outputs are added to the stream.
        attn_out, act_in, mlp_out: as of ``_sites``.
    """
    return {
        "resid.torso.post_ln_attn": Tap("in", attn),
        "attn.v_out": Tap("in", attn_out),
        "resid.torso.delta_attn": Tap("out", attn),
        "resid.torso.post_ln_mlp": Tap("in", mlp),
        "mlp.pre_act": Tap("out", act_in),
        "mlp.post_act": Tap("in", mlp_out),
        "resid.torso.delta_mlp": Tap("out", mlp),
    }


def _without(sites: Mapping[str, Tap], *paths: str) -> dict[str, Tap]:
    return {path: tap for path, tap in sites.items() if path not in paths}


# --- layouts of weights ---


def _third(which: int) -> Layout:
    """GPT-2's ``[d, 3 * h * d_head]``: all of q, then k, then v."""
    return lambda weight, sizes: into_heads(weight.chunk(3, dim=1)[which].T, sizes)


def _third_in_each_head(which: int) -> Layout:
    """GPT-NeoX's ``[h * 3 * d_head, d]``: q, k and v of the first head, then of the second, …"""
    return lambda weight, sizes: weight.reshape(
        sizes[Dimension.ATTN_HEADS], 3, sizes[Dimension.VALUE_CHANNELS], -1
    )[:, which].transpose(1, 2)


def _of_shared(which: int) -> Layout:
    """GPT-BigCode's q (0), k (1) or v (2).

    The matrix is GPT-NeoX's, or ``[d + 2 * d_head, d]``: the queries of all heads, then the one key
    and the one value that they share.
    """

    def layout(weight: Tensor, sizes: Sizes) -> Tensor:
        d, d_head = sizes[Dimension.RESIDUAL_STREAM_CHANNELS], sizes[Dimension.VALUE_CHANNELS]
        if len(weight) == 3 * d:
            return _third_in_each_head(which)(weight, sizes)
        return into_heads(torch.split(weight, [d, d_head, d_head])[which], sizes)

    return layout


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
    """The weights of models in which q, k and v are ``nn.Linear`` modules of their own."""
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

_GEMMA = replace(
    _LLAMA,
    weights={
        **_LLAMA.weights,
        W.EMBEDDING: Weight("model.embed_tokens", _scaled_embedding),
        W.LAYER_NORM_GAIN_PRE_ATTN: Weight("input_layernorm", _one_more),
        W.LAYER_NORM_GAIN_PRE_MLP: Weight("post_attention_layernorm", _one_more),
        W.LAYER_NORM_GAIN_FINAL: Weight("model.norm", _one_more),
    },
)

# With images: the language model is a part of the model. Its layers are read for text alone.
_GEMMA3 = replace(
    _GEMMA2,
    layers="model.language_model.layers",
    final_norm="model.language_model.norm",
    weights={
        **_GEMMA2.weights,
        W.EMBEDDING: Weight("model.language_model.embed_tokens", _scaled_embedding),
        W.LAYER_NORM_GAIN_FINAL: Weight("model.language_model.norm", _one_more),
    },
)

_NORM_GAINS = [
    W.LAYER_NORM_GAIN_PRE_ATTN,
    W.LAYER_NORM_GAIN_PRE_MLP,
    W.LAYER_NORM_GAIN_FINAL,
    W.LAYER_NORM_BIAS_FINAL,
]

# OLMo's norms have no gain and no bias.
_OLMO = replace(_LLAMA, lacks=lambda config: [W.MLP_TO_HIDDEN, *_NORM_GAINS])

# OLMo 2 and 3 have norms behind attention and the MLP; both read the stream as it is.
_OLMO2 = replace(
    _LLAMA,
    sites={
        "attn.v_out": Tap("in", "self_attn.o_proj"),
        "resid.torso.delta_attn": Tap("out", "post_attention_layernorm"),
        "resid.torso.post_attn": Tap("in", "mlp", is_stream=True),
        "mlp.pre_act": Tap("out", "mlp.gate_proj"),
        "mlp.post_act": Tap("in", "mlp.down_proj"),
        "resid.torso.delta_mlp": Tap("out", "post_feedforward_layernorm"),
    },
    lacks=lambda config: [
        W.MLP_TO_HIDDEN,
        W.LAYER_NORM_GAIN_PRE_ATTN,
        W.LAYER_NORM_GAIN_PRE_MLP,
        W.LAYER_NORM_BIAS_FINAL,
    ],
)

# The experts of a mixture are one tensor: no module holds what one of them reads or writes.
_MIXTRAL = replace(
    _LLAMA,
    sites=_without(_LLAMA.sites, "mlp.pre_act", "mlp.post_act"),
    lacks=lambda config: [W.MLP_TO_HIDDEN, W.MLP_TO_RESIDUAL, W.LAYER_NORM_BIAS_FINAL],
)

# The softmax of GPT-OSS has a column more, for the part of attention that goes to no token.
_GPT_OSS = replace(_MIXTRAL, attention=None, works_in_place=True)


def _granite_lacks(config: Any) -> list[str]:
    lacks: list[str] = [W.MLP_TO_HIDDEN, W.LAYER_NORM_BIAS_FINAL]
    if config.residual_multiplier != 1:  # what is added is no module's output, but a multiple of it
        lacks += ["resid.torso.delta_attn", "resid.torso.delta_mlp"]
    if config.embedding_multiplier != 1:
        lacks += [W.EMBEDDING]
    return lacks


_STARCODER2 = replace(
    _LLAMA,
    sites=_sites(
        ln_attn="input_layernorm",
        attn_out="self_attn.o_proj",
        delta_attn="self_attn",
        ln_mlp="post_attention_layernorm",
        act_in="mlp.c_fc",
        mlp_out="mlp.c_proj",
        delta_mlp="mlp",
    ),
    weights={
        **_LLAMA.weights,
        W.MLP_TO_HIDDEN: Weight("mlp.c_fc", transposed),
        W.MLP_TO_RESIDUAL: Weight("mlp.c_proj", transposed),
    },
    lacks=_no_one,
)

_LLAMA_BY_READER = _sites_by_reader(
    attn="self_attn",
    attn_out="self_attn.o_proj",
    mlp="mlp",
    act_in="mlp.gate_proj",
    mlp_out="mlp.down_proj",
)

_COHERE = replace(
    _LLAMA,
    sites=_LLAMA_BY_READER,
    weights={
        **_LLAMA.weights,
        W.LAYER_NORM_GAIN_PRE_MLP: Weight("input_layernorm", as_stored),
    },
)

_STABLELM = replace(
    _LLAMA,
    sites=_LLAMA_BY_READER
    | {"resid.torso.post_attn": Tap("in", "post_attention_layernorm", is_stream=True)},
    lacks=lambda config: [
        W.MLP_TO_HIDDEN,
        *(
            ["resid.torso.post_attn", W.LAYER_NORM_GAIN_PRE_MLP]
            if config.use_parallel_residual
            else []
        ),
    ],
)

_PHI = Architecture(
    layers="model.layers",
    works_in_place=False,
    final_norm="model.final_layernorm",
    attention="self_attn",
    sites=_sites_by_reader(
        attn="self_attn",
        attn_out="self_attn.dense",
        mlp="mlp",
        act_in="mlp.fc1",
        mlp_out="mlp.fc2",
    ),
    weights=_linear_weights(
        embedding="model.embed_tokens",
        final_norm="model.final_layernorm",
        ln_attn="input_layernorm",
        ln_mlp="input_layernorm",
        attn="self_attn",
        attn_out="dense",
        mlp_in="mlp.fc1",
        mlp_out="mlp.fc2",
    ),
)

_GPTJ = Architecture(
    layers="transformer.h",
    works_in_place=False,
    final_norm="transformer.ln_f",
    attention="attn",
    sites=_sites_by_reader(
        attn="attn",
        attn_out="attn.out_proj",
        mlp="mlp",
        act_in="mlp.fc_in",
        mlp_out="mlp.fc_out",
    ),
    weights=_linear_weights(
        embedding="transformer.wte",
        final_norm="transformer.ln_f",
        ln_attn="ln_1",
        ln_mlp="ln_1",
        attn="attn",
        attn_out="out_proj",
        mlp_in="mlp.fc_in",
        mlp_out="mlp.fc_out",
    ),
)

_GPT_BIGCODE = replace(
    _GPT2,
    weights={  # nn.Linear, where GPT-2 has Conv1D
        **_GPT2.weights,
        W.ATTN_TO_QUERY: Weight("attn.c_attn", _of_shared(0)),
        W.ATTN_TO_KEY: Weight("attn.c_attn", _of_shared(1)),
        W.ATTN_TO_VALUE: Weight("attn.c_attn", _of_shared(2)),
        W.ATTN_TO_RESIDUAL: Weight("attn.c_proj", out_of_heads),
        W.MLP_TO_HIDDEN: Weight("mlp.c_fc", transposed),
        W.MLP_TO_RESIDUAL: Weight("mlp.c_proj", transposed),
    },
)


def _falcon_lacks(config: Any) -> list[str]:
    lacks: list[str] = []
    if config.new_decoder_architecture or config.parallel_attn:
        lacks += ["resid.torso.post_attn", W.LAYER_NORM_GAIN_PRE_MLP]
    if config.new_decoder_architecture and config.num_ln_in_parallel_attn in (None, 2):
        lacks += [W.LAYER_NORM_GAIN_PRE_ATTN]  # the norm has another name there
    if config.alibi:  # transformers' two ways to compute attention then give different patterns
        lacks += ["attn.qk_probs"]
    return lacks


_FALCON = Architecture(
    layers="transformer.h",
    final_norm="transformer.ln_f",
    attention="self_attention",
    sites=_sites_by_reader(
        attn="self_attention",
        attn_out="self_attention.dense",
        mlp="mlp",
        act_in="mlp.dense_h_to_4h",
        mlp_out="mlp.dense_4h_to_h",
    )
    | {"resid.torso.post_attn": Tap("in", "post_attention_layernorm", is_stream=True)},
    weights={  # how q, k and v lie in one matrix differs between the versions
        W.EMBEDDING: Weight("transformer.word_embeddings", as_stored),
        W.UNEMBEDDING: Weight("lm_head", transposed),
        W.ATTN_TO_RESIDUAL: Weight("self_attention.dense", out_of_heads),
        W.MLP_TO_HIDDEN: Weight("mlp.dense_h_to_4h", transposed),
        W.MLP_TO_RESIDUAL: Weight("mlp.dense_4h_to_h", transposed),
        W.LAYER_NORM_GAIN_PRE_ATTN: Weight("input_layernorm", as_stored),
        W.LAYER_NORM_GAIN_PRE_MLP: Weight("post_attention_layernorm", as_stored),
        W.LAYER_NORM_GAIN_FINAL: Weight("transformer.ln_f", as_stored),
        W.LAYER_NORM_BIAS_FINAL: Weight("transformer.ln_f:bias", as_stored),
    },
    lacks=_falcon_lacks,
)


def _bloom_lacks(config: Any) -> list[str]:
    lacks: list[str] = []
    if config.apply_residual_connection_post_layernorm:  # deltas are added to the norms' outputs
        lacks += ["resid.torso.post_ln_attn", "resid.torso.post_attn", "resid.torso.post_ln_mlp"]
        lacks += ["resid.torso.delta_attn", "resid.torso.delta_mlp"]
    if config.pretraining_tp > 1 and config.slow_but_exact:  # matrices are read, not called
        lacks += ["attn.v_out", "resid.torso.delta_attn", "mlp.post_act", "resid.torso.delta_mlp"]
    return lacks


_BLOOM = Architecture(
    layers="transformer.h",
    final_norm="transformer.ln_f",
    attention="self_attention",
    sites=_sites(
        ln_attn="input_layernorm",
        attn_out="self_attention.dense",
        delta_attn="self_attention.dense",
        ln_mlp="post_attention_layernorm",
        act_in="mlp.dense_h_to_4h",
        mlp_out="mlp.dense_4h_to_h",
        delta_mlp="mlp.dense_4h_to_h",
    ),
    weights={  # without the embedding: a norm stands between it and the stream
        W.UNEMBEDDING: Weight("lm_head", transposed),
        W.ATTN_TO_QUERY: Weight("self_attention.query_key_value", _third_in_each_head(0)),
        W.ATTN_TO_KEY: Weight("self_attention.query_key_value", _third_in_each_head(1)),
        W.ATTN_TO_VALUE: Weight("self_attention.query_key_value", _third_in_each_head(2)),
        W.ATTN_TO_RESIDUAL: Weight("self_attention.dense", out_of_heads),
        W.MLP_TO_HIDDEN: Weight("mlp.dense_h_to_4h", transposed),
        W.MLP_TO_RESIDUAL: Weight("mlp.dense_4h_to_h", transposed),
        W.LAYER_NORM_GAIN_PRE_ATTN: Weight("input_layernorm", as_stored),
        W.LAYER_NORM_GAIN_PRE_MLP: Weight("post_attention_layernorm", as_stored),
        W.LAYER_NORM_GAIN_FINAL: Weight("transformer.ln_f", as_stored),
        W.LAYER_NORM_BIAS_FINAL: Weight("transformer.ln_f:bias", as_stored),
    },
    lacks=_bloom_lacks,
)


def _third_of_rows(which: int) -> Layout:
    """MPT's ``[3 * h * d_head, d]``: all of q, then k, then v."""
    return lambda weight, sizes: into_heads(weight.chunk(3)[which], sizes)


def _mpt_lacks(config: Any) -> list[str]:
    clipped = config.attn_config.clip_qkv  # then no matrix alone gives q, k and v
    return [W.ATTN_TO_QUERY, W.ATTN_TO_KEY, W.ATTN_TO_VALUE] if clipped else []


_MPT = Architecture(
    layers="transformer.blocks",
    final_norm="transformer.norm_f",
    attention="attn",
    sites=_sites(
        ln_attn="norm_1",
        attn_out="attn.out_proj",
        delta_attn="attn",
        ln_mlp="norm_2",
        act_in="ffn.up_proj",
        mlp_out="ffn.down_proj",
        delta_mlp="ffn.down_proj",
    ),
    weights={
        W.EMBEDDING: Weight("transformer.wte", as_stored),
        W.UNEMBEDDING: Weight("lm_head", transposed),
        W.ATTN_TO_QUERY: Weight("attn.Wqkv", _third_of_rows(0)),
        W.ATTN_TO_KEY: Weight("attn.Wqkv", _third_of_rows(1)),
        W.ATTN_TO_VALUE: Weight("attn.Wqkv", _third_of_rows(2)),
        W.ATTN_TO_RESIDUAL: Weight("attn.out_proj", out_of_heads),
        W.MLP_TO_HIDDEN: Weight("ffn.up_proj", transposed),
        W.MLP_TO_RESIDUAL: Weight("ffn.down_proj", transposed),
        W.LAYER_NORM_GAIN_PRE_ATTN: Weight("norm_1", as_stored),
        W.LAYER_NORM_GAIN_PRE_MLP: Weight("norm_2", as_stored),
        W.LAYER_NORM_GAIN_FINAL: Weight("transformer.norm_f", as_stored),
    },
    lacks=_mpt_lacks,
)

FAMILIES: dict[str, Architecture] = {
    "bloom": _BLOOM,
    "cohere": _COHERE,
    "cohere2": _COHERE,
    "falcon": _FALCON,
    "gemma": _GEMMA,
    "gemma2": _GEMMA2,
    "gemma3": _GEMMA3,
    "gemma3_text": _GEMMA2,
    "gpt2": _GPT2,
    "gpt_bigcode": _GPT_BIGCODE,
    "gpt_neo": _GPT_NEO,
    "gpt_neox": _GPT_NEOX,
    "gpt_oss": _GPT_OSS,
    "gptj": _GPTJ,
    "granite": replace(_LLAMA, lacks=_granite_lacks),
    "llama": _LLAMA,
    "mistral": _LLAMA,
    "mixtral": _MIXTRAL,
    "mpt": _MPT,
    "olmo": _OLMO,
    "olmo2": _OLMO2,
    "olmo3": _OLMO2,
    "opt": _OPT,
    "phi": _PHI,
    "qwen2": _LLAMA,
    "qwen3": _LLAMA,
    "stablelm": _STABLELM,
    "starcoder2": _STARCODER2,
}
"""By ``config.model_type``."""


def architecture_of(config: Any) -> Architecture:
    """The table's entry for a model's config (the whole one, where text is a part of the model).

    Raises:
        LocationError: there is none; it says how to give one.
    """
    if config.model_type not in FAMILIES:
        raise LocationError(
            f"models of type {config.model_type!r} are not in the table ({', '.join(FAMILIES)}). "
            "Describe where their places are: architecture=Architecture(layers=…, sites={…}); see "
            "neuron_explainer.models.huggingface.families."
        )
    return FAMILIES[config.model_type].for_config(config.get_text_config())


# --- sizes ---


def sizes_of(config: Any) -> dict[Dimension, int]:
    """The sizes that a config of transformers states; one that it does not state is absent."""
    d_model = config.hidden_size
    sizes = {
        Dimension.RESIDUAL_STREAM_CHANNELS: d_model,
        Dimension.VOCAB_SIZE: config.vocab_size,
        Dimension.LAYERS: config.num_hidden_layers,
        Dimension.MAX_CONTEXT_LENGTH: getattr(config, "max_position_embeddings", None)
        or getattr(config, "max_seq_len", None),
        Dimension.MLP_ACTS: _mlp_width(config),
    }
    n_heads = getattr(config, "num_attention_heads", None)
    if n_heads is not None:  # models without attention have none
        d_head = getattr(config, "head_dim", None) or d_model // n_heads
        sizes[Dimension.ATTN_HEADS] = n_heads
        sizes[Dimension.QUERY_AND_KEY_CHANNELS] = sizes[Dimension.VALUE_CHANNELS] = d_head
    return {dimension: size for dimension, size in sizes.items() if size is not None}


def _mlp_width(config: Any) -> int | None:
    names = ("intermediate_size", "n_inner", "ffn_dim", "ffn_hidden_size")
    widths = [getattr(config, name, None) for name in names]
    # GPT-2's n_inner of None means four times the width of the model; BLOOM and MPT have no other.
    fourfold = hasattr(config, "n_inner") or config.model_type in ("bloom", "mpt")
    default = 4 * config.hidden_size if fourfold else None
    return next((width for width in widths if width), default)


def attention_window(config: Any) -> int | None:
    """The smallest window of a layer, in tokens; None if all layers see all tokens."""
    kinds = getattr(config, "layer_types", None) or getattr(config, "attention_layers", None)
    if kinds is not None and not {"sliding_attention", "local"} & set(kinds):
        return None
    return getattr(config, "sliding_window", None) or getattr(config, "window_size", None)


def counts_places(config: Any) -> bool:
    """True if attention measures distances in places of a row, pads included, and not in tokens.

    Pads at either end change no distance between tokens; pads between tokens do.
    """
    return bool(config.model_type == "mpt")
