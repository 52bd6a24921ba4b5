"""k-sparse probing: how well do a few latents tell whether a token has a label?

The ``k`` latents whose means differ most between tokens with and without the label are chosen, and a probe
of these is fitted; both on training rows only. The accuracy is that on other documents, with as many tokens
with the label as without it, so that 0.5 is chance (Gurnee et al. 2023, arXiv:2305.01610; SAEBench, Karvonen
et al. 2025, arXiv:2503.09532).

Beside it stand a probe of the activations themselves, which is what there is to find; one of as many
channels of the activations; the same with shuffled labels, which must be at chance; and, if one is given, an
autoencoder that has learned nothing.

Shape legend: ``t`` tokens, ``n`` width, ``l`` latents, ``k`` chosen latents.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from neuron_explainer.errors import InputError
from neuron_explainer.evaluation.linear_probes import (
    Method,
    Probe,
    balanced,
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

MOST_TRAIN, MOST_TEST = 2000, 1000
"""Rows of one label that a probe is fitted on, and tested on; half of them have the label."""
FEWEST = 50
"""Rows with the label, and rows without it, below which a label is left out."""


@dataclass(frozen=True)
class SparseProbing:
    """How well one label is told from a few latents; every accuracy is over the seeds."""

    label: str
    n_train: int
    """Rows that probes were fitted on, with the first seed; half of them have the label."""
    n_test: int
    accuracy: Mapping[int, Spread]
    """By ``k``: a probe of at most ``k`` latents, on test rows."""
    train_accuracy: Mapping[int, Spread]
    """By ``k``: on the rows that it was fitted on."""
    shuffled: Mapping[int, Spread]
    """By ``k``: the same with shuffled labels. Far from 0.5, something leaks from test to train."""
    dense: Spread | None
    """A probe of the activations; None if they were not given."""
    channels: Mapping[int, Spread]
    """By ``k``: a probe of at most ``k`` channels of the activations, chosen as latents are; empty without
    activations."""
    chosen: tuple[int, ...] = field(repr=False)
    """The latents chosen with the first seed, most different first."""
    floor: Mapping[int, Spread] = field(default_factory=dict)
    """By ``k``: what the latents of an autoencoder that has learned nothing reach."""

    def to_dict(self) -> dict[str, Any]:
        """All of it as JSON can hold it."""
        spreads = {
            name: {str(k): spread.to_dict() for k, spread in getattr(self, name).items()}
            for name in ("accuracy", "train_accuracy", "shuffled", "channels", "floor")
        }
        return {
            "label": self.label,
            "n_train": self.n_train,
            "n_test": self.n_test,
            **spreads,
            "dense": None if self.dense is None else self.dense.to_dict(),
            "chosen": list(self.chosen),
        }


@torch.no_grad()
def sparse_probing(
    latents: Latents | Tensor,
    labels: Mapping[str, Tensor],
    activations: Tensor | None = None,
    *,
    ks: Sequence[int] = (1, 2, 5),
    groups: Tensor | None = None,
    seeds: Sequence[int] = (0, 1, 2),
    floor: Latents | Tensor | None = None,
    method: Method = "closed_form",
    fewest: int = FEWEST,
) -> dict[str, SparseProbing]:
    """Probe the latents of some tokens for each of several labels.

    Args:
        latents: of all tokens, ``[t, l]``, sparse or dense.
        labels: for each name whether a token has the label, ``[t]`` bool.
        activations: what the latents are of, ``[t, n]``, for the probe beside them.
        ks: how many latents a probe may use.
        groups: the document of each token, ``[t]``: no document is on both sides. None: each token is one.
        seeds: each draws other documents and tokens to test on.
        floor: latents of an autoencoder that has learned nothing, of the same tokens; see
            :func:`~neuron_explainer.evaluation.floors.random_autoencoder`.
        method: how probes are fitted, see :func:`~neuron_explainer.evaluation.linear_probes.fit_probe`.
        fewest: labels with fewer tokens than this in training or in testing are left out, and so are those
            that nearly all tokens have.

    Returns:
        ``{label: figures}`` for the labels that have enough tokens.
    """
    ks, latents = sorted(set(ks)), sparse(latents)
    n_tokens = len(latents.values)
    if not ks or ks[0] < 1:
        raise InputError(f"ks must be whole numbers of at least 1, found {list(ks)}.")
    if not seeds:
        raise InputError("at least one seed is needed.")
    nothing = None if floor is None else sparse(floor)
    of_floor = None if nothing is None else nothing.values
    check_rows(n_tokens, {"activations": activations, "groups": groups, "floor": of_floor})
    check_labels(n_tokens, labels)
    found = {}
    for name, label in labels.items():
        runs = []
        for seed in seeds:
            rows = _rows(label, groups, seed, fewest)
            if rows is None:
                break
            runs.append(_probe(latents, label, activations, rows, ks, seed, nothing, method))
        else:
            found[name] = _result(name, runs, ks)
    return found


def _rows(
    label: Tensor, groups: Tensor | None, seed: int, fewest: int
) -> tuple[Tensor, Tensor] | None:
    """Rows to fit on and to test on; None if there are too few."""
    split = split_rows(len(label), seed, groups)
    train = balanced(split.train, label, MOST_TRAIN, seed)
    test = balanced(split.test, label, MOST_TEST, seed)
    return None if min(len(train), len(test)) < 2 * fewest else (train, test)


@dataclass(frozen=True)
class _Run:
    """What one seed found."""

    n_train: int
    n_test: int
    accuracy: dict[int, float]
    train_accuracy: dict[int, float]
    shuffled: dict[int, float]
    floor: dict[int, float]
    dense: float | None
    channels: dict[int, float]
    chosen: tuple[int, ...]


def _probe(
    latents: Latents,
    label: Tensor,
    activations: Tensor | None,
    rows: tuple[Tensor, Tensor],
    ks: Sequence[int],
    seed: int,
    floor: Latents | None,
    method: Method,
) -> _Run:
    train, test = rows
    label = label.cpu()
    y, y_test = label[train], label[test]
    sides = rows_of(latents, train), rows_of(latents, test)
    chosen, accuracy, train_accuracy = _by_k(sides, y, y_test, ks, method)
    generator = torch.Generator().manual_seed(seed + 1)
    mixed = [each[torch.randperm(len(each), generator=generator)] for each in (y, y_test)]
    shuffled = _by_k(sides, mixed[0], mixed[1], ks, method)[1]
    nothing = {}
    if floor is not None:
        sides = rows_of(floor, train), rows_of(floor, test)
        nothing = _by_k(sides, y, y_test, ks, method)[1]
    dense, channels = None, dict[int, float]()
    if activations is not None:
        x = activations.cpu()
        channels = _by_k((_as_latents(x[train]), _as_latents(x[test])), y, y_test, ks, method)[1]
        dense = quality(fit_probe(x[train], y, method=method).predict(x[test]), y_test).accuracy
    counts = len(train), len(test)
    return _Run(*counts, accuracy, train_accuracy, shuffled, nothing, dense, channels, chosen)


def _as_latents(x: Tensor) -> Latents:
    """Channels ``[t, n]`` in the place of latents."""
    return Latents(x, torch.arange(x.shape[1]).expand(x.shape), x.shape[1])


def _by_k(
    sides: tuple[Latents, Latents], y: Tensor, y_test: Tensor, ks: Sequence[int], method: Method
) -> tuple[tuple[int, ...], dict[int, float], dict[int, float]]:
    """The chosen latents, and by ``k`` the accuracy on test rows and on training rows.

    Of the probes of 1, …, k latents (of those in ``ks``) the one that is best in training is taken, so
    that more latents are never worse there.
    """
    difference = mean_difference(sides[0], y).abs()
    order = difference.argsort(descending=True, stable=True)[: ks[-1]]
    x, x_test = (columns_of(side, order).cpu() for side in sides)
    best: tuple[float, Probe, int] | None = None
    accuracy, train_accuracy = {}, {}
    for k in ks:
        probe = fit_probe(x[:, :k], y, method=method)
        reached = quality(probe.predict(x[:, :k]), y).accuracy
        if best is None or reached > best[0]:
            best = reached, probe, k
        reached, probe, used = best
        train_accuracy[k] = reached
        accuracy[k] = quality(probe.predict(x_test[:, :used]), y_test).accuracy
    return tuple(order.tolist()), accuracy, train_accuracy


def _result(name: str, runs: Sequence[_Run], ks: Sequence[int]) -> SparseProbing:
    def spread(what: str) -> dict[int, Spread]:
        return {k: Spread.of(getattr(run, what)[k] for run in runs) for k in ks}

    first = runs[0]
    dense = [run.dense for run in runs if run.dense is not None]
    return SparseProbing(
        label=name,
        n_train=first.n_train,
        n_test=first.n_test,
        accuracy=spread("accuracy"),
        train_accuracy=spread("train_accuracy"),
        shuffled=spread("shuffled"),
        dense=Spread.of(dense) if dense else None,
        channels=spread("channels") if first.channels else {},
        chosen=first.chosen,
        floor=spread("floor") if first.floor else {},
    )


def mean_over_labels(found: Mapping[str, SparseProbing], k: int, what: str = "accuracy") -> Spread:
    """The mean over labels of the accuracy with ``k`` latents, with each seed.

    Args:
        found: at least one label.
        k: number of latents.
        what: ``"accuracy"``, ``"floor"``, ``"channels"``, ``"shuffled"`` or ``"train_accuracy"``.
    """
    by_label = [getattr(each, what)[k].values for each in found.values()]
    return Spread.of(sum(values) / len(values) for values in zip(*by_label, strict=True))


def probing_table(found: Mapping[str, SparseProbing]) -> str:
    """One line for each label and one for their mean: accuracies, and what they are to be compared with."""
    if not found:
        return "no label has enough tokens"
    ks = list(next(iter(found.values())).accuracy)
    first, last = ks[0], ks[-1]
    head = [
        "label",
        *(f"k = {k}" for k in ks),
        f"random, k = {first}",
        f"random, k = {last}",
        f"channels, k = {last}",
        f"shuffled, k = {last}",
        "activations",
        f"tells apart, k = {first}",
        "test",
    ]
    rows = []
    for each in found.values():
        floors = [f"{each.floor[k]:.3f}" if each.floor else "-" for k in (first, last)]
        rows.append(
            [
                each.label,
                *(f"{each.accuracy[k]:.3f}" for k in ks),
                *floors,
                f"{each.channels[last]:.3f}" if each.channels else "-",
                f"{each.shuffled[last]:.3f}",
                "-" if each.dense is None else f"{each.dense:.3f}",
                f"{each.accuracy[first].smallest_difference:.3f}",
                f"{each.n_test:,}",
            ]
        )
    if len(found) > 1:
        rows.append(_mean_row(found, ks))
    return text_table(head, rows)


def _mean_row(found: Mapping[str, SparseProbing], ks: Sequence[int]) -> list[str]:
    first, last = ks[0], ks[-1]
    means = {k: mean_over_labels(found, k) for k in ks}
    floors = ["-", "-"]
    if all(each.floor for each in found.values()):
        floors = [f"{mean_over_labels(found, k, 'floor'):.3f}" for k in (first, last)]
    dense = [each.dense.values for each in found.values() if each.dense is not None]
    of_dense = [sum(values) / len(values) for values in zip(*dense, strict=True)]
    return [
        f"mean of {len(found)}",
        *(f"{means[k]:.3f}" for k in ks),
        *floors,
        f"{mean_over_labels(found, last, 'channels'):.3f}" if of_dense else "-",
        f"{mean_over_labels(found, last, 'shuffled'):.3f}",
        f"{Spread.of(of_dense):.3f}" if of_dense else "-",
        f"{means[first].smallest_difference:.3f}",
        "",
    ]
