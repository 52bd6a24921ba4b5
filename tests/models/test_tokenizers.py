"""Tokenizers: the same tokens as the library that wrote the files, or a refusal."""

import json
import os
import random
from base64 import b64encode
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import tiktoken
from hypothesis import given, settings
from hypothesis import strategies as st
from tiktoken.load import load_tiktoken_bpe

from neuron_explainer.errors import CheckpointError, InputError, SourceError
from neuron_explainer.models import tokenizer_files, tokenizers
from neuron_explainer.models.huggingface.tokenizer import HuggingFaceTokenizer
from neuron_explainer.models.tokenizer_files import (
    GPT2_PATTERN,
    TokenizerSpec,
    is_gpt2,
    read_vocabulary,
)
from neuron_explainer.models.tokenizers import (
    builtin_names,
    decode,
    encode_prompt,
    load_encoding,
    token_strings,
    vocabulary_bytes,
    without_lone_surrogates,
    write_tiktoken,
)

TEXT = (
    "The Mole had been working very hard all the morning, spring-cleaning his little home. "
    "It's the Rat's boat; they'll row, won't they?  Two  spaces\n\nand lines.\t1234 €5,50 naïve "
    "日本語 🙂 ‘quotes’ — the end."
)
REAL_CACHE = Path(__file__).parents[3] / "shared/tiktoken_cache"


@pytest.fixture(autouse=True)
def no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    """tiktoken reads URLs through this function alone."""

    def refuse(url: str) -> bytes:
        raise ConnectionError(f"no network in tests: {url}")

    monkeypatch.setattr("tiktoken.load.read_file", refuse)


@pytest.fixture(scope="session")
def trained() -> Any:
    """A byte-level BPE of Hugging Face's library, split as GPT-2 does."""
    library = pytest.importorskip("tokenizers")
    made = library.Tokenizer(library.models.BPE())
    made.pre_tokenizer = library.pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = library.decoders.ByteLevel()
    trainer = library.trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=["<|endoftext|>"],
        initial_alphabet=library.pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    made.train_from_iterator([TEXT] * 3, trainer)
    return made


@pytest.fixture
def json_file(trained: Any, tmp_path: Path) -> Path:
    trained.save(str(tmp_path / "tokenizer.json"))
    return tmp_path / "tokenizer.json"


@pytest.fixture
def vocab_files(trained: Any, tmp_path: Path) -> tuple[str, ...]:
    trained.model.save(str(tmp_path))
    return (str(tmp_path / "vocab.json"), str(tmp_path / "merges.txt"))


def load(*paths: str | Path) -> tiktoken.Encoding:
    return load_encoding(TokenizerSpec("test", files=tuple(map(str, paths))))


def own_spec(tmp_path: Path, **tokens: int) -> TokenizerSpec:
    """Single bytes and a few words."""
    ranks = {bytes([b]): b for b in range(256)} | {t.encode(): i for t, i in tokens.items()}
    path = tmp_path / "own.tiktoken"
    path.write_bytes(b"".join(b64encode(t) + b" %d\n" % i for t, i in ranks.items()))
    return TokenizerSpec("own", GPT2_PATTERN, (("<|endoftext|>", 300),), (str(path),))


# ---------------------------------------------------------------------------- Hugging Face's files


def texts() -> Iterator[str]:
    yield TEXT
    yield ""
    yield "<|endoftext|>Once upon a time<|endoftext|>"
    chance = random.Random(0)
    for _ in range(50):
        yield "".join(chance.choices(TEXT, k=chance.randrange(1, 60)))
    for _ in range(50):
        yield "".join(chr(chance.choice([*range(1, 0x300), 0x3000, 0x1F642])) for _ in range(20))


def test_tokenizer_json_gives_the_same_tokens(trained: Any, json_file: Path) -> None:
    enc = load(json_file)
    assert enc.n_vocab == trained.get_vocab_size()
    for text in texts():
        assert encode_prompt(enc, text) == trained.encode(text).ids, text
        assert decode(enc, encode_prompt(enc, text)) == text


