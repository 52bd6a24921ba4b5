"""The queue of requests to the model: order, refusals, cancelling, and what happens when it dies."""

import asyncio
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import aclosing, closing
from typing import Any

import pytest

from neuron_explainer.server.compute.operations import OPERATIONS, Session
from neuron_explainer.server.compute.refusals import Refusal
from neuron_explainer.server.compute.setup import Setup
from neuron_explainer.server.worker import Worker
from tests.server.computed import make_setup


@pytest.fixture(scope="module")
def setup(tmp_path_factory: pytest.TempPathFactory) -> Setup:
    return make_setup(tmp_path_factory.mktemp("model"), seconds=20.0)


@pytest.fixture
def worker(setup: Setup) -> Iterator[Worker]:
    found = Worker(setup, in_thread=True, queue_size=2)
    found.start()
    wait_until(lambda: found.state == "ready")
    with closing(found):
        yield found


def wait_until(condition: Callable[[], bool], seconds: float = 30.0) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "waited too long"
        time.sleep(0.005)


class Held:
    """An operation that runs until it is let go, or ends as any other at its guard."""

    def __init__(self) -> None:
        self.begun, self.released, self.ended = (threading.Event() for _ in range(3))

    def __call__(self, session: Session, request: dict[str, Any]) -> Any:
        self.begun.set()
        try:
            while not self.released.wait(0.002):
                session.guard()
        finally:
            self.ended.set()
        return request["answer"]


@pytest.fixture
def held(monkeypatch: pytest.MonkeyPatch) -> Held:
    operation = Held()
    monkeypatch.setitem(OPERATIONS, "held", operation)
    return operation


def refused(worker: Worker, operation: str = "tokenize", **request: Any) -> Refusal:
    with pytest.raises(Refusal) as error:
        asyncio.run(worker.call(operation, request or {"text": "a"}))
    return error.value


def test_answers_and_errors_come_back(worker: Worker, monkeypatch: pytest.MonkeyPatch) -> None:
    assert asyncio.run(worker.call("tokenize", {"text": "ab"}))["ids"] == [97, 98]
    assert worker.facts["n_layers"] == 2
    assert worker.dictionary("mlp.0") == {"has_autoencoder": True, "map": True}
    assert worker.dictionary("neurons.0")["has_autoencoder"] is False
    request = {"texts": ["abc"], "dictionary": "nothing", "top_k": 1}
    assert refused(worker, "activations", **request).status == 404

    def fails(session: Session, request: dict[str, Any]) -> Any:
        raise ZeroDivisionError("a secret of the prompt")

    monkeypatch.setitem(OPERATIONS, "fails", fails)
    error = refused(worker, "fails")
    assert (error.status, error.code) == (500, "internal_error")
    assert "secret" not in error.detail
    assert worker.queue_depth == 0


def test_more_than_the_queue_holds_are_refused(worker: Worker, held: Held) -> None:
    async def run() -> None:
        tasks = [asyncio.create_task(worker.call("held", {"answer": n})) for n in range(3)]
        await asyncio.sleep(0)
        await asyncio.to_thread(held.begun.wait, 10)
        assert worker.queue_depth == 3
        with pytest.raises(Refusal) as error:
            await worker.call("tokenize", {"text": "a"})
        assert (error.value.status, error.value.code) == (429, "queue_full")
        assert error.value.retry_after is not None
        assert error.value.retry_after >= 1
        held.released.set()
        assert await asyncio.gather(*tasks) == [0, 1, 2]

    asyncio.run(run())
    assert worker.queue_depth == 0


def test_cancelling_ends_what_runs_and_skips_what_waits(worker: Worker, held: Held) -> None:
    async def run() -> None:
        running = asyncio.create_task(worker.call("held", {"answer": 1}))
        waiting = asyncio.create_task(worker.call("held", {"answer": 2}))
        await asyncio.to_thread(held.begun.wait, 10)
        waiting.cancel()
        running.cancel()
        for task in (running, waiting):
            with pytest.raises(asyncio.CancelledError):
                await task

    asyncio.run(run())
    assert held.ended.wait(10)
    wait_until(lambda: worker.queue_depth == 0)
    assert asyncio.run(worker.call("tokenize", {"text": "b"}))["ids"] == [98]


def test_a_request_ends_when_its_time_is_over(setup: Setup, held: Held) -> None:
    limited = Worker(make_limited(setup, 0.05), in_thread=True)
    limited.start()
    with closing(limited):
        wait_until(lambda: limited.state == "ready")
        assert refused(limited, "held", answer=1).code == "time_limit"
        assert asyncio.run(limited.call("tokenize", {"text": "b"}))["ids"] == [98]


def make_limited(setup: Setup, seconds: float) -> Setup:
    return Setup(setup.model, setup.dictionaries, seconds=seconds)


