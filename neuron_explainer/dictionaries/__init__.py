"""Learning dictionaries: one loop, many objectives, an ordinary ``Autoencoder`` in the end."""

from neuron_explainer.dictionaries.config import TrainConfig
from neuron_explainer.dictionaries.config_files import read_config
from neuron_explainer.dictionaries.objectives import (
    BatchTopKConfig,
    GatedConfig,
    JumpReLUConfig,
    Loss,
    MatryoshkaConfig,
    Moment,
    Objective,
    ObjectiveConfig,
    PAnnealConfig,
    ReLUConfig,
    SparseLatents,
    TopKConfig,
    register,
)
from neuron_explainer.dictionaries.train import StepReport, train, train_many

__all__ = [
    "BatchTopKConfig",
    "GatedConfig",
    "JumpReLUConfig",
    "Loss",
    "MatryoshkaConfig",
    "Moment",
    "Objective",
    "ObjectiveConfig",
    "PAnnealConfig",
    "ReLUConfig",
    "SparseLatents",
    "StepReport",
    "TopKConfig",
    "TrainConfig",
    "read_config",
    "register",
    "train",
    "train_many",
]