@given(st.text(max_size=40))
@settings(deadline=None, max_examples=200, database=None)
def test_any_text_gives_the_same_tokens(trained: Any, text: str) -> None:
    vocab = trained.get_vocab()
    merges = [tuple(pair) for pair in json.loads(trained.to_str())["model"]["merges"]]
    made = tokenizer_files.from_bpe(
        {t: i for t, i in vocab.items() if t != "<|endoftext|>"},
        merges,
        {"<|endoftext|>": vocab["<|endoftext|>"]},
        Path("tokenizer.json"),
    )
    enc = tokenizers._make_encoding("test", made, "test")
    assert encode_prompt(enc, text) == trained.encode(text).ids


def test_vocab_and_merges_give_the_same_tokens(trained: Any, vocab_files: tuple[str, ...]) -> None:
    enc = load(*vocab_files)
    for text in texts():
        assert encode_prompt(enc, text) == trained.encode(text).ids


def test_merges_without_a_version_line_and_with_windows_ends(
    trained: Any, vocab_files: tuple[str, ...]
) -> None:
    merges = Path(vocab_files[1])
    lines = merges.read_text("utf-8").split("\n")
    assert lines[0].startswith("#version")
    merges.write_bytes("\r\n".join(lines[1:]).encode())
    assert encode_prompt(load(*vocab_files), TEXT) == trained.encode(TEXT).ids


def test_transformers_folder_gives_the_same_tokens(
    vocab_files: tuple[str, ...], tmp_path: Path
) -> None:
    transformers = pytest.importorskip("transformers")
    theirs = transformers.GPT2Tokenizer(*vocab_files)
    theirs.save_pretrained(tmp_path / "saved")
    path = tmp_path / "saved/tokenizer.json"
    if not path.exists():
        pytest.skip("this version of transformers writes no tokenizer.json")
    enc = load(path)
    for text in texts():
        assert encode_prompt(enc, text) == theirs.encode(text)


def test_added_tokens_are_special(vocab_files: tuple[str, ...], tmp_path: Path) -> None:
    added = tmp_path / "added_tokens.json"
    added.write_text('{"<pad>": 400}')
    config = tmp_path / "tokenizer_config.json"
    config.write_text('{"added_tokens_decoder": {"401": {"content": "<sep>", "lstrip": false}}}')
    enc = load(*vocab_files, added, config)
    assert encode_prompt(enc, "<pad><sep><|endoftext|>") == [400, 401, enc.eot_token]
    added.write_text('{"<pad>": 5}')
    with pytest.raises(CheckpointError, match=r"two tokens each: 5"):
        load(*vocab_files, added, config)


def test_tokenizer_json_with_two_part_merges_as_one_text(json_file: Path) -> None:
    expected = encode_prompt(load(json_file), TEXT)
    content = json.loads(json_file.read_text("utf-8"))
    content["model"]["merges"] = [" ".join(pair) for pair in content["model"]["merges"]]
    json_file.write_text(json.dumps(content))
    assert encode_prompt(load(json_file), TEXT) == expected


def test_split_by_gpt2s_own_regex_is_accepted(trained: Any, json_file: Path) -> None:
    pattern = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
    split = {
        "type": "Split",
        "pattern": {"Regex": pattern},
        "behavior": "Isolated",
        "invert": False,
    }
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "use_regex": False}
    content = json.loads(json_file.read_text("utf-8"))
    content["pre_tokenizer"] = {"type": "Sequence", "pretokenizers": [split, byte_level]}
    json_file.write_text(json.dumps(content))
    assert encode_prompt(load(json_file), TEXT) == trained.encode(TEXT).ids


BYTE_LEVEL = {"type": "ByteLevel", "add_prefix_space": False, "use_regex": True}


