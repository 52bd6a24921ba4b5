"""The settings of a training run: one flat, frozen dataclass that is checked when it is made.

Each objective has a dataclass of its own, so that no run has fields without a meaning. The room
``settings/`` reads both from TOML and JSON, and makes command-line flags from them.
"""

import math
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

import torch

from neuron_explainer.dictionaries.dictionary import DecoderNorm
from neuron_explainer.dictionaries.first_batches import DecoderBias
from neuron_explainer.dictionaries.objectives import ObjectiveConfig, TopKConfig
from neuron_explainer.dictionaries.schedules import Decay
from neuron_explainer.errors import InputError
from neuron_explainer.models.locations import ActivationLocation
from neuron_explainer.settings.fields import check_types, to_dict

Normalization = Literal["none", "constant", "center", "layer_norm", "rms"]
Remedy = Literal["none", "resample", "ghost"]

_DEFAULT_EXPANSION = 8.0
_AT_LEAST_1 = (
    "batch_size",
    "sample_batches",
    "dead_after_tokens",
    "resample_every",
    "checkpoint_every",
    "keep_checkpoints",
    "log_every",
)
_AT_LEAST_0 = ("warmup_steps", "decay_steps", "sparsity_warmup_steps")


@dataclass(frozen=True)
class TrainConfig:
    """Everything besides the batches that decides what a dictionary becomes."""

    alternatives: ClassVar = (("steps", "num_tokens"), ("n_latents", "expansion"))
    """Groups of fields of which at most one may be given."""

    objective: ObjectiveConfig = field(default_factory=TopKConfig)
    """Which variant is trained, with its own settings."""

    n_latents: int | None = None
    """Number of latents. If not given: expansion times the width of the input."""
    expansion: float | None = None
    """Number of latents divided by the width of the input, instead of n_latents; 8 if neither is given."""
    tied: bool = False
    """Whether the decoder is the transpose of the encoder."""
    transcoder: bool = False
    """Whether to predict another activation than the input: batches are then pairs (input, target)."""
    skip: bool = False
    """Whether a transcoder also has a linear map from its input straight to its output."""

    steps: int | None = None
    """Number of batches to train on; give this or num_tokens."""
    num_tokens: int | None = None
    """Number of activations to train on, in batches of batch_size; an incomplete last batch is left out."""
    batch_size: int = 4096
    """Activations in a batch, if training makes the batches. Batches that are passed in are used as they
    are, and batch_size then only turns num_tokens into steps."""

    lr: float | None = None
    """Adam's learning rate after the warm-up. If not given: 2e-4 / sqrt(n_latents / 2**14), the scaling
    that Gao et al. 2024 found."""
    beta1: float = 0.9
    """Adam's decay rate for the mean of gradients."""
    beta2: float = 0.999
    """Adam's decay rate for the mean of squared gradients."""
    eps: float = 1e-8
    """Adam's eps."""
    warmup_steps: int | None = None
    """Steps in which the learning rate rises linearly. If not given: 5 % of all steps, at most 1000."""
    decay: Decay = "linear"
    """How the learning rate falls at the end: none, linear or cosine."""
    decay_steps: int | None = None
    """The last steps, in which the learning rate falls. If not given: a fifth of all steps; 0 means all."""
    lr_end: float = 0.0
    """The share of lr that it falls to."""
    grad_clip: float | None = None
    """Largest allowed norm of a dictionary's gradient; a longer gradient is scaled down to it."""
    sparsity_warmup_steps: int = 0
    """Steps in which the sparsity penalty rises linearly from zero."""

    input_normalization: Normalization = "constant"
    """What happens to activations before training. constant subtracts the mean and divides by one scale,
    so that the variance is 1; both are measured on the first batches and folded into the final weights.
    center, layer_norm and rms normalise each vector by itself and are recorded in the autoencoder. none
    leaves activations as they are."""
    sample_batches: int = 1
    """How many of the first batches mean, scale and initial bias are measured on; they are trained on too."""
    decoder_bias: DecoderBias = "geometric_median"
    """Initial bias of the decoder: geometric_median or mean of the first batches, or zeros."""
    decoder_norm: DecoderNorm = "unit"
    """Length of latents' directions: unit keeps each at 1, at_most_unit lets it shrink, free does not
    limit it."""

    dead_after_tokens: int | None = None
    """A latent counts as dead if it was not active in this many activations in a row. If not given: a
    tenth of the run's activations, at most 10 million."""
    remedy: Remedy = "none"
    """How dead latents are revived, besides AuxK: resample gives them the directions of badly
    reconstructed activations every resample_every steps; ghost adds a loss that only trains them."""
    resample_every: int | None = None
    """Steps between two resamplings. If not given: a quarter of all steps, at most 25,000. The learning rate
    warms up again after each."""

    seed: int = 0
    """Random seed of the initial directions, of resampling, and of the order of rows if training makes the
    batches."""
    dtype: Literal["float32", "float64"] = "float32"
    """The dtype of the weights during training."""
    autocast: bool = False
    """Whether dense matrix products run in bfloat16. topk and relu have sparse products and choose the
    precision themselves."""
    device: str | None = None
    """Device to train on. If not given: the device of the batches."""

    checkpoint_every: int | None = None
    """Steps between two checkpoints, if there is a folder. If not given: a tenth of all, at most 1000."""
    keep_checkpoints: int = 2
    """How many checkpoints are kept; older ones are deleted."""
    log_every: int | None = None
    """Steps between two lines of the log. If not given: a fiftieth of all, at most 100."""

    location: str | None = None
    """Location in the model that the inputs come from, such as 3/mlp.post_act; only recorded."""
    output_location: str | None = None
    """Location that a transcoder's output predicts; only recorded."""
    model_name: str | None = None
    """The model that the activations come from; only recorded."""

    def __post_init__(self) -> None:
        check_types(self)
        _ = self.objective.name  # raises if it is not registered
        for location in (self.location, self.output_location):
            if location is not None:
                ActivationLocation.parse(location)  # raises if there is no such location
        self._check_numbers()
        self._check_size()
        self._check_schedule()
        self._check_transcoder()
        self._check_remedy()

    def _check_numbers(self) -> None:
        for name in _AT_LEAST_1 + _AT_LEAST_0:
            value, least = getattr(self, name), int(name in _AT_LEAST_1)
            _check(name, value is None or value >= least, f"at least {least}", value)
        _check("seed", 0 <= self.seed < 2**64, "in 0 to 2**64 - 1", self.seed)
        if self.lr is not None:
            _check("lr", self.lr > 0 and math.isfinite(self.lr), "above 0", self.lr)
        _check("eps", self.eps > 0, "above 0", self.eps)
        _check("beta1", 0 <= self.beta1 < 1, "in 0 to 1, 1 excluded", self.beta1)
        _check("beta2", 0 <= self.beta2 < 1, "in 0 to 1, 1 excluded", self.beta2)
        _check("lr_end", 0 <= self.lr_end <= 1, "a share of lr, in 0 to 1", self.lr_end)
        if self.grad_clip is not None:
            _check("grad_clip", self.grad_clip > 0, "above 0, or not given", self.grad_clip)

    def _check_size(self) -> None:
        if self.n_latents is not None and self.expansion is not None:
            raise InputError("give n_latents or expansion, not both.")
        for name in ("n_latents", "expansion", "steps"):
            value = getattr(self, name)
            if value is not None:
                _check(name, value > 0, "above 0", value)
        if (self.steps is None) == (self.num_tokens is None):
            raise InputError("give one of steps and num_tokens: how long to train.")
        if self.num_tokens is not None and self.num_tokens < self.batch_size:
            raise InputError(
                f"num_tokens = {self.num_tokens} is less than one batch of {self.batch_size}: there "
                "would be nothing to train on. Give more tokens, or a smaller batch_size."
            )

    def _check_schedule(self) -> None:
        if self.decay == "none" and self.decay_steps:
            raise InputError("decay_steps needs decay = linear or cosine.")
        steps = self.total_steps
        for name in ("warmup_steps", "decay_steps", "sparsity_warmup_steps"):
            if (getattr(self, name) or 0) > steps:
                raise InputError(
                    f"{name} = {getattr(self, name)} is more than the {steps} steps of the run: it "
                    "would never be what it should."
                )
        if (self.warmup_steps or 0) + (self.decay_steps or 0) > steps:
            raise InputError(
                f"warmup_steps = {self.warmup_steps} and decay_steps = {self.decay_steps} are together "
                f"more than the {steps} steps of the run: the learning rate would never be what it "
                "should."
            )
        self.objective.check_run(steps, self.decoder_norm, self.tied)

    def _check_transcoder(self) -> None:
        if self.transcoder:
            if self.tied:
                raise InputError("a transcoder's decoder cannot be tied to its encoder.")
            if self.skip and self.input_normalization not in ("none", "constant"):
                raise InputError(
                    f"skip with input_normalization = {self.input_normalization}: the skip "
                    "connection takes activations without normalisation; use constant or none."
                )
            return
        if self.skip or self.output_location is not None:
            raise InputError("skip and output_location are for transcoders: set transcoder = true.")

    def _check_remedy(self) -> None:
        if self.remedy != "resample":
            return
        if self.resample_interval >= self.total_steps:
            raise InputError(
                f"resample_every = {self.resample_interval} is not less than the {self.total_steps} steps of "
                "the run: nothing would ever be resampled."
            )
        if self.decay != "none" and self.total_steps - self.n_decay_steps < self.resample_interval:
            raise InputError(
                "the learning rate decays before the first resampling; make decay_steps or "
                "resample_every smaller."
            )

    def check_remedy(self, n_tokens: int) -> None:
        """Raise InputError if, with batches of ``n_tokens``, no latent can be dead in time for the remedy."""
        if self.remedy == "none":
            return
        steps = self.total_steps - 1
        if self.remedy == "resample":
            steps -= steps % self.resample_interval
        if self.dead_after(n_tokens) > steps * n_tokens:
            raise InputError(
                f"remedy = {self.remedy} can never start: dead_after_tokens = "
                f"{self.dead_after(n_tokens)} is more than the {steps * n_tokens} tokens before its "
                "last chance. Make it smaller."
            )

    @property
    def total_steps(self) -> int:
        """Number of batches to train on."""
        if self.steps is not None:
            return self.steps
        assert self.num_tokens is not None
        return self.num_tokens // self.batch_size

    @property
    def n_warmup_steps(self) -> int:
        """Steps in which the learning rate rises."""
        if self.warmup_steps is not None:
            return self.warmup_steps
        room = self.total_steps - (self.decay_steps or 0)
        return min(1000, self.total_steps // 20, room)

    @property
    def n_decay_steps(self) -> int:
        """Steps in which the learning rate falls, unless decay is none."""
        if self.decay_steps is not None:
            return self.decay_steps or self.total_steps
        return max(1, min(self.total_steps // 5, self.total_steps - self.n_warmup_steps))

    @property
    def resample_interval(self) -> int:
        """Steps between two resamplings."""
        return self.resample_every or max(1, min(25_000, self.total_steps // 4))

    @property
    def checkpoint_interval(self) -> int:
        """Steps between two checkpoints."""
        return self.checkpoint_every or max(1, min(1000, self.total_steps // 10))

    @property
    def log_interval(self) -> int:
        """Steps between two lines of the log."""
        return self.log_every or max(1, min(100, self.total_steps // 50))

    def dead_after(self, n_tokens: int) -> int:
        """Tokens without activity after which a latent is dead, for batches of ``n_tokens``."""
        return self.dead_after_tokens or max(1, min(10_000_000, self.total_steps * n_tokens // 10))

    def lr_for(self, n_latents: int) -> float:
        """The learning rate for a dictionary of ``n_latents``."""
        return 2e-4 / math.sqrt(n_latents / 2**14) if self.lr is None else self.lr

    def resolved(self, n_inputs: int) -> dict[str, Any]:
        """All settings for activations of width ``n_inputs``, with the default values filled in."""
        n_latents = self.latents_for(n_inputs)
        worked_out = {
            "n_latents": n_latents,
            "expansion": n_latents / n_inputs,
            "steps": self.total_steps,
            "num_tokens": self.total_steps * self.batch_size,
            "lr": self.lr_for(n_latents),
            "warmup_steps": self.n_warmup_steps,
            "decay_steps": 0 if self.decay == "none" else self.n_decay_steps,
            "dead_after_tokens": self.dead_after(self.batch_size),
            "resample_every": self.resample_interval if self.remedy == "resample" else None,
            "checkpoint_every": self.checkpoint_interval,
            "log_every": self.log_interval,
        }
        return {**to_dict(self), **worked_out}

    @property
    def torch_dtype(self) -> torch.dtype:
        """The dtype of the weights."""
        return torch.float64 if self.dtype == "float64" else torch.float32

    def latents_for(self, n_inputs: int) -> int:
        """The number of latents for activations of width ``n_inputs``."""
        if self.n_latents is not None:
            return self.n_latents
        return max(1, round((self.expansion or _DEFAULT_EXPANSION) * n_inputs))


def _check(name: str, right: bool, expected: str, found: object) -> None:
    if not right:
        raise InputError(f"{name} must be {expected}, found {found!r}.")
