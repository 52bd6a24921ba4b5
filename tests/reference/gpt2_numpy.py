"""GPT-2 from the paper's equations, in slow float64 numpy: what every hook site must show.

Written from Radford et al. 2019, Vaswani et al. 2017, Ba et al. 2016 and Hendrycks & Gimpel 2016, with
loops over rows, heads and queries where that is plainer. It knows nothing of torch or of the library:
parameters come as a dict of arrays under GPT-2's parts' names (see ``forward``).

Padding: a pad takes no position; a query looks at keys that are not later than itself and of its own
kind (tokens at tokens, pads at pads).
"""

import math
from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = Any  # of float64: numpy's own stubs make Any of its arithmetic
Mask = NDArray[np.bool_]
Sites = dict[tuple[str, int | None], Array]

_erf = np.vectorize(math.erf)


def activation_function(name: str, x: Array) -> Array:
    """Radford et al. use GELU's tanh approximation; the others are for other configs."""
    if name == "relu":
        return np.where(x > 0, x, 0.0)
    if name == "gelu":
        return x * (1 + _erf(x / math.sqrt(2))) / 2
    inner = math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)
    return x * (1 + np.tanh(inner)) / 2


def positions_of(pad: Mask) -> NDArray[np.int64]:
    """Each token counts the tokens before it; a pad stands where the token before it stands (or at 0)."""
    positions = np.zeros(pad.shape, dtype=np.int64)
    for row in range(pad.shape[0]):
        seen = 0
        for i in range(pad.shape[1]):
            seen += not pad[row, i]
            positions[row, i] = max(seen - 1, 0)
    return positions


def forward(
    parameters: dict[str, Array],
    tokens: NDArray[np.int64],
    n_heads: int,
    pad: Mask | None = None,
    activation: str = "gelu_tanh",
    eps: float = 1e-5,
) -> Sites:
    """The value of every hook site, by (path, layer); layer is None for the sites a model has once.

    Args:
        parameters: by state-dict key; linear maps are ``[out, in]``.
        tokens: ids ``[b, s]``.
        n_heads: attention heads a layer.
        pad: True where a position is padding, ``[b, s]``.
        activation: of the MLP.
        eps: added to the variance.
    """
    p = {name: np.asarray(value, dtype=np.float64) for name, value in parameters.items()}
    pad = np.zeros(tokens.shape, dtype=bool) if pad is None else pad
    n_layers = 1 + max(int(name.split(".")[1]) for name in p if name.startswith("xf_layers."))
    sites: Sites = {}

    def linear(name: str, x: Array) -> Array:
        y = np.einsum("bsi,oi->bso", x, p[f"{name}.weight"])
        return y + p[f"{name}.bias"] if f"{name}.bias" in p else y

    def norm(name: str, x: Array, path: str, layer: int | None) -> Array:
        centered = x - x.mean(axis=-1, keepdims=True)
        scale = np.sqrt((centered**2).mean(axis=-1, keepdims=True) + eps)
        sites[f"{path}.post_mean_subtraction", layer] = centered
        sites[f"{path}.scale", layer] = scale
        sites[f"{path}.post_scale", layer] = centered / scale
        return centered / scale * p[f"{name}.weight"] + p[f"{name}.bias"]

    stream = p["tok_embed.weight"][tokens] + p["pos_embed.weight"][positions_of(pad)]
    sites["resid.post_emb", None] = stream
    for i in range(n_layers):
        name = f"xf_layers.{i}"
        normed = norm(f"{name}.ln_1", stream, "resid.torso.ln_attn", i)
        sites["resid.torso.post_ln_attn", i] = normed
        q, k, v = (
            _heads(linear(f"{name}.attn.{part}_proj", normed), n_heads) for part in ("q", "k", "v")
        )
        _attend(q, k, v, pad, sites, i)
        merged = sites["attn.v_out", i].reshape(*tokens.shape, -1)
        delta = linear(f"{name}.attn.out_proj", merged)
        sites["resid.torso.delta_attn", i] = delta
        sites["resid.torso.post_attn", i] = stream = stream + delta
        normed = norm(f"{name}.ln_2", stream, "resid.torso.ln_mlp", i)
        sites["resid.torso.post_ln_mlp", i] = normed
        sites["mlp.pre_act", i] = pre = linear(f"{name}.mlp.in_layer", normed)
        sites["mlp.post_act", i] = post = activation_function(activation, pre)
        sites["resid.torso.delta_mlp", i] = delta = linear(f"{name}.mlp.out_layer", post)
        sites["resid.torso.post_mlp", i] = stream = stream + delta
    final = norm("final_ln", stream, "resid.ln_f", None)
    sites["resid.post_ln_f", None] = final
    sites["logits", None] = linear("unembed", final)
    return sites


def _heads(x: Array, n_heads: int) -> Array:
    """``[b, s, d] -> [b, s, h, d / h]``: head h owns the h-th run of neighbouring channels."""
    width = x.shape[-1] // n_heads
    return np.stack([x[..., h * width : (h + 1) * width] for h in range(n_heads)], axis=2)


def _attend(q: Array, k: Array, v: Array, pad: Mask, sites: Sites, layer: int) -> None:
    """Scaled dot-product attention, one query at a time."""
    batch, length, n_heads, width = q.shape
    q, k = q / width**0.25, k / width**0.25
    logits = np.full((batch, length, length, n_heads), -np.inf)
    denominator = np.zeros((batch, length, 1, n_heads))
    probs = np.zeros((batch, length, length, n_heads))
    out = np.zeros_like(v)
    for b in range(batch):
        for i in range(length):
            seen = [j for j in range(i + 1) if pad[b, j] == pad[b, i]]
            for h in range(n_heads):
                scores = np.array([q[b, i, h] @ k[b, j, h] for j in seen])
                exps = np.exp(scores - scores.max())
                logits[b, i, seen, h] = scores
                denominator[b, i, 0, h] = exps.sum()
                probs[b, i, seen, h] = exps / exps.sum()
                out[b, i, h] = probs[b, i, seen, h] @ v[b, seen, h]
    sites["attn.q", layer], sites["attn.k", layer], sites["attn.v", layer] = q, k, v
    sites["attn.qk_logits", layer] = logits
    sites["attn.qk_softmax_denominator", layer] = denominator
    sites["attn.qk_probs", layer] = probs
    sites["attn.v_out", layer] = out
