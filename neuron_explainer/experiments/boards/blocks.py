"""What both architectures are made of: sizes, blocks, first weights, checks of what goes in.

Shape legend: ``b`` boards, ``s`` cells, ``q`` and ``k`` cells that attend and are attended to, ``h`` heads,
``d`` width of the stream, ``f`` width of the MLP.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from neuron_explainer.errors import InputError
from neuron_explainer.experiments.boards.sites import NO_STREAM_HOOKS, location, recorder
from neuron_explainer.models.hooks import AttentionHooks, NormalizationHooks, TransformerHooks
from neuron_explainer.models.locations import ActivationLocation, LocationLike
from neuron_explainer.models.transformer import Norm, merge_heads, split_heads
from neuron_explainer.settings import check_types

ModelType = Literal["factor", "vanilla"]
INITIAL_STD = 0.02


@dataclass(frozen=True)
class Sizes:
    """The sizes that both architectures have."""

    type: ModelType = "factor"
    """factor: positions beside the stream; vanilla: positions added to the tokens."""
    vocab_size: int = 21
    """Tokens of boards."""
    n_cells: int = 64
    """Cells of a board."""
    n_layers: int = 3
    """Blocks of a stream."""
    n_heads: int = 2
    """Heads of each attention."""
    width: int = 64
    """Width of the stream."""
    position_width: int = 32
    """Width of the position code; vanilla models have none."""

    def __post_init__(self) -> None:
        check_types(self)
        name = type(self).__name__
        for field, value in vars(self).items():
            if type(value) is int and value < 1:
                raise InputError(f"{name}: {field} must be at least 1, found {value}.")
        if self.width % self.n_heads:
            raise InputError(
                f"{name}: width {self.width} is not divisible by n_heads {self.n_heads}."
            )


def check_numbers(x: Tensor, things: str, numbers: str, length: int, n: int) -> None:
    """Refuse what is no batch ``[b, length]`` of numbers below ``n``.

    Args:
        things: what a row is, for the error: "boards".
        numbers: what its numbers are: "tokens".
    """
    whole = x.dtype in (torch.int64, torch.int32)
    if not whole or x.dim() != 2 or x.shape[1] != length:
        raise InputError(
            f"expected {things} as whole numbers [b, {length}], found {x.dtype} {list(x.shape)}."
        )
    if not x.numel():
        raise InputError(f"expected at least one row of {things}, found {list(x.shape)}.")
    low, high = (int(end) for end in x.aminmax())
    if low < 0 or high >= n:
        raise InputError(f"{numbers} must lie in 0 to {n - 1}, found {low if low < 0 else high}.")


def linear(layer: nn.Linear, x: Tensor) -> Tensor:
    """What a linear layer makes of ``x`` ``[..., d]``."""
    return F.linear(x, layer.weight, layer.bias)


def attend(
    q: Tensor, k: Tensor, v: Tensor, n_heads: int, hooks: AttentionHooks | None, at: dict[str, Any]
) -> Tensor:
    """Attention without a mask: queries ``[b, q, d]``, keys and values ``[b, k, d]`` to ``[b, q, d]``."""
    q, k, v = (split_heads(x, n_heads) for x in (q, k, v))
    d_head = q.shape[-1]
    if hooks is None or hooks.is_empty():
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        # Rejected: the product, softmax and product of the formula. Of a training step they take 2% (gpt) and
        # 7% (lea) less time with two threads, and 5% and 9% more with one.
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


class BoardBlock(nn.Module):
    """What the blocks of both architectures do once a norm has read the stream.

    Each architecture makes its own layers, because the order decides the first weights. Without hooks it has
    :data:`NO_STREAM_HOOKS`, whose parts nobody asks whether they are empty: that took up to 3 ms of a step.
    """

    n_heads: int
    qkv: nn.Linear
    proj: nn.Linear
    fc: nn.Linear
    out: nn.Linear

    def attended(self, x: Tensor, qkv: Tensor, hooks: TransformerHooks, at: Any) -> Tensor:
        """The stream ``[b, s, d]`` after self-attention, from queries, keys and values ``[b, s, 3 d]``."""
        torso = hooks.resid.torso
        q, k, v = qkv.chunk(3, dim=-1)
        inside = None if hooks is NO_STREAM_HOOKS else hooks.attn
        found = linear(self.proj, attend(q, k, v, self.n_heads, inside, at))
        return torso.post_attn(x + torso.delta_attn(found, **at), **at)

    def norm(
        self, norm: Norm, x: Tensor, inside: NormalizationHooks, hooks: Any, at: Any
    ) -> Tensor:
        """What a norm makes of ``x``; ``inside`` are the hooks that see its steps, a part of ``hooks``."""
        found: Tensor = norm(x, None if hooks is NO_STREAM_HOOKS else inside, **at)
        return found

    def fed(self, x: Tensor, pre: Tensor, hooks: TransformerHooks, at: Any) -> Tensor:
        """The stream ``[b, s, d]`` after the MLP, from what its first matrix gave, ``[b, s, f]``."""
        torso, mlp = hooks.resid.torso, hooks.mlp
        post = mlp.post_act(F.gelu(mlp.pre_act(pre, **at)), **at, out_layer=self.out)
        return torso.post_mlp(x + torso.delta_mlp(linear(self.out, post), **at), **at)


class BoardNet(nn.Module):
    """What both architectures have besides their forward passes."""

    sizes: Sizes
    tok_embed: nn.Embedding

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the parameters."""
        return self.tok_embed.weight.dtype

    @property
    def device(self) -> torch.device:
        """The device of the parameters."""
        return self.tok_embed.weight.device

    def check_boards(self, tokens: Tensor) -> None:
        """Refuse what is no batch of boards ``[b, s]`` of this model's size."""
        check_numbers(tokens, "boards", "tokens", self.sizes.n_cells, self.sizes.vocab_size)

    def captured(
        self,
        locations: LocationLike | Sequence[LocationLike],
        hooks: TransformerHooks,
        run: Callable[[], object],
    ) -> dict[ActivationLocation, Tensor]:
        """The activations at locations, by location, that a run gives which uses ``hooks``.

        Args:
            locations: one without a layer means all layers.
            hooks: get a recorder at each location, after the hooks that are there.
        """
        names = [locations] if isinstance(locations, str | ActivationLocation) else locations
        wanted = [p for name in names for p in location(name).expand(self.sizes.n_layers)]
        found: dict[ActivationLocation, Tensor] = {}
        for place in dict.fromkeys(wanted):
            hooks.append_at(place, recorder(found, place), "fwd2")
        run()
        return {place: found[place] for place in wanted}


def initialise(module: nn.Module) -> None:
    """Normal weights of 0.02 for matrices and embeddings, zero biases, as in the paper's program."""
    if isinstance(module, nn.Linear | nn.Embedding):
        nn.init.normal_(module.weight, std=INITIAL_STD)
    if isinstance(module, nn.Linear) and module.bias is not None:
        nn.init.zeros_(module.bias)
