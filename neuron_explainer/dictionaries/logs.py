"""What a run reports: a progress bar, one line of JSON for each logged step, other loggers on request."""

import contextlib
import json
import os
import time
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Protocol, Self, TypeVar

from neuron_explainer import files
from neuron_explainer.dictionaries.runs import RunFolder
from neuron_explainer.errors import InputError, did_you_mean, optional_module
from neuron_explainer.progress import progress_bar

Metrics = Mapping[str, Mapping[str, float]]
"""By dictionary, then by name."""


class Logger(Protocol):
    """Anything that accepts the numbers of a step."""

    def write(self, step: int, common: Mapping[str, float], metrics: Metrics) -> None: ...

    def close(self) -> None: ...


L = TypeVar("L", bound=Logger)


class JsonLines:
    """``log.jsonl``: one JSON object for each logged step.

    Opening it at a step removes the lines of later steps, because a run resumed at that step writes them
    again.
    """

    def __init__(self, path: Path, step: int) -> None:
        self._path = path
        if path.exists():
            files.check_regular(path)
            kept = [line for line in path.read_bytes().splitlines() if _step_of(line) <= step]
            with files.atomic_write(path) as temporary:
                temporary.write_bytes(b"".join(line + b"\n" for line in kept))
        self._file = open(path, "a", encoding="utf-8")  # noqa: SIM115  # closed by close()

    def write(self, step: int, common: Mapping[str, float], metrics: Metrics) -> None:
        line = {"step": step, **common, "dictionaries": {k: dict(v) for k, v in metrics.items()}}
        with files.explain_refusal(self._path), files.plain_write(self._path):
            self._file.write(json.dumps(line) + "\n")
            self._file.flush()

    def sync(self) -> None:
        """Wait until all lines so far are on the disk."""
        with files.explain_refusal(self._path):
            files.step("sync", self._path)
            os.fsync(self._file.fileno())

    def close(self) -> None:
        with files.explain_refusal(self._path):  # closing may report an earlier write that failed
            self._file.close()


class ProgressBar:
    """Shows tokens per second, and the mean over all dictionaries of every other number."""

    def __init__(self, steps: int | None, step: int, show: bool) -> None:
        self._bar = progress_bar(total=steps, initial=step, unit="step", disable=not show)

    def step(self) -> None:
        self._bar.update()

    def write(self, step: int, common: Mapping[str, float], metrics: Metrics) -> None:
        names = dict.fromkeys(name for values in metrics.values() for name in values)
        means = {}
        for name in names:
            found = [values[name] for values in metrics.values() if name in values]
            means[name] = f"{sum(found) / len(found):.4g}"
        self._bar.set_postfix(
            {"tokens/s": f"{common['tokens_per_second']:.3g}", **means}, refresh=False
        )

    def close(self) -> None:
        self._bar.close()


class TensorBoard:
    """Scalars for TensorBoard, in the run's folder."""

    def __init__(self, folder: Path, step: int) -> None:
        module = optional_module("torch.utils.tensorboard", "logging to tensorboard", "tensorboard")
        # purge_step hides events of steps that the resumed run takes again.
        self._writer = module.SummaryWriter(str(folder / "tensorboard"), purge_step=step + 1)

    def write(self, step: int, common: Mapping[str, float], metrics: Metrics) -> None:
        for name, value in _flat(common, metrics).items():
            self._writer.add_scalar(name, value, step)

    def close(self) -> None:
        self._writer.close()


class Wandb:
    """Scalars for Weights & Biases; a resumed run continues the run whose id is in its folder."""

    def __init__(self, folder: Path, step: int, settings: Mapping[str, Any]) -> None:
        module = optional_module("wandb", "logging to wandb")
        record = folder / "wandb.json"
        identity = files.read_json(record)["id"] if record.exists() else None
        self._run = module.init(
            config=dict(settings), id=identity, resume="allow", name=folder.name, dir=str(folder)
        )
        if identity is None:
            files.write_json(record, {"id": self._run.id})

    def write(self, step: int, common: Mapping[str, float], metrics: Metrics) -> None:
        self._run.log(_flat(common, metrics), step=step)

    def close(self) -> None:
        self._run.finish()


class Logs:
    """Everything that a run writes to on the way; all is closed together, however the run ends.

    Args:
        steps: of the whole run, if that is known.
        step: the step that the run has reached.
        tokens: activations that it has seen so far.
        place: the run's folder, if it has one.
        progress: whether to show a bar.
        log_to: ``"tensorboard"``, ``"wandb"``; they need a folder.
        settings: of the run, for loggers that record them.
    """

    def __init__(
        self,
        steps: int | None,
        step: int,
        tokens: int,
        place: RunFolder | None,
        progress: bool,
        log_to: Iterable[str],
        settings: Mapping[str, Any],
    ) -> None:
        folder = None if place is None else place.path
        for name in log_to:
            _check_known(name, folder)
        self._lines: JsonLines | None = None
        with contextlib.ExitStack() as stack:  # closes what is open if the next cannot be opened
            self._bar = _keep(stack, ProgressBar(steps, step, progress))
            self._loggers: list[Logger] = [self._bar]
            if folder is not None:
                self._lines = _keep(stack, JsonLines(folder / "log.jsonl", step))
                self._loggers.append(self._lines)
                for name in log_to:
                    extra: Logger = (
                        TensorBoard(folder, step)
                        if name == "tensorboard"
                        else Wandb(folder, step, settings)
                    )
                    self._loggers.append(_keep(stack, extra))
            self._stack = stack.pop_all()
        self._tokens, self._time = tokens, time.perf_counter()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self._stack.close()

    def step(self) -> None:
        """Count one step on the progress bar."""
        self._bar.step()

    def write(self, step: int, tokens: int, metrics: Metrics, epoch: int | None = None) -> None:
        """Send the numbers of a step to every logger; ``epoch`` counts from 0, where a run has epochs."""
        now = time.perf_counter()
        rate = (tokens - self._tokens) / max(now - self._time, 1e-9)
        self._tokens, self._time = tokens, now
        common: dict[str, float] = {} if epoch is None else {"epoch": epoch}
        for logger in self._loggers:
            logger.write(step, common | {"tokens": tokens, "tokens_per_second": rate}, metrics)

    def sync(self) -> None:
        """Wait until all lines so far are on the disk, so that no checkpoint is newer than the log."""
        if self._lines is not None:
            self._lines.sync()


def _keep(stack: contextlib.ExitStack, logger: L) -> L:
    stack.callback(logger.close)
    return logger


def _check_known(name: str, folder: Path | None) -> None:
    if name not in ("tensorboard", "wandb"):
        hint = did_you_mean(name, ["tensorboard", "wandb"])
        raise InputError(f"unknown logger {name!r}.{hint} Known: tensorboard, wandb.")
    if folder is None:
        raise InputError(f"logging to {name} needs a folder for the run.")


def _flat(common: Mapping[str, float], metrics: Metrics) -> dict[str, float]:
    flat = dict(common)
    for dictionary, values in metrics.items():
        prefix = f"{dictionary}/" if len(metrics) > 1 else ""
        flat |= {prefix + name: value for name, value in values.items()}
    return flat


def _step_of(line: bytes) -> float:
    """The step of a log line; infinity if the line was cut off."""
    try:
        return int(json.loads(line)["step"])
    except (ValueError, KeyError, TypeError):
        return float("inf")
