"""Routes that compute with the model. Each is sent to :class:`~neuron_explainer.server.worker.Worker`."""

import asyncio
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Request
from pydantic import Field, model_validator
from starlette.responses import Response

from neuron_explainer.server.bodies import StrictRoute
from neuron_explainer.server.compute.refusals import Refusal
from neuron_explainer.server.problems import Problem
from neuron_explainer.server.registry import ID_PATTERN
from neuron_explainer.server.replies import json_reply
from neuron_explainer.server.security import COMPUTE
from neuron_explainer.server.serving import Served, Serving
from neuron_explainer.server.shapes import Body
from neuron_explainer.server.worker import Worker

router = APIRouter(route_class=StrictRoute)
LOOK = 0.25
"""Seconds between looks at whether a client is still there."""

# --- what may be asked ---

Prompted = Annotated[str, Field(min_length=1, max_length=65_536)]
TokenLike = Annotated[str, Field(max_length=200)] | Annotated[int, Field(ge=0, lt=2**31)]
Id = Annotated[str, Field(pattern=ID_PATTERN)]
Number = Annotated[int, Field(ge=0, lt=2**31)]
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
    through: Literal["q", "k", "v", "qk"] | None = None


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
    task = asyncio.ensure_future(worker_of(served).call(operation, content))
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


@router.post("/debug", **COMPUTE)
async def debug(request: Request, served: Served, body: DebugRequest) -> Response:
    """Which nodes make a prediction."""
    return json_reply(request, await ask(request, served, "debug", _content(body)), etag=False)
