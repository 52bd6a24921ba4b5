"""Transformer factors: what ``neuron-explainer factors collate``, ``importance`` and ``saliency`` found."""

from pathlib import Path as FilePath
from typing import TYPE_CHECKING, Annotated, Any

from fastapi import APIRouter, Path, Request
from starlette.responses import Response

from neuron_explainer.server import shapes
from neuron_explainer.server.factor_runs import Run
from neuron_explainer.server.problems import Problem
from neuron_explainer.server.registry import ID_PATTERN
from neuron_explainer.server.replies import json_reply
from neuron_explainer.server.security import READ
from neuron_explainer.server.serving import Served, Unit

if TYPE_CHECKING:
    from neuron_explainer.analysis.factors import Saliency

router = APIRouter(tags=["factors"])
SENTENCES = 20
"""Of each factor in a layer."""
WORDS = 6
_MOST_FACTORS = 2000
"""Rows of a run's table: the strongest ones."""
RunId = Annotated[str, Path(pattern=ID_PATTERN, description="id of a folder of factors' examples")]


@router.get("/factors", response_model=shapes.FactorRunList, **READ)
def factors(request: Request, served: Served) -> Response:
    """The folders of factors, and in each the strongest factors with their importance by layer."""
    runs = [served.factors[id] for id in served.factors]
    rows = [_summary(run) for run in runs]
    vocabulary: dict[str, dict[str, str]] = {"vocab": {}, "vocab_bytes": {}}
    for run, row in zip(runs, rows, strict=True):
        found = run.vocabulary(token for each in row["factors"] for token in each["words"])
        for name, words in found.items():
            vocabulary[name] |= words
    return json_reply(request, {"runs": rows, **vocabulary})


def _summary(run: Run) -> dict[str, Any]:
    found, examples = run.importance, run.examples
    levels = found.levels
    strongest = found.strongest(_MOST_FACTORS)
    return {
        "id": run.id,
        "name": run.id,
        "model": FilePath(str(examples.settings["model"])).name,
        "text": str(examples.settings.get("corpus", {}).get("name", "a text")),
        "n_factors": examples.n_factors,
        "n_tokens": examples.n_tokens,
        "locations": [str(place) for place in found.locations],
        "levels": {level: levels.count(level) for level in ("low", "mid", "high", "silent")},
        "factors": [
            {
                "factor": factor,
                "level": levels[factor],
                "importance": found.values[factor].tolist(),
                "words": _words(run, factor),
            }
            for factor in strongest
        ],
        "python": run.python(
            "{factor: found.values[factor].tolist() for factor in found.strongest()}"
        ),
    }


def _words(run: Run, factor: int) -> list[int]:
    """The tokens on which a factor is strongest, in the layer of its peak, each once."""
    place = run.importance.locations[run.importance.peak[factor]]
    found = run.examples.examples(factor, place, 4 * WORDS, each_sentence_once=True)
    return list(dict.fromkeys(example.tokens[example.index] for example in found))[:WORDS]


@router.get("/factors/{run}/{i}", response_model=shapes.Factor, **READ)
def factor(request: Request, served: Served, run: RunId, i: Unit) -> Response:
    """A factor: its importance in each layer, and its strongest sentences there."""
    opened = served.factors[run]
    found, examples = opened.importance, opened.examples
    if i >= examples.n_factors:
        raise Problem(
            404,
            "index_out_of_range",
            f"{run} has no factor {i}: they are 0 to {examples.n_factors - 1}.",
            loc=("path", "i"),
            allowed=[f"0 to {examples.n_factors - 1}"],
        )
    saliencies = _saliencies(opened)
    layers = []
    tokens: set[int] = set()
    for place in found.locations:
        shown = examples.examples(i, place, SENTENCES, each_sentence_once=True)
        tokens.update(token for example in shown for token in example.tokens)
        rows = [_example(each, saliencies.get((i, place, each.position))) for each in shown]
        layers.append({"location": str(place), "examples": rows})
    content = {
        "run": run,
        "factor": i,
        "level": found.levels[i],
        "locations": [str(place) for place in found.locations],
        "importance": found.values[i].tolist(),
        "layers": layers,
        "previous": i - 1 if i > 0 else None,
        "next": i + 1 if i + 1 < examples.n_factors else None,
        **opened.vocabulary(tokens),
        "python": opened.python(
            f'{{"importance": found.values[{i}].tolist(), "scores": [[each.score for each in '
            f"examples.examples({i}, place, {SENTENCES}, each_sentence_once=True)] "
            "for place in found.locations]}"
        ),
    }
    return json_reply(request, content)


def _saliencies(run: Run) -> "dict[Any, Saliency]":
    """What has been computed by now: the file may grow while the server runs."""
    from neuron_explainer.analysis.factors import SaliencyFile
    from neuron_explainer.analysis.factors.saliency import key_of

    return {key_of(each): each for each in SaliencyFile(run.folder).read()}


def _example(example: Any, saliency: "Saliency | None") -> dict[str, Any]:
    return {
        "score": example.score,
        "ids": list(example.tokens),
        "index": example.index,
        "position": example.position,
        "saliency": None if saliency is None else list(saliency.weights),
        "r2": None if saliency is None else saliency.r2,
    }
