"""Documents: every kind of file gives the same texts, and each thing that is wrong with one is named."""

import csv
import gzip
import json
import os
import sys
from pathlib import Path
from typing import Literal

import pytest

from neuron_explainer.activations import (
    huggingface_documents,
    read_documents,
    row_documents,
)
from neuron_explainer.errors import InputError, MissingExtraError, SourceError

TEXTS = ["One, two.", 'a "quoted"\nline', "", "ünï — 語"]


def jsonl(texts: list[str] = TEXTS, column: str = "text") -> bytes:
    return "".join(json.dumps({column: t, "id": i}) + "\n" for i, t in enumerate(texts)).encode()


def write(path: Path, data: bytes) -> Path:
    path.write_bytes(data)
    return path


def csv_bytes(separator: str = ",") -> bytes:
    quoted = ['"' + text.replace('"', '""') + '"' for text in TEXTS]
    return "\n".join(
        [f"id{separator}text", *(f"{i}{separator}{t}" for i, t in enumerate(quoted))]
    ).encode()


@pytest.mark.parametrize(
    ("name", "data"),
    [
        ("a.jsonl", jsonl()),
        ("a.ndjson", b"\xef\xbb\xbf" + jsonl()),
        ("a.jsonl.gz", gzip.compress(jsonl())),
        ("a.csv", csv_bytes()),
        ("a.v1.csv.gz", gzip.compress(csv_bytes())),
        ("a.tsv", csv_bytes("\t")),
    ],
)
def test_each_kind_gives_the_texts_as_often_as_asked(
    tmp_path: Path, name: str, data: bytes
) -> None:
    documents = read_documents(write(tmp_path / name, data))
    assert list(documents) == TEXTS
    assert list(documents) == TEXTS


def test_a_text_file_is_one_document_or_is_cut(tmp_path: Path) -> None:
    path = write(tmp_path / "a.txt", b"one\n\ntwo\n\nthree")
    assert list(read_documents(path)) == ["one\n\ntwo\n\nthree"]
    assert list(read_documents(path, split=r"\n\n")) == ["one", "two", "three"]
    wiki = write(tmp_path / "w.txt", b" = A = \nx\n = B = \ny\n")
    assert list(read_documents(wiki, split=r"(?m)^(?= = [^=]+ = $)")) == [
        " = A = \nx\n",
        " = B = \ny\n",
    ]
    with pytest.raises(InputError, match="not a regular expression"):
        read_documents(path, split="(")


def test_a_folder_is_its_files_by_name(tmp_path: Path) -> None:
    write(tmp_path / "b.txt", b"second")
    write(tmp_path / "a.txt", b"first")
    write(tmp_path / "c.jsonl", jsonl(["third"]))
    write(tmp_path / "notes.md", b"no source")
    assert list(read_documents(tmp_path)) == ["first", "second", "third"]


def test_groups_in_the_pattern_make_no_documents_of_separators(tmp_path: Path) -> None:
    path = write(tmp_path / "a.txt", b"CHAPTER I\none\nCHAPTER II\ntwo\nCHAPTER IX\nthree")
    for pattern in (r"CHAPTER [IVX]+\n", r"CHAPTER ([IVX]+)\n", r"(CHAPTER) (([IV])+|IX)\n"):
        assert list(read_documents(path, split=pattern)) == ["one\n", "two\n", "three"]


