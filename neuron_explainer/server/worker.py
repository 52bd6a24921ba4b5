"""The model's own process, and the queue of requests to it.

The web server never imports torch: the model lives in one child process, which takes requests one after
the other over a pipe and sends back results, or the parts of a stream. If it dies, the requests that wait
are refused and it is started again. Tests, and servers of a model that is in memory already, run the same
loop in a thread (``in_thread=True``).

A request can be cancelled while it waits, and while it runs between the layers of a pass or the tokens of
a text. One that runs longer than allowed ends itself there; a process that does not come to that is ended.
"""

import asyncio
import atexit
import contextlib
import gc
import importlib
import itertools
import logging
import math
import multiprocessing
import queue
import signal
import threading
import time
from collections import deque
from collections.abc import AsyncGenerator, Callable, Iterator
from dataclasses import dataclass
from multiprocessing.connection import Connection
from types import ModuleType
from typing import Any, Literal

from neuron_explainer.errors import NeuronExplainerError
from neuron_explainer.server.compute.refusals import Cancelled, Refusal
from neuron_explainer.server.compute.setup import Setup

log = logging.getLogger(__name__)
State = Literal["none", "loading", "ready", "failed"]
TRIES = 3
"""How often a process may end while it loads the model before it is given up."""
_OPERATIONS = "neuron_explainer.server.compute.operations"
_LOOKS = 0.5  # seconds between looks at whether a request runs too long
_OUT_OF_MEMORY = ("not enough memory", "out of memory", "can't allocate memory")


# --- the side of the web server ---


@dataclass(eq=False)
class _Job:
    """A request that has been sent to the model, and who waits for it."""

    number: int
    deliver: Callable[[str, Any], None]
    """Called with "part", "done" or "refused" and what belongs to it, from another thread."""


