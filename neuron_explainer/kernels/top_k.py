"""The largest entries of long rows, faster than ``torch.topk`` and with one tie rule.

Of equal entries the one with the lowest index wins, in every dtype and on every device: low-precision
pre-activations are often equal, and which latents are active must not depend on the path taken.

The search has two stages: the maximum of every group of 16 entries is cheap, and the ``k`` largest
entries of a row lie in the ``k`` groups with the largest maxima. Only the members of those groups are
compared.

Shape legend: ``b`` rows, ``l`` entries of a row, ``m`` entries compared, ``k`` wanted, ``…`` any
leading axes.
"""

import torch
from torch import Tensor

from neuron_explainer.errors import InputError

_GROUP = 16
# Members of a group lie this far apart, so that their maxima are taken by whole vectors.
_STRIDE = 64
# Below this many groups for each wanted entry a single search is as fast.
_GROUPS_PER_ENTRY = 8
# Entries of rows with a tie for the last place that are looked through at a time.
_TIED_ENTRIES = 2**22


def top_k(x: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The ``k`` largest entries of each row: ``[…, l] -> values […, k], indices […, k]`` int64.

    Exactly the first ``k`` of a stable descending sort: the largest entry comes first; of equal
    entries the one with the lowest index comes first (``torch.topk`` leaves this open); NaN counts as
    larger than any number. Values carry no gradient: where one is needed, gather with the indices.
    """
    if x.ndim == 0 or not 1 <= k <= x.shape[-1]:
        raise InputError(
            f"top_k: k={k!r} of entries of shape {list(x.shape)}: k must lie between 1 and the "
            "length of the last axis."
        )
    with torch.no_grad():
        rows = x.detach().reshape(-1, x.shape[-1])
        values, indices = search(rows, min(k + 1, rows.shape[1]))
        values, indices = settle_ties(values, indices, k, rows, None)
    return values.view(*x.shape[:-1], k), indices.view(*x.shape[:-1], k)


def largest_entries(x: Tensor, k: int) -> Tensor:
    """Where the ``k`` largest of all entries are: ``[m] -> [k]`` int64, ascending.

    The tie rule is that of :func:`top_k`: of equal entries of which not all are taken, those with the
    lowest index are. For a ``k`` of many thousands, whose order nobody needs.
    """
    if x.ndim != 1 or not 1 <= k <= len(x):
        raise InputError(
            f"largest_entries: k={k!r} of entries of shape {list(x.shape)}: expected one axis, at "
            "least k long."
        )
    with torch.no_grad():
        rows = x.detach()[None]
        values, indices = search(rows, min(k + 1, len(x)))
        if bool(_is_cut(values, k)):
            return _first_of_equals(rows, values[:, k - 1 : k], k)[0]
    return indices[0, :k].sort().values


def search(rows: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The ``k`` largest of ``[b, l]``, descending: values and indices ``[b, k]``.

    Which of several equal entries are found, and in which order, is left open.
    """
    b, l = rows.shape  # noqa: E741  # l latents, as everywhere
    if l % (_GROUP * _STRIDE) or l // _GROUP < _GROUPS_PER_ENTRY * k or not rows.is_contiguous():
        return _sorted_topk(rows, k)
    maxima = rows.view(b, -1, _GROUP, _STRIDE).amax(2).view(b, -1)
    groups = maxima.topk(k, sorted=False).indices
    # Group p is the column p % 64 of the block p // 64.
    first = groups + (groups // _STRIDE) * ((_GROUP - 1) * _STRIDE)
    steps = torch.arange(0, _GROUP * _STRIDE, _STRIDE, device=rows.device)
    members = (first[:, :, None] + steps).view(b, -1)
    values, position = _sorted_topk(rows.gather(1, members), k)
    return values, members.gather(1, position)


def settle_ties(
    values: Tensor, indices: Tensor, k: int, rows: Tensor, labels: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Turn the ``k + 1`` (or all) largest entries into the first ``k`` of a stable sort.

    Args:
        values: ``[b, k + 1]`` descending.
        indices: ``[b, k + 1]`` labels of the values.
        k: how many to return.
        rows: ``[b, m]`` all entries.
        labels: ``[b, m]`` int64: of equal entries the one with the lowest label comes first; None
            stands for the position in the row.
    """
    equal = (values[:, 1:] == values[:, :-1]) | values[:, 1:].isnan()
    tied = equal.any(1).nonzero().squeeze(1)
    cut = _is_cut(values, k).nonzero().squeeze(1)
    values, indices = values[:, :k].contiguous(), indices[:, :k].contiguous()
    for some in torch.split(cut, max(1, _TIED_ENTRIES // rows.shape[1])):
        entries, names = rows[some], None
        if labels is not None:
            names, order = labels[some].sort(1)
            entries = entries.gather(1, order)
        chosen = _first_of_equals(entries, values[some, -1:], k)
        values[some] = entries.gather(1, chosen)
        indices[some] = chosen if names is None else names.gather(1, chosen)
    if len(tied):
        by_label, order = indices[tied].sort(1)
        values[tied], order = (
            values[tied].gather(1, order).sort(dim=1, descending=True, stable=True)
        )
        indices[tied] = by_label.gather(1, order)
    return values, indices


def _is_cut(values: Tensor, k: int) -> Tensor:
    """``[b]`` bool: whether the entry after the ``k``-th largest of ``[b, k + 1]`` is equal to it."""
    if values.shape[1] == k:
        return torch.zeros(len(values), dtype=torch.bool, device=values.device)
    return (values[:, k] == values[:, k - 1]) | values[:, k].isnan()


def _first_of_equals(rows: Tensor, smallest: Tensor, k: int) -> Tensor:
    """Positions ``[b, k]``, ascending, of the first ``k`` entries of each row by a stable sort.

    ``rows`` ``[b, m]``; ``smallest`` ``[b, 1]`` is the ``k``-th largest entry of each.
    """
    row, column = (~(rows < smallest)).nonzero(as_tuple=True)  # NaN is never <
    found, bound = rows[row, column], smallest[row, 0]
    equal = (found == bound) | (found.isnan() & bound.isnan())
    above = (found > bound) | (found.isnan() & ~bound.isnan())
    n_above = torch.zeros(len(rows), dtype=torch.int64, device=rows.device)
    n_equal = n_above.index_add(0, row, equal.long())
    n_above.index_add_(0, row, above.long())
    # How many entries of the same row, up to this one, are equal to the smallest.
    rank = equal.cumsum(0) - (n_equal.cumsum(0) - n_equal)[row]
    taken = above | (equal & (rank <= (k - n_above)[row]))
    return column[taken].view(-1, k)


def _sorted_topk(rows: Tensor, k: int) -> tuple[Tensor, Tensor]:
    top = rows.topk(k)
    return top.values, top.indices
