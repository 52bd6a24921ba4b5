"""A lock that does not keep its owner from being pickled or copied: :class:`Lock`."""

import threading


class Lock:
    """A reentrant lock. In a pickle or a copy of its owner, a new lock takes its place.

    So what holds one can be sent to a process that is started with ``spawn``.
    """

    def __init__(self) -> None:
        self._lock = threading.RLock()

    def __enter__(self) -> None:
        self._lock.acquire()

    def __exit__(self, *error: object) -> None:
        self._lock.release()

    def __reduce__(self) -> tuple[type["Lock"], tuple[()]]:
        return Lock, ()
