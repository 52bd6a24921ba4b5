"""What users say about units: kept through new collations, safe with several writers."""

import contextlib
import errno
import os
import sqlite3
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from neuron_explainer import files
from neuron_explainer.analysis.store import ExampleStore
from neuron_explainer.analysis.workspace import (
    WORKSPACE_FILE,
    Bookmark,
    Workspace,
    data_dir,
    workspace_path,
)
from neuron_explainer.errors import CheckpointError, InputError, SourceError
from tests.analysis.examples import VOCABULARY, make_collected, make_corpus
from tests.dictionaries.test_resume import no_room


@pytest.fixture
def workspace(tmp_path: Path) -> Workspace:
    return Workspace(tmp_path / WORKSPACE_FILE, "ab12", 10)


def make_store(folder: Path, seed: int = 0) -> ExampleStore:
    corpus = make_corpus()
    collected = make_collected(corpus, seed=seed, provenance={"autoencoder_sha256": "ab12"})
    documents = [corpus.document(i).tolist() for i in range(len(corpus))]
    return ExampleStore.from_arrays(folder, collected, documents, VOCABULARY)


def test_labels_bookmarks_and_scores(workspace: Workspace) -> None:
    assert workspace.labels() == []
    assert workspace.bookmarks() == []
    assert not workspace.path.exists(), "reading makes no file"
    workspace.set_label(3, "kings and queens")
    workspace.set_label(3, "royalty", source="model", score=0.5)
    workspace.set_label(3, "kings")  # replaces the first
    workspace.set_label(4, "queens")
    assert [(x.text, x.source, x.score) for x in workspace.labels(3)] == [
        ("kings", "user", None),
        ("royalty", "model", 0.5),
    ]
    assert [x.unit for x in workspace.search("queen")] == [4]
    workspace.set_label(4, "  ")  # removes it
    assert workspace.search("queen") == []
    assert [x.unit for x in workspace.labels()] == [3, 3]
    workspace.bookmark(5)
    workspace.bookmark(5, "look again")
    workspace.bookmark(1)
    workspace.remove_bookmark(1)
    assert workspace.bookmarks() == [Bookmark(5, "look again")]
    workspace.set_score(5, "detection", 0.75)
    assert workspace.scores(5) == {"detection": 0.75}
    other = Workspace(workspace.path, "cd34", 10)
    assert other.labels() == []
    assert other.bookmarks() == []
    workspace.close()
    assert [x.text for x in workspace.labels(3)] == ["kings", "royalty"]


def test_what_is_refused(workspace: Workspace) -> None:
    with pytest.raises(InputError, match="no unit 10: the units are 0 to 9"):
        workspace.set_label(10, "x")
    with pytest.raises(InputError, match="finite number"):
        workspace.set_score(1, "x", float("nan"))
    workspace.path.write_bytes(b"no database " * 1000)
    with pytest.raises(CheckpointError, match="not a workspace, or damaged"):
        workspace.labels()
    workspace.path.unlink()
    with sqlite3.connect(workspace.path) as db:
        db.execute("CREATE TABLE mine (x)")
    db.close()
    with pytest.raises(CheckpointError, match="found another SQLite file"):
        workspace.set_label(1, "x")


def test_hostile_text(workspace: Workspace) -> None:
    for text in ("'; DROP TABLE labels; --", "a\0b", "\ud800", "\x1b[2J", "<script>"):
        workspace.set_label(1, text)
        workspace.search(text)
    assert workspace.labels(1)[0].text == "<script>"


def test_a_new_collation_keeps_what_was_said(tmp_path: Path) -> None:
    with make_store(tmp_path) as store:
        store.workspace.set_label(2, "kings")
        before = store[2].statistics
    with make_store(tmp_path, seed=1) as store:
        assert store[2].statistics != before
        assert store[2].label == "kings"
        assert [label.unit for label in store.search("king")] == [2]


WRITER = """
import sys
from neuron_explainer.analysis.workspace import Workspace
workspace = Workspace(sys.argv[1], "ab12", 1000)
for i in range(40):
    workspace.set_label(2 * i + int(sys.argv[2]), f"label {sys.argv[2]}")
    workspace.set_label(999, f"common {i}")
"""


def test_two_processes_write_at_once(tmp_path: Path) -> None:
    path = tmp_path / WORKSPACE_FILE
    writers = [
        subprocess.Popen([sys.executable, "-c", WRITER, str(path), str(i)]) for i in range(2)
    ]
    assert [writer.wait() for writer in writers] == [0, 0]
    workspace = Workspace(path, "ab12", 1000)
    labels = {label.unit: label.text for label in workspace.labels()}
    assert labels == {i: f"label {i % 2}" for i in range(80)} | {999: "common 39"}
    assert len(workspace.search("label", limit=100)) == 80


