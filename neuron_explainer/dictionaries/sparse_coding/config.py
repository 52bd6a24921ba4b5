"""Everything that decides a dictionary of sparse coding, next to the activations."""

from dataclasses import dataclass
from typing import Literal

from neuron_explainer.errors import InputError
from neuron_explainer.models.autoencoders.fista import MAX_ITERATIONS, TOLERANCE, check_settings
from neuron_explainer.settings.fields import check_types


@dataclass(frozen=True)
class SparseCodingConfig:
    """Settings; the defaults are those of Yun et al. 2021 and its program."""

    n_latents: int
    """Atoms of each dictionary. Published: 2000 for 768 inputs."""
    penalty: float
    """Of the L1 norm, on the scale of the activations; the published value, 0.3, is for BERT-base."""
    epochs: int = 1
    """Passes over the batches. A run that has ended goes on if this alone is raised."""
    batch_size: int = 100
    """Most rows that are coded, and learned from, at once. A batch of activations is shuffled and cut
    into equal parts of at most so many."""
    step_size: float = 0.005
    """Share of a Newton step that each part takes."""
    hessian_floor: float = 1e-3
    """Added to the mean square of a latent before dividing by it."""
    history: int = 300
    """Parts that the moving averages look back on."""
    solver: Literal["fista", "ista"] = "fista"
    """How codes are found while learning; the same codes, but ISTA takes far more iterations."""
    max_iterations: int = MAX_ITERATIONS
    """At which a solve ends at the latest."""
    tolerance: float = TOLERANCE
    """At which it ends (:mod:`neuron_explainer.models.autoencoders.fista`); 0: always ``max_iterations``."""
    across_layers: bool = True
    """One dictionary for all layers of a hook path, or one for each layer."""
    seed: int = 0
    """Of the first dictionary and of the order of rows."""
    log_every: int = 10
    """Batches between lines of the log."""
    checkpoint_every: int = 100
    """Batches between checkpoints; there is one at the end in any case."""
    keep_checkpoints: int = 2
    """Checkpoints that stay; older ones are deleted."""

    def __post_init__(self) -> None:
        check_types(self)
        check_settings(self.penalty, self.max_iterations, self.tolerance)
        for name in _COUNTS:
            self._check(name, getattr(self, name) >= 1, "at least 1")
        for name in ("step_size", "hessian_floor"):
            self._check(name, getattr(self, name) > 0, "above 0")
        self._check("seed", 0 <= self.seed < 2**31, "in 0 to 2**31 - 1")

    def _check(self, name: str, right: bool, expected: str) -> None:
        if not right:
            raise InputError(
                f"SparseCodingConfig: {name} must be {expected}, found {getattr(self, name)}."
            )


_COUNTS = (
    "n_latents",
    "epochs",
    "batch_size",
    "history",
    "log_every",
    "checkpoint_every",
    "keep_checkpoints",
)
