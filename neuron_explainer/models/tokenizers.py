"""Tokenizers: tiktoken's own by name, and those whose vocabulary is beside a model's weights.

Nothing is read or downloaded before the first text: models run on token ids without a vocabulary.
tiktoken is the only engine. A vocabulary that it cannot reproduce exactly is refused, not approximated.
"""

import itertools
import threading
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from neuron_explainer import files
from neuron_explainer.errors import CheckpointError, InputError, SourceError, did_you_mean
from neuron_explainer.models.tokenizer_files import (
    TokenizerSpec,
    Vocabulary,
    as_lines,
    read_vocabulary,
    some,
)

if TYPE_CHECKING:
    import tiktoken

TOKENIZER_FILE = "tokenizer.tiktoken"
END_OF_TEXT = "<|endoftext|>"
NO_TOKENIZER = "none"
"""The ``enc`` of a model that came without a tokenizer of its own or a name for one."""
NO_START_TOKEN = (
    "Use bos=False (in the shell --no-bos, or leave --bos out). capture and sample also take the id of "
    "any token as bos."
)
"""What to do with a model that has no start token."""


_cache: dict[object, "tiktoken.Encoding"] = {}
_lock = threading.RLock()


def builtin_names() -> list[str]:
    """The names that tiktoken knows; nothing is downloaded."""
    import tiktoken

    return tiktoken.list_encoding_names()


def load_encoding(spec: TokenizerSpec | str) -> "tiktoken.Encoding":
    """The encoding of a spec or of one of tiktoken's names; it is made once in a process.

    A vocabulary file that has changed since then is read again.
    """
    if isinstance(spec, str):
        spec = TokenizerSpec(spec)
    if not spec.files:
        return _builtin(spec.name)
    key = (spec, *(_state_of(file) for file in spec.files))
    with _lock:
        if key not in _cache:
            _cache[key] = _make_encoding(spec.name, read_vocabulary(spec), spec.files[0])
        return _cache[key]


def _state_of(file: str) -> tuple[int, int]:
    try:
        found = Path(file).stat()
    except OSError as error:
        raise CheckpointError(
            f"{file}: this vocabulary file cannot be read ({error.strerror}). "
            "The model still runs on token ids."
        ) from None
    return found.st_mtime_ns, found.st_size


def _builtin(name: str) -> "tiktoken.Encoding":
    import tiktoken

    if name == NO_TOKENIZER:
        raise SourceError(
            "this model came without a tokenizer, so text cannot be turned into tokens. Give "
            f"token ids instead, or save the model with a tokenizer ({TOKENIZER_FILE})."
        )
    if name not in builtin_names():
        raise SourceError(
            f"unknown tokenizer {name!r}.{did_you_mean(name, builtin_names())} "
            f"Known by name: {', '.join(sorted(builtin_names()))}. Token ids work without one."
        )
    try:
        return tiktoken.get_encoding(name)
    except (OSError, ValueError) as error:  # requests' errors are OSErrors
        raise SourceError(
            f"the vocabulary of the tokenizer {name!r} is not available: {_first_line(error)}. "
            "tiktoken downloads it once; set TIKTOKEN_CACHE_DIR to a folder in which to keep it, "
            "or, without a network, to a folder that already has it. "
            "Token ids work without it."
        ) from error


def _first_line(error: Exception) -> str:
    text = str(error).strip()
    return f"{type(error).__name__}: {text.splitlines()[0][:200] if text else 'no details'}"


def _make_encoding(name: str, vocabulary: Vocabulary, where: str) -> "tiktoken.Encoding":
    import tiktoken

    _check_vocabulary(vocabulary, where)
    try:
        return tiktoken.Encoding(
            name,
            pat_str=vocabulary.pattern,
            mergeable_ranks=vocabulary.ranks,
            special_tokens=vocabulary.special_tokens,
        )
    except (ValueError, OverflowError) as error:
        raise CheckpointError(f"{where}: tiktoken refuses this: {_first_line(error)}") from error


def _check_vocabulary(vocabulary: Vocabulary, where: str) -> None:
    """Check what tiktoken assumes: if it does not hold, tiktoken panics or drops text."""
    ranks, special = vocabulary.ranks, vocabulary.special_tokens
    absent = [byte for byte in range(256) if bytes([byte]) not in ranks]
    if absent:
        raise CheckpointError(
            f"{where}: {len(absent)} of the 256 single bytes are no tokens (the first is "
            f"0x{absent[0]:02x}), so some text could not be written with this vocabulary."
        )
    ids = sorted([*ranks.values(), *special.values()])
    twice = sorted({one for one, next_one in itertools.pairwise(ids) if one == next_one})
    if twice:
        raise CheckpointError(f"{where}: these ids belong to two tokens each: {some(twice)}.")
    if ids[0] < 0 or ids[-1] >= 2**32:
        raise CheckpointError(f"{where}: token ids must be in 0 to 2**32, found {some(ids)}.")
    if "" in special:
        raise CheckpointError(f"{where}: a special token is an empty text.")