def test_threads_write_at_once(workspace: Workspace) -> None:
    def write(offset: int) -> None:
        for i in range(5):
            workspace.set_label(i + offset, "x")

    threads = [threading.Thread(target=write, args=(offset,)) for offset in (0, 5)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(workspace.labels()) == 10


def test_many_make_the_same_file_at_once(tmp_path: Path) -> None:
    """As the stores of a server do when their first labels are written."""
    errors: list[Exception] = []

    def write(number: int, path: Path, start: threading.Barrier) -> None:
        workspace = Workspace(path, f"store {number}", 100)
        start.wait()
        try:
            workspace.set_label(number, "x")
        except Exception as error:  # whatever it is, it is one too many
            errors.append(error)
        workspace.close()

    for turn in range(10):
        start, path = threading.Barrier(8), tmp_path / f"{turn}.sqlite"
        threads = [threading.Thread(target=write, args=(i, path, start)) for i in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert not errors


def test_a_killed_writer_leaves_nothing_half(workspace: Workspace) -> None:
    workspace.set_label(1, "before")
    script = (
        "import os, sys\nfrom neuron_explainer.analysis.workspace import Workspace\n"
        "w = Workspace(sys.argv[1], 'ab12', 10)\n"
        "with w._writing() as db:\n"
        "    db.execute(\"UPDATE labels SET text = 'half'\")\n    os._exit(9)"
    )
    run = subprocess.run([sys.executable, "-c", script, str(workspace.path)], check=False)
    assert run.returncode == 9
    assert workspace.labels(1)[0].text == "before"
    workspace.set_label(1, "after")


def test_a_full_disk(workspace: Workspace) -> None:
    workspace.set_label(1, "before")
    with no_room(1), pytest.raises(SourceError, match="cannot use the workspace"):
        workspace.set_label(1, "x" * 100_000)
    assert workspace.labels(1)[0].text == "before"
    workspace.set_label(1, "after")


def test_where_the_file_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert workspace_path(tmp_path) == tmp_path / WORKSPACE_FILE
    monkeypatch.setenv("NEURON_EXPLAINER_DATA", str(tmp_path / "data"))
    assert data_dir() == tmp_path / "data"
    assert workspace_path("/proc") == tmp_path / "data" / WORKSPACE_FILE
    monkeypatch.delenv("NEURON_EXPLAINER_DATA")
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path / "xdg"))
    if sys.platform == "linux":
        assert data_dir() == tmp_path / "xdg" / "neuron_explainer"
        monkeypatch.setenv("XDG_DATA_HOME", "relative")
        assert data_dir() == Path.home() / ".local/share/neuron_explainer"


def test_a_full_disk_does_not_lead_to_another_file(tmp_path: Path) -> None:
    def full(kind: object, path: Path) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))

    with make_store(tmp_path / "store") as store:
        store.workspace.set_label(2, "said before")
        there = store.workspace.path
    with files.watch_steps(full):
        assert workspace_path(tmp_path / "store") == there


@contextlib.contextmanager
def protected(*folders: Path) -> Iterator[None]:
    """Folders that this user cannot write to; root, who can write anywhere, becomes another user."""
    if not hasattr(os, "geteuid"):
        pytest.skip("modes of Unix")
    paths = [path for folder in folders for path in (*folder.rglob("*"), folder)]
    for path in paths:
        path.chmod(0o555 if path.is_dir() else 0o444)
    root = os.geteuid() == 0
    if root:
        os.seteuid(65534)
    try:
        yield
    finally:
        if root:
            os.seteuid(0)
        for path in paths:
            path.chmod(0o755 if path.is_dir() else 0o644)


def test_a_store_on_a_disk_that_cannot_be_written(monkeypatch: pytest.MonkeyPatch) -> None:
    # Not tmp_path, which lies in a folder that only its user can enter.
    with tempfile.TemporaryDirectory() as name:
        Path(name).chmod(0o777)
        folder, data = Path(name, "shared"), Path(name, "data")
        monkeypatch.setenv("NEURON_EXPLAINER_DATA", str(data))
        with make_store(folder) as store:
            store.workspace.set_label(2, "said by the owner")
        with protected(folder), ExampleStore.open(folder) as store:
            assert store[2].label == "said by the owner"
            store.workspace.set_label(2, "said by a reader")
            texts = [label.text for label in store.labels(2)]
            assert texts == ["said by a reader", "said by the owner"]
            assert len(store.search("said")) == 2
            store.verify()
        assert (data / WORKSPACE_FILE).exists()
        assert sorted(os.listdir(folder)) == ["made-up.store", "tokens", WORKSPACE_FILE]
        with protected(data, folder), ExampleStore.open(folder) as store:
            assert store[2].label == "said by a reader"
            with pytest.raises(
                SourceError, match="the workspace cannot be written to: cannot write"
            ):
                store.workspace.set_label(2, "nobody hears this")
