"""Sparse autoencoders: a vector of activations as a sum of few of many learned directions.

    x̂, stats   = normalize(x)
    pre_act    = (x̂ - pre_bias) · W_encᵀ + latent_bias
    latents    = activation(pre_act)
    recons     = denormalize(latents · W_decᵀ + pre_bias, stats)

Parametrisation and state-dict keys are those of OpenAI's ``sparse_autoencoder``. What has to be known
to apply an autoencoder rightly (activation, tying, input normalisation, location) is recorded with
it; nothing of it is guessed, and nothing is kept between ``encode`` and ``decode``.

Others' dictionaries differ in a few places, each of which is there or is not:

    post_bias  a bias of the output that is not ``pre_bias``
    skip       W_skip · x is added to the output, x as the model has it
    glu        pre_act is multiplied by sigmoid((x̂ - pre_bias) · W_gluᵀ + b_glu)
    n_outputs  a transcoder: its output stands for another activation than its input, so that there
               is nothing to denormalize, and its bias is always a ``post_bias``

Shape legend: ``b`` batch, ``s`` sequence, ``n`` inputs, ``o`` outputs (``n`` but for transcoders),
``l`` latents, ``k`` latents kept of a row, ``…`` any leading axes.
"""

import json
import logging
import math
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Self, Unpack

import safetensors.torch
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from neuron_explainer import files
from neuron_explainer.errors import CheckpointError, InputError
from neuron_explainer.kernels.encode_top_k import encode_top_k
from neuron_explainer.kernels.products import product
from neuron_explainer.kernels.top_k import top_k
from neuron_explainer.models.autoencoders.latents import Latents
from neuron_explainer.models.autoencoders.nonlinearities import (
    ACTIVATIONS_CLASSES,
    BatchTopK,
    JumpReLU,
    Nonlinearity,
    TopK,
    activation_name,
    as_nonlinearity,
    make_activation,
)
from neuron_explainer.models.checkpoints.autoencoders import Stated, read_autoencoder
from neuron_explainer.models.checkpoints.autoencoders.native import FORMAT_VERSION, WEIGHTS_FILE
from neuron_explainer.models.checkpoints.autoencoders.state import (
    NORMALIZATIONS,
    OPTIONAL_PARAMETERS,
    PARAMETERS,
    STATISTICS,
    Entries,
    InputNormalization,
    check_sizes,
    parse_state_dict,
    read_group_sizes,
    unknown_normalization,
)
from neuron_explainer.models.locations import ActivationLocation, LocationLike

__all__ = [
    "ACTIVATIONS_CLASSES",
    "Autoencoder",
    "AutoencoderOutput",
    "BatchTopK",
    "InputNormalization",
    "InputStats",
    "JumpReLU",
    "TiedTranspose",
    "TopK",
    "UnstatedNormalizationWarning",
]

logger = logging.getLogger(__name__)

_LAYER_NORM_EPS = 1e-5
# Dense latents held at a time where they are not the result.
_CHUNK_BYTES = 2**24
# Decoding row by row beats a matrix product below this share of active latents.
_SPARSE_SHARE = 1 / 32


class UnstatedNormalizationWarning(UserWarning):
    """A TopK autoencoder was read from a file that does not say how its inputs were normalised."""


class AutoencoderOutput(NamedTuple):
    """All that a forward pass computes."""

    latents_pre_act: Tensor
    """``[…, l]`` before the activation function."""
    latents: Tensor
    """``[…, l]``"""
    recons: Tensor
    """``[…, o]`` on the scale of the input."""


class InputStats(NamedTuple):
    """What decoding needs to know of an input besides its latents."""

    mean: Tensor | None
    """``[…, 1]`` mean over the width; None where it was left alone."""
    std: Tensor | None
    """``[…, 1]`` what was divided by: the unbiased standard deviation over the width, or with
    ``"rms"`` the root mean square; None where it was left alone."""
    skip: Tensor | None = None
    """``[…, o]`` what goes past the latents; None without a skip connection."""


class TiedTranspose(nn.Module):
    """A decoder that is the transpose of the encoder ``linear`` and has no weights of its own."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.linear = linear

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight)

    @property
    def weight(self) -> Tensor:
        """``[n, l]``, a view of the encoder's weight."""
        return self.linear.weight.t()

    @property
    def bias(self) -> Tensor | None:
        """None for the encoders used here: a tied decoder adds ``pre_bias`` only."""
        return None


