"""Dictionary-learning interpretability on GPT-2-family models.

Nothing heavy is imported here: torch is loaded by ``neuron_explainer.models``.
"""

__version__ = "0.1.0"

__all__ = ["__version__"]
