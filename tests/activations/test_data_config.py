"""From a path and settings to windows and batches; what is not there is an error that helps."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch

from neuron_explainer.activations import (
    DataConfig,
    Harvester,
    TokenWindows,
    harvest_to_store,
    is_store,
    open_buffer,
    open_corpus,
    open_windows,
    start_token,
    write_token_file,
)
from neuron_explainer.errors import InputError, LocationError, SourceError
from neuron_explainer.models.model_context import ModelContext

PLACE = "2/resid.torso.delta_mlp"
CONFIG = DataConfig(context_length=16, windows_per_forward=2, hold_out=0.25, buffer_tokens=64)


@pytest.fixture
def books(tmp_path: Path) -> Path:
    folder = tmp_path / "books"
    folder.mkdir()
    for number in range(4):
        text = f"Document {number} tells of {number} wolves and a king. " * 5
        (folder / f"{number}.txt").write_text(text, "utf-8")
    return folder


def documents_of(windows: TokenWindows) -> set[int]:
    return {int(d) for batch in windows for d in batch.document.flatten() if d >= 0}


def test_parts_share_no_document_and_leave_none_out(tales: ModelContext, books: Path) -> None:
    training = documents_of(open_windows(tales, books, CONFIG))
    held_out = documents_of(open_windows(tales, books, CONFIG, part="held_out"))
    assert (len(training), len(held_out)) == (3, 1)
    assert training | held_out == documents_of(open_windows(tales, books, CONFIG, part="all"))
    assert not training & held_out


def test_a_token_file_gives_the_windows_of_its_texts(
    tales: ModelContext, books: Path, tmp_path: Path
) -> None:
    texts = [path.read_text("utf-8") for path in sorted(books.iterdir())]
    write_token_file(tmp_path / "tokens", texts, tales)
    pairs = zip(
        open_windows(tales, books, CONFIG),
        open_windows(tales, tmp_path / "tokens", CONFIG),
        strict=True,
    )
    assert all(torch.equal(a.tokens, b.tokens) for a, b in pairs)
    assert not is_store(tmp_path / "tokens")


@pytest.mark.parametrize("bos", [True, False])
def test_settings_reach_the_windows(tales: ModelContext, books: Path, bos: bool) -> None:
    config = DataConfig(context_length=16, windows_per_forward=2, bos=bos, hold_out=0, split=r"\. ")
    assert len(open_corpus(tales, books, config)) == 20  # sentences
    batch = next(iter(open_windows(tales, books, config)))
    assert batch.tokens.shape == (2, 16)
    assert bool((batch.tokens[:, 0] == start_token(tales)).all()) == bos


def test_a_buffer_takes_what_is_needed_and_no_more(tales: ModelContext, books: Path) -> None:
    with open_buffer(tales, books, PLACE, CONFIG, 8, num_tokens=40) as batches:
        found = torch.cat([batch for batch in batches if isinstance(batch, torch.Tensor)])
    assert found.shape == (40, 192)


def test_a_model_on_the_cpu_takes_turns_with_what_reads(tales: ModelContext, books: Path) -> None:
    """A thread would compute on the same cores; asked for, it gives the same batches."""
    found = []
    for prefetch in (None, True):
        with open_buffer(
            tales, books, PLACE, CONFIG, 8, num_tokens=40, prefetch=prefetch
        ) as batches:
            found.append(list(batches))
        assert (batches.waited_s > 0) == bool(prefetch)
    for one, other in zip(*found, strict=True):
        assert isinstance(one, torch.Tensor)
        assert isinstance(other, torch.Tensor)
        assert torch.equal(one, other)


def test_a_store_gives_back_what_was_harvested(
    tales: ModelContext, books: Path, tmp_path: Path
) -> None:
    windows = open_windows(tales, books, CONFIG)
    harvester = Harvester(tales, [PLACE, "1/resid.torso.delta_mlp"])
    store = harvest_to_store(tmp_path / "store", harvester, windows)
    assert is_store(tmp_path / "store")
    with open_buffer(tales, tmp_path / "store", PLACE, CONFIG, 8, epochs=1) as batches:
        found = torch.cat([batch for batch in batches if isinstance(batch, torch.Tensor)])
    rows = store.rows(0, len(store)).activations[store.locations[0]]
    assert sorted(map(tuple, found.tolist())) == sorted(map(tuple, rows.tolist()))
    with pytest.raises(LocationError, match=r"has no 3/resid.* it has 2/resid"):
        open_buffer(tales, tmp_path / "store", "3/resid.torso.delta_mlp", CONFIG, 8)


def test_one_book_is_cut_for_the_hold_out(
    tales: ModelContext, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    path = tmp_path / "book.txt"
    path.write_text(" ".join(f"Wolf {number} met a king." for number in range(2000)))
    config = DataConfig(context_length=16, windows_per_forward=64)
    held_out = open_windows(tales, path, config, part="held_out").corpus
    training = open_windows(tales, path, config).corpus
    whole = open_windows(tales, path, config, part="all").corpus
    assert held_out.n_tokens + training.n_tokens == whole.n_tokens
    assert held_out.n_tokens / whole.n_tokens == pytest.approx(0.05, abs=0.01)
    assert not set(held_out.numbers) & set(training.numbers)
    assert held_out.source_fingerprint == training.source_fingerprint == whole.source_fingerprint
    said = "\n".join(record.getMessage() for record in caplog.records)
    assert f"1 document, {whole.n_tokens:,} tokens" in said
    assert "the text is cut into pieces of" in said
    assert "--split" in said
    assert f"{held_out.n_tokens:,} of {whole.n_tokens:,} tokens (5." in said


def test_what_is_read_is_said(
    tales: ModelContext, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    rows = [{"text": "a wolf and a king" if number % 5 else ""} for number in range(40)]
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, rows)))
    open_buffer(tales, tmp_path / "a.jsonl", PLACE, CONFIG, 8, num_tokens=4000)
    said = "\n".join(record.getMessage() for record in caplog.records)
    assert "40 documents (8 of them without text)" in said
    assert "8 of 40 documents are held out" in said
    assert re.search(r"4,000 are wanted, so it is read \d+\.\d times", said)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("context_length", 16.0),
        ("context_length", True),
        ("context_length", 1),
        ("context_length", -5),
        ("windows_per_forward", 0),
        ("windows_per_forward", "4"),
        ("corpus_tokens", 1e3),
        ("corpus_tokens", 0),
        ("buffer_tokens", -1),
        ("hold_out", 1),
        ("hold_out", -0.1),
        ("hold_out", float("nan")),
        ("max_norm_multiple", 0),
        ("data_seed", -1),
        ("data_seed", 2**64),
        ("split", "("),
        ("split", b"x"),
        ("bos", 1),
    ],
)
def test_settings_that_cannot_be(field: str, value: Any) -> None:
    """Refused by name when they are made, not after the text has been read."""
    with pytest.raises(InputError, match=field):
        DataConfig(**{field: value})


def test_what_cannot_be_opened(tales: ModelContext, books: Path) -> None:
    with pytest.raises(SourceError, match=r"no file or folder .*bokks.* Did you mean .*books"):
        open_windows(tales, books.parent / "bokks", CONFIG)
    (books / "short.txt").write_text("Only a few words.")
    with pytest.raises(
        InputError, match=r"single document of \d+ tokens, too short.*hold_out to 0"
    ):
        open_windows(tales, books / "short.txt", CONFIG)
    none = DataConfig(hold_out=0)
    assert len(documents_of(open_windows(tales, books / "0.txt", none))) == 1
    with pytest.raises(InputError, match="hold_out is 0"):
        open_windows(tales, books, none, part="held_out")