class Worker:
    """The queue of requests to the model.

    Args:
        setup: the model and its dictionaries; None: no model, and every request is refused.
        in_thread: run in a thread of this process instead of a process of its own.
        queue_size: how many requests may wait; more are refused (429).
        pause: seconds before a process that died is started again; doubled each time it dies young.
        grace: seconds after its time is over in which a request may end itself before its process is ended.
    """

    def __init__(
        self,
        setup: Setup | None,
        *,
        in_thread: bool = False,
        queue_size: int = 8,
        pause: float = 0.5,
        grace: float = 5.0,
    ) -> None:
        self.setup, self.in_thread, self.queue_size = setup, in_thread, queue_size
        self.state: State = "none" if setup is None else "loading"
        self.error: str | None = None
        """Why the model could not be loaded."""
        self.facts: dict[str, Any] = {}
        self.restarts = 0
        self._sources = {} if setup is None else {each.id: each for each in setup.dictionaries}
        self._pause, self._grace = pause, grace
        self._lock = threading.RLock()
        self._sending = threading.Lock()
        self._jobs: dict[int, _Job] = {}
        self._numbers = itertools.count()
        self._took: deque[float] = deque([1.0], maxlen=16)  # seconds of the last requests
        self._running_since = 0.0  # when the request that came first began to run
        self._connection: Any = None
        self._process: Any = None
        self._closing = threading.Event()
        self._supervisor: threading.Thread | None = None

    @property
    def queue_depth(self) -> int:
        """How many requests run or wait."""
        return len(self._jobs)

    def description(self) -> dict[str, Any]:
        """What the model says about itself; empty before it is loaded."""
        return self.facts

    def dictionary(self, id: str) -> dict[str, Any]:
        """What can be computed of a dictionary; empty for one that the worker does not have."""
        found = self._sources.get(id)
        if found is None:
            return {}
        has_autoencoder = found.kind == "latent" and found.autoencoder is not None
        return {"has_autoencoder": has_autoencoder, "map": has_autoencoder}

    @property
    def pid(self) -> int | None:
        """The number of the model's process."""
        return getattr(self._process, "pid", None)

    def start(self) -> None:
        """Begin to load the model; returns at once."""
        if self.setup is None or self._supervisor is not None:
            return
        # An application that the server is mounted in does not tell it that it ends: the process, which ends
        # with the interpreter, must not be started again then.
        atexit.register(self._closing.set)
        self._supervisor = threading.Thread(target=self._supervise, name="model", daemon=True)
        self._supervisor.start()

    def close(self, drain: float = 5.0) -> None:
        """Refuse new requests, wait up to ``drain`` seconds for those that run, and end the process."""
        end = time.monotonic() + drain
        atexit.unregister(self._closing.set)
        self._closing.set()
        while self._jobs and time.monotonic() < end:
            time.sleep(0.02)
        for job in list(self._jobs.values()):
            self._cancel(job)
        self._send(("stop",))
        if self._process is not None:
            self._process.join(2.0)
            if self._process.exitcode is None:
                self._process.kill()
        if self._supervisor is not None:
            self._supervisor.join(5.0)

    # --- asking ---

    async def call(self, operation: str, request: dict[str, Any]) -> Any:
        """The answer to a request; a :class:`Refusal` if there is none. Cancelling cancels the request."""
        async with contextlib.aclosing(self.stream(operation, request)) as events:
            async for kind, payload in events:
                if kind == "done":
                    return payload
        raise AssertionError("a request ends with its answer or an error")

    async def stream(
        self, operation: str, request: dict[str, Any]
    ) -> AsyncGenerator[tuple[str, Any], None]:
        """``("part", …)`` as often as there are parts, then ``("done", …)``."""
        loop = asyncio.get_running_loop()
        events: asyncio.Queue[tuple[str, Any]] = asyncio.Queue()

        def deliver(kind: str, payload: Any) -> None:
            with contextlib.suppress(RuntimeError):  # the loop may have ended: nobody waits
                loop.call_soon_threadsafe(events.put_nowait, (kind, payload))

        job = self._submit(operation, request, deliver)
        try:
            while True:
                kind, payload = await events.get()
                if kind == "refused":
                    raise Refusal.of(payload)
                yield kind, payload
                if kind == "done":
                    return
        finally:
            self._cancel(job)

    def _submit(
        self, operation: str, request: dict[str, Any], deliver: Callable[[str, Any], None]
    ) -> _Job:
        with self._lock:
            self._check_ready()
            if len(self._jobs) > self.queue_size:
                wait = len(self._jobs) * sum(self._took) / len(self._took)
                raise Refusal(
                    429,
                    "queue_full",
                    f"{len(self._jobs)} requests wait for the model already; try again later.",
                    retry_after=max(1, math.ceil(wait)),
                )
            if not self._jobs:
                self._running_since = time.monotonic()
            job = _Job(next(self._numbers), deliver)
            self._jobs[job.number] = job
        self._send(("run", job.number, operation, request))
        return job

    def _check_ready(self) -> None:
        if self._closing.is_set():
            raise Refusal(503, "shutting_down", "The server is shutting down.", retry_after=5)
        if self.state == "none":
            raise Refusal(
                503, "no_model", "This server has no model: start it with --model to compute."
            )
        if self.state == "loading":
            raise Refusal(503, "model_loading", "The model is loading.", retry_after=2)
        if self.state == "failed":
            raise Refusal(503, "model_failed", f"The model could not be loaded: {self.error}")

    def _cancel(self, job: _Job) -> None:
        with self._lock:
            waiting = self._jobs.get(job.number) is job
        if waiting:
            self._send(("cancel", job.number))

    def _send(self, message: tuple[Any, ...]) -> None:
        with self._sending, contextlib.suppress(OSError, ValueError):
            # A pipe that broke is noticed by the thread that reads it, which refuses what waits.
            if self._connection is not None:
                self._connection.send(message)

    # --- the process ---

    def _supervise(self) -> None:
        pause, never_ready = self._pause, 0
        while not self._closing.is_set():
            born = time.monotonic()
            self._connection, theirs = multiprocessing.Pipe()
            self._begin(theirs)
            why = self._read(self._connection)
            was_ready = self.state == "ready"
            self._process_ended(why)
            if self._closing.is_set() or self.in_thread:
                return
            self.restarts += 1
            never_ready = never_ready + 1 if time.monotonic() - born < 60 and not was_ready else 0
            if never_ready == TRIES:
                self.state, self.error = "failed", f"its process ended {TRIES} times while loading"
                return
            pause = self._pause if time.monotonic() - born > 60 else min(30.0, 2 * pause)
            log.warning("The model's process ended (%s); it is started again.", why.code)
            self._closing.wait(pause)

    def _begin(self, theirs: Connection) -> None:
        assert self.setup is not None
        if self.in_thread:
            threading.Thread(
                target=run, args=(theirs, self.setup), name="model's loop", daemon=True
            ).start()
            return
        context = multiprocessing.get_context("spawn")
        self._process = context.Process(
            target=run_as_process, args=(theirs, self.setup), name="model", daemon=True
        )
        self._process.start()
        theirs.close()  # so that the end of the process ends the pipe

    def _read(self, connection: Connection) -> Refusal:
        """Handle messages until the pipe ends; returns what to tell those who still wait."""
        while True:
            try:
                if connection.poll(_LOOKS):
                    self._handle(*connection.recv())
            except (EOFError, OSError):
                return Refusal(
                    503,
                    "worker_died",
                    "The model's process ended, perhaps for lack of memory. It is started again.",
                    retry_after=5,
                )
            if self._is_stuck() and self._process is not None:
                self._process.kill()
                self._process.join()
                return Refusal(
                    504,
                    "time_limit",
                    "The request took too long and its process was ended; it is started again.",
                    retry_after=5,
                )

    def _handle(self, kind: str, number: int | None, payload: Any) -> None:
        if kind == "state":
            self.state, facts = payload
            self.error = facts if self.state == "failed" else None
            self.facts = {}
            if self.state == "ready":
                self.facts, sources = facts
                self._sources = {source.id: source for source in sources}
            return
        with self._lock:
            job = self._jobs.get(number) if number is not None else None
            if job is None:
                return
            if kind != "part":
                del self._jobs[job.number]
                now = time.monotonic()
                self._took.append(now - self._running_since)
                self._running_since = now
        job.deliver(kind, payload)

    def _is_stuck(self) -> bool:
        assert self.setup is not None
        with self._lock:  # requests run in the order in which they came
            took = time.monotonic() - self._running_since
            return bool(self._jobs) and took > self.setup.seconds + self._grace

    def _process_ended(self, why: Refusal) -> None:
        with self._lock:
            self.state, self.facts = "loading", {}
            waiting, self._jobs = list(self._jobs.values()), {}
        for job in waiting:
            job.deliver("refused", why.facts())


