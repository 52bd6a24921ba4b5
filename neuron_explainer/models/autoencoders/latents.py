"""Sparse latents, the few active ones of each row: :class:`Latents`.

Shape legend: ``k`` entries kept of each row, ``l`` latents, ``o`` outputs, ``…`` any leading axes.
"""

from collections.abc import Sequence
from typing import NamedTuple, Self

import torch
import torch.nn.functional as F
from torch import Tensor

from neuron_explainer.models.checks import check_tensor
from neuron_explainer.tables import by_shape


class Latents(NamedTuple):
    """The active latents of each row; all others are zero."""

    values: Tensor
    """``[…, k]``; 0 where fewer than ``k`` are active."""
    indices: Tensor
    """``[…, k]`` int64; an index occurs twice in a row only where its value is 0."""
    n_latents: int

    def __repr__(self) -> str:
        return by_shape(self)

    def dense(self) -> Tensor:
        """Return the dense latents ``[…, l]``, differentiable with respect to the values."""
        zeros = self.values.new_zeros(*self.values.shape[:-1], self.n_latents)
        return zeros.scatter_add(-1, self.indices, self.values)

    @classmethod
    def of(cls, dense: Tensor) -> Self:
        """Return the entries of dense latents ``[…, l]`` that are not zero.

        Rows with fewer entries than the longest are padded with value 0 and index 0. Indices ascend within a
        row. The result is differentiable.
        """
        check_tensor(dense, "latents")
        rows = dense.reshape(-1, dense.shape[-1])
        row, column = rows.detach().nonzero(as_tuple=True)
        counts = torch.bincount(row, minlength=len(rows))
        place = torch.arange(len(row), device=row.device) - (counts.cumsum(0) - counts)[row]
        width = int(counts.max()) if counts.numel() else 0
        indices = column.new_zeros(len(rows), width).index_put((row, place), column)
        values = rows.new_zeros(len(rows), width).index_put((row, place), rows[row, column])
        shape = (*dense.shape[:-1], width)
        return cls(values.view(shape), indices.view(shape), dense.shape[-1])

    @classmethod
    def cat(cls, parts: Sequence["Latents"]) -> Self:
        """Join parts ``[·, k]`` of one autoencoder row after row, padded to the widest part."""
        width = max(part.values.shape[-1] for part in parts)
        pads = [(0, width - part.values.shape[-1]) for part in parts]
        values = [F.pad(part.values, pad) for part, pad in zip(parts, pads, strict=True)]
        indices = [F.pad(part.indices, pad) for part, pad in zip(parts, pads, strict=True)]
        return cls(torch.cat(values), torch.cat(indices), parts[0].n_latents)

    def unflatten(self, shape: Sequence[int]) -> Self:
        """Return rows ``[b, k]`` in the shape ``[*shape, k]``."""
        values, indices, n_latents = self
        return type(self)(
            values.view(*shape, values.shape[-1]),
            indices.view(*shape, indices.shape[-1]),
            n_latents,
        )

    def decode(self, directions: Tensor) -> Tensor:
        """Return the sum of the latents' directions ``[l, o]``, each times the latent's value: ``[…, o]``."""
        width = self.values.shape[-1]
        if not self.values.numel():
            return directions.new_zeros(*self.values.shape[:-1], directions.shape[1])
        recons = F.embedding_bag(
            self.indices.reshape(-1, width),
            directions.contiguous(),
            per_sample_weights=self.values.reshape(-1, width).to(directions.dtype),
            mode="sum",
        )
        return recons.view(*self.values.shape[:-1], directions.shape[1])
