"""The variants of dictionary learning: each is a small config and a loss.

Importing this module registers all of them. :mod:`.base` explains how to add one of your own.
"""

from neuron_explainer.dictionaries.objectives.base import (
    Loss,
    Objective,
    ObjectiveConfig,
    SparseLatents,
    StepFacts,
    make_objective,
    register,
)
from neuron_explainer.dictionaries.objectives.batch_topk import BatchTopKConfig, MatryoshkaConfig
from neuron_explainer.dictionaries.objectives.gated import GatedConfig
from neuron_explainer.dictionaries.objectives.jumprelu import JumpReLUConfig
from neuron_explainer.dictionaries.objectives.relu import PAnnealConfig, ReLUConfig
from neuron_explainer.dictionaries.objectives.topk import TopKConfig

__all__ = [
    "BatchTopKConfig",
    "GatedConfig",
    "JumpReLUConfig",
    "Loss",
    "MatryoshkaConfig",
    "Objective",
    "ObjectiveConfig",
    "PAnnealConfig",
    "ReLUConfig",
    "SparseLatents",
    "StepFacts",
    "TopKConfig",
    "make_objective",
    "register",
]
