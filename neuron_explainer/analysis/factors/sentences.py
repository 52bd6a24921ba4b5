"""Sentences: pieces of documents, each of which the model reads by itself.

Factors are learned from, and looked at in, short pieces of text (64 tokens in the published program), so
that an example can be read at a glance. A document is cut into pieces of equal length, the last of which
is shorter; no piece holds parts of two documents.
"""

from dataclasses import dataclass

import numpy as np

from neuron_explainer.activations.corpus import Ints, TokenCorpus
from neuron_explainer.activations.windows import TokenWindows
from neuron_explainer.errors import InputError
from neuron_explainer.models.model_context import ModelContext


@dataclass(frozen=True)
class Sentences:
    """The pieces of a corpus, numbered from 0 over the whole of it."""

    corpus: TokenCorpus
    """Its documents are the sentences."""
    length: int
    """Tokens of the longest sentence, at most."""
    bos: int | None
    """Id of the start token that the model reads before each sentence; None for none. It is not part of
    the sentence, and its activation is never looked at: in GPT-2 it is many times longer than others."""

    @classmethod
    def cut(cls, corpus: TokenCorpus, length: int = 64, bos: int | None = None) -> "Sentences":
        """Cut the documents of a whole corpus into sentences of at most ``length`` tokens."""
        return cls(corpus.cut(length), length, bos)

    def windows(self, batch_size: int, seed: int | None = None) -> TokenWindows:
        """Batches with one sentence a row, in the order of the corpus or in a seeded one."""
        room = self.length + (self.bos is not None)
        return TokenWindows(
            self.corpus, room, batch_size, concat=False, bos=self.bos, seed=seed, epochs=1
        )

    def number_at(self, positions: Ints) -> Ints:
        """The numbers of the sentences that hold these corpus positions."""
        return np.searchsorted(self.corpus.starts, positions, side="right").astype(np.int64) - 1

    def check(self, context: ModelContext) -> None:
        """Raise InputError if a sentence is too long for the model."""
        room = self.length + (self.bos is not None)
        try:
            longest = context.n_context
        except InputError:  # positions that are not learned may have no end
            return
        if room > longest:
            raise InputError(
                f"sentences of {self.length} tokens{' and a start token' if self.bos is not None else ''} "
                f"are longer than the context of {longest} of {context.model_name}; "
                f"sentence_length={longest - (self.bos is not None)} is the most."
            )
