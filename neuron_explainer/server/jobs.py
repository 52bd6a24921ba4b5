"""Explaining units in the background: rules of the texts that a store holds, scored beside floors.

No language model is asked, the model is not run, and nothing leaves this machine. Explanations and scores
are kept in the workspace, as those of ``neuron-explainer explain`` are.
"""

import asyncio
import secrets
from collections.abc import AsyncIterator, Iterator
from functools import partial
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Path, Request
from pydantic import BaseModel, Field
from starlette.responses import Response, StreamingResponse

from neuron_explainer.analysis.explaining.explanation import Score
from neuron_explainer.analysis.explaining.work import Step, explain_units, score_units
from neuron_explainer.analysis.store import ExampleStore
from neuron_explainer.server.background import ENDED, Job, Kind, State
from neuron_explainer.server.bodies import StrictRoute
from neuron_explainer.server.content import open_store
from neuron_explainer.server.registry import ID_PATTERN, Registry, Shelf
from neuron_explainer.server.replies import dumps, json_reply
from neuron_explainer.server.security import READ, WRITE
from neuron_explainer.server.serving import Served, Serving, check_unit
from neuron_explainer.server.shapes import Body

router = APIRouter(route_class=StrictRoute, prefix="/jobs")
JobId = Annotated[str, Path(pattern="^[0-9a-f]{32}$")]
_LOOK = 0.1  # seconds between two looks at a job that somebody follows


class UnitsRequest(Body):
    """Which units a job is about."""

    dictionary: Annotated[str, Field(pattern=ID_PATTERN)]
    units: Annotated[
        list[Annotated[int, Field(ge=0, le=2**31 - 1)]], Field(min_length=1, max_length=64)
    ]


class ExplainRequest(UnitsRequest):
    """Which units to explain, and how: with a rule, or with the tokens that they are active on."""

    method: Literal["rules", "tokens"] = "rules"


class JobReply(BaseModel):
    """How far a job is, and what it has found."""

    id: str
    kind: Kind
    dictionary: str
    state: State
    done: int
    total: int
    items: list[dict[str, Any]]
    error: str | None
    python: str


# --- routes ---


@router.post("/explain", status_code=202, response_model=JobReply, **WRITE)
def explain(request: Request, served: Served, body: ExplainRequest) -> Response:
    """Explain units by rules of their texts, and score that. The explanations become labels."""
    return _started(request, served, "explain", body, body.method)


@router.post("/score", status_code=202, response_model=JobReply, **WRITE)
def score(request: Request, served: Served, body: UnitsRequest) -> Response:
    """Score the explanations that units have."""
    return _started(request, served, "score", body, "")


def _started(
    request: Request, served: Serving, kind: Kind, body: UnitsRequest, method: str
) -> Response:
    shelf = served.registry[body.dictionary]
    units = list(dict.fromkeys(body.units))
    with served.registry.reading(shelf.id) as store:
        for unit in units:
            check_unit(store, unit)
    python = _python(shelf, kind, units, method)
    job = Job(secrets.token_hex(16), kind, shelf.id, units, method, python)
    served.jobs.start(job, partial(_work, registry=served.registry))
    reply = json_reply(request, job.content(), etag=False)
    reply.status_code = 202
    return reply


@router.get("/{id}", response_model=JobReply, **READ)
def job(request: Request, served: Served, id: JobId) -> Response:
    """How far a job is, and what it has found."""
    return json_reply(request, served.jobs[id].content(), etag=False)


@router.delete("/{id}", response_model=JobReply, **WRITE)
def cancel(request: Request, served: Served, id: JobId) -> Response:
    """Stop a job after the unit that it is at."""
    found = served.jobs[id]
    found.stop.set()
    return json_reply(request, found.content(), etag=False)


@router.get("/{id}/events", response_class=StreamingResponse, **READ)
async def follow(served: Served, id: JobId) -> Response:
    """The job each time that it has changed, until it has ended."""
    found = served.jobs[id]

    async def events() -> AsyncIterator[bytes]:
        before = b""
        while True:
            ended = found.state in ENDED
            now = dumps(found.content())
            if now != before:
                yield b"event: job\ndata: " + now + b"\n\n"
                before = now
            if ended:
                return
            await asyncio.sleep(_LOOK)

    headers = {"Cache-Control": "no-store", "X-Accel-Buffering": "no"}
    return StreamingResponse(events(), headers=headers, media_type="text/event-stream")


def _python(shelf: Shelf, kind: str, units: list[int], method: str) -> str:
    """The same as Python; ``result`` has a step for each unit."""
    lines = [open_store(shelf)]
    if kind == "score":
        lines += ["from neuron_explainer.analysis.explaining.work import score_units\n\n"]
        return "".join(lines) + f"result = list(score_units(store, {units}, save=False))\n"
    return "".join(lines) + (
        "from neuron_explainer.analysis.explaining.work import explain_units, score_units\n\n"
        f"explained = list(explain_units(store, {units}, {method!r}, save=False))\n"
        "explanations = {step.unit: step.explanation for step in explained if step.explanation}\n"
        f"result = list(score_units(store, {units}, explanations=explanations, save=False))\n"
    )


# --- the work ---


def _work(job: Job, registry: Registry) -> None:
    with registry.reading(job.dictionary) as store:
        for step in _steps(job, store):
            _take(job, step)
            if job.stop.is_set():
                return


def _steps(job: Job, store: ExampleStore) -> Iterator[Step]:
    if job.kind == "score":
        yield from score_units(store, job.units)
        return
    explanations = {}
    for step in explain_units(store, job.units, job.method):
        if step.explanation is not None:
            explanations[step.unit] = step.explanation
        yield step
    # Beside chance and the token set; not beside whatever else happens to have been explained.
    yield from score_units(store, job.units, explanations=explanations)


def _take(job: Job, step: Step) -> None:
    """What became of a unit."""
    item = job.items.setdefault(
        step.unit, {"unit": step.unit, "text": None, "scores": [], "error": None}
    )
    if step.explanation is not None:
        item["text"], item["method"] = step.explanation.text, step.explanation.method
    item["scores"] = [_score(each) for each in step.scores] or item["scores"]
    item["error"] = step.error or item["error"]
    job.done += 1


def _score(score: Score) -> dict[str, Any]:
    return {
        "name": score.name,
        "metric": score.metric,
        "value": score.value,
        "interval": score.interval,
        "floors": [{"name": floor.name, "value": floor.value} for floor in score.floors],
        "smallest_difference": score.smallest_difference,
    }
