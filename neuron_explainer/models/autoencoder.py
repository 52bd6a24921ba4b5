"""Sparse autoencoders: a vector of activations as a sum of a few of many learned directions.

    x̂, stats   = normalize(x)
    pre_act    = (x̂ - pre_bias) · W_encᵀ + latent_bias
    latents    = activation(pre_act)
    recons     = denormalize(latents · W_decᵀ + pre_bias, stats)

Parametrisation and state-dict keys are those of OpenAI's ``sparse_autoencoder``. What has to be known
to apply an autoencoder correctly (nonlinearity, tying, input normalisation, location) is recorded with
it; none of it is guessed, and nothing is kept between ``encode`` and ``decode``.

Other libraries' dictionaries differ in a few parts, each of which is there or is not:

    post_bias  a bias of the output that is not ``pre_bias``
    skip       W_skip · x is added to the output, where x is the input as the model has it
    glu        pre_act is multiplied by sigmoid((x̂ - pre_bias) · W_gluᵀ + b_glu)
    n_outputs  a transcoder: its output stands for another activation than its input, so there is
               nothing to denormalize, and its bias is always a ``post_bias``

Shape legend: ``b`` batch, ``s`` sequence, ``n`` inputs, ``o`` outputs (``n`` but for transcoders),
``l`` latents, ``k`` latents kept of a row, ``…`` any leading axes.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, Generic, NamedTuple, TypeVar, Unpack, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from neuron_explainer.errors import InputError
from neuron_explainer.kernels.products import product
from neuron_explainer.kernels.top_k import top_k
from neuron_explainer.models.autoencoders.facts import Facts, check_names
from neuron_explainer.models.autoencoders.fast_encode import (
    SPARSE_SHARE,
    cheaper_to_decode,
    in_pieces,
    needs_graph,
    searched_latents,
    sparse_latents,
)
from neuron_explainer.models.autoencoders.input_normalization import (
    InputStats,
    check_stats,
    normalize_input,
)
from neuron_explainer.models.autoencoders.latents import Latents
from neuron_explainer.models.autoencoders.nonlinearities import (
    ACTIVATIONS_CLASSES,
    BatchTopK,
    JumpReLU,
    TopK,
    as_nonlinearity,
)
from neuron_explainer.models.autoencoders.splicing import LatentEdit, spliced_dense, spliced_edits
from neuron_explainer.models.autoencoders.state_dicts import (
    StoredAutoencoder,
    UnstatedNormalizationWarning,
    by_latent,
)
from neuron_explainer.models.checkpoints.autoencoders.state import (
    STATISTICS,
    InputNormalization,
    check_sizes,
    read_group_sizes,
)
from neuron_explainer.models.checks import check_tensor
from neuron_explainer.models.locations import ActivationLocation, LocationLike
from neuron_explainer.tables import by_shape

__all__ = [
    "ACTIVATIONS_CLASSES",
    "Autoencoder",
    "AutoencoderOutput",
    "BatchTopK",
    "Code",
    "InputNormalization",
    "InputStats",
    "JumpReLU",
    "TiedTranspose",
    "TopK",
    "UnstatedNormalizationWarning",
]

L = TypeVar("L", Tensor, Latents)


class AutoencoderOutput(NamedTuple):
    """All that a forward pass computes."""

    latents_pre_act: Tensor
    """``[…, l]`` before the nonlinearity."""
    latents: Tensor
    """``[…, l]``"""
    recons: Tensor
    """``[…, o]`` on the scale of the input."""

    def __repr__(self) -> str:
        return by_shape(self)


class Code(NamedTuple, Generic[L]):
    """The latents of an input, and the way back."""

    latents: L
    """Dense ``[…, l]``, or sparse."""
    stats: InputStats | None
    """What :meth:`Autoencoder.normalize` gives with it."""
    decode: Callable[[Tensor | Latents], Tensor]
    """Latents, these or edited ones, ``-> […, o]`` on the scale of this input."""

    def __repr__(self: Any) -> str:
        return by_shape(self)


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


class Autoencoder(StoredAutoencoder):
    """A sparse autoencoder for activations of one location.

    How it is saved and loaded stands in
    :class:`~neuron_explainer.models.autoencoders.state_dicts.StoredAutoencoder`.

    Args:
        n_latents: number of latents, ``l``.
        n_inputs: width of the activations, ``n``.
        activation: the nonlinearity, one of :data:`ACTIVATIONS_CLASSES`; ReLU if not given.
        tied: whether the decoder is the transpose of the encoder.
        n_outputs: width of a transcoder's output, ``o``, even where it equals ``n``; None for an
            autoencoder, whose output stands for its input.
        post_bias: whether the output has a bias of its own instead of ``pre_bias``.
        skip: whether a linear map of the input goes past the latents to the output.
        glu: whether a second encoder gates the first.
        group_sizes: the groups of a Matryoshka autoencoder, whose first latents are an autoencoder
            by themselves (:meth:`decode_prefix`); they add up to ``n_latents``.
        facts: ``input_normalization``, ``location`` and more, see
            :class:`~neuron_explainer.models.autoencoders.facts.Facts`.
    """

    def __init__(
        self,
        n_latents: int,
        n_inputs: int,
        activation: nn.Module | None = None,
        tied: bool = False,
        *,
        n_outputs: int | None = None,
        post_bias: bool = False,
        skip: bool = False,
        glu: bool = False,
        group_sizes: Sequence[int] | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        **facts: Unpack[Facts],
    ) -> None:
        super().__init__()
        check_names(facts)
        self.input_normalization: InputNormalization = facts.get("input_normalization") or "none"
        check_sizes(n_latents, n_inputs, activation, self.input_normalization, n_outputs)
        _check_combination(tied, n_outputs, facts.get("output_location"), activation)
        self.n_latents = n_latents
        self.n_inputs = n_inputs
        self.n_outputs = n_inputs if n_outputs is None else n_outputs
        self.is_transcoder = n_outputs is not None
        self.tied = tied
        self.group_sizes = read_group_sizes(group_sizes, n_latents)
        self.location = _parse(facts.get("location"))
        self.output_location = _parse(facts.get("output_location"))
        self.model_name = facts.get("model_name")
        self.metadata: dict[str, Any] = dict(facts.get("metadata") or {})

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

    # ---- applying ------------------------------------------------------------------------------

    def normalize(self, x: Tensor) -> tuple[Tensor, InputStats | None]:
        """The input as the encoder takes it, and what else :meth:`decode` needs to know about it.

        ``[…, n] -> […, n]`` and statistics ``[…, 1]`` (None where nothing is needed).
        """
        x_hat, stats = self._normalize(x)
        if self.skip is None:
            return x_hat, stats
        self._check_dtype(x)
        skip = self.skip(x)
        return x_hat, InputStats(None, None, skip) if stats is None else stats._replace(skip=skip)

    def encode_pre_act(self, x: Tensor, latent_slice: slice = slice(None)) -> Tensor:
        """Latents before the nonlinearity, all or a slice of them.

        ``[…, n] -> […, l]``. ``x`` is an activation as the model has it; it is normalised here.
        """
        return self._pre_act(self._normalize(x)[0], latent_slice)

    def encode(self, x: Tensor) -> Tensor:
        """``[…, n] -> […, l]``, dense; ``x`` is an activation as the model has it."""
        return self._encode(self._normalize(x)[0], needs_graph(self, x))

    def encode_sparse(self, x: Tensor, *, chunk_bytes: int | None = None) -> Latents:
        """The active latents of each row of ``[…, n]``; ``x`` is an activation as the model has it.

        TopK gives ``k`` entries a row, largest first. All others give as many entries as the row with
        the most active latents has, in the order of their indices, and pad the other rows. The latents
        are those of :meth:`encode`, and differentiable as they are. ``chunk_bytes`` is the size of the
        dense latents that are held at a time where no gradient is needed; None: what suits the device.
        """
        return self._encode_sparse(self._normalize(x)[0], needs_graph(self, x), chunk_bytes)

    def code(self, x: Tensor) -> Code[Tensor]:
        """``[…, n]``: the latents of :meth:`encode`, and the function that decodes latents for this
        input. The input is normalised once for both."""
        x_hat, stats = self.normalize(x)
        latents = self._encode(x_hat, needs_graph(self, x))
        return Code(latents, stats, partial(self.decode, stats=stats))

    def code_sparse(self, x: Tensor, *, chunk_bytes: int | None = None) -> Code[Latents]:
        """The same with the latents of :meth:`encode_sparse`."""
        x_hat, stats = self.normalize(x)
        latents = self._encode_sparse(x_hat, needs_graph(self, x), chunk_bytes)
        return Code(latents, stats, partial(self.decode, stats=stats))

    def decode(self, latents: Tensor | Latents, stats: InputStats | None = None) -> Tensor:
        """``[…, l] -> […, o]``, on the scale of the input that ``stats`` belongs to.

        ``latents`` are dense, or sparse as :meth:`encode_sparse` gives them.

        An autoencoder that normalises its inputs, or has a skip connection, needs ``stats``, the
        second result of :meth:`normalize` for the same ``x``: they are arguments, never remembered,
        so that two batches can be in flight at once. :meth:`code` passes them on by itself.
        """
        self._check_latents(latents)
        recons: Tensor = (
            latents.decode(self.directions)
            if isinstance(latents, Latents)
            else self.decoder(latents)
        )
        recons = recons + (self.pre_bias if self.post_bias is None else self.post_bias)
        return self.denormalize(recons, stats)

    @property
    def directions(self) -> Tensor:
        """``[l, o]``: row ``i`` is the direction that latent ``i`` writes.

        It is what one unit of the latent adds to the reconstruction: a column of ``decoder.weight``,
        which is ``[o, l]``. Where inputs are normalised, it is in units of normalised inputs. Latents that
        were left out of memory have rows of zeros.
        """
        return self.decoder.weight.t()

    def denormalize(self, recons: Tensor, stats: InputStats | None) -> Tensor:
        """The decoder's output ``[…, o]`` on the scale of the input that ``stats`` belongs to."""
        undo = self.input_normalization != "none" and not self.is_transcoder
        if not undo and self.skip is None:
            return recons
        name = self._name()
        stats = check_stats(stats, self.input_normalization, self.skip is not None, name)
        recons = stats.undo(recons) if undo else recons
        return recons if stats.skip is None else recons + stats.skip

    def decode_prefix(
        self, latents: Tensor, n_latents: int, stats: InputStats | None = None
    ) -> Tensor:
        """Decode the first ``n_latents`` of ``[…, l]`` latents only, ``-> […, o]``.

        This is what a Matryoshka autoencoder was trained for at the ends of its ``group_sizes``.
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

        Statistics of the latents are not updated, not even in training mode: a forward pass may run
        twice for one step (recomputed activations, an evaluation in between) or on part of a batch,
        so only the training loop can count steps.
        """
        x_hat, stats = self.normalize(x)
        pre_act = self._pre_act(x_hat)
        latents = self.nonlinearity.latents(pre_act, self.decoder.weight)
        return AutoencoderOutput(pre_act, latents, self.decode(latents, stats))

    def reconstruct(
        self, x: Tensor, *, chunk_bytes: int | None = None, sparse_share: float = SPARSE_SHARE
    ) -> Tensor:
        """``[…, n] -> […, o]``: encode and decode.

        Where no gradient is needed, ``chunk_bytes`` of dense latents are held at a time (None: what
        suits the device), and decoded through their active entries if fewer than ``sparse_share`` are.
        """
        self._check_width(x, self.n_inputs, "input")
        if needs_graph(self, x) or self.nonlinearity.needs_dictionary:
            return cast(AutoencoderOutput, self(x)).recons
        if self._searches:
            code = self.code_sparse(x, chunk_bytes=chunk_bytes)
            return code.decode(code.latents)
        parts = []
        for rows in in_pieces(x.reshape(-1, self.n_inputs), self.n_latents, chunk_bytes):
            latents, _, decode = self.code(rows)
            parts.append(decode(cheaper_to_decode(latents, sparse_share)))
        return torch.cat(parts).view(*x.shape[:-1], self.n_outputs)

    def spliced(
        self,
        x: Tensor,
        edits: Sequence[LatentEdit] | Callable[[Tensor], Tensor],
        add_error: bool,
    ) -> Tensor | None:
        """``[…, n] -> […, n]``: what a model continues with where this autoencoder is spliced in.

        Args:
            edits: of some latents, or a function of the dense latents ``[…, l]``.
            add_error: add back what the autoencoder does not capture of ``x``.

        None where a gradient, or a hook on a module inside, needs the formula itself.
        """
        self._check_width(x, self.n_inputs, "input")
        if needs_graph(self, x):
            return None
        if callable(edits):
            return spliced_dense(self, x, edits, add_error)
        return spliced_edits(self, x, edits, add_error)

    def _normalize(self, x: Tensor) -> tuple[Tensor, InputStats | None]:
        self._check_width(x, self.n_inputs, "input")
        return normalize_input(x, self.input_normalization)

    def _pre_act(
        self, x_hat: Tensor, latent_slice: slice = slice(None), relu: bool = False
    ) -> Tensor:
        """``relu``: also apply ReLU (ignored with a glu)."""
        self._check_dtype(x_hat)
        x_hat = x_hat - self.pre_bias
        some = latent_slice
        pre_act = product(x_hat, self.encoder.weight[some], self.latent_bias[some], relu)
        if self.glu is None:
            return pre_act
        return pre_act * product(x_hat, self.glu.weight[some], self.glu.bias[some]).sigmoid()

    def _encode(self, x_hat: Tensor, graph: bool) -> Tensor:
        if self._searches and not graph:
            return self._search(x_hat).dense()
        if self.nonlinearity.is_relu and self.glu is None and not graph:
            return self._pre_act(x_hat, relu=True)
        return self.nonlinearity.latents(self._pre_act(x_hat), self.decoder.weight)

    def _encode_sparse(self, x_hat: Tensor, graph: bool, chunk_bytes: int | None) -> Latents:
        if self._searches and not graph:
            return self._search(x_hat, chunk_bytes)
        nonlinearity = self.nonlinearity
        if nonlinearity.top_k is not None:
            pre_act = self._pre_act(x_hat)
            indices = top_k(pre_act, nonlinearity.top_k)[1]
            values = nonlinearity.after_top_k(pre_act.gather(-1, indices))
            return Latents(values, indices, self.n_latents)
        if graph or nonlinearity.needs_dictionary:
            return Latents.of(self._encode(x_hat, graph))
        return sparse_latents(
            x_hat, partial(self._encode, graph=False), self.n_latents, chunk_bytes
        )

    @property
    def _searches(self) -> bool:
        """Whether latents can be found by a search for the largest pre-activations."""
        return self.glu is None and self.nonlinearity.top_k is not None

    def _search(self, x_hat: Tensor, chunk_bytes: int | None = None) -> Latents:
        self._check_dtype(x_hat)
        centred, weight, bias = x_hat - self.pre_bias, self.encoder.weight, self.latent_bias
        return searched_latents(centred, weight, bias, self.nonlinearity, chunk_bytes)

    def _check_latents(self, latents: Tensor | Latents) -> None:
        if not isinstance(latents, Latents):
            self._check_width(latents, self.n_latents, "latents")
            return
        check_tensor(latents.values, f"{self._name()}: latents", self.device)
        self._check_dtype(latents.values)
        if latents.n_latents != self.n_latents:
            raise InputError(
                f"{self._name()}: expected latents out of {self.n_latents}, found some out of "
                f"{latents.n_latents}."
            )

    def _check_width(self, x: Tensor, width: int, what: str) -> None:
        check_tensor(x, f"{self._name()}: {what}", self.device)
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


def _parse(location: LocationLike | None) -> ActivationLocation | None:
    return None if location is None else ActivationLocation.parse(location)


def _decoder_by_latent(n_latents: int, n_outputs: int, factory: dict[str, Any]) -> nn.Linear:
    decoder = nn.Linear(n_latents, n_outputs, bias=False, **factory)
    weight = decoder.weight.detach()
    decoder.weight = nn.Parameter(by_latent(weight, weight.device, weight.dtype))
    return decoder


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
