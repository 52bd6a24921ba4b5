"""Windows: each token once an epoch, one order for any number of workers, and files that hold it."""

import json
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from neuron_explainer.activations import (
    TokenBatch,
    TokenCorpus,
    TokenWindows,
    open_token_file,
    start_token,
    tokenize,
    write_token_file,
)
from neuron_explainer.activations.corpus import permutation
from neuron_explainer.errors import CheckpointError, InputError, SourceError
from neuron_explainer.models.model_context import ModelContext
from tests.activations.helpers import random_corpus

BOS = 0
LENGTHS = [5, 0, 1, 13, 4, 9, 30]


def same(one: TokenBatch, other: TokenBatch) -> bool:
    pairs = [(x, vars(other)[name]) for name, x in vars(one).items()]
    return all((x is None and y is None) or torch.equal(x, y) for x, y in pairs)


def read_tokens(batches: list[TokenBatch]) -> Counter[tuple[int, int]]:
    """(document, id) of the tokens that were read, not put there."""
    found: Counter[tuple[int, int]] = Counter()
    for batch in batches:
        keep = batch.position >= 0 if batch.bos is None else (batch.position >= 0) & ~batch.bos
        found.update(zip(batch.document[keep].tolist(), batch.tokens[keep].tolist(), strict=True))
    return found


def expected_tokens(corpus: TokenCorpus) -> Counter[tuple[int, int]]:
    return Counter((int(n), int(t)) for n in corpus.numbers for t in corpus.document(int(n)))


@settings(max_examples=40, deadline=None)
@given(
    lengths=st.lists(st.integers(0, 25), min_size=1, max_size=8).filter(sum),
    context_length=st.integers(2, 9),
    batch_size=st.integers(1, 4),
    bos=st.sampled_from([None, BOS]),
    seed=st.sampled_from([None, 0, 7]),
)
def test_packed_each_token_is_in_one_window(
    lengths: list[int], context_length: int, batch_size: int, bos: int | None, seed: int | None
) -> None:
    corpus = random_corpus(lengths)
    windows = TokenWindows(corpus, context_length, batch_size, bos=bos, seed=seed)
    batches = list(windows)
    assert len(batches) == windows.n_batches
    assert read_tokens(batches) == expected_tokens(corpus)
    rows = [row for batch in batches for row in batch.position.tolist()]
    assert sum(-1 in row for row in rows) <= 1  # all windows but the last are full
    for batch in batches:
        in_row = (batch.tokens == BOS) & (batch.position >= 0)
        if bos is None:
            assert not in_row.any()
        else:
            assert batch.bos is not None
            assert torch.equal(in_row, batch.bos)
            assert batch.bos[:, 0].all()
            assert not (batch.bos[:, 1:] & batch.bos[:, :-1]).any()  # never two in a row


def test_packed_by_hand() -> None:
    corpus = TokenCorpus.of([[1, 2], [], [3], [4, 5, 6, 7, 8, 9]])
    batch = TokenWindows(corpus, 4, 9, bos=BOS, seed=None).batch(0)
    # Stream: 0 1 2 | 0 3 | 0 4 5 6 7 8 9. The second window begins with text, so it gets a start token;
    # the third too, and it is the last.
    assert batch.tokens.tolist() == [[0, 1, 2, 0], [0, 3, 0, 4], [0, 5, 6, 7], [0, 8, 9, 0]]
    assert batch.document.tolist() == [[0, 0, 0, 2], [2, 2, 3, 3], [3, 3, 3, 3], [3, 3, 3, -1]]
    assert batch.position.tolist() == [[0, 1, 2, 3], [0, 1, 2, 3], [0, 1, 2, 3], [0, 1, 2, -1]]
    assert batch.pad is not None
    assert batch.pad.tolist() == [[False] * 4] * 3 + [[False] * 3 + [True]]
    assert batch.bos is not None
    assert batch.bos.nonzero().tolist() == [[0, 0], [0, 3], [1, 0], [1, 2], [2, 0], [3, 0]]


def test_a_separator_at_the_front_is_the_start_token() -> None:
    batch = TokenWindows(TokenCorpus.of([[1, 2], [3, 4]]), 3, 2, bos=BOS, seed=None).batch(0)
    assert batch.tokens.tolist() == [[0, 1, 2], [0, 3, 4]]
    assert batch.pad is None