def test_a_closed_stream_is_cancelled(worker: Worker, monkeypatch: pytest.MonkeyPatch) -> None:
    ended = threading.Event()

    def counts(session: Session, request: dict[str, Any]) -> Any:
        try:
            for number in range(10**6):
                session.guard()
                yield number
                time.sleep(0.001)
        finally:
            ended.set()

    monkeypatch.setitem(OPERATIONS, "counts", counts)

    async def run() -> list[Any]:
        found = []
        async with aclosing(worker.stream("counts", {})) as events:
            async for event in events:
                found.append(event)
                if len(found) == 3:
                    break
        return found

    assert asyncio.run(run()) == [("part", 0), ("part", 1), ("part", 2)]
    assert ended.wait(10)
    wait_until(lambda: worker.queue_depth == 0)


@pytest.mark.parametrize(
    "error", [MemoryError(), RuntimeError("DefaultCPUAllocator: not enough memory: you tried")]
)
def test_without_memory_caches_are_dropped(
    error: Exception, worker: Worker, monkeypatch: pytest.MonkeyPatch
) -> None:
    sessions: list[Session] = []

    def fills(session: Session, request: dict[str, Any]) -> Any:
        sessions.append(session)
        session.kept("big", lambda: bytearray(10))
        session.autoencoder("mlp.0")
        raise error

    monkeypatch.setitem(OPERATIONS, "fills", fills)
    found = refused(worker, "fills")
    assert (found.status, found.code, found.retry_after) == (503, "out_of_memory", 1)
    assert len(sessions[0].results) == 0
    assert not sessions[0]._loaded
    assert asyncio.run(worker.call("tokenize", {"text": "b"}))["ids"] == [98]


def test_a_server_without_a_model_and_one_whose_model_is_broken(tmp_path: Any) -> None:
    assert refused(Worker(None)).code == "no_model"
    broken = Worker(Setup(str(tmp_path / "nothing")), in_thread=True)
    broken.start()
    with closing(broken):
        wait_until(lambda: broken.state == "failed")
        assert "nothing" in str(broken.error)
        assert refused(broken).code == "model_failed"
    loading = Worker(Setup("tiny-tales"))
    assert (refused(loading).status, refused(loading).code) == (503, "model_loading")


def test_closing_waits_for_what_runs(setup: Setup, held: Held) -> None:
    worker = Worker(setup, in_thread=True)
    worker.start()
    wait_until(lambda: worker.state == "ready")

    async def run() -> None:
        task = asyncio.create_task(worker.call("held", {"answer": "done"}))
        await asyncio.to_thread(held.begun.wait, 10)
        closed = asyncio.create_task(asyncio.to_thread(worker.close, 10.0))
        await asyncio.sleep(0.05)
        with pytest.raises(Refusal) as error:
            await worker.call("tokenize", {"text": "a"})
        assert error.value.code == "shutting_down"
        held.released.set()
        assert await task == "done"
        await closed

    asyncio.run(run())


def test_the_web_server_s_side_does_not_import_torch() -> None:
    code = (
        "import sys, neuron_explainer.server.worker, neuron_explainer.server.computing; "
        "sys.exit('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


@pytest.mark.slow
def test_a_process_that_dies_is_started_again(setup: Setup) -> None:
    path = setup.model.model_name
    own = Worker(Setup(path, setup.dictionaries, device="cpu"), pause=0.05)
    own.start()
    with closing(own):
        wait_until(lambda: own.state == "ready", 60)
        assert asyncio.run(own.call("tokenize", {"text": "ab"}))["ids"] == [97, 98]
        assert own.pid not in (None, os.getpid())
        os.kill(own.pid or 0, signal.SIGSTOP)  # so that the request is still there when it dies

        async def ask_and_kill() -> None:
            task = asyncio.create_task(own.call("tokenize", {"text": "a"}))
            await asyncio.sleep(0.05)
            os.kill(own.pid or 0, signal.SIGKILL)
            with pytest.raises(Refusal) as error:
                await task
            assert (error.value.status, error.value.code) == (503, "worker_died")

        asyncio.run(ask_and_kill())
        wait_until(lambda: own.state == "ready", 60)
        assert own.restarts == 1
        assert asyncio.run(own.call("tokenize", {"text": "a"}))["ids"] == [97]


@pytest.mark.slow
def test_a_process_that_hangs_is_ended(setup: Setup) -> None:
    own = Worker(Setup(setup.model.model_name, device="cpu", seconds=0.2), pause=0.05, grace=0.2)
    own.start()
    with closing(own):
        wait_until(lambda: own.state == "ready", 60)
        os.kill(own.pid or 0, signal.SIGSTOP)
        error = refused(own)
        assert (error.status, error.code) == (504, "time_limit")
        wait_until(lambda: own.state == "ready", 60)
        assert asyncio.run(own.call("tokenize", {"text": "a"}))["ids"] == [97]


@pytest.mark.slow
def test_an_interpreter_that_ends_starts_no_process_again() -> None:
    """As where the server is mounted in an application: nobody closes the worker."""
    code = (
        "import sys, time\n"
        "from neuron_explainer.server.compute.setup import Setup\n"
        "from neuron_explainer.server.worker import Worker\n"
        "worker = Worker(Setup('tiny-tales', device='cpu'), pause=0.0)\n"
        "worker.start()\n"
        "while worker.state != 'ready': time.sleep(0.01)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True
    )
    assert done.stderr == ""
