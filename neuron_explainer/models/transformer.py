"""A GPT-2-family transformer whose every intermediate value can be seen, replaced or differentiated.

The file reads from top to bottom: norm, attention, MLP, layer, model. Names, shapes, hook order and
state-dict keys are those of OpenAI's Transformer Debugger. The mathematics is GPT-2's (Radford et al.
2019); the tests compare it with an independent numpy implementation and with Hugging Face's. What both
kinds of model have in common (captures, sampling) is in
:class:`~neuron_explainer.models.language_model.LanguageModel`; loading and saving are in
:class:`~neuron_explainer.models.checkpointed.Checkpointed`.

There is one meaning and two ways to compute it: fused attention and ``F.layer_norm`` run if no hook
would see inside them, the explicit formulas if one does. Products with weights go through
:mod:`neuron_explainer.kernels.products`, which knows the fastest kernel for each.

Shape legend: ``b`` batch, ``s`` sequence (of this call), ``q`` query (= s), ``k`` key (the tokens of
earlier calls and of this one), ``h`` head, ``d`` model width, ``f`` MLP width, ``v`` vocabulary.
"""

import functools
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import TYPE_CHECKING, Any, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from neuron_explainer.errors import InputError
from neuron_explainer.kernels.products import linear, linears, weight_copies
from neuron_explainer.models import tokenizers
from neuron_explainer.models.checkpointed import Checkpointed
from neuron_explainer.models.config import SerializableDataclass, TransformerConfig
from neuron_explainer.models.devices import Device, default_device
from neuron_explainer.models.hooks import (
    NO_HOOKS,
    AttentionHooks,
    MLPHooks,
    NormalizationHooks,
    TransformerHooks,
)
from neuron_explainer.models.initial_weights import draw_weights, uninitialised_embedding
from neuron_explainer.models.kv_cache import HiddenState, KeyValueCache, check_state
from neuron_explainer.models.language_model import (
    Activations,
    Prompts,
    Sample,
    Step,
    with_recorder,
)
from neuron_explainer.models.locations import ActivationLocation, LocationLike, parse_locations
from neuron_explainer.models.sampling import (
    nucleus_sample,
    prep_input_and_pad,
    prep_input_and_right_pad_for_forward_pass,
    prep_pos_from_pad_and_prev_lens,
)
from neuron_explainer.models.simplify import apply_layernorm_foldin
from neuron_explainer.models.tokenizer_files import TokenizerSpec

if TYPE_CHECKING:
    import tiktoken

__all__ = [
    "MLP",
    "Activations",
    "Device",
    "HiddenState",
    "KeyValueCache",
    "MultiHeadedDotProductSelfAttention",
    "Norm",
    "Sample",
    "SerializableDataclass",
    "Transformer",
    "TransformerConfig",
    "TransformerLayer",
    "apply_layernorm_foldin",
    "causal_attn_mask",
    "default_device",
    "gelu",
    "merge_heads",
    "nucleus_sample",
    "prep_input_and_pad",
    "prep_input_and_right_pad_for_forward_pass",
    "prep_pos_from_pad_and_prev_lens",
    "safe_div",
    "split_heads",
]


