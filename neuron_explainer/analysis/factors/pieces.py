"""The tokens of a sentence as pieces of its text, to be shown one by one.

A character may be made of several tokens (byte-level BPE splits rare ones into bytes). It stands in the piece
of the token that completes it; the pieces of the tokens before it are empty.
"""

from collections.abc import Sequence

from neuron_explainer.models.model_context import ModelContext

_INCOMPLETE = "\ufffd"


def pieces(context: ModelContext, tokens: Sequence[int]) -> list[str]:
    """The text that each token adds; together they are the text of the sentence.

    Tokens that are decoded together may read otherwise than alone: this is the text of all of them.
    """
    found: list[str] = []
    done = ""
    for end in range(1, len(tokens) + 1):
        text = context.decode(tokens[:end])
        # The beginning of a character decodes to U+FFFD until its last byte is there.
        complete = text if end == len(tokens) else text.rstrip(_INCOMPLETE)
        if not complete.startswith(done):
            complete = done
        found.append(complete[len(done) :])
        done = complete
    return found