def write_tiktoken(spec: TokenizerSpec, path: str | Path) -> TokenizerSpec:
    """Write the vocabulary of a spec with files in our format; returns the spec of the written file."""
    vocabulary = read_vocabulary(spec)
    _make_encoding(spec.name, vocabulary, spec.files[0])
    path = Path(path)
    with files.atomic_write(path) as temporary:
        temporary.write_bytes(as_lines(vocabulary.ranks))
    return replace(
        spec,
        pattern=vocabulary.pattern,
        special_tokens=tuple(vocabulary.special_tokens.items()),
        files=(str(path),),
    )


# ------------------------------------------------------------------------------- text and tokens


def start_token(spec: TokenizerSpec | str) -> int:
    """The id of ``<|endoftext|>``, the start token of GPT-2-family models.

    The vocabulary is read only if neither the spec nor the name says it.
    """
    if isinstance(spec, str):
        spec = TokenizerSpec(spec)
    if (known := known_start_token(spec)) is not None:
        return known
    if spec.name == NO_TOKENIZER and not spec.files:
        raise InputError(f"a model without a tokenizer has no known start token. {NO_START_TOKEN}")
    return start_token_of(load_encoding(spec))


def known_start_token(spec: TokenizerSpec | str) -> int | None:
    """The start token if it is known without the vocabulary, else None."""
    if isinstance(spec, str):
        spec = TokenizerSpec(spec)
    is_gpt2 = spec.name == "gpt2" and not spec.files
    return dict(spec.special_tokens).get(END_OF_TEXT, 50256 if is_gpt2 else None)


def start_token_of(encoding: "tiktoken.Encoding") -> int:
    """The id of ``<|endoftext|>`` in an encoding."""
    if END_OF_TEXT not in encoding.special_tokens_set:
        raise InputError(
            f"the tokenizer {encoding.name!r} has no start token {END_OF_TEXT}. {NO_START_TOKEN}"
        )
    return encoding.eot_token


def encode_prompt(enc: "tiktoken.Encoding", text: str) -> list[int]:
    """The tokens of a text. Special tokens that it spells out, ``<|endoftext|>``, are read as such."""
    if not isinstance(text, str):
        raise InputError(f"expected a text, found {type(text).__name__}.")
    return enc.encode(without_lone_surrogates(text), allowed_special="all")


def without_lone_surrogates(text: str) -> str:
    r"""Text as UTF-8 can hold it: a pair of surrogates is its character, a lone one is U+FFFD.

    Scraped JSON has them (``"\ud83d"``), and no tokenizer can encode them.
    """
    try:
        text.encode()
    except UnicodeEncodeError:
        return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    return text


def decode(enc: "tiktoken.Encoding", ids: Iterable[int]) -> str:
    """The text of tokens, decoded together, so that characters made of several tokens are right.

    Bytes that are not UTF-8 become U+FFFD. An id beyond the vocabulary, which a model with a padded
    embedding may sample, becomes ``<|token 50260|>``: it has no text, and dropping it would hide
    that the model chose it.
    """
    return b"".join(_bytes_of_token(enc, i) for i in check_ids(ids)).decode(errors="replace")


def token_strings(enc: "tiktoken.Encoding", ids: Iterable[int]) -> list[str]:
    r"""Each token's own text, for display; parts of characters are shown as bytes (``\xe2``)."""
    return [_bytes_of_token(enc, i).decode(errors="backslashreplace") for i in check_ids(ids)]


def vocabulary_bytes(enc: Any) -> list[bytes]:
    """What each token of a tokenizer writes, by id, as bytes: a token may end within a character.

    Args:
        enc: a ``tiktoken.Encoding``, or a tokenizer with a method ``token_bytes``.
    """
    if hasattr(enc, "token_bytes"):
        return list(enc.token_bytes())
    return [_bytes_of_token(enc, i) for i in range(enc.n_vocab)]


def check_ids(ids: Iterable[int]) -> list[int]:
    """The ids as plain ints; an InputError if one is negative or not a whole number."""
    result = []
    for i in ids:
        try:
            number = i.__index__()  # numpy's and torch's whole numbers too
        except (AttributeError, TypeError):
            raise InputError(f"token ids must be whole numbers, found {i!r}.") from None
        if number < 0:
            raise InputError(f"token ids must be at least 0, found {number}.")
        result.append(number)
    return result


def _bytes_of_token(enc: "tiktoken.Encoding", token: int) -> bytes:
    try:
        return enc.decode_single_token_bytes(token)
    except (KeyError, OverflowError):
        return b"<|token %d|>" % token
