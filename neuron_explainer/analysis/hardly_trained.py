"""Tokens that training hardly touched, found from a model's own embeddings.

A vocabulary has tokens that the model's training text never held: bytes that occur in no valid UTF-8,
pieces of longer tokens, rows beyond the tokenizer. Their rows have all moved in the same way, away from
whatever the model predicts, so each of them stands near the top or the bottom of the list of any
direction that happens to lie along that common vector. They say nothing about the direction.

The rule (after Land & Bartolo 2024, "Fishing for Magikarp", section 2.2):

1. The reference is the tokens that no text can contain: those that are a byte which UTF-8 never uses
   (0xC0, 0xC1, 0xF5 to 0xFF), and rows beyond the tokenizer's vocabulary.
2. A token is hardly trained if the cosine distance of its row to the mean of the reference rows is less
   than a quarter of the median distance of all tokens. For GPT-2 small, where the median is 0.54, the
   bound is 0.134; the paper's authors found 0.140 by asking the model to repeat tokens. The test is left
   out if most of the reference tokens do not pass it themselves: then they are no cluster, as in a model
   with random weights.
3. A token is hardly trained if its row is shorter than a quarter of the median row: what gets no gradient
   is only decayed.
4. Rows beyond the tokenizer's vocabulary are always counted as hardly trained.

Rows are those of the embedding for lists of input tokens, and those of the unembedding times the final
norm's gain for lists of output tokens.

Shape legend: ``d`` model width, ``v`` vocabulary.
"""

import contextlib
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from neuron_explainer.analysis.highlights import token_string
from neuron_explainer.errors import NeuronExplainerError
from neuron_explainer.models.model_context import ModelContext

NEAR = 0.25
"""Share of the median distance, and of the median length, below which a row is hardly trained."""
NEVER_IN_UTF8 = (0xC0, 0xC1, *range(0xF5, 0x100))
_ROWS_AT_ONCE = 2**24  # entries of rows that are looked at together


@dataclass(frozen=True, eq=False)
class HardlyTrained:
    """Which tokens are hardly trained."""

    marked: Tensor
    """``[v]`` bool, on the CPU."""
    n_reference: int
    """How many tokens that no text can contain were compared with; 0 if the test was left out."""

    @property
    def count(self) -> int:
        """How many tokens are marked."""
        return int(self.marked.sum())

    def __repr__(self) -> str:
        return (
            f"HardlyTrained({self.count:,} of {len(self.marked):,} tokens, by "
            f"{self.n_reference} tokens that no text can contain)"
        )


class TokenTexts:
    """The tokens of a model as they are shown: for both kinds of tokenizer, and for models without one.

    An id without a text is ``<|token 50260|>``.
    """

    def __init__(self, context: ModelContext) -> None:
        self._context = context
        try:
            self._encoding: Any = context.get_encoding()
        except NeuronExplainerError:
            self._encoding = (
                None  # token ids only; whatever is wrong is told where text is asked for
            )
        self._gives_bytes = hasattr(self._encoding, "decode_single_token_bytes")

    @property
    def n_known(self) -> int | None:
        """Number of ids that the tokenizer knows; None without a tokenizer."""
        return None if self._encoding is None else int(self._encoding.n_vocab)

    def __call__(self, tokens: Iterable[int]) -> list[str]:
        """The text of each token, as ``token_string`` shows it."""
        return [token_string(self._bytes_of(token)) for token in tokens]

    def _bytes_of(self, token: int) -> bytes:
        if self._gives_bytes:
            with contextlib.suppress(KeyError, OverflowError):  # an id beyond the vocabulary
                piece: bytes = self._encoding.decode_single_token_bytes(token)
                return piece
        elif self._encoding is not None:
            return self._context.decode_token(token).encode()
        return b"<|token %d|>" % token

    def impossible(self) -> list[int]:
        """The tokens that no text can contain: bytes that UTF-8 never uses."""
        if self._encoding is None:
            return []
        find = self._byte_token if self._gives_bytes else self._byte_token_of_hugging_face
        return _distinct(find(byte) for byte in NEVER_IN_UTF8)

    def _byte_token(self, byte: int) -> int | None:
        try:
            return int(self._encoding.encode_single_token(bytes([byte])))
        except KeyError:
            return None

    def _byte_token_of_hugging_face(self, byte: int) -> int | None:
        """Byte-level vocabularies write the byte as the letter of its number, others as ``<0xF5>``."""
        vocabulary: Callable[[], dict[str, int]] = self._encoding.tokenizer.get_vocab
        for name in (chr(byte), f"<0x{byte:02X}>"):
            token = vocabulary().get(name)
            # Where letters are tokens themselves, the same name is the letter, not the byte.
            if token is not None and "\ufffd" in self._context.decode_token(token):
                return token
        return None


def _distinct(tokens: Iterable[int | None]) -> list[int]:
    return sorted({token for token in tokens if token is not None})


@torch.no_grad()
def find_hardly_trained(rows: Tensor, texts: TokenTexts) -> HardlyTrained:
    """Apply the rule of this module to the rows ``[v, d]`` of an embedding."""
    n_rows = len(rows)
    n_known = n_rows if texts.n_known is None else min(n_rows, texts.n_known)
    beyond = torch.arange(n_rows) >= n_known
    reference = [token for token in texts.impossible() if token < n_known]
    reference += beyond.nonzero().flatten().tolist()
    lengths = rows.norm(dim=1).float().cpu()
    marked = beyond | (lengths < NEAR * lengths[~beyond].median())
    distance = _distance_to_mean(rows, reference)
    bound = NEAR * distance[~beyond].median() if len(reference) > 1 else distance.new_tensor(0.0)
    if len(reference) > 1 and bool(distance[reference].median() < bound):
        return HardlyTrained(marked | (distance < bound), len(reference))
    return HardlyTrained(marked, 0)


def _distance_to_mean(rows: Tensor, reference: list[int]) -> Tensor:
    """``[v]``: 1 - the cosine of each row with the mean of the reference's directions, on the CPU."""
    if not reference:
        return torch.ones(len(rows))
    mean = F.normalize(rows[reference].float(), dim=1).mean(dim=0)
    mean = F.normalize(mean, dim=0)
    pieces = torch.split(rows, max(1, _ROWS_AT_ONCE // rows.shape[1]))
    return torch.cat([1 - F.normalize(piece.float(), dim=1) @ mean for piece in pieces]).cpu()
