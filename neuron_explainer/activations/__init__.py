"""Text to streams of vectors: documents, token windows, activations, stores on disk, shuffling."""

from neuron_explainer.activations.tokens import TokenBatch

__all__ = ["TokenBatch"]