@pytest.mark.parametrize(
    ("part", "value", "message"),
    [
        ("pre_tokenizer", {"type": "Whitespace"}, "pre_tokenizer"),
        ("pre_tokenizer", None, "pre_tokenizer"),
        ("pre_tokenizer", {"type": "Sequence", "pretokenizers": []}, "pre_tokenizer"),
        ("pre_tokenizer", BYTE_LEVEL | {"add_prefix_space": True}, "add_prefix_space false"),
        ("pre_tokenizer", BYTE_LEVEL | {"use_regex": False}, "splits as GPT-2's"),
        (
            "pre_tokenizer",
            {"type": "Sequence", "pretokenizers": [{"type": "Digits"}, BYTE_LEVEL]},
            "splits as GPT-2's",
        ),
        ("normalizer", {"type": "NFC"}, "normalizer"),
        ("post_processor", {"type": "TemplateProcessing"}, "adds no tokens"),
        (
            "post_processor",
            {"type": "TemplateProcessing", "single": [{"SpecialToken": {"id": "<s>"}}]},
            "adds no tokens",
        ),
        (
            "post_processor",
            {"type": "Sequence", "processors": [{"type": "Bert"}]},
            "adds no tokens",
        ),
        ("model", {"type": "Unigram", "vocab": []}, "model.type is 'Unigram'"),
        ("model", {"type": "BPE", "dropout": 0.1}, "model.dropout is '0.1'"),
        ("model", {"type": "BPE", "end_of_word_suffix": "</w>"}, "end_of_word_suffix"),
        ("model", {"type": "BPE", "vocab": [], "merges": []}, "vocab must be an object"),
        ("model", {"type": "BPE", "vocab": {}, "merges": [1]}, "merges must hold pairs"),
        ("model", {"type": "BPE", "vocab": {}, "merges": [["a"]]}, "merges of two parts"),
        ("model", {"type": "BPE", "vocab": {}, "merges": []}, "256 of the 256 single bytes"),
        ("model", {"type": "BPE", "vocab": {"a": "b"}, "merges": []}, "not a whole number"),
        ("added_tokens", [{"id": 1, "content": "<x>", "lstrip": True}], "lstrip of '<x>'"),
        ("added_tokens", [{"content": "<x>"}], "lacks its id"),
        ("added_tokens", [{"id": 7, "content": "e"}], "contradict the vocabulary: 'e'"),
    ],
)
def test_what_tiktoken_cannot_reproduce_is_refused(
    part: str, value: Any, message: str, json_file: Path
) -> None:
    content = json.loads(json_file.read_text("utf-8"))
    content[part] = value
    json_file.write_text(json.dumps(content))
    with pytest.raises(CheckpointError) as caught:
        load(json_file)
    assert message in str(caught.value)
    assert str(json_file) in str(caught.value)


@pytest.mark.parametrize("field", ["add_prefix_space", "add_bos_token"])
def test_tokenizer_config_that_changes_tokens_is_refused(
    field: str, vocab_files: tuple[str, ...], tmp_path: Path
) -> None:
    config = tmp_path / "tokenizer_config.json"
    config.write_text(json.dumps({field: True}))
    with pytest.raises(CheckpointError, match=f"{field} is 'True'; supported is false"):
        load(*vocab_files, config)


def letters() -> dict[str, int]:
    return {letter: number for number, letter in enumerate(tokenizer_files.BYTE_OF_LETTER)}


@pytest.mark.parametrize(
    ("words", "merges"),
    [
        # the second merge makes the lower id
        ({"ab": 257, "cd": 256}, [("a", "b"), ("c", "d")]),
        # abc is made of ab + c, but tiktoken would come to a + bc first
        ({"bc": 256, "ab": 257, "abc": 258}, [("b", "c"), ("a", "b"), ("ab", "c")]),
        # the same token made twice
        ({"aa": 256, "aaa": 257}, [("a", "a"), ("aa", "a"), ("a", "aa")]),
    ],
)
def test_ranks_that_are_not_the_order_of_merges(
    words: dict[str, int], merges: list[tuple[str, str]]
) -> None:
    with pytest.raises(CheckpointError, match="do not follow the order of their merges"):
        tokenizer_files.from_bpe(letters() | words, merges, {}, Path("tokenizer.json"))


