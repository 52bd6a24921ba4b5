"""Finding units: a table that is sorted and filtered, and a search over all dictionaries."""

import re
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple

import numpy as np
import numpy.typing as npt
from fastapi import APIRouter, Query, Request
from starlette.responses import Response

from neuron_explainer.analysis.label_search import CANDIDATES
from neuron_explainer.analysis.store import COLUMNS, ExampleStore
from neuron_explainer.analysis.store_format import Label
from neuron_explainer.analysis.workspace import Workspace
from neuron_explainer.server import shapes
from neuron_explainer.server.content import open_store, vocabulary
from neuron_explainer.server.problems import Problem
from neuron_explainer.server.registry import ID_PATTERN
from neuron_explainer.server.replies import json_reply
from neuron_explainer.server.security import READ
from neuron_explainer.server.serving import DictionaryId, Served, Serving

router = APIRouter()
Ints = npt.NDArray[np.int64]
Number = Annotated[float | None, Query(allow_inf_nan=False)]
Words = Annotated[str | None, Query(max_length=200)]
SORTS = ("unit", *COLUMNS, "score")


@router.get("/dictionaries/{d}/features", response_model=shapes.FeatureRows, **READ)
def features(
    request: Request,
    served: Served,
    d: DictionaryId,
    sort: Annotated[str, Query(description=f"one of {', '.join(SORTS)}")] = "unit",
    order: Literal["asc", "desc"] | None = None,
    density_min: Number = None,
    density_max: Number = None,
    alive: bool | None = None,
    q: Words = None,
    token: Words = None,
    cursor: Annotated[str | None, Query(pattern=r"^\d{1,9}$")] = None,
    limit: Annotated[int, Query(ge=1, le=200)] = 50,
) -> Response:
    """A page of a table of units: sorted by a figure, and filtered by density, label or token."""
    if sort not in SORTS:
        text = f"There is no figure {sort[:40]!r} to sort by."
        raise Problem(422, "unknown_sort", text, loc=("query", "sort"), allowed=SORTS)
    shelf = served.registry[d]
    descending = (order or ("asc" if sort == "unit" else "desc")) == "desc"
    begin = int(cursor or 0)
    choose = Choice(density_min, density_max, alive, q, token)
    with served.registry.reading(d) as store:
        units = _sorted(store, choose.units(store), sort, descending)
        content = {
            **_rows(store, units[begin : begin + limit].tolist()),
            "next_cursor": str(begin + limit) if begin + limit < len(units) else None,
            "total": len(units),
            "python": open_store(shelf)
            + choose.python()
            + _python_sort(sort, descending)
            + f"result = units[{begin}:{begin + limit}]\n",
        }
    return json_reply(request, content)


class Choice(NamedTuple):
    """Which units of a dictionary a table shows."""

    density_min: float | None
    density_max: float | None
    alive: bool | None
    label: str | None
    token: str | None

    def units(self, store: ExampleStore) -> Ints:
        """Their numbers, in order."""
        chosen = np.zeros(len(store), dtype=bool)
        chosen[store.filter(density=(self.density_min, self.density_max))] = True
        if self.alive is not None:
            chosen &= (store.column("count") > 0) == self.alive
        for wanted in (
            store.units_with_label(self.label) if self.label else None,
            store.units_at_token(self.token) if self.token else None,
        ):
            if wanted is not None:
                these = np.zeros(len(store), dtype=bool)
                these[wanted] = True
                chosen &= these
        return np.flatnonzero(chosen)

    def python(self) -> str:
        """The same as Python, which ends with ``units``."""
        lines = [f"units = store.filter(density=({self.density_min}, {self.density_max}))"]
        more = [
            "alive" if self.alive else "dead" if self.alive is not None else "",
            f"units_with_label({self.label!r})" if self.label else "",
            f"units_at_token({self.token!r})" if self.token else "",
        ]
        lines += [f"units = np.intersect1d(units, store.{each})" for each in more if each]
        return "import numpy as np\n\n" * any(more) + "\n".join(lines) + "\n"


def _python_sort(sort: str, descending: bool) -> str:
    """What :func:`_sorted` does, as Python."""
    if sort == "unit":
        return "units = units[::-1]\n" if descending else ""
    if sort == "score":
        sign = "-" if descending else ""
        line = f"units[({sign}store.label_scores()[units]).argsort(kind='stable')]"
    else:
        line = f"store.sort({sort!r}, descending={descending}, among=units)"
    return f"units = {line}\n"


def _sorted(store: ExampleStore, units: Ints, sort: str, descending: bool) -> Ints:
    """Units in an order; of equals, the lowest number comes first, and what has no score comes last."""
    if sort == "unit":
        return units[::-1] if descending else units
    if sort != "score":
        return store.sort(sort, descending=descending, among=units)
    scores = store.label_scores()[units]
    return units[np.argsort(-scores if descending else scores, kind="stable")]


