"""A dictionary while it is being learned: encoder, decoder, and how inputs are scaled.

Rows are latents in both matrices, so that a change to a latent is a change to a row of memory. The result of
training is a plain ``Autoencoder`` of activations as the model has them.

Shape legend: ``b`` tokens of a batch, ``n`` inputs, ``o`` outputs, ``l`` latents, ``k`` active ones.
"""

import contextlib
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from neuron_explainer.dictionaries.distributed import SINGLE_PROCESS, World
from neuron_explainer.kernels.workspace import row_blocks

DecoderNorm = Literal["unit", "at_most_unit", "free"]


class LearnedDictionary(nn.Module):
    """Encoder ``[l, n]``, decoder ``[l, o]`` and their biases, in units of normalised inputs.

    Args:
        n_latents: ``l``.
        n_inputs: ``n``.
        n_outputs: ``o`` of a transcoder, which predicts another activation than its input; None for an
            autoencoder.
        tied: whether the decoder is the encoder.
        skip: whether a linear map leads from the input straight to the output; transcoders only.
        autocast: whether matrix products run in bfloat16.
        generator: draws the initial directions, on the CPU, so that they do not depend on the device.
        world: the processes that train it. Each has the whole of it, and sees a part of every batch; or
            each has some of the latents, and sees whole batches. Every method gives the result of one
            process alone.
    """

    input_mean: Tensor
    """``[n]``, subtracted from inputs."""
    input_scale: Tensor
    """``[]``, inputs are divided by it."""
    target_mean: Tensor
    target_scale: Tensor
    variance: Tensor
    """``[]``: mean squared distance of normalised targets from their mean."""

    def __init__(
        self,
        n_latents: int,
        n_inputs: int,
        n_outputs: int | None = None,
        *,
        tied: bool = False,
        skip: bool = False,
        autocast: bool = False,
        dtype: torch.dtype = torch.float32,
        generator: torch.Generator | None = None,
        world: World = SINGLE_PROCESS,
    ) -> None:
        super().__init__()
        self.world = world
        here = world.latents(n_latents)
        self.n_latents_everywhere, self.n_latents, self.n_inputs = n_latents, len(here), n_inputs
        self.first_latent = here.start
        self.is_transcoder = n_outputs is not None
        self.n_outputs = n_inputs if n_outputs is None else n_outputs
        self.autocast = autocast
        directions = _unit_rows(n_latents, n_inputs, generator, dtype, here)
        self.encoder = nn.Parameter(directions)
        self.decoder: nn.Parameter | None = None
        if not tied:
            # An autoencoder's latent starts with one direction for both; a transcoder's two spaces are
            # unrelated.
            same = not self.is_transcoder
            self.decoder = nn.Parameter(
                directions.clone()
                if same
                else _unit_rows(n_latents, self.n_outputs, generator, dtype, here)
            )
        self.latent_bias = nn.Parameter(torch.zeros(len(here), dtype=dtype))
        self.pre_bias = nn.Parameter(torch.zeros(n_inputs, dtype=dtype))
        self.post_bias: nn.Parameter | None = None
        self.skip: nn.Parameter | None = None
        if self.is_transcoder:
            self.post_bias = nn.Parameter(torch.zeros(self.n_outputs, dtype=dtype))
        if skip:
            self.skip = nn.Parameter(torch.zeros(self.n_outputs, n_inputs, dtype=dtype))
        for side, width in (("input", n_inputs), ("target", self.n_outputs)):
            self.register_buffer(f"{side}_mean", torch.zeros(width, dtype=dtype))
            self.register_buffer(f"{side}_scale", torch.ones((), dtype=dtype))
        self.register_buffer("variance", torch.ones((), dtype=dtype))

    @property
    def rows(self) -> nn.Parameter:
        """``[l, o]``: the direction that each latent adds to the output."""
        return self.encoder if self.decoder is None else self.decoder

    @property
    def out_bias(self) -> nn.Parameter:
        """``[o]``: the output when no latent is active."""
        return self.pre_bias if self.post_bias is None else self.post_bias

    def per_latent(self) -> list[nn.Parameter]:
        """The parameters that have one row for each latent."""
        found = [self.encoder, self.latent_bias]
        return found if self.decoder is None else [*found, self.decoder]

    def pre_act(self, x: Tensor, latents: Tensor | None = None) -> Tensor:
        """Pre-activations ``[b, n] -> [b, l]``, of all latents or of some."""
        weight, bias = self._encoder_of(latents)
        with self.products(x):
            # The bias takes up pre_bias, so that the input needs no gradient: a third of the encoder's work.
            return F.linear(x, weight, bias - weight @ self.pre_bias).to(x.dtype)

    def decode(self, latents: Tensor, x: Tensor) -> Tensor:
        """The reconstruction ``[b, o]`` from latents ``[b, l]``; inputs ``[b, n]`` are for the skip
        connection."""
        with self.products(x):
            recons = (latents @ self.rows).to(x.dtype)
        return self.complete(recons, x)

    def complete(self, recons: Tensor, x: Tensor) -> Tensor:
        """The reconstruction ``[b, o]``, given the weighted sum ``[b, o]`` of the rows of active latents:
        summed over processes, plus bias and skip connection."""
        if not self.world.splits_latents or self.world.is_rank_zero:  # what all share is added once
            recons = self.add_rest(recons, x)
        return self.total(recons)

    def total(self, x: Tensor) -> Tensor:
        """The sum over all latents, given the sum ``x`` over those of this process."""
        return self.world.total_over_latents(x)

    def mean(self, x: Tensor, n_tokens: int) -> Tensor:
        """The mean over a batch of ``n_tokens``, given the mean ``x`` over the tokens of this process."""
        return self.world.mean_over_batch(x, n_tokens)

    def add_rest(self, recons: Tensor, x: Tensor) -> Tensor:
        """``recons`` ``[b, o]`` plus bias and skip connection."""
        recons = recons + self.out_bias
        if self.skip is None:
            return recons
        with self.products(x):
            return recons + F.linear(x, self.skip).to(x.dtype)

    def frozen_rest(self, x: Tensor) -> Tensor:
        """What :meth:`add_rest` adds, ``[b, o]`` or ``[o]``, without gradient."""
        with torch.no_grad():
            return self.add_rest(torch.zeros((), dtype=x.dtype, device=x.device), x)

    def products(self, x: Tensor) -> contextlib.AbstractContextManager[Any]:
        """A context in which matrix products run in bfloat16, if ``autocast`` was asked for."""
        if not self.autocast:
            return contextlib.nullcontext()
        return torch.autocast(x.device.type, torch.bfloat16)

    def _encoder_of(self, latents: Tensor | None) -> tuple[Tensor, Tensor]:
        if latents is None:
            return self.encoder, self.latent_bias
        return self.encoder[latents], self.latent_bias[latents]

    # ---- the length of directions --------------------------------------------------------------

    @torch.no_grad()
    def constrain_gradient(self, norm: DecoderNorm) -> None:
        """Before a step: remove the part of the gradient that only changes the length of a row.

        With ``"at_most_unit"``, rows shorter than 1 may change their length, and rows of length 1 may
        become shorter.
        """
        if norm == "free" or self.rows.grad is None:
            return
        for rows, grad in row_blocks(self.rows, self.rows.grad):
            along = torch.linalg.vecdot(grad, rows)
            squared = torch.linalg.vecdot(rows, rows)
            if norm == "at_most_unit":
                along = torch.where((squared >= 1 - 1e-5) & (along < 0), along, 0.0)
            grad.addcmul_(rows, (along / squared.clamp_min(1e-12))[:, None], value=-1)

    @torch.no_grad()
    def constrain_rows(self, norm: DecoderNorm) -> None:
        """After a step: scale rows to length 1, or to length 1 at most."""
        if norm == "free":
            return
        shortest = 1e-12 if norm == "unit" else 1.0
        for (rows,) in row_blocks(self.rows):
            length = torch.linalg.vector_norm(rows, dim=1, keepdim=True)
            rows.div_(length.clamp_min(shortest))

    # ---- the result ----------------------------------------------------------------------

    @torch.no_grad()
    def weights(self) -> dict[str, Tensor]:
        """The weights, by name, of an ``Autoencoder`` that computes the same from activations without
        normalisation.

        The nonlinearities commute with a positive factor, so the scale moves from the inputs to the
        latents, which then have the units of the target.
        """
        ratio = self.target_scale / self.input_scale
        weights = {
            "encoder.weight": self.encoder * ratio,
            "latent_bias": self.latent_bias * self.target_scale,
            "pre_bias": self.pre_bias * self.input_scale + self.input_mean,
        }
        if self.decoder is not None:
            weights["decoder.weight"] = self.decoder.t()
        if self.post_bias is not None:
            weights["post_bias"] = self.post_bias * self.target_scale + self.target_mean
        if self.skip is not None:
            weights["skip.weight"] = self.skip * ratio
            weights["post_bias"] -= weights["skip.weight"] @ self.input_mean
        return weights


_BLOCK = 4096  # rows drawn at a time


def _unit_rows(
    n_rows: int, width: int, generator: torch.Generator | None, dtype: torch.dtype, here: range
) -> Tensor:
    """The rows ``here`` of ``n_rows`` random unit rows, without ever holding all of them."""
    if len(here) == n_rows:
        return F.normalize(torch.randn(n_rows, width, generator=generator, dtype=dtype), dim=1)
    parts = []
    # torch draws the same numbers as in one piece, if each part has a multiple of 16 of them and the last
    # part is not small.
    ends = [*range(_BLOCK, n_rows - _BLOCK + 1, _BLOCK), n_rows]
    for start, end in zip([0, *ends], ends, strict=False):
        drawn = torch.randn(end - start, width, generator=generator, dtype=dtype)
        own = drawn[max(0, here.start - start) : max(0, here.stop - start)]
        parts.append(F.normalize(own, dim=1))
    return torch.cat(parts)
