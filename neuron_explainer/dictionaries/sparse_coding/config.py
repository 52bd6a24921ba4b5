"""Everything besides the activations that decides what a dictionary of sparse coding becomes."""

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
    """Weight of the L1 norm, on the scale of the activations. The published value, 0.3, is for BERT-base."""
    epochs: int = 1
    """Number of passes over the batches. A finished run continues if only this is raised."""
    batch_size: int = 100
    """Largest number of rows that are coded, and learned from, at once. A batch of activations is shuffled
    and cut into equal parts of at most this size."""
    step_size: float = 0.005
    """The fraction of a Newton step that is taken for each part."""
    hessian_floor: float = 1e-3
    """Added to the mean square of a latent before dividing by it."""
    history: int = 300
    """Number of parts that the moving averages look back on."""
    solver: Literal["fista", "ista"] = "fista"
    """How codes are found in training. Both find the same codes; ISTA needs far more iterations."""
    max_iterations: int = MAX_ITERATIONS
    """Largest number of iterations of a solve."""
    tolerance: float = TOLERANCE
    """A solve ends at this accuracy (:mod:`neuron_explainer.models.autoencoders.fista`); with 0 it always
    takes ``max_iterations``."""
    across_layers: bool = True
    """Whether all layers of a hook path share one dictionary, or each layer gets its own."""
    seed: int = 0
    """Random seed of the initial dictionary and of the order of rows."""
    log_every: int = 10
    """Number of batches between two lines of the log."""
    checkpoint_every: int = 100
    """Number of batches between two checkpoints; there is always one at the end."""
    keep_checkpoints: int = 2
    """How many checkpoints are kept; older ones are deleted."""

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