@pytest.mark.parametrize("bos", [None, BOS])
def test_one_document_a_row(bos: int | None) -> None:
    corpus = random_corpus(LENGTHS)
    windows = TokenWindows(corpus, 8, 3, concat=False, bos=bos, seed=None)
    assert windows.n_windows == sum(n > 0 for n in LENGTHS)
    front = [] if bos is None else [bos]
    rows = [
        (row[keep].tolist(), set(document[keep].tolist()))
        for batch in windows
        for row, document, keep in zip(
            batch.tokens, batch.document, batch.position >= 0, strict=True
        )
    ]
    numbers = [number for number, length in enumerate(LENGTHS) if length]
    assert rows == [([*front, *corpus.document(n)][:8], {n}) for n in numbers]
    assert windows.batch(0).tokens.shape == (3, 8)
    short = TokenWindows(random_corpus([2, 3]), 8, 2, concat=False, bos=bos)
    assert short.batch(0).tokens.shape == (2, 3 + len(front))  # to the longest of the batch


def test_epochs_have_orders_of_their_own_and_no_seed_keeps_the_corpus() -> None:
    windows = TokenWindows(random_corpus(LENGTHS), 4, 2, seed=3, epochs=2)
    first, second = (
        list(windows)[: windows.batches_per_epoch],
        list(windows)[windows.batches_per_epoch :],
    )
    assert read_tokens(first) == read_tokens(second)
    assert not all(map(same, first, second))
    as_they_lie = TokenWindows(random_corpus(LENGTHS), 4, 2, seed=None, epochs=2)
    assert same(as_they_lie.batch(0), as_they_lie.batch(as_they_lie.batches_per_epoch))
    assert not same(TokenWindows(random_corpus(LENGTHS), 4, 2, seed=4).batch(0), first[0])


