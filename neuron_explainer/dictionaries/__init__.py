"""Learning dictionaries: one loop, many objectives, an ordinary ``Autoencoder`` as the result.

Also what follows training: pruning it and fine-tuning its decoder.
"""

from neuron_explainer.dictionaries.config import TrainConfig
from neuron_explainer.dictionaries.finetune import finetune_decoder
from neuron_explainer.dictionaries.objectives import (
    BatchTopKConfig,
    GatedConfig,
    JumpReLUConfig,
    Loss,
    MatryoshkaConfig,
    Objective,
    ObjectiveConfig,
    PAnnealConfig,
    ReLUConfig,
    SparseLatents,
    StepFacts,
    TopKConfig,
    register,
)
from neuron_explainer.dictionaries.prune import prune
from neuron_explainer.dictionaries.train import StepReport, train, train_many
from neuron_explainer.evaluation.evaluate import evaluate, evaluate_all, measure
from neuron_explainer.evaluation.figures import Evaluation, evaluation_table
from neuron_explainer.settings import read_config

__all__ = [
    "BatchTopKConfig",
    "Evaluation",
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
    "StepReport",
    "TopKConfig",
    "TrainConfig",
    "evaluate",
    "evaluate_all",
    "evaluation_table",
    "finetune_decoder",
    "measure",
    "prune",
    "read_config",
    "register",
    "train",
    "train_many",
]
