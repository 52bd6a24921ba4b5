"""The application: stores, pages and a model behind one guard."""

import contextlib
from collections import defaultdict
from collections.abc import AsyncIterator, Iterable, Sequence
from pathlib import Path
from typing import Any

from fastapi import APIRouter, Depends, FastAPI, Request
from starlette.responses import Response

from neuron_explainer import __version__
from neuron_explainer.analysis.store import ExampleStore
from neuron_explainer.server import (
    computing,
    exporting,
    jobs,
    labels,
    legacy,
    pages,
    problems,
    reading,
    search,
)
from neuron_explainer.server import factors as factor_routes
from neuron_explainer.server.compute.setup import DictionarySource, Setup
from neuron_explainer.server.factor_runs import FactorRuns
from neuron_explainer.server.limits import Limits
from neuron_explainer.server.registry import BUDGET, Registry, not_remote
from neuron_explainer.server.replies import json_reply
from neuron_explainer.server.security import (
    READ,
    ClientRate,
    Guard,
    admitted,
    make_policy,
    secure,
    set_cookie,
)
from neuron_explainer.server.serving import Compute, Serving
from neuron_explainer.server.shapes import PROBLEMS
from neuron_explainer.server.worker import Worker

API = "/api/v1"
ABOUT = "Stores of examples, and their model. Reads are GETs with an ETag; computing is POST."


def create_app(
    stores: Registry | Iterable[str | Path | ExampleStore] = ("tiny-tales",),
    model: Any = None,
    autoencoders: Sequence[str] = (),
    *,
    token: str | None = None,
    base_path: str = "",
    read_only: bool = False,
    hosts: Iterable[str] = (),
    any_address: bool = False,
    origins: Iterable[str] = (),
    frame_ancestors: str = "'self'",
    limits: Limits | None = None,
    store_budget: int = BUDGET,
    factors: Sequence[str | Path] = (),
    device: str | None = None,
    compute: Compute | None = None,
    log_prompts: bool = False,
) -> FastAPI:
    """An application that shows stores of examples, and computes with a model.

    It can be mounted in another application: the token, the check of the Host header and the path of the
    cookie stay as they are.

    Args:
        stores: files or folders of stores, or names of those of the package.
        model: a name, which gets a process of its own; a ``ModelContext``, used in this one (its weights
            may change between requests, so that results are not kept); or None.
        autoencoders: names, folders or files of autoencoders of this model.
        token: what clients must send; None: a random one, ``app.state.serving.policy.token``.
        base_path: the path in the browser's address, all of it, if a proxy takes a part of it away.
        read_only: refuse to change labels and bookmarks.
        hosts: names under which the server is reached, beside ``localhost`` and its addresses.
        any_address: answer under every IP address; needed where the server listens on all of them.
        origins: exact origins of other web pages that may use the API.
        frame_ancestors: who may show the pages in a frame, as in a Content-Security-Policy.
        limits: sizes and counts of requests.
        store_budget: bytes of memory for the figures of open stores.
        factors: folders of transformer factors' examples, as ``factors collate`` writes them.
        device: where the model runs; None: the best there is.
        compute: who runs the model, in place of ``model``.
        log_prompts: whether the log also holds the texts that requests give to the model.
    """
    limits = limits or Limits()
    policy = make_policy(
        token,
        hosts=hosts,
        any_address=any_address,
        origins=origins,
        base_path=base_path,
        frame_ancestors=frame_ancestors,
    )
    registry = stores if isinstance(stores, Registry) else Registry(stores, budget=store_budget)
    if compute is None:
        compute = _compute(model, autoencoders, registry, limits, device)
    rate = ClientRate(limits.compute_per_second)
    name = model if isinstance(model, str) else registry.model
    served = Serving(registry, policy, limits, compute, read_only, rate, name)
    served.factors, served.log_prompts = FactorRuns(factors), log_prompts
    return _application(served)


def _application(served: Serving) -> FastAPI:
    policy, limits = served.policy, served.limits
    files = pages.read_pages()
    app = FastAPI(
        title="neuron_explainer",
        version=__version__,
        description=ABOUT,
        openapi_url=None,  # GET /api/v1/openapi.json, with the token
        docs_url=None,  # these pages load scripts from elsewhere
        redoc_url=None,
        dependencies=[Depends(admitted)],
        lifespan=_lifespan,
        redirect_slashes=False,
        generate_unique_id_function=lambda route: route.name,
    )
    app.state.serving = served
    problems.install(app, lambda headers: secure(headers, policy))
    app.include_router(_api(), prefix=API)
    app.include_router(legacy.router, responses=PROBLEMS)
    app.include_router(pages.pages_router(files))
    sizes = defaultdict(lambda: limits.body_bytes, {f"{API}/labels/import": limits.import_bytes})
    public = frozenset(files) | {f"{API}/health"}
    app.add_middleware(Guard, policy=policy, public=public, sizes=sizes, seconds=limits.seconds)
    return app


def _api() -> APIRouter:
    api = APIRouter(responses=PROBLEMS)
    own = (reading, search, labels, exporting, factor_routes, computing, jobs)
    for router in (module.router for module in own):
        api.include_router(router)

    @api.get("/openapi.json", include_in_schema=False, **READ)
    def openapi(request: Request) -> Response:
        return json_reply(request, request.app.openapi())

    @api.post("/login", status_code=204, **READ)
    async def login(request: Request) -> Response:
        """A cookie for a page that knows the token from the fragment of its address."""
        reply = Response(status_code=204)
        set_cookie(reply, request.scope, request.app.state.serving.policy)
        return reply

    return api


@contextlib.asynccontextmanager
async def _lifespan(app: FastAPI) -> AsyncIterator[None]:
    served: Serving = app.state.serving
    served.compute.start()
    try:
        yield
    finally:
        served.jobs.close()
        served.compute.close()
        served.registry.close()


def _compute(
    model: Any,
    autoencoders: Sequence[str],
    registry: Registry,
    limits: Limits,
    device: str | None,
) -> Compute:
    """Who runs the model: a process for a name or path, a thread for a model that is open."""
    if model is None:
        return Worker(None)
    dictionaries = [
        DictionarySource(
            shelf.id, shelf.location, shelf.kind, not_remote(shelf.autoencoder), shelf.model
        )
        for shelf in registry
    ]
    setup = Setup(
        str(model) if isinstance(model, Path) else model,
        tuple(dictionaries),
        tuple(autoencoders),
        device=device,
        budget=limits.autoencoder_bytes,
        kept=limits.kept_bytes,
        max_tokens=limits.max_tokens,
        seconds=limits.seconds,
    )
    in_thread = not isinstance(model, str | Path)
    return Worker(setup, in_thread=in_thread, queue_size=limits.queue)
