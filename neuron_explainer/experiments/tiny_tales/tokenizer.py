"""A byte-level BPE trained on the books and stored in the format that tiktoken reads.

``tokenizers`` learns the merges (only for training). What is stored and used is tiktoken's list of
base64-encoded tokens with their ranks. Both split text with GPT-2's pattern.
"""

from collections.abc import Iterable
from pathlib import Path

import tiktoken

from neuron_explainer import files
from neuron_explainer.errors import SourceError, optional_module
from neuron_explainer.models.tokenizer_files import (
    BYTE_OF_LETTER,
    GPT2_PATTERN,
    TokenizerSpec,
    as_lines,
)
from neuron_explainer.models.tokenizers import TOKENIZER_FILE, load_encoding

__all__ = [
    "TOKENIZER_FILE",
    "load_tokenizer",
    "save_tokenizer",
    "tokenizer_spec",
    "train_tokenizer",
]

VOCABULARY_SIZE = 4096  # <|endoftext|> included, as the last id
END_OF_TEXT = "<|endoftext|>"


def train_tokenizer(
    texts: Iterable[str], vocabulary_size: int = VOCABULARY_SIZE
) -> dict[bytes, int]:
    """Learn BPE merges; returns tiktoken's ``mergeable_ranks`` (bytes of a token -> its id)."""
    optional_module("tokenizers", "training a tokenizer")
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary_size - 1, initial_alphabet=sorted(BYTE_OF_LETTER), show_progress=False
    )
    tokenizer.train_from_iterator(texts, trainer)
    return {
        bytes(BYTE_OF_LETTER[character] for character in token): rank
        for token, rank in tokenizer.get_vocab().items()
    }


def save_tokenizer(ranks: dict[bytes, int], path: Path) -> None:
    """Write tiktoken's format: one ``base64(token) rank`` a line, in the order of the ranks."""
    with files.atomic_write(path) as temporary:
        temporary.write_bytes(as_lines(ranks))


def tokenizer_spec(path: Path) -> TokenizerSpec:
    """The stored tokenizer, with ``<|endoftext|>`` as the id after the last rank."""
    if not path.is_file():
        raise SourceError(
            f"No tokenizer at {str(path)!r}: train it with "
            "`python -m neuron_explainer.experiments.tiny_tales tokenizer`."
        )
    end_of_text = len(path.read_bytes().splitlines())
    return TokenizerSpec(
        "tiny-tales", GPT2_PATTERN, ((END_OF_TEXT, end_of_text),), (str(path.resolve()),)
    )


def load_tokenizer(path: Path) -> tiktoken.Encoding:
    """The encoding stored by ``save_tokenizer``."""
    return load_encoding(tokenizer_spec(path))
