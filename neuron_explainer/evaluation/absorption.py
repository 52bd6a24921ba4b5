"""Feature absorption: latents that stay silent where a more special latent has taken over their work.

A latent for "begins with s" that does not fire on "snake", because the latent for "snake" also writes "begins
with s", is absorbed there (Chanin et al. 2024, arXiv:2409.14507). For each label:

1. A dense probe of the activations finds the label's direction.
2. The main latents: the one that tells the label best, and a second, third, … as long as each raises F1 by
   :data:`SPLIT_GAIN` (the feature is split among these).
3. On tokens that have the label, and for which the probe says so: absorption is full where all main latents
   are silent and the latent that contributes most along the probe's direction (cosine at least
   :data:`FULL_COSINE`) contributes at least :data:`SHARE` of all there is. The fraction also counts tokens
   where the main latents are merely weak, and up to :data:`ABSORBERS` others (cosine at least
   :data:`FRACTION_COSINE`) do their work.

The thresholds are SAEBench's. Three things are done otherwise. Contributions are measured from the
autoencoder's bias, which is where its latents start from. Directions need not have length 1. And the probe is
a strongly regularised discriminant, see :data:`~neuron_explainer.evaluation.linear_probes.STRONG_RIDGE`.

Shape legend: ``t`` tokens, ``n`` width, ``l`` latents, ``k`` active latents of a token.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from neuron_explainer.errors import InputError
from neuron_explainer.evaluation.floors import permuted_directions
from neuron_explainer.evaluation.linear_probes import (
    STRONG_RIDGE,
    Split,
    check_labels,
    check_rows,
    columns_of,
    fit_probe,
    mean_difference,
    quality,
    rows_of,
    sparse,
    split_rows,
)
from neuron_explainer.evaluation.spread import Spread
from neuron_explainer.models.autoencoders.latents import Latents
from neuron_explainer.tables import text_table

SPLIT_GAIN = 0.03
MOST_MAIN = 10
LEAST_F1 = 0.6
"""A label whose dense probe does worse than this on test tokens says nothing and is left out."""
SILENT = 1e-8
FULL_COSINE = 0.025
FRACTION_COSINE = 0.1
SHARE = 0.4
ABSORBERS = 3
FEWEST = 20
"""Tokens with the label, in training and in testing, below which it is left out."""


@dataclass(frozen=True)
class Absorption:
    """How much of one label's main latents is absorbed; figures are over the seeds."""

    label: str
    full: Spread
    """Share of true positives with full absorption."""
    floor: Spread
    """The same with permuted directions, which have nothing to do with the latents."""
    fraction: Spread
    """Mean over true positives of the share of the work that other latents have taken over."""
    n_main: Spread
    """Number of main latents: more than 1 where the feature is split."""
    probe_f1: Spread
    """F1 of the dense probe on test tokens."""
    main_f1: Spread
    """F1 of the probe of the main latents on test tokens. Where it is low there is no latent for the label,
    and little can be absorbed."""
    n_true: int
    """Number of true positives with the first seed."""
    main: tuple[int, ...]
    """The main latents with the first seed."""
    absorbers: Mapping[int, int] = field(repr=False)
    """Latents that absorbed with the first seed, and on how many tokens; most tokens first."""
    by_part: Mapping[int, float] = field(default_factory=dict, repr=False)
    """Share with full absorption by ``parts``, with the first seed."""

    def to_dict(self) -> dict[str, Any]:
        """All of it as JSON can hold it."""
        spreads = {name: s.to_dict() for name, s in vars(self).items() if isinstance(s, Spread)}
        maps = ("absorbers", "by_part")
        return {
            "label": self.label,
            **spreads,
            "n_true": self.n_true,
            "main": list(self.main),
            **{name: {str(k): v for k, v in getattr(self, name).items()} for name in maps},
        }


