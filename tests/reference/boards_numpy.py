"""The factored transformer once more, in numpy and float64, written from its description alone.

The token embedding is the stream; a block reads ``[LN(stream); position code]``; positions are never added.
Attention has no mask. Nothing here is shared with the package.
"""

import math
from typing import Any

import numpy as np

Array = np.ndarray[Any, np.dtype[np.float64]]
Sites = dict[tuple[str, int | None], Array]


def norm(x: Array, weight: Array, bias: Array) -> Array:
    centred = x - x.mean(-1, keepdims=True)
    return np.asarray(
        centred / np.sqrt((centred**2).mean(-1, keepdims=True) + 1e-5) * weight + bias
    )


def gelu(x: Array) -> Array:
    return np.asarray(0.5 * x * (1 + np.vectorize(math.erf)(x / math.sqrt(2))))


def softmax(x: Array, axis: int) -> Array:
    exps = np.exp(x - x.max(axis, keepdims=True))
    return np.asarray(exps / exps.sum(axis, keepdims=True))


def gpt(
    w: dict[str, Array], tokens: Any, n_layers: int, n_heads: int, factor: bool = True
) -> Sites:
    """What every record point holds, by path and layer."""
    sites: Sites = {}
    x = w["tok_embed.weight"][tokens]
    b, s, d = x.shape
    position = np.broadcast_to(w["pos_embed"], (b, s, w["pos_embed"].shape[-1]))
    if not factor:
        x = x + position
    sites["resid.post_emb", None] = x
    for i in range(n_layers):
        p = f"blocks.{i}."

        def note(path: str, value: Array, i: int = i) -> Array:
            sites[path, i] = value
            return value

        def read(z: Array, name: str, p: str = p) -> Array:
            z = np.concatenate([z, position], -1) if factor else z
            return z @ w[f"{p}{name}.weight"].T + w[f"{p}{name}.bias"]

        z = note("resid.torso.post_ln_attn", norm(x, w[f"{p}ln_1.weight"], w[f"{p}ln_1.bias"]))
        q, k, v = (
            part.reshape(b, s, n_heads, d // n_heads)
            for part in np.split(read(z, "qkv"), 3, axis=-1)
        )
        scale = (d // n_heads) ** -0.25
        q, k, v = note("attn.q", q * scale), note("attn.k", k * scale), note("attn.v", v)
        scores = note("attn.qk_logits", np.einsum("bqhd,bkhd->bqkh", q, k))
        pattern = note("attn.qk_probs", softmax(scores, 2))
        out = note("attn.v_out", np.einsum("bqkh,bkhd->bqhd", pattern, v))
        delta = out.reshape(b, s, d) @ w[f"{p}proj.weight"].T + w[f"{p}proj.bias"]
        x = note("resid.torso.post_attn", x + note("resid.torso.delta_attn", delta))
        z = note("resid.torso.post_ln_mlp", norm(x, w[f"{p}ln_2.weight"], w[f"{p}ln_2.bias"]))
        pre = note("mlp.pre_act", read(z, "fc"))
        post = note("mlp.post_act", gelu(pre))
        delta = post @ w[f"{p}out.weight"].T + w[f"{p}out.bias"]
        x = note("resid.torso.post_mlp", x + note("resid.torso.delta_mlp", delta))
    last = norm(x, w["final_ln.weight"], w["final_ln.bias"])
    sites["resid.post_ln_f", None] = last
    sites["logits", None] = last @ w["unembed.weight"].T
    return sites
