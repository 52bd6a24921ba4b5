"""The largest entries of long rows, faster than ``torch.topk`` and with ties settled.

Two stages: the maximum of every group of 16 entries is cheap, and the ``k`` largest entries of a row
lie in the ``k`` groups with the largest maxima. Only the members of those groups are compared.

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


def top_k(x: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The ``k`` largest entries of each row: ``[…, l] -> values […, k], indices […, k]`` int64.

    Exactly the first ``k`` of a stable descending sort: the largest first, of equal entries the one
    with the lowest index first (``torch.topk`` leaves that open), and a NaN counts as larger than
    any number. Values carry no gradient; gather with the indices where one is needed.
    """
    if x.ndim == 0 or not 1 <= k <= x.shape[-1]:
        raise InputError(f"top_k: k={k!r} of entries of shape {list(x.shape)}.")
    with torch.no_grad():
        rows = x.detach().reshape(-1, x.shape[-1])
        values, indices = search(rows, min(k + 1, rows.shape[1]))
        values, indices = settle_ties(values, indices, k, rows, None)
    return values.view(*x.shape[:-1], k), indices.view(*x.shape[:-1], k)


def search(rows: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """``[b, l]`` -> the ``k`` largest in descending order, which of equal ones being left open."""
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
        labels: ``[b, m]`` int64 what ties go by, lowest first; None: the position.
    """
    equal = (values[:, 1:] == values[:, :-1]) | values[:, 1:].isnan()
    tied = equal.any(1).nonzero().squeeze(1)
    values, indices = values[:, :k].contiguous(), indices[:, :k].contiguous()
    if len(tied):
        entries = rows[tied]
        keys = None if labels is None else labels[tied]
        values[tied], indices[tied] = _first_of_equals(entries, values[tied, -1:], k, keys)
    return values, indices


def _first_of_equals(
    rows: Tensor, smallest: Tensor, k: int, labels: Tensor | None
) -> tuple[Tensor, Tensor]:
    """As :func:`settle_ties`, of rows ``[b, m]`` whose ``k``-th largest entry is ``smallest``."""
    nan = rows.isnan()
    above = (rows > smallest) | (nan & ~smallest.isnan())
    equal = (rows == smallest) | (nan & smallest.isnan())
    if labels is None:
        labels = torch.arange(rows.shape[1], device=rows.device).expand_as(rows)
    last = labels.amax() + 1
    rank = torch.where(above, last + 1, torch.where(equal, last - labels, -1))
    chosen = rank.topk(k, sorted=False).indices
    ordered, order = labels.gather(1, chosen).sort(1)
    values, by_value = rows.gather(1, chosen.gather(1, order)).sort(
        dim=1, descending=True, stable=True
    )
    return values, ordered.gather(1, by_value)


def _sorted_topk(rows: Tensor, k: int) -> tuple[Tensor, Tensor]:
    top = rows.topk(k)
    return top.values, top.indices
