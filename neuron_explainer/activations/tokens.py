"""Batches of token windows, with what each token is: of which document, where in it, pad, start token.

Shape legend: ``b`` windows in a batch, ``s`` positions of a window.
"""

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class TokenBatch:
    """Windows of tokens, as they go through a model."""

    tokens: Tensor
    """Ids ``[b, s]`` int64."""
    document: Tensor
    """Running number of the document that each token belongs to, ``[b, s]`` int64; -1 at pads."""
    position: Tensor
    """Place in the window as the model sees it, ``[b, s]`` int64, from 0; -1 at pads."""
    pad: Tensor | None = None
    """Pad mask ``[b, s]`` bool, True at padding; None: there is none."""
    bos: Tensor | None = None
    """``[b, s]`` bool, True at start tokens and document separators that were put there, not read;
    None: there are none."""
