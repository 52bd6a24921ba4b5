"""What all routes of one application share."""

import time
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal, Protocol

from fastapi import Depends, Path, Request

from neuron_explainer.analysis.latent_record import LatentRecord
from neuron_explainer.analysis.store import ExampleStore
from neuron_explainer.server.background import Jobs
from neuron_explainer.server.factor_runs import FactorRuns
from neuron_explainer.server.limits import Limits
from neuron_explainer.server.problems import Problem
from neuron_explainer.server.registry import ID_PATTERN, Registry
from neuron_explainer.server.security import ClientRate, Policy
from neuron_explainer.server.sessions import Sessions

ModelState = Literal["none", "loading", "ready", "failed"]


class Compute(Protocol):
    """What the routes that only read need to know of the model and who runs it."""

    @property
    def state(self) -> ModelState:
        """Whether there is a model, and whether it can be asked."""

    @property
    def error(self) -> str | None:
        """Why it failed."""

    @property
    def queue_depth(self) -> int:
        """How many requests wait."""

    def start(self) -> None:
        """Begin to load the model; returns at once, and does nothing the second time."""

    def close(self) -> None:
        """Stop everything that runs."""

    def description(self) -> dict[str, Any]:
        """The part of ``GET /model`` that only the model knows; empty before it is ready."""

    def dictionary(self, id: str) -> dict[str, Any]:
        """``has_autoencoder``, ``metrics`` and ``map`` of a dictionary, as far as they are known."""


class NoModel:
    """A server of stores alone."""

    state: ModelState = "none"
    error: str | None = None
    queue_depth = 0

    def start(self) -> None:
        """Nothing is to be loaded."""

    def close(self) -> None:
        """Nothing runs."""

    def description(self) -> dict[str, Any]:
        """Nothing is known."""
        return {}

    def dictionary(self, id: str) -> dict[str, Any]:
        """Nothing is known."""
        return {}


@dataclass
class Serving:
    """The state of one application; ``app.state.serving``."""

    registry: Registry
    policy: Policy
    limits: Limits
    compute: Compute
    read_only: bool
    rate: ClientRate
    model_name: str | None = None
    started: float = field(default_factory=time.monotonic)
    sessions: Sessions = field(default_factory=Sessions)
    factors: FactorRuns = field(default_factory=FactorRuns)
    jobs: Jobs = field(default_factory=Jobs)
    log_prompts: bool = False
    """Whether the log holds the texts of prompts."""


async def serving(request: Request) -> Serving:
    """The state of the application that a request came to."""
    found = request.app.state.serving
    assert isinstance(found, Serving)
    return found


Served = Annotated[Serving, Depends(serving)]
"""Type of a route's parameter that receives the state."""
DictionaryId = Annotated[str, Path(pattern=ID_PATTERN, description="id of a dictionary")]
Unit = Annotated[int, Path(ge=0, le=2**31 - 1, description="number of a unit")]


def record_of(store: ExampleStore, unit: int) -> LatentRecord:
    """What the store knows of a unit; a 404 if there is none of this number."""
    check_unit(store, unit)
    return store[unit]


def check_unit(store: ExampleStore, unit: int) -> None:
    """A 404 if the store has no unit of this number."""
    if unit >= len(store):
        raise Problem(
            404,
            "index_out_of_range",
            f"{store.name} has no {store.kind} {unit}: there are 0 to {len(store) - 1}.",
            loc=("path", "i"),
            allowed=[f"0 to {len(store) - 1}"],
        )
