"""Which tokens of one text are which tokens of another."""

import difflib
from collections.abc import Sequence

import torch
from torch import Tensor

from neuron_explainer.errors import InputError


def align(here: Sequence[int], there: Sequence[int]) -> Tensor:
    """``[len(here)]`` int64: for each token here, the position of its counterpart there, or -1.

    An edit script (Python's ``difflib``) matches the tokens, so texts of unequal length are aligned where
    they agree. Where some tokens are replaced by as many others, they are matched one by one.
    """
    index_map = torch.full((len(here),), -1)
    matcher = difflib.SequenceMatcher(None, list(here), list(there), autojunk=False)
    for kind, a, b, c, d in matcher.get_opcodes():
        if kind == "equal" or (kind == "replace" and b - a == d - c):
            index_map[a:b] = torch.arange(c, d)
    if bool((index_map < 0).all()):
        raise InputError("the two texts cannot be aligned: they have no token in common.")
    return index_map
