"""Ctrl-C that waits for a good moment."""

import contextlib
import signal
import threading
from collections.abc import Iterator


@contextlib.contextmanager
def interrupts_wait(wait: bool = True) -> Iterator[list[int]]:
    """Ctrl-C appends to the list instead of raising, so that a step is finished and its state saved.

    Ctrl-C pressed a second time raises ``KeyboardInterrupt`` at once. Nothing changes unless ``wait``, and
    nothing changes in threads other than the main one, where Python allows no signal handlers.
    """
    asked: list[int] = []

    def note(number: int, frame: object) -> None:
        if asked:
            raise KeyboardInterrupt
        asked.append(number)

    before = signal.getsignal(signal.SIGINT)
    ours = threading.current_thread() is threading.main_thread()
    if not (wait and ours and before is signal.default_int_handler):
        yield asked
        return
    signal.signal(signal.SIGINT, note)
    try:
        yield asked
    finally:
        signal.signal(signal.SIGINT, before)
