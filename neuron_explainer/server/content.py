"""What the pages show of a unit, as plain values for JSON; needs neither the extra ``serve`` nor a model."""

from collections.abc import Iterable
from dataclasses import asdict
from typing import Any, Protocol

import numpy as np

from neuron_explainer.analysis.latent_record import Example, LatentRecord
from neuron_explainer.analysis.records import HISTOGRAM_EDGES
from neuron_explainer.analysis.store import ExampleStore


class Shelved(Protocol):
    """Where a store is known from."""

    @property
    def id(self) -> str:
        """What addresses call it."""

    @property
    def source(self) -> str:
        """What :meth:`ExampleStore.open` takes."""


def open_store(shelf: Shelved) -> str:
    """Python that opens the store of a dictionary as ``store``."""
    return (
        "from neuron_explainer.analysis.store import ExampleStore\n\n"
        f"store = ExampleStore.open({shelf.source!r})\n"
    )


def feature_content(shelf: Shelved, store: ExampleStore, record: LatentRecord) -> dict[str, Any]:
    """The reply that describes a unit, but for its neighbours in other layers."""
    alive, unit = store.alive, record.unit
    place = int(np.searchsorted(alive, unit))
    after = place + int(place < len(alive) and alive[place] == unit)
    partners = [partner.unit for partner in record.partners]
    names = store.first_labels(partners)
    return {
        "dictionary": shelf.id,
        "unit": unit,
        "kind": record.kind,
        "location": record.location,
        "signed": record.signed,
        "stats": asdict(record.statistics),
        "hist": _bars(record),
        "badges": badges(record),
        "examples": [example_content(example, record) for example in record.all_examples],
        "partners": [
            {
                **asdict(partner),
                "label": names[partner.unit].text if partner.unit in names else None,
            }
            for partner in record.partners
        ],
        "labels": labels_content(store, unit),
        "bookmarked": any(mark.unit == unit for mark in store.workspace.bookmarks()),
        "prev_alive": int(alive[place - 1]) if place > 0 else None,
        "next_alive": int(alive[after]) if after < len(alive) else None,
        **vocabulary(store, (example.tokens for example in record.all_examples)),
        "python": open_store(shelf) + f"result = store[{unit}]\n",
    }


def _bars(record: LatentRecord) -> dict[str, list[float] | list[int]]:
    """The part of the histogram between the first and the last bar that is not empty."""
    filled = np.flatnonzero(record.histogram)
    if not len(filled):
        return {"edges": [], "counts": []}
    edges = np.concatenate([[0.0], HISTOGRAM_EDGES, [2 * HISTOGRAM_EDGES[-1]]])
    first, last = int(filled[0]), int(filled[-1])
    return {
        "edges": edges[first : last + 2].tolist(),
        "counts": record.histogram[first : last + 1].tolist(),
    }


def badges(record: LatentRecord) -> list[str]:
    """What is special about a unit: it is dead or dense, or active on one token or at the start only."""
    active = [e for e in record.all_examples if e.group not in ("inactive", "bottom")]
    found = [] if record.alive else ["dead"]
    if record.dense:
        found.append("dense")
    if len(active) >= 3 and len({int(e.tokens[e.query]) for e in active}) == 1:
        found.append("single_token")
    if active and all(e.position + e.query == 0 for e in active):
        found.append("start_only")
    return found


def example_content(example: Example, record: LatentRecord) -> dict[str, Any]:
    """An example as JSON: only the activations that are not 0."""
    low = high = None
    if example.group == "stratum" and record.intervals:
        high = (1 - example.interval / record.intervals) * record.statistics.max
        low = max(0.0, (1 - (example.interval + 1) / record.intervals) * record.statistics.max)
    places = np.flatnonzero(example.activations)
    values = example.activations[places].tolist()
    return {
        "group": example.group,
        "interval": example.interval,
        "low": low,
        "high": high,
        "rank": example.rank,
        "value": example.value,
        "peak": example.peak,
        "document": example.document,
        "start": example.start,
        "position": example.position,
        "ids": example.tokens.tolist(),
        "acts": list(zip(places.tolist(), values, strict=True)),
        "pairs": example.pairs,
    }


def vocabulary(store: ExampleStore, ids: Iterable[Any]) -> dict[str, dict[str, str]]:
    """What tokens write: ``vocab`` as text, and ``vocab_bytes`` of those that are not whole UTF-8."""
    parts = [np.asarray(part, np.int64) for part in ids]
    unique = np.unique(np.concatenate(parts)) if parts else np.empty(0, np.int64)
    text: dict[str, str] = {}
    raw: dict[str, str] = {}
    for number, piece in zip(unique.tolist(), store.tokens.pieces(unique), strict=True):
        text[str(number)] = piece.decode(errors="replace")
        try:
            piece.decode()
        except UnicodeDecodeError:
            raw[str(number)] = piece.hex()
    return {"vocab": text, "vocab_bytes": raw}


def labels_content(store: ExampleStore, unit: int) -> list[dict[str, Any]]:
    """The labels of a unit; those that the user may change come first."""
    mine = len(store.workspace.labels(unit))
    return [
        {
            "id": f"user:{label.source}" if number < mine else f"store:{number - mine}",
            "source": label.source,
            "text": label.text,
            "score": label.score,
            "editable": number < mine,
        }
        for number, label in enumerate(store.labels(unit))
    ]
