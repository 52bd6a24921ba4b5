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


def visible(text: str) -> str:
    r"""A piece with its invisible characters shown: ``↵`` for a line break, ``\x1b`` for a control character.

    Marks that turn the direction of a line are shown as well, because they would mix up the pieces.
    """
    return "".join(map(_visible, text))


_TURNING = {*range(0x200E, 0x2010), *range(0x202A, 0x202F), *range(0x2066, 0x206A)}


def _visible(character: str) -> str:
    if character == "\n":
        return "↵"
    code = ord(character)
    if code < 32 or 127 <= code < 160 or code in (*_TURNING, 0x2028, 0x2029):
        return repr(character)[1:-1]
    return character
