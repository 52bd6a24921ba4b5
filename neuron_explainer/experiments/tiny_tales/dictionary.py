"""One TopK autoencoder while it is being trained: its parameters, its loss, its care of dead latents.

Follows Gao et al. 2024 (arXiv:2406.04093): TopK activation, decoder rows of unit norm, encoder
initialised as the decoder's transpose, AuxK loss for latents that have not fired for a while.
Inputs are centred and scaled by constants measured beforehand, so that one learning rate suits all
locations; ``finished`` folds the constants into the weights of a plain ``Autoencoder``.

Shape legend: ``b`` tokens of a batch, ``n`` inputs, ``l`` latents, ``k`` active latents.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

AUX_K = 64
GROUP = 8  # of pre-activations, in the search for the largest
AUX_COEFFICIENT = 1 / 32


@dataclass(frozen=True)
class DictionaryConfig:
    """Latents in all, how many of them may be active for one token, and Adam's learning rate."""

    n_latents: int
    k: int
    lr: float = 2e-3


@dataclass(frozen=True)
class Loss:
    """What is minimised, and the part of it that is the share of variance not explained."""

    total: Tensor
    fvu: Tensor


def largest(x: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """``x.topk(k, dim=1)`` in any order, by groups: two to three times faster on CPUs.

    The k largest values lie within the k groups of largest maxima.
    """
    n_groups = x.shape[1] // GROUP
    if x.shape[1] % GROUP or n_groups < 2 * k:
        return x.topk(k, dim=1, sorted=False)
    groups = x.reshape(len(x), GROUP, n_groups)  # a group is a column: maxima are taken row by row
    best = groups.amax(1).topk(k, dim=1, sorted=False).indices
    candidates = groups.gather(2, best[:, None].expand(-1, GROUP, -1)).flatten(1)
    values, chosen = candidates.topk(k, dim=1, sorted=False)
    return values, chosen // k * n_groups + best.gather(1, chosen % k)


class Dictionary(nn.Module):
    """Encoder and decoder for the activations of one location.

    Args:
        config: latents in all and active ones.
        sample: ``[b, n]`` activations from which mean, scale and first directions are taken.
        generator: draws the first directions.
    """

    mean: Tensor
    scale: Tensor
    tokens_since_active: Tensor

    def __init__(
        self, config: DictionaryConfig, sample: Tensor, generator: torch.Generator
    ) -> None:
        super().__init__()
        n_latents, n_inputs = config.n_latents, sample.shape[1]
        self.k = config.k
        mean = sample.mean(0)
        self.register_buffer("mean", mean)
        self.register_buffer("scale", (sample - mean).square().mean().sqrt())
        directions = F.normalize(torch.randn(n_latents, n_inputs, generator=generator), dim=1)
        # Rows are latents in both matrices; the Autoencoder keeps the decoder transposed.
        self.encoder = nn.Parameter(directions.clone())
        self.decoder = nn.Parameter(directions)
        self.latent_bias = nn.Parameter(torch.zeros(n_latents))
        self.pre_bias = nn.Parameter(torch.zeros(n_inputs))
        self.register_buffer("tokens_since_active", torch.zeros(n_latents, dtype=torch.long))

    def loss(self, activations: Tensor, dead_after: int) -> Loss:
        """Reconstruct ``[b, n]``; latents silent for ``dead_after`` tokens get the AuxK loss."""
        x = (activations - self.mean) / self.scale
        pre_act = self._pre_act(x, self.encoder, self.latent_bias)
        values, latents = largest(pre_act, self.k)
        values = values.float().relu()
        error = x - self.pre_bias - self._decode(values, latents)
        fvu = error.square().mean()  # x has unit variance
        dead = (self.tokens_since_active > dead_after).nonzero().flatten()
        self._count(values.detach(), latents)
        if not len(dead):
            return Loss(fvu, fvu.detach())
        return Loss(fvu + AUX_COEFFICIENT * self._aux_loss(x, error.detach(), dead), fvu.detach())

    def _pre_act(self, x: Tensor, encoder: Tensor, latent_bias: Tensor) -> Tensor:
        """``[b, l]``. The bias is taken apart so that ``x`` needs no gradient, a third of the work."""
        with torch.autocast("cpu", torch.bfloat16):
            return F.linear(x, encoder, latent_bias - encoder @ self.pre_bias)

    def _decode(self, values: Tensor, latents: Tensor) -> Tensor:
        """``[b, k]``, ``[b, k]`` -> ``[b, n]``: the sum of the active latents' rows alone."""
        return F.embedding_bag(latents, self.decoder, per_sample_weights=values, mode="sum")

    def _aux_loss(self, x: Tensor, error: Tensor, dead: Tensor) -> Tensor:
        """How badly the best of the dead latents explain what the live ones leave over."""
        pre_act = self._pre_act(x, self.encoder[dead], self.latent_bias[dead])
        values, chosen = pre_act.topk(min(AUX_K, len(dead)), dim=1, sorted=False)
        explained = self._decode(values.float().relu(), dead[chosen])
        return (error - explained).square().mean() / error.square().mean()

    @torch.no_grad()
    def _count(self, values: Tensor, latents: Tensor) -> None:
        self.tokens_since_active += len(values)
        self.tokens_since_active[latents[values > 0]] = 0

    def dead_share(self, dead_after: int) -> float:
        """Share of latents that have been silent for ``dead_after`` tokens."""
        return float((self.tokens_since_active > dead_after).float().mean())

    @torch.no_grad()
    def keep_gradient_tangential(self) -> None:
        """Before a step: drop the gradient along decoder rows, which only moves their norm."""
        if self.decoder.grad is not None:
            along = (self.decoder.grad * self.decoder).sum(1, keepdim=True)
            self.decoder.grad -= along * self.decoder

    @torch.no_grad()
    def normalise_decoder(self) -> None:
        """After a step: back to rows of unit norm, so that latents are in units of the input."""
        self.decoder.div_(self.decoder.norm(dim=1, keepdim=True))

    @torch.no_grad()
    def folded_state_dict(self) -> dict[str, Tensor]:
        """The same function of raw activations, in the layout of ``Autoencoder``.

        ReLU and TopK commute with a positive factor, so the scale moves from the inputs to the
        latents: they come out in the units of the activation.
        """
        return {
            "pre_bias": self.pre_bias * self.scale + self.mean,
            "encoder.weight": self.encoder.detach().clone(),
            "latent_bias": self.latent_bias * self.scale,
            "decoder.weight": self.decoder.detach().t().contiguous(),
        }
