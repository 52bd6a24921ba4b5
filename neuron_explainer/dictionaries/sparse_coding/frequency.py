"""Weights that keep the most frequent tokens from dominating the dictionary.

    weight(token) = 1 / √(number of times the token occurs in the training set)

Without them, most atoms are spent on the activations of a few words. Tokens are counted by id, because text
would first have to be cut into the same pieces, with the same marks for spaces.

Yun et al. 2021, "Transformer visualization via dictionary learning", appendix.

Shape legend: ``v`` vocabulary, ``…`` any axes.
"""

from collections.abc import Iterable

import torch
from torch import Tensor

from neuron_explainer.activations.windows import TokenBatch
from neuron_explainer.errors import InputError


def count_tokens(batches: Iterable[TokenBatch | Tensor], n_vocab: int) -> Tensor:
    """The number of times each id occurs in the batches, ``[v]`` int64, without padding.

    Tensors of ids ``[…]`` must have no padding. Count everything that training will see, once.
    """
    counts = torch.zeros(n_vocab, dtype=torch.int64)
    for batch in batches:
        tokens = (batch if isinstance(batch, Tensor) else _without_pads(batch)).reshape(-1).cpu()
        _check_ids(tokens)
        if len(tokens) and int(tokens.max()) >= n_vocab:
            raise InputError(f"token {int(tokens.max())} is outside a vocabulary of {n_vocab}.")
        counts += torch.bincount(tokens, minlength=n_vocab)
    return counts


def frequency_weights(tokens: Tensor, counts: Tensor) -> Tensor:
    """``1 / √count`` of each id, ``[…] -> […]`` float64; 1 for ids beyond ``counts``."""
    _check_ids(tokens)
    known = tokens < len(counts)
    count = counts.to(tokens.device)[torch.where(known, tokens, 0)]
    count = torch.where(known, count, 1).clamp(min=1)
    return count.double().rsqrt()


def _without_pads(batch: TokenBatch) -> Tensor:
    return batch.tokens if batch.pad is None else batch.tokens[~batch.pad]


def _check_ids(tokens: Tensor) -> None:
    if tokens.is_floating_point() or tokens.dtype == torch.bool:
        raise InputError(f"token ids must be whole numbers, found {tokens.dtype}.")
    if tokens.numel() and int(tokens.min()) < 0:
        raise InputError(f"token ids must be >= 0, found {int(tokens.min())}.")