def test_merges_that_are_accepted_give_the_same_tokens() -> None:
    """Random merges, most of them such as no training would make."""
    library = pytest.importorskip("tokenizers")
    chance = random.Random(5)
    accepted = 0
    for _ in range(300):
        vocab, merges, parts = letters(), [], ["a", "b", "c"]
        for _ in range(chance.randrange(1, 8)):
            left, right = chance.choice(parts), chance.choice(parts)
            if left + right not in vocab:
                vocab[left + right] = len(vocab)
                merges.append((left, right))
                parts.append(left + right)
        try:
            made = tokenizer_files.from_bpe(vocab, merges, {}, Path("tokenizer.json"))
        except CheckpointError:
            continue
        accepted += 1
        enc = tokenizers._make_encoding("test", made, "test")
        theirs = library.Tokenizer(library.models.BPE(vocab=vocab, merges=merges))
        theirs.pre_tokenizer = library.pre_tokenizers.ByteLevel(add_prefix_space=False)
        for _ in range(20):
            text = "".join(chance.choices("abc", k=chance.randrange(1, 16)))
            assert encode_prompt(enc, text) == theirs.encode(text).ids, (merges, text)
    assert 150 < accepted < 300


@pytest.mark.parametrize(
    ("words", "merges", "message"),
    [
        ({}, [("a", "b")], "merged tokens are not in the vocabulary: 'ab'"),
        ({"ab c": 256}, [("ab", " c")], "not in the vocabulary: 'ab', ' c'"),
        ({" c": 256, " ": 257}, [(" ", "c")], "not in the vocabulary: ' '"),
    ],
)
def test_merges_that_do_not_fit_the_vocabulary(
    words: dict[str, int], merges: list[tuple[str, str]], message: str
) -> None:
    with pytest.raises(CheckpointError, match=message):
        tokenizer_files.from_bpe(letters() | words, merges, {}, Path("tokenizer.json"))


def test_token_that_was_not_added_is_not_read_from_text(json_file: Path) -> None:
    content = json.loads(json_file.read_text("utf-8"))
    content["model"]["vocab"]["<odd>"] = 400
    json_file.write_text(json.dumps(content))
    enc = load(json_file)
    assert 400 not in encode_prompt(enc, "<odd>")
    assert decode(enc, [400]) == "<|token 400|>"


# ------------------------------------------------------------------------------------ our own file


def test_own_file_round_trip(json_file: Path, tmp_path: Path) -> None:
    spec = TokenizerSpec("test", files=(str(json_file),))
    written = write_tiktoken(spec, tmp_path / "tokenizer.tiktoken")
    assert written.pattern == GPT2_PATTERN
    assert written.special_tokens == (("<|endoftext|>", 0),)
    expected = load_encoding(spec)
    assert encode_prompt(load_encoding(written), TEXT) == encode_prompt(expected, TEXT)
    again = write_tiktoken(written, tmp_path / "again.tiktoken")
    assert Path(again.files[0]).read_bytes() == Path(written.files[0]).read_bytes()


def test_own_file_is_readable_by_tiktoken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    spec = own_spec(tmp_path, th=256, the=257)
    monkeypatch.undo()
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", "")
    assert load_tiktoken_bpe(spec.files[0]) == read_vocabulary(spec).ranks


def test_encodings_are_made_once_and_again_when_the_file_changes(tmp_path: Path) -> None:
    spec = own_spec(tmp_path, th=256)
    assert load_encoding(spec) is load_encoding(spec)
    assert encode_prompt(load_encoding(spec), "the") == [256, 101]
    own_spec(tmp_path, th=256, the=257)
    assert encode_prompt(load_encoding(spec), "the") == [257]


