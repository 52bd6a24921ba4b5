"""Attention: the patterns of many heads as bytes, and one head in detail."""

import json
import struct
from typing import Any

import numpy as np
import torch
from torch import Tensor

from neuron_explainer.analysis.attention_paths import token_write
from neuron_explainer.analysis.attention_scores import attention_scores
from neuron_explainer.kernels.top_k import top_k
from neuron_explainer.models.weight_names import Dimension, WeightLocationType
from neuron_explainer.server.compute.refusals import Refusal
from neuron_explainer.server.compute.session import Session

N_PAIRS = 20
N_TOKENS = 10


def attention(session: Session, request: dict[str, Any]) -> bytes:
    """Lower triangles of heads' patterns, or of the lengths of what they write from each token.

    Four bytes with the length of the header (little-endian), the header as JSON, then for each head its
    lower triangle row by row, a byte a pair: 255 is ``scale``.
    """
    ids = session.ids(request["text"], ("body", "text"))
    heads = [_checked(session, head, i) for i, head in enumerate(request["heads"])]
    found = _values(session, ids, heads, request["kind"])  # [n, q, k]
    rows, columns = np.tril_indices(len(ids))
    values = found[:, rows, columns].numpy()
    scale = 1.0 if request["kind"] == "pattern" else float(values.max(initial=0.0)) or 1.0
    header = {
        "ids": ids,
        **session.vocabulary(ids),
        "heads": heads,
        "kind": request["kind"],
        "scale": scale,
        "shape": [len(heads), len(ids), len(ids)],
        "python": _script(session, ids, heads, request["kind"]),
    }
    head = json.dumps(header).encode()
    body = np.rint(values / scale * 255).astype(np.uint8).tobytes()
    return struct.pack("<I", len(head)) + head + body


def _checked(session: Session, head: list[int], number: int) -> list[int]:
    """A layer and a head that the model has."""
    layer, unit = head
    n_heads = session.model.sizes[Dimension.ATTN_HEADS]
    if not (0 <= layer < session.model.n_layers and 0 <= unit < n_heads):
        raise Refusal(
            422,
            "no_such_head",
            f"There is no head {unit} in layer {layer}: layers are 0 to {session.model.n_layers - 1}, heads "
            f"0 to {n_heads - 1}.",
            loc=("body", "heads", number),
        )
    return [layer, unit]


@torch.no_grad()
def _values(session: Session, ids: list[int], heads: list[list[int]], kind: str) -> Tensor:
    """``[n, q, k]``."""
    layers = sorted({layer for layer, _ in heads})
    paths = ["attn.qk_probs"] if kind == "pattern" else ["attn.qk_probs", "attn.v"]
    places = [f"{layer}/{path}" for layer in layers for path in paths]
    run = session.model.capture([ids], places, hooks=session.watched())
    found = []
    for layer, head in heads:
        pattern = run[f"{layer}/attn.qk_probs"][0, :, :, head].double()
        if kind == "write_norm":
            weight = session.model.weight(WeightLocationType.ATTN_TO_RESIDUAL, layer)[head]
            written = run[f"{layer}/attn.v"][0, :, head].double() @ weight.double()
            pattern = pattern * written.norm(dim=-1)
        found.append(pattern.cpu())
    return torch.stack(found)


def _script(session: Session, ids: list[int], heads: list[list[int]], kind: str) -> str:
    script = session.names.script().add(f"ids = {ids}", f"heads = {heads}")
    pattern = "model.capture([ids], f'{layer}/attn.qk_probs')[f'{layer}/attn.qk_probs']"
    value = f"{pattern}[0, :, :, head].detach()"
    if kind == "write_norm":
        script.use("models.weight_names", "WeightLocationType")
        v = "model.capture([ids], f'{layer}/attn.v')[f'{layer}/attn.v'][0, :, head].detach()"
        weight = "model.weight(WeightLocationType.ATTN_TO_RESIDUAL, layer)[head].detach()"
        value = f"({value} * ({v} @ {weight}).norm(dim=-1))"
    return script.result({"values": f"[{value}.tolist() for layer, head in heads]"}).text()