def _rows(store: ExampleStore, units: Sequence[int]) -> dict[str, Any]:
    labels = store.first_labels(units)
    figures = {name: store.column(name) for name in ("density", "max", "mean")}
    items, ids = [], []
    for unit in units:
        example, label = store.first_example(unit), labels.get(unit)
        peek = None
        if example is not None:
            ids.append(example.tokens)
            shown = example.highlighted  # of heads, those of the query at the peak
            places = np.flatnonzero(shown)
            peek = {
                "ids": example.tokens.tolist(),
                "acts": list(zip(places.tolist(), shown[places].tolist(), strict=True)),
                "peak": example.query,
            }
        items.append(
            {
                "unit": unit,
                **{name: values[unit].item() for name, values in figures.items()},
                "label": None if label is None else label.text,
                "score": None if label is None else label.score,
                "peek": peek,
            }
        )
    return {"items": items, **vocabulary(store, ids)}


# --- all dictionaries ---


@router.get("/search", response_model=shapes.Hits, **READ)
def search(
    request: Request,
    served: Served,
    q: Annotated[str, Query(min_length=1, max_length=200)],
    dictionary: Annotated[str | None, Query(alias="dict", pattern=ID_PATTERN)] = None,
    mode: Literal["label", "token", "id", "all"] = "label",
    limit: Annotated[int, Query(ge=1, le=50)] = 50,
) -> Response:
    """Units by the words of their labels, by the token that they peak at, or by number; or by all three:
    numbers first, then labels, and tokens if there is room.

    ``complete`` is false if a search by token had no time for all dictionaries; ask again.
    """
    everywhere = dictionary is None
    shelves = served.registry.available() if everywhere else [served.registry[str(dictionary)]]
    ids = [shelf.id for shelf in shelves]
    complete = True
    if mode == "label":
        items = _by_label(served, q, ids, limit)
    elif mode == "token":
        items, complete = _by_token(served, q, ids, limit)
    else:
        items = _by_number(served, q, ids, limit)
    if mode == "all":
        items += _by_label(served, q, ids, limit)
        if len(items) < limit:
            more, complete = _by_token(served, q, ids, limit)
            items += more
        once: dict[tuple[str, int], dict[str, Any]] = {}
        for each in items:
            once.setdefault((each["dictionary"], each["unit"]), each)
        items = list(once.values())[:limit]
    return json_reply(request, {"items": items, "complete": complete})


def _hit(dictionary: str, unit: int, label: str | None, why: str, score: Any) -> dict[str, Any]:
    return {"dictionary": dictionary, "unit": unit, "label": label, "why": why, "score": score}


def _by_label(served: Serving, text: str, ids: Sequence[str], limit: int) -> list[dict[str, Any]]:
    """Labels with these words: whole words before beginnings, the user's before those of the stores."""
    found: dict[tuple[str, Label], None] = {}
    # So many labels are looked at in all, however many stores they are in.
    candidates = max(limit, CANDIDATES // max(len(ids), 1))
    for prefix in (False, True):
        stored: list[tuple[str, Label]] = []
        places: dict[Path, Workspace] = {}
        owners: dict[str, list[str]] = {}
        for id in ids:
            with served.registry.reading(id) as store:
                places |= {place.path: place for place in store.workspaces}
                owners.setdefault(store.subject, []).append(id)
                if prefix and len(stored) > 4 * limit:  # beginnings of words are common
                    continue
                labels = store.search_stored(text, limit, prefix=prefix, candidates=candidates)
                stored += [(id, label) for label in labels]
        for place in places.values():
            for subject, label in place.search_all(text, limit, prefix=prefix):
                found.update(dict.fromkeys((id, label) for id in owners.get(subject, ())))
        stored.sort(key=lambda pair: len(pair[1].text))
        found.update(dict.fromkeys(stored[:limit]))
        if len(found) >= limit:
            break
    return [
        _hit(id, label.unit, label.text, f"label by {label.source or '?'}", label.score)
        for id, label in list(found)[:limit]
    ]


def _by_token(
    served: Serving, text: str, ids: Sequence[str], limit: int
) -> tuple[list[dict[str, Any]], bool]:
    found: list[tuple[int, dict[str, Any]]] = []
    end = time.monotonic() + served.limits.token_search_seconds
    for number, id in enumerate(ids):
        if number and time.monotonic() >= end:
            break
        with served.registry.reading(id) as store:
            units = store.units_at_token(text)[:limit]
            counts = store.peaks_at_token(text)[units]
            labels = store.first_labels(units.tolist())
        n = store.peak_tokens.shape[1]
        for unit, count in zip(units.tolist(), counts.tolist(), strict=True):
            label = labels[unit].text if unit in labels else None
            why = f"{count} of its {n} strongest examples peak at this token"
            found.append((count, _hit(id, unit, label, why, count / n)))
    else:
        number = len(ids)
    found.sort(key=lambda pair: -pair[0])
    return [hit for _, hit in found[:limit]], number == len(ids)


def _by_number(served: Serving, text: str, ids: Sequence[str], limit: int) -> list[dict[str, Any]]:
    """``1234``; or with part of the name of a dictionary before it, ``mlp.2/1234``."""
    match = re.fullmatch(r"\s*(?:(.*?)[\s/:#]+)?(\d{1,10})\s*", text)
    if match is None:
        return []
    part, unit = (match[1] or "").casefold(), int(match[2])
    found = []
    for id in ids:
        shelf = served.registry[id]
        if unit < shelf.n and (part in id.casefold() or part in shelf.name.casefold()):
            with served.registry.reading(id) as store:
                label = store.first_labels([unit]).get(unit)
            found.append(_hit(id, unit, label.text if label else None, "number", None))
        if len(found) == limit:
            break
    return found
