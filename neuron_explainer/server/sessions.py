"""States of pages that are too long for an address, kept under a hash of their content."""

import json
import sqlite3
import threading
from hashlib import sha256
from pathlib import Path
from typing import Any

from neuron_explainer import files
from neuron_explainer.analysis.workspace import data_dir
from neuron_explainer.errors import InputError, SourceError

FILE = "sessions.sqlite"
MOST = 2000
_ID_LENGTH = 32
_WAIT = 10.0  # seconds for another writer


class Sessions:
    """The states, in a file of the user's folder for data, which is made when the first one is kept.

    Args:
        path: the file; None: the one in that folder.
        most: how many are kept; those used longest ago are forgotten.
    """

    def __init__(self, path: Path | None = None, most: int = MOST) -> None:
        self._path, self.most = path, most
        self._lock = threading.Lock()

    @property
    def path(self) -> Path:
        """The file."""
        return self._path or data_dir() / FILE

    def keep(self, state: dict[str, Any]) -> str:
        """Keep a state, and return its id: equal states have the same."""
        try:
            text = json.dumps(state, allow_nan=False, sort_keys=True, separators=(",", ":"))
        except (ValueError, RecursionError) as error:
            raise InputError(f"a state must be JSON: {error}") from None
        id = sha256(text.encode()).hexdigest()[:_ID_LENGTH]
        files.make_folder(self.path.parent)
        with self._lock, self._open("rwc") as db:
            db.execute(
                "CREATE TABLE IF NOT EXISTS sessions (number INTEGER PRIMARY KEY, "
                "id TEXT NOT NULL UNIQUE, state TEXT NOT NULL)"
            )
            db.execute("INSERT OR REPLACE INTO sessions (id, state) VALUES (?, ?)", (id, text))
            db.execute(
                "DELETE FROM sessions WHERE number <= (SELECT max(number) FROM sessions) - ?",
                (self.most,),
            )
        return id

    def find(self, id: str) -> dict[str, Any] | None:
        """The state of an id; None if it is not known or was forgotten."""
        if not self.path.exists():
            return None
        with self._lock, self._open("rw") as db:
            rows = db.execute("SELECT state FROM sessions WHERE id = ?", (id,)).fetchall()
        found: dict[str, Any] | None = json.loads(rows[0][0]) if rows else None
        return found

    def _open(self, mode: str) -> "_Closing":
        return _Closing(self.path, mode)


class _Closing:
    """A connection for one transaction: written at the end of the block, or not at all."""

    def __init__(self, path: Path, mode: str) -> None:
        self.path, self.mode = path, mode

    def __enter__(self) -> sqlite3.Connection:
        try:
            files.check_regular(self.path)
            uri = f"{self.path.absolute().as_uri()}?mode={self.mode}"
            self.db = sqlite3.connect(uri, uri=True, timeout=_WAIT, check_same_thread=False)
            self.db.execute("PRAGMA trusted_schema = OFF")
        except sqlite3.Error as error:
            raise self._explained(error) from error
        return self.db

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        try:
            if error is None:
                self.db.commit()
        except sqlite3.Error as failed:
            raise self._explained(failed) from failed
        finally:
            self.db.close()
        if isinstance(error, sqlite3.Error):
            raise self._explained(error) from error

    def _explained(self, error: sqlite3.Error) -> SourceError:
        return SourceError(f"cannot use the file of sessions {self.path}: {error}.")
