"""How alike directions are: neighbours, two dictionaries matched, several compared.

Directions are compared by the cosine of decoder rows (or of encoder rows). Two dictionaries of the same
activations have rows in the same space; to compare dictionaries of different locations, take what they
write to the stream: ``Units(context, autoencoder).rows()``.

Rows of zeros (latents left out of memory) take no part: they match nothing and nothing matches them.

Every figure stands beside its floor: what random directions of the same shape get.

Shape legend: ``a``, ``b`` directions of two dictionaries, ``l`` latents, ``k`` neighbours, ``n`` width.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from torch import Tensor

from neuron_explainer.errors import InputError, optional_module
from neuron_explainer.kernels.top_k import top_k
from neuron_explainer.models.autoencoder import Autoencoder
from neuron_explainer.models.autoencoders.pruned import PrunedAutoencoder
from neuron_explainer.tables import percent

Side = Literal["decoder", "encoder"]
Rows = Autoencoder | Tensor
"""An autoencoder, or rows ``[l, n]``."""
Floats = npt.NDArray[np.float32]
Ints = npt.NDArray[np.int64]

_CHUNK_BYTES = 2**26
_MOST_PAIRS = 2**27
_FLOOR_SAMPLE = 512
THRESHOLDS = (0.5, 0.7, 0.9)


def rows_of(directions: Rows, side: Side = "decoder") -> Tensor:
    """Decoder or encoder rows ``[l, n]`` float32; zeros for latents that were left out of memory."""
    if side not in ("decoder", "encoder"):
        raise InputError(f"side must be 'decoder' or 'encoder', found {side!r}.")
    if isinstance(directions, Tensor):
        rows = directions
    elif side == "decoder":
        rows = directions.directions
    elif isinstance(directions, PrunedAutoencoder):
        weight = directions.small.encoder.weight
        rows = weight.new_zeros(directions.n_latents, weight.shape[1])
        rows = rows.index_copy(0, directions.kept, weight)
    else:
        rows = directions.encoder.weight
    if rows.ndim != 2 or not len(rows):
        raise InputError(f"expected directions of shape [l, n], found {list(rows.shape)}.")
    return rows.detach().float()


# ---- neighbours ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Neighbours:
    """The directions nearest to one, nearest first."""

    unit: int
    units: tuple[int, ...]
    cosines: tuple[float, ...]
    side: Side = "decoder"

    def __repr__(self) -> str:
        listed = ", ".join(
            f"{unit} ({cosine:.3f})" for unit, cosine in zip(self.units, self.cosines, strict=True)
        )
        return f"nearest {self.side} rows to {self.unit}: {listed or 'none'}"


@torch.no_grad()
def nearest(
    directions: Rows,
    unit: int,
    other: Rows | None = None,
    k: int = 10,
    *,
    side: Side = "decoder",
    signed: bool = False,
) -> Neighbours:
    """The directions with the largest cosine to one of ``directions``.

    Args:
        directions: an autoencoder, or rows ``[l, n]``.
        unit: which of them.
        other: where to look for neighbours; None: among the same directions, without the unit itself.
        k: how many; fewer if there are fewer.
        side: decoder or encoder rows.
        signed: count a direction and its opposite as the same (the cosine's absolute value ranks; the
            cosines given keep their sign).
    """
    rows = rows_of(directions, side)
    _check_unit(unit, len(rows))
    own = other is None
    others = rows if other is None else _same_width(rows_of(other, side), rows)
    cosines = F.normalize(others, dim=1) @ F.normalize(rows[unit], dim=0).to(others.device)
    if not bool(rows[unit].any()):
        raise InputError(
            f"direction {unit} is zero, as that of a latent that was left out of memory."
        )
    rank = cosines.abs() if signed else cosines.clone()
    left_out = ~others.any(dim=1)
    if own:
        left_out[unit] = True
    rank[left_out] = -torch.inf
    n_found = min(k, int((~left_out).sum()))
    found = top_k(rank, n_found)[1] if n_found else torch.zeros(0, dtype=torch.int64)
    return Neighbours(unit, tuple(found.tolist()), tuple(cosines[found].tolist()), side)


def encoder_decoder_cosine(autoencoder: Autoencoder) -> Tensor:
    """How much each latent writes in the direction that it reads, ``[l]``; NaN for rows of zeros.

    A transcoder reads and writes at different places, whose directions cannot be compared.
    """
    if autoencoder.is_transcoder:
        raise InputError(
            f"{autoencoder._name()}: a transcoder reads and writes at different places."
        )
    encoder, decoder = rows_of(autoencoder, "encoder"), rows_of(autoencoder)
    cosine = F.cosine_similarity(encoder, decoder, dim=1)
    return cosine.masked_fill(~(encoder.any(dim=1) & decoder.any(dim=1)), torch.nan)


@dataclass(frozen=True)
class Alignment:
    """The entries of a decoder row that are largest: which neurons, or channels, it consists of."""

    unit: int
    entries: tuple[int, ...]
    values: tuple[float, ...]
    shares: tuple[float, ...]
    """Each value's share of the row's L1 norm, without sign."""


def neuron_alignment(directions: Rows, unit: int, k: int = 3, *, signed: bool = False) -> Alignment:
    """The ``k`` largest entries of a decoder row, in the basis of the activations themselves.

    For an autoencoder of ``mlp.post_act`` these are neurons, elsewhere channels.

    Args:
        signed: rank by absolute value, so that large negative entries count.
    """
    rows = rows_of(directions)
    _check_unit(unit, len(rows))
    row = rows[unit]
    found = top_k(row.abs() if signed else row, min(k, len(row)))[1]
    values = row[found]
    total = row.abs().sum().clamp(min=torch.finfo(row.dtype).tiny)
    shares = (values.abs() / total).tolist()
    return Alignment(unit, tuple(found.tolist()), tuple(values.tolist()), tuple(shares))


# ---- two dictionaries ------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False, repr=False)
class Matching:
    """Two dictionaries matched by the cosines of their directions. -1 and NaN stand for rows of zeros."""

    nearest_of_a: Ints
    """``[a]``: the direction of the second that is nearest to each of the first."""
    cosine_of_a: Floats
    """``[a]``: its cosine."""
    nearest_of_b: Ints
    """``[b]``: the same the other way round."""
    cosine_of_b: Floats
    """``[b]``"""
    floor: float
    """The mean max cosine that random directions of the same shape get."""
    partner_of_a: Ints | None = None
    """``[a]``: the one-to-one assignment with the largest sum of cosines; -1 without a partner. None if
    it was not asked for."""
    partner_cosine: Floats | None = None
    """``[a]``"""

    @property
    def mmcs(self) -> float:
        """Mean max cosine similarity of the first's directions with the second's (Sharkey et al. 2022)."""
        return _mean(self.cosine_of_a)

    @property
    def mmcs_of_b(self) -> float:
        """The same the other way round."""
        return _mean(self.cosine_of_b)

    @property
    def mean_partner_cosine(self) -> float | None:
        """Mean cosine of the one-to-one assignment; None if it was not asked for."""
        return None if self.partner_cosine is None else _mean(self.partner_cosine)

    def share_above(self, threshold: float) -> float:
        """Share of the first's directions whose nearest one has a larger cosine."""
        return _share_above(self.cosine_of_a, threshold)

    def __repr__(self) -> str:
        paired = self.mean_partner_cosine
        return (
            f"Matching({len(self.cosine_of_a):,} directions with {len(self.cosine_of_b):,}: MMCS "
            f"{self.mmcs:.3f} and back {self.mmcs_of_b:.3f}"
            f"{'' if paired is None else f', one to one {paired:.3f}'}; "
            f"random directions get {self.floor:.3f})"
        )


