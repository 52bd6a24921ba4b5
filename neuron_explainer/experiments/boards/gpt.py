"""The factored transformer: tokens on the residual stream, positions only beside it.

``BoardGPT`` with ``type="factor"`` is the paper's GPTFactor. The stream carries what is known about a cell's
token; where the cell is, is told to attention and MLP anew in every block, as a code concatenated after the
norm. With ``type="vanilla"`` positions are added to the tokens, once, as usual. Every cell sees every cell.

Shape legend: ``b`` boards, ``s`` cells, ``h`` heads, ``d`` width of the stream, ``p`` width of the position
code, ``v`` tokens.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from neuron_explainer.errors import InputError, did_you_mean
from neuron_explainer.experiments.boards.sites import check_hooks, location, recorder
from neuron_explainer.models.hooks import NO_HOOKS, AttentionHooks, TransformerHooks
from neuron_explainer.models.locations import ActivationLocation, LocationLike
from neuron_explainer.models.transformer import Norm, merge_heads, split_heads
from neuron_explainer.settings import check_types

ModelType = Literal["factor", "vanilla"]
MODEL_TYPES: tuple[ModelType, ...] = ("factor", "vanilla")
INITIAL_STD = 0.02


def check_model_type(name: str) -> None:
    """An error that suggests the nearest type of model if there is none of this name."""
    if name not in MODEL_TYPES:
        raise InputError(
            f"unknown type of model {name!r}.{did_you_mean(name, MODEL_TYPES)} Known: "
            f"{', '.join(MODEL_TYPES)}."
        )


@dataclass(frozen=True)
class GPTSizes:
    """Sizes of ``BoardGPT``; the defaults are the paper's."""

    type: ModelType = "factor"
    """factor: positions beside the stream; vanilla: positions added to the tokens."""
    vocab_size: int = 21
    """Tokens."""
    n_cells: int = 64
    """Cells of a board."""
    n_layers: int = 3
    """Blocks."""
    n_heads: int = 2
    """Heads of each attention."""
    width: int = 64
    """Width of the stream."""
    position_width: int = 32
    """Width of the position code; vanilla models have none."""

    def __post_init__(self) -> None:
        check_model_type(self.type)
        check_types(self)
        check_widths(self)


def check_widths(sizes: Any) -> None:
    """Refuse sizes below 1, and heads that do not divide the width."""
    for name, value in vars(sizes).items():
        if type(value) is int and value < 1:
            raise InputError(f"{type(sizes).__name__}: {name} must be at least 1, found {value}.")
    if sizes.width % sizes.n_heads:
        raise InputError(
            f"{type(sizes).__name__}: width {sizes.width} is not divisible by n_heads {sizes.n_heads}."
        )


def attend(
    q: Tensor, k: Tensor, v: Tensor, n_heads: int, hooks: AttentionHooks | None, at: dict[str, Any]
) -> Tensor:
    """Attention without a mask: queries ``[b, q, d]``, keys and values ``[b, k, d]`` to ``[b, q, d]``."""
    q, k, v = (split_heads(x, n_heads) for x in (q, k, v))
    d_head = q.shape[-1]
    if hooks is None or hooks.is_empty():
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        return merge_heads(F.scaled_dot_product_attention(q, k, v).transpose(1, 2))
    q, k = hooks.q(q * d_head**-0.25, **at), hooks.k(k * d_head**-0.25, **at)
    v = hooks.v(v.clone(), **at)
    scores = (q.transpose(1, 2) @ k.permute(0, 2, 3, 1)).permute(0, 2, 3, 1)
    scores = hooks.qk_logits(scores, **at)
    exps = (scores - scores.amax(dim=2, keepdim=True).detach()).exp()
    total = hooks.qk_softmax_denominator(exps.sum(dim=2, keepdim=True), **at)
    pattern = hooks.qk_probs(exps / total, **at)
    found = (pattern.permute(0, 3, 1, 2) @ v.transpose(1, 2)).transpose(1, 2)
    return merge_heads(hooks.v_out(found, **at))


def feed_forward(
    x: Tensor, fc: nn.Linear, out: nn.Linear, hooks: TransformerHooks, at: dict[str, Any]
) -> Tensor:
    """What the MLP adds: ``[b, s, d]``; ``x`` is what its first matrix makes of its input."""
    post = hooks.mlp.post_act(F.gelu(hooks.mlp.pre_act(x, **at)), **at, out_layer=out)
    return F.linear(post, out.weight, out.bias)


def initialise(module: nn.Module) -> None:
    """Normal weights of 0.02 for matrices and embeddings, zero biases, as in the paper's program."""
    if isinstance(module, nn.Linear | nn.Embedding):
        nn.init.normal_(module.weight, std=INITIAL_STD)
    if isinstance(module, nn.Linear) and module.bias is not None:
        nn.init.zeros_(module.bias)