def test_what_is_left_out_of_a_folder_is_said(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    write(tmp_path / "a.txt", b"first")
    for name in ("notes.md", "b.pdf", ".hidden"):
        write(tmp_path / name, b"x")
    (tmp_path / "more").mkdir()
    (tmp_path / "dir.txt").mkdir()
    os.mkfifo(tmp_path / "pipe.txt")
    assert list(read_documents(tmp_path)) == ["first"]
    assert [record.getMessage().partition(": ")[2] for record in caplog.records] == [
        "sub-folders left out: dir.txt, more",
        "files of no known kind left out: b.pdf, notes.md, pipe.txt",
    ]


@pytest.mark.parametrize(
    ("rows", "line"),
    [
        ('1,"never closed\n2,"quoted"\n', 2),
        ('1,fine\n2,"never closed\n3,more\n4,more\n', 3),
        ('1,"closed" late\n2,x\n', 2),
        ('1,x\n"2,x\n', 3),
    ],
)
def test_a_quote_that_is_not_closed_swallows_no_rows(tmp_path: Path, rows: str, line: int) -> None:
    path = write(tmp_path / "a.csv", f"id,text\n{rows}".encode())
    with pytest.raises(SourceError, match=rf"a\.csv: the row that begins in line {line} is not"):
        list(read_documents(path))
    with pytest.raises(SourceError, match="the row that begins in line 1 is not valid CSV"):
        list(read_documents(write(tmp_path / "b.csv", b'id,"text\n1,x\n')))


@pytest.mark.parametrize(
    "texts",
    [
        ['"Hello," she said.', "plain"],
        ['"All of it."', "plain"],
        ['an "inner" one', '"open', 'close"', '"'],
        ['"a" and "b"', '"open', "between", 'close"'],
    ],
)
def test_quotes_in_a_tsv_are_text(tmp_path: Path, texts: list[str]) -> None:
    rows = "".join(f"{number}\t{text}\n" for number, text in enumerate(texts))
    path = write(tmp_path / "a.tsv", f"id\ttext\n{rows}".encode())
    assert list(read_documents(path)) == texts


@pytest.mark.parametrize("quoting", [csv.QUOTE_MINIMAL, csv.QUOTE_ALL, csv.QUOTE_NONNUMERIC])
@pytest.mark.parametrize(
    "texts", [["plain", "a\ttab"], ["two\nlines", "x"], ['"both" sides"', 'an "inner" one']]
)
def test_a_tsv_that_is_quoted_as_csv(
    tmp_path: Path, quoting: Literal[0, 1, 2], texts: list[str]
) -> None:
    with (tmp_path / "a.tsv").open("w", newline="") as file:
        csv.writer(file, delimiter="\t", quoting=quoting).writerows(
            [["id", "text"], *enumerate(texts)]
        )
    assert list(read_documents(tmp_path / "a.tsv")) == texts


def test_pipes_and_devices_are_refused(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "a.txt")
    with pytest.raises(SourceError, match="is a pipe, socket or device"):
        list(read_documents(tmp_path / "a.txt"))


@pytest.mark.parametrize("name", ["a.txt.gz", "a.jsonl.gz", "a.csv.gz", "a.jsonl.zst"])
def test_a_small_file_that_would_fill_the_memory_is_refused(tmp_path: Path, name: str) -> None:
    """One line of zeros that inflates a thousand times; half the limit still is read."""
    if name.endswith(".zst"):
        pack = pytest.importorskip("zstandard").ZstdCompressor(level=3).compress
    else:
        pack = gzip.compress
    head, tail = {"json": (b'{"text": "', b'"}'), "csv": (b"text\n", b"\n")}.get(
        name[2:].partition(".")[0].removesuffix("l"), (b"", b"")
    )
    fine = write(tmp_path / name, pack(head + b"0" * (1 << 19) + tail))
    assert [len(text) for text in read_documents(fine, inflated_bytes=1 << 20)] == [1 << 19]
    bomb = write(tmp_path / name, pack(head + b"0" * (1 << 25) + tail))
    with pytest.raises(SourceError, match=r"inflates to more than \d+ bytes"):
        list(read_documents(bomb, inflated_bytes=1 << 20))


def test_lines_that_no_reader_of_json_can_hold(tmp_path: Path) -> None:
    for line in (b'{"text": "x", "n": ' + b"9" * 5000 + b"}", b"[" * 100_000):
        with pytest.raises(SourceError, match="line 2: not valid JSON"):
            list(read_documents(write(tmp_path / "a.jsonl", jsonl(["x"]) + line)))


def test_a_csv_field_may_be_a_book(tmp_path: Path) -> None:
    book = "x" * 300_000
    assert list(read_documents(write(tmp_path / "a.csv", b"text\n" + book.encode()))) == [book]


def test_zstandard(tmp_path: Path) -> None:
    zstandard = pytest.importorskip("zstandard")
    packed = zstandard.compress(jsonl()[:20]) + zstandard.compress(jsonl()[20:])  # two frames
    assert list(read_documents(write(tmp_path / "a.jsonl.zst", packed))) == TEXTS
    with pytest.raises(SourceError, match=r"b\.jsonl\.zst: damaged or cut off"):
        list(read_documents(write(tmp_path / "b.jsonl.zst", packed[:-3])))
    with pytest.raises(SourceError, match="damaged or cut off"):
        list(read_documents(write(tmp_path / "c.jsonl.zst", b"nothing of the kind")))


def test_parquet(tmp_path: Path) -> None:
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    parquet.write_table(pyarrow.table({"text": TEXTS, "id": [0, 1, 2, 3]}), tmp_path / "a.parquet")
    assert list(read_documents(tmp_path / "a.parquet")) == TEXTS
    with pytest.raises(SourceError, match=r"no column 'body'.*It has: 'text', 'id'"):
        list(read_documents(tmp_path / "a.parquet", "body"))
    with pytest.raises(SourceError, match="cannot be read as Parquet"):
        list(read_documents(write(tmp_path / "b.parquet", b"PAR1, or not")))


def test_rows_in_memory() -> None:
    rows = [{"text": text} for text in TEXTS]
    assert list(row_documents(rows)) == TEXTS
    with pytest.raises(SourceError, match="row 1: 'text' should be text, found NoneType"):
        list(row_documents([{"text": ""}, {"text": None}]))


@pytest.mark.parametrize(
    ("name", "data", "message"),
    [
        ("a.csv", b"id,body\n1,x\n", r"no column 'text'.*It has: 'id', 'body'; choose one"),
        ("a.csv", b"id,text\n1,x\n2\n", "line 3: the row ends before the column 'text'"),
        ("a.csv", b"", r"a\.csv is empty"),
        ("a.csv", b"id,text\n", r"a\.csv is empty: it holds no document"),
        (
            "a.jsonl",
            jsonl(column="txt"),
            r"no column 'text'. Did you mean 'txt'\? It has: 'txt', 'id'",
        ),
        ("a.jsonl", jsonl() + b"{", "line 5: not valid JSON"),
        ("a.jsonl", b"[1]", "line 1: expected a JSON object, found list"),
        ("a.jsonl", b"\n", "is empty"),
        ("a.txt", b"", "is empty"),
        ("a.txt", b"\xff\xfe", "not UTF-8"),
        ("a.jsonl.gz", gzip.compress(jsonl())[:-9], "damaged or cut off"),
        ("a.txt.gz", b"plain", "damaged or cut off"),
    ],
)
def test_what_is_wrong_with_a_file_is_said(
    tmp_path: Path, name: str, data: bytes, message: str
) -> None:
    with pytest.raises(SourceError, match=message):
        list(read_documents(write(tmp_path / name, data)))


def test_what_is_wrong_with_a_path_is_said(tmp_path: Path) -> None:
    write(tmp_path / "books.jsonl", jsonl())
    with pytest.raises(SourceError, match=r"no file .*Did you mean 'books\.jsonl'"):
        list(read_documents(tmp_path / "book.jsonl"))
    with pytest.raises(SourceError, match=r"found '\.md'"):
        read_documents(tmp_path / "a.md")
    (tmp_path / "empty").mkdir()
    with pytest.raises(SourceError, match="holds no file of text"):
        list(read_documents(tmp_path / "empty"))


@pytest.mark.parametrize("package", ["zstandard", "pyarrow", "datasets"])
def test_a_missing_package_is_named_with_its_extra(
    package: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    monkeypatch.setitem(sys.modules, "pyarrow.parquet", None)
    name = {"zstandard": "a.txt.zst", "pyarrow": "a.parquet"}.get(package, "")
    write(tmp_path / (name or "x"), b"x")

    def ask() -> None:
        if name:
            list(read_documents(tmp_path / name))
        huggingface_documents("some/dataset")

    with pytest.raises(MissingExtraError, match=rf"{package}.*pip install {package}"):
        ask()


def test_datasets_of_hugging_face(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("datasets")
    path = write(tmp_path / "a.jsonl", jsonl())
    documents = huggingface_documents("json", data_files=str(path))
    assert list(documents) == TEXTS
    assert list(documents) == TEXTS
    with pytest.raises(SourceError, match=r"json \(train\), row 0 has no column 'body'"):
        list(huggingface_documents("json", "body", data_files=str(path)))
    with pytest.raises(SourceError, match="cannot be had"):
        huggingface_documents(str(tmp_path / "nowhere"))
