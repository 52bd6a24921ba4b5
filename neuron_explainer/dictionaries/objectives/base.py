"""What a variant of dictionary learning is: a loss, an activation, perhaps something after a step.

The loop in ``train.py`` knows no variant. A new one is a frozen dataclass of its settings and a
subclass of :class:`Objective` that is registered for it:

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

from torch import Tensor, nn

from neuron_explainer.dictionaries.dictionary import DecoderNorm, LearnedDictionary
from neuron_explainer.errors import InputError
from neuron_explainer.kernels.workspace import Workspace
from neuron_explainer.settings.fields import Variant


@dataclass(frozen=True)
class ObjectiveConfig(Variant, noun="objective"):
    """Settings of one objective; each objective has its own subclass, known by the objective's name."""

    def check_run(self, steps: int, decoder_norm: DecoderNorm, tied: bool) -> None:
        """An error if a run with these settings of its own cannot be what it is meant to be."""


class StepFacts(NamedTuple):
    """Where in the run a loss is computed."""

    step: int
    """From 0."""
    steps: int
    """Of the whole run."""
    sparsity: float
    """Factor on sparsity penalties, 1 after their warm-up."""
    dead: Tensor
    """``[d]`` int64: latents that have been silent for too long."""
    n_tokens: int = 0
    """Tokens of the whole batch, of which this process may see a part."""
    workspace: Workspace | None = None
    """Memory for large gradients, used again at the next step; kernels take it."""


class SparseLatents(NamedTuple):
    """Which latents were active, without a ``[b, l]`` tensor."""

    values: Tensor
    """``[b, k]`` or ``[m]``; 0 where none is active."""
    indices: Tensor
    """Of the same shape, int64."""


class Loss(NamedTuple):
    """What an objective makes of a batch."""

    total: Tensor
    """``[]``, minimised."""
    terms: dict[str, Tensor]
    """``[]`` each, detached: the parts of ``total``, for the log. ``"reconstruction"`` must be among
    them where ghost gradients, which are scaled to it, are wanted."""
    error: Tensor
    """``[b, o]``, detached: target minus reconstruction, normalised."""
    latents: Tensor | SparseLatents
    """``[b, l]``, detached, or the active ones only."""


C = TypeVar("C", bound=ObjectiveConfig)


class Objective(nn.Module, ABC, Generic[C]):
    """A loss, with the parameters and running numbers that only training needs.

    Several processes may share a run: ``x`` is then this process's part of a batch, or ``dictionary`` its
    part of the latents. A loss that is a mean over the tokens of a batch needs nothing more: such losses
    are averaged. Any other mean over a batch (to divide by, for example) goes through
    ``dictionary.mean``, and any sum over latents through ``dictionary.total``.

    All that changes from step to step is kept in parameters and buffers: they are what a checkpoint
    holds.
    """

    per_latent: ClassVar[tuple[str, ...]] = ()
    """Names of parameters with one row for each latent: Adam's moments are reset with their latent."""
    trains_latent_bias: ClassVar[bool] = True
    first_encoder_norm: ClassVar[float] = 1.0
    """Length of encoder rows at the start. Where nothing limits how many latents are active, half of
    them are at first, and with rows as long as the decoder's the first reconstruction would be a
    multiple of the input."""
    splits_latents: ClassVar[bool] = False
    """Whether it can be computed where each process holds some of the latents."""

    def __init__(self, config: C, dictionary: LearnedDictionary) -> None:
        super().__init__()
        self.config = config

    @abstractmethod
    def loss(
        self, dictionary: LearnedDictionary, x: Tensor, target: Tensor, facts: StepFacts
    ) -> Loss:
        """Of normalised inputs ``[b, n]`` and targets ``[b, o]`` (the same tensor but for
        transcoders). Losses of tokens are summed over the width and averaged over the batch."""

    @abstractmethod
    def activation(self, dictionary: LearnedDictionary) -> nn.Module:
        """For the finished ``Autoencoder``, whose latents are ``dictionary.target_scale`` times
        those in training; so must thresholds be."""

    def after_step(self, dictionary: LearnedDictionary, loss: Loss, facts: StepFacts) -> None:
        """Called after each step of the optimiser, without gradients."""

    def revive(self, latents: Tensor) -> None:
        """Called when ``latents`` ``[d]`` got new directions: forget what was learned of the old."""

    def group_sizes(self) -> tuple[int, ...] | None:
        """Of a Matryoshka dictionary."""
        return None


_OBJECTIVES: dict[str, type[Objective[Any]]] = {}


def register(
    name: str, config_class: type[ObjectiveConfig]
) -> Callable[[type[Objective[Any]]], type[Objective[Any]]]:
    """Class decorator: makes an objective known by a name and by the class of its settings."""

    def decorate(objective: type[Objective[Any]]) -> type[Objective[Any]]:
        known = _OBJECTIVES.get(name)
        if known is not None and known.__qualname__ != objective.__qualname__:
            raise InputError(f"an objective {name!r} is registered already: {known.__name__}.")
        _OBJECTIVES[name] = objective
        ObjectiveConfig.add(name, config_class)
        return objective

    return decorate


def make_objective(config: ObjectiveConfig, dictionary: LearnedDictionary) -> Objective[Any]:
    """The objective that ``config`` sets, for one dictionary."""
    return _OBJECTIVES[config.name](config, dictionary)


def check_free_rows(name: str, decoder_norm: DecoderNorm, tied: bool) -> None:
    """An error where decoder rows could grow, and latents shrink, to escape a penalty on latents."""
    if decoder_norm == "free" and not tied:
        raise InputError(
            f"{name} with decoder_norm = free: decoder rows would grow so that latents, and the "
            "penalty on them, become as small as you like. Take unit or at_most_unit, or relu with "
            "weighted = true."
        )


def squared_error(error: Tensor) -> Tensor:
    """``[b, o] -> []``: summed over the width, averaged over the batch."""
    return error.square().sum() / len(error)