def test_nothing_is_left_in_tiktokens_cache(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache = tmp_path / "cache"
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(cache))
    load_encoding(own_spec(tmp_path, th=256))
    assert not cache.exists()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"dGg=\n", "line 1: expected a token in base64 and its rank"),
        (b"dGg= 1\n!!! 2\n", "line 2: expected a token"),
        (b"dGg= x\n", "line 1"),
        (b"dGg= 1\ndGg= 2\n", "line 2: the token b'th' is empty or occurs twice"),
        (b"dGg= 1\n", "255 of the 256 single bytes|256 of the 256"),
        (b"", "256 of the 256 single bytes"),
    ],
)
def test_damaged_own_file(content: bytes, message: str, tmp_path: Path) -> None:
    spec = own_spec(tmp_path)
    Path(spec.files[0]).write_bytes(content)
    with pytest.raises(CheckpointError, match=message):
        load_encoding(spec)


def test_own_file_that_is_missing_or_contradictory(tmp_path: Path) -> None:
    spec = own_spec(tmp_path, th=256)
    for special, message in [
        ((("<x>", 256),), "two tokens each: 256"),
        ((("<x>", -1),), "must be in 0 to"),
        ((("<x>", 2**40),), "must be in 0 to"),
        ((("", 300),), "empty text"),
    ]:
        with pytest.raises(CheckpointError, match=message):
            load_encoding(TokenizerSpec("own", GPT2_PATTERN, special, spec.files))
    with pytest.raises(CheckpointError, match="tiktoken refuses this"):
        load_encoding(TokenizerSpec("own", "(", (), spec.files))
    with pytest.raises(CheckpointError, match="pattern"):
        load_encoding(TokenizerSpec("own", None, (), spec.files))
    Path(spec.files[0]).unlink()
    with pytest.raises(CheckpointError, match=r"cannot be read.*runs on token ids"):
        load_encoding(spec)
    with pytest.raises(CheckpointError, match="expected one file"):
        load(__file__)


# --------------------------------------------------------------------------------------- built-in


def test_builtin_without_network(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr("tiktoken.registry.ENCODINGS", {})
    with pytest.raises(SourceError) as caught:
        load_encoding("gpt2")
    text = str(caught.value)
    assert "TIKTOKEN_CACHE_DIR" in text
    assert "no network in tests" in text
    assert "Token ids work without it" in text


def test_unknown_names() -> None:
    assert "gpt2" in builtin_names()
    with pytest.raises(SourceError, match=r"unknown tokenizer 'gpt-2'. Did you mean 'gpt2'"):
        load_encoding("gpt-2")
    with pytest.raises(SourceError, match="came without a tokenizer"):
        load_encoding("none")


needs_vocabulary = pytest.mark.skipif(
    not REAL_CACHE.is_dir(), reason="GPT-2's vocabulary is not at hand"
)


@pytest.fixture
def gpt2(monkeypatch: pytest.MonkeyPatch) -> tiktoken.Encoding:
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(REAL_CACHE))
    return load_encoding("gpt2")


@needs_vocabulary
def test_gpt2s_own_vocabulary(gpt2: tiktoken.Encoding) -> None:
    assert encode_prompt(gpt2, "hello world<|endoftext|>") == [31373, 995, 50256]
    assert load_encoding("gpt2") is gpt2
    assert gpt2._pat_str == GPT2_PATTERN