@pytest.mark.parametrize("world", [2, 3, 5])
def test_any_number_of_workers_sees_one_order(world: int) -> None:
    corpus = random_corpus(LENGTHS)
    alone = list(TokenWindows(corpus, 4, 2, epochs=3))
    parts = [
        list(TokenWindows(corpus, 4, 2, epochs=3, rank=rank, world=world)) for rank in range(world)
    ]
    together = [parts[number % world][number // world] for number in range(len(alone))]
    assert sum(map(len, parts)) == len(alone)
    assert all(map(same, alone, together))


def test_resuming_equals_going_on() -> None:
    windows = TokenWindows(random_corpus(LENGTHS), 4, 2, epochs=2)
    whole = list(windows)
    for stop in range(len(whole) + 1):
        first = iter(windows)
        for _ in range(stop):
            next(first)
        second = iter(TokenWindows(random_corpus(LENGTHS), 4, 2, epochs=2))
        second.load_state_dict(json.loads(json.dumps(first.state_dict())))
        rest = list(second)
        assert len(rest) == len(whole) - stop
        assert all(map(same, rest, whole[stop:]))


def test_the_state_of_other_windows_is_refused() -> None:
    state = iter(TokenWindows(random_corpus(LENGTHS), 4, 2)).state_dict()
    with pytest.raises(CheckpointError, match="batch_size was 2, is 3; seed was 0, is 1"):
        iter(TokenWindows(random_corpus(LENGTHS), 4, 3, seed=1)).load_state_dict(state)
    with pytest.raises(CheckpointError, match="fingerprint was"):
        iter(TokenWindows(random_corpus(LENGTHS, seed=1), 4, 2)).load_state_dict(state)


def test_windows_without_end() -> None:
    windows = TokenWindows(random_corpus([6]), 3, 1, epochs=None)
    assert windows.n_batches is None
    assert windows.batch(10_001).tokens.shape == (1, 3)
    with pytest.raises(TypeError, match=r"never end .*batches_per_epoch"):
        len(windows)


@pytest.mark.parametrize("epochs", [1, 3])
@pytest.mark.parametrize("world", [1, 2])
def test_their_length_is_the_number_of_batches(epochs: int, world: int) -> None:
    for rank in range(world):
        windows = TokenWindows(random_corpus(LENGTHS), 4, 2, epochs=epochs, rank=rank, world=world)
        assert len(windows) == len(list(windows)) == windows.n_batches


def test_the_order_is_pinned() -> None:
    """A resumed run must find the order that it began with, whatever has been updated since."""
    assert permutation(8, 0, 0).tolist() == [7, 2, 4, 0, 5, 3, 1, 6]
    assert permutation(8, 0, 1).tolist() != [7, 2, 4, 0, 5, 3, 1, 6]
    assert sorted(permutation(1000, 2**40 + 1, 3)) == list(range(1000))
    with pytest.raises(InputError, match="seed must be at least 0"):
        permutation(8, -1)


def test_held_out_documents_are_whole_and_apart() -> None:
    corpus = random_corpus([3] * 20)
    training, held_out = corpus.split(0.25, seed=1)
    assert (len(training), len(held_out)) == (15, 5)
    assert sorted([*training.numbers, *held_out.numbers]) == list(range(20))
    assert np.array_equal(corpus.split(0.25, seed=1)[1].numbers, held_out.numbers)
    assert not np.array_equal(corpus.split(0.25, seed=2)[1].numbers, held_out.numbers)
    batches = list(TokenWindows(held_out, 4, 2, bos=BOS))
    assert read_tokens(batches) == expected_tokens(held_out)
    assert len(random_corpus([3, 3]).split(0.01)[1]) == 1
    assert len(random_corpus([0, 3, 0, 3]).split(0.5)[1]) == 1
    with pytest.raises(InputError, match="single document"):
        random_corpus([9]).split(0.5)
    with pytest.raises(InputError, match="between 0 and 1, found 1"):
        corpus.split(1)


@pytest.mark.parametrize("seed", range(20))
def test_a_share_of_tokens_is_held_out_not_of_documents(seed: int) -> None:
    """One of six books was 21 % of the text where 5 % were asked for."""
    lengths = [210, 50, 60, 300, 80, 300]
    held_out = random_corpus(lengths).split(0.05, seed)[1]
    assert 50 <= held_out.n_tokens <= 80
    longer = random_corpus([100, 90, 110, 400]).split(0.05, seed)[1]
    assert longer.n_tokens <= 100  # none comes near: 9 to 57 %
    many = random_corpus([1 + n % 7 for n in range(500)])
    assert many.split(0.1, seed)[1].n_tokens / many.n_tokens == pytest.approx(0.1, abs=0.003)


def test_a_corpus_is_cut_into_documents() -> None:
    corpus = random_corpus([7, 0, 3, 10])
    pieces = corpus.cut(4)
    assert pieces.lengths.tolist() == [4, 3, 3, 4, 4, 2]
    assert np.array_equal(pieces.tokens, corpus.tokens)
    assert pieces.source_fingerprint == corpus.source_fingerprint
    assert pieces.fingerprint != corpus.fingerprint
    with pytest.raises(InputError, match="length must be at least 1"):
        corpus.cut(0)
    with pytest.raises(InputError, match="cut the whole corpus"):
        corpus.split(0.3)[0].cut(2)


@pytest.mark.parametrize("place", [0, 1, 4097, 9_998, 9_999])
def test_a_fingerprint_is_of_every_token(place: int, tmp_path: Path, tales: ModelContext) -> None:
    corpus = random_corpus([4000, 6000])
    changed = corpus.tokens.copy()
    changed[place] += 1
    other = TokenCorpus(changed, corpus.starts, corpus.numbers)
    moved = TokenCorpus(corpus.tokens, np.array([0, 4001, 10_000]), corpus.numbers)
    parts = corpus.split(0.5)
    found = [each.fingerprint for each in (corpus, other, moved, *parts)]
    assert len(set(found)) == 5
    assert parts[0].source_fingerprint == corpus.source_fingerprint != other.source_fingerprint
    state = iter(TokenWindows(corpus, 8, 4)).state_dict()
    with pytest.raises(CheckpointError, match="fingerprint was"):
        iter(TokenWindows(other, 8, 4)).load_state_dict(state)


def test_a_token_file_has_the_fingerprint_of_its_texts(tmp_path: Path, tales: ModelContext) -> None:
    in_memory = tokenize(TEXTS, tales)
    on_disk = write_token_file(tmp_path / "tokens", TEXTS, tales)
    assert on_disk.source_fingerprint == in_memory.source_fingerprint


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"context_length": 0}, "no room for text"),
        ({"context_length": 1, "bos": BOS}, "no room for text"),
        ({"batch_size": 0}, "batch_size 0"),
        ({"epochs": 0}, "epochs 0"),
        ({"rank": 2, "world": 2}, "rank must be 0 to 1 of 2, found 2"),
    ],
)
def test_settings_that_cannot_be(change: dict[str, int], message: str) -> None:
    arguments = {"context_length": 4, "batch_size": 2} | change
    with pytest.raises(InputError, match=message):
        TokenWindows(random_corpus(LENGTHS), **arguments)  # type: ignore[arg-type]


def test_numbers_beyond_the_end_and_corpora_without_tokens() -> None:
    with pytest.raises(InputError, match="found number 99"):
        TokenWindows(random_corpus(LENGTHS), 4, 2).batch(99)
    with pytest.raises(SourceError, match="no tokens in 2 documents"):
        TokenCorpus.of([[], []])


# --- token files ---

TEXTS = ["Once upon a time.", "", "The end, <|endoftext|> or so."]


