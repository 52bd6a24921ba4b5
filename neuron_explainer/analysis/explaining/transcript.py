"""What an endpoint was asked and what it answered: a file of JSON lines that only grows.

It is at once the record of what left this machine and the reason why nothing is asked twice. A line appears
whole or is ignored: a process that is killed loses only the requests that are under way. (A power cut may
lose the last seconds, for lines are not synced to disk one by one.) Several processes may append to one
file. It never holds a key, see ``client.py``.
"""

import errno
import json
import os
import threading
from pathlib import Path
from typing import Any

from neuron_explainer import files
from neuron_explainer.errors import SourceError

TRANSCRIPT_FILE = "endpoint.jsonl"
_BEGIN = b'{"key":"'
_KEY = 64  # hex digits of a SHA-256


class Transcript:
    """Replies by the hash of what was asked.

    Args:
        path: the file; None: the replies are kept in memory.
    """

    def __init__(self, path: str | Path | None = None) -> None:
        self.path = None if path is None else files.local_path(path)
        self._lock = threading.Lock()
        self._places: dict[str, int] = {}  # where the lines begin
        self._kept: dict[str, dict[str, Any]] = {}
        self._torn = False  # whether the last line was cut off
        if self.path is not None and self.path.exists():
            self._read_places(self.path)

    def _read_places(self, path: Path) -> None:
        files.check_regular(path)
        place = 0
        try:
            with path.open("rb") as file:
                for line in file:
                    self._torn = not line.endswith(b"\n")
                    key = line[len(_BEGIN) : len(_BEGIN) + _KEY]
                    if line.startswith(_BEGIN) and line.endswith(b"}\n"):
                        self._places[key.decode("ascii", "replace")] = place
                    place += len(line)
        except OSError as error:
            raise SourceError(f"cannot read {path}: {error.strerror or error}") from error

    def __len__(self) -> int:
        return len(self._places) + len(self._kept)

    def __contains__(self, key: str) -> bool:
        return key in self._places or key in self._kept

    def get(self, key: str) -> dict[str, Any] | None:
        """What was answered; None if it was not asked, or if the line is damaged."""
        if self.path is None:
            return self._kept.get(key)
        place = self._places.get(key)
        if place is None:
            return None
        try:
            with self.path.open("rb") as file:
                file.seek(place)
                found = json.loads(file.readline())
        except OSError as error:
            raise SourceError(f"cannot read {self.path}: {error.strerror or error}") from error
        except (ValueError, RecursionError):
            return None
        same = isinstance(found, dict) and found.get("key") == key
        return found if same else None

    def append(self, key: str, record: dict[str, Any]) -> None:
        """Keep what was answered.

        Args:
            key: the hash of what was asked.
            record: plain values.
        """
        if self.path is None:
            self._kept[key] = record
            return
        line = json.dumps({"key": key, **record}, separators=(",", ":")).encode() + b"\n"
        with self._lock, files.explain_refusal(self.path):
            self._write(self.path, key, line)

    def _write(self, path: Path, key: str, line: bytes) -> None:
        files.make_folder(path.parent)
        with files.plain_write(path), open(path, "ab", buffering=0, opener=_private) as file:
            begin = file.seek(0, os.SEEK_END) + self._torn
            # Another process may have appended meanwhile: what is read at this place is checked.
            whole = b"\n" * self._torn + line
            self._torn = True
            if file.write(whole) != len(whole):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))
            self._torn = False
        self._places[key] = begin


def _private(path: str, flags: int) -> int:
    """Open for this user alone: prompts hold the text of a corpus."""
    return os.open(path, flags, 0o600)
