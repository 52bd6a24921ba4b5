"""Hugging Face's tokenizers behind the calls that the rest of the package makes."""

from collections.abc import Iterable
from typing import Any

from neuron_explainer.errors import InputError, SourceError


class HuggingFaceTokenizer:
    """Text to tokens and back, with nothing added: no start token, no cleaning up of spaces.

    Args:
        tokenizer: one of transformers.
    """

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer
        # Where there are no files, transformers makes a tokenizer that knows nothing, without a word.
        if set(self.encode("a")) <= {tokenizer.unk_token_id}:
            raise SourceError(
                f"the tokenizer {self.name!r} has no vocabulary; token ids work without one."
            )

    @property
    def name(self) -> str:
        """Where it was loaded from."""
        return str(self.tokenizer.name_or_path)

    @property
    def n_vocab(self) -> int:
        """Tokens that it knows; a model may have more rows."""
        return len(self.tokenizer)

    @property
    def bos_token(self) -> int:
        """The start token."""
        if self.tokenizer.bos_token_id is None:
            raise InputError(f"the tokenizer {self.name!r} has no start token; give its id as bos.")
        return int(self.tokenizer.bos_token_id)

    def encode(self, text: str) -> list[int]:
        """The tokens of a text; special tokens that it spells out are those."""
        if not isinstance(text, str):
            raise InputError(f"expected a text, found {type(text).__name__}.")
        return list(self.tokenizer.encode(text, add_special_tokens=False))

    def decode(self, ids: Iterable[int]) -> str:
        """The text of tokens from its beginning; an id beyond the vocabulary is ``<|token 50260|>``."""
        text, known = [], []
        for token in _checked(ids):
            if token < self.n_vocab:
                known.append(token)
                continue
            text += [self._decode(known), f"<|token {token}|>"]
            known = []
        return "".join([*text, self._decode(known)])

    def decode_continuation(self, ids: Iterable[int]) -> str:
        """The text of tokens that go on another text: a space at the front is kept.

        Tokenizers that put a space before a text take it away from the front of what they decode.
        """
        ids, anchor = list(ids), self.encode("a")
        start, text = self.decode(anchor), self.decode([*anchor, *ids])
        return text.removeprefix(start) if text.startswith(start) else self.decode(ids)

    def _decode(self, ids: list[int]) -> str:
        if not ids:
            return ""
        return str(
            self.tokenizer.decode(
                ids, skip_special_tokens=False, clean_up_tokenization_spaces=False
            )
        )

    def __repr__(self) -> str:
        return f"HuggingFaceTokenizer({self.name!r}, {self.n_vocab} tokens)"


def _checked(ids: Iterable[int]) -> list[int]:
    numbers = [int(i) for i in ids]
    if any(number < 0 for number in numbers):
        raise InputError(f"token ids must be at least 0, found {min(numbers)}.")
    return numbers
