"""What an autoencoder is worth: metrics, spliced passes, figures. Nothing is trained here."""

from neuron_explainer.evaluation.evaluate import evaluate, evaluate_all, measure
from neuron_explainer.evaluation.figures import Evaluation, evaluation_table
from neuron_explainer.evaluation.verify import Verification, verify, verify_autoencoder

__all__ = [
    "Evaluation",
    "Verification",
    "evaluate",
    "evaluate_all",
    "evaluation_table",
    "measure",
    "verify",
    "verify_autoencoder",
]
