"""Dead latents, which nothing activates any more: how to count them, and two ways to revive them.

A third way, AuxK, belongs to the objectives that have a fixed number of active latents.

Shape legend: ``b`` tokens of a batch, ``n`` inputs, ``o`` outputs, ``l`` latents, ``d`` dead ones.
"""

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from neuron_explainer.dictionaries.dictionary import LearnedDictionary
from neuron_explainer.dictionaries.objectives import SparseLatents


class ActivityCounter(nn.Module):
    """Counts how many tokens ago each latent was last active."""

    silent: Tensor
    """``[l + 1]`` int64. The last entry belongs to no latent: entries that are not active point to it. A
    boolean mask would have to be turned into indices, which waits for the device."""

    def __init__(self, n_latents: int) -> None:
        super().__init__()
        self.register_buffer("silent", torch.zeros(n_latents + 1, dtype=torch.int64))

    @torch.no_grad()
    def update(self, latents: Tensor | SparseLatents, n_tokens: int) -> None:
        """Update the counters with one batch's latents."""
        self.silent += n_tokens
        if isinstance(latents, SparseLatents):
            nowhere = len(self.silent) - 1
            hit = torch.where(latents.values > 0, latents.indices, nowhere)
            self.silent.index_fill_(0, hit.flatten(), 0)
        else:
            self.silent[:-1].masked_fill_((latents > 0).any(0), 0)

    def dead(self, after: int) -> Tensor:
        """``[d]`` int64: latents that were not active for ``after`` tokens or more."""
        return (self.silent[:-1] >= after).nonzero().flatten()

    @torch.no_grad()
    def revive(self, latents: Tensor) -> None:
        """Reset the counters of ``latents`` ``[d]``."""
        self.silent.index_fill_(0, latents, 0)


def ghost_loss(dictionary: LearnedDictionary, x: Tensor, error: Tensor, dead: Tensor) -> Tensor:
    """A loss ``[]`` that pulls dead latents towards what the living ones leave unexplained.

        g = exp(dead pre-activations) · their rows, scaled to half the length of the error e
        Σ (g - e)² · stop(e² / ((g - e)² + 1e-6))   summed over the width, averaged over tokens

    The scalings are constants to the gradient, and so is ``error`` ``[b, o]``: only dead latents
    get one, and the value is that of the squared error. (Where both losses are divided by a norm
    for each token, as in gpt2-dictionary, the norms cancel here.)

    Jermyn and Templeton 2024, "Ghost grads: an improvement on resampling".
    """
    pre_act = dictionary.pre_act(x, dead)
    # Without this factor for each token, which the scaling removes again, exp could overflow.
    pre_act = pre_act - pre_act.detach().amax(1, keepdim=True)
    ghost = pre_act.exp() @ dictionary.rows[dead]
    length = torch.linalg.vector_norm(error, dim=1, keepdim=True)
    ghost_length = torch.linalg.vector_norm(ghost.detach(), dim=1, keepdim=True)
    distance = (ghost * (length / (1e-6 + 2 * ghost_length)) - error).square()
    rescaled: Tensor = distance * (error.square() / (distance + 1e-6)).detach()
    return rescaled.sum() / len(error)


@torch.no_grad()
def resample(
    dictionary: LearnedDictionary,
    dead: Tensor,
    x: Tensor,
    target: Tensor,
    error: Tensor,
    generator: torch.Generator,
) -> Tensor:
    """Give dead latents the directions of activations that are badly reconstructed.

    Activations of the batch are drawn without replacement, with a probability proportional to the square
    of their squared error. The latent's direction becomes that of the activation; its encoder row has
    the same direction and a fifth of the mean length of living latents' rows; its bias is 0.

    Returns the latents ``[≤ d]`` that were changed, at most one for each activation of the batch.
    Bricken et al. 2023, "Towards monosemanticity", appendix on neuron resampling.
    """
    weight = error.square().sum(1).double().square().cpu()
    n = min(len(dead), int((weight > 0).sum()))
    if n == 0:
        return dead[:0]
    chosen = torch.multinomial(weight, n, generator=generator).to(x.device)
    alive = torch.ones(dictionary.n_latents, dtype=torch.bool, device=x.device)
    alive[dead] = False
    dead = dead[:n]
    lengths = torch.linalg.vector_norm(dictionary.encoder[alive], dim=1)
    length = 0.2 * lengths.mean() if len(lengths) else torch.tensor(0.2)
    inputs = nn.functional.normalize(x[chosen] - dictionary.pre_bias, dim=1)
    if dictionary.decoder is None:
        dictionary.encoder[dead] = inputs
    else:
        targets = target[chosen] - dictionary.out_bias
        dictionary.decoder[dead] = nn.functional.normalize(targets, dim=1)
        dictionary.encoder[dead] = inputs * length
    dictionary.latent_bias[dead] = 0
    return dead


@torch.no_grad()
def forget_moments(
    parameters: Iterable[nn.Parameter], optimizer: torch.optim.Optimizer, latents: Tensor
) -> None:
    """Reset Adam's moments of ``latents`` in ``parameters``, which have one row for each latent."""
    for parameter in parameters:
        state: dict[str, Any] = optimizer.state.get(parameter, {})
        for moment in ("exp_avg", "exp_avg_sq"):
            if moment in state:
                state[moment][latents] = 0
