"""Documents: every kind of file gives the same texts, and each thing that is wrong with one is named."""

import gzip
import json
import sys
from pathlib import Path

import pytest

from neuron_explainer.activations import huggingface_documents, read_documents, row_documents
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