@torch.no_grad()
def match(
    a: Rows,
    b: Rows,
    *,
    one_to_one: bool = False,
    side: Side = "decoder",
    signed: bool = False,
    seed: int = 0,
    chunk_bytes: int = _CHUNK_BYTES,
) -> Matching:
    """Match each direction of one dictionary with the nearest of another, both ways.

    Args:
        a, b: autoencoders or rows ``[l, n]`` of the same width.
        one_to_one: also find the assignment in which no direction is used twice and the sum of cosines
            is largest (the Hungarian algorithm; needs scipy, and time that grows with the cube of the
            number: a minute for 10,000).
        side: decoder or encoder rows.
        signed: count a direction and its opposite as the same (absolute cosines).
        seed: of the random directions of the floor.
        chunk_bytes: size of the cosines that are held at a time; one_to_one holds all of them.
    """
    rows, others = rows_of(a, side), rows_of(b, side)
    others = _same_width(others, rows).to(rows.device)
    measure = torch.abs if signed else _as_is
    forth, back = _nearest_both_ways(rows, others, measure, chunk_bytes)
    partner, partner_cosine = (
        _assigned(rows, others, measure, chunk_bytes) if one_to_one else (None, None)
    )
    shape = (_n_alive(rows), _n_alive(others), rows.shape[1])
    return Matching(*forth, *back, _floor(*shape, measure, seed), partner, partner_cosine)


