"""Ctrl-C between two steps, not in one."""

import contextlib
import signal
import threading
from collections.abc import Iterator


@contextlib.contextmanager
def step_is_finished(wait: bool) -> Iterator[list[int]]:
    """Ctrl-C is noted in a list that is empty before, so that a step is finished and its checkpoint is
    written; pressed again it ends what is under way. In other threads than the first, and unless
    ``wait``, it is what it was."""
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
