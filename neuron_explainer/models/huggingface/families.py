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


# --- layouts of weights ---


def _third(which: int) -> Layout:
    """GPT-2's ``[d, 3 * h * d_head]``: all of q, then k, then v."""
    return lambda weight, sizes: into_heads(weight.chunk(3, dim=1)[which].T, sizes)


def _third_in_each_head(which: int) -> Layout:
    """GPT-NeoX's ``[h * 3 * d_head, d]``: q, k and v of the first head, then of the second, …"""
    return lambda weight, sizes: weight.reshape(
        sizes[Dimension.ATTN_HEADS], 3, sizes[Dimension.VALUE_CHANNELS], -1
    )[:, which].transpose(1, 2)


def _third_of_rows(which: int) -> Layout:
    """MPT's ``[3 * h * d_head, d]``: all of q, then k, then v."""
    return lambda weight, sizes: into_heads(weight.chunk(3)[which], sizes)


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


# --- one family ---

_QKV = (W.ATTN_TO_QUERY, W.ATTN_TO_KEY, W.ATTN_TO_VALUE)


def _family(
    layers: str,
    embedding: str,
    final_norm: str,
    attention: tuple[str, str, str],
    mlp: tuple[str, str, str],
    *,
    deltas: tuple[str | None, str] = (None, "mlp"),
    by_reader: bool = False,
    one_matrix: tuple[str, Callable[[int], Layout]] | None = None,
    gain: Layout = as_stored,
    weights: Mapping[WeightLocationType, Weight] | None = None,
    lacks: Callable[[Any], Collection[str]] = _no_one,
    works_in_place: bool = False,
) -> Architecture:
    """A family whose layers add attention and then an MLP to the stream.

    Args:
        attention: the norm before it, the module, and the name of its last matrix.
        mlp: the norm before it, the matrix whose output the nonlinearity is applied to (in a gated MLP:
            the gate), and its last matrix.
        deltas: the modules whose outputs are added to the stream; None: the one of ``attention``.
        by_reader: attention and the MLP may read the output of one shared norm. What a part reads is
            then tapped where it reads it, so that an edit reaches that part alone.
        one_matrix: the name of the matrix that holds q, k and v, and how; None if each is an
            ``nn.Linear`` of its own.
        gain: how the gains of norms are stored.
        weights: those that lie otherwise, and further ones.
    """
    ln_attn, attn, attn_out = attention
    ln_mlp, mlp_in, mlp_out = mlp
    delta_attn, delta_mlp = deltas[0] or attn, deltas[1]
    sites = {
        "resid.torso.post_ln_attn": Tap("in", delta_attn) if by_reader else Tap("out", ln_attn),
        "attn.v_out": Tap("in", f"{attn}.{attn_out}"),
        "resid.torso.delta_attn": Tap("out", delta_attn),
        "resid.torso.post_attn": Tap("in", ln_mlp, is_stream=True),
        "resid.torso.post_ln_mlp": Tap("in", delta_mlp) if by_reader else Tap("out", ln_mlp),
        "mlp.pre_act": Tap("out", mlp_in),
        "mlp.post_act": Tap("in", mlp_out),
        "resid.torso.delta_mlp": Tap("out", delta_mlp),
    }
    if ln_attn == ln_mlp:  # both read the same stream, so there is none between them
        del sites["resid.torso.post_attn"]
    found = _weights(embedding, final_norm, attention, mlp, one_matrix, gain)
    return Architecture(
        layers, sites, final_norm, attn, found | dict(weights or {}), lacks, works_in_place
    )


