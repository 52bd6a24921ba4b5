"""What users say: labels, bookmarks and states of pages. The only routes that write."""

import hashlib
from collections.abc import Iterator
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Header, Path, Query, Request
from starlette.concurrency import run_in_threadpool
from starlette.responses import Response, StreamingResponse

from neuron_explainer.analysis.interchange.objects import dumps as dumps_object
from neuron_explainer.analysis.store import ExampleStore
from neuron_explainer.analysis.store_format import Label
from neuron_explainer.server import shapes
from neuron_explainer.server.bodies import StrictRoute
from neuron_explainer.server.content import labels_content
from neuron_explainer.server.label_lines import read_label_lines
from neuron_explainer.server.problems import Problem
from neuron_explainer.server.registry import ID_PATTERN
from neuron_explainer.server.replies import dumps, json_reply
from neuron_explainer.server.security import READ, WRITE
from neuron_explainer.server.serving import DictionaryId, Served, Serving, Unit, check_unit

router = APIRouter(route_class=StrictRoute)
Match = Annotated[str | None, Header(max_length=1000)]
_ANY = Annotated[str | None, Query(pattern=ID_PATTERN)]
_PATH = "/dictionaries/{d}/features/{i}/labels"


# --- labels of a unit ---


@router.get(_PATH, response_model=shapes.Labels, **READ)
def labels(request: Request, served: Served, d: DictionaryId, i: Unit) -> Response:
    """The labels of a unit. The ETag is what ``If-Match`` of a change refers to."""
    with served.registry.reading(d) as store:
        check_unit(store, i)
        return _labels_reply(request, store, i)


def _labels_reply(request: Request, store: ExampleStore, unit: int) -> Response:
    body, tag = _labels(store, unit)
    headers = {"ETag": tag}
    if request.method == "GET" and tag in request.headers.get("if-none-match", ""):
        return Response(status_code=304, headers=headers)
    return Response(body, headers=headers, media_type="application/json")


def _labels(store: ExampleStore, unit: int) -> tuple[bytes, str]:
    """The labels as JSON, and their strong ETag."""
    body = dumps({"items": labels_content(store, unit)})
    return body, f'"{hashlib.blake2b(body, digest_size=12).hexdigest()}"'


@router.put(_PATH, response_model=shapes.Labels, **WRITE)
def set_label(
    request: Request,
    served: Served,
    d: DictionaryId,
    i: Unit,
    label: shapes.NewLabel,
    if_match: Match = None,
) -> Response:
    """Say what a unit means; it replaces what the same source said before."""
    if not label.text.strip():
        raise Problem(422, "empty_label", "A label needs a text.", loc=("body", "text"))
    return _change(request, served, d, Label(i, label.text, label.source, label.score), if_match)


@router.delete(_PATH, response_model=shapes.Labels, **WRITE)
def remove_label(
    request: Request,
    served: Served,
    d: DictionaryId,
    i: Unit,
    source: Annotated[str, Query(max_length=80)] = "user",
    if_match: Match = None,
) -> Response:
    """Remove what a source says of a unit. Labels that came with the store stay."""
    return _change(request, served, d, Label(i, "", source), if_match)


def _change(
    request: Request, served: Serving, d: str, label: Label, if_match: str | None
) -> Response:
    with served.registry.reading(d) as store:
        check_unit(store, label.unit)
        tags = None if if_match is None else [tag.strip() for tag in if_match.split(",")]

        def compare() -> None:
            if tags is not None and "*" not in tags and _labels(store, label.unit)[1] not in tags:
                raise Problem(
                    412,
                    "changed_meanwhile",
                    "The labels of this unit have changed since they were read. Read them again.",
                    loc=("header", "if-match"),
                )

        # In the transaction, as another server may write to the same file.
        store.workspace.set_labels([label], before=compare)
        return _labels_reply(request, store, label.unit)


# --- many labels ---


@router.post(
    "/labels/import",
    response_model=shapes.Imported,
    openapi_extra={
        **WRITE["openapi_extra"],
        "requestBody": {
            "required": True,
            "content": {"application/x-ndjson": {"schema": {"type": "string"}}},
        },
    },
)
async def import_labels(request: Request, served: Served, dictionary: _ANY = None) -> Response:
    """Labels of JSON lines: of this server, of the published explanations, or of Neuronpedia.

    Without ``dictionary``, each line says which one it belongs to. Lines that cannot be used are counted.
    """
    body = await request.body()
    return await run_in_threadpool(_import, request, served, body, dictionary)


