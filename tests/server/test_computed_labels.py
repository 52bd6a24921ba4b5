"""Nodes and neighbours have the labels of the stores."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

from neuron_explainer.server.computing import _add_labels
from neuron_explainer.server.registry import Registry
from neuron_explainer.server.serving import Serving
from tests.server.stores import LABELS, make_stores


def test_rows_get_the_labels_of_their_store(tmp_path: Path) -> None:
    registry = Registry([make_stores(tmp_path)])
    labelled = next(shelf for shelf in registry if shelf.layer == 2)
    rows: list[dict[str, Any]] = [
        {"dictionary": labelled.id, "unit": unit, "kind": kind, "location": "x", "label": None}
        for unit, kind in [(2, "latent"), (5, "latent"), (2, "error")]
    ]
    rows += [
        {"dictionary": "no-such-store", "unit": 2, "label": None},
        {"dictionary": None, "unit": 2, "kind": "neuron", "location": "9/x", "label": None},
    ]
    _add_labels(cast(Serving, SimpleNamespace(registry=registry)), rows)
    second = next(label.text for label in LABELS if label.unit == 2)
    assert [row["label"] for row in rows] == [second, None, None, None, None]
    registry.close()
