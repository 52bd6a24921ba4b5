"""Work of minutes: jobs run one after the other in a thread of the server, and are asked for by id."""

import logging
import threading
from collections import OrderedDict
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any, Literal

from neuron_explainer.errors import NeuronExplainerError
from neuron_explainer.server.problems import Problem

log = logging.getLogger(__name__)
Kind = Literal["explain", "score"]
State = Literal["queued", "running", "done", "failed", "cancelled"]
ENDED = ("done", "failed", "cancelled")
_MOST_WAITING = 8
_MOST_KEPT = 64


@dataclass
class Job:
    """Something that is done in the background."""

    id: str
    kind: Kind
    dictionary: str
    units: list[int]
    method: str
    python: str
    state: State = "queued"
    done: int = 0
    items: dict[int, dict[str, Any]] = field(default_factory=dict)
    error: str | None = None
    stop: threading.Event = field(default_factory=threading.Event)

    def content(self) -> dict[str, Any]:
        """What the reply holds."""
        return {
            "id": self.id,
            "kind": self.kind,
            "dictionary": self.dictionary,
            "state": self.state,
            "done": self.done,
            "total": len(self.units) * (2 if self.kind == "explain" else 1),
            "items": [self.items[unit] for unit in self.units if unit in self.items],
            "error": self.error,
            "python": self.python,
        }


class Jobs:
    """The jobs of a server: one runs, some wait, and the last ones are remembered."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._jobs: OrderedDict[str, Job] = OrderedDict()
        self._workers = ThreadPoolExecutor(1, thread_name_prefix="jobs")

    def start(self, job: Job, work: Callable[[Job], None]) -> None:
        """Queue a job; a 429 if too many wait. ``work`` fills it, and ends early once it is stopped."""
        with self._lock:
            if sum(each.state not in ENDED for each in self._jobs.values()) >= _MOST_WAITING:
                raise Problem(429, "queue_full", "Too many jobs are waiting.", retry_after=5)
            while len(self._jobs) >= _MOST_KEPT:
                ended = next(id for id, each in self._jobs.items() if each.state in ENDED)
                del self._jobs[ended]
            self._jobs[job.id] = job
        self._workers.submit(_run, job, work).add_done_callback(_ended(job))

    def __getitem__(self, id: str) -> Job:
        with self._lock:
            found = self._jobs.get(id)
        if found is None:
            raise Problem(
                404,
                "unknown_job",
                "There is no such job, or it ended long ago.",
                loc=("path", "id"),
            )
        return found

    def close(self) -> None:
        """Stop all jobs after the unit that they are at."""
        with self._lock:
            for job in self._jobs.values():
                job.stop.set()
        self._workers.shutdown(cancel_futures=True)


def _ended(job: Job) -> Callable[["Future[None]"], None]:
    """What is noted when a job has ended: also an error that nobody foresaw, which is in the log then."""

    def note(future: "Future[None]") -> None:
        if future.cancelled() or job.stop.is_set():
            job.state = "cancelled"
            return
        error = future.exception()
        if error is not None:
            log.error("a job ended with an error", exc_info=error)
            job.error = (
                str(error)
                if isinstance(error, NeuronExplainerError | Problem)
                else "internal error"
            )
        job.state = "done" if error is None else "failed"

    return note


def _run(job: Job, work: Callable[[Job], None]) -> None:
    if not job.stop.is_set():
        job.state = "running"
        work(job)