class Autoencoder(nn.Module):
    """A sparse autoencoder for activations of one location.

    Args:
        n_latents: number of latents, ``l``.
        n_inputs: width of the activations, ``n``.
        activation: one of :data:`ACTIVATIONS_CLASSES`; ReLU if not given.
        tied: whether the decoder is the transpose of the encoder.
        input_normalization: what is done to each input vector before encoding and undone after
            decoding: ``"none"``; ``"center"`` takes off its mean; ``"layer_norm"`` takes off its
            mean and divides by its unbiased standard deviation + 1e-5 (the eps is added to the
            deviation, not to the variance), as OpenAI's v5 autoencoders were trained; ``"rms"``
            divides by its root mean square, so that its norm is √n (a vector of zeros stays one).
        n_outputs: width of the output, ``o``, of a transcoder, also where it is ``n``; None for an
            autoencoder, whose output stands for its input.
        post_bias: whether the output has a bias of its own instead of ``pre_bias``.
        skip: whether a linear map of the input goes past the latents to the output.
        glu: whether a second encoder gates the first.
        group_sizes: of a Matryoshka autoencoder, whose first latents make an autoencoder by
            themselves (:meth:`decode_prefix`); they add up to ``n_latents``.
        location: where in the model the inputs come from; None if not known.
        output_location: what a transcoder's output stands for; None if not known.
        model_name: the model that it was trained on; None if not known.
        metadata: anything else worth keeping that JSON can hold; it is saved and never read.
    """

    pre_bias: nn.Parameter
    latent_bias: nn.Parameter
    post_bias: nn.Parameter | None
    stats_last_nonzero: Tensor
    """``[l]`` int64: training steps since the latent was last active."""
    latents_activation_frequency: Tensor
    """``[l]`` float: share of training tokens on which the latent was active; ones if not known."""
    latents_mean_square: Tensor
    """``[l]`` float: mean square of the latent over training tokens."""

    def __init__(
        self,
        n_latents: int,
        n_inputs: int,
        activation: nn.Module | None = None,
        tied: bool = False,
        *,
        input_normalization: InputNormalization = "none",
        n_outputs: int | None = None,
        post_bias: bool = False,
        skip: bool = False,
        glu: bool = False,
        group_sizes: Sequence[int] | None = None,
        location: LocationLike | None = None,
        output_location: LocationLike | None = None,
        model_name: str | None = None,
        metadata: Mapping[str, Any] | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        check_sizes(n_latents, n_inputs, activation, input_normalization, n_outputs)
        _check_combination(tied, n_outputs, output_location, activation)
        self.n_latents = n_latents
        self.n_inputs = n_inputs
        self.n_outputs = n_inputs if n_outputs is None else n_outputs
        self.is_transcoder = n_outputs is not None
        self.tied = tied
        self.input_normalization: InputNormalization = input_normalization
        self.group_sizes = read_group_sizes(group_sizes, n_latents)
        self.location = _parse(location)
        self.output_location = _parse(output_location)
        self.model_name = model_name
        self.metadata = dict(metadata or {})

        factory: dict[str, Any] = {"device": device, "dtype": dtype}
        self.pre_bias = nn.Parameter(torch.zeros(n_inputs, **factory))
        self.encoder = nn.Linear(n_inputs, n_latents, bias=False, **factory)
        self.latent_bias = nn.Parameter(torch.zeros(n_latents, **factory))
        self.activation = nn.ReLU() if activation is None else activation
        self.decoder: nn.Linear | TiedTranspose = (
            TiedTranspose(self.encoder)
            if tied
            else _decoder_by_latent(n_latents, self.n_outputs, factory)
        )
        self.post_bias = (
            nn.Parameter(torch.zeros(self.n_outputs, **factory))
            if post_bias or self.is_transcoder
            else None
        )
        self.skip = nn.Linear(n_inputs, self.n_outputs, bias=False, **factory) if skip else None
        self.glu = nn.Linear(n_inputs, n_latents, **factory) if glu else None
        for name, (value, statistics_dtype) in STATISTICS.items():
            self.register_buffer(
                name, torch.full((n_latents,), value, dtype=statistics_dtype, device=device)
            )
        self.register_state_dict_post_hook(_fold_python_entries)  # type: ignore[no-untyped-call]

    # ---- applying ------------------------------------------------------------------------------

    def normalize(self, x: Tensor) -> tuple[Tensor, InputStats | None]:
        """The input as the encoder takes it, and what else of it :meth:`decode` needs.

        ``[…, n] -> […, n]`` and statistics ``[…, 1]`` (None where nothing is needed).
        """
        self._check_width(x, self.n_inputs, "input")
        skip = None
        if self.skip is not None:
            self._check_dtype(x)
            skip = self.skip(x)
        if self.input_normalization == "none":
            return x, None if skip is None else InputStats(None, None, skip)
        if self.input_normalization == "rms":
            rms = torch.linalg.vector_norm(x, dim=-1, keepdim=True) / math.sqrt(self.n_inputs)
            return x / torch.where(rms == 0, 1.0, rms), InputStats(None, rms, skip)
        mean = x.mean(dim=-1, keepdim=True)
        x = x - mean
        if self.input_normalization == "center":
            return x, InputStats(mean, None, skip)
        # Unbiased: n - 1. Of no rows at all torch would warn, as if the width were too small.
        std = x.std(dim=-1, keepdim=True) if x.numel() else mean
        return x / (std + _LAYER_NORM_EPS), InputStats(mean, std, skip)

    def encode_pre_act(self, x: Tensor, latent_slice: slice = slice(None)) -> Tensor:
        """Latents before the activation function, of all or a slice of them.

        ``[…, n] -> […, l]``. ``x`` is an activation as the model has it; it is normalised here.
        """
        x_hat, _ = self.normalize(x)
        return self._pre_act(x_hat, latent_slice)

    def encode(self, x: Tensor) -> Tensor:
        """``[…, n] -> […, l]``, dense; ``x`` is an activation as the model has it."""
        x_hat, _ = self.normalize(x)
        if self._needs_graph(x):
            return self._latents(x_hat)[1]
        if self._searches:
            return self._top_k(x_hat).dense()
        return self._plain_latents(x_hat)

    def encode_sparse(self, x: Tensor) -> Latents:
        """``[…, n]`` to the active latents of each row; ``x`` is an activation as the model has it.

        TopK gives ``k`` entries a row, largest first. All others give as many as the row that has
        the most active latents, in the order of their indices, and pad the rest. Differentiable, as
        :meth:`encode` is. The same latents, but that of equal pre-activations of which not all are
        kept, the first is.
        """
        x_hat, _ = self.normalize(x)
        k = self.nonlinearity.top_k
        if k is None:
            return self._padded(x_hat, x)
        if self._searches and not self._needs_graph(x):
            return self._top_k(x_hat)
        pre_act = self._pre_act(x_hat)
        indices = top_k(pre_act, k)[1]
        values = self.nonlinearity.after_top_k(pre_act.gather(-1, indices))
        return Latents(values, indices, self.n_latents)

    def decode(self, latents: Tensor | Latents, stats: InputStats | None = None) -> Tensor:
        """``[…, l] -> […, o]``, on the scale of the input that ``stats`` belongs to.

        ``latents`` are dense, or sparse as :meth:`encode_sparse` gives them.

        An autoencoder that normalises its inputs, or has a skip connection, needs ``stats``, the
        second result of :meth:`normalize` for the same ``x``: they are arguments, never remembered,
        so that two batches can be in flight at once.
        """
        self._check_latents(latents)
        recons = self._decode_normalized(latents)
        return self.denormalize(recons, stats)

    def denormalize(self, recons: Tensor, stats: InputStats | None) -> Tensor:
        """``[…, o]``: what the decoder gives, on the scale of the input that ``stats`` belongs to."""
        undo = self.input_normalization != "none" and not self.is_transcoder
        if not undo and self.skip is None:
            return recons
        stats = self._check_stats(stats)
        if undo and stats.std is not None:
            recons = recons * stats.std
        if undo and stats.mean is not None:
            recons = recons + stats.mean
        return recons if stats.skip is None else recons + stats.skip

    def decode_prefix(
        self, latents: Tensor, n_latents: int, stats: InputStats | None = None
    ) -> Tensor:
        """Decode the first ``n_latents`` of ``[…, l]`` latents only, ``-> […, o]``.

        What a Matryoshka autoencoder was trained for at the ends of its ``group_sizes``.
        """
        self._check_width(latents, self.n_latents, "latents")
        if type(n_latents) is not int or not 0 <= n_latents <= self.n_latents:
            raise InputError(
                f"{self._name()}: n_latents must lie in 0 to {self.n_latents}, found {n_latents!r}."
            )
        first = F.pad(latents[..., :n_latents], (0, self.n_latents - n_latents))
        return self.decode(first, stats)

    def forward(self, x: Tensor) -> AutoencoderOutput:
        """``[…, n] -> (pre-activations […, l], latents […, l], reconstruction […, o])``.

        Statistics of the latents are not updated, in training mode neither: a forward pass may run
        twice for one step (recomputed activations, evaluation in between) or on part of a batch,
        so only the training loop can count steps.
        """
        x_hat, stats = self.normalize(x)
        pre_act, latents = self._latents(x_hat)
        return AutoencoderOutput(pre_act, latents, self.decode(latents, stats))

    def reconstruct(self, x: Tensor) -> Tensor:
        """``[…, n] -> […, o]``: encode and decode.

        Where no gradient is asked for, a part of the rows at a time and only through the active
        latents: dense latents are never held for all rows.
        """
        if self._needs_graph(x) or self.nonlinearity.needs_dictionary:
            return self(x).recons  # type: ignore[no-any-return]  # nn.Module.__call__ is untyped
        self._check_width(x, self.n_inputs, "input")
        rows = x.reshape(-1, self.n_inputs)
        size = (
            max(1, len(rows)) if self._searches else self._rows_at_a_time()
        )  # the search has its own
        parts = [self._reconstruct_rows(part) for part in torch.split(rows, size)]
        return torch.cat(parts).view(*x.shape[:-1], self.n_outputs)

    def _pre_act(
        self, x_hat: Tensor, latent_slice: slice = slice(None), relu: bool = False
    ) -> Tensor:
        """``relu``: take that of it too, where there is no gate."""
        self._check_dtype(x_hat)
        x_hat = x_hat - self.pre_bias
        some = latent_slice
        pre_act = product(x_hat, self.encoder.weight[some], self.latent_bias[some], relu)
        if self.glu is None:
            return pre_act
        return pre_act * product(x_hat, self.glu.weight[some], self.glu.bias[some]).sigmoid()

    def _latents(self, x_hat: Tensor) -> tuple[Tensor, Tensor]:
        """Before and after the activation function."""
        pre_act = self._pre_act(x_hat)
        return pre_act, self._activate(pre_act)

    def _activate(self, pre_act: Tensor) -> Tensor:
        return self.nonlinearity.latents(pre_act, self.decoder.weight)

    def _decode_normalized(self, latents: Tensor | Latents) -> Tensor:
        """On the scale of normalised inputs."""
        recons: Tensor = (
            latents.decode(self.decoder.weight.t())
            if isinstance(latents, Latents)
            else self.decoder(latents)
        )
        return recons + (self.pre_bias if self.post_bias is None else self.post_bias)

    # ---- without a graph: the same results, with less time and memory ----------------------------

    def _needs_graph(self, x: Tensor) -> bool:
        """Whether something would notice that a computation took another way than the formula's.

        Gradients do, and automatic casting, and hooks on modules inside.
        """
        if torch.is_autocast_enabled(x.device.type):
            return True
        if torch.is_grad_enabled() and (
            x.requires_grad or any(parameter.requires_grad for parameter in self.parameters())
        ):
            return True
        return any(module._forward_hooks or module._forward_pre_hooks for module in self.modules())

    def _top_k(self, x_hat: Tensor) -> Latents:
        nonlinearity = self.nonlinearity
        k = nonlinearity.top_k
        assert k is not None
        self._check_dtype(x_hat)
        rows = (x_hat - self.pre_bias).reshape(-1, self.n_inputs)
        weight, bias = self.encoder.weight, self.latent_bias
        values, indices = encode_top_k(rows, weight, bias, k)
        shape = (*x_hat.shape[:-1], k)
        values = nonlinearity.after_top_k(values)
        return Latents(values.view(shape), indices.view(shape), self.n_latents)

    def _padded(self, x_hat: Tensor, x: Tensor) -> Latents:
        if self._needs_graph(x) or self.nonlinearity.needs_dictionary:
            return Latents.of(self._latents(x_hat)[1])
        rows = x_hat.reshape(-1, self.n_inputs)
        parts = [
            Latents.of(self._plain_latents(part))
            for part in torch.split(rows, self._rows_at_a_time())
        ]
        return Latents.cat(parts).unflatten(x_hat.shape[:-1])

    def _plain_latents(self, x_hat: Tensor) -> Tensor:
        """``[…, l]``, dense."""
        if self.nonlinearity.is_relu and self.glu is None:
            return self._pre_act(x_hat, relu=True)
        return self._activate(self._pre_act(x_hat))

    def _rows_at_a_time(self) -> int:
        return max(1, _CHUNK_BYTES // (self.n_latents * self.encoder.weight.element_size()))

    def _reconstruct_rows(self, x: Tensor) -> Tensor:
        x_hat, stats = self.normalize(x)
        if self._searches:
            return self.decode(self._top_k(x_hat), stats)
        latents = self._plain_latents(x_hat)
        few = torch.count_nonzero(latents) < _SPARSE_SHARE * latents.numel()
        return self.decode(Latents.of(latents) if few else latents, stats)

    def _check_stats(self, stats: InputStats | None) -> InputStats:
        if stats is None:
            why = (
                f"inputs are normalised ({self.input_normalization!r})"
                if self.input_normalization != "none"
                else "it has a skip connection"
            )
            raise InputError(
                f"{self._name()}: decode needs stats, because {why}: `x_hat, stats = "
                "autoencoder.normalize(x)`, then `autoencoder.decode(latents, stats)`. "
                "`autoencoder.reconstruct(x)` does it all."
            )
        expected = (
            self.input_normalization in ("none", "rms"),
            self.input_normalization in ("none", "center"),
            self.skip is None,
        )
        if tuple(part is None for part in stats) != expected:
            raise InputError(
                f"{self._name()}: these stats are not of {self.input_normalization!r} "
                f"normalisation {'without' if self.skip is None else 'with'} a skip connection; take "
                "them from this autoencoder's normalize(x)."
            )
        return stats

    def _check_latents(self, latents: Tensor | Latents) -> None:
        if not isinstance(latents, Latents):
            self._check_width(latents, self.n_latents, "latents")
            return
        self._check_dtype(latents.values)
        if latents.n_latents != self.n_latents:
            raise InputError(
                f"{self._name()}: expected latents out of {self.n_latents}, found some out of "
                f"{latents.n_latents}."
            )

    def _check_width(self, x: Tensor, width: int, what: str) -> None:
        if x.ndim == 0 or x.shape[-1] != width:
            raise InputError(
                f"{self._name()}: expected {what} of width {width} in the last axis, found shape "
                f"{list(x.shape)}."
            )

    def _check_dtype(self, x: Tensor) -> None:
        if x.dtype != self.dtype and not torch.is_autocast_enabled(x.device.type):
            raise InputError(
                f"{self._name()}: its weights are {self.dtype}, the input is {x.dtype}; convert "
                "one of them with .to(dtype)."
            )

    # ---- what it is ----------------------------------------------------------------------------

    @property
    def nonlinearity(self) -> Nonlinearity:
        """The activation function with all that it says about itself."""
        return as_nonlinearity(self.activation)

    @property
    def _searches(self) -> bool:
        """Whether latents are found by a search for the largest pre-activations."""
        return self.glu is None and self.nonlinearity.top_k is not None

    @property
    def dtype(self) -> torch.dtype:
        """Of the weights."""
        return self.encoder.weight.dtype

    @property
    def device(self) -> torch.device:
        """Of the weights."""
        return self.encoder.weight.device

    def _name(self) -> str:
        return "autoencoder" if self.location is None else f"autoencoder of {self.location}"

    def __repr__(self) -> str:
        facts = [
            f"n_latents={self.n_latents}",
            f"n_inputs={self.n_inputs}",
            f"activation={self.activation!r}",
            f"tied={self.tied}",
            f"input_normalization={self.input_normalization!r}",
            f"location={None if self.location is None else str(self.location)!r}",
        ]
        if self.model_name is not None:
            facts.append(f"model_name={self.model_name!r}")
        if self.is_transcoder:
            output = None if self.output_location is None else str(self.output_location)
            facts.append(f"n_outputs={self.n_outputs}, output_location={output!r}")
        facts += [
            f"{name}=True"
            for name in ("post_bias", "skip", "glu")
            if getattr(self, name) is not None
        ]
        if self.group_sizes is not None:
            facts.append(f"group_sizes={self.group_sizes}")
        return f"{type(self).__name__}({', '.join(facts)}, dtype={self.dtype})"

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        """torch's hook behind ``.to``, ``.half`` and the like: statistics keep their dtype."""
        before = {name: getattr(self, name) for name in STATISTICS}
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        for name, old in before.items():
            new = getattr(self, name)
            if new.dtype != old.dtype:
                setattr(self, name, old.to(new.device))
        return self

    # ---- state dicts ---------------------------------------------------------------------------

    def _load_from_state_dict(
        self, state_dict: dict[str, Any], prefix: str, *args: Any, **kwargs: Any
    ) -> None:
        # state_dict is torch's own shallow copy: entries may be taken out of it.
        _unfold_python_entries(self, state_dict, prefix)
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)

    @classmethod
    def from_state_dict(
        cls,
        state_dict: Mapping[str, Any],
        strict: bool = True,
        *,
        input_normalization: InputNormalization | None = None,
        location: LocationLike | None = None,
        output_location: LocationLike | None = None,
        model_name: str | None = None,
        metadata: Mapping[str, Any] | None = None,
        dtype: torch.dtype | None = None,
    ) -> Self:
        """The autoencoder that a ``state_dict()``, of this class or OpenAI's, describes.

        The caller's dict is left as it is and shares no memory with the result.

        Args:
            state_dict: tensors, and ``activation`` (a name; ReLU if absent, as in the earliest
                files) with ``activation_state_dict``.
            strict: if False, statistics buffers may be missing and unknown entries are left out,
                each with a logged warning. Weights may never be missing.
            input_normalization: stated by the caller where the file does not say. OpenAI's layout
                has no entry for it: its v5 files (TopK) need ``"layer_norm"``, and a TopK file
                without a statement is read as ``"none"`` with an
                :class:`UnstatedNormalizationWarning`.
            location: recorded on the result.
            output_location: recorded on the result, which must be a transcoder.
            model_name: recorded on the result.
            metadata: recorded on the result.
            dtype: of the weights; None keeps that of ``encoder.weight``.
        """
        entries, problems, notes = parse_state_dict(state_dict, strict)
        if problems:
            raise CheckpointError("not a state dict of an autoencoder: " + "; ".join(problems))
        for note in notes:
            logger.warning("autoencoder state dict: %s", note)
        return cls._build(
            entries,
            input_normalization=_settle_normalization(entries, input_normalization),
            location=location,
            output_location=output_location,
            model_name=model_name,
            metadata=metadata,
            dtype=dtype,
        )

    @classmethod
    def _build(
        cls,
        entries: Entries,
        *,
        input_normalization: InputNormalization,
        location: LocationLike | None,
        output_location: LocationLike | None,
        model_name: str | None,
        metadata: Mapping[str, Any] | None,
        dtype: torch.dtype | None,
    ) -> Self:
        encoder = entries.tensors["encoder.weight"]
        n_latents, n_inputs = encoder.shape
        device, dtype = encoder.device, dtype or encoder.dtype
        # On "meta" no weights are drawn only to be overwritten: seconds and gigabytes for 131072
        # latents.
        autoencoder = cls(
            n_latents,
            n_inputs,
            make_activation(entries.activation, entries.activation_fields).to(device, dtype),
            entries.tied,
            input_normalization=input_normalization,
            n_outputs=entries.n_outputs,
            post_bias="post_bias" in entries.tensors,
            skip="skip.weight" in entries.tensors,
            glu="glu.weight" in entries.tensors,
            group_sizes=entries.group_sizes,
            location=location,
            output_location=output_location,
            model_name=model_name,
            metadata=metadata,
            device="meta",
            dtype=dtype,
        )
        for name in (*PARAMETERS, *OPTIONAL_PARAMETERS):
            if name in entries.tensors:
                weight = entries.tensors[name].detach()
                weight = (
                    _by_latent(weight, device, dtype)
                    if name == "decoder.weight"
                    else weight.to(device, dtype, copy=True)
                )
                owner, _, leaf = name.rpartition(".")
                setattr(autoencoder.get_submodule(owner), leaf, nn.Parameter(weight))
        for name, (value, statistics_dtype) in STATISTICS.items():
            known = entries.tensors.get(name, torch.full((n_latents,), value))
            setattr(autoencoder, name, known.detach().to(device, statistics_dtype, copy=True))
        return autoencoder

    # ---- files ---------------------------------------------------------------------------------

    def save(
        self, folder: str | Path, dtype: torch.dtype | None = None, *, overwrite: bool = False
    ) -> None:
        """Write ``config.json`` and ``autoencoder.safetensors`` into ``folder``, whole or not at all.

        ``dtype`` is that of the two matrices on disk (None: as they are); float16 halves the size.
        Biases, thresholds and statistics, a small part, keep their own. An autoencoder that is
        already there is replaced only with ``overwrite``.
        """
        dtype = dtype or self.dtype
        tensors = self._tensors_to_save(dtype)
        config = self._config(dtype)
        with files.atomic_folder(folder, overwrite=overwrite) as temporary:
            files.write_json(temporary / "config.json", config)
            safetensors.torch.save_file(tensors, temporary / WEIGHTS_FILE)

    def _tensors_to_save(self, dtype: torch.dtype) -> dict[str, Tensor]:
        """Every tensor on the CPU; refuses what could not be loaded again."""
        tensors = {}
        for name, value in [*self.named_parameters(), *self.named_buffers()]:
            value = value.detach()
            stored = value.to(dtype) if name in ("encoder.weight", "decoder.weight") else value
            if not torch.isfinite(stored).all():
                largest = float(value.abs().max())
                raise InputError(
                    f"{self._name()} is not saved: {name} holds "
                    + (
                        f"values up to {largest:.3g}, beyond the range of {dtype}."
                        if math.isfinite(largest)
                        else "NaN or infinity."
                    )
                )
            tensors[name] = stored.cpu().contiguous()
        return tensors

    def _config(self, dtype: torch.dtype) -> dict[str, Any]:
        name = activation_name(self.activation)
        fields = self.nonlinearity.plain_fields()
        try:
            metadata = json.loads(json.dumps(self.metadata, allow_nan=False))
        except (TypeError, ValueError) as error:
            raise InputError(f"{self._name()}: metadata cannot be JSON: {error}.") from None
        config = {
            "format_version": FORMAT_VERSION,
            "kind": "autoencoder",
            "n_latents": self.n_latents,
            "n_inputs": self.n_inputs,
            "activation": {"name": name, **fields},
            "tied": self.tied,
            "input_normalization": self.input_normalization,
            "location": None if self.location is None else str(self.location),
            "model_name": self.model_name,
            "dtype": str(dtype).removeprefix("torch."),
            "metadata": metadata,
        }
        if self.is_transcoder:
            config["n_outputs"] = self.n_outputs
        if self.output_location is not None:
            config["output_location"] = str(self.output_location)
        if self.group_sizes is not None:
            config["group_sizes"] = list(self.group_sizes)
        return config

    @classmethod
    def load(
        cls,
        source: str | Path,
        *,
        strict: bool = True,
        dtype: torch.dtype | None = torch.float32,
        device: torch.device | str | None = None,
        **stated: Unpack[Stated],
    ) -> Self:
        """Read a folder that :meth:`save` wrote, or what another library did; path or URL.

        The format is found from the content (:mod:`neuron_explainer.models.checkpoints.autoencoders`
        lists them all). What a file does not say and changes numbers has to be stated here; what it
        does say may be stated, and not contradicted.

        Args:
            source: a folder or a file. A ``.pt`` file is read with torch's ``weights_only`` reader:
                code in it is never run.
            strict: see :meth:`from_state_dict`; concerns files of OpenAI's layout.
            dtype: of the weights in memory; None keeps what is stored.
            device: where to put it.
            stated: such as ``input_normalization``, ``location``, ``norm_factor``: see
                :class:`~neuron_explainer.models.checkpoints.autoencoders.Stated`.
        """
        loaded = read_autoencoder(source, stated)
        try:
            autoencoder = cls.from_state_dict(
                loaded.state_dict,
                strict or not loaded.lenient,
                input_normalization=loaded.input_normalization,
                location=loaded.location,
                output_location=loaded.output_location,
                model_name=loaded.model_name,
                metadata=loaded.metadata,
                dtype=dtype,
            )
        except CheckpointError as error:
            raise CheckpointError(f"{source}: {error}") from None
        return autoencoder.to(device)


def _parse(location: LocationLike | None) -> ActivationLocation | None:
    return None if location is None else ActivationLocation.parse(location)


def _decoder_by_latent(n_latents: int, n_outputs: int, factory: dict[str, Any]) -> nn.Linear:
    decoder = nn.Linear(n_latents, n_outputs, bias=False, **factory)
    weight = decoder.weight.detach()
    decoder.weight = nn.Parameter(_by_latent(weight, weight.device, weight.dtype))
    return decoder


def _by_latent(weight: Tensor, device: torch.device, dtype: torch.dtype) -> Tensor:
    """A copy of a decoder's ``[o, l]`` in which what a latent writes lies together in memory.

    Sparse decoding reads few whole columns; a matrix product takes either layout.
    """
    by_latent = weight.t().to(device, dtype, copy=True, memory_format=torch.contiguous_format)
    return by_latent.t()


def _check_combination(
    tied: bool,
    n_outputs: int | None,
    output_location: LocationLike | None,
    activation: nn.Module | None,
) -> None:
    if tied and n_outputs is not None:
        raise InputError("Autoencoder: a transcoder's decoder cannot be tied to its encoder.")
    if output_location is not None and n_outputs is None:
        raise InputError("Autoencoder: output_location is for transcoders; n_outputs is not given.")
    nonlinearity = None if activation is None else as_nonlinearity(activation)
    if nonlinearity is not None and nonlinearity.needs_dictionary and not tied:
        raise InputError(
            f"Autoencoder: {nonlinearity.name} codes an input in the decoder's directions; the encoder "
            "must be tied to them (tied=True)."
        )


# ---- state dicts: tensors and python entries -------------------------------------------------------


def _fold_python_entries(
    module: nn.Module, state_dict: dict[str, Any], prefix: str, local_metadata: Any
) -> None:
    """Turn torch's flat entries of the activation and the tied decoder into those of the format.

    ``tied`` and ``input_normalization`` stand only where a reader of OpenAI's layout, which has
    neither, would get another autoencoder without them: all other state dicts have its keys exactly.
    """
    assert isinstance(module, Autoencoder)
    inner = prefix + "activation."
    fields = {key[len(inner) :]: v for key, v in state_dict.items() if key.startswith(inner)}
    for key in fields:
        del state_dict[inner + key]
    state_dict[prefix + "activation"] = activation_name(module.activation)
    state_dict[prefix + "activation_state_dict"] = fields
    if module.tied:
        del state_dict[prefix + "decoder.linear.weight"]
        state_dict[prefix + "tied"] = True
    if module.input_normalization != "none" or module.nonlinearity.needs_normalization:
        state_dict[prefix + "input_normalization"] = module.input_normalization
    if module.is_transcoder:
        state_dict[prefix + "n_outputs"] = module.n_outputs
    if module.group_sizes is not None:
        state_dict[prefix + "group_sizes"] = list(module.group_sizes)


def _unfold_python_entries(
    autoencoder: Autoencoder, state_dict: dict[str, Any], prefix: str
) -> None:
    """The inverse of :func:`_fold_python_entries`, in place, for ``load_state_dict``.

    What a state dict cannot change about an existing autoencoder has to agree with it.
    """
    fields = state_dict.pop(prefix + "activation_state_dict", {})
    state_dict.update({f"{prefix}activation.{key}": value for key, value in fields.items()})
    if autoencoder.tied and prefix + "encoder.weight" in state_dict:
        weight = state_dict[prefix + "encoder.weight"]
        state_dict.setdefault(prefix + "decoder.linear.weight", weight)
    for key, expected, default in (
        ("activation", activation_name(autoencoder.activation), "ReLU"),
        ("tied", autoencoder.tied, False),
        ("input_normalization", autoencoder.input_normalization, "none"),
        ("n_outputs", autoencoder.n_outputs if autoencoder.is_transcoder else None, None),
        ("group_sizes", list(autoencoder.group_sizes) if autoencoder.group_sizes else None, None),
    ):
        found = state_dict.pop(prefix + key, default)
        if found != expected:
            raise CheckpointError(
                f"{autoencoder._name()}: {key} is {expected!r}, the state dict says {found!r}; use "
                "Autoencoder.from_state_dict."
            )


def _settle_normalization(entries: Entries, given: InputNormalization | None) -> InputNormalization:
    stated = entries.input_normalization
    if given is not None and given not in NORMALIZATIONS:
        raise InputError(unknown_normalization(given))
    if stated is not None and given is not None and stated != given:
        raise CheckpointError(
            f"the state dict says input_normalization {stated!r}, the call says {given!r}."
        )
    doubtful = getattr(ACTIVATIONS_CLASSES[entries.activation], "needs_normalization", False)
    if stated is None and given is None and doubtful:
        warnings.warn(
            f"This {entries.activation} autoencoder's state dict does not say how its inputs were "
            "normalised; it is read as input_normalization='none'. OpenAI's v5 autoencoders were trained on "
            "layer-normed inputs and give garbage without: state it, "
            "`Autoencoder.from_state_dict(state_dict, input_normalization='layer_norm')` (or 'none' "
            "to confirm).",
            UnstatedNormalizationWarning,
            stacklevel=3,
        )
    settled: Any = stated or given or "none"
    return settled  # type: ignore[no-any-return]  # one of the literals: checked above and in _parse