def split_heads(Z: Tensor, n_heads: int) -> Tensor:
    """``[b, s, d] -> [b, s, h, d / h]``."""
    return Z.view(*Z.shape[:-1], n_heads, Z.shape[-1] // n_heads)


def merge_heads(Z: Tensor) -> Tensor:
    """``[b, s, h, d_head] -> [b, s, h * d_head]``."""
    return Z.flatten(-2)


def gelu(x: Tensor) -> Tensor:
    """The tanh approximation of GELU (Hendrycks & Gimpel 2016), as in GPT-2."""
    return F.gelu(x, approximate="tanh")


_Nonlinearity = Callable[[Tensor], Tensor]
_NONLINEARITIES: dict[str, _Nonlinearity] = {"gelu_tanh": gelu, "gelu": F.gelu, "relu": F.relu}


class Norm(nn.Module):
    """Layer norm (Ba et al. 2016) in float32, over the last dimension."""

    def __init__(
        self,
        size: int,
        eps: float = 1e-5,
        device: Device | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.size, self.eps = size, eps
        self.weight = nn.Parameter(torch.ones(size, device=device, dtype=dtype))
        self.bias = nn.Parameter(torch.zeros(size, device=device, dtype=dtype))

    def forward(
        self,
        x: Tensor,
        hooks: NormalizationHooks | None = None,
        layer: int | None = None,
        positions: Tensor | None = None,
    ) -> Tensor:
        """``[..., d] -> [..., d]``. Hooks see float32, whatever the model's dtype."""
        at = {"layer": layer, "positions": positions}
        dtype = _at_least_float32(x.dtype)
        weight, bias = self.weight.to(dtype), self.bias.to(dtype)
        if hooks is None or hooks.is_empty_at(layer):
            return F.layer_norm(x.to(dtype), (self.size,), weight, bias, self.eps).to(x.dtype)
        centered = x.to(dtype)
        centered = hooks.post_mean_subtraction(centered - centered.mean(-1, keepdim=True), **at)
        # Of the hooked values: an edit above changes the scale, as in the original.
        scale = (centered.square().mean(-1, keepdim=True) + self.eps).sqrt()
        scale = hooks.scale(scale if hooks.scale.is_empty() else _editable(scale), **at)
        normed = hooks.post_scale(centered / scale, **at)
        return (normed * weight + bias).to(x.dtype)

    def extra_repr(self) -> str:
        return f"{self.size}, eps={self.eps}"


def _at_least_float32(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def _editable(x: Tensor) -> Tensor:
    """A copy for hooks, which may edit in place; the backward pass reads ``x`` unedited."""
    return x.clone() if x.requires_grad else x


class MultiHeadedDotProductSelfAttention(nn.Module):
    """Causal attention over all heads (Vaswani et al. 2017, section 3.2)."""

    def __init__(
        self,
        cfg: TransformerConfig,
        layer_idx: int,
        device: Device | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        linear = functools.partial(nn.Linear, device=device, dtype=dtype)
        self.n_heads, self.layer_idx = cfg.n_heads, layer_idx
        self.q_proj = linear(cfg.d_model, cfg.d_attn_qk)
        self.k_proj = linear(cfg.d_model, cfg.d_attn_qk)
        self.v_proj = linear(cfg.d_model, cfg.d_attn_v)
        self.out_proj = linear(cfg.d_attn_v, cfg.d_model)
        # On q and on k, before their hooks: q.k is then the scaled score.
        self.qk_scale = cfg.d_head_qk**-0.25

    def forward(
        self,
        X: Tensor,
        kv_cache: KeyValueCache | None = None,
        pad: Tensor | None = None,
        hooks: AttentionHooks | None = None,
        positions: Tensor | None = None,
    ) -> tuple[Tensor, KeyValueCache]:
        """Attend from the new tokens to all tokens so far.

        Args:
            X: the normed residual stream ``[b, s, d]`` of the new tokens.
            kv_cache: keys and values of the tokens so far; updated in place. None: a new one is made.
            pad: pad mask ``[b, s]`` of the new tokens; None if nothing is padded.

        Returns:
            What attention adds to the residual stream ``[b, s, d]``, and the cache.
        """
        hooks = NO_HOOKS.attn if hooks is None else hooks
        at: dict[str, Any] = {"layer": self.layer_idx, "positions": positions}
        Q, K, V = linears(X, (self.q_proj, self.k_proj, self.v_proj))
        kv_cache = KeyValueCache() if kv_cache is None else kv_cache
        kv_cache.update(K, V, pad)
        K, V = kv_cache.K_cache, kv_cache.V_cache
        allowed = _attention_mask(kv_cache.pad_cache, Q.shape[1], K.shape[1], Q.device)
        q, k, v = (split_heads(Z, self.n_heads) for Z in (Q, K, V))
        explicit, scale = hooks.need_explicit(self.layer_idx), self.qk_scale**2
        if explicit or not (hooks.q.is_empty() and hooks.k.is_empty()):
            q, k, scale = q * self.qk_scale, k * self.qk_scale, 1.0
            q = hooks.q(q, **at)
            if not hooks.k.is_empty():
                k = hooks.k(k, **at | {"positions": kv_cache.positions})
        if not hooks.v.is_empty():
            # A copy: the cache's own memory must not be edited.
            v = hooks.v(v.clone(), **at | {"positions": kv_cache.positions})
        if explicit:
            v_out = _explicit_attention(q, k, v, allowed, hooks, at)
        else:
            v_out = _fused_attention(q, k, v, allowed, scale)
        if not hooks.v_out.is_empty():
            v_out = hooks.v_out(v_out if explicit else _editable(v_out), **at)
        return linear(merge_heads(v_out), self.out_proj), kv_cache


def _causal(n_new: int, n_all: int, device: torch.device) -> Tensor:
    """Bool ``[q, k]``: the last ``n_new`` rows of the causal triangle of ``n_all`` tokens."""
    slots = torch.arange(n_all, device=device)
    return slots[None, :] <= slots[n_all - n_new :, None]


def _attention_mask(
    pad: Tensor | None, n_new: int, n_all: int, device: torch.device
) -> Tensor | None:
    """Bool ``[b, q, k]``, True where the query may attend to the key; None if the mask is just causal.

    Tokens attend to tokens and pads to pads, each at least to itself. So every row has a key (a softmax
    over none is NaN), and no real token depends on a pad.

    Args:
        pad: pad mask ``[b, k]`` of all tokens so far; None if there has been no pad.
    """
    if pad is None:
        return None
    same_kind = pad[:, n_all - n_new :, None] == pad[:, None, :]
    return _causal(n_new, n_all, device) & same_kind


def _fused_attention(
    q: Tensor, k: Tensor, v: Tensor, allowed: Tensor | None, scale: float
) -> Tensor:
    """Attention that never forms the pattern (Dao et al. 2022). Tensors are ``[b, s, h, d_head]``."""
    n_new, n_all = q.shape[1], k.shape[1]
    if allowed is not None:
        allowed = allowed[:, None]
    elif 1 < n_new < n_all:  # is_causal would align the triangle to the first key, not the last
        allowed = _causal(n_new, n_all, q.device)
    out = F.scaled_dot_product_attention(
        q.transpose(1, 2),
        k.transpose(1, 2),
        v.transpose(1, 2),
        attn_mask=allowed,
        is_causal=allowed is None and n_new > 1,
        scale=scale,
    )
    return out.transpose(1, 2)


def _explicit_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    allowed: Tensor | None,
    hooks: AttentionHooks,
    at: dict[str, Any],
) -> Tensor:
    """The same with the pattern formed, so that hooks can see it. q and k are scaled already.

    Hooks see ``[b, q, k, h]``. In memory it is ``[b, h, q, k]``, with a query's keys side by side:
    products and softmax read that twice as fast.
    """
    if allowed is None:
        allowed = _causal(q.shape[1], k.shape[1], q.device)[None]
    logits = q.transpose(1, 2) @ k.permute(0, 2, 3, 1)
    logits = logits.masked_fill_(~allowed[:, None], -torch.inf).permute(0, 2, 3, 1)
    logits = hooks.qk_logits(logits, **at).to(_at_least_float32(q.dtype)).permute(0, 3, 1, 2)
    if hooks.qk_softmax_denominator.is_empty():
        probs = logits.softmax(dim=-1)
        if not hooks.qk_probs.is_empty():
            probs = _editable(probs)
    else:
        exps = (logits - logits.amax(dim=-1, keepdim=True).detach()).exp_()
        total = exps.sum(dim=-1, keepdim=True).permute(0, 2, 3, 1)
        probs = exps / hooks.qk_softmax_denominator(total, **at).permute(0, 3, 1, 2)
    probs = hooks.qk_probs(probs.to(q.dtype).permute(0, 2, 3, 1), **at).permute(0, 3, 1, 2)
    return (probs @ v.transpose(1, 2)).transpose(1, 2)


class MLP(nn.Module):
    """Two linear maps with a nonlinearity between them. Its inner units are the "neurons"."""

    def __init__(
        self,
        cfg: TransformerConfig,
        device: Device | None = None,
        dtype: torch.dtype | None = None,
        layer_idx: int | None = None,
    ) -> None:
        super().__init__()
        self.layer_idx = layer_idx
        self.in_layer = nn.Linear(cfg.d_model, cfg.d_ff, device=device, dtype=dtype)
        self.out_layer = nn.Linear(cfg.d_ff, cfg.d_model, device=device, dtype=dtype)
        self.act = _NONLINEARITIES[cfg.activation]

    def forward(
        self, X: Tensor, hooks: MLPHooks | None = None, positions: Tensor | None = None
    ) -> Tensor:
        """``[b, s, d] -> [b, s, d]``."""
        hooks = NO_HOOKS.mlp if hooks is None else hooks
        at = {"layer": self.layer_idx, "positions": positions}
        if self.act is gelu and hooks.pre_act.is_empty():
            post = linear(X, self.in_layer, gelu=True)
        else:
            post = self.act(hooks.pre_act(linear(X, self.in_layer), **at))
        if not hooks.post_act.is_empty():
            post = _editable(post) if self.act is F.relu else post
            post = hooks.post_act(post, **at, out_layer=self.out_layer)
        return linear(post, self.out_layer)


class TransformerLayer(nn.Module):
    """One layer: attention, then an MLP. Each reads the normed residual stream and adds to it."""

    def __init__(
        self,
        cfg: TransformerConfig,
        layer_idx: int,
        device: Device | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.cfg, self.layer_idx = cfg, layer_idx
        self.attn = MultiHeadedDotProductSelfAttention(cfg, layer_idx, device, dtype)
        self.mlp = MLP(cfg, device, dtype, layer_idx)
        self.ln_1 = Norm(cfg.d_model, cfg.norm_eps, device, dtype)
        self.ln_2 = Norm(cfg.d_model, cfg.norm_eps, device, dtype)

    def attn_block(
        self,
        X: Tensor,
        kv_cache: KeyValueCache | None = None,
        pad: Tensor | None = None,
        hooks: TransformerHooks | None = None,
        positions: Tensor | None = None,
    ) -> tuple[Tensor, KeyValueCache]:
        """What attention adds to the stream ``[b, s, d]``, and the updated cache."""
        hooks = NO_HOOKS if hooks is None else hooks
        torso, at = hooks.resid.torso, {"layer": self.layer_idx, "positions": positions}
        normed = torso.post_ln_attn(self.ln_1(X, torso.ln_attn, **at), **at)
        delta, kv_cache = self.attn(normed, kv_cache, pad, hooks.attn, positions)
        return torso.delta_attn(delta, **at), kv_cache

    def mlp_block(
        self, X: Tensor, hooks: TransformerHooks | None = None, positions: Tensor | None = None
    ) -> Tensor:
        """What the MLP adds to the stream ``[b, s, d]``."""
        hooks = NO_HOOKS if hooks is None else hooks
        torso, at = hooks.resid.torso, {"layer": self.layer_idx, "positions": positions}
        normed = torso.post_ln_mlp(self.ln_2(X, torso.ln_mlp, **at), **at)
        return torso.delta_mlp(self.mlp(normed, hooks.mlp, positions), **at)

    def forward(
        self,
        X: Tensor,
        kv_cache: KeyValueCache | None = None,
        pad: Tensor | None = None,
        hooks: TransformerHooks | None = None,
        positions: Tensor | None = None,
    ) -> tuple[Tensor, KeyValueCache]:
        """The stream after this layer ``[b, s, d]``, and the updated cache."""
        hooks = NO_HOOKS if hooks is None else hooks
        torso, at = hooks.resid.torso, {"layer": self.layer_idx, "positions": positions}
        delta, kv_cache = self.attn_block(X, kv_cache, pad, hooks, positions)
        X = torso.post_attn(X + delta, **at)
        X = torso.post_mlp(X + self.mlp_block(X, hooks, positions), **at)
        return X, kv_cache

    def simplify(self) -> None:
        """Fold both norms into the linear maps behind them, in place."""
        apply_layernorm_foldin(self.ln_1, [self.attn.q_proj, self.attn.k_proj, self.attn.v_proj])
        apply_layernorm_foldin(self.ln_2, [self.mlp.in_layer])


class Transformer(Checkpointed):
    """A decoder-only transformer: embedding, layers, final norm, unembedding.

    ``fast = torch.compile(model)`` compiles what runs without hooks; ``model`` itself runs as before.

    In bfloat16, parameters, products and the residual stream are bfloat16; norms and softmax compute in
    float32 inside.

    Args:
        cfg: the sizes.
        recompute: whether to recompute each layer in the backward pass instead of keeping its inner
            values (less memory, more time; forward hooks then run again during the backward pass).
        seed: for the initial weights, which are drawn as GPT-2's are; None: torch's global generator.
        tokenizer: the tokenizer whose files belong to the model; default: the one that ``cfg`` names.
    """

    def __init__(
        self,
        cfg: TransformerConfig,
        recompute: bool = False,
        device: Device | None = None,
        dtype: torch.dtype | None = None,
        seed: int | None = None,
        tokenizer: TokenizerSpec | None = None,
    ) -> None:
        super().__init__()
        self.cfg, self.recompute, self.tokenizer = cfg, recompute, tokenizer
        self.sizes, self.metadata = cfg.sizes, {}
        self._enc: tiktoken.Encoding | None = None
        # On "meta", because torch's own initial values would only cost time and random numbers.
        at: dict[str, Any] = {"device": "meta", "dtype": dtype}
        self.tok_embed = uninitialised_embedding(cfg.n_vocab, cfg.d_model, **at)
        self.pos_embed = uninitialised_embedding(cfg.ctx_window, cfg.d_model, **at)
        self.xf_layers = nn.ModuleList(
            TransformerLayer(cfg, layer, **at) for layer in range(cfg.n_layers)
        )
        self.final_ln = Norm(cfg.d_model, cfg.norm_eps, **at)
        self.unembed = nn.Linear(cfg.d_model, cfg.n_vocab, bias=False, **at)
        device = torch.get_default_device() if device is None else torch.device(device)
        if device.type != "meta":
            self.to_empty(device=device)
            draw_weights(self, cfg.n_layers, seed)

    @property
    def layers(self) -> Iterator[TransformerLayer]:
        """The layers, typed."""
        return (layer for layer in self.xf_layers if isinstance(layer, TransformerLayer))

    @property
    def device(self) -> torch.device:
        """The device of the parameters."""
        return self.tok_embed.weight.device

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the parameters."""
        return self.tok_embed.weight.dtype

    @property
    def enc(self) -> "tiktoken.Encoding":
        """The tokenizer. The first use reads its vocabulary (GPT-2's from tiktoken's cache or the net)."""
        return self._enc or tokenizers.load_encoding(self.tokenizer or self.cfg.enc)

    @enc.setter
    def enc(self, encoding: "tiktoken.Encoding") -> None:
        self._enc = encoding

    def set_recompute(self, recompute: bool) -> None:
        """Choose whether the backward pass recomputes each layer."""
        self.recompute = recompute

    # --- the forward pass, in four stages ---

    def forward(
        self,
        tokens: Tensor | Prompts,
        H: HiddenState | None = None,
        pad: Tensor | None = None,
        hooks: TransformerHooks | None = None,
    ) -> tuple[Tensor, HiddenState]:
        """Logits of the next token after each token.

        Args:
            tokens: ids ``[b, s]``, int64; in a continuation only the new ones. Or prompts as
                :meth:`sample` takes them, which are padded on the right (see :meth:`to_batch`).
            H: what an earlier call returned, to continue from it. It is updated in place; if the call
                raises, it is as before. To begin a text with hooks for later tokens, give a new
                ``HiddenState(n_layers)``.
            pad: ``[b, s]`` bool, True where a position is padding, which may be on any side and even
                between tokens. Each row's result at its tokens is that of its solo run.
            hooks: what to see or replace on the way.

        Returns:
            Logits ``[b, s, v]`` and the state to continue from.
        """
        tokens, pad = self.to_batch(tokens, pad)
        if H is None:  # with H, a hook may be for tokens of another call
            self._check_whole(tokens, pad, hooks)
            H = HiddenState(self.cfg.n_layers)
        check_state(H, self.cfg.n_layers, self.cfg.d_attn_qk)
        hooks = NO_HOOKS if hooks is None else hooks
        with H.restored_on_error():
            X, H, pad, hooks = self.run_embed(tokens, H, pad, hooks)
            X, H = self.run_torso(X, H, pad, hooks)
            X, H = self.run_ln_f(X, H, hooks)
            return self.run_unembed(X, H, hooks)

    def run_embed(
        self,
        tokens: Tensor,
        H: HiddenState | None = None,
        pad: Tensor | None = None,
        hooks: TransformerHooks | None = None,
    ) -> tuple[Tensor, HiddenState, Tensor | None, TransformerHooks]:
        """Token and position embeddings ``[b, s, d]``; pad is returned as None if nothing is padded."""
        H = HiddenState(self.cfg.n_layers) if H is None else H
        # A new tree, not NO_HOOKS: the caller gets it and may append to it.
        hooks = TransformerHooks() if hooks is None else hooks
        self._check_hooks(hooks)
        pad = self._advance(tokens, H, pad)
        X = self.tok_embed(tokens) + self.pos_embed(H.positions)
        return hooks.resid.post_emb(X, layer=None, positions=H.positions), H, pad, hooks

    def run_torso(
        self,
        X: Tensor,
        H: HiddenState,
        pad: Tensor | None = None,
        hooks: TransformerHooks | None = None,
        n_layers: int | None = None,
        first: int = 0,
    ) -> tuple[Tensor, HiddenState]:
        """All layers, or those from ``first`` up to ``n_layers``: ``[b, s, d] -> [b, s, d]``."""
        for layer in list(self.layers)[first:n_layers]:
            if self.recompute and torch.is_grad_enabled():
                X = self._run_layer_recomputed(layer, X, H, pad, hooks)
            else:
                X, H[layer.layer_idx] = layer(X, H[layer.layer_idx], pad, hooks, H.positions)
        return X, H

    @staticmethod
    def _run_layer_recomputed(
        layer: TransformerLayer,
        X: Tensor,
        H: HiddenState,
        pad: Tensor | None,
        hooks: TransformerHooks | None,
    ) -> Tensor:
        before, positions = H[layer.layer_idx], H.positions

        def run(X: Tensor) -> Tensor:
            # From the same cache each time: the run in the backward pass must not append once more.
            X, kv_cache = layer(X, before.fork(), pad, hooks, positions)
            if H[layer.layer_idx] is before:  # in the first run; later, H may have been continued
                H[layer.layer_idx] = kv_cache
            return X

        result: Tensor = checkpoint(run, X, use_reentrant=False)
        return result

    def run_ln_f(
        self, X: Tensor, H: HiddenState, hooks: TransformerHooks | None = None
    ) -> tuple[Tensor, HiddenState]:
        """The final norm: ``[b, s, d] -> [b, s, d]``."""
        hooks = NO_HOOKS if hooks is None else hooks
        X = self.final_ln(X, hooks.resid.ln_f, layer=None, positions=H.positions)
        return hooks.resid.post_ln_f(X, layer=None, positions=H.positions), H

    def run_unembed(
        self, X: Tensor, H: HiddenState, hooks: TransformerHooks | None = None
    ) -> tuple[Tensor, HiddenState]:
        """Logits: ``[b, s, d] -> [b, s, v]``."""
        hooks = NO_HOOKS if hooks is None else hooks
        logits = linear(X, self.unembed)
        return hooks.logits(logits, layer=None, positions=H.positions), H

    # --- looking and sampling, for LanguageModel ---

    def _run_until(
        self,
        wanted: list[ActivationLocation],
        tokens: Tensor,
        pad: Tensor | None,
        hooks: TransformerHooks,
    ) -> None:
        X, H, pad, _ = self.run_embed(tokens, None, pad, hooks)
        self._run_layers_until(wanted, X, H, pad, hooks, 0)

    def _run_layers_until(
        self,
        wanted: list[ActivationLocation],
        X: Tensor,
        H: HiddenState,
        pad: Tensor | None,
        hooks: TransformerHooks,
        first: int,
    ) -> None:
        needed = max((p.depth(self.n_layers) + p.site.per_layer for p in wanted), default=0)
        X, H = self.run_torso(X, H, pad, hooks, needed, first)
        if any(p.site.stage == "final" for p in wanted):
            X, H = self.run_ln_f(X, H, hooks)
        if any(p.path == "logits" for p in wanted):
            self.run_unembed(X, H, hooks)

    def capture_from(
        self,
        layer: int,
        earlier: Activations,
        locations: LocationLike | Sequence[LocationLike],
        hooks: TransformerHooks | None = None,
    ) -> Activations:
        """What :meth:`capture` returns, with everything before a layer taken from an earlier call.

        The numbers are those of a whole call, if the earlier one had the same tokens, weights, and hooks
        before the layer. Gradients flow on into the earlier graph.

        Args:
            layer: the first layer that runs; ``n_layers`` for the final norm alone.
            earlier: what :meth:`capture` returned, with the wanted locations before the layer, and the
                stream that the layer reads (``resid.torso.post_mlp`` of the one before, or the embedding).
            locations: see :meth:`capture`.
            hooks: those of the whole call; the ones before the layer are not run.
        """
        self._check_whole(earlier.tokens, earlier.pad, hooks)
        wanted = [p for each in parse_locations(locations) for p in each.expand(self.n_layers)]
        found = Activations(earlier.tokens, earlier.pad)
        for place in wanted:
            self.require(place.path)
            if place.depth(self.n_layers) < layer or place.site.stage == "embed":
                found[place] = earlier[place]
        wanted = [place for place in wanted if place not in found]
        stream = earlier[f"{layer - 1}/resid.torso.post_mlp" if layer else "resid.post_emb"]
        H = HiddenState(self.cfg.n_layers)
        pad = self._advance(earlier.tokens, H, earlier.pad)
        hooks = with_recorder(hooks, wanted, found)
        self._run_layers_until(wanted, stream, H, pad, hooks, layer)
        return found

    def _reader(self, place: ActivationLocation) -> nn.Module:
        if place.layer is None:
            return self.final_ln
        layer = list(self.layers)[place.layer]
        of_layer: dict[str, nn.Module] = {
            "resid.torso.post_ln_attn": layer.ln_1,
            "resid.torso.post_ln_mlp": layer.ln_2,
            "mlp.pre_act": layer.mlp.in_layer,
        }
        return of_layer[place.path]

    @contextmanager
    def _generation(
        self, n_rows: int, prompt_length: int, num_tokens: int, hooks: TransformerHooks | None
    ) -> Iterator[Step]:
        H = HiddenState(self.cfg.n_layers, capacity=prompt_length + num_tokens)

        def step(tokens: Tensor, pad: Tensor) -> Tensor:
            return self._last_logits(tokens, H, pad, NO_HOOKS if hooks is None else hooks)

        # Hooks of either kind are a user's code: it may change weights, which copies would not show.
        observed = hooks is not None and not hooks.is_empty()
        observed |= any(m._forward_hooks or m._forward_pre_hooks for m in self.modules())
        with nullcontext() if observed else weight_copies(n_rows, num_tokens):
            yield step

    def _last_logits(
        self, tokens: Tensor, H: HiddenState, pad: Tensor | None, hooks: TransformerHooks
    ) -> Tensor:
        """Logits ``[b, v]`` after the last token. The others are computed only if a hook sees them."""
        X, H, pad, _ = self.run_embed(tokens, H, pad, hooks)
        X, H = self.run_torso(X, H, pad, hooks)
        X, H = self.run_ln_f(X, H, hooks)
        if not (hooks.resid.post_ln_f.is_empty() and hooks.logits.is_empty()):
            return self.run_unembed(X, H, hooks)[0][:, -1]
        return linear(X[:, -1], self.unembed)

    def _encode(self, text: str) -> list[int]:
        return tokenizers.encode_prompt(self.enc, text)

    def _decode(self, ids: list[int]) -> str:
        return tokenizers.decode(self.enc, ids)

    def _start_token(self) -> int:
        return tokenizers.start_token(self.tokenizer or self.cfg.enc)

    @property
    def _fillers(self) -> set[int]:
        start = tokenizers.known_start_token(self.tokenizer or self.cfg.enc)
        return super()._fillers | ({start} if start is not None else set())

    def simplify(self) -> Self:
        """Fold each layer's norms into the linear maps behind them, in place, and return the model.

        The logits do not change. The final norm stays, because the unembedding has no bias to fold into.
        """
        for layer in self.layers:
            layer.simplify()
        return self


# --- the original's names, which nothing here uses ---


def safe_div(numerator: int, denominator: int) -> int:
    """Exact division; an InputError if there is a remainder."""
    if numerator % denominator:
        raise InputError(f"{numerator} is not divisible by {denominator}.")
    return numerator // denominator


def causal_attn_mask(size: int, device: Device = "cpu") -> Tensor:
    """Bool ``[size, size]``, True where the query (row) may attend to the key (column)."""
    return torch.ones(size, size, dtype=torch.bool, device=device).tril()
