"""What the residual stream predicts layer by layer, and texts that go on with and without changes."""

from collections.abc import Generator
from typing import Any

import numpy as np

from neuron_explainer.analysis.lenses import logit_lens
from neuron_explainer.server.compute.changes import check_position, read_changes
from neuron_explainer.server.compute.refusals import Refusal
from neuron_explainer.server.compute.session import Session
from neuron_explainer.server.snippets import Script

MOST_POSITIONS = 64


def lens(session: Session, request: dict[str, Any]) -> dict[str, Any]:
    """The likeliest next tokens at points of the stream: ``mid`` after attention, ``post`` after a layer."""
    ids = session.ids(request["text"], ("body", "text"))
    given = request.get("positions")
    positions = (
        list(range(len(ids)))
        if given is None
        else sorted(
            {
                check_position(each, len(ids), ("body", "positions", i))
                for i, each in enumerate(given)
            }
        )
    )
    if len(positions) > MOST_POSITIONS:
        raise Refusal(
            422,
            "too_many_positions",
            f"The lens reads {MOST_POSITIONS} positions at most, found {len(positions)}: name some.",
            loc=("body", "positions"),
            allowed=[str(MOST_POSITIONS)],
        )
    wanted, k = request["points"], request["k"]
    names = "sublayers" if "mid" in wanted else "layers"
    found = logit_lens(session.model, ids, points=names, top_k=k, positions=positions)  # type: ignore[arg-type]  # a Points
    kept = [i for i, point in enumerate(found.points) if _is_wanted(point, wanted)]
    points = [{"layer": _layer(found.points[i]), "point": _point(found.points[i])} for i in kept]
    top = found.top_ids[kept]
    script = session.names.script().use("analysis.lenses", "logit_lens")
    script.add(
        f"ids = {ids}",
        f"lens = logit_lens(model, ids, points={names!r}, top_k={k}, positions={positions})",
    )
    return {
        "tokens": ids,
        "positions": positions,
        "points": points,
        "ids": top.tolist(),
        "probs": found.top_probs[kept].tolist(),
        "kl": found.kl[kept].tolist(),
        **session.vocabulary([*ids, *np.unique(top).tolist()]),
        "python": script.result(
            {
                "ids": f"lens.top_ids[{kept}].tolist()",
                "probs": f"lens.top_probs[{kept}].tolist()",
                "kl": f"lens.kl[{kept}].tolist()",
            }
        ).text(),
    }


def _is_wanted(name: str, wanted: list[str]) -> bool:
    return ("mid" if name.endswith("post_attn") else "post") in wanted


def _point(name: str) -> str:
    return {"post_emb": "embedding", "post_attn": "mid", "post_mlp": "post"}[
        name.rpartition(".")[2]
    ]


def _layer(name: str) -> int | None:
    layer = name.partition("/")[0]
    return int(layer) if layer.isdecimal() else None


def generate(
    session: Session, request: dict[str, Any]
) -> Generator[tuple[str, dict[str, Any]], None, dict[str, Any]]:
    """A text goes on, with and without interventions, token by token and with the same random numbers.

    Yields:
        ``("token", {stream, id, text, prob})`` for each token; ``baseline`` and ``changed`` take turns.

    Returns:
        ``{diverged_at, python, …}``: the first new token that differs, None if there is none.
    """
    ids = session.ids(request["prompt"], ("body", "prompt"))
    n = _room(session, ids, request["max_new"])
    changes = read_changes(session, request["interventions"], ids, n_new=n - 1)
    sampling = {name: request[name] for name in ("temperature", "top_p", "seed")}
    hooks = {"changed": changes.hooks()} if changes.each else {}
    if request["baseline"] or not hooks:
        hooks = {"baseline": None, **hooks}
    streams = {
        name: session.model.stream(ids, n, hooks=session.watched(each), **sampling)
        for name, each in hooks.items()
    }
    tokens: dict[str, list[int]] = {name: [] for name in streams}
    for _ in range(n):
        for name, stream in streams.items():
            session.guard()
            token, prob = next(stream)
            tokens[name].append(token)
            text = session.vocabulary([token])["vocab"][str(token)]
            yield "token", {"stream": name, "id": token, "text": text, "prob": prob}
    diverged = None
    if len(tokens) == 2:
        pairs = zip(tokens["baseline"], tokens["changed"], strict=True)
        diverged = next((i for i, (a, b) in enumerate(pairs) if a != b), None)
    script = session.names.script().add(f"ids = {ids}")
    written = {"baseline": "None", "changed": changes.write(script, "ids")}
    return {
        "diverged_at": diverged,
        "tokens": tokens,
        "texts": {name: session.context.decode(each) for name, each in tokens.items()}
        if session.has_texts
        else {},
        **session.vocabulary(token for each in tokens.values() for token in each),
        "python": _script(script, {n: written[n] for n in tokens}, n, sampling),
    }


def _room(session: Session, ids: list[int], wanted: int) -> int:
    """How many tokens can follow: the context is not exceeded."""
    context = session.context_length
    return wanted if context is None else min(wanted, context - len(ids) + 1)


def _script(script: Script, hooks: dict[str, str], n: int, sampling: dict[str, Any]) -> str:
    given = ", ".join(f"{name}={value!r}" for name, value in sampling.items())
    parts = {
        name: f"model.sample(ids, {n}, hooks={each}, {given})['tokens'][0]"
        for name, each in hooks.items()
    }
    return script.result(parts).text()
