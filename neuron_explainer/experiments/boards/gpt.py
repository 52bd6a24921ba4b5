"""The factored transformer: tokens on the residual stream, positions only beside it.

``BoardGPT`` with ``type="factor"`` is the paper's GPTFactor. The stream carries what is known about a cell's
token. Where the cell is, attention and MLP are told in every block anew, by a code that is concatenated after
the norm. With ``type="vanilla"`` positions are added to the tokens, once, as usual. Attention has no mask.

Shape legend: ``b`` boards, ``s`` cells, ``d`` width of the stream, ``p`` width of the position code,
``v`` tokens.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from neuron_explainer.experiments.boards.blocks import (
    BoardBlock,
    BoardNet,
    Sizes,
    initialise,
    linear,
)
from neuron_explainer.experiments.boards.sites import NO_STREAM_HOOKS, check_hooks
from neuron_explainer.models.hooks import TransformerHooks
from neuron_explainer.models.locations import ActivationLocation, LocationLike
from neuron_explainer.models.transformer import Norm


@dataclass(frozen=True)
class GPTSizes(Sizes):
    """Sizes of ``BoardGPT``; the defaults are the paper's."""


class Block(BoardBlock):
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
        normed = torso.post_ln_attn(self.norm(self.ln_1, x, torso.ln_attn, hooks, at), **at)
        x = self.attended(x, _beside(self.qkv, normed, code), hooks, at)
        normed = torso.post_ln_mlp(self.norm(self.ln_2, x, torso.ln_mlp, hooks, at), **at)
        return self.fed(x, _beside(self.fc, normed, code), hooks, at)


def _beside(layer: nn.Linear, x: Tensor, code: Tensor | None) -> Tensor:
    """``layer([x; code])`` for ``x`` ``[b, s, d]`` and a ``code`` ``[s, p]`` that all boards share.

    The code's share of the product is computed once, not for each board: a third of the work.
    """
    if code is None:
        return linear(layer, x)
    d = x.shape[-1]
    shared = F.linear(code, layer.weight[:, d:], layer.bias)
    return F.linear(x, layer.weight[:, :d]).add_(shared)


class BoardGPT(BoardNet):
    """Fills in a board: ``[b, s]`` tokens, some of them hidden, to logits ``[b, s, v]``.

    Args:
        sizes: default: the paper's GPTFactor, 197,824 parameters.
        seed: of the initial weights.
    """

    sizes: GPTSizes

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

    def forward(self, tokens: Tensor, hooks: TransformerHooks | None = None) -> Tensor:
        """Logits ``[b, s, v]`` of the token of every cell.

        Args:
            tokens: ``[b, s]``; hidden cells hold the last token of the vocabulary.
            hooks: what to see or replace on the way (:data:`~.sites.BOARD_SITES`).
        """
        self.check_boards(tokens)
        at: dict[str, Any] = {"layer": None, "positions": None}
        if hooks is not None:
            check_hooks(hooks, TransformerHooks, self.sizes.n_layers)
            at["positions"] = torch.arange(tokens.shape[1], device=tokens.device).expand_as(tokens)
        hooks = NO_STREAM_HOOKS if hooks is None else hooks
        factor = self.sizes.type == "factor"
        x = F.embedding(tokens, self.tok_embed.weight)
        x = hooks.resid.post_emb(x if factor else x + self.pos_embed, **at)
        code = self.pos_embed if factor else None
        for block in self.blocks:
            x = block(x, code, hooks, at)
        x = hooks.resid.post_ln_f(self.final_ln(x, hooks.resid.ln_f, **at), **at)
        return hooks.logits(linear(self.unembed, x), **at)

    def capture(
        self,
        tokens: Tensor,
        locations: LocationLike | Sequence[LocationLike],
        hooks: TransformerHooks | None = None,
    ) -> dict[ActivationLocation, Tensor]:
        """The activations at locations, by location, from one pass; a location without layer means all."""
        hooks = TransformerHooks() if hooks is None else hooks.copy()
        return self.captured(locations, hooks, lambda: self(tokens, hooks))