def _weights(
    embedding: str,
    final_norm: str,
    attention: tuple[str, str, str],
    mlp: tuple[str, str, str],
    one_matrix: tuple[str, Callable[[int], Layout]] | None,
    gain: Layout,
) -> dict[WeightLocationType, Weight]:
    """Where the weights of a family lie; arguments are those of :func:`_family`."""
    ln_attn, attn, attn_out = attention
    ln_mlp, mlp_in, mlp_out = mlp
    if one_matrix is None:
        qkv = {
            kind: Weight(f"{attn}.{x}_proj", into_heads)
            for kind, x in zip(_QKV, "qkv", strict=True)
        }
    else:
        name, layout = one_matrix
        qkv = {kind: Weight(f"{attn}.{name}", layout(i)) for i, kind in enumerate(_QKV)}
    return {
        W.EMBEDDING: Weight(embedding, as_stored),
        W.UNEMBEDDING: Weight("lm_head", transposed),
        **qkv,
        W.ATTN_TO_RESIDUAL: Weight(f"{attn}.{attn_out}", out_of_heads),
        W.MLP_TO_HIDDEN: Weight(mlp_in, transposed),
        W.MLP_TO_RESIDUAL: Weight(mlp_out, transposed),
        W.LAYER_NORM_GAIN_PRE_ATTN: Weight(ln_attn, gain),
        W.LAYER_NORM_GAIN_PRE_MLP: Weight(ln_mlp, gain),
        W.LAYER_NORM_GAIN_FINAL: Weight(final_norm, gain),
        W.LAYER_NORM_BIAS_FINAL: Weight(f"{final_norm}:bias", as_stored),
    }


def _always(*lacks: str) -> Callable[[Any], Collection[str]]:
    return lambda config: lacks


# --- what the variants of a family lack ---

# A gated MLP has two input matrices, and RMS norms have no bias.
_GATED = (W.MLP_TO_HIDDEN, W.LAYER_NORM_BIAS_FINAL)
_LAYER_GAINS = (W.LAYER_NORM_GAIN_PRE_ATTN, W.LAYER_NORM_GAIN_PRE_MLP)
# The experts of a mixture are one tensor: no module holds what one of them reads or writes.
_EXPERTS = (*_GATED, W.MLP_TO_RESIDUAL, "mlp.pre_act", "mlp.post_act")


def _gpt_neox_lacks(config: Any) -> list[str]:
    # In a parallel block both parts read the same stream, so there is no stream between them.
    return ["resid.torso.post_attn"] if config.use_parallel_residual else []


def _stablelm_lacks(config: Any) -> list[str]:
    parallel = ["resid.torso.post_attn", W.LAYER_NORM_GAIN_PRE_MLP]
    return [W.MLP_TO_HIDDEN, *(parallel if config.use_parallel_residual else [])]


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


def _granite_lacks(config: Any) -> list[str]:
    lacks: list[str] = [*_GATED]
    if config.residual_multiplier != 1:  # what is added is no module's output, but a multiple of it
        lacks += ["resid.torso.delta_attn", "resid.torso.delta_mlp"]
    if config.embedding_multiplier != 1:
        lacks += [W.EMBEDDING]
    return lacks


def _falcon_lacks(config: Any) -> list[str]:
    # How q, k and v lie in one matrix differs between the versions.
    lacks: list[str] = [W.ATTN_TO_QUERY, W.ATTN_TO_KEY, W.ATTN_TO_VALUE]
    if config.new_decoder_architecture or config.parallel_attn:
        lacks += ["resid.torso.post_attn", W.LAYER_NORM_GAIN_PRE_MLP]
    if config.new_decoder_architecture and config.num_ln_in_parallel_attn in (None, 2):
        lacks += [W.LAYER_NORM_GAIN_PRE_ATTN]  # the norm has another name there
    if config.alibi:  # transformers' two ways to compute attention then give different patterns
        lacks += ["attn.qk_probs"]
    return lacks


def _bloom_lacks(config: Any) -> list[str]:
    lacks: list[str] = [W.EMBEDDING]  # a norm stands between it and the stream
    if config.apply_residual_connection_post_layernorm:  # deltas are added to the norms' outputs
        lacks += ["resid.torso.post_ln_attn", "resid.torso.post_attn", "resid.torso.post_ln_mlp"]
        lacks += ["resid.torso.delta_attn", "resid.torso.delta_mlp"]
    if config.pretraining_tp > 1 and config.slow_but_exact:  # matrices are read, not called
        lacks += ["attn.v_out", "resid.torso.delta_attn", "mlp.post_act", "resid.torso.delta_mlp"]
    return lacks


