"""Routes that compute with the model. Each is sent to :class:`~neuron_explainer.server.worker.Worker`."""

import asyncio
import contextlib
import logging
from collections.abc import AsyncGenerator, AsyncIterator, Coroutine, Iterator
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Query, Request
from pydantic import Field, model_validator
from starlette.concurrency import run_in_threadpool
from starlette.responses import Response, StreamingResponse

from neuron_explainer.server.bodies import StrictRoute
from neuron_explainer.server.compute.refusals import Refusal
from neuron_explainer.server.problems import Problem, problem_reply
from neuron_explainer.server.registry import ID_PATTERN
from neuron_explainer.server.replies import bytes_reply, dumps, json_reply
from neuron_explainer.server.security import COMPUTE
from neuron_explainer.server.serving import DictionaryId, Served, Serving, Unit
from neuron_explainer.server.shapes import Body
from neuron_explainer.server.worker import Worker

log = logging.getLogger(__name__)
router = APIRouter(route_class=StrictRoute)
LOOK = 0.25
"""Seconds between looks at whether a client is still there."""
EVENTS = "text/event-stream"
_AS_EVENTS: dict[int | str, dict[str, Any]] = {
    200: {"content": {EVENTS: {"schema": {"type": "string"}}}}
}

# --- what may be asked ---

Prompted = Annotated[str, Field(min_length=1, max_length=65_536)]
TokenLike = Annotated[str, Field(max_length=200)] | Annotated[int, Field(ge=0, lt=2**31)]
Id = Annotated[str, Field(pattern=ID_PATTERN)]
Number = Annotated[int, Field(ge=0, lt=2**31)]
Listed = Annotated[int, Query(ge=1, le=100)]
Position = Annotated[int, Field(ge=-1, lt=2**31)]
Layer = Annotated[int, Field(ge=0, lt=10_000)]
Location = Annotated[str, Field(min_length=1, max_length=100)]
Metric = Literal["activation", "write_norm", "direct", "act_grad"]
METRICS: tuple[Metric, ...] = ("activation", "write_norm", "direct", "act_grad")
Value = Annotated[float, Field(ge=-1e6, le=1e6)]


class TokenizeRequest(Body):
    """A text."""

    text: Annotated[str, Field(max_length=65_536)]


class ActivationsRequest(Body):
    """Either chosen units, or the most active ones of each token."""

    texts: Annotated[list[Prompted], Field(min_length=1, max_length=8)]
    dictionary: Id
    units: Annotated[list[Number], Field(min_length=1, max_length=64)] | None = None
    top_k: Annotated[int, Field(ge=1, le=32)] | None = None

    @model_validator(mode="after")
    def _one_of_both(self) -> "ActivationsRequest":
        if (self.units is None) == (self.top_k is None):
            raise ValueError("give units or top_k, and not both")
        return self


class PromptRequest(Body):
    """A prompt and its tokens of interest; without a target, its likeliest next token."""

    text: Prompted
    target: Annotated[list[TokenLike], Field(max_length=20, default_factory=list)]
    distractor: Annotated[list[TokenLike], Field(max_length=20, default_factory=list)]


class NodeRequest(Body):
    """A unit at a position: -1 is the last token, null every token."""

    location: Location
    unit: Number
    kind: Literal["neuron", "head", "pair", "latent"] | None = None
    position: Position = -1
    attended: Position | None = None
    dictionary: Id | None = None


class ChangedNode(Body):
    """What is changed: one unit, or all of a location; at one position, or at all (null)."""

    location: Location
    unit: Number | None = None
    position: Position | None = None
    dictionary: Id | None = None


class InterventionRequest(Body):
    """What is done to a unit. ``swap`` takes its value from the other prompt, or from ``source``."""

    node: ChangedNode
    action: Literal["zero", "mean", "set", "scale", "add", "swap"]
    value: Value | None = None
    source: Prompted | None = None


class UnitsRequest(Body):
    """What the nodes of MLPs and of attention are."""

    mlp: Literal["neuron", "latent"] = "neuron"
    attention: Literal["head", "pair", "latent"] = "head"


class TraceRequest(Body):
    """A node whose value takes the place of the prediction."""

    node: NodeRequest
    through: Literal["q", "k", "qk", "v"] | None = None