def test_a_file_holds_what_memory_holds(tmp_path: Path, tales: ModelContext) -> None:
    in_memory = tokenize(TEXTS, tales)
    written = write_token_file(tmp_path / "tokens", TEXTS, tales, progress=True)
    opened = open_token_file(tmp_path / "tokens", tales, verify=True)
    for corpus in (written, opened):
        assert isinstance(corpus.tokens, np.memmap)
        assert corpus.tokens.dtype == np.uint16
        assert [corpus.document(i).tolist() for i in range(3)] == [tales.encode(t) for t in TEXTS]
    arguments = {"bos": start_token(tales), "epochs": 2}
    from_memory = list(TokenWindows(in_memory, 5, 2, **arguments))  # type: ignore[arg-type]
    assert all(map(same, from_memory, TokenWindows(opened, 5, 2, **arguments)))  # type: ignore[arg-type]
    assert start_token(tales) == tales.encode("<|endoftext|>")[0]
    assert opened.vocabulary == tales.get_encoding().n_vocab
    with pytest.raises(InputError, match="not empty"):
        write_token_file(tmp_path / "tokens", TEXTS, tales)


def test_a_file_appears_whole_or_not_at_all(tmp_path: Path, tales: ModelContext) -> None:
    def broken() -> list[str]:
        raise OSError("the disk went away")

    with pytest.raises(OSError, match="went away"):
        write_token_file(tmp_path / "tokens", (t for _ in TEXTS for t in broken()), tales)
    with pytest.raises(SourceError, match="no tokens in 1 documents"):
        write_token_file(tmp_path / "tokens", [""], tales)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"kind": "store"}, "expected kind 'token_file' of format_version 1, found 'store' of 1"),
        ({"format_version": 9}, "found 'token_file' of 9"),
        ({"n_tokens": "many"}, "n_tokens: expected a whole number, found 'many'"),
        ({"n_tokens": 5}, r"tokens\.bin: expected 10 bytes, found"),
        ({"n_documents": 7}, r"starts\.bin: expected 64 bytes, found"),
        ({"n_documents": 0}, "at least 1"),
        ({"dtype": "uint8"}, "dtype: expected one of uint16, uint32, found 'uint8'"),
        ({"sha256": {}}, r"sha256 should name tokens\.bin, starts\.bin"),
    ],
)
def test_a_bad_manifest_is_refused(
    tmp_path: Path, tales: ModelContext, change: dict[str, object], message: str
) -> None:
    write_token_file(tmp_path / "tokens", TEXTS, tales)
    path = tmp_path / "tokens" / "manifest.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(CheckpointError, match=message):
        open_token_file(tmp_path / "tokens")


def test_a_damaged_or_foreign_file_is_refused(
    tmp_path: Path, tales: ModelContext, context: ModelContext
) -> None:
    folder = tmp_path / "tokens"
    write_token_file(folder, TEXTS, tales)
    other = json.loads((folder / "manifest.json").read_text()) | {"tokenizer": "gpt2"}
    data = bytearray((folder / "tokens.bin").read_bytes())
    data[0] ^= 1
    (folder / "tokens.bin").write_bytes(data)
    with pytest.raises(CheckpointError, match=r"tokens\.bin: expected SHA-256 .* damaged"):
        open_token_file(folder, verify=True)
    (folder / "tokens.bin").write_bytes(data[:-1])
    with pytest.raises(CheckpointError, match=r"tokens\.bin: expected \d+ bytes, found \d+"):
        open_token_file(folder)
    (folder / "manifest.json").write_text(json.dumps(other))
    with pytest.raises(InputError, match=r"the tokenizer 'gpt2' .* Write a token file for this"):
        open_token_file(folder, tales)
    (folder / "manifest.json").unlink()
    with pytest.raises(SourceError, match=r"no file .*manifest\.json"):
        open_token_file(folder)


def test_whole_corpora_are_joined() -> None:
    parts = [TokenCorpus.of([[1, 2], [3]], "a/one"), TokenCorpus.of([[4, 5, 6]], "b/two")]
    both = TokenCorpus.joined(parts)
    assert [both.document(number).tolist() for number in range(3)] == [[1, 2], [3], [4, 5, 6]]
    assert both.name == "one + two"
    whole = TokenCorpus.of([[1, 2], [3], [4, 5, 6]])
    assert both.source_fingerprint == whole.source_fingerprint
    assert TokenCorpus.joined(parts[:1]) is parts[0]
    with pytest.raises(InputError, match="join whole corpora"):
        TokenCorpus.joined([parts[1], parts[0].split(0.4)[0]])
    with pytest.raises(InputError, match="of one tokenizer"):
        TokenCorpus.joined([replace(part, vocabulary=n) for n, part in enumerate(parts, 7)])
    with pytest.raises(InputError, match="found 0 corpora"):
        TokenCorpus.joined([])
