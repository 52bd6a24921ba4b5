"""Files to keep: a unit as a page or as JSON, and the figures of a dictionary as a table."""

import csv
import io
from collections.abc import Iterator

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


def table_lines(store: ExampleStore) -> Iterator[str]:
    """The rows of the table, some at a time."""
    yield ",".join(["unit", *COLUMNS, "label"]) + "\r\n"
    for begin in range(0, len(store), _ROWS):
        units = range(begin, min(begin + _ROWS, len(store)))
        labels = store.first_labels(units)
        figures = [store.column(name)[units.start : units.stop].tolist() for name in COLUMNS]
        texts = [labels[unit].text if unit in labels else "" for unit in units]
        out = io.StringIO()
        csv.writer(out).writerows(
            zip(units, *figures, [_not_a_formula(text) for text in texts], strict=True)
        )
        yield out.getvalue()


def _not_a_formula(text: str) -> str:
    """A label may be somebody else's: an apostrophe in front keeps a spreadsheet from running it."""
    return f"'{text}" if text.startswith(_FORMULA) else text