class DebugRequest(Body):
    """See :mod:`neuron_explainer.server.compute.debugging`."""

    prompts: Annotated[list[PromptRequest], Field(min_length=1, max_length=2)]
    units: UnitsRequest = UnitsRequest()
    dictionaries: Annotated[list[Id], Field(max_length=100)] | None = None
    layers: Annotated[list[Layer], Field(min_length=1, max_length=200)] | None = None
    metrics: Annotated[
        list[Metric], Field(min_length=1, max_length=4, default_factory=lambda: [*METRICS])
    ]
    position: Position | Literal["all"] = -1
    top_k: Annotated[int, Field(ge=1, le=200)] = 10
    top_logits: Annotated[int, Field(ge=1, le=100)] = 20
    interventions: Annotated[list[InterventionRequest], Field(max_length=64, default_factory=list)]
    trace: TraceRequest | None = None
    loss: bool = False


class NodeDetailRequest(DebugRequest):
    """A row of the debugger's table; the rest is what the table was asked with."""

    node: NodeRequest


Head = Annotated[list[Number], Field(min_length=2, max_length=2)]


class AttentionRequest(Body):
    """Patterns, or lengths of what is written, of ``[layer, head]`` pairs."""

    text: Prompted
    heads: Annotated[list[Head], Field(min_length=1, max_length=144)]
    kind: Literal["pattern", "write_norm"] = "pattern"


class HeadRequest(Body):
    """One head on one text."""

    text: Prompted
    layer: Layer
    head: Number


class HeadLatentsRequest(Body):
    """The latents of two dictionaries (which may be the same) at the two ends of one head."""

    layer: Layer
    head: Number
    queries: Id
    keys: Id
    k: Annotated[int, Field(ge=1, le=100)] = 20


def _post() -> list[Literal["mid", "post"]]:
    return ["post"]


class LensRequest(Body):
    """Which points of the stream are read, and where: null is every token."""

    text: Prompted
    points: Annotated[
        list[Literal["mid", "post"]], Field(min_length=1, max_length=2, default_factory=_post)
    ]
    positions: Annotated[list[Position], Field(min_length=1, max_length=64)] | None = None
    k: Annotated[int, Field(ge=1, le=10)] = 5


class GenerateRequest(Body):
    """A text to go on with, unchanged and under interventions."""

    prompt: Prompted
    max_new: Annotated[int, Field(ge=1, le=128)] = 20
    seed: Annotated[int, Field(ge=0, lt=2**31)] = 0
    temperature: Annotated[float, Field(ge=0, le=10)] = 0.8
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    interventions: Annotated[list[InterventionRequest], Field(max_length=16, default_factory=list)]
    baseline: bool = True


# --- asking ---


def as_problem(refusal: Refusal) -> Problem:
    """A refusal of the model as the reply to a client."""
    return Problem(
        refusal.status,
        refusal.code,
        refusal.detail,
        loc=refusal.loc,
        allowed=refusal.allowed,
        retry_after=refusal.retry_after,
    )


def worker_of(served: Serving) -> Worker:
    """Who runs the model."""
    if not isinstance(served.compute, Worker):
        raise Problem(
            503, "no_model", "This server has no model: start it with --model to compute."
        )
    return served.compute


async def ask(request: Request, served: Serving, operation: str, content: dict[str, Any]) -> Any:
    """The model's answer. A client that goes away takes its request with it."""
    note_prompts(request, served, content)
    return await _while_there(request, worker_of(served).call(operation, content))


def note_prompts(request: Request, served: Serving, content: Any) -> None:
    """With ``--log-prompts``, a line of the log with the texts of a request to the model."""
    if served.log_prompts and (texts := list(_texts_of(content))):
        log.info("%s prompts %r", request.state.request_id, texts)


def _texts_of(content: Any) -> Iterator[str]:
    if isinstance(content, dict):
        for name, value in content.items():
            if isinstance(value, str) and name in ("text", "prompt", "source"):
                yield value
            elif name == "texts":
                yield from value
            else:
                yield from _texts_of(value)
    elif isinstance(content, list):
        for each in content:
            yield from _texts_of(each)


