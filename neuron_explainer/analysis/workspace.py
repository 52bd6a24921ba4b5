"""What is said about units: labels, bookmarks, explanations and scores, in a small file beside the stores.

The file is ``workspace.sqlite`` in the folder of the stores. Where that folder cannot be written to, or
belongs to this package, it is in the user's folder for data (``$NEURON_EXPLAINER_DATA``, or else what the
system provides), never in the cache. Entries belong to a *subject*, the hash of the autoencoder or of the
model and the location, and a unit of it: collating again, or moving the store, keeps them. Several programs
may write at once.
"""

import contextlib
import datetime
import json
import math
import os
import sqlite3
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from neuron_explainer import files
from neuron_explainer.analysis.explaining.explanation import (
    Explained,
    Explanation,
    Score,
    as_dict,
    explanation_from,
    score_from,
)
from neuron_explainer.analysis.label_search import CANDIDATES, find_labels
from neuron_explainer.analysis.store_format import Label, encodable
from neuron_explainer.analysis.store_names import is_built_in
from neuron_explainer.errors import CheckpointError, InputError, SourceError, shown

WORKSPACE_FILE = "workspace.sqlite"
DATA_VARIABLE = "NEURON_EXPLAINER_DATA"
_VERSION = 1
_APPLICATION_ID = 0x4E455857  # "NEXW"
_WAIT = 10.0  # seconds for another writer
_MOST_VALUES = 900  # in one statement; older versions of SQLite take 999
_FIRST = "source <> 'user'"  # what users say comes before what programs found out
_SCHEMA = """
CREATE TABLE IF NOT EXISTS labels (
    id INTEGER PRIMARY KEY, subject TEXT NOT NULL, unit INTEGER NOT NULL, source TEXT NOT NULL,
    text TEXT NOT NULL, score REAL, changed TEXT NOT NULL, UNIQUE (subject, unit, source));
CREATE VIRTUAL TABLE IF NOT EXISTS labels_fts USING fts5(text, content='labels', content_rowid='id');
CREATE TABLE IF NOT EXISTS bookmarks (
    subject TEXT NOT NULL, unit INTEGER NOT NULL, note TEXT NOT NULL, changed TEXT NOT NULL,
    PRIMARY KEY (subject, unit)) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS scores (
    subject TEXT NOT NULL, unit INTEGER NOT NULL, name TEXT NOT NULL, value REAL NOT NULL,
    changed TEXT NOT NULL, PRIMARY KEY (subject, unit, name)) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS explanations (
    id INTEGER PRIMARY KEY, subject TEXT NOT NULL, unit INTEGER NOT NULL, key TEXT NOT NULL,
    request TEXT NOT NULL, method TEXT NOT NULL, content TEXT NOT NULL, changed TEXT NOT NULL,
    UNIQUE (subject, unit, key));
CREATE INDEX IF NOT EXISTS explanations_by_request ON explanations (subject, unit, request);
CREATE TABLE IF NOT EXISTS explanation_scores (
    subject TEXT NOT NULL, unit INTEGER NOT NULL, key TEXT NOT NULL, name TEXT NOT NULL,
    judge TEXT NOT NULL, request TEXT NOT NULL, content TEXT NOT NULL, answers TEXT NOT NULL,
    changed TEXT NOT NULL, PRIMARY KEY (subject, unit, key, name, judge)) WITHOUT ROWID;
"""


class Bookmark(NamedTuple):
    """A unit to come back to."""

    unit: int
    note: str


def data_dir() -> Path:
    """The user's folder for data: ``$NEURON_EXPLAINER_DATA``, or what the system provides."""
    if chosen := os.environ.get(DATA_VARIABLE):
        return Path(os.path.abspath(Path(chosen).expanduser()))
    if sys.platform == "win32":
        base = Path(os.environ.get("LOCALAPPDATA") or Path.home() / "AppData/Local")
    elif sys.platform == "darwin":
        base = Path.home() / "Library/Application Support"
    else:
        # The XDG specification says to ignore a relative path.
        xdg = os.environ.get("XDG_DATA_HOME", "")
        base = Path(xdg) if os.path.isabs(xdg) else Path.home() / ".local/share"
    return base / "neuron_explainer"


