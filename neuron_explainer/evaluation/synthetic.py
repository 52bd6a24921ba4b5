"""Activations made of known features, after SynthSAEBench (Chanin & Garriga-Alonso 2026, arXiv:2602.14687).

Each token is a bias plus a sum of unit directions, one for each feature that is active on it.

- How often: the rank of a feature gives its probability by Zipf's law, rescaled to lie between ``least``
  and ``most``.
- Which together: a feature is active where a normal variable exceeds a threshold. These variables are
  correlated through ``rank`` common factors.
- Hierarchy: the first features form ``n_roots`` trees. A child is active only where its parent is, and
  never together with a sibling; if several would be, one of them is drawn. Probabilities of children are
  raised so that they are about what Zipf's law says.
- How strongly: normal with a mean that falls linearly from the most frequent feature to the rarest and a
  standard deviation of the feature's own, cut at 0; a child's value is scaled by its parent's value over
  the parent's mean.

The defaults are the published 16k model at 1/16 of its size.

Shape legend: ``t`` tokens, ``n`` width, ``m`` features, ``r`` rank.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from neuron_explainer.errors import InputError
from neuron_explainer.models.checks import check_seed
from neuron_explainer.settings import check_types
from neuron_explainer.tables import by_shape


@dataclass(frozen=True)
class SyntheticConfig:
    """Sizes and statistics of synthetic activations."""

    n_features: int = 1024
    width: int = 96
    n_roots: int = 8
    """Number of trees; 0 for features without a hierarchy."""
    branching: int = 4
    """Children of each feature that has any."""
    depth: int = 3
    """Levels of children below the roots."""
    exponent: float = 0.5
    """Of Zipf's law."""
    most: float = 0.4
    """Probability of the most frequent feature."""
    least: float = 5e-4
    """Probability of the rarest one."""
    rank: int = 25
    """Number of common factors; 0 for features that are independent but for the hierarchy."""
    correlation: float = 0.1
    """Standard deviation of the factors' weights."""
    first_magnitude: float = 5.0
    """Mean value of the most frequent feature where it is active."""
    last_magnitude: float = 4.0
    """Mean value of the rarest one."""
    magnitude_sd: tuple[float, float] = (0.5, 0.5)
    """Mean and standard deviation of the normal distribution whose absolute values are the features'
    standard deviations."""
    bias: float = 0.5
    """Length of the vector that is added to all tokens."""
    orthogonal_steps: int = 100
    """Steps of gradient descent that push the directions apart."""
    orthogonal_lr: float = 3e-4
    seed: int = 42
    """Decides everything but which tokens are drawn."""

    def __post_init__(self) -> None:
        check_types(self)
        check_seed(self.seed)
        for name in ("n_features", "width"):
            if getattr(self, name) < 1:
                raise InputError(f"{name} must be at least 1, found {getattr(self, name)}.")
        for name in ("n_roots", "branching", "depth", "rank", "orthogonal_steps"):
            if getattr(self, name) < 0:
                raise InputError(f"{name} must be at least 0, found {getattr(self, name)}.")
        if not 0 < self.least <= self.most < 1:
            raise InputError(
                f"expected 0 < least <= most < 1, found least {self.least} and most {self.most}."
            )
        if self.rank * self.correlation**2 >= 1:
            raise InputError(
                f"rank {self.rank} with correlation {self.correlation}: the common factors would explain "
                "all of the variance; rank times the square of correlation must be below 1."
            )


class SyntheticBatch(NamedTuple):
    """Tokens and the truth about them."""

    x: Tensor
    """``[t, n]``"""
    features: Tensor
    """``[t, m]``: the value of each feature, 0 where it is not active."""

    def __repr__(self) -> str:
        return by_shape(self)