# --- the side of the model ---


def run_as_process(connection: Connection, setup: Setup) -> None:
    """:func:`run` as the whole of a process: Ctrl-C is for the web server, which tells this one to stop."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    run(connection, setup)


class Guard:
    """Tells a running request whether it should end: nobody waits for it, or its time is over."""

    def __init__(self, seconds: float, number: int, cancelled: set[int]) -> None:
        self.seconds = seconds
        self._end = time.monotonic() + seconds
        self._number, self._cancelled = number, cancelled

    def __call__(self) -> None:
        """Raise :class:`Cancelled` or a :class:`Refusal` if the request should end."""
        if self._number in self._cancelled:
            raise Cancelled
        if time.monotonic() > self._end:
            raise Refusal(
                504,
                "time_limit",
                f"The request took longer than {self.seconds:g} s: ask for less, such as fewer tokens, "
                "positions or dictionaries.",
            )


def run(connection: Connection, setup: Setup) -> None:
    """Load the model, then answer requests until the pipe ends."""
    inbox: queue.SimpleQueue[tuple[Any, ...] | None] = queue.SimpleQueue()
    cancelled: set[int] = set()
    threading.Thread(
        target=_receive, args=(connection, inbox, cancelled), name="requests", daemon=True
    ).start()
    with contextlib.suppress(OSError), contextlib.closing(connection):
        operations = importlib.import_module(_OPERATIONS)
        try:
            session = operations.Session(setup)
        except Exception as error:  # whatever it is, the pages without a model still work
            log.exception("The model could not be loaded.")
            connection.send(("state", None, ("failed", f"{type(error).__name__}: {error}")))
            while inbox.get() is not None:
                pass
            return
        connection.send(
            ("state", None, ("ready", (session.facts(), list(session.sources.values()))))
        )
        while (message := inbox.get()) is not None:
            number, operation, request = message
            guard = Guard(setup.seconds, number, cancelled)
            for kind, payload in _answers(operations, session, operation, request, guard):
                connection.send((kind, number, payload))
            cancelled.discard(number)


def _receive(connection: Connection, inbox: "queue.SimpleQueue[Any]", cancelled: set[int]) -> None:
    """Sort what comes over the pipe, also while the model computes."""
    with contextlib.suppress(EOFError, OSError):
        while True:
            kind, *rest = connection.recv()
            if kind == "run":
                inbox.put(tuple(rest))
            elif kind == "cancel":
                cancelled.add(rest[0])
            else:
                break
    inbox.put(None)


def _answers(
    operations: ModuleType, session: Any, operation: str, request: dict[str, Any], guard: Guard
) -> Iterator[tuple[str, Any]]:
    """The parts and the end of one request."""
    refused: Refusal
    try:
        guard()
        yield from operations.answer(session, operation, request, guard)
        return
    except Cancelled:
        refused = Refusal(499, "cancelled", "The request was cancelled.")
    except Refusal as error:
        refused = error
    except NeuronExplainerError as error:
        refused = Refusal(422, "invalid_input", str(error))
    except Exception as error:  # one request must not end the process
        if isinstance(error, MemoryError) or any(w in str(error) for w in _OUT_OF_MEMORY):
            refused = Refusal(
                503,
                "out_of_memory",
                "The model ran out of memory; what it kept for later was dropped. Try again, or ask for "
                "less.",
                retry_after=1,
            )
        else:
            log.exception("%s failed.", operation)
            refused = Refusal(
                500, "internal_error", f"{operation} failed; the server's log says why."
            )
    if refused.code == "out_of_memory":
        session.drop_caches()  # after the except block, whose error holds the tensors of the request
        gc.collect()
    yield "refused", refused.facts()