async def _while_there(request: Request, answer: Coroutine[Any, Any, Any]) -> Any:
    """What is awaited, as long as its client is there."""
    task = asyncio.ensure_future(answer)
    try:
        while not (await asyncio.wait({task}, timeout=LOOK))[0]:
            if await request.is_disconnected():
                raise Problem(503, "client_gone", "Nobody waits for this answer any more.")
        return task.result()
    except Refusal as refusal:
        raise as_problem(refusal) from None
    finally:
        task.cancel()


def _content(body: Body) -> dict[str, Any]:
    return body.model_dump()


@router.post("/tokenize", **COMPUTE)
async def tokenize(request: Request, served: Served, body: TokenizeRequest) -> Response:
    """The tokens of a text."""
    return json_reply(request, await ask(request, served, "tokenize", _content(body)), etag=False)


@router.post("/activations", **COMPUTE)
async def activations(request: Request, served: Served, body: ActivationsRequest) -> Response:
    """Where units are active on texts, or which units are most active at each token."""
    found = await ask(request, served, "activations", _content(body))
    return json_reply(request, found, etag=False)


@router.post("/debug", **COMPUTE, responses=_AS_EVENTS)
async def debug(request: Request, served: Served, body: DebugRequest) -> Response:
    """Which nodes make a prediction.

    With ``Accept: text/event-stream`` the reply comes in parts, as events with a JSON object each:

    - ``started``, after the pass of the model: ``prompts`` (``ids``, ``target_ids``, ``top_logits``,
      ``logit_difference``, ``token_effects``, …), ``goal``, ``aligned``, ``cache_key``, ``vocab`` and
      ``vocab_bytes`` as in the whole reply, and ``sublayers``: how many ``nodes`` events follow;
    - ``nodes``, for each sublayer in the order of the model: ``number`` (1 to ``sublayers``), ``layer`` (null
      for the embedding and the goal's constant), ``locations``, ``nodes`` (rows as in the whole reply) and
      ``values`` (metric, then prompt ``A`` or ``B``, then a number for each of these rows). They are the
      rows of this sublayer that are among the ``top_k`` of all sublayers so far, and may be none. Later ones
      may displace them; every row of the whole reply has been in an event;
    - ``done``: the whole reply, the same as without streaming;
    - ``error``: a problem, in place of ``done``.

    What is wrong with the request itself is an ordinary error reply. Closing the connection cancels.
    """
    content = _content(body)
    if not _wants_events(request):
        found = await ask(request, served, "debug", content)
        await run_in_threadpool(_add_labels, served, found["nodes"])
        return json_reply(request, found, etag=False)
    return await _events(request, served, "debug_streamed", content)


def _wants_events(request: Request) -> bool:
    """Whether the client names the form of streams in its Accept header."""
    given = request.headers.get("accept", "").lower().split(",")
    return EVENTS in (each.partition(";")[0].strip() for each in given)


def _add_labels(served: Serving, rows: list[dict[str, Any]]) -> None:
    """Give each row the first label that its unit has in a store. Neurons are in the store of their layer."""
    ids = {shelf.id for shelf in served.registry}
    of_neurons = {s.location: s.id for s in served.registry if s.kind == "neuron"}
    by_store: dict[str, list[dict[str, Any]]] = {}
    for row in rows:
        id = row["dictionary"]
        if row.get("kind") == "neuron":
            id = of_neurons.get(row["location"])
        if id in ids and row.get("kind") != "error":
            by_store.setdefault(id, []).append(row)
    for id, several in by_store.items():
        with served.registry.reading(id) as store:
            labels = store.first_labels([row["unit"] for row in several])
        for row in several:
            if row["unit"] in labels:
                row["label"] = labels[row["unit"]].text


@router.post("/node", **COMPUTE)
async def node(request: Request, served: Served, body: NodeDetailRequest) -> Response:
    """What one node writes, what excites it, and where it looks."""
    return json_reply(request, await ask(request, served, "node", _content(body)), etag=False)


@router.post("/attention", **COMPUTE, response_class=Response)
async def attention(request: Request, served: Served, body: AttentionRequest) -> Response:
    """Patterns of many heads, as bytes: see :mod:`neuron_explainer.server.compute.attention`."""
    found = await ask(request, served, "attention", _content(body))
    return bytes_reply(request, found, "application/octet-stream", etag=False)


