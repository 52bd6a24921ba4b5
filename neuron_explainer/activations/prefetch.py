"""A thread that fetches items before they are asked for, in the same order."""

import threading
import time
import weakref
from collections import deque
from collections.abc import Callable, Sized
from typing import Generic, TypeVar

Item = TypeVar("Item", bound=Sized)


class _Shared(Generic[Item]):
    """The state that the thread and its owner share. The thread does not hold the owner, so that it can be
    collected."""

    def __init__(self, fetch: Callable[[int], Item | None], start: int, ahead: int) -> None:
        self.fetch, self.next, self.ahead = fetch, start, ahead
        self.ready: deque[Item | BaseException | None] = deque()
        self.rows = 0
        self.closed = False
        self.changed = threading.Condition()

    def run(self) -> None:
        while True:
            with self.changed:
                self.changed.wait_for(lambda: self.closed or self.rows < self.ahead)
                if self.closed:
                    return
            item: Item | BaseException | None
            try:
                item = self.fetch(self.next)
            except BaseException as error:
                item = error
            with self.changed:
                self.next += 1
                self.ready.append(item)
                ended = item is None or isinstance(item, BaseException)
                if not ended:
                    self.rows += len(item)  # type: ignore[arg-type]
                self.changed.notify_all()
                if ended:
                    return

    def close(self, thread: threading.Thread) -> None:
        with self.changed:
            self.closed = True
            self.ready.clear()
            self.changed.notify_all()
        if thread is not threading.current_thread():
            thread.join()


class Prefetcher(Generic[Item]):
    """Gives ``fetch(start)``, ``fetch(start + 1)``, … until None, which a thread fetches in advance.

    An error in ``fetch`` is raised by the call of :meth:`get` that would have returned its result. The
    thread ends with :meth:`close`, with this object, and with the interpreter.

    Args:
        fetch: makes the item with a number; None ends the series. The length of an item counts as rows.
        start: the number of the first item.
        ahead: rows that may lie ready: with this many, the thread waits.
    """

    def __init__(self, fetch: Callable[[int], Item | None], start: int, ahead: int) -> None:
        self._shared = _Shared(fetch, start, max(1, ahead))
        thread = threading.Thread(target=self._shared.run, name="activations", daemon=True)
        # Runs when this is collected, and at exit before daemon threads are cut off in mid-forward.
        self._finalizer = weakref.finalize(self, self._shared.close, thread)
        self.waited_s = 0.0
        """Seconds that :meth:`get` has spent waiting."""
        thread.start()

    def get(self) -> Item | None:
        """The next item; None at the end and in every later call."""
        shared, began = self._shared, time.perf_counter()
        with shared.changed:
            shared.changed.wait_for(lambda: shared.ready or shared.closed)
            self.waited_s += time.perf_counter() - began
            if shared.closed:
                raise RuntimeError("the prefetcher has been closed")
            item = shared.ready[0]
            if item is None:
                return None
            if isinstance(item, BaseException):
                raise item
            shared.ready.popleft()
            shared.rows -= len(item)
            shared.changed.notify_all()
            return item

    def close(self) -> None:
        """End the thread, after waiting for the item that it is fetching."""
        self._finalizer()