def workspace_path(folder: str | Path) -> Path:
    """Where the workspace of the stores in a folder is."""
    beside = files.local_path(folder) / WORKSPACE_FILE
    elsewhere = is_built_in(beside.parent) or _why_not_writable(beside)
    return data_dir() / WORKSPACE_FILE if elsewhere else beside


def _why_not_writable(path: Path) -> str:
    """Why a file, and others beside it, cannot be written; empty if they can."""
    try:
        if path.exists():  # a full disk is no reason to look elsewhere for what is here
            path.open("r+b").close()
            return "" if os.access(path.parent, os.W_OK) else f"cannot write in {path.parent}"
        files.check_writable(path)  # asks whether a file can be made in the folder
    except SourceError as error:
        return str(error)
    except OSError as error:
        return f"cannot write {path}: {error.strerror}"
    return ""


class Workspace:
    """Labels, bookmarks and scores of one subject. The file is made when the first entry is written.

    Args:
        path: the file, see :func:`workspace_path`.
        subject: the hash of what the units belong to.
        n_units: how many units there are; others are refused.
    """

    def __init__(self, path: str | Path, subject: str, n_units: int) -> None:
        self.path, self.subject, self.n_units = files.local_path(path), subject, n_units
        self._lock = threading.RLock()  # in a transaction, its thread also reads
        self._connection: sqlite3.Connection | None = None
        self._refusal = ""  # why the open file cannot be written to

    # --- labels ---

    def set_label(
        self, unit: int, text: str, *, source: str = "user", score: float | None = None
    ) -> None:
        """Say what a unit means; it replaces what the same source said before. No text removes that.

        Args:
            unit: the unit.
            text: what it means.
            source: who says so.
            score: how well the text predicts the unit, by the source's own measure.
        """
        self.set_labels([Label(unit, text, source, score)])

    def set_labels(self, labels: Iterable[Label], before: Callable[[], None] | None = None) -> int:
        """:meth:`set_label` for many: all of them are written, or nothing.

        Args:
            labels: what to write.
            before: is called when nobody else can write any more, and before anything is written. If it
                raises, nothing is.

        Returns:
            how many there were.
        """
        checked = []
        for label in labels:
            self._check(label.unit, label.score)
            text, source = encodable(label.text).strip(), encodable(label.source)
            checked.append(label._replace(text=text, source=source))
        with self._writing() as connection:
            if before is not None:
                before()
            for label in checked:
                self._replace_label(connection, label)
        return len(checked)

    def _replace_label(self, connection: sqlite3.Connection, label: Label) -> None:
        old = connection.execute(
            "SELECT id, text FROM labels WHERE subject = ? AND unit = ? AND source = ?",
            (self.subject, label.unit, label.source),
        ).fetchall()
        for number, before in old:
            connection.execute(
                "INSERT INTO labels_fts (labels_fts, rowid, text) VALUES ('delete', ?, ?)",
                (number, before),
            )
            connection.execute("DELETE FROM labels WHERE id = ?", (number,))
        if label.text:
            number = connection.execute(
                "INSERT INTO labels (subject, unit, source, text, score, changed) "
                "VALUES (?, ?, ?, ?, ?, ?)",
                (self.subject, label.unit, label.source, label.text, label.score, _now()),
            ).lastrowid
            connection.execute(
                "INSERT INTO labels_fts (rowid, text) VALUES (?, ?)", (number, label.text)
            )

    def labels(self, unit: int | None = None) -> list[Label]:
        """The labels of a unit, or of all units: those of the user first, then the latest first."""
        one, values = ("", ()) if unit is None else (" AND unit = ?", (unit,))
        rows = self._read(
            f"SELECT unit, text, source, score FROM labels WHERE subject = ?{one} "
            f"ORDER BY unit, {_FIRST}, changed DESC, id DESC",
            values,
        )
        return [Label(*row) for row in rows]

    def labels_of(self, units: Sequence[int]) -> list[Label]:
        """The labels of some units, for each in the order of :meth:`labels`."""
        found: list[Label] = []
        for begin in range(0, len(units), _MOST_VALUES):
            part = [int(unit) for unit in units[begin : begin + _MOST_VALUES]]
            rows = self._read(
                "SELECT unit, text, source, score FROM labels WHERE subject = ? AND unit IN "
                f"({', '.join('?' * len(part))}) ORDER BY unit, {_FIRST}, changed DESC, id DESC",
                part,
            )
            found += [Label(*row) for row in rows]
        return found

    def search(self, text: str, limit: int = 50, candidates: int = CANDIDATES) -> list[Label]:
        """Labels that hold all these words, short ones first; then those of longer words, as typed so far.

        Args:
            text: what somebody typed.
            limit: how many.
            candidates: how many labels are looked at.
        """
        found: dict[Label, None] = {}
        for prefix in (False, True):
            if len(found) < limit:
                rows = find_labels(
                    self._rows,
                    text,
                    limit,
                    prefix=prefix,
                    candidates=candidates,
                    where="AND subject = ?",
                    values=(self.subject,),
                )
                found.update(dict.fromkeys(Label(*row) for row in rows))
        return list(found)[:limit]

    def search_all(self, text: str, limit: int, *, prefix: bool) -> list[tuple[str, Label]]:
        """:meth:`search` among the labels of all subjects of the file: subject and label."""
        columns = "subject, unit, text, source, score"
        rows = find_labels(self._rows, text, limit, prefix=prefix, columns=columns)
        return [(str(row[0]), Label(*row[1:])) for row in rows]

    # --- bookmarks and scores ---

    def bookmark(self, unit: int, note: str = "") -> None:
        """Remember a unit; the note replaces the one before."""
        self._check(unit)
        with self._writing() as connection:
            connection.execute(
                "INSERT OR REPLACE INTO bookmarks VALUES (?, ?, ?, ?)",
                (self.subject, unit, encodable(note), _now()),
            )

    def remove_bookmark(self, unit: int) -> None:
        """Forget a bookmark; nothing happens if there is none."""
        with self._writing() as connection:
            connection.execute(
                "DELETE FROM bookmarks WHERE subject = ? AND unit = ?", (self.subject, unit)
            )

    def bookmarks(self) -> list[Bookmark]:
        """All bookmarks, by unit."""
        rows = self._read("SELECT unit, note FROM bookmarks WHERE subject = ? ORDER BY unit")
        return [Bookmark(*row) for row in rows]

    def set_score(self, unit: int, name: str, value: float) -> None:
        """Note a figure of a unit, such as a detection score; it replaces the one before."""
        self._check(unit, value)
        with self._writing() as connection:
            connection.execute(
                "INSERT OR REPLACE INTO scores VALUES (?, ?, ?, ?, ?)",
                (self.subject, unit, encodable(name), float(value), _now()),
            )

    def scores(self, unit: int) -> dict[str, float]:
        """The figures noted of a unit, by name."""
        rows = self._read(
            "SELECT name, value FROM scores WHERE subject = ? AND unit = ? ORDER BY name", (unit,)
        )
        return dict(rows)

    # --- explanations ---

    def save_explanations(self, explanations: Iterable[tuple[Explanation, str]]) -> None:
        """Keep explanations of this subject's units. Each is a label too, whose source is its method.

        One that is kept already becomes the latest.

        Args:
            explanations: each with its request, a hash of what it was made with: who asks for the same
                again finds it (:meth:`explanation_of`).
        """
        found = list(explanations)
        for explanation, _ in found:
            self._check(explanation.unit)
            if explanation.subject != self.subject:
                raise InputError(
                    f"the explanation is of another subject ({shown(explanation.subject)}) than this "
                    f"workspace ({shown(self.subject)})."
                )
        if not found:
            return
        with self._writing() as connection:
            for explanation, request in found:
                unit, method = explanation.unit, encodable(explanation.method)
                connection.execute(
                    "DELETE FROM explanations WHERE subject = ? AND unit = ? AND key = ?",
                    (self.subject, unit, explanation.key),
                )
                connection.execute(
                    "INSERT INTO explanations (subject, unit, key, request, method, content, changed) "
                    "VALUES (?, ?, ?, ?, ?, ?, ?)",
                    (
                        *(self.subject, unit, explanation.key, request, method),
                        *(json.dumps(as_dict(explanation)), _now()),
                    ),
                )
                text = encodable(explanation.text).strip()
                self._replace_label(connection, Label(unit, text, method, None))

    def explanation_of(self, unit: int, request: str) -> Explanation | None:
        """The explanation that was made by a request, if there is one."""
        rows = self._read(
            "SELECT content FROM explanations WHERE subject = ? AND unit = ? AND request = ? "
            "ORDER BY changed DESC LIMIT 1",
            (unit, request),
        )
        return self._explanation(rows[0][0]) if rows else None

    def explained(self, unit: int, method: str | None = None) -> list[Explained]:
        """The explanations of a unit with their scores (without the answers), latest first.

        Args:
            unit: the unit.
            method: only those that were found by this method.
        """
        of_method, values = ("", (unit,)) if method is None else (" AND method = ?", (unit, method))
        rows = self._read(
            "SELECT key, content, changed FROM explanations WHERE subject = ? AND unit = ?"
            f"{of_method} ORDER BY changed DESC, id DESC",
            values,
        )
        if not rows:
            return []
        scores: dict[str, list[Score]] = {}
        for key, content in self._read(
            "SELECT key, content FROM explanation_scores WHERE subject = ? AND unit = ? "
            "ORDER BY name, judge",
            (unit,),
        ):
            scores.setdefault(key, []).append(score_from(self._content(content)))
        return [
            Explained(self._explanation(content), tuple(scores.get(key, ())), changed)
            for key, content, changed in rows
        ]

    def explained_units(self, method: str | None = None) -> list[int]:
        """The units that have an explanation (by a method), rising."""
        of_method, values = ("", ()) if method is None else (" AND method = ?", (method,))
        rows = self._read(
            f"SELECT DISTINCT unit FROM explanations WHERE subject = ?{of_method} ORDER BY unit",
            values,
        )
        return [unit for (unit,) in rows]

    def save_explanation_scores(self, scores: Iterable[tuple[Explanation, Score, str]]) -> None:
        """Keep scores of explanations; each replaces the one of the same scorer and judge.

        Args:
            scores: the explanation, its score, and the request, see :meth:`save_explanations`.
        """
        rows = []
        for explanation, score, request in scores:
            content = as_dict(score)
            # Apart, because they are long and seldom asked for.
            answers = content.pop("answers")
            rows.append(
                (
                    *(self.subject, explanation.unit, explanation.key, score.name, score.judge),
                    *(request, json.dumps(content, allow_nan=False), json.dumps(answers), _now()),
                )
            )
        if not rows:
            return
        with self._writing() as connection:
            connection.executemany(
                "INSERT OR REPLACE INTO explanation_scores VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?)", rows
            )

    def explanation_score_of(self, explanation: Explanation, request: str) -> Score | None:
        """The score of an explanation that was made by a request, with its answers, if there is one."""
        found = self._scores_with_answers(explanation, "AND request = ?", request)
        return found[0] if found else None

    def with_answers(self, explanation: Explanation) -> tuple[Score, ...]:
        """The scores of an explanation by name, with what was said about each text."""
        return self._scores_with_answers(explanation, "ORDER BY name, judge")

    def _scores_with_answers(
        self, explanation: Explanation, more: str, *values: str
    ) -> tuple[Score, ...]:
        rows = self._read(
            "SELECT content, answers FROM explanation_scores WHERE subject = ? AND unit = ? AND key = ? "
            + more,
            (explanation.unit, explanation.key, *values),
        )
        return tuple(
            score_from({**self._content(content), "answers": self._content(answers)})
            for content, answers in rows
        )

    def _explanation(self, content: str) -> Explanation:
        return explanation_from(self._content(content))

    def _content(self, text: str) -> Any:
        try:
            return json.loads(text)
        except ValueError as error:
            raise CheckpointError(
                f"{self.path}: damaged: an explanation is no JSON: {error}."
            ) from None

    # --- the file ---

    def _check(self, unit: int, number: float | None = None) -> None:
        if not 0 <= unit < self.n_units:
            raise InputError(f"there is no unit {unit}: the units are 0 to {self.n_units - 1}.")
        if number is not None and not math.isfinite(number):
            raise InputError(f"a score must be a finite number, found {number}.")

    def _read(self, sql: str, values: Sequence[Any] = ()) -> list[tuple[Any, ...]]:
        """Rows of a query whose first value is the subject; none if there is no file."""
        return self._rows(sql, (self.subject, *values))

    def _rows(self, sql: str, values: Sequence[Any]) -> list[tuple[Any, ...]]:
        """Rows of a query; none if there is no file."""
        with self._lock:
            if self._connection is None and not self.path.exists():
                return []
            with self._in_words():
                connection = self._open()
                if self._refusal and "explanation" in sql and not _has_explanations(connection):
                    return []  # a file of an earlier version, which cannot be changed
                return connection.execute(sql, tuple(values)).fetchall()

    @contextlib.contextmanager
    def _writing(self) -> Iterator[sqlite3.Connection]:
        """A transaction: all of it is written, or nothing; other writers wait for its end."""
        with self._lock, self._in_words():
            connection = self._open()
            if self._refusal:
                raise SourceError(f"the workspace cannot be written to: {self._refusal}")
            connection.execute("BEGIN IMMEDIATE")
            try:
                yield connection
                connection.execute("COMMIT")
            except BaseException:
                with contextlib.suppress(sqlite3.Error):
                    connection.execute("ROLLBACK")
                raise

    def _open(self) -> sqlite3.Connection:
        if self._connection is not None:
            return self._connection
        files.check_regular(self.path)
        self._refusal = _why_not_writable(self.path)
        if self._refusal and not self.path.exists():
            raise SourceError(f"the workspace cannot be made: {self._refusal}")
        # SQLite makes files beside this one even to read it, unless it is told that nobody writes.
        mode = "ro&immutable=1" if self._refusal else "rwc"
        connection = sqlite3.connect(
            f"{self.path.absolute().as_uri()}?mode={mode}",
            uri=True,
            timeout=_WAIT,
            isolation_level=None,
            check_same_thread=False,
        )
        try:
            connection.execute("PRAGMA trusted_schema = OFF")
            if not self._refusal:
                self._set_up(connection)
        except BaseException:
            connection.close()
            raise
        self._connection = connection
        return connection

    def _set_up(self, connection: sqlite3.Connection) -> None:
        connection.execute(
            "BEGIN"
        )  # another process may set up the file between two of these looks
        is_ready = self._is_ready(connection)
        connection.execute("COMMIT")
        if is_ready:
            return
        _use_wal(connection)
        connection.execute("BEGIN IMMEDIATE")
        if not self._is_ready(connection):
            for statement in _SCHEMA.split(";\n"):
                if statement.strip():
                    connection.execute(statement)
            connection.execute(f"PRAGMA application_id = {_APPLICATION_ID}")
            connection.execute(f"PRAGMA user_version = {_VERSION}")
        connection.execute("COMMIT")

    def _is_ready(self, connection: sqlite3.Connection) -> bool:
        """Whether the file has all tables; a CheckpointError if it is no workspace."""
        found = (
            connection.execute("PRAGMA application_id").fetchone()[0],
            connection.execute("PRAGMA user_version").fetchone()[0],
        )
        # Tables came with later versions of this library; earlier ones do not look at them.
        if found == (_APPLICATION_ID, _VERSION) and _has_explanations(connection):
            return True
        tables = connection.execute("SELECT count(*) FROM sqlite_master").fetchone()[0]
        if tables and found not in ((_APPLICATION_ID, 0), (_APPLICATION_ID, _VERSION)):
            raise CheckpointError(
                f"{self.path}: expected a workspace of version {_VERSION}, found another SQLite file or "
                "a newer version."
            )
        return False

    @contextlib.contextmanager
    def _in_words(self) -> Iterator[None]:
        try:
            yield
        except sqlite3.OperationalError as error:  # locked, full, read-only
            raise SourceError(f"cannot use the workspace {self.path}: {error}.") from error
        except sqlite3.DatabaseError as error:
            raise CheckpointError(f"{self.path}: not a workspace, or damaged: {error}.") from None

    def close(self) -> None:
        """Close the file; the next use opens it again."""
        with self._lock:
            if self._connection is not None:
                self._connection.close()
                self._connection = None

    def __repr__(self) -> str:
        return f"Workspace({str(self.path)!r}, subject={shown(self.subject)})"


def _has_explanations(connection: sqlite3.Connection) -> bool:
    rows = connection.execute(
        "SELECT count(*) FROM sqlite_master WHERE name = 'explanation_scores'"
    ).fetchall()
    return bool(rows[0][0])


def _now() -> str:
    return datetime.datetime.now(datetime.UTC).isoformat(timespec="microseconds")


def _use_wal(connection: sqlite3.Connection) -> None:
    """Switch to a write-ahead log. SQLite does not wait for others where it switches."""
    end = time.monotonic() + _WAIT
    while True:
        try:
            connection.execute("PRAGMA journal_mode = WAL")
            return
        except sqlite3.OperationalError:
            if time.monotonic() > end:
                raise
            time.sleep(0.01)