@router.post("/head", **COMPUTE)
async def head(request: Request, served: Served, body: HeadRequest) -> Response:
    """One attention head in detail."""
    return json_reply(request, await ask(request, served, "head", _content(body)), etag=False)


@router.post("/head/latents", **COMPUTE)
async def head_latents(request: Request, served: Served, body: HeadLatentsRequest) -> Response:
    """The pairs of latents with the largest attention scores in one head, read from the weights."""
    found = await ask(request, served, "head_latents", _content(body))
    both = [pair[side] for pair in found["pairs"] for side in ("query", "key")]
    await run_in_threadpool(_add_labels, served, both)
    return json_reply(request, found, etag=False)


@router.post("/lens", **COMPUTE)
async def lens(request: Request, served: Served, body: LensRequest) -> Response:
    """What the stream predicts, layer by layer."""
    return json_reply(request, await ask(request, served, "lens", _content(body)), etag=False)


@router.post("/generate", **COMPUTE, response_class=StreamingResponse, responses=_AS_EVENTS)
async def generate(request: Request, served: Served, body: GenerateRequest) -> Response:
    """Tokens as they are drawn: events ``token``, then ``done``, or ``error`` with a problem.

    What is wrong with the request itself is an ordinary error reply.
    """
    return await _events(request, served, "generate", _content(body))


async def _events(
    request: Request, served: Serving, operation: str, content: dict[str, Any]
) -> Response:
    """A reply that is a stream. It begins with its first part, so that a refusal is an ordinary error."""
    note_prompts(request, served, content)
    events = worker_of(served).stream(operation, content)
    first = await _while_there(request, _first(events))
    headers = {"Cache-Control": "no-store", "X-Accel-Buffering": "no"}
    return StreamingResponse(_sent(served, first, events), 200, headers, EVENTS)


async def _first(events: AsyncGenerator[tuple[str, Any], None]) -> tuple[str, Any]:
    return await anext(events)


async def _sent(
    served: Serving, first: tuple[str, Any], rest: AsyncGenerator[tuple[str, Any], None]
) -> AsyncIterator[bytes]:
    async with contextlib.aclosing(rest):
        try:
            yield await _event(served, *first)
            async for event in rest:
                yield await _event(served, *event)
        except Refusal as refusal:
            yield b"event: error\ndata: " + bytes(problem_reply(as_problem(refusal)).body) + b"\n\n"


async def _event(served: Serving, kind: str, payload: Any) -> bytes:
    name, content = payload if kind == "part" else ("done", payload)
    if rows := content.get("nodes"):
        await run_in_threadpool(_add_labels, served, rows)
    return b"event: " + name.encode() + b"\ndata: " + dumps(content) + b"\n\n"


# --- units of dictionaries ---


async def _read(
    request: Request, served: Served, operation: str, d: str, **content: Any
) -> Response:
    found = await ask(request, served, operation, {"dictionary": d, **content})
    return json_reply(request, found)


@router.get("/dictionaries/{d}/features/{i}/logits", **COMPUTE)
async def logits(
    request: Request, served: Served, d: DictionaryId, i: Unit, k: Listed = 10
) -> Response:
    """The tokens that a unit makes likelier and less likely, and those that excite it."""
    return await _read(request, served, "logits", d, unit=i, k=k)


@router.get("/dictionaries/{d}/features/{i}/neighbours", **COMPUTE)
async def neighbours(
    request: Request, served: Served, d: DictionaryId, i: Unit, k: Listed = 10
) -> Response:
    """The latents whose decoder rows are most alike."""
    found = await ask(request, served, "neighbours", {"dictionary": d, "unit": i, "k": k})
    await run_in_threadpool(_add_labels, served, found["items"])
    return json_reply(request, found)


@router.get("/dictionaries/{d}/map", **COMPUTE)
async def dictionary_map(request: Request, served: Served, d: DictionaryId) -> Response:
    """Every latent as a point in the plane, and how often it is active."""
    found = await ask(request, served, "map", {"dictionary": d})
    if any(
        shelf.id == d for shelf in served.registry
    ):  # else there is only an autoencoder of this name
        with served.registry.reading(d) as store:
            found["density"] = store.column("density")[found["unit"]].tolist()
    return json_reply(request, found)
