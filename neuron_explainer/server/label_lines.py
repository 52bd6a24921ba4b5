"""Labels from JSON lines of three kinds: of this server, OpenAI's explanations, Neuronpedia's export."""

import math
from dataclasses import dataclass, field
from typing import Any

from neuron_explainer.analysis.interchange.dashboards import ExplanationRow
from neuron_explainer.analysis.interchange.neuron_records import (
    AttentionSimulationResults,
    explanations_of,
)
from neuron_explainer.analysis.interchange.objects import parse, read_object
from neuron_explainer.analysis.store_format import Label
from neuron_explainer.errors import InputError, NeuronExplainerError, did_you_mean, shown
from neuron_explainer.server.registry import Registry, Shelf

_MOST_ERRORS = 20


@dataclass
class LabelLines:
    """What a text of JSON lines says."""

    labels: dict[str, list[Label]] = field(default_factory=dict)
    """By the id of the dictionary."""
    skipped: int = 0
    errors: list[dict[str, Any]] = field(default_factory=list)


def read_label_lines(
    body: bytes, registry: Registry, dictionary: str | None, most: int
) -> LabelLines:
    """The labels of JSON lines.

    Args:
        body: the lines.
        registry: the dictionaries that there are.
        dictionary: which one all lines belong to; None: each line says it.
        most: characters of a label; longer ones are skipped.
    """
    read = LabelLines()
    for number, line in enumerate(body.split(b"\n"), 1):
        if not line.strip():
            continue
        try:
            shelf, labels = _of_line(parse(line, f"line {number}"), registry, dictionary)
            for label in labels:
                _check(label, shelf, most)
        except NeuronExplainerError as error:
            read.skipped += 1
            if len(read.errors) < _MOST_ERRORS:
                read.errors.append({"line": number, "detail": str(error)[:500]})
        else:
            read.labels.setdefault(shelf.id, []).extend(labels)
    return read


def _check(label: Label, shelf: Shelf, most: int) -> None:
    if not 0 <= label.unit < shelf.n:
        raise InputError(f"{shelf.id} has no unit {label.unit}: there are 0 to {shelf.n - 1}.")
    if not label.text.strip() or len(label.text) > most:
        raise InputError(f"expected a label of 1 to {most} characters, found {len(label.text)}.")


def _of_line(value: Any, registry: Registry, dictionary: str | None) -> tuple[Shelf, list[Label]]:
    if not isinstance(value, dict):
        raise InputError(f"expected a JSON object, found {shown(value)}.")
    if "modelId" in value:
        return _of_neuronpedia(value, registry, dictionary)
    if {"neuron_id", "attention_head_id", "attention_id"} & value.keys():
        return _of_explanations(value, registry, dictionary)
    return _of_ours(value, registry, dictionary)


def _of_ours(
    value: dict[str, Any], registry: Registry, dictionary: str | None
) -> tuple[Shelf, list[Label]]:
    unit, text, source = value.get("unit"), value.get("text"), value.get("source", "import")
    score = value.get("score")
    fits = isinstance(unit, int) and not isinstance(unit, bool)
    if not (fits and isinstance(text, str) and isinstance(source, str)):
        raise InputError(
            'expected {"dictionary": …, "unit": number, "text": text, "source": text}.'
        )
    shelf = _named(dictionary or value.get("dictionary"), registry)
    return shelf, [Label(int(str(unit)), text, source[:80], _score(score))]


def _of_neuronpedia(
    value: dict[str, Any], registry: Registry, dictionary: str | None
) -> tuple[Shelf, list[Label]]:
    row = read_object(ExplanationRow, value, "row")
    if not row.index.isdecimal():
        raise InputError(f"expected a number as index, found {shown(row.index)}.")
    shelf = _named(dictionary or row.layer, registry)
    score = row.scoreV2 if row.scoreV2 is not None else row.scoreV1
    source = row.typeName or row.explanationModelName or "neuronpedia"
    return shelf, [Label(int(row.index[:12]), row.description, source[:80], _score(score))]


def _of_explanations(
    value: dict[str, Any], registry: Registry, dictionary: str | None
) -> tuple[Shelf, list[Label]]:
    found = explanations_of(value, "object")
    unit = found.neuron_id
    if dictionary is not None:
        shelf = registry[dictionary]
    else:
        kind = "head" if isinstance(found, AttentionSimulationResults) else "neuron"
        shelf = _at(kind, unit.layer_index, registry)
    explained: list[Any] = list(found.scored_explanations)
    return shelf, [
        Label(unit.neuron_index, each.explanation, f"explanation {n}" if n else "explanation", s)
        for n, each in enumerate(sorted(explained, key=lambda e: -(_score(e.score) or -2.0)))
        for s in [_score(each.score)]
    ]


def _at(kind: str, layer: int, registry: Registry) -> Shelf:
    for shelf in registry:
        if (shelf.kind, shelf.layer) == (kind, layer):
            return shelf
    raise InputError(
        f"there is no dictionary of {kind}s of layer {layer}; give the one that the lines belong to."
    )


def _named(name: Any, registry: Registry) -> Shelf:
    for shelf in registry:
        if name in (shelf.id, shelf.name):
            return shelf
    hint = did_you_mean(name, [shelf.id for shelf in registry]) if isinstance(name, str) else ""
    raise InputError(f"there is no dictionary {shown(name)}.{hint}")


def _score(value: Any) -> float | None:
    """A finite number, or None."""
    number = isinstance(value, int | float) and not isinstance(value, bool)
    return float(value) if number and abs(value) < 1e300 and math.isfinite(value) else None
