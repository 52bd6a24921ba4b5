"""A folder of transformer factors' examples of made-up numbers, on sentences of ``tiny-tales``."""

from pathlib import Path

import numpy as np

from neuron_explainer.analysis.factors import FactorExamples, Saliency, SaliencyConfig, SaliencyFile
from neuron_explainer.analysis.factors.examples import SentenceTable
from neuron_explainer.analysis.factors.strongest import Entries
from neuron_explainer.models.locations import ActivationLocation
from neuron_explainer.models.model_context import ModelContext

TEXTS = [
    "The queen went into the forest, and when she came home the king was sad.",
    "Once upon a time there was a poor woman who had a <b>beautiful</b> daughter.",
    "The old man said to the prince: go into the garden and look for the golden bird.",
]
N_FACTORS, N_LAYERS = 5, 4


def write_factors(folder: Path) -> Path:
    """Factor 0 peaks in the first layer, 1 in the middle, 2 in the last, 3 in all; 4 is active nowhere."""
    context = ModelContext.from_model_type("tiny-tales")
    sentences = [context.encode(text) for text in TEXTS]
    starts = np.cumsum([0, *map(len, sentences)])
    entries = {}
    for layer in range(N_LAYERS):
        rows = []
        for factor in range(N_FACTORS - 1):
            peak = (0, 2, 3, layer)[factor]
            for number, start in enumerate(starts[:-1].tolist()):
                score = 4.0 - abs(layer - peak) - 0.5 * number
                rows.append((factor, score, start + 1 + factor + number))
        columns = list(zip(*rows, strict=True))
        kinds = (np.int32, np.float32, np.int64)
        made = [np.array(x, kind) for x, kind in zip(columns, kinds, strict=True)]
        entries[ActivationLocation("resid.torso.post_mlp", layer)] = Entries(*made)
    table = SentenceTable(
        np.arange(len(sentences)),
        starts[:-1],
        starts,
        np.concatenate([np.array(ids, np.int32) for ids in sentences]),
    )
    settings = {
        "model": "tiny-tales",
        "n_layers": N_LAYERS,
        "bos": None,
        "corpus": {"name": "three"},
    }
    examples = FactorExamples(
        entries, table, N_FACTORS, 3, int(starts[-1]), dict.fromkeys(entries, 1.0), settings
    )
    examples.save(folder)
    place = examples.locations[0]
    strongest = examples.examples(0, place)[0]
    weights = (*(0.5 * (-1) ** i for i in range(strongest.index)), 3.0)
    file = SaliencyFile(folder)
    file.begin(SaliencyConfig(), 5)
    at, score = strongest.position, strongest.score
    file.add([Saliency(0, str(place), at, strongest.index, score, weights, 0.25, 0.875)])
    return folder
