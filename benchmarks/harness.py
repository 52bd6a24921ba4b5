"""Contestants side by side: each in its own process, one at a time, in rotating order.

**A contestant** is a module ``benchmarks/contestants/<module>.py`` that imports only its own library
(and :mod:`benchmarks.workloads`), with one function for each workload it offers. The function gets the
workload's settings as keywords, prepares what is not timed and returns the call that is::

    def logits(folder, tokens):                       # settings: JSON values of the race
        model, tokens = load(folder), torch.tensor(tokens)
        return lambda: {"logits": model(tokens)}      # this call is timed

The call returns ``{name: tensor, list of tensors, or (nested) list of whole numbers}``. A checksum of each
is taken after the first call (not timed) and compared with the other contestants' checksums of the same
name. Returned tensors have the layout that :mod:`benchmarks.workloads` describes, whatever the library's
own layout is; a name that only one contestant returns is not compared. Instead of a callable, a
:class:`~benchmarks.workloads.Prepared` may be returned, which adds a remark; one that cannot do the
work raises :class:`~benchmarks.workloads.Refusal`. Gradients are off unless the race says ``grad=True``.

**A table** is a module ``benchmarks/<name>.py`` with ``races(setup) -> list[Race]`` (see
``benchmarks/forward.py``), listed in ``benchmarks/__main__.py``. A :class:`Race` is one heading: entries
that do the same work, and the label of the entry that ratios refer to. Each race has an entry called
*GEMM floor*: the same matrix products, with preallocated outputs and nothing else.

For every entry the harness starts the contestant (once for all races, or anew for each run with
``fresh=True``), prepares it, calls it once for the checksum, once more to measure extra peak memory, and
then once in each round; each round starts with another entry. Figures are medians over rounds; ratios are
medians of the ratios within a round. A call that takes longer than a minute stands for all of an entry's
calls, and its memory is not measured. An entry whose library is not
installed, or that fails, is listed with the reason.
"""

import json
import math
import os
import select
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self

THREADS = 2
ROOT = Path(__file__).parent.parent
_SETTLE = 0.02  # seconds; threads of the previous contestant spin for a moment before they sleep
_PATIENCE = 600  # seconds until a silent contestant counts as stuck
_TOLERANCE = (
    1e-3  # relative to the scale of a checksum; the order of summation alone makes about 1e-6
)


class ContestantError(Exception):
    """A contestant cannot take part: not installed, not offered, failed, stuck."""


@dataclass(frozen=True)
class Contestant:
    """A library, or a baseline, that takes part."""

    name: str
    """The name in tables."""
    module: str
    """Its module in ``benchmarks.contestants``."""
    variant: str = ""
    """Passed to the module's functions as ``variant`` if it is not empty."""
    peer: str = ""
    """Its name in ``--peers`` and in ``benchmarks/peers/<peer>.txt``; empty if no other library is needed."""
    distribution: str = ""
    """The name that pip knows, to look up the version."""
    major: str = ""
    """What the version must start with."""
    optional: bool = False
    """Whether it takes part only with ``--peers``."""


@dataclass(frozen=True)
class Entry:
    """One line of a table: a contestant, which of its functions, with which settings."""

    contestant: Contestant
    workload: str
    settings: Mapping[str, Any] = field(default_factory=dict)
    label: str = ""
    """What the table calls it; the contestant's name by default."""
    fresh: bool = False
    """Whether each run happens in a new process."""
    apart: bool = False
    """Whether its result differs from the others' on purpose and is not compared."""

    @property
    def shown(self) -> str:
        """What the table calls it."""
        return self.label or self.contestant.name


@dataclass(frozen=True)
class Race:
    """Entries that do the same work, under one heading."""

    title: str
    entries: Sequence[Entry]
    reference: str
    """Label of the entry that ratios refer to."""
    grad: bool = False
    calls: int = 1
    """How many calls one run makes; the times shown are divided by it."""
    rounds: int | None = None
    """Upper limit of rounds, whatever the command line asks for."""
    warm_s: float = 0.0
    """Seconds of untimed calls before each timed one. Some systems take memory away from idle processes, and
    the first calls after a pause would pay for it."""
    remark: str = ""


