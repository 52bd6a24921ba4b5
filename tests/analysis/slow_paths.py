"""A transformer written out source by source and destination by destination: slow, and plain to read.

It shares nothing with the package but the parameters.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from neuron_explainer.models.transformer import Norm, Transformer

Sources = dict[str, Tensor]
"""Name -> what a source writes on one prompt ``[s, d]``."""
InputOf = Callable[[str, Sources, Tensor], Tensor]
"""From a destination, the sources before it and the biases ``[d]`` to the destination's input ``[s, d]``."""


def whole_input(destination: str, sources: Sources, bias: Tensor) -> Tensor:
    """As in an unchanged pass."""
    return torch.stack(list(sources.values())).sum(dim=0) + bias


def slow_pass(
    model: Transformer, tokens: list[int], input_of: InputOf = whole_input
) -> tuple[Tensor, Sources]:
    """Logits ``[s, v]`` and what each source writes, with each destination's input made by ``input_of``."""
    n, heads, width = len(tokens), model.cfg.n_heads, model.cfg.d_attn_v // model.cfg.n_heads
    sources = {"input": model.tok_embed.weight[tokens] + model.pos_embed.weight[:n]}
    bias = torch.zeros_like(sources["input"][0])
    later = torch.ones(n, n, dtype=torch.bool).triu(1)
    for number, layer in enumerate(model.layers):
        written = {}
        for head in range(heads):
            name, rows = f"a{number}.h{head}", slice(head * width, (head + 1) * width)
            q, k, v = (
                _norm(layer.ln_1, input_of(f"{name}<{letter}>", sources, bias))
                @ projection.weight[rows].T
                + projection.bias[rows]
                for letter, projection in zip(
                    "qkv", (layer.attn.q_proj, layer.attn.k_proj, layer.attn.v_proj), strict=True
                )
            )
            scores = (q @ k.T / width**0.5).masked_fill(later, -torch.inf)
            written[name] = scores.softmax(dim=-1) @ v @ layer.attn.out_proj.weight[:, rows].T
        sources |= written
        bias = bias + layer.attn.out_proj.bias
        x = _norm(layer.ln_2, input_of(f"m{number}", sources, bias))
        hidden = torch.nn.functional.gelu(
            x @ layer.mlp.in_layer.weight.T + layer.mlp.in_layer.bias, approximate="tanh"
        )
        sources[f"m{number}"] = hidden @ layer.mlp.out_layer.weight.T + layer.mlp.out_layer.bias
    return _norm(
        model.final_ln, input_of("logits", sources, bias)
    ) @ model.unembed.weight.T, sources


def _norm(norm: Norm, x: Tensor) -> Tensor:
    centered = x - x.mean(dim=-1, keepdim=True)
    scale = (centered.square().mean(dim=-1, keepdim=True) + norm.eps).sqrt()
    return centered / scale * norm.weight + norm.bias