@torch.no_grad()
def absorption(
    latents: Latents | Tensor,
    labels: Mapping[str, Tensor],
    activations: Tensor,
    directions: Tensor,
    *,
    bias: Tensor | None = None,
    groups: Tensor | None = None,
    parts: Tensor | None = None,
    seeds: Sequence[int] = (0, 1, 2),
    fewest: int = FEWEST,
    least_f1: float = LEAST_F1,
) -> dict[str, Absorption]:
    """Measure absorption for each of several labels.

    Args:
        latents: of all tokens, ``[t, l]``, sparse or dense.
        labels: for each name whether a token has the label, ``[t]`` bool; such as its first letter.
        activations: what the latents are of, ``[t, n]``.
        directions: what the latents write, ``[l, n]``.
        bias: what the autoencoder adds to what its latents write, ``[n]``; None for 0.
        groups: the document of each token ``[t]``; no document is on both sides.
        parts: a number for each token ``[t]``, such as which child of a feature is active: shares are given
            by part too.
        seeds: each draws other documents to test on.
        fewest: labels with fewer tokens in training or in testing are left out.
        least_f1: labels whose dense probe has a lower F1 on test tokens are left out.

    Returns:
        ``{label: figures}`` for the labels that are not left out.
    """
    latents = sparse(latents)
    n_tokens = len(latents.values)
    check_rows(n_tokens, {"activations": activations, "groups": groups, "parts": parts})
    check_labels(n_tokens, labels)
    if directions.shape != (latents.n_latents, activations.shape[1]):
        raise InputError(
            f"expected directions {[latents.n_latents, activations.shape[1]]}, found "
            f"{list(directions.shape)}; absorption is not defined for transcoders."
        )
    if not seeds:
        raise InputError("at least one seed is needed.")
    centred = activations if bias is None else activations - bias
    x, rows = centred.cpu().double(), directions.detach().cpu().double()
    runs: dict[str, list[_Run]] = {name: [] for name in labels}
    for number, seed in enumerate(seeds):
        sides = _Sides.of(latents, x, split_rows(len(x), seed, groups))
        for name, label in labels.items():
            if len(runs[name]) < number:
                continue  # left out with an earlier seed
            run = _measured(sides, rows, label.cpu(), parts, fewest, least_f1)
            if run is not None:
                runs[name].append(run)
    return {name: _result(name, found) for name, found in runs.items() if len(found) == len(seeds)}


class _Sides(NamedTuple):
    """Tokens to fit on and tokens to test on."""

    split: Split
    x: Tensor
    """``[t, n]`` of all tokens."""
    train: Latents
    test: Latents
    products: Tensor
    """``xᵀ x`` of the training tokens, which is the same for all labels."""

    @classmethod
    def of(cls, latents: Latents, x: Tensor, split: Split) -> "_Sides":
        rows = x[split.train]
        train, test = rows_of(latents, split.train), rows_of(latents, split.test)
        return cls(split, x, train, test, rows.t() @ rows)


class _Run(NamedTuple):
    """What one seed found."""

    full: float
    floor: float
    fraction: float
    probe_f1: float
    main_f1: float
    n_true: int
    main: tuple[int, ...]
    absorbers: dict[int, int]
    by_part: dict[int, float]


def _measured(
    sides: _Sides,
    directions: Tensor,
    label: Tensor,
    parts: Tensor | None,
    fewest: int,
    least_f1: float,
) -> _Run | None:
    split, x, train, test, products = sides
    y, y_test = label[split.train], label[split.test]
    if min(int(y.sum()), int(y_test.sum()), int((~y).sum()), int((~y_test).sum())) < fewest:
        return None
    probe = fit_probe(x[split.train], y, "f1", products=products, ridge=STRONG_RIDGE)
    said = probe.predict(x[split.test])
    probe_f1 = quality(said, y_test).f1
    true = (said & y_test).nonzero().flatten()
    if probe_f1 < least_f1 or not len(true):
        return None
    main = main_latents(train, y)
    some = fit_probe(columns_of(train, main).cpu(), y, "f1")
    main_f1 = quality(some.predict(columns_of(test, main).cpu()), y_test).f1
    rows, unit = split.test[true], F.normalize(probe.direction, dim=0)
    found = absorbed(rows_of(test, true), x[rows], directions, unit, main)
    permuted = permuted_directions(directions)
    nothing = absorbed(rows_of(test, true), x[rows], permuted, unit, main)
    by_part = {}
    if parts is not None:
        here = parts.cpu()[rows]
        by_part = {
            int(part): float(found.full[here == part].double().mean())
            for part in torch.unique(here)
        }
    counts = found.absorber[found.full].bincount(minlength=1)
    order = counts.argsort(descending=True, stable=True)
    absorbers = {int(i): int(counts[i]) for i in order if counts[i]}
    return _Run(
        full=float(found.full.double().mean()),
        floor=float(nothing.full.double().mean()),
        fraction=float(found.fraction.mean()),
        probe_f1=probe_f1,
        main_f1=main_f1,
        n_true=len(rows),
        main=tuple(main.tolist()),
        absorbers=absorbers,
        by_part=by_part,
    )


