"""Which latents of one dictionary attend to which of another: directions read through a head's QK.

For a query direction ``a`` and a key direction ``b`` in the residual stream, one unit of activation of
each gives the head's attention score

    score(a, b) = (a' * g) W_Q . (b' * g) W_K / sqrt(d_head)

where ``g`` is the gain of the norm before attention and ``a' = a - mean(a)`` if that norm subtracts the
mean (LayerNorm; with RMSNorm ``a' = a``). Left out are

- the norm's division by the scale of the stream, one positive factor for the query and one for the key;
- the biases of queries and keys and of the norm: they give terms that depend on the query alone, which
  the softmax removes, and a term that depends on the key alone, which it does not;
- positions: with rotary embeddings (Llama, GPT-NeoX) a score depends on the distance between the tokens.
  The scores given are those at distance 0; ``note`` says so. A model's other scale of attention, cap of
  scores or penalty of distance is left out too.

Heads that share keys (grouped queries) each have the shared ``W_K``. Models that norm queries and keys
(Qwen 3, OLMo 2) are refused: there a score is not bilinear.

Shape legend: ``a`` query directions, ``b`` key directions, ``d`` model width, ``d_head`` width of a head.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from neuron_explainer.analysis.matching import rows_of
from neuron_explainer.analysis.unit_directions import BEHIND_FINAL_NORM, Units
from neuron_explainer.errors import InputError, LocationError
from neuron_explainer.kernels.top_k import top_k
from neuron_explainer.models.autoencoder import Autoencoder
from neuron_explainer.models.huggingface.context import HuggingFaceModelContext
from neuron_explainer.models.locations import ActivationLocation
from neuron_explainer.models.model_context import ModelContext
from neuron_explainer.models.weight_names import Dimension, WeightLocationType

_CHUNK_BYTES = 2**26
_NORMED = "resid.torso.post_ln_attn"


class Pair(NamedTuple):
    """A query direction, a key direction and their score."""

    query: int
    key: int
    score: float


@dataclass(frozen=True, eq=False, repr=False)
class AttentionScores:
    """The scores of all pairs, held as two factors: they are multiplied where they are asked for."""

    queries: Tensor
    """``[a, d_head]`` float32; the scale of attention is in it."""
    keys: Tensor
    """``[b, d_head]`` float32"""
    query_name: str
    key_name: str
    head: str
    """Such as ``"head 3 of layer 1"``."""
    note: str
    """What the scores leave out."""

    def of_query(self, query: int) -> Tensor:
        """The scores of one query direction with every key direction, ``[b]``."""
        _check(query, len(self.queries), self.query_name)
        return self.keys @ self.queries[query]

    def of_key(self, key: int) -> Tensor:
        """The scores of every query direction with one key direction, ``[a]``."""
        _check(key, len(self.keys), self.key_name)
        return self.queries @ self.keys[key]

    def attended_by(self, query: int, k: int = 10) -> list[Pair]:
        """The key directions that a query direction attends to most, largest score first."""
        values, keys = _largest(self.of_query(query), k)
        return [Pair(query, key, score) for key, score in zip(keys, values, strict=True)]

    def attending_to(self, key: int, k: int = 10) -> list[Pair]:
        """The query directions that attend to a key direction most, largest score first."""
        values, queries = _largest(self.of_key(key), k)
        return [Pair(query, key, score) for query, score in zip(queries, values, strict=True)]

    def top_pairs(self, k: int = 10, *, chunk_bytes: int = _CHUNK_BYTES) -> list[Pair]:
        """The pairs with the largest scores; ``chunk_bytes`` of scores are held at a time."""
        step = max(1, chunk_bytes // (4 * len(self.keys)))
        best: list[Pair] = []
        for start in range(0, len(self.queries), step):
            scores = self.queries[start : start + step] @ self.keys.t()
            values, places = _largest(scores.flatten(), k)
            best += [
                Pair(start + place // len(self.keys), place % len(self.keys), value)
                for place, value in zip(places, values, strict=True)
            ]
            best = sorted(best, key=lambda pair: (-pair.score, pair.query, pair.key))[:k]
        return best

    def __repr__(self) -> str:
        return (
            f"AttentionScores({len(self.queries):,} {self.query_name} as queries, {len(self.keys):,} "
            f"{self.key_name} as keys, {self.head}; {self.note})"
        )


@torch.no_grad()
def attention_scores(
    context: ModelContext,
    queries: Autoencoder | Units,
    keys: Autoencoder | Units,
    layer: int,
    head: int,
) -> AttentionScores:
    """The attention scores of a head between the directions of two dictionaries (or of one with itself).

    Directions of zero length (latents left out of memory) get the score 0 with everything.

    Args:
        context: the model.
        queries, keys: autoencoders that write to the residual stream before this layer's attention, or
            that reconstruct what attention reads (``post_ln_attn`` of this layer: the norm is then
            left out); or :class:`~neuron_explainer.analysis.unit_directions.Units`.
        layer, head: which head.
    """
    if not 0 <= head < context.n_attention_heads:
        raise InputError(f"there is no head {head}: they are 0 to {context.n_attention_heads - 1}.")
    note = _note(context, layer)
    to_query = context.get_weight(WeightLocationType.ATTN_TO_QUERY, layer)[head].float()
    to_key = context.get_weight(WeightLocationType.ATTN_TO_KEY, layer)[head].float()
    scale = context.get_dim_size(Dimension.QUERY_AND_KEY_CHANNELS) ** -0.5
    read = [_read(context, what, layer) for what in (queries, keys)]
    return AttentionScores(
        read[0][0] @ to_query * scale,
        read[1][0] @ to_key,
        read[0][1],
        read[1][1],
        f"head {head} of layer {layer}",
        note,
    )


def _read(context: ModelContext, what: Autoencoder | Units, layer: int) -> tuple[Tensor, str]:
    """What attention of this layer reads of the directions, ``[a, d]``, and what they are called."""
    if isinstance(what, Autoencoder) and _reads_for_attention(what, layer):
        rows = rows_of(what).to(context.device)
        return rows, f"latents of {what.location}"
    units = what if isinstance(what, Units) else Units(context, what)
    _check_before(units.location, layer)
    rows = units.rows()
    if context.norms_subtract_mean:
        rows = rows - rows.mean(dim=1, keepdim=True)
    gain = context.get_weight(WeightLocationType.LAYER_NORM_GAIN_PRE_ATTN, layer)
    return rows * gain.float(), units.name


def _reads_for_attention(autoencoder: Autoencoder, layer: int) -> bool:
    """Whether it reconstructs what attention of this layer reads, behind the norm."""
    location = autoencoder.location
    if location is None or autoencoder.is_transcoder or location.path != _NORMED:
        return False
    return location.layer in (None, layer)


def _check_before(location: ActivationLocation, layer: int) -> None:
    behind = location.layer is not None and location.layer >= layer
    if behind or location.path == BEHIND_FINAL_NORM:
        raise LocationError(
            f"attention of layer {layer} does not read what is written at {location}: expected a place in an "
            "earlier layer."
        )


def _note(context: ModelContext, layer: int) -> str:
    """What the scores leave out in this model; a LocationError for a model whose scores are not bilinear."""
    left_out = ["scales of the norm", "biases"]
    if isinstance(context, HuggingFaceModelContext):
        names = {
            name.rpartition(".")[2]
            for name, _ in context.get_or_create_model().layers[layer].named_modules()
        }
        normed = names & {"q_norm", "k_norm", "q_layernorm", "k_layernorm"}
        if normed:
            raise LocationError(
                f"{context.model_name} norms queries and keys ({', '.join(sorted(normed))}): its attention "
                "scores are not bilinear in what the heads read, so directions have none."
            )
        if not _has_positions(context):
            left_out.append("rotary positions (the scores are those at distance 0)")
    return f"without {_listed(left_out)}"


def _has_positions(context: HuggingFaceModelContext) -> bool:
    """Whether positions are embedded, and so in what heads read, rather than in the heads."""
    known = context.get_or_create_model().architecture.weights
    return WeightLocationType.POSITION_EMBEDDING in known


def _listed(parts: Iterable[str]) -> str:
    *first, last = parts
    return f"{', '.join(first)} and {last}" if first else last


def _largest(scores: Tensor, k: int) -> tuple[list[float], list[int]]:
    if k < 1:
        raise InputError(f"k must be at least 1, found {k}.")
    values, places = top_k(scores, min(k, len(scores)))
    return values.tolist(), places.tolist()


def _check(unit: int, n_units: int, name: str) -> None:
    if not 0 <= unit < n_units:
        raise InputError(f"there is no unit {unit} among the {name}: they are 0 to {n_units - 1}.")