@dataclass
class Result:
    """The measurements of one entry."""

    label: str
    seconds: list[float] = field(default_factory=list)
    peak_mib: float | None = None
    checksum: dict[str, list[float]] = field(default_factory=dict)
    note: str = ""
    error: str = ""

    @property
    def median(self) -> float:
        """Median of the timed runs, in seconds."""
        return statistics.median(self.seconds)


def everyone(
    contestants: Sequence[Contestant], workload: str, settings: Mapping[str, Any]
) -> list[Entry]:
    """One entry for each contestant, all with the same workload and settings."""
    return [Entry(contestant, workload, settings) for contestant in contestants]


class Process:
    """A contestant's process and the pipe to it: each command is one line of JSON, and so is its answer."""

    def __init__(self, contestant: Contestant, python: str, threads: int) -> None:
        self._log = tempfile.TemporaryFile()  # noqa: SIM115 - lives as long as the process
        numbers = {name: str(threads) for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS")}
        offline = {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1", "PYTHONPATH": str(ROOT)}
        try:
            self._child = subprocess.Popen(
                [python, "-m", "benchmarks.child"],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=self._log,
                cwd=ROOT,
                env={**os.environ, **numbers, **offline},
            )
        except OSError as error:
            self._log.close()
            raise ContestantError(f"its interpreter does not start: {error}") from None
        try:
            self.hello = self.ask(
                "hello",
                module=contestant.module,
                distribution=contestant.distribution,
                major=contestant.major,
                threads=threads,
            )
        except ContestantError:
            self.close()
            raise

    def ask(self, do: str, **arguments: Any) -> dict[str, Any]:
        """Send a command and wait for its answer.

        Raises:
            ContestantError: the answer is an error, or no answer came.
        """
        assert self._child.stdin is not None
        assert self._child.stdout is not None
        try:
            self._child.stdin.write(json.dumps({"do": do, **arguments}).encode() + b"\n")
            self._child.stdin.flush()
        except BrokenPipeError:
            raise ContestantError(f"its process has ended. {self._last_words()}") from None
        if not select.select([self._child.stdout], [], [], _PATIENCE)[0]:
            self.close()
            raise ContestantError(f"no answer to {do!r} within {_PATIENCE} s.")
        line = self._child.stdout.readline()
        if not line:
            raise ContestantError(f"its process has ended. {self._last_words()}")
        answer: dict[str, Any] = json.loads(line)
        if "error" in answer:
            raise ContestantError(answer["error"])
        return answer

    def _last_words(self) -> str:
        """How the process ended, and the last line that it wrote to stderr."""
        status = self._child.wait()
        self._log.seek(0)
        lines = self._log.read().decode(errors="replace").strip().splitlines()
        last = f" Its last line: {lines[-1]}" if lines else ""
        if status == -signal.SIGKILL:
            return f"It was killed; where memory is short, the system does that.{last}"
        return f"Exit status {status}.{last}"

    def close(self) -> None:
        """End the process."""
        self._child.kill()
        self._child.communicate()
        self._log.close()


class Harness:
    """Starts contestants, runs races and keeps processes between races. A context manager.

    Args:
        rounds: timed runs of each entry.
        pythons: interpreters by peer name; peers without one are looked for in this environment.
        with_peers: whether optional contestants take part.
        threads: number of threads of each contestant.
        slow_s: seconds from which a call stands for all calls of its entry.
    """

    def __init__(
        self,
        rounds: int,
        pythons: Mapping[str, str] | None = None,
        with_peers: bool = True,
        threads: int = THREADS,
        slow_s: float = 60.0,
    ) -> None:
        self.rounds, self.with_peers, self.threads = rounds, with_peers, threads
        self.slow_s = slow_s
        self.pythons = dict(pythons or {})
        self._processes: dict[Contestant, Process] = {}

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        for process in self._processes.values():
            process.close()

    def run(self, race: Race) -> list[Result]:
        """The results of a race, in the order of its entries."""
        entries = [e for e in race.entries if self.with_peers or not e.contestant.optional]
        runners = [_Runner(self, entry, race) for entry in entries]
        for runner in runners:
            runner.attempt(runner.prepare)
        for index in range(min(self.rounds, race.rounds or self.rounds)):
            start = index % len(runners)
            for runner in [*runners[start:], *runners[:start]]:
                runner.attempt(runner.time)
        for runner in runners:
            runner.attempt(runner.finish)
        return [runner.result for runner in runners]

    def process(self, contestant: Contestant, fresh: bool = False) -> Process:
        """The contestant's running process; with ``fresh`` a new one, which the caller closes."""
        python = self.pythons.get(contestant.peer, sys.executable)
        if fresh:
            return Process(contestant, python, self.threads)
        if contestant not in self._processes:
            self._processes[contestant] = Process(contestant, python, self.threads)
        return self._processes[contestant]


class _Runner:
    """Takes one entry through a race; after a failure it does nothing more."""

    def __init__(self, harness: Harness, entry: Entry, race: Race) -> None:
        self.harness, self.entry, self.race = harness, entry, race
        self.key = f"{race.title}: {entry.shown}"
        self.result = Result(entry.shown)
        self.once: float | None = None
        """Seconds of the only call, where it takes too long for others."""

    def attempt(self, step: Any) -> None:
        if self.result.error:
            return
        try:
            step()
        except ContestantError as error:
            self.result.error = str(error)
            print(f"  {self.key}: {error}", file=sys.stderr)

    def prepare(self) -> None:
        print(f"  {self.key}", file=sys.stderr)
        if self.entry.fresh:
            return
        process = self.harness.process(self.entry.contestant)
        self._prepare_in(process)
        first = process.ask("check", key=self.key)
        self._note_checksum(first)
        if first["seconds"] > self.harness.slow_s:
            self.once = first["seconds"]
            return
        self.result.peak_mib = process.ask("measure", key=self.key)["peak_mib"]

    def time(self) -> None:
        if self.once is not None:
            self.result.seconds.append(self.once)
            return
        time.sleep(_SETTLE)
        if self.entry.fresh:
            self._fresh_run()
            return
        process = self.harness.process(self.entry.contestant)
        warm = 0.0
        while warm < self.race.warm_s:
            warm += process.ask("run", key=self.key)["seconds"]
        self.result.seconds.append(process.ask("run", key=self.key)["seconds"])

    def finish(self) -> None:
        if not self.entry.fresh:
            self.harness.process(self.entry.contestant).ask("drop", key=self.key)

    def _prepare_in(self, process: Process) -> None:
        settings = dict(self.entry.settings)
        if self.entry.contestant.variant:
            settings["variant"] = self.entry.contestant.variant
        prepared = process.ask(
            "prepare",
            key=self.key,
            workload=self.entry.workload,
            settings=settings,
            grad=self.race.grad,
        )
        self.result.note = prepared["note"]

    def _note_checksum(self, answer: dict[str, Any]) -> None:
        if not self.entry.apart:
            self.result.checksum = answer["checksum"]

    def _fresh_run(self) -> None:
        process = self.harness.process(self.entry.contestant, fresh=True)
        try:
            self._prepare_in(process)
            answer = process.ask("measure", key=self.key)
            if not self.result.seconds:
                self._note_checksum(process.ask("check", key=self.key))
        finally:
            process.close()
        self.result.seconds.append(answer["seconds"])
        self.result.peak_mib = max(self.result.peak_mib or 0.0, answer["peak_mib"])


# --- the table ---


def agreement(results: Sequence[Result], reference: str) -> dict[str, str]:
    """For each label, what was compared with the reference (or with the first entry that has a checksum).

    Equal results are listed with a digest; different ones are marked loudly.
    """
    first = [r for r in results if r.label == reference and r.checksum]
    judges = first + [r for r in results if r.checksum and r.label != reference]
    verdicts = {}
    for result in results:
        shared = {
            name: (value, judge.checksum[name])
            for judge in reversed(judges)  # the first judge has the last word
            if judge is not result
            for name, value in result.checksum.items()
            if name in judge.checksum
        }
        wrong = sorted(name for name, (a, b) in shared.items() if not _close(a, b))
        if wrong:
            verdicts[result.label] = f"**DIFFERS: {', '.join(wrong)}**"
        else:
            verdicts[result.label] = (
                ", ".join(_digest(result, name) for name in sorted(shared)) or "-"
            )
    return verdicts


def _digest(result: Result, name: str) -> str:
    """The name of a result and one number that summarises its checksum."""
    return f"{name} {statistics.fmean(map(abs, result.checksum[name])):.5g}"


def _close(a: Sequence[float], b: Sequence[float]) -> bool:
    """Whether all elements are close, relative to the largest of both; NaN equals nothing."""
    scale = max(map(abs, [*a, *b]), default=0.0)
    return len(a) == len(b) and all(
        math.isclose(x, y, rel_tol=0.0, abs_tol=_TOLERANCE * scale)
        for x, y in zip(a, b, strict=True)
    )


def table(race: Race, results: Sequence[Result]) -> str:
    """A markdown table with a line for each entry; entries without figures come last, with the reason."""
    per_call, unit = (1e6 / race.calls, "µs a call") if race.calls > 1 else (1e3, "ms")
    same = agreement(results, race.reference)
    base = next((r for r in results if r.label == race.reference and not r.error), None)
    lines = [
        f"### {race.title}",
        "",
        *([race.remark, ""] if race.remark else []),
        f"| contestant | median {unit} | min-max | ratio | extra peak MiB | same result |",
        "|---|--:|--:|--:|--:|---|",
    ]
    for result in results:
        if result.error or not result.seconds:
            continue
        low, high = (per_call * f(result.seconds) for f in (min, max))
        lines.append(
            f"| {result.label}{f' ({result.note})' if result.note else ''} "
            f"| {per_call * result.median:.4g} | {low:.4g}-{high:.4g} | {_ratio(result, base)} "
            f"| {_mib(result.peak_mib)} | {same[result.label]} |"
        )
    lines += [f"| {r.label} | - | - | - | - | {r.error} |" for r in results if r.error]
    return "\n".join(lines) + "\n"


def _ratio(result: Result, base: Result | None) -> str:
    if base is None:
        return "-"
    pairs = zip(result.seconds, base.seconds, strict=False)
    return f"{statistics.median(a / b for a, b in pairs):.3f}"


def _mib(value: float | None) -> str:
    return "-" if value is None else f"{value:.0f}"


def provenance() -> str:
    """Date, hardware, interpreter and commit: the first line of a report."""
    commit = _output("git", "rev-parse", "--short", "HEAD") or "unknown"
    changed = " with changes" if _output("git", "status", "--porcelain") else ""
    cpu = next(
        (
            line.partition(":")[2].strip()
            for line in _lines("/proc/cpuinfo")
            if line.startswith("model name")
        ),
        "unknown processor",
    )
    return (
        f"{time.strftime('%Y-%m-%d')}, {cpu}, {os.cpu_count()} cores, {THREADS} threads, "
        f"Python {sys.version.split()[0]}, commit {commit}{changed}"
    )


def _lines(path: str) -> list[str]:
    try:
        return Path(path).read_text().splitlines()
    except OSError:
        return []


def _output(*command: str) -> str:
    try:
        run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return ""
    return run.stdout.strip()