class SyntheticActivations:
    """A source of activations with known features; all of it follows from the config."""

    def __init__(self, config: SyntheticConfig | None = None) -> None:
        self.config = c = SyntheticConfig() if config is None else config
        generator = torch.Generator().manual_seed(c.seed)
        rows = F.normalize(torch.randn(c.n_features, c.width, generator=generator), dim=1)
        self.directions = _pushed_apart(rows, c.orthogonal_steps, c.orthogonal_lr)
        """``[m, n]``, of length 1."""
        self.bias = c.bias * F.normalize(torch.randn(c.width, generator=generator), dim=0)
        """``[n]``"""
        self.probability = zipf(c.n_features, c.exponent, c.most, c.least)
        """``[m]``: how often Zipf's law has each feature active, most frequent first."""
        self.levels = _levels(c)
        """For each level of children, the parent of each: features and parents."""
        self.mean = torch.linspace(c.first_magnitude, c.last_magnitude, c.n_features)
        """``[m]``: mean value where active."""
        centre, sd = c.magnitude_sd
        self.sd = (centre + sd * torch.randn(c.n_features, generator=generator)).abs()
        """``[m]``: standard deviation of the value where active."""
        self._weights = c.correlation * torch.randn(c.n_features, c.rank, generator=generator)
        self._rest = (1 - self._weights.square().sum(dim=1)).clamp(min=0.01).sqrt()
        wanted = (self.probability * self._compensation()).clamp(max=1 - 1e-6)
        variance = self._weights.square().sum(dim=1) + self._rest.square()
        self._threshold = torch.special.ndtri(1 - wanted.double()).float() * variance.sqrt()

    @property
    def parents(self) -> Tensor:
        """``[m]``: the parent of each feature; -1 for roots and for features outside of the trees."""
        parents = torch.full((self.config.n_features,), -1)
        for children, above in self.levels:
            parents[children] = above
        return parents

    def sample(self, n_tokens: int, seed: int | torch.Generator = 0) -> SyntheticBatch:
        """Draw tokens; the same ones for the same seed."""
        generator = seed
        if not isinstance(generator, torch.Generator):
            generator = torch.Generator().manual_seed(generator)
        c = self.config
        normal = torch.randn(n_tokens, c.n_features, generator=generator).mul_(self._rest)
        if c.rank:
            normal += torch.randn(n_tokens, c.rank, generator=generator) @ self._weights.t()
        token, feature = (normal > self._threshold).nonzero(as_tuple=True)
        noise = torch.randn(len(token), generator=generator)
        values = torch.zeros(n_tokens, c.n_features)
        values[token, feature] = (self.mean[feature] + self.sd[feature] * noise).relu()
        for children, parents in self.levels:
            values[:, children] = self._of_children(values, children, parents, generator)
        return SyntheticBatch(values @ self.directions + self.bias, values)

    def batches(self, n_tokens: int, batch_size: int, seed: int = 0) -> Iterator[SyntheticBatch]:
        """Draw tokens in batches, all from one stream; an incomplete last batch is left out."""
        generator = torch.Generator().manual_seed(seed)
        for _ in range(n_tokens // batch_size):
            yield self.sample(batch_size, generator)

    def _of_children(
        self, values: Tensor, children: Tensor, parents: Tensor, generator: torch.Generator
    ) -> Tensor:
        """One level's values ``[t, c]``: scaled by the parent's, and of siblings at most one."""
        above = values[:, parents]
        found = values[:, children] * (above / self.mean[parents])
        groups = found.view(len(found), -1, self.config.branching)
        active = groups > 0
        if (crowded := active.sum(dim=2, keepdim=True) > 1).any():
            lots = torch.rand(groups.shape, generator=generator).masked_fill_(~active, -1)
            drawn = F.one_hot(lots.argmax(dim=2), self.config.branching).bool()
            groups = groups.masked_fill(crowded & ~drawn, 0)
        result: Tensor = groups.flatten(1)
        return result

    def _compensation(self) -> Tensor:
        """``[m]``: factors for the probabilities of children, which parents and siblings lower."""
        factor = torch.ones(self.config.n_features)
        for children, parents in self.levels:
            own, above = self.probability[children], self.probability[parents]
            siblings = own.view(-1, self.config.branching).sum(dim=1)
            others = siblings.repeat_interleave(self.config.branching) - own
            factor[children] = (1 + others / above) / above
        return factor


def zipf(n: int, exponent: float, most: float, least: float) -> Tensor:
    """Probabilities ``[n]`` in falling order that follow Zipf's law, rescaled to ``least`` to ``most``."""
    raw = torch.arange(1, n + 1, dtype=torch.float64) ** -exponent
    if n == 1 or exponent == 0:
        return torch.full((n,), most)
    scaled = least + (most - least) * (raw - raw[-1]) / (raw[0] - raw[-1])
    return scaled.float()


def _levels(config: SyntheticConfig) -> list[tuple[Tensor, Tensor]]:
    """Features are numbered level after level, most frequent first: roots, their children, and so on.

    Only whole groups of siblings are made, while there are features.
    """
    found = []
    parents = torch.arange(min(config.n_roots, config.n_features))
    first = len(parents)
    for _ in range(config.depth):
        room = (config.n_features - first) // max(1, config.branching)
        parents = parents[:room]
        if not len(parents) or not config.branching:
            break
        children = torch.arange(first, first + len(parents) * config.branching)
        found.append((children, parents.repeat_interleave(config.branching)))
        parents, first = children, first + len(children)
    return found


def _pushed_apart(rows: Tensor, steps: int, lr: float) -> Tensor:
    """Unit rows whose squared cosines with each other were lowered by Adam."""
    with torch.enable_grad():
        weight = rows.clone().requires_grad_()
        optimizer = torch.optim.Adam([weight], lr=lr)
        for _ in range(steps):
            # Σ (W Wᵀ - 1)², by the smaller of the two Gram matrices, and the rows' lengths.
            gram = weight.t() @ weight
            length = weight.square().sum(dim=1)
            off_diagonal = gram.square().sum() - length.square().sum()
            loss = off_diagonal + len(rows) * (length - 1).square().sum()
            weight.grad = torch.autograd.grad(loss, weight)[0]
            optimizer.step()
    return F.normalize(weight.detach(), dim=1)
