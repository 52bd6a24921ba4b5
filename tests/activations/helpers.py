"""A model small enough to run thousands of times, and texts for it."""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from neuron_explainer.activations import (
    ActivationBatch,
    ActivationStore,
    Harvester,
    StoreWriter,
    TokenBatch,
    TokenCorpus,
)
from neuron_explainer.models.locations import LocationLike
from neuron_explainer.models.model_context import ModelContext, StandardModelContext
from tests.conftest import TINY, make_model

SITE = "1/mlp.post_act"


def save_context(folder: Path, **sizes: Any) -> ModelContext:
    make_model(**sizes).save(folder)
    return StandardModelContext(folder, "cpu")


def random_corpus(lengths: list[int], seed: int = 0) -> TokenCorpus:
    """Documents of these lengths over the tokens 1 to 28; 0 is left for the start token."""
    rng = np.random.default_rng(seed)
    return TokenCorpus.of([rng.integers(1, TINY.n_vocab, n).tolist() for n in lengths], "random")


def harvest_all(
    context: ModelContext,
    windows: Iterable[TokenBatch],
    locations: LocationLike = SITE,
    **options: Any,
) -> ActivationBatch:
    harvester = Harvester(context, locations, **options)
    return ActivationBatch.cat([harvester(batch) for batch in windows])


def as_rows(x: Tensor) -> list[bytes]:
    """Each row as its exact bytes, so that multisets of rows can be compared."""
    return [row.tobytes() for row in x.numpy()]


class ListSource:
    """Activations of a list of batches."""

    forward_s = 0.0

    def __init__(self, batches: list[ActivationBatch]) -> None:
        self.batches = batches

    def chunk(self, number: int) -> ActivationBatch | None:
        return self.batches[number] if number < len(self.batches) else None

    def describe(self) -> dict[str, Any]:
        return {}


def write_store(
    folder: Path, batches: Iterable[ActivationBatch], model: str, **options: Any
) -> ActivationStore:
    with StoreWriter(folder, model, **options) as writer:
        for batch in batches:
            writer.add(batch)
    return ActivationStore(folder)