def _mpt_lacks(config: Any) -> list[str]:
    clipped = config.attn_config.clip_qkv  # then no matrix alone gives q, k and v
    return [W.LAYER_NORM_BIAS_FINAL, *(_QKV if clipped else ())]


# --- the table ---

_GPT2_POSITIONS = {W.POSITION_EMBEDDING: Weight("transformer.wpe", as_stored)}
_GPT2: dict[str, Any] = {
    "layers": "transformer.h",
    "embedding": "transformer.wte",
    "final_norm": "transformer.ln_f",
    "attention": ("ln_1", "attn", "c_proj"),
    "mlp": ("ln_2", "mlp.c_fc", "mlp.c_proj"),
}
_LLAMA: dict[str, Any] = {
    "layers": "model.layers",
    "embedding": "model.embed_tokens",
    "final_norm": "model.norm",
    "attention": ("input_layernorm", "self_attn", "o_proj"),
    "mlp": ("post_attention_layernorm", "mlp.gate_proj", "mlp.down_proj"),
    "lacks": _always(*_GATED),
}
_GEMMA = _LLAMA | {
    "gain": _one_more,
    "weights": {W.EMBEDDING: Weight("model.embed_tokens", _scaled_embedding)},
}
_GEMMA2 = _GEMMA | {
    "mlp": ("pre_feedforward_layernorm", "mlp.gate_proj", "mlp.down_proj"),
    # Both are added after norms of their own.
    "deltas": ("post_attention_layernorm", "post_feedforward_layernorm"),
}
# Norms stand behind attention and the MLP; both read the stream as it is.
_OLMO2 = _LLAMA | {
    "mlp": ("mlp", "mlp.gate_proj", "mlp.down_proj"),
    "deltas": ("post_attention_layernorm", "post_feedforward_layernorm"),
    "lacks": _always(*_GATED, *_LAYER_GAINS, "resid.torso.post_ln_attn", "resid.torso.post_ln_mlp"),
}
_COHERE = _LLAMA | {
    "by_reader": True,
    "mlp": ("input_layernorm", "mlp.gate_proj", "mlp.down_proj"),
}


