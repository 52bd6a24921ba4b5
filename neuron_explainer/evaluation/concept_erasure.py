"""Can a concept be removed by switching a few latents off? Two scores, and one for exchanging attributes.

``tpp``       Targeted probe perturbation. A probe is fitted for each class, and the latents that do most for
              one class are switched off. The score is how far the accuracy on that class falls, minus how far
              the accuracy on the other classes falls.
``scr``       Spurious correlation removal. A probe is fitted on tokens where two labels always come together,
              and the latents that do most for the unwanted label are switched off. The score is the share
              that this closes of the gap in accuracy to a probe that was fitted on unbiased tokens.
``exchange``  After RAVEL. The latents of one attribute are exchanged for those of another token. That
              attribute should follow, and another attribute should stay.

The error of the reconstruction stays in place throughout: only what the chosen latents write is taken away.
Definitions are SAEBench's, with probes in closed form. An audit of 2026 (arXiv:2605.18229) finds that TPP can
get worse with training and that SCR can have the wrong sign: use these beside other figures, not alone.

Shape legend: ``t`` tokens, ``n`` width, ``l`` latents, ``k`` active latents of a token.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from neuron_explainer.errors import InputError
from neuron_explainer.evaluation.floors import permuted_directions
from neuron_explainer.evaluation.linear_probes import (
    STRONG_RIDGE,
    Probe,
    Split,
    balanced,
    check_labels,
    check_rows,
    fit_probe,
    mean_difference,
    quality,
    rows_of,
    solve_ridge,
    sparse,
    split_rows,
)
from neuron_explainer.evaluation.spread import Spread
from neuron_explainer.models.autoencoders.latents import Latents

NS = (2, 5, 10, 20, 50)
"""Numbers of latents that are switched off."""
MOST_ROWS = 4000
SMALLEST_GAP = 0.001
"""If the unbiased probe is not better than the biased one by this, there is nothing to remove."""


class Subject(NamedTuple):
    """Tokens, their latents, and what these write."""

    latents: Latents
    """``[t, l]``; :meth:`Latents.of` makes them of dense ones."""
    activations: Tensor
    """``[t, n]``"""
    directions: Tensor
    """``[l, n]``"""

    def checked(self) -> "Subject":
        """The same in float64 on the CPU; an error if the shapes do not fit."""
        latents, x, directions = sparse(self.latents), self.activations, self.directions
        if len(latents.values) != len(x) or directions.shape != (latents.n_latents, x.shape[1]):
            raise InputError(
                f"expected latents of {len(x)} tokens and directions {[latents.n_latents, x.shape[1]]}, "
                f"found {len(latents.values)} and {list(directions.shape)}."
            )
        cpu = Latents(latents.values.cpu().double(), latents.indices.cpu(), latents.n_latents)
        return Subject(cpu, x.cpu().double(), directions.detach().cpu().double())

    def of(self, rows: Tensor) -> "Subject":
        """Some of the tokens."""
        return Subject(rows_of(self.latents, rows), self.activations[rows], self.directions)

    def permuted(self, seed: int) -> "Subject":
        """The same latents with directions that have nothing to do with them, for a floor."""
        return self._replace(directions=permuted_directions(self.directions, seed))

    def without(self, chosen: Tensor) -> Tensor:
        """Activations with some latents switched off, ``[k] -> [t, n]``."""
        off = torch.isin(self.latents.indices, chosen)
        removed = self.latents._replace(values=torch.where(off, self.latents.values, 0.0))
        return self.activations - removed.decode(self.directions)


def _to_dict(found: object) -> dict[str, Any]:
    """The fields of a result, as JSON can hold them."""
    result: dict[str, Any] = {}
    for name, value in vars(found).items():
        if isinstance(value, Spread):
            result[name] = value.to_dict()
        elif isinstance(value, Mapping):
            result[name] = {str(key): spread.to_dict() for key, spread in value.items()}
        else:
            result[name] = list(value)
    return result


def _fit(x: Tensor, y: Tensor) -> Probe:
    return fit_probe(x, y, ridge=STRONG_RIDGE)


def effects(subject: Subject, label: Tensor, probe: Probe) -> Tensor:
    """How much each latent does for a label: its mean difference along the probe's direction, ``[l]``."""
    return mean_difference(subject.latents, label) * (subject.directions @ probe.direction)