@torch.no_grad()
def head(session: Session, request: dict[str, Any]) -> dict[str, Any]:
    """One head on one text: its pattern, the pairs that write most, and what it copies.

    ``ov`` is what the head writes for a token of the text that it attends to fully: the token's
    embedding through the norm and the head's value and output weights, read by the unembedding.
    """
    ids = session.ids(request["text"], ("body", "text"))
    layer, unit = _checked(session, [request["layer"], request["head"]], 0)
    pattern, writes = (
        _values(session, ids, [[layer, unit]], k)[0] for k in ("pattern", "write_norm")
    )
    values, places = top_k(writes.flatten(), min(N_PAIRS, writes.numel()))
    pairs = [
        {"position": place // len(ids), "attended": place % len(ids), "write_norm": value}
        for place, value in zip(places.tolist(), values.tolist(), strict=True)
        if value > 0
    ]
    for pair in pairs:
        pair["pattern"] = float(pattern[pair["position"], pair["attended"]])
    copied = [_copied(session, layer, unit, token) for token in dict.fromkeys(ids)]
    return {
        "ids": ids,
        "layer": layer,
        "head": unit,
        "pattern": [row[: place + 1] for place, row in enumerate(pattern.tolist())],
        "pairs": pairs,
        "ov": copied,
        **session.vocabulary(
            [*ids, *(each["id"] for of in copied for each in (*of["promotes"], *of["demotes"]))]
        ),
        "python": _head_script(session, ids, layer, unit),
    }


def _copied(session: Session, layer: int, unit: int, token: int) -> dict[str, Any]:
    write = token_write(session.model, layer, unit, token)
    up, down = session.directions().tokens_of(write, N_TOKENS)
    return {
        "id": token,
        "promotes": [{"id": each.token, "value": each.value} for each in up],
        "demotes": [{"id": each.token, "value": each.value} for each in down],
    }


def _head_script(session: Session, ids: list[int], layer: int, unit: int) -> str:
    script = session.names.script()
    script.use("analysis.attention_paths", "token_write").use("analysis.directions", "Directions")
    script.use("models.weight_names", "WeightLocationType").use("kernels.top_k", "top_k")
    places = [f"{layer}/attn.qk_probs", f"{layer}/attn.v"]
    script.add(
        f"ids = {ids}",
        f"run = model.capture([ids], {places})",
        f"pattern = run[{places[0]!r}][0, :, :, {unit}].detach().double()",
        f"v = run[{places[1]!r}][0, :, {unit}].detach().double()",
        f"weight = model.weight(WeightLocationType.ATTN_TO_RESIDUAL, {layer})[{unit}].detach().double()",
        "lengths = pattern * (v @ weight).norm(dim=-1)",
        f"values, at = top_k(lengths.flatten(), min({N_PAIRS}, lengths.numel()))",
        "directions = Directions(context, '0/mlp.post_act')",
        f"writes = [token_write(model, {layer}, {unit}, token) for token in dict.fromkeys(ids)]",
        f"lists = [directions.tokens_of(write, {N_TOKENS}) for write in writes]",
    )
    return script.result(
        {
            "pattern": "[row[: i + 1] for i, row in enumerate(pattern.tolist())]",
            "pairs": "[[*divmod(i, len(ids)), x] for i, x in zip(at.tolist(), values.tolist()) if x]",
            "promotes": "[[[t.token, t.value] for t in up] for up, _ in lists]",
            "demotes": "[[[t.token, t.value] for t in down] for _, down in lists]",
        }
    ).text()


def head_latents(session: Session, request: dict[str, Any]) -> dict[str, Any]:
    """The pairs of latents, one of a token that looks and one of a token looked at, that a head's queries
    and keys bring together most: see :mod:`neuron_explainer.analysis.attention_scores`."""
    layer, unit = _checked(session, [request["layer"], request["head"]], 0)
    names = [request["queries"], request["keys"]]
    for side, name in zip(("queries", "keys"), names, strict=True):
        session.source(name, ("body", side))
    queries, keys = session.autoencoders(names, ("body", "queries"))
    scores = attention_scores(session.context, queries, keys, layer, unit)
    script = session.names.script().use("analysis.attention_scores", "attention_scores")
    for side, name in zip(("queries", "keys"), names, strict=True):
        script.add(f"{side} = {session.names.autoencoder(script, name)}")
    script.add(
        f"pairs = attention_scores(context, queries, keys, {layer}, {unit}).top_pairs({request['k']})"
    )
    return {
        "queries": names[0],
        "keys": names[1],
        "pairs": [
            {
                "query": {"dictionary": names[0], "unit": pair.query, "label": None},
                "key": {"dictionary": names[1], "unit": pair.key, "label": None},
                "score": pair.score,
            }
            for pair in scores.top_pairs(request["k"])
        ],
        "note": scores.note,
        "python": script.result({"pairs": "[list(pair) for pair in pairs]"}).text(),
    }
