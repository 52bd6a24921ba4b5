"""What a run says of itself: a progress bar, a JSON line for each logged step, other loggers if asked."""

import importlib
import json
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Literal, Protocol

from tqdm import tqdm

from neuron_explainer import files
from neuron_explainer.errors import InputError, MissingExtraError, did_you_mean

LoggerName = Literal["tensorboard", "wandb"]
Metrics = Mapping[str, Mapping[str, float]]
"""By dictionary, then by name."""


class Logger(Protocol):
    """Anything that takes the numbers of a step."""

    def write(self, step: int, common: Mapping[str, float], metrics: Metrics) -> None: ...

    def close(self) -> None: ...


class JsonLines:
    """``log.jsonl``: one object a step.

    Opened at a step, it loses what was written after it: a run that was resumed from there says it
    again.
    """

    def __init__(self, path: Path, step: int) -> None:
        self._path = path
        if path.exists():
            kept = [line for line in path.read_bytes().splitlines() if _step_of(line) <= step]
            with files.atomic_write(path) as temporary:
                temporary.write_bytes(b"".join(line + b"\n" for line in kept))
        self._file = open(path, "a", encoding="utf-8")  # noqa: SIM115  # closed by close()

    def write(self, step: int, common: Mapping[str, float], metrics: Metrics) -> None:
        line = {"step": step, **common, "dictionaries": {k: dict(v) for k, v in metrics.items()}}
        self._file.write(json.dumps(line) + "\n")
        self._file.flush()

    def sync(self) -> None:
        """Make all lines so far last, as the checkpoint does that comes after them."""
        os.fsync(self._file.fileno())

    def close(self) -> None:
        self._file.close()


class ProgressBar:
    """Rate, loss terms, L0, FVU and dead latents, as means over all dictionaries."""

    def __init__(self, steps: int, step: int, show: bool) -> None:
        self._bar = tqdm(total=steps, initial=step, unit="step", disable=not show)

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
    """Scalars for TensorBoard, below the run's folder."""

    def __init__(self, folder: Path, step: int) -> None:
        module = _import("torch.utils.tensorboard", "tensorboard")
        # Events of steps that the resumed run will do again are hidden by it.
        self._writer = module.SummaryWriter(str(folder / "tensorboard"), purge_step=step + 1)

    def write(self, step: int, common: Mapping[str, float], metrics: Metrics) -> None:
        for name, value in _flat(common, metrics).items():
            self._writer.add_scalar(name, value, step)

    def close(self) -> None:
        self._writer.close()


class Wandb:
    """Scalars for Weights & Biases; a resumed run goes on with the run whose id is in its folder."""

    def __init__(self, folder: Path, step: int, settings: Mapping[str, Any]) -> None:
        module = _import("wandb", "wandb")
        record = folder / "wandb.json"
        identity = files.read_json(record)["id"] if record.exists() else None
        self._run = module.init(
            config=dict(settings), id=identity, resume="allow", name=folder.name
        )
        if identity is None:
            files.write_json(record, {"id": self._run.id})

    def write(self, step: int, common: Mapping[str, float], metrics: Metrics) -> None:
        self._run.log(_flat(common, metrics), step=step)

    def close(self) -> None:
        self._run.finish()


def open_loggers(
    names: Iterable[str], folder: Path | None, step: int, settings: Mapping[str, Any]
) -> list[Logger]:
    """The extra loggers that were asked for."""
    loggers: list[Logger] = []
    for name in names:
        if name not in ("tensorboard", "wandb"):
            hint = did_you_mean(name, ["tensorboard", "wandb"])
            raise InputError(f"unknown logger {name!r}.{hint} Known: tensorboard, wandb.")
        if folder is None:
            raise InputError(f"logging to {name} needs a folder for the run.")
        loggers.append(
            TensorBoard(folder, step) if name == "tensorboard" else Wandb(folder, step, settings)
        )
    return loggers


def _flat(common: Mapping[str, float], metrics: Metrics) -> dict[str, float]:
    flat = dict(common)
    for dictionary, values in metrics.items():
        prefix = f"{dictionary}/" if len(metrics) > 1 else ""
        flat |= {prefix + name: value for name, value in values.items()}
    return flat


def _import(module: str, package: str) -> Any:
    try:
        return importlib.import_module(module)
    except ImportError:
        raise MissingExtraError(
            f"logging to {package} needs the package {package!r}: pip install {package}"
        ) from None


def _step_of(line: bytes) -> float:
    """Of a log line; infinity if it was cut off."""
    try:
        return int(json.loads(line)["step"])
    except (ValueError, KeyError, TypeError):
        return float("inf")
