"""What a variant of dictionary learning is: a loss, a nonlinearity, and perhaps something after each step.

Training knows no variant. A new one is a frozen dataclass of its settings and a subclass of
:class:`Objective` that is registered for it:

    @dataclass(frozen=True)
    class MyConfig(ObjectiveConfig):
        strength: float = 1.0

    @register("mine", MyConfig)
    class Mine(Objective[MyConfig]):
        def loss(self, dictionary, x, target, facts): ...
        def activation(self, dictionary): ...

Shape legend: ``b`` tokens of a batch, ``n`` inputs, ``o`` outputs, ``l`` latents, ``k`` active ones.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar, Generic, NamedTuple, TypeVar

import torch.nn.functional as F
from torch import Tensor, nn

from neuron_explainer.dictionaries.dictionary import DecoderNorm, LearnedDictionary
from neuron_explainer.errors import InputError
from neuron_explainer.kernels.workspace import Workspace
from neuron_explainer.settings.fields import Variant


@dataclass(frozen=True)
class ObjectiveConfig(Variant, noun="objective"):
    """Settings of one objective; each objective has its own subclass, known by the objective's name."""

    def check_run(self, steps: int, decoder_norm: DecoderNorm, tied: bool) -> None:
        """Raise InputError if these settings cannot work in a run of ``steps`` steps."""


class StepFacts(NamedTuple):
    """What an objective is told about a step."""

    step: int
    """The number of the step, from 0."""
    steps: int
    """The number of steps in the whole run."""
    sparsity: float
    """Factor on sparsity penalties: it rises to 1 in ``sparsity_warmup_steps``."""
    dead: Tensor
    """``[d]`` int64: dead latents."""
    n_tokens: int = 0
    """Tokens of the whole batch, of which this process may see a part."""
    workspace: Workspace | None = None
    """Memory for large gradients, used again at the next step; kernels take it."""


class SparseLatents(NamedTuple):
    """The active latents of a batch, without a ``[b, l]`` tensor."""

    values: Tensor
    """``[b, k]``; or ``[m]``, token after token. 0 in entries that are not active."""
    indices: Tensor
    """Which latent each value belongs to: int64, of the same shape."""
    starts: Tensor | None = None
    """``[b]`` int64, where values are ``[m]``: the index of each token's first one."""

    def decode(self, rows: Tensor) -> Tensor:
        """``[b, o]``: the sum of the active latents' rows ``[l, o]``, each times its value."""
        return F.embedding_bag(
            self.indices, rows, self.starts, mode="sum", per_sample_weights=self.values
        )


class Loss(NamedTuple):
    """What an objective computes from a batch."""

    total: Tensor
    """``[]``, minimised."""
    terms: dict[str, Tensor]
    """``[]`` each, detached: the parts of ``total``, for the log. Ghost gradients are scaled to the term
    ``"reconstruction"``, so ``remedy = ghost`` needs it."""
    error: Tensor
    """``[b, o]``, detached: normalised target minus reconstruction."""
    latents: Tensor | SparseLatents
    """``[b, l]``, detached; or only the active ones."""


C = TypeVar("C", bound=ObjectiveConfig)


class Objective(nn.Module, ABC, Generic[C]):
    """A loss, with the parameters and running averages that only training needs.

    Several processes may share a run: ``x`` is then this process's part of a batch, or ``dictionary`` its
    part of the latents. A loss that is a mean over the tokens of a batch needs nothing more: such losses
    are averaged. Any other mean over a batch (to divide by, for example) goes through
    ``dictionary.mean``, and any sum over latents through ``dictionary.total``.

    Everything that changes from step to step must be a parameter or a buffer, because these are what a
    checkpoint holds.
    """

    per_latent: ClassVar[tuple[str, ...]] = ()
    """Names of parameters with one row for each latent. Resampling a latent resets Adam's moments of its
    row."""
    trains_latent_bias: ClassVar[bool] = True
    """Whether the dictionary's own latent bias is trained."""
    first_encoder_norm: ClassVar[float] = 1.0
    """Initial length of encoder rows. Where nothing limits how many latents are active, half of them are
    active at first; with rows of length 1, the first reconstruction would then be a multiple of the
    input."""
    splits_latents: ClassVar[bool] = False
    """Whether the loss can be computed where each process holds some of the latents."""

    def __init__(self, config: C, dictionary: LearnedDictionary) -> None:
        super().__init__()
        self.config = config

    @abstractmethod
    def loss(
        self, dictionary: LearnedDictionary, x: Tensor, target: Tensor, facts: StepFacts
    ) -> Loss:
        """The loss of normalised inputs ``[b, n]`` and targets ``[b, o]`` (the same tensor, unless it is a
        transcoder). The losses of tokens are summed over the width and averaged over the batch."""

    @abstractmethod
    def activation(self, dictionary: LearnedDictionary) -> nn.Module:
        """The nonlinearity of the finished ``Autoencoder``. Its latents are ``dictionary.target_scale`` times
        as large as in training, so thresholds must be, too."""

    def after_step(self, dictionary: LearnedDictionary, loss: Loss, facts: StepFacts) -> None:
        """Called after each step of the optimiser, without gradients."""

    def revive(self, latents: Tensor) -> None:
        """Called when ``latents`` ``[d]`` got new directions: forget what was learned about the old ones."""

    def group_sizes(self) -> tuple[int, ...] | None:
        """The sizes of the groups of a Matryoshka dictionary; None for any other."""
        return None


_OBJECTIVES: dict[str, type[Objective[Any]]] = {}


def register(
    name: str, config_class: type[ObjectiveConfig]
) -> Callable[[type[Objective[Any]]], type[Objective[Any]]]:
    """Class decorator: register an objective under a name and for the class of its settings."""

    def decorate(objective: type[Objective[Any]]) -> type[Objective[Any]]:
        known = _OBJECTIVES.get(name)
        if known is not None and known.__qualname__ != objective.__qualname__:
            raise InputError(f"an objective {name!r} is registered already: {known.__name__}.")
        _OBJECTIVES[name] = objective
        ObjectiveConfig.add(name, config_class)
        return objective

    return decorate


def make_objective(config: ObjectiveConfig, dictionary: LearnedDictionary) -> Objective[Any]:
    """The objective that ``config`` belongs to, for one dictionary."""
    return _OBJECTIVES[config.name](config, dictionary)


def check_free_rows(name: str, decoder_norm: DecoderNorm, tied: bool) -> None:
    """Raise InputError if directions could grow and latents shrink to escape a penalty on latents."""
    if decoder_norm == "free" and not tied:
        raise InputError(
            f"{name} with decoder_norm = free: directions would grow so that latents, and the "
            "penalty on them, become arbitrarily small. Take unit or at_most_unit, or relu with "
            "weighted = true."
        )


def squared_error(error: Tensor) -> Tensor:
    """``[b, o] -> []``: summed over the width, averaged over the batch."""
    return error.square().sum() / len(error)
