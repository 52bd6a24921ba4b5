"""What the downloads of one call have in common."""

import threading
from typing import Any

from neuron_explainer.files import _routes


class Transfer:
    """What the downloads of one call share: connections, the progress bar, the wish to stop."""

    def __init__(self, *, progress: bool, threads: int = 1) -> None:
        self.stopped = threading.Event()
        self._progress, self._threads = progress, threads
        self._lock = threading.Lock()
        self._session: Any = None
        self._bar: Any = None
        self._got: dict[str, int] = {}  # bytes of each source that the bar has counted

    def __enter__(self) -> "Transfer":
        return self

    def __exit__(self, *_: object) -> None:
        if self._session is not None:
            self._session.close()
        if self._bar is not None:
            self._bar.close()

    def session(self) -> Any:
        """Made when first needed: a warm cache does not even import requests."""
        with self._lock:
            if self._session is None:
                self._session = _routes.new_session(self._threads)
            return self._session

    def began(self, source: str, total: int | None, have: int) -> None:
        """A try has begun for a file of ``total`` bytes, of which ``have`` are there already."""
        if not self._progress:
            return
        from tqdm import tqdm

        with self._lock:
            if self._bar is None:
                name = source.rpartition("/")[2] if self._threads == 1 else "downloading"
                # disable=None: silent where nobody looks
                self._bar = tqdm(desc=name, unit="B", unit_scale=True, disable=None, total=0)
            if source not in self._got:
                self._bar.total += total or 0
            self._bar.update(have - self._got.get(source, 0))  # back, where a try starts anew
            self._got[source] = have

    def received(self, source: str, count: int) -> None:
        if self.stopped.is_set():
            raise KeyboardInterrupt
        if self._bar is not None:
            with self._lock:
                self._got[source] += count
                self._bar.update(count)

    def pause(self, seconds: float) -> None:
        """Sleep, unless somebody wants to stop."""
        if self.stopped.wait(seconds):
            raise KeyboardInterrupt