FAMILIES: dict[str, Architecture] = {
    "bloom": _family(
        "transformer.h",
        "transformer.word_embeddings",
        "transformer.ln_f",
        ("input_layernorm", "self_attention", "dense"),
        ("post_attention_layernorm", "mlp.dense_h_to_4h", "mlp.dense_4h_to_h"),
        deltas=("self_attention.dense", "mlp.dense_4h_to_h"),
        one_matrix=("query_key_value", _third_in_each_head),
        lacks=_bloom_lacks,
        works_in_place=True,
    ),
    "cohere": _family(**_COHERE),
    "cohere2": _family(**_COHERE),
    "falcon": _family(
        "transformer.h",
        "transformer.word_embeddings",
        "transformer.ln_f",
        ("input_layernorm", "self_attention", "dense"),
        ("post_attention_layernorm", "mlp.dense_h_to_4h", "mlp.dense_4h_to_h"),
        by_reader=True,
        lacks=_falcon_lacks,
        works_in_place=True,
    ),
    "gemma": _family(**_GEMMA),
    "gemma2": _family(**_GEMMA2),
    # With images: the language model is a part of the model. Its layers are read for text alone.
    "gemma3": _family(
        **_GEMMA2
        | {
            "layers": "model.language_model.layers",
            "final_norm": "model.language_model.norm",
            "weights": {
                W.EMBEDDING: Weight("model.language_model.embed_tokens", _scaled_embedding)
            },
        }
    ),
    "gemma3_text": _family(**_GEMMA2),
    "gpt2": _family(
        **_GPT2,
        one_matrix=("c_attn", _third),
        weights={  # Conv1D stores matrices as [in, out]
            **_GPT2_POSITIONS,
            W.ATTN_TO_RESIDUAL: Weight("attn.c_proj", lambda w, sizes: out_of_heads(w.T, sizes)),
            W.MLP_TO_HIDDEN: Weight("mlp.c_fc", as_stored),
            W.MLP_TO_RESIDUAL: Weight("mlp.c_proj", as_stored),
        },
    ),
    "gpt_bigcode": _family(**_GPT2, one_matrix=("c_attn", _of_shared), weights=_GPT2_POSITIONS),
    "gpt_neo": _family(
        **_GPT2 | {"attention": ("ln_1", "attn.attention", "out_proj")},
        deltas=("attn", "mlp"),
        weights=_GPT2_POSITIONS,
    ),
    "gpt_neox": _family(
        "gpt_neox.layers",
        "gpt_neox.embed_in",
        "gpt_neox.final_layer_norm",
        ("input_layernorm", "attention", "dense"),
        ("post_attention_layernorm", "mlp.dense_h_to_4h", "mlp.dense_4h_to_h"),
        one_matrix=("query_key_value", _third_in_each_head),
        lacks=_gpt_neox_lacks,
    ),
    # The softmax has a column more, for the part of attention that goes to no token.
    "gpt_oss": _family(
        **_LLAMA | {"lacks": _always(*_EXPERTS, "attn.qk_probs")}, works_in_place=True
    ),
    "gptj": _family(
        "transformer.h",
        "transformer.wte",
        "transformer.ln_f",
        ("ln_1", "attn", "out_proj"),
        ("ln_1", "mlp.fc_in", "mlp.fc_out"),
        by_reader=True,
    ),
    "granite": _family(**_LLAMA | {"lacks": _granite_lacks}),
    "llama": _family(**_LLAMA),
    "mistral": _family(**_LLAMA),
    "mixtral": _family(**_LLAMA | {"lacks": _always(*_EXPERTS)}),
    "mpt": _family(
        "transformer.blocks",
        "transformer.wte",
        "transformer.norm_f",
        ("norm_1", "attn", "out_proj"),
        ("norm_2", "ffn.up_proj", "ffn.down_proj"),
        deltas=(None, "ffn.down_proj"),
        one_matrix=("Wqkv", _third_of_rows),
        lacks=_mpt_lacks,
        works_in_place=True,
    ),
    # Its norms have no gain and no bias.
    "olmo": _family(**_LLAMA | {"lacks": _always(*_GATED, *_LAYER_GAINS, W.LAYER_NORM_GAIN_FINAL)}),
    "olmo2": _family(**_OLMO2),
    "olmo3": _family(**_OLMO2),
    "opt": _family(
        "model.decoder.layers",
        "model.decoder.embed_tokens",
        "model.decoder.final_layer_norm",
        ("self_attn_layer_norm", "self_attn", "out_proj"),
        ("final_layer_norm", "fc1", "fc2"),
        deltas=(None, "fc2"),
        weights={W.POSITION_EMBEDDING: Weight("model.decoder.embed_positions", _after_two)},
        lacks=_opt_lacks,
    ),
    "phi": _family(
        "model.layers",
        "model.embed_tokens",
        "model.final_layernorm",
        ("input_layernorm", "self_attn", "dense"),
        ("input_layernorm", "mlp.fc1", "mlp.fc2"),
        by_reader=True,
    ),
    "qwen2": _family(**_LLAMA),
    "qwen3": _family(**_LLAMA),
    "stablelm": _family(**_LLAMA | {"by_reader": True, "lacks": _stablelm_lacks}),
    "starcoder2": _family(
        **_LLAMA | {"mlp": ("post_attention_layernorm", "mlp.c_fc", "mlp.c_proj"), "lacks": _no_one}
    ),
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