@needs_vocabulary
def test_gpt2s_files_as_hugging_face_has_them(gpt2: tiktoken.Encoding, tmp_path: Path) -> None:
    """The cached originals are the same files under other names."""
    by_size = sorted(REAL_CACHE.iterdir(), key=os.path.getsize)
    merges, vocab = (path for path in by_size if path.stat().st_size in (456318, 1042301))
    (tmp_path / "vocab.json").write_bytes(vocab.read_bytes())
    (tmp_path / "merges.txt").write_bytes(merges.read_bytes())
    enc = load(tmp_path / "vocab.json", tmp_path / "merges.txt")
    assert enc._mergeable_ranks == gpt2._mergeable_ranks
    assert enc._special_tokens == gpt2._special_tokens
    assert encode_prompt(enc, TEXT) == encode_prompt(gpt2, TEXT)
    spec = TokenizerSpec("x", files=(str(tmp_path / "vocab.json"), str(tmp_path / "merges.txt")))
    assert is_gpt2(spec)
    assert is_gpt2(write_tiktoken(spec, tmp_path / "tokenizer.tiktoken"))


def test_what_is_not_gpt2s_vocabulary(tmp_path: Path) -> None:
    assert is_gpt2(TokenizerSpec("gpt2"))
    assert not is_gpt2(TokenizerSpec("cl100k_base"))
    assert not is_gpt2(own_spec(tmp_path, th=256))


# -------------------------------------------------------------------------------- text and tokens


@pytest.fixture
def small(tmp_path: Path) -> tiktoken.Encoding:
    return load_encoding(own_spec(tmp_path, th=256, the=257))


def test_special_tokens_in_a_prompt(small: tiktoken.Encoding) -> None:
    assert encode_prompt(small, "the<|endoftext|>x") == [257, 300, 120]
    with pytest.raises(InputError, match="expected a text, found bytes"):
        encode_prompt(small, b"x")  # type: ignore[arg-type]


@given(st.text(max_size=30))
@settings(deadline=None, max_examples=100, database=None)
def test_decoding_a_whole_keeps_every_character(text: str) -> None:
    ranks = {bytes([b]): b for b in range(256)}
    enc = tiktoken.Encoding("b", pat_str=r"\S|\s", mergeable_ranks=ranks, special_tokens={})
    assert decode(enc, encode_prompt(enc, text)) == text


def test_parts_of_characters(small: tiktoken.Encoding) -> None:
    ids = encode_prompt(small, "é€")
    assert decode(small, ids) == "é€"
    assert token_strings(small, ids) == ["\\xc3", "\\xa9", "\\xe2", "\\x82", "\\xac"]
    assert decode(small, ids[:-1]) == "é\ufffd"
    assert token_strings(small, [257, 300, 10]) == ["the", "<|endoftext|>", "\n"]


def test_ids_beyond_the_vocabulary(small: tiktoken.Encoding) -> None:
    assert decode(small, [257, 299, 257]) == "the<|token 299|>the"
    assert token_strings(small, [50300, 2**40]) == ["<|token 50300|>", f"<|token {2**40}|>"]


def test_ids_of_other_types(small: tiktoken.Encoding) -> None:
    import numpy as np
    import torch

    assert decode(small, torch.tensor([257, 97])) == "thea"
    assert decode(small, np.array([257, 97])) == "thea"
    wrong_ones: list[Any] = [[-1], [1.5], ["a"], torch.tensor([0.5]), torch.tensor([[1, 2]])]
    for wrong in wrong_ones:
        with pytest.raises(InputError, match="token ids must be"):
            decode(small, wrong)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("broken \ud83d here", "broken \ufffd here"),
        ("\udc4d", "\ufffd"),
        ("a\udc4d\ud83db", "a\ufffd\ufffdb"),  # the halves in the wrong order
        ("pair \ud83d\udc4d", "pair \U0001f44d"),
        ("\ufeff\ud83d\udc4d\ufeff", "\ufeff\U0001f44d\ufeff"),
        ("<|endoftext|>\ud83d", "<|endoftext|>\ufffd"),
        ("日本 🙂", "日本 🙂"),
    ],
)
def test_surrogates(text: str, expected: str, small: tiktoken.Encoding) -> None:
    assert decode(small, encode_prompt(small, text)) == expected
    assert without_lone_surrogates(text) == expected


