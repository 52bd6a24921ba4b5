"""Dictionaries learned by sparse coding: non-negative FISTA codes, diagonal-Hessian steps."""

from neuron_explainer.dictionaries.sparse_coding.config import SparseCodingConfig
from neuron_explainer.dictionaries.sparse_coding.frequency import count_tokens, frequency_weights
from neuron_explainer.dictionaries.sparse_coding.train import train_sparse_coding

__all__ = ["SparseCodingConfig", "count_tokens", "frequency_weights", "train_sparse_coding"]
