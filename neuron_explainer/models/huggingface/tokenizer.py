"""Hugging Face's tokenizers behind the calls that the rest of the package makes."""

import re
from collections.abc import Iterable
from functools import cached_property
from typing import Any

from neuron_explainer.errors import InputError, SourceError
from neuron_explainer.models.tokenizer_files import BYTE_OF_LETTER
from neuron_explainer.models.tokenizers import NO_START_TOKEN, check_ids, without_lone_surrogates


class HuggingFaceTokenizer:
    """Text to tokens and back, with nothing added: no start token, no cleaning up of spaces.

    Args:
        tokenizer: one of transformers.
    """

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer
        # Without files, transformers silently makes a tokenizer that knows special tokens only.
        if len(tokenizer) <= len(self._special):
            raise SourceError(
                f"the tokenizer {self.name!r} has no vocabulary; token ids work without one."
            )

    @property
    def name(self) -> str:
        """Where it was loaded from."""
        return str(self.tokenizer.name_or_path)

    @property
    def n_vocab(self) -> int:
        """Number of tokens that it knows; a model may have more rows."""
        return len(self.tokenizer)

    @property
    def bos_token(self) -> int:
        """The start token."""
        if self.tokenizer.bos_token_id is None:
            raise InputError(f"the tokenizer {self.name!r} has no start token. {NO_START_TOKEN}")
        return int(self.tokenizer.bos_token_id)

    @cached_property
    def _special(self) -> frozenset[int]:
        return frozenset(self.tokenizer.all_special_ids)

    def encode(self, text: str) -> list[int]:
        """The tokens of a text. Special tokens that it spells out are read as such."""
        if not isinstance(text, str):
            raise InputError(f"expected a text, found {type(text).__name__}.")
        text = without_lone_surrogates(text)
        return list(self.tokenizer.encode(text, add_special_tokens=False))

    def decode(self, ids: Iterable[int]) -> str:
        """The text of tokens from its beginning; an id beyond the vocabulary is ``<|token 50260|>``."""
        text, known = [], []
        for token in check_ids(ids):
            if token < self.n_vocab:
                known.append(token)
                continue
            text += [self._decode(known), f"<|token {token}|>"]
            known = []
        return "".join([*text, self._decode(known)])

    def decode_continuation(self, ids: Iterable[int]) -> str:
        """The text of tokens that continue another text: a space at the front is kept.

        Tokenizers that put a space before a text remove it from the front of what they decode.
        """
        ids = list(ids)
        before, after = self.decode(self._anchor), self.decode([*self._anchor, *ids])
        return after.removeprefix(before) if after.startswith(before) else self.decode(ids)

    @cached_property
    def _anchor(self) -> list[int]:
        """Tokens of some text: of "a", or of the first token that has a text, if "a" has none."""
        found = self.encode("a")
        if found and self.tokenizer.unk_token_id not in found:
            return found
        ordinary = (token for token in range(self.n_vocab) if token not in self._special)
        return next(([token] for token in ordinary if self._decode([token]).strip()), [])

    def token_bytes(self) -> list[bytes]:
        """What each token writes, by id, as bytes.

        Vocabularies that write bytes as letters (GPT-2's way) or as ``<0xE2>`` (SentencePiece's) are read
        off; with another one each token is decoded behind other text.
        """
        names = [str(n) for n in self.tokenizer.convert_ids_to_tokens(list(range(self.n_vocab)))]
        added = {i: str(token) for i, token in self.tokenizer.added_tokens_decoder.items()}
        known = set(names)
        if known >= set(BYTE_OF_LETTER):
            found = [_bytes_of_letters(name) for name in names]
        elif "<0x00>" in known:
            found = [_bytes_of_piece(name) for name in names]
        else:
            found = [self.decode_continuation([i]).encode() for i in range(self.n_vocab)]
        return [added[i].encode() if i in added else text for i, text in enumerate(found)]

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


def _bytes_of_letters(name: str) -> bytes:
    if all(letter in BYTE_OF_LETTER for letter in name):
        return bytes(BYTE_OF_LETTER[letter] for letter in name)
    return name.encode()  # a token that was added


def _bytes_of_piece(name: str) -> bytes:
    byte = re.fullmatch("<0x([0-9A-F]{2})>", name)
    return bytes([int(byte[1], 16)]) if byte else name.replace("\u2581", " ").encode()
