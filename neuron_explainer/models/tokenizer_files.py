"""Where a tokenizer comes from, and its vocabulary files: tiktoken's ranks, and Hugging Face's.

What tiktoken, the only engine here, cannot reproduce exactly is refused, not approximated.
"""

import base64
import binascii
import hashlib
import itertools
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from neuron_explainer import files
from neuron_explainer.errors import CheckpointError, SourceError

GPT2_PATTERN = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}++| ?\p{N}++| ?[^\s\p{L}\p{N}]++|\s++$|\s+(?!\S)|\s"
"""How GPT-2 splits text before merging. It gives the same splits as the published one, faster."""

# SHA-256 of GPT-2's tokens and ranks as lines of our file; tiktoken states the same for r50k_base.
_GPT2_SHA256 = "306cd27f03c1a714eca7108e03d66b7dc042abe8c258b44c199a7ed9838dd930"
_GPT2_PATTERNS = (
    GPT2_PATTERN,
    r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+",
)


@dataclass(frozen=True)
class TokenizerSpec:
    """Where a tokenizer comes from, without its vocabulary.

    Without ``files`` it is one of tiktoken's, by ``name``. Otherwise ``files`` are either ours
    (``*.tiktoken``, with a token in base64 and its rank on each line), together with ``pattern`` and
    ``special_tokens``, or Hugging Face's (``tokenizer.json``, or ``vocab.json`` and ``merges.txt`` with
    the files beside them), which contain both.
    """

    name: str
    pattern: str | None = None
    """How text is split before merging (a regular expression of tiktoken's); None: as the files say."""
    special_tokens: tuple[tuple[str, int], ...] = ()
    files: tuple[str, ...] = ()
    """Local paths."""


@dataclass(frozen=True)
class Vocabulary:
    """Everything that tiktoken needs."""

    ranks: dict[bytes, int]
    special_tokens: dict[str, int]
    pattern: str


def read_vocabulary(spec: TokenizerSpec) -> Vocabulary:
    """Read the files of a spec; SourceError if one cannot be read any more."""
    try:
        return _read(spec)
    except OSError as error:
        raise SourceError(f"cannot read {error.filename}: {error.strerror}.") from None


def _read(spec: TokenizerSpec) -> Vocabulary:
    paths = [Path(file) for file in spec.files]
    by_name = {path.name: path for path in paths}
    if len(paths) == 1 and paths[0].suffix == ".tiktoken":
        if spec.pattern is None:
            raise CheckpointError(f"{paths[0]}: the pattern that splits text is not given.")
        return Vocabulary(_read_tiktoken(paths[0]), dict(spec.special_tokens), spec.pattern)
    if "tokenizer.json" in by_name:
        return _read_tokenizer_json(by_name["tokenizer.json"])
    if {"vocab.json", "merges.txt"} <= set(by_name):
        return _read_vocab_and_merges(by_name)
    raise CheckpointError(
        f"{', '.join(spec.files)}: expected one file *.tiktoken, a tokenizer.json, or vocab.json "
        "and merges.txt. The model still runs on token ids."
    )


def _read_tiktoken(path: Path) -> dict[bytes, int]:
    # Not tiktoken.load.load_tiktoken_bpe: it copies local files to a cache that is keyed by the
    # path alone, so that a changed vocabulary would go unnoticed.
    ranks: dict[bytes, int] = {}
    for number, line in enumerate(path.read_bytes().splitlines(), 1):
        try:
            token_text, rank_text = line.split()
            token, rank = base64.b64decode(token_text, validate=True), int(rank_text)
        except (ValueError, binascii.Error):
            raise CheckpointError(
                f"{path}, line {number}: expected a token in base64 and its rank, "
                f"found {line[:60]!r}."
            ) from None
        if token in ranks or not token:
            raise CheckpointError(
                f"{path}, line {number}: the token {token!r} is empty or occurs twice."
            )
        ranks[token] = rank
    return ranks


def as_lines(ranks: Mapping[bytes, int]) -> bytes:
    """The content of our vocabulary file: a token in base64 and its rank on each line."""
    by_rank = sorted(ranks.items(), key=lambda item: item[1])
    return b"".join(base64.b64encode(token) + b" %d\n" % rank for token, rank in by_rank)