@dataclass(frozen=True)
class TPP:
    """Targeted probe perturbation, by number of latents switched off; each over the seeds."""

    own: Mapping[int, Spread]
    """Fall of the accuracy on the class whose latents are switched off, mean over classes."""
    others: Mapping[int, Spread]
    """Fall of the accuracy on the other classes, mean over pairs."""
    score: Mapping[int, Spread]
    """``own - others``"""
    floor: Mapping[int, Spread]
    """The score with permuted directions, which have nothing to do with the latents."""
    accuracy: Spread
    """Mean accuracy of the probes with nothing switched off: no class can fall further than to 0.5."""

    def to_dict(self) -> dict[str, Any]:
        """All of it as JSON can hold it."""
        return _to_dict(self)


@torch.no_grad()
def tpp(
    subject: Subject,
    classes: Mapping[str, Tensor],
    *,
    ns: Sequence[int] = NS,
    groups: Tensor | None = None,
    seeds: Sequence[int] = (0, 1, 2),
) -> TPP:
    """Targeted probe perturbation.

    Args:
        subject: tokens and latents.
        classes: for each name whether a token has the label, ``[t]`` bool; two classes or more.
        ns: numbers of latents to switch off.
        groups: the document of each token ``[t]``; no document is on both sides.
        seeds: each draws other documents and tokens to test on.
    """
    if len(classes) < 2 or not seeds:
        raise InputError(
            f"TPP needs two classes and one seed at least, found {len(classes)} and {len(seeds)}."
        )
    subject = subject.checked()
    check_labels(len(subject.activations), classes)
    labels = {name: label.cpu() for name, label in classes.items()}
    runs, nothing = [], []
    for seed in seeds:
        split = split_rows(len(subject.activations), seed, groups)
        runs.append(_tpp_run(subject, labels, split, ns, seed))
        nothing.append(_tpp_run(subject.permuted(seed), labels, split, ns, seed))
    return TPP(
        own={n: Spread.of(run.own[n] for run in runs) for n in ns},
        others={n: Spread.of(run.others[n] for run in runs) for n in ns},
        score={n: Spread.of(run.own[n] - run.others[n] for run in runs) for n in ns},
        floor={n: Spread.of(run.own[n] - run.others[n] for run in nothing) for n in ns},
        accuracy=Spread.of(run.accuracy for run in runs),
    )


class _Falls(NamedTuple):
    own: dict[int, float]
    others: dict[int, float]
    accuracy: float


def _tpp_run(
    subject: Subject, labels: Mapping[str, Tensor], split: Split, ns: Sequence[int], seed: int
) -> _Falls:
    probes, tests, first, order = {}, {}, {}, {}
    for name, label in labels.items():
        train = _drawn(split.train, label, name, seed)
        tests[name] = _drawn(split.test, label, name, seed)
        some = subject.of(train)
        probes[name] = _fit(some.activations, label[train])
        first[name] = _accuracy(probes[name], subject.activations, label, tests[name])
        effect = effects(some, label[train], probes[name]).clamp(min=0)
        order[name] = effect.argsort(descending=True, stable=True)[: int((effect > 0).sum())]
    subjects = {name: subject.of(rows) for name, rows in tests.items()}
    own, others = {}, {}
    for n in ns:
        falls: dict[bool, list[float]] = {True: [], False: []}
        for target in labels:
            for name, label in labels.items():
                x = subjects[name].without(order[target][:n])
                predicted = probes[name].predict(x)
                fall = first[name] - quality(predicted, label[tests[name]]).accuracy
                falls[name == target].append(fall)
        own[n], others[n] = (sum(falls[side]) / len(falls[side]) for side in (True, False))
    return _Falls(own, others, sum(first.values()) / len(first))


def _drawn(rows: Tensor, label: Tensor, name: str, seed: int) -> Tensor:
    drawn = balanced(rows, label, MOST_ROWS, seed)
    if not len(drawn):
        raise InputError(
            f"{name}: of {len(rows)} tokens all or none have the label; both are needed."
        )
    return drawn


def _accuracy(probe: Probe, x: Tensor, label: Tensor, rows: Tensor) -> float:
    return quality(probe.predict(x[rows]), label[rows]).accuracy


