"""Read routes of the original activation server and of seed 003, answered from our stores.

Clients that were written for those find the routes at the root, with the names and fields that they had.
Names of data sets are looked up; a path or URL in their place is an unknown name. What is not kept, and what
stands in its place, is in the README.
"""

import random
from typing import Annotated, Any

import numpy as np
from fastapi import APIRouter, Request
from pydantic import ConfigDict, Field
from pydantic.alias_generators import to_camel
from starlette.responses import Response

from neuron_explainer.analysis.latent_record import Example, LatentRecord
from neuron_explainer.analysis.records import HISTOGRAM_EDGES
from neuron_explainer.server import shapes
from neuron_explainer.server.bodies import StrictRoute
from neuron_explainer.server.msgpack import packed
from neuron_explainer.server.problems import Problem
from neuron_explainer.server.registry import Shelf
from neuron_explainer.server.replies import bytes_reply, json_reply
from neuron_explainer.server.security import READ
from neuron_explainer.server.serving import DictionaryId, Served, Serving, record_of

router = APIRouter(route_class=StrictRoute, tags=["earlier servers"])
_PER_SPLIT = 10
"""Examples of each kind in a record, as the original server gave."""
_RANDOM = ("uniform", "weighted", "stratum")
_Number = Annotated[int, Field(ge=0, le=2**31 - 1)]
_Names = Annotated[list[Annotated[str, Field(max_length=500)]], Field(max_length=20)]


class CamelBody(shapes.Body):
    """A body with names such as ``layerIndex``."""

    model_config = ConfigDict(
        extra="forbid", allow_inf_nan=False, alias_generator=to_camel, populate_by_name=True
    )


class NodeIdAndDatasets(CamelBody):
    """A unit of a layer, and where to look for it."""

    dst: str
    layer_index: _Number
    activation_index: _Number
    datasets: _Names


class ExistingExplanations(CamelBody):
    """A unit of a layer, and whose explanations are wanted."""

    dst: str
    layer_index: _Number
    activation_index: _Number
    explanation_datasets: _Names = Field(default_factory=list)
    neuron_dataset: str | None = None


# --- the original activation server ---


@router.post("/neuron_datasets_metadata", **READ)
def neuron_datasets_metadata(request: Request, served: Served) -> Response:
    """The data sets: dictionaries of one name, whatever their layer."""
    found = {_short_name(shelf): shelf for shelf in served.registry}
    content = [
        {
            "shortName": name,
            "derivedScalarType": scalar_type(shelf),
            "userVisibleName": f"{shelf.model or 'model'}: {shelf.kind}s of {shelf.site}",
            "neuronDatasetPath": name,
        }
        for name, shelf in found.items()
    ]
    return json_reply(request, content)


def _short_name(shelf: Shelf) -> str:
    """Such as ``tiny-tales_ae-resid-delta-mlp``; of neurons, the name of the model."""
    model = shelf.model or "model"
    if shelf.kind == "latent":
        return f"{model}_{shelf.name.rpartition('/')[0] or shelf.name}"
    return model if shelf.kind == "neuron" else f"{model}_{shelf.kind}s"


def scalar_type(shelf: Shelf) -> str:
    """The original's name for the values of a dictionary."""
    if shelf.kind == "latent":
        return f"{'attention' if 'attn' in shelf.site else 'mlp'}_autoencoder_latent"
    return "attn_write_norm" if shelf.kind == "head" else shelf.site.replace(".", "_")


def _find(served: Serving, names: list[str], dst: str, layer: int) -> Shelf:
    for name in names:
        for shelf in served.registry:
            known = name in (shelf.id, shelf.name, _short_name(shelf))
            if known and shelf.layer == layer and dst == scalar_type(shelf):
                return shelf
    raise Problem(
        404,
        "unknown_dataset",
        f"There is no data set of {dst[:80]!r} for layer {layer} under these names.",
        allowed=sorted({_short_name(shelf) for shelf in served.registry})[:50],
    )


@router.post("/neuron_record", **READ)
def neuron_record(request: Request, served: Served, node: NodeIdAndDatasets) -> Response:
    """The examples of a unit: those with the largest values, and random ones."""
    shelf = _find(served, node.datasets, node.dst, node.layer_index)
    with served.registry.reading(shelf.id) as store:
        record = record_of(store, node.activation_index)
        top = _sequences(record, record.top[:_PER_SPLIT])
        drawn = [e for group in _RANDOM for e in record.examples(group)]
        content = {
            "dataset": _short_name(shelf),
            "maxActivation": record.statistics.max,
            "topActivations": top,
            "randomSample": _sequences(record, drawn[:_PER_SPLIT]),
        }
    return json_reply(request, content)