def _as_is(x: Tensor) -> Tensor:
    return x


Measure = Callable[[Tensor], Tensor]


def _cosines(
    rows: Tensor, others: Tensor, measure: Measure, chunk_bytes: int
) -> Iterator[tuple[slice, Tensor]]:
    """Cosines of some rows with all others, ``[some, b]``; -inf where one of the two is zero."""
    others = F.normalize(others, dim=1)
    dead = ~others.any(dim=1)
    step = max(1, chunk_bytes // (4 * len(others)))
    for start in range(0, len(rows), step):
        some = rows[start : start + step]
        cosines = measure(F.normalize(some, dim=1) @ others.t())
        cosines[:, dead] = -torch.inf
        cosines[~some.any(dim=1)] = -torch.inf
        yield slice(start, start + len(some)), cosines


def _nearest_both_ways(
    rows: Tensor, others: Tensor, measure: Measure, chunk_bytes: int
) -> tuple[tuple[Ints, Floats], tuple[Ints, Floats]]:
    found = []
    best = others.new_full((len(others),), -torch.inf)
    place = torch.zeros(len(others), dtype=torch.int64, device=others.device)
    for where, cosines in _cosines(rows, others, measure, chunk_bytes):
        found.append(cosines.max(dim=1))
        here, first = cosines.max(dim=0)
        place = torch.where(here > best, first + where.start, place)
        best = torch.maximum(best, here)
    values = torch.cat([each.values for each in found])
    indices = torch.cat([each.indices for each in found])
    return _settled(indices, values), _settled(place, best)


def _settled(indices: Tensor, values: Tensor) -> tuple[Ints, Floats]:
    """As arrays; -1 and NaN where nothing was found."""
    nothing = values == -torch.inf
    return (
        indices.masked_fill(nothing, -1).cpu().numpy(),
        values.masked_fill(nothing, torch.nan).cpu().numpy(),
    )


def _assigned(
    rows: Tensor, others: Tensor, measure: Measure, chunk_bytes: int
) -> tuple[Ints, Floats]:
    optimize = optional_module("scipy.optimize", "one_to_one")
    alive_a, alive_b = (x.any(dim=1).nonzero().flatten() for x in (rows, others))
    if len(alive_a) * len(alive_b) > _MOST_PAIRS:
        raise InputError(
            f"one_to_one holds all cosines: {len(alive_a):,} times {len(alive_b):,} is more than "
            f"{_MOST_PAIRS:,}. Match a sample of the directions, or leave one_to_one out."
        )
    parts = _cosines(rows[alive_a], others[alive_b], measure, chunk_bytes)
    cosines = torch.cat([each for _, each in parts]).cpu().numpy()
    first, second = optimize.linear_sum_assignment(cosines, maximize=True)
    partner = np.full(len(rows), -1, dtype=np.int64)
    value = np.full(len(rows), np.nan, dtype=np.float32)
    places = alive_a.cpu().numpy()[first]
    partner[places] = alive_b.cpu().numpy()[second]
    value[places] = cosines[first, second]
    return partner, value


def _floor(n_rows: int, n_others: int, width: int, measure: Measure, seed: int) -> float:
    """Mean max cosine of random directions with ``n_others`` random ones; of a sample of the rows."""
    if not n_rows or not n_others:
        return float("nan")
    generator = torch.Generator().manual_seed(seed)
    some = torch.randn(min(n_rows, _FLOOR_SAMPLE), width, generator=generator)
    others = torch.randn(n_others, width, generator=generator)
    cosines = measure(F.normalize(some, dim=1) @ F.normalize(others, dim=1).t())
    return float(cosines.amax(dim=1).mean())


# ---- several dictionaries --------------------------------------------------------------------------


@dataclass(frozen=True, eq=False, repr=False)
class Stability:
    """How far dictionaries trained with different seeds have the same directions."""

    cosines: tuple[Floats, ...]
    """For each dictionary ``[l]``: the max cosine of each direction with another dictionary, averaged
    over the others. NaN for rows of zeros."""
    share_above: Mapping[float, float]
    """Threshold -> share of directions whose averaged max cosine is larger, over all dictionaries."""
    floor: float
    """The mean that random directions of the same shape get."""
    floor_share_above: Mapping[float, float]
    """What random directions get instead of ``share_above``."""

    @property
    def mean(self) -> float:
        """Mean over the directions of all dictionaries."""
        return _mean(np.concatenate(self.cosines))

    @property
    def spread(self) -> float:
        """Standard deviation of the dictionaries' means."""
        return float(np.std([_mean(each) for each in self.cosines]))

    def __repr__(self) -> str:
        floors = self.floor_share_above
        shares = ", ".join(
            f"{percent(share, 1)} above {threshold:g} (random {percent(floors[threshold], 1)})"
            for threshold, share in self.share_above.items()
        )
        return (
            f"Stability({len(self.cosines)} dictionaries: mean max cosine {self.mean:.3f} ± "
            f"{self.spread:.3f}, random directions {self.floor:.3f}; {shares})"
        )


def stability(
    dictionaries: Sequence[Rows],
    *,
    thresholds: Sequence[float] = THRESHOLDS,
    side: Side = "decoder",
    signed: bool = False,
    seed: int = 0,
) -> Stability:
    """Compare dictionaries trained with different seeds, each with all others.

    The share above 0.7 is the usual measure of how many latents are found again (Paulo & Belrose 2025).

    Args:
        dictionaries: two or more autoencoders, or rows ``[l, n]``, of the same width.
        thresholds: of ``share_above``.
        side, signed, seed: as of :func:`match`.
    """
    if len(dictionaries) < 2:
        raise InputError(f"expected two dictionaries or more, found {len(dictionaries)}.")
    rows = [rows_of(each, side) for each in dictionaries]
    generator = torch.Generator().manual_seed(seed)
    random = [torch.randn(x.shape, generator=generator).to(x.device) for x in rows]
    measured, floor = _mean_max(rows, signed), _mean_max(random, signed)
    joined, random_joined = np.concatenate(measured), np.concatenate(floor)
    return Stability(
        tuple(measured),
        {t: _share_above(joined, t) for t in thresholds},
        _mean(random_joined),
        {t: _share_above(random_joined, t) for t in thresholds},
    )


@torch.no_grad()
def _mean_max(dictionaries: Sequence[Tensor], signed: bool) -> list[Floats]:
    """For each dictionary ``[l]``: max cosines, averaged over the other dictionaries."""
    measure = torch.abs if signed else _as_is
    sums = [np.zeros(len(each), dtype=np.float64) for each in dictionaries]
    for i, rows in enumerate(dictionaries):
        for j in range(i):
            others = _same_width(dictionaries[j], rows).to(rows.device)
            (_, forth), (_, back) = _nearest_both_ways(rows, others, measure, _CHUNK_BYTES)
            sums[i] += forth
            sums[j] += back
    return [(each / (len(dictionaries) - 1)).astype(np.float32) for each in sums]


# ---- checks ------------------------------------------------------------------------------------------


def _mean(cosines: Floats) -> float:
    known = cosines[~np.isnan(cosines)]
    return float(known.mean(dtype=np.float64)) if len(known) else float("nan")


def _share_above(cosines: Floats, threshold: float) -> float:
    known = cosines[~np.isnan(cosines)]
    return float((known > threshold).mean()) if len(known) else float("nan")


def _n_alive(rows: Tensor) -> int:
    return int(rows.any(dim=1).sum())


def _check_unit(unit: Any, n_units: int) -> None:
    if isinstance(unit, bool) or not isinstance(unit, int) or not 0 <= unit < n_units:
        raise InputError(f"there is no direction {unit!r}: they are 0 to {n_units - 1}.")


def _same_width(others: Tensor, rows: Tensor) -> Tensor:
    if others.shape[1] != rows.shape[1]:
        raise InputError(
            f"directions of width {rows.shape[1]} and of width {others.shape[1]} cannot be compared. Compare "
            "what they write to the residual stream: Units(context, autoencoder).rows()."
        )
    return others