@dataclass(frozen=True)
class SCR:
    """Spurious correlation removal; each figure over the seeds."""

    score: Mapping[int, Spread]
    """By number of latents switched off: 1 if the biased probe becomes as good as the unbiased one, 0 if
    nothing changes, below 0 if it becomes worse."""
    floor: Mapping[int, Spread]
    """The score with permuted directions."""
    biased: Spread
    """Accuracy on unbiased tokens of the probe fitted where both labels come together."""
    clean: Spread
    """Accuracy of the probe fitted on unbiased tokens."""

    def to_dict(self) -> dict[str, Any]:
        """All of it as JSON can hold it."""
        return _to_dict(self)


@torch.no_grad()
def scr(
    subject: Subject,
    wanted: Tensor,
    unwanted: Tensor,
    *,
    ns: Sequence[int] = NS,
    groups: Tensor | None = None,
    seeds: Sequence[int] = (0, 1, 2),
) -> SCR:
    """Spurious correlation removal.

    Args:
        subject: tokens and latents.
        wanted: the label that a probe should find, ``[t]`` bool.
        unwanted: the label that comes together with it in training, ``[t]`` bool. All four combinations
            must occur.
        ns: numbers of latents to switch off.
        groups: the document of each token ``[t]``; no document is on both sides.
        seeds: each draws other documents and tokens to test on.
    """
    if not seeds:
        raise InputError("at least one seed is needed.")
    subject = subject.checked()
    check_labels(len(subject.activations), {"wanted": wanted, "unwanted": unwanted})
    wanted, unwanted = wanted.cpu(), unwanted.cpu()
    runs, nothing = [], []
    for seed in seeds:
        split = split_rows(len(wanted), seed, groups)
        runs.append(_scr_run(subject, wanted, unwanted, split, ns, seed))
        nothing.append(_scr_run(subject.permuted(seed), wanted, unwanted, split, ns, seed))
    return SCR(
        score={n: Spread.of(run[0][n] for run in runs) for n in ns},
        floor={n: Spread.of(run[0][n] for run in nothing) for n in ns},
        biased=Spread.of(run[1] for run in runs),
        clean=Spread.of(run[2] for run in runs),
    )


def _scr_run(
    subject: Subject,
    wanted: Tensor,
    unwanted: Tensor,
    split: Split,
    ns: Sequence[int],
    seed: int,
) -> tuple[dict[int, float], float, float]:
    together = split.train[wanted[split.train] == unwanted[split.train]]
    biased_rows = _drawn(together, wanted, "wanted, where both labels agree", seed)
    clean_rows = _even(split.train, wanted, unwanted, seed)
    test = subject.of(_even(split.test, wanted, unwanted, seed))
    y = wanted[_even(split.test, wanted, unwanted, seed)]
    biased = _fit(subject.activations[biased_rows], wanted[biased_rows])
    clean = _fit(subject.activations[clean_rows], wanted[clean_rows])
    other = _fit(subject.activations[clean_rows], unwanted[clean_rows])
    base = quality(biased.predict(test.activations), y).accuracy
    best = quality(clean.predict(test.activations), y).accuracy
    effect = effects(subject.of(clean_rows), unwanted[clean_rows], other).abs()
    order = effect.argsort(descending=True, stable=True)
    scores = {}
    for n in ns:
        reached = quality(biased.predict(test.without(order[:n])), y).accuracy
        gap = best - base
        scores[n] = (reached - base) / gap if gap >= SMALLEST_GAP else 0.0
    return scores, base, best