def _sequences(record: LatentRecord, examples: Any) -> list[list[dict[str, Any]]]:
    """Token, value and value relative to the largest one, of each token of each example."""
    scale = max(record.statistics.max, 1e-5)
    return [
        [
            {
                "token": piece.decode(errors="replace"),
                "scalar": value,
                "normalizedScalar": max(value, 0.0) / scale,
            }
            for piece, value in zip(example.pieces, example.highlighted.tolist(), strict=True)
        ]
        for example in examples
    ]


@router.post("/existing_explanations", **READ)
def existing_explanations(
    request: Request, served: Served, wanted: ExistingExplanations
) -> Response:
    """What is said about a unit: the user's labels and those of the store."""
    names = wanted.explanation_datasets
    if bool(names) == (wanted.neuron_dataset is not None):
        text = "Give either explanationDatasets or neuronDataset."
        raise Problem(400, "one_of_two", text, loc=("body",))
    names = names or [str(wanted.neuron_dataset)]
    shelf = _find(served, names, wanted.dst, wanted.layer_index)
    with served.registry.reading(shelf.id) as store:
        labels = record_of(store, wanted.activation_index).labels
    content = [{"explanation": x.text, "score": x.score, "datasetName": x.source} for x in labels]
    return json_reply(request, content)


@router.post("/model_info", **READ)
def model_info(request: Request, served: Served) -> Response:
    """The model, its autoencoders and its layers."""
    latents = [shelf for shelf in served.registry if shelf.kind == "latent"]
    attention = [shelf for shelf in latents if scalar_type(shelf).startswith("attention")]
    mlp = [shelf for shelf in latents if shelf not in attention]
    layers = [shelf.layer for shelf in served.registry if shelf.layer is not None]
    names = [each[0].name.rpartition("/")[0] if each else None for each in (mlp, attention)]
    content = {
        "modelName": served.model_name,
        "hasMlpAutoencoder": bool(mlp),
        "mlpAutoencoderName": names[0],
        "hasAttentionAutoencoder": bool(attention),
        "attentionAutoencoderName": names[1],
        "nLayers": served.compute.description().get("n_layers") or max(layers, default=-1) + 1,
    }
    return json_reply(request, content)


# --- seed 003 ---


@router.get("/dictionaries", **READ)
def dictionaries(request: Request, served: Served) -> Response:
    """The ids of all dictionaries."""
    return json_reply(request, [shelf.id for shelf in served.registry])


@router.get("/dictionaries/{d}/features/{index}", **READ)
def packed_feature(request: Request, served: Served, d: DictionaryId, index: str) -> Response:
    """A unit as MessagePack; ``random`` is any unit that is alive."""
    with served.registry.reading(d) as store:
        if index == "random":
            alive = store.alive
            if not len(alive):
                raise Problem(404, "all_dead", "No unit of this dictionary is alive.")
            index = str(random.choice(alive.tolist()))
        if not (index.isascii() and index.isdecimal() and len(index) < 10):
            raise Problem(400, "no_index", "Expected a number or random.", loc=("path", "index"))
        record = record_of(store, int(index))
    content = {
        "feature_index": record.unit,
        "dictionary_name": d,
        "feature_activation_histogram": [_bars(record)],
        "act_times": record.statistics.count,
        "max_feature_act": record.statistics.max,
        "sample_groups": [
            {"analysis_name": group, "samples": [_sample(e) for e in record.examples(group)]}
            for group in dict.fromkeys(example.group for example in record.all_examples)
        ],
        "logits": None,
        "interpretation": _interpretation(record),
    }
    return bytes_reply(request, packed(content), "application/x-msgpack", etag=False)


def _bars(record: LatentRecord) -> dict[str, Any]:
    """Bars for plotly."""
    filled = np.flatnonzero(record.histogram)
    edges = np.concatenate([[0.0], HISTOGRAM_EDGES, [2 * HISTOGRAM_EDGES[-1]]])
    chosen = slice(int(filled[0]), int(filled[-1]) + 1) if len(filled) else slice(0)
    middles = ((edges[1:] + edges[:-1]) / 2)[chosen]
    return {"type": "bar", "x": middles.tolist(), "y": record.histogram[chosen].tolist()}


def _sample(example: Example) -> dict[str, Any]:
    return {"context": example.pieces, "feature_acts": example.highlighted.tolist()}


def _interpretation(record: LatentRecord) -> dict[str, Any] | None:
    return {"text": record.label, "validation": []} if record.label else None
