"""Labels of tokens by rules: what a token is written with, what comes next, where it stands.

Such labels need no annotated data, and everyone knows what they mean. Rules are of four kinds:

- of the token's text: begins a word, has a capital, digit, punctuation, …;
- of the next token's text, which the model is about to predict;
- of the text before: inside a quotation, after punctuation;
- of nothing that a model should care about: whether the position is odd. What probes reach there is the
  least that can be told apart from chance.

Shape legend: ``b`` windows, ``s`` positions, ``v`` different tokens.
"""

import string
from collections.abc import Callable, Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from neuron_explainer.activations.windows import TokenBatch
from neuron_explainer.models.model_context import ModelContext
from neuron_explainer.tables import by_shape

QUOTES = '"“”«»'
"""Characters that begin or end a quotation; the apostrophe is none, as it has other uses."""
LETTERS = string.ascii_lowercase


def _word(text: str) -> str:
    """The text without the space before it, if it begins a word; else nothing."""
    rest = text[1:]
    return rest if text[:1] in (" ", "Ġ", "▁") and rest[:1].isalpha() else ""


TEXT_RULES: Mapping[str, Callable[[str], bool]] = {
    "begins a word": lambda text: bool(_word(text)),
    "capital": lambda text: any(letter.isupper() for letter in text),
    "digit": lambda text: any(letter.isdigit() for letter in text),
    "punctuation": lambda text: bool(text.strip()) and not any(c.isalnum() for c in text),
    "new line": lambda text: "\n" in text,
    "vowel first": lambda text: text.strip()[:1].lower() in tuple("aeiou"),
    "five letters or more": lambda text: sum(letter.isalpha() for letter in text) >= 5,
    "ends in s": lambda text: text.endswith("s"),
}
"""Rules of one token's text."""
NEXT_RULES = ("begins a word", "capital", "punctuation", "new line")
"""Those that are asked of the next token too."""


class TokenLabels(NamedTuple):
    """Labels of the tokens of a batch."""

    labels: dict[str, Tensor]
    """By name, ``[b, s]`` bool."""
    letters: dict[str, Tensor]
    """By letter: whether the token begins a word with it, ``[b, s]`` bool."""
    known: Tensor
    """``[b, s]`` bool: False at pads, start tokens, and where the next token is not of the same document."""

    def __repr__(self) -> str:
        return by_shape(self)


def label_tokens(context: ModelContext, batch: TokenBatch) -> TokenLabels:
    """Apply all rules to a batch of tokens.

    A window that begins inside a document is taken to begin outside of a quotation.
    """
    tokens = batch.tokens.cpu()
    ids, places = torch.unique(tokens, return_inverse=True)
    texts = [context.decode_token(int(token)) for token in ids]

    def where(rule: Callable[[str], bool]) -> Tensor:
        return torch.tensor([rule(text) for text in texts])[places]

    document = batch.document.cpu()
    same = torch.zeros_like(tokens, dtype=torch.bool)
    same[:, :-1] = document[:, :-1] == document[:, 1:]
    own = {name: where(rule) for name, rule in TEXT_RULES.items()}
    labels = dict(own)
    for name in NEXT_RULES:
        labels[f"next: {name}"] = own[name].roll(-1, dims=1) & same
    labels["after punctuation"] = own["punctuation"].roll(1, dims=1) & same.roll(1, dims=1)
    n_quotes = torch.tensor([sum(text.count(quote) for quote in QUOTES) for text in texts])[places]
    labels["in a quotation"] = _running_sum(n_quotes, document) % 2 == 1
    labels["odd position"] = batch.position.cpu() % 2 == 1
    first = [_word(text)[:1].lower() for text in texts]
    letters = {
        letter: torch.tensor([each == letter for each in first])[places] for letter in LETTERS
    }
    known = same.clone()
    for mask in (batch.pad, batch.bos):
        if mask is not None:
            known &= ~mask.cpu()
    return TokenLabels(labels, letters, known)


def _running_sum(counts: Tensor, document: Tensor) -> Tensor:
    """Sums ``[b, s]`` from where each document begins in its window, each token included."""
    total = counts.cumsum(dim=1)
    begins = torch.ones_like(document, dtype=torch.bool)
    begins[:, 1:] = document[:, 1:] != document[:, :-1]
    before = torch.where(begins, total - counts, -1).cummax(dim=1).values
    return total - before