class Block(nn.Module):
    """Attention, then an MLP; both read the normed stream ``[b, s, d]`` and the code ``[s, p]`` beside it."""

    def __init__(self, sizes: GPTSizes, layer: int) -> None:
        super().__init__()
        self.layer, self.n_heads = layer, sizes.n_heads
        d, p = sizes.width, sizes.position_width if sizes.type == "factor" else 0
        self.ln_1, self.ln_2 = Norm(d), Norm(d)
        self.qkv, self.proj = nn.Linear(d + p, 3 * d), nn.Linear(d, d)
        self.fc, self.out = nn.Linear(d + p, 4 * d), nn.Linear(4 * d, d)

    def forward(self, x: Tensor, code: Tensor | None, hooks: TransformerHooks, at: Any) -> Tensor:
        at = at | {"layer": self.layer}
        torso = hooks.resid.torso
        normed = torso.post_ln_attn(self.ln_1(x, torso.ln_attn, **at), **at)
        q, k, v = _beside(self.qkv, normed, code).chunk(3, dim=-1)
        found = F.linear(
            attend(q, k, v, self.n_heads, hooks.attn, at), self.proj.weight, self.proj.bias
        )
        x = torso.post_attn(x + torso.delta_attn(found, **at), **at)
        normed = torso.post_ln_mlp(self.ln_2(x, torso.ln_mlp, **at), **at)
        found = feed_forward(_beside(self.fc, normed, code), self.fc, self.out, hooks, at)
        return torso.post_mlp(x + torso.delta_mlp(found, **at), **at)


def _beside(linear: nn.Linear, x: Tensor, code: Tensor | None) -> Tensor:
    """``linear([x; code])`` for ``x`` ``[b, s, d]`` and a ``code`` ``[s, p]`` that all boards share.

    The code's share of the product is computed once, not for each board: a third of the work.
    """
    if code is None:
        return F.linear(x, linear.weight, linear.bias)
    d = x.shape[-1]
    shared = F.linear(code, linear.weight[:, d:], linear.bias)
    return F.linear(x, linear.weight[:, :d]) + shared


class BoardGPT(nn.Module):
    """Fills in a board: ``[b, s]`` tokens, some of them hidden, to logits ``[b, s, v]``.

    Args:
        sizes: default: the paper's GPTFactor, 197,824 parameters.
        seed: of the initial weights.
    """

    def __init__(self, sizes: GPTSizes | None = None, seed: int = 0) -> None:
        super().__init__()
        self.sizes = sizes = GPTSizes() if sizes is None else sizes
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.tok_embed = nn.Embedding(sizes.vocab_size, sizes.width)
            width = sizes.position_width if sizes.type == "factor" else sizes.width
            self.pos_embed = nn.Parameter(torch.zeros(sizes.n_cells, width))
            self.blocks = nn.ModuleList(Block(sizes, layer) for layer in range(sizes.n_layers))
            self.final_ln = Norm(sizes.width)
            self.unembed = nn.Linear(sizes.width, sizes.vocab_size, bias=False)
            self.apply(initialise)

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the parameters."""
        return self.tok_embed.weight.dtype

    @property
    def device(self) -> torch.device:
        """The device of the parameters."""
        return self.tok_embed.weight.device

    def forward(self, tokens: Tensor, hooks: TransformerHooks | None = None) -> Tensor:
        """Logits ``[b, s, v]`` of the token of every cell.

        Args:
            tokens: ``[b, s]``; hidden cells hold the last token of the vocabulary.
            hooks: what to see or replace on the way (:data:`~.sites.BOARD_SITES`).
        """
        check_cells(tokens, self.sizes.n_cells, self.sizes.vocab_size)
        at: dict[str, Any] = {"layer": None, "positions": None}
        if hooks is not None:
            check_hooks(hooks, TransformerHooks, self.sizes.n_layers)
            at["positions"] = torch.arange(tokens.shape[1], device=tokens.device).expand_as(tokens)
        hooks = NO_HOOKS if hooks is None else hooks
        factor = self.sizes.type == "factor"
        x = F.embedding(tokens, self.tok_embed.weight)
        x = hooks.resid.post_emb(x if factor else x + self.pos_embed, **at)
        code = self.pos_embed if factor else None
        for block in self.blocks:
            x = block(x, code, hooks, at)
        x = hooks.resid.post_ln_f(self.final_ln(x, hooks.resid.ln_f, **at), **at)
        return hooks.logits(F.linear(x, self.unembed.weight), **at)

    def capture(
        self,
        tokens: Tensor,
        locations: LocationLike | Sequence[LocationLike],
        hooks: TransformerHooks | None = None,
    ) -> dict[ActivationLocation, Tensor]:
        """The activations at locations, by location, from one pass; a location without layer means all."""
        names = [locations] if isinstance(locations, str | ActivationLocation) else locations
        wanted = [p for name in names for p in location(name).expand(self.sizes.n_layers)]
        hooks = TransformerHooks() if hooks is None else hooks.copy()
        found: dict[ActivationLocation, Tensor] = {}
        for place in dict.fromkeys(wanted):
            hooks.append_at(place, recorder(found, place), "fwd2")
        self(tokens, hooks)
        return {place: found[place] for place in wanted}


def check_cells(tokens: Tensor, n_cells: int, vocab_size: int) -> None:
    """Refuse what is no batch of boards of this size."""
    whole = tokens.dtype in (torch.int64, torch.int32)
    if not whole or tokens.dim() != 2 or tokens.shape[1] != n_cells:
        raise InputError(
            f"expected boards as whole numbers [b, {n_cells}], found {tokens.dtype} {list(tokens.shape)}."
        )
    if not tokens.numel():
        raise InputError(f"expected at least one board, found {list(tokens.shape)}.")
    low, high = (int(x) for x in tokens.aminmax())
    if low < 0 or high >= vocab_size:
        raise InputError(
            f"tokens must lie in 0 to {vocab_size - 1}, found {low if low < 0 else high}."
        )