def main_latents(latents: Latents, y: Tensor, gain: float = SPLIT_GAIN) -> Tensor:
    """The latents that stand for a label: those that each raise the F1 of a probe, ``[t, l], [t] -> [k]``.

    Candidates are those whose mean on tokens with the label exceeds that on the others most.
    """
    order = mean_difference(latents, y).argsort(descending=True, stable=True)[:MOST_MAIN]
    x = columns_of(latents, order).cpu()
    k, reached = 1, _f1(x[:, :1], y)
    while k < len(order):
        more = _f1(x[:, : k + 1], y)
        if more < reached + gain:
            break
        k, reached = k + 1, more
    return order[:k]


def _f1(x: Tensor, y: Tensor) -> float:
    return quality(fit_probe(x, y, "f1").predict(x), y).f1


class Absorbed(NamedTuple):
    """What absorption there is on each of some tokens."""

    full: Tensor
    """``[t]`` bool"""
    fraction: Tensor
    """``[t]`` in float64, 0 to 1"""
    absorber: Tensor
    """``[t]``: the latent that contributes most along the probe's direction."""


@torch.no_grad()
def absorbed(
    latents: Latents, x: Tensor, directions: Tensor, probe: Tensor, main: Tensor
) -> Absorbed:
    """Absorption on tokens that have a label.

    Args:
        latents: ``[t, l]``.
        x: what the latents are to add up to, ``[t, n]``.
        directions: ``[l, n]``.
        probe: the label's direction, of length 1, ``[n]``.
        main: the latents that stand for the label.
    """
    indices, values = latents.indices.cpu(), latents.values.cpu().double()
    along = directions @ probe
    cosine = F.cosine_similarity(directions, probe[None], dim=1)
    contribution = values * along[indices]  # [t, k]
    whole = x @ probe
    is_main = torch.isin(indices, main.cpu())
    silent = ~(is_main & (values.abs() >= SILENT)).any(dim=1)
    largest, place = contribution.max(dim=1)
    absorber = indices.gather(1, place[:, None])[:, 0]
    full = silent & (cosine[absorber] >= FULL_COSINE) & (whole > 0) & (largest >= SHARE * whole)

    by_main = torch.where(is_main, contribution, 0.0).sum(dim=1)
    may_absorb = ~is_main & (cosine[indices] >= FRACTION_COSINE) & (contribution > 0)
    others = torch.where(may_absorb, contribution, 0.0)
    by_others = others.topk(min(ABSORBERS, others.shape[1]), dim=1).values.sum(dim=1)
    taken = torch.minimum(by_others, whole - by_main)
    fraction = torch.where(by_main <= 0, 1.0, taken / (taken + by_main))
    some = (whole > 0) & (by_main < whole) & (by_others >= SHARE * whole)
    return Absorbed(full, torch.where(some, fraction, 0.0), absorber)


def _result(name: str, runs: Sequence[_Run]) -> Absorption:
    first = runs[0]
    return Absorption(
        label=name,
        full=Spread.of(run.full for run in runs),
        floor=Spread.of(run.floor for run in runs),
        fraction=Spread.of(run.fraction for run in runs),
        n_main=Spread.of(len(run.main) for run in runs),
        probe_f1=Spread.of(run.probe_f1 for run in runs),
        main_f1=Spread.of(run.main_f1 for run in runs),
        n_true=first.n_true,
        main=first.main,
        absorbers=first.absorbers,
        by_part=first.by_part,
    )


def absorption_table(
    found: Mapping[str, Absorption], floor: Mapping[str, Absorption] | None = None
) -> str:
    """One line for each label; ``floor`` has the same figures of an autoencoder that has learned nothing."""
    if not found:
        return "no label has enough tokens and a dense probe that finds it"
    floor = {} if floor is None else floor
    head = [
        "label",
        "full",
        "permuted",
        "random",
        "fraction",
        "random",
        "main latents",
        "their F1",
        "dense F1",
        "tells apart",
        "tokens",
    ]
    rows = []
    for each in found.values():
        nothing = floor.get(each.label)
        floors = (
            ["-", "-"]
            if nothing is None
            else [f"{s:.3f}" for s in (nothing.full, nothing.fraction)]
        )
        rows.append(
            [
                each.label,
                f"{each.full:.3f}",
                f"{each.floor:.3f}",
                floors[0],
                f"{each.fraction:.3f}",
                floors[1],
                f"{each.n_main:.1f}",
                f"{each.main_f1:.3f}",
                f"{each.probe_f1:.3f}",
                f"{each.full.smallest_difference:.3f}",
                f"{each.n_true:,}",
            ]
        )
    return text_table(head, rows)