def _byte_of_letter() -> dict[str, int]:
    """GPT-2's vocabulary files write each byte as one printable letter."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(b): b for b in printable} | {chr(256 + i): b for i, b in enumerate(others)}


BYTE_OF_LETTER = _byte_of_letter()
"""The byte that each of those letters stands for."""


def _bytes_of(text: str) -> bytes:
    return bytes(BYTE_OF_LETTER[letter] for letter in text)


def _read_vocab_and_merges(by_name: dict[str, Path]) -> Vocabulary:
    vocab_path, merges_path = by_name["vocab.json"], by_name["merges.txt"]
    vocab = files.read_json(vocab_path)
    merges = _read_merges(merges_path)
    special: dict[str, int] = {}
    if "added_tokens.json" in by_name:
        special |= files.read_json(by_name["added_tokens.json"])
    if "tokenizer_config.json" in by_name:
        special |= _check_tokenizer_config(by_name["tokenizer_config.json"])
    # These files do not say which tokens are special: those that no merge makes, such as
    # <|endoftext|> in GPT-2's own files.
    made = {left + right for left, right in merges}
    unmade = {text: i for text, i in vocab.items() if not _is_byte(text) and text not in made}
    return from_bpe(vocab, merges, unmade | special, vocab_path)


def _read_merges(path: Path) -> list[tuple[str, str]]:
    try:
        # Not splitlines(): merges contain letters that it treats as line ends.
        lines = path.read_bytes().decode("utf-8").replace("\r\n", "\n").split("\n")
    except UnicodeDecodeError as error:
        raise CheckpointError(f"{path}, byte {error.start}: not UTF-8 text") from None
    if lines[0].startswith("#version"):
        lines = lines[1:]
    pairs = [tuple(line.split(" ")) for line in lines if line]
    return _checked_pairs(pairs, path)


def _checked_pairs(pairs: Iterable[Sequence[Any]], path: Path) -> list[tuple[str, str]]:
    checked = []
    for pair in pairs:
        if len(pair) != 2 or not all(isinstance(part, str) and part for part in pair):
            raise CheckpointError(f"{path}: expected merges of two parts, found {pair!r}.")
        checked.append((pair[0], pair[1]))
    return checked


def _check_tokenizer_config(path: Path) -> dict[str, int]:
    config = files.read_json(path)
    for name in ("add_prefix_space", "add_bos_token", "add_eos_token"):
        if config.get(name):
            raise _unsupported(path, name, config[name], "false")
    found = config.get("added_tokens_decoder", {})
    if not isinstance(found, dict):
        raise _unsupported(path, "added_tokens_decoder", found, "an object")
    try:
        entries = [{"id": int(number), **entry} for number, entry in found.items()]
    except (TypeError, ValueError):
        raise _unsupported(path, "added_tokens_decoder", found, "tokens by their ids") from None
    return _added_tokens(entries, path)


def _read_tokenizer_json(path: Path) -> Vocabulary:
    content = files.read_json(path)
    model = content.get("model")
    if not isinstance(model, dict) or model.get("type", "BPE") != "BPE":
        kind = model.get("type") if isinstance(model, dict) else model
        raise _unsupported(path, "model.type", kind, "'BPE'")
    for name in (
        "dropout",
        "continuing_subword_prefix",
        "end_of_word_suffix",
        "byte_fallback",
        "ignore_merges",
    ):
        if model.get(name):
            raise _unsupported(path, f"model.{name}", model[name], "none")
    if content.get("normalizer") is not None:
        raise _unsupported(path, "normalizer", content["normalizer"], "null")
    _check_processor(content.get("post_processor"), path)
    _check_pre_tokenizer(content.get("pre_tokenizer"), path)
    vocab, merges = model.get("vocab"), model.get("merges")
    if not isinstance(vocab, dict) or not isinstance(merges, list):
        raise CheckpointError(f"{path}: model.vocab must be an object and model.merges a list.")
    # Older files write a merge as "a b", newer ones as ["a", "b"].
    pairs = [merge.split(" ") if isinstance(merge, str) else merge for merge in merges]
    if not all(isinstance(pair, list) for pair in pairs):
        raise CheckpointError(f"{path}: model.merges must hold pairs of texts.")
    special = _added_tokens(content.get("added_tokens") or [], path)
    return from_bpe(vocab, _checked_pairs(pairs, path), special, path)


def _check_processor(found: Any, path: Path) -> None:
    """Refuse a step that adds tokens to each text."""
    if not _adds_nothing(found):
        raise _unsupported(path, "post_processor", found, "one that adds no tokens")


def _adds_nothing(processor: Any) -> bool:
    if processor is None:
        return True
    if not isinstance(processor, dict):
        return False
    if processor.get("type") == "Sequence":
        return all(map(_adds_nothing, processor.get("processors", [None])))
    if processor.get("type") == "TemplateProcessing":  # transformers 5 writes one that is empty
        steps = processor.get("single", ["?"])
        return len(steps) == 1 and "Sequence" in steps[0]
    return processor.get("type") == "ByteLevel"  # moves offsets only


def _check_pre_tokenizer(found: Any, path: Path) -> None:
    """Refuse all but GPT-2's split: ByteLevel's own, or a Split and a ByteLevel without one."""
    steps = [found]
    if isinstance(found, dict) and found.get("type") == "Sequence":
        steps = found.get("pretokenizers") or [None]
    if not all(isinstance(step, dict) for step in steps):
        raise _unsupported(path, "pre_tokenizer", found, "ByteLevel")
    last = steps[-1]
    if last.get("type") != "ByteLevel" or last.get("add_prefix_space", True):
        raise _unsupported(path, "pre_tokenizer", found, "ByteLevel with add_prefix_space false")
    own_split = last.get("use_regex", True)
    if not (
        (len(steps) == 1 and own_split)
        or (len(steps) == 2 and not own_split and _splits_as_gpt2(steps[0]))
    ):
        raise _unsupported(path, "pre_tokenizer", found, "one that splits as GPT-2's does")


def _splits_as_gpt2(step: dict[str, Any]) -> bool:
    wanted = {"type": "Split", "behavior": "Isolated", "invert": False}
    return {name: step.get(name) for name in wanted} == wanted and (
        step.get("pattern") in [{"Regex": pattern} for pattern in _GPT2_PATTERNS]
    )


def _added_tokens(entries: Any, path: Path) -> dict[str, int]:
    tokens: dict[str, int] = {}
    for entry in entries:
        if not (
            isinstance(entry, dict)
            and isinstance(entry.get("content"), str)
            and type(entry.get("id")) is int
        ):
            raise CheckpointError(f"{path}: an added token lacks its id or content: {entry!r}.")
        for name in ("lstrip", "rstrip", "single_word"):
            if entry.get(name):
                raise _unsupported(path, f"{name} of {entry['content']!r}", True, "false")
        tokens[entry["content"]] = entry["id"]
    return tokens


def _unsupported(path: Path, name: str, found: object, supported: str) -> CheckpointError:
    return CheckpointError(
        f"{path}: {name} is {str(found)[:200]!r}; supported is {supported}. Another tokenizer would "
        "give other tokens than the model was trained on; give token ids instead."
    )


def from_bpe(
    vocab: dict[str, Any],
    merges: list[tuple[str, str]],
    added: dict[str, Any],
    path: Path,
) -> Vocabulary:
    """A vocabulary of letters and merges as tiktoken's ranks, if both give the same tokens.

    A token that no merge makes and that is not a single byte never comes from text. If it was not
    ``added`` as a special token either, it is left out, so that similar text is not read as that token.
    """
    for name, token in (*vocab.items(), *added.items()):
        if type(token) is not int:
            raise CheckpointError(f"{path}: the id of {name!r} is not a whole number: {token!r}.")
    made = {left + right for left, right in merges}
    ordinary = {text: token for text, token in vocab.items() if _is_byte(text) or text in made}
    contradictory = sorted(
        text for text, token in added.items() if text in ordinary or vocab.get(text, token) != token
    )
    if contradictory:
        raise CheckpointError(
            f"{path}: added tokens contradict the vocabulary: {some(contradictory)}."
        )
    _check_merges(ordinary, merges, path)
    ranks = {_bytes_of(text): rank for text, rank in ordinary.items()}
    special = dict(sorted(added.items(), key=lambda item: item[1]))
    return Vocabulary(ranks, special, GPT2_PATTERN)


def _is_byte(text: str) -> bool:
    return len(text) == 1 and text in BYTE_OF_LETTER


def _check_merges(vocab: dict[str, int], merges: list[tuple[str, str]], path: Path) -> None:
    """Check that merging the pair of the lowest *rank* (tiktoken) is merging the *first* pair (BPE).

    It is if two things hold. Ids rise in the order of the merges. And each token, spelled out in letters
    and merged by ranks below its own, ends as exactly the two parts that its merge names: then no other
    pair can make it.
    """
    previous = -1
    for left, right in merges:
        token = left + right
        absent = [text for text in (left, right, token) if text not in vocab]
        if absent:
            raise CheckpointError(
                f"{path}: merged tokens are not in the vocabulary: {some(absent)}."
            )
        if not all(letter in BYTE_OF_LETTER for letter in token):
            raise CheckpointError(f"{path}: {token!r} is not written in GPT-2's letters for bytes.")
        rank = vocab[token]
        if rank <= previous or merge_below(token, vocab, rank) != [left, right]:
            raise CheckpointError(
                f"{path}: the ids of tokens do not follow the order of their merges (at {token!r}, "
                f"id {rank}), which tiktoken assumes; give token ids instead."
            )
        previous = rank


def merge_below(token: str, ranks: dict[str, int], top: int) -> list[str]:
    """Merge the letters of ``token`` by ranks below ``top``, as byte-pair encoding does."""
    parts = list(token)
    while len(parts) > 1:
        pairs = [ranks.get(a + b, top) for a, b in itertools.pairwise(parts)]
        best = min(pairs)
        if best >= top:
            break
        at = pairs.index(best)
        parts[at : at + 2] = [parts[at] + parts[at + 1]]
    return parts


def is_gpt2(spec: TokenizerSpec) -> bool:
    """Whether a spec is tiktoken's ``gpt2``, by name or by the content of its files."""
    if not spec.files:
        return spec.name == "gpt2"
    vocabulary = read_vocabulary(spec)
    return (
        hashlib.sha256(as_lines(vocabulary.ranks)).hexdigest() == _GPT2_SHA256
        and vocabulary.pattern in _GPT2_PATTERNS
        and vocabulary.special_tokens == {"<|endoftext|>": 50256}
    )


def some(values: Sequence[object]) -> str:
    """The first values, for an error message."""
    shown = ", ".join(map(repr, values[:5]))
    return shown + (f" and {len(values) - 5} more" if len(values) > 5 else "")
