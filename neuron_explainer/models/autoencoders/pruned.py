"""Autoencoders without some of their latents, because these never fire or hardly ever do.

Shape legend: ``n`` inputs, ``o`` outputs, ``l`` latents, ``…`` any leading axes.
"""

from typing import Any, cast

import torch
from torch import Tensor, nn

from neuron_explainer.errors import InputError
from neuron_explainer.models.autoencoder import Autoencoder, AutoencoderOutput, Code
from neuron_explainer.models.autoencoders.fast_encode import SPARSE_SHARE, needs_graph
from neuron_explainer.models.autoencoders.input_normalization import InputStats
from neuron_explainer.models.autoencoders.latents import Latents
from neuron_explainer.models.checkpoints.autoencoders.state import STATISTICS, select_latents

ACTIVATION_FREQUENCY_THRESHOLD_FOR_DEAD_LATENTS = 1e-8


def get_decoder_weight(autoencoder: Autoencoder) -> Tensor:
    """:attr:`Autoencoder.directions`, under the original's name."""
    return autoencoder.directions


def count_dead_latents(autoencoder: Autoencoder) -> int:
    """Latents that were active on less than 1e-8 of the training tokens, by its statistics."""
    return int((~_alive(autoencoder)).sum())


def _alive(autoencoder: Autoencoder) -> Tensor:
    frequency = autoencoder.latents_activation_frequency
    if not frequency.any():
        raise InputError(
            f"{autoencoder._name()}: its statistics say that no latent was ever active: they were "
            "not recorded, and cannot tell which latents are dead."
        )
    return frequency >= ACTIVATION_FREQUENCY_THRESHOLD_FOR_DEAD_LATENTS


def omit_dead_latents(autoencoder: Autoencoder) -> Autoencoder:
    """The autoencoder without its dead latents in memory; every index stays what it is."""
    return omit_least_active_latents(autoencoder, int(_alive(autoencoder).sum()))


def omit_least_active_latents(
    autoencoder: Autoencoder, n_latents_to_keep: int, preserve_indices: bool = True
) -> Autoencoder:
    """The autoencoder with only its most active latents in memory.

    Activity is ``latents_activation_frequency``; of equally active latents the first are kept. Biases,
    nonlinearity, tying and input normalisation stay. With TopK, the place among the ``k`` of a
    latent that is left out goes to the next.

    Args:
        autoencoder: left as it is.
        n_latents_to_keep: how many.
        preserve_indices: if True, latents keep their indices: the result is a
            :class:`PrunedAutoencoder`. If False, it is an ordinary, smaller autoencoder in which the
            latents that are left have moved together.
    """
    n_latents = autoencoder.n_latents
    if not 1 <= n_latents_to_keep <= n_latents:
        raise InputError(
            f"{autoencoder._name()}: n_latents_to_keep must lie in 1 to {n_latents}, found "
            f"{n_latents_to_keep}."
        )
    if isinstance(autoencoder, PrunedAutoencoder):
        raise InputError(f"{autoencoder._name()}: latents were left out already; load it whole.")
    if preserve_indices and n_latents_to_keep == n_latents:
        return autoencoder
    order = autoencoder.latents_activation_frequency.argsort(descending=True, stable=True)
    kept = order[:n_latents_to_keep].sort().values
    return PrunedAutoencoder(autoencoder, kept) if preserve_indices else _reduced(autoencoder, kept)


def _reduced(whole: Autoencoder, kept: Tensor) -> Autoencoder:
    """An ordinary autoencoder of the latents ``kept`` only."""
    return Autoencoder.from_state_dict(select_latents(whole.state_dict(), kept), **whole.facts)