def _even(rows: Tensor, wanted: Tensor, unwanted: Tensor, seed: int) -> Tensor:
    """As many of each of the four combinations."""
    generator = torch.Generator().manual_seed(seed)
    kinds = 2 * wanted[rows].long() + unwanted[rows].long()
    sides = [rows[kinds == kind] for kind in range(4)]
    n = min(MOST_ROWS // 4, *map(len, sides))
    if not n:
        raise InputError(
            "all four combinations of the wanted and the unwanted label must occur on both sides; found "
            f"{[len(side) for side in sides]} tokens."
        )
    return torch.cat([side[torch.randperm(len(side), generator=generator)[:n]] for side in sides])


@dataclass(frozen=True)
class Exchange:
    """What happens when latents of one attribute are exchanged; each figure over the seeds."""

    cause: Spread
    """Share of tokens whose attribute is then that of the other token."""
    isolation: Spread
    """Share of tokens whose other attribute stays as it was."""
    disentangle: Spread
    """The mean of cause and isolation: 0.5 if nothing is exchanged, and if everything is."""
    floor: Spread
    """The same with permuted directions."""
    chosen: tuple[int, ...]
    """The latents that were exchanged with the first seed."""

    def to_dict(self) -> dict[str, Any]:
        """All of it as JSON can hold it."""
        return _to_dict(self)


@torch.no_grad()
def exchange(
    subject: Subject,
    attribute: Tensor,
    other: Tensor,
    *,
    least_share: float = 0.05,
    groups: Tensor | None = None,
    seeds: Sequence[int] = (0, 1, 2),
) -> Exchange:
    """Exchange the latents of an attribute between tokens that differ in it and in another one.

    RAVEL trains a mask over latents. Here a latent is exchanged if the attribute explains more of its
    variance than the other one does, and at least ``least_share``.

    Args:
        subject: tokens and latents.
        attribute: its value for each token, ``[t]`` int64.
        other: the value of the one that should stay, ``[t]`` int64.
        least_share: see above.
        groups: the document of each token ``[t]``; no document is on both sides.
        seeds: each draws other documents and pairs of tokens to test on.
    """
    if not seeds:
        raise InputError("at least one seed is needed.")
    subject = subject.checked()
    check_rows(len(subject.activations), {"attribute": attribute, "other": other})
    attribute, other = attribute.cpu(), other.cpu()
    runs, nothing = [], []
    for seed in seeds:
        split = split_rows(len(attribute), seed, groups)
        given = attribute, other, split, least_share, seed
        runs.append(_exchange_run(subject, *given))
        nothing.append(_exchange_run(subject.permuted(seed), *given))
    return Exchange(
        cause=Spread.of(run[0] for run in runs),
        isolation=Spread.of(run[1] for run in runs),
        disentangle=Spread.of((run[0] + run[1]) / 2 for run in runs),
        floor=Spread.of((run[0] + run[1]) / 2 for run in nothing),
        chosen=tuple(runs[0][2].tolist()),
    )


def _exchange_run(
    subject: Subject, attribute: Tensor, other: Tensor, split: Split, least_share: float, seed: int
) -> tuple[float, float, Tensor]:
    train = subject.of(split.train)
    shares = [_explained(train.latents, each[split.train]) for each in (attribute, other)]
    chosen = ((shares[0] > shares[1]) & (shares[0] >= least_share)).nonzero().flatten()
    generator = torch.Generator().manual_seed(seed)
    base = split.test
    source = base[torch.randperm(len(base), generator=generator)]
    differ = (attribute[base] != attribute[source]) & (other[base] != other[source])
    base, source = base[differ], source[differ]
    if not len(base):
        raise InputError("no two tokens differ in both attributes.")
    subjects = subject.of(base), subject.of(source)
    written = subjects[1].activations - subjects[1].without(chosen)
    x = subjects[0].without(chosen) + written
    found = [
        _classes(train.activations, each[split.train], x) == each[wanted]
        for each, wanted in ((attribute, source), (other, base))
    ]
    return float(found[0].double().mean()), float(found[1].double().mean()), chosen


def _explained(latents: Latents, value: Tensor) -> Tensor:
    """Share of each latent's variance that lies between the values of an attribute, ``[l]``."""
    n = len(value)
    sums = latents.values.new_zeros(2, latents.n_latents)
    for row, values in enumerate((latents.values, latents.values.square())):
        sums[row].scatter_add_(0, latents.indices.flatten(), values.flatten())
    mean = sums[0] / n
    between = torch.zeros_like(mean)
    for each in torch.unique(value):
        some = rows_of(latents, (value == each).nonzero().flatten())
        total = torch.zeros_like(mean)
        total.scatter_add_(0, some.indices.flatten(), some.values.flatten())
        between += (total / len(some.values) - mean).square() * (len(some.values) / n)
    variance = sums[1] / n - mean.square()
    return torch.where(variance > 0, between / variance.clamp(min=1e-30), 0.0)


def _classes(x: Tensor, value: Tensor, other: Tensor) -> Tensor:
    """Linear discriminant analysis of ``[t, n]`` with values ``[t]``; returns those of other rows ``[u]``."""
    values, place = torch.unique(value, return_inverse=True)
    means = torch.stack([x[place == i].mean(dim=0) for i in range(len(values))])
    rest = x - means[place]
    within = rest.t() @ rest / len(rest)
    weights = solve_ridge(within, means.t())
    scores: Tensor = other @ weights - (means.t() * weights).sum(dim=0) / 2
    found: Tensor = values[scores.argmax(dim=1)]
    return found
