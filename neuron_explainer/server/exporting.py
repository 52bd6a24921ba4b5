"""Files to keep: a unit as a page or as JSON, and the figures of a dictionary as a table."""

import csv
import io
from collections.abc import Iterator

import numpy as np
from fastapi import APIRouter, Request
from starlette.responses import Response, StreamingResponse

from neuron_explainer.analysis.store import COLUMNS, ExampleStore
from neuron_explainer.server.content import feature_content
from neuron_explainer.server.replies import bytes_reply, dumps
from neuron_explainer.server.security import READ
from neuron_explainer.server.serving import DictionaryId, Served, Unit, record_of

router = APIRouter(prefix="/export")
_ROWS = 1000
_FORMULA = ("=", "+", "-", "@", "\t", "\r")
"""How a text begins that a spreadsheet takes for a formula."""


def _attachment(name: str) -> dict[str, str]:
    """Saved and not shown: what is in a file does not become a page of this origin."""
    return {"Content-Disposition": f'attachment; filename="{name}"'}


@router.get("/{d}/{i}.html", response_class=Response, **READ)
def unit_page(request: Request, served: Served, d: DictionaryId, i: Unit) -> Response:
    """A unit as one HTML file without script, as ``neuron-explainer page`` writes it."""
    with served.registry.reading(d) as store:
        body = record_of(store, i).html().encode()
    name = f"{d}-{i}.html"
    return bytes_reply(request, body, "text/html; charset=utf-8", headers=_attachment(name))


@router.get("/{d}/{i}.json", response_class=Response, **READ)
def unit_json(request: Request, served: Served, d: DictionaryId, i: Unit) -> Response:
    """A unit as JSON: what its page is made of."""
    shelf = served.registry[d]
    with served.registry.reading(d) as store:
        body = dumps(feature_content(shelf, store, record_of(store, i)))
    return bytes_reply(request, body, "application/json", headers=_attachment(f"{d}-{i}.json"))


@router.get("/{d}.csv", response_class=Response, **READ)
def table(served: Served, d: DictionaryId) -> Response:
    """The figures of all units, and their first labels, as a table for spreadsheets."""
    _ = served.registry[d]

    def lines() -> Iterator[str]:
        with served.registry.reading(d) as store:
            yield from table_lines(store)

    return StreamingResponse(
        lines(), headers=_attachment(f"{d}.csv"), media_type="text/csv; charset=utf-8"
    )


@router.get("/{d}.parquet", response_class=Response, **READ)
def parquet_table(request: Request, served: Served, d: DictionaryId) -> Response:
    """The same table as a Parquet file, with labels as they are. It needs the extra ``data`` (else 501)."""
    from neuron_explainer.analysis.interchange.parquet import table_bytes

    with served.registry.reading(d) as store:
        texts = [text for units in _parts(store) for text in _labels(store, units)]
        figures = {name: store.column(name) for name in COLUMNS}
        body = table_bytes({"unit": np.arange(len(store)), **figures, "label": texts})
    headers = _attachment(f"{d}.parquet")
    return bytes_reply(request, body, "application/vnd.apache.parquet", headers=headers)


def table_lines(store: ExampleStore) -> Iterator[str]:
    """The rows of the table, some at a time."""
    yield ",".join(["unit", *COLUMNS, "label"]) + "\r\n"
    for units in _parts(store):
        figures = [store.column(name)[units.start : units.stop].tolist() for name in COLUMNS]
        texts = [_not_a_formula(text or "") for text in _labels(store, units)]
        out = io.StringIO()
        csv.writer(out).writerows(zip(units, *figures, texts, strict=True))
        yield out.getvalue()


def _parts(store: ExampleStore) -> Iterator[range]:
    """All units, some at a time."""
    for begin in range(0, len(store), _ROWS):
        yield range(begin, min(begin + _ROWS, len(store)))


def _labels(store: ExampleStore, units: range) -> list[str | None]:
    """The first label of each unit."""
    labels = store.first_labels(units)
    return [labels[unit].text if unit in labels else None for unit in units]


def _not_a_formula(text: str) -> str:
    """A label may be somebody else's: an apostrophe in front keeps a spreadsheet from running it."""
    return f"'{text}" if text.startswith(_FORMULA) else text