class PrunedAutoencoder(Autoencoder):
    """A smaller autoencoder that is used by the indices of the whole one it comes from.

    It wraps :attr:`small`, which has only the latents :attr:`kept`: what goes out gets its place among
    all ``l`` latents, and what comes in is looked up there. Latents that were left out are zero, before
    and after the nonlinearity. Statistics are those of all latents. This is a way of using an
    autoencoder, not of storing one: it is not saved.
    """

    small: Autoencoder
    """Has the weights; its parts (``encoder``, ``pre_bias``, …) are found here too."""
    kept: Tensor
    """``[kept]`` int64, ascending: the latents that are there."""

    def __init__(self, whole: Autoencoder, kept: Tensor) -> None:
        nn.Module.__init__(self)
        # Buffers first: torch refuses one whose name can be found, as `small`'s then can.
        for name in STATISTICS:
            self.register_buffer(name, getattr(whole, name).clone())
        self.register_buffer("kept", kept.clone())
        self.small = _reduced(whole, kept)
        for name in ("n_latents", "group_sizes", "n_inputs", "n_outputs", "is_transcoder", "tied"):
            setattr(self, name, getattr(whole, name))
        for name, fact in whole.facts.items():
            setattr(self, name, fact)
        self.train(whole.training)

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("small"), name)

    # ---- from some latents to all, and back ----------------------------------------------------------

    def placed(self, latents: Tensor) -> Tensor:
        """``[…, kept] -> […, l]``, each in its place among all."""
        shape = (*latents.shape[:-1], self.n_latents)
        return latents.new_zeros(shape).index_copy(-1, self.kept, latents)

    def _placed_sparse(self, latents: Latents) -> Latents:
        return Latents(latents.values, self.kept[latents.indices], self.n_latents)

    def _looked_up(self, latents: Tensor | Latents) -> Tensor | Latents:
        """The inverse of both; an error if it would lose an edit of a latent that is not there."""
        self._check_latents(latents)
        found: Tensor | Latents
        if isinstance(latents, Latents):
            place = self.kept.new_full((self.n_latents,), -1)
            place[self.kept] = torch.arange(len(self.kept), device=place.device)
            indices = place[latents.indices]
            lost = latents.indices[(indices < 0) & (latents.values != 0)]
            found = Latents(latents.values, indices.clamp(min=0), len(self.kept))
        else:
            found, lost = latents.index_select(-1, self.kept), self.kept[:0]
            if (found != 0).sum() != (latents != 0).sum():
                active = (latents != 0).reshape(-1, self.n_latents).any(0)
                lost = active.index_fill(0, self.kept, False).nonzero().flatten()
        if len(lost):
            raise InputError(
                f"{self._name()}: latent {int(lost[0])} is not zero but was left out of memory; load "
                "the autoencoder with omit_dead_latents=False to set it."
            )
        return found

    # ---- the wrapped methods ---------------------------------------------------------------------------

    @property
    def directions(self) -> Tensor:
        rows = self.small.directions
        return rows.new_zeros(self.n_latents, rows.shape[1]).index_copy(0, self.kept, rows)

    def normalize(self, x: Tensor) -> tuple[Tensor, InputStats | None]:
        return self.small.normalize(x)

    def encode_pre_act(self, x: Tensor, latent_slice: slice = slice(None)) -> Tensor:
        return self.placed(self.small.encode_pre_act(x))[..., latent_slice]

    def encode(self, x: Tensor) -> Tensor:
        return self.placed(self.small.encode(x))

    def encode_sparse(self, x: Tensor, *, chunk_bytes: int | None = None) -> Latents:
        return self._placed_sparse(self.small.encode_sparse(x, chunk_bytes=chunk_bytes))

    def code(self, x: Tensor) -> Code[Tensor]:
        code = self.small.code(x)
        return Code(
            self.placed(code.latents),
            code.stats,
            lambda latents: code.decode(self._looked_up(latents)),
        )

    def code_sparse(self, x: Tensor, *, chunk_bytes: int | None = None) -> Code[Latents]:
        code = self.small.code_sparse(x, chunk_bytes=chunk_bytes)
        return Code(
            self._placed_sparse(code.latents),
            code.stats,
            lambda latents: code.decode(self._looked_up(latents)),
        )

    def decode(self, latents: Tensor | Latents, stats: InputStats | None = None) -> Tensor:
        return self.small.decode(self._looked_up(latents), stats)

    def denormalize(self, recons: Tensor, stats: InputStats | None) -> Tensor:
        return self.small.denormalize(recons, stats)

    def forward(self, x: Tensor) -> AutoencoderOutput:
        pre_act, latents, recons = self.small(x)
        return AutoencoderOutput(self.placed(pre_act), self.placed(latents), recons)

    def reconstruct(
        self, x: Tensor, *, chunk_bytes: int | None = None, sparse_share: float = SPARSE_SHARE
    ) -> Tensor:
        self._check_width(x, self.n_inputs, "input")
        if needs_graph(self, x):
            return cast(AutoencoderOutput, self(x)).recons
        return self.small.reconstruct(x, chunk_bytes=chunk_bytes, sparse_share=sparse_share)

    def _save_to_state_dict(self, *args: Any, **kwargs: Any) -> None:
        """Refused: it would be read as a smaller autoencoder, in which every index has moved."""
        raise InputError(f"{self._name()}: latents were left out; save or copy the whole one.")

    def save(self, *args: Any, **kwargs: Any) -> None:
        """Refused, as ``state_dict()`` is."""
        self.state_dict()

    def __repr__(self) -> str:
        return f"{super().__repr__().removesuffix(')')}, in memory={len(self.kept)})"
