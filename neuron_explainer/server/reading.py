"""Routes that read stores: the model, dictionaries, units and their examples."""

import time
from dataclasses import asdict
from typing import Annotated, Any

import numpy as np
from fastapi import APIRouter, Query, Request
from starlette.responses import Response

from neuron_explainer import __version__
from neuron_explainer.analysis.records import GROUPS
from neuron_explainer.server import shapes
from neuron_explainer.server.content import example_content, feature_content, open_store, vocabulary
from neuron_explainer.server.problems import Problem
from neuron_explainer.server.registry import Shelf
from neuron_explainer.server.replies import json_reply
from neuron_explainer.server.security import PUBLIC, READ
from neuron_explainer.server.serving import DictionaryId, Served, Serving, Unit, record_of

router = APIRouter()
_DENSITIES = """import numpy as np

density = store.column("density")
edges = np.append(np.arange(-40, 0) / 4, 1e-9)
counts = np.histogram(np.log10(density[density > 0]), edges)[0].tolist()
result = {"provenance": store.provenance, "settings": store.settings, "counts": counts}
"""
FROM_MODEL = (
    *("family", "n_layers", "n_heads", "d_model", "d_ff", "n_ctx", "n_vocab", "dtype", "device"),
    "parameters",
)


@router.get("/health", response_model=shapes.Health, **PUBLIC)
async def health(request: Request, served: Served) -> Response:
    """Whether the server is there; the only route that needs no token."""
    content = {
        "version": __version__,
        "model_state": served.compute.state,
        "queue_depth": served.compute.queue_depth,
        "uptime": round(time.monotonic() - served.started, 3),
    }
    return json_reply(request, content, etag=False)


@router.get("/model", response_model=shapes.Model, **READ)
def model(request: Request, served: Served) -> Response:
    """The model, the dictionaries, and the limits of this server."""
    known = served.compute.description()
    content = {
        "name": served.model_name,
        "state": served.compute.state,
        "error": served.compute.error,
        **dict.fromkeys(FROM_MODEL),
        "sites": [],
        "heads": [],
        "python": _open_model(served),
        "stores_python": _open_stores(served),
        **known,
        "dictionaries": [dictionary_row(served, shelf) for shelf in served.registry.available()],
        "limits": asdict(served.limits),
        "capabilities": ["read", *known.get("capabilities", ())],
        "read_only": served.read_only,
    }
    return json_reply(request, content)


def _open_model(served: Serving) -> str:
    return (
        "from neuron_explainer.models.model_context import ModelContext\n\n"
        f"context = ModelContext.from_model_type({served.model_name or 'tiny-tales'!r})\n"
        "result = context.get_or_create_model()\n"
    )


def _open_stores(served: Serving) -> str:
    """Python that gives the figures of all stores."""
    sources = {shelf.id: shelf.source for shelf in served.registry.available()}
    lines = "".join(f"    {id!r}: {source!r},\n" for id, source in sources.items())
    return (
        "from neuron_explainer.analysis.store import ExampleStore\n\n"
        f"sources = {{\n{lines}}}\n"
        "stores = {id: ExampleStore.open(source) for id, source in sources.items()}\n"
        "result = {\n"
        '    id: {"n": len(store), "n_alive": len(store.alive), "n_dense": len(store.dense())}\n'
        "    for id, store in stores.items()\n"
        "}\n"
    )


def dictionary_row(served: Serving, shelf: Shelf) -> dict[str, Any]:
    """What a list of dictionaries says about one."""
    n_alive, n_dense = served.registry.counts(shelf)
    known = served.compute.dictionary(shelf.id)
    return {
        "id": shelf.id,
        "name": shelf.name,
        "kind": shelf.kind,
        "location": shelf.location,
        "layer": shelf.layer,
        "site": shelf.site,
        "n": shelf.n,
        "n_alive": n_alive,
        "n_dead": shelf.n - n_alive,
        "n_dense": n_dense,
        "signed": shelf.signed,
        "has_autoencoder": bool(known.get("has_autoencoder", False)),
        "metrics": known.get("metrics", shelf.metrics),
    }


@router.get("/dictionaries/{d}", response_model=shapes.Dictionary, **READ)
def dictionary(request: Request, served: Served, d: DictionaryId) -> Response:
    """A dictionary: how many units are alive, how dense they are, and where the figures come from."""
    shelf = served.registry[d]
    with served.registry.reading(d) as store:
        density = store.column("density")
        edges = np.arange(-40, 1) / 4
        # The last edge is above 1, so that units that are always active are counted.
        counts = np.histogram(np.log10(density[density > 0]), np.append(edges[:-1], 1e-9))[0]
        content = {
            **dictionary_row(served, shelf),
            "n_tokens": store.n_tokens,
            "density_hist": {"edges": edges.tolist(), "counts": counts.tolist()},
            "provenance": store.provenance,
            "settings": store.settings,
            "map": bool(served.compute.dictionary(d).get("map", False)),
            **_layers_beside(served, shelf),
            "python": open_store(shelf) + _DENSITIES,
        }
    return json_reply(request, content)


def _layers_beside(served: Serving, shelf: Shelf) -> dict[str, str | None]:
    before, after = (served.registry.beside(shelf, step) for step in (-1, 1))
    return {
        "prev_layer": None if before is None else before.id,
        "next_layer": None if after is None else after.id,
    }


# --- one unit ---


@router.get("/dictionaries/{d}/features/{i}", response_model=shapes.Feature, **READ)
def feature(request: Request, served: Served, d: DictionaryId, i: Unit) -> Response:
    """A unit: figures, histogram, examples, partners and labels. A dead one has no examples."""
    shelf = served.registry[d]
    with served.registry.reading(d) as store:
        record = record_of(store, i)
        content = feature_content(shelf, store, record) | _layers_beside(served, shelf)
    return json_reply(request, content)


@router.get("/dictionaries/{d}/features/{i}/examples", response_model=shapes.Examples, **READ)
def examples(
    request: Request,
    served: Served,
    d: DictionaryId,
    i: Unit,
    group: Annotated[str | None, Query(description=f"one of {', '.join(GROUPS)}")] = None,
    low: Annotated[float | None, Query(allow_inf_nan=False)] = None,
    high: Annotated[float | None, Query(allow_inf_nan=False)] = None,
    offset: Annotated[int, Query(ge=0, le=1_000_000)] = 0,
    limit: Annotated[int, Query(ge=1, le=50)] = 50,
) -> Response:
    """Examples of a unit, of a group or with their peaks in an interval."""
    if group is not None and group not in GROUPS:
        text = f"There is no group {group[:40]!r}."
        raise Problem(422, "unknown_group", text, loc=("query", "group"), allowed=GROUPS)
    with served.registry.reading(d) as store:
        record = record_of(store, i)
        found = [
            example
            for example in record.examples(group)
            if (low is None or example.value >= low) and (high is None or example.value <= high)
        ]
        page = found[offset : offset + limit]
        content = {
            "items": [example_content(example, record) for example in page],
            "total": len(found),
            "next_offset": offset + limit if offset + limit < len(found) else None,
            **vocabulary(store, (example.tokens for example in page)),
        }
    return json_reply(request, content)