def _import(request: Request, served: Serving, body: bytes, dictionary: str | None) -> Response:
    if dictionary is not None:
        _ = served.registry[dictionary]
    read = read_label_lines(body, served.registry, dictionary, served.limits.label_characters)
    imported = 0
    for id, found in read.labels.items():
        with served.registry.reading(id) as store:
            imported += store.workspace.set_labels(found)
    content = {"imported": imported, "skipped": read.skipped, "errors": read.errors}
    return json_reply(request, content, etag=False)


@router.get(
    "/labels/export",
    response_class=Response,
    responses={200: {"content": {"application/x-ndjson": {"schema": {"type": "string"}}}}},
    **READ,
)
def export_labels(
    served: Served,
    format: Literal["jsonl", "neuronpedia"] = "jsonl",
    dictionary: _ANY = None,
    stored: Annotated[bool, Query(description="also those that came with the stores")] = False,
) -> Response:
    """The labels as JSON lines: those of the user, and perhaps those that came with the stores."""
    if dictionary is not None:
        _ = served.registry[dictionary]
    name = f"labels-{dictionary}" if dictionary else "labels"
    headers = {"Content-Disposition": f'attachment; filename="{name}.jsonl"'}
    lines = _lines(served, format, dictionary, stored)
    return StreamingResponse(lines, headers=headers, media_type="application/x-ndjson")


def _lines(served: Serving, format: str, dictionary: str | None, stored: bool) -> Iterator[bytes]:
    for shelf in served.registry.available():
        if dictionary in (None, shelf.id):
            with served.registry.reading(shelf.id) as store:
                found = store.all_labels(stored=stored)
            for label in found:
                if format == "neuronpedia":
                    yield _neuronpedia_line(shelf.model or "", shelf.id, label)
                else:
                    yield dumps({"dictionary": shelf.id, **label._asdict()}) + b"\n"


def _neuronpedia_line(model: str, id: str, label: Label) -> bytes:
    from neuron_explainer.analysis.interchange.dashboards import ExplanationRow

    who = model, id, str(label.unit)
    row = ExplanationRow(*who, label.text, label.source or None, None, label.score)
    return dumps_object(row).encode() + b"\n"


# --- bookmarks ---


@router.get("/bookmarks", response_model=shapes.Bookmarks, **READ)
def bookmarks(request: Request, served: Served) -> Response:
    """All units that are bookmarked."""
    items: list[dict[str, Any]] = []
    for shelf in served.registry.available():
        with served.registry.reading(shelf.id) as store:
            found = [mark for mark in store.workspace.bookmarks() if mark.unit < len(store)]
            names = store.first_labels([mark.unit for mark in found])
        for mark in found:
            label = names[mark.unit].text if mark.unit in names else None
            items.append({"dictionary": shelf.id, **mark._asdict(), "label": label})
    return json_reply(request, {"items": items})


@router.post("/bookmarks", response_model=shapes.Bookmarks, **WRITE)
def bookmark(request: Request, served: Served, mark: shapes.NewBookmark) -> Response:
    """Remember a unit; the note replaces the one before."""
    with served.registry.reading(mark.dictionary) as store:
        check_unit(store, mark.unit)
        store.workspace.bookmark(mark.unit, mark.note)
    return bookmarks(request, served)


@router.delete("/bookmarks", response_model=shapes.Bookmarks, **WRITE)
def remove_bookmark(
    request: Request,
    served: Served,
    dictionary: Annotated[str, Query(pattern=ID_PATTERN)],
    unit: Annotated[int, Query(ge=0, le=2**31 - 1)],
) -> Response:
    """Forget a unit; nothing happens if it was not bookmarked."""
    with served.registry.reading(dictionary) as store:
        store.workspace.remove_bookmark(unit)
    return bookmarks(request, served)


# --- states of pages ---


@router.post("/sessions", response_model=shapes.SessionId, **WRITE)
def keep_session(request: Request, served: Served, session: shapes.NewSession) -> Response:
    """Keep a state; the same state gets the same id."""
    return json_reply(request, {"id": served.sessions.keep(session.state)}, etag=False)


@router.get("/sessions/{id}", response_model=shapes.Session, **READ)
def session(
    request: Request, served: Served, id: Annotated[str, Path(pattern="^[0-9a-f]{32}$")]
) -> Response:
    """A state that was kept."""
    state = served.sessions.find(id)
    if state is None:
        text = "This state is not known here: it was kept by another server, or long ago."
        raise Problem(404, "unknown_session", text, loc=("path", "id"))
    return json_reply(request, {"id": id, "state": state})
