"""Progress bars: the one place that makes them."""

import sys
from collections.abc import Callable, Iterable
from typing import IO, Any

from tqdm import tqdm

SECONDS_BETWEEN_LINES = 10.0


class _Lines(tqdm):  # type: ignore[misc]  # tqdm comes without types
    """A bar that writes a line now and then, for a stderr that is a file or a pipe."""

    disable: bool

    @staticmethod
    def status_printer(file: IO[str]) -> Callable[[str], None]:
        """Write whole lines, where tqdm writes over the last one."""

        def write(text: str) -> None:
            if text.strip():
                file.write(f"{text}\n")
                file.flush()

        return write

    def close(self) -> None:
        """End with the last line, and with no empty one after it."""
        if not self.disable:
            if self.n != self.last_print_n:
                self.refresh()
            self.leave, self.disable = False, True
        super().close()


def progress_bar(iterable: Iterable[Any] | None = None, **options: Any) -> Any:
    """tqdm's bar with its ``options``: on a terminal as ever, elsewhere a line each ten seconds."""
    stream = options.get("file") or sys.stderr
    if stream is None or stream.isatty():
        return tqdm(iterable, **options)
    # ncols=0: numbers only, since a bar that does not grow says nothing.
    return _Lines(iterable, **{"mininterval": SECONDS_BETWEEN_LINES, "ncols": 0, **options})
