"""Transformer factors: where a dictionary's factors are strong, in which layers, and because of which words.

What Yun et al. 2021 do after learning a dictionary by sparse coding, for any autoencoder with latents >= 0.
"""

from neuron_explainer.analysis.factors.collect import FactorDictionary, collect_examples
from neuron_explainer.analysis.factors.examples import (
    FactorExample,
    FactorExamples,
    read_records,
    write_records,
)
from neuron_explainer.analysis.factors.importance import (
    Importance,
    importance,
    plot_importance,
)
from neuron_explainer.analysis.factors.pages import write_pages
from neuron_explainer.analysis.factors.saliency import (
    Saliency,
    SaliencyConfig,
    SaliencyFile,
    saliency_of,
)
from neuron_explainer.analysis.factors.sentences import Sentences

__all__ = [
    "FactorDictionary",
    "FactorExample",
    "FactorExamples",
    "Importance",
    "Saliency",
    "SaliencyConfig",
    "SaliencyFile",
    "Sentences",
    "collect_examples",
    "importance",
    "plot_importance",
    "read_records",
    "saliency_of",
    "write_pages",
    "write_records",
]