# --------------------------------------------------------------- tokenizers of transformers


def of_letters(vocabulary: str, **options: Any) -> HuggingFaceTokenizer:
    """One token for each character."""
    transformers = pytest.importorskip("transformers")
    library = pytest.importorskip("tokenizers")
    model = library.models.BPE({letter: i for i, letter in enumerate(vocabulary)}, [])
    made = library.Tokenizer(model)
    made.decoder = library.decoders.Fuse()
    return HuggingFaceTokenizer(
        transformers.PreTrainedTokenizerFast(tokenizer_object=made, **options)
    )


@pytest.mark.parametrize("text", ["120+3=", "GATTACA", "αβγ", "abca", "着手", "♔♕♖"])
def test_any_alphabet_will_do(text: str) -> None:
    for options in ({}, {"unk_token": "<unk>", "bos_token": "<s>"}):
        tokenizer = of_letters("".join(dict.fromkeys(text)), **options)
        ids = tokenizer.encode(text)
        assert len(ids) == len(text)
        assert tokenizer.decode(ids) == text
        assert tokenizer.decode_continuation(ids[1:]) == text[1:]


def test_a_tokenizer_of_special_tokens_alone_is_none() -> None:
    with pytest.raises(SourceError, match="has no vocabulary; token ids work without one"):
        of_letters("", unk_token="<unk>", bos_token="<s>")
    transformers = pytest.importorskip("transformers")
    with pytest.raises(SourceError, match="has no vocabulary"):
        HuggingFaceTokenizer(transformers.GPT2TokenizerFast())


def test_bytes_of_tokens(small: tiktoken.Encoding) -> None:
    found = vocabulary_bytes(small)
    assert len(found) == small.n_vocab
    ids = encode_prompt(small, "a ☃\n<|endoftext|>")
    assert b"".join(found[i] for i in ids).decode() == "a ☃\n<|endoftext|>"


@pytest.mark.parametrize("kind", ["letters", "pieces", "other"])
def test_bytes_of_tokens_of_transformers(kind: str) -> None:
    transformers = pytest.importorskip("transformers")
    from tokenizers import AddedToken, Tokenizer, decoders, pre_tokenizers
    from tokenizers.models import BPE

    before: Any
    behind: Any
    if kind == "letters":
        names = sorted(pre_tokenizers.ByteLevel.alphabet())
        before, behind = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    else:
        names = ["▁", "a", "é"] + [f"<0x{i:02X}>" for i in range(256) if kind == "pieces"]
        before = pre_tokenizers.Metaspace(prepend_scheme="never")
        behind = decoders.Metaspace(prepend_scheme="never")
        if kind == "pieces":
            behind = decoders.Sequence(
                [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
            )
    vocab = {name: i for i, name in enumerate(names)}
    backend = Tokenizer(BPE(vocab=vocab, merges=[], byte_fallback=kind == "pieces"))
    backend.pre_tokenizer, backend.decoder = before, behind
    backend.add_tokens([AddedToken("<é>", normalized=False)])
    made = transformers.PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>")
    tokenizer = HuggingFaceTokenizer(made)
    text = "a é<é>a" if kind == "other" else "a é☃<é>a"
    found = vocabulary_bytes(tokenizer)
    assert len(found) == tokenizer.n_vocab
    assert b"".join(found[i] for i in tokenizer.encode(text)).decode() == text
    assert found[tokenizer.bos_token] == b"<s>"


def test_files_that_are_gone_by_the_time_they_are_read(tmp_path: Path) -> None:
    for names in (["a.tiktoken"], ["tokenizer.json"], ["vocab.json", "merges.txt"]):
        spec = tokenizer_files.TokenizerSpec(
            name="gone", files=tuple(str(tmp_path / name) for name in names), pattern=r"\w+"
        )
        with pytest.raises(SourceError, match=r"cannot read .*No such file|there is no file"):
            tokenizer_files.read_vocabulary(spec)
