"""From vectors to words: the nearest code, its gradient, and how the codebook learns.

Shape legend: ``b`` boards, ``k`` words of a sentence, ``d`` width, ``w`` codes of the codebook.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

COMMITMENT, USAGE = 0.25, 0.25
"""Weights of the two small losses (van den Oord et al. 2017, and the paper's program)."""
DECAY = 0.99
"""Of the moving averages."""
DEAD = 0.01
"""A code whose average number of vectors in a step is below this is moved to a vector of the batch."""


class Quantised(NamedTuple):
    """What the quantiser made of vectors ``[b, k, d]``."""

    vectors: Tensor
    """``[b, k, d]``: the codes; the gradient passes to the vectors unchanged (straight-through)."""
    words: Tensor
    """``[b, k]``: the numbers of the codes."""
    loss: Tensor
    """What draws vectors and codes together."""


class VectorQuantiser(nn.Module):
    """Replaces each vector by the nearest of ``n_codes`` codes (van den Oord et al. 2017).

    A forward pass changes nothing. With moving averages (``ema``), :meth:`update` moves each code to the
    mean of the vectors that chose it lately; no optimiser touches it. Without, the loss moves the codes.

    Args:
        n_codes: size of the codebook.
        width: length of a code.
        ema: how the codebook learns.
        n_kept: this many codes at the end are never moved because they are dead.
    """

    def __init__(self, n_codes: int, width: int, ema: bool, n_kept: int = 1) -> None:
        super().__init__()
        self.ema, self.n_kept = ema, n_kept
        self.codebook = nn.Parameter(torch.randn(n_codes, width), requires_grad=not ema)
        """``[w, d]``."""
        if ema:
            # A parameter only so that it counts as one, as in the paper's program.
            self.sums = nn.Parameter(self.codebook.detach().clone(), requires_grad=False)
            """``[w, d]``: moving average of the sum of the vectors that chose a code."""
            self.register_buffer("counts", torch.ones(n_codes))
            self.counts: Tensor
            """``[w]``: moving average of their number."""

    def nearest(self, x: Tensor) -> Tensor:
        """The number of the nearest code of each vector, ``[..., d] -> [...]``."""
        codes = self.codebook.detach()
        return (codes.square().sum(1) - 2 * x.detach() @ codes.T).argmin(-1)

    def codes(self, words: Tensor) -> Tensor:
        """The codes of words, ``[...] -> [..., d]``."""
        return F.embedding(words, self.codebook)

    def forward(self, x: Tensor) -> Quantised:
        """Quantise vectors ``[b, k, d]``."""
        words = self.nearest(x)
        codes = self.codes(words)
        usage = torch.bincount(words.flatten(), minlength=len(self.codebook)) / words.numel()
        # The usage has no gradient: it is a count. It is part of the loss as the paper's program has it.
        loss = COMMITMENT * F.mse_loss(x, codes.detach())
        loss = loss + USAGE * (usage - 1 / len(usage)).square().mean()
        if not self.ema:
            loss = loss + F.mse_loss(codes, x.detach())
        return Quantised(straight_through(x, codes), words, loss)

    @torch.no_grad()
    def update(self, x: Tensor, words: Tensor, generator: torch.Generator) -> None:
        """Let the codebook learn from vectors ``[b, k, d]`` and the words that they became."""
        if not self.ema:
            return
        x, words = x.detach().flatten(0, 1), words.flatten()
        n = torch.bincount(words, minlength=len(self.codebook)).to(x.dtype)
        self.counts.mul_(DECAY).add_(n, alpha=1 - DECAY)
        self.sums.mul_(DECAY).add_(
            torch.zeros_like(self.sums).index_add_(0, words, x), alpha=1 - DECAY
        )
        # Codes that nothing uses: their averages would fade away, and 0 / 0 be their place.
        dead = self.counts < DEAD
        if dead.any():
            scale = torch.where(dead, DEAD / self.counts, 1.0)
            self.sums.mul_(scale[:, None])
            self.counts.mul_(scale)
            dead[len(dead) - self.n_kept :] = False
            chosen = torch.randint(len(x), (int(dead.sum()),), generator=generator).to(x.device)
            self.sums[dead], self.counts[dead] = x[chosen], 1.0
        self.codebook.copy_(self.sums / self.counts[:, None])


def straight_through(x: Tensor, codes: Tensor) -> Tensor:
    """The codes, with the gradient of ``x``: d codes / d x is taken to be the identity."""
    return x + (codes - x).detach()
