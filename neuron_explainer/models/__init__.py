"""Transformers and autoencoders, and everything that is applied to them: tensors, weights, tokens."""

from neuron_explainer.models.autoencoder import Autoencoder
from neuron_explainer.models.config import TransformerConfig
from neuron_explainer.models.hooks import Hooks, TransformerHooks
from neuron_explainer.models.huggingface.context import HuggingFaceModelContext
from neuron_explainer.models.model_context import ModelContext
from neuron_explainer.models.transformer import Transformer

__all__ = [
    "Autoencoder",
    "Hooks",
    "HuggingFaceModelContext",
    "ModelContext",
    "Transformer",
    "TransformerConfig",
    "TransformerHooks",
]
